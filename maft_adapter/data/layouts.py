"""Where the files of a data set lie: the layouts that people have, and finding them in a folder.

The first layout of a data set that has the split asked for is read. Those that somebody's script prepared come first,
because published figures were made with them; the downloads as they are come last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..pictures import SUFFIXES

SPLITS = ("train", "val")
_TRAINING = {"train": "training", "val": "validation"}
_YEAR = {"train": "train2017", "val": "val2017"}
# mmsegmentation writes its labels beside those of COCO-Stuff.
_CONVERTED = "_labelTrainIds.png"


class Layout(NamedTuple):
    """One way to lay out a data set.

    Attributes:
        name: whose.
        folders: where people put it, below the folder that holds their data sets.
        images: folders with pictures; the first that exists.
        labels: folders with label files; a file is taken from the first that has it.
        splits: "train" and "val" -> what stands for {split} in these.
        suffix: of label files.
        original: the labels hold the values of the download, not 0..C-1.
        val_list: text files with the names of the split "val", the first that exists; all others are "train".
        image_suffixes: of pictures.
        nested: the files lie in folders of these folders.
    """

    name: str
    folders: tuple[str, ...]
    images: tuple[str, ...]
    labels: tuple[str, ...]
    splits: Mapping[str, str] = dict(zip(SPLITS, SPLITS, strict=True))
    suffix: str = ".png"
    original: bool = False
    val_list: tuple[str, ...] = ()
    image_suffixes: tuple[str, ...] = (".jpg",)
    nested: bool = False


class Found(NamedTuple):
    """A layout in somebody's folder.

    Attributes:
        layout: which.
        folder: the one of its `folders` that exists.
        split: "train" or "val".
        images: the folder with pictures.
        labels: the folders with label files.
        val_list: file, if the layout has one.
    """

    layout: Layout
    folder: Path
    split: str
    images: Path
    labels: tuple[Path, ...]
    val_list: Path | None


class Pair(NamedTuple):
    """A picture and its label file; the name is the picture's path in its folder, without the suffix."""

    name: str
    picture: Path
    labels: Path


_VOC = ("VOCdevkit/VOC2012",)
_VOC_IMAGES = ("JPEGImages", "images_detectron2/{split}")
_VOC_ORIGINAL = Layout(
    "original", _VOC, ("JPEGImages",), ("SegmentationClass", "SegmentationClassAug"), original=True,
    val_list=("ImageSets/Segmentation/val.txt",),
)  # fmt: skip
_CONTEXT = ("VOCdevkit/VOC2010",)
_CONTEXT_LISTS = ("ImageSets/SegmentationContext/val.txt", "pascalcontext_val.txt")
_ADE = ("ADEChallengeData2016", "ade/ADEChallengeData2016")
_ADE_FULL = ("ADE20K_2021_17_01", "ade/ADE20K_2021_17_01")
_STUFF = ("coco-stuff", "coco_stuff164k", "coco/coco_stuff")

