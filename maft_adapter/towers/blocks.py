"""Blocks of class-token towers in the split form: patches once, then class tokens asked against what they kept.

A block of a host is addressed by its own parts (norms, projections, rotary embedding, layer scale, MLP), which are
called as the host calls them. That the sum of the parts is the block is not taken on trust: `prove_blocks` compares.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import class_attention, project, projections
from .base import MaskAware, computing, refuse_own_methods, refuse_unknown, restore_class, swap_class

_PATCHES = 4  # that a proof runs on, beside the class token


class ProposalBlock(MaskAware):
    """Mixed into a residual block. A layout gives `_project` and `_finish`, and names its parts for `check_block`.

    Without the keywords below it is the host's block. With `keep` it is for patches, which attend to each other
    (Eq. 4), and gives their keys and values, too. With `asked`, the keys, values and bias of the patches that they
    see, it is for class tokens; see `class_attention`.
    """

    NEEDED: tuple[str, ...]  # parts of the block besides its attention
    OPTIONAL: tuple[str, ...] = ()
    ATTENTION: str  # the name of its attention
    ATTENTION_NEEDED: tuple[str, ...]
    ATTENTION_OPTIONAL: tuple[str, ...] = ()

    def forward(
        self: Any,
        x: Tensor,
        *args: Any,
        keep: bool = False,
        last: bool = False,
        asked: tuple[Tensor, Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """See the class; x is (B, T, width). Nobody reads patches after the `last` block: they come back as given."""
        if keep:
            q, k, v = self._project(x, options.get("rope"), first=int(last))  # (B, heads, hw, d) each
            patches = x if last else self._finish(x, F.scaled_dot_product_attention(q, k, v))  # (B, hw, width)
            # As a view, the values would keep the queries and keys of their common projection alive.
            return patches, F.pad(k, (0, 0, 1, 0)), v.contiguous()
        if asked is not None:
            q, k, v = self._project(x, None)  # (B, heads, N, d) each
            return self._finish(x, class_attention(q, k, v, *asked))  # (B, N, width)
        return super().forward(x, *args, **options)  # type: ignore[misc]

    def _project(self, x: Tensor, rope: Any, first: int = 0) -> tuple[Any, Tensor, Tensor]:
        """Tokens (B, T, width) -> queries (None if `first` is 1), keys and values (B, heads, T, d)."""
        raise NotImplementedError

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residual branches: x (B, T, width) and what attention gave (B, heads, T, d) -> (B, T, width)."""
        raise NotImplementedError


class ClipBlock(ProposalBlock):
    """Of open_clip's and OpenAI's residual block."""

    NEEDED = ("ln_1", "ln_2", "mlp")
    OPTIONAL = ("ls_1", "ls_2")
    ATTENTION = "attn"
    ATTENTION_NEEDED = ("in_proj_weight", "out_proj", "num_heads")
    ATTENTION_OPTIONAL = ("in_proj_bias", "parametrizations")  # whose weights are read like others

    def _project(self: Any, x: Tensor, rope: Any, first: int = 0) -> tuple[Any, Tensor, Tensor]:
        return (None,) * first + project(self.ln_1(x), projections(self.attn), first, 3)  # type: ignore[return-value]

    def _finish(self: Any, x: Tensor, attended: Tensor) -> Tensor:
        ls_1, ls_2 = getattr(self, "ls_1", _identity), getattr(self, "ls_2", _identity)
        x = x + ls_1(projections(self.attn).out(rearrange(attended, "b h t d -> b t (h d)")))
        return x + ls_2(self.mlp(self.ln_2(x)))


