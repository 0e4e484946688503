"""The ZSSeg shim on the real repository: ZSSEG_ROOT and DETECTRON2_ROOT name checkouts of both."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from stand_ins import Host, HostRunner, figures, metrics, predictions, read, stage2

LEARNABLE_REGIONS = ("MODEL.CLIP_ADAPTER.REGION_CLIP_ADAPTER.PROMPT_LEARNER", "learnable")
TWO_CLIPS = ("MODEL.CLIP_ADAPTER.SEPERATE_ADAPTER", True, *LEARNABLE_REGIONS)
VARIANTS: dict[str, tuple[Any, ...]] = {
    "one prompt": (),
    "80 prompts": ("MODEL.CLIP_ADAPTER.PROMPT_LEARNER", "imagenet"),
    "14 prompts": ("MODEL.CLIP_ADAPTER.PROMPT_LEARNER", "vild"),
    "learnable prompts": ("MODEL.CLIP_ADAPTER.PROMPT_LEARNER", "learnable"),
    "two CLIPs": TWO_CLIPS,
    "CLIP alone": ("MODEL.CLIP_ADAPTER.CLIP_ENSEMBLE_WEIGHT", 0.0),
    "another threshold": ("MODEL.CLIP_ADAPTER.MASK_THR", 0.9),
    "no valid proposal": ("MODEL.CLIP_ADAPTER.MASK_THR", 1.0),
    "crops not resized": ("MODEL.CLIP_ADAPTER.REGION_RESIZED", False),
}


@pytest.fixture(scope="module")
def runner(start_host: Callable[..., HostRunner]) -> HostRunner:
    runner = start_host("ZSSEG_ROOT", "third_party/CLIP")
    stand_ins.write_voc(runner.folder)
    runner.call(stand_ins.write_clip, runner.folder / "clip.pt")
    return runner


@pytest.fixture(scope="module")
def zsseg(runner: HostRunner) -> Host:
    config = f"{runner.paths[0]}/configs/voc-11k-15/zero_shot_maskformer_R50_single_prompt_bs16_20k.yaml"
    return Host("zsseg", "mask_former", config, stand_ins.small(runner.folder / "clip.pt"))


def test_patched_and_unpatched(runner: HostRunner, zsseg: Host) -> None:
    runner.call(stand_ins.patch_and_back, zsseg)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_classifier_changes(runner: HostRunner, zsseg: Host, variant: str) -> None:
    results, difference = runner.call(stand_ins.host_features_through_the_shim, zsseg.but(*VARIANTS[variant]))
    assert results == 2 and difference < 1e-5


def test_without_seen_flags(runner: HostRunner, zsseg: Host) -> None:
    host = zsseg.but(dataset="voc_base_sem_seg_test")
    assert runner.call(stand_ins.host_features_through_the_shim, host)[1] < 1e-5


@pytest.fixture(scope="module")
def untrained(runner: HostRunner, zsseg: Host) -> Path:
    runner.call(stand_ins.save_model, zsseg, runner.folder / "stage1.pth")
    return runner.folder / "stage1.pth"


@pytest.fixture(scope="module")
def trained(runner: HostRunner, zsseg: Host, untrained: Path) -> str:
    """The output of two iterations on one process."""
    return stage2(runner, zsseg, "one", untrained)


def test_stage_2_trains_the_attention_and_saves_no_teacher(runner: HostRunner, untrained: Path, trained: str) -> None:
    before, after = read(untrained), read(runner.folder / "one" / "model_final.pth")
    assert after.keys() == before.keys()
    visual = "clip_adapter.clip_model.visual."
    changed = {name.removeprefix(visual) for name in before if not torch.equal(before[name], after[name])}
    assert {"proj", "ln_post.weight", "transformer.resblocks.0.attn.in_proj_weight"} <= changed
    assert all(re.match(r"proj$|ln_|transformer\.resblocks\.\d+\.(ln_|attn\.)", name) for name in changed)
    written = metrics(runner.folder / "one")
    assert 0 < written["loss_mask_aware"] < 1
    assert written["total_loss"] == pytest.approx(written["loss_mask_aware"] + written["loss_self_distillation"])
    assert 0 < written["lr"] < 1e-5  # the paper's, decayed by the host


def test_the_paper_s_settings_are_the_defaults(runner: HostRunner, trained: str) -> None:
    config = (runner.folder / "one" / "config.yaml").read_text(encoding="utf-8")
    assert "BASE_LR: 1.0e-05" in config and "WEIGHT_DECAY: 1.0e-05" in config
    assert "DISTILLATION_WEIGHT: 1.0" in config and "META_ARCHITECTURE: MAFT_zsseg" in config
    assert "CHECKPOINT_PERIOD: 20\n" in config and "WARMUP_ITERS: 0\n" in config


def test_evaluation_is_mask_aware(runner: HostRunner, zsseg: Host, trained: str) -> None:
    assert all(value >= 0 for value in figures(trained).values())
    checkpoint, script = runner.folder / "one" / "model_final.pth", f"{runner.paths[0]}/train_net.py"
    again = stage2(runner, zsseg, "evaluated", checkpoint, "--eval-only")
    assert figures(again) == figures(trained)
    options = (*zsseg.options, *stand_ins.TINY_DATA, "MODEL.WEIGHTS", checkpoint, "OUTPUT_DIR", runner.folder / "plain")
    plain = runner.command(script, "--config-file", zsseg.config, "--eval-only", *options)
    assert "not found in the checkpoint" not in plain  # the host reads it, too
    one, evaluated, host = (predictions(runner.folder / name) for name in ("one", "evaluated", "plain"))
    assert one == evaluated != host


def test_a_config_that_stage_2_wrote(runner: HostRunner, trained: str) -> None:
    script, config = f"{runner.paths[0]}/train_net.py", runner.folder / "one" / "config.yaml"
    weights = ("MODEL.WEIGHTS", runner.folder / "one" / "model_final.pth", "OUTPUT_DIR", runner.folder / "again")
    command = ("-m", "maft_adapter.integrations.zsseg", script, "--eval-only", "--config-file", config)
    assert figures(runner.command(*command, *weights)) == figures(trained)
    assert "MAX_ITER: 2\n" in (runner.folder / "again" / "config.yaml").read_text(encoding="utf-8")


def test_two_lines_in_train_net_instead_of_the_launcher(runner: HostRunner, zsseg: Host, trained: str) -> None:
    """With a configuration of ZSSeg, and with one that stage 2 has written."""
    script = Path(runner.paths[0], "train_net.py").read_text(encoding="utf-8")
    merge = "cfg.merge_from_file(args.config_file)"
    assert script.count(merge) == 1
    edited = runner.folder / "train_net.py"
    imported = "from maft_adapter.integrations.zsseg import add_maft_config\n"
    edited.write_text(imported + script.replace(merge, "add_maft_config(cfg, args.config_file)"), encoding="utf-8")
    weights = ("MODEL.WEIGHTS", runner.folder / "one" / "model_final.pth", "OUTPUT_DIR", runner.folder / "edited")
    maft = ("MODEL.MAFT.START_LAYER", 2, "MODEL.MAFT.SIZE", 96)
    for config, options in (
        (zsseg.config, (*zsseg.options, *stand_ins.TINY_DATA, *maft)),
        (runner.folder / "one" / "config.yaml", ()),
    ):
        output = runner.command(edited, "--config-file", config, "--eval-only", *options, *weights)
        assert figures(output) == figures(trained)
        assert predictions(runner.folder / "edited") == predictions(runner.folder / "one")


def test_two_processes(runner: HostRunner, zsseg: Host, untrained: Path, trained: str) -> None:
    output = stage2(runner, zsseg, "two", untrained, "--num-gpus", "2", "--dist-url", "auto")
    assert all(value >= 0 for value in figures(output).values())
    assert read(runner.folder / "two" / "model_final.pth").keys() == read(untrained).keys()
    assert 0 < metrics(runner.folder / "two")["loss_mask_aware"] < 1


def test_two_clips(runner: HostRunner, zsseg: Host) -> None:
    """VOC's configs with learnable prompts keep a second CLIP for the proposals: that one trains."""
    host, path = zsseg.but(*TWO_CLIPS), runner.folder / "two_clips.pth"
    runner.call(stand_ins.save_model, host, path)
    stage2(runner, host, "two_clips", path)
    before, after = read(path), read(runner.folder / "two_clips" / "model_final.pth")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("_region_clip_adapter.clip_model.visual.") for name in changed)


