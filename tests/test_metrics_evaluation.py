"""All scores of a confusion matrix against numpy and scikit-learn, in both conventions, and mask accuracy."""

import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, jaccard_score
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torch import Tensor

from maft_adapter.metrics import SegmentationMetrics, confusion_matrix, evaluation_scores

Maps = NDArray[np.int64]
C, IGNORE = 9, 255


def random_maps(seed: int) -> tuple[Maps, Maps]:
    """(3, 20, 30): class 2 is never there and never predicted, 5 only predicted, 7 only there; uncovered pixels."""
    rng = np.random.default_rng(seed)
    target = rng.choice([0, 1, 3, 4, 6, 7, 8, IGNORE], p=[0.3, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.1], size=(3, 20, 30))
    other = rng.choice([0, 1, 3, 4, 5, 6, 8, IGNORE], size=target.shape)
    right = (rng.random(target.shape) < 0.6) & (target != 7)
    return np.where(right, target, other), target


def oracle(prediction: Maps, target: Maps, unseen: list[int], absent: str) -> dict[str, Any]:
    """Class by class over the pixels, without a matrix."""
    counted = target != IGNORE
    p, t = prediction[counted], target[counted]
    iou, accuracy, weights = np.full(C, np.nan), np.full(C, np.nan), np.zeros(C)
    for c in range(C):
        there, said = t == c, p == c
        weights[c] = there.mean()
        if there.any():
            accuracy[c] = 100 * (there & said).sum() / there.sum()
        if there.any() or (said.any() and absent == "zero"):
            iou[c] = 100 * (there & said).sum() / (there | said).sum()
    is_unseen = np.isin(np.arange(C), unseen)
    seen_miou, unseen_miou = np.nanmean(iou[~is_unseen]), np.nanmean(iou[is_unseen])
    return {
        "miou": np.nanmean(iou),
        "miou_seen": seen_miou,
        "miou_unseen": unseen_miou,
        "hiou": 2 / (1 / seen_miou + 1 / unseen_miou),
        "iou": iou,
        "fwiou": np.nansum(iou * weights),
        "pixel_accuracy": 100 * (p == t).mean(),
        "mean_accuracy": np.nanmean(accuracy),
        "accuracy": accuracy,
    }


@pytest.mark.parametrize("absent", ["ignore", "zero"])
@pytest.mark.parametrize("seed", range(5))
def test_equals_numpy(seed: int, absent: str) -> None:
    prediction, target = random_maps(seed)
    counts = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(target), C)
    scores: dict[str, Any] = {**evaluation_scores(counts, [3, 5, 8], absent)}
    expected = oracle(prediction, target, [3, 5, 8], absent)
    assert scores.keys() == expected.keys()
    for name, value in scores.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6, err_msg=name)
    assert (np.isnan(scores["iou"][5]), scores["iou"][5] == 0) == (absent == "ignore", absent == "zero")
    assert np.isnan(scores["iou"][2]) and scores["iou"][7] == 0


@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(seed: int) -> None:
    prediction, target = random_maps(seed)
    counts = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(target), C)
    counted = target != IGNORE
    t, p = target[counted], np.where(prediction == IGNORE, C, prediction)[counted]  # for scikit-learn "none" is a class
    np.testing.assert_array_equal(counts, sklearn_confusion(t, p, labels=range(C + 1)))
    scores = evaluation_scores(counts, absent="ignore")
    there, anywhere = np.unique(t), np.setdiff1d(np.union1d(t, p), [C])
    np.testing.assert_allclose(scores["miou"], 100 * jaccard_score(t, p, labels=there, average="macro"), atol=1e-6)
    np.testing.assert_allclose(scores["fwiou"], 100 * jaccard_score(t, p, labels=there, average="weighted"), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # y_pred contains classes not in y_true
        np.testing.assert_allclose(scores["mean_accuracy"], 100 * balanced_accuracy_score(t, p), atol=1e-6)
    zero = evaluation_scores(counts, absent="zero")
    np.testing.assert_allclose(zero["miou"], 100 * jaccard_score(t, p, labels=anywhere, average="macro"), atol=1e-6)


def test_accuracies_do_not_depend_on_the_convention_and_fwiou_does_not_either() -> None:
    prediction, target = random_maps(0)
    counts = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(target), C)
    new, old = evaluation_scores(counts), evaluation_scores(counts, absent="zero")
    assert new["fwiou"] == pytest.approx(old["fwiou"], abs=1e-12)
    assert (new["pixel_accuracy"], new["mean_accuracy"]) == (old["pixel_accuracy"], old["mean_accuracy"])
    assert old["miou"] < new["miou"]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 40))
