"""`maft-adapter segment`: what it writes, what it skips, what it refuses, and what a kill leaves."""

import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maft_adapter import cli, data, pictures
from maft_adapter.checkpoint import save_mask_aware
from maft_adapter.cli.segment import KEPT, output_names, read_classes, root_of
from maft_adapter.pictures import MARK, Segmenter
from maft_adapter.shapes import CLASSES, load_clip, render_scene

EXAMPLES = Path(__file__).parent.parent / "examples" / "pictures"


def segment(*arguments: Any) -> int:
    return cli.main(["segment", *map(str, arguments)])


def draw(path: Path, seed: int = 0, size: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render_scene(seed, size=size).image).save(path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """All that was written, besides the proposals that are kept."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if not name.startswith(KEPT)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one in a sub-folder."""
    for seed, name in enumerate(["a b.png", "白鳥.png", "sub/a b.png"]):
        draw(tmp_path / "in" / name, seed)
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="no examples/ beside tests/: these tests run away from the checkout")
def test_the_examples(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment(EXAMPLES, "--out", out) == 0
    assert f"6 pictures segmented, 0 had been already, 0 failed: {out / 'index.html'}" in capsys.readouterr().out
    rights = []
    for path in sorted(EXAMPLES.glob("*.png")):
        scene = render_scene((7_000_000, int(path.stem[-2:])), size=256, things=(2, 4), radius=(0.16, 0.28))
        assert (np.asarray(Image.open(path)) == scene.image).all()  # as the README there says
        labels = np.asarray(Image.open(out / path.name))
        rights.append((labels == scene.labels).mean())
        coco = json.loads((out / f"{path.stem}.json").read_bytes())
        assert coco["info"]["pixels"] == {str(k + 1): int((labels == k).sum()) for k in np.unique(labels)}
        assert Image.open(out / f"{path.stem}_overlay.jpg").width == 512
    assert min(rights) > 0.8
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<figure ") == 6 and 'src="scene_08_overlay.jpg"' in page and 'data-label="blue heart"' in page


def test_the_folder_of_a_run_is_a_checkpoint(
    folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for command in ("segment", "embed"):
        given = [command, str(folder / "a b.png"), "--checkpoint", str(run), "--out", str(out / command)]
        assert cli.main(given) == 1
        assert f"--checkpoint {run} has no tower.safetensors: name a folder that finetune wrote" in (
            capsys.readouterr().err
        )
        save_mask_aware(load_clip(mask_aware=True).visual, run / "tower.safetensors")
        assert cli.main(given) == 0
        (run / "tower.safetensors").unlink()


def test_bad_pictures_are_named_and_the_others_go_on(
    folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ["cmyk.jpg", "grey16.png", "rgba.png", "one.png"]
    Image.fromarray(render_scene(5).image).convert("CMYK").save(folder / good[0])
    Image.fromarray(render_scene(6).image[..., 0].astype(np.uint16) * 257).save(folder / good[1])
    Image.fromarray(render_scene(7).image).convert("RGBA").save(folder / good[2])
    Image.new("RGB", (1, 1), "red").save(folder / good[3])
    bad = ["empty.png", "text.jpg", "cut.png", "gone.jpg", "head.jpg"]
    (folder / bad[0]).touch()
    (folder / bad[1]).write_text("hello")
    (folder / bad[2]).write_bytes((folder / "a b.png").read_bytes()[:700])
    (folder / bad[3]).symlink_to(folder / "nowhere")
    (folder / bad[4]).write_bytes(b"\xff\xd8\xff\xe0 and no more")
    assert segment(folder, "--out", out) == 1
    output = capsys.readouterr()
    assert "7 pictures segmented, 0 had been already, 5 failed" in output.out
    failed = [line for line in output.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == len(bad) and all(sum(f"/{name} " in line for line in failed) == 1 for name in bad)
    written = contents(out)
    assert len(written) == 7 * 3 + 2
    for name in written:
        if name.endswith((".png", ".jpg")):
            Image.open(out / name).load()
    assert segment(folder, "--out", out) == 1
    assert "0 pictures segmented, 7 had been already, 5 failed" in capsys.readouterr().out
    assert contents(out) == written


def test_a_second_run_skips_what_is_finished(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    call = Segmenter.__call__

    def count(self: Segmenter, picture: Path) -> Any:
        asked.append(Path(picture).name)
        return call(self, picture)

    monkeypatch.setattr(Segmenter, "__call__", count)
    assert segment(folder, "--out", out) == 0
    first = contents(out)
    assert asked == ["a b.png", "白鳥.png", "a b.png"]
    assert {"a b.png", "白鳥.json", "sub/a b_overlay.jpg", "index.html", MARK} < first.keys()

    asked.clear()
    monkeypatch.chdir(folder)  # the same pictures by another path
    assert segment(".", "--out", out) == 0 and asked == [] and contents(out) == first

    (out / "白鳥_overlay.jpg").write_bytes(first["白鳥_overlay.jpg"][:-9])
    (out / "a b.json").write_text("{")
    assert segment(folder, "--out", out) == 0 and asked == ["a b.png", "白鳥.png"] and contents(out) == first

    asked.clear()
    draw(folder / "白鳥.png", 9)
    assert segment(folder, "--out", out) == 0 and asked == ["白鳥.png"] and contents(out) != first

    asked.clear()
    for options in (["--templates", "a drawing of {}"], ["--size", "64"], ["--keep-aspect"], ["--classes", "red ball"]):
        assert segment(folder, "--out", out, *options) == 0
    assert len(asked) == 4 * 3
    assert "3 pictures segmented" in capsys.readouterr().out


PROGRAM = "import sys; from maft_adapter.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    for seed in range(8):
        draw(tmp_path / "in" / f"{seed}.png", seed)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert segment(tmp_path / "in", "--out", whole) == 0
    command = [sys.executable, "-c", PROGRAM, "segment", str(tmp_path / "in"), "--out", str(out)]
    for names in ("1.png", "4_overlay.jpg"):  # in the middle of a picture
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while not (out / names).exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL and not (out / "index.html").exists()
        for path in out.glob("*.json"):
            json.loads(path.read_bytes())
    assert segment(tmp_path / "in", "--out", out) == 0
    assert contents(out) == contents(whole)


def test_ctrl_c_leaves_whole_files_only(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Any] = []
    replace = os.replace

    def interrupt(source: Any, target: Any) -> None:
        if str(target).endswith("白鳥_overlay.jpg"):
            raise KeyboardInterrupt
        replace(source, target)
        written.append(target)

    monkeypatch.setattr(os, "replace", interrupt)
    assert segment(folder, "--out", out) == 130
    assert "stopped" in capsys.readouterr().err
    left = contents(out)
    assert left.keys() == {MARK, "a b.png", "a b_overlay.jpg", "a b.json", "白鳥.png"}
    assert not list(out.rglob("*.part"))


def test_a_full_disk_stops_the_run_and_says_so(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(pictures, "replace_file", full)
    assert segment(folder, "--out", out) == 1
    output = capsys.readouterr()
    assert re.search(rf"--out {out} can't be written to: .*No space left on device", output.err)
    assert "failed:" not in output.err and "segmented" not in output.out  # the pictures are not to blame


def test_folders_that_hold_something_else_are_left_alone(
    folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert segment(folder / "a b.png", "--out", folder) == 1  # its label map would be called like it
    assert f"a b.png is in --out {folder}, where it could be replaced" in capsys.readouterr().err
    assert segment(draw(tmp_path / "other" / "x.png"), "--out", folder) == 1
    assert f"--out {folder} holds other files, which could be replaced: name a new" in capsys.readouterr().err
    assert contents(folder) == before
    assert segment(folder, "--out", out) == 0
    done = contents(out)
    assert segment(tmp_path / "other", "--out", out) == 1
    assert "holds outputs of pictures of another folder" in capsys.readouterr().err
    assert contents(out) == done
    assert segment(folder, "--out", __file__) == 1
    assert f"--out {__file__} can't be written to" in capsys.readouterr().err


def test_outputs_inside_the_folder_of_pictures_are_no_pictures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert segment(folder, "--out", folder / "out") == 0
    assert len(contents(folder / "out")) == 3 * 3 + 2
    assert f"passed over: {folder / 'out'} holds outputs" in capsys.readouterr().out
    for given in (folder, folder / "**" / "*.*g"):  # nor are they for another run
        assert segment(given, folder / "out", "--out", tmp_path / "other") == 0
        output = capsys.readouterr().out
        assert re.search(r"^(3|0) pictures segmented, (0|3) had been already, 0 failed", output)
        assert output.count(f"passed over: {folder / 'out'} holds outputs") == 1
    assert segment(folder / "out", "--out", tmp_path / "new") == 1
    assert "no pictures are left" in capsys.readouterr().err
    assert segment(folder / "out" / "a b_overlay.jpg", "--out", tmp_path / "new") == 0  # named, so meant


def test_what_a_kill_left_does_not_lock_the_folder(folder: Path, out: Path) -> None:
    out.mkdir()
    (out / f"{MARK}.machine.1234567.part").write_text("written by")
    assert segment(folder, "--out", out) == 0


def test_what_is_named_and_missing_stops_nothing(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment(folder / "a b.png", folder / "gone.png", "--out", out) == 1
    output = capsys.readouterr()
    assert "1 pictures segmented, 0 had been already, 1 failed" in output.out
    assert re.search(r"failed: .*gone\.png", output.err)
    assert segment(folder / "gone.png", "--out", out) == 1
    assert "gone.png: no such file or folder" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="no named pipes")
def test_formats_that_are_not_read_and_pipes_are_named(
    folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "x.heic").write_bytes(b"\0\0\0\x18ftypheic")
    Image.fromarray(render_scene(5).image).save(folder / "y.tga")
    Image.fromarray(render_scene(6).image).save(folder / "z.jfif")
    assert segment(folder, "--out", out) == 1
    output = capsys.readouterr()
    assert "5 pictures segmented, 0 had been already, 2 failed" in output.out
    assert re.search(r"failed: .*pipe\.png is a folder, a pipe or a device", output.err)
    assert re.search(r"failed: .*x\.heic is no picture of a format that PIL knows", output.err)


def test_outputs_of_what_a_failed_picture_was_before_are_reported(
    folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(folder, "--out", out) == 0
    before = contents(out)
    (folder / "a b.png").write_bytes(b"no picture")
    (folder / "c.png").write_bytes(b"no picture")
    assert segment(folder, "--out", out) == 1
    first, second = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert first.endswith(f"what {out} holds of a b is of an earlier run") and "earlier" not in second
    after = contents(out)
    assert {name: after[name] for name in before if name.startswith("a b")} and b'"a b' not in after["index.html"]


def test_a_folder_called_like_an_output(folder: Path, out: Path) -> None:
    draw(folder / "a b.json" / "a b.png", 3)
    assert segment(folder, "--out", out) == 0
    assert {"a b.png.json", "a b.json/a b.json"} < contents(out).keys()


def test_masks_that_are_too_small_are_counted(folder: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    ids = np.full((64, 64), 1, np.uint8)
    ids[3, 3] = 2
    Image.fromarray(ids).save(tmp_path / "masks" / "a b.png")
    assert segment(folder / "a b.png", "--out", out, "--proposals", f"files:{tmp_path / 'masks'}") == 0
    coco = json.loads((out / "a b.json").read_bytes())
    assert [annotation["proposal"] for annotation in coco["annotations"]] == [0] and coco["info"]["left_out"] == [1]
    assert "64 × 64, 1 masks, 1 more are too small" in (out / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg"], ["a"]),
        (["a.jpg", "a.png"], ["a.jpg", "a.png"]),
        (["A.jpg", "a.jpg"], ["A.jpg", "a.jpg"]),
        (["a.jpg", "a.png", "a.png.jpg"], ["a.jpg", "a.png", "a.png.jpg"]),
        (["x/a.jpg", "y/a.jpg", "y/z/b.c.jpg"], ["x/a", "y/a", "y/z/b.c"]),
        (["x/a.jpg", "x/b.jpg"], ["x/a", "x/b"]),
        (["p.jpg", "p.png/p.jpg", "q_overlay.JPG/a.jpg", "q.jpg"], ["p.jpg", "p.png/p", "q_overlay.JPG/a", "q.jpg"]),
        (["a\u0301.jpg", "\u00e1.png"], ["a\u0301.jpg", "\u00e1.png"]),  # one letter, written in two ways
    ],
)
def test_names_of_outputs_never_fall_together(names: list[str], expected: list[str]) -> None:
    assert output_names([Path("/p", name) for name in names], Path("/p")) == expected


def test_the_root_comes_from_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "in" / "sub" / "a[1].png")
    monkeypatch.chdir(tmp_path)
    for given, expected in {
        ("in",): "in",
        ("in/sub",): "in/sub",
        ("in/sub/a[1].png",): "in/sub",
        ("in/*/*.png",): "in",
        ("in/s*",): "in",
        ("**/*.png",): "",
        ("in/sub", "in/x.png"): "in",
        ("in/gone.png",): "in",
    }.items():
        assert root_of(given) == tmp_path / expected


def test_one_more_picture_changes_no_name(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "in" / "sub" / "a.png")
    assert segment(tmp_path / "in", "--out", out) == 0
    before = contents(out)
    draw(tmp_path / "in" / "b.png", 1)
    assert segment(tmp_path / "in", "--out", out) == 0
    assert "1 pictures segmented, 1 had been already" in capsys.readouterr().out
    after = contents(out)
    assert "sub/a.json" in before and {name: after[name] for name in before if "sub" in name} == {
        name: data for name, data in before.items() if "sub" in name
    }


def test_same_stems_side_by_side(tmp_path: Path, out: Path) -> None:
    draw(tmp_path / "in" / "a.png", 1)
    draw(tmp_path / "in" / "a.jpg", 2)
    assert segment(tmp_path / "in", "--out", out) == 0
    assert {"a.png.png", "a.png_overlay.jpg", "a.png.json", "a.jpg.png"} < contents(out).keys()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are UTF-8 elsewhere")
def test_names_that_are_no_utf_8(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "in" / "x.png")
    os.replace(tmp_path / "in" / "x.png", os.fsencode(tmp_path / "in") + b"/caf\xe9.png")
    (tmp_path / "in" / os.fsdecode(b"\xe9.png")).write_text("no picture")
    assert segment(tmp_path / "in", "--out", out) == 1
    assert "1 pictures segmented, 0 had been already, 1 failed" in capsys.readouterr().out
    assert (out / os.fsdecode(b"caf\xe9.json")).exists()


# Classes


def test_classes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffswan , white bird\n\n  red river\nCafé 5:00\n", encoding="utf-8")
    assert read_classes(str(path)) == [("swan", "white bird"), ("red river",), ("Café 5:00",)]
    path.write_text("0:invalid_class_id\n1:wall,walls\n3: road \n", encoding="utf-8")
    assert read_classes(str(path)) == [("wall", "walls"), ("road",)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", " names no class"),
        (b"swan,\nriver", "'swan,' has an empty name"),
        (b"1:a\n1:b", "have the same index"),
        (b"0:invalid_class_id", " names no class"),
        (b"\xff\xfes\x00w\x00", " is no list of class names"),
    ],
)
def test_files_of_classes_that_are_broken(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/classes.txt.*{message}"):
        read_classes(str(tmp_path / "classes.txt"))


def test_classes_of_the_data_sets_and_json_lists(tmp_path: Path) -> None:
    names = Path(data.__file__).parent / "names" / "voc-20.plain.txt"  # its first line is a comment
    assert read_classes(str(names))[:2] == [("aeroplane",), ("bicycle",)]
    (tmp_path / "classes.json").write_text('["swan, white bird", "river"]')
    assert read_classes(str(tmp_path / "classes.json")) == [("swan", "white bird"), ("river",)]


def test_classes_of_the_command_line(tmp_path: Path) -> None:
    assert read_classes(" swan,river / brook, St. Bernard") == [("swan",), ("river / brook",), ("St. Bernard",)]
    assert read_classes("St. Bernard") == [("St. Bernard",)]
    assert len(read_classes(",".join(f"class {k}" for k in range(1000)))) == 1000
    files = ["clases.txt", "classes.names", "classes.json", "x/classes", str(tmp_path)]
    for given, message in {"a,,b": "empty name", "": "no classes", **dict.fromkeys(files, "no such file")}.items():
        with pytest.raises(ValueError, match=rf"--classes {given}: .*{message}"):
            read_classes(given)


def test_words_of_ones_own_with_synonyms_and_a_background(folder: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("1:pale grass,dark grass\n2:red ball\n")
    assert segment(folder, "--out", out, "--classes", tmp_path / "classes.txt", "--background", "pale sand") == 0
    categories = json.loads((out / "a b.json").read_bytes())["categories"]
    assert [category["synonyms"] for category in categories] == [["pale grass", "dark grass"], ["red ball"]]
    labels = np.concatenate(
        [np.unique(np.asarray(Image.open(out / f"{name}.png"))) for name in ("a b", "白鳥", "sub/a b")]
    )
    assert set(labels) <= {0, 1, 255} and 255 in labels


def test_more_classes_than_a_byte_tells(folder: Path, out: Path, tmp_path: Path) -> None:
    lines = [f"{first} and {second}" for first in CLASSES[:20] for second in CLASSES[20:35]]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    assert segment(folder / "a b.png", "--out", out, "--classes", tmp_path / "classes.txt") == 0
    labels = np.asarray(Image.open(out / "a b.png"))
    assert labels.dtype == np.uint16 and labels.max() < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "swan"], "'a picture of swan' also has ['swan']"),
        (["--model", "ViT-B-61"], "'ViT-B-61' is no model of open_clip"),
        (["--model", "ViT-S-32-alt", "--pretrained", "random"], "--model needs --classes"),
        (["--proposals", "magic"], "proposals are 'magic'"),
        (["--templates", "two"], "templates are 'two'"),
        (["--size", "0"], "size is 0"),
        (["--device", "abacus"], "device 'abacus' can't be used"),
    ],
)
def test_wrong_options_are_reported_before_any_picture(
    options: list[str], message: str, folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(folder, "--out", out, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("maft-adapter segment: ") or "No pretrained weights" in error
    assert message in error and "failed:" not in error
    assert contents(out).keys() <= {MARK}


def test_no_pictures(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment(tmp_path, "--out", out) == 1
    assert "no pictures there" in capsys.readouterr().err and not out.exists()


def test_masks_from_files(folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "masks" / "sub").mkdir(parents=True)
    halves = np.zeros((64, 64), np.uint8)
    halves[:32], halves[40:] = 1, 2
    for name in ("a b", "sub/a b"):
        Image.fromarray(halves).save(tmp_path / "masks" / f"{name}.png")
    assert segment(folder, "--out", out, "--proposals", f"files:{tmp_path / 'masks'}") == 1
    output = capsys.readouterr()
    assert "2 pictures segmented, 0 had been already, 1 failed" in output.out
    assert re.search(r"failed: .*白鳥\.png", output.err)  # which has none
    labels = np.asarray(Image.open(out / "sub" / "a b.png"))
    assert ((labels == 255) == (halves == 0)).all()
    annotations = json.loads((out / "a b.json").read_bytes())["annotations"]
    assert [annotation["area"] for annotation in annotations] == [32 * 64, 24 * 64]


def test_help_names_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        segment("--help")
    text = capsys.readouterr().out
    options = ("classes", "out", "model", "pretrained", "checkpoint", "proposals", "templates", "size", "keep-aspect")
    assert all(f"--{option}" in text for option in (*options, "device", "precision", "background"))


def test_a_missing_library_is_named(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PIL", "maft_adapter.pictures"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert segment(folder, "--out", out) == 1
    assert 'PIL is not installed; run: pip install "maft-adapter[pictures]"' in capsys.readouterr().err
    monkeypatch.undo()
    importlib.import_module("maft_adapter.pictures")


def test_masks_that_changed_are_noticed(tmp_path: Path) -> None:
    picture, masks, out = tmp_path / "p.png", tmp_path / "masks", tmp_path / "out"
    scene = render_scene(3)
    Image.fromarray(scene.image).save(picture)
    masks.mkdir()
    Image.fromarray((scene.labels == scene.present[0]).astype(np.uint8)).save(masks / "p.png")
    given = ["segment", str(picture), "--out", str(out), "--proposals", f"files:{masks}"]
    assert cli.main(given) == 0
    first = json.loads((out / "p.json").read_text())
    Image.fromarray(scene.labels).save(masks / "p.png")
    assert cli.main(given) == 0
    assert len(json.loads((out / "p.json").read_text())["annotations"]) > len(first["annotations"])
