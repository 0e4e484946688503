"""Layouts of towers: what those of one host share across the families, and images of any size for its ViTs.

The mixins interpolate the position embedding to the images' token grid inside the host's own forward, so that
everything which the host builds on it (intermediate features, pooling, extra outputs) holds for other sizes, too.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..masks import WHOLE
from .base import MaskAware, MaskAwareTower, computing, divide_into_patches, refuse_unknown, share_seen, swap_class

# All that is read of a CLIP ViT, children and parameters alike.
_CLIP_VIT = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post", "proj")
_NAFLEX = "takes patches that were cut before, of images of any shape (NaFlex), and no masks: not supported; take "
INTERPOLATIONS: dict[str, dict[str, Any]] = {
    "maft": {"mode": "bicubic", "align_corners": True},
    "open_clip": {"mode": "bicubic", "align_corners": False, "antialias": True},
}


def interpolate_position(
    embedding: Tensor, native: tuple[int, int], grid: tuple[int, int], interpolation: str = "maft"
) -> Tensor:
    """Position embedding for another grid; the P leading tokens have no place and stay.

    "maft" is the authors' way, bicubic between the corners (align_corners=True), "open_clip" what open_clip and
    timm do when they load weights for another size (antialias, align_corners=False). On a 14 -> 30 grid they
    differ by 13 %, so weights that were fine-tuned with one must run with it.

    Args:
        embedding: (P+hw, width).
        native: height and width (h, w) of the token grid that it was made for.
        grid: height and width (h', w') of another.
        interpolation: a key of `INTERPOLATIONS`.

    Returns:
        (P+h'w', width) in the same dtype.

    Example:
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


def prove_clip_vit(visual: Any, tower: type) -> None:
    """`prove_frame` of an open_clip or OpenAI ViT; `tower` is the mixin of its family."""
    twin = patched_copy(visual, tower)
    twin.ln_pre = nn.Sequential(visual.ln_pre, _Mix())
    twin.transformer = shallow_copy(visual.transformer)
    twin.transformer.resblocks = nn.Sequential()
    height, width = (cells * step for cells, step in zip(native_grid(visual), visual.conv1.stride, strict=True))
    prove_frame(twin, (1, visual.conv1.in_channels, height, width))


class ClipViT(MaskAwareTower):
    """Of open_clip's and OpenAI's ViT, beside a family's own mixin."""

    def token_grid(self: Any, images: Tensor) -> tuple[int, int]:
        side = getattr(self, "input_resolution", None)  # OpenAI's name
        native = getattr(self, "image_size", (side, side)), native_grid(self)
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


def timm_trunk(visual: Any) -> Any | None:
    """The timm model inside open_clip's `TimmModel`, None in other towers."""
    return visual.trunk if all(hasattr(visual, name) for name in ("trunk", "head", "image_size")) else None


def check_timm_vit(trunk: Any) -> None:
    """Raise ValueError unless a timm ViT takes its position embedding and its images as `TimmTrunk` does."""
    name = type(trunk).__name__
    if hasattr(trunk, "embeds"):
        raise ValueError(f"trunk ({name}) {_NAFLEX}a ViT of one image size, without use_naflex")
    embed: Any = getattr(trunk, "patch_embed", None)
    if not hasattr(trunk, "_pos_embed") or not hasattr(embed, "grid_size"):
        raise ValueError(f"trunk ({name}) cuts its patches or adds their places in a way of its own: not supported")
    hybrid = hasattr(embed, "backbone")
    refuse_unknown(embed, ("proj", "backbone" if hybrid else "norm"), "trunk.patch_embed")
    if hybrid and any(size % cells for size, cells in zip(embed.img_size, embed.grid_size, strict=True)):
        raise ValueError(
            f"trunk.patch_embed ({type(embed).__name__}) cuts images of {embed.img_size} into {embed.grid_size} cells, "
            "which they don't divide; build the tower for a size that its stride divides"
        )
    rows, cells = getattr(trunk.pos_embed, "shape", (1, 0))[1], embed.num_patches
    if trunk.pos_embed is not None and rows not in (cells, cells + trunk.num_prefix_tokens):
        raise ValueError(f"trunk.pos_embed has {rows} rows, expected one for each of {cells} patches")
    if getattr(trunk, "rope_mixed", False):
        raise ValueError("trunk has a rotary embedding of its own for every block (rope_mixed), unknown here")
    rope = getattr(trunk, "rope", None)
    if rope is not None and not hasattr(rope, "update_feat_shape"):
        raise ValueError(f"trunk.rope ({type(rope).__name__}) keeps one grid only in timm before 1.0.18; upgrade timm")


