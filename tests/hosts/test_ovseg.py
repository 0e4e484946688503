"""The OVSeg shim on the real repository: OVSEG_ROOT and DETECTRON2_ROOT name checkouts of both; pandas is needed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from stand_ins import Host, HostRunner, metrics, predictions, read, stage2

VISUAL = "clip_adapter.clip_model.visual."
PROMPTS = f"{VISUAL}mask_embedding"
VARIANTS: dict[str, tuple[Any, ...]] = {
    "mask prompts": (),
    "no mask prompts": ("MODEL.CLIP_ADAPTER.MASK_PROMPT_FWD", False, "MODEL.CLIP_ADAPTER.MASK_PROMPT_DEPTH", 0),
    "14 templates": ("MODEL.CLIP_ADAPTER.TEXT_TEMPLATES", "vild"),
    "80 templates": ("MODEL.CLIP_ADAPTER.TEXT_TEMPLATES", "imagenet"),
    "CLIP alone": ("MODEL.CLIP_ADAPTER.CLIP_ENSEMBLE_WEIGHT", 0.0),
    "another threshold": ("MODEL.CLIP_ADAPTER.MASK_THR", 0.9),
}


@pytest.fixture(scope="module")
def runner(start_host: Callable[..., HostRunner]) -> HostRunner:
    runner = start_host("OVSEG_ROOT", "third_party/CLIP")
    stand_ins.write_voc(runner.folder)
    stand_ins.link_for_ovseg(runner.folder)
    runner.call(stand_ins.write_clip, runner.folder / "clip.pt")
    return runner


@pytest.fixture(scope="module")
def ovseg(runner: HostRunner) -> Host:
    config = f"{runner.paths[0]}/configs/ovseg_R101c_vitB_bs32_120k.yaml"
    options = (
        *stand_ins.small_ovseg(runner.folder / "clip.pt"),
        # DeepLab's has 50 layers at least
        *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.STEM_OUT_CHANNELS", 64),
        # one for each of 171 classes, instead of 14
        *("MODEL.CLIP_ADAPTER.TEXT_TEMPLATES", "predefined", "DATASETS.TEST", "('pascalvoc20_sem_seg_val',)"),
    )
    return Host("ovseg", "open_vocab_seg", config, options, "pascalvoc20_sem_seg_val", "add_ovseg_config")


def test_patched_and_unpatched(runner: HostRunner, ovseg: Host) -> None:
    runner.call(stand_ins.patch_and_back, ovseg)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_classifier_changes(runner: HostRunner, ovseg: Host, variant: str) -> None:
    results, difference = runner.call(stand_ins.host_features_through_the_shim, ovseg.but(*VARIANTS[variant]))
    assert results == 2 and difference < 1e-5


def test_the_demo(runner: HostRunner, ovseg: Host) -> None:
    """It takes the words with each image, and CLIP alone."""
    options = ("MODEL.META_ARCHITECTURE", "OVSegDEMO", *VARIANTS["CLIP alone"])
    for words in (("cat", "dog", "grass"), ("cat",)):
        host = ovseg.but(*options, class_names=words)
        assert runner.call(stand_ins.host_features_through_the_shim, host)[1] < 1e-5
        runner.call(stand_ins.patch_and_back, host)


def test_no_valid_proposal(runner: HostRunner, ovseg: Host) -> None:
    runner.call(patch_without_valid_proposals, ovseg.but("MODEL.CLIP_ADAPTER.MASK_THR", 1.0))


def patch_without_valid_proposals(host: Host) -> None:
    """OVSeg raises; here A^c is 1 for all, as for every single invalid proposal of its."""
    model = host.build_random()
    with pytest.raises(ValueError, match="unpack"):
        host.segment(model)
    patched = host.segment(host.shim.patch(model, start_layer=2, size=96))
    model.clip_ensemble = False
    model.clip_ensemble_weight = None  # not read
    generator_alone = host.segment(model)
    assert all(x.isfinite().all() for x in patched)
    assert [x.shape for x in patched] == [x.shape for x in generator_alone]
    assert not torch.allclose(patched[0], generator_alone[0])  # A^p to the power of 0.3


@pytest.fixture(scope="module")
def untrained(runner: HostRunner, ovseg: Host) -> Path:
    """Laid out as the released checkpoints, with a CLIP other than that of `clip.load`, and its mask prompts."""
    runner.call(stand_ins.save_model, ovseg, runner.folder / "stage1.pth")
    return runner.folder / "stage1.pth"


@pytest.fixture(scope="module")
def trained(runner: HostRunner, ovseg: Host, untrained: Path) -> str:
    """The output of two iterations on one process."""
    return stage2(runner, ovseg, "one", untrained)


def figures(output: str) -> dict[str, float]:
    return stand_ins.figures(output, ["mIoU", "fwIoU"])  # no class is unseen


def test_stage_2_trains_the_tower_but_its_mask_prompts(runner: HostRunner, untrained: Path, trained: str) -> None:
    before, after = read(untrained), read(runner.folder / "one" / "model_final.pth")
    assert after.keys() == before.keys() and PROMPTS in after
    changed = {name.removeprefix(VISUAL) for name in before if not torch.equal(before[name], after[name])}
    assert {"proj", "ln_post.weight", "transformer.resblocks.0.attn.in_proj_weight"} <= changed
    assert all(re.match(r"proj$|ln_|transformer\.resblocks\.\d+\.(ln_|attn\.)", name) for name in changed)
    written = metrics(runner.folder / "one")
    assert 0 < written["loss_mask_aware"] < 1
    assert written["loss_self_distillation"] > 1e-5  # the teacher is CLIP, the student another one from the start
    assert 0 < written["lr"] < 1e-5  # the paper's, without OVSeg's warmup of 1500 iterations


def test_evaluation_is_mask_aware(runner: HostRunner, ovseg: Host, trained: str) -> None:
    assert all(value >= 0 for value in figures(trained).values())
    checkpoint, script = runner.folder / "one" / "model_final.pth", f"{runner.paths[0]}/train_net.py"
    again = stage2(runner, ovseg, "evaluated", checkpoint, "--eval-only")
    assert figures(again) == figures(trained)
    options = (*ovseg.options, *stand_ins.TINY_DATA, "MODEL.WEIGHTS", checkpoint, "OUTPUT_DIR", runner.folder / "plain")
    plain = runner.command(script, "--config-file", ovseg.config, "--eval-only", *options)
    assert "not found in the checkpoint" not in plain  # OVSeg reads it, too
    one, evaluated, host = (predictions(runner.folder / name) for name in ("one", "evaluated", "plain"))
    assert one == evaluated != host


def test_two_processes(runner: HostRunner, ovseg: Host, untrained: Path) -> None:
    output = stage2(runner, ovseg, "two", untrained, "--num-gpus", "2", "--dist-url", "auto")
    assert all(value >= 0 for value in figures(output).values())
    assert read(runner.folder / "two" / "model_final.pth").keys() == read(untrained).keys()


def test_student_and_teacher_are_chosen(runner: HostRunner, ovseg: Host, untrained: Path) -> None:
    """The whole CLIP that `clip.load` read as the student, OVSeg's own as the teacher; only where a run begins."""
    clip, folder = runner.folder / "clip.pt", runner.folder / "chosen"
    rates = ("SOLVER.BASE_LR", 1e-9, "SOLVER.CHECKPOINT_PERIOD", 1)  # what is trained hardly moves
    host = ovseg.but(*rates, "MODEL.MAFT.STUDENT", clip, "MODEL.MAFT.TEACHER", untrained)
    stage2(runner, host, "chosen", untrained)
    assert metrics(folder)["loss_self_distillation"] > 1e-5
    loaded = torch.load(clip, weights_only=True)
    last, first = read(folder / "model_final.pth"), read(untrained)
    tower = {name: value for name, value in last.items() if name.startswith(VISUAL) and name != PROMPTS}
    for name, value in tower.items():
        torch.testing.assert_close(value, loaded[name.removeprefix("clip_adapter.clip_model.")].float(), msg=name)
    assert torch.equal(last[PROMPTS], first[PROMPTS])

    stand_ins.stop_after_one(folder)
    state = torch.load(folder / "model_0000000.pth", weights_only=True)
    state["model"][f"{VISUAL}proj"] += 1  # as if trained a long time
    torch.save(state, folder / "model_0000000.pth")
    stage2(runner, host, "chosen", None, "--resume")
    torch.testing.assert_close(read(folder / "model_final.pth")[f"{VISUAL}proj"], state["model"][f"{VISUAL}proj"])


