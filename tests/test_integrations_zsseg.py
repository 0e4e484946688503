"""ZSSeg's shim, and what the shims share, on stand-ins; tests/hosts runs the same on the real repositories."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from region_hosts import SEMANTIC, Clip, MaskFormer, array, inputs, oracle
from torch import Tensor, nn

from maft_adapter import is_mask_aware
from maft_adapter.checkpoint import load_visual, visual_weights
from maft_adapter.integrations.inference import ClipInput
from maft_adapter.integrations.zsseg import patch, unpatch, visual


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


@torch.no_grad()
def test_a_resnet(build: Any) -> None:
    """Its stride is 32, and it has no start layer; the oracle's default is `patch`'s."""
    model = build(resnet=True)
    image = nn.functional.normalize(visual(model)(torch.zeros(1, 3, 64, 64)), dim=-1)  # (1, D)
    prompts = model.clip_adapter.prompts  # near to what images give, or one class would always win
    prompts.copy_(image + 0.3 * torch.randn(prompts.shape, generator=torch.Generator().manual_seed(0)))
    expected = [oracle(model, x["image"], "flags", SEMANTIC, 8, 96) for x in inputs()]
    crops = segment(model)
    with pytest.raises(ValueError, match="size is 72, expected a multiple of the patch size 32; take 64"):
        patch(model, size=72)
    patch(model, size=96)
    for a, b, c in zip(segment(model), expected, crops, strict=True):
        np.testing.assert_allclose(array(a), b, rtol=0, atol=1e-5)
        assert not torch.allclose(a, c, atol=1e-3)


def test_the_defaults_are_the_paper_s(build: Any) -> None:
    with pytest.raises(ValueError, match="start_layer is 8"):  # of 3
        patch(build())
    model = patch(build(), start_layer=1)
    assert (model.clip_adapter.clip_input.size, model.clip_adapter.clip_input.keep_aspect_ratio) == (480, False)


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
    with pytest.raises(TypeError, match="Linear is no model of ZegFormer, ZSSeg, FreeSeg or OVSeg"):
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
    upright = kept([torch.ones(3, 90, 30)])  # padded to 96 x 32: the shorter side becomes 64
    assert upright.shape == (1, 3, 192, 64)
    assert upright[0, 0, :178, :58].min() == 1 and upright[0, 0, 182:].max() == upright[0, 0, :, 62:].max() == 0
    assert ClipInput(0, 8, 64).pad(images).shape == (2, 3, 40, 90)


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