def test_the_launcher_refuses_an_untrained_host(runner: HostRunner, zsseg: Host, untrained: Path) -> None:
    stand_ins.write_backbone(untrained, runner.folder / "R-103.pkl")
    needs = "stage 2 needs a trained zsseg model"
    for weights, message in (
        ("detectron2://ImageNetPretrained/torchvision/R-50.pkl", f"a backbone or a tower alone; {needs}"),
        (runner.folder / "R-103.pkl", f"these weights lack .* that make proposals.*; {needs}"),
        ("", f"no weights were loaded; {needs}"),
    ):
        with pytest.raises(AssertionError, match=message):
            stage2(runner, zsseg, "refused", weights)
    with pytest.raises(AssertionError, match="these weights lack"):
        stage2(runner, zsseg, "refused", runner.folder / "R-103.pkl", "--eval-only")


def test_going_on_after_a_stop(runner: HostRunner, zsseg: Host, untrained: Path) -> None:
    """Without MODEL.WEIGHTS: the configuration names a backbone, which is not read."""
    host, folder = zsseg.but("SOLVER.CHECKPOINT_PERIOD", 1), runner.folder / "stopped"
    stage2(runner, host, "stopped", untrained)
    stand_ins.stop_after_one(folder)
    first = read(folder / "model_0000000.pth")
    output = stage2(runner, host, "stopped", None, "--resume")
    assert "Starting training from iteration 1" in output
    assert metrics(folder)["loss_self_distillation"] > 0  # the teacher is CLIP, not the tower so far
    last = read(folder / "model_final.pth")
    assert last.keys() == first.keys() and any(not torch.equal(last[name], first[name]) for name in last)
    assert figures(stage2(runner, host, "stopped", None, "--eval-only", "--resume")) == figures(output)


