"""Scores of segmentation over seen and unseen classes (paper Sec. 5.1), mIoU_s, mIoU_u, hIoU, and of masks.

Everything is computed from one confusion matrix of int64 counts: those of several processes, or of the parts of an
evaluation that was stopped, are summed.
"""

from collections.abc import Sequence
from operator import index
from typing import TypedDict

import torch
from torch import Tensor

from .extras import extra
from .losses import class_indices


class SegmentationScores(TypedDict):
    """Percentages in [0, 100]; NaN where no class counts. `iou` has one entry per class."""

    miou: float
    miou_seen: float
    miou_unseen: float
    hiou: float
    iou: list[float]


class EvaluationScores(SegmentationScores):
    """Also percentages in [0, 100]; NaN where no class counts. `accuracy` has one entry per class."""

    fwiou: float
    pixel_accuracy: float
    mean_accuracy: float
    accuracy: list[float]


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count the pairs of true and predicted class: of pixels, or of masks, each mask counting once.

    Args:
        prediction: class indices 0..C-1 or `ignore_index`, of any shape, integer dtype and device.
        target: likewise, of the same shape.
        num_classes: C >= 1.
        ignore_index: in `target`, what does not count; in `prediction`, no class at all, a miss.

    Returns:
        (C + 1, C + 1) int64 on the target's device: rows are true classes, columns predicted ones, the last of them
        none; the last row is 0.

    Raises:
        TypeError: they are no integer tensors.
        ValueError: different shapes, labels that are neither in 0..C-1 nor `ignore_index`, or an `ignore_index` that is
            a class.
        ImportError: without torchmetrics, of the extra `demo`.

    Example:
        Mask accuracy, of three ground-truth masks of class 0 and one of class 1:

        >>> counts = confusion_matrix(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]), num_classes=2)
        >>> counts.tolist(), evaluation_scores(counts)["mean_accuracy"]
        ([[2, 1, 0], [0, 1, 0], [0, 0, 0]], 83.33...)
    """
    prediction, target = _checked_labels(prediction, target, num_classes, ignore_index)
    with extra("demo"):
        from torchmetrics.functional.classification import multiclass_confusion_matrix
    return multiclass_confusion_matrix(
        prediction.to(target.device), target, num_classes + 1, ignore_index=ignore_index, validate_args=False
    )


def evaluation_scores(confusion: Tensor, unseen: Sequence[int] = (), absent: str = "ignore") -> EvaluationScores:
    """All scores that a confusion matrix gives.

    Args:
        confusion: (C + 1, C + 1) integers, as `confusion_matrix` gives, or the sum of several.
        unseen: indices of the unseen classes; all others are seen.
        absent: what becomes of classes that are in no target. "ignore" leaves them out (detectron2 since July 2022);
            "zero" counts those that were predicted anyway as IoU 0 (detectron2 before).

    Returns:
        Of IoU = hits / (target + prediction - hits): its mean over all, seen and unseen classes, "miou", "miou_seen",
        "miou_unseen"; "hiou", the harmonic mean of the last two, 0 if both are 0; "fwiou", its mean weighted by the
        classes' share of the target; the list "iou".
        Of accuracy = hits / target, over the classes that are in a target whatever `absent` says: the list "accuracy";
        "mean_accuracy", its mean over the classes, which is the mask accuracy where masks were counted (MaskCLIP++);
        "pixel_accuracy", over everything counted.

    Raises:
        TypeError: no tensor of integers.
        ValueError: another shape, negative counts, a last row that is not 0, nothing counted, unseen classes out of
            range or named twice, or an unknown `absent`.

    Example:
        >>> counts = torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]])
        >>> scores = evaluation_scores(counts)
        >>> scores["iou"], scores["miou"], scores["fwiou"], scores["pixel_accuracy"]
        ([75.0, 50.0], 62.5, 70.0, 80.0)
    """
    if absent not in ("ignore", "zero"):
        raise ValueError(f"absent must be 'ignore' or 'zero', got {absent!r}")
    confusion = class_indices("confusion", confusion)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1] or len(confusion) < 2:
        raise ValueError(f"confusion must be (C + 1, C + 1) with C >= 1, got {tuple(confusion.shape)}")
    if (confusion < 0).any() or confusion[-1].any():
        raise ValueError("confusion must hold counts, the last row 0: what has no true class does not count")
    if not confusion.any():
        raise ValueError("no labelled pixel has been added: nothing was counted")
    is_unseen = _flags(unseen, len(confusion) - 1)  # (C,)
    counts = confusion.cpu().double()  # (C + 1, C + 1)
    hit = counts.diagonal()[:-1]  # (C,)
    in_target, in_prediction = counts.sum(1)[:-1], counts.sum(0)[:-1]  # (C,)
    union = in_target + in_prediction - hit  # (C,)
    iou = torch.where(in_target > 0 if absent == "ignore" else union > 0, 100 * hit / union, torch.nan)  # (C,)
    accuracy = torch.where(in_target > 0, 100 * hit / in_target, torch.nan)  # (C,)
    seen_miou, unseen_miou = iou[~is_unseen].nanmean().item(), iou[is_unseen].nanmean().item()
    return {
        "miou": iou.nanmean().item(),
        "miou_seen": seen_miou,
        "miou_unseen": unseen_miou,
        "hiou": 2 * seen_miou * unseen_miou / (seen_miou + unseen_miou) if seen_miou + unseen_miou else 0.0,
        "iou": iou.tolist(),
        "fwiou": (iou * in_target).nansum().item() / in_target.sum().item(),
        "pixel_accuracy": 100 * hit.sum().item() / in_target.sum().item(),
        "mean_accuracy": accuracy.nanmean().item(),
        "accuracy": accuracy.tolist(),
    }


def _check_classes(num_classes: int, ignore_index: int) -> None:
    if num_classes < 1 or 0 <= ignore_index < num_classes:
        raise ValueError(
            "expected num_classes >= 1 and ignore_index outside 0..num_classes-1, got "
            f"num_classes={num_classes} and ignore_index={ignore_index}"
        )


def _flags(unseen: Sequence[int], num_classes: int) -> Tensor:
    """Which classes are unseen, (C,) bool."""
    indices = [index(c) for c in unseen]
    if len(set(indices)) < len(indices) or not all(0 <= c < num_classes for c in indices):
        raise ValueError(f"unseen must be distinct class indices in 0..{num_classes - 1}, got {indices}")
    flags = torch.zeros(num_classes, dtype=torch.bool)  # (C,)
    flags[indices] = True
    return flags


def _checked_labels(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels as int64, in the prediction C in place of `ignore_index`."""
    _check_classes(num_classes, ignore_index)
    prediction, target = class_indices("prediction", prediction), class_indices("target", target)
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must be of one shape, got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    for name, labels in (("prediction", prediction), ("target", target)):
        bad = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
        if len(bad):
            raise ValueError(
                f"{name} must lie in 0..{num_classes - 1} or be {ignore_index} "
                f"(ignore_index), got {bad.unique().tolist()[:8]}"
            )
    return prediction.masked_fill(prediction == ignore_index, num_classes), target


