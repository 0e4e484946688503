"""Every layout of every data set through the commands: check, two iterations of fine-tuning, evaluation."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import CASES, write_labels
from torch import Tensor

from maft_adapter import classify, cli
from maft_adapter.data import class_list
from maft_adapter.data.layouts import LAYOUTS

SIDE = 24


def write_scene(root: Path, picture: str, labels: str, values: list[int]) -> None:
    """Stripes, one of each value, in colours of their own."""
    stripes = np.repeat(np.arange(len(values)), SIDE)  # (W,)
    pixels = np.random.default_rng(0).integers(0, 256, (len(values), 3), dtype=np.uint8)[stripes]  # (W, 3)
    (root / picture).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(pixels[None], SIDE, 0)).save(root / picture, quality=95)
    write_labels(root / labels, np.repeat(np.array(values)[stripes][None], SIDE, 0))


def text_of(classes: int) -> Tensor:
    """(C, 64) unit vectors in place of names."""
    drawn = torch.randn(classes, 64, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn, dim=-1)


@pytest.mark.parametrize(("name", "layout", "base", "picture", "labels", "values", "listed"), CASES)
def test_check_finetune_evaluate(
    name: str,
    layout: str,
    base: str,
    picture: str,
    labels: str,
    values: Mapping[int, int | None],
    listed: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The small CLIP has no words for these classes, and up to 847 would take seconds.
    monkeypatch.setattr(classify, "text_classifier", lambda clip, tokenizer, names, templates: text_of(len(names)))
    root, classes = tmp_path / "root", class_list(name).names
    splits = {one.name: one.splits for one in LAYOUTS[name]}[layout]
    write_scene(root / base, picture, labels, list(values))
    trains = "train" in splits
    if listed:
        (root / base / listed).parent.mkdir(parents=True, exist_ok=True)
        (root / base / listed).write_text("a\n")
        write_scene(root / base, picture.replace("a.jpg", "b.jpg"), labels.replace("/a", "/b"), list(values))
    elif trains:
        there, here = splits["val"], splits["train"]
        of_train = [
            path.replace(f"/{there}", f"/{here}").replace(f"_{there}/", f"_{here}/") for path in (f"/{picture}", labels)
        ]
        write_scene(
            root / base, of_train[0][1:].replace("a.jpg", "b.jpg"), of_train[1].replace("/a", "/b"), list(values)
        )
    given = ["--data", name, "--root", str(root)]

    assert cli.main(["data", "check", str(root), "--data", name]) == 1  # the published counts are others
    assert layout in (said := capsys.readouterr().out) and "published are" in said

    tuned, scores = tmp_path / "tuned", tmp_path / "scores"
    if trains:
        few = ["--iterations", "2", "--batch-size", "1", "--lr", "1e-3", "--cpu", "--workers", "0"]
        assert cli.main(["finetune", *given, *few, "--proposals", "superpixels+ground-truth", "--out", str(tuned)]) == 0
        assert len((tuned / "log.jsonl").read_text().splitlines()) == 2
        given += ["--checkpoint", str(tuned)]
    assert cli.main(["evaluate", *given, "--proposals", "ground-truth", "--out", str(scores)]) == 0
    settings = json.loads((scores / "metrics.json").read_text())["settings"]
    assert (settings["layout"], settings["pictures"], settings["names"]) == (layout, 1, "plain")
    rows = list(csv.DictReader((scores / "per_class.csv").open(encoding="utf-8")))
    assert len(rows) == len(classes)
    # Ground-truth masks cover all that counts, so these classes, and no others, have pixels.
    counted = {k for k, row in enumerate(rows) if int(row["pixels"])}
    assert counted == {k for k in values.values() if k is not None}
