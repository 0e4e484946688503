"""The 22 data sets of MESS (Blumenstiel et al., NeurIPS 2023) through its own package, which needs no detectron2."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ..extras import extra
from .datasets import FileDataset
from .layouts import Pair


def mess_names() -> list[str]:
    """What `open_dataset` takes after "mess:", such as "floodnet_sem_seg_test"; several of some data sets.

    Raises:
        ModuleNotFoundError: mess-benchmark is not installed, of the extra `mess`.
    """
    return [name for name in _catalogs()[0] if "_sem_seg_" in name]


def open_mess(name: str, root: str | os.PathLike[str], split: str) -> FileDataset:
    """One of MESS's data sets, as its scripts (`python mess/prepare_all_datasets.py`) prepare it.

    Args:
        name: one of `mess_names()`.
        root: the folder that holds them, MESS's `$DETECTRON2_DATASETS`.
        split: must be "val": the part is in the name, and all are for evaluation.

    Raises:
        ModuleNotFoundError: as `mess_names`.
        OSError: the data set is not there.
        ValueError: an unknown name, or another split.
    """
    datasets, metadata = _catalogs()
    if name not in mess_names():
        raise ValueError(f"unknown data set mess:{name}: expected one of {', '.join(mess_names())}")
    if split != "val":
        raise ValueError(f"mess:{name} is for evaluation: split must be 'val', got {split!r}")
    about = metadata.get(name)
    # MESS takes the folder from the environment when it is imported; its loaders take any.
    registered = os.getenv("DETECTRON2_DATASETS", "datasets")
    images, labels = (Path(root, os.path.relpath(p, registered)) for p in (about.image_root, about.sem_seg_root))
    for folder in (images, labels):
        if not folder.is_dir():
            raise NotADirectoryError(f"mess:{name}: {folder} is no folder; MESS's prepare_all_datasets makes it")
    records = datasets[name](str(images), str(labels))
    pairs = [
        Pair(Path(one["file_name"]).stem, Path(one["file_name"]), Path(one["sem_seg_file_name"])) for one in records
    ]
    count = len(about.stuff_classes)
    return FileDataset(
        name=f"mess:{name}",
        split=split,
        class_names=tuple((one,) for one in about.stuff_classes),
        names="MESS",
        unseen=(),
        layout="mess",
        folder=labels,
        pairs=tuple(pairs),
        values=tuple(range(count)),
        void=(about.ignore_label,),
    )


def _catalogs() -> tuple[Any, Any]:
    with extra("mess"):
        import_module("mess.datasets")  # registers them
        # Where detectron2 is installed, the catalogs are its own.
        catalogs = import_module("mess.datasets.TorchvisionDataset")
    return catalogs.DatasetCatalog, catalogs.MetadataCatalog