def patch_timm_vit(visual: Any, tower: type) -> None:
    """Swap the classes of open_clip's `TimmModel` and of what takes other sizes in its ViT."""
    swap_class(visual, tower)
    swap_class(visual.trunk, TimmTrunk)
    swap_class(visual.trunk.patch_embed, TimmPatchEmbed)


def prove_timm_vit(visual: Any, tower: type) -> None:
    """`prove_frame` of open_clip's `TimmModel` around a ViT; `tower` is the mixin of its family."""
    twin = patched_copy(visual, tower)
    twin.trunk = patched_copy(visual.trunk, TimmTrunk)
    twin.trunk.patch_embed = patched_copy(visual.trunk.patch_embed, TimmPatchEmbed)
    twin.trunk.norm_pre = nn.Sequential(visual.trunk.norm_pre, _Mix())
    twin.trunk.blocks = nn.Sequential()
    prove_frame(twin, (1, 3, *visual.trunk.patch_embed.img_size))


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


def meta_copy(module: nn.Module) -> Any:
    """A copy on the meta device, in eval mode and without hooks: it computes nothing but shapes."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    memo |= {id(parameter): nn.Parameter(parameter.to("meta")) for parameter in module.parameters()}
    for part in module.modules():
        memo |= {id(hooks): OrderedDict() for hooks in (part._forward_hooks, part._forward_pre_hooks)}
    return copy.deepcopy(module, memo).eval()


def shallow_copy(module: Any) -> Any:
    """A copy of `module` that shares parameters and children with it."""
    twin = copy.copy(module)
    twin._modules = dict(twin._modules)
    return twin


def patched_copy(module: Any, mixin: type) -> Any:
    """A `shallow_copy` of the class that `module` would be swapped to."""
    twin = shallow_copy(module)
    if not isinstance(twin, MaskAware):
        swap_class(twin, mixin)
        twin.interpolation, twin.threshold, twin.start_layer = "maft", 0.5, 0
    return twin


def prove_pool(twin: Any, shape: tuple[int, ...], grid: tuple[int, int], where: str) -> None:
    """Raise ValueError, naming the pool, unless a full mask gives what the host itself pools.

    Random features go through both, in the tower's dtype. The tower is in eval mode meanwhile, no random state is
    touched, and on the meta device nothing is run.

    Args:
        twin: what `patched_copy` gives of the tower.
        shape: of the features of one image.
        grid: height and width of the token grid in them.
        where: the pool's name in the tower.
    """
    like = next(parameter for parameter in twin.parameters() if parameter.is_floating_point())
    if like.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    # Around one, since what a head makes of a mean near zero is little besides its bias.
    features = (1 + torch.randn(shape, generator=generator)).to(like.device, like.dtype)
    try:
        with computing(twin, like.device):
            own = twin._pool_image((features,), grid)  # (1, D)
            full = twin._on_grid(like.new_ones(1, 1, 1, 1), grid, WHOLE, features.dtype)
            asked = twin._pool_masks((features,), full)[:, 0]  # (1, D)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where} can't pool features of {shape} as its parts say ({said}): not supported") from error
    if not _same(asked, own):
        raise ValueError(
            f"{where} computes something else than its parts say: a full mask does not give what it makes of the same "
            "features, so masks can't be asked of it: not supported"
        )


class _Mix(nn.Module):
    """In place of all blocks, for one image: every token sees all of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=(0, 1))


