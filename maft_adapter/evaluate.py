"""Evaluation on a data set: what is right of each picture, counted, and all figures of the field from the counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as image_functional

from .adapt import encode_masks, valid_masks
from .baselines import MergeMode, encode_crops
from .classify import class_scores, ensemble, label_map
from .data import Item, SegmentationDataset
from .losses import mask_iou
from .metrics import confusion_matrix, evaluation_scores
from .models import Model, image_tower
from .pictures import prepare, read_picture
from .proposals import Proposals, Proposer, check_proposals

__all__ = [
    "FIGURES",
    "PUBLISHED",
    "Evaluator",
    "PseudoLabelled",
    "Published",
    "Records",
    "Result",
    "crop_scorer",
    "figures",
    "mask_aware_scorer",
]

# A picture (H, W, 3) uint8 and masks (N, H, W) -> A^c (N, C) and which masks the encoder can see, (N,) bool.
Scorer = Callable[[NDArray[np.uint8], Tensor], tuple[Tensor, Tensor]]

FIGURES = ("miou", "miou_seen", "miou_unseen", "hiou", "fwiou", "pixel_accuracy", "mask_accuracy")


def mask_aware_scorer(model: Model, text: Tensor, size: int | None = None, keep_aspect: bool = False) -> Scorer:
    """A^c of a mask-aware CLIP: all masks of a picture in one pass.

    Args:
        model: of `load_model`.
        text: (C, D) of `text_classifier`, on the model's device.
        size, keep_aspect: of the tower's input, see `prepare`; by default the model's size.

    Example:
        >>> from maft_adapter.classify import text_classifier
        >>> from maft_adapter.models import load_model
        >>> model = load_model()
        >>> score = mask_aware_scorer(model, text_classifier(model.clip, model.tokenizer, ["red ball", "pale sand"]))
        >>> scores, valid = score(np.zeros((8, 8, 3), np.uint8), torch.ones(3, 8, 8, dtype=torch.bool))
        >>> scores.shape, valid.tolist()
        (torch.Size([3, 2]), [True, True, True])
    """
    weight = next(image_tower(model.clip).parameters())

    @torch.no_grad()
    def score(picture: NDArray[np.uint8], masks: Tensor) -> tuple[Tensor, Tensor]:
        image = prepare(picture, model.mean, model.std, size or model.size, keep_aspect, model.multiple)  # (3, h, w)
        images, asked = image[None].to(weight.device, weight.dtype), masks[None].to(weight.device)
        embeddings = encode_masks(model.clip, images, asked)[0].float()  # (N, D)
        valid = valid_masks(image_tower(model.clip), images, asked)[0]  # (N,)
        return class_scores(embeddings, text, model.logit_scale), valid

    return score


def crop_scorer(model: Model, text: Tensor, mode: MergeMode) -> Scorer:
    """A^c of the paper's baselines: a sub-image of every mask, cut out of the picture at its own size.

    Args:
        model: of `load_model`, of open_clip and not fine-tuned. Its tower sees no masks, so it is the frozen CLIP.
        text: (C, D) of `text_classifier`, on the model's device.
        mode: what becomes of a mask, see `merge`.

    Raises:
        ValueError: a model of transformers.
    """
    if not hasattr(model.clip, "encode_image"):
        raise ValueError(f"crops need a CLIP of open_clip, got transformers' {type(model.clip).__name__}")
    weight = next(model.clip.visual.parameters())

    @torch.no_grad()
    def score(picture: NDArray[np.uint8], masks: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image_functional.to_tensor(picture)  # (3, H, W) in [0, 1]
        image = image_functional.normalize(pixels, model.mean, model.std).to(weight.device, weight.dtype)
        embeddings, valid = encode_crops(model.clip, image[None], masks[None].to(weight.device), mode)
        return class_scores(embeddings[0].float(), text, model.logit_scale), valid[0]

    return score


class Result(NamedTuple):
    """What an `Evaluator` says of one picture.

    Attributes:
        prediction: (H, W) int64 class indices, or the data set's `ignore_index` where no proposal is.
        pixels: (C + 1, C + 1) int64, `confusion_matrix` of the pixels.
        masks: likewise of the ground-truth masks, one for each class that is there; all 0 for the upper bound.
    """

    prediction: Tensor
    pixels: Tensor
    masks: Tensor


@dataclass
class Evaluator:
    """Segments a picture of a data set and counts what is right, with C classes.

    Args:
        dataset: whose pictures, classes and split into seen and unseen classes these are.
        proposals: what makes the masks; None for the ground truth's own, one for each class that is there.
        scorer: what gives A^c, such as `mask_aware_scorer`. None for the paper's upper bound (Table 7): the IoU with
            the ground truth (S_IoU) stands in place of A^c.
        weight: lambda of the ensemble with A^p (Eq. 9); None for A^c alone.
        unseen_form: of the ensemble, see `maft_adapter.classify.ensemble`.
        trained_on: the classes, with their synonyms, that the training knew. Seen are then the classes that share a
            name with one of them, as FC-CLIP's lineage has it; upper and lower case do not matter. By default the
            seen classes of the data set's own zero-shot setting, which are all where it has none.

    Raises:
        ValueError: a weight outside [0, 1], or one for the upper bound.

    Example:
        >>> from maft_adapter.data import open_dataset
        >>> from maft_adapter.proposals import proposer
        >>> shapes = open_dataset("shapes")
        >>> upper_bound = Evaluator(shapes, proposer("superpixels"))
        >>> result = upper_bound(shapes[0])
        >>> result.prediction.shape, evaluation_scores(result.pixels)["pixel_accuracy"] > 80
        (torch.Size([96, 96]), True)
    """

    dataset: SegmentationDataset
    proposals: Proposer | None
    scorer: Scorer | None = None
    weight: float | None = None
    unseen_form: Literal["paper", "released"] = "paper"
    trained_on: Sequence[Sequence[str]] | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and (self.scorer is None or not 0 <= self.weight <= 1):
            raise ValueError(f"weight is {self.weight}, expected one in [0, 1], and none for the upper bound")
        classes = len(self.dataset.class_names)
        if self.trained_on is None:
            self._known = torch.eye(classes)[list(self.dataset.seen)]  # (C', C): which classes a known one is
        else:
            own, known = (
                [{name.casefold() for name in names} for names in lists]
                for lists in (self.dataset.class_names, self.trained_on)
            )
            self._known = torch.tensor([[float(bool(a & b)) for b in own] for a in known]).view(-1, classes)  # (C', C)
        self._seen = self._known.any(0)  # (C,)

    @property
    def unseen(self) -> tuple[int, ...]:
        """Indices of the unseen classes."""
        return tuple((~self._seen).nonzero().flatten().tolist())

    @torch.no_grad()
    def __call__(self, item: Item) -> Result:
        """Segment one picture.

        Raises:
            OSError: the picture can't be read.
            ValueError: it is damaged, or the proposals are not of its size; with a `weight`, proposals without class
                scores, or with those of an unknown number of classes.
        """
        picture = read_picture(item.picture)
        classes, ignore = len(self.dataset.class_names), self.dataset.ignore_index
        labels = torch.from_numpy(item.labels.astype(np.int64))  # (H, W)
        present = labels[labels != ignore].unique()  # (K,)
        truth = labels == present[:, None, None]  # (K, H, W)
        proposals = Proposals(truth.numpy()) if self.proposals is None else self.proposals(picture, item.file)
        check_proposals(proposals, picture.shape[:2])
        masks = torch.from_numpy(proposals.masks)  # (N, H, W)

        if self.scorer is None:
            scores, valid = torch.zeros(len(masks), classes), torch.ones(len(masks), dtype=torch.bool)
            scores[:, present] = mask_iou(masks, truth).T.float()  # (N, K)
            counted = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)
        else:
            # Together, so that a mask-aware encoder sees the picture once.
            all_scores, all_valid = self.scorer(picture, torch.cat([masks, truth]))  # (N + K, C), (N + K,)
            scores, valid = all_scores[: len(masks)], all_valid[: len(masks)]
            named = all_scores[len(masks) :].argmax(1).masked_fill(~all_valid[len(masks) :], ignore)  # (K,)
            counted = confusion_matrix(named.cpu(), present, classes, ignore)
        if self.weight is not None:
            known = self._class_scores(proposals.class_scores).to(scores.device)  # (N, C)
            # Of a mask without a patch the scores may be anything; it has no vote.
            scores = ensemble(known, scores.masked_fill(~valid[:, None], 0), self._seen.to(scores.device), self.weight,
                              self.unseen_form)  # fmt: skip
        prediction = label_map(scores, masks.to(scores.device), ignore, valid).cpu()  # (H, W)
        return Result(prediction, confusion_matrix(prediction, labels, classes, ignore), counted)

    def _class_scores(self, given: NDArray[np.float32] | None) -> Tensor:
        """A^p over the data set's classes, (N, C); 0 for those that the generator does not know."""
        if given is None:
            raise ValueError("the ensemble needs class scores (A^p), which these proposals have not")
        scores = torch.from_numpy(given)[:, :-1]  # (N, C') without "no object", which the paper's A^p does not have:
        # left out of the sum, too, or masks of no object would lose their votes for seen classes alone.
        scores = (scores / scores.sum(1, keepdim=True).clamp(min=1e-6)).clamp(max=1)
        known, classes = self._known.shape
        if scores.shape[1] == known:
            return (scores @ self._known).clamp(max=1)  # several known ones may be one class here
        if scores.shape[1] == classes:
            return scores
        raise ValueError(
            f"the proposals' class scores are of {scores.shape[1]} classes: expected the {known} that the training "
            f"knew, or the {classes} of {self.dataset.name}; name those that it knew"
        )


