"""`maft-adapter finetune`: from a data set on disk to a tower, resumed, with a log; few steps on the embedded CLIP."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from maft_adapter import cli, make_mask_aware
from maft_adapter.classify import text_classifier
from maft_adapter.data import datasets, open_dataset
from maft_adapter.evaluate import Evaluator, PseudoLabelled, mask_aware_scorer
from maft_adapter.finetune import SegmentationSamples, finetune
from maft_adapter.models import load_model
from maft_adapter.proposals.merging import Superpixels
from maft_adapter.shapes import SEEN, render_scene
from maft_adapter.shapes.demo import RECIPE, draw_scenes, frozen_model, image_scores


@pytest.fixture(autouse=True)
def one_accelerator_each() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Scenes of the embedded world as a folder of pictures, with two classes that its names call sky and ball."""
    root = tmp_path / "tree"
    for split in ("train", "val"):
        for i in range(3):
            scene = render_scene((7, split == "val", i))
            picture, labels = (root / kind / split / f"{i}.png" for kind in ("images", "labels"))
            for path, values in ((picture, scene.image), (labels, scene.labels.astype(np.uint8))):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
    names = open_dataset("shapes").class_names
    (root / "classes.txt").write_text("\n".join(name for (name,) in names))
    return root


def run(out: Path, *arguments: str) -> int:
    shared = ["--cpu", "--workers", "0", "--iterations", "4", "--batch-size", "2", "--lr", "1e-3"]
    return cli.main(["finetune", *shared, "--out", str(out), *arguments])


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_shapes_trains_as_the_demo_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(datasets._SCENES, "train", 4)
    out = tmp_path / "out"
    assert (
        cli.main(["finetune", "--data", "shapes", "--iterations", "2", "--cpu", "--workers", "0", "--out", str(out)])
        == 0
    )
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["lr"], settings["batch_size"]) == (RECIPE.lr, RECIPE.batch_size)

    model = frozen_model()
    train = draw_scenes(0, "train", 4, Superpixels(min_contrast=RECIPE.min_contrast))
    dataset = SegmentationSamples(train, model, train.seen, train)
    samples = [dataset[i] for i in range(4)]
    text = text_classifier(model.clip, model.tokenizer, SEEN, model.templates)
    teacher_scores = image_scores(model.clip, samples, text, model.logit_scale)
    finetune(model.clip, samples, text, iterations=2, lr=RECIPE.lr, teacher_scores=teacher_scores, progress=False)
    tower = load_file(out / "tower.safetensors")
    assert all(torch.equal(tower[name], value) for name, value in model.clip.visual.state_dict().items())


