"""What proposals are, what makes them, and what has to be true of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

MOST_PIXELS = 2**32  # of all masks of a picture: 4 GB as bool


class Proposals(NamedTuple):
    """N mask proposals of one picture; N = 0 is legal.

    Attributes:
        masks: (N, H, W) bool, or float32 in [0, 1] where a generator gives soft ones, at the picture's size.
        scores: (N,) float32 in [0, 1], how good the generator finds each mask; None if it does not say.
        class_scores: A^p, (N, C+1) float32 probabilities of the generator's own classes, the last column "no object";
            None if it has none.
    """

    masks: NDArray[np.bool_] | NDArray[np.float32]
    scores: NDArray[np.float32] | None = None
    class_scores: NDArray[np.float32] | None = None


class Proposer(Protocol):
    """What makes the proposals of a picture.

    One whose result depends on more than the picture and the settings, as that of `Files` does, has a method
    `version(name)`, too: a string that tells so, see `version_of`.

    Attributes:
        settings: all that determines the result besides the picture, in words.
    """

    @property
    def settings(self) -> str: ...

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        """The proposals of a picture (H, W, 3) uint8 RGB; `name` is its file's, for masks that come from files."""
        ...


def version_of(proposer: Proposer, name: str) -> str:
    """What the proposals of the picture `name` depend on besides its pixels and the settings; "" if on nothing."""
    version = getattr(proposer, "version", None)
    return "" if version is None else version(name)


def check_room(shape: Sequence[int]) -> None:
    """Raise ValueError, before memory is taken, if masks (N, H, W) have more pixels than one picture's should."""
    if math.prod(map(int, shape)) > MOST_PIXELS:
        raise ValueError(
            f"masks of {' x '.join(map(str, shape))} pixels are more than a picture may have, {MOST_PIXELS / 1e9:.1f} "
            "billion; keep fewer masks, or reduce the picture and them"
        )


def check_picture(picture: NDArray[np.uint8]) -> None:
    """Raise ValueError unless the picture is (H, W, 3) uint8 of at least one pixel."""
    shape: tuple[int, ...] = getattr(picture, "shape", ())
    dtype = getattr(picture, "dtype", type(picture).__name__)
    if len(shape) != 3 or shape[2] != 3 or dtype != np.uint8 or 0 in shape:
        raise ValueError(f"a picture is (H, W, 3) uint8 RGB of at least one pixel, got {tuple(shape)} {dtype}")


def check_proposals(proposals: Proposals, size: tuple[int, int]) -> None:
    """Raise unless the proposals are what `Proposals` says, for a picture of this size.

    Args:
        proposals: what a proposer gave.
        size: (H, W) of the picture.

    Raises:
        TypeError: another type or dtype.
        ValueError: another size or shape, or values outside [0, 1].

    Example:
        >>> check_proposals(Proposals(np.zeros((3, 4, 6), bool)), (4, 6))
        >>> check_proposals(Proposals(np.zeros((3, 4, 6), bool)), (6, 4))
        Traceback (most recent call last):
        ValueError: masks are 4 x 6 (height x width), the picture 6 x 4, turned as its EXIF data say; turn the masks
    """
    if not isinstance(proposals, Proposals):
        raise TypeError(f"a proposer gives Proposals, got {type(proposals).__name__}")
    masks, scores, class_scores = proposals
    if not isinstance(masks, np.ndarray) or masks.dtype not in (np.bool_, np.float32):
        found = getattr(masks, "dtype", type(masks).__name__)
        raise TypeError(f"masks are a bool or float32 array, got {found}; 0 and 1 need .astype(bool)")
    if masks.ndim != 3:
        raise ValueError(f"masks are (N, H, W), got {masks.shape}")
    check_size(masks.shape[1:], size)
    _check_unit_range("masks", masks, "logits need a sigmoid")
    for name, values, ndim in (("scores", scores, 1), ("class_scores", class_scores, 2)):
        if values is None:
            continue
        if not isinstance(values, np.ndarray) or values.dtype != np.float32:
            raise TypeError(f"{name} are a float32 array, got {getattr(values, 'dtype', type(values).__name__)}")
        if values.ndim != ndim or len(values) != len(masks):
            raise ValueError(f"{name} are {values.shape} for {len(masks)} masks, expected one row each")
        _check_unit_range(name, values, "logits need a softmax")
    if class_scores is not None and not np.allclose(class_scores.sum(1), 1, atol=1e-3):
        raise ValueError('class_scores must sum to 1 over the classes and "no object", the last column')


def check_size(found: Sequence[int], size: Sequence[int]) -> None:
    """Raise ValueError unless masks of the size (H, W) that was found are of the picture's."""
    if tuple(found) != tuple(size):
        turned = tuple(found) == tuple(size)[::-1]
        cure = ", turned as its EXIF data say; turn the masks" if turned else "; resize the masks"
        sizes = [" x ".join(map(str, lengths)) for lengths in (found, size)]
        raise ValueError(f"masks are {sizes[0]} (height x width), the picture {sizes[1]}{cure}")


def _check_unit_range(name: str, values: NDArray[Any], cure: str) -> None:
    if not values.size:
        return
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}: {cure}")


def fingerprint(path: Path) -> str:
    """What tells that a file, or any file in a folder, changed: names, sizes and times, as 16 digits."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    lines = []
    for file in files:
        if file.is_file():
            about = file.stat()
            lines.append(f"{file.relative_to(path)} {about.st_size} {about.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]
