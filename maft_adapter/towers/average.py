"""Family D, average: the mean over the last feature map becomes a mean over each mask, as in FC-CLIP and MAFT+.

ConvNeXt, FastViT (MobileCLIP), ViTamin, Swin and other timm towers with average pooling inside open_clip's
`TimmModel`, and open_clip's own ViT with average pooling (CLIPA). The features are the tower's own, and so are the
norm and head after the mean. Each cell counts by the share of it that lies inside the mask; an empty mask is the
mean of the whole map, so that it stays finite.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..masks import mean_weights
from .base import MaskAwareTower, divide_into_patches, refuse_unknown, swap_class
from .layouts import (
    PoolingOpenClipViT,
    PoolingTimm,
    PoolingTimmViT,
    check_clip_vit,
    check_timm_vit,
    is_clip_vit,
    meta_copy,
    patch_timm_vit,
    patched_copy,
    prove_clip_vit,
    prove_frame,
    prove_pool,
    prove_timm_vit,
    shallow_copy,
    timm_trunk,
)

SETTINGS = ("interpolation",)
POOLS = "averages its last feature map"

_CELLS = (2, 3)  # that a proof runs on where any will do


def recognise(visual: Any) -> bool:
    """Whether `visual` averages its features."""
    if is_clip_vit(visual):
        return getattr(visual, "attn_pool", None) is None and getattr(visual, "pool_type", "tok") == "avg"
    trunk = timm_trunk(visual)
    return trunk is not None and _timm_pool(trunk) in ("avg", "fast", "fastavg")


def check(visual: Any, start_layer: int) -> None:
    """Raise ValueError, naming what is unknown, unless `patch` computes exactly this tower."""
    if is_clip_vit(visual):
        check_clip_vit(visual)
        tokens = (1, 1 + _CELLS[0] * _CELLS[1], visual.class_embedding.shape[-1])
        prove_pool(patched_copy(visual, _ClipTower), tokens, _CELLS, "the tower's average")
        prove_clip_vit(visual, _ClipTower)
        return
    trunk = visual.trunk
    refuse_unknown(visual.head, ("drop", "proj", "mlp"), "head")
    if getattr(trunk, "attn_pool", None) is not None:
        raise ValueError("trunk has an attention pool beside its average, which is unknown here")
    where = f"trunk ({type(trunk).__name__})"
    if hasattr(trunk, "_pos_embed") or hasattr(trunk, "embeds"):
        check_timm_vit(trunk)
        if trunk.num_prefix_tokens:
            raise ValueError(f"trunk averages its patches beside {trunk.num_prefix_tokens} tokens without a place")
        tokens = (1, _CELLS[0] * _CELLS[1], trunk.num_features)
        prove_pool(patched_copy(visual, _TimmViTTower), tokens, _CELLS, where)
        prove_timm_vit(visual, _TimmViTTower)
    else:
        shape, grid = _check_map(visual)
        # Not on the tower's own grid, which may be one cell, whose maximum is its mean.
        features = (1, *_CELLS, shape[3]) if _is_nhwc(trunk) else (1, shape[1], *_CELLS)
        prove_pool(patched_copy(visual, _TimmMapTower), features, _CELLS, where)
        _prove_map(visual, shape, grid)


def patch(visual: Any, start_layer: int) -> None:
    """Swap the classes of the tower and of what takes other sizes."""
    if is_clip_vit(visual):
        swap_class(visual, _ClipTower)
    elif hasattr(visual.trunk, "_pos_embed"):
        patch_timm_vit(visual, _TimmViTTower)
    else:
        swap_class(visual, _TimmMapTower)


def _timm_pool(trunk: Any) -> str | None:
    for holder in (trunk, getattr(trunk, "head", None)):
        pool = getattr(holder, "global_pool", getattr(holder, "pool_type", None))
        pool = getattr(pool, "pool_type", pool)  # of a module
        if isinstance(pool, str):
            return pool
    return None


def _check_map(visual: Any) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Shape of the last feature map of one image, and its token grid; ValueError if there is no such map."""
    trunk, name = visual.trunk, type(visual.trunk).__name__
    if not getattr(trunk, "feature_info", None):
        raise ValueError(f"trunk ({name}) has no feature_info, which tells its stride")
    stride = trunk.feature_info[-1]["reduction"]
    height, width = (-(-side // stride) * stride for side in visual.image_size)
    like = next(trunk.parameters())
    try:
        with torch.no_grad():
            image = torch.empty(1, 3, height, width, dtype=like.dtype, device="meta")
            features = meta_copy(trunk).forward_features(image)
    except Exception as error:
        size, said = f"{height}x{width}", f"{type(error).__name__}: {error}"
        raise ValueError(
            f"trunk ({name}) takes no images of {size} ({said}); build it for a size that its stride {stride} divides"
        ) from error
    shape = tuple(getattr(features, "shape", ()))  # some give a list
    grid = height // stride, width // stride
    if len(shape) != 4 or (shape[1:3] if _is_nhwc(trunk) else shape[2:]) != grid:
        given = f"features of {shape[1:]}" if shape else f"a {type(features).__name__}"
        raise ValueError(
            f"trunk ({name}) turns images of {height}x{width} into {given}; masks need a map of {grid[0]}x{grid[1]} "
            f"cells, as its stride of {stride} says, to know which of them lie inside: not supported"
        )
    return shape, grid


def _prove_map(visual: Any, shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    """`prove_frame` of a trunk whose features are of `shape`, without computing them."""
    twin = patched_copy(visual, _TimmMapTower)
    twin.trunk = shallow_copy(visual.trunk)
    like = next(visual.trunk.parameters())
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    twin.trunk.forward_features = lambda images: (images[0, 0, 0, 0] + features).sin()
    stride = visual.trunk.feature_info[-1]["reduction"]
    prove_frame(twin, (1, 3, stride * grid[0], stride * grid[1]))


def _is_nhwc(trunk: Any) -> bool:
    return getattr(trunk, "output_fmt", "NCHW") == "NHWC"


class _AverageTower(MaskAwareTower):
    """What the hosts share: the mean over each mask, of what the tower averages."""

    settings = SETTINGS

    def valid_masks(self, masks: Tensor, grid: tuple[int, int], seen: tuple[float, float]) -> Tensor:
        rows, columns = (math.ceil(size * share) for size, share in zip(masks.shape[2:], seen, strict=True))
        return masks[..., :rows, :columns].flatten(2).any(-1)  # (B, N)

    def _on_grid(self, masks: Tensor, grid: tuple[int, int], seen: tuple[float, float], dtype: torch.dtype) -> Tensor:
        return mean_weights(masks, grid, seen).to(dtype)  # (B, N, h*w)

    def _pool_masks(self, features: tuple[Tensor, ...], on_grid: Tensor) -> Tensor:
        return self._head(on_grid @ self._patches(features[0]))  # (B, N, D)

    def _patches(self, features: Tensor) -> Tensor:
        """Features -> (B, hw, C), row after row."""
        raise NotImplementedError

    def _head(self, means: Tensor) -> Tensor:
        """Means (B, N, C) -> embeddings (B, N, D)."""
        raise NotImplementedError


class _ClipTower(PoolingOpenClipViT, _AverageTower):
    def _patches(self: Any, features: Tensor) -> Tensor:
        return (features if self.final_ln_after_pool else self.ln_post(features))[:, 1:]

    def _head(self: Any, means: Tensor) -> Tensor:
        return self._project(self.ln_post(means) if self.final_ln_after_pool else means)


class _TimmViTTower(PoolingTimmViT, _AverageTower):
    def _patches(self, features: Tensor) -> Tensor:
        return features

    def _head(self: Any, means: Tensor) -> Tensor:
        single = means.flatten(0, 1)[:, None]  # (B*N, 1, C): each the only patch of an image of its own
        return self._pool_image((single,), (1, 1)).unflatten(0, means.shape[:2])


class _TimmMapTower(PoolingTimm, _AverageTower):
    def plain(self: Any, images: Tensor, **options: Any) -> Any:
        return super(MaskAwareTower, self).forward(images, **options)  # type: ignore[misc]  # every size as before

    def token_grid(self: Any, images: Tensor) -> tuple[int, int]:
        embed: Any = getattr(self.trunk, "patch_embed", None)
        if getattr(embed, "strict_img_size", False) and tuple(images.shape[2:]) != tuple(embed.img_size):
            raise ValueError(
                f"images are {tuple(images.shape)}, but the windows of {type(self.trunk).__name__} are made for "
                f"{embed.img_size}; call visual.set_input_size((H, W)) before"
            )
        stride = self.trunk.feature_info[-1]["reduction"]
        return divide_into_patches(images, (stride, stride))

    def _features(self: Any, images: Tensor) -> tuple[Tensor, ...]:
        (features,) = super()._features(images)  # (B, C, h, w) or (B, h, w, C)
        (h, w), grid = features.shape[1:3] if _is_nhwc(self.trunk) else features.shape[2:], self.token_grid(images)
        if (h, w) != grid:
            raise ValueError(f"trunk gives a map of {h}x{w} cells, expected {grid[0]}x{grid[1]}; resize the images")
        return (features,)

    def _patches(self: Any, features: Tensor) -> Tensor:
        return rearrange(features, "b h w c -> b (h w) c" if _is_nhwc(self.trunk) else "b c h w -> b (h w) c")

    def _head(self: Any, means: Tensor) -> Tensor:
        # A map of one cell each.
        single = rearrange(means, "b n c -> (b n) 1 1 c" if _is_nhwc(self.trunk) else "b n c -> (b n) c 1 1")
        return self._pool_image((single,), (1, 1)).unflatten(0, means.shape[:2])