def test_the_launcher_refuses_an_untrained_host(runner: HostRunner, ovseg: Host, untrained: Path) -> None:
    """The configurations name backbones: R-103.pkl, and a Swin by its file alone."""
    stand_ins.write_backbone(untrained, runner.folder / "swin_base.pkl")
    needs = "stage 2 needs a trained ovseg model"
    for weights, message in (
        (None, f"a backbone or a tower alone; {needs}"),
        (runner.folder / "swin_base.pkl", f"these weights lack .* that make proposals.*; {needs}"),
    ):
        with pytest.raises(AssertionError, match=message):
            stage2(runner, ovseg, "refused", weights)


def test_export(runner: HostRunner, ovseg: Host, trained: str) -> None:
    """The fine-tuned tower alone, in open_clip's tower."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    from maft_adapter.checkpoint import load_visual

    path, tower_file = runner.folder / "one" / "model_final.pth", runner.folder / "tower.safetensors"
    runner.call(save_tower, ovseg, path, tower_file)
    tower = VisionTransformer(224, 32, 64, 4, 1, mlp_ratio=4.0, output_dim=64, act_layer=QuickGELU).eval()
    load_visual(tower, tower_file)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedding = tower(image)
    torch.testing.assert_close(embedding, runner.call(stand_ins.embed, ovseg, path, image), rtol=0, atol=1e-5)


def save_tower(host: Host, checkpoint: Path, path: Path) -> None:
    from maft_adapter.checkpoint import save_mask_aware

    tower = host.shim.visual(host.shim.patch(host.build(), start_layer=2, size=96))
    host.shim.load_visual(tower, checkpoint)
    with host.shim.without_mask_prompts(tower):
        save_mask_aware(tower, path)
