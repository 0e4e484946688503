"""Masks as other programs have them; pycocotools is the oracle."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from pycocotools import mask as coco

from maft_adapter.proposals.convert import from_rle, to_rle

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
    assert np.array_equal(from_rle(as_bytes, masks.shape[1:]), masks)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("counts", ["", "0111", "o", "\xff", "oooooooooo1", [], [3], [-1, 17], [8.0, 8.0], ["16"], 16])
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
    with pytest.raises(ValueError, match=r"code 0 is of size \(4, 5\), expected \(height, width\) \(5, 4\)"):
        from_rle(rle, (5, 4))
    with pytest.raises(ValueError, match=r"code 1 is of size \(5, 4\)"):
        from_rle([*rle, *to_rle(disk(5, 4)[None])])