class PseudoLabelled(Dataset[Item]):
    """A data set on which a model labels the unseen classes, for self-training (paper Table 8).

    Where the label is none of the seen classes, what the evaluator predicts stands if it is an unseen class; other
    such pixels are ignored. The data set's own labels of unseen classes are not used.

    Args:
        evaluator: of the data set's training part; what it counts is left aside.

    Raises:
        ValueError: an evaluator whose proposals or scores are made of the ground truth.

    Example:
        >>> from maft_adapter.classify import text_classifier
        >>> from maft_adapter.data import open_dataset
        >>> from maft_adapter.models import load_model
        >>> from maft_adapter.proposals import proposer
        >>> model, shapes = load_model(), open_dataset("shapes", split="train")
        >>> text = text_classifier(model.clip, model.tokenizer, shapes.class_names, model.templates)
        >>> labelled = PseudoLabelled(Evaluator(shapes, proposer("superpixels"), mask_aware_scorer(model, text)))
        >>> len(labelled), labelled[0].labels.shape
        (480, (96, 96))
    """

    def __init__(self, evaluator: Evaluator) -> None:
        if evaluator.proposals is None or evaluator.scorer is None:
            raise ValueError("pseudo-labels of ground-truth masks or of the upper bound would be the ground truth")
        self.evaluator = evaluator

    def __len__(self) -> int:
        return len(self.evaluator.dataset)

    def __getitem__(self, index: int) -> Item:
        dataset = self.evaluator.dataset
        item = dataset[index]
        predicted = self.evaluator(item).prediction.numpy()  # (H, W)
        labels = item.labels.copy()  # (H, W)
        unknown = ~np.isin(labels, dataset.seen)  # (H, W)
        labels[unknown] = np.where(np.isin(predicted, dataset.unseen), predicted, dataset.ignore_index)[unknown]
        return item._replace(labels=labels)


