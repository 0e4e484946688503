"""`maft-adapter data check`, on small trees and on trees that look as large as the real ones."""

import base64
import html
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maft_adapter.cli import main
from maft_adapter.data import check, open_dataset
from maft_adapter.data.check import check_dataset

ADE = "ADEChallengeData2016"
Output = Callable[[], str]


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Output:
    return lambda: capsys.readouterr().out


@pytest.fixture
def ade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """4 pictures for validation, as many as are published here; classes 0 and 4."""
    monkeypatch.setitem(check.COUNTS, "ade20k-150", {"train": {6: ""}, "val": {4: ""}})
    for kind in ("images", "annotations"):
        (tmp_path / ADE / kind / "validation").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20, 10), (0, 0, 200)).save(tmp_path / ADE / f"images/validation/{i}.jpg")
        labels = np.ones((10, 20), np.uint8)
        labels[:, 10:] = 5
        labels[0] = 0
        Image.fromarray(labels).save(tmp_path / ADE / f"annotations/validation/{i}.png")
    return tmp_path


def test_all_as_published(ade: Path, output: Output) -> None:
    assert main(["data", "check", str(ade)]) == 0
    text = output()
    assert f"ade20k-150 val: original layout, in {ade / ADE}\n" in text
    assert "  150 classes, plain names, 0 of them unseen\n" in text
    assert "  4 pictures, as published\n" in text
    assert "  labels of 4 pictures read: 2 of 150 classes, 10.0 % of the pixels do not count\n" in text
    assert re.search(r"not there: .*voc-20 train, .*ade20k-150 train, .*context-459 val\nnothing is wrong\n$", text)


def test_the_layout_that_was_not_taken_is_named(ade: Path, output: Output) -> None:
    (ade / ADE / "annotations_detectron2/validation").mkdir(parents=True)
    for i in range(4):
        labels = np.asarray(Image.open(ade / ADE / f"annotations/validation/{i}.png")) - 1
        Image.fromarray(labels).save(ade / ADE / f"annotations_detectron2/validation/{i}.png")
    assert main(["data", "check", str(ade), "--data", "ade20k-150", "--classes", "prompted"]) == 0
    text = output()
    assert "ade20k-150 val: detectron2 layout" in text and f"not taken: original, in {ade / ADE}\n" in text
    assert "prompted names" in text and "2 of 150 classes, 10.0 %" in text
    assert main(["data", "check", str(ade), "--data", "ade20k-150", "--layout", "original"]) == 0
    assert "ade20k-150 val: original layout" in output()


def one_more(ade: Path) -> None:
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        (ade / ADE / kind / f"validation/9.{suffix}").hardlink_to(ade / ADE / kind / f"validation/0.{suffix}")


def spoil(path: str, content: bytes | None) -> Callable[[Path], None]:
    def do(ade: Path) -> None:
        file = ade / ADE / path
        file.unlink() if content is None else file.write_bytes(content or file.read_bytes()[:60])

    return do


def relabel(value: int, shape: tuple[int, int] = (10, 20)) -> Callable[[Path], None]:
    return lambda ade: Image.new("L", shape[::-1], value).save(ade / ADE / "annotations/validation/2.png")


def nothing_counts(ade: Path) -> None:
    for i in range(4):
        Image.new("L", (20, 10)).save(ade / ADE / f"annotations/validation/{i}.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (one_more, "WRONG: 5 pictures, published are 4"),
        (spoil("images/validation/2.jpg", None), "WRONG: 1 label files of .* have no picture in .*, such as 2:"),
        (spoil("annotations/validation/2.png", None), "WRONG: 1 pictures have no label file, such as 2"),
        (spoil("annotations/validation/2.png", b""), "WRONG: .*2.png can't be read as a label map"),
        (spoil("images/validation/2.jpg", b"\xff\xd8\xff"), "WRONG: .*2.jpg can't be read as a picture"),
        (relabel(151), r"WRONG: .*2.png: the values \[151\] stand for no class; there are 150 classes, 1 to 150"),
        (relabel(1, (5, 10)), "WRONG: .*2.png is 5x10 .*, its picture .*2.jpg 10x20"),
        (nothing_counts, "WRONG: no pixel of 4 label maps is of any class"),
    ],
)
def test_what_is_wrong_is_said(spoil: Callable[[Path], None], message: str, ade: Path, output: Output) -> None:
    spoil(ade)
    assert main(["data", "check", str(ade), "--data", "ade20k-150"]) == 1
    text = output()
    assert re.search(message, text), text
    assert re.search(r"\nwrong: \d\n$", text)


