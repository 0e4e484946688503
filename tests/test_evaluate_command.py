"""`maft-adapter evaluate`: every family of layouts, what it writes, goes on with, sums up and refuses."""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_data import CASES, write_case

from maft_adapter import cli
from maft_adapter.checkpoint import save_mask_aware
from maft_adapter.classify import text_classifier
from maft_adapter.data import class_list, open_dataset
from maft_adapter.evaluate import FIGURES, Evaluator, mask_aware_scorer
from maft_adapter.models import load_model
from maft_adapter.proposals import Kept, proposer
from maft_adapter.shapes import CLASSES, clip, load_clip, render_scene

SCENES = 6
C = len(CLASSES)


def evaluate(*arguments: Any) -> int:
    return cli.main(["evaluate", *map(str, arguments)])


def metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_bytes())


def per_class(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "per_class.csv").open(encoding="utf-8")))


def results(out: Path) -> tuple[bytes, ...]:
    """All that an evaluation says, which must not depend on how it came about."""
    return tuple((out / name).read_bytes() for name in ("metrics.json", "per_class.csv", "worst.html"))


@pytest.fixture(scope="module")
def keep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proposals")


@pytest.fixture(scope="module")
def whole(keep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate("--data", "shapes", "--limit", SCENES, "--keep", keep, "--out", out) == 0
    return out


def test_the_written_figures_equal_numpy_on_the_predictions(whole: Path, keep: Path) -> None:
    shapes = open_dataset("shapes")
    model = load_model(checkpoint=Path(clip.__file__).with_name(clip.WEIGHTS))
    text = text_classifier(model.clip, model.tokenizer, shapes.class_names, model.templates)
    scorer = mask_aware_scorer(model, text)
    evaluator = Evaluator(shapes, Kept(proposer("superpixels"), keep), scorer)
    said = np.stack([evaluator(shapes[i]).prediction.numpy() for i in range(SCENES)])
    true = np.stack([shapes[i].labels for i in range(SCENES)])
    iou, zero, accuracy, rows = np.full(C, np.nan), np.full(C, np.nan), np.full(C, np.nan), per_class(whole)
    for k, row in enumerate(rows):
        there, here = true == k, said == k
        assert [int(row[name]) for name in ("class", "unseen", "pixels", "predicted_pixels", "right_pixels")] == [
            k, k in shapes.unseen, there.sum(), here.sum(), (there & here).sum()
        ]  # fmt: skip
        assert row["name"] == CLASSES[k]
        if (there | here).any():
            zero[k] = 100 * (there & here).sum() / (there | here).sum()
        if there.any():
            iou[k], accuracy[k] = zero[k], 100 * (there & here).sum() / there.sum()
        assert int(row["masks"]) == sum(k in true[i] for i in range(SCENES))
        for name, value in (("iou", iou[k]), ("iou_absent_as_zero", zero[k]), ("accuracy", accuracy[k])):
            assert float(row[name] or "nan") == pytest.approx(value, abs=1e-6, nan_ok=True)
    unseen = np.isin(np.arange(C), shapes.unseen)
    found = metrics(whole)
    for scores, of in ((found, iou), (found["absent_as_zero"], zero)):
        means = [np.nanmean(of), np.nanmean(of[~unseen]), np.nanmean(of[unseen])]
        assert [scores[name] for name in ("miou", "miou_seen", "miou_unseen")] == pytest.approx(means, abs=1e-6)
        assert scores["hiou"] == pytest.approx(2 * means[1] * means[2] / (means[1] + means[2]), abs=1e-6)
    share = [(true == k).mean() for k in range(C)]
    assert found["fwiou"] == pytest.approx(np.nansum(share * iou), abs=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(100 * (said == true).mean(), abs=1e-6)
    of_masks = [float(row["mask_accuracy"]) for row in rows if row["masks"] != "0"]
    assert found["mask_accuracy"] == pytest.approx(np.mean(of_masks), abs=1e-6)

    # the worst first, by the mean over the classes that are there
    scores = []
    for p, t in zip(said, true, strict=True):
        scores.append(np.mean([100 * ((p == k) & (t == k)).sum() / ((p == k) | (t == k)).sum() for k in np.unique(t)]))
    page = (whole / "worst.html").read_text(encoding="utf-8")
    shown = re.findall(r"<b>val-(\d+)</b>[^<]*<br>mIoU ([\d.]+) %", page)
    assert [int(number) for number, _ in shown] == np.argsort(scores).tolist()
    assert [float(score) for _, score in shown] == [round(score, 1) for score in sorted(scores)]


def test_metrics_say_what_made_them(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = metrics(whole)
    assert list(found)[:7] == list(FIGURES)
    assert (found["pictures"], found["failed"], found["published"]) == (SCENES, [], [])
    settings = found["settings"]
    assert settings["model"].startswith("embedded CLIP, checkpoint small_clip.safetensors, start layer 0, fp32")
    assert settings["class_names"] == [[name] for name in CLASSES]
    assert (settings["encoder"], settings["size"], settings["names"]) == ("mask-aware", 96, "plain")
    assert settings["proposals"] == proposer("superpixels").settings
    assert {"absent", "mask_accuracy"} < found["conventions"].keys()


@pytest.mark.parametrize("parts", [["1/1"], ["1/2", "2/2"], ["3/3", "1/3", "2/3"], ["2/2", "1/1"]])
def test_parts_and_repeats_give_what_one_run_gives(
    parts: list[str], whole: Path, keep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, part in enumerate(parts, 1):
        arguments = ("--data", "shapes", "--limit", SCENES, "--keep", keep, "--out", tmp_path, "--part", part)
        assert evaluate(*arguments) == 0
        assert (tmp_path / "metrics.json").exists() == (number == len(parts))
        printed = capsys.readouterr().out
        assert ("left to other parts" in printed) == (number < len(parts))
    assert results(tmp_path) == results(whole)
    assert evaluate(*arguments) == 0  # once more, with nothing left to do
    assert results(tmp_path) == results(whole)
    lines = [line for path in tmp_path.glob("pictures.*") for line in path.read_text().split()]
    assert sorted(json.loads(line)["picture"] for line in lines) == list(range(SCENES))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_run_goes_on(whole: Path, keep: Path, tmp_path: Path) -> None:
    arguments = ["--data", "shapes", "--limit", str(SCENES), "--keep", str(keep), "--out", str(tmp_path)]
    code = "import sys; from maft_adapter import cli; sys.exit(cli.main(['evaluate', *sys.argv[1:]]))"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    kept = tmp_path / "pictures.1-of-1.jsonl"
    while process.poll() is None and not (kept.exists() and kept.read_bytes().count(b"\n") >= 2):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = kept.read_bytes()
    assert b"\n" in done
    kept.write_bytes(done[:-3])  # and in the middle of a line
    assert evaluate(*arguments) == 0
    assert results(tmp_path) == results(whole)
    assert kept.read_bytes().startswith(done[:-3])


@pytest.mark.parametrize("encoder", ["mask", "crop", "mask-and-crop", "upper-bound"])
def test_other_encoders(encoder: str, whole: Path, keep: Path, tmp_path: Path) -> None:
    arguments = ("--data", "shapes", "--limit", 2, "--keep", keep, "--worst", 0, "--encoder", encoder)
    assert evaluate(*arguments, "--out", tmp_path) == 0
    found = metrics(tmp_path)
    assert (found["mask_accuracy"] is None) == (encoder == "upper-bound")
    assert (found["settings"]["model"] is None) == (encoder == "upper-bound")
    assert "<figure " not in (tmp_path / "worst.html").read_text()
    assert encoder != "upper-bound" or found["miou"] > metrics(whole)["miou"]


def test_checkpoints(whole: Path, keep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    save_mask_aware(load_clip(mask_aware=True).visual, tmp_path / "run" / "tower.safetensors")
    found = []
    for number, checkpoint in enumerate(["shipped", tmp_path / "run", tmp_path / "run" / "tower.safetensors"]):
        out = tmp_path / str(number)
        arguments = ("--data", "shapes", "--limit", SCENES, "--keep", keep, "--checkpoint", checkpoint)
        assert evaluate(*arguments, "--out", out) == 0
        found.append([metrics(out)[name] for name in FIGURES])
    assert found[0] == found[1] == found[2]
    assert found[0][0] > metrics(whole)["miou"] + 5
    (tmp_path / "run" / "tower.safetensors").unlink()
    assert evaluate(*arguments[:-1], tmp_path / "run", "--out", tmp_path / "new") == 1
    assert "has no tower.safetensors: name a folder that finetune wrote" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# Data sets on disk

FAMILIES = {
    (name, layout): case
    for case in CASES
    for name, layout in [case[:2]]
    if (name, layout) in {
        ("voc-20", "maft"), ("voc-20b", "original"), ("voc-21", "fc-clip"), ("coco-stuff", "detectron2"),
        ("coco-stuff", "cat-seg"), ("coco-stuff", "mmsegmentation"), ("ade20k-150", "detectron2"),
        ("ade20k-150", "original"), ("ade20k-847", "zegformer"), ("ade20k-847", "detectron2"),
        ("context-59", "mmsegmentation"), ("context-459", "original"),
    }
}  # fmt: skip


@pytest.mark.parametrize("name_and_layout", FAMILIES, ids="-".join)
def test_every_family_of_layouts(
    name_and_layout: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, layout, base, picture, labels, values, listed = FAMILIES[name_and_layout]
    write_case(tmp_path / "data" / base, picture, labels, values, listed)
    classes = len(class_list(name).names)
    # Names that the embedded CLIP can read.
    names = itertools.islice(itertools.product(clip._WORDS, repeat=3), classes)
    (tmp_path / "names.txt").write_text("\n".join(map(" ".join, names)))
    arguments = ("--data", name, "--root", tmp_path / "data", "--names", tmp_path / "names.txt")
    assert evaluate(*arguments, "--out", tmp_path / "out") == 0
    found, rows = metrics(tmp_path / "out"), per_class(tmp_path / "out")
    there = {k for k in values.values() if k is not None}
    assert len(rows) == classes
    assert {int(row["class"]): int(row["pixels"]) for row in rows if row["pixels"] != "0"} == dict.fromkeys(there, 3)
    assert {int(row["class"]) for row in rows if row["masks"] == "1"} == there
    assert found["settings"]["layout"] == layout
    assert (found["miou_unseen"] is None) == (not there & set(open_dataset(name, tmp_path / "data").unseen))
    printed = capsys.readouterr().out
    assert all(f"{row['method']} " in printed and row["source"] in printed for row in found["published"])
    assert bool(found["published"]) == (name not in ("voc-20b", "voc-21"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of the embedded world, and class scores that know the truth, but for one class."""
    for part in ("images", "labels", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
    (tmp_path / "data" / "classes.txt").write_text("\n".join(CLASSES))
    for i in range(3):
        scene = render_scene(i)
        Image.fromarray(scene.image).save(tmp_path / "data" / "images" / f"{i}.png")
        Image.fromarray(scene.labels.astype(np.uint8)).save(tmp_path / "data" / "labels" / f"{i}.png")
        present = np.unique(scene.labels)
        np.savez(
            tmp_path / "data" / "masks" / f"{i}.npz",
            masks=scene.labels == present[:, None, None],
            class_scores=np.eye(C + 1, dtype=np.float32)[present],
        )
    return tmp_path / "data"


def test_ensemble_with_class_scores_from_files(folder: Path, tmp_path: Path) -> None:
    arguments = ("--data", "folder", "--root", folder, "--proposals", f"files:{folder / 'masks'}")
    assert evaluate(*arguments, "--out", tmp_path / "without") == 0
    assert evaluate(*arguments, "--ensemble", 0.9, "--out", tmp_path / "with") == 0
    without, found = metrics(tmp_path / "without"), metrics(tmp_path / "with")
    assert without["miou"] < 90 and found["miou"] == 100
    assert found["mask_accuracy"] == without["mask_accuracy"]
    assert found["miou_unseen"] is None
    assert (found["settings"]["ensemble"], found["settings"]["ensemble_form"]) == (0.9, "paper")

    (tmp_path / "known.txt").write_text(
        "\n".join(["RED BALL, ball", *CLASSES[1:8], *(f"thing {k}" for k in range(32))])
    )
    more = ("--ensemble", 1, "--ensemble-form", "released", "--trained-on", tmp_path / "known.txt")
    assert evaluate(*arguments, *more, "--out", tmp_path / "trained") == 0
    assert metrics(tmp_path / "trained")["settings"]["unseen"] == list(CLASSES[8:])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "--ensemble: these --proposals have no class scores (A^p), leave it out"),
        ({"class_scores": np.full((1, 6), 1 / 6, np.float32)}, "are of 5 classes: .* with --trained-on"),
    ],
)
def test_class_scores_that_do_not_fit_are_said_once(
    scores: dict[str, Any], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        np.savez(folder / "masks" / f"{i}.npz", masks=np.ones((1, 96, 96), bool), **scores)
    out = tmp_path / "out"
    given = ("--data", "folder", "--root", folder, "--proposals", f"files:{folder / 'masks'}", "--out", out)
    assert evaluate(*given, "--ensemble", 0.7) == 1
    said = capsys.readouterr().err
    assert re.search(message if scores else re.escape(message), said) and "failed:" not in said
    assert not list(out.glob("pictures.*"))

    names = tmp_path / "shapes.txt"  # which is no data set
    names.write_text("\n".join(CLASSES[:5]))
    assert evaluate(*given, "--ensemble", 0.7, "--trained-on", names) == (0 if scores else 1)


def test_the_first_picture_is_broken_and_the_ensemble_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images" / "0.png").write_bytes(b"")
    given = ("--data", "folder", "--root", folder, "--proposals", f"files:{folder / 'masks'}", "--ensemble", 0.7)
    assert evaluate(*given, "--out", tmp_path / "out") == 1
    assert "2 pictures evaluated, 1 failed" in capsys.readouterr().out


def test_a_broken_picture_is_named_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", folder / "images" / "1.png"
    arguments = ("--data", "folder", "--root", folder, "--proposals", f"files:{folder / 'masks'}")
    assert evaluate(*arguments, "--out", whole) == 0
    data = broken.read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    out = tmp_path / "out"
    for _ in range(2):
        capsys.readouterr()
        assert evaluate(*arguments, "--out", out) == 1
        printed = capsys.readouterr()
        assert "failed: picture 1:" in printed.err and str(broken) in printed.err
        assert f"2 pictures evaluated, 1 failed: {out / 'metrics.json'}" in printed.out
        found = metrics(out)
        assert found["pictures"] == 2 and len(found["failed"]) == 1 and str(broken) in found["failed"][0]
        assert sum(int(row["pixels"]) for row in per_class(out)) == 2 * 96 * 96
    broken.write_bytes(data)
    assert evaluate(*arguments, "--out", out) == 0
    assert results(out) == results(whole)


def test_all_pictures_broken(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "masks")
    (folder / "masks").mkdir()
    arguments = ("--data", "folder", "--root", folder, "--proposals", f"files:{folder / 'masks'}")
    assert evaluate(*arguments, "--out", tmp_path / "out") == 1
    assert "all 3 pictures failed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()


# Refusals


def test_folders_of_something_else_are_left_alone(
    whole: Path, keep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(whole)
    arguments = ("--data", "shapes", "--keep", keep, "--out", whole)
    assert evaluate(*arguments, "--limit", 2) == 1
    assert "with other settings: pictures (there 6, here 2); give the same, or a new folder" in capsys.readouterr().err
    assert evaluate(*arguments, "--limit", SCENES, "--checkpoint", "shipped") == 1
    assert "model (there 'embedded CLI" in capsys.readouterr().err
    assert results(whole) == before
    (tmp_path / "metrics.json").write_text("{}")
    assert evaluate("--data", "shapes", "--limit", 1, "--out", tmp_path) == 1
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_a_run_that_never_began_claims_nothing(keep: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"data": "other"}')
    assert evaluate("--data", "shapes", "--limit", 1, "--keep", keep, "--out", tmp_path) == 0
    (tmp_path / "settings.json").write_text("{")
    assert evaluate("--data", "shapes", "--limit", 1, "--keep", keep, "--out", tmp_path) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "0/2"], "--part 0/2: expected I/N"),
        (["--part", "3/2"], "--part 3/2: expected I/N"),
        (["--part", "half"], "--part half: expected I/N"),
        (["--limit", "0"], "--limit 0: expected at least 1"),
        (["--size", "0"], "--size 0: expected at least 1"),
        (["--worst", "-1"], "--worst -1: expected at least 0"),
        (["--ensemble", "1.5"], "--ensemble 1.5: expected a weight in [0, 1]"),
        (["--ensemble-form", "released"], "--ensemble-form needs --ensemble"),
        (["--ensemble", "0.7"], "--ensemble: superpixels have no class scores"),
        (["--encoder", "upper-bound", "--ensemble", "0"], "--ensemble: --encoder upper-bound has no CLIP"),
        (["--encoder", "upper-bound", "--model", "ViT-B-16"], "--model: --encoder upper-bound has no CLIP"),
        (["--encoder", "crop", "--checkpoint", "x"], "--checkpoint: --encoder crop is the frozen CLIP"),
        (["--encoder", "mask", "--keep-aspect"], "--keep-aspect: --encoder mask is the frozen CLIP"),
        (["--encoder", "crop", "--start-layer", "0"], "--start-layer: --encoder crop is the frozen CLIP"),
        (["--encoder", "clip"], "invalid choice"),
    ],
)
def test_wrong_options_exit_with_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        evaluate("--data", "shapes", "--out", tmp_path / "out", *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "voc-21"], "voc-21 needs root"),
        (["--data", "cityscapes"], "unknown data set 'cityscapes'"),
        (["--data", "shapes", "--proposals", "none"], "proposals are 'none'"),
        (["--data", "shapes", "--model", "ViT-B-32", "--checkpoint", "shipped"], "of the small CLIP of shapes"),
        (["--data", "shapes", "--templates", "all"], "templates are 'all'"),
        (["--data", "shapes", "--trained-on", "nowhere.txt"], "nowhere.txt"),
        (["--data", "shapes", "--device", "nowhere"], "nowhere"),
    ],
)
def test_what_can_not_be_evaluated(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--out", tmp_path / "out", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_stops_the_run(
    keep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Any, item: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Evaluator, "__call__", full)
    assert evaluate("--data", "shapes", "--limit", 2, "--keep", keep, "--out", tmp_path) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.glob("pictures.*"))


def test_trained_on_an_embedded_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--data", "shapes", "--limit", 1, "--proposals", "ground-truth", "--out", tmp_path)
    assert evaluate(*given, "--trained-on", "shapes-a") == 0
    unseen = json.loads((tmp_path / "metrics.json").read_text())["settings"]["unseen"]
    assert len(unseen) == 19 and {name.split()[1] for name in unseen} == {"heart", "ring", "moon", "brick", "wood"}
    assert evaluate(*given, "--layout", "maft") == 1
    assert "leave names and layout out" in capsys.readouterr().err
