from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from maft_adapter.classify import class_scores
from maft_adapter.losses import (
    MAFTLoss,
    MaskClassificationLoss,
    mask_aware_loss,
    mask_classification_loss,
    mask_iou,
    min_max_normalize,
    self_distillation_loss,
)

KINDS = ["smooth_l1", "l1", "l2", "kl"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ragged_batch() -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """scores, masks, targets, labels of four images with C = 6; K = 2, 0, 3, 1 and N = 5, 4, 1, 7."""
    sizes = [(5, 2, 8, 8), (4, 0, 8, 8), (1, 3, 5, 9), (7, 1, 12, 4)]
    scores = [torch.randn(n, 6).softmax(-1) for n, _, _, _ in sizes]
    masks = [torch.rand(n, h, w) for n, _, h, w in sizes]
    targets = [torch.rand(k, h, w) > 0.6 for _, k, h, w in sizes]
    labels = [torch.randperm(6)[:k] for _, k, _, _ in sizes]
    return scores, masks, targets, labels


def numpy_iou(masks: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    iou = np.zeros((len(targets), len(masks)))
    for k, target in enumerate(targets):
        for n, mask in enumerate(masks):
            intersection = (mask * target).sum()
            union = (mask + target - mask * target).sum()
            iou[k, n] = intersection / union if union else 0
    return iou


def numpy_normalize(iou: NDArray[np.float64]) -> NDArray[np.float64]:
    rows = [(row - row.min()) / np.ptp(row) if np.ptp(row) else row for row in iou]
    return np.array(rows).reshape(iou.shape)


def numpy_distance(kind: str, x: float, y: float) -> float:
    if kind == "kl":  # torch ends logarithms at -100
        log = lambda value: max(np.log(value), -100) if value else -100  # noqa: E731
        return y * (log(y) - log(x)) + (1 - y) * (log(1 - y) - log(1 - x))
    d = abs(x - y)
    return {"l1": d, "l2": d * d, "smooth_l1": 0.5 * d * d if d < 1 else d - 0.5}[kind]  # smooth_l1: Eq. 7


@pytest.mark.parametrize("soft", [False, True])
def test_iou_equals_numpy(soft: bool) -> None:
    masks = torch.rand(7, 9, 13)
    targets = torch.rand(4, 9, 13) > 0.5
    if not soft:
        masks = masks > 0.3
    masks[2] = 0
    targets[1] = 0  # with masks[2] a pair without any pixel
    expected = numpy_iou(masks.double().numpy(), targets.double().numpy())
    assert mask_iou(masks, targets).dtype == torch.float32
    np.testing.assert_allclose(mask_iou(masks, targets).numpy(), expected, rtol=1e-5)


def test_iou_of_a_binary_mask_with_itself_is_one_and_symmetric() -> None:
    masks = torch.rand(6, 30, 30) > 0.5
    iou = mask_iou(masks, masks)
    assert torch.equal(iou.diagonal(), torch.ones(6))
    assert torch.equal(iou, iou.T)


@pytest.mark.parametrize(("n", "k"), [(0, 3), (3, 0), (0, 0)])
def test_no_proposals_or_no_classes(n: int, k: int) -> None:
    iou = min_max_normalize(mask_iou(torch.rand(n, 4, 4), torch.ones(k, 4, 4)))
    assert iou.shape == (k, n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_rounds_the_pixel_counts(dtype: torch.dtype) -> None:
    masks = torch.ones(1, 300, 300, dtype=dtype)  # 90000 pixels: beyond float16
    targets = torch.ones(1, 300, 300, dtype=torch.bool)
    targets[:, :1] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        iou = mask_iou(masks, targets)
    assert iou.item() == pytest.approx(299 / 300, rel=1e-6)


def test_iou_gradient() -> None:
    masks = torch.rand(3, 3, 4, dtype=torch.float64, requires_grad=True)
    targets = (torch.rand(2, 3, 4) > 0.5).double()
    assert torch.autograd.gradcheck(lambda m: min_max_normalize(mask_iou(m, targets)), masks)


def test_empty_masks_have_finite_gradients() -> None:
    masks = torch.zeros(2, 4, 4, requires_grad=True)
    min_max_normalize(mask_iou(masks, torch.zeros(1, 4, 4))).sum().backward()
    assert masks.grad is not None
    assert masks.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_iou_of_next_to_nothing_has_finite_gradients(dtype: torch.dtype) -> None:
    for weight in (1e-7, 1e-18, 1e-30, 1e-38, 1e-40):
        masks = torch.full((3, 4, 4), weight, dtype=dtype, requires_grad=True)
        min_max_normalize(mask_iou(masks, weight * torch.rand(2, 4, 4))).sum().backward()
        assert masks.grad is not None and masks.grad.isfinite().all(), weight


@pytest.mark.parametrize(
    ("masks", "targets", "message"),
    [
        (torch.rand(2, 4, 4), torch.ones(1, 4, 5), r"\(2, 4, 4\) and \(1, 4, 5\): resize"),
        (torch.rand(1, 2, 4, 4), torch.ones(1, 4, 4), r"masks \(N, H, W\)"),
        (torch.full((2, 4, 4), -3.0), torch.ones(1, 4, 4), r"masks must lie in \[0, 1\].*-3.*sigmoid"),
        (torch.full((2, 4, 4), torch.nan), torch.ones(1, 4, 4), "masks must lie.*nan"),
        (torch.rand(2, 4, 4), torch.full((1, 4, 4), 255), "targets must lie.*one binary mask per class"),
    ],
)
def test_iou_refuses(masks: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_iou(masks, targets)


def test_rows_are_stretched_to_zero_and_one_independently() -> None:
    iou = torch.rand(5, 20) * torch.tensor([0.9, 0.5, 1e-3, 1e-9, 1.0])[:, None]
    normalized = min_max_normalize(iou)
    assert torch.equal(normalized.amin(1), torch.zeros(5))
    assert torch.equal(normalized.amax(1), torch.ones(5))
    assert torch.equal(normalized.argsort(1), iou.argsort(1))
    assert torch.equal(normalized[2], min_max_normalize(iou[2:3])[0])
    np.testing.assert_allclose(normalized.numpy(), numpy_normalize(iou.double().numpy()), atol=1e-6)


@pytest.mark.parametrize("row", [[0.9], [0.0], [0.4, 0.4, 0.4], [0.0, 0.0]])
def test_constant_rows_stay(row: list[float]) -> None:
    iou = torch.tensor([row, row], requires_grad=True)
    normalized = min_max_normalize(iou)
    assert torch.equal(normalized, iou)
    normalized.sum().backward()
    assert iou.grad is not None
    assert torch.equal(iou.grad, torch.ones_like(iou))


def test_identical_proposals_are_not_told_apart_by_rounding() -> None:
    # the sums of some of these copies differ in their last bits, with some kernels
    masks = torch.rand(1, 400, 400).repeat(33, 1, 1)
    iou = mask_iou(masks, torch.rand(3, 400, 400) > 0.7)
    assert torch.equal(min_max_normalize(iou), iou)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_next_to_nothing_have_finite_gradients(dtype: torch.dtype) -> None:
    for scale in (1e-3, 6e-8, 1e-18, 1e-20, 1e-38, 1e-44):
        row = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).double() * scale
        iou = row.to(dtype).requires_grad_()
        normalized = min_max_normalize(iou)
        (normalized * torch.tensor([1.0, -2.0, 3.0, 5.0])).sum().backward()
        assert normalized.dtype == torch.promote_types(dtype, torch.float32)
        assert iou.grad is not None and iou.grad.isfinite().all() and normalized.isfinite().all(), scale
        if scale in (1e-3, 1e-18) and dtype != torch.float16:
            torch.testing.assert_close(normalized.detach(), (row / row.max()).to(normalized.dtype), atol=4e-3, rtol=0)


def test_spreads_of_next_to_nothing_stay() -> None:
    """At most 1e-19, or within rounding: 1e-5 of the maximum."""
    iou = torch.tensor([[0, 1e-19], [0, 1.2e-19], [0.5, 0.500004], [0.5, 0.500006]])
    stretched = torch.tensor([[0.0, 1.0]])
    assert torch.equal(min_max_normalize(iou), torch.cat([iou[:1], stretched, iou[2:3], stretched]))


def test_normalize_refuses_a_batch() -> None:
    with pytest.raises(ValueError, match=r"iou \(K, N\).*\(2, 3, 4\)"):
        min_max_normalize(torch.rand(2, 3, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_mask_aware_loss_equals_numpy(kind: str) -> None:
    scores, masks, targets, labels = ragged_batch()
    pairs = []
    for score, mask, target, label in zip(scores, masks, targets, labels, strict=True):
        wanted = numpy_normalize(numpy_iou(mask.double().numpy(), target.double().numpy()))
        for k, c in enumerate(label.tolist()):
            pairs += [numpy_distance(kind, score[n, c].item(), wanted[k, n]) for n in range(len(score))]
    assert len(pairs) == 2 * 5 + 3 * 1 + 1 * 7
    iou = [min_max_normalize(mask_iou(m, t)) for m, t in zip(masks, targets, strict=True)]
    assert mask_aware_loss(scores, iou, labels, kind).item() == pytest.approx(np.mean(pairs), rel=1e-5)


def test_matches_torch_on_a_dense_batch_as_in_the_released_code() -> None:
    """SmoothL1Loss over the stacked (image, class) rows; epsilons in both divisions."""
    scores, labels = torch.randn(3, 10, 5).softmax(-1), [torch.tensor([4, 0])] * 3
    masks, targets = torch.rand(3, 10, 16, 16), [torch.rand(2, 16, 16) > 0.5 for _ in range(3)]
    rows, goals = [], []
    for b in range(3):
        for target, label in zip(targets[b].float(), labels[b], strict=True):
            intersection = (masks[b] * target).sum((1, 2))
            iou = intersection / (masks[b].sum((1, 2)) + target.sum() - intersection + 1e-7)
            goals.append((iou - iou.min()) / (iou.max() - iou.min() + 1e-8))
            rows.append(scores[b, :, label])
    expected = F.smooth_l1_loss(torch.stack(rows), torch.stack(goals))
    losses = MAFTLoss(distillation_weight=0)(scores, masks, targets, labels)
    torch.testing.assert_close(losses["mask_aware"], expected)


def test_tensor_and_sequence_agree() -> None:
    scores, iou = torch.randn(2, 4, 3).softmax(-1), [torch.rand(2, 4), torch.rand(1, 4)]
    labels = [torch.tensor([2, 0]), torch.tensor([1])]
    assert torch.equal(mask_aware_loss(scores, iou, labels), mask_aware_loss(list(scores), iou, labels))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_zero_at_the_target_only(kind: str) -> None:
    iou = torch.tensor([[0.0, 0.3, 1.0, 0.8]])
    scores = iou.T.clone()  # (N=4, C=1)
    labels = [torch.tensor([0])]
    assert mask_aware_loss([scores], [iou], labels, kind).item() == pytest.approx(0, abs=1e-6)
    for n in range(4):
        moved = scores.clone()
        moved[n] = (moved[n] - 0.4).abs()
        assert mask_aware_loss([moved], [iou], labels, kind).item() > 1e-3


def test_smooth_l1_is_half_of_l2_on_probabilities() -> None:
    scores, iou, labels = torch.rand(1, 9, 3), [torch.rand(3, 9)], [torch.arange(3)]
    torch.testing.assert_close(2 * mask_aware_loss(scores, iou, labels), mask_aware_loss(scores, iou, labels, "l2"))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_scores_of_present_classes_only(kind: str) -> None:
    scores = torch.rand(1, 3, 4, dtype=torch.float64) * 0.8 + 0.1
    scores.requires_grad_()
    iou = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    labels = [torch.tensor([3, 1])]
    loss = mask_aware_loss(scores, [iou], labels, kind)
    loss.backward()
    assert iou.grad is None
    assert scores.grad is not None
    assert (scores.grad[..., [1, 3]] != 0).all()
    assert (scores.grad[..., [0, 2]] == 0).all()
    check: Callable[[Tensor], Tensor] = lambda s: mask_aware_loss(s, [iou.detach()], labels, kind)  # noqa: E731
    assert torch.autograd.gradcheck(check, scores)


@pytest.mark.parametrize("kind", KINDS)
def test_saturated_scores_keep_loss_and_gradient_finite(kind: str) -> None:
    logits = torch.tensor([[[200.0, -200.0], [-200.0, 200.0]]], requires_grad=True)  # softmax gives 0 and 1
    iou = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    loss = mask_aware_loss(logits.softmax(-1), [iou], [torch.tensor([0, 1])], kind)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_score_that_a_dtype_holds_has_a_finite_gradient(kind: str, dtype: torch.dtype) -> None:
    values = [0.0, 1.0, 6e-8, 1e-6, 1e-5, 1e-4, 0.3, 1 - 2**-11]
    scores = torch.tensor(values).to(dtype)[:, None].requires_grad_()  # (N, C=1)
    for target in (0.0, 1.0, 0.4):
        loss = mask_aware_loss([scores], [torch.full((1, 8), target)], [torch.tensor([0])], kind)
        (gradient,) = torch.autograd.grad(loss, scores)
        assert loss.isfinite() and gradient.isfinite().all()
        exact = scores.detach().double().requires_grad_()
        expected = mask_aware_loss([exact], [torch.full((1, 8), target)], [torch.tensor([0])], kind)
        (slope,) = torch.autograd.grad(expected, exact)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        largest = torch.finfo(dtype).max
        torch.testing.assert_close(gradient.double(), slope.clamp(-largest, largest), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 4])
def test_batch_without_classes_is_a_zero_attached_to_the_graph(kind: str, n: int) -> None:
    scores = torch.full((2, n, 3), 1 / 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = mask_aware_loss(scores, [torch.zeros(0, n)] * 2, [none, none], kind)
    loss.backward()
    assert loss.item() == 0
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.zeros(2, n, 3))


def test_image_without_classes_changes_nothing() -> None:
    scores, iou, labels = torch.rand(2, 4, 3), torch.rand(2, 4), torch.tensor([0, 2])
    none = torch.zeros(0, dtype=torch.long)
    both = mask_aware_loss(scores, [iou, torch.zeros(0, 4)], [labels, none])
    assert torch.equal(both, mask_aware_loss(scores[:1], [iou], [labels]))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_scores_give_a_float32_loss_also_under_autocast(kind: str) -> None:
    scores = torch.rand(1, 4, 3).bfloat16()
    iou, labels = [torch.rand(2, 4)], [torch.tensor([0, 2])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mask_aware_loss(scores, iou, labels, kind)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mask_aware_loss(scores.float(), iou, labels, kind))


INTEGERS = [
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    scores, iou, labels = torch.rand(1, 4, 3), [torch.rand(2, 4)], torch.tensor([2, 0])
    assert torch.equal(mask_aware_loss(scores, iou, [labels.to(dtype)]), mask_aware_loss(scores, iou, [labels]))
    with pytest.raises(ValueError, match=r"labels\[0\] must lie in 0..2, got \[2, 3\]"):
        mask_aware_loss(scores, iou, [torch.tensor([2, 3]).to(dtype)])


SCORES = torch.full((1, 4, 3), 1 / 3)
IOU = torch.full((2, 4), 0.5)
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("scores", "iou", "labels", "kind", "message"),
    [
        (SCORES, [IOU], [LABELS], "huber", "unknown kind 'huber'.*smooth_l1, l1, l2, kl"),
        (SCORES, [IOU, IOU], [LABELS], "l1", "one entry per image.*'iou': 2"),
        (SCORES[:0], [], [], "l1", "at least one image"),
        (SCORES[0], [IOU] * 4, [LABELS] * 4, "l1", r"image 0: expected scores \(N, C\)"),
        (SCORES, [IOU.T], [LABELS], "l1", r"image 0: .*\(4, 2\)"),
        (SCORES, [IOU], [LABELS[:1]], "l1", r"image 0: .*\(2, 4\) and \(1,\)"),
        (SCORES, [IOU], [LABELS + 1], "l1", r"labels\[0\] must lie in 0..2, got \[1, 3\]"),
        (SCORES, [IOU], [LABELS - 1], "l1", r"labels\[0\] must lie in 0..2, got \[-1, 1\]"),
        (SCORES * 30, [IOU], [LABELS], "l1", r"scores\[0\] must lie in \[0, 1\].*softmax"),
        (SCORES * torch.nan, [IOU], [LABELS], "kl", r"scores\[0\] must lie in \[0, 1\].*nan"),
        (SCORES, [IOU * 4], [LABELS], "l1", r"iou\[0\] must lie in \[0, 1\], got values from 2 to 2"),
    ],
)
def test_mask_aware_loss_refuses(
    scores: Tensor, iou: list[Tensor], labels: list[Tensor], kind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mask_aware_loss(scores, iou, labels, kind)


@pytest.mark.parametrize("labels", [LABELS.float(), LABELS.bool(), LABELS.to(torch.complex64), [0, 2], LABELS.numpy()])
def test_labels_must_be_integer_tensors(labels: Tensor) -> None:
    with pytest.raises(TypeError, match=r"labels\[0\] must be a tensor of integer class indices"):
        mask_aware_loss(SCORES, [IOU], [labels])


def test_distillation_equals_numpy_and_leaves_the_teacher_alone() -> None:
    student, teacher = torch.rand(3, 5, requires_grad=True), torch.rand(3, 5, requires_grad=True)
    loss = self_distillation_loss(student, teacher)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    assert loss.item() == pytest.approx(np.mean([numpy_distance("smooth_l1", x, y) for x, y in pairs]))
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distillation_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student = torch.full((2, 3), 2.0**-9, dtype=dtype, requires_grad=True)  # squares that float16 rounds to 0
    teacher = torch.full((2, 3), 2.0**-10)
    loss = self_distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.5 * 2.0**-20, rel=1e-6)
    loss.backward()
    assert student.grad is not None and student.grad.dtype == dtype


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.rand(2, 3), torch.rand(2, 4), r"\(2, 3\) and \(2, 4\)"),
        (torch.rand(3), torch.rand(3), r"\(B, C\)"),
        (torch.rand(0, 3), torch.rand(0, 3), "non-empty"),
        (torch.rand(2, 3) + 1.5, torch.rand(2, 3), "student_scores must lie.*softmax"),
        (torch.rand(2, 3), torch.rand(2, 3) - 1.5, "teacher_scores must lie.*softmax"),
    ],
)
def test_distillation_refuses(student: Tensor, teacher: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        self_distillation_loss(student, teacher)


@pytest.mark.parametrize("kind", KINDS)
def test_module_combines_the_functions(kind: str) -> None:
    scores, masks, targets, labels = ragged_batch()
    student, teacher = torch.rand(4, 6), torch.rand(4, 6)
    losses = MAFTLoss(kind, distillation_weight=0.5)(scores, masks, targets, labels, student, teacher)
    iou = [min_max_normalize(mask_iou(m, t)) for m, t in zip(masks, targets, strict=True)]
    assert list(losses) == ["mask_aware", "self_distillation"]
    assert torch.equal(losses["mask_aware"], mask_aware_loss(scores, iou, labels, kind))
    assert torch.equal(losses["self_distillation"], 0.5 * self_distillation_loss(student, teacher))


def test_module_sends_no_gradient_into_the_masks() -> None:
    scores, masks, targets, labels = ragged_batch()
    logits = [score.log().requires_grad_() for score in scores]
    masks = [mask.requires_grad_() for mask in masks]
    losses = MAFTLoss(distillation_weight=0)([x.softmax(-1) for x in logits], masks, targets, labels)
    losses["mask_aware"].backward()
    assert all(mask.grad is None for mask in masks)
    # the second image has no classes
    assert [bool(x.grad is not None and x.grad.any()) for x in logits] == [True, False, True, True]


def test_module_without_distillation_needs_no_teacher() -> None:
    losses = MAFTLoss(distillation_weight=0)(*ragged_batch())
    assert losses["self_distillation"].item() == 0


def test_the_paper_s_kind_and_lambda_are_the_defaults() -> None:
    assert (MAFTLoss().kind, MAFTLoss().distillation_weight) == ("smooth_l1", 1.0)


def test_module_refuses() -> None:
    scores, masks, targets, labels = ragged_batch()
    with pytest.raises(ValueError, match=r"pass student_scores and teacher_scores \(B, C\), or set"):
        MAFTLoss()(scores, masks, targets, labels, student_scores=torch.rand(4, 6))
    with pytest.raises(ValueError, match="'masks': 3"):
        MAFTLoss(distillation_weight=0)(scores, masks[:3], targets, labels)
    with pytest.raises(ValueError, match="unknown kind 'mse'"):
        MAFTLoss("mse")
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="distillation_weight must be finite"):
            MAFTLoss(distillation_weight=weight)


# MaskCLIP++'s loss


def numpy_classification(
    embeddings: list[NDArray[np.float64]], text: NDArray[np.float64], scale: float, labels: list[list[int]]
) -> float:
    """Balanced cross-entropy of `scale` times the cosines, one mask after the other."""
    images = []
    for masks, own in zip(embeddings, labels, strict=True):
        by_class: dict[int, list[float]] = {}
        for mask, c in zip(masks, own, strict=True):
            logits = [scale * mask @ word / np.linalg.norm(mask) / np.linalg.norm(word) for word in text]
            by_class.setdefault(c, []).append(np.logaddexp.reduce(logits) - logits[c])
        if by_class:
            images.append(np.mean([np.mean(losses) for losses in by_class.values()]))
    return float(np.mean(images or [0]))


@given(data=st.data(), scale=st.sampled_from([1.0, 10.0, 100.0]))
def test_mask_classification_equals_a_cross_entropy_of_cosines(data: st.DataObject, scale: float) -> None:
    classes = data.draw(st.integers(1, 5))
    labels = data.draw(st.lists(st.lists(st.integers(0, classes - 1), max_size=5), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    text = torch.randn(classes, 32, generator=generator)
    embeddings = [torch.randn(len(own), 32, generator=generator) for own in labels]
    integers = data.draw(st.sampled_from(INTEGERS))
    loss = mask_classification_loss(
        [class_scores(masks, text, scale) for masks in embeddings],
        [torch.tensor(own, dtype=torch.int64).to(integers) for own in labels],
    )
    expected = numpy_classification([array(masks) for masks in embeddings], array(text), scale, labels)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_mask_classification_of_one_mask_an_image_is_torch_s_cross_entropy() -> None:
    logits, labels = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 3, 1, 1, 2, 0])
    loss = mask_classification_loss(list(logits.softmax(-1)[:, None]), list(labels[:, None]))
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, expected)
    (slope,), (wanted,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(slope, wanted)


def test_mask_classification_of_scores_that_round_to_zero_stays_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        logits = torch.tensor([[800.0, -800.0], [-800.0, 800.0], [90.0, 0.0]], dtype=dtype, requires_grad=True)
        loss = mask_classification_loss([logits.softmax(-1)], [torch.tensor([1, 1, 1])])
        (slope,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and loss > 50 and slope.isfinite().all()


def test_mask_classification_of_no_masks_is_a_zero_attached_to_the_graph() -> None:
    scores = torch.full((2, 0, 3), 1 / 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = mask_classification_loss(scores, [none, none])
    loss.backward()
    assert loss.item() == 0 and scores.grad is not None
    one = torch.rand(2, 3)
    assert torch.equal(
        mask_classification_loss([one, one[:0]], [torch.tensor([0, 2]), none]),
        mask_classification_loss([one], [torch.tensor([0, 2])]),
    )


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (SCORES, [LABELS], r"image 0: expected scores \(K, C\) and one label a mask.*\(4, 3\) and \(2,\)"),
        (SCORES[0], [LABELS] * 4, r"image 0: expected scores \(N, C\)"),
        (SCORES[:, :2], [LABELS + 1], r"labels\[0\] must lie in 0..2, got \[1, 3\]"),
        (SCORES[:, :2] * 30, [LABELS], r"scores\[0\] must lie in \[0, 1\].*softmax"),
        (SCORES, [], "one entry per image"),
        (SCORES[:0], [], "at least one image"),
    ],
)
def test_mask_classification_refuses(scores: Tensor, labels: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_classification_loss(scores, labels)


def test_the_module_of_mask_classification() -> None:
    _, _, targets, labels = ragged_batch()
    scores = [torch.rand(len(label), 6) for label in labels]
    student, teacher = torch.rand(4, 6), torch.rand(4, 6)
    masks = [target.float() for target in targets]
    plain = MaskClassificationLoss()(scores, masks, targets, labels)
    assert list(plain) == ["mask_classification", "self_distillation"] and plain["self_distillation"] == 0
    assert torch.equal(plain["mask_classification"], mask_classification_loss(scores, labels))
    both = MaskClassificationLoss(0.5)(scores, masks, targets, labels, student, teacher)
    assert torch.equal(both["self_distillation"], 0.5 * self_distillation_loss(student, teacher))
    assert MaskClassificationLoss().counts(masks, labels) == [1, 0, 1, 1]
    with pytest.raises(ValueError, match="distillation_weight must be finite"):
        MaskClassificationLoss(-1.0)
    for wrong in (masks[0][:1], masks[0].flip(0), masks[0] * 0.5):
        with pytest.raises(ValueError, match=r"image 0: its \d masks are not the regions of its 2 classes.*propose"):
            MaskClassificationLoss()([scores[0], *scores[1:]], [wrong, *masks[1:]], targets, labels)


# Any shapes, dtypes and values, against numpy in float64

FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
SEEDS = st.integers(0, 2**32)
SIDES = st.integers(1, 12)


def array(values: Tensor) -> NDArray[np.float64]:
    return values.detach().double().numpy()


def random_proposals(n: int, height: int, width: int, soft: bool, dtype: torch.dtype, seed: int) -> Tensor:
    """(n, H, W), soft ones in `dtype` or bool; among them whole and empty masks."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(n, 1, 1, generator=generator).mul(1.5).sub(0.25)
    masks = torch.rand(n, height, width, generator=generator)
    return (masks * (masks < share)).to(dtype) if soft else masks < share


@given(n=st.integers(0, 6), k=st.integers(0, 4), size=st.tuples(SIDES, SIDES), soft=st.tuples(*[st.booleans()] * 2),
       dtypes=st.tuples(FLOATS, FLOATS), seed=SEEDS)  # fmt: skip
def test_any_iou_equals_numpy(
    n: int, k: int, size: tuple[int, int], soft: tuple[bool, bool], dtypes: tuple[torch.dtype, torch.dtype], seed: int
) -> None:
    masks = random_proposals(n, *size, soft[0], dtypes[0], seed)
    targets = random_proposals(k, *size, soft[1], dtypes[1], seed + 1)
    iou = mask_iou(masks, targets)
    wide = torch.promote_types(torch.promote_types(masks.dtype, targets.dtype), torch.float32)
    assert iou.dtype == wide and iou.shape == (k, n) and ((iou >= 0) & (iou <= 1)).all()
    np.testing.assert_allclose(array(iou), numpy_iou(array(masks), array(targets)), rtol=2e-5, atol=1e-7)


@given(data=st.data(), dtype=FLOATS, k=st.integers(0, 4), n=st.integers(0, 7))
def test_any_rows_are_stretched_as_numpy_does(data: st.DataObject, dtype: torch.dtype, k: int, n: int) -> None:
    """Of few steps, so that a row is constant or has a spread beyond all rounding."""
    steps = data.draw(st.lists(st.lists(st.integers(0, 64), min_size=n, max_size=n), min_size=k, max_size=k))
    scales = data.draw(st.lists(st.sampled_from([1, 2**-3, 2**-14]), min_size=k, max_size=k))
    iou = (torch.tensor(steps).reshape(k, n) / 64 * torch.tensor(scales).reshape(k, 1)).to(dtype)
    normalized = min_max_normalize(iou)
    assert normalized.dtype == torch.promote_types(dtype, torch.float32)
    expected = numpy_normalize(array(iou)) if n else array(iou)
    np.testing.assert_allclose(array(normalized), expected, atol=1e-6)


@given(data=st.data(), kind=st.sampled_from(KINDS), dtype=FLOATS, sharpness=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
def test_any_mask_aware_loss_equals_numpy(data: st.DataObject, kind: str, dtype: torch.dtype, sharpness: float) -> None:
    classes = data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=3))  # N_b, K_b
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    integers = data.draw(st.sampled_from(INTEGERS))
    scores = [(sharpness * torch.randn(n, classes, generator=generator)).softmax(-1).to(dtype) for n, _ in sizes]
    iou = [torch.rand(k, n, generator=generator).mul(1.5).sub(0.25).clamp(0, 1) for n, k in sizes]
    labels = [torch.randint(0, classes, (k,), generator=generator) for _, k in sizes]
    loss = mask_aware_loss(scores, iou, [label.to(integers) for label in labels], kind)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    pairs = [
        numpy_distance(kind, array(score)[n, c], array(target)[k, n])
        for score, target, label in zip(scores, iou, labels, strict=True)
        for k, c in enumerate(label.tolist())
        for n in range(len(score))
    ]
    # The entropy is subtracted from a cross entropy of up to 100.
    assert loss.item() == pytest.approx(np.mean(pairs or [0]), rel=1e-4, abs=1e-4 if kind == "kl" else 1e-7)


@given(b=st.integers(1, 4), c=st.integers(1, 6), dtypes=st.tuples(FLOATS, FLOATS), seed=SEEDS)
def test_any_distillation_equals_numpy(b: int, c: int, dtypes: tuple[torch.dtype, torch.dtype], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(b, c, generator=generator).mul(3).softmax(-1).to(dtype) for dtype in dtypes)
    pairs = zip(array(student).flatten(), array(teacher).flatten(), strict=True)
    expected = np.mean([numpy_distance("smooth_l1", x, y) for x, y in pairs])
    assert self_distillation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