@pytest.mark.parametrize("proposals", ["superpixels", "ground-truth", "superpixels+ground-truth"])
def test_a_folder_of_pictures_stopped_and_resumed(proposals: str, tree: Path, tmp_path: Path) -> None:
    given = ["--data", "folder", "--root", str(tree), "--proposals", proposals, "--checkpoint-every", "2"]
    given += ["--validate-every", "2", "--validate-on", "2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(whole, *given) == 0
    assert {file.name for file in whole.iterdir()} >= {"tower.safetensors", "best.safetensors", "state.pt", "log.jsonl"}
    entries = log(whole)
    assert [entry["iteration"] for entry in entries] == [1, 2, 3, 4]
    assert [0 < entry["miou"] <= 100 for entry in entries if "miou" in entry] == [True, True]

    with pytest.MonkeyPatch.context() as patch:
        add = cli.finetune._Log.add

        def stop(self: Any, entry: dict[str, float]) -> bool:
            if entry["iteration"] == 3:
                raise KeyboardInterrupt
            return add(self, entry)

        patch.setattr(cli.finetune._Log, "add", stop)
        assert run(stopped, *given) == 130
    with (stopped / "log.jsonl").open("a") as file:
        file.write('{"iteration": 4, "mask_aware": 9}\n{"iterat')  # of what is done again, and cut off
    assert run(stopped, *given, "--resume") == 0
    for name in ("tower.safetensors", "best.safetensors"):
        a, b = load_file(whole / name), load_file(stopped / name)
        assert all(torch.equal(value, b[key]) for key, value in a.items()), name
    drop = ("seconds",)
    by_iteration = {entry["iteration"]: entry for entry in log(stopped)}
    for entry in entries:  # that of the stop, too
        assert all(by_iteration[entry["iteration"]][key] == entry[key] for key in entry if key not in drop)


def test_the_recipe_of_maskclippp(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", "folder", "--root", str(tree), "--recipe", "maskclip++"]
    out, both = tmp_path / "out", tmp_path / "both"
    assert run(out, *given) == 0
    settings = json.loads((out / "settings.json").read_text())
    expected = {"recipe": "maskclip++", "proposals": "ground-truth", "distillation_weight": 0}
    assert {key: settings[key] for key in expected} == expected
    assert all(entry["mask_classification"] > 0 == entry["self_distillation"] for entry in log(out))
    assert run(both, *given, "--distillation-weight", "1", "--proposals", "ground-truth") == 0
    assert log(both)[-1]["self_distillation"] > 0
    assert run(tmp_path / "wrong", *given, "--proposals", "superpixels") == 1
    assert "--proposals superpixels: --recipe maskclip++ trains on ground-truth masks alone" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_a_folder_with_something_else_is_left_alone(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", "folder", "--root", str(tree), "--proposals", "ground-truth"]
    other, out = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    (other / "tower.safetensors").write_bytes(b"mine")
    assert run(other, *given) == 1
    assert "holds other files" in capsys.readouterr().err and (other / "tower.safetensors").read_bytes() == b"mine"
    assert run(out, *given, "--freeze", "most") == 1  # which leaves nothing that the next run could harm
    assert run(out, *given, "--iterations", "1", "--resume", "--tensorboard") == 0
    assert list((out / "tensorboard").iterdir())
    capsys.readouterr()
    before = (out / "tower.safetensors").read_bytes()
    assert run(out, *given, "--iterations", "1") == 1
    assert "--resume goes on with it" in capsys.readouterr().err
    assert run(out, *given, "--resume", "--seed", "1", "--iterations", "1") == 1
    assert "seed (there 0, here 1)" in capsys.readouterr().err
    assert (out / "tower.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "shapes", "--setting", "all", "--freeze", "most"], "unknown freeze 'most'"),
        (["--data", "nothing"], "unknown data set 'nothing'"),
        (["--data", "shapes", "--proposals", "magic"], "proposals are 'magic'"),
        (["--data", "shapes", "--model", "ViT-B-32"], "has no weights yet"),
    ],
)
def test_wrong_arguments_exit_with_1_and_say_why(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(datasets._SCENES, "train", 2)
    assert run(tmp_path / "out", *arguments) == 1
    assert message in capsys.readouterr().err


def test_self_training_labels_unseen_classes_and_nothing_else(tmp_path: Path) -> None:
    model = load_model()
    train = open_dataset("shapes", split="train")
    text = text_classifier(model.clip, model.tokenizer, train.class_names, model.templates)
    evaluator = Evaluator(train, Superpixels(), mask_aware_scorer(model, text))
    labelled = PseudoLabelled(evaluator)
    hidden, right = 0, 0
    for i in range(8):
        given, item = labelled[i].labels, train[i]
        known = np.isin(item.labels, train.seen)
        assert (given[known] == item.labels[known]).all()
        assert set(np.unique(given[~known])) <= {*train.unseen, 255}
        hidden += (~known).sum()
        right += (given[~known] == item.labels[~known]).sum()
    assert 0.3 * hidden < right < hidden  # of the model, which is good but not perfect

    first, second = tmp_path / "first", tmp_path / "second"
    few = ["finetune", "--data", "shapes", "--limit", "3", "--iterations", "2", "--batch-size", "2", "--cpu"]
    assert cli.main([*few, "--out", str(second), "--self-training", str(first)]) == 1 and not second.exists()
    assert cli.main([*few, "--out", str(first)]) == 0
    assert cli.main([*few, "--out", str(second), "--self-training", str(first)]) == 0
    assert json.loads((second / "settings.json").read_text())["pictures"] == 3
    towers = [load_file(folder / "tower.safetensors") for folder in (first, second)]
    assert any(not torch.equal(value, towers[1][name]) for name, value in towers[0].items())


def test_ground_truth_masks_label_nothing_in_self_training() -> None:
    train = open_dataset("shapes", split="train")
    given: Any = lambda *_: None  # noqa: E731
    for evaluator in (Evaluator(train, None, given), Evaluator(train, Superpixels())):
        with pytest.raises(ValueError, match="would be the ground truth"):
            PseudoLabelled(evaluator)


def test_options_without_an_effect_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["finetune", "--data", "shapes", "--iterations", "1", "--out", str(tmp_path / "out")]
    for options, message in (
        (["--recipe", "maskclip++", "--loss", "kl"], "--loss kl"),
        (["--root", str(tmp_path)], f"--root {tmp_path}: shapes is drawn"),
        (["--proposals", "ground-truth", "--keep", str(tmp_path)], "--keep: ground-truth masks are not kept"),
        (["--recipe", "maskclip++", "--keep", str(tmp_path)], "--keep: ground-truth masks are not kept"),
    ):
        assert cli.main([*given, *options]) == 1
        assert message in capsys.readouterr().err
    for options in (["--size", "0"], ["--batch-size", "0"], ["--checkpoint-every", "0"], ["--limit", "0"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*given, *options])
        assert f"{options[0]} 0: expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_transformers_clips_are_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=small, projection_dim=16)).eval()
    make_mask_aware(clip.vision_model, start_layer=1)
    monkeypatch.setattr(cli.finetune, "_frozen_model", lambda arguments: load_model()._replace(clip=clip))
    assert cli.main(["finetune", "--data", "shapes", "--model", "a/clip", "--out", str(tmp_path / "out")]) == 1
    assert "whose projection lies outside the tower" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_a_kill_leaves_of_a_file_is_no_other_file(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("settings.json.host.1.part", "log.jsonl.host.1.part"):
        (out / name).write_text("{")
    given = ["--data", "folder", "--root", str(tree), "--proposals", "ground-truth", "--iterations", "1"]
    assert run(out, *given, "--resume") == 0


@pytest.mark.parametrize("workers", ["0", "1"])
def test_masks_of_one_name_in_both_parts_are_refused(
    workers: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(3):
        np.save(masks / f"{i}.npy", np.ones((1, 96, 96), bool))
    given = ["--data", "folder", "--root", str(tree), "--proposals", f"files:{masks}", "--workers", workers]
    assert run(tmp_path / "one", *given) == 0
    assert run(tmp_path / "both", *given, "--validate-every", "4") == 1
    assert f"holds the masks of {tree / 'images' / 'train' / '0.png'}" in capsys.readouterr().err
    assert not (tmp_path / "both").exists()
    for split in ("train", "val"):
        (masks / split).mkdir()
        for i in range(3):
            np.save(masks / split / f"{i}.npy", np.ones((1, 96, 96), bool))
    assert run(tmp_path / "apart", *given, "--validate-every", "4") == 0


def test_the_kind_of_the_loss_is_the_tables(tmp_path: Path) -> None:
    few = ["finetune", "--data", "shapes", "--limit", "2", "--iterations", "1", "--batch-size", "2", "--cpu"]
    losses = {}
    for kind in ("smooth_l1", "l1", "l2", "kl"):
        assert cli.main([*few, "--loss", kind, "--out", str(tmp_path / kind), "--keep", str(tmp_path / "keep")]) == 0
        (entry,) = log(tmp_path / kind)
        losses[kind] = entry["mask_aware"]
    assert len(set(losses.values())) == 4 and losses["l1"] > losses["smooth_l1"]


def test_data_sets_without_a_recipe_or_a_split_say_so(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["finetune", "--data", "folder", "--root", str(tree), "--out", str(tmp_path / "out")]
    assert cli.main(given) == 1
    assert "names no iterations for folder: give --iterations" in capsys.readouterr().err
    assert cli.main([*given, "--iterations", "1", "--setting", "zero-shot"]) == 1
    assert "folder has no unseen classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_samples_ignore_unseen_classes_and_keep_masks_on_their_pixels() -> None:
    dataset = open_dataset("shapes", split="train")
    model = load_model()
    sample = SegmentationSamples(dataset, model, dataset.seen, Superpixels(), ground_truth_masks=True, size=48)[0]
    item = dataset[0]
    assert isinstance(item.picture, np.ndarray)
    labels = item.labels[1::2, 1::2]  # the nearest pixel of half the size
    wanted = np.full(labels.shape, -1)
    for row, k in enumerate(dataset.seen):
        wanted[labels == k] = row
    assert sample.labels.tolist() == wanted.tolist()
    expected = [*Superpixels()(item.picture).masks[:, 1::2, 1::2], *(wanted == k for k in np.unique(wanted) if k >= 0)]
    assert np.array_equal(sample.masks.numpy(), np.stack(expected))
    with pytest.raises(ValueError, match="no masks to train with"):
        SegmentationSamples(dataset, model, dataset.seen)
