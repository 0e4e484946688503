"""Masks made elsewhere, read from files and matched to pictures by name."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..extras import extra
from .base import Proposals, check_picture, check_proposals, check_room, check_size, fingerprint
from .convert import from_sam, mask_of, scores_of, stack

_SUFFIXES = (".json", ".png", ".npy", ".npz", "")  # the last one is a folder


class Files:
    """A proposer that reads masks made elsewhere.

    One file holds the masks of many pictures, if it is one of COCO's:

    - COCO's instances: masks are polygons or run-length codes, crowds among them; scores are `score`, where
      annotations have it.
    - COCO's panoptic segmentation: NAME.json, and beside it the folder NAME of PNGs whose colours are the ids.

    Any other file holds the masks of the picture that has its stem, `dog.png` those of `dog.jpg`. Such files lie in one
    folder, or in sub-folders that are called as those of the pictures. Masks are one picture's: a second one that would
    get the same is refused.

    - STEM.json: records of SAM's automatic generator or of SA-1B (`convert.from_sam`), or COCO's of this picture.
    - STEM.png: an id map of 8 or 16 bits, grey or with a palette: 0 is nothing, every other id is one mask, in
      ascending order, 255 and 65535 among them.
    - STEM.npy: (N, H, W) bool, float in [0, 1] (soft masks) or integers 0 and 1; an id map (H, W) of integers; one
      mask (H, W) bool.
    - STEM.npz: such an array `masks`, and `scores` (N,) and `class_scores` (N, C+1), as `Proposals` has them, or not.
    - a folder STEM of PNGs, at least one, one mask each: 0 is outside, one other value inside. They come in the order
      of their numbers; other files in it are left alone.

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
        self._fingerprint = fingerprint(self.path) if self.path.is_file() else ""  # of what is read now
        content = _read_json(self.path) if self.path.suffix == ".json" and self.path.is_file() else None
        self._coco = content if isinstance(content, _Coco) else None
        self._owners: dict[str, str] = {}  # whose masks they are

    @property
    def settings(self) -> str:
        """The path; what tells that the masks of a picture changed is their `version`."""
        return f"files: {self.path.resolve()}"

    def version(self, name: str) -> str:
        """The file of a picture's masks, and what tells that it changed.

        Args:
            name: as a call takes it.

        Raises:
            ValueError: no name, or there are no masks for this picture, several files of them, or another picture's.
        """
        masks, path, _ = self._locate(name)
        return f"{masks} {self._fingerprint} {fingerprint(path)}"

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        """The masks of one picture.

        Args:
            picture: (H, W, 3) uint8 RGB, turned as its EXIF data say.
            name: of its file, with as many of its folders as it takes to tell it from others of this name.

        Raises:
            ValueError: a picture of another form; no name; no masks for this picture, several files of them, or those
                of another picture; masks of another size, or of more than 4 billion pixels; or a damaged file, which
                is named.
        """
        check_picture(picture)
        size = picture.shape[:2]
        _, path, entry = self._locate(name)
        if self._coco and entry:
            return self._coco.proposals(entry, size)
        content = _read_json(path) if path.suffix == ".json" and path.is_file() else None
        if isinstance(content, _Coco):
            return content.proposals(content.find(PurePath(name)), size)
        with _reading(path):
            proposals = _read(path, size) if content is None else from_sam(content, size)
            check_proposals(proposals, size)
        return proposals

    def _locate(self, name: str) -> tuple[str, Path, dict[str, Any] | None]:
        """A name for a picture's masks, what holds them and, in one of COCO's files, the picture's entry."""
        if not name:
            raise ValueError(f"masks in {self.path} are found by the picture's file name: give name=")
        if self._coco:
            entry = self._coco.find(PurePath(name))
            masks, path = entry["file_name"], self._coco.holder(entry)
        else:
            entry, path = None, self._find(PurePath(name))
            masks = str(path.relative_to(self.path))
        owner = self._owners.setdefault(masks, os.path.abspath(name))
        if owner != os.path.abspath(name):
            raise ValueError(
                f"{path} holds the masks of {owner}, and can't hold those of {name!r}, too: lay masks of pictures of "
                "one name in sub-folders that are called as theirs"
            )
        return masks, path, entry

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
        unknown = self.annotations.keys() - {image["id"] for image in content["images"]}
        if unknown:
            known = "which is the id of none of its 'images'"
            raise ValueError(f"annotations are of the picture with the id {min(unknown, key=str)!r}, {known}")

    def holder(self, entry: dict[str, Any]) -> Path:
        """The file that holds the masks of a picture."""
        annotations = self.annotations.get(entry["id"])
        return self.folder / annotations[0]["file_name"] if self.folder and annotations else self.path

    def proposals(self, entry: dict[str, Any], size: tuple[int, int]) -> Proposals:
        """The masks of a picture."""
        annotations, name = self.annotations.get(entry["id"], []), entry["file_name"]
        path = self.holder(entry)
        with _reading(path):
            check_size((entry["height"], entry["width"]), size)  # polygons don't tell it
            if self.folder and annotations:
                proposals = Proposals(_panoptic(path, annotations, size))
            else:
                masks = (
                    mask_of(a.get("segmentation"), f"annotation {a.get('id')} of {name!r}", size) for a in annotations
                )
                proposals = Proposals(stack(masks, len(annotations), size), scores_of(annotations, "score"))
            check_proposals(proposals, size)
        return proposals

    def find(self, name: PurePath) -> dict[str, Any]:
        """The entry of a picture."""
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
        found = (file for file in path.iterdir() if file.suffix.lower() == ".png")
        files = sorted(found, key=lambda file: (len(file.stem), file.stem))
        if not files:
            raise ValueError("the folder holds no PNG; for a picture without masks, write [] to a .json file instead")
        return Proposals(stack((_read_mask(file, size) for file in files), len(files), size))
    if path.suffix == ".png":
        return Proposals(_masks_of_ids(_read_png(path), size))
    if path.suffix == ".npy":
        with path.open("rb") as file:
            _check_array(file)
        return Proposals(_masks_of_array(np.load(path), size))
    with np.load(path) as arrays:
        if "masks" not in arrays:
            raise ValueError(f"it holds {', '.join(arrays) or 'nothing'}, expected an array 'masks'")
        with arrays.zip.open("masks.npy") as file:
            _check_array(file)
        scores, class_scores = (
            arrays[key].astype(np.float32) if key in arrays else None for key in ("scores", "class_scores")
        )
        return Proposals(_masks_of_array(arrays["masks"], size), scores, class_scores)


