"""The demo with a handful of scenes and a CLIP of random weights: what it computes, writes and leaves behind."""

import base64
import copy
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from maft_adapter import make_mask_aware
from maft_adapter.baselines import encode_crops
from maft_adapter.classify import text_classifier
from maft_adapter.data import Item, open_dataset
from maft_adapter.finetune import finetune
from maft_adapter.masks import masks_on_grid
from maft_adapter.models import WORLD_TEMPLATES
from maft_adapter.pictures import read_picture
from maft_adapter.proposals import Proposals
from maft_adapter.proposals.merging import Superpixels, propose_masks
from maft_adapter.shapes import CLASSES, SEEN, UNSEEN, demo, preprocess, tokenize
from maft_adapter.shapes.clip import create_clip

NAMES = ["frozen_mask_crop", "ip_clip", "ip_clip_ma", "ip_clip_ma_dis"]
TINY = demo.Recipe(
    start_layer=2, iterations=3, lr=1e-2, batch_size=2, min_contrast=0.3, train_scenes=3, eval_scenes=5, curve_every=2
)
SEEDS = [3, 5]


def draw_here(seed: int, split: str, count: int, proposals: Superpixels) -> demo.Scenes:
    """What `demo.draw_scenes` gives with few proposals, without starting processes."""
    assert proposals.min_contrast == {"val": 0, "train": TINY.min_contrast}[split]
    dataset = open_dataset(f"shapes:{seed}", split=split)
    items = [dataset[i] for i in range(count)]
    few = replace(proposals, most=12)
    named = {item.name: few(read_picture(item.picture)) for item in items}
    return demo.Scenes(**vars(dataset), items=items, proposals=named, settings=few.settings)


@pytest.fixture(scope="module")
def clip() -> Any:
    torch.manual_seed(0)
    model = create_clip().eval()
    with torch.no_grad():
        for parameter in model.visual.parameters():  # fresh weights give all images the same embedding
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK", TINY)
    monkeypatch.setattr(demo, "draw_scenes", draw_here)


@pytest.fixture(scope="module")
def folder(clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run over two seeds wrote to."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(demo, "QUICK", TINY)
        monkeypatch.setattr(demo, "draw_scenes", draw_here)
        out = tmp_path_factory.mktemp("demo")
        demo.run_demo(out, SEEDS, quick=True, clip=clip)
    return out


@pytest.fixture(scope="module")
def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_metrics_have_the_promised_structure(metrics: dict[str, Any]) -> None:
    assert [row["name"] for row in metrics["rows"]] == NAMES
    assert metrics["seeds"] == SEEDS
    assert metrics["seconds"] > 0
    for row in metrics["rows"]:
        assert [numbers["seed"] for numbers in row["per_seed"]] == SEEDS
        for key in ("miou_seen", "miou_unseen", "hiou"):
            values = [numbers[key] for numbers in row["per_seed"]]
            assert row[key] == pytest.approx(np.mean(values))
            assert row["std"][key] == pytest.approx(np.std(values, ddof=1))
        assert row["seconds_per_image"] > 0
    gmacs = [row["gmacs"] for row in metrics["rows"]]
    assert gmacs[1] == gmacs[2] == gmacs[3] < gmacs[0]


def test_history_and_curves(metrics: dict[str, Any]) -> None:
    runs = [(seed, name) for seed in SEEDS for name in NAMES[2:]]
    assert [(run["seed"], run["name"]) for run in metrics["history"]] == runs
    assert [(run["seed"], run["name"]) for run in metrics["curves"]] == runs
    rows = {row["name"]: row for row in metrics["rows"]}
    for run in metrics["history"]:
        assert len(run["mask_aware"]) == TINY.iterations
        assert any(run["self_distillation"]) == (run["name"] == "ip_clip_ma_dis")
    for run in metrics["curves"]:
        assert run["iterations"] == [0, 2, 3]
        seed = SEEDS.index(run["seed"])
        for key in ("miou_seen", "miou_unseen"):
            # from the row without fine-tuning to the row itself
            assert run[key][0] == rows["ip_clip"]["per_seed"][seed][key]
            assert run[key][-1] == rows[run["name"]]["per_seed"][seed][key]
            assert len(run[key]) == 3


@torch.no_grad()
def scores_by_hand(picture: Any, masks: NDArray[Any], clip: Any, crops: bool) -> NDArray[np.float64]:
    """(N, C) probabilities, zero where a proposal must not vote."""
    images, proposals = preprocess(picture)[None], torch.from_numpy(masks)[None]
    if crops:
        embeddings, valid = (tensor[0].numpy().astype(float) for tensor in encode_crops(clip, images, proposals))
    else:
        visual = make_mask_aware(copy.deepcopy(clip.visual), TINY.start_layer)
        embeddings = visual(images, proposals)[0].numpy().astype(float)
        valid = masks_on_grid(proposals, (12, 12)).flatten(2).any(-1)[0].numpy()
    text = text_classifier(clip, tokenize, CLASSES, WORLD_TEMPLATES).numpy().astype(float)
    cosine = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)) @ text.T
    exponential = np.exp(float(clip.logit_scale.exp()) * cosine)
    return valid[:, None] * exponential / exponential.sum(1, keepdims=True)


