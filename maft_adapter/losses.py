"""Losses of mask-aware fine-tuning, L = L_ma + lambda * L_dis (paper Eq. 5-8), and MaskCLIP++'s in place of L_ma.

B images, N proposals, C classes, K ground-truth classes of one image. N and K may differ from image to image:
what depends on them comes as a sequence with one tensor per image. Scores are probabilities, after softmax.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from .masks import check_unit_range

PerImage = Tensor | Sequence[Tensor]  # (B, ...) or one tensor per image

# Dividing by less gives gradients that float32 can't hold; no mask of any use weighs so little.
_SMALLEST = 1e-19


def mask_iou(masks: Tensor, targets: Tensor) -> Tensor:
    """Soft IoU of proposals and ground truth of one image (paper's S_IoU).

    Intersection sum(m * t), union sum(m) + sum(t) - intersection; 0 if both masks are empty. A soft mask scores below
    1 even against itself.

    Args:
        masks: (N, H, W) proposals, bool or in [0, 1].
        targets: (K, H, W) ground truth, bool or in [0, 1].

    Returns:
        (K, N) in [0, 1], float32 at least.

    Raises:
        ValueError: other shapes, different H and W, or values outside [0, 1].

    Example:
        >>> masks = torch.tensor([[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.5, 0.5]]])  # (N=2, H=1, W=4)
        >>> mask_iou(masks, targets=torch.ones(1, 1, 4, dtype=torch.bool))
        tensor([[0.5000, 0.2500]])
    """
    if masks.ndim != 3 or targets.ndim != 3 or masks.shape[1:] != targets.shape[1:]:
        got = f"{tuple(masks.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"expected masks (N, H, W) and targets (K, H, W), got {got}: resize one of them")
    dtype = torch.promote_types(masks.dtype, targets.dtype)
    masks, targets = _widen(masks, dtype), _widen(targets, dtype)
    check_unit_range("masks", masks, "turn logits into probabilities with .sigmoid()")
    check_unit_range("targets", targets, "give one binary mask per class, not a map of class indices")
    with torch.autocast(masks.device.type, enabled=False):  # pixel counts overflow half precision
        intersection = einsum(targets, masks, "k h w, n h w -> k n")
    union = targets.sum((1, 2))[:, None] + masks.sum((1, 2)) - intersection  # (K, N)
    iou = intersection / torch.where(union > _SMALLEST, union, 1)
    return iou.clamp(max=1)  # only rounding goes beyond


def min_max_normalize(iou: Tensor) -> Tensor:
    """Stretch each class's row of IoU to the full [0, 1] over the proposals (paper Eq. 5).

    A constant row (N = 1, or a spread within rounding, 1e-5 of the maximum, or of at most 1e-19) has no range to
    stretch and stays as it is: a lone proposal of IoU 0.9 keeps 0.9, where the released code gives 0. Values and
    gradients are finite.

    Args:
        iou: (K, N) of one image, in [0, 1].

    Returns:
        (K, N) in [0, 1], float32 at least.

    Raises:
        ValueError: `iou` is not two-dimensional.

    Example:
        >>> min_max_normalize(torch.tensor([[0.25, 0.5, 0.75], [0.5, 0.5, 0.5]]))
        tensor([[0.0000, 0.5000, 1.0000],
                [0.5000, 0.5000, 0.5000]])
    """
    if iou.ndim != 2:
        raise ValueError(f"expected iou (K, N) of one image, got {tuple(iou.shape)}")
    iou = _widen(iou)
    if iou.shape[1] == 0:
        return iou
    low, high = iou.amin(1, keepdim=True), iou.amax(1, keepdim=True)  # (K, 1)
    # the sums of identical proposals may differ in their last bits: stretching that would be noise
    constant = (high - low <= 1e-5 * high) | (high - low <= _SMALLEST)  # (K, 1)
    return torch.where(constant, iou, (iou - low) / torch.where(constant, 1, high - low))


def _kl(scores: Tensor, iou: Tensor, reduction: str) -> Tensor:
    entropy = F.binary_cross_entropy(iou, iou, reduction=reduction)
    return F.binary_cross_entropy(scores, iou, reduction=reduction) - entropy


_KINDS: dict[str, Any] = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "l2": F.mse_loss, "kl": _kl}


def mask_aware_loss(scores: PerImage, iou: PerImage, labels: PerImage, kind: str = "smooth_l1") -> Tensor:
    """Mask-aware loss L_ma: draw A^c of the classes present to their IoU (paper Eq. 6-7, Table 4b).

    The mean over all (class, proposal) pairs of the batch. Images without classes add nothing; a batch with
    no class at all gives a zero that can still be backpropagated. No gradient flows into the IoU.

    Args:
        scores: A^c in [0, 1], (B, N, C) or one (N_b, C) per image.
        iou: one (K_b, N_b) per image, in [0, 1], from `min_max_normalize`.
        labels: one (K_b,) per image, integer class indices in 0..C-1.
        kind: "smooth_l1" (the paper's; half of "l2", as both sides lie in [0, 1]), "l1", "l2" or "kl".
            The paper leaves its KL open; as rows of Eq. 5 are no distributions (many proposals may fit a
            class, or none), this is each pair's Bernoulli KL(iou || score), zero only where both agree.

    Returns:
        A scalar, float32 at least.

    Raises:
        TypeError: labels are no integer tensors.
        ValueError: an empty batch, an unknown kind, or lengths, shapes or values that do not fit.

    Example:
        >>> scores = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])  # (B=1, N=2, C=2)
        >>> mask_aware_loss(scores, [torch.tensor([[1.0, 1.0]])], [torch.tensor([0])], kind="l2")
        tensor(0.1250)
    """
    _check_kind(kind)
    _check_lengths(scores=scores, iou=iou, labels=labels)
    selected, wanted = [], []
    for b, (score, target, label) in enumerate(zip(scores, iou, labels, strict=True)):
        label = _check_labels(b, score, label)
        if target.shape != (len(label), len(score)):
            got = f"{tuple(score.shape)}, {tuple(target.shape)} and {tuple(label.shape)}"
            raise ValueError(f"image {b}: expected scores (N, C), iou (K, N) and labels (K,), got {got}")
        check_unit_range(f"iou[{b}]", target, "see mask_iou and min_max_normalize")
        selected.append(_widen(score[:, label].T.flatten()))  # (K_b * N_b,)
        wanted.append(target.detach().flatten().to(selected[-1].dtype))  # (K_b * N_b,)
    pairs = torch.cat(selected)  # (P,)
    with torch.autocast(pairs.device.type, enabled=False):  # under it, binary_cross_entropy refuses to run
        return _KINDS[kind](pairs, torch.cat(wanted), reduction="none").sum() / max(len(pairs), 1)


def mask_classification_loss(scores: PerImage, labels: PerImage) -> Tensor:
    """Cross-entropy of labelled masks, the loss of MaskCLIP++ (arXiv 2412.11464, their `ReweightCELoss`, balanced).

    -log A^c of each mask's own class; its mean over the masks of a class, over the classes of an image, and over the
    images that have masks, so that neither many instances nor many classes outweigh others. A batch without masks
    gives a zero that can still be backpropagated. Scores that float32 rounds to 0 count as its smallest normal number.

    MaskCLIP++'s consistency alignment is no term of its loss: what it learns besides CLIP may act on the similarities
    of masks and words only, not on their embeddings; for its ViTs and ResNets it is a linear map of the cosine. A^c is
    the softmax of one, whose slope, CLIP's `logit_scale`, stays as it is.

    Args:
        scores: A^c of the ground-truth masks in [0, 1], (B, K, C) or one (K_b, C) per image.
        labels: one (K_b,) per image, the class of each mask, an index in 0..C-1; a class may come several times.

    Returns:
        A scalar, float32 at least.

    Raises:
        TypeError: labels are no integer tensors.
        ValueError: an empty batch, or lengths, shapes or values that do not fit.

    Example:
        >>> scores = torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]])  # (B=1, K=3, C=2)
        >>> mask_classification_loss(scores, [torch.tensor([0, 0, 1])])  # -log 0.5 / 4
        tensor(0.1733)
    """
    _check_lengths(scores=scores, labels=labels)
    terms = []
    for b, (score, label) in enumerate(zip(scores, labels, strict=True)):
        label = _check_labels(b, score, label)
        if label.shape != score.shape[:1]:
            got = f"{tuple(score.shape)} and {tuple(label.shape)}"
            raise ValueError(f"image {b}: expected scores (K, C) and one label a mask, (K,), got {got}")
        own = _widen(score).gather(1, label[:, None])[:, 0]  # (K,)
        _, place, count = label.unique(return_inverse=True, return_counts=True)
        weight = 1 / (len(count) * count[place])  # (K,), of sum 1
        terms.append(-(own.clamp(min=torch.finfo(own.dtype).tiny).log() * weight).sum())
    return torch.stack(terms).sum() / max(sum(len(label) > 0 for label in labels), 1)


def self_distillation_loss(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """Self-distillation loss L_dis: mean SmoothL1 of whole-image scores A^S and A^T (paper Eq. 8).

    Args:
        student_scores: A^S, (B, C) in [0, 1], of the encoder that trains, without masks.
        teacher_scores: A^T, (B, C) in [0, 1], of the frozen encoder; no gradient flows into them.

    Returns:
        A scalar, float32 at least.

    Raises:
        ValueError: shapes that differ or are not (B, C), an empty batch, values outside [0, 1].

    Example:
        >>> self_distillation_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
        tensor(0.1250)
    """
    if student_scores.ndim != 2 or student_scores.shape != teacher_scores.shape or not student_scores.numel():
        got = f"{tuple(student_scores.shape)} and {tuple(teacher_scores.shape)}"
        raise ValueError(f"expected student and teacher scores of one non-empty shape (B, C), got {got}")
    check_unit_range("student_scores", student_scores, "pass them through softmax over the classes")
    check_unit_range("teacher_scores", teacher_scores, "pass them through softmax over the classes")
    dtype = torch.promote_types(student_scores.dtype, teacher_scores.dtype)
    return F.smooth_l1_loss(_widen(student_scores, dtype), _widen(teacher_scores.detach(), dtype))


class MAFTLoss(nn.Module):
    """L_ma and lambda * L_dis of a batch (paper Eq. 5-8).

    The released code's lambda is 0.1; its loss differs in constant IoU rows only, see `min_max_normalize`.

    Args:
        kind: of L_ma, see `mask_aware_loss`.
        distillation_weight: lambda, finite and >= 0.

    Raises:
        ValueError: an unknown kind or a weight out of its range.

    Example:
        >>> targets, labels = [torch.ones(1, 2, 2)], [torch.tensor([0])]
        >>> MAFTLoss(distillation_weight=0)(torch.ones(1, 3, 1), torch.ones(1, 3, 2, 2), targets, labels)
        {'mask_aware': tensor(0.), 'self_distillation': tensor(0.)}
    """

    term = "mask_aware"

    def __init__(self, kind: str = "smooth_l1", distillation_weight: float = 1.0) -> None:
        super().__init__()
        _check_kind(kind)
        if not (math.isfinite(distillation_weight) and distillation_weight >= 0):
            raise ValueError(f"distillation_weight must be finite and >= 0, got {distillation_weight}")
        self.kind, self.distillation_weight = kind, distillation_weight

    def forward(
        self,
        scores: PerImage,
        masks: PerImage,
        targets: PerImage,
        labels: PerImage,
        student_scores: Tensor | None = None,
        teacher_scores: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Both losses of a batch.

        Args:
            scores: A^c, see `mask_aware_loss`.
            masks: (B, N, H, W), or one (N_b, H, W) per image, see `mask_iou`.
            targets: one (K_b, H, W) per image, see `mask_iou`.
            labels: one (K_b,) per image, see `mask_aware_loss`.
            student_scores: A^S, see `self_distillation_loss`; may be left out if lambda is 0.
            teacher_scores: A^T, likewise.

        Returns:
            The scalars "mask_aware" and "self_distillation", the latter weighted already: their sum is the total.

        Raises:
            TypeError, ValueError: missing student or teacher scores, and what the functions refuse.
        """
        _check_lengths(scores=scores, masks=masks, targets=targets, labels=labels)
        of_masks = self._of_masks(scores, masks, targets, labels)
        if self.distillation_weight == 0:
            return {self.term: of_masks, "self_distillation": of_masks.new_zeros(())}
        if student_scores is None or teacher_scores is None:
            raise ValueError("pass student_scores and teacher_scores (B, C), or set distillation_weight=0")
        distillation = self_distillation_loss(student_scores, teacher_scores)
        return {self.term: of_masks, "self_distillation": self.distillation_weight * distillation}

    def counts(self, masks: PerImage, labels: PerImage) -> list[int]:
        """How much each image counts in the first loss's mean over a batch: L_ma is one over pairs.

        Args:
            masks: as `forward` takes them.
            labels: likewise.
        """
        return [len(label) * len(mask) for mask, label in zip(masks, labels, strict=True)]

    def _of_masks(self, scores: PerImage, masks: PerImage, targets: PerImage, labels: PerImage) -> Tensor:
        with torch.no_grad():
            iou = [min_max_normalize(mask_iou(m, t)) for m, t in zip(masks, targets, strict=True)]
        return mask_aware_loss(scores, iou, labels, self.kind)


