"""What is wrong with a data set on disk, found out in seconds: layout, counts, and a sample of its files."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from ..pictures import read_picture
from .datasets import FileDataset, Item, SegmentationDataset

_VOC = {"train": {10582: "", 1464: "those of VOC alone; SegmentationClassAug brings 9118 more"}, "val": {1449: ""}}
_CONTEXT = {"train": {4998: ""}, "val": {5105: ""}}
# Published numbers of pictures, and what there is to say about them.
COUNTS: dict[str, dict[str, dict[int, str]]] = {
    "voc-20": _VOC,
    "voc-20b": _VOC,
    "voc-21": _VOC,
    "coco-stuff": {"train": {118287: ""}, "val": {5000: ""}},
    "ade20k-150": {"train": {20210: ""}, "val": {2000: ""}},
    "ade20k-847": {"train": {25574: ""}, "val": {2000: ""}},
    "context-59": _CONTEXT,
    "context-459": _CONTEXT,
}


class Report(NamedTuple):
    """What was found.

    Attributes:
        facts: in words.
        faults: what is wrong, in words; empty if nothing is.
        sample: the items that were read.
    """

    facts: tuple[str, ...]
    faults: tuple[str, ...]
    sample: tuple[Item, ...]


def check_dataset(dataset: SegmentationDataset, sample: int = 32) -> Report:
    """Look a data set over: the number of its pictures, empty files, and a sample of pictures and labels.

    Args:
        dataset: that `open_dataset` has found.
        sample: how many pictures and label maps to read, evenly spaced; at least 1. All if there are fewer.

    Raises:
        ValueError: `sample` is below 1.

    Example:
        >>> from maft_adapter.data import open_dataset
        >>> report = check_dataset(open_dataset("shapes"), sample=2)
        >>> report.facts[1], report.faults
        ('labels of 2 pictures read: 10 of 40 classes, 0.0 % of the pixels do not count', ())
    """
    if sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")
    faults = []
    published = COUNTS.get(dataset.name, {}).get(dataset.split, {})
    count = f"{len(dataset)} pictures"
    if len(dataset) in published:
        count += ", as published" + (f" ({note})" if (note := published[len(dataset)]) else "")
    elif published:
        faults.append(f"{count}, published are {' or '.join(map(str, published))}")
    if isinstance(dataset, FileDataset):
        if dataset.unlabelled:
            faults.append(f"{len(dataset.unlabelled)} pictures have no label file, such as {dataset.unlabelled[0]}")
        files = [path for pair in dataset.pairs for path in (pair.picture, pair.labels)]
        empty = [path for path in files if os.path.getsize(path) == 0]
        if empty:
            faults.append(f"{len(empty)} files are empty, such as {empty[0]}")

    items = []
    areas = np.zeros(len(dataset.class_names) + 1, np.int64)  # (C + 1,) pixels; the last of what does not count
    for index in np.unique(np.linspace(0, len(dataset) - 1, sample).round().astype(int)).tolist():
        try:
            item = dataset[index]
            read_picture(item.picture)
        except (OSError, ValueError) as error:
            faults.append(str(error))
            continue
        items.append(item)
        labels = np.minimum(item.labels, len(areas) - 1)
        areas += np.bincount(labels.ravel(), minlength=len(areas))
    present, pixels = np.count_nonzero(areas[:-1]), areas.sum()
    share = 100 * areas[-1] / pixels if pixels else 100.0
    if items and not present:
        faults.append(f"no pixel of {len(items)} label maps is of any class: the labels are of something else")
    read = f"labels of {len(items)} pictures read: {present} of {len(dataset.class_names)} classes, "
    return Report((count, f"{read}{share:.1f} % of the pixels do not count"), tuple(faults), tuple(items))
