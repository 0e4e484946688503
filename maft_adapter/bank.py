"""A memory of labelled masks beside the class names: few-shot classification of masks without training.

kNN-CLIP (arXiv:2404.09447) and RetCLIP (arXiv:2601.12779) keep embeddings of labelled masks and join what is near with
CLIP's own scores. Here embeddings are compared after whitening. On validation scenes of the embedded world 20 masks a
class, without any words, had a hIoU of 24.7 as they are and 58.0 whitened, where the frozen CLIP's words had 36.1.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from ._version import __version__
from .adapt import encode_masks, valid_masks
from .checkpoint import replace_file
from .classify import class_scores

if TYPE_CHECKING:
    from .data import SegmentationDataset
    from .evaluate import Scorer
    from .models import Model

__all__ = ["MaskBank", "bank_scorer", "labelled_embeddings"]

_KEY = "maft_adapter.bank"  # of the settings in the file's metadata
_SHARPNESS = 5.0  # factor of the cosines, of 3, 5, 8 and 12: with less the words prevail, with more single masks do
_AT_ONCE = 2**24  # similarities that are held at a time: 64 MB of float32


class MaskBank:
    """Embeddings of labelled masks, M of them, and how much they change the scores that words give.

    Masks can be added at any time, of classes known or new; nothing is trained. Labels are class names, so that one
    bank serves any vocabulary: of the classes asked for, those without masks keep the scores of their words, and masks
    of other classes take no part.

    Args:
        source: what the embeddings depend on, such as `load_model(...).source`; it is saved with them.

    Attributes:
        embeddings: (M, D) float32 of unit length, where the first that were added lie.
        labels: of each mask the name of its class.
        source: as given.

    Example:
        >>> bank = MaskBank()
        >>> bank.add(torch.tensor([[1.0, 0.2], [1.0, -0.2], [-0.2, 1.0]]), ["cat", "cat", "dog"])
        >>> text = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.0, -1.0]])  # these words are no help
        >>> names = ["cat", "dog", ("bird", "fowl")]
        >>> masks = torch.tensor([[0.9, 0.1], [0.0, 1.0]])
        >>> from maft_adapter.classify import class_scores
        >>> by_words = class_scores(masks, text, logit_scale=10)
        >>> by_words.argmax(1).tolist(), bank.fuse(by_words, masks, names).argmax(1).tolist()
        ([1, 0], [0, 1])
    """

    def __init__(self, source: str | None = None) -> None:
        self.embeddings = torch.empty(0, 0)
        self.labels: list[str] = []
        self.source = source
        self._space: tuple[Tensor, Tensor, Tensor] | None = None  # see `_whitening`; None after a change

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> dict[str, int]:
        """How many masks there are of each class."""
        return dict(Counter(self.labels))

    def add(self, embeddings: Tensor | NDArray[np.floating[Any]], labels: Sequence[str]) -> None:
        """Remember masks.

        Args:
            embeddings: (M, D) float of any length, all of one CLIP and of masks that its token grid can see: what
                `encode_masks` or `labelled_embeddings` give, or rows of what `maft-adapter embed` wrote:
                `read_embeddings(folder).matrix[rows]`, whose `find` gives the row of a picture's mask.
            labels: M names of classes.

        Raises:
            TypeError: embeddings that are no floats, or labels that are no strings.
            ValueError: shapes or numbers that don't match, another D than before, an empty name, embeddings that are 0
                or not finite. The bank is unchanged then.

        Example:
            >>> bank = MaskBank()
            >>> bank.add(torch.eye(3), ["cat", "dog", "dog"])
            >>> bank.add(np.ones((1, 3), np.float16), ["bird"])
            >>> bank.counts
            {'cat': 1, 'dog': 2, 'bird': 1}
        """
        given = embeddings if isinstance(embeddings, Tensor) else torch.from_numpy(np.array(embeddings))
        if not given.is_floating_point():
            raise TypeError(f"embeddings must be floats, got {given.dtype}")
        if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
            raise TypeError("labels must be a list of class names, one for each mask")
        if given.ndim != 2 or len(given) != len(labels):
            raise ValueError(f"expected embeddings (M, D) and M labels, got {tuple(given.shape)} and {len(labels)}")
        if not all(label.strip() for label in labels):
            raise ValueError("labels hold an empty name; leave masks without a class out")
        if not len(given):
            return
        self._check_width(given)
        lengths = given.float().norm(dim=1)  # (M,)
        bad = int((~(lengths.isfinite() & (lengths > 0))).sum())
        if bad:
            raise ValueError(f"{bad} of {len(given)} embeddings are 0 or not finite; leave those masks out")
        added = normalize(given.detach().float(), dim=1)  # (M, D)
        self.embeddings = torch.cat([self.embeddings, added.to(self.embeddings.device)]) if len(self) else added
        self.labels += labels
        self._space = None

    @torch.no_grad()
    def scores(self, embeddings: Tensor, class_names: Sequence[str | Sequence[str]]) -> Tensor:
        """How much masks resemble those of each class, as probabilities.

        Of a class, the mean over its masks of exp(5 cos); the cosine is that of whitened embeddings: centred and
        multiplied by the inverse root of their covariance, in which every class weighs the same. The covariance is
        shrunk towards a sphere as if D masks more had been seen. All masks are compared, whatever their number.

        Args:
            embeddings: (..., N, D) float, of the same CLIP as the bank's.
            class_names: C classes, as for `text_classifier`: each a name or its synonyms. A mask belongs to the class
                that its label names.

        Returns:
            (..., N, C) float32 in [0, 1], where the embeddings lie: 0 for classes without masks, the others sum to 1.
            All 0 if no class has masks, NaN for an embedding that is not finite.

        Raises:
            TypeError: the embeddings are no float tensor.
            ValueError: another D than the bank's, no classes, or a name in two classes.
        """
        similarity, _ = self._similarity(embeddings, class_names)
        return similarity / similarity.sum(-1, keepdim=True).clamp(min=1e-30)

    @torch.no_grad()
    def fuse(
        self, clip_scores: Tensor, embeddings: Tensor, class_names: Sequence[str | Sequence[str]], words: float = 1.0
    ) -> Tensor:
        """A^c, joined with what the bank says.

        A class with n masks puts w = n / (n + `words`) of its probability into a pot, which is dealt out in
        proportion to w times the bank's scores. So words count for less the more masks there are; a class without masks
        keeps its probability, and an empty bank changes nothing.

        Args:
            clip_scores: (..., N, C) in [0, 1], such as `class_scores` returns.
            embeddings: (..., N, D) float, what the scores are of.
            class_names: C classes, see `scores`.
            words: positive; the number of masks that the words of a class are worth. The default was chosen on
                validation scenes of the embedded world; where words are good and masks bad, take more.

        Returns:
            (..., N, C) in [0, 1] with the sums over the classes that `clip_scores` have; float32 or wider.

        Raises:
            TypeError: scores or embeddings are no float tensors.
            ValueError: as `scores`; shapes that don't match; `words` is not positive and finite.
        """
        if not isinstance(clip_scores, Tensor) or not clip_scores.is_floating_point():
            raise TypeError(f"clip_scores must be a float tensor, got {getattr(clip_scores, 'dtype', clip_scores)}")
        if not 0 < words < float("inf"):
            raise ValueError(f"words must be positive and finite, got {words}")
        similarity, counts = self._similarity(embeddings, class_names)  # (..., N, C), (C,)
        if clip_scores.shape != similarity.shape:
            raise ValueError(
                f"clip_scores must be {tuple(similarity.shape)}, a row for each embedding and a column for each class, "
                f"got {tuple(clip_scores.shape)}"
            )
        share = counts / (counts + words)  # (C,)
        dealt = share * similarity  # (..., N, C)
        dealt = dealt / dealt.sum(-1, keepdim=True).clamp(min=1e-30)
        by_words = clip_scores.to(torch.promote_types(clip_scores.dtype, torch.float32))
        return (1 - share) * by_words + (share * by_words).sum(-1, keepdim=True) * dealt

    def nearest(self, embeddings: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The labelled masks that masks resemble most: why the bank says what it says.

        Args:
            embeddings: (N, D) float, of the same CLIP as the bank's, finite.
            k: at least 1.

        Returns:
            Cosines (N, K) of the whitened embeddings, see `scores`, the greatest first, and the rows of the bank's
            embeddings and labels (N, K), K = min(k, M), as `maft_adapter.search.search` gives them, with FAISS where
            it is installed.

        Raises:
            TypeError, ValueError: as `scores` and `search`; the bank is empty.
        """
        from .search import search

        if not len(self):
            raise ValueError("the bank is empty: add labelled masks first")
        asked = self._whitened(self._checked(embeddings)).cpu().numpy()  # (N, D)
        return search(self._whitening()[2].cpu().numpy(), asked, k)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank as safetensors: `path` holds the old or the new file, never a part.

        Args:
            path: of the file; its folder exists.

        Raises:
            OSError: the file can't be written.
        """
        from safetensors.torch import save

        header = {"version": __version__, "source": self.source, "labels": self.labels}
        tensors = {"embeddings": self.embeddings.cpu().contiguous()}
        replace_file(path, save(tensors, {_KEY: json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], source: str | None = None) -> MaskBank:
        """Read what `save` wrote.

        Args:
            path: of the file.
            source: of the CLIP that will be asked, if the bank's has to agree.

        Raises:
            OSError: there is no such file, or it can't be read.
            ValueError: it is damaged or no bank, or its embeddings are of another source.

        Example:
            >>> import tempfile
            >>> bank = MaskBank("a CLIP")
            >>> bank.add(torch.eye(2), ["cat", "dog"])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     bank.save(f"{folder}/pets.safetensors")
            ...     MaskBank.load(f"{folder}/pets.safetensors", "a CLIP").counts
            {'cat': 1, 'dog': 1}
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                header = (file.metadata() or {}).get(_KEY, "")
                if header:
                    about = json.loads(header)
                    bank = cls(about["source"])
                    bank.add(file.get_tensor("embeddings"), about["labels"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
        if not header:
            raise ValueError(f"{path} holds no bank of masks; expected what MaskBank.save wrote")
        if source is not None and source != bank.source:
            raise ValueError(f"the masks of {path} were embedded by {bank.source!r}, not by {source!r}")
        return bank

    def _check_width(self, embeddings: Tensor) -> None:
        if len(self) and embeddings.shape[-1] != self.embeddings.shape[1]:
            raise ValueError(
                f"the bank's embeddings have D = {self.embeddings.shape[1]}, got {tuple(embeddings.shape)}; all must "
                "come from the same CLIP"
            )

    def _checked(self, embeddings: Tensor) -> Tensor:
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            raise TypeError(f"embeddings must be a float tensor, got {getattr(embeddings, 'dtype', embeddings)}")
        if embeddings.ndim < 2:
            raise ValueError(f"embeddings must be (..., N, D), got {tuple(embeddings.shape)}")
        self._check_width(embeddings)
        return embeddings

    def _similarity(self, embeddings: Tensor, class_names: Sequence[str | Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Mean similarity to the masks of each class (..., N, C), 0 without any, and their numbers (C,)."""
        embeddings = self._checked(embeddings)
        classes = _classes(class_names)
        known = {label: classes.get(label, len(class_names)) for label in self.counts}  # the last column: of no class
        class_of = torch.tensor([known[label] for label in self.labels], dtype=torch.int64)  # (M,)
        counts = class_of.bincount(minlength=len(class_names) + 1)  # (C + 1,)
        shape = (*embeddings.shape[:-1], len(class_names))
        if not len(self):
            return embeddings.new_zeros(shape, dtype=torch.float32), counts[:-1].to(embeddings.device)
        device = self.embeddings.device
        asked = self._whitened(embeddings.flatten(0, -2))  # (Q, D)
        memory, class_of = self._whitening()[2], class_of.to(device)  # (M, D), (M,)
        sums = asked.new_zeros(len(asked), len(counts))  # (Q, C + 1)
        rows = max(1, _AT_ONCE // max(1, len(asked)))
        for start in range(0, len(memory), rows):
            near = (_SHARPNESS * asked @ memory[start : start + rows].T).exp()  # (Q, up to rows)
            sums.index_add_(1, class_of[start : start + rows], near)
        means = (sums / counts.to(device).clamp(min=1))[:, :-1]  # (Q, C)
        return means.view(shape).to(embeddings.device), counts[:-1].to(embeddings.device)

    def _whitened(self, embeddings: Tensor) -> Tensor:
        """Embeddings (Q, D) where the bank compares them, of unit length."""
        unit = normalize(embeddings.to(self.embeddings.device, torch.float32), dim=1)  # (Q, D)
        return _project(unit, *self._whitening()[:2])

    def _whitening(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centre (D,), Cholesky factor of the covariance (D, D), and the bank's embeddings whitened with them, (M, D).

        A class with many masks, such as sky, would otherwise decide alone what counts as near.
        """
        if self._space is None:
            counts = self.counts
            weights = torch.tensor([1 / counts[label] for label in self.labels], dtype=torch.float64) / len(counts)
            x = self.embeddings.double()  # (M, D)
            weights = weights.to(x.device)[:, None]  # (M, 1)
            centre = (weights * x).sum(0)  # (D,)
            covariance = (x - centre).T @ (weights * (x - centre))  # (D, D)
            masks, dim = x.shape
            # The floor is far below any variance of embeddings: masks that are all alike say nothing.
            sphere = torch.eye(dim, dtype=x.dtype, device=x.device) * (covariance.trace() / dim).clamp(min=1e-8)
            factor = torch.linalg.cholesky((masks * covariance + dim * sphere) / (masks + dim))  # (D, D)
            centre, factor = centre.float(), factor.float()
            self._space = centre, factor, _project(self.embeddings, centre, factor)
        return self._space


def labelled_embeddings(
    model: Model, dataset: SegmentationDataset, per_class: int, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """Embeddings of a data set's ground-truth masks, for `MaskBank.add`.

    Pictures are taken in a random order until every class has its masks, or there are no more pictures. A picture's
    mask of a class is all that has its label; one that contains no token is left out.

    Args:
        model: of `load_model`.
        dataset: such as `open_dataset(..., split="train")`.
        per_class: at most this many masks of each class, at least 1. Fewer are the first of more.
        seed: of the order.

    Returns:
        Embeddings (M, D) float32 in the order of the pictures, and M labels: the first name of each mask's class.

    Raises:
        ValueError: `per_class` below 1; a damaged picture or label file.
        OSError: a file can't be read.

    Example:
        >>> from maft_adapter.data import open_dataset
        >>> from maft_adapter.models import load_model
        >>> model, bank = load_model(), MaskBank()
        >>> bank.add(*labelled_embeddings(model, open_dataset("shapes", split="train"), per_class=1))
        >>> len(bank)
        40
    """
    from .finetune import ground_truth
    from .pictures import read_picture

    if per_class < 1:
        raise ValueError(f"per_class is {per_class}, expected at least 1")
    missing = torch.full((len(dataset.class_names),), per_class)  # (C,)
    embeddings, labels = [], []
    for index in tqdm(np.random.default_rng(seed).permutation(len(dataset)), desc="labelled masks", disable=None):
        item = dataset[int(index)]
        masks, classes = ground_truth(torch.from_numpy(item.labels.astype(np.int64)), len(missing))  # (K, H, W), (K,)
        wanted = missing[classes] > 0  # (K,)
        if not wanted.any():
            continue
        masks, classes = masks[wanted], classes[wanted]
        encoded, valid = _encode(model, read_picture(item.picture), masks)  # (K, D), (K,)
        embeddings.append(encoded[valid])
        labels += [dataset.class_names[k][0] for k in classes[valid.cpu()].tolist()]
        missing[classes[valid.cpu()]] -= 1
        if not missing.any():
            break
    return torch.cat(embeddings) if embeddings else torch.empty(0, 0), labels


def bank_scorer(
    model: Model, text: Tensor, bank: MaskBank, class_names: Sequence[str | Sequence[str]], words: float = 1.0
) -> Scorer:
    """A^c of a mask-aware CLIP joined with a bank, for `maft_adapter.evaluate.Evaluator`.

    Args:
        model: of `load_model`.
        text: (C, D) of `text_classifier`, on the model's device.
        bank: of embeddings of the same model.
        class_names: the C classes of the text.
        words: see `MaskBank.fuse`.

    Example:
        >>> from maft_adapter.classify import text_classifier
        >>> from maft_adapter.models import load_model
        >>> model, names = load_model(), ["red ball", "pale sand"]
        >>> text = text_classifier(model.clip, model.tokenizer, names)
        >>> score = bank_scorer(model, text, MaskBank(), names)
        >>> scores, valid = score(np.zeros((8, 8, 3), np.uint8), torch.ones(3, 8, 8))
        >>> scores.shape, valid.tolist()
        (torch.Size([3, 2]), [True, True, True])
    """

    @torch.no_grad()
    def score(picture: NDArray[np.uint8], masks: Tensor) -> tuple[Tensor, Tensor]:
        embeddings, valid = _encode(model, picture, masks)  # (N, D), (N,)
        by_words = class_scores(embeddings, text, model.logit_scale)  # (N, C)
        return bank.fuse(by_words, embeddings, class_names, words), valid

    return score


@torch.no_grad()
def _encode(model: Model, picture: NDArray[np.uint8], masks: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) of a picture's masks (N, H, W) and which of them contain a token, (N,) bool."""
    from .models import image_tower
    from .pictures import prepare

    tower = image_tower(model.clip)
    weight = next(tower.parameters())
    image = prepare(picture, model.mean, model.std, model.size, multiple=model.multiple)  # (3, h, w)
    images, asked = image[None].to(weight.device, weight.dtype), masks[None].to(weight.device)
    return encode_masks(model.clip, images, asked)[0].float(), valid_masks(tower, images, asked)[0]


def _project(unit: Tensor, centre: Tensor, factor: Tensor) -> Tensor:
    # Cosines are the same for every root of the covariance, so a triangular one will do.
    return normalize(torch.linalg.solve_triangular(factor, (unit - centre).T, upper=False).T, dim=1, eps=1e-6)


def _classes(class_names: Sequence[str | Sequence[str]]) -> dict[str, int]:
    """Of every name its class."""
    if isinstance(class_names, str) or not len(class_names):
        raise ValueError(f"class_names must be a list of at least one class, got {class_names!r}")
    classes: dict[str, int] = {}
    for k, names in enumerate(class_names):
        for name in [names] if isinstance(names, str) else names:
            if classes.setdefault(name, k) != k:
                raise ValueError(f"{name!r} names both class {classes[name]} and class {k}; a mask has one class")
    return classes