class SegmentationMetrics:
    """mIoU of all, seen and unseen classes and their harmonic mean, over as many images as are added.

    One confusion matrix is accumulated over all pixels of all images; it is a torchmetrics metric, so it adds
    up over the processes of torch.distributed.

    Args:
        num_classes: C >= 1; labels are 0..C-1.
        unseen: indices of the unseen classes; all others are seen. May be empty.
        ignore_index: in a target, a pixel that does not count; in a prediction, one that no proposal covers:
            a miss that enlarges the union of its true class. Outside 0..C-1.

    Raises:
        TypeError: indices that are no integers.
        ValueError: indices out of range or named twice.
        ImportError: without torchmetrics, of the extra `demo`.

    Example:
        >>> metrics = SegmentationMetrics(num_classes=3, unseen=[2])
        >>> metrics.update(torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[0, 1, 1, 2]]]))
        >>> metrics.compute()
        {'miou': 66.66..., 'miou_seen': 50.0, 'miou_unseen': 100.0, 'hiou': 66.66..., 'iou': [50.0, 50.0, 100.0]}
    """

    def __init__(self, num_classes: int, unseen: Sequence[int], ignore_index: int = 255) -> None:
        _check_classes(num_classes, ignore_index)
        self.unseen = _flags(unseen, num_classes)  # (C,)
        with extra("demo"):
            from torchmetrics.classification import MulticlassConfusionMatrix
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        # class C takes the pixels that no proposal covers
        self.confusion = MulticlassConfusionMatrix(num_classes + 1, ignore_index, validate_args=False)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add label maps.

        Args:
            prediction: (B, H, W) of any integer dtype, on any device: class indices or `ignore_index`.
            target: likewise.

        Raises:
            TypeError: they are no integer tensors.
            ValueError: other shapes, or labels that are neither in 0..C-1 nor `ignore_index`.
        """
        prediction, target = class_indices("prediction", prediction), class_indices("target", target)
        if prediction.ndim != 3 or prediction.shape != target.shape:
            raise ValueError(
                "expected prediction and target of one shape (B, H, W), got "
                f"{tuple(prediction.shape)} and {tuple(target.shape)}"
            )
        prediction, target = _checked_labels(prediction, target, self.num_classes, self.ignore_index)
        device = self.confusion.device
        self.confusion.update(prediction.to(device), target.to(device))

    def compute(self, absent: str = "ignore") -> SegmentationScores:
        """Scores of everything added so far.

        Args:
            absent: what becomes of classes that no target pixel shows. "ignore" leaves them out (detectron2
                since July 2022); "zero" counts those that were predicted anyway as IoU 0 (detectron2 before).

        Returns:
            "miou", "miou_seen", "miou_unseen", "hiou" and the list "iou", as `evaluation_scores` gives them, which
            has more: `evaluation_scores(metrics.confusion.compute())`.

        Raises:
            ValueError: an unknown `absent`, or no labelled pixel has been added.
        """
        unseen = self.unseen.nonzero().flatten().tolist()
        scores = evaluation_scores(self.confusion.compute(), unseen, absent)
        return SegmentationScores(
            miou=scores["miou"],
            miou_seen=scores["miou_seen"],
            miou_unseen=scores["miou_unseen"],
            hiou=scores["hiou"],
            iou=scores["iou"],
        )

    def reset(self) -> None:
        """Forget everything added so far."""
        self.confusion.reset()
