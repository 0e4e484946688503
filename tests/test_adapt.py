import copy
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import (
    ZOO,
    assert_same_modules,
    embedding,
    mask_aware_tower,
    plain_tower,
    random_images,
    random_masks,
    snapshot,
)

from maft_adapter import (
    encode_features,
    encode_image,
    encode_masks,
    encode_masks_and_image,
    is_mask_aware,
    make_mask_aware,
    restore,
    valid_masks,
)
from maft_adapter.attention import dense_block
from maft_adapter.masks import attention_bias, masks_on_grid
from maft_adapter.towers import attention_pool, class_token

START_LAYERS = range(4)  # the towers of conftest.py have three blocks
OTHER_SIZES = [(64, 40), (24, 48), (56, 56), (8, 8)]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def authors_position(tower: Any, grid: tuple[int, int]) -> Tensor:
    """Position embedding (1+hw, width) of a square tower for another grid."""
    side = round((len(tower.positional_embedding) - 1) ** 0.5)
    native = getattr(tower, "grid_size", (side, side))
    spatial = tower.positional_embedding[1:].T.reshape(1, -1, *native)
    spatial = F.interpolate(spatial, grid, mode="bicubic", align_corners=True)
    return torch.cat([tower.positional_embedding[:1], spatial.flatten(2)[0].T])


# Two encoders to compare with, both over an unpatched tower.


def embed(tower: Any, images: Tensor, position: Tensor) -> Tensor:
    patches = tower.conv1(images).flatten(2).mT  # (B, hw, width)
    class_token = tower.class_embedding.expand(len(images), 1, -1)
    return tower.ln_pre(torch.cat([class_token, patches], dim=1) + position)  # (B, 1+hw, width)


