"""Proposal-biased attention (paper Eq. 2-4): class tokens look at their own mask, patches at patches.

Patches never see a class token, so their keys and values are computed once and kept; class tokens are asked against
them (`class_attention`). `dense_block` is the same equations with one (N+P)^2 bias, as the paper writes them, kept as
the oracle of the tests and the yardstick of the benchmark.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def class_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Multi-head attention of N class tokens, each on itself and on the patches of its mask (Eq. 2-3).

    Args:
        q, k, v: (B, heads, N, d) of the class tokens.
        keys: (B, heads, 1+P, d), zeros in the place of a class token's own key, then the patch tokens'.
        values: (B, heads, P, d) of the patch tokens.
        bias: (B, 1, N, 1+P) added to the logits: 0 for itself and inside the mask, -inf outside.

    Returns:
        (B, heads, N, d). A class token whose mask is empty sees itself alone and stays finite.

    Example:
        >>> import torch
        >>> q = k = v = torch.randn(1, 2, 3, 8)
        >>> keys, values = F.pad(torch.randn(1, 2, 4, 8), (0, 0, 1, 0)), torch.randn(1, 2, 4, 8)
        >>> class_attention(q, k, v, keys, values, torch.zeros(1, 1, 3, 5)).shape
        torch.Size([1, 2, 3, 8])
    """
    q = q * q.shape[-1] ** -0.5
    # In place, and with room for its own logit: copies of numbers for all pairs would cost as much as the products.
    logits = q @ keys.mT  # (B, heads, N, 1+P)
    logits += bias
    logits[..., 0] += (q * k).sum(-1)
    weights = logits.softmax(dim=-1).to(v.dtype)  # (B, heads, N, 1+P)
    return weights[..., :1] * v + weights[..., 1:] @ values  # (B, heads, N, d)


def query_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Multi-head attention of one query, asked once for every proposal, as pools with a single query need it.

    Args:
        q: (B, heads, 1, d) the query.
        k, v: (B, heads, P, d) keys and values.
        bias: (B, 1, N, P) added to the logits; no row may be -inf throughout.

    Returns:
        (B, N, heads * d).

    Example:
        >>> import torch
        >>> q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 4, 8)
        >>> query_attention(q, k, k, torch.zeros(1, 1, 3, 4)).shape
        torch.Size([1, 3, 16])
    """
    q = q.expand(-1, -1, bias.shape[2], -1)  # (B, heads, N, d)
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h n d -> b n (h d)")


class Projections(NamedTuple):
    """What an attention with the parameters of `nn.MultiheadAttention` computes with."""

    weight: Any  # of queries, keys and values one below the other, (3 * width, width), or a tuple of three
    bias: Tensor | None  # (3 * width,)
    heads: int
    out: Callable[[Tensor], Tensor]  # the output projection of (..., width)


def projections(attn: Any) -> Projections:
    """The projections of `attn`: an `nn.MultiheadAttention`, one with its parameters, or peft's LoRA around it.

    `nn.MultiheadAttention` reads the weight of its `out_proj` and never calls it, so neither is it called here:
    whatever wraps that layer changes as little as in the host.
    """
    if not hasattr(attn, "get_delta_weight"):
        return _projections_of(attn)
    # As its own forward does: what is active goes into the weights, the attention computes, and it comes out again.
    if attn.disable_adapters and attn.merged:
        attn.unmerge()
    if attn.disable_adapters or attn.merged:
        return _projections_of(attn.base_layer)
    attn.merge(adapter_names=[name for name in attn.active_adapters if name in attn.lora_A])
    try:
        return _projections_of(attn.base_layer)
    finally:
        attn.unmerge()


def _projections_of(attn: Any) -> Projections:
    weight, bias, out = attn.in_proj_weight, attn.in_proj_bias, attn.out_proj
    if weight is None:
        weight = attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight
    if isinstance(attn, nn.MultiheadAttention):
        out = functools.partial(F.linear, weight=out.weight, bias=out.bias)
    return Projections(weight, bias, attn.num_heads, out)


def project(x: Tensor, attn: Projections, first: int, last: int) -> tuple[Tensor, ...]:
    """Tokens (B, T, width) -> parts `first` to `last` (exclusive) of queries, keys, values, (B, heads, T, d) each."""
    if not isinstance(attn.weight, Tensor):
        biases = (None,) * 3 if attn.bias is None else attn.bias.chunk(3)
        parts = [F.linear(x, attn.weight[i], biases[i]) for i in range(first, last)]
        return tuple(rearrange(part, "b t (h d) -> b h t d", h=attn.heads) for part in parts)
    width = len(attn.weight) // 3
    rows = slice(first * width, last * width)
    fused = F.linear(x, attn.weight[rows], None if attn.bias is None else attn.bias[rows])
    return tuple(rearrange(fused, "b t (parts h d) -> parts b h t d", parts=last - first, h=attn.heads))


def dense_bias(bias: Tensor) -> Tensor:
    """The bias B of Eq. 2 written out for every pair of tokens, for blocks that take such a mask.

    Args:
        bias: (B, 1, N, P), see `class_attention`.

    Returns:
        (B, 1, N+P, N+P): class tokens see themselves and their patches, patches see patches (Eq. 4).
    """
    n, p = bias.shape[-2:]
    full = bias.new_full((bias.shape[0], 1, n + p, n + p), float("-inf"))
    full[:, :, :n, :n].diagonal(dim1=2, dim2=3).fill_(0)  # I(N, N)
    full[:, :, :n, n:] = bias  # Flat(M)
    full[:, :, n:, n:] = 0  # Eq. 4
    return full


def dense_block(block: Any, x: Tensor, bias: Tensor) -> Tensor:
    """A CLIP residual block with the bias of every pair of tokens and head written out.

    Args:
        block: has ln_1, attn (in_proj_weight, in_proj_bias, out_proj, num_heads), ln_2, mlp (and ls_1, ls_2).
        x: (B, N+P, width), class tokens first.
        bias: (B, 1, N, P), see `class_attention`.

    Returns:
        (B, N+P, width).
    """
    attn = block.attn
    ls_1, ls_2 = getattr(block, "ls_1", _identity), getattr(block, "ls_2", _identity)
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)  # (B, N+P, 3 * width)
    q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=attn.num_heads)
    full = dense_bias(bias).expand(-1, attn.num_heads, -1, -1)  # (B, heads, N+P, N+P)
    out = rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=full), "b h t d -> b t (h d)")
    x = x + ls_1(attn.out_proj(out))
    return x + ls_2(block.mlp(block.ln_2(x)))


def _identity(x: Tensor) -> Tensor:
    return x