class MaskClassificationLoss(MAFTLoss):
    """MaskCLIP++'s loss in place of L_ma, and lambda * L_dis if wanted; the masks are the ground truth's.

    Those without a patch on the token grid count like the others.

    Args:
        distillation_weight: lambda, finite and >= 0. MaskCLIP++ has no such term.

    Raises:
        ValueError: a weight out of its range. When called, also masks other than the targets.

    Example:
        >>> regions, labels = [torch.ones(1, 2, 2)], [torch.tensor([0])]
        >>> MaskClassificationLoss()(torch.ones(1, 1, 2), regions, regions, labels)
        {'mask_classification': tensor(0.), 'self_distillation': tensor(0.)}
    """

    term = "mask_classification"

    def __init__(self, distillation_weight: float = 0.0) -> None:
        super().__init__(distillation_weight=distillation_weight)
        self.kind = "cross_entropy"

    def counts(self, masks: PerImage, labels: PerImage) -> list[int]:
        """See `MAFTLoss.counts`; every image that has masks counts alike.

        Args:
            masks: as `forward` takes them.
            labels: likewise.
        """
        return [int(len(label) > 0) for label in labels]

    def _of_masks(self, scores: PerImage, masks: PerImage, targets: PerImage, labels: PerImage) -> Tensor:
        for b, (mask, target) in enumerate(zip(masks, targets, strict=True)):
            if mask.shape != target.shape or not (mask == target).all():
                raise ValueError(
                    f"image {b}: its {len(mask)} masks are not the regions of its {len(target)} classes, in their "
                    "order; this loss takes ground-truth masks alone: SegmentationSamples(..., "
                    "ground_truth_masks=True) without propose"
                )
        return mask_classification_loss(scores, labels)


