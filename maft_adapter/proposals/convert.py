"""Masks as other programs have them: run-length codes and polygons, SAM's records, supervision's detections, boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..extras import extra
from ..masks import boxes_to_masks
from .base import Proposals, check_proposals, check_room, check_size

if TYPE_CHECKING:
    import supervision


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
        from pycocotools import mask as coco
    height, width = masks.shape[1:]
    change = np.empty((height, width), bool)
    rles = []
    for mask in masks:
        # Codes go down the columns. Where a pixel differs from the one before, found row by row and then sorted, is six
        # times faster than to turn masks around, as pycocotools' encode needs them.
        np.not_equal(mask[1:], mask[:-1], out=change[1:])
        np.not_equal(mask[0, 1:], mask[-1, :-1], out=change[0, 1:])
        change[0, 0] = mask[0, 0]
        y, x = np.divmod(np.flatnonzero(change), width)
        runs = np.diff(np.sort(x * height + y), prepend=0, append=mask.size)
        code = coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)["counts"]
        rles.append({"size": [height, width], "counts": code.decode("ascii")})
    return rles


def from_rle(rles: Sequence[Mapping[str, Any]], size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """COCO's run-length codes, compressed or not -> masks.

    Args:
        rles: N dictionaries, `size` [H, W] and `counts`: a string or bytes, or a list of lengths. All of one size.
        size: (H, W) that the masks shall have. Without it the first one's counts, and N = 0 is refused.

    Returns:
        (N, H, W) bool.

    Raises:
        TypeError: an entry is not such a dictionary.
        ValueError: the sizes differ, the masks would be more than memory should hold (4 billion pixels), or the runs
            of a code are damaged: they don't fill its size.

    Example:
        >>> from_rle([{"size": [2, 2], "counts": [0, 1, 2, 1]}]).astype(int).tolist()
        [[[1, 0], [0, 1]]]
    """
    for i, rle in enumerate(rles):
        if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
            raise TypeError(f"code {i} is {rle!r:.60}, expected a dictionary with 'size' and 'counts'")
        found = rle["size"]
        if (
            not isinstance(found, Sequence)
            or len(found) != 2
            or not all(isinstance(n, int | np.integer) and n > 0 for n in found)
        ):
            raise ValueError(f"code {i} is of size {found!r:.60}, expected [height, width]")
        size = size or (found[0], found[1])
        check_size(found, size)
    if size is None:
        raise ValueError("there are no codes to tell the size of the masks: give size=(height, width)")
    height, width = size
    check_room((len(rles), height, width))
    masks = np.empty((len(rles), height, width), bool)
    for i, (mask, rle) in enumerate(zip(masks, rles, strict=True)):
        runs = _runs(rle["counts"])
        # pycocotools' own decoder leaves what short codes don't reach uninitialised.
        if runs is None or runs.min(initial=0) < 0 or runs.max(initial=0) > mask.size or runs.sum() != mask.size:
            raise ValueError(f"code {i} is damaged: its runs don't fill its {height} x {width} pixels")
        inside = np.arange(len(runs)) % 2 == 1
        mask[:] = inside.repeat(runs).reshape(width, height).T
    return masks


def from_coco(segmentation: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """What COCO calls a segmentation -> one mask.

    Args:
        segmentation: a list of polygons [x1, y1, x2, y2, ...] in pixels, whose union it is, or a run-length code.
        size: (H, W) of the picture.

    Returns:
        (H, W) bool, drawn as pycocotools draws it.

    Raises:
        TypeError: it is neither.
        ValueError: a code of another size or damaged; no polygon; one of less than three points, or not of numbers.

    Example:
        >>> from_coco([[1, 0, 3, 0, 3, 2, 1, 2]], (2, 4)).astype(int).tolist()
        [[0, 1, 1, 0], [0, 1, 1, 0]]
    """
    if isinstance(segmentation, Mapping):
        return from_rle([segmentation], size)[0]
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
        raise TypeError(f"segmentation is {segmentation!r:.60}, expected a list of polygons or a run-length code")
    if not segmentation:
        raise ValueError("segmentation is an empty list, expected at least one polygon")
    for polygon in segmentation:
        points = np.asarray(polygon) if isinstance(polygon, Sequence) else np.empty(0)
        numbers = points.dtype.kind in "iuf" and points.ndim == 1 and np.isfinite(points).all()
        # pycocotools takes two points for a box.
        if not numbers or len(points) < 6 or len(points) % 2:
            raise ValueError(f"polygon {polygon!r:.60} is not [x1, y1, x2, y2, ...] of at least three points")
    with extra("pictures"):
        from pycocotools import mask as coco
    return from_rle([coco.merge(coco.frPyObjects(segmentation, *size))], size)[0]


def from_sam(records: Sequence[Mapping[str, Any]], size: tuple[int, int] | None = None) -> Proposals:
    """The records of SAM's automatic mask generator, or of SA-1B -> proposals.

    Args:
        records: one dictionary a mask: `segmentation`, an (H, W) bool array or COCO's (a run-length code, polygons),
            and, in all of them or in none, `predicted_iou`.
        size: (H, W) of the picture; only without records and with polygons it has to be given.

    Returns:
        Proposals with bool masks. Their scores are the predicted IoU, an estimate that may leave [0, 1] a little and
        is cut to it.

    Raises:
        TypeError: a record is not such a dictionary.
        ValueError: masks of another size, a damaged code, or `predicted_iou` in some records only.

    Example:
        >>> from_sam([{"segmentation": np.eye(3, dtype=bool), "predicted_iou": 0.9}]).scores
        array([0.9], dtype=float32)
    """
    for i, record in enumerate(records):
        if not isinstance(record, Mapping) or "segmentation" not in record:
            raise TypeError(f"record {i} is {record!r:.60}, expected a dictionary with a 'segmentation'")
    if size is None:
        if not records:
            raise ValueError("there are no records to tell the size of the masks: give size=(H, W)")
        size = mask_of(records[0]["segmentation"], "record 0", None).shape
    masks = stack(
        (mask_of(record["segmentation"], f"record {i}", size) for i, record in enumerate(records)), len(records), size
    )
    scores = scores_of(records, "predicted_iou")
    return Proposals(masks, None if scores is None else scores.clip(0, 1))


def mask_of(segmentation: Any, owner: str, size: tuple[int, int] | None) -> NDArray[np.bool_]:
    """The `segmentation` of a record, an array or COCO's -> (H, W) bool; errors name the owner.

    Raises:
        ValueError: as `from_sam` says.
    """
    if isinstance(segmentation, np.ndarray):
        mask = segmentation
        if mask.dtype != np.bool_ or mask.ndim != 2:
            raise ValueError(f"{owner} has a mask {mask.shape} {mask.dtype}, expected (H, W) bool")
        check_size(mask.shape, size or mask.shape)
        return mask
    try:
        if isinstance(segmentation, Mapping):
            return from_rle([segmentation], size)[0]
        if size is None:
            raise ValueError("polygons don't tell the size of the picture: give size=(H, W)")
        return from_coco(segmentation, size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{owner}: {error}") from error


def stack(masks: Iterable[NDArray[np.bool_]], count: int, size: tuple[int, int]) -> NDArray[np.bool_]:
    """N masks (H, W), which need not be there at the same time -> (N, H, W).

    Raises:
        ValueError: there are more of them than memory should hold.

    Example:
        >>> stack(iter([]), 0, (2, 3)).shape
        (0, 2, 3)
    """
    check_room((count, *size))
    return np.fromiter(masks, np.dtype((bool, size)), count)


def scores_of(records: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float32] | None:
    """What all records hold under a key, (N,); None if none does.

    Raises:
        ValueError: only some do, or it is not a number.

    Example:
        >>> scores_of([{"score": 0.5}, {"score": 1}], "score")
        array([0.5, 1. ], dtype=float32)
    """
    found = [record[key] for record in records if record.get(key) is not None]
    if not found:
        return None
    if len(found) < len(records):
        raise ValueError(f"{len(found)} of {len(records)} records have {key!r}, expected all or none")
    if not all(isinstance(value, float | int | np.number) for value in found):
        raise ValueError(f"{key!r} must be a number in every record")
    return np.array(found, np.float32)


def from_detections(detections: supervision.Detections, size: tuple[int, int]) -> Proposals:
    """`supervision.Detections` -> proposals: its masks, or else its boxes; its confidences as scores.

    Args:
        detections: N of them.
        size: (H, W) of the picture.

    Returns:
        Proposals with bool masks.

    Raises:
        TypeError: other masks than bool ones.
        ValueError: masks of another size, or boxes that are not XYXY.

    Example:
        >>> import supervision
        >>> detections = supervision.Detections(np.array([[1, 0, 3, 1]]), confidence=np.array([0.75]))
        >>> from_detections(detections, (2, 4)).masks.astype(int).tolist()
        [[[0, 1, 1, 0], [0, 0, 0, 0]]]
    """
    if detections.mask is None or not len(detections):  # none at all may have masks of no size
        proposals = from_boxes(detections.xyxy, size)
    else:
        proposals = Proposals(np.asarray(detections.mask))  # type: ignore[arg-type]  # checked below
    confidence = detections.confidence
    proposals = proposals._replace(scores=None if confidence is None else confidence.astype(np.float32))
    check_proposals(proposals, size)
    return proposals


def from_boxes(boxes: NDArray[Any], size: tuple[int, int]) -> Proposals:
    """Boxes -> proposals, filled rectangles, as `masks.boxes_to_masks` draws them.

    Args:
        boxes: (N, 4) XYXY in pixels.
        size: (H, W) of the picture.

    Returns:
        Proposals with bool masks.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, or boxes that are not XYXY.

    Example:
        >>> from_boxes(np.array([[0, 0, 2, 1]]), (2, 3)).masks.astype(int).tolist()
        [[[1, 1, 0], [0, 0, 0]]]
    """
    return Proposals(boxes_to_masks(torch.from_numpy(np.array(boxes)), size).numpy())


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
