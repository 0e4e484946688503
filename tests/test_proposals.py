"""Proposals by merging superpixels."""

import dataclasses
import inspect
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.segmentation import felzenszwalb

from maft_adapter.proposals import merging
from maft_adapter.proposals.merging import Superpixels, propose_masks
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


@pytest.mark.parametrize("scales", [(40.0,), (40.0, 120.0), (10.0, 40.0, 120.0)])
def test_proposals_are_what_pixels_say(scales: tuple[float, ...]) -> None:
    """All regions of the trees, and which of them remain, counted pixel by pixel."""
    image = render_scene(7).image
    everything = propose_masks(image, scales, most=10**6, max_iou=1.0, min_area=0.0)
    superpixels = []
    for scale in scales:
        labels = felzenszwalb(image, scale=scale, sigma=0.8, min_size=96 * 96 // 400)
        superpixels += [labels == k for k in range(labels.max() + 1)]
    assert len(everything) == 2 * len(superpixels) - len(scales)
    assert {mask.tobytes() for mask in superpixels} <= {mask.tobytes() for mask in everything}
    kept: list[NDArray[np.bool_]] = []
    for mask in everything:
        if mask.mean() >= 0.02 and len(kept) < 25 and all(iou(mask, other) <= 0.5 for other in kept):
            kept.append(mask)
    assert np.array_equal(propose_masks(image, scales, most=25, max_iou=0.5, min_area=0.02), kept)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2), (64, 96), (4000, 4)])
@pytest.mark.parametrize("options", [{}, {"min_contrast": 1.0}, {"min_area": 1.0}, {"most": 1}, {"max_iou": 0.0}])
def test_a_picture_without_regions_is_one(shape: tuple[int, int], options: dict[str, Any]) -> None:
    for value in (0, 255):
        masks = propose_masks(np.full((*shape, 3), value, np.uint8), **options)
        assert masks.shape == (1, *shape) and masks.all()
    faint = (128 + np.random.default_rng(0).integers(0, 2, (*shape, 3))).astype(np.uint8)
    masks = propose_masks(faint, scales=(300.0,), **options)
    assert masks.dtype == bool and masks.shape[1:] == shape and masks[0].all()


def test_large_pictures_are_divided_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_MOST_PIXELS", 32 * 32)
    scene = render_scene(5, size=32).image
    masks = propose_masks(np.kron(scene, np.ones((3, 3, 1), np.uint8))[:95, :94])
    small = propose_masks(scene)
    assert len(masks) == len(small) > 5
    for mask, expected in zip(masks, small, strict=True):
        assert np.array_equal(mask, np.kron(expected, np.ones((3, 3), bool))[:95, :94])


def test_memory_does_not_grow_with_the_number_of_regions() -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    tracemalloc.start()
    masks = propose_masks(image, most=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert masks.shape == (1, 300, 300)
    assert peak < 400 * 90_000 + 2**26  # bytes a pixel, and what the regions' overlaps need at the most


def test_most_regions_of_the_world_are_covered() -> None:
    best = []
    for seed in range(6):
        scene = render_scene((3, seed))
        masks = propose_masks(scene.image)
        best += [max(iou(mask, scene.labels == k) for mask in masks) for k in scene.present]
    assert np.mean(np.array(best) > 0.5) > 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_contrast": 1.5}, r"min_contrast is 1.5, expected a number in \[0, 1\]"),
        ({"min_contrast": np.nan}, "min_contrast is nan"),
        ({"min_area": 2}, "min_area is 2, expected"),
        ({"max_iou": -0.1}, "max_iou is -0.1, expected"),
        ({"most": 0}, "most is 0, expected at least 1"),
        ({"scales": ()}, r"scales are \(\), expected at least one positive number"),
        ({"scales": (40.0, 0.0)}, "scales are"),
    ],
)
def test_numbers_out_of_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        propose_masks(np.zeros((8, 8, 3), np.uint8), **options)


def test_other_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 RGB .* got \(3, 8, 8\) uint8"):
        propose_masks(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"at least one pixel, got \(0, 8, 3\) uint8"):
        propose_masks(np.zeros((0, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="float64"):
        propose_masks(np.zeros((8, 8, 3)))  # type: ignore[arg-type]


def test_superpixels_are_the_proposals_of_these_settings() -> None:
    image = render_scene(5).image
    proposer = Superpixels(most=20, max_iou=0.5)
    masks, scores, class_scores = proposer(image, "a.png")
    assert np.array_equal(masks, propose_masks(image, most=20, max_iou=0.5)) and scores is None and class_scores is None
    assert proposer.settings == "superpixels: scales=(40.0, 120.0) most=20 max_iou=0.5 min_area=0.015 min_contrast=0.0"
    assert len({Superpixels().settings, Superpixels(most=20).settings, Superpixels(scales=(40.0,)).settings}) == 3
    assert all(Superpixels()(np.zeros((*size, 3), np.uint8)).masks.shape == (1, *size) for size in ((1, 1), (1, 500)))
    defaults = inspect.signature(propose_masks).parameters
    assert all(getattr(Superpixels(), f.name) == defaults[f.name].default for f in dataclasses.fields(Superpixels))
    with pytest.raises(ValueError, match="most is 0, expected at least 1"):
        Superpixels(most=0)
