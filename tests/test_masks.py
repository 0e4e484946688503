import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maft_adapter.masks import attention_bias, boxes_to_masks, check_masks, masks_on_grid, mean_weights, pad_masks


def bilinear(mask: NDArray[np.float64], grid: tuple[int, int]) -> NDArray[np.float64]:
    """Sample one mask (H, W) at the centres of the grid's cells, between the centres of its own pixels."""
    sampled = np.zeros(grid)
    for i, j in product(*map(range, grid)):
        corners = []
        for index, cells, pixels in ((i, grid[0], mask.shape[0]), (j, grid[1], mask.shape[1])):
            at = max((index + 0.5) * pixels / cells - 0.5, 0)
            low = int(at)
            corners.append(((low, 1 - at + low), (min(low + 1, pixels - 1), at - low)))
        for (y, weight_y), (x, weight_x) in product(*corners):
            sampled[i, j] += weight_y * weight_x * mask[y, x]
    return sampled


@pytest.mark.parametrize("size", [(4, 6), (8, 12), (9, 14), (3, 3), (1, 1), (64, 80)])
def test_grid_is_the_thresholded_bilinear_resize(size: tuple[int, int]) -> None:
    masks = torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    on_grid = masks_on_grid(masks, (4, 6))
    assert on_grid.dtype == torch.bool
    for b, n in np.ndindex(2, 3):
        expected = bilinear(masks[b, n].numpy(), (4, 6)) >= 0.5
        np.testing.assert_array_equal(on_grid[b, n].numpy(), expected)


def test_threshold_includes_one_half() -> None:
    below = torch.tensor(0.5).nextafter(torch.tensor(0.0)).item()
    masks = torch.tensor([0.5, below]).reshape(1, 2, 1, 1).expand(-1, -1, 4, 4)
    assert masks_on_grid(masks, (4, 4)).flatten(2).all(-1).tolist() == [[True, False]]


def test_bool_and_half_masks_are_the_same_proposals_as_float_ones() -> None:
    masks = torch.rand(2, 4, 17, 23) > 0.5
    expected = masks_on_grid(masks.float(), (5, 7))
    assert torch.equal(masks_on_grid(masks, (5, 7)), expected)
    assert torch.equal(masks_on_grid(masks.bfloat16(), (5, 7)), expected)
    assert 0.2 < expected.float().mean() < 0.8


def test_complement_and_single_pixels() -> None:
    masks = torch.rand(1, 5, 32, 48) > 0.4
    # where no resized value is exactly one half, a patch is either in the mask or in its complement
    odd = masks_on_grid(masks[..., :31, :47], (5, 5))
    assert torch.equal(odd, ~masks_on_grid(~masks[..., :31, :47], (5, 5)))
    pixel = torch.zeros(1, 1, 32, 32)
    pixel[..., 5, 9] = 1
    assert not masks_on_grid(pixel, (4, 4)).any()  # vanishes on a coarser grid
    assert torch.equal(masks_on_grid(pixel, (32, 32)), pixel.bool())  # and stays on its own


