"""Reading the 572 / 275 split from the data set's folder; hosts/test_zegformer.py does it with the real lists."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from maft_adapter.data import ade20k_847_split

Lists = dict[int, list[str]]


@pytest.fixture
def lists() -> Lists:
    names = [f"class {i}" for i in range(847)]
    names[3] = "sofa, couch, lounge"
    unseen = [name for i, name in enumerate(names) if i % 3 == 1][:275]
    return {847: names, 572: [name for name in names if name not in unseen], 275: unseen}


def write(root: Path, lists: Lists) -> Path:
    (root / "ADE20K_2021_17_01").mkdir()
    for count, names in lists.items():
        (root / "ADE20K_2021_17_01" / f"ADE20K_{count}_pure_class.json").write_text(json.dumps(names))
    return root


def test_names_and_flags(lists: Lists, tmp_path: Path) -> None:
    names, seen = ade20k_847_split(write(tmp_path, lists))
    assert names == lists[847]
    assert sum(seen) == 572
    assert [name for name, flag in zip(names, seen, strict=True) if not flag] == lists[275]


def swap_two_seen(lists: Lists) -> None:
    lists[572][0], lists[572][1] = lists[572][1], lists[572][0]


def unseen_that_is_seen(lists: Lists) -> None:
    lists[275][0] = lists[572][0]


def one_twice(lists: Lists) -> None:
    lists[847][5] = lists[847][6]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (swap_two_seen, "don't fit each other"),
        (unseen_that_is_seen, "don't fit each other"),
        (one_twice, "must list 847 different class names"),
        (lambda lists: lists[275].pop(), "must list 275 different class names, it holds 274"),
    ],
)
def test_lists_that_contradict_each_other(
    lists: Lists, tmp_path: Path, spoil: Callable[[Lists], object], message: str
) -> None:
    spoil(lists)
    with pytest.raises(ValueError, match=message):
        ade20k_847_split(write(tmp_path, lists))


@pytest.mark.parametrize("missing", [847, 572, 275])
def test_missing_list_names_the_script(lists: Lists, tmp_path: Path, missing: int) -> None:
    del lists[missing]
    with pytest.raises(FileNotFoundError, match=rf"ADE20K_{missing}_pure_class.json does not exist; .*json\.py"):
        ade20k_847_split(write(tmp_path, lists))
