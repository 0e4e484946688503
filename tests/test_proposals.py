"""Proposals by merging superpixels."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from maft_adapter.proposals.merging import propose_masks
from maft_adapter.shapes.scenes import render_scene


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_regions_of_flat_colour_are_found_exactly() -> None:
    image = np.full((48, 48, 3), 200, np.uint8)
    image[8:24, 8:24] = [220, 30, 30]
    image[30:40, 12:40] = [30, 40, 200]
    masks = propose_masks(image)
    for color in ([220, 30, 30], [30, 40, 200]):
        assert max(iou(mask, (image == color).all(-1)) for mask in masks) > 0.85


def test_proposals_are_distinct_sorted_and_repeatable() -> None:
    image = render_scene(5).image
    masks = propose_masks(image, most=30, max_iou=0.6)
    areas = masks.sum((1, 2))
    assert len(masks) <= 30 and masks.dtype == bool and masks.shape[1:] == (96, 96)
    assert (np.diff(areas) <= 0).all() and areas.min() > 0
    assert max(iou(masks[i], masks[j]) for i in range(len(masks)) for j in range(i)) <= 0.6
    assert np.array_equal(masks, propose_masks(image.copy(), most=30, max_iou=0.6))


def test_small_regions_and_those_that_do_not_stand_out_are_left_out() -> None:
    image = np.full((64, 64, 3), 200, np.uint8)
    image[8:40, 8:40] = [220, 30, 30]  # red, left half a little darker: 12 % and 25 % of the picture
    image[8:40, 8:24] = [196, 30, 30]
    image[50:56, 50:56] = [30, 40, 200]  # less than 1 % of it
    square, half, spot = np.zeros((3, 64, 64), bool)
    square[8:40, 8:40] = half[8:40, 8:24] = spot[50:56, 50:56] = True

    def found(region: NDArray[np.bool_], **options: Any) -> bool:
        return max(iou(mask, region) for mask in propose_masks(image, scales=(1.0,), **options)) > 0.8

    assert found(square) and found(half) and not found(spot)
    assert found(spot, min_area=0.0)
    assert found(square, min_contrast=0.9) and not found(half, min_contrast=0.9)


def test_filters_only_leave_out_what_the_proposals_hold() -> None:
    image = render_scene(5).image
    everything = {mask.tobytes() for mask in propose_masks(image, most=1000, max_iou=1.0, min_area=0.0)}
    kept = propose_masks(image, most=1000, max_iou=1.0, min_area=0.03, min_contrast=0.4)
    assert kept[0].all()  # the whole picture is merged with nothing
    assert 1 < len(kept) < len(everything) / 2 and all(mask.tobytes() in everything for mask in kept)
    assert min(mask.mean() for mask in kept) >= 0.03


def test_most_regions_of_the_world_are_covered() -> None:
    best = []
    for seed in range(6):
        scene = render_scene((3, seed))
        masks = propose_masks(scene.image)
        best += [max(iou(mask, scene.labels == k) for mask in masks) for k in scene.present]
    assert np.mean(np.array(best) > 0.5) > 0.7


def test_other_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 RGB, got \(3, 8, 8\) uint8"):
        propose_masks(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="float64"):
        propose_masks(np.zeros((8, 8, 3)))  # type: ignore[arg-type]
