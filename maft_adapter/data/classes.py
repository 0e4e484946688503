"""Class names with their synonyms, out of files: those of the data sets in `names/`, and anybody's own."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

_NAMES = Path(__file__).parent / "names"


class ClassList(NamedTuple):
    """The C classes of a data set, in the order of their indices.

    Attributes:
        names: of each class, its synonyms, the usual name first, as `text_classifier` takes them.
        values: (C,) what stands for each class in the label files that were not converted to 0..C-1.
    """

    names: tuple[tuple[str, ...], ...]
    values: tuple[int, ...]


def read_classes(path: str | os.PathLike[str]) -> ClassList:
    """Read a file of class names.

    Three forms are known: lines `index:name,synonym` as in FC-CLIP's lineage, where `invalid_class_id` is no class and
    the index is the value in label files; lines `name, synonym` or `name; synonym` as in mmsegmentation's, and JSON
    lists of such strings as in CAT-Seg's, whose values are 0..C-1. Empty lines and those that begin with `#` are left
    out.

    Args:
        path: of the file, UTF-8; JSON if its name ends in `.json`.

    Returns:
        The classes in the order of the file.

    Raises:
        OSError: the file can't be read.
        ValueError: it is none of these, or has no class, an empty name, one index for two classes, or two classes with
            the same names.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "classes.txt")
        ...     _ = path.write_text("0:invalid_class_id\\n1:sofa,couch\\n7:cat\\n")
        ...     read_classes(path)
        ClassList(names=(('sofa', 'couch'), ('cat',)), values=(1, 7))
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        rows = json.loads(text) if str(path).endswith(".json") else text.splitlines()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no list of class names: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
        raise ValueError(f"{path} must hold a list of strings, one a class")
    if not str(path).endswith(".json"):
        rows = [row.strip() for row in rows if row.strip() and not row.startswith("#")]

    indexed = [re.fullmatch(r"(\d+):(.*)", row) for row in rows]
    if any(indexed) and not all(indexed):
        row = rows[indexed.index(None)]
        raise ValueError(f"{path}: either all lines begin with `index:` or none does, got {row!r}")
    names: list[tuple[str, ...]] = []
    values: list[int] = []
    for number, (row, match) in enumerate(zip(rows, indexed, strict=True)):
        value, listed = (int(match[1]), match[2]) if match else (number, row)
        if listed.strip() == "invalid_class_id":
            continue
        synonyms = tuple(dict.fromkeys(name.strip() for name in re.split("[,;]", listed)))
        if not all(synonyms):
            raise ValueError(f"{path}: {row!r} has an empty name")
        names.append(synonyms)
        values.append(value)
    if not names:
        raise ValueError(f"{path} names no class")
    for kind, given in (("index", values), ("names", [frozenset(synonyms) for synonyms in names])):
        first: dict[object, int] = {}
        for i, key in enumerate(given):
            if first.setdefault(key, i) != i:
                raise ValueError(f"{path}: {names[first[key]]} and {names[i]} have the same {kind}; change one")
    return ClassList(tuple(names), tuple(values))


def class_list(dataset: str, version: str = "plain") -> ClassList:
    """The classes of a data set, as one of the two lists that published figures use.

    Args:
        dataset: such as "ade20k-150"; see `maft_adapter.data.DATASETS`.
        version: "plain", one or few names a class as in CAT-Seg and MAFT, or "prompted", the longer lists of FC-CLIP's
            lineage, made by prompt engineering. The two give different figures.

    Raises:
        ValueError: there is no such list.

    Example:
        >>> class_list("ade20k-150", "prompted").names[0]
        ('wall', 'walls', 'brick wall', 'stone wall', 'interior wall')
    """
    path = _NAMES / f"{dataset}.{version}.txt"
    if version not in ("plain", "prompted") or not path.is_file():
        raise ValueError(f"there are no {version!r} names of {dataset!r}: give 'plain', 'prompted' or a file of names")
    return read_classes(path)


def unseen_classes(dataset: str) -> tuple[int, ...]:
    """Indices of the classes that the zero-shot setting of a data set keeps from training; empty without one.

    Example:
        >>> [class_list("voc-20").names[k][0] for k in unseen_classes("voc-20")]
        ['pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor']
    """
    path = _NAMES / f"{dataset}.unseen.txt"
    if not path.is_file():
        return ()
    values = class_list(dataset).values
    return tuple(sorted(values.index(value) for value in read_classes(path).values))
