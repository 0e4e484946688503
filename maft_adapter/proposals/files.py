"""Masks made elsewhere, read from files and matched to pictures by name."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..extras import extra
from .base import Proposals, check_picture, check_proposals, check_size, fingerprint
from .convert import from_sam, mask_of, scores_of, stack

_SUFFIXES = (".json", ".png", ".npy", ".npz", "")  # the last one is a folder


class Files:
    """A proposer that reads masks made elsewhere.

    One file holds the masks of many pictures, if it is one of COCO's:

    - COCO's instances: masks are polygons or run-length codes, crowds among them; scores are `score`, where
      annotations have it.
    - COCO's panoptic segmentation: NAME.json, and beside it the folder NAME of PNGs whose colours are the ids.

    Any other file holds the masks of the picture that has its stem, `dog.png` those of `dog.jpg`. Such files lie in one
    folder, or in sub-folders that are called as those of the pictures:

    - STEM.json: records of SAM's automatic generator or of SA-1B (`convert.from_sam`), or COCO's of this picture.
    - STEM.png: an id map of 8 or 16 bits, grey or with a palette: 0 is nothing, every other id is one mask, in
      ascending order, 255 and 65535 among them.
    - STEM.npy: (N, H, W) bool, float in [0, 1] (soft masks) or integers 0 and 1; an id map (H, W) of integers; one
      mask (H, W) bool.
    - STEM.npz: such an array `masks`, and `scores` (N,) and `class_scores` (N, C+1), as `Proposals` has them, or not.
    - a folder STEM of PNGs, one mask each: 0 is outside, one other value inside. They come in the order of their
      numbers; other files in it are left alone.

    Args:
        path: of a file or a folder.

    Raises:
        OSError: no such path.
        ValueError: a file of another kind; a JSON file that is damaged or holds no masks; or the folder of the PNGs of
            a panoptic segmentation is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder, "dog.npy"), np.array([[0, 1], [2, 2]]))
        ...     Files(folder)(np.zeros((2, 2, 3), np.uint8), "dog.jpg").masks.astype(int).tolist()
        [[[0, 1], [0, 0]], [[0, 0], [1, 1]]]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder of masks")
        if self.path.is_file() and self.path.suffix not in _SUFFIXES[:-1]:
            raise ValueError(f"{path} is not a folder, nor one of {', '.join(_SUFFIXES[:-1])}")
        content = _read_json(self.path) if self.path.suffix == ".json" and self.path.is_file() else None
        self._coco = content if isinstance(content, _Coco) else None

    @cached_property
    def settings(self) -> str:
        """The path, and what tells that its files changed since the first look at this."""
        paths = [self.path, *([self._coco.folder] if self._coco and self._coco.folder else [])]
        return f"files: {self.path.resolve()} {' '.join(map(fingerprint, paths))}"

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        """The masks of one picture.

        Args:
            picture: (H, W, 3) uint8 RGB, turned as its EXIF data say.
            name: of its file, with as many of its folders as it takes to tell it from others of this name.

        Raises:
            ValueError: a picture of another form; no name; no masks for this picture, or several files of them; masks
                of another size; or a damaged file, which is named.
        """
        check_picture(picture)
        if not name:
            raise ValueError(f"masks in {self.path} are found by the picture's file name: give name=")
        size = picture.shape[:2]
        if self._coco:
            return self._coco.proposals(name, size)
        path = self._find(PurePath(name))
        content = _read_json(path) if path.suffix == ".json" and path.is_file() else None
        if isinstance(content, _Coco):
            return content.proposals(name, size)
        with _reading(path):
            proposals = _read(path, size) if content is None else from_sam(content, size)
            check_proposals(proposals, size)
        return proposals

    def _find(self, name: PurePath) -> Path:
        """The file or folder of a picture's masks."""
        if self.path.is_file():
            if self.path.stem != name.stem:
                raise ValueError(f"{self.path} holds masks of {self.path.stem!r} alone, none of {str(name)!r}")
            return self.path
        # a/b/dog.jpg: a/b/dog.png, b/dog.png, dog.png
        folders = [part for part in name.parts[:-1] if part not in (name.anchor, "..", ".")]
        for first in range(len(folders) + 1):
            place = self.path.joinpath(*folders[first:])
            paths = {suffix: place / f"{name.stem}{suffix}" for suffix in _SUFFIXES}
            found = [path for suffix, path in paths.items() if (path.is_file() if suffix else path.is_dir())]
            if len(found) > 1:
                raise ValueError(f"{str(name)!r} has several files of masks, keep one: {', '.join(map(str, found))}")
            if found:
                return found[0]
        looked_for = ", ".join(f"{name.stem}{suffix}" for suffix in _SUFFIXES[:-1])
        raise ValueError(f"{self.path} holds no masks of {str(name)!r}: no {looked_for} and no folder {name.stem}")