def test_counts_of_parts_add_up(seed: int, classes: int, pixels: int) -> None:
    """As of several processes, and of an evaluation that was stopped and resumed; in whatever order."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, classes + 1, size=(2, pixels)))
    prediction, target = labels.masked_fill(labels == classes, IGNORE)
    cut = int(rng.integers(0, pixels + 1))
    whole = confusion_matrix(prediction, target, classes)
    parts = [confusion_matrix(prediction[part], target[part], classes) for part in (slice(cut), slice(cut, None))]
    assert whole.dtype == torch.int64 and torch.equal(parts[1] + parts[0], whole)
    assert int(whole.sum()) == int((target != IGNORE).sum())


@given(st.integers(0, 2**32 - 1))
def test_scores_stay_within_bounds_and_agree_with_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = torch.from_numpy(rng.integers(0, 50, size=(5, 5)) * (rng.random((5, 5)) < 0.7))
    counts[-1] = 0
    counts[0, 0] += 1
    new, old = evaluation_scores(counts, [3]), evaluation_scores(counts, [3], absent="zero")
    assert old["miou"] <= new["miou"] + 1e-9
    for scores in (new, old):
        single = [value for value in scores.values() if isinstance(value, float)]
        numbers = [*single, *scores["iou"], *scores["accuracy"]]
        assert all(np.isnan(x) or 0 <= x <= 100 + 1e-9 for x in numbers)
        assert all(i <= a + 1e-9 for i, a in zip(scores["iou"], scores["accuracy"], strict=True) if i == i and a == a)


def test_counts_beyond_32_bits_and_float32() -> None:
    """COCO-Stuff has 5000 pictures of 300,000 pixels; training sets more."""
    big = 2**33 + 1
    scores = evaluation_scores(torch.tensor([[big, 0, 0], [big, big, 0], [0, 0, 0]]))
    assert scores["iou"] == pytest.approx([50.0, 50.0], abs=1e-9)
    assert scores["pixel_accuracy"] == pytest.approx(200 / 3, abs=1e-9)


def test_the_metric_and_the_function_agree() -> None:
    prediction, target = (torch.from_numpy(one) for one in random_maps(1))
    metrics = SegmentationMetrics(C, [3, 5, 8])
    metrics.update(prediction, target)
    counts = confusion_matrix(prediction, target, C)
    assert torch.equal(metrics.confusion.compute(), counts)
    for absent in ("ignore", "zero"):
        few, all_of_them = metrics.compute(absent), evaluation_scores(counts, [3, 5, 8], absent)
        np.testing.assert_equal(few, {name: value for name, value in all_of_them.items() if name in few})


@pytest.mark.parametrize("seed", range(3))
def test_mask_accuracy(seed: int) -> None:
    """Ground-truth masks in, argmax out, the share of right ones class by class, averaged."""
    rng = np.random.default_rng(seed)
    target = rng.choice([0, 1, 2, 4], size=50)
    scores = rng.random((50, 5)) + 0.6 * np.eye(5)[target]
    predicted = scores.argmax(1)
    expected = np.mean([100 * (predicted[target == k] == k).mean() for k in np.unique(target)])
    counts = confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(target), 5)
    assert evaluation_scores(counts)["mean_accuracy"] == pytest.approx(expected, abs=1e-6)
    assert evaluation_scores(counts)["mean_accuracy"] != pytest.approx(100 * (predicted == target).mean(), abs=1e-6)


ONES = torch.ones(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("confusion", "options", "error", "message"),
    [
        (ONES.tolist(), {}, TypeError, "confusion must be a tensor of integer"),
        (ONES.float(), {}, TypeError, "float32"),
        (ONES, {}, ValueError, "the last row 0"),
        (-ONES, {}, ValueError, "must hold counts"),
        (torch.zeros(3, 3, dtype=torch.int64), {}, ValueError, "nothing was counted"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, ValueError, r"\(C \+ 1, C \+ 1\) with C >= 1, got \(2, 3\)"),
        (torch.zeros(1, 1, dtype=torch.int64), {}, ValueError, r"got \(1, 1\)"),
        (torch.tensor([[1, 0], [0, 0]]), {"absent": "drop"}, ValueError, "'ignore' or 'zero', got 'drop'"),
        (torch.tensor([[1, 0], [0, 0]]), {"unseen": [1]}, ValueError, r"class indices in 0..0, got \[1\]"),
        (torch.tensor([[1, 0], [0, 0]]), {"unseen": [0, 0]}, ValueError, "distinct"),
    ],
)
def test_scores_refuse(confusion: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluation_scores(confusion, **options)


LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("prediction", "target", "classes", "ignore", "error", "message"),
    [
        (LABELS, LABELS[:2], 2, 255, ValueError, r"of one shape, got \(4,\) and \(2,\)"),
        (LABELS + 2, LABELS, 2, 255, ValueError, r"prediction must lie in 0..1 or be 255 .*got \[2\]"),
        (LABELS, LABELS - 1, 2, 255, ValueError, r"target must lie in 0..1"),
        (LABELS, LABELS, 2, 1, ValueError, "ignore_index outside"),
        (LABELS, LABELS, 0, 255, ValueError, "num_classes >= 1"),
        (LABELS.float(), LABELS, 2, 255, TypeError, "prediction must be a tensor of integer"),
    ],
)
def test_counting_refuses(
    prediction: Tensor, target: Tensor, classes: int, ignore: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        confusion_matrix(prediction, target, classes, ignore)


def test_missing_torchmetrics_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    with pytest.raises(ImportError, match=r"maft-adapter\[demo\]"):
        confusion_matrix(LABELS, LABELS, 2)