def prove_frame(twin: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tower does around its blocks what a masked pass does there.

    A random image goes through the host's own forward, which a subclass may have changed, and through `_features` and
    `_pool_image`; as in `prove_pool`.

    Args:
        twin: what `patched_copy` gives of the tower, without what makes it expensive.
        shape: of one image, (1, 3, H, W), as the tower was made for.
    """
    if any(parameter.is_meta for parameter in twin.parameters()):
        return
    name = type(twin).__name__
    like = next(parameter for parameter in twin.parameters() if parameter.ndim == 4)  # the convolution that reads it
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    try:
        with computing(twin, like.device):
            own = image_embedding(twin.forward(images))  # (1, D)
            ours = twin._pool_image(twin._features(images), twin.token_grid(images))  # (1, D)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"the tower ({name}) can't embed an image of {shape} as its parts say ({said})") from error
    if not _same(ours, own):
        raise ValueError(
            f"the tower ({name}) does something else around its blocks than its parts say, as a subclass with methods "
            "of its own may; a masked pass would leave that out: not supported"
        )


def image_embedding(output: Any) -> Any:
    """The embedding (B, D) in what a host gives: itself, the first of a tuple, or a field of transformers'."""
    if isinstance(output, Tensor | tuple):
        return output if isinstance(output, Tensor) else output[0]
    return getattr(output, "image_embeds", getattr(output, "pooler_output", None))


def _same(actual: Tensor, expected: Tensor) -> bool:
    """In half of the digits: rounding stays far below, other arithmetic far above. Weights may not be set yet."""
    if not expected.isfinite().all():
        return True
    allowed = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= allowed)


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

    def forward(self: Any, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> token map (B, h, w, C)."""
        (height, width), (rows, columns) = self.img_size, self.grid_size
        if not hasattr(self, "backbone") and tuple(x.shape[2:]) != (height, width):
            return self.norm(self.proj(x).movedim(1, -1))
        grid = x.shape[2] // (height // rows), x.shape[3] // (width // columns)
        x = super().forward(x)  # type: ignore[misc]
        return x.unflatten(1, grid) if self.flatten else x


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
    name = type(inner).__name__
    embed: Any = getattr(inner, "embeddings", None)
    if isinstance(getattr(embed, "patch_embedding", None), nn.Linear):
        raise ValueError(f"{name} {_NAFLEX}a SigLIP 2 without naflex in its name, which loads as SiglipModel")
    size: Any = getattr(embed, "image_size", None)
    if not isinstance(size, int) or not isinstance(getattr(embed, "patch_size", None), int):
        raise ValueError(f"{name} does not embed images of one image_size and patch_size as CLIP does: not supported")
    if not hasattr(embed, "interpolate_pos_encoding"):
        raise ValueError(f"{name} takes images of {size}x{size} only in transformers before 4.46; upgrade it")
    if not hasattr(getattr(inner, "encoder", None), "layers") or not hasattr(inner, "post_layernorm"):
        raise ValueError(f"{name} has no encoder.layers and post_layernorm as CLIP's towers have: not supported")
    known = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head")
    refuse_unknown(inner, known, name)
    refuse_unknown(embed, ("class_embedding", "patch_embedding", "position_embedding"), "embeddings")
    refuse_unknown(inner.encoder, ("layers",), "encoder")
    if inner is not visual:
        refuse_unknown(visual, ("vision_model", "visual_projection"), type(visual).__name__)
    twin = meta_copy(visual)
    twin.config._attn_implementation = "eager"  # others need a device that computes
    try:
        with torch.no_grad():
            output = twin(torch.empty(1, 3, size, size, dtype=embed.patch_embedding.weight.dtype, device="meta"))
    except Exception as error:
        raise ValueError(f"{name} takes no images of {size}x{size} ({type(error).__name__}: {error})") from error
    if image_embedding(output) is None:
        raise ValueError(f"{name} gives no pooler_output, or not by that name (return_dict=False): not supported")


def prove_transformers(visual: Any, tower: type) -> None:
    """`prove_frame` of a vision model of transformers; `tower` is the mixin of its family."""
    twin = inner = patched_copy(visual, tower)
    if hasattr(visual, "vision_model"):
        twin.vision_model = inner = shallow_copy(visual.vision_model)
    if hasattr(inner, "pre_layrnorm"):
        inner.pre_layrnorm = nn.Sequential(inner.pre_layrnorm, _Mix())
    inner.encoder = shallow_copy(inner.encoder)
    inner.encoder.layers = nn.Sequential()
    prove_frame(twin, (1, 3, inner.embeddings.image_size, inner.embeddings.image_size))


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