def figures(pixels: Tensor, masks: Tensor, unseen: Sequence[int], absent: str = "ignore") -> dict[str, float]:
    """The seven figures of an evaluation.

    Args:
        pixels: (C + 1, C + 1) counts of the pixels, summed over the pictures.
        masks: likewise of the ground-truth masks.
        unseen: indices of the unseen classes.
        absent: what becomes of classes that are nowhere in the ground truth, see `evaluation_scores`.

    Returns:
        `FIGURES` in percent, as `evaluation_scores` defines them. NaN where nothing counts, such as "miou_unseen"
        without unseen classes, or "mask_accuracy" of the upper bound.

    Raises:
        ValueError: no labelled pixel, and as `evaluation_scores`.

    Example:
        >>> counts = torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]])
        >>> figures(counts, counts, unseen=[1])
        {'miou': 62.5, 'miou_seen': 75.0, 'miou_unseen': 50.0, 'hiou': 60.0, 'fwiou': 70.0, 'pixel_accuracy': 80.0,
         'mask_accuracy': 87.5}
    """
    scores: Mapping[str, Any] = evaluation_scores(pixels, unseen, absent)
    accuracy = evaluation_scores(masks)["mean_accuracy"] if masks.any() else float("nan")
    return {name: accuracy if name == "mask_accuracy" else scores[name] for name in FIGURES}