def class_indices(name: str, values: Any) -> Tensor:
    """Class indices of any integer dtype as int64: of the unsigned ones torch can hardly compute with more than uint8.

    Args:
        name: of the argument, for the error.
        values: integer tensor of any shape.

    Raises:
        TypeError: no tensor, or one of another dtype.

    Example:
        >>> class_indices("labels", torch.tensor([0, 65535], dtype=torch.uint16))
        tensor([    0, 65535])
    """
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{name} must be a tensor of integer class indices, got {type(values).__name__}; numpy's need "
            "torch.from_numpy(...)"
        )
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integer class indices, got {values.dtype}")
    return values.long()


def _widen(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """In float32 at least. On the way back, what the dtype given can't hold stays at its largest value, not infinity:
    the slope of KL or of a quotient is beyond float16."""
    wide = values.to(torch.promote_types(torch.promote_types(values.dtype, dtype), torch.float32))
    if wide.requires_grad and wide.dtype != values.dtype:
        largest = torch.finfo(values.dtype).max
        wide.register_hook(lambda gradient: gradient.clamp(-largest, largest))
    return wide


def _check_kind(kind: str) -> None:
    if kind not in _KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(_KINDS)}")


def _check_labels(b: int, score: Tensor, label: Any) -> Tensor:
    """The labels of image b as int64, after making sure that its scores are some and have a column for each."""
    label = class_indices(f"labels[{b}]", label)
    if score.ndim != 2 or label.ndim != 1:
        got = f"{tuple(score.shape)} and {tuple(label.shape)}"
        raise ValueError(f"image {b}: expected scores (N, C) and labels (K,), got {got}")
    if len(label) and not (label.min() >= 0 and label.max() < score.shape[1]):
        got = f"0..{score.shape[1] - 1}, got {label.tolist()}"
        raise ValueError(f"labels[{b}] must lie in {got}: drop ignored classes, index the scored ones")
    check_unit_range(f"scores[{b}]", score, "pass them through softmax over the classes")
    return label


def _check_lengths(**per_image: PerImage) -> None:
    lengths = {name: len(values) for name, values in per_image.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"expected one entry per image and at least one image, got {lengths}")
