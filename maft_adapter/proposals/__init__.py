"""Mask proposals: a picture in, masks out, made by a generator or read from files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Proposals, Proposer, check_proposals
from .files import Files
from .kept import Kept

if TYPE_CHECKING:
    import torch

__all__ = ["Files", "Kept", "Proposals", "Proposer", "check_proposals", "proposer"]


def proposer(spec: str, device: torch.device | str = "cpu") -> Proposer:
    """The proposer that a few words name, as the command line's `--proposals` does.

    Args:
        spec: `superpixels`; `sam` or `sam:MODEL` (`generators.Sam`); `mask2former` or `mask2former:MODEL`
            (`generators.Mask2Former`), where MODEL is a name on the Hugging Face Hub, a folder or, for
            mask2former, `shapes`; `files:PATH`
            (`Files`).
        device: that a generator's model runs on.

    Raises:
        ValueError: a spec of another form.
        OSError: no such model or path.

    Example:
        >>> proposer("superpixels").settings
        'superpixels: scales=(40.0, 120.0) most=80 max_iou=0.7 min_area=0.015 min_contrast=0.0'
    """
    kind, colon, argument = spec.partition(":")
    if kind == "superpixels" and not colon:
        from .merging import Superpixels

        return Superpixels()
    if kind == "files" and argument:
        return Files(argument)
    if kind in ("sam", "mask2former") and bool(colon) == bool(argument):
        from .generators import Mask2Former, Sam

        generator = Sam if kind == "sam" else Mask2Former
        return generator(argument, device) if argument else generator(device=device)
    raise ValueError(
        f"proposals are {spec!r}; expected superpixels, sam, sam:MODEL, mask2former, mask2former:MODEL or files:PATH"
    )
