"""ADE20K with all 847 classes, 572 of them seen and 275 unseen: the split of ZegFormer, for every other host.

A class is unseen if ZegFormer's list marks it "rare", which it does with those of at most 10 images. What hosts are
given is read from the data set's folder, where ZegFormer's script `create_ade-frequency_json.py`, one of those that
prepare the labels, writes it: so it fits these labels. `open_dataset` needs no such files.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

FOLDER = "ADE20K_2021_17_01"
IGNORE = 65535  # labels are 16-bit TIFFs


def ade20k_847_split(root: str | os.PathLike[str]) -> tuple[list[str], list[bool]]:
    """The class names in the order of the labels, and which of them are seen.

    Args:
        root: the folder that holds `ADE20K_2021_17_01`, prepared with ZegFormer's scripts.

    Returns:
        847 names, synonyms separated by ", " as in ADE20K, and 847 flags, of which 572 are True.

    Raises:
        FileNotFoundError: a class list is missing.
        ValueError: the lists are not 847 classes, of which 572 are seen and the other 275 unseen.
    """
    lists = {}
    for count in (847, 572, 275):
        path = Path(root, FOLDER, f"ADE20K_{count}_pure_class.json")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; ZegFormer's datasets/ade20k-full-frequency-split/create_ade-frequency_json.py "
                f"writes it (into datasets/{FOLDER} of the folder where it is started)"
            )
        lists[count] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(lists[count], list) or len(set(lists[count])) != count or len(lists[count]) != count:
            raise ValueError(f"{path} must list {count} different class names, it holds {len(lists[count])} entries")
    names: list[str] = lists[847]
    unseen = set(lists[275])
    if [name for name in names if name not in unseen] != lists[572]:
        raise ValueError(
            f"the class lists in {Path(root, FOLDER)} don't fit each other: the 847 classes without the 275 unseen "
            "ones must be the 572 seen ones in the same order; write all of them again with ZegFormer's script"
        )
    return names, [name not in unseen for name in names]


def register_ade20k_847(root: str | os.PathLike[str] | None = None) -> tuple[str, str]:
    """Register the zero-shot split with detectron2's catalogs, for hosts other than ZegFormer, which has it built in.

    `ade20k_full_base_sem_seg_train` has the training images with labels of the 572 seen classes, 0..571;
    `ade20k_full_sem_seg_val` the validation images with labels of all 847. 65535 is ignored in both. The metadata are
    those that ZSSeg and FreeSeg read: `trainable_flag` for the ensemble, `evaluation_set` for the seen and unseen
    figures of their evaluators; and ZegFormer's `val_extra_classes`. Images and labels are looked for when a loader
    asks for them, in the folders that ZegFormer's preparation makes. A second call changes nothing.

    Args:
        root: the folder that holds `ADE20K_2021_17_01`; by default `DETECTRON2_DATASETS`, or `datasets`, as detectron2.

    Returns:
        The names of both data sets.

    Raises:
        FileNotFoundError, ValueError: as `ade20k_847_split`; nothing has been registered then.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import load_sem_seg

    root = os.getenv("DETECTRON2_DATASETS", "datasets") if root is None else root
    names, seen = ade20k_847_split(root)
    folder = Path(root, FOLDER)
    seen_names = [name for name, flag in zip(names, seen, strict=True) if flag]
    unseen_names = [name for name, flag in zip(names, seen, strict=True) if not flag]
    flags = {
        "trainable_flag": [int(flag) for flag in seen],
        "evaluation_set": {"base": [i for i, flag in enumerate(seen) if flag]},
        "val_extra_classes": unseen_names,
    }
    train, val = "ade20k_full_base_sem_seg_train", "ade20k_full_sem_seg_val"
    for dataset, images, labels, metadata in (
        (train, "training", "training_seen", {"stuff_classes": seen_names}),
        (val, "validation", "val_all", {"stuff_classes": names, **flags}),
    ):
        if dataset in DatasetCatalog:
            continue
        image_root = str(folder / "images_detectron2_freq" / images)
        label_root = str(folder / "annotations_detectron2_freq" / labels)
        load = functools.partial(load_sem_seg, label_root, image_root, gt_ext="tif", image_ext="jpg")
        DatasetCatalog.register(dataset, load)
        MetadataCatalog.get(dataset).set(
            image_root=image_root,
            sem_seg_root=label_root,
            evaluator_type="sem_seg",
            ignore_label=IGNORE,
            **metadata,
        )
    return train, val
