"""Pictures as users have them: read, found in folders, and made the input of an image tower."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .extras import extra

with extra("pictures"):
    from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["SUFFIXES", "find_pictures", "prepare", "read_picture"]

# Of the files that count as pictures in a folder; a file that is named is read whatever its suffix.
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff"),
    ".webp",
)


def read_picture(source: Any) -> NDArray[np.uint8]:
    """Read a picture as RGB, turned as its EXIF data say.

    Grey, palette, CMYK and other modes become RGB; what is transparent is laid on white; 16-bit grey is scaled to 8
    bits, 65535 to 255; of an animation comes the first frame. Colour profiles are not applied.

    Args:
        source: a path, the bytes of a file or a file open in binary mode, a PIL image, or an array: (H, W, 3) uint8
            RGB in [0, 255], or (H, W) uint8 grey.

    Returns:
        (H, W, 3) uint8 RGB in [0, 255].

    Raises:
        TypeError: `source` is something else.
        ValueError: no picture: empty, truncated, of an unknown format, with values whose range is not known, or of more
            pixels than PIL takes for harmless (`PIL.Image.MAX_IMAGE_PIXELS`, 89 million); or an array that is not as
            above. The path is named.
        OSError: the file is missing, a broken link, a folder or not to be read. The path is named.

    Example:
        >>> read_picture(Image.new("CMYK", (4, 2))).shape
        (2, 4, 3)
    """
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    if isinstance(source, Image.Image):
        return _decoded(source, f"a PIL image of {source.width}x{source.height}")
    if isinstance(source, str | os.PathLike):
        what = str(source)
        if os.path.islink(source) and not os.path.exists(source):
            raise FileNotFoundError(f"{what} is a link to {os.readlink(what)}, which does not exist")
        data = Path(source).read_bytes()
    elif isinstance(source, bytes) or hasattr(source, "read"):
        data = source if isinstance(source, bytes) else source.read()
        what = str(getattr(source, "name", f"{len(data)} bytes"))
    else:
        raise TypeError(f"a picture is a path, bytes, a PIL image or an array, got {type(source).__name__}")
    if not data:
        raise ValueError(f"{what} is empty; copy or download it again")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError(f"{what} is no picture of a format that PIL knows") from error
    except Exception as error:  # of any kind, depending on which byte is damaged
        raise ValueError(f"{what} can't be read as a picture: {error or repr(error)}") from error
    return _decoded(image, what)


def find_pictures(arguments: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The pictures that paths, folders and patterns name, each once.

    Args:
        arguments: files, whatever their suffix; folders, whose files with a suffix of `SUFFIXES` are taken, sub-folders
            included, in alphabetic order, what begins with a dot left out; patterns as the shell has them, `**` for any
            sub-folders. Links to files are taken, also broken ones, which `read_picture` reports; links to folders
            inside folders are not followed.

    Returns:
        Paths in the order of the arguments; one that is named twice comes once, at its first place.

    Raises:
        OSError: an argument names nothing, or a folder can't be read.
        ValueError: a folder or a pattern without any picture, or no arguments.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (4, 4)).save(Path(folder, "a b.png"))
        ...     [path.name for path in find_pictures([folder, f"{folder}/*.png"])]
        ['a b.png']
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        text = os.fspath(argument)
        if os.path.lexists(text):
            named = [text]
        elif glob.has_magic(text):
            named = sorted(glob.glob(text, recursive=True))
        else:
            raise FileNotFoundError(f"{text}: no such file or folder")
        pictures = [path for name in named for path in (_in_folder(name) if os.path.isdir(name) else (Path(name),))]
        if not pictures:
            raise ValueError(f"{text}: no pictures there; their suffixes are {', '.join(SUFFIXES)}")
        for path in pictures:
            found.setdefault(os.path.abspath(path), path)
    if not found:
        raise ValueError("no pictures were named: give files, folders or patterns")
    return list(found.values())


def prepare(
    picture: NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    size: int = 480,
    keep_aspect: bool = False,
    multiple: int = 1,
) -> Tensor:
    """Make a picture the input of an image tower: all of it, so that masks keep their place.

    open_clip's own `preprocess` cuts out the centre, which masks of the whole picture would not fit. Resized is with
    PIL's bicubic filter, which smooths where it makes smaller.

    Args:
        picture: (H, W, 3) uint8 RGB in [0, 255].
        mean, std: the model's, three numbers each for pixels in [0, 1].
        size: side of the square that the picture becomes, in pixels; what `multiple` does not divide becomes the
            nearest that it does: for ViT-L/14, 480 becomes 476.
        keep_aspect: give both sides the picture's ratio instead, with about as many pixels as that square has; the
            nearest multiples, and at least one.
        multiple: what the tower's patch or stride divides images into, `Model.multiple`.

    Returns:
        (3, h, w) float32, normalised.

    Raises:
        ValueError: the picture is not as above, or a number is not positive.

    Example:
        >>> picture = np.zeros((100, 400, 3), np.uint8)
        >>> prepare(picture, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), multiple=14).shape
        torch.Size([3, 476, 476])
        >>> prepare(picture, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), keep_aspect=True, multiple=16).shape
        torch.Size([3, 240, 960])
    """
    picture = _checked_array(picture)
    if size < 1 or multiple < 1 or not all(value > 0 for value in std):
        raise ValueError(f"size {size}, multiple {multiple} and std {tuple(std)} must be positive")
    height, width = picture.shape[:2]
    ratio = (height / width) ** 0.5 if keep_aspect else 1.0
    h, w = (max(1, round(side / multiple)) * multiple for side in (size * ratio, size / ratio))
    resized = np.array(Image.fromarray(picture).resize((w, h), Image.Resampling.BICUBIC))  # (h, w, 3)
    pixels = torch.from_numpy(resized).movedim(-1, 0).float() / 255  # (3, h, w)
    return ((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).contiguous()


# Reading


def _checked_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, W, 3) of an array that is a picture; TypeError or ValueError with the cure for any other."""
    if array.dtype != np.uint8:
        cure = "(255 * x).round().astype(np.uint8) if they are in [0, 1]" if array.dtype.kind == "f" else "scale it"
        raise ValueError(f"a picture is uint8 in [0, 255], got an array of {array.dtype}: {cure}")
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        cure = {
            array.shape[:1] == (3,): "; move the channels to the end: np.moveaxis(x, 0, -1)",
            array.shape[2:] == (4,): "; lay transparency on something first: PIL.Image.fromarray(x) does for this",
        }.get(True, "")
        raise ValueError(f"a picture is (H, W, 3) RGB or (H, W) grey of at least one pixel, got {array.shape}{cure}")
    return np.ascontiguousarray(array)


def _decoded(image: Image.Image, what: str) -> NDArray[np.uint8]:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{what} has {image.width}x{image.height} pixels, more than {limit}; make it smaller, or set "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )
    try:
        return np.array(_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # of any kind, depending on which byte is damaged
        raise ValueError(f"{what} can't be read as a picture: {error or repr(error)}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"it has pixels of mode {image.mode}, whose range is not known: save it with 8 or 16 bits")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _in_folder(folder: str) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(parent, name)