def _check_array(file: IO[bytes]) -> None:
    """`check_room` of what the header of an npy file promises, before numpy makes room for it."""
    header = np.lib.format
    read = header.read_array_header_1_0 if header.read_magic(file) == (1, 0) else header.read_array_header_2_0
    check_room(read(file)[0])


def _masks_of_array(array: NDArray[Any], size: tuple[int, int]) -> NDArray[np.bool_] | NDArray[np.float32]:
    kind = array.dtype.kind
    if array.ndim == 2 and kind in "iu":
        return _masks_of_ids(array, size)
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


def _masks_of_ids(ids: NDArray[Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W) integers -> (N, H, W), one mask for every id but 0."""
    check_size(ids.shape, size)
    found = np.unique(ids)
    if found.min(initial=0) < 0:
        raise ValueError(f"id {found.min()} is negative; 0 is nothing, masks have ids from 1 on")
    found = found[found != 0]
    check_room((len(found), *size))
    masks: NDArray[np.bool_] = ids == found[:, None, None]
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


def _panoptic(path: Path, annotations: list[dict[str, Any]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The segments of COCO's panoptic PNG, (N, H, W), in the order in which the JSON names them."""
    if len(annotations) > 1:
        raise ValueError(f"the JSON has {len(annotations)} annotations of this picture, expected one")
    with extra("pictures"):
        from PIL import Image
    with Image.open(path, formats=["PNG"]) as image:
        if image.mode != "RGB":
            raise ValueError(f"a PNG of mode {image.mode}, expected RGB")
        ids = np.asarray(image) @ np.array([1, 256, 256**2])  # (H, W)
    check_size(ids.shape, size)
    segments = np.array([segment["id"] for segment in annotations[0]["segments_info"]], np.int64)
    unlike = np.setxor1d(ids[ids != 0], segments)
    if len(unlike):
        raise ValueError(f"ids {unlike[:5].tolist()} are in the PNG or in the JSON alone")
    check_room((len(segments), *size))
    masks: NDArray[np.bool_] = ids == segments[:, None, None]
    return masks
