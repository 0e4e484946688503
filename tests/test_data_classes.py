"""Class lists: the shipped ones against each other and against what is published, and anybody's own files."""

import json
from pathlib import Path

import pytest

from maft_adapter.data import class_list, read_classes, unseen_classes
from maft_adapter.data.classes import ClassList

COUNTS = {
    "voc-20": 20, "voc-20b": 21, "voc-21": 21, "coco-stuff": 171, "ade20k-150": 150, "ade20k-847": 847,
    "context-59": 59, "context-459": 459,
}  # fmt: skip


@pytest.mark.parametrize("version", ["plain", "prompted"])
@pytest.mark.parametrize("name", COUNTS)
def test_as_many_as_the_name_says_with_their_origin(name: str, version: str) -> None:
    assert len(class_list(name, version).names) == COUNTS[name]
    path = Path(__file__).parent.parent / "maft_adapter/data/names" / f"{name}.{version}.txt"
    if path.exists():
        assert "github.com/" in path.read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("name", COUNTS)
def test_both_versions_name_the_same_classes_in_the_same_order(name: str) -> None:
    """The two come from different repositories: a list out of order has hardly a name in common with the other."""
    plain, prompted = class_list(name), class_list(name, "prompted")
    assert plain.values == prompted.values
    together = [
        {one.replace(" ", "") for one in a} & {one.replace(" ", "") for one in b}
        for a, b in zip(plain.names, prompted.names, strict=True)
    ]
    assert sum(map(bool, together)) >= 0.93 * len(together)


def test_values_of_the_downloads() -> None:
    def value(dataset: str, name: str) -> int:
        classes = class_list(dataset)
        return classes.values[[names[0] for names in classes.names].index(name)]

    assert [value("coco-stuff", name) for name in ("person", "stop sign", "banner", "wood")] == [0, 12, 91, 181]
    assert [value("ade20k-847", name) for name in ("wall", "person", "stove")] == [2978, 1831, 2598]
    assert [value("voc-20b", name) for name in ("aeroplane", "tvmonitor", "background")] == [1, 20, 0]
    assert class_list("voc-21").names[0][0] == class_list("voc-20b").names[20][0] == "background"
    assert [value("context-459", name) for name in ("accordion", "aeroplane", "table", "wool")] == [1, 2, 397, 459]
    assert class_list("context-59").values == tuple(range(1, 60))
    assert class_list("ade20k-150").values == tuple(range(1, 151))


def test_the_59_classes_of_context_are_those_of_the_459_that_every_conversion_takes() -> None:
    taken = [
        2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158,
        159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366,
        368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
    ]  # fmt: skip
    many = class_list("context-459")
    names = [many.names[many.values.index(value)][0] for value in taken]
    assert [name if name != "table" else "diningtable" for name in names] == [
        one[0] for one in class_list("context-59").names
    ]


def test_splits() -> None:
    def unseen(dataset: str) -> set[str]:
        return {class_list(dataset).names[k][0] for k in unseen_classes(dataset)}

    assert unseen("voc-20") == {"pottedplant", "sheep", "sofa", "train", "tvmonitor"}
    assert unseen("coco-stuff") == {
        "frisbee", "skateboard", "cardboard", "carrot", "scissors", "suitcase", "giraffe", "cow", "road",
        "wall-concrete", "tree", "grass", "river", "clouds", "playingfield",
    }  # fmt: skip
    assert len(unseen_classes("ade20k-847")) == 275
    assert "adding machine" in unseen("ade20k-847") and "wall" not in unseen("ade20k-847")
    assert unseen_classes("ade20k-150") == unseen_classes("context-59") == ()


FORMS = {
    "index.txt": "0:invalid_class_id\n1:sofa,couch\n\n4: cat \n",
    "comma.txt": "# mine\nsofa, couch\ncat\n",
    "semicolon.txt": "sofa; couch\r\ncat\r\n",
    "list.json": json.dumps(["sofa, couch", "cat"]),
    "bom.txt": "\ufeffsofa,couch\ncat",
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_people_have(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(FORMS[name], encoding="utf-8")
    expected = (("sofa", "couch"), ("cat",))
    assert read_classes(path) == ClassList(expected, (1, 4) if name == "index.txt" else (0, 1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "names no class"),
        ("a.txt", b"# only words about them\n", "names no class"),
        ("a.txt", b"0:invalid_class_id\n", "names no class"),
        ("a.txt", b"1:cat\ndog\n", "either all lines begin with `index:` or none does, got 'dog'"),
        ("a.txt", b"1:cat\n1:dog\n", r"\('cat',\) and \('dog',\) have the same index"),
        ("a.txt", b"cat,kitten\nkitten,cat\n", "have the same names"),
        ("a.txt", b"cat\n,\n", "',' has an empty name"),
        ("a.txt", b"1:\n", "'1:' has an empty name"),
        ("a.txt", b"\xff\xfe\x00", "is no list of class names"),
        ("a.json", b"[1, 2]", "must hold a list of strings"),
        ("a.json", b'{"cat": 1}', "must hold a list of strings"),
        ("a.json", b'["cat"', "is no list of class names"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_classes(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize("arguments", [("ade20k-150", "short"), ("lvis",), ("voc-20", "unseen")])
def test_unknown_lists(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"there are no .* names of"):
        class_list(*arguments)