class Records:
    """The counts of single pictures, kept in a folder as soon as they are there, by any number of processes.

    A process appends a line for each picture to a file of its own, so a run that is killed loses the picture it was
    at. A line that was cut off is no JSON, and its picture is evaluated again. Counts are integers and are summed over
    the pictures: neither their order nor who counted them matters.

    Args:
        folder: that exists.
        classes: C.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     records = Records(Path(folder), classes=1)
        ...     counts = torch.tensor([[3, 1], [0, 0]])
        ...     records.add("1-of-2", 0, Result(torch.zeros(2, 2), counts, counts))
        ...     records.add("2-of-2", 1, "its file is damaged")
        ...     pixels, masks = records.read()
        ...     records.summed(pixels.values()).tolist(), records.failed
        ([[3, 1], [0, 0]], {1: 'its file is damaged'})
    """

    def __init__(self, folder: Path, classes: int) -> None:
        self.folder, self.classes = folder, classes
        self.failed: dict[int, str] = {}
        self._begun: set[Path] = set()

    def add(self, part: str, index: int, result: Result | str) -> None:
        """Keep what came of a picture, its counts or why it failed.

        Args:
            part: names the file, one for each process.
            index: of the picture in the data set.
            result: of the picture, or a reason.

        Raises:
            OSError: the file can't be written.
        """
        record: dict[str, Any] = {"picture": index}
        if isinstance(result, str):
            record["failed"] = result
        else:
            for name in ("pixels", "masks"):
                counts = getattr(result, name)  # (C + 1, C + 1)
                rows, columns = counts.nonzero().T  # (R,) each
                record[name] = torch.stack([rows, columns, counts[rows, columns]]).tolist()
        path = self.folder / f"pictures.{part}.jsonl"
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        if path not in self._begun:  # what a killed process left of a line stays a line
            self._begun.add(path)
            line = b"\n" + line if path.exists() else line
        with path.open("ab") as file:
            file.write(line)

    def read(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """All that was kept by any process, and why pictures failed, as `failed`.

        Returns:
            The counts of pixels and those of masks, by the picture's index: (3, R) int64, what is not 0 in the (C + 1,
            C + 1) of `Result`, its row, column and number. `summed` makes matrices of them.

        Raises:
            OSError: a file can't be read.
        """
        pixels: dict[int, Tensor] = {}
        masks: dict[int, Tensor] = {}
        self.failed = {}
        for path in sorted(self.folder.glob("pictures.*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if "failed" in record:
                    self.failed[record["picture"]] = record["failed"]
                else:
                    pixels[record["picture"]] = torch.tensor(record["pixels"], dtype=torch.int64)
                    masks[record["picture"]] = torch.tensor(record["masks"], dtype=torch.int64)
        self.failed = {index: reason for index, reason in self.failed.items() if index not in pixels}
        return pixels, masks

    def summed(self, counts: Iterable[Tensor]) -> Tensor:
        """The sum over pictures of what `read` gives, (C + 1, C + 1) int64."""
        rows, columns, values = torch.cat([torch.empty(3, 0, dtype=torch.int64), *counts], 1)  # (R,) each
        total = torch.zeros(self.classes + 1, self.classes + 1, dtype=torch.int64)
        return total.index_put_((rows, columns), values, accumulate=True)


class Published(NamedTuple):
    """Figures that somebody published, in percent, with their source; None where there is none."""

    method: str
    source: str
    miou: float | None = None
    miou_seen: float | None = None
    miou_unseen: float | None = None
    hiou: float | None = None
    mask_accuracy: float | None = None


_MAFT = "arXiv:2310.00240, Table"
_MASKCLIP = "arXiv:2412.11464"

# mIoU of seen and of unseen classes and hIoU, of COCO-Stuff (156 / 15), VOC (15 / 5) and ADE20K (572 / 275).
_ZERO_SHOT = {
    "coco-stuff": (
        ("SPNet", f"{_MAFT} 1", 34.6, 26.9, 30.3),
        ("ZS5", f"{_MAFT} 1", 34.9, 10.6, 16.2),
        ("CaGNet", f"{_MAFT} 1", 35.6, 13.4, 19.5),
        ("STRICT", f"{_MAFT} 1", 35.3, 30.3, 32.6),
        ("ZegFormer", f"{_MAFT} 1", 36.7, 36.2, 36.4),
        ("ZegFormer + MAFT", f"{_MAFT} 1", 36.4, 40.1, 38.1),
        ("ZSSeg", f"{_MAFT} 1", 40.4, 36.5, 38.3),
        ("ZSSeg + MAFT", f"{_MAFT} 1", 40.6, 40.1, 40.3),
        ("FreeSeg", f"{_MAFT} 1", 42.4, 42.2, 42.3),
        ("FreeSeg + MAFT", f"{_MAFT} 1", 43.3, 50.4, 46.5),
        ("ZegFormer, no ensemble", f"{_MAFT} 2", 18.5, 23.0, 20.5),
        ("ZegFormer + MAFT, no ensemble", f"{_MAFT} 2", 35.1, 31.6, 33.3),
        ("ZSSeg, no ensemble", f"{_MAFT} 2", 20.6, 27.4, 23.6),
        ("ZSSeg + MAFT, no ensemble", f"{_MAFT} 2", 36.1, 35.9, 36.0),
        ("FreeSeg, no ensemble", f"{_MAFT} 2", 22.3, 29.3, 25.3),
        ("FreeSeg + MAFT, no ensemble", f"{_MAFT} 2", 40.1, 49.7, 44.4),
    ),
    "voc-20": (
        ("SPNet", f"{_MAFT} 1", 77.8, 25.8, 38.8),
        ("ZS5", f"{_MAFT} 1", 78.0, 21.2, 33.3),
        ("CaGNet", f"{_MAFT} 1", 78.6, 30.3, 43.7),
        ("STRICT", f"{_MAFT} 1", 82.7, 35.6, 73.3),  # as printed; the harmonic mean of the two is 49.8
        ("ZegFormer", f"{_MAFT} 1", 90.1, 70.6, 79.2),
        ("ZegFormer + MAFT", f"{_MAFT} 1", 91.5, 80.7, 85.7),
        ("ZSSeg", f"{_MAFT} 1", 86.6, 59.7, 69.4),
        ("ZSSeg + MAFT", f"{_MAFT} 1", 88.4, 66.2, 75.7),
        ("FreeSeg", f"{_MAFT} 1", 91.9, 78.6, 84.7),
        ("FreeSeg + MAFT", f"{_MAFT} 1", 91.4, 81.8, 86.3),
        ("ZegFormer, no ensemble", f"{_MAFT} 2", 81.4, 76.8, 79.0),
        ("ZegFormer + MAFT, no ensemble", f"{_MAFT} 2", 87.6, 79.9, 83.5),
        ("ZSSeg, no ensemble", f"{_MAFT} 2", 82.0, 71.2, 76.2),
        ("ZSSeg + MAFT, no ensemble", f"{_MAFT} 2", 87.1, 76.1, 81.2),
        ("FreeSeg, no ensemble", f"{_MAFT} 2", 87.4, 74.7, 80.5),
        ("FreeSeg + MAFT, no ensemble", f"{_MAFT} 2", 90.4, 84.7, 87.5),
    ),
    "ade20k-847": (
        ("ZegFormer", f"{_MAFT} 1", 17.4, 5.1, 7.9),
        ("ZegFormer + MAFT", f"{_MAFT} 1", 16.6, 7.0, 9.8),
        ("ZSSeg", f"{_MAFT} 1", 18.0, 4.5, 7.2),
        ("ZSSeg + MAFT", f"{_MAFT} 1", 18.9, 6.7, 9.9),
        ("FreeSeg", f"{_MAFT} 1", 22.3, 4.4, 7.3),
        ("FreeSeg + MAFT", f"{_MAFT} 1", 21.4, 8.7, 12.4),
        ("ZegFormer, no ensemble", f"{_MAFT} 2", 5.1, 2.6, 3.5),
        ("ZegFormer + MAFT, no ensemble", f"{_MAFT} 2", 15.8, 7.0, 9.8),
        ("ZSSeg, no ensemble", f"{_MAFT} 2", 5.9, 2.8, 3.9),
        ("ZSSeg + MAFT, no ensemble", f"{_MAFT} 2", 17.2, 7.2, 10.2),
        ("FreeSeg, no ensemble", f"{_MAFT} 2", 6.5, 2.8, 3.9),
        ("FreeSeg + MAFT, no ensemble", f"{_MAFT} 2", 21.3, 8.7, 12.2),
    ),
}  # fmt: skip
# The same with mIoU of all classes.
_WITH_SAM = {
    "coco-stuff": (
        ("SAM-H", f"{_MAFT} 5(a)", 42.1, 43.1, 43.3, 43.2),
        ("SAM-H + MAFT", f"{_MAFT} 5(a)", 44.1, 43.4, 51.5, 47.1),
        ("FreeSeg + MAFT", f"{_MAFT} 7", 43.9, 43.3, 50.4, 46.5),
        ("upper bound of its proposals", f"{_MAFT} 7", 77.6, 77.2, 82.1, 79.6),
    ),
    "voc-20": (
        ("SAM-H", f"{_MAFT} 5(a)", 85.5, 85.1, 86.7, 85.9),
        ("SAM-H + MAFT", f"{_MAFT} 5(a)", 90.4, 91.0, 88.6, 89.8),
    ),
}
# mIoU, trained on COCO.
_SETS = ("ade20k-847", "context-459", "ade20k-150", "context-59", "voc-20")
_OPEN_VOCABULARY: tuple[tuple[str, str, tuple[float | None, ...]], ...] = (
    ("SPNet", f"{_MAFT} 3", (None, None, None, 24.3, 18.3)),
    ("ZSSeg", f"{_MAFT} 3", (None, None, None, 19.4, 38.3)),
    ("LSeg+", f"{_MAFT} 3", (2.5, 5.2, 13.0, 36.0, 59.0)),
    ("OVSeg", f"{_MAFT} 3", (7.1, 11.0, 24.8, 53.3, 92.6)),
    ("OpenSeg", f"{_MAFT} 3", (8.8, 12.2, 28.6, 48.2, 72.2)),
    ("FreeSeg", f"{_MAFT} 3", (7.1, 6.4, 17.9, 34.4, 85.6)),
    ("FreeSeg + MAFT", f"{_MAFT} 3", (10.1, 12.8, 29.1, 53.5, 90.0)),
    ("SAM-H", f"{_MAFT} 5(b)", (9.0, 7.8, 21.3, 33.7, 87.5)),
    ("SAM-H + MAFT", f"{_MAFT} 5(b)", (12.7, 16.2, 33.0, 59.0, 92.7)),
    ("OVSeg, ViT-L", f"{_MAFT} 6", (9.0, 12.4, 29.6, 55.7, 94.5)),
    ("FreeSeg, ViT-L", f"{_MAFT} 6", (8.5, 7.6, 21.0, 33.8, 86.4)),
    ("FreeSeg + MAFT, ViT-L", f"{_MAFT} 6", (12.1, 15.7, 32.0, 58.5, 92.1)),
    ("FreeSeg, RN50", f"{_MAFT} 6", (5.3, 5.4, 15.5, 28.2, 87.1)),
    ("FreeSeg + MAFT, RN50", f"{_MAFT} 6", (8.4, 9.9, 27.0, 50.8, 89.0)),
    ("FC-CLIP, ConvNeXt-L", "arXiv:2308.02487", (14.8, 18.2, 34.1, 58.4, 95.4)),
    ("MAFT+, ConvNeXt-L", "arXiv:2408.00744", (15.1, 21.6, 36.1, 59.4, 96.5)),
    ("MaskCLIP++", _MASKCLIP, (16.8, 23.9, 38.2, 62.5, 96.8)),
    ("CAT-Seg, ViT-L", "arXiv:2303.11797", (16.0, 23.8, 37.9, 63.3, 97.0)),
    ("CorrCLIPv2, no training", "github.com/zdk258/CorrCLIP", (15.0, 18.8, 36.5, 56.8, 93.6)),
    ("SAM 3", "arXiv:2511.16719", (13.8, None, None, 60.8, None)),
)
# Of EVA02-L/14: the frozen CLIP's and MaskCLIP++'s.
_MASK_ACCURACY = {
    "ade20k-847": (35.2, 38.4),
    "context-459": (44.8, 56.4),
    "ade20k-150": (52.7, 67.0),
    "context-59": (54.6, 85.2),
    "coco-stuff": (45.0, 67.8),
}


def _published(name: str) -> tuple[Published, ...]:
    rows = [Published(method, source, None, *scores) for method, source, *scores in _ZERO_SHOT.get(name, ())]
    rows += [Published(*row) for row in _WITH_SAM.get(name, ())]
    if name in _SETS:
        at = _SETS.index(name)
        rows += [Published(method, source, scores[at]) for method, source, scores in _OPEN_VOCABULARY if scores[at]]
    for method, accuracy in zip(("frozen EVA02-L/14", "MaskCLIP++"), _MASK_ACCURACY.get(name, ()), strict=False):
        rows.append(Published(method, _MASKCLIP, mask_accuracy=accuracy))
    return tuple(rows)


# By the name of the data set; empty where nothing comparable was published.
PUBLISHED = {name: _published(name) for name in ("coco-stuff", *_SETS)}
