"""Mask-aware fine-tuning, the paper's second stage (Sec. 4.2 and 5.1)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm

from .adapt import encode_masks, encode_masks_and_image, is_mask_aware
from .checkpoint import save_mask_aware
from .classify import class_scores
from .freezing import trainable_parameters
from .losses import MAFTLoss


class Sample(NamedTuple):
    """One training image with its proposals and ground truth.

    Attributes:
        image: (3, H, W) float, normalised as the model wants it; one size for all samples of a batch.
        masks: (N, H', W') proposals, bool or float in [0, 1]; N may differ from image to image.
        labels: (H', W') integer label map; values are rows of the text classifier, and anything outside 0..C-1
            (255, unseen classes) is ignored.
    """

    image: Tensor
    masks: Tensor
    labels: Tensor


def finetune(
    clip_model: Any,
    samples: Dataset[Sample] | Sequence[Sample],
    text: Tensor,
    *,
    iterations: int = 1000,
    batch_size: int = 16,
    lr: float = 1e-5,
    weight_decay: float = 1e-5,
    freeze: str = "paper",
    loss: MAFTLoss | None = None,
    logit_scale: float | None = None,
    teacher_scores: Tensor | None = None,
    seed: int = 0,
    num_workers: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    on_iteration: Callable[[int], None] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Fine-tune the mask-aware tower of a CLIP model with L_ma + lambda * L_dis; the defaults are the paper's.

    Paper Sec. 5.1: AdamW, lr and weight decay 1e-5, batch 16, images of 480x480; 100 iterations for Pascal-VOC, 1000
    for COCO-Stuff, 5000 for ADE20K. More iterations go on raising seen classes and lower unseen ones (Table 4c). The
    released configuration adds a polynomial decay of the learning rate to 0 (power 0.9) and clips the gradient's norm
    at 0.01; so does this.
    On the CPU a repeat with the same seed is equal to the bit.

    Args:
        clip_model: a CLIP model with a mask-aware `.visual`, which is trained in place and stays in float32; the text
            tower is not used. The model is put into eval mode for the time of the call: CLIP has no dropout to
            train with, and running statistics stay the frozen model's.
        samples: the training images; only seen classes belong into their labels.
        text: (C, D) unit-length text embeddings of the seen classes, see `maft_adapter.classify.text_classifier`.
        iterations: optimizer steps.
        batch_size: images a step, drawn in random order, every image once before any comes again.
        lr: learning rate of the first step.
        weight_decay: of AdamW, on every trained parameter.
        freeze: what stays frozen, see `trainable_parameters`.
        loss: defaults to `MAFTLoss()`: SmoothL1, lambda = 1.
        logit_scale: 1 / temperature of A^c; defaults to the model's own `logit_scale.exp()`, 100 for trained CLIPs.
        teacher_scores: (len(samples), C) class scores of the frozen CLIP for the whole images, computed before. By
            default a frozen copy of the tower computes them batch by batch.
        seed: of the order of the samples.
        num_workers: of the DataLoader.
        checkpoint: path that `save_mask_aware` writes the tower to, every `checkpoint_every` iterations and at the
            end (also after Ctrl-C), never half.
        checkpoint_every: iterations between two checkpoints.
        on_iteration: called with the number of finished iterations, after each.
        progress: show a bar with both losses.

    Returns:
        Both losses of every iteration: [{"mask_aware": ..., "self_distillation": ...}, ...], the latter weighted.

    Raises:
        TypeError: the model is not mask-aware or not in float32.
        ValueError: no samples, or an argument out of its range.
        FloatingPointError: the training diverged: class scores are not finite.

    Example:
        >>> import open_clip, maft_adapter
        >>> clip = open_clip.create_model("ViT-B-32")
        >>> _ = maft_adapter.make_mask_aware(clip.visual, start_layer=11)
        >>> sample = Sample(torch.randn(3, 64, 64), torch.ones(1, 64, 64), torch.zeros(64, 64, dtype=torch.int64))
        >>> text = torch.nn.functional.normalize(torch.randn(2, 512), dim=-1)
        >>> len(finetune(clip, [sample], text, iterations=1, progress=False))
        1
    """
    visual = clip_model.visual
    _check(
        visual, samples, text, teacher_scores,
        iterations=iterations, batch_size=batch_size, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    loss = MAFTLoss() if loss is None else loss
    scale = float(clip_model.logit_scale.detach().exp()) if logit_scale is None else logit_scale
    device = next(visual.parameters()).device
    text = text.to(device)
    distil = loss.distillation_weight > 0
    teacher = copy.deepcopy(visual).requires_grad_(False).eval() if distil and teacher_scores is None else None
    parameters = trainable_parameters(visual, freeze)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = PolynomialLR(optimizer, total_iters=iterations, power=0.9)
    batches = _batches(samples, batch_size, iterations, seed, num_workers)
    history: list[dict[str, float]] = []
    was_training = clip_model.training
    clip_model.eval()
    try:
        bar = tqdm(batches, disable=not progress, desc="fine-tuning")
        for indices, images, proposals, label_maps in bar:
            images, masks = images.to(device), [mask.to(device) for mask in proposals]
            targets, labels = zip(
                *(ground_truth(label_map.to(device), len(text)) for label_map in label_maps), strict=True
            )
            student_scores = frozen_scores = None
            if distil:
                embeddings, image = encode_masks_and_image(clip_model, images, masks)
                student_scores = class_scores(image, text, scale)  # (B, C)
                if teacher is None:
                    frozen_scores = teacher_scores[indices].to(device)  # type: ignore[index]  # (B, C)
                else:
                    with torch.no_grad():
                        frozen_scores = class_scores(teacher(images), text, scale)  # (B, C)
            else:
                embeddings = encode_masks(clip_model, images, masks)
            scores = [class_scores(embedding, text, scale) for embedding in embeddings]  # B x (N_i, C)
            if not all(score.isfinite().all() for score in scores):
                raise FloatingPointError(f"iteration {len(history) + 1}: class scores are not finite; lower lr ({lr})")
            terms = loss(scores, masks, targets, labels, student_scores, frozen_scores)
            total = sum(terms.values())
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.01)
            optimizer.step()
            schedule.step()
            history.append({name: term.item() for name, term in terms.items()})
            bar.set_postfix({name: f"{value:.4f}" for name, value in history[-1].items()})
            if on_iteration is not None:
                on_iteration(len(history))
            if checkpoint is not None and len(history) % checkpoint_every == 0:
                save_mask_aware(visual, checkpoint)
    finally:
        clip_model.train(was_training)
        if checkpoint is not None and history:
            save_mask_aware(visual, checkpoint)
    return history


