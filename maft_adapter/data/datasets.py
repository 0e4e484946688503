"""Data sets for training and evaluation: pictures, label maps and class names, the same way for all of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from .classes import ClassList, class_list, read_classes, unseen_classes
from .labels import lay_on_picture, read_values, to_classes
from .layouts import LAYOUTS, SPLITS, Pair, find_layouts, pair_files

# Worlds that are drawn, and what they leave out: a half of the things and materials, or nothing.
_WORLDS = {
    "shapes": (),
    "shapes-a": ("heart", "ring", "moon", "brick", "wood"),
    "shapes-b": ("ball", "box", "star", "grass", "sand", "water"),
    "shapes-nouns": (),
}
DATASETS = (*LAYOUTS, *_WORLDS)

# Values of original labels that stand for no class; None: all that do not.
_VOID: dict[str, tuple[int, ...] | None] = {
    "voc-20": (0, 255),
    "voc-20b": (255,),
    "voc-21": (255,),
    "coco-stuff": (255,),
    "ade20k-150": (0,),
    "ade20k-847": None,
    "context-59": (0,),
    "context-459": (0,),
    "folder": (255, 65535),
}
# How many scenes, and the first entries of their seeds; no scene serves twice.
_SCENES = {"train": 480, "val": 200}
_SEEDS = {
    ("shapes", "train"): 9_000_000, ("shapes", "val"): 8_000_000, ("shapes-a", "train"): 41_000_000,
    ("shapes-a", "val"): 42_000_000, ("shapes-b", "train"): 43_000_000, ("shapes-b", "val"): 44_000_000,
    ("shapes-nouns", "train"): 45_000_000, ("shapes-nouns", "val"): 46_000_000,
}  # fmt: skip


class Item(NamedTuple):
    """One picture with its ground truth.

    Attributes:
        picture: a file, to be read with `maft_adapter.pictures.read_picture`, or (H, W, 3) uint8 RGB.
        labels: (H, W) class indices 0..C-1 or the data set's `ignore_index`, uint8 or uint16, on the picture as
            `read_picture` gives it.
        name: the picture's path in its folder of pictures, such as "ADE_val_00000001.jpg"; different for each.
    """

    picture: Path | NDArray[np.uint8]
    labels: NDArray[np.uint8] | NDArray[np.uint16]
    name: str

    @property
    def file(self) -> str:
        """What proposers know it by, different in every split: its file's path, or the name of one that is drawn."""
        return str(self.picture) if isinstance(self.picture, Path) else self.name


@dataclass(frozen=True)
class SegmentationDataset(Dataset[Item]):
    """Pictures with label maps; `len(dataset)`, and `dataset[i]` reads one when it is asked for.

    Attributes:
        name: what `open_dataset` calls it, such as "ade20k-150".
        split: "train" or "val".
        class_names: C tuples of synonyms, as `text_classifier` takes them.
        names: which class names these are: "plain", "prompted", or a file.
        unseen: indices of the classes that the zero-shot setting keeps from training; empty if it has none.
        layout: whose layout the files have.
        folder: that they lie in; None if there are none.
    """

    name: str
    split: str
    class_names: tuple[tuple[str, ...], ...] = field(repr=False)
    names: str
    unseen: tuple[int, ...] = field(repr=False)
    layout: str
    folder: Path | None

    @property
    def seen(self) -> tuple[int, ...]:
        """Indices of all other classes."""
        return tuple(k for k in range(len(self.class_names)) if k not in self.unseen)

    @property
    def ignore_index(self) -> int:
        """The label of pixels that don't count: 255, or 65535 with more than 255 classes."""
        return 255 if len(self.class_names) <= 255 else 65535

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Item:
        """The item, read now.

        Raises:
            IndexError: there is none of that index.
            OSError: a file is missing or can't be opened.
            ValueError: a label file that is damaged, in colour, of another size than its picture, or with values that
                stand for no class; the file is named.
        """
        raise NotImplementedError

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class FileDataset(SegmentationDataset):
    """A data set on disk.

    Attributes:
        pairs: the files.
        values: (C,) what stands for each class in the label files.
        void: the values there that don't count; None: all that stand for no class.
        unlabelled: names of the pictures without a label file, which are left out.
    """

    pairs: tuple[Pair, ...] = field(repr=False)
    values: tuple[int, ...] = field(repr=False)
    void: Collection[int] | None
    unlabelled: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Item:
        pair = self.pairs[index]
        values = read_values(pair.labels)
        if values.dtype == np.uint8 and max(self.values) > 255:
            raise ValueError(f"{pair.labels} has 8 bits, its values go up to {max(self.values)}: prepare it again")
        try:
            labels = to_classes(values, self.values, self.void, self.ignore_index)
        except ValueError as error:
            raise ValueError(f"{pair.labels}: {error}") from None
        labels = lay_on_picture(labels, pair.picture, pair.labels)
        return Item(pair.picture, labels, pair.name + pair.picture.suffix)


@dataclass(frozen=True)
class ShapesDataset(SegmentationDataset):
    """The embedded world, or another that its CLIP has words for: scenes that are drawn when they are asked for.

    Attributes:
        seed: of the scenes; different ones share none.
        values: (C,) classes of `maft_adapter.shapes.CLASSES` -> these, by index.
        exclude: names of classes that do not appear.
    """

    seed: int
    values: tuple[int, ...] = field(repr=False)
    exclude: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        return _SCENES[self.split]

    def __getitem__(self, index: int) -> Item:
        from ..shapes import render_scene

        number = range(len(self))[index]
        world = self.name.partition(":")[0]
        scene = render_scene((_SEEDS[world, self.split], self.seed, number), exclude=self.exclude)
        return Item(scene.image, np.array(self.values, np.uint8)[scene.labels], f"{self.split}-{number}")


