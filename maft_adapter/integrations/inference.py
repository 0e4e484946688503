"""What the shims share: recognising a host, the CLIP's input, the mask-aware classifier.

ZSSeg, FreeSeg and OVSeg classify proposals in a module that all call `MaskFormerClipAdapter`; `MaskAwareRegions` is
mixed into it. Nothing here imports a host or detectron2.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..adapt import make_mask_aware, restore
from ..towers.base import MaskAware, restore_class, swap_class


def check_host(model: Any, expected: str) -> None:
    """Refuse anything but the built model of the host `expected`, by what it holds, not by its name.

    Args:
        model: what the host's `build_model(cfg)` returned.
        expected: "zegformer", "zsseg", "freeseg" or "ovseg".

    Raises:
        TypeError: another host's model, none at all, or a parallel wrapper around one.
    """
    name = type(model).__name__
    if isinstance(getattr(model, "module", None), nn.Module):
        raise TypeError(f"{name} is a parallel wrapper; patch before wrapping, or pass its .module")
    found: str | None
    if hasattr(model, "region_clip_adapter"):
        found = "freeseg" if hasattr(model, "task_names") else "zsseg"
    elif hasattr(model, "clip_adapter"):
        found = "ovseg"
    else:
        found = "zegformer" if hasattr(model, "clip_classification") else None
    if found is None:
        raise TypeError(
            f"{name} is no model of ZegFormer, ZSSeg, FreeSeg or OVSeg; pass what their build_model(cfg) returns"
        )
    if found != expected:
        raise TypeError(f"{name} is a model of {found}, not of {expected}; use maft_adapter.integrations.{found}")


@dataclass(frozen=True)
class ClipInput:
    """How a host's images become the mask-aware CLIP's input: padded as the host pads them, then resized.

    Attributes:
        size: side in pixels of the square that the padded image is squashed to (the paper's 480).
        keep_aspect_ratio: instead, make the shorter side `size` and round the longer one to the patch size.
        divisor: the host's `size_divisibility`; 0 and 1 pad to the largest image only.
        patch_size: of the tower; `size` must be a multiple of it.

    Raises:
        ValueError: `size` is no positive multiple of `patch_size`.

    Example:
        >>> ClipInput(divisor=32, patch_size=16)([torch.zeros(3, 100, 200)]).shape
        torch.Size([1, 3, 480, 480])
        >>> ClipInput(divisor=32, patch_size=16, keep_aspect_ratio=True)([torch.zeros(3, 100, 200)]).shape
        torch.Size([1, 3, 480, 832])
    """

    divisor: int
    patch_size: int
    size: int = 480
    keep_aspect_ratio: bool = False

    def __post_init__(self) -> None:
        if self.size <= 0 or self.size % self.patch_size:
            size, patch = self.size, self.patch_size
            nearest = max(1, round(size / patch)) * patch
            raise ValueError(
                f"size is {size}, expected a multiple of the patch size {patch}; take {nearest} "
                "(MODEL.MAFT.SIZE for train_net.py)"
            )

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Images (3, h, w), normalised as CLIP's -> (B, 3, H, W), bilinear as the authors resize."""
        padded = self.pad(images)  # (B, 3, H', W')
        size = (self.size, self.size)
        if self.keep_aspect_ratio:
            scale = self.size / min(padded.shape[-2:])
            height, width = (round(side * scale / self.patch_size) * self.patch_size for side in padded.shape[-2:])
            size = height, width
        return F.interpolate(padded, size=size, mode="bilinear", align_corners=False)  # (B, 3, H, W)

    def pad(self, tensors: Sequence[Tensor]) -> Tensor:
        """(c, h, w) tensors -> (B, c, H, W), filled up with 0 at the right and the bottom as detectron2 does."""
        divisor = max(self.divisor, 1)
        height, width = (-(-max(t.shape[dim] for t in tensors) // divisor) * divisor for dim in (-2, -1))
        return torch.stack([F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2])) for t in tensors])


def clip_patch_size(visual: Any) -> int:
    """Pixels that one token of OpenAI's image towers covers: a ViT's patch, 32 for a ResNet."""
    return int(visual.conv1.stride[0]) if hasattr(visual, "class_embedding") else 32


def region_adapter(model: Any) -> Any:
    """The module of ZSSeg, FreeSeg or OVSeg that classifies proposals; the first two may keep another beside it."""
    return getattr(model, "region_clip_adapter", model.clip_adapter)


