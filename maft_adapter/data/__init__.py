"""Data sets as users have them on disk, their class names, and their splits into seen and unseen classes.

One interface for all: `open_dataset("ade20k-150", root)` looks where its files lie, in any of the usual layouts, and
gives pictures with label maps and class names. `check` tells what is wrong with them.
"""

from .ade20k_847 import ade20k_847_split, register_ade20k_847
from .classes import ClassList, class_list, read_classes, unseen_classes
from .datasets import DATASETS, Item, SegmentationDataset, open_dataset

__all__ = [
    "DATASETS",
    "ClassList",
    "Item",
    "SegmentationDataset",
    "ade20k_847_split",
    "class_list",
    "open_dataset",
    "read_classes",
    "register_ade20k_847",
    "unseen_classes",
]
