"""Proposals from pixels alone: superpixels merged into ever larger regions, every region on the way kept.

The superpixels are scikit-image's Felzenszwalb segments, the merging its hierarchical merging of a region adjacency
graph; what to merge next is chosen as in selective search (Uijlings et al., 2013): regions of like colours, small
ones first, and those that fill each other's gaps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..extras import extra

with extra("demo"):
    from skimage import graph
    from skimage.color import rgb2lab
    from skimage.segmentation import felzenszwalb

_BINS = 12


def propose_masks(
    image: NDArray[np.uint8],
    scales: tuple[float, ...] = (40.0, 120.0),
    most: int = 80,
    max_iou: float = 0.7,
    min_area: float = 0.015,
    min_contrast: float = 0.0,
) -> NDArray[np.bool_]:
    """Propose regions of one picture.

    Args:
        image: (H, W, 3) uint8 RGB in [0, 255].
        scales: of Felzenszwalb's method, one merging tree each; larger ones start from larger superpixels.
        most: the greatest number of proposals; the largest regions are kept.
        max_iou: of two proposals that overlap more than this the smaller one is left out.
        min_area: regions smaller than this share of the picture are left out.
        min_contrast: in [0, 1]; regions whose colours differ less than this from those of the region that they
            are merged with are left out: 0 keeps all, 1 only those that share no colour with it. Parts of a thing
            differ little from each other, so this leaves fewer fragments, but it also loses some whole regions.

    Returns:
        (N, H, W) bool, N <= `most`, largest first; the whole picture is always the first.

    Raises:
        ValueError: the image has another shape or dtype.

    Example:
        >>> image = np.zeros((32, 32, 3), np.uint8)
        >>> image[:, 16:] = 255
        >>> masks = propose_masks(image)
        >>> masks.dtype, masks.shape[1:]
        (dtype('bool'), (32, 32))
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
    lab = rgb2lab(image)
    trees = [_tree(image, lab, scale) for scale in scales]
    masks, contrasts = (np.concatenate(parts) for parts in zip(*trees, strict=True))
    masks = masks[(contrasts >= min_contrast) & (masks.mean((1, 2)) >= min_area)]
    masks = masks[np.argsort(-masks.sum((1, 2)), kind="stable")]
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    areas, intersection = flat.sum(1), flat @ flat.T
    iou = intersection / (areas[:, None] + areas[None] - intersection)
    kept: list[int] = []
    for i in range(len(masks)):
        if len(kept) < most and (iou[i, kept] <= max_iou).all():
            kept.append(i)
    return masks[kept]


def _tree(
    image: NDArray[np.uint8], lab: NDArray[np.float64], scale: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """All regions of one merging tree, (2S - 1, H, W) for S superpixels, and the contrast in [0, 1] of each to the
    region it is merged with, (2S - 1,); the whole picture's is 1."""
    labels = felzenszwalb(image, scale=scale, sigma=0.8, min_size=image.shape[0] * image.shape[1] // 400)
    # Colour histograms: lightness in [0, 100], a and b of real pictures in about [-80, 80].
    position = (lab - [0, -80, -80]) / [100, 160, 160] * _BINS
    bins = np.clip(position.astype(np.int64), 0, _BINS - 1) + _BINS * np.arange(3)  # (H, W, 3)
    rag = graph.RAG(labels, connectivity=2)
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
    contrasts = np.ones(2 * len(regions) - 1)

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
    return np.stack([np.isin(labels, region) for region in regions]), contrasts


def _join(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _contrast(a: dict[str, Any], b: dict[str, Any]) -> float:
    return float(np.abs(a["hist"] - b["hist"]).sum() / 2)


def _distance(a: dict[str, Any], b: dict[str, Any], total: int) -> float:
    top, left, bottom, right = _join(a["box"], b["box"])
    size = a["size"] + b["size"]
    gap = ((bottom - top) * (right - left) - size) / total
    return float(_contrast(a, b) + size / total + gap)
