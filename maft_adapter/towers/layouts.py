"""Layouts of towers: what those of one host share across the families, and images of any size for its ViTs.

The mixins interpolate the position embedding to the images' token grid inside the host's own forward, so that
everything which the host builds on it (intermediate features, pooling, extra outputs) holds for other sizes, too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .base import MaskAware, MaskAwareTower, divide_into_patches, refuse_unknown, share_seen, swap_class

# All that is read of a CLIP ViT, children and parameters alike.
_CLIP_VIT = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post", "proj")
INTERPOLATIONS: dict[str, dict[str, Any]] = {
    "maft": {"mode": "bicubic", "align_corners": True},
    "open_clip": {"mode": "bicubic", "align_corners": False, "antialias": True},
}


def interpolate_position(
    embedding: Tensor, native: tuple[int, int], grid: tuple[int, int], interpolation: str = "maft"
) -> Tensor:
    """Position embedding (P+hw, width) for another grid; the P leading tokens have no place and stay.

    "maft" is the authors' way, bicubic between the corners (align_corners=True), "open_clip" what open_clip and
    timm do when they load weights for another size (antialias, align_corners=False). On a 14 -> 30 grid they
    differ by 13 %, so weights that were fine-tuned with one must run with it.

    >>> interpolate_position(torch.randn(1 + 4, 8), (2, 2), (3, 5)).shape
    torch.Size([16, 8])
    """
    if grid == native:
        return embedding
    prefix = len(embedding) - native[0] * native[1]
    precise = torch.promote_types(embedding.dtype, torch.float32)  # half would lose digits in between
    spatial = rearrange(embedding[prefix:].to(precise), "(h w) c -> 1 c h w", h=native[0])
    spatial = F.interpolate(spatial, size=grid, **INTERPOLATIONS[interpolation])
    return torch.cat([embedding[:prefix], rearrange(spatial, "1 c h w -> (h w) c").to(embedding.dtype)])


def is_clip_vit(visual: Any) -> bool:
    """Whether `visual` is laid out as open_clip's or OpenAI's ViT."""
    return all(hasattr(visual, name) for name in _CLIP_VIT) and hasattr(visual.transformer, "resblocks")


def check_clip_vit(visual: Any) -> None:
    """Raise ValueError unless the parts of `visual` outside its blocks and its pool are known."""
    h, w = native_grid(visual)
    rows = len(visual.positional_embedding)
    if rows != 1 + h * w:
        raise ValueError(f"positional_embedding has {rows} rows, expected 1 + {h} x {w}")
    refuse_unknown(visual, (*_CLIP_VIT, "patch_dropout", "attn_pool"), "the tower")
    refuse_unknown(visual.transformer, ("resblocks",), "transformer")


def native_grid(visual: Any) -> tuple[int, int]:
    """Height and width of the token grid that an open_clip or OpenAI ViT's position embedding was made for."""
    grid = getattr(visual, "grid_size", None)
    if isinstance(grid, tuple):
        return grid
    side = round((visual.positional_embedding.shape[0] - 1) ** 0.5)
    return side, side


class ClipViT(MaskAwareTower):
    """Of open_clip's and OpenAI's ViT, beside a family's own mixin."""

    def token_grid(self: Any, images: Tensor) -> tuple[int, int]:
        native = getattr(self, "image_size", None), native_grid(self)
        return divide_into_patches(images, self.conv1.stride, native, self.conv1.in_channels)

    def seen(self: Any, images: Tensor) -> tuple[float, float]:
        return share_seen(images, self.conv1.stride, self.token_grid(images))

    def embed(self: Any, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) of any size -> tokens (B, 1+hw, width)."""
        # OpenAI's models hold half precision on a GPU and cast what they are given.
        patches = rearrange(self.conv1(images.to(self.conv1.weight.dtype)), "b c h w -> b (h w) c")  # (B, hw, width)
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)  # (B, 1, width)
        grid = self.token_grid(images)
        position = interpolate_position(self.positional_embedding, native_grid(self), grid, self.interpolation)
        tokens = torch.cat([class_token, patches], dim=1) + position.to(patches.dtype)  # (B, 1+hw, width)
        return self.ln_pre(self.patch_dropout(tokens) if hasattr(self, "patch_dropout") else tokens)


class OpenClipViT(ClipViT):
    """Of open_clip's ViT, whose own forward embeds the images with `_embeds`."""

    def _embeds(self: Any, x: Tensor) -> Tensor:
        if self.token_grid(x) == native_grid(self):
            return super()._embeds(x)  # type: ignore[misc]
        return self.embed(x)


