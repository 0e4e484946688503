"""The paper's tables: which commands they run, what is made of their figures, and a real quick run of one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maft_adapter import cli, paper, save_mask_aware
from maft_adapter.classify import text_classifier
from maft_adapter.cli import evaluate, finetune
from maft_adapter.data import datasets, open_dataset
from maft_adapter.evaluate import FIGURES, Evaluator, mask_aware_scorer
from maft_adapter.metrics import evaluation_scores
from maft_adapter.models import load_model
from maft_adapter.proposals import proposer
from maft_adapter.shapes import CLASSES, render_scene
from maft_adapter.shapes.demo import frozen_model

ALL = [name for name in paper.TABLES if name != "6"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of the commands, which write figures made of them and take no time."""
    recorded: list[list[str]] = []
    real = cli.main

    def main(arguments: list[str]) -> int:
        if arguments[0] == "paper":
            return real(arguments)
        recorded.append(list(arguments))
        parser = __import__("argparse").ArgumentParser()
        commands = parser.add_subparsers()
        for command in (evaluate, finetune):
            command.add(commands)
        given = parser.parse_args(arguments)  # options that the commands do not have fail here
        given.out.mkdir(parents=True, exist_ok=True)
        if arguments[0] == "evaluate":
            if given.checkpoint is not None:
                assert Path(given.checkpoint, "finished").exists()
            seed = int(given.data.partition(":")[2] or 0)
            figures = {name: 10.0 * k + seed for k, name in enumerate(FIGURES)}
            (given.out / "metrics.json").write_text(json.dumps(figures))
        return 0

    monkeypatch.setattr(cli, "main", main)
    return recorded


def option(arguments: list[str], name: str) -> str | None:
    """The last one counts, as for argparse."""
    at = [i for i, argument in enumerate(arguments) if argument == name]
    return arguments[at[-1] + 1] if at else None


@pytest.mark.parametrize("name", ALL)
def test_every_table_of_the_embedded_world(name: str, calls: list[list[str]], tmp_path: Path) -> None:
    result = paper.measure(name, paper.World(), [0, 2], tmp_path)
    width = len(result["columns"])
    assert {len(seed) for row in result["rows"] for seed in row["per_seed"]} == {width}
    assert {len(row["published"]) for row in result["rows"]} <= {0, width}
    assert {len(figures) for _, figures in result["others"]} <= {width}
    outs = [option(arguments, "--out") for arguments in calls]
    assert len(set(outs)) == len(outs)  # no run is made twice, or over another
    for arguments in calls:
        data = option(arguments, "--data")
        assert data is not None and data.startswith("shapes") and data.endswith((":0", ":2"))
        if arguments[0] == "finetune":
            assert option(arguments, "--seed") == data.partition(":")[2]
    calls.clear()
    assert paper.measure(name, paper.World(), [0, 2], tmp_path) == result and not calls  # goes on with what is there


def test_tables_share_the_run_with_the_defaults(calls: list[list[str]], tmp_path: Path) -> None:
    for name in ("4a", "4b", "4c", "4d", "4e", "7", "8"):
        paper.measure(name, paper.World(), [0], tmp_path)
    runs = [arguments for arguments in calls if arguments[0] == "finetune"]
    special = ("--distillation-weight", "--loss", "--iterations", "--freeze", "--start-layer", "--self-training")
    assert len([run for run in runs if not any(option(run, name) for name in special)]) == 1
    assert len(runs) == 1 + 4 + 3 + 5 + 5 + 1
    (trained,) = (run for run in runs if option(run, "--self-training"))
    assert Path(option(trained, "--self-training") or "", "finished").exists()


def test_means_and_spreads_over_seeds(calls: list[list[str]], tmp_path: Path) -> None:
    result = paper.measure("4a", paper.World(), range(3), tmp_path)
    seen = [10.0 * FIGURES.index("miou_seen") + seed for seed in range(3)]
    cell = f"{np.mean(seen):.1f} ± {np.std(seen, ddof=1):.1f}"
    assert cell in paper.text(result) and f"| {cell} |" in paper.page([result], {})
    assert "4a. Components" in paper.text(result) and "22.3" in paper.text(result)
    assert "It holds." in paper.page([result], {"4a": "It holds."})