@contextlib.contextmanager
def without_mask_prompts(visual: Any) -> Iterator[Any]:
    """Take out of OVSeg's image tower what OpenAI's lacks, and put it back in the end; other towers stay as they are.

    Its mask prompts stand in for what lies outside of one proposal, so that no pass for many proposals can use them. A
    tower that holds them is refused by `make_mask_aware`, `trainable_parameters` and other towers of the same weights.
    Its `grid_size` is a number where open_clip's is a pair, which would look like another tower's in a file.

    Args:
        visual: OVSeg's tower, mask-aware or not.

    Yields:
        `visual`, for as long as the block runs.

    Example:
        >>> tower = nn.Linear(1, 1)
        >>> tower.mask_pool, tower.mask_embedding = nn.AvgPool2d(16), nn.Parameter(torch.zeros(3, 49, 768))
        >>> tower.grid_size = 7
        >>> with without_mask_prompts(tower):
        ...     list(tower.state_dict())
        ['weight', 'bias']
        >>> list(tower.state_dict())
        ['weight', 'bias', 'mask_embedding']
    """
    names = ("mask_pool", "mask_embedding", "grid_size") if hasattr(visual, "mask_embedding") else ()
    own = {name: getattr(visual, name) for name in names}
    for name in own:
        delattr(visual, name)
    try:
        yield visual
    finally:
        for name, part in own.items():
            setattr(visual, name, part)


def load_visual(visual: Any, path: str | os.PathLike[str]) -> None:
    """`maft_adapter.checkpoint.load_visual`, also for OVSeg's tower: mask prompts are read if the file has some."""
    lacks = hasattr(visual, "mask_embedding") and "mask_embedding" not in checkpoint.visual_weights(path)
    with without_mask_prompts(visual) if lacks else contextlib.nullcontext():
        checkpoint.load_visual(visual, path)


class Regions(NamedTuple):
    """An image and the proposals to classify, in place of the host's crops."""

    image: Tensor  # (3, h, w), normalised
    masks: Tensor  # (n, h, w) in [0, 1]


class MaskAwareRegions(MaskAware):
    """Mixed into the `MaskFormerClipAdapter` of ZSSeg, FreeSeg and OVSeg: one IP-CLIP pass instead of crops.

    The adapter's own `forward` still runs, and with it its text features, background embedding and temperature;
    the two of its methods that made and encoded crops are replaced. The host's MASK_THR still says which proposals
    are valid and which of their pixels count.
    """

    settings = ("clip_input",)
    clip_input: ClipInput

    def _preprocess_image(self: Any, image: Tensor, mask: Tensor, normalize: bool = True) -> Any:
        valid = (mask > self.mask_thr).flatten(1).any(-1)  # (N,)
        if not valid.any():
            return None, valid
        image = image.to(mask.dtype)  # (3, h, w)
        if normalize:
            image = (image - self.pixel_mean[0]) / self.pixel_std[0]
        return Regions(image, mask[valid]), valid

    def get_image_features(self: Any, image: Any, *args: Any) -> Tensor:
        if not isinstance(image, Regions):
            return super().get_image_features(image, *args)  # type: ignore[misc]
        visual = self.clip_model.visual
        images = self.clip_input([image.image]).to(visual.conv1.weight.dtype)  # (1, 3, H, W)
        masks = self.clip_input.pad([image.masks])  # (1, n, H', W'); padding lies in no proposal
        features = visual(images, masks)[0]  # (n, D)
        return features / features.norm(dim=-1, keepdim=True)


def patch_regions(
    model: Any, host: str, mixin: type[MaskAwareRegions], start_layer: int, size: int, keep_aspect_ratio: bool
) -> Any:
    """`patch` of ZSSeg, FreeSeg and OVSeg; see there."""
    check_host(model, host)
    adapter = region_adapter(model)
    visual = adapter.clip_model.visual
    if not model.clip_ensemble:
        raise ValueError(f"{host} never asks CLIP here: build it with MODEL.CLIP_ADAPTER.CLIP_ENSEMBLE True")
    clip_input = ClipInput(model.size_divisibility, clip_patch_size(visual), size, keep_aspect_ratio)
    with without_mask_prompts(visual):
        make_mask_aware(visual, start_layer, threshold=adapter.mask_thr)
    if not isinstance(adapter, MaskAwareRegions):
        swap_class(adapter, mixin)
    adapter.clip_input = clip_input
    return model


def unpatch_regions(model: Any, host: str) -> Any:
    """`unpatch` of ZSSeg, FreeSeg and OVSeg; see there."""
    check_host(model, host)
    adapter: Any = region_adapter(model)
    if not isinstance(adapter, MaskAwareRegions):
        raise ValueError(f"{type(model).__name__} is not patched: there is nothing to undo")
    if isinstance(model, MaskAware):
        restore_class(model)
    restore_class(adapter)
    restore(region_adapter(model).clip_model.visual)
    return model