class PoolingOpenClipViT(OpenClipViT):
    """Of open_clip's ViT that pools its patches."""

    def _features(self: Any, images: Tensor) -> tuple[Tensor, ...]:
        refuse_patch_dropout(self, "patch_dropout")
        return (self.transformer(self.embed(images)),)  # (B, 1+hw, width)

    def _pool_image(self: Any, features: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        return self._project(self._pool(features[0])[0])

    def _project(self: Any, pooled: Tensor) -> Tensor:
        return pooled if self.proj is None else pooled @ self.proj


def check_timm_vit(trunk: Any) -> None:
    """Raise ValueError unless a timm ViT takes its position embedding and its images as `TimmTrunk` does."""
    known = ("backbone",) if hasattr(trunk.patch_embed, "backbone") else ("norm",)
    refuse_unknown(trunk.patch_embed, ("proj", *known), "trunk.patch_embed")
    if not hasattr(trunk, "_pos_embed"):
        raise ValueError(f"trunk ({type(trunk).__name__}) has no _pos_embed, where its position embedding is added")
    rows, cells = getattr(trunk.pos_embed, "shape", (1, 0))[1], trunk.patch_embed.num_patches
    if trunk.pos_embed is not None and rows not in (cells, cells + trunk.num_prefix_tokens):
        raise ValueError(f"trunk.pos_embed has {rows} rows, expected one for each of {cells} patches")
    if getattr(trunk, "rope_mixed", False):
        raise ValueError("trunk has a rotary embedding of its own for every block (rope_mixed), unknown here")


def patch_timm_vit(visual: Any, tower: type) -> None:
    """Swap the classes of open_clip's `TimmModel` and of what takes other sizes in its ViT."""
    swap_class(visual, tower)
    swap_class(visual.trunk, TimmTrunk)
    swap_class(visual.trunk.patch_embed, TimmPatchEmbed)


class TimmViT(MaskAwareTower):
    """Of open_clip's `TimmModel` around a ViT, beside a family's own mixin."""

    def token_grid(self: Any, images: Tensor) -> tuple[int, int]:
        embed = self.trunk.patch_embed
        return divide_into_patches(images, self._stride(), (tuple(embed.img_size), tuple(embed.grid_size)))

    def seen(self: Any, images: Tensor) -> tuple[float, float]:
        return share_seen(images, self._stride(), self.token_grid(images))

    def _stride(self: Any) -> tuple[int, int]:
        (height, width), (rows, columns) = self.trunk.patch_embed.img_size, self.trunk.patch_embed.grid_size
        return height // rows, width // columns


class PoolingTimm(MaskAwareTower):
    """Of open_clip's `TimmModel` around any trunk that pools."""

    def _features(self: Any, images: Tensor) -> tuple[Tensor, ...]:
        return (self.trunk.forward_features(images),)

    def _pool_image(self: Any, features: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        return self.head(self.trunk.forward_head(features[0]))

    def _bypassed(self: Any) -> Iterator[tuple[str, Any]]:
        yield "trunk", self.trunk


class PoolingTimmViT(TimmViT, PoolingTimm):
    """Of open_clip's `TimmModel` around a ViT that pools."""

    def _features(self: Any, images: Tensor) -> tuple[Tensor, ...]:
        refuse_patch_dropout(self.trunk, "patch_drop")
        return super()._features(images)  # (B, P+hw, width)


class TimmPatchEmbed(MaskAware):
    """Of timm's `PatchEmbed` and `HybridEmbed`: takes other sizes, too, and keeps the two axes of the token map."""

    # As properties of the class these come before the instance's own attributes, which stay what they were.
    flatten = property(lambda self: False)
    output_fmt = property(lambda self: "NHWC")

    def forward(self: Any, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> token map (B, h, w, C)."""
        if tuple(x.shape[2:]) == tuple(self.img_size):
            return super().forward(x)  # type: ignore[misc]
        if hasattr(self, "backbone"):
            return self.proj(self.backbone(x)).movedim(1, -1)
        return self.norm(self.proj(x).movedim(1, -1))


class TimmTrunk(MaskAware):
    """Of timm's `VisionTransformer` and `Eva` whose `patch_embed` is a `TimmPatchEmbed`."""

    settings = ("interpolation",)
    interpolation: str

    def _pos_embed(self: Any, x: Tensor) -> Any:
        """Token map (B, h, w, C) -> tokens (B, P+hw, C), which `Eva` returns together with its rotary embedding."""
        grid: tuple[int, int] = (x.shape[1], x.shape[2])
        if grid == tuple(self.patch_embed.grid_size):
            return super()._pos_embed(x if self.dynamic_img_size else x.flatten(1, 2))  # type: ignore[misc]
        x = x.flatten(1, 2)  # (B, hw, C)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is None:
            x = torch.cat([*prefix, x], dim=1)  # (B, P+hw, C)
        else:
            native = tuple(self.patch_embed.grid_size)
            position = interpolate_position(self.pos_embed[0], native, grid, self.interpolation)  # (P+hw or hw, C)
            if self.no_embed_class:
                x = torch.cat([*prefix, x + position], dim=1)  # (B, P+hw, C)
            else:
                x = torch.cat([*prefix, x], dim=1) + position  # (B, P+hw, C)
        x = self.pos_drop(x)
        if not hasattr(self, "rope"):
            return x
        # Unlike `VisionTransformer`, `Eva` drops patches in here, and their part of the rotary embedding with them.
        x, kept = (x, None) if self.patch_drop is None else self.patch_drop(x)  # (B, P+kept, C), (B, kept)
        rotation = self.rotation(grid)
        if rotation is None or kept is None:
            return x, rotation
        return x, rotation[kept][:, None]  # (B, 1, kept, 2 * head width)

    def rotation(self: Any, grid: tuple[int, int]) -> Tensor | None:
        """Sine and cosine of the rotary embedding of `Eva`, (hw, 2 * head width), None where there is none."""
        rope = getattr(self, "rope", None)
        if rope is not None and grid != tuple(self.patch_embed.grid_size):
            rope = copy.deepcopy(rope)  # keeps the sine and cosine of one grid only
            rope.update_feat_shape(list(grid))
        return None if rope is None else rope.get_embed(list(grid))


def transformers_inner(visual: Any) -> Any:
    """The module that holds embeddings and encoder: `visual` itself, or its `vision_model` beside a projection."""
    return getattr(visual, "vision_model", visual)


def check_transformers(visual: Any) -> None:
    """Raise ValueError unless the tower holds what is read of transformers' CLIP and SigLIP towers, and no more."""
    inner = transformers_inner(visual)
    known = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head")
    refuse_unknown(inner, known, type(inner).__name__)
    refuse_unknown(inner.embeddings, ("class_embedding", "patch_embedding", "position_embedding"), "embeddings")
    refuse_unknown(inner.encoder, ("layers",), "encoder")
    if inner is not visual:
        refuse_unknown(visual, ("vision_model", "visual_projection"), type(visual).__name__)


def patch_transformers(visual: Any, tower: type) -> None:
    """Swap the classes of a vision model of transformers and of what takes other sizes in it."""
    swap_class(visual, tower)
    swap_class(transformers_inner(visual).embeddings, TransformersEmbeddings)


class TransformersTower(MaskAwareTower):
    """Of transformers' vision models, beside a family's own mixin."""

    def forward(  # type: ignore[override]  # the first argument goes by the name that transformers gives it
        self, pixel_values: Any = None, masks: Tensor | None = None, *, with_image: bool = False, **options: Any
    ) -> Any:
        """See `maft_adapter.make_mask_aware`."""
        return super().forward(pixel_values, masks, with_image=with_image, **options)

    def token_grid(self, images: Tensor) -> tuple[int, int]:
        embeddings = transformers_inner(self).embeddings
        size, patch = embeddings.image_size, embeddings.patch_size
        return divide_into_patches(images, (patch, patch), ((size, size), (size // patch, size // patch)))

    def seen(self, images: Tensor) -> tuple[float, float]:
        patch = transformers_inner(self).embeddings.patch_size
        return share_seen(images, (patch, patch), self.token_grid(images))


class TransformersEmbeddings(MaskAware):
    """Of transformers' `CLIPVisionEmbeddings` and `SiglipVisionEmbeddings`."""

    settings = ("interpolation",)
    interpolation: str

    def forward(self: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        native = tuple(pixel_values.shape[2:]) == (self.image_size, self.image_size)
        return super().forward(pixel_values, interpolate_pos_encoding=not native)  # type: ignore[misc]

    def interpolate_pos_encoding(self: Any, embeddings: Tensor, height: int, width: int) -> Tensor:
        side = self.image_size // self.patch_size
        grid = height // self.patch_size, width // self.patch_size
        position = self.position_embedding.weight  # (P+hw, width)
        return interpolate_position(position, (side, side), grid, self.interpolation)[None]  # (1, P+hw, width)


def refuse_patch_dropout(module: Any, name: str) -> None:
    """Raise ValueError if the module's patch dropout is active: it would drop patches under the masks."""
    if module.training and getattr(getattr(module, name, None), "prob", 0):
        raise ValueError(f"{name} would drop patches under the masks; call .eval() or set its prob to 0")
