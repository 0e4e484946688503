import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from maft_adapter.masks import attention_bias, check_masks, masks_on_grid, pad_masks


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
