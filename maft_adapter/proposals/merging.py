"""Proposals from pixels alone: superpixels merged into ever larger regions, every region on the way kept.

The superpixels are scikit-image's Felzenszwalb segments, the merging its hierarchical merging of a region adjacency
graph; what to merge next is chosen as in selective search (Uijlings et al., 2013): regions of like colours, small
ones first, and those that fill each other's gaps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..extras import extra
from .base import Proposals, check_picture, check_room

with extra("pictures"):
    from PIL import Image
    from scipy.linalg import block_diag
    from skimage import graph
    from skimage.color import rgb2lab
    from skimage.segmentation import felzenszwalb

_BINS = 12
_MOST_PIXELS = 2**21  # of the picture that is divided; superpixels of more would need gigabytes and minutes


def propose_masks(
    image: NDArray[np.uint8],
    scales: tuple[float, ...] = (40.0, 120.0),
    most: int = 80,
    max_iou: float = 0.7,
    min_area: float = 0.015,
    min_contrast: float = 0.0,
) -> NDArray[np.bool_]:
    """Propose regions of one picture.

    Beside the picture and the proposals this needs at most 1 GB: pictures of more than 2 megapixels are reduced to that
    by averaging blocks of 2x2, 3x3, ... pixels, whose proposals are made of whole blocks then.

    Args:
        image: (H, W, 3) uint8 RGB in [0, 255], of at least one pixel.
        scales: of Felzenszwalb's method, one merging tree each; larger ones start from larger superpixels.
        most: the greatest number of proposals, at least 1; the largest regions are kept.
        max_iou: in [0, 1]; of two proposals that overlap more than this the smaller one is left out.
        min_area: in [0, 1]; regions smaller than this share of the picture are left out.
        min_contrast: in [0, 1]; regions whose colours differ less than this from those of the region that they
            are merged with are left out: 0 keeps all, 1 only those that share no colour with it. Parts of a thing
            differ little from each other, so this leaves fewer fragments, but it also loses some whole regions.

    Returns:
        (N, H, W) bool, 1 <= N <= `most`, largest first. The whole picture is always the first; a picture of one colour
        has no other.

    Raises:
        ValueError: the image has another shape or dtype, a number is out of its range, or the picture is so large that
            its masks would have more than 4 billion pixels.

    Example:
        >>> image = np.zeros((32, 32, 3), np.uint8)
        >>> image[:, 16:] = 255
        >>> masks = propose_masks(image)
        >>> masks.dtype, masks.shape[1:]
        (dtype('bool'), (32, 32))
    """
    check_picture(image)
    _check_settings(scales, most, max_iou, min_area, min_contrast)
    height, width = image.shape[:2]
    factor = next(f for f in itertools.count(1) if -(-height // f) * -(-width // f) <= _MOST_PIXELS)
    if factor > 1:
        image = np.asarray(Image.fromarray(image).reduce(factor))
    bins = _color_bins(image)
    trees = [_tree(image, bins, scale) for scale in scales]

    # A region is a set of superpixels of its tree, S' of all trees together, so that no region needs its pixels.
    regions = block_diag(*(tree.regions for tree in trees))  # (R, S')
    overlap = np.block([[_overlap(a.labels, b.labels) for b in trees] for a in trees])  # (S', S') in pixels
    contrasts = np.concatenate([tree.contrasts for tree in trees])  # (R,)
    tree_of = np.repeat(np.arange(len(trees)), [len(tree.regions) for tree in trees])  # (R,)
    intersection = regions @ overlap @ regions.T  # (R, R)
    areas = intersection.diagonal()
    large = np.flatnonzero((contrasts >= min_contrast) & (areas / trees[0].labels.size >= min_area))
    iou = intersection / (areas[:, None] + areas[None] - intersection)
    kept: list[int] = []
    for i in large[np.argsort(-areas[large], kind="stable")]:
        if len(kept) < most and (iou[i, kept] <= max_iou).all():
            kept.append(i)
    check_room((len(kept), height, width))
    masks = np.empty((len(kept), height, width), bool)
    for mask, i in zip(masks, kept, strict=True):
        first = sum(tree.regions.shape[1] for tree in trees[: tree_of[i]])
        small = (regions[i, first:] > 0)[trees[tree_of[i]].labels]
        mask[:] = small.repeat(factor, 0).repeat(factor, 1)[:height, :width]
    return masks


@dataclass(frozen=True)
class Superpixels:
    """A proposer: `propose_masks` with these settings; its proposals have no scores.

    Args:
        scales, most, max_iou, min_area, min_contrast: as `propose_masks` takes them.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> Superpixels(most=10)(np.zeros((8, 8, 3), np.uint8)).masks.shape
        (1, 8, 8)
    """

    scales: tuple[float, ...] = (40.0, 120.0)
    most: int = 80
    max_iou: float = 0.7
    min_area: float = 0.015
    min_contrast: float = 0.0

    def __post_init__(self) -> None:
        _check_settings(self.scales, self.most, self.max_iou, self.min_area, self.min_contrast)

    @property
    def settings(self) -> str:
        return "superpixels: " + " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        """The regions of a picture (H, W, 3) uint8 RGB; `name` does not matter."""
        return Proposals(propose_masks(picture, self.scales, self.most, self.max_iou, self.min_area, self.min_contrast))


class _Tree(NamedTuple):
    """A merging tree of S superpixels.

    Attributes:
        labels: (H, W) in 0..S-1.
        regions: (2S - 1, S), 1 for the superpixels of each region.
        contrasts: (2S - 1,) in [0, 1], of each region to the one it is merged with; the whole picture's is 1.
    """

    labels: NDArray[np.int64]
    regions: NDArray[np.float64]
    contrasts: NDArray[np.float64]


def _check_settings(scales: tuple[float, ...], most: int, max_iou: float, min_area: float, min_contrast: float) -> None:
    if not scales or not all(0 < scale < np.inf for scale in scales):
        raise ValueError(f"scales are {scales!r}, expected at least one positive number")
    if most < 1:
        raise ValueError(f"most is {most!r}, expected at least 1")
    for name, value in {"max_iou": max_iou, "min_area": min_area, "min_contrast": min_contrast}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}, expected a number in [0, 1]")


def _color_bins(image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Which of the bins of all three channels' histograms each pixel lies in, (H, W, 3)."""
    # Lightness in [0, 100], a and b of real pictures in about [-80, 80].
    position = (rgb2lab(image) - [0, -80, -80]) / [100, 160, 160] * _BINS
    return np.clip(position.astype(np.int64), 0, _BINS - 1) + _BINS * np.arange(3)