def miou_by_hand(truths: list[Any], predictions: list[Any], classes: Sequence[str]) -> float:
    truth, prediction = np.concatenate(truths, axis=None), np.concatenate(predictions, axis=None)
    ious = []
    for k in (CLASSES.index(name) for name in classes):
        if (truth == k).any():
            ious.append(((truth == k) & (prediction == k)).sum() / ((truth == k) | (prediction == k)).sum())
    return 100 * float(np.mean(ious))


@pytest.mark.parametrize(("row", "crops"), [(0, True), (1, False)])
def test_rows_equal_a_computation_by_hand(row: int, crops: bool, metrics: dict[str, Any], clip: Any) -> None:
    truths, predictions = [], []
    scenes = draw_here(SEEDS[0], "val", TINY.eval_scenes, Superpixels())
    for item in scenes:
        masks = scenes.proposals[item.name].masks
        votes = np.einsum("nc,nhw->chw", scores_by_hand(item.picture, masks, clip, crops), masks.astype(float))
        predictions.append(np.where(votes.max(0) > 0, votes.argmax(0), 255))
        truths.append(item.labels)
    seen, unseen = (miou_by_hand(truths, predictions, classes) for classes in (SEEN, UNSEEN))
    numbers = metrics["rows"][row]["per_seed"][0]
    assert numbers["miou_seen"] == pytest.approx(seen, abs=1e-4)
    assert numbers["miou_unseen"] == pytest.approx(unseen, abs=1e-4)
    hiou = 2 * seen * unseen / (seen + unseen) if seen + unseen else 0
    assert numbers["hiou"] == pytest.approx(hiou, abs=1e-4)


def test_label_maps_of_every_row_give_its_scores(tiny: None, clip: Any) -> None:
    scenes = draw_here(3, "val", TINY.eval_scenes, Superpixels())
    scores = []
    for row in demo.run_seed(3, scenes, TINY, demo.frozen_model(TINY.start_layer, clip)):
        masks = torch.from_numpy(scenes.proposals[scenes[0].name].masks)
        scores.append(row.scorer(read_picture(scenes[0].picture), masks)[0])
        for key, classes in (("miou_seen", SEEN), ("miou_unseen", UNSEEN)):
            by_hand = miou_by_hand([item.labels for item in scenes], row.evaluation.label_maps, classes)
            assert row.evaluation.scores[key] == pytest.approx(by_hand, abs=1e-4)
    for i, first in enumerate(scores):  # each row has an encoder of its own
        assert not any(torch.allclose(first, second, atol=1e-6) for second in scores[:i])


def test_fine_tuning_knows_seen_classes_only(
    tiny: None, clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, Tensor, Tensor]] = []

    def spy(model: Any, samples: Any, text: Tensor, **options: Any) -> Any:
        calls.append((samples, text, options["teacher_scores"]))
        return finetune(model, samples, text, **options)

    monkeypatch.setattr(demo, "finetune", spy)
    # Scenes that show every class, so that no unseen one is missed by chance.
    everything = np.arange(96 * 96, dtype=np.uint8).reshape(96, 96) % len(CLASSES)
    scenes = draw_here(3, "train", 3, Superpixels(min_contrast=TINY.min_contrast))
    scenes = replace(scenes, items=[item._replace(labels=everything) for item in scenes])
    evaluation = draw_here(3, "val", 1, Superpixels())
    monkeypatch.setattr(demo, "draw_scenes", lambda seed, split, count, proposals: scenes)
    list(demo.run_seed(3, evaluation, TINY, demo.frozen_model(TINY.start_layer, clip)))

    assert len(calls) == 2
    for samples, text, teacher_scores in calls:
        assert torch.equal(text, text_classifier(clip, tokenize, SEEN, WORLD_TEMPLATES))
        assert teacher_scores.shape == (3, len(SEEN))
        for sample, item in zip(samples, scenes, strict=True):
            for label, k in zip(sample.labels.flatten().tolist(), item.labels.flatten().tolist(), strict=True):
                name = CLASSES[k]
                assert (label == -1) if name in UNSEEN else (SEEN[label] == name)
            assert (sample.masks.numpy() == scenes.proposals[item.name].masks).all()