class _Coco:
    """One of COCO's files: what it holds of each picture."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.images: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by the stems of their names
        self.annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)  # by the image's id
        self.folder = None  # of the PNGs of a panoptic segmentation
        for image in _entries(content, "images", {"id", "file_name", "height", "width"}):
            self.images[PurePath(image["file_name"]).stem].append(image)
        for annotation in _entries(content, "annotations", {"image_id"}):
            self.annotations[annotation["image_id"]].append(annotation)
        if any("segments_info" in annotation for annotation in content["annotations"]):
            _entries(content, "annotations", {"file_name", "segments_info"})
            self.folder = path.with_suffix("")
            if not self.folder.is_dir():
                raise FileNotFoundError(f"it is a panoptic segmentation, but there is no folder {self.folder}")

    def proposals(self, name: str, size: tuple[int, int]) -> Proposals:
        image = self._find(PurePath(name))
        annotations = self.annotations[image["id"]]
        path = self.folder / annotations[0]["file_name"] if self.folder and annotations else self.path
        with _reading(path):
            check_size((image["height"], image["width"]), size)  # polygons don't tell it
            if self.folder and annotations:
                proposals = Proposals(_panoptic(path, annotations))
            else:
                masks = (
                    mask_of(a.get("segmentation"), f"annotation {a.get('id')} of {name!r}", size) for a in annotations
                )
                proposals = Proposals(stack(masks, len(annotations), size), scores_of(annotations, "score"))
            check_proposals(proposals, size)
        return proposals

    def _find(self, name: PurePath) -> dict[str, Any]:
        # One name may hold more folders than the other, but no different ones.
        found = [image for image in self.images.get(name.stem, ()) if _same_end(PurePath(image["file_name"]), name)]
        exact = [image for image in found if PurePath(image["file_name"]).suffix == name.suffix]
        found = exact or found
        if len(found) > 1:
            raise ValueError(f"{self.path} has several pictures {str(name)!r}: {[i['file_name'] for i in found]}")
        if not found:
            raise ValueError(f"{self.path} holds no picture {str(name)!r}")
        return found[0]


def _same_end(a: PurePath, b: PurePath) -> bool:
    pairs = zip(reversed(a.parts[:-1]), reversed(b.parts[:-1]), strict=False)
    return all(one == other for one, other in pairs)


def _entries(content: dict[str, Any], key: str, needed: set[str]) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise ValueError(f"no list {key!r}, as COCO's files have it")
    for i, entry in enumerate(entries):
        missing = needed - entry.keys() if isinstance(entry, dict) else needed
        if missing:
            raise ValueError(f"entry {i} of {key!r} has no {', '.join(sorted(missing))}")
    return entries


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise becomes one error that names it."""
    try:
        yield
    except ModuleNotFoundError:  # an extra that is not installed
        raise
    except Exception as error:
        # Of others, such as a KeyError, the message alone says little.
        kind = "" if isinstance(error, ValueError | TypeError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{path} gives no masks: {kind}{error}") from error


def _read_json(path: Path) -> _Coco | list[Any]:
    """One of COCO's files, or SAM's records of one picture."""
    with _reading(path):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and "images" in content:
            return _Coco(path, content)
        records = content.get("annotations") if isinstance(content, dict) else content
        if not isinstance(records, list):
            raise ValueError("expected a list of SAM's records, SA-1B's 'annotations', or COCO's 'images'")
        return records


def _read(path: Path, size: tuple[int, int]) -> Proposals:
    if path.is_dir():
        files = sorted(path.glob("*.png"), key=lambda file: (len(file.stem), file.stem))
        return Proposals(stack((_read_mask(file, size) for file in files), len(files), size))
    if path.suffix == ".png":
        return Proposals(_masks_of_ids(_read_png(path)))
    content = np.load(path)
    if isinstance(content, np.ndarray):
        return Proposals(_masks_of_array(content))
    with content as arrays:
        if "masks" not in arrays:
            raise ValueError(f"it holds {', '.join(arrays) or 'nothing'}, expected an array 'masks'")
        scores, class_scores = (
            arrays[key].astype(np.float32) if key in arrays else None for key in ("scores", "class_scores")
        )
        return Proposals(_masks_of_array(arrays["masks"]), scores, class_scores)


def _masks_of_array(array: NDArray[Any]) -> NDArray[np.bool_] | NDArray[np.float32]:
    kind = array.dtype.kind
    if array.ndim == 2 and kind in "iu":
        return _masks_of_ids(array)
    if array.ndim == 2 and kind == "b":
        return array[None]
    if array.ndim == 3 and kind == "b":
        return array
    if array.ndim == 3 and kind == "f":
        return array.astype(np.float32)
    if array.ndim == 3 and kind in "iu" and array.min(initial=0) >= 0 and array.max(initial=0) <= 1:
        return array.astype(bool)
    raise ValueError(
        f"it holds an array {array.shape} {array.dtype}; expected masks (N, H, W), bool, float in [0, 1] or integers "
        "0 and 1, or an id map (H, W) of integers"
    )


def _masks_of_ids(ids: NDArray[Any]) -> NDArray[np.bool_]:
    """(H, W) integers -> (N, H, W), one mask for every id but 0."""
    found = np.unique(ids)
    if found.min(initial=0) < 0:
        raise ValueError(f"id {found.min()} is negative; 0 is nothing, masks have ids from 1 on")
    masks: NDArray[np.bool_] = ids == found[found != 0][:, None, None]
    return masks


def _read_png(path: Path) -> NDArray[Any]:
    """(H, W) integers; with a palette, its indices."""
    with extra("pictures"):
        from PIL import Image
    with Image.open(path, formats=["PNG"]) as image:
        if image.mode not in ("1", "L", "P", "I;16", "I"):
            raise ValueError(f"a PNG of mode {image.mode}, expected one grey channel of 8 or 16 bits, or a palette")
        return np.asarray(image).astype(np.int32)


def _read_mask(path: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
    values = _read_png(path)
    check_size(values.shape, size)
    found = np.unique(values)
    if (found != 0).sum() > 1:
        raise ValueError(f"{path.name} has values {found[:4].tolist()} ..., expected 0 and one other: binarize it")
    return values > 0


def _panoptic(path: Path, annotations: list[dict[str, Any]]) -> NDArray[np.bool_]:
    """The segments of COCO's panoptic PNG, (N, H, W), in the order in which the JSON names them."""
    if len(annotations) > 1:
        raise ValueError(f"the JSON has {len(annotations)} annotations of this picture, expected one")
    with extra("pictures"):
        from PIL import Image
    with Image.open(path, formats=["PNG"]) as image:
        if image.mode != "RGB":
            raise ValueError(f"a PNG of mode {image.mode}, expected RGB")
        ids = np.asarray(image) @ np.array([1, 256, 256**2])  # (H, W)
    segments = np.array([segment["id"] for segment in annotations[0]["segments_info"]], np.int64)
    unlike = np.setxor1d(ids[ids != 0], segments)
    if len(unlike):
        raise ValueError(f"ids {unlike[:5].tolist()} are in the PNG or in the JSON alone")
    masks: NDArray[np.bool_] = ids == segments[:, None, None]
    return masks
