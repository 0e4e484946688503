"""What proposals are, what makes them, and which makers there are."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Proposals(NamedTuple):
    """N mask proposals of one picture.

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

    Attributes:
        settings: all that determines the result besides the picture, in words.
    """

    @property
    def settings(self) -> str: ...  # noqa: D102

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        """The proposals of a picture (H, W, 3) uint8 RGB; `name` is its file's, for masks that come from files."""
        ...