def test_no_scene_serves_twice() -> None:
    datasets = [open_dataset(f"shapes:{seed}", split=split) for split in ("train", "val") for seed in (0, 1)]
    assert len({read_picture(dataset[i].picture).tobytes() for dataset in datasets for i in range(5)}) == 20


def test_scenes_are_the_same_on_all_cores() -> None:
    scenes = demo.draw_scenes(7, "train", 2, Superpixels(min_contrast=0.4))
    dataset = open_dataset("shapes:7", split="train")
    for i, item in enumerate(scenes):
        np.testing.assert_array_equal(item.picture, dataset[i].picture)
        np.testing.assert_array_equal(item.labels, dataset[i].labels)
        masks = propose_masks(read_picture(item.picture), min_contrast=0.4)
        np.testing.assert_array_equal(scenes(read_picture(item.picture), item.name).masks, masks)


def test_a_seed_repeats_whatever_ran_before(tiny: None, clip: Any, metrics: dict[str, Any], tmp_path: Path) -> None:
    again = demo.run_demo(tmp_path, SEEDS[1:], quick=True, clip=clip)
    for row, before in zip(again["rows"], metrics["rows"], strict=True):
        assert row["std"] == {"miou_seen": 0, "miou_unseen": 0, "hiou": 0}
        for key in ("miou_seen", "miou_unseen", "hiou"):
            assert row[key] == before["per_seed"][1][key]


def test_the_given_clip_stays_unchanged(folder: Path, clip: Any) -> None:
    torch.manual_seed(0)
    fresh = create_clip().eval()
    with torch.no_grad():
        for parameter in fresh.visual.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    assert type(clip.visual) is type(fresh.visual)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, clip.state_dict()[name]), name


def test_the_folder_holds_the_report_its_figures_and_the_metrics(folder: Path) -> None:
    written = ["curves.png", "figure1.png", "label_maps.png", "metrics.json", "report.html", "tower.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == written
    page = (folder / "report.html").read_text(encoding="utf-8")
    for name in ("curves", "figure1", "label_maps"):
        assert base64.b64encode((folder / f"{name}.png").read_bytes()).decode() in page


def test_ctrl_c_leaves_the_finished_rows(
    tiny: None, clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[Any] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        runs.append(options)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return finetune(*arguments, **options)

    monkeypatch.setattr(demo, "finetune", interrupted)
    (tmp_path / "report.html").write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, [0], quick=True, clip=clip)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "report.html"]
    assert (tmp_path / "report.html").read_text() == "of an earlier run"
    kept = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in kept["rows"]] == NAMES[:3]
    assert [run["name"] for run in kept["history"]] == NAMES[2:3]
    assert f"3 of 4 rows were finished: {tmp_path / 'metrics.json'}" in capsys.readouterr().out


def test_typical_proposals_are_the_thing_its_background_and_both() -> None:
    labels = np.full((96, 96), CLASSES.index("pale sand"), np.uint8)
    labels[60:] = CLASSES.index("dark brick")
    labels[5:55, 20:70] = CLASSES.index("red star")
    thing, sand, brick = (labels == CLASSES.index(name) for name in ("red star", "pale sand", "dark brick"))
    part = thing.copy()
    part[:30] = False
    masks = np.stack([part, sand | thing, brick | sand, thing, sand, np.ones_like(thing)])
    pixels = np.zeros((96, 96, 3), np.uint8)
    blank = Item(pixels, np.full_like(labels, CLASSES.index("pale sand")), "blank")
    shown = Item(pixels, labels, "shown")
    dataset = open_dataset("shapes")
    proposals = {item.name: Proposals(masks) for item in (blank, shown)}
    scenes = demo.Scenes(**vars(dataset), items=[blank, shown], proposals=proposals, settings="by hand")

    item, indices, classes = demo.typical_proposals(scenes)
    assert item is shown
    assert [indices[0], indices[2]] == [3, 1]
    assert indices[1] == 4
    names = [[CLASSES[k] for k in row] for row in classes]
    assert names == [["red star"], ["pale sand"], ["red star", "pale sand"]]


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1]])
def test_wrong_seeds_are_refused_before_anything_is_written(seeds: list[int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=re.escape(f"got {seeds}")):
        demo.run_demo(out, seeds, quick=True)
    assert not out.exists()
