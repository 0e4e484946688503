"""Label maps out of files: every value as it was written, then the classes that the values stand for."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..extras import extra

with extra("pictures"):
    from PIL import Image, ImageOps

_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # its values that swap height and width


def read_values(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read the values of a label file, unchanged.

    PNG, TIFF and whatever else PIL reads without loss, of one channel: grey values of 8, 16 or 32 bits, or indices into
    a palette, never its colours. `_seg.png` files of ADE20K: the class's number R // 10 * 256 + G. `.mat` files of
    Pascal Context: `LabelMap`.

    Args:
        path: of the file.

    Returns:
        (H, W) of an unsigned or signed integer dtype.

    Raises:
        OSError: the file is missing or can't be opened.
        ValueError: it is truncated, no picture, lossy (JPEG), or in colour; the path is named.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.fromarray(np.array([[0, 846, 65535]], np.uint16)).save(f"{folder}/a.tif")
        ...     read_values(f"{folder}/a.tif").tolist()
        [[0, 846, 65535]]
    """
    if str(path).endswith(".mat"):
        return _read_mat(path)
    with open(path, "rb") as file:
        try:
            with Image.open(file) as image:
                values, lossy = np.asarray(image), image.format in ("JPEG", "JPEG2000", "MPO")
        except Exception as error:  # of any kind, depending on which byte is damaged
            raise ValueError(f"{path} can't be read as a label map: {error}") from error
    if lossy:
        raise ValueError(f"{path} is a JPEG, which changes the values of labels: labels are PNG or TIFF files")
    if str(path).endswith("_seg.png") and values.ndim == 3 and values.shape[2] >= 3:
        return values[..., 0].astype(np.uint16) // 10 * 256 + values[..., 1]  # (H, W)
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"{path} holds {values.shape} {values.dtype}, expected one channel of integers: a picture in colour shows "
            "labels, it does not hold them"
        )
    return values


def _read_mat(path: str | os.PathLike[str]) -> NDArray[Any]:
    with extra("pictures"):
        from scipy.io import loadmat
    with open(path, "rb") as file:
        try:
            content = loadmat(file)
        except Exception as error:  # of any kind, depending on which byte is damaged
            raise ValueError(f"{path} can't be read as a MATLAB file: {error}") from error
    if "LabelMap" not in content or content["LabelMap"].ndim != 2:
        raise ValueError(f"{path} has no LabelMap (H, W), the label map of Pascal Context")
    return content["LabelMap"]


def to_classes(
    values: NDArray[Any], of_classes: Sequence[int], void: Collection[int] | None, ignore_index: int
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """What the values stand for.

    Args:
        values: (H, W) integers.
        of_classes: (C,) the value of each class.
        void: values of pixels that don't count; None: all that stand for no class.
        ignore_index: 255, or 65535 for more than 255 classes; what such pixels become.

    Returns:
        (H, W) class indices 0..C-1 or `ignore_index`; uint8 if `ignore_index` is 255, else uint16.

    Raises:
        ValueError: values that are neither of a class nor void.

    Example:
        >>> to_classes(np.array([[0, 1, 7]]), of_classes=[1, 7], void=[0], ignore_index=255)
        array([[255,   0,   1]], dtype=uint8)
    """
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low >= 0 and high < 2**16:
        present = np.flatnonzero(np.bincount(values.ravel())).tolist()
    else:
        present = np.unique(values).tolist()
    unknown = sorted(set(present) - set(of_classes) - set(void or ())) if void is not None else []
    if unknown or low < 0 or high >= 2**16:
        expected = f"{len(of_classes)} classes, {min(of_classes)} to {max(of_classes)}"
        if void:
            expected += f", and {', '.join(map(str, void))} for what does not count"
        raise ValueError(f"the values {(unknown or present)[:8]} stand for no class; there are {expected}")
    table = np.full(high + 1, ignore_index, np.uint8 if ignore_index == 255 else np.uint16)
    for index, value in enumerate(of_classes):
        if value <= high:
            table[value] = index
    return table[values]


def lay_on_picture(values: NDArray[Any], picture: Path, labels: Path) -> NDArray[Any]:
    """The label map as it lies on the picture that `read_picture` gives, which follows the EXIF orientation.

    Some labels were drawn on the picture as a viewer shows it, some on the pixels as they are stored: the size tells.
    Where both fit, as for a square, the labels are taken to lie on the picture as it is shown.

    Args:
        values: (H, W).
        picture: its file, of which only the header is read.
        labels: the label map's file, for the error.

    Raises:
        OSError: the picture can't be opened.
        ValueError: the sizes fit neither way, or the picture's header can't be read.
    """
    with open(picture, "rb") as file:
        try:
            with Image.open(file) as image:
                width, height = image.size
                orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception as error:  # of any kind, depending on which byte is damaged
            raise ValueError(f"{picture} can't be read as a picture: {error}") from error
    stored = (height, width)
    shown = (width, height) if orientation in _TURNED else stored
    if values.shape == shown:
        return values
    if values.shape == stored:
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        page = Image.fromarray(values.astype(np.int32))  # older versions of PIL do not turn 16 bits
        page.info["exif"] = exif.tobytes()
        return np.asarray(ImageOps.exif_transpose(page)).astype(values.dtype)  # (W, H)
    raise ValueError(
        f"{labels} is {values.shape[0]}x{values.shape[1]} (height x width), its picture {picture} "
        f"{shown[0]}x{shown[1]}: they don't belong together, or one was resized"
    )