def open_dataset(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: str = "val",
    *,
    names: str | os.PathLike[str] = "plain",
    layout: str | None = None,
) -> SegmentationDataset:
    """Find a data set on disk, in whichever layout it has.

    Of several layouts the first that has the split is taken, in the order of `maft_adapter.data.layouts.LAYOUTS`: what
    somebody's script prepared before the download as it is; only FC-CLIP's copy of VOC 2012, which has a seventh of the
    training part, comes last. `maft-adapter data check` lists all that are there.

    Args:
        name: one of `DATASETS`:
            "voc-20" (unseen: 5), "voc-20b" (what is none of them is the last class), "voc-21" (background is class 0),
            "coco-stuff" (171, unseen: 15), "ade20k-150", "ade20k-847" (unseen: 275), "context-59", "context-459";
            "folder": `root` holds `images/` and `labels/`, each with or without `train/` and `val/` in it, and label
            files (PNG) of the same names, with the indices of the class file or 255 or 65535, which don't count;
            "shapes" or "shapes:SEED": the embedded world, which needs no `root`. "shapes-a" (balls, boxes and stars on
            grass, sand and water) and "shapes-b" (what is left) share no noun, "shapes-nouns" has no colours and tones;
            "mess:NAME": one of MESS's sets, see `maft_adapter.data.mess`.
        root: the folder that holds the data sets, or the data set's own.
        split: "train" or "val".
        names: "plain" or "prompted", see `class_list`, or a file of class names, see `read_classes`; "folder" needs a
            file, and uses `root/classes.txt` where none is given.
        layout: take this one, such as "fc-clip".

    Returns:
        The data set; no file has been opened yet.

    Raises:
        OSError: `root` is missing or no folder.
        ValueError: an unknown name, split or layout; `names` or `layout` for a drawn world or one of MESS's sets;
            nothing was found; one layout lies there twice; label files without pictures; class names that are not as
            many as the data set's classes.

    Warns:
        UserWarning: pictures without a label file are left out.

    Example:
        >>> shapes = open_dataset("shapes")
        >>> len(shapes), shapes[0].labels.shape, shapes.class_names[0], len(shapes.unseen)
        (200, (96, 96), ('red ball',), 8)
    """
    kind, _, detail = name.partition(":")
    if kind not in (*DATASETS, "mess") or (detail and kind not in (*_WORLDS, "mess")):
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(DATASETS)}, shapes:SEED or mess:NAME")
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    if kind in (*_WORLDS, "mess") and (names != "plain" or layout is not None):
        raise ValueError(f"{name} has one list of names and no layout: leave names and layout out")
    if kind in _WORLDS:
        return _open_shapes(name, detail, split)
    if root is None:
        raise ValueError(f"{name} needs root, the folder that it lies in")
    if kind == "mess":
        from .mess import open_mess

        return open_mess(detail, root, split)

    all_found = find_layouts(name, root, split)
    found = [one for one in all_found if layout in (None, one.layout.name)]
    if not found:
        known = ", ".join(dict.fromkeys(one.name for one in LAYOUTS[name]))
        there = ", ".join(one.layout.name for one in all_found) or "none"
        raise ValueError(
            f"no {split} part of {name} below {root} in the layout {layout or 'of any kind'}; known are {known}, there "
            f"is {there}: `maft-adapter data check` tells what is where"
        )
    classes, version = _classes(name, Path(root), names)
    pairs, unlabelled = pair_files(found[0])
    if unlabelled:
        warnings.warn(
            f"{len(unlabelled)} pictures of {found[0].images} have no label file and are left out, such as "
            f"{unlabelled[0]}",
            stacklevel=2,
        )
    original = found[0].layout.original
    return FileDataset(
        name=name,
        split=split,
        class_names=classes.names,
        names=version,
        unseen=unseen_classes(name),
        layout=found[0].layout.name,
        folder=found[0].folder,
        pairs=tuple(pairs),
        values=classes.values if original else tuple(range(len(classes.names))),
        void=_VOID[name] if original else (255, 65535) if len(classes.names) <= 255 else (65535,),
        unlabelled=tuple(unlabelled),
    )


def _classes(name: str, root: Path, names: str | os.PathLike[str]) -> tuple[ClassList, str]:
    if name == "folder":
        path = root / "classes.txt" if names == "plain" else Path(names)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: a folder of pictures needs a file of class names")
        return read_classes(path), str(path)
    if names in ("plain", "prompted"):
        return class_list(name, str(names)), str(names)
    own, known = read_classes(names), class_list(name)
    if len(own.names) != len(known.names):
        raise ValueError(f"{names} names {len(own.names)} classes, {name} has {len(known.names)}")
    return ClassList(own.names, known.values), str(names)


def _open_shapes(name: str, seed: str, split: str) -> ShapesDataset:
    from ..shapes import CLASSES, UNSEEN

    if seed and not seed.isdecimal():
        raise ValueError(f"{name}: the seed must be a number from 0 on")
    world = name.partition(":")[0]
    kept = [one for one in CLASSES if one.split()[1] not in _WORLDS[world]]
    called = {one: one.split()[1] if world == "shapes-nouns" else one for one in kept}
    names = list(dict.fromkeys(called.values()))
    return ShapesDataset(
        name=name,
        split=split,
        class_names=tuple((one,) for one in names),
        names="plain",
        unseen=tuple(names.index(one) for one in UNSEEN) if world == "shapes" else (),
        layout="drawn",
        folder=None,
        seed=int(seed or 0),
        values=tuple(names.index(called[one]) if one in called else 255 for one in CLASSES),
        exclude=tuple(one for one in CLASSES if one not in kept),
    )
