"""ZSSeg's shim, and what the shims share, on stand-ins; tests/hosts runs the same on the real repositories."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from region_hosts import CLASSES, DIM, SEMANTIC, Clip, MaskFormer, array, inputs, oracle, softmax
from torch import Tensor, nn

from maft_adapter import is_mask_aware
from maft_adapter.checkpoint import load_mask_aware, load_visual, save_mask_aware, visual_weights
from maft_adapter.integrations import stage2
from maft_adapter.integrations.inference import ClipInput
from maft_adapter.integrations.zsseg import HOST, patch, unpatch, visual


@pytest.fixture
def build() -> Callable[..., MaskFormer]:
    """`build(**options)`: a stand-in of ZSSeg's model in eval mode, with the same weights in every test."""

    def build(**options: Any) -> MaskFormer:
        torch.manual_seed(0)
        return MaskFormer(with_tasks=False, **options).eval()

    return build


@torch.no_grad()
def segment(model: Any, dataset: str = "flags") -> list[Tensor]:
    return [result[SEMANTIC] for result in model(inputs(dataset))]


@torch.no_grad()
@pytest.mark.parametrize("dataset", ["flags", "plain"])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight": 0.0}, {"weight": 0.7, "two_clips": True}, {"mask_thr": 0.9}, {"weight": 0.0, "mask_thr": 0.9}],
    ids=str,
)
def test_scores_are_those_of_the_formulas(build: Any, options: dict[str, Any], dataset: str) -> None:
    model = build(**options)
    expected = [oracle(model, x["image"], dataset, SEMANTIC, 1, 64) for x in inputs(dataset)]
    crops = segment(model, dataset)
    patch(model, start_layer=1, size=64)
    for a, b, c in zip(segment(model, dataset), expected, crops, strict=True):
        np.testing.assert_allclose(array(a), b, rtol=0, atol=1e-5)
        assert not torch.allclose(a, c, atol=1e-3)


@torch.no_grad()
def test_proposals_below_the_threshold_are_invalid(build: Any) -> None:
    """Then A^c is 1 for them; with none valid CLIP does not run at all."""
    model = build(mask_thr=1.0)
    expected = segment(model)
    patch(model, start_layer=1, size=64)
    visual(model).register_forward_pre_hook(lambda *_: pytest.fail("CLIP ran"))
    assert all(torch.equal(a, b) for a, b in zip(segment(model), expected, strict=True))


@torch.no_grad()
def test_one_pass_an_image_and_no_crops(build: Any) -> None:
    model = patch(build(), start_layer=1, size=64)
    seen: list[Any] = []
    visual(model).register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    segment(model)
    assert seen == [(1, 3, 64, 64)] * 2
    assert model.region_clip_adapter.crops == 0


def test_unpatched_again(build: Any) -> None:
    model = build(two_clips=True)
    before, keys, types = segment(model), list(model.state_dict()), [type(m) for m in model.modules()]
    assert patch(model, start_layer=1, size=64) is model
    assert is_mask_aware(model._region_clip_adapter.clip_model.visual)
    assert not is_mask_aware(model.clip_adapter.clip_model.visual)
    first = segment(model)
    patch(model, start_layer=3, size=64)  # a second call changes the settings
    assert not torch.equal(segment(model)[0], first[0])
    patch(model, start_layer=1, size=64)
    assert torch.equal(segment(model)[0], first[0])
    assert list(model.state_dict()) == keys
    assert unpatch(model) is model
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(a, b) for a, b in zip(before, segment(model), strict=True))
    with pytest.raises(ValueError, match="nothing to undo"):
        unpatch(model)


def test_a_deepcopy_is_independent(build: Any) -> None:
    model = patch(build(), start_layer=1, size=64)
    copied = copy.deepcopy(model)
    patched = segment(model)
    unpatch(model)
    assert torch.equal(segment(copied)[0], patched[0])
    assert not torch.equal(segment(model)[0], patched[0])


