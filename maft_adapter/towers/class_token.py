"""Family A, class token: the paper's way (Sec. 4.1). The class token is copied N times at the start layer.

Three layouts of one ViT: open_clip's `VisionTransformer` and OpenAI's, which CLIP forks in hosts keep; timm's
ViT and EVA inside open_clip's `TimmModel`; transformers' `CLIPVisionModel` and `CLIPVisionModelWithProjection`.

The first runs proposal-biased attention in its split form. The blocks of the other two run as they are, with the
same bias in its dense form as their attention mask: whatever they hold (rotary embeddings, normalised queries,
gated MLPs) is computed by their own code, at 1.04 instead of 0.97 of a plain forward's multiply-accumulates.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import dense_bias, proposal_block
from ..masks import attention_bias
from . import MaskAware, MaskAwareTower, refuse_unknown, swap_class
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
    refuse_patch_dropout,
    transformers_inner,
)

SETTINGS = ("start_layer", "interpolation", "threshold")
POOLS = "reads its class token"

# All that is read of a CLIP block, and all that a timm ViT with a class token may hold.
_BLOCK = ("ln_1", "attn", "ln_2", "mlp")
_TIMM = ("patch_embed", "pos_embed", "cls_token", "patch_drop", "blocks", "norm_pre", "norm", "fc_norm", "head", "rope")


def recognise(visual: Any) -> bool:
    """Whether `visual` is a ViT that gives its class token."""
    if is_clip_vit(visual):
        return getattr(visual, "attn_pool", None) is None and getattr(visual, "pool_type", "tok") == "tok"
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        return hasattr(trunk, "blocks") and getattr(trunk, "global_pool", None) == "token"
    return hasattr(getattr(visual, "vision_model", visual), "pre_layrnorm")  # the name is transformers'


def check(visual: Any, start_layer: int) -> None:
    """Raise ValueError, naming what is unknown, unless the tower is built of parts that `patch` computes.

    What is seen are children, parameters and settings. A subclass that does other arithmetic with the very same ones
    is beyond it.
    """
    blocks = _blocks(visual)
    if type(start_layer) is not int or not 0 <= start_layer <= len(blocks):
        raise ValueError(f"start_layer is {start_layer!r}, expected an int in 0..{len(blocks)} (the depth)")
    if is_clip_vit(visual):
        check_clip_vit(visual)
        for i, block in enumerate(blocks):
            _check_clip_block(block, f"transformer.resblocks.{i}")
    elif hasattr(visual, "trunk"):
        for i, block in enumerate(blocks):
            _check_takes(block, "attn_mask", f"trunk.blocks.{i}")
        check_timm_vit(visual.trunk)
        refuse_unknown(visual.trunk, _TIMM, "trunk")  # register tokens among others
    else:
        check_transformers(visual)
        for i, block in enumerate(blocks):
            _check_takes(block, "attention_mask", f"encoder.layers.{i}")


def patch(visual: Any, start_layer: int) -> None:
    """Swap the classes of the tower and of what needs the bias or another size."""
    if is_clip_vit(visual):
        swap_class(visual, _OpenClipTower if hasattr(visual, "_embeds") else _OpenAITower)
        for block in visual.transformer.resblocks[start_layer:]:
            swap_class(block, _ClipBlock)
    elif hasattr(visual, "trunk"):
        patch_timm_vit(visual, _TimmTower)
    else:
        patch_transformers(visual, _TransformersTower)


def _blocks(visual: Any) -> Any:
    if is_clip_vit(visual):
        return visual.transformer.resblocks
    return visual.trunk.blocks if hasattr(visual, "trunk") else transformers_inner(visual).encoder.layers


def _check_clip_block(block: Any, where: str) -> None:
    refuse_unknown(block, (*_BLOCK, "ls_1", "ls_2"), where)
    if not all(hasattr(block, name) for name in _BLOCK):
        raise ValueError(f"{where} lacks some of {', '.join(_BLOCK)}, which a CLIP block has")
    if getattr(block, "attn_mask", None) is not None:
        raise ValueError(f"{where} has an attention mask, as text towers have; pass the image tower")
    attn = block.attn
    if any(getattr(attn, name, None) is None for name in ("in_proj_weight", "out_proj", "num_heads")):
        raise ValueError(f"{where}.attn has no fused in_proj_weight, out_proj and num_heads")
    refuse_unknown(attn, ("in_proj_weight", "in_proj_bias", "out_proj"), f"{where}.attn")
    if getattr(attn, "dropout", 0) or getattr(attn, "add_zero_attn", False):
        raise ValueError(f"{where}.attn has dropout or an extra key, which CLIP's attention has not")


def _check_takes(block: Any, name: str, where: str) -> None:
    if name not in inspect.signature(block.forward).parameters:
        raise ValueError(
            f"{where} ({type(block).__name__}) takes no {name}, which the proposals' bias goes in as; a relative "
            "position bias, for one, is made for a fixed number of tokens"
        )


class _ClassTokenTower(MaskAwareTower):
    """What the layouts share. Each gives its embedding, its blocks and its head."""

    settings = SETTINGS
    start_layer: int

    def encode(self, images: Tensor, masks: Tensor, grid: tuple[int, int], with_image: bool) -> Any:
        tokens, options = self._embed(images)  # (B, 1+hw, width)
        shared = self._run(tokens, options, stop=self.start_layer)  # (B, 1+hw, width)
        bias = attention_bias(masks, grid, shared.dtype, self.threshold)  # (B, 1, N, hw)
        n = masks.shape[1]
        copies = shared[:, :1].expand(-1, n, -1)  # (B, N, width)
        if n:
            tokens = torch.cat([copies, shared[:, 1:]], dim=1)  # (B, N+hw, width)
            copies = self._run_biased(tokens, bias, options)[:, :n]  # (B, N, width)
        embeddings = self._head(copies)  # (B, N, D)
        if not with_image:
            return embeddings
        image = self._run(shared, options, start=self.start_layer)[:, :1]  # (B, 1, width)
        return embeddings, self._head(image)[:, 0]  # (B, N, D), (B, D)

    def _embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Tokens (B, 1+hw, width) and what else the blocks take."""
        raise NotImplementedError

    def _run(self, x: Tensor, options: dict[str, Any], start: int = 0, stop: int | None = None) -> Tensor:
        """The tower's own blocks on tokens (B, 1+hw, width)."""
        for block in _blocks(self)[start:stop]:
            x = self._call(block, x, **options)
        return x

    def _run_biased(self, x: Tensor, bias: Tensor, options: dict[str, Any]) -> Tensor:
        """Blocks from the start layer on, on tokens (B, N+hw, width) -> class tokens first."""
        raise NotImplementedError

    def _head(self, x: Tensor) -> Tensor:
        """Class tokens (B, N, width) -> embeddings (B, N, D)."""
        raise NotImplementedError

    def _call(self, block: nn.Module, x: Tensor, **options: Any) -> Tensor:
        if self._grad_checkpointing() and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **options)
        return block(x, **options)

    def _grad_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on and left to the caller of a block."""
        return False


class _ClipBlock(MaskAware):
    def forward(self, x: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any) -> Any:
        if bias is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return proposal_block(self, x, bias, **kwargs)


class _ClipTower(ClipViT, _ClassTokenTower):
    def _embed(self: Any, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        refuse_patch_dropout(self, "patch_dropout")
        return self.embed(images), {}

    def _run(self: Any, x: Tensor, options: dict[str, Any], start: int = 0, stop: int | None = None) -> Tensor:
        batch_first = getattr(self.transformer.resblocks[0].attn, "batch_first", True)
        x = x if batch_first else x.transpose(0, 1)
        x = super()._run(x, options, start, stop)
        return x if batch_first else x.transpose(0, 1)

    def _run_biased(self: Any, x: Tensor, bias: Tensor, options: dict[str, Any]) -> Tensor:
        blocks = self.transformer.resblocks
        for i in range(self.start_layer, len(blocks)):
            x = self._call(blocks[i], x, bias=bias, last=i == len(blocks) - 1)
        return x

    def _grad_checkpointing(self: Any) -> bool:
        return getattr(self.transformer, "grad_checkpointing", False)

    def _head(self: Any, x: Tensor) -> Tensor:
        pooled = self.ln_post(x)
        return pooled if self.proj is None else pooled @ self.proj


class _OpenClipTower(OpenClipViT, _ClipTower):
    pass


class _OpenAITower(_ClipTower):
    def plain(self: Any, images: Tensor, **options: Any) -> Any:
        if options or self.token_grid(images) == native_grid(self):
            return super().plain(images, **options)
        return self._head(self._run(self.embed(images), {})[:, :1])[:, 0]  # (B, D)


class _DenseTower(_ClassTokenTower):
    mask_name: str  # of the blocks' argument

    def _run_biased(self: Any, x: Tensor, bias: Tensor, options: dict[str, Any]) -> Tensor:
        options = {**options, self.mask_name: dense_bias(bias)}  # (B, 1, N+hw, N+hw)
        return self._run(x, options, start=self.start_layer)


class _TimmTower(TimmViT, _DenseTower):
    mask_name = "attn_mask"

    def _embed(self: Any, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        refuse_patch_dropout(self.trunk, "patch_drop")
        x = self.trunk._pos_embed(self.trunk.patch_embed(images))  # (B, 1+hw, width)
        x, options = (x[0], {"rope": x[1]}) if isinstance(x, tuple) else (x, {})
        return self.trunk.norm_pre(x), options

    def _run_biased(self: Any, x: Tensor, bias: Tensor, options: dict[str, Any]) -> Tensor:
        rope = options.get("rope")
        if rope is not None:
            # A block rotates everything after its one class token: sine 0 and cosine 1 leave the copies in place.
            sine = rope.new_zeros(bias.shape[2], rope.shape[1] // 2)  # (N, head width)
            unmoved = torch.cat([sine, sine + 1], dim=1)  # (N, 2 * head width)
            options = {"rope": torch.cat([unmoved, rope])[1:]}  # (N-1+hw, 2 * head width)
        return super()._run_biased(x, bias, options)

    def _grad_checkpointing(self: Any) -> bool:
        return self.trunk.grad_checkpointing

    def _head(self: Any, x: Tensor) -> Tensor:
        single = self.trunk.norm(x).flatten(0, 1)[:, None]  # (B*N, 1, width): each the class token of its own
        return self.head(self.trunk.forward_head(single)).unflatten(0, x.shape[:2])  # (B, N, D)


class _TransformersTower(TransformersTower, _DenseTower):
    mask_name = "attention_mask"

    def _embed(self: Any, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        inner = transformers_inner(self)
        kernel = self.config._attn_implementation
        if kernel not in ("sdpa", "eager"):
            raise ValueError(f"{kernel} takes no mask of pairs of tokens; call .set_attn_implementation('sdpa')")
        return inner.pre_layrnorm(inner.embeddings(images)), {"attention_mask": None}

    def _head(self: Any, x: Tensor) -> Tensor:
        pooled = transformers_inner(self).post_layernorm(x)
        return self.visual_projection(pooled) if hasattr(self, "visual_projection") else pooled
