"""The FreeSeg shim on the real repository: FREESEG_ROOT and DETECTRON2_ROOT name checkouts of both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from stand_ins import Host, HostRunner, figures, metrics, predictions, read, stage2

SEMANTIC = ("INPUT.TASK_NAME", "['semantic segmentation.']")
TWO_CLIPS = ("MODEL.CLIP_ADAPTER.SEPERATE_ADAPTER", True)
VARIANTS: dict[str, tuple[Any, ...]] = {
    "one CLIP": (),
    "two CLIPs": TWO_CLIPS,
    "CLIP alone": ("MODEL.CLIP_ADAPTER.CLIP_ENSEMBLE_WEIGHT", 0.0),
    "another threshold": ("MODEL.CLIP_ADAPTER.MASK_THR", 0.9),
    "no valid proposal": ("MODEL.CLIP_ADAPTER.MASK_THR", 1.0),
}


@pytest.fixture(scope="module")
def runner(start_host: Callable[..., HostRunner]) -> HostRunner:
    runner = start_host("FREESEG_ROOT", "third_party/CLIP", SMALL_CLIP="{folder}/clip.pt")
    stand_ins.write_voc(runner.folder)
    runner.call(stand_ins.write_clip, runner.folder / "clip.pt")
    return runner


@pytest.fixture(scope="module")
def freeseg(runner: HostRunner) -> Host:
    """With all three tasks, and no overlap too small for an instance."""
    options = (
        *stand_ins.small("ViT-B/16"),
        *("MODEL.SEM_SEG_HEAD.EMB_SIZE", 32, "MODEL.SEM_SEG_HEAD.EMBED_DIM", 64),
        *("MODEL.SEM_SEG_HEAD.EMBED_HIDDEN_DIM", 64, "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0),
        *("INPUT.TASK_NAME", "['semantic segmentation.', 'instance segmentation.', 'panoptic segmentation.']"),
    )
    config = f"{runner.paths[0]}/configs/voc-11k-15/mask2former_R50_bs16_20k.yaml"
    return Host("freeseg", "mask2former", config, options)


def test_patched_and_unpatched(runner: HostRunner, freeseg: Host) -> None:
    runner.call(stand_ins.patch_and_back, freeseg)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_classifier_changes(runner: HostRunner, freeseg: Host, variant: str) -> None:
    """In semantic, instance and panoptic segmentation alike."""
    results, difference = runner.call(stand_ins.host_features_through_the_shim, freeseg.but(*VARIANTS[variant]))
    assert results > 2 * 6 and difference < 1e-5  # there are segments beside the masks, boxes and scores


@pytest.fixture(scope="module")
def semantic(runner: HostRunner, freeseg: Host) -> Host:
    return freeseg.but(*SEMANTIC)


@pytest.fixture(scope="module")
def untrained(runner: HostRunner, semantic: Host) -> Path:
    runner.call(stand_ins.save_model, semantic, runner.folder / "stage1.pth")
    return runner.folder / "stage1.pth"


@pytest.fixture(scope="module")
def trained(runner: HostRunner, semantic: Host, untrained: Path) -> str:
    """The output of two iterations on one process."""
    return stage2(runner, semantic, "one", untrained)


def test_stage_2_trains_the_tower_and_saves_no_teacher(runner: HostRunner, untrained: Path, trained: str) -> None:
    before, after = read(untrained), read(runner.folder / "one" / "model_final.pth")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "clip_adapter.clip_model.visual.proj" in changed
    assert all(name.startswith("clip_adapter.clip_model.visual.") and ".mlp." not in name for name in changed)
    assert 0 < metrics(runner.folder / "one")["loss_mask_aware"] < 1
    assert all(value >= 0 for value in figures(trained).values())


def test_two_processes(runner: HostRunner, semantic: Host, untrained: Path) -> None:
    output = stage2(runner, semantic, "two", untrained, "--num-gpus", "2", "--dist-url", "auto")
    assert all(value >= 0 for value in figures(output).values())
    assert read(runner.folder / "two" / "model_final.pth").keys() == read(untrained).keys()


@pytest.mark.parametrize("options", [(), TWO_CLIPS], ids=["one CLIP", "two CLIPs"])
def test_evaluation_keeps_the_fine_tuned_clip(
    runner: HostRunner, semantic: Host, options: tuple[Any, ...], request: pytest.FixtureRequest
) -> None:
    """With two CLIPs `--eval-only` copies one over the other, so its predictions were not those of the training."""
    host, name = semantic.but(*options), request.node.callspec.id.replace(" ", "_")
    runner.call(stand_ins.save_model, host, runner.folder / f"{name}.pth")
    output = stage2(runner, host, name, runner.folder / f"{name}.pth")
    checkpoint = runner.folder / name / "model_final.pth"
    again = stage2(runner, host, f"{name}_evaluated", checkpoint, "--eval-only")
    if not options:
        assert figures(again) == figures(output)
        assert predictions(runner.folder / name) == predictions(runner.folder / f"{name}_evaluated")
    kept, tower = runner.call(eval_only, host, checkpoint)
    assert all(torch.equal(kept[name], tower[name]) for name in tower)


def eval_only(host: Host, checkpoint: Path) -> tuple[Any, Any]:
    """The tower after what train_net.py --eval-only does with a checkpoint, and that in the checkpoint."""
    from maft_adapter.checkpoint import visual_weights

    model = host.shim.patch(host.build(), start_layer=2, size=96)
    model.load_state_dict(read(checkpoint))
    if model._region_clip_adapter is not None:
        prompts = model.clip_adapter.prompt_learner.prefix_prompt
        model._region_clip_adapter.load_state_dict(model.clip_adapter.state_dict())
        assert torch.equal(model._region_clip_adapter.prompt_learner.prefix_prompt, prompts)  # the rest is copied
    return host.shim.visual(model).state_dict(), visual_weights(checkpoint)


def test_the_authors_checkpoint(runner: HostRunner, semantic: Host) -> None:
    """Laid out as the released one: the fine-tuned tower under IPCLIP., a frozen one beside it."""
    path = runner.folder / "maft.pth"
    runner.call(save_as_authors, semantic, path)
    expected = {name: value for name, value in read(path).items() if name.startswith("IPCLIP.")}
    tower = runner.call(loaded_tower, semantic, path)
    assert {f"IPCLIP.{name}" for name in tower} == expected.keys()
    assert all(torch.equal(value, expected[f"IPCLIP.{name}"]) for name, value in tower.items())


def test_the_authors_checkpoint_is_evaluated(runner: HostRunner, semantic: Host, untrained: Path) -> None:
    path = runner.folder / "maft.pth"
    runner.call(save_as_authors, semantic, path)
    output = stage2(runner, semantic.but("MODEL.MAFT.TOWER", path), "authors", untrained, "--eval-only")
    assert all(value >= 0 for value in figures(output).values())
    runner.call(move_tower, untrained, path, runner.folder / "moved.pth")
    assert figures(stage2(runner, semantic, "moved", runner.folder / "moved.pth", "--eval-only")) == figures(output)
    assert predictions(runner.folder / "moved") == predictions(runner.folder / "authors")
    with pytest.raises(AssertionError, match=r"IPCLIP.*name the file in MODEL\.MAFT\.TOWER"):
        stage2(runner, semantic, "refused", path, "--eval-only")


def move_tower(checkpoint: Path, authors: Path, path: Path) -> None:
    """A checkpoint of FreeSeg with the tower out of another's."""
    visual = "clip_adapter.clip_model.visual."
    tuned = {n.replace("IPCLIP.", visual): value for n, value in read(authors).items() if n.startswith("IPCLIP.")}
    torch.save({"model": {**read(checkpoint), **tuned}}, path)


def save_as_authors(host: Host, path: Path) -> None:
    adapter = host.build_random().clip_adapter.state_dict(prefix="clip_adapter.")
    visual = "clip_adapter.clip_model.visual."
    tower = {name.removeprefix(visual): value for name, value in adapter.items() if name.startswith(visual)}
    tuned = {f"IPCLIP.{name}": value + 1 for name, value in tower.items()}
    torch.save({"model": {**adapter, **tuned, **{f"T.{name}": value for name, value in tower.items()}}}, path)


def loaded_tower(host: Host, path: Path) -> Any:
    model = host.shim.patch(host.build(), start_layer=2)
    host.shim.load_visual(host.shim.visual(model), path)
    return host.shim.visual(model).state_dict()
