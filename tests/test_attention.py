from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from maft_adapter.attention import dense_block, proposal_attention, proposal_block

B, HEADS, N, P, D = 2, 3, 4, 6, 5


def random_bias(n: int = N, p: int = P) -> Tensor:
    """(B, 1, n, p); the first proposal is empty, the last one full."""
    outside = torch.rand(B, 1, n, p, generator=torch.Generator().manual_seed(3)) > 0.5
    outside[:, :, :1], outside[:, :, n - 1 :] = True, False
    return torch.zeros(B, 1, n, p).masked_fill(outside, float("-inf"))


def seen_by(token: int, inside: Tensor) -> list[int]:
    """The tokens that one token attends to, read off Eq. 2-4; `inside` is (N, P) bool."""
    n, p = inside.shape
    if token >= n:
        return list(range(n, n + p))
    return [token] + [n + i for i in range(p) if inside[token, i]]


def token_by_token(q: Tensor, k: Tensor, v: Tensor, inside: Tensor) -> Tensor:
    """Attention of one image and head, (T, d) each, with one softmax per token over the tokens it sees."""
    rows = []
    for token in range(len(q)):
        seen = seen_by(token, inside)
        weights = torch.stack([q[token] @ k[i] / k.shape[1] ** 0.5 for i in seen]).exp()
        rows.append(sum(w * v[i] for w, i in zip(weights / weights.sum(), seen, strict=True)))
    return torch.stack(rows)


def random_qkv() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, B, HEADS, N + P, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return q, k, v


def test_equals_a_loop_over_tokens() -> None:
    q, k, v = random_qkv()
    bias = random_bias().double()
    out = proposal_attention(q, k, v, bias)
    for b, h in product(range(B), range(HEADS)):
        expected = token_by_token(q[b, h], k[b, h], v[b, h], bias[b, 0] == 0)
        torch.testing.assert_close(out[b, h], expected, rtol=0, atol=1e-12)


def test_class_queries_alone_give_the_class_rows() -> None:
    q, k, v = random_qkv()
    bias = random_bias().double()
    assert torch.equal(proposal_attention(q[:, :, :N], k, v, bias), proposal_attention(q, k, v, bias)[:, :, :N])


def test_an_empty_mask_returns_its_own_value() -> None:
    q, k, v = random_qkv()
    bias = torch.full((B, 1, N, P), float("-inf"), dtype=torch.float64)
    torch.testing.assert_close(proposal_attention(q, k, v, bias)[:, :, :N], v[:, :, :N])


def test_without_proposals_it_is_plain_attention_of_the_patches() -> None:
    q, k, v = (x[:, :, N:] for x in random_qkv())
    out = proposal_attention(q, k, v, torch.zeros(B, 1, 0, P, dtype=torch.float64))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = (x[:1, :1].requires_grad_() for x in random_qkv())
    bias = random_bias()[:1].double()
    assert torch.autograd.gradcheck(lambda q, k, v: proposal_attention(q, k, v, bias), (q, k, v))


def test_large_logits_stay_finite() -> None:
    q, k, v = random_qkv()
    assert proposal_attention(1e4 * q, 1e4 * k, v, random_bias().double()).isfinite().all()


def block_loop(block: Any, x: Tensor, bias: Tensor) -> Tensor:
    """A whole residual block on (B, N+P, width) with `token_by_token` inside."""
    attn, heads = block.attn, block.attn.num_heads
    images = []
    for tokens, inside in zip(block.ln_1(x), bias[:, 0] == 0, strict=True):
        qkv = tokens @ attn.in_proj_weight.T + attn.in_proj_bias
        parts = [part.chunk(heads, dim=1) for part in qkv.chunk(3, dim=1)]
        rows = [token_by_token(q, k, v, inside) for q, k, v in zip(*parts, strict=True)]
        images.append(torch.cat(rows, dim=1))
    attended = torch.stack(images) @ attn.out_proj.weight.T + attn.out_proj.bias
    scale_1, scale_2 = (getattr(block, name).gamma if is_scaled(block) else 1 for name in ("ls_1", "ls_2"))
    x = x + scale_1 * attended
    return x + scale_2 * block.mlp(block.ln_2(x))


def is_scaled(block: Any) -> bool:
    return hasattr(getattr(block, "ls_1", None), "gamma")


def test_both_forms_of_the_block_equal_the_loop(tower: Any) -> None:
    block = tower.transformer.resblocks[0].double()
    width = block.ln_1.normalized_shape[0]
    x = torch.randn(B, N + P, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    bias = random_bias().double()
    expected = block_loop(block, x, bias)
    torch.testing.assert_close(dense_block(block, x, bias), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(proposal_block(block, x, bias), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(proposal_block(block, x, bias, last=True), expected[:, :N], rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", [dense_block, proposal_block])
def test_attention_without_biases(build_tower: Any, form: Any) -> None:
    block = build_tower().transformer.resblocks[0]
    x, bias = torch.randn(B, N + P, block.ln_1.normalized_shape[0]), random_bias()
    torch.nn.init.zeros_(block.attn.in_proj_bias)
    expected = form(block, x, bias)
    block.attn.in_proj_bias = None
    torch.testing.assert_close(form(block, x, bias), expected)
