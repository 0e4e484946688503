import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from maft_adapter import make_mask_aware, restore
from maft_adapter.towers import FAMILIES, class_token, layouts
from maft_adapter.towers.base import MaskAware


def test_recognised_and_accepted_by_one_family(tower: Any) -> None:
    assert [family for family in FAMILIES if family.recognise(tower)] == [class_token]
    for start_layer in range(4):
        class_token.check(tower, start_layer)


def test_only_the_tower_and_its_blocks_from_the_start_layer_on_are_swapped(tower: Any) -> None:
    make_mask_aware(tower, 1)
    swapped = {name for name, module in tower.named_modules() if isinstance(module, MaskAware)}
    assert swapped == {"", "transformer.resblocks.1", "transformer.resblocks.2"}
    blocks = tower.transformer.resblocks
    assert type(blocks[1]) is type(blocks[2])  # one class for all
    assert type(blocks[1]).__bases__[1] is type(blocks[0])
    restore(tower)
    assert not any(isinstance(module, MaskAware) for module in tower.modules())


def test_native_grid(tower: Any) -> None:
    height, width = getattr(tower, "image_size", (32, 32))
    assert layouts.native_grid(tower) == (height // 8, width // 8)


@pytest.mark.parametrize("grid", [(4, 4), (7, 7), (3, 9), (1, 1), (30, 30)])
def test_position_is_interpolated_bicubically_between_the_corners(grid: tuple[int, int]) -> None:
    embedding = torch.randn(1 + 4 * 4, 6, generator=torch.Generator().manual_seed(0))
    actual = layouts.interpolate_position(embedding, (4, 4), grid)
    expected = nn.functional.interpolate(
        embedding[1:].T.reshape(1, 6, 4, 4), size=grid, mode="bicubic", align_corners=True
    )
    assert torch.equal(actual[0], embedding[0])  # the class token has no place
    torch.testing.assert_close(actual[1:], expected[0].flatten(1).T)
    if min(grid) > 1:  # align_corners: the corners stay where they were
        corners = actual[1:].reshape(*grid, 6)[[0, 0, -1, -1], [0, -1, 0, -1]]
        torch.testing.assert_close(corners, embedding[1:].reshape(4, 4, 6)[[0, 0, -1, -1], [0, -1, 0, -1]])


def test_position_keeps_its_precision() -> None:
    embedding = torch.randn(1 + 2 * 3, 4, dtype=torch.float64)
    larger = layouts.interpolate_position(embedding, (2, 3), (5, 5))
    assert larger.dtype == torch.float64
    corners = larger[1:].reshape(5, 5, 4)[[0, 0, -1, -1], [0, -1, 0, -1]]
    native = embedding[1:].reshape(2, 3, 4)[[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, native, rtol=0, atol=1e-14)
    half = layouts.interpolate_position(embedding.bfloat16(), (2, 3), (5, 5))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), larger, rtol=0.02, atol=0.02)


def with_child(path: str, name: str) -> Callable[[Any], Any]:
    def change(tower: Any) -> None:
        tower.get_submodule(path).add_module(name, nn.LayerNorm(32))

    return change


def with_parameter(path: str, name: str) -> Callable[[Any], Any]:
    def change(tower: Any) -> None:
        tower.get_submodule(path).register_parameter(name, nn.Parameter(torch.ones(32)))

    return change


def with_attributes(path: str, **values: Any) -> Callable[[Any], Any]:
    def change(tower: Any) -> None:
        for name, value in values.items():
            setattr(tower.get_submodule(path), name, value)

    return change


def without(path: str, name: str) -> Callable[[Any], Any]:
    def change(tower: Any) -> None:
        delattr(tower.get_submodule(path), name)

    return change


LAST = "transformer.resblocks.2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_child("", "neck"), "the tower ("),
        (with_child("", "neck"), "has neck, unknown here: patching it would leave that out"),
        (with_parameter("", "register_tokens"), "has register_tokens, unknown here"),
        (with_child("transformer", "norm"), "has norm, unknown here"),
        (with_child(LAST, "adapter"), f"{LAST} ("),
        (with_child(LAST, "adapter"), "has adapter, unknown here"),
        (with_parameter(LAST, "gamma_1"), "has gamma_1, unknown here"),
        (with_child(f"{LAST}.attn", "rope"), "has rope, unknown here"),
        (with_parameter(f"{LAST}.attn", "temperature"), f"{LAST}.attn ("),
        (without(LAST, "ln_2"), ") lacks ln_2, which is read of it here"),
        (with_attributes(LAST, attn_mask=torch.zeros(4, 4)), f"{LAST} has an attention mask, as text towers"),
        (
            with_attributes(LAST, attn=nn.MultiheadAttention(32, 4, kdim=8)),
            f"{LAST}.attn (MultiheadAttention) has q_proj_weight, k_proj_weight, v_proj_weight, unknown here",
        ),
        (with_attributes(LAST, attn=nn.MultiheadAttention(32, 4, dropout=0.1)), f"{LAST}.attn has dropout"),
        (with_attributes(LAST, attn=nn.MultiheadAttention(32, 4, add_zero_attn=True)), "or an extra key"),
        (
            with_attributes(LAST, attn=nn.MultiheadAttention(32, 4, add_bias_kv=True)),
            "has bias_k, bias_v, unknown",
        ),
        (
            with_attributes("", positional_embedding=nn.Parameter(torch.ones(9, 32))),
            "has 9 rows, expected 1 +",
        ),
    ],
)
def test_what_would_be_left_out_is_refused_by_name(tower: Any, change: Any, message: str) -> None:
    change(tower)
    classes = [type(module) for module in tower.modules()]
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mask_aware(tower, 3)  # also where the block is not touched: another call may lower start_layer
    assert [type(module) for module in tower.modules()] == classes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "transformer.resblocks.0.attn (Attention) has ln_q, ln_k, unknown here"),
        ({"scale_heads": True}, "attn (Attention) has head_scale"),
        ({"scaled_cosine_attn": True}, "attn (Attention) has logit_scale"),
        ({"scale_attn_inner": True}, "attn (Attention) has ln_inner"),
        ({"scale_attn": True}, "transformer.resblocks.0 (CustomResidualAttentionBlock) has ln_attn"),
        ({"pool_type": "none"}, "VisionTransformer is not supported"),
        ({"attentional_pool": "parallel"}, "the tower (VisionTransformer) has attn_pool_contrastive"),
        ({"attentional_pool": True, "pool_type": "avg"}, "the tower gives 'avg' of its queries"),
    ],
)
def test_open_clip_options_that_compute_something_else_are_refused(
    build_tower: Any, options: dict[str, Any], message: str
) -> None:
    tower = build_tower(**options)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mask_aware(tower, 8 if "attentional_pool" in options else 1)


def test_a_compiled_block_is_refused(build_tower: Any) -> None:
    tower = build_tower()
    tower.transformer.resblocks[1] = torch.compile(tower.transformer.resblocks[1])
    with pytest.raises(ValueError, match=r"resblocks\.1 \(OptimizedModule\) has _orig_mod"):
        make_mask_aware(tower, 1)
