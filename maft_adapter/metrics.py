"""Semantic segmentation scores over seen and unseen classes (paper Sec. 5.1): mIoU_s, mIoU_u, hIoU."""

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
        if num_classes < 1 or 0 <= ignore_index < num_classes:
            raise ValueError(
                "expected num_classes >= 1 and ignore_index outside 0..num_classes-1, got "
                f"num_classes={num_classes} and ignore_index={ignore_index}"
            )
        indices = [index(c) for c in unseen]
        if len(set(indices)) < len(indices) or not all(0 <= c < num_classes for c in indices):
            raise ValueError(f"unseen must be distinct class indices in 0..{num_classes - 1}, got {indices}")
        with extra("demo"):
            from torchmetrics.classification import MulticlassConfusionMatrix
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.unseen = torch.zeros(num_classes, dtype=torch.bool)  # (C,)
        self.unseen[indices] = True
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
        for name, labels in (("prediction", prediction), ("target", target)):
            bad = labels[((labels < 0) | (labels >= self.num_classes)) & (labels != self.ignore_index)]
            if len(bad):
                raise ValueError(
                    f"{name} must lie in 0..{self.num_classes - 1} or be {self.ignore_index} "
                    f"(ignore_index), got {bad.unique().tolist()[:8]}"
                )
        prediction = prediction.masked_fill(prediction == self.ignore_index, self.num_classes)
        device = self.confusion.device
        self.confusion.update(prediction.to(device), target.to(device))

    def compute(self, absent: str = "ignore") -> SegmentationScores:
        """Scores of everything added so far.

        Args:
            absent: what becomes of classes that no target pixel shows. "ignore" leaves them out (detectron2
                since July 2022); "zero" counts those that were predicted anyway as IoU 0 (detectron2 before).

        Returns:
            "miou", "miou_seen", "miou_unseen", "hiou" and the list "iou", see `SegmentationScores`. hIoU is
            the harmonic mean of seen and unseen, 0 if both are 0.

        Raises:
            ValueError: an unknown `absent`, or no labelled pixel has been added.
        """
        if absent not in ("ignore", "zero"):
            raise ValueError(f"absent must be 'ignore' or 'zero', got {absent!r}")
        confusion = self.confusion.compute().cpu().double()  # (C + 1, C + 1), rows target, columns prediction
        if not confusion.sum():
            raise ValueError("no labelled pixel has been added: call update first")
        hit = confusion.diagonal()[:-1]  # (C,)
        in_target, in_prediction = confusion.sum(1)[:-1], confusion.sum(0)[:-1]  # (C,)
        union = in_target + in_prediction - hit  # (C,)
        counts = in_target > 0 if absent == "ignore" else union > 0  # (C,)
        iou = torch.where(counts, 100 * hit / union, torch.nan)  # (C,)
        seen, unseen = iou[~self.unseen].nanmean().item(), iou[self.unseen].nanmean().item()
        return {
            "miou": iou.nanmean().item(),
            "miou_seen": seen,
            "miou_unseen": unseen,
            "hiou": 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0,
            "iou": iou.tolist(),
        }

    def reset(self) -> None:
        """Forget everything added so far."""
        self.confusion.reset()