def _overlap(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """How many pixels the superpixels of two label maps share, (S_a, S_b)."""
    shape = a.max() + 1, b.max() + 1
    return np.bincount((a * shape[1] + b).ravel(), minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def _tree(image: NDArray[np.uint8], bins: NDArray[np.int64], scale: float) -> _Tree:
    labels = felzenszwalb(image, scale=scale, sigma=0.8, min_size=image.shape[0] * image.shape[1] // 400)
    rag = graph.RAG(labels, connectivity=2)
    count = int(labels.max()) + 1
    rag.add_nodes_from(range(count))  # a lone superpixel has no neighbour to come with
    for index, node in enumerate(rag):
        rows, columns = np.nonzero(labels == node)
        rag.nodes[node].update(
            labels=[int(node)],  # the superpixels of a region; the graph keeps the list
            index=index,  # among `regions`
            hist=np.bincount(bins[rows, columns].ravel(), minlength=3 * _BINS) / (3 * len(rows)),
            size=len(rows),
            box=(rows.min(), columns.min(), rows.max() + 1, columns.max() + 1),
        )
    regions = [rag.nodes[node]["labels"] for node in rag]
    contrasts = np.ones(2 * count - 1)

    def merge(rag: Any, source: int, target: int) -> None:
        a, b = rag.nodes[source], rag.nodes[target]
        contrasts[[a["index"], b["index"]]] = _contrast(a, b)
        b["index"] = len(regions)
        regions.append(a["labels"] + b["labels"])
        size = a["size"] + b["size"]
        b["hist"] = (a["hist"] * a["size"] + b["hist"] * b["size"]) / size
        b["size"], b["box"] = size, _join(a["box"], b["box"])

    def weight(rag: Any, source: int, target: int, neighbour: int) -> dict[str, float]:
        return {"weight": _distance(rag.nodes[target], rag.nodes[neighbour], labels.size)}

    for a, b in rag.edges:
        rag.edges[a, b]["weight"] = _distance(rag.nodes[a], rag.nodes[b], labels.size)
    graph.merge_hierarchical(
        labels, rag, thresh=np.inf, rag_copy=False, in_place_merge=True, merge_func=merge, weight_func=weight
    )
    members = np.zeros((len(regions), count))  # (2S - 1, S)
    for row, region in zip(members, regions, strict=True):
        row[region] = 1
    return _Tree(labels, members, contrasts)


def _join(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _contrast(a: dict[str, Any], b: dict[str, Any]) -> float:
    return float(np.abs(a["hist"] - b["hist"]).sum() / 2)


def _distance(a: dict[str, Any], b: dict[str, Any], total: int) -> float:
    top, left, bottom, right = _join(a["box"], b["box"])
    size = a["size"] + b["size"]
    gap = ((bottom - top) * (right - left) - size) / total
    return float(_contrast(a, b) + size / total + gap)
