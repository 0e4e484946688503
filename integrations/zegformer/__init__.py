"""ZegFormer (dingjiansw101/ZegFormer) with a mask-aware CLIP, without editing its files; see README.md beside this.

Notation: B images, N proposals an image, K classes, D the embedding's width. A^p are the class scores of the proposal
generator, A^c those of CLIP.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maft_adapter import encode_masks, make_mask_aware, restore
from maft_adapter.checkpoint import load_visual
from maft_adapter.integrations.inference import ClipInput, check_host, clip_patch_size
from maft_adapter.integrations.stage2 import Host, TrainingBatch
from maft_adapter.integrations.stage2 import add_maft_config as _add_maft_config
from maft_adapter.towers.base import MaskAware, restore_class, swap_class

__all__ = ["HOST", "add_maft_config", "load_visual", "patch", "unpatch", "visual"]

# The ensemble's lambda, a constant in the host's forward.
_LAMBDA = 2 / 3


def patch(model: Any, start_layer: int = 8, size: int = 480, keep_aspect_ratio: bool = False) -> Any:
    """Classify the proposals of a built ZegFormer by one mask-aware CLIP pass, in place.

    The host's `forward` runs as it is, except for its merge-and-crop classifier, which it skips: A^c comes from the
    whole image and `sem_seg_head.predictor.clip_model.visual`. Prompts, temperature, the background logit taken from
    A^p, `ENSEMBLING`, `ENSEMBLING_ALL_CLS`, neither of them, `GZERO_CALIBRATE` and both values of
    `SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE` mean what they meant. As before there is no validity flag: an empty
    proposal is classified, too. `CLIP_CLS_STYLE`, the way to crop, has no meaning any more. The forward for training
    stays the host's.

    state_dict keys do not change, so this may come before or after weights are loaded. A second call only changes the
    settings. While patched, `model.clip_classification` is False.

    Args:
        model: what ZegFormer's `build_model(cfg)` returned with `MODEL.SEM_SEG_HEAD.CLIP_CLASSIFICATION True` and a
            ViT as CLIP, which may be in float16 (as ZegFormer loads it) or float32.
        start_layer: L, see `maft_adapter.make_mask_aware`.
        size: the image, padded to a multiple of `size_divisibility`, is squashed to a square of this many pixels.
        keep_aspect_ratio: instead, its shorter side becomes `size`.

    Returns:
        `model`.

    Raises:
        TypeError: another host's model, or a parallel wrapper.
        ValueError: no CLIP is attached or it is a ResNet, both ensembles are set, an unsupported tower or start layer,
            or a size that the patch size does not divide. Nothing has been changed then.
    """
    check_host(model, "zegformer")
    patched = isinstance(model, _MaskAwareZegFormer)
    predictor = model.sem_seg_head.predictor
    if not patched and not (model.clip_classification and hasattr(predictor, "clip_model")):
        raise ValueError(
            "no CLIP is attached to this ZegFormer; build it with MODEL.SEM_SEG_HEAD.CLIP_CLASSIFICATION True, "
            "as its *_gzss_eval.yaml configs do"
        )
    if not hasattr(predictor, "text_features_test_clip"):
        raise ValueError("CLIP has no text embeddings; build ZegFormer with MODEL.SEM_SEG_HEAD.WORDVEC False")
    if model.ensembling and model.ensembling_all_cls:
        raise ValueError("ENSEMBLING and ENSEMBLING_ALL_CLS are both set; ZegFormer takes one of them or none")
    tower = visual(model)
    if not hasattr(tower, "class_embedding"):
        raise ValueError(
            f"CLIP is a {type(tower).__name__}, with which ZegFormer's own classifier does not run either; build it "
            "with a ViT in MODEL.SEM_SEG_HEAD.CLIP_PRETRAINED"
        )
    clip_input = ClipInput(model.size_divisibility, clip_patch_size(tower), size, keep_aspect_ratio)
    make_mask_aware(tower, start_layer)
    if not patched:
        swap_class(model, _MaskAwareZegFormer)
        model.clip_classification = False  # the host then skips its crops and calls semantic_inference
        model.embeddings = []
    model.clip_input = clip_input
    return model


def unpatch(model: Any) -> Any:
    """Undo `patch`, and stage 2 where it was prepared: the outputs are bit-identical to before. Returns `model`.

    Weights stay what they are, and what stage 2 froze stays frozen. It made them float32, which the host's own
    classifier refuses: its `mask_former.third_party.model.convert_weights(clip_model)` brings float16 back.

    Raises:
        TypeError: another host's model.
        ValueError: the model is not patched.
    """
    check_host(model, "zegformer")
    if not isinstance(model, _MaskAwareZegFormer):
        raise ValueError(f"{type(model).__name__} is not patched: there is nothing to undo")
    while isinstance(model, MaskAware):
        restore_class(model)
    restore(visual(model))
    model.clip_classification = True
    return model


def visual(model: Any) -> Any:
    """The image tower that classifies proposals."""
    return model.sem_seg_head.predictor.clip_model.visual


def add_maft_config(cfg: Any, config_file: str | os.PathLike[str] | None = None) -> None:
    """The alternative to the launcher, for those who edit train_net.py.

    Args:
        cfg: the host's, with its own keys declared; changed in place.
        config_file: put this call in place of `cfg.merge_from_file(config_file)`. Without it `cfg` is taken as merged
            already, which does not work with a config.yaml that stage 2 has written.
    """
    _add_maft_config(cfg, HOST, config_file)


class _MaskAwareZegFormer(MaskAware):
    """Mixed in before ZegFormer's `MaskFormer`; the embeddings of a call wait in a list for `semantic_inference`."""

    settings = ("clip_input", "embeddings")

    def forward(self: Any, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        if self.training:
            return super().forward(batched_inputs)  # type: ignore[misc]

        def embed(head: nn.Module, arguments: Any, outputs: dict[str, Tensor]) -> None:
            # Here the masks are still those of the padded image, whatever the host makes of them afterwards.
            images, masks = _clip_images(self, batched_inputs), _proposals(self, batched_inputs, outputs)
            with torch.no_grad():
                embeddings = encode_masks(self.sem_seg_head.predictor.clip_model, images, masks)  # (B, N, D)
            self.embeddings = list(embeddings)

        handle = self.sem_seg_head.register_forward_hook(embed)
        try:
            return super().forward(batched_inputs)  # type: ignore[misc]
        finally:
            handle.remove()
            self.embeddings = []

    def semantic_inference(self: Any, mask_cls: Tensor, mask_pred: Tensor) -> Tensor:
        """The host calls this for one image after the other.

        Args:
            mask_cls: (N, K+1) logits of A^p, the last one of the background.
            mask_pred: (N, H, W) mask logits.

        Returns:
            (K, H, W) class scores of the pixels.
        """
        return self.semantic_inference2(_class_scores(self, mask_cls, self.embeddings.pop(0)), mask_pred)


def _clip_images(model: Any, batched_inputs: Sequence[dict[str, Any]]) -> Tensor:
    """The images of a batch as the mask-aware CLIP wants them -> (B, 3, S, S) in its dtype."""
    mean, std = model.clip_pixel_mean, model.clip_pixel_std
    images = model.clip_input([(x["image"].to(model.device) - mean) / std for x in batched_inputs])  # (B, 3, S, S)
    return images.to(visual(model).conv1.weight.dtype)


def _proposals(model: Any, batched_inputs: Sequence[dict[str, Any]], outputs: dict[str, Tensor]) -> Tensor:
    """The head's mask logits (B, N, h, w) at the size of the padded batch -> (B, N, H, W) in [0, 1]."""
    size = model.clip_input.pad([x["image"] for x in batched_inputs]).shape[-2:]
    return F.interpolate(outputs["pred_masks"], size=size, mode="bilinear", align_corners=False).sigmoid()


def _class_scores(model: Any, mask_cls: Tensor, embeddings: Tensor) -> Tensor:
    """Logits of A^p (N, K+1) and embeddings (N, D) -> (N, K) scores, combined as the configuration says."""
    predictor = model.sem_seg_head.predictor
    features = embeddings / embeddings.norm(dim=-1, keepdim=True)  # (N, D)
    # In CLIP's own precision, as the host: in float16 that rounds the logits to steps of 1/64.
    scale = predictor.clip_model.logit_scale.exp().to(features.dtype)
    text = predictor.text_features_test_clip.to(features.dtype)  # (K, D)
    logits = torch.cat([(scale * features @ text.T).float(), mask_cls[:, -1:]], dim=1)  # (N, K+1)
    clip_scores = logits.softmax(dim=-1)[:, :-1]  # (N, K)
    if model.ensembling_all_cls:
        weight = torch.full_like(clip_scores[0], _LAMBDA)  # (K,) of CLIP
    elif model.ensembling:
        seen, unseen = model.seen_indexes, model.unseen_indexes
        clip_scores[:, seen] = clip_scores[:, seen].mean(dim=1, keepdim=True)
        weight = torch.zeros_like(clip_scores[0])  # (K,); TEST_CLASS_JSON may list more classes: they keep A^p
        weight[seen], weight[unseen] = 1 - _LAMBDA, _LAMBDA
    else:
        return clip_scores
    return mask_cls.softmax(dim=-1)[:, :-1] ** (1 - weight) * clip_scores**weight


def _training_batch(model: Any, batched_inputs: list[dict[str, Any]]) -> TrainingBatch:
    raw = [(x["image"].to(model.device) - model.pixel_mean) / model.pixel_std for x in batched_inputs]
    padded = model.clip_input.pad(raw)  # (B, 3, H, W)
    outputs = model.sem_seg_head(model.backbone(padded), None, None)
    instances = [x["instances"].to(model.device) for x in batched_inputs]
    targets = model.prepare_targets(instances, SimpleNamespace(tensor=padded))
    predictor = model.sem_seg_head.predictor
    return TrainingBatch(
        images=_clip_images(model, batched_inputs),
        masks=_proposals(model, batched_inputs, outputs),
        targets=[target["masks"] for target in targets],
        labels=[target["labels"] for target in targets],
        text=predictor.text_features_clip,
        logit_scale=float(predictor.clip_model.logit_scale.detach().exp()),
    )


def _configure(cfg: Any) -> None:
    cfg.MODEL.SEM_SEG_HEAD.CLIP_CLASSIFICATION = True  # the configs of stage 1 attach no CLIP


HOST = Host("zegformer", patch, visual, _training_batch, _configure)
