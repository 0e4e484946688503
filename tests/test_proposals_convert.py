"""Masks as other programs have them; pycocotools is the oracle."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from matplotlib.path import Path
from numpy.typing import NDArray
from pycocotools import mask as coco

from maft_adapter.proposals.convert import from_boxes, from_coco, from_detections, from_rle, from_sam, to_rle

MASKS = arrays(bool, array_shapes(min_dims=3, max_dims=3, max_side=40))


def disk(height: int, width: int) -> NDArray[np.bool_]:
    y, x = np.mgrid[:height, :width]
    return (y - height / 2) ** 2 + (x - width / 3) ** 2 < (height / 3) ** 2


@given(MASKS)
def test_rle_is_pycocotools_and_gives_the_masks_back(masks: NDArray[np.bool_]) -> None:
    rles = to_rle(masks)
    for mask, rle in zip(masks, rles, strict=True):
        assert np.array_equal(coco.decode(rle), mask)
        assert rle == {"size": list(mask.shape), "counts": rle["counts"]} and isinstance(rle["counts"], str)
    assert np.array_equal(from_rle(rles), masks)
    as_bytes = [{"size": rle["size"], "counts": rle["counts"].encode()} for rle in rles]
    assert np.array_equal(from_rle(as_bytes, masks.shape[1:]), masks)


@given(st.lists(st.integers(0, 50_000), min_size=1, max_size=30))
def test_long_runs_and_differences_of_every_sign(counts: list[int]) -> None:
    width = max(1, sum(counts))
    counts = counts if sum(counts) else [1]
    compressed = coco.frPyObjects({"size": [1, width], "counts": counts}, 1, width)
    expected = np.repeat(np.arange(len(counts)) % 2, counts)[None].astype(bool)
    assert np.array_equal(from_rle([compressed])[0], expected)
    assert np.array_equal(from_rle([{"size": [1, width], "counts": counts}])[0], expected)


@given(MASKS.filter(lambda masks: masks[0].size > 1), st.data())
def test_a_damaged_code_is_refused_or_another_mask_of_that_size(masks: NDArray[np.bool_], data: Any) -> None:
    rle = to_rle(masks)[0]
    place = data.draw(st.integers(0, len(rle["counts"]) - 1))
    changed = rle["counts"][:place] + data.draw(st.sampled_from([*"0oP~\x00é", ""])) + rle["counts"][place + 1 :]
    try:
        mask = from_rle([{**rle, "counts": changed}])[0]
    except ValueError as error:
        assert "damaged" in str(error)
    else:
        assert np.array_equal(coco.decode({**rle, "counts": changed}), mask)


@pytest.mark.parametrize(
    "counts",
    ["", "0111", "o", "\xff", "oooooooooo1", [], [3], [-1, 1, 16], [8.0, 8.0], ["16"], 16, "`" + "P" * 13 + "1"],
)
def test_counts_that_do_not_fill_the_mask_are_refused(counts: Any) -> None:
    with pytest.raises(ValueError, match=r"code 0 is damaged: its runs don't fill its 4 x 4 pixels"):
        from_rle([{"size": [4, 4], "counts": counts}])


def test_no_masks_need_a_size() -> None:
    assert to_rle(np.zeros((0, 3, 4), bool)) == []
    assert from_rle([], (3, 4)).shape == (0, 3, 4)
    with pytest.raises(ValueError, match=r"give size=\(height, width\)"):
        from_rle([])


def test_other_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"\(N, H, W\) bool array, got float64"):
        to_rle(np.zeros((1, 3, 4)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \(3, 4\)"):
        to_rle(np.zeros((3, 4), bool))
    with pytest.raises(TypeError, match="code 0 is 'abc'"):
        from_rle(["abc"])  # type: ignore[list-item]
    rle = to_rle(disk(4, 5)[None])
    with pytest.raises(ValueError, match=r"masks are 4 x 5 \(height x width\), the picture 5 x 4, turned"):
        from_rle(rle, (5, 4))
    with pytest.raises(ValueError, match=r"masks are 5 x 4 .* the picture 4 x 5"):
        from_rle([*rle, *to_rle(disk(5, 4)[None])])


def test_polygons_are_drawn_as_pycocotools_draws_them() -> None:
    polygons = [[3.2, 1.5, 14.0, 2.5, 9.0, 11.0], [1, 9, 5, 9, 5, 13, 1, 13]]
    parts = [coco.decode(part) for part in coco.frPyObjects(polygons, 15, 20)]
    assert np.array_equal(from_coco(polygons, (15, 20)), parts[0] | parts[1])
    inside = Path([(1, 9), (5, 9), (5, 13), (1, 13)]).contains_points(np.argwhere(np.ones((20, 15))) + 0.5)
    assert np.array_equal(from_coco(polygons[1:], (15, 20)), inside.reshape(20, 15).T)


def test_records_of_sam() -> None:
    mask = disk(7, 9)
    records: list[dict[str, Any]] = [{"segmentation": mask}, {"segmentation": to_rle(mask[None])[0]}]
    masks, scores, class_scores = from_sam(records)
    assert np.array_equal(masks, [mask, mask]) and scores is None and class_scores is None
    for record, score in zip(records, (1.01, -0.01), strict=True):
        record["predicted_iou"] = score
    assert np.array_equal(from_sam(records, (7, 9)).scores, np.array([1, 0], np.float32))  # type: ignore[arg-type]
    assert from_sam([], (7, 9)).masks.shape == (0, 7, 9)
    with pytest.raises(ValueError, match=r"no records to tell the size of the masks: give size=\(H, W\)"):
        from_sam([])
    with pytest.raises(ValueError, match=r"record 0: polygons don't tell the size"):
        from_sam([{"segmentation": [[1, 1, 3, 3, 1, 3]]}])
    with pytest.raises(ValueError, match=r"masks are 7 x 9 \(height x width\), the picture 9 x 7, turned"):
        from_sam(records, (9, 7))
    with pytest.raises(ValueError, match=r"masks are 9 x 7 \(height x width\), the picture 7 x 9, turned"):
        from_sam([records[0], {"segmentation": mask.T}])
    with pytest.raises(ValueError, match=r"record 1 has a mask \(7, 9\) uint8, expected \(H, W\) bool"):
        from_sam([records[0], {"segmentation": mask.astype(np.uint8)}])
    with pytest.raises(TypeError, match="record 0 is "):
        from_sam([mask])  # type: ignore[list-item]


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_detections_of_supervision() -> None:
    import supervision

    masks = np.stack([disk(7, 9), disk(7, 9)[:, ::-1]])
    boxes = supervision.mask_to_xyxy(masks).astype(float)
    confidence = np.array([0.25, 1.0])
    for kept in (masks, supervision.CompactMask.from_dense(masks, boxes, (7, 9))):
        found = from_detections(supervision.Detections(boxes, mask=kept, confidence=confidence), (7, 9))
        assert np.array_equal(found.masks, masks)
        assert found.scores is not None and found.scores.tolist() == [0.25, 1]
    boxed = from_detections(supervision.Detections(np.array([[2, 1, 4, 7]])), (7, 9))
    expected = np.zeros((1, 7, 9), bool)
    expected[0, 1:7, 2:4] = True
    assert np.array_equal(boxed.masks, expected) and boxed.scores is None
    assert from_detections(supervision.Detections.empty(), (7, 9)).masks.shape == (0, 7, 9)
    with pytest.raises(ValueError, match=r"masks are 7 x 9 .* the picture 9 x 7"):
        from_detections(supervision.Detections(boxes, mask=masks), (9, 7))


def test_boxes() -> None:
    boxes = np.array([[0.0, 0, 2, 3], [1, 1, 1, 1]])
    masks = from_boxes(boxes, (4, 5)).masks
    assert masks[0, :3, :2].all() and masks.sum() == 6
    with pytest.raises(ValueError, match="is not XYXY"):
        from_boxes(boxes[:, ::-1], (4, 5))