def test_a_tower_file_is_evaluated(runner: HostRunner, zsseg: Host, untrained: Path, trained: str) -> None:
    """The host is that of stage 1, whose checkpoint has a CLIP of its own."""
    tower = runner.folder / "tower.safetensors"
    runner.call(save_tower, zsseg, runner.folder / "one" / "model_final.pth", tower)
    host = zsseg.but("MODEL.MAFT.TOWER", tower)
    assert figures(stage2(runner, host, "tower", untrained, "--eval-only")) == figures(trained)
    assert predictions(runner.folder / "tower") == predictions(runner.folder / "one")
    with pytest.raises(AssertionError, match="a tower to evaluate; add --eval-only"):
        stage2(runner, host, "refused", untrained)
    with pytest.raises(AssertionError, match=r"A tower alone belongs in MODEL\.MAFT\.TOWER"):
        stage2(runner, zsseg, "refused", tower, "--eval-only")


def save_tower(host: Host, checkpoint: Path, path: Path) -> None:
    from maft_adapter.checkpoint import save_mask_aware

    tower = host.shim.visual(host.shim.patch(host.build(), start_layer=2, size=96))
    host.shim.load_visual(tower, checkpoint)
    save_mask_aware(tower, path)


def test_a_resnet(runner: HostRunner, zsseg: Host) -> None:
    runner.call(stand_ins.write_clip, runner.folder / "resnet.pt", 16, (1, 1, 1, 1))
    host = zsseg.but("MODEL.CLIP_ADAPTER.CLIP_MODEL_NAME", str(runner.folder / "resnet.pt"))
    runner.call(patch_a_resnet, host)


def patch_a_resnet(host: Host) -> None:
    from maft_adapter.integrations.stage2 import prepare

    model = host.build_random()
    before = host.segment(model)
    host.shim.patch(model, size=96)
    patched = host.segment(model)
    assert patched[0].isfinite().all() and not torch.allclose(before[0], patched[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"CLIP is a ResNet \(ModifiedResNet\)"):
        prepare(model, host.shim.HOST)
    assert stand_ins.equal(before, host.segment(host.shim.unpatch(model)))


def test_export(runner: HostRunner, zsseg: Host, trained: str) -> None:
    """The fine-tuned tower alone, in open_clip's tower and in the host's again."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    from maft_adapter.checkpoint import load_visual, visual_weights

    path = runner.folder / "one" / "model_final.pth"
    tower = VisionTransformer(224, 32, 64, 4, 1, mlp_ratio=4.0, output_dim=64, act_layer=QuickGELU).eval()
    load_visual(tower, path)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedding = tower(image)
    torch.testing.assert_close(embedding, runner.call(stand_ins.embed, zsseg, path, image), rtol=0, atol=1e-5)
    assert visual_weights(path).keys() == tower.state_dict().keys()
