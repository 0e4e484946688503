"""Masks as other programs have them, and as arrays: run-length codes, SAM's records, supervision's detections, boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..extras import extra


def to_rle(masks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Masks -> COCO's compressed run-length codes, ready for JSON.

    Args:
        masks: (N, H, W) bool.

    Returns:
        N dictionaries, `size` [H, W] and `counts` a string, as pycocotools reads and writes them.

    Raises:
        TypeError: not a bool array.
        ValueError: another shape, or no pixels.

    Example:
        >>> to_rle(np.eye(2, dtype=bool)[None])
        [{'size': [2, 2], 'counts': '0120'}]
    """
    if not isinstance(masks, np.ndarray) or masks.dtype != np.bool_:
        raise TypeError(f"masks are an (N, H, W) bool array, got {getattr(masks, 'dtype', type(masks).__name__)}")
    if masks.ndim != 3 or 0 in masks.shape[1:]:
        raise ValueError(f"masks are (N, H, W) of at least one pixel, got {masks.shape}")
    with extra("pictures"):
        from pycocotools.mask import encode
    rles = [encode(np.asfortranarray(mask.view(np.uint8))) for mask in masks]
    return [{"size": list(masks.shape[1:]), "counts": rle["counts"].decode("ascii")} for rle in rles]


def from_rle(rles: Sequence[Mapping[str, Any]], size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """COCO's run-length codes, compressed or not -> masks.

    Args:
        rles: N dictionaries, `size` [H, W] and `counts`: a string or bytes, or a list of lengths. All of one size.
        size: (H, W) that the masks shall have. Without it the first one's counts, and N = 0 is refused.

    Returns:
        (N, H, W) bool.

    Raises:
        TypeError: an entry is not such a dictionary.
        ValueError: the sizes differ, or the runs of a code are damaged: they don't fill its size.

    Example:
        >>> from_rle([{"size": [2, 2], "counts": [0, 1, 2, 1]}]).astype(int).tolist()
        [[[1, 0], [0, 1]]]
    """
    for i, rle in enumerate(rles):
        if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
            raise TypeError(f"code {i} is {rle!r:.60}, expected a dictionary with 'size' and 'counts'")
        height_width = tuple(rle["size"])
        size = size or height_width
        if height_width != tuple(size) or len(size) != 2:
            raise ValueError(f"code {i} is of size {height_width}, expected (height, width) {tuple(size)}")
    if size is None:
        raise ValueError("there are no codes to tell the size of the masks: give size=(height, width)")
    height, width = size
    masks = np.empty((len(rles), height, width), bool)
    for i, (mask, rle) in enumerate(zip(masks, rles, strict=True)):
        runs = _runs(rle["counts"])
        # pycocotools' own decoder leaves what short codes don't reach uninitialised.
        if runs is None or runs.min(initial=0) < 0 or runs.max(initial=0) > mask.size or runs.sum() != mask.size:
            raise ValueError(f"code {i} is damaged: its runs don't fill its {height} x {width} pixels")
        inside = np.arange(len(runs)) % 2 == 1
        mask[:] = inside.repeat(runs).reshape(width, height).T
    return masks


def _runs(counts: str | bytes | Sequence[int]) -> NDArray[np.int64] | None:
    """Lengths of the runs, outside and inside by turns; None if the code is damaged."""
    if not isinstance(counts, str | bytes):
        try:
            return np.array(counts).reshape(-1).astype(np.int64, casting="safe") if len(counts) else None
        except (TypeError, ValueError, OverflowError):
            return None
    # Digits of 5 bits from the lowest up, each a character from "0" on; a sixth bit says that more follow. The last
    # digit's highest bit is the sign. From the fourth number on it is the difference to the last but one.
    try:
        characters = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        return None
    digits = np.frombuffer(characters, np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] > 31:
        return None
    starts = np.concatenate([[0], np.flatnonzero(digits[:-1] < 32) + 1])
    lengths = np.diff(np.append(starts, len(digits)))
    if lengths.max() > 8:  # 40 bits; more pixels than any picture has
        return None
    place = np.arange(len(digits)) - starts.repeat(lengths)
    numbers = np.add.reduceat((digits & 31) << (5 * place), starts)
    negative = (digits[starts + lengths - 1] & 16) > 0
    numbers -= negative << (5 * lengths)
    for first in (1, 2):
        numbers[first::2] = numbers[first::2].cumsum()
    return numbers
