"""Proposal-biased attention (paper Eq. 2-4): class tokens look at their own mask, patches at patches.

`proposal_attention` is the form that runs; `dense_block` is the same equations with one (N+P)^2 bias, as the
paper writes them, kept as the oracle of the tests and the yardstick of the benchmark.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def proposal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Multi-head attention of N class tokens and P patch tokens, in two parts, without any (N+P)^2 mask.

    Class token n attends to itself and, with `bias`, to the patches (Eq. 2-3). Patches attend to patches only
    (Eq. 4), without any mask, so the fused kernel applies.

    Args:
        q: (B, heads, N+P, d) queries, class tokens first; or (B, heads, N, d) when only they are wanted.
        k: (B, heads, N+P, d) keys.
        v: (B, heads, N+P, d) values.
        bias: (B, 1, N, P) added to the logits of class tokens on patches: 0 inside the mask, -inf outside.

    Returns:
        The shape of `q`. A class token whose mask is empty sees itself alone and stays finite.

    Example:
        >>> q = k = v = torch.randn(1, 2, 3 + 4, 8)
        >>> proposal_attention(q, k, v, torch.zeros(1, 1, 3, 4)).shape
        torch.Size([1, 2, 7, 8])
    """
    n, p = bias.shape[-2:]
    q_cls, q_patch = q[:, :, :n], q[:, :, n:]
    (k_cls, k_patch), (v_cls, v_patch) = k.split([n, p], dim=2), v.split([n, p], dim=2)
    q_cls = q_cls * q.shape[-1] ** -0.5
    on_itself = (q_cls * k_cls).sum(-1, keepdim=True)  # (B, heads, N, 1)
    on_patches = q_cls @ k_patch.mT + bias  # (B, heads, N, P)
    weights = torch.cat([on_itself, on_patches], dim=-1).softmax(dim=-1).to(v.dtype)  # (B, heads, N, 1+P)
    out_cls = weights[..., :1] * v_cls + weights[..., 1:] @ v_patch  # (B, heads, N, d)
    if q.shape[2] == n:
        return out_cls
    out_patch = F.scaled_dot_product_attention(q_patch, k_patch, v_patch)  # (B, heads, P, d)
    return torch.cat([out_cls, out_patch], dim=2)


def proposal_block(block: Any, x: Tensor, bias: Tensor, last: bool = False) -> Tensor:
    """A CLIP residual block with proposal-biased attention, addressed by its parameters and children.

    Args:
        block: has ln_1, attn (in_proj_weight, in_proj_bias, out_proj, num_heads), ln_2, mlp (and ls_1, ls_2).
        x: (B, N+P, width), class tokens first.
        bias: (B, 1, N, P), see `proposal_attention`.
        last: nothing reads the patch tokens after this block: of them only keys and values are computed.

    Returns:
        (B, N+P, width), or (B, N, width) if `last`.
    """
    attn, width = block.attn, x.shape[-1]
    ls_1, ls_2 = getattr(block, "ls_1", _identity), getattr(block, "ls_2", _identity)
    queries = bias.shape[-2] if last else x.shape[1]
    q_bias, kv_bias = (None, None) if attn.in_proj_bias is None else attn.in_proj_bias.split([width, 2 * width])

    y = block.ln_1(x)  # (B, N+P, width)
    q = F.linear(y[:, :queries], attn.in_proj_weight[:width], q_bias)  # (B, Q, width)
    kv = F.linear(y, attn.in_proj_weight[width:], kv_bias)  # (B, N+P, 2 * width)
    q = rearrange(q, "b q (h d) -> b h q d", h=attn.num_heads)
    k, v = rearrange(kv, "b t (two h d) -> two b h t d", two=2, h=attn.num_heads)
    out = rearrange(proposal_attention(q, k, v, bias), "b h q d -> b q (h d)")  # (B, Q, width)
    x = x[:, :queries] + ls_1(attn.out_proj(out))
    return x + ls_2(block.mlp(block.ln_2(x)))


def dense_bias(bias: Tensor) -> Tensor:
    """The bias B of Eq. 2 written out for every pair of tokens, for blocks that take such a mask.

    Args:
        bias: (B, 1, N, P), see `proposal_attention`.

    Returns:
        (B, 1, N+P, N+P): class tokens see themselves and their patches, patches see patches (Eq. 4).
    """
    n, p = bias.shape[-2:]
    full = bias.new_full((bias.shape[0], 1, n + p, n + p), float("-inf"))
    full[:, :, :n, :n].diagonal(dim1=2, dim2=3).fill_(0)  # I(N, N)
    full[:, :, :n, n:] = bias  # Flat(M)
    full[:, :, n:, n:] = 0  # Eq. 4
    return full


def query_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Multi-head attention of one query, asked once for every proposal, as pools with a single query need it.

    Args:
        q: (B, heads, 1, d) the query.
        k, v: (B, heads, P, d) keys and values.
        bias: (B, 1, N, P) added to the logits; no row may be -inf throughout.

    Returns:
        (B, N, heads * d).

    Example:
        >>> q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 4, 8)
        >>> query_attention(q, k, k, torch.zeros(1, 1, 3, 4)).shape
        torch.Size([1, 3, 16])
    """
    q = q.expand(-1, -1, bias.shape[2], -1)  # (B, heads, N, d)
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h n d -> b n (h d)")


def dense_block(block: Any, x: Tensor, bias: Tensor) -> Tensor:
    """`proposal_block` with the bias of every pair of tokens and head written out.

    Args and returns as `proposal_block` with `last=False`.
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