class TimmBlock(ProposalBlock):
    """Of timm's `Block` (ViT), `EvaBlock` and, with the norms behind its branches, `EvaBlockPostNorm`."""

    NEEDED = ("norm1", "drop_path1", "norm2", "drop_path2", "mlp")
    OPTIONAL = ("ls1", "gamma_1", "ls2", "gamma_2")
    ATTENTION = "attn"
    ATTENTION_NEEDED = ("q_norm", "k_norm", "norm", "proj", "proj_drop", "num_heads")
    ATTENTION_OPTIONAL = ("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias")

    def _project(self: Any, x: Tensor, rope: Any, first: int = 0) -> tuple[Any, Tensor, Tensor]:
        attn, heads = self.attn, self.attn.num_heads
        y = x if self._post_norm() else self.norm1(x)
        if attn.qkv is None:
            layers = (attn.q_proj, attn.k_proj, attn.v_proj)
            q, k, v = (rearrange(f(y), "b t (h d) -> b h t d", h=heads) for f in layers)
        else:
            if getattr(attn, "q_bias", None) is None:
                qkv = attn.qkv(y)
            else:
                bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
                qkv = attn.qkv(y) + bias if attn.qkv_bias_separate else F.linear(y, attn.qkv.weight, bias)
            q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=heads)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            rotate = _rotate_half if getattr(attn, "rotate_half", False) else _rotate_pairs
            sine, cosine = rope.chunk(2, dim=-1)  # (hw, d) each
            q, k = ((t * cosine + rotate(t) * sine).type_as(v) for t in (q, k))
        return q, k, v

    def _finish(self: Any, x: Tensor, attended: Tensor) -> Tensor:
        attn, post_norm = self.attn, self._post_norm()
        y = attn.proj_drop(attn.proj(attn.norm(rearrange(attended, "b h t d -> b t (h d)"))))
        x = x + self.drop_path1(self.norm1(y) if post_norm else self._scale(y, "ls1", "gamma_1"))
        if post_norm:
            return x + self.drop_path2(self.norm2(self.mlp(x)))
        return x + self.drop_path2(self._scale(self.mlp(self.norm2(x)), "ls2", "gamma_2"))

    def _post_norm(self: Any) -> bool:
        return not hasattr(self, "ls1") and not hasattr(self, "gamma_1")

    def _scale(self: Any, x: Tensor, layer: str, gamma: str) -> Tensor:
        if hasattr(self, layer):
            return getattr(self, layer)(x)
        return x if getattr(self, gamma) is None else getattr(self, gamma) * x