def test_refusals_change_nothing(build: Any) -> None:
    model = build()
    types = [type(m) for m in model.modules()]
    for arguments, message in [
        ({"size": 60}, "size is 60, expected a multiple of the patch size 8; take 64"),
        ({"size": 0}, "size is 0"),
        ({"start_layer": 4}, "start_layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            patch(model, **{"start_layer": 1, "size": 64, **arguments})
    model.clip_ensemble = False
    with pytest.raises(ValueError, match=r"build it with MODEL\.CLIP_ADAPTER\.CLIP_ENSEMBLE True"):
        patch(model)
    model.clip_ensemble = True
    with pytest.raises(TypeError, match=r"pass its \.module"):
        patch(nn.DataParallel(model))
    with pytest.raises(TypeError, match="Linear is no model of ZegFormer, ZSSeg or FreeSeg"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model of freeseg, not of zsseg; use maft_adapter\.integrations\.freeseg"):
        patch(MaskFormer(with_tasks=True))
    zegformer: Any = nn.Module()
    zegformer.clip_classification = True
    with pytest.raises(TypeError, match=r"use maft_adapter\.integrations\.zegformer"):
        patch(zegformer)
    assert [type(m) for m in model.modules()] == types
    segment(model)


def test_keeping_the_aspect_ratio() -> None:
    images = [torch.ones(3, 40, 56), torch.ones(3, 30, 90)]  # padded to 64 x 96
    squashed, kept = ClipInput(32, 8, 64), ClipInput(32, 8, 64, keep_aspect_ratio=True)
    assert squashed(images).shape == (2, 3, 64, 64)
    assert kept(images).shape == (2, 3, 64, 96)
    assert kept.pad(images)[0, 0].sum() == 40 * 56
    assert ClipInput(0, 8, 64).pad(images).shape == (2, 3, 40, 90)


# Stage 2.


def prepared(model: Any, **options: Any) -> Any:
    return stage2.prepare(patch(model, start_layer=1, size=64), HOST, **options)


def transcribed_losses(model: Any, tower: Any, teacher: Any, batch: list[dict[str, Any]]) -> tuple[float, float]:
    """L_ma and L_dis in numpy, from the host's proposals and the towers' embeddings."""
    adapter = model.region_clip_adapter
    text = array(adapter.prompts[0])
    text /= np.linalg.norm(text, axis=1, keepdims=True)  # (K, D)
    pairs, students, teachers = [], [], []

    def scores(embeddings: Tensor) -> Any:
        unit = array(embeddings)
        return softmax(100 * unit / np.linalg.norm(unit, axis=-1, keepdims=True) @ text.T)

    for x in batch:
        padded = nn.functional.pad((x["image"] - model.pixel_mean) / model.pixel_std, (0, 8, 0, 24))[None]
        logits = 4 * model.sem_seg_head.masks(model.backbone(padded))
        masks = nn.functional.interpolate(logits, (64, 64), mode="bilinear", align_corners=False).sigmoid()
        pixels = nn.functional.pad((x["image"] - adapter.pixel_mean[0]) / adapter.pixel_std[0], (0, 8, 0, 24))[None]
        a_c, m = scores(tower(pixels, masks))[0], array(masks)[0]
        students.append(scores(tower(pixels)))
        teachers.append(scores(teacher(pixels)))
        for label, truth in zip(x["instances"].gt_classes, x["instances"].gt_masks, strict=True):
            t = np.pad(truth.numpy(), ((0, 24), (0, 8)))
            intersection = (m * t).sum((1, 2))
            iou = intersection / (m.sum((1, 2)) + t.sum() - intersection)
            pairs.append(a_c[:, label] - (iou - iou.min()) / (iou.max() - iou.min()))

    def smooth_l1(difference: Any) -> float:
        return float((0.5 * difference**2).mean())  # both sides lie in [0, 1]

    return smooth_l1(np.concatenate(pairs)), smooth_l1(np.concatenate(students) - np.concatenate(teachers))


def test_training_gives_the_losses_of_the_paper(build: Any) -> None:
    model = prepared(build(), distillation_weight=0.5).train()
    batch, tower = inputs(), visual(model)
    teacher = copy.deepcopy(tower)
    with torch.no_grad():
        tower.proj.add_(torch.randn_like(tower.proj))  # as if trained: it differs from the teacher
        mask_aware, distillation = transcribed_losses(model, tower, teacher, batch)
    losses = model(batch)
    assert losses.keys() == {"loss_mask_aware", "loss_self_distillation"}
    assert losses["loss_mask_aware"].item() == pytest.approx(mask_aware, abs=1e-6)
    assert losses["loss_self_distillation"].item() == pytest.approx(0.5 * distillation, abs=1e-6)
    assert mask_aware > 1e-3 and distillation > 1e-3


def test_what_trains_and_what_is_saved(build: Any) -> None:
    model = build(two_clips=True)
    for parameter in model.clip_adapter.parameters():
        parameter.requires_grad = True  # as learnable prompts do
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    prepared(model).train()
    sum(model(inputs()).values()).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("_region_clip_adapter.clip_model.visual.") and ".mlp." not in name for name in trained)
    assert "_region_clip_adapter.clip_model.visual.proj" in trained
    # Every one gets a gradient: DDP, as detectron2 sets it up, would wait for it.
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert list(model.state_dict()) == keys
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and changed <= trained
    teacher = model.stage2.teacher.state_dict()
    assert all(torch.equal(before[f"_region_clip_adapter.clip_model.visual.{name}"], teacher[name]) for name in teacher)


def test_the_frozen_host_stays_in_eval_mode(build: Any) -> None:
    model = prepared(build().train())
    assert model.training and not any(m.training for m in model.modules() if m is not model)
    assert model(inputs())["loss_mask_aware"] == model.train()(inputs())["loss_mask_aware"]  # no dropout
    assert not model.eval().training


def test_evaluation_and_unpatch_after_stage_2(build: Any) -> None:
    model = build()
    before, types = segment(model), [type(m) for m in model.modules()]
    patched = segment(patch(model, start_layer=1, size=64))
    assert torch.equal(segment(prepared(model).eval())[0], patched[0])
    stage2.prepare(model, HOST)  # a second call makes no second layer
    unpatch(model)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(segment(model)[0], before[0])


def test_an_image_without_ground_truth(build: Any) -> None:
    batch = inputs()
    for x in batch:
        x["instances"].gt_classes, x["instances"].gt_masks = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 40, 56)
    losses = prepared(build()).train()(batch)
    assert losses["loss_mask_aware"] == 0
    sum(losses.values()).backward()


def test_prepare_refuses_and_changes_nothing(build: Any) -> None:
    model = build()
    with pytest.raises(TypeError, match=r"call zsseg\.patch\(model\) first"):
        stage2.prepare(model, HOST)
    patch(model, start_layer=1, size=64)
    flags = [p.requires_grad for p in model.parameters()]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"loss": "l3"}, "unknown kind"),
        ({"freeze": "most"}, "unknown freeze"),
        ({"distillation_weight": -1.0}, "distillation_weight"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            stage2.prepare(model, HOST, **options)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_the_launcher_without_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    stage2.main(HOST, [])
    assert "MODEL.MAFT.START_LAYER 8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"missing\.py is no file; the first argument is the host's train_net\.py"):
        stage2.main(HOST, ["missing.py"])


# Weights.


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("IPCLIP.", "clip_adapter.clip_model.visual."),
        ("_region_clip_adapter.clip_model.visual.", "clip_adapter.clip_model.visual."),
        ("clip_adapter.clip_model.visual.", None),
        ("sem_seg_head.predictor.clip_model.visual.", None),
        ("visual.", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_tower_in_a_checkpoint(tmp_path: Path, prefix: str, beside: str | None, wrapped: bool) -> None:
    tower, other = Clip().visual, Clip().visual
    state = {f"{prefix}{name}": value for name, value in tower.state_dict().items()}
    if beside:
        state |= {f"{beside}{name}": value for name, value in other.state_dict().items()}
    torch.save({"model": state, "iteration": 3} if wrapped else state, tmp_path / "model.pth")
    load_visual(other, tmp_path / "model.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in tower.state_dict().items())


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    tower = Clip().visual
    before = copy.deepcopy(tower.state_dict())
    state = {name: value + 1 for name, value in tower.state_dict().items()}
    torch.save({**state, "proj": torch.zeros(2, 2)}, tmp_path / "tower.pth")
    with pytest.raises(ValueError, match=r"proj \(2, 2\) for \(32, 16\)"):
        load_visual(tower, tmp_path / "tower.pth")
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    torch.save({"model": {"backbone.weight": torch.zeros(1)}}, tmp_path / "host.pth")
    with pytest.raises(ValueError, match="holds no CLIP image tower"):
        visual_weights(tmp_path / "host.pth")


def test_export_to_another_host(build: Any, tmp_path: Path) -> None:
    model = prepared(build())
    save_mask_aware(visual(model), tmp_path / "tower.safetensors")
    other = build(two_clips=True)
    other.load_state_dict({name: value + 1 for name, value in other.state_dict().items()})
    load_mask_aware(visual(patch(other, start_layer=2, size=64)), tmp_path / "tower.safetensors")
    assert visual(other).start_layer == 1
    images, masks = torch.randn(1, 3, 64, 64), torch.ones(1, 2, 8, 8)
    with torch.no_grad():
        assert torch.equal(visual(model)(images, masks), visual(other)(images, masks))
    assert visual(model)(images, masks).shape == (1, 2, DIM) and len(CLASSES) == 4
