"""OVSeg (facebookresearch/ov-seg) with a mask-aware CLIP, without editing its files; see README.md beside this."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from maft_adapter.integrations.inference import (
    MaskAwareRegions,
    load_visual,
    patch_regions,
    unpatch_regions,
    without_mask_prompts,
)
from maft_adapter.integrations.stage2 import Host, TrainingBatch, region_batch
from maft_adapter.integrations.stage2 import add_maft_config as _add_maft_config

__all__ = ["HOST", "add_maft_config", "load_visual", "patch", "unpatch", "visual", "without_mask_prompts"]


class _OVSegRegions(MaskAwareRegions):
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Tensor]:
        # Without a valid proposal OVSeg gives two values where its caller takes three.
        logits, *crops, valid = super().forward(*args, **kwargs)  # type: ignore[misc]
        return logits, crops[0] if crops else None, valid

    def _preprocess_image(self: Any, image: Tensor, mask: Tensor, normalize: bool = True) -> Any:
        regions, valid = super()._preprocess_image(image, mask, normalize)
        return (regions, None), None, valid  # without crops as a picture, and without masks for the mask prompts


def patch(model: Any, start_layer: int = 8, size: int = 480, keep_aspect_ratio: bool = False) -> Any:
    """Classify the proposals of a built `OVSeg` or `OVSegDEMO` by one mask-aware CLIP pass an image, in place.

    `clip_adapter` no longer crops, and its mask prompts rest; its templates, background embedding and temperature,
    which proposals are valid and the ensemble stay OVSeg's own code. state_dict keys do not change, so this may come
    before or after weights are loaded. A second call only changes the settings.

    Args:
        model: what OVSeg's `build_model(cfg)` returned, with `MODEL.CLIP_ADAPTER.CLIP_ENSEMBLE True`.
        start_layer: L, see `maft_adapter.make_mask_aware`; 16 for ViT-L/14.
        size: the image, padded to a multiple of `size_divisibility`, is squashed to a square of this many pixels; 476
            for ViT-L/14.
        keep_aspect_ratio: instead, its shorter side becomes `size`.

    Returns:
        `model`.

    Raises:
        TypeError: another host's model, or a parallel wrapper.
        ValueError: CLIP is switched off, an unsupported tower or start layer, or a size that the patch size does not
            divide. Nothing has been changed then.
    """
    return patch_regions(model, "ovseg", _OVSegRegions, start_layer, size, keep_aspect_ratio)


def unpatch(model: Any) -> Any:
    """Undo `patch`, and stage 2 where it was prepared: the outputs are bit-identical to before. Returns `model`.

    What stage 2 froze stays frozen.

    Raises:
        TypeError: another host's model.
        ValueError: the model is not patched.
    """
    return unpatch_regions(model, "ovseg")


def visual(model: Any) -> Any:
    """The image tower that classifies proposals, with its mask prompts; see `without_mask_prompts`."""
    return model.clip_adapter.clip_model.visual


def add_maft_config(cfg: Any, config_file: str | os.PathLike[str] | None = None) -> None:
    """The alternative to the launcher, for those who edit train_net.py.

    Args:
        cfg: the host's, with its own keys declared; changed in place.
        config_file: put this call in place of `cfg.merge_from_file(config_file)`. Without it `cfg` is taken as merged
            already, which does not work with a config.yaml that stage 2 has written.
    """
    _add_maft_config(cfg, HOST, config_file)


def _training_batch(model: Any, batched_inputs: list[dict[str, Any]]) -> TrainingBatch:
    names = model.get_class_name_list(batched_inputs[0]["meta"]["dataset_name"])
    return region_batch(
        model,
        batched_inputs,
        head=lambda features: model.sem_seg_head(features),
        text=model.clip_adapter.get_text_features(names),
        ground_truth="instances",
        align_corners=False,
    )


HOST = Host("ovseg", patch, visual, _training_batch)
