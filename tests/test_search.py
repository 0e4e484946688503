"""The nearest embeddings, compared with sorting all of them."""

import importlib.util
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

import maft_adapter.search
from maft_adapter.search import search

NO_FAISS = pytest.mark.skipif(not importlib.util.find_spec("faiss"), reason="faiss is not installed")
ENGINES = ["numpy", pytest.param("faiss", marks=NO_FAISS)]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(maft_adapter.search, "find_spec", lambda name: request.param == name)


def brute_force(embeddings: NDArray[Any], queries: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """All scores in float64, sorted; the lower index first."""
    scores = queries.astype(np.float64) @ embeddings.T.astype(np.float64)
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, indices, 1), indices


# Small whole numbers: every product is exact, so that ties are ties.
MATRICES = st.tuples(st.integers(0, 30), st.integers(1, 4), st.integers(0, 4)).flatmap(
    lambda shape: st.tuples(
        arrays(np.float16, shape[:2], elements=st.integers(-2, 2)),
        arrays(np.float32, (shape[2], shape[1]), elements=st.integers(-2, 2)),
    )
)


@given(MATRICES, st.integers(1, 40), st.integers(1, 40))
def test_equals_sorting_everything_ties_and_parts_included(
    matrices: tuple[NDArray[Any], NDArray[Any]], k: int, floats: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maft_adapter.search, "_FLOATS", floats)  # many parts, also of fewer rows than k
        patch.setattr(maft_adapter.search, "find_spec", lambda name: None)
        scores, indices = search(*matrices, k)
    expected_scores, expected = brute_force(*matrices, k)
    assert scores.dtype == np.float32 and indices.dtype == np.int64
    assert np.array_equal(indices, expected)
    assert np.array_equal(scores, expected_scores)


def test_unit_vectors_of_a_mapped_file(engine: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maft_adapter.search, "_FLOATS", 2**12)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((500, 64))
    vectors[400:450] = vectors[:50]  # the same in another part
    np.save(tmp_path / "m.npy", (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
    mapped = np.load(tmp_path / "m.npy", mmap_mode="r")
    queries = rng.standard_normal((7, 64)).astype(np.float32)
    scores, indices = search(mapped, queries, 10)
    expected, order = brute_force(mapped, queries, 10)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    # Equal rows may be rounded differently, so either of them may come first.
    assert np.array_equal(np.sort(indices % 400), np.sort(order % 400))
    assert np.array_equal(search(mapped, mapped[[123]], 1)[1], [[123]])


def test_more_than_there_are_gives_all(engine: None) -> None:
    scores, indices = search(np.eye(3, dtype=np.float16), np.array([[1, 0, -1]]), 10)
    assert indices.tolist() == [[0, 1, 2]] and scores.tolist() == [[1, 0, -1]]
    empty = search(np.empty((0, 3), np.float16), np.ones((2, 3)), 10)
    assert [part.shape for part in empty] == [(2, 0), (2, 0)]


@pytest.mark.parametrize(
    ("embeddings", "queries", "k", "message"),
    [
        (np.ones((3, 4)), np.ones((1, 5)), 1, r"of one D, got \(3, 4\) and \(1, 5\)"),
        (np.ones((3, 4)), np.ones(4), 1, r"got \(3, 4\) and \(4,\)"),
        (np.ones((3, 4)), np.ones((1, 4)), 0, "k is 0, expected at least 1"),
        (np.ones((3, 4)), np.full((1, 4), np.nan), 1, "NaN"),
    ],
)
def test_what_cannot_be_searched_is_refused(embeddings: Any, queries: Any, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(embeddings, queries, k)
