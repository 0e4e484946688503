"""Proposals by merging superpixels."""

import numpy as np
import pytest

from maft_adapter.proposals.merging import propose_masks
from maft_adapter.shapes.scenes import render_scene


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_regions_of_flat_colour_are_found_exactly():
    image = np.full((48, 48, 3), 200, np.uint8)
    image[8:24, 8:24] = [220, 30, 30]
    image[30:40, 12:40] = [30, 40, 200]
    masks = propose_masks(image)
    for color in ([220, 30, 30], [30, 40, 200]):
        assert max(iou(mask, (image == color).all(-1)) for mask in masks) > 0.85


def test_proposals_are_distinct_sorted_and_repeatable():
    image = render_scene(5).image
    masks = propose_masks(image, most=30, max_iou=0.6)
    areas = masks.sum((1, 2))
    assert len(masks) <= 30 and masks.dtype == bool and masks.shape[1:] == (96, 96)
    assert (np.diff(areas) <= 0).all() and areas.min() > 0
    assert max(iou(masks[i], masks[j]) for i in range(len(masks)) for j in range(i)) <= 0.6
    assert np.array_equal(masks, propose_masks(image.copy(), most=30, max_iou=0.6))


def test_most_regions_of_the_world_are_covered():
    best = []
    for seed in range(6):
        scene = render_scene((3, seed))
        masks = propose_masks(scene.image)
        best += [max(iou(mask, scene.labels == k) for mask in masks) for k in scene.present]
    assert np.mean(np.array(best) > 0.5) > 0.7


def test_other_input_is_refused():
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 RGB, got \(3, 8, 8\) uint8"):
        propose_masks(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="float64"):
        propose_masks(np.zeros((8, 8, 3)))  # type: ignore[arg-type]
