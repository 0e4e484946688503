"""The nearest of a million embeddings, exactly, in little memory."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["search"]

_FLOATS = 2**24  # held at a time: 64 MB of float32


def search(
    embeddings: NDArray[np.floating[Any]], queries: ArrayLike, k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k embeddings with the greatest inner product with each query; of unit length, that is the cosine.

    All of them are compared, part after part, in float32, so that a memory-mapped float16 matrix needs not fit into
    memory. FAISS does it where it is installed, numpy elsewhere; scores differ by their rounding alone.

    Args:
        embeddings: (M, D) float, such as `read_embeddings(folder).matrix`.
        queries: (Q, D) float, such as rows of `text_classifier`.
        k: at least 1.

    Returns:
        Scores (Q, K) float32, the greatest first, and the embeddings' indices (Q, K) int64, K = min(k, M). Of equal
        scores, the lower index comes first.

    Raises:
        ValueError: shapes that don't match, `k` below 1, or queries that are not finite.

    Example:
        >>> scores, indices = search(np.eye(3, dtype=np.float16), [[0.6, 0.8, 0.0]], k=2)
        >>> scores.tolist(), indices.tolist()
        ([[0.800000011920929, 0.6000000238418579]], [[1, 0]])
    """
    asked = np.ascontiguousarray(queries, np.float32)  # (Q, D)
    if embeddings.ndim != 2 or asked.ndim != 2 or asked.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"expected embeddings (M, D) and queries (Q, D) of one D, got {embeddings.shape} and {asked.shape}; "
            "both must come from the same CLIP"
        )
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    if not np.isfinite(asked).all():
        raise ValueError("queries hold NaN or infinite numbers")
    nearest = _faiss if find_spec("faiss") else _numpy
    scores = np.empty((len(asked), 0), np.float32)  # (Q, up to k)
    indices = np.empty((len(asked), 0), np.int64)  # (Q, up to k)
    rows = max(1, _FLOATS // max(1, *asked.shape))
    room = np.empty((min(rows, len(embeddings)), asked.shape[1]), np.float32)  # once: new memory costs more than search
    for start in range(0, len(embeddings), rows):
        part = room[: len(embeddings) - start]  # (R, D)
        part[:] = embeddings[start : start + rows]
        new_scores, new_indices = nearest(part, asked, min(k, len(part)))  # (Q, up to k) each
        scores = np.hstack([scores, new_scores])
        indices = np.hstack([indices, new_indices + start])
        best = np.lexsort((indices, -scores))[:, :k]  # (Q, up to k)
        scores, indices = np.take_along_axis(scores, best, 1), np.take_along_axis(indices, best, 1)
    return scores, indices


def _numpy(part: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    scores = queries @ part.T  # (Q, R)
    least = np.partition(scores, -k, axis=1)[:, -k]  # (Q,)
    indices = np.empty((len(queries), k), np.int64)
    for row, at_least, index in zip(scores, least, indices, strict=True):
        candidates = np.flatnonzero(row >= at_least)  # all that are as good as the k-th
        index[:] = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
    return np.take_along_axis(scores, indices, 1), indices


def _faiss(part: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    import faiss

    return faiss.knn(queries, part, k, metric=faiss.METRIC_INNER_PRODUCT)