# Of COCO, FC-CLIP's lineage reads the 133 panoptic classes, which are none of these.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "voc-20": (
        Layout("detectron2", _VOC, _VOC_IMAGES, ("annotations_detectron2/{split}",)),
        Layout("maft", _VOC, _VOC_IMAGES, ("annotations_ovs/{split}",)),
        _VOC_ORIGINAL,
        Layout("fc-clip", ("pascal_voc_d2",), ("images/{split}",), ("annotations_pascal20/{split}",), _TRAINING),
    ),
    "voc-20b": (
        Layout("detectron2", _VOC, _VOC_IMAGES, ("annotations_detectron2_bg/{split}",)),
        _VOC_ORIGINAL,
        Layout(
            "fc-clip", ("pascal_voc_d2",), ("images/{split}",), ("annotations_pascal21/{split}",), _TRAINING,
            original=True,
        ),
    ),
    "voc-21": (
        _VOC_ORIGINAL,
        Layout(
            "fc-clip", ("pascal_voc_d2",), ("images/{split}",), ("annotations_pascal21/{split}",), _TRAINING,
            original=True,
        ),
    ),
    "coco-stuff": (
        Layout("detectron2", ("coco",), ("{split}",), ("stuffthingmaps_detectron2/{split}",), _YEAR),
        Layout("cat-seg", ("coco-stuff",), ("images/{split}",), ("annotations_detectron2/{split}",), _YEAR),
        # Its labels for training are of the 156 seen classes only.
        Layout(
            "zegformer", ("coco/coco_stuff",), ("images/val2017",), ("annotations_detectron2/{split}",),
            {"val": "val2017_all"},
        ),
        Layout("mmsegmentation", _STUFF, ("images/{split}",), ("annotations/{split}",), _YEAR, _CONVERTED),
        Layout("original", ("coco",), ("{split}",), ("stuffthingmaps/{split}",), _YEAR, original=True),
        Layout("original", _STUFF, ("images/{split}",), ("annotations/{split}",), _YEAR, original=True),
    ),
    "ade20k-150": (
        Layout("detectron2", _ADE, ("images/{split}",), ("annotations_detectron2/{split}",), _TRAINING),
        Layout("original", _ADE, ("images/{split}",), ("annotations/{split}",), _TRAINING, original=True),
    ),
    "ade20k-847": (
        Layout(
            "detectron2", _ADE_FULL, ("images_detectron2/{split}",), ("annotations_detectron2/{split}",), _TRAINING,
            ".tif",
        ),
        # As with COCO-Stuff, but of the 572 seen classes.
        Layout(
            "zegformer", _ADE_FULL, ("images_detectron2_freq/validation",), ("annotations_detectron2_freq/{split}",),
            {"val": "val_all"}, ".tif",
        ),
        Layout(
            "original", _ADE_FULL, ("images/ADE/{split}",), ("images/ADE/{split}",), _TRAINING, "_seg.png",
            original=True, nested=True,
        ),
    ),
    "context-59": (
        Layout("detectron2", _CONTEXT, ("JPEGImages",), ("annotations_detectron2/pc59_{split}",)),
        Layout("maft", _CONTEXT, ("{split}/image", "JPEGImages"), ("annotations_detectron2_ovs/pc59_{split}",)),
        Layout("fc-clip", ("pascal_ctx_d2",), ("images/{split}",), ("annotations_ctx59/{split}",), _TRAINING),
        Layout(
            "mmsegmentation", _CONTEXT, ("JPEGImages",), ("SegmentationClassContext",), original=True,
            val_list=_CONTEXT_LISTS,
        ),
    ),
    "context-459": (
        Layout("detectron2", _CONTEXT, ("JPEGImages",), ("annotations_detectron2/pc459_{split}",), suffix=".tif"),
        Layout(
            "maft", _CONTEXT, ("{split}/image", "JPEGImages"), ("annotations_detectron2_ovs/pc459_{split}",),
            suffix=".tif",
        ),
        Layout("fc-clip", ("pascal_ctx_d2",), ("images/{split}",), ("annotations_ctx459/{split}",), _TRAINING, ".tif"),
        Layout(
            "original", _CONTEXT, ("JPEGImages",), ("trainval",), suffix=".mat", original=True,
            val_list=_CONTEXT_LISTS,
        ),
    ),
    "folder": (
        Layout(
            "with splits", ("",), ("images/{split}",), ("labels/{split}",), original=True, image_suffixes=SUFFIXES,
        ),
        Layout(
            "without splits", ("",), ("images",), ("labels",), dict.fromkeys(SPLITS, ""), original=True,
            image_suffixes=SUFFIXES,
        ),
    ),
}  # fmt: skip
_FOLDER_NAMES = {Path(folder).name for layouts in LAYOUTS.values() for one in layouts for folder in one.folders}


def find_layouts(dataset: str, root: str | os.PathLike[str], split: str) -> list[Found]:
    """All layouts of a data set below a folder that have pictures and labels of a split, in the order of preference.

    Args:
        dataset: a key of `LAYOUTS`.
        root: the folder that holds one's data sets (`$DETECTRON2_DATASETS`, mmsegmentation's `data`), or the data
            set's own folder, or one between the two.
        split: "train" or "val".

    Raises:
        OSError: `root` is missing or no folder.
        ValueError: one layout lies there twice.
    """
    root = Path(root)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder: give the one that holds the data sets, or the data set's own")
    found: list[Found] = []
    for layout in LAYOUTS[dataset]:
        here = [one for folder in _places(layout, root) if (one := _look(layout, folder, split)) is not None]
        if len(here) > 1:
            raise ValueError(
                f"{dataset} lies twice below {root}, in {here[0].folder} and in {here[1].folder}: give one of them"
            )
        found += here
    return found


