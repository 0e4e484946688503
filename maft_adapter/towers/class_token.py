"""Family A, class token: the paper's way (Sec. 4.1). The class token is copied N times at the start layer.

Three layouts of one ViT: open_clip's `VisionTransformer` and OpenAI's, which CLIP forks in hosts keep; timm's
ViT and EVA inside open_clip's `TimmModel`; transformers' `CLIPVisionModel`, `CLIPVisionModelWithProjection` and the
towers of CLIP's relatives.

From the start layer on patches see patches only, so what an image contributes is kept: its tokens there, and keys and
values of the patches in every block from there on. Of the last block nothing else of them is computed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .base import MaskAwareTower, refuse_unknown, swap_class
from .blocks import ClipBlock, ProposalBlock, TimmBlock, TransformersBlock, check_block, prove_blocks, run_block
from .layouts import (
    ClipViT,
    OpenClipViT,
    TimmViT,
    TransformersTower,
    check_clip_vit,
    check_timm_vit,
    check_transformers,
    is_clip_vit,
    native_grid,
    patch_timm_vit,
    patch_transformers,
    prove_clip_vit,
    prove_timm_vit,
    prove_transformers,
    refuse_patch_dropout,
    timm_trunk,
    transformers_inner,
)

SETTINGS = ("start_layer", "interpolation", "threshold")
POOLS = "reads its class token"

# All that a timm ViT with a class token may hold.
_TIMM = ("patch_embed", "pos_embed", "cls_token", "patch_drop", "blocks", "norm_pre", "norm", "fc_norm", "head", "rope")


def recognise(visual: Any) -> bool:
    """Whether `visual` is a ViT that gives its class token."""
    if is_clip_vit(visual):
        return getattr(visual, "attn_pool", None) is None and getattr(visual, "pool_type", "tok") == "tok"
    trunk = timm_trunk(visual)
    if trunk is not None:
        listed = isinstance(getattr(trunk, "blocks", None), nn.Sequential | nn.ModuleList)
        return listed and getattr(trunk, "global_pool", None) == "token"
    return hasattr(getattr(visual, "vision_model", visual), "pre_layrnorm")  # the name is transformers'


def check(visual: Any, start_layer: int) -> None:
    """Raise ValueError, naming what is unknown, unless the tower is built of parts that `patch` computes.

    What is seen are children, parameters and settings; `prove_blocks` compares what the blocks do with them.
    """
    layout = _layout(visual)
    if layout is ClipBlock:
        check_clip_vit(visual)
    elif layout is TransformersBlock:
        check_transformers(visual)
    blocks = _named_blocks(visual)
    if type(start_layer) is not int or not 0 <= start_layer <= len(blocks):
        raise ValueError(f"start_layer is {start_layer!r}, expected an int in 0..{len(blocks)} (the depth)")
    for where, block in blocks:
        check_block(block, layout, where)
    options = {}
    if layout is ClipBlock:
        width = visual.class_embedding.shape[-1]
    elif layout is TimmBlock:  # last, since a block says better what a trunk without position embedding has instead
        check_timm_vit(visual.trunk)
        refuse_unknown(visual.trunk, _TIMM, "trunk")  # register tokens among others
        width = visual.trunk.embed_dim
        options = {"rope": None} if getattr(visual.trunk, "rope", None) is not None else {}
    else:
        width, options = visual.config.hidden_size, _transformers_options(visual)
    prove_blocks(blocks[start_layer:], layout, width, options)
    if layout is ClipBlock:
        prove_clip_vit(visual, _clip_tower(visual))
    elif layout is TimmBlock:
        prove_timm_vit(visual, _TimmTower)
    else:
        prove_transformers(visual, _TransformersTower)


def patch(visual: Any, start_layer: int) -> None:
    """Swap the classes of the tower, of its blocks from the start layer on, and of what takes other sizes."""
    layout = _layout(visual)
    blocks = _named_blocks(visual)[start_layer:]
    if layout is ClipBlock:
        swap_class(visual, _clip_tower(visual))
    elif layout is TimmBlock:
        patch_timm_vit(visual, _TimmTower)
    else:
        patch_transformers(visual, _TransformersTower)
    for _, block in blocks:
        swap_class(block, layout)


def _layout(visual: Any) -> type[ProposalBlock]:
    if is_clip_vit(visual):
        return ClipBlock
    return TimmBlock if hasattr(visual, "trunk") else TransformersBlock


def _clip_tower(visual: Any) -> type:
    return _OpenClipTower if hasattr(visual, "_embeds") else _OpenAITower


def _named_blocks(visual: Any) -> list[tuple[str, Any]]:
    if is_clip_vit(visual):
        path, blocks = "transformer.resblocks", visual.transformer.resblocks
    elif hasattr(visual, "trunk"):
        path, blocks = "trunk.blocks", visual.trunk.blocks
    else:
        path, blocks = "encoder.layers", transformers_inner(visual).encoder.layers
    return [(f"{path}.{i}", block) for i, block in enumerate(blocks)]


def _transformers_options(visual: Any) -> dict[str, Any]:
    """The masks that a block asks for: one in transformers 5, two before."""
    blocks = _named_blocks(visual)
    if not blocks:  # as where `prove_frame` looks at what is around them
        return {}
    block = blocks[0][1]
    host: Any = super(ProposalBlock, block) if isinstance(block, ProposalBlock) else block
    return {name: None for name in inspect.signature(host.forward).parameters if name.endswith("attention_mask")}


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Without the inference path of `nn.MultiheadAttention`, which writes out all pairs of tokens on the CPU.

    The fused kernel that it uses otherwise takes about 0.6 of its time.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _ClassTokenTower(MaskAwareTower):
    """What the layouts share. Each gives its embedding, its blocks' options and its head."""

    settings = SETTINGS
    start_layer: int

    def _features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Tokens at the start layer (B, 1+hw, width), then of block after block what `class_attention` reads."""
        grid, blocks = self.token_grid(images), self._blocks()
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _fused_attention():
            tokens = self._run(self._embed(images), grid, blocks[: self.start_layer])  # (B, 1+hw, width)
        patches, kept = tokens[:, 1:], [tokens]  # (B, hw, width)
        rope = {name: value for name, value in self._options(grid).items() if name == "rope"}
        for block in blocks[self.start_layer :]:
            patches, *keys_values = self._call(block, patches, keep=True, last=block is blocks[-1], **rope)
            kept += keys_values
        return tuple(kept)

    def _on_grid(self, masks: Tensor, grid: tuple[int, int], seen: tuple[float, float], dtype: torch.dtype) -> Tensor:
        return F.pad(super()._on_grid(masks, grid, seen, dtype), (1, 0))  # (B, 1, N, 1+hw): itself, then patches

    def _pool_masks(self, features: tuple[Tensor, ...], on_grid: Tensor) -> Tensor:
        tokens, *kept = features
        x = tokens[:, :1].expand(-1, on_grid.shape[2], -1)  # (B, N, width)
        blocks = self._blocks()[self.start_layer :]
        for block, keys, values in zip(blocks, kept[::2], kept[1::2], strict=True):
            x = self._call(block, x, asked=(keys, values, on_grid))  # (B, N, width)
        return self._head(x)  # (B, N, D)

    def _pool_image(self, features: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        tokens = self._run(features[0], grid, self._blocks()[self.start_layer :])  # (B, 1+hw, width)
        return self._head(tokens[:, :1])[:, 0]  # (B, D)

    def _blocks(self) -> list[Any]:
        return [block for _, block in _named_blocks(self)]

    def _refuse_changes(self) -> None:
        layout = _layout(self)
        for where, block in _named_blocks(self)[self.start_layer :]:
            check_block(block, layout, where)
        super()._refuse_changes()

    def _bypassed(self) -> Iterator[tuple[str, Any]]:
        name = _layout(self).ATTENTION
        for where, block in _named_blocks(self)[self.start_layer :]:
            yield f"{where}.{name}", getattr(block, name)

    def _embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> tokens (B, 1+hw, width)."""
        raise NotImplementedError

    def _options(self, grid: tuple[int, int]) -> dict[str, Any]:
        """What the host's blocks take besides tokens."""
        return {}

    def _head(self, x: Tensor) -> Tensor:
        """Class tokens (B, N, width) -> embeddings (B, N, D)."""
        raise NotImplementedError

    def _run(self, x: Tensor, grid: tuple[int, int], blocks: list[Any]) -> Tensor:
        """The tower's own blocks on tokens (B, 1+hw, width)."""
        options = self._options(grid)
        for block in blocks:
            x = run_block(functools.partial(self._call, block), block, x, options)
        return x

    def _call(self, block: Any, x: Tensor, **options: Any) -> Any:
        if self._grad_checkpointing() and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **options)
        return block(x, **options)

    def _grad_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on and left to the caller of a block."""
        return False


class _ClipTower(ClipViT, _ClassTokenTower):
    def _embed(self: Any, images: Tensor) -> Tensor:
        refuse_patch_dropout(self, "patch_dropout")
        return self.embed(images)

    def _grad_checkpointing(self: Any) -> bool:
        return getattr(self.transformer, "grad_checkpointing", False)

    def _bypassed(self: Any) -> Iterator[tuple[str, Any]]:
        blocks = self.transformer.resblocks
        yield from (("transformer", self.transformer), ("transformer.resblocks", blocks), *super()._bypassed())

    def _head(self: Any, x: Tensor) -> Tensor:
        pooled = self.ln_post(x)
        return pooled if self.proj is None else pooled @ self.proj


class _OpenClipTower(OpenClipViT, _ClipTower):
    pass


class _OpenAITower(_ClipTower):
    def plain(self: Any, images: Tensor, **options: Any) -> Any:
        grid = self.token_grid(images)
        if options or grid == native_grid(self):
            return super().plain(images, **options)
        return self._head(self._run(self.embed(images), grid, self._blocks())[:, :1])[:, 0]  # (B, D)


class _TimmTower(TimmViT, _ClassTokenTower):
    def _embed(self: Any, images: Tensor) -> Tensor:
        refuse_patch_dropout(self.trunk, "patch_drop")
        tokens = self.trunk._pos_embed(self.trunk.patch_embed(images))  # (B, 1+hw, width), Eva's with its rotation
        return self.trunk.norm_pre(tokens[0] if isinstance(tokens, tuple) else tokens)

    def _options(self: Any, grid: tuple[int, int]) -> dict[str, Any]:
        rotation = self.trunk.rotation(grid)  # (hw, 2 * head width)
        return {} if rotation is None else {"rope": rotation}

    def _grad_checkpointing(self: Any) -> bool:
        return self.trunk.grad_checkpointing

    def _bypassed(self: Any) -> Iterator[tuple[str, Any]]:
        yield from (("trunk", self.trunk), ("trunk.blocks", self.trunk.blocks), *super()._bypassed())

    def _head(self: Any, x: Tensor) -> Tensor:
        single = self.trunk.norm(x).flatten(0, 1)[:, None]  # (B*N, 1, width): each the class token of its own
        return self.head(self.trunk.forward_head(single)).unflatten(0, x.shape[:2])  # (B, N, D)


class _TransformersTower(TransformersTower, _ClassTokenTower):
    def _embed(self: Any, images: Tensor) -> Tensor:
        inner = transformers_inner(self)
        return inner.pre_layrnorm(inner.embeddings(images))

    def _options(self, grid: tuple[int, int]) -> dict[str, Any]:
        return _transformers_options(self)

    def _bypassed(self: Any) -> Iterator[tuple[str, Any]]:
        inner = transformers_inner(self)
        yield from (("vision_model", inner),) if inner is not self else ()
        yield from (("encoder", inner.encoder), *super()._bypassed())

    def _head(self: Any, x: Tensor) -> Tensor:
        pooled = transformers_inner(self).post_layernorm(x)
        return self.visual_projection(pooled) if hasattr(self, "visual_projection") else pooled
