"""Proposals computed once and kept on disk."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import replace_file
from .base import Proposals, Proposer, check_picture, check_proposals, version_of
from .convert import from_rle, to_rle

_FORMAT = 1  # of the entries; to be raised when it changes, so that older ones are made again
_DIGEST = 32  # bytes of it, before the rest


class Kept:
    """A proposer that asks another one once a picture and keeps what it gave in a folder.

    An entry is found by the picture's pixels and the proposer's settings (and, for `Files`, the file of its masks), so
    moved and renamed pictures find theirs, and those of other settings are not used. It begins with a checksum over
    both and the rest; one that does not match is made again, with a warning. Entries are written whole or not at all,
    so processes may share the folder. Nothing is ever removed; the folder can be at any time.

    Bool masks are kept as run-length codes, scores as they are. Soft masks are kept in steps of 1/255, and given so at
    once, so that the first answer equals the later ones; at most 0.002 off, and on the same side of 0.5.

    Args:
        proposer: the one to ask.
        folder: to keep entries in; made if it is missing.

    Raises:
        OSError: the folder can't be made or written to.

    Example:
        >>> import tempfile
        >>> from maft_adapter.proposals import proposer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kept = Kept(proposer("superpixels"), folder)
        ...     kept(np.zeros((8, 8, 3), np.uint8)).masks.shape
        (1, 8, 8)
    """

    def __init__(self, proposer: Proposer, folder: str | os.PathLike[str]) -> None:
        self.proposer = proposer
        self.folder = Path(folder)
        with _keeping(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it can't be written to")

    @property
    def settings(self) -> str:
        """Those of the other proposer."""
        return self.proposer.settings

    def version(self, name: str) -> str:
        """That of the other proposer."""
        return version_of(self.proposer, name)

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        """The proposals of a picture (H, W, 3) uint8 RGB, kept or made now.

        Raises:
            ValueError: a picture of another form.
            OSError: they can't be written or read; and whatever the other proposer raises.
        """
        check_picture(picture)
        about = [_FORMAT, self.settings, self.version(name), picture.shape, picture.dtype]
        key = hashlib.sha256(repr(about).encode(errors="surrogateescape"))
        key.update(picture.tobytes())
        # Each folder stays small enough to be listed, as is done whenever a file is replaced.
        path = self.folder / key.hexdigest()[:2] / f"{key.hexdigest()[2:]}.masks"
        try:
            entry = path.read_bytes()
        except FileNotFoundError:
            pass
        else:
            content = entry[_DIGEST:]
            if entry[:_DIGEST] == _digest(key.digest(), content):
                return _unpack(content)
            warnings.warn(f"{path} is damaged; its proposals are made again", stacklevel=2)
        proposals = self.proposer(picture, name)
        check_proposals(proposals, picture.shape[:2])
        content = _pack(proposals)
        del proposals  # which may be gigabytes, if soft, before they are there once more
        with _keeping(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, _digest(key.digest(), content) + content)
        return _unpack(content)


@contextmanager
def _keeping(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, f"proposals can't be kept in {folder}: {error.strerror}") from error


def _digest(key: bytes, content: bytes) -> bytes:
    return hashlib.sha256(key + content).digest()


def _pack(proposals: Proposals) -> bytes:
    masks: NDArray[Any] = proposals.masks
    arrays: dict[str, NDArray[Any]] = {"shape": np.array(masks.shape)}
    if masks.dtype == np.bool_:
        codes = "\n".join(rle["counts"] for rle in to_rle(masks))
        arrays["codes"] = np.frombuffer(codes.encode("ascii"), np.uint8)
    else:
        arrays["soft"] = np.empty(masks.shape, np.uint8)
        for soft, mask in zip(arrays["soft"], masks, strict=True):
            soft[:] = np.rint(mask * 255)
    arrays |= {key: values for key, values in proposals._asdict().items() if key != "masks" and values is not None}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _unpack(content: bytes) -> Proposals:
    with np.load(io.BytesIO(content)) as arrays:
        count, *size = arrays["shape"].tolist()
        if "soft" in arrays:
            masks = arrays["soft"] / np.float32(255)
        else:
            codes = arrays["codes"].tobytes().decode("ascii").split("\n") if count else []
            masks = from_rle([{"size": size, "counts": code} for code in codes], tuple(size))
        return Proposals(masks, arrays.get("scores"), arrays.get("class_scores"))