def test_empty_files_outside_the_sample_are_found(ade: Path, output: Output) -> None:
    (ade / ADE / "images/validation/1.jpg").write_bytes(b"")
    assert main(["data", "check", str(ade), "--data", "ade20k-150", "--sample", "1"]) == 1
    text = output()
    assert re.search(r"WRONG: 1 files are empty, such as .*1\.jpg", text) and "labels of 1 pictures read" in text


def test_truncated_picture(ade: Path, output: Output) -> None:
    file = ade / ADE / "images/validation/3.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["data", "check", str(ade), "--data", "ade20k-150"]) == 1
    assert re.search(r"WRONG: .*3\.jpg", output())


def test_the_same_data_twice_is_a_fault_of_the_tree(ade: Path, output: Output) -> None:
    (ade / "ade").mkdir()
    os.rename(ade / ADE, ade / "ade" / ADE)
    main(["data", "check", str(ade), "--data", "ade20k-150"])
    assert "nothing is wrong" in output()
    for kind in ("images", "annotations"):
        (ade / ADE / kind / "validation").mkdir(parents=True)
    for path in (ade / "ade" / ADE).rglob("*.*g"):
        (ade / ADE / path.relative_to(ade / "ade" / ADE)).hardlink_to(path)
    assert main(["data", "check", str(ade), "--data", "ade20k-150"]) == 1
    assert "lies twice below" in output()


def test_nothing_there(tmp_path: Path, output: Output) -> None:
    assert main(["data", "check", str(tmp_path)]) == 1
    assert re.search(
        r"nothing found in .*: looked for ADE20K_2021_17_01, ADEChallengeData2016, .*pascal_voc_d2", output()
    )
    assert main(["data", "check", str(tmp_path), "--data", "folder"]) == 1
    assert "looked for images/ and labels/" in output()


def test_mess_without_its_package(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mess", None)
    assert main(["data", "check", str(tmp_path), "--data", "mess:floodnet_sem_seg_test"]) == 1
    assert re.search(r'val\n  WRONG: .*run: pip install "maft-adapter\[mess\]"\nwrong: 1\n$', output())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}", "--data", "cityscapes"], "--data cityscapes: expected one of voc-20,"),
        (["{}", "--sample", "0"], "--sample 0: expected at least 1"),
        (["{}/nowhere"], "nowhere is no folder"),
        (["{}", "--out", "{}/nowhere/a.html"], "its folder does not exist"),
        ([], "the following arguments are required: ROOT"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["data", "check", *(one.format(tmp_path) for one in arguments)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_contact_sheet(ade: Path, tmp_path: Path, output: Output) -> None:
    assert main(["data", "check", str(ade), "--data", "ade20k-150", "--out", str(tmp_path / "a.html")]) == 0
    assert f"4 pictures with their labels: {tmp_path / 'a.html'}" in output()
    page = html.unescape((tmp_path / "a.html").read_text(encoding="utf-8"))
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page)
    assert len(pictures) == 4
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0])))).astype(int)
    assert pixels.shape == (200, 800, 3)
    assert abs(pixels[:, :380] - (0, 0, 200)).max() < 12  # the picture
    top, left, right = pixels[10, 600], pixels[100, 450], pixels[100, 750]
    assert abs(top - 255).max() < 12  # what does not count is white
    assert abs(left - right).max() > 30  # the two classes differ
    assert "wall 45 %, tree 45 %" in page and "ade20k-150 val 3" in page


def test_voc_without_sbd_is_said_and_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset("shapes")
    monkeypatch.setitem(check.COUNTS, "shapes", {"val": {200: "those of VOC alone"}})
    report = check_dataset(dataset, 1)
    assert (report.facts[0], report.faults) == ("200 pictures, as published (those of VOC alone)", ())
    with pytest.raises(ValueError, match="sample must be at least 1, got 0"):
        check_dataset(dataset, 0)


def test_published_counts() -> None:
    numbers = {name: (max(of["train"]), max(of["val"])) for name, of in check.COUNTS.items()}
    assert numbers == {
        "voc-20": (10582, 1449), "voc-20b": (10582, 1449), "voc-21": (10582, 1449), "coco-stuff": (118287, 5000),
        "ade20k-150": (20210, 2000), "ade20k-847": (25574, 2000), "context-59": (4998, 5105),
        "context-459": (4998, 5105),
    }  # fmt: skip
