from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from zoo import mask_aware_tower, random_images, random_masks

from maft_adapter.attention import class_attention, dense_block
from maft_adapter.towers.base import swap_class
from maft_adapter.towers.blocks import ClipBlock

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


def split(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the class tokens q, k and v, of the patches keys and values, as `class_attention` takes them."""
    return q[:, :, :N], k[:, :, :N], v[:, :, :N], pad(k[:, :, N:], (0, 0, 1, 0)), v[:, :, N:]


def test_equals_a_loop_over_tokens() -> None:
    q, k, v = random_qkv()
    bias = random_bias().double()
    out = class_attention(*split(q, k, v), pad(bias, (1, 0)))
    for b, h in product(range(B), range(HEADS)):
        expected = token_by_token(q[b, h], k[b, h], v[b, h], bias[b, 0] == 0)[:N]
        torch.testing.assert_close(out[b, h], expected, rtol=0, atol=1e-12)


def test_an_empty_mask_returns_its_own_value() -> None:
    q, k, v = random_qkv()
    bias = torch.full((B, 1, N, P), float("-inf"), dtype=torch.float64)
    torch.testing.assert_close(class_attention(*split(q, k, v), pad(bias, (1, 0))), v[:, :, :N])


def test_without_proposals_it_is_empty() -> None:
    q, k, v = random_qkv()
    none = q[:, :, :0]
    out = class_attention(none, none, none, k, v[:, :, 1:], torch.zeros(B, 1, 0, N + P, dtype=torch.float64))
    assert out.shape == (B, HEADS, 0, D)


def test_gradients_are_those_of_finite_differences() -> None:
    parts = [x[:1, :1].clone().requires_grad_() for x in split(*random_qkv())]  # q, k, v, keys, values
    bias = random_bias()[:1].double()
    assert torch.autograd.gradcheck(
        lambda q, k, v, keys, values: class_attention(q, k, v, keys, values, pad(bias, (1, 0))), parts
    )


def test_large_logits_stay_finite() -> None:
    q, k, v = random_qkv()
    assert class_attention(*split(1e4 * q, 1e4 * k, v), pad(random_bias().double(), (1, 0))).isfinite().all()


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


def split_block(block: Any, x: Tensor, bias: Tensor) -> Tensor:
    """Patches once, then class tokens asked of what they kept; with `dense_block`'s arguments and result."""
    swap_class(block, ClipBlock)
    patches, keys, values = block(x[:, N:], keep=True)
    unread, *same = block(x[:, N:], keep=True, last=True)
    assert torch.equal(unread, x[:, N:])
    for kept, expected in zip(same, (keys, values), strict=True):
        torch.testing.assert_close(kept, expected)
    return torch.cat([block(x[:, :N], asked=(keys, values, pad(bias, (1, 0)))), patches], dim=1)


def test_both_forms_of_the_block_equal_the_loop(tower: Any) -> None:
    block = tower.transformer.resblocks[0].double()
    width = block.ln_1.normalized_shape[0]
    x = torch.randn(B, N + P, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    bias = random_bias().double()
    expected = block_loop(block, x, bias)
    torch.testing.assert_close(dense_block(block, x, bias), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(split_block(block, x, bias), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", [dense_block, split_block])
def test_attention_without_biases(build_tower: Any, form: Any) -> None:
    first, second = build_tower().transformer.resblocks[:2]
    second.load_state_dict(first.state_dict())
    x, bias = torch.randn(B, N + P, first.ln_1.normalized_shape[0]), random_bias()
    torch.nn.init.zeros_(first.attn.in_proj_bias)
    second.attn.in_proj_bias = None
    torch.testing.assert_close(form(second, x, bias), form(first, x, bias))


@torch.no_grad()
def test_adapters_that_are_merged_and_then_disabled_say_nothing() -> None:
    peft = pytest.importorskip("peft", reason="peft, of the extra test, is not installed")
    images, masks = random_images((32, 32)), random_masks(3, (32, 32))
    expected = mask_aware_tower("open_clip")(images, masks)
    config = peft.LoraConfig(target_modules=["attn"], init_lora_weights=False)
    wrapped = peft.get_peft_model(mask_aware_tower("open_clip"), config)
    adapted = wrapped(images, masks)
    assert (adapted - expected).abs().max() > 1e-2
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(images, masks), adapted, rtol=0, atol=1e-4)
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(images, masks), expected, rtol=0, atol=1e-4)
