import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from maft_adapter.metrics import SegmentationMetrics

Maps = NDArray[np.int64]


def oracle(
    prediction: Maps, target: Maps, classes: int, unseen: list[int], ignore: int, absent: str
) -> dict[str, object]:
    """Sets of pixels, class by class."""
    pixels = [(p, t) for p, t in zip(prediction.ravel(), target.ravel(), strict=True) if t != ignore]
    iou = []
    for c in range(classes):
        predicted = {i for i, (p, _) in enumerate(pixels) if p == c}
        true = {i for i, (_, t) in enumerate(pixels) if t == c}
        if true or (predicted and absent == "zero"):
            iou.append(100 * len(predicted & true) / len(predicted | true))
        else:
            iou.append(np.nan)
    seen = [x for c, x in enumerate(iou) if c not in unseen and not np.isnan(x)]
    other = [x for c, x in enumerate(iou) if c in unseen and not np.isnan(x)]
    s, u = (sum(x) / len(x) if x else np.nan for x in (seen, other))
    hiou = 0.0 if s == u == 0 else 2 * s * u / (s + u)
    return {"miou": np.mean(seen + other), "miou_seen": s, "miou_unseen": u, "hiou": hiou, "iou": iou}


def random_maps(seed: int, ignore: int) -> tuple[Maps, Maps]:
    """(4, 9, 11) maps of 8 classes: target without 2 and 6, prediction without 3 and 6, agreeing on half."""
    rng = np.random.default_rng(seed)
    target = rng.choice([0, 1, 3, 4, 5, 7, ignore], size=(4, 9, 11))
    prediction = rng.choice([0, 1, 2, 4, 5, 7, ignore], size=(4, 9, 11))
    same = (rng.random(target.shape) < 0.5) & (target != 3)
    return np.where(same, target, prediction), target


@pytest.mark.parametrize("absent", ["ignore", "zero"])
@pytest.mark.parametrize("ignore", [255, 65535, -1, 8])
@pytest.mark.parametrize("seed", range(3))
def test_equals_numpy(seed: int, ignore: int, absent: str) -> None:
    prediction, target = random_maps(seed, ignore)
    unseen = [2, 3, 7]
    metrics = SegmentationMetrics(8, unseen, ignore)
    metrics.update(torch.from_numpy(prediction[:1]), torch.from_numpy(target[:1]))
    metrics.update(torch.from_numpy(prediction[1:]), torch.from_numpy(target[1:]))
    expected = oracle(prediction, target, 8, unseen, ignore, absent)
    scores = metrics.compute(absent)
    assert list(scores) == list(expected)
    for name, value in scores.items():
        assert value == pytest.approx(expected[name], rel=1e-9, nan_ok=True), name
    assert scores["iou"][3] == 0
    assert np.isnan(scores["iou"][6])


def test_both_conventions_from_one_state() -> None:
    metrics = SegmentationMetrics(3, unseen=[2])
    metrics.update(torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[0, 0, 1, 1]]]))
    new, old = metrics.compute(), metrics.compute(absent="zero")
    assert (new["miou"], new["miou_seen"]) == (75, 75)
    assert np.isnan([new["miou_unseen"], new["hiou"], new["iou"][2]]).all()
    assert (old["miou"], old["miou_seen"], old["miou_unseen"], old["hiou"]) == (50, 75, 0, 0)
    assert metrics.compute()["miou"] == 75


def test_perfect_and_hopeless_predictions() -> None:
    target = torch.tensor([[[0, 1, 2, 3]]])
    metrics = SegmentationMetrics(4, unseen=[1, 3])
    metrics.update(target, target)
    assert metrics.compute() == {"miou": 100, "miou_seen": 100, "miou_unseen": 100, "hiou": 100, "iou": [100.0] * 4}
    metrics.reset()
    metrics.update(3 - target, target)
    assert metrics.compute() == {"miou": 0, "miou_seen": 0, "miou_unseen": 0, "hiou": 0, "iou": [0.0] * 4}


def test_uncovered_pixels_are_misses_and_ignored_pixels_are_not_counted() -> None:
    metrics = SegmentationMetrics(2, unseen=[1])
    prediction = torch.tensor([[[0, 255, 255, 1, 0]]], dtype=torch.uint8)
    target = torch.tensor([[[0, 0, 1, 1, 255]]], dtype=torch.uint8)
    metrics.update(prediction, target)
    assert metrics.compute()["iou"] == [50, 50]
    assert prediction.tolist() == [[[0, 255, 255, 1, 0]]]


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.int32, torch.int64],
)
def test_label_maps_of_any_integer_dtype(dtype: torch.dtype) -> None:
    prediction, target = (torch.from_numpy(x) for x in random_maps(0, ignore=255))
    metrics, same = SegmentationMetrics(8, [2, 3, 7]), SegmentationMetrics(8, [2, 3, 7])
    metrics.update(prediction.to(dtype), target)
    metrics.update(prediction, target.to(dtype))
    same.update(prediction, target)
    np.testing.assert_equal(metrics.compute(), same.compute())


