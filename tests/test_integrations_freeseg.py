"""FreeSeg's shim on a stand-in: the task's name and prompts, three inferences, the copied adapter, align_corners."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from region_hosts import INSTANCE, PANOPTIC, SEMANTIC, MaskFormer, array, inputs, oracle
from torch import nn

from maft_adapter.integrations import stage2
from maft_adapter.integrations.freeseg import HOST, patch, unpatch, visual


@pytest.fixture
def build() -> Callable[..., MaskFormer]:
    """`build(**options)`: a stand-in of FreeSeg's model in eval mode, with the same weights in every test."""

    def build(**options: Any) -> MaskFormer:
        torch.manual_seed(0)
        return MaskFormer(with_tasks=True, **options).eval()

    return build


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"weight": 0.0}, {"two_clips": True, "mask_thr": 0.4}], ids=str)
def test_scores_are_those_of_the_formulas_in_every_task(build: Any, options: dict[str, Any]) -> None:
    model, tasks = build(**options), (SEMANTIC, INSTANCE, PANOPTIC)
    expected = [{task: oracle(model, x["image"], "flags", task, 1, 64) for task in tasks} for x in inputs()]
    patch(model, start_layer=1, size=64)
    passes: list[Any] = []
    visual(model).register_forward_pre_hook(lambda _, args: passes.append(args))
    for result, wanted in zip(model(inputs()), expected, strict=True):
        assert tuple(result) == tasks
        for task in tasks:
            np.testing.assert_allclose(array(result[task]), wanted[task], rtol=0, atol=1e-5)
    assert len(passes) == 2 * 3
    assert model.region_clip_adapter.crops == 0


@torch.no_grad()
def test_unpatched_again(build: Any) -> None:
    model = build(two_clips=True)
    before, types = model(inputs()), [type(m) for m in model.modules()]
    patched = patch(model, start_layer=1, size=64)(inputs())
    assert not torch.equal(patched[0][PANOPTIC], before[0][PANOPTIC])
    unpatch(model)
    assert [type(m) for m in model.modules()] == types
    for a, b in zip(before, model(inputs()), strict=True):
        assert all(torch.equal(a[task], b[task]) for task in a)


def test_eval_only_does_not_erase_the_fine_tuned_clip(build: Any) -> None:
    """FreeSeg's train_net.py --eval-only copies `clip_adapter` over a separate region adapter."""
    model = patch(build(two_clips=True), start_layer=1, size=64)
    tower = copy.deepcopy(visual(model).state_dict())
    model._region_clip_adapter.load_state_dict(model.clip_adapter.state_dict())
    assert all(torch.equal(value, tower[name]) for name, value in visual(model).state_dict().items())
    assert torch.equal(model._region_clip_adapter.prompts, model.clip_adapter.prompts)  # the rest is copied
    unpatch(model)
    model._region_clip_adapter.load_state_dict(model.clip_adapter.state_dict())
    assert not torch.equal(visual(model).state_dict()["proj"], tower["proj"])  # as without us


def test_training_reads_the_semantic_ground_truth_and_prompts(build: Any) -> None:
    model = stage2.prepare(patch(build(two_clips=True), start_layer=1, size=64), HOST).train()
    with torch.no_grad():
        batch = HOST.training_batch(model, inputs(key="sem_instances"))
    adapter = model._region_clip_adapter
    # FreeSeg trains these prompts, never the separate adapter's, and --eval-only copies them over those.
    assert torch.equal(batch.text, nn.functional.normalize(model.clip_adapter.prompts[0], dim=-1))
    assert batch.logit_scale == 100
    assert [label.tolist() for label in batch.labels] == [[0, 2], [3]]
    logits = 4 * model.sem_seg_head.masks(
        model.backbone(adapter.clip_input.pad([(x["image"] - model.pixel_mean) / model.pixel_std for x in inputs()]))
    )
    expected = nn.functional.interpolate(logits, (64, 64), mode="bilinear", align_corners=True).sigmoid()
    assert torch.equal(batch.masks, expected)
    sum(model(inputs(key="sem_instances")).values()).backward()
    assert visual(model).proj.grad is not None


def test_the_defaults_are_the_paper_s(build: Any) -> None:
    with pytest.raises(ValueError, match="start_layer is 8"):  # of 3
        patch(build())
    model = patch(build(), start_layer=1)
    assert (model.clip_adapter.clip_input.size, model.clip_adapter.clip_input.keep_aspect_ratio) == (480, False)


def test_another_host(build: Any) -> None:
    with pytest.raises(TypeError, match=r"model of zsseg, not of freeseg; use maft_adapter\.integrations\.zsseg"):
        patch(MaskFormer(with_tasks=False))
    with pytest.raises(ValueError, match="nothing to undo"):
        unpatch(build())
