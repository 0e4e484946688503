"""Family A, class token: open_clip's `VisionTransformer` and OpenAI's layout, which CLIP forks in hosts keep.

Both have conv1, class_embedding, positional_embedding, ln_pre, transformer.resblocks, ln_post and proj; they
differ in where the batch stands between blocks (open_clip 3: first; OpenAI: second).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import proposal_block
from ..masks import attention_bias, check_masks
from . import MaskAware, MaskAwareTower, swap_class

# All that is read of a tower and of its blocks, children and parameters alike.
_READ = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post", "proj")
_BLOCK = ("ln_1", "attn", "ln_2", "mlp")


def recognise(visual: nn.Module) -> bool:
    """Whether `visual` is laid out as a CLIP ViT with a class token."""
    return all(hasattr(visual, name) for name in _READ) and hasattr(visual.transformer, "resblocks")


def check(visual: Any, start_layer: int) -> None:
    """Raise ValueError, naming what is unknown, unless `patch` computes exactly this tower."""
    blocks = visual.transformer.resblocks
    if type(start_layer) is not int or not 0 <= start_layer <= len(blocks):
        raise ValueError(f"start_layer is {start_layer!r}, expected an int in 0..{len(blocks)} (the depth)")
    if getattr(visual, "attn_pool", None) is not None or getattr(visual, "pool_type", "tok") != "tok":
        raise ValueError("the tower pools its patches; supported are towers that read the class token")
    h, w = native_grid(visual)
    rows = len(visual.positional_embedding)
    if rows != 1 + h * w:
        raise ValueError(f"positional_embedding has {rows} rows, expected 1 + {h} x {w}")
    _refuse_unknown(visual, (*_READ, "patch_dropout"), "the tower")
    _refuse_unknown(visual.transformer, ("resblocks",), "transformer")
    for i, block in enumerate(blocks):
        where, attn = f"transformer.resblocks.{i}", getattr(block, "attn", None)
        _refuse_unknown(block, (*_BLOCK, "ls_1", "ls_2"), where)
        if not all(hasattr(block, name) for name in _BLOCK):
            raise ValueError(f"{where} lacks some of {', '.join(_BLOCK)}, which a CLIP block has")
        if getattr(block, "attn_mask", None) is not None:
            raise ValueError(f"{where} has an attention mask, as text towers have; pass the image tower")
        if any(getattr(attn, name, None) is None for name in ("in_proj_weight", "out_proj", "num_heads")):
            raise ValueError(f"{where}.attn has no fused in_proj_weight, out_proj and num_heads")
        _refuse_unknown(attn, ("in_proj_weight", "in_proj_bias", "out_proj"), f"{where}.attn")
        if getattr(attn, "dropout", 0) or getattr(attn, "add_zero_attn", False):
            raise ValueError(f"{where}.attn has dropout or an extra key, which CLIP's attention has not")


def patch(visual: Any, start_layer: int) -> None:
    """Swap the classes of the tower and of its blocks from `start_layer` on."""
    swap_class(visual, _MaskAwareTower)
    visual.start_layer = start_layer
    for block in visual.transformer.resblocks[start_layer:]:
        swap_class(block, _MaskAwareBlock)


class _MaskAwareBlock(MaskAware):
    def forward(self, x: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any) -> Any:
        if bias is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return proposal_block(self, x, bias, **kwargs)


class _MaskAwareTower(MaskAwareTower):
    settings = ("start_layer",)

    def forward(self: Any, x: Tensor, masks: Tensor | None = None, *, with_image: bool = False) -> Any:
        """See `maft_adapter.make_mask_aware`."""
        if masks is None and with_image:
            raise ValueError("with_image=True gives mask and image embeddings together and needs masks")
        grid = self.token_grid(x)
        if masks is None:
            return super().forward(x) if grid == native_grid(self) else self._resized(x, grid)  # type: ignore[misc]
        check_masks(masks, batch=x.shape[0])
        if self.training and getattr(getattr(self, "patch_dropout", None), "prob", 0):
            raise ValueError("patch_dropout would drop patches under the masks; call .eval() or set its prob to 0")
        shared = self._plain(self._embed(x, grid), stop=self.start_layer)  # (B, 1+hw, width)
        bias = attention_bias(masks, grid, shared.dtype)  # (B, 1, N, hw)
        copies = shared[:, :1].expand(-1, masks.shape[1], -1)  # (B, N, width)
        tokens = torch.cat([copies, shared[:, 1:]], dim=1)  # (B, N+hw, width)
        blocks = self.transformer.resblocks
        for i in range(self.start_layer, len(blocks)):
            tokens = self._run(blocks[i], tokens, bias=bias, last=i == len(blocks) - 1)
        embeddings = self._head(tokens[:, : masks.shape[1]])  # (B, N, D)
        if not with_image:
            return embeddings
        return embeddings, self._head(self._plain(shared, start=self.start_layer)[:, 0])  # (B, N, D), (B, D)

    def token_grid(self: Any, images: Tensor) -> tuple[int, int]:
        height, width = self.conv1.stride
        if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] != self.conv1.in_channels:
            raise ValueError(f"images are (B, 3, H, W) with B >= 1, got {tuple(images.shape)}")
        h, w = images.shape[2:]
        if h % height or w % width or not h or not w:
            raise ValueError(f"images of {h}x{w} do not divide into {height}x{width} patches; resize or pad")
        return h // height, w // width

    def _resized(self: Any, images: Tensor, grid: tuple[int, int]) -> Any:
        """What the tower's own forward would give for images of another size than its native one."""
        tokens = self._plain(self._embed(images, grid))  # (B, 1+hw, width)
        pooled = self._head(tokens[:, 0])  # (B, D)
        if not getattr(self, "output_tokens", False):
            return pooled
        return pooled, tokens[:, 1:] if self.final_ln_after_pool else self.ln_post(tokens)[:, 1:]

    def _embed(self: Any, images: Tensor, grid: tuple[int, int]) -> Tensor:
        patches = rearrange(self.conv1(images), "b c h w -> b (h w) c")  # (B, hw, width)
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)  # (B, 1, width)
        position = interpolate_position(self.positional_embedding, native_grid(self), grid)  # (1+hw, width)
        tokens = torch.cat([class_token, patches], dim=1) + position.to(patches.dtype)  # (B, 1+hw, width)
        return self.ln_pre(self.patch_dropout(tokens) if hasattr(self, "patch_dropout") else tokens)

    def _plain(self: Any, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The tower's own blocks in their own layout, on batch-first tokens (B, 1+hw, width)."""
        batch_first = getattr(self.transformer.resblocks[0].attn, "batch_first", True)
        x = x if batch_first else x.transpose(0, 1)
        for block in self.transformer.resblocks[start:stop]:
            x = self._run(block, x)
        return x if batch_first else x.transpose(0, 1)

    def _run(self: Any, block: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
        if getattr(self.transformer, "grad_checkpointing", False) and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **kwargs)
        return block(x, **kwargs)

    def _head(self: Any, tokens: Tensor) -> Tensor:
        pooled = self.ln_post(tokens)
        return pooled if self.proj is None else pooled @ self.proj


def native_grid(visual: Any) -> tuple[int, int]:
    """Height and width of the token grid that the position embedding was made for."""
    grid = getattr(visual, "grid_size", None)
    if isinstance(grid, tuple):
        return grid
    side = round((visual.positional_embedding.shape[0] - 1) ** 0.5)
    return side, side


def interpolate_position(embedding: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Position embedding (1+hw, width) for another grid, the authors' way: bicubic, align_corners=True.

    open_clip's own way at load time (antialias, align_corners=False) differs by 13 % on a 14 -> 30 grid; the
    released checkpoints were trained with this one.
    """
    if grid == native:
        return embedding
    precise = torch.promote_types(embedding.dtype, torch.float32)  # half would lose digits in between
    spatial = rearrange(embedding[1:].to(precise), "(h w) c -> 1 c h w", h=native[0])
    spatial = F.interpolate(spatial, size=grid, mode="bicubic", align_corners=True)
    return torch.cat([embedding[:1], rearrange(spatial, "1 c h w -> (h w) c").to(embedding.dtype)])


def _refuse_unknown(module: Any, known: tuple[str, ...], where: str) -> None:
    held = {**dict(module.named_children()), **dict(module.named_parameters(recurse=False))}
    idle = [n for n, x in held.items() if isinstance(x, nn.Identity | nn.Dropout) and not getattr(x, "p", 0)]
    unknown = ", ".join(name for name in held if name not in (*known, *idle))
    if unknown:
        name = type(module).__name__
        raise ValueError(f"{where} ({name}) has {unknown}, unknown here: patching it would leave that out")