def ground_truth(label_map: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Binary maps of the K classes present in a label map.

    Args:
        label_map: (H, W) integer; anything outside 0..num_classes-1 is ignored.
        num_classes: C.

    Returns:
        targets (K, H, W) bool and labels (K,) int64, K >= 0.

    Example:
        >>> targets, labels = ground_truth(torch.tensor([[2, 255], [0, 0]]), num_classes=3)
        >>> labels.tolist(), targets.sum((1, 2)).tolist()
        ([0, 2], [2, 1])
    """
    present = label_map.unique()
    labels = present[(present >= 0) & (present < num_classes)].long()  # (K,)
    return label_map[None] == labels[:, None, None], labels


class _Indexed(Dataset[Any]):
    """Samples with their index, which precomputed teacher scores are looked up by."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        return index, self.samples[index]


def _collate(rows: list[tuple[int, Sample]]) -> tuple[list[int], Tensor, list[Tensor], list[Tensor]]:
    indices, samples = zip(*rows, strict=True)
    images = torch.stack([sample.image for sample in samples])  # (B, 3, H, W)
    return list(indices), images, [sample.masks for sample in samples], [sample.labels for sample in samples]


def _batches(samples: Any, batch_size: int, iterations: int, seed: int, num_workers: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(samples, num_samples=iterations * batch_size, generator=generator)
    return DataLoader(_Indexed(samples), batch_size, sampler=sampler, collate_fn=_collate, num_workers=num_workers)


def _check(visual: Any, samples: Any, text: Tensor, teacher_scores: Tensor | None, **positive: int) -> None:
    if not is_mask_aware(visual):
        raise TypeError("clip_model.visual is not mask-aware; call make_mask_aware(clip_model.visual) first")
    dtypes = {parameter.dtype for parameter in visual.parameters()}
    if dtypes != {torch.float32}:
        raise TypeError(f"the tower holds {dtypes}; AdamW loses updates below float32, call clip_model.visual.float()")
    if len(samples) == 0:
        raise ValueError("samples is empty; give at least one image to fine-tune on")
    if text.ndim != 2 or len(text) == 0:
        raise ValueError(f"text holds one embedding a seen class, (C, D), got {tuple(text.shape)}")
    if teacher_scores is not None and teacher_scores.shape != (len(samples), len(text)):
        raise ValueError(
            f"teacher_scores are {tuple(teacher_scores.shape)}, expected {(len(samples), len(text))}: one row a sample"
        )
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