def _places(layout: Layout, root: Path) -> list[Path]:
    """The folders below `root`, or `root` itself, that may hold the layout; each once."""
    places, own_name = [], root.absolute().name
    for folder in layout.folders:
        parts = Path(folder).parts
        places += [root.joinpath(*parts[i:]) for i in range(len(parts))]
        # A folder of another data set is not this one's, whatever it holds: VOC2010 has a SegmentationClass, too.
        if not parts or own_name == parts[-1] or own_name not in _FOLDER_NAMES:
            places.append(root)
    return list({place.resolve(): place for place in places if place.is_dir()}.values())


def _look(layout: Layout, folder: Path, split: str) -> Found | None:
    if split not in layout.splits:
        return None

    def existing(names: tuple[str, ...]) -> list[Path]:
        paths = [folder / name.format(split=layout.splits[split]) for name in names]
        return [path for path in paths if path.exists()]

    images, labels, lists = existing(layout.images), existing(layout.labels), existing(layout.val_list)
    labels = [path for path in labels if next(_walk(path, (layout.suffix,), layout.nested), None)]
    if not images or not labels or (layout.val_list and not lists):
        return None
    found = Found(layout, folder, split, images[0], tuple(labels), lists[0] if lists else None)
    return found if not lists or _label_files(found) else None


def pair_files(found: Found) -> tuple[list[Pair], list[str]]:
    """The pictures of a split with their label files, in the order of their names, and the names without a label file.

    Pictures of `JPEGImages`, which holds those of every task and split, may have none.

    Raises:
        OSError: a folder or the list of names can't be read.
        ValueError: label files without a picture, names of the list without a label file, or two files of one name.
    """
    labels = _label_files(found)
    if found.val_list is not None and found.split == "val":
        lost = _listed(found.val_list) - labels.keys()
        _refuse(lost, f"names of {found.val_list} have no label file in {found.labels[0]}")
    pictures = _files(found.images, found.layout.image_suffixes, found.layout.nested)
    _refuse(labels.keys() - pictures.keys(), f"label files of {found.labels[0]} have no picture in {found.images}")
    unlabelled = [] if found.images.name == "JPEGImages" else sorted(pictures.keys() - labels.keys())
    return [Pair(name, pictures[name], labels[name]) for name in sorted(labels)], unlabelled


def _label_files(found: Found) -> dict[str, Path]:
    """Those of the split, by their names."""
    labels: dict[str, Path] = {}
    for folder in reversed(found.labels):
        labels.update(_files(folder, (found.layout.suffix,), found.layout.nested))
    if found.val_list is None:
        return labels
    listed = _listed(found.val_list)
    return {name: path for name, path in labels.items() if (name in listed) == (found.split == "val")}


def _listed(val_list: Path) -> set[str]:
    return set(val_list.read_text(encoding="utf-8").split())


def _refuse(names: set[str], what: str) -> None:
    if names:
        raise ValueError(f"{len(names)} {what}, such as {min(names)}: copy or prepare the data set again")


def _files(folder: Path, suffixes: tuple[str, ...], nested: bool) -> dict[str, Path]:
    """Paths by their names."""
    found: dict[str, Path] = {}
    for name, path in _walk(folder, suffixes, nested):
        if name in found:
            raise ValueError(f"two files are named {name}, {found[name]} and {path}: remove one of them")
        found[name] = path
    return found


def _walk(folder: Path, suffixes: tuple[str, ...], nested: bool) -> Iterator[tuple[str, Path]]:
    """The names of files, which are their paths in the folder without the suffix, and their whole paths."""
    for parent, _, files in os.walk(folder):
        inside = "" if parent == str(folder) else Path(parent).relative_to(folder).as_posix() + "/"
        for file in files:
            suffix = next((suffix for suffix in suffixes if file.lower().endswith(suffix.lower())), None)
            if suffix is None or file.startswith(".") or (file.endswith(_CONVERTED) and suffix != _CONVERTED):
                continue
            yield inside + file[: -len(suffix)], Path(parent, file)
        if not nested:
            return