def dense_encoder(tower: Any, images: Tensor, masks: Tensor, start_layer: int, position: Tensor) -> Tensor:
    """The batch at once, with the explicit bias of Eq. 2 over all pairs of tokens."""
    n, grid = masks.shape[1], tuple(size // 8 for size in images.shape[-2:])
    assert len(grid) == 2
    x = embed(tower, images, position)
    for block in tower.transformer.resblocks[:start_layer]:
        batch_first = getattr(block.attn, "batch_first", True)
        x = block(x) if batch_first else block(x.transpose(0, 1)).transpose(0, 1)
    x = torch.cat([x[:, :1].expand(-1, n, -1), x[:, 1:]], dim=1)  # (B, N+hw, width)
    for block in tower.transformer.resblocks[start_layer:]:
        x = dense_block(block, x, attention_bias(masks, grid, x.dtype))
    return tower.ln_post(x[:, :n]) @ tower.proj


def naive_block(block: Any, x: Tensor, seen: Callable[[int], list[int]]) -> Tensor:
    """One residual block on the tokens (T, width) of one image; `seen(t)` lists what token t attends to."""
    attn = block.attn
    qkv = block.ln_1(x) @ attn.in_proj_weight.T + attn.in_proj_bias
    q, k, v = qkv.reshape(len(x), 3, attn.num_heads, -1).unbind(1)  # (T, heads, d) each
    rows = []
    for t in range(len(x)):
        logits = torch.einsum("hd,shd->hs", q[t], k[seen(t)]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hs,shd->hd", logits.softmax(1), v[seen(t)]).flatten())
    attended = torch.stack(rows) @ attn.out_proj.weight.T + attn.out_proj.bias
    x = x + getattr(block, "ls_1", nn.Identity())(attended)
    return x + getattr(block, "ls_2", nn.Identity())(block.mlp(block.ln_2(x)))


def naive_encoder(tower: Any, images: Tensor, on_grid: Tensor, start_layer: int) -> Tensor:
    """Image by image and proposal by proposal, each with one class token of its own, in float64."""
    tower = copy.deepcopy(tower).double()
    blocks, embeddings = tower.transformer.resblocks, []
    for x, proposals in zip(embed(tower, images.double(), tower.positional_embedding), on_grid, strict=True):
        everything = list(range(len(x)))
        for block in blocks[:start_layer]:
            x = naive_block(block, x, lambda t: everything)  # noqa: B023
        for proposal in proposals.flatten(1).tolist():
            inside = [0] + [1 + i for i, holds in enumerate(proposal) if holds]
            mine = x
            for block in blocks[start_layer:]:
                mine = naive_block(block, mine, lambda t: everything[1:] if t else inside)  # noqa: B023
            embeddings.append(tower.ln_post(mine[0]) @ tower.proj)
    return torch.stack(embeddings).reshape(*on_grid.shape[:2], -1)


# Numerics


@torch.no_grad()
@pytest.mark.parametrize("start_layer", START_LAYERS)
def test_equals_the_naive_encoder(tower: Any, images: Tensor, masks: Tensor, start_layer: int) -> None:
    grid = tuple(size // 8 for size in images.shape[-2:])
    expected = naive_encoder(tower, images, masks_on_grid(masks, grid), start_layer)  # type: ignore[arg-type]
    close(make_mask_aware(tower, start_layer)(images, masks), expected.float())


@torch.no_grad()
@pytest.mark.parametrize("start_layer", START_LAYERS)
def test_equals_the_dense_form(tower: Any, images: Tensor, masks: Tensor, start_layer: int) -> None:
    expected = dense_encoder(tower, images, masks, start_layer, tower.positional_embedding)
    close(make_mask_aware(tower, start_layer)(images, masks), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", OTHER_SIZES)
def test_other_image_sizes_equal_the_dense_form(tower: Any, size: tuple[int, int]) -> None:
    images, masks = random_images(size), random_masks(6, (30, 50))
    position = authors_position(tower, (size[0] // 8, size[1] // 8))
    expected = dense_encoder(tower, images, masks, 1, position)
    close(make_mask_aware(tower, 1)(images, masks), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", OTHER_SIZES)
def test_other_image_sizes_without_masks(tower: Any, size: tuple[int, int]) -> None:
    images = random_images(size)
    resized = copy.deepcopy(tower)
    resized.positional_embedding = nn.Parameter(authors_position(tower, (size[0] // 8, size[1] // 8)))
    close(make_mask_aware(tower, 1)(images), resized(images))


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 7, 300])
@pytest.mark.parametrize("size", [(32, 48), (11, 9), (4, 4), (128, 160)])
def test_any_number_and_resolution_of_masks(tower: Any, images: Tensor, n: int, size: tuple[int, int]) -> None:
    masks = random_masks(n, size)
    expected = dense_encoder(tower, images, masks, 1, tower.positional_embedding)
    make_mask_aware(tower, 1)
    assert tower(images, masks).shape == (2, n, 16)
    close(tower(images, masks), expected)
    close(tower(images, masks >= 0.5), dense_encoder_of_bools(tower, images, masks))


def dense_encoder_of_bools(tower: Any, images: Tensor, masks: Tensor) -> Tensor:
    plain = restore(copy.deepcopy(tower))
    return dense_encoder(plain, images, (masks >= 0.5).float(), 1, plain.positional_embedding)


@torch.no_grad()
def test_proposals_do_not_influence_each_other(tower: Any, images: Tensor, masks: Tensor) -> None:
    make_mask_aware(tower, 1)
    together = tower(images, masks)
    order = torch.tensor([3, 1, 4, 0, 2])
    close(tower(images, masks[:, order]), together[:, order])
    close(tower(images, masks[:, 1:3]), together[:, 1:3])
    close(tower(images, torch.cat([torch.zeros_like(masks), masks], dim=1))[:, 5:], together)
    close(tower(images[1:], masks[1:]), together[1:])
    different = (together[:, :, None] - together[:, None]).abs().amax(-1)  # (B, N, N)
    assert different[:, ~torch.eye(5, dtype=torch.bool)].min() > 1e-3  # but the masks matter


@torch.no_grad()
def test_patch_tokens_do_not_depend_on_the_proposals(tower: Any, images: Tensor, masks: Tensor) -> None:
    make_mask_aware(tower, 1)
    seen: list[Tensor] = []
    tower.transformer.resblocks[1].register_forward_hook(
        lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    tower(images, masks)
    tower(images, 1 - masks[:, :2])
    patches, asked, same_patches, others = seen
    assert torch.equal(patches, same_patches)
    assert patches.shape[1] > asked.shape[1] == 5
    assert (asked[:, :2] - others).abs().max() > 1e-2


@torch.no_grad()
def test_the_last_block_computes_no_patch_tokens(tower: Any, images: Tensor, masks: Tensor) -> None:
    make_mask_aware(tower, 1)
    shapes: list[tuple[int, ...]] = []
    tower.transformer.resblocks[2].mlp.register_forward_hook(lambda _, args, out: shapes.append(out.shape))
    tower(images, masks)
    assert shapes == [(2, 5, 32)]


@torch.no_grad()
def test_from_the_last_layer_on_every_proposal_is_the_image(tower: Any, images: Tensor, masks: Tensor) -> None:
    make_mask_aware(tower, 3)
    close(tower(images, masks), tower(images)[:, None].expand(-1, 5, -1))


@torch.no_grad()
def test_pixels_outside_a_mask_matter_only_through_the_patches(tower: Any, images: Tensor) -> None:
    masks = torch.zeros(2, 1, *images.shape[-2:])
    masks[..., :16, :] = 1
    make_mask_aware(tower, 2)
    before = tower(images, masks)
    images[..., 16:, :] = 0
    assert (tower(images, masks) - before).abs().max() > 1e-3  # mixed in by the blocks before L
    make_mask_aware(tower, 0)
    inside = tower(images, masks)
    tower.transformer.resblocks = tower.transformer.resblocks[:1]  # one block: nothing is mixed in
    single = make_mask_aware(tower, 0)(images, masks)
    close(single, tower(torch.cat([images[..., :16, :], images[..., 16:, :] + 5], dim=2), masks))
    assert (single - inside).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("start_layer", START_LAYERS)
def test_empty_and_tiny_masks_are_finite_and_flagged(tower: Any, images: Tensor, start_layer: int) -> None:
    make_mask_aware(tower, start_layer)
    height, width = images.shape[-2:]
    masks = torch.zeros(2, 4, height, width)  # 0: empty
    masks[:, 1] = 1  # full
    masks[:, 2, 8:16, 8:16] = 1  # one patch
    masks[:, 3, 9, 9] = 1  # one pixel, which vanishes on the grid
    embeddings = tower(images, masks)
    assert embeddings.isfinite().all()
    assert valid_masks(tower, images, masks).tolist() == [[False, True, True, False]] * 2
    close(embeddings[:, 3], embeddings[:, 0])
    # on a grid as fine as the mask's own the pixel is a patch
    larger = torch.zeros(2, 3, height * 8, width * 8)
    assert valid_masks(tower, larger, masks).tolist() == [[False, True, True, True]] * 2


def test_gradients_equal_those_of_the_dense_form(tower: Any, images: Tensor, masks: Tensor) -> None:
    tower.double()
    images, masks = images.double(), masks.double()
    weights = [block.attn.in_proj_weight for block in tower.transformer.resblocks]
    dense = dense_encoder(tower, images, masks, 1, tower.positional_embedding)
    expected = torch.autograd.grad(dense.square().sum(), weights)
    split = make_mask_aware(tower, 1)(images, masks)
    for grad, wanted in zip(torch.autograd.grad(split.square().sum(), weights), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


@torch.no_grad()
def test_bfloat16_is_near_float32(tower: Any, images: Tensor, masks: Tensor) -> None:
    make_mask_aware(tower, 1)
    expected = tower(images, masks), tower(random_images((64, 40)), masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = tower(images, masks)
    tower.bfloat16()
    actual = tower(images.bfloat16(), masks), tower(random_images((64, 40)).bfloat16(), masks)
    assert actual[0].dtype == torch.bfloat16
    for low, high in zip((mixed, *actual), (expected[0], *expected), strict=True):
        assert (low - high).abs().max() < 0.05 * high.abs().max()


@torch.no_grad()
def test_wrapped_towers_are_taken_where_masks_are_encoded(tower: Any, images: Tensor, masks: Tensor) -> None:
    expected = make_mask_aware(tower, 1)(images, masks)
    for wrapped in (torch.compile(tower, backend="eager"), nn.DataParallel(tower)):
        clip = SimpleNamespace(visual=wrapped)
        close(encode_masks(clip, images, masks), expected)
        assert torch.equal(valid_masks(wrapped, images, masks), valid_masks(tower, images, masks))


@torch.no_grad()
def test_images_are_cast_to_the_towers_precision(tower: Any, images: Tensor, masks: Tensor) -> None:
    make_mask_aware(tower, 1).bfloat16()
    assert tower(images, masks).dtype == torch.bfloat16


def test_masks_on_another_device_are_refused(tower: Any, images: Tensor, masks: Tensor) -> None:
    make_mask_aware(tower, 1)
    with pytest.raises(ValueError, match=r"masks are on meta, images on cpu; call masks\.to\(images\.device\)"):
        tower(images, masks.to("meta"))


@torch.no_grad()
def test_a_native_size_that_the_patch_does_not_divide(build_tower: Any) -> None:
    tower = build_tower(image_size=34)
    images = torch.randn(1, 3, 34, 34)
    before = tower(images)
    assert torch.equal(make_mask_aware(tower, 3)(images), before)
    close(tower(images, torch.ones(1, 1, 34, 34))[:, 0], before)  # no block is mask-aware: plain CLIP


@torch.no_grad()
def test_kept_features_are_indexed_as_lists_are(build_tower: Any) -> None:
    features = encode_features(make_mask_aware(build_tower(), 1), torch.randn(3, 3, 32, 32))
    for index in (0, 1, 2, -1, -2, -3, slice(1, 3), slice(None, None, 2)):
        wanted = [index] if isinstance(index, int) else index
        for part, whole in zip(features[index].tensors, features.tensors, strict=True):
            assert torch.equal(part, whole[wanted])
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"image {index} of 3"):
            features[index]


def test_one_weight_changed_in_place_makes_kept_features_stale(tower: Any, images: Tensor, masks: Tensor) -> None:
    with torch.no_grad():
        features = encode_features(make_mask_aware(tower, 1), images)
        tower.conv1.weight.view(-1)[1] += 1  # of those values that are not kept to compare with
    with pytest.raises(ValueError, match="have changed since these features were made"):
        tower(features, masks)


# Any masks, sizes and settings

ANY = ["open_clip", "timm-eva02", "timm-siglip-so400m", "resnet", "timm-convnext", "open_clip-clipa"]


@functools.cache
def pair(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The same tower twice, unpatched and patched."""
    return plain_tower(name).to(dtype), mask_aware_tower(name).to(dtype)


@torch.no_grad()
@given(data=st.data())
def test_what_every_tower_promises_of_any_masks(data: st.DataObject) -> None:
    name, dtype = data.draw(st.sampled_from(ANY)), data.draw(st.sampled_from([torch.float32, torch.float64]))
    kind, (plain, tower) = ZOO[name], pair(name, dtype)
    settings: dict[str, Any] = {"interpolation": data.draw(st.sampled_from(["maft", "open_clip"]))}
    if "start_layer" in tower.settings:
        settings["start_layer"] = data.draw(st.integers(0, 3))
    if "threshold" in tower.settings:
        settings["threshold"] = data.draw(st.floats(1e-3, 1))
    make_mask_aware(tower, **settings)
    grid = data.draw(st.one_of(st.none(), st.tuples(st.integers(1, 5), st.integers(1, 5))))
    stride = kind.size[0] // kind.grid[0]
    size = (grid[0] * stride, grid[1] * stride) if grid else kind.size
    batch, n, seed = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 6)), data.draw(st.integers(0, 2**16))
    images = random_images(size, batch, seed).to(dtype)
    masks = random_masks(n, data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40))), batch, seed)
    masks = masks * (masks > data.draw(st.floats(0, 0.9)))
    floats = st.sampled_from([torch.float16, torch.float32, torch.float64])
    masks = masks > 0.5 if data.draw(st.booleans()) else masks.to(data.draw(floats))

    # Means over masks are weighed in the masks' own precision.
    tolerance = 1e-12 if dtype == masks.dtype == torch.float64 else 2e-5

    def same(actual: Tensor, expected: Tensor) -> None:
        close(actual, expected, tolerance * max([1.0, *expected.abs().flatten().tolist()]))

    embeddings, image = tower(images, masks, with_image=True)
    assert embeddings.dtype == dtype and embeddings.shape[:2] == (batch, n) and embeddings.isfinite().all()
    # Proposals know nothing of one another: in any order, any of them, any number of times, each image alone.
    chosen = data.draw(st.lists(st.integers(0, n - 1), max_size=8)) if n else []
    same(tower(images, masks[:, chosen]), embeddings[:, chosen])
    same(tower(images[-1:], masks[-1:]), embeddings[-1:])
    # The image's part is the same for all of them, and kept it gives the same.
    assert torch.equal(encode_masks(tower, encode_features(tower, images), masks), embeddings)
    same(image, embedding(tower(images)))
    if size == kind.size:
        assert torch.equal(embedding(tower(images)), embedding(plain(images)))
    # What contains nothing that the tower sees is an empty mask; what contains everything is the image, and where there
    # is no class token and no mean of the image to fall back on, so is nothing.
    ends = tower(images, torch.cat([torch.zeros(batch, 1, 3, 3), torch.ones(batch, 1, 3, 3)], dim=1))
    unseen = ~valid_masks(tower, images, masks)  # (B, N)
    same(embeddings[unseen], ends[:, :1].expand_as(embeddings)[unseen])
    if kind.family is not class_token:
        same(ends[:, 1], image)
        if kind.family is not attention_pool:
            same(ends[:, 0], image)


# One pass for proposals and image, and whole CLIP models


@torch.no_grad()
@pytest.mark.parametrize("start_layer", START_LAYERS)
@pytest.mark.parametrize("size", [None, (24, 48)])
def test_with_image_is_both_at_once(
    tower: Any, images: Tensor, masks: Tensor, start_layer: int, size: tuple[int, int] | None
) -> None:
    make_mask_aware(tower, start_layer)
    images = images if size is None else random_images(size)
    embeddings, image = tower(images, masks, with_image=True)
    assert torch.equal(embeddings, tower(images, masks))
    close(image, tower(images))


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@pytest.mark.parametrize("final_ln_after_pool", [False, True])
def test_towers_that_return_their_patch_tokens_too(
    build_tower: Any, size: tuple[int, int], final_ln_after_pool: bool
) -> None:
    tower = build_tower(output_tokens=True, final_ln_after_pool=final_ln_after_pool)
    images, masks = random_images(size), random_masks(3, size)
    resized = copy.deepcopy(tower)
    resized.positional_embedding = nn.Parameter(authors_position(tower, (size[0] // 8, size[1] // 8)))
    make_mask_aware(tower, 1)
    for actual, expected in zip(tower(images), resized(images), strict=True):
        close(actual, expected)
    embeddings, image = tower(images, masks, with_image=True)
    close(embeddings, tower(images, masks))
    close(image, resized(images)[0])


@torch.no_grad()
def test_unit_length_on_demand(tower: Any, images: Tensor, masks: Tensor) -> None:
    make_mask_aware(tower, 1)
    clip = SimpleNamespace(visual=tower)
    raw = encode_masks(clip, images, masks)
    assert torch.equal(raw, tower(images, masks))
    unit = encode_masks(clip, images, masks, normalize=True)
    close(unit, raw / raw.norm(dim=-1, keepdim=True))
    both, image = encode_masks_and_image(clip, images, masks, normalize=True)
    assert isinstance(both, Tensor)
    close(both, unit)
    close(image.norm(dim=-1), torch.ones(2))
    assert torch.equal(encode_image(clip, images, normalize=True), F.normalize(encode_image(clip, images), dim=-1))
    ragged = encode_masks(clip, images, [masks[0], masks[1, :1]], normalize=True)
    close(torch.cat(ragged), torch.cat([unit[0], unit[1, :1]]))


def small_clip() -> Any:
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8},
        text_cfg={"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    ).eval()


@torch.no_grad()
def test_a_whole_clip_model_goes_on_as_before() -> None:
    clip, images, masks = small_clip(), random_images((32, 32)), random_masks(3, (32, 32))
    text = torch.randint(1, 32, (4, 8))
    before = clip(images, text)
    make_mask_aware(clip.visual, 1)
    assert all(torch.equal(a, b) for a, b in zip(clip(images, text), before, strict=True))
    _, image = encode_masks_and_image(clip, images, masks, normalize=True)
    close(image, clip.encode_image(images, normalize=True))
    close(encode_image(clip, images, normalize=True), clip.encode_image(images, normalize=True))
    assert encode_masks(clip, images, masks).shape == (2, 3, 16)


# What patching leaves as it was


def test_patching_keeps_object_parameters_and_plain_output(tower: Any, images: Tensor) -> None:
    host, keys = type(tower), list(tower.state_dict())
    parameters = [(name, id(parameter)) for name, parameter in tower.named_parameters()]
    with torch.no_grad():
        plain = tower(images)
    tower.train()
    trained = tower(images)
    trained.sum().backward()
    gradient = tower.conv1.weight.grad.clone()
    tower.zero_grad()

    assert make_mask_aware(tower.eval(), 1) is tower
    assert is_mask_aware(tower)
    assert isinstance(tower, host)
    assert list(tower.state_dict()) == keys
    assert [(name, id(parameter)) for name, parameter in tower.named_parameters()] == parameters
    with torch.no_grad():
        assert torch.equal(tower(images), plain)
    tower.train()
    again = tower(images)
    assert torch.equal(again, trained)
    again.sum().backward()
    assert torch.equal(tower.conv1.weight.grad, gradient)


@torch.no_grad()
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (0, 3), (3, 0), (1, 1)])
def test_patching_again_only_changes_the_start_layer(
    tower: Any, images: Tensor, masks: Tensor, first: int, second: int
) -> None:
    before, fresh = snapshot(tower), make_mask_aware(copy.deepcopy(tower), second)
    assert make_mask_aware(make_mask_aware(tower, first), second) is tower
    assert [type(module) for module in tower.modules()] == [type(module) for module in fresh.modules()]
    assert torch.equal(tower(images, masks), fresh(images, masks))
    assert_same_modules(snapshot(restore(tower)), before)


@torch.no_grad()
def test_weights_go_both_ways(tower: Any, images: Tensor, masks: Tensor) -> None:
    plain = copy.deepcopy(tower)
    make_mask_aware(tower, 1)
    for parameter in tower.parameters():
        parameter += 0.1
    plain.load_state_dict(tower.state_dict())
    assert torch.equal(plain(images), tower(images))
    assert torch.equal(make_mask_aware(plain, 1)(images, masks), tower(images, masks))


@torch.no_grad()
def test_hooks_on_blocks_fire(tower: Any, images: Tensor, masks: Tensor) -> None:
    calls: list[int] = []
    blocks = tower.transformer.resblocks
    blocks[2].register_forward_hook(lambda *_: calls.append(2))  # before patching and after it
    make_mask_aware(tower, 1)
    blocks[0].register_forward_hook(lambda *_: calls.append(0))
    blocks[1].register_forward_hook(lambda *_: calls.append(1))
    tower(images, masks)
    assert calls == [0, 1, 2, 1, 2]  # patches, then class tokens
    calls.clear()
    tower(images, masks, with_image=True)
    assert calls == [0, 1, 2, 1, 2, 1, 2]  # block 0 runs once for both
    before = tower(images, masks)
    blocks[2].register_forward_hook(lambda module, args, output: output if isinstance(output, tuple) else output.cos())
    assert (tower(images, masks) - before).abs().max() > 1e-3


def test_gradient_checkpointing_changes_nothing(tower: Any, images: Tensor, masks: Tensor) -> None:
    make_mask_aware(tower.train(), 1)

    def run() -> tuple[list[Tensor], list[Tensor]]:
        outputs = list(tower(images, masks, with_image=True))
        loss = sum(output.square().sum() for output in outputs)
        return outputs, list(torch.autograd.grad(loss, tower.parameters()))

    expected = run()
    if hasattr(tower, "set_grad_checkpointing"):
        tower.set_grad_checkpointing()
    else:
        tower.transformer.grad_checkpointing = True
    calls: list[int] = []
    tower.transformer.resblocks[2].ln_1.register_forward_hook(lambda *_: calls.append(1))
    for actual, wanted in zip(run(), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))
    assert len(calls) == 6  # patches, class tokens and the image are each computed again on the way back


@torch.no_grad()
def test_open_clips_other_methods_survive(build_tower: Any) -> None:
    tower, images = build_tower(), random_images((32, 32))
    expected = tower.forward_intermediates(images)
    make_mask_aware(tower, 1)
    actual = tower.forward_intermediates(images)
    assert torch.equal(actual["image_features"], expected["image_features"])
    pairs = zip(actual["image_intermediates"], expected["image_intermediates"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    tower.lock(unlocked_groups=1)
    assert [name for name, p in tower.named_parameters() if p.requires_grad] == ["proj"]


def test_active_patch_dropout(build_tower: Any) -> None:
    tower, masks = build_tower(patch_dropout=0.5), random_masks(3, (32, 32))
    plain = copy.deepcopy(tower)
    make_mask_aware(tower, 1).train()
    plain.train()
    for size in [(32, 32), (64, 40)]:  # without masks it goes on dropping, at any size
        images = random_images(size)
        grid = (size[0] // 8, size[1] // 8)
        plain.positional_embedding = nn.Parameter(authors_position(tower, grid))
        torch.manual_seed(0)
        expected = plain(images)
        torch.manual_seed(0)
        close(tower(images), expected)
    with refused(tower, ValueError, "patch_dropout would drop patches under the masks; call .eval()"):
        tower(images, masks)
    assert tower.eval()(images, masks).shape == (2, 3, 16)
    tower.train().patch_dropout.prob = 0
    assert torch.equal(tower(images, masks), tower.eval()(images, masks))


# Refusals, each of which leaves the model as it was


@contextmanager
def refused(module: nn.Module, error: type[Exception], message: str) -> Iterator[None]:
    before = snapshot(module)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=re.escape(message)):
        yield
    assert_same_modules(snapshot(module), before)
    after = module.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("start_layer", [-1, 4, 8, "1", True, 1.0, None])
def test_start_layer_out_of_range(tower: Any, images: Tensor, start_layer: Any, patched: bool) -> None:
    if patched:
        make_mask_aware(tower, 2)
    with torch.no_grad():
        before = tower(images)
        with refused(tower, ValueError, f"start_layer is {start_layer!r}, expected an int in 0..3"):
            make_mask_aware(tower, start_layer)
        assert torch.equal(tower(images), before)


def test_the_default_start_layer_needs_eight_blocks(build_tower: Any) -> None:
    with refused(tower := build_tower(), ValueError, "start_layer is 8, expected an int in 0..3"):
        make_mask_aware(tower)
    assert make_mask_aware(build_tower(layers=9)).start_layer == 8


@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (torch.compile, TypeError, "OptimizedModule is a torch.compile wrapper; patch before compiling"),
        (
            nn.DataParallel,
            TypeError,
            "DataParallel is a parallel wrapper; patch before wrapping, or pass its .module",
        ),
        (nn.Sequential, ValueError, "Sequential is not supported: it has no class token"),
    ],
)
def test_wrappers_are_refused(build_tower: Any, wrap: Any, error: type[Exception], message: str) -> None:
    wrapper = wrap(build_tower())
    with refused(wrapper, error, message):
        make_mask_aware(wrapper, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused() -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match=r"TopLevelTracedModule is TorchScript.*patch the eager model"):
        make_mask_aware(traced, 1)


def test_a_whole_clip_is_refused() -> None:
    clip = small_clip()
    with refused(clip, TypeError, "CLIP is a whole CLIP model; pass its image tower: make_mask_aware(model.visual)"):
        make_mask_aware(clip, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), "VisionTransformer is not supported"),
        (lambda: small_clip().transformer, "Transformer is not supported: it has no class token"),
        (lambda: nn.Linear(2, 2), "Linear is not supported: it has no class token, learned query, attention pool"),
    ],
)
def test_other_architectures_are_refused_by_name(build: Callable[[], nn.Module], message: str) -> None:
    module = build()
    with refused(module, ValueError, message):
        make_mask_aware(module, 0)


@pytest.mark.parametrize("visual", [None, "ViT-B-16", lambda images: images])
def test_only_modules_are_towers(visual: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a CLIP image tower \(a torch.nn.Module\), got"):
        make_mask_aware(visual, 1)


def test_what_is_not_patched_cannot_be_restored_or_asked(tower: Any, images: Tensor, masks: Tensor) -> None:
    name = type(tower).__name__
    with refused(tower, ValueError, f"{name} is not mask-aware: there is nothing to restore"):
        restore(tower)
    with refused(tower, TypeError, f"{name} is not mask-aware; call make_mask_aware on it first"):
        valid_masks(tower, images, masks)
    message = "clip_model.visual is not mask-aware; call make_mask_aware(clip_model.visual) first"
    for encode in (encode_masks, encode_masks_and_image):
        with refused(tower, TypeError, message):
            encode(SimpleNamespace(visual=tower), images, masks)
        with refused(tower, TypeError, message):
            encode(tower, images, masks)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 3, 32, 32), "images are (B, 3, H, W) with B >= 1, got (0, 3, 32, 32)"),
        (torch.zeros(3, 32, 32), "got (3, 32, 32)"),
        (torch.zeros(2, 1, 32, 32), "got (2, 1, 32, 32)"),
        (torch.zeros(2, 3, 0, 32), "images of 0x32 do not divide into 8x8 patches"),
        (torch.zeros(2, 3, 36, 32), "images of 36x32 do not divide into 8x8 patches; resize or pad"),
        (torch.zeros(2, 3, 32, 33), "images of 32x33 do not divide into 8x8 patches"),
    ],
)
@pytest.mark.parametrize("with_masks", [True, False])
def test_bad_images_are_refused(tower: Any, images: Tensor, message: str, with_masks: bool) -> None:
    make_mask_aware(tower, 1)
    with refused(tower, ValueError, message):
        tower(images, torch.ones(2, 1, 32, 32) if with_masks else None)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda masks: masks[0], ValueError, "one image's need masks[None]"),
        (lambda masks: masks[:1], ValueError, "masks are for 1 images, but 2 images were given"),
        (lambda masks: masks[:0], ValueError, "masks are for 0 images, but 2 images were given"),
        (
            lambda masks: masks * 8 - 4,
            ValueError,
            "masks must lie in [0, 1], got values from -4 to 4: logits need .sigmoid()",
        ),
        (lambda masks: masks / 0, ValueError, "masks must lie in [0, 1], got values from nan to nan"),
        (lambda masks: masks.long(), TypeError, "masks are bool or float in [0, 1], got torch.int64"),
        (lambda masks: masks.numpy(), TypeError, "masks are a (B, N, H, W) tensor"),
        (lambda masks: [masks[0]], ValueError, "masks are for 1 images, but 2 images were given"),
        (lambda masks: [masks[0], masks[1, 0]], ValueError, "masks[1] is (32"),
    ],
)
def test_bad_masks_are_refused(tower: Any, images: Tensor, masks: Tensor, bad: Any, error: Any, message: str) -> None:
    make_mask_aware(tower, 1)
    wrong = bad(masks)
    with torch.no_grad():
        before = tower(images, masks)
        for encode in (encode_masks, encode_masks_and_image):
            with refused(tower, error, message):
                encode(SimpleNamespace(visual=tower), images, wrong)
        if isinstance(wrong, Tensor):
            for call in (
                tower,
                lambda *args: tower(*args, with_image=True),
                lambda *args: valid_masks(tower, *args),
            ):
                with refused(tower, error, message):
                    call(images, wrong)
        assert torch.equal(tower(images, masks), before)