@pytest.mark.parametrize("name", ["4a", "4c", "3"])
def test_the_page_and_its_pictures(name: str, calls: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text(json.dumps({name: "Said by hand."}))
    assert cli.main(["paper", name, "--out", str(tmp_path), "--seeds", "2"]) == 0
    written = (tmp_path / "README.md").read_text()
    assert f"![Table {name}](table-{name}.png)" in written and "Said by hand." in written
    with Image.open(tmp_path / f"table-{name}.png") as picture:
        assert picture.width > 300 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    (result,) = json.loads((tmp_path / "tables.json").read_text())
    assert result["seeds"] == [0, 1]


def test_on_a_data_set(calls: list[list[str]], tmp_path: Path) -> None:
    given = ["--data", "coco-stuff", "--root", "sets", "--model", "ViT-B-16", "--pretrained", "openai"]
    given += ["--proposals", "files:masks", "--generator", "mask2former:mine", "--out", str(tmp_path)]
    assert cli.main(["paper", "1", "3", "4c", "6", "7", *given]) == 0
    for arguments in calls:
        assert option(arguments, "--root") == "sets" and ":" not in (option(arguments, "--data") or ":")
        bound = option(arguments, "--encoder") == "upper-bound"
        assert (option(arguments, "--model") is None) == bound  # which has no CLIP
    tested = {option(arguments, "--data") for arguments in calls}
    assert tested == {"coco-stuff", "ade20k-847", "ade20k-150", "context-459", "context-59", "voc-20"}
    assert {option(arguments, "--model") for arguments in calls} >= {"ViT-B-16", "ViT-L-14-quickgelu", "RN50-quickgelu"}
    ensembles = [arguments for arguments in calls if option(arguments, "--ensemble")]
    assert {option(arguments, "--proposals") for arguments in ensembles} == {"mask2former:mine"}
    counts = {option(arguments, "--iterations") for arguments in calls if arguments[0] == "finetune"}
    assert counts == {None, "500", "1000", "2000", "3000", "4000", "5000"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["9"], "unknown table 9: expected 1, 2, 3"),
        (["all", "4a"], "unknown table all"),
        (["4a", "--seeds", "0"], "--seeds 0"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["paper", *arguments, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_table_or_a_run_that_cannot_be_made_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["paper", "6", "--out", str(tmp_path)]) == 1
    assert "the embedded world has one CLIP" in capsys.readouterr().err
    assert cli.main(["paper", "7", "1", "--data", "voc-20", "--out", str(tmp_path / "new")]) == 1
    assert "Table 1 on voc-20 needs --generator" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # said before anything is made
    assert cli.main(["paper", "7", "--data", "voc-20", "--root", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "maft-adapter finetune --data voc-20" in said and "failed with exit status 1" in said


def test_folders_of_others_and_of_other_worlds_are_left_alone(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    (mine / "README.md").write_text("mine")
    assert cli.main(["paper", "4a", "--out", str(mine)]) == 1 and (mine / "README.md").read_text() == "mine"
    assert "holds other files" in capsys.readouterr().err
    assert cli.main(["paper", "4b", "--out", str(out)]) == 0
    for other in (["--quick"], ["--proposals", "sam"], ["--model", "ViT-B-16"], ["--data", "voc-20"]):
        calls.clear()
        assert cli.main(["paper", "4b", *other, "--out", str(out)]) == 1 and not calls
        assert "name another folder" in capsys.readouterr().err
    assert cli.main(["paper", "4a", "--out", str(out)]) == 0  # which joins the page
    assert [each["table"] for each in json.loads((out / "tables.json").read_text())] == ["4a", "4b"]
    page = (out / "README.md").read_text()
    assert page.index("Table 4a") < page.index("Table 4b")


def test_pictures_that_failed_are_said(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    main = cli.main

    def failing(arguments: list[str]) -> int:
        status = main(arguments)
        if arguments[0] == "evaluate":
            path = Path(option(arguments, "--out") or "", "metrics.json")
            path.write_text(json.dumps(json.loads(path.read_text()) | {"failed": ["picture 3: is damaged"]}))
            return 1
        return status

    monkeypatch.setattr(cli, "main", failing)
    for _ in range(2):  # made, and read
        assert cli.main(["paper", "7", "--out", str(tmp_path)]) == 0
        assert "without up to 1 pictures that failed" in capsys.readouterr().out


def test_ctrl_c_in_a_run_stops_the_tables(
    calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    main = cli.main
    monkeypatch.setattr(cli, "main", lambda arguments: main(arguments) if arguments[0] == "paper" else 130)
    assert cli.main(["paper", "4a", "4b", "--out", str(tmp_path)]) == 130


def test_options_of_one_command(calls: list[list[str]], tmp_path: Path) -> None:
    given = ["--data", "context-59", "--iterations", "7", "--trained-on", "coco-stuff", "--out", str(tmp_path)]
    assert cli.main(["paper", "7", *given, "--proposals", "ground-truth"]) == 0
    for arguments in calls:
        assert option(arguments, "--iterations") == ("7" if arguments[0] == "finetune" else None)
        assert option(arguments, "--trained-on") == ("coco-stuff" if arguments[0] == "evaluate" else None)
        assert option(arguments, "--keep") is None  # ground-truth masks are not kept


def test_a_quick_run_of_the_commands(tmp_path: Path) -> None:
    assert cli.main(["paper", "8", "--quick", "--out", str(tmp_path)]) == 0
    (result,) = json.loads((tmp_path / "tables.json").read_text())
    assert result["quick"] and [row["name"] for row in result["rows"]] == ["MAFT", "MAFT + ST"]
    figures: Any = [row["per_seed"][0] for row in result["rows"]]
    assert all(0 < figure < 100 for row in figures for figure in row) and figures[0] != figures[1]


# The memory of labelled masks, which no row of finetune and evaluate can be


def test_a_quick_run_of_the_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "_FEW", 4)
    monkeypatch.setitem(datasets._SCENES, "train", 60)
    assert cli.main(["paper", "bank", "--quick", "--out", str(tmp_path)]) == 0
    (result,) = json.loads((tmp_path / "tables.json").read_text())
    assert [row["name"] for row in result["rows"]] == [
        "words alone", "1 mask a class", "5 masks a class", "20 masks a class"
    ]  # fmt: skip
    assert result["x"] == [0, 1, 2, 3] and result["quick"]
    (words,), *others = (row["per_seed"] for row in result["rows"])
    assert len(words) == len(result["columns"]) == 6 and all(row[0] != words for row in others)
    assert words == pytest.approx(words_alone(4), abs=1e-6)
    assert "paper: " not in paper.text(result)  # it published nothing like it
    with Image.open(tmp_path / "table-bank.png") as picture:
        assert picture.width > 300

    monkeypatch.setattr(paper, "_bank_figures", None)
    assert paper.measure("bank", paper.World(quick=True), [0], tmp_path) == result  # goes on with what is there


def words_alone(count: int) -> list[float]:
    """hIoU and what it is made of, of the frozen CLIP and of the fine-tuned one, without any bank."""
    scenes = open_dataset(f"shapes:{paper._BANK_SEED}")
    found = []
    for model in (frozen_model(), load_model()):
        text = text_classifier(model.clip, model.tokenizer, scenes.class_names, model.templates)
        evaluator = Evaluator(scenes, proposer("superpixels"), mask_aware_scorer(model, text))
        pixels = torch.stack([evaluator(scenes[i]).pixels for i in range(count)]).sum(0)
        scores = evaluation_scores(pixels, scenes.unseen)
        found += [scores["miou_seen"], scores["miou_unseen"], scores["hiou"]]
    return found


def test_the_bank_of_a_data_set_takes_the_default_runs_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "tree"
    for split in ("train", "val"):
        for i in range(2):
            scene = render_scene((7, split == "val", i))
            for kind, values in (("images", scene.image), ("labels", scene.labels)):
                path = root / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    tower = tmp_path / "tower.safetensors"
    save_mask_aware(load_model().clip.visual, tower)
    monkeypatch.setattr(paper.Runs, "run", lambda self, options: tmp_path if options == () else None)
    world = paper.World("folder", ("--root", str(root)))
    result = paper.measure("bank", world, [0], tmp_path / "out")
    for row in result["rows"]:
        ((seen, unseen, hiou), second) = row["per_seed"][0][:3], row["per_seed"][0][3:]
        assert seen > 0 and unseen is None and hiou is None and second[0] > 0
    assert "-" in paper.text(result)
    paper.write(result, tmp_path / "out")
    with pytest.raises(RuntimeError, match="name another folder"):
        paper.measure("bank", paper.World("folder", ("--root", "elsewhere")), [0], tmp_path / "out")
