"""Mask-aware fine-tuning, the paper's second stage (Sec. 4.2 and 5.1)."""

from __future__ import annotations

import copy
import hashlib
import io
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm

from .adapt import encode_image, encode_masks, encode_masks_and_image, is_mask_aware
from .checkpoint import replace_file, save_mask_aware
from .classify import class_scores
from .freezing import trainable_parameters
from .losses import MAFTLoss, class_indices
from .masks import check_unit_range

if TYPE_CHECKING:
    from .data import SegmentationDataset
    from .evaluate import PseudoLabelled
    from .models import Model
    from .proposals import Proposer


class Sample(NamedTuple):
    """One training image with its proposals and ground truth.

    Attributes:
        image: (3, H, W) float, normalised as the model wants it; one size for all samples of a batch.
        masks: (N, H', W') proposals, bool or float in [0, 1]; N may differ from image to image.
        labels: (H', W') label map of any integer dtype; values are rows of the text classifier, and anything outside
            0..C-1 (255, 65535, unseen classes) is ignored.
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
    teacher: Any | None = None,
    teacher_scores: Tensor | None = None,
    seed: int = 0,
    num_workers: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    state: str | os.PathLike[str] | None = None,
    accelerator: Any | None = None,
    on_iteration: Callable[[int, dict[str, float]], None] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Fine-tune the mask-aware tower of a CLIP model with L_ma + lambda * L_dis; the defaults are the paper's.

    Paper Sec. 5.1: AdamW, lr and weight decay 1e-5, batch 16, images of 480x480; 100 iterations for Pascal-VOC, 1000
    for COCO-Stuff, 5000 for ADE20K. More iterations go on raising seen classes and lower unseen ones (Table 4c). The
    released configuration adds a polynomial decay of the learning rate to 0 (power 0.9) and clips the gradient's norm
    at 0.01; so does this.
    On the CPU a repeat with the same seed is equal to the bit.

    A run that was stopped, even by SIGKILL, goes on if it is called again as it was the first time, with the frozen
    tower that it began with, and the same `state`. On the CPU, with samples that are the same whenever they are asked
    for, it ends in the weights, to the bit, in which it would have ended.

    A tower that was fine-tuned before, here or in the checkpoint that it was loaded from, is no frozen teacher:
    training it again needs `teacher` or `teacher_scores`.

    On several processes, each with the same model, samples and arguments, every step takes the gradients of one process
    with the same `batch_size`, which is that of all together.

    Args:
        clip_model: a CLIP model with a mask-aware `.visual`, or a mask-aware tower, such as transformers'. The tower is
            trained in place and stays in float32; the text tower is not used. The model is put into eval mode for the
            time of the call: CLIP has no dropout to train with, and running statistics stay the frozen model's.
        samples: the training images; only seen classes belong into their labels.
        text: (C, D) unit-length text embeddings of the seen classes, see `maft_adapter.classify.text_classifier`.
        iterations: optimizer steps.
        batch_size: images a step, drawn in random order, every image once before any comes again.
        lr: learning rate of the first step.
        weight_decay: of AdamW, on every trained parameter.
        freeze: what stays frozen, see `trainable_parameters`; "as_is" trains adapters such as LoRA where they are.
        loss: defaults to `MAFTLoss()`: SmoothL1, lambda = 1. `maft_adapter.losses.MaskClassificationLoss()` is
            MaskCLIP++'s, for samples whose masks are the ground truth's.
        logit_scale: 1 / temperature of A^c; defaults to the model's own `logit_scale.exp()`, 100 for trained CLIPs.
        teacher: the frozen CLIP of self-distillation, a mask-aware model or tower in eval mode as `clip_model` was
            before any fine-tuning; it stays unchanged. By default a copy of the tower as it is now. Not needed if
            lambda is 0.
        teacher_scores: (len(samples), C) class scores of the frozen CLIP for the whole images, computed before, in
            place of a teacher that computes them batch by batch.
        seed: of the order of the samples.
        num_workers: of the DataLoader.
        checkpoint: path that `save_mask_aware` writes the tower to, every `checkpoint_every` iterations and at the
            end, also after Ctrl-C or an error. It is never written half, in the middle of a step, or with weights
            that give no finite embeddings: after divergence it holds what was last saved.
        checkpoint_every: iterations between two checkpoints.
        state: path of a file for going on after a stop, written whenever `checkpoint` is and as safely: trained
            weights, optimizer, schedule, losses, and what they depend on. If it is there, the run goes on from it. How
            many processes and workers there are may change, but then the weights differ in rounding.
        accelerator: accelerate's `Accelerator`, for mixed precision (the weights stay in float32), several processes,
            and gradient accumulation, which takes each process's share of a batch in parts to save memory. The tower
            is moved to its device. In the tests the losses of bf16 stay within 0.02 of float32's, and the cosine of
            the two steps is above 0.8.
        on_iteration: called with the number of finished iterations and the losses of the last, after each, on every
            process; before the checkpoint of that iteration is written. A run that goes on begins by calling it again
            for the last iteration that it has, where the stop may have cut it off.
        progress: show a bar with both losses.

    Returns:
        Both losses of every iteration: [{"mask_aware": ..., "self_distillation": ...}, ...], the latter weighted; the
        first goes by the name of the loss, its `term`.

    Raises:
        TypeError: the model or the teacher is not mask-aware, the tower is not in float32, or label maps hold no
            integers.
        ValueError: no samples, an argument out of its range, a tower that was fine-tuned before and no teacher, or a
            `state` that is of a run with other arguments, which are named, or damaged. Nothing is changed then.
        OSError: `checkpoint` or `state` can't be written; found out before the first iteration.
        FloatingPointError: the training diverged: embeddings, loss, gradients or weights are not finite.

    Example:
        >>> import open_clip, maft_adapter
        >>> clip = open_clip.create_model("ViT-B-32")
        >>> _ = maft_adapter.make_mask_aware(clip.visual, start_layer=11)
        >>> sample = Sample(torch.randn(3, 64, 64), torch.ones(1, 64, 64), torch.zeros(64, 64, dtype=torch.int64))
        >>> text = torch.nn.functional.normalize(torch.randn(2, 512), dim=-1)
        >>> len(finetune(clip, [sample], text, iterations=1, progress=False))
        1
    """
    visual = _tower(clip_model, "clip_model")
    loss = MAFTLoss() if loss is None else loss
    distil = loss.distillation_weight > 0
    accelerator = cast(Any, _Alone()) if accelerator is None else accelerator
    _check(
        visual, samples, text,
        iterations=iterations, batch_size=batch_size, checkpoint_every=checkpoint_every, lr=lr,
        weight_decay=weight_decay,
    )  # fmt: skip
    shares = accelerator.num_processes * accelerator.gradient_accumulation_steps
    if batch_size < shares:
        raise ValueError(f"batch_size is {batch_size}, too small for processes and accumulation: at least {shares}")
    _check_teacher(visual, samples, text, teacher, teacher_scores, distil)
    if logit_scale is None and not hasattr(clip_model, "logit_scale"):
        raise ValueError(f"{type(clip_model).__name__} has no logit_scale of its own: pass logit_scale, such as 100")
    scale = float(clip_model.logit_scale.detach().exp()) if logit_scale is None else logit_scale
    count = len(samples)  # type: ignore[arg-type]  # torch's Dataset declares no length
    settings: dict[str, int | float | str] = {}
    saved: dict[str, Any] | None = None
    if checkpoint is not None:
        _check_writable("checkpoint", checkpoint)
    if state is not None:
        _check_writable("state", state)
        frozen = {} if not distil else _tower(visual if teacher is None else teacher, "teacher").state_dict()
        settings = {
            "iterations": iterations, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay,
            "freeze": freeze, "loss": f"{type(loss).__name__} {loss.kind}, {loss.distillation_weight}",
            "logit_scale": scale, "seed": seed, "len(samples)": count,
            "accelerator.mixed_precision": str(accelerator.mixed_precision), "text": _digest({"": text}),
            "teacher": _digest(frozen if teacher_scores is None else {"": teacher_scores}),
            "clip_model": _digest(visual.state_dict()),
        }  # fmt: skip
        saved = _read_state(state, settings)
    visual.to(accelerator.device)  # of one process alone, None: where it is
    device = next(visual.parameters()).device
    text = text.detach().to(device)
    if distil and teacher is None and teacher_scores is None:
        teacher = copy.deepcopy(visual).requires_grad_(False).eval()
    parameters = trainable_parameters(visual, freeze)
    names = [name for name, parameter in visual.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = PolynomialLR(optimizer, total_iters=iterations, power=0.9)
    history: list[dict[str, float]] = []
    if saved is not None:
        if list(saved["weights"]) != names:
            raise ValueError(f"state {state} is of a run that trains other parameters than this tower's: {names[:4]}")
        with torch.no_grad():
            for parameter, value in zip(parameters, saved["weights"].values(), strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        history = saved["history"]
        visual.fine_tuned = True
        if checkpoint is not None and accelerator.is_main_process:
            save_mask_aware(visual, checkpoint)
    order = drawn(count, iterations * batch_size, seed)
    steps = [order[i : i + batch_size] for i in range(len(history) * batch_size, len(order), batch_size)]
    batches = DataLoader(
        _Indexed(samples),
        batch_sampler=[step[accelerator.process_index :: accelerator.num_processes] for step in steps],
        collate_fn=_collate,
        num_workers=num_workers,
    )
    tower, stepper = accelerator.prepare(visual, optimizer)
    if saved is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(saved["scaler"])

    def check_finite(*tensors: Tensor) -> None:
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise FloatingPointError(
                f"diverged after {len(history)} iterations: embeddings, loss, gradients or weights are not finite; "
                f"lower lr ({lr})"
            )

    def norms(embeddings: Tensor) -> Tensor:
        """Not finite already where scaling to unit length would give zeros, and finite scores that say nothing."""
        return embeddings.norm(dim=-1)

    def save(images: Tensor, masks: list[Tensor]) -> None:
        """Only weights that work replace a checkpoint, and only with it the state."""
        if not accelerator.is_main_process or (checkpoint is None and state is None):
            return
        with torch.no_grad():
            embeddings, image = encode_masks_and_image(visual, images, masks)
            check_finite(*visual.state_dict().values(), *(norms(x) for x in [*embeddings, image]))
        if checkpoint is not None:
            save_mask_aware(visual, checkpoint)
        if state is not None:
            content = {
                "settings": settings,
                "weights": dict(zip(names, (parameter.detach() for parameter in parameters), strict=True)),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
                "history": history,
            }
            torch.save(content, file := io.BytesIO())
            replace_file(state, file.getvalue())

    modes = [(module, module.training) for module in clip_model.modules()]
    clip_model.eval()
    last: tuple[Tensor, list[Tensor]] | None = None  # images and masks of the last step; None while one is made
    bar = tqdm(
        total=len(order), initial=len(history) * batch_size, unit=" images", desc="fine-tuning",
        disable=not progress or not accelerator.is_main_process,
    )  # fmt: skip
    try:
        if history and on_iteration is not None:  # which the stop may have cut off
            on_iteration(len(history), history[-1])
        for indices, images, proposals, label_maps in batches:
            truth = [ground_truth(label_map.to(device), len(text)) for label_map in label_maps]
            # The first loss is a mean over the whole batch, wherever its images are.
            counts = loss.counts(proposals, [labels for _, labels in truth])
            all_counts = float(accelerator.reduce(torch.tensor(float(sum(counts)), device=device)))
            losses = {name: torch.zeros((), device=device) for name in (loss.term, "self_distillation")}
            stepper.zero_grad(set_to_none=True)
            parts = torch.arange(len(indices)).tensor_split(accelerator.gradient_accumulation_steps)
            for part in map(Tensor.tolist, parts):
                pixels, masks = images[part].to(device), [proposals[i].to(device) for i in part]
                targets, labels = zip(*(truth[i] for i in part), strict=True)
                student_scores = frozen_scores = None
                # Processes exchange gradients with the last part only.
                with nullcontext() if part[-1] == len(indices) - 1 else accelerator.no_sync(tower):
                    if distil:
                        embeddings, image = encode_masks_and_image(tower, pixels, masks)
                        student_scores = class_scores(image, text, scale)  # (B, C)
                        if teacher_scores is not None:
                            frozen_scores = teacher_scores[[indices[i] for i in part]].to(device)  # (B, C)
                        else:
                            with torch.no_grad(), accelerator.autocast():
                                frozen_scores = class_scores(encode_image(teacher, pixels), text, scale)  # (B, C)
                    else:
                        embeddings = encode_masks(tower, pixels, masks)
                    scores = [class_scores(embedding, text, scale) for embedding in embeddings]  # B x (N_i, C)
                    check_finite(*map(norms, embeddings))
                    terms = loss(scores, masks, targets, labels, student_scores, frozen_scores)
                    weight = {
                        loss.term: sum(counts[i] for i in part) / max(all_counts, 1),
                        "self_distillation": len(part) / batch_size,
                    }
                    terms = {name: term * weight[name] for name, term in terms.items()}
                    total = sum(terms.values())
                    check_finite(total)
                    accelerator.backward(total * shares)  # which gives the mean over parts and processes
                losses = {name: losses[name] + term.detach() for name, term in terms.items()}
            norm = accelerator.clip_grad_norm_(parameters, 0.01)
            if accelerator.scaler is None:  # which skips a step that has left float16's range
                check_finite(norm)
            last = None
            visual.fine_tuned = True
            stepper.step()
            schedule.step()
            history.append({name: accelerator.reduce(value).item() for name, value in losses.items()})
            last = pixels, masks
            bar.update(batch_size)
            bar.set_postfix({name: f"{value:.4f}" for name, value in history[-1].items()})
            if on_iteration is not None:
                on_iteration(len(history), history[-1])
            if len(history) % checkpoint_every == 0 or len(history) == iterations:
                save(*last)
    except BaseException as error:
        if last is not None and not isinstance(error, FloatingPointError):
            save(*last)
        raise
    finally:
        bar.close()
        accelerator.unwrap_model(tower, keep_fp32_wrapper=False)
        for name in ("forward", "_is_accelerate_prepared"):  # which that leaves behind
            vars(visual).pop(name, None)
        for module, mode in modes:
            module.training = mode
    return history


class SegmentationSamples(Dataset[Sample]):
    """The samples that a data set gives: pictures resized to a square, with proposals, and labels of some classes.

    Whole pictures are resized, as `maft_adapter.pictures.prepare` does, so that a sample is always the same; masks and
    labels take the nearest pixel.

    Args:
        dataset: from `maft_adapter.data.open_dataset`, as it is or `maft_adapter.evaluate.PseudoLabelled`.
        model: whose mean, standard deviation and patch images are prepared for.
        classes: indices of the data set's classes to train on, in the order of the text classifier; pixels of others
            are ignored.
        propose: makes the proposals, such as `maft_adapter.proposals.Kept`; None for none.
        ground_truth_masks: add the region of each of these classes as a proposal.
        size: side of the square in pixels, made the nearest multiple of the model's patch; None for the model's own.

    Raises:
        ValueError: neither proposals nor ground-truth masks.

    Example:
        >>> from maft_adapter.data import open_dataset
        >>> from maft_adapter.models import load_model
        >>> dataset = open_dataset("shapes", split="train")
        >>> samples = SegmentationSamples(dataset, load_model(), dataset.seen, ground_truth_masks=True)
        >>> samples[0].image.shape, samples[0].masks.dtype
        (torch.Size([3, 96, 96]), torch.bool)
    """

    def __init__(
        self,
        dataset: SegmentationDataset | PseudoLabelled,
        model: Model,
        classes: Sequence[int],
        propose: Proposer | None = None,
        ground_truth_masks: bool = False,
        size: int | None = None,
    ) -> None:
        if propose is None and not ground_truth_masks:
            raise ValueError("no masks to train with: give propose, ground_truth_masks, or both")
        self.dataset, self.propose, self.ground_truth_masks = dataset, propose, ground_truth_masks
        self._mean, self._std, self._multiple = model.mean, model.std, model.multiple
        self._size = model.size if size is None else size
        self._row = torch.full((65536,), -1)  # of the text classifier, by label
        self._row[list(classes)] = torch.arange(len(classes))
        self._classes = len(classes)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        from .pictures import prepare, read_picture

        item = self.dataset[index]
        picture = read_picture(item.picture)  # (H, W, 3)
        image = prepare(picture, self._mean, self._std, self._size, multiple=self._multiple)  # (3, h, w)
        rows, columns = (
            torch.div((2 * torch.arange(side) + 1) * full, 2 * side, rounding_mode="floor")
            for side, full in zip(image.shape[1:], picture.shape[:2], strict=True)
        )
        labels = self._row[torch.from_numpy(item.labels.astype("int64"))[rows][:, columns]]  # (h, w)
        masks = [ground_truth(labels, self._classes)[0]] if self.ground_truth_masks else []  # (K, h, w)
        if self.propose is not None:
            found = torch.from_numpy(self.propose(picture, item.file).masks)[:, rows][:, :, columns]  # (N, h, w)
            masks.insert(0, found)
        return Sample(image, torch.cat([mask.to(masks[0].dtype) for mask in masks]), labels)


def ground_truth(label_map: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Binary maps of the K classes present in a label map.

    Args:
        label_map: (H, W) of any integer dtype; anything outside 0..num_classes-1 is ignored.
        num_classes: C.

    Returns:
        targets (K, H, W) bool and labels (K,) int64, K >= 0.

    Raises:
        TypeError: the label map is no integer tensor.
        ValueError: it is not two-dimensional.

    Example:
        >>> targets, labels = ground_truth(torch.tensor([[2, 255], [0, 0]]), num_classes=3)
        >>> labels.tolist(), targets.sum((1, 2)).tolist()
        ([0, 2], [2, 1])
    """
    label_map = class_indices("a label map", label_map)
    if label_map.ndim != 2:
        raise ValueError(f"a label map is (H, W), got {tuple(label_map.shape)}")
    present = label_map.unique()
    labels = present[(present >= 0) & (present < num_classes)]  # (K,)
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
    for index, sample in rows:
        for name, value in zip(Sample._fields, sample, strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"samples[{index}].{name} must be a tensor, got {type(value).__name__}; numpy's need "
                    "torch.from_numpy(...)"
                )
    label_maps = [class_indices(f"samples[{index}].labels", sample.labels) for index, sample in rows]
    images = torch.stack([sample.image for sample in samples])  # (B, 3, H, W)
    return list(indices), images, [sample.masks for sample in samples], label_maps


def drawn(count: int, draws: int, seed: int) -> list[int]:
    """The order in which `finetune` draws samples: random, every one once before any comes again.

    Args:
        count: of the samples.
        draws: iterations times batch size.
        seed: as `finetune` takes it.

    Example:
        >>> sorted(drawn(3, 6, seed=0)[3:])
        [0, 1, 2]
    """
    return list(RandomSampler(range(count), num_samples=draws, generator=torch.Generator().manual_seed(seed)))


class _Alone:
    """What `finetune` asks of an accelerator, for one process in float32, which needs no library."""

    process_index, num_processes, is_main_process = 0, 1, True
    gradient_accumulation_steps, mixed_precision, scaler, device = 1, "no", None, None
    autocast = staticmethod(nullcontext)
    backward = staticmethod(Tensor.backward)
    clip_grad_norm_ = staticmethod(torch.nn.utils.clip_grad_norm_)

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        return objects

    def reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def unwrap_model(self, tower: Any, keep_fp32_wrapper: bool) -> Any:
        return tower


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_state(path: str | os.PathLike[str], settings: Mapping[str, int | float | str]) -> dict[str, Any] | None:
    """What a run of the same settings left to go on from, None if there is nothing."""
    if not Path(path).exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before = content["settings"]
        if content.keys() != {"settings", "weights", "optimizer", "schedule", "scaler", "history"}:
            raise KeyError(*content)
    except Exception as error:  # of any kind, depending on which byte is damaged
        raise ValueError(f"state {path} is damaged, or none of a fine-tuning ({error!r}); name another file") from error
    differ = [name for name, value in settings.items() if before.get(name) != value]
    if differ:
        values = ", ".join(f"{name} (there {before.get(name)}, here {settings[name]})" for name in differ)
        raise ValueError(
            f"state {path} is of a run with other arguments: {values}; give those of the first time, clip_model as it "
            "was before any fine-tuning, or name another file"
        )
    return content


def _tower(clip_model: Any, name: str) -> Any:
    visual = clip_model if is_mask_aware(clip_model) else getattr(clip_model, "visual", None)
    if visual is None or not is_mask_aware(visual):
        given = f"{type(clip_model).__name__} with a .visual of {type(visual).__name__}"
        raise TypeError(
            f"{name} is not mask-aware ({given}): call make_mask_aware({name}.visual) first; give the tower inside "
            "torch.compile's, a parallel or peft's wrapper, and of transformers one with its projection, such as "
            "CLIPVisionModelWithProjection"
        )
    return visual


def _check(visual: Any, samples: Any, text: Tensor, *, lr: float, weight_decay: float, **positive: int) -> None:
    dtypes = {parameter.dtype for parameter in visual.parameters()}
    if dtypes != {torch.float32}:
        raise TypeError(f"the tower holds {dtypes}; AdamW loses updates below float32, call clip_model.visual.float()")
    if len(samples) == 0:
        raise ValueError("samples is empty; give at least one image to fine-tune on")
    if text.ndim != 2 or len(text) == 0 or not text.isfinite().all():
        raise ValueError(f"text holds one embedding a seen class, (C, D) and finite, got {tuple(text.shape)}")
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    for name, number in {"lr": lr, "weight_decay": weight_decay}.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} is {number}, expected a finite number of at least 0")


def _check_teacher(visual: Any, samples: Any, text: Tensor, teacher: Any, scores: Tensor | None, distil: bool) -> None:
    if teacher is not None and scores is not None:
        raise ValueError("teacher and teacher_scores are two sources of the same scores: give one of them")
    if teacher is not None:
        tower = _tower(teacher, "teacher")
        if tower is visual:
            raise ValueError("teacher is the tower that is trained: give a copy of it from before the fine-tuning")
        if tower.training:
            raise ValueError("teacher is in training mode: call teacher.eval() first")
    if scores is not None:
        shape = len(samples), len(text)
        if scores.shape != shape:
            raise ValueError(f"teacher_scores are {tuple(scores.shape)}, expected {shape}: one row a sample")
        check_unit_range("teacher_scores", scores, "pass them through softmax over the classes")
    if distil and teacher is None and scores is None and getattr(visual, "fine_tuned", False):
        raise ValueError(
            "the tower was fine-tuned before, so a copy of it is not the frozen CLIP that self-distillation needs: "
            "give the frozen CLIP as teacher, its teacher_scores, or loss=MAFTLoss(distillation_weight=0)"
        )


def _check_writable(name: str, path: str | os.PathLike[str]) -> None:
    """Raise OSError unless a file can be written where `path`, or what it links to, lies."""
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{name} {path} is a folder; give the path of a file in it")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        message = f"{name} {path} can't be written ({error.strerror}); make its folder, or give another path"
        raise type(error)(error.errno, message) from error
