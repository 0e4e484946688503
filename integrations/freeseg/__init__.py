"""FreeSeg (bytedance/FreeSeg) with a mask-aware CLIP, without editing its files; see README.md beside this."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from maft_adapter.checkpoint import load_visual
from maft_adapter.integrations.inference import MaskAwareRegions, patch_regions, unpatch_regions
from maft_adapter.integrations.stage2 import Host, TrainingBatch, region_batch
from maft_adapter.integrations.stage2 import add_maft_config as _add_maft_config

__all__ = ["HOST", "add_maft_config", "load_visual", "patch", "unpatch", "visual"]


class _FreeSegRegions(MaskAwareRegions):
    def load_state_dict(self: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        # train_net.py --eval-only copies `clip_adapter` over a separate region adapter, fine-tuned tower included.
        own = self.clip_model.visual.state_dict(prefix="clip_model.visual.")
        return super().load_state_dict({**state_dict, **own}, *args, **kwargs)  # type: ignore[misc]


def patch(model: Any, start_layer: int = 8, size: int = 480, keep_aspect_ratio: bool = False) -> Any:
    """Classify the proposals of a built `OpenVocabulary` model by one mask-aware CLIP pass each time FreeSeg asks.

    That is once an image for each of semantic, instance and panoptic inference. `region_clip_adapter` no longer
    crops; its prompts, background embedding and temperature, which proposals are valid, the ensemble and the
    seen / unseen flags stay FreeSeg's own code. state_dict keys do not change, so this may come before or after
    weights are loaded. A second call only changes the settings.

    Args:
        model: what FreeSeg's `build_model(cfg)` returned, with `MODEL.CLIP_ADAPTER.CLIP_ENSEMBLE True`.
        start_layer: L, see `maft_adapter.make_mask_aware`.
        size: the image, padded to a multiple of `size_divisibility`, is squashed to a square of this many pixels.
        keep_aspect_ratio: instead, its shorter side becomes `size`.

    Returns:
        `model`.

    Raises:
        TypeError: another host's model, or a parallel wrapper.
        ValueError: CLIP is switched off, an unsupported tower or start layer, or a size that the patch size does not
            divide. Nothing has been changed then.
    """
    return patch_regions(model, "freeseg", _FreeSegRegions, start_layer, size, keep_aspect_ratio)


def unpatch(model: Any) -> Any:
    """Undo `patch`, and stage 2 where it was prepared: the outputs are bit-identical to before. Returns `model`.

    What stage 2 froze stays frozen.

    Raises:
        TypeError: another host's model.
        ValueError: the model is not patched.
    """
    return unpatch_regions(model, "freeseg")


def visual(model: Any) -> Any:
    """The image tower that classifies proposals; with `SEPERATE_ADAPTER True` the model keeps two CLIPs."""
    return model.region_clip_adapter.clip_model.visual


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
    # Not region_clip_adapter's: FreeSeg trains this one's prompts, and --eval-only copies them over the other's.
    text = model.clip_adapter.get_text_features(names, "semantic segmentation.")  # (K+1, D)
    return region_batch(
        model,
        batched_inputs,
        head=lambda features: model.sem_seg_head(features, text)[0],
        text=text,
        ground_truth="sem_instances",
        align_corners=True,
    )


HOST = Host("freeseg", patch, visual, _training_batch)
