"""Family C, attention pool: CLIP's `ModifiedResNet` (RN50 ... RN50x64), the paper's Sec. 5.5.

The convolutions run as they always did. `AttentionPool2d` asks with the mean over all patches; this mean token
is the query of every proposal, with the mask as a bias on the patch keys. Of the other keys it sees its own mean
token, as the class token of a ViT sees itself: so a mask without a patch leaves it the mean of the image, which is
finite, and a full mask is plain CLIP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import query_attention
from .base import MaskAware, MaskAwareTower, divide_into_patches, refuse_unknown, swap_class
from .layouts import interpolate_position, patched_copy, prove_frame, prove_pool

SETTINGS = ("interpolation", "threshold")
POOLS = "pools the last feature map of its convolutions"

_STEM = tuple(f"{name}{i}" for i in (1, 2, 3) for name in ("conv", "bn", "act", "relu"))
_LAYERS = ("layer1", "layer2", "layer3", "layer4")
_STRIDE = 32  # of stem and layers


def recognise(visual: Any) -> bool:
    """Whether `visual` is a ResNet with an attention pool."""
    return all(hasattr(visual, name) for name in (*_LAYERS, "attnpool", "avgpool"))


def check(visual: Any, start_layer: int) -> None:
    """Raise ValueError, naming what is unknown, unless `patch` computes exactly this tower."""
    refuse_unknown(visual, (*_STEM, "relu", "avgpool", *_LAYERS, "attnpool"), "the tower")
    pool = visual.attnpool
    refuse_unknown(pool, ("positional_embedding", "q_proj", "k_proj", "v_proj", "c_proj"), "attnpool")
    side, rows = _native_side(pool), len(pool.positional_embedding)
    if rows != 1 + side**2:
        raise ValueError(f"attnpool.positional_embedding has {rows} rows, expected 1 + a square number")
    twin = patched_copy(visual, _ResNetTower)
    twin.attnpool = patched_copy(pool, _AttentionPool)
    prove_pool(twin, (1, pool.k_proj.in_features, side, side), (side, side), "attnpool")
    for name in _LAYERS:
        setattr(twin, name, nn.Identity())
    twin.attnpool = _NoPool()
    prove_frame(twin, (1, 3, _STRIDE * side, _STRIDE * side))


def patch(visual: Any, start_layer: int) -> None:
    """Swap the classes of the tower and of its pool."""
    swap_class(visual, _ResNetTower)
    swap_class(visual.attnpool, _AttentionPool)


def _native_side(pool: Any) -> int:
    return round((len(pool.positional_embedding) - 1) ** 0.5)


class _ResNetTower(MaskAwareTower):
    settings = SETTINGS

    def token_grid(self, images: Tensor) -> tuple[int, int]:
        return divide_into_patches(images, (_STRIDE, _STRIDE))

    def _features(self: Any, images: Tensor) -> tuple[Tensor, ...]:
        x = images.to(self.conv1.weight.dtype)
        for i in ("1", "2", "3"):  # the activation is act1..3 in open_clip, relu1..3 or one relu in OpenAI's
            act = getattr(self, f"act{i}", None) or getattr(self, f"relu{i}", None) or self.relu
            x = act(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = self.avgpool(x)
        for name in _LAYERS:
            x = getattr(self, name)(x)
        return (x,)  # (B, C, h, w)

    def _pool_masks(self: Any, features: tuple[Tensor, ...], on_grid: Tensor) -> Tensor:
        return self.attnpool(features[0], on_grid)

    def _pool_image(self: Any, features: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        return self.attnpool(features[0])


class _AttentionPool(MaskAware):
    settings = ("interpolation",)
    interpolation: str

    def forward(self: Any, x: Tensor, bias: Tensor | None = None, return_cls: bool = True) -> Tensor:
        """Feature map (B, C, h, w) -> (B, D), or (B, N, D) for a bias (B, 1, N, h*w).

        The CLIPs of ZSSeg, FreeSeg and OVSeg give their pool `return_cls`; what False means stays theirs.
        """
        if not return_cls:
            return super().forward(x, bias, return_cls)  # type: ignore[misc]
        grid, side = (x.shape[2], x.shape[3]), _native_side(self)
        if bias is None and grid == (side, side):
            return super().forward(x)  # type: ignore[misc]
        position = interpolate_position(self.positional_embedding, (side, side), grid, self.interpolation)
        patches = rearrange(x, "b c h w -> b (h w) c")
        tokens = torch.cat([patches.mean(1, keepdim=True), patches], dim=1) + position.to(x.dtype)  # (B, 1+hw, C)
        q, k, v = (
            rearrange(_project(layer, t), "b t (h d) -> b h t d", h=self.num_heads)
            for layer, t in ((self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        if bias is None:
            bias = x.new_zeros(len(x), 1, 1, tokens.shape[1] - 1)  # of one proposal, the whole image
            return self.forward(x, bias)[:, 0]
        bias = torch.cat([bias.new_zeros(*bias.shape[:3], 1), bias], dim=-1)  # (B, 1, N, 1+hw): its own mean token
        return _project(self.c_proj, query_attention(q, k, v, bias))  # (B, N, D)


class _NoPool(nn.Identity):
    def forward(self, x: Tensor, *options: Any) -> Tensor:
        return x


def _project(layer: Any, x: Tensor) -> Tensor:
    # As the host, which reads the weights of its layers and never calls them.
    return F.linear(x, layer.weight, layer.bias)
