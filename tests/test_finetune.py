"""Fine-tuning on the small CLIP with random weights: repeats, what trains, teachers, checkpoints, errors."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from maft_adapter import MAFTLoss, make_mask_aware
from maft_adapter.classify import class_scores
from maft_adapter.finetune import Sample, finetune, ground_truth
from maft_adapter.shapes.clip import create_clip


@pytest.fixture
def clip() -> Any:
    torch.manual_seed(0)
    model = create_clip()
    make_mask_aware(model.visual, start_layer=9)
    return model


@pytest.fixture
def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    result = []
    for proposals in (2, 3, 1):  # ragged
        labels = torch.full((32, 32), 255)
        labels[:16] = int(torch.randint(0, 4, (), generator=generator))
        masks = torch.rand(proposals, 32, 32, generator=generator) > 0.5
        masks[0] = labels < 4
        result.append(Sample(torch.randn(3, 32, 32, generator=generator), masks, labels))
    return result


TEXT = normalize(torch.randn(4, 64, generator=torch.Generator().manual_seed(2)), dim=-1)


def run(clip: Any, samples: list[Sample], **options: Any) -> list[dict[str, float]]:
    defaults: dict[str, Any] = {"iterations": 3, "batch_size": 2, "lr": 1e-3, "progress": False}
    return finetune(clip, samples, TEXT, **{**defaults, **options})


def test_a_repeat_with_the_same_seed_is_equal_to_the_bit(clip: Any, samples: list[Sample]) -> None:
    again = copy.deepcopy(clip)
    assert run(clip, samples, seed=3) == run(again, samples, seed=3)
    for (name, a), b in zip(clip.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_another_seed_gives_another_order(clip: Any, samples: list[Sample]) -> None:
    other = copy.deepcopy(clip)
    assert run(clip, samples, seed=0, batch_size=1) != run(other, samples, seed=1, batch_size=1)


def test_only_the_units_of_the_recipe_change_and_the_text_tower_never(clip: Any, samples: list[Sample]) -> None:
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    run(clip, samples, freeze="paper")
    changed = {name for name, value in clip.state_dict().items() if not torch.equal(value, before[name])}
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in changed and "visual.proj" in changed
    assert not [name for name in changed if not name.startswith("visual.") or ".mlp." in name or "embedding" in name]
    assert "visual.conv1.weight" not in changed


def test_precomputed_teacher_scores_equal_the_frozen_copy(clip: Any, samples: list[Sample]) -> None:
    other = copy.deepcopy(clip).eval()
    images = torch.stack([sample.image for sample in samples])
    with torch.no_grad():
        scores = class_scores(other.visual(images), TEXT, other.logit_scale.exp())
    expected, actual = run(clip, samples), run(other, samples, teacher_scores=scores)
    for a, b in zip(expected, actual, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert expected[0]["self_distillation"] == pytest.approx(0, abs=1e-9)  # the student starts as the teacher
    assert expected[-1]["self_distillation"] > 0


def test_the_mask_aware_loss_falls(clip: Any, samples: list[Sample]) -> None:
    history = run(clip, samples, iterations=16, batch_size=3, lr=3e-4, loss=MAFTLoss(distillation_weight=0))
    assert history[-1]["mask_aware"] < 0.5 * history[0]["mask_aware"]
    assert all(step["self_distillation"] == 0 for step in history)


def test_unseen_pixels_never_reach_the_loss(clip: Any, samples: list[Sample]) -> None:
    other = copy.deepcopy(clip)
    marked = [Sample(s.image, s.masks, torch.where(s.labels == 255, 77, s.labels)) for s in samples]
    assert run(clip, samples) == run(other, marked)


def test_images_without_any_seen_class(clip: Any, samples: list[Sample]) -> None:
    empty = [Sample(s.image, s.masks, torch.full_like(s.labels, 255)) for s in samples]
    assert run(clip, empty)[0]["mask_aware"] == 0


def test_checkpoint_loads_into_an_unpatched_tower(clip: Any, samples: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "tower.safetensors"
    run(clip, samples, checkpoint=path)
    plain = create_clip().visual
    plain.load_state_dict(load_file(path))
    image = samples[0].image[None].repeat(1, 1, 2, 2)
    assert torch.equal(plain.eval()(image), clip.visual.eval()(image))
    assert [file.name for file in tmp_path.iterdir()] == ["tower.safetensors"]


def test_ctrl_c_leaves_the_checkpoint_of_the_last_step_and_the_mode(
    clip: Any, samples: list[Sample], tmp_path: Path
) -> None:
    def stop(iteration: int) -> None:
        if iteration == 2:
            raise KeyboardInterrupt

    clip.train()
    with pytest.raises(KeyboardInterrupt):
        run(clip, samples, iterations=5, checkpoint=tmp_path / "tower.safetensors", on_iteration=stop)
    saved = load_file(tmp_path / "tower.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in clip.visual.state_dict().items())
    assert clip.training and clip.visual.training


def test_divergence_is_an_error_that_names_the_learning_rate(clip: Any, samples: list[Sample]) -> None:
    with pytest.raises(FloatingPointError, match=r"lower lr \(1e\+30\)"):
        run(clip, samples, lr=1e30, iterations=5, loss=MAFTLoss(distillation_weight=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"teacher_scores": torch.zeros(2, 4)}, r"teacher_scores are \(2, 4\), expected \(3, 4\)"),
        ({"freeze": "most"}, "unknown freeze"),
    ],
)
def test_bad_options(clip: Any, samples: list[Sample], options: dict[str, Any], message: str) -> None:
    before = copy.deepcopy(clip.state_dict())
    with pytest.raises(ValueError, match=message):
        run(clip, samples, **options)
    assert all(torch.equal(before[name], value) for name, value in clip.state_dict().items())


def test_bad_models_and_data(clip: Any, samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="samples is empty"):
        run(clip, [])
    with pytest.raises(ValueError, match=r"one embedding a seen class, \(C, D\)"):
        finetune(clip, samples, TEXT[0], iterations=1)
    with pytest.raises(TypeError, match="not mask-aware"):
        run(create_clip(), samples)
    clip.visual.bfloat16()
    with pytest.raises(TypeError, match=r"call clip_model.visual.float\(\)"):
        run(clip, samples)


def test_ground_truth_ignores_what_is_no_class() -> None:
    targets, labels = ground_truth(torch.tensor([[-1, 3], [3, 255]]), num_classes=4)
    assert labels.tolist() == [3]
    assert targets.tolist() == [[[False, True], [True, False]]]
    assert ground_truth(torch.full((2, 2), 255), num_classes=4)[0].shape == (0, 2, 2)


def test_every_step_has_the_released_decay_and_clipping(
    clip: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    class Spy(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            group = self.param_groups[0]
            norms = [p.grad.norm() for p in group["params"] if p.grad is not None]
            steps.append((group["lr"], float(torch.stack(norms).norm())))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    run(clip, samples, iterations=4, lr=1e-3)
    assert [lr for lr, _ in steps] == pytest.approx([1e-3 * (1 - i / 4) ** 0.9 for i in range(4)])
    assert max(norm for _, norm in steps) == pytest.approx(0.01, rel=1e-3)