class TransformersBlock(ProposalBlock):
    """Of transformers' CLIP encoder layer, which its CLIP's relatives share."""

    NEEDED = ("layer_norm1", "layer_norm2", "mlp")
    ATTENTION = "self_attn"
    ATTENTION_NEEDED = ("q_proj", "k_proj", "v_proj", "out_proj", "num_heads")

    def _project(self: Any, x: Tensor, rope: Any, first: int = 0) -> tuple[Any, Tensor, Tensor]:
        attn, y = self.self_attn, self.layer_norm1(x)
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)[first:]
        parts = (rearrange(layer(y), "b t (h d) -> b h t d", h=attn.num_heads) for layer in layers)
        return (*(None,) * first, *parts)

    def _finish(self: Any, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.out_proj(rearrange(attended, "b h t d -> b t (h d)"))
        return x + self.mlp(self.layer_norm2(x))


def check_block(block: Any, layout: type[ProposalBlock], where: str) -> None:
    """Raise ValueError, naming what is unknown, unless `block` is built of the parts that its layout computes."""
    _check_parts(block, (*layout.NEEDED, layout.ATTENTION), layout.OPTIONAL, where)
    if getattr(block, "attn_mask", None) is not None:
        raise ValueError(f"{where} has an attention mask, as text towers have; pass the image tower")
    attn, where = getattr(block, layout.ATTENTION), f"{where}.{layout.ATTENTION}"
    if hasattr(attn, "get_delta_weight"):  # peft's LoRA around it, see `projections`
        refuse_own_methods(attn, where)
        attn = attn.base_layer
    _check_parts(attn, layout.ATTENTION_NEEDED, layout.ATTENTION_OPTIONAL, where)
    dropout = getattr(attn, "dropout", 0) or getattr(getattr(attn, "attn_drop", None), "p", 0)
    if dropout or getattr(attn, "add_zero_attn", False):
        raise ValueError(f"{where} has dropout or an extra key, which CLIP's attention has not")


def _check_parts(module: Any, needed: tuple[str, ...], optional: tuple[str, ...], where: str) -> None:
    refuse_unknown(module, (*needed, *optional), where)
    refuse_own_methods(module, where)
    missing = [name for name in needed if getattr(module, name, None) is None]
    if missing:
        raise ValueError(f"{where} ({type(module).__name__}) lacks {', '.join(missing)}, which is read of it here")


def run_block(call: Any, block: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
    """The host's own block on tokens (B, T, width), through `call`: the block itself or its `forward` without hooks."""
    batch_first = getattr(getattr(block, "attn", None), "batch_first", True)
    y = call(x if batch_first else x.transpose(0, 1), **options)
    y = y[0] if isinstance(y, tuple) else y  # as blocks of transformers 4 have it
    return y if batch_first else y.transpose(0, 1)


def prove_blocks(
    blocks: Iterable[tuple[str, Any]], layout: type[ProposalBlock], width: int, options: dict[str, Any]
) -> None:
    """Raise ValueError, naming the block, unless the split form gives what each kind of block gives by itself.

    A few random tokens of `width` go through both, in the block's dtype: a class token that sees itself and all
    patches, and the patches alone. Of the blocks that differ in nothing but their tensors one is run; on the meta
    device none. The block is in eval mode meanwhile, and no random state is touched.

    Args:
        blocks: names and blocks, patched or not.
        layout: the mixin that would be swapped in.
        width: of the tokens.
        options: what the host's blocks take besides tokens; a `rope` is made here for the few tokens.
    """
    proven = set()
    for where, block in blocks:
        floating = [p for p in block.parameters() if p.is_floating_point()]
        like = next((p for p in floating if p.ndim > 1), floating[0])
        if like.is_meta or (kind := _kind(block)) in proven:
            continue
        proven.add(kind)
        fresh = not isinstance(block, ProposalBlock)
        if fresh:
            swap_class(block, layout)
        try:
            with computing(block, like.device):
                same = _same_arithmetic(block, like.new_empty(0), width, options)
        finally:
            if fresh:
                restore_class(block)
        if not same:
            raise ValueError(
                f"{where} ({type(block).__name__}) has the parts of a known block but computes something else with "
                "them, so its class tokens can't be asked by themselves: not supported"
            )


def _kind(block: nn.Module) -> Any:
    """All that a block is besides its tensors."""
    return tuple(
        (name, type(module), *(f"{key} {value}" for key, value in vars(module).items() if _plain(value)))
        for name, module in block.named_modules()
        if not name.endswith(
            ("drop_path1", "drop_path2")
        )  # whose rate grows with the depth and is nothing in eval mode
    )


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or callable(value)


def _same_arithmetic(block: Any, like: Tensor, width: int, options: dict[str, Any]) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    x, ours = random(1, 1 + _PATCHES, width), {}
    if "rope" in options:
        rope = random(_PATCHES, 2 * block._project(x, None)[1].shape[-1])
        # Asked alone, the first token counts as a patch, too: sine 0 and cosine 1 leave it where it was.
        still = torch.cat([torch.zeros_like(rope[:1, ::2]), torch.ones_like(rope[:1, ::2])], dim=-1)
        options, ours = {**options, "rope": rope}, {"rope": torch.cat([still, rope])}
    own = run_block(block.forward, block, x, options)  # (1, 1+P, width)
    if not own.isfinite().all():  # weights that nobody has set yet
        return True
    tokens, _, _ = block.forward(x, keep=True, **ours)  # (1, 1+P, width)
    _, keys, values = block.forward(x[:, 1:], keep=True, **({"rope": options["rope"]} if ours else {}))
    bias = like.new_zeros(1, 1, 1, 1 + _PATCHES)
    class_token = block.forward(x[:, :1], asked=(keys, values, bias))  # (1, 1, width)
    # Of what the branches add, half of the digits: rounding stays far below, other arithmetic far above.
    allowed = torch.finfo(like.dtype).eps ** 0.5 * (own - x).abs().max()
    return bool((tokens - own).abs().max() <= allowed and (class_token - own[:, :1]).abs().max() <= allowed)


def _rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _identity(x: Tensor) -> Tensor:
    return x