def test_no_proposals() -> None:
    assert masks_on_grid(torch.rand(2, 0, 8, 8), (4, 5)).shape == (2, 0, 4, 5)
    assert attention_bias(torch.rand(2, 0, 8, 8), (4, 5), torch.float32).shape == (2, 1, 0, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bias_is_zero_inside_and_minus_infinity_outside_row_by_row(dtype: torch.dtype) -> None:
    masks = torch.tensor([[1, 0, 0], [0, 1, 1]]).bool().reshape(1, 1, 2, 3)
    bias = attention_bias(masks, (2, 3), dtype)
    assert bias.dtype == dtype
    infinity = float("inf")
    assert bias.tolist() == [[[[0, -infinity, -infinity, -infinity, 0, 0]]]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_appends_empty_masks(dtype: torch.dtype) -> None:
    ragged = [(torch.rand(n, 4, 5) > 0.5).to(dtype) for n in (2, 0, 3)]
    padded = pad_masks(ragged)
    assert padded.shape == (3, 3, 4, 5)
    assert padded.dtype == dtype
    for image, masks in zip(padded, ragged, strict=True):
        assert torch.equal(image[: len(masks)], masks)
        assert not image[len(masks) :].any()


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ([], ValueError, "empty list"),
        (None, TypeError, "a list of (N_i, H, W), got None"),
        ([[[[1.0]]]], TypeError, "a list of (N_i, H, W), got [[[[1.0]]]]"),
        (np.ones((1, 2, 4, 4)), TypeError, "a list of (N_i, H, W)"),
        ([torch.ones(4, 4)], ValueError, "masks[0] is (4, 4)"),
        ([torch.ones(1, 4, 4), torch.ones(1, 4, 5)], ValueError, "masks[1] is (1, 4, 5)"),
        ([torch.ones(1, 4, 4), torch.ones(1, 4, 4).bool()], ValueError, "one H x W and one dtype"),
    ],
)
def test_padding_refuses(masks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        pad_masks(masks)


@pytest.mark.parametrize(
    "masks",
    [
        torch.zeros(2, 3, 4, 5),
        torch.ones(2, 3, 4, 5),
        torch.rand(2, 3, 1, 1).half(),
        torch.rand(2, 1, 4, 5) > 0.5,
        torch.rand(2, 0, 4, 5),
    ],
)
def test_check_accepts(masks: Tensor) -> None:
    check_masks(masks, batch=2)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ([torch.ones(3, 4, 4)] * 2, TypeError, "got list"),
        (np.ones((2, 3, 4, 4)), TypeError, "got ndarray"),
        (torch.ones(2, 3, 4, 4).long(), TypeError, "got torch.int64; 0 and 1 need .bool()"),
        (torch.full((2, 3, 4, 4), 255).byte(), TypeError, "got torch.uint8"),
        (torch.ones(3, 4, 4), ValueError, "got (3, 4, 4); one image's need masks[None]"),
        (torch.ones(2, 3, 1, 4, 4), ValueError, "got (2, 3, 1, 4, 4)"),
        (torch.ones(2, 3, 0, 4), ValueError, "got (2, 3, 0, 4)"),
        (torch.ones(1, 3, 4, 4), ValueError, "for 1 images, but 2 images"),
        (
            torch.full((2, 3, 4, 4), -3.0),
            ValueError,
            "[0, 1], got values from -3 to -3: logits need .sigmoid()",
        ),
        (torch.full((2, 3, 4, 4), 1.01), ValueError, "got values from 1.01 to 1.01"),
        (torch.full((2, 3, 4, 4), float("inf")), ValueError, "got values from inf to inf"),
        (torch.ones(2, 3, 4, 4).index_fill(2, torch.tensor(1), float("nan")), ValueError, "from nan to nan"),
    ],
)
def test_check_refuses(masks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        check_masks(masks, batch=2)


# Sizes and shares: any masks on any grid

sizes = st.tuples(st.integers(1, 50), st.integers(1, 50))
grids = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(size=sizes, grid=grids, seed=st.integers(0, 10**6), soft=st.booleans())
def test_what_is_gathered_is_what_interpolating_whole_masks_gives(
    size: tuple[int, int], grid: tuple[int, int], seed: int, soft: bool
) -> None:
    masks = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    masks = masks if soft else (masks > 0.5).float()
    whole = F.interpolate(masks, grid, mode="bilinear")
    clear = (whole - 0.5).abs() > 1e-6  # at one half, rounding decides
    assert torch.equal(masks_on_grid(masks, grid)[clear], (whole >= 0.5)[clear])


def test_ties_fall_as_in_the_authors_code() -> None:
    """Edges through the centres of cells, where the resized value is one half but for rounding."""
    for size, cells in ((1024, 30), (480, 30), (120, 30), (768, 30), (512, 24), (427, 30)):
        edges = torch.arange(size)
        masks = (torch.arange(size) >= edges[:, None])[None, :, None]  # (1, size, 1, size)
        whole = F.interpolate(masks.float(), (1, cells), mode="bilinear") >= 0.5
        assert torch.equal(masks_on_grid(masks, (1, cells)), whole)


@given(size=sizes, grid=grids, threshold=st.floats(1e-6, 1), half=st.booleans())
def test_full_masks_contain_every_patch_at_any_threshold(
    size: tuple[int, int], grid: tuple[int, int], threshold: float, half: bool
) -> None:
    masks = torch.ones(1, 1, *size, dtype=torch.float16 if half else torch.float32)
    assert masks_on_grid(masks, grid, threshold).all()
    assert not masks_on_grid(1 - masks, grid, threshold).any()


def area(mask: NDArray[np.float64], grid: tuple[int, int], seen: tuple[float, float]) -> NDArray[np.float64]:
    """Share of every cell inside one mask (H, W): its pixels drawn many times finer, and counted."""
    (h, w), (height, width) = mask.shape, grid
    share = np.zeros(grid)
    for i, j, y, x in np.ndindex(height, width, h, w):
        overlap = 1.0
        for index, cells, pixel, pixels, part in ((i, height, y, h, seen[0]), (j, width, x, w, seen[1])):
            cell = pixels * part / cells
            overlap *= max(0.0, min((index + 1) * cell, pixel + 1) - max(index * cell, pixel)) / cell
        share[i, j] += overlap * mask[y, x]
    return share


@pytest.mark.parametrize("seen", [(1.0, 1.0), (378 / 384, 0.75)])
@pytest.mark.parametrize(("size", "grid"), [((8, 8), (3, 5)), ((3, 2), (7, 4)), ((6, 9), (3, 3)), ((5, 1), (2, 2))])
def test_mean_weights_are_exact_areas(size: tuple[int, int], grid: tuple[int, int], seen: tuple[float, float]) -> None:
    masks = torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = mean_weights(masks, grid, seen)
    assert weights.dtype == torch.float64
    for b, n in np.ndindex(2, 3):
        expected = area(masks[b, n].numpy(), grid, seen)
        np.testing.assert_allclose(weights[b, n].numpy(), (expected / expected.sum()).flatten(), atol=1e-12)
    assert mean_weights(masks.half(), grid, seen).dtype == torch.float32


def test_an_empty_mask_weighs_every_cell_alike() -> None:
    masks = torch.zeros(1, 2, 6, 6)
    masks[0, 1, 5, 5] = 1  # beyond what the grid sees
    assert torch.equal(mean_weights(masks, (2, 2), (0.5, 0.5)), torch.full((1, 2, 4), 0.25))


def test_mean_weights_have_gradients_also_beside_an_empty_mask_and_without_masks() -> None:
    masks = torch.rand(1, 3, 6, 6)
    masks[0, 1] = 0
    masks.requires_grad_()
    mean_weights(masks, (2, 2))[..., 0].sum().backward()
    assert masks.grad is not None
    assert masks.grad.isfinite().all()
    assert masks.grad[0, 0].abs().max() > 0
    none = torch.rand(1, 0, 6, 6, requires_grad=True)
    mean_weights(none, (2, 2)).sum().backward()
    assert none.grad is not None


@pytest.mark.parametrize("native, stride", [((34, 34), 8), ((50, 34), 16)])
def test_only_what_the_grid_sees_counts(native: tuple[int, int], stride: int) -> None:
    grid = native[0] // stride, native[1] // stride
    seen = grid[0] * stride / native[0], grid[1] * stride / native[1]
    masks = torch.rand(1, 4, *native, generator=torch.Generator().manual_seed(2)) > 0.5
    cut = masks[..., : grid[0] * stride, : grid[1] * stride]
    assert torch.equal(masks_on_grid(masks, grid, seen=seen), masks_on_grid(cut, grid))
    torch.testing.assert_close(mean_weights(masks, grid, seen), mean_weights(cut, grid))
    fine = masks.repeat_interleave(3, 2).repeat_interleave(3, 3)  # of another resolution than the image
    torch.testing.assert_close(mean_weights(fine, grid, seen), mean_weights(cut, grid))


class Largest(TorchDispatchMode):
    """The largest tensor that is made inside, in bytes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(out.data_ptr() == x.data_ptr() for x in args if isinstance(x, Tensor)):
            self.size = max(self.size, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("expanded", [False, True])
def test_large_masks_are_never_converted_whole(expanded: bool) -> None:
    masks = torch.zeros(1, 20, 3000, 1000, dtype=torch.bool)  # 60 MB
    masks[..., :1500, :] = True
    masks = masks[:, :1].expand(-1, 20, -1, -1) if expanded else masks
    with Largest() as made:
        attention_bias(masks, (30, 30), torch.float32)
    assert made.size < 2**20
    with Largest() as made:
        mean_weights(masks, (30, 30))
    assert made.size <= 2**26


# Boxes


def test_boxes_contain_the_pixels_whose_centres_lie_in_them() -> None:
    boxes = torch.tensor(
        [
            [0, 0, 6, 4],
            [1, 2, 3, 4],
            [0.4, 0.6, 1.6, 1.4],
            [0.5, 1.5, 2.5, 3.5],
            [2, 2, 2, 3],
            [-5, -5, 2, 1],
            [5, 3, 50, 50],
        ]
    )
    masks = boxes_to_masks(boxes, (4, 6))
    assert masks.shape == (7, 4, 6)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        for y, x in np.ndindex(4, 6):
            assert mask[y, x] == (x1 <= x + 0.5 < x2 and y1 <= y + 0.5 < y2)
    assert torch.equal(boxes_to_masks(boxes[None].int(), (4, 6)), boxes_to_masks(boxes.int(), (4, 6))[None])
    assert boxes_to_masks(torch.zeros(0, 4), (4, 6)).shape == (0, 4, 6)


@pytest.mark.parametrize(
    ("boxes", "error", "message"),
    [
        ([[0, 0, 1, 1]], TypeError, "boxes are a tensor of numbers (N, 4), got list"),
        (torch.ones(2, 4).bool(), TypeError, "got torch.bool"),
        (torch.ones(2, 5), ValueError, "boxes are (N, 4) XYXY in pixels, got (2, 5)"),
        (torch.tensor([[0.0, 0, 1, 1], [5, 5, 2, 2]]), ValueError, "box [5.0, 5.0, 2.0, 2.0] is not XYXY"),
        (torch.tensor([[0.0, 0, 1, float("nan")]]), ValueError, "is not XYXY"),
    ],
)
def test_what_are_no_boxes_is_refused(boxes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        boxes_to_masks(boxes, (4, 6))
