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
    patch_timm_vit,
)

SETTINGS = ("interpolation",)
POOLS = "averages its last feature map"


def recognise(visual: Any) -> bool:
    """Whether `visual` averages its features."""
    if is_clip_vit(visual):
        return getattr(visual, "attn_pool", None) is None and getattr(visual, "pool_type", "tok") == "avg"
    trunk = getattr(visual, "trunk", None)
    return trunk is not None and _timm_pool(trunk) == "avg"


def check(visual: Any, start_layer: int) -> None:
    """Raise ValueError, naming what is unknown, unless `patch` computes exactly this tower."""
    if is_clip_vit(visual):
        check_clip_vit(visual)
        return
    trunk = visual.trunk
    refuse_unknown(visual.head, ("drop", "proj", "mlp"), "head")
    if getattr(trunk, "attn_pool", None) is not None:
        raise ValueError("trunk has an attention pool beside its average, which is unknown here")
    if hasattr(trunk, "_pos_embed"):
        check_timm_vit(trunk)
        if trunk.num_prefix_tokens:
            raise ValueError(f"trunk averages its patches beside {trunk.num_prefix_tokens} tokens without a place")
    elif not getattr(trunk, "feature_info", None):
        raise ValueError(f"trunk ({type(trunk).__name__}) has no feature_info, which tells its stride")


def patch(visual: Any, start_layer: int) -> None:
    """Swap the classes of the tower and of what takes other sizes."""
    if is_clip_vit(visual):
        swap_class(visual, _ClipTower)
    elif hasattr(visual.trunk, "_pos_embed"):
        patch_timm_vit(visual, _TimmViTTower)
    else:
        swap_class(visual, _TimmMapTower)


def _timm_pool(trunk: Any) -> str | None:
    pool = getattr(trunk, "global_pool", None)
    if isinstance(pool, str):
        return pool
    return getattr(getattr(trunk.head, "global_pool", None), "pool_type", None)


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
        return self._pool_image((means.flatten(0, 1)[:, None],), (1, 1)).unflatten(
            0, means.shape[:2]
        )  # each its own patch


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

    def _patches(self: Any, features: Tensor) -> Tensor:
        nhwc = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"
        return rearrange(features, "b h w c -> b (h w) c" if nhwc else "b c h w -> b (h w) c")

    def _head(self: Any, means: Tensor) -> Tensor:
        nhwc = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"
        single = rearrange(means, "b n c -> (b n) 1 1 c" if nhwc else "b n c -> (b n) c 1 1")  # a map of one cell each
        return self._pool_image((single,), (1, 1)).unflatten(0, means.shape[:2])