def test_the_smallest_and_the_largest_of_16_bits() -> None:
    """ADE20K-847 ignores 65535, and int8 has no 255: its ignore_index is negative."""
    labels = torch.from_numpy(np.array([[[0, 1, 846, 65535]]], np.uint16))
    metrics = SegmentationMetrics(847, unseen=[0], ignore_index=65535)
    metrics.update(labels, labels)
    assert metrics.compute()["iou"][846] == 100
    small = SegmentationMetrics(100, unseen=[99], ignore_index=-1)
    small.update(torch.tensor([[[-1, 99]]], dtype=torch.int8), torch.tensor([[[1, 99]]], dtype=torch.int8))
    assert small.compute()["miou"] == 50


def test_class_0_can_be_unseen() -> None:
    metrics = SegmentationMetrics(2, unseen=[0])
    metrics.update(torch.tensor([[[0, 1, 0, 1]]]), torch.tensor([[[0, 0, 1, 1]]]))
    metrics.update(torch.tensor([[[0, 0]]]), torch.tensor([[[0, 0]]]))
    scores = metrics.compute()
    assert (scores["miou_unseen"], scores["miou_seen"]) == pytest.approx((60, 100 / 3))


def test_no_unseen_classes() -> None:
    metrics = SegmentationMetrics(2, unseen=[])
    metrics.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]))
    scores = metrics.compute()
    assert scores["miou"] == scores["miou_seen"] == 100
    assert np.isnan([scores["miou_unseen"], scores["hiou"]]).all()


def test_one_class_is_enough() -> None:
    metrics = SegmentationMetrics(1, unseen=[])
    metrics.update(torch.tensor([[[0, 255]]]), torch.tensor([[[0, 0]]]))
    assert metrics.compute()["iou"] == [50]


MAP = torch.zeros(1, 2, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        (MAP, MAP[0], ValueError, r"one shape \(B, H, W\).*\(1, 2, 2\) and \(2, 2\)"),
        (MAP[0], MAP[0], ValueError, r"\(B, H, W\)"),
        (MAP + 3, MAP, ValueError, r"prediction must lie in 0..2 or be 255 .*got \[3\]"),
        (MAP, MAP - 1, ValueError, r"target must lie in 0..2 or be 255 .*got \[-1\]"),
        (MAP.float(), MAP, TypeError, "prediction must be a tensor of integer.*float32"),
        (MAP, MAP.bool(), TypeError, r"target must be a tensor of integer.*bool"),
        (MAP, MAP.to(torch.complex64), TypeError, r"target must be a tensor of integer.*complex64"),
        (MAP.numpy(), MAP, TypeError, r"prediction must be a tensor of integer.*ndarray; .*torch\.from_numpy"),
    ],
)
def test_update_refuses_and_adds_nothing(
    prediction: Tensor, target: Tensor, error: type[Exception], message: str
) -> None:
    metrics = SegmentationMetrics(3, unseen=[1])
    metrics.update(MAP, MAP)
    before = metrics.compute()
    with pytest.raises(error, match=message):
        metrics.update(prediction, target)
    metrics.update(MAP, MAP)
    np.testing.assert_equal(metrics.compute(), before)


@pytest.mark.parametrize(
    ("classes", "unseen", "ignore", "message"),
    [
        (3, [3], 255, r"distinct class indices in 0..2, got \[3\]"),
        (3, [-1], 255, "distinct class indices"),
        (3, [1, 1], 255, "distinct class indices"),
        (3, [1], 2, "ignore_index outside"),
        (3, [1], 0, "ignore_index outside"),
        (0, [], 255, "num_classes >= 1"),
    ],
)
def test_refuses_settings(classes: int, unseen: list[int], ignore: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationMetrics(classes, unseen, ignore)


def test_names_are_no_indices() -> None:
    with pytest.raises(TypeError):
        SegmentationMetrics(3, ["cat"])  # type: ignore[list-item]


def test_unknown_convention_and_missing_data() -> None:
    metrics = SegmentationMetrics(3, unseen=[1])
    metrics.update(MAP, MAP + 255)
    with pytest.raises(ValueError, match="no labelled pixel"):
        metrics.compute()
    with pytest.raises(ValueError, match="'ignore' or 'zero', got 'drop'"):
        metrics.compute("drop")


def test_missing_torchmetrics_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(ImportError, match=r"maft-adapter\[demo\]"):
        SegmentationMetrics(3, unseen=[1])
