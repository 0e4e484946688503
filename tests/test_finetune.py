"""Fine-tuning on the small CLIP with random weights: repeats, what trains, teachers, checkpoints, errors."""

import copy
import inspect
import math
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import normalize
from zoo import DIM, embedding, mask_aware_tower, plain_tower, random_images, random_masks

from maft_adapter import MAFTLoss, encode_image, encode_masks, make_mask_aware, restore
from maft_adapter.classify import class_scores
from maft_adapter.finetune import Sample, finetune, ground_truth
from maft_adapter.losses import MaskClassificationLoss, self_distillation_loss
from maft_adapter.shapes.clip import create_clip


def create() -> Any:
    torch.manual_seed(0)
    model = create_clip()
    make_mask_aware(model.visual, start_layer=9)
    return model


@pytest.fixture
def clip() -> Any:
    return create()


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


def test_given_teacher_scores_are_the_ones_that_count(clip: Any, samples: list[Sample]) -> None:
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(4))
    images = torch.stack([sample.image for sample in samples])
    with torch.no_grad():
        student = class_scores(clip.eval().visual(images), TEXT, clip.logit_scale.exp())
    expected = float(((student - scores).double() ** 2).mean() / 2)  # SmoothL1 of differences below 1
    step = run(clip, samples, teacher_scores=scores, batch_size=3, iterations=1)[0]
    assert step["self_distillation"] == pytest.approx(expected, rel=1e-5) and expected > 0.01


def test_a_fine_tuned_tower_needs_the_frozen_one(clip: Any, samples: list[Sample]) -> None:
    frozen = copy.deepcopy(clip).eval()
    run(clip, samples)
    for tuned in (clip, copy.deepcopy(clip), patched_again(clip)):
        before = copy.deepcopy(tuned.state_dict())
        with pytest.raises(ValueError, match=r"was fine-tuned before.*frozen CLIP as teacher, its teacher_scores"):
            run(tuned, samples)
        assert all(torch.equal(before[name], value) for name, value in tuned.state_dict().items())
    other, third = copy.deepcopy(clip), copy.deepcopy(clip)
    images = torch.stack([sample.image for sample in samples])
    with torch.no_grad():
        scores = class_scores(frozen.visual(images), TEXT, frozen.logit_scale.exp())
    unchanged = copy.deepcopy(frozen.state_dict())
    history = run(clip, samples, teacher=frozen)
    assert history[0]["self_distillation"] > 1e-6
    for a, b in zip(history, run(other, samples, teacher_scores=scores), strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert run(third, samples, teacher=frozen.visual) == history
    assert all(torch.equal(unchanged[name], value) for name, value in frozen.state_dict().items())
    run(clip, samples, loss=MAFTLoss(distillation_weight=0))


def patched_again(clip: Any) -> Any:
    clip = copy.deepcopy(clip)
    make_mask_aware(restore(clip.visual), start_layer=9)
    return clip


def test_bad_teachers(clip: Any, samples: list[Sample]) -> None:
    with pytest.raises(TypeError, match="teacher is not mask-aware"):
        run(clip, samples, teacher=create_clip().eval())
    with pytest.raises(ValueError, match="teacher is the tower that is trained"):
        run(clip, samples, teacher=clip)
    with pytest.raises(ValueError, match=r"call teacher.eval\(\)"):
        run(clip, samples, teacher=create().train())
    with pytest.raises(ValueError, match="two sources"):
        run(clip, samples, teacher=create().eval(), teacher_scores=torch.full((3, 4), 0.25))


def test_the_defaults_are_the_paper_s(clip: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sec. 5.1 and Table 4: 1000 iterations (COCO-Stuff), batch 16, lr and weight decay 1e-5, "+conv", lambda 1."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(finetune).parameters.items()}
    assert (defaults["iterations"], defaults["batch_size"], defaults["freeze"]) == (1000, 16, "paper")
    assert (defaults["lr"], defaults["weight_decay"], defaults["checkpoint_every"]) == (1e-5, 1e-5, 500)
    seen: list[Any] = []

    class Spy(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            seen.append({key: self.param_groups[0][key] for key in ("lr", "weight_decay")})
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    other = copy.deepcopy(clip)
    scores = torch.full((3, 4), 0.25)
    history = finetune(clip, samples, TEXT, iterations=1, teacher_scores=scores, progress=False)
    assert seen == [{"lr": 1e-5, "weight_decay": 1e-5}]
    expected = finetune(
        other, samples, TEXT, iterations=1, batch_size=16, freeze="+conv", loss=MAFTLoss("smooth_l1", 1.0),
        teacher_scores=scores, progress=False,
    )  # fmt: skip
    assert history == expected
    trains = {name: parameter.requires_grad for name, parameter in other.visual.named_parameters()}
    assert trains == {name: parameter.requires_grad for name, parameter in clip.visual.named_parameters()}


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


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
    ],
)  # fmt: skip
def test_label_maps_of_every_integer_dtype_train(dtype: torch.dtype, clip: Any, samples: list[Sample]) -> None:
    other = copy.deepcopy(clip)
    ignored = -1 if dtype == torch.int8 else 255
    cast = [Sample(s.image, s.masks, s.labels.where(s.labels < 4, ignored).to(dtype)) for s in samples]
    assert run(clip, samples, iterations=1) == run(other, cast, iterations=1)


def test_label_maps_as_numpy_reads_16_bit_files(clip: Any, samples: list[Sample]) -> None:
    other = copy.deepcopy(clip)
    maps = [s.labels.where(s.labels < 4, 65535).numpy().astype(np.uint16) for s in samples]
    read = [Sample(s.image, s.masks, torch.from_numpy(x)) for s, x in zip(samples, maps, strict=True)]
    assert run(clip, samples, iterations=1) == run(other, read, iterations=1)
    with pytest.raises(TypeError, match=r"samples\[\d\]\.labels must be a tensor, got ndarray.*torch\.from_numpy"):
        run(create(), [Sample(s.image, s.masks, x) for s, x in zip(samples, maps, strict=True)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"samples\[\d\]\.labels must be a tensor of integer class .*float32"):
        run(create(), [s._replace(labels=s.labels.float()) for s in samples])


TOWERS = [
    "open_clip-output_tokens",
    "open_clip-coca",
    "transformers-clip-projection",
    "transformers-siglip",
    "timm-gap",
]


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_whose_own_call_gives_more_than_an_embedding(kind: str) -> None:
    """Against the teacher that the unpatched tower is."""
    visual = mask_aware_tower(kind)
    text = torch.randn(3, visual(random_images((32, 32)), random_masks(1, (32, 32))).shape[-1])
    images, masks = random_images((32, 32), batch=1), random_masks(4, (32, 32), batch=1)
    sample = Sample(images[0], masks[0], torch.zeros(32, 32, dtype=torch.int64))
    with torch.no_grad():
        teacher = class_scores(embedding(plain_tower(kind)(images)), text, 10.0)
    history = finetune(
        visual, [sample], text, iterations=3, batch_size=1, lr=1e-2, logit_scale=10.0, progress=False,
        freeze="as_is" if kind == "timm-gap" else "paper",
    )  # fmt: skip
    assert history[0]["self_distillation"] == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        student = class_scores(encode_image(visual, images), text, 10.0)
    assert self_distillation_loss(student, teacher) > 1e-9
    again = mask_aware_tower(kind)
    expected = finetune(
        again, [sample], text, iterations=3, batch_size=1, lr=1e-2, logit_scale=10.0, progress=False,
        freeze="as_is" if kind == "timm-gap" else "paper", teacher_scores=teacher,
    )  # fmt: skip
    for a, b in zip(history, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_running_statistics_stay_the_frozen_model_s() -> None:
    visual = mask_aware_tower("resnet").train()
    sample = Sample(random_images((64, 64))[0], random_masks(2, (64, 64))[0], torch.zeros(64, 64, dtype=torch.int64))
    text = torch.randn(3, DIM).requires_grad_()
    visual.requires_grad_(False).attnpool.requires_grad_(True)
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    history = finetune(
        visual, [sample], text, iterations=2, batch_size=1, logit_scale=10.0, freeze="as_is", progress=False
    )
    assert history[0]["self_distillation"] == pytest.approx(0, abs=1e-12)  # the teacher is in eval mode, too
    changed = {name for name, value in visual.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("attnpool.") for name in changed)
    assert all(module.training for module in visual.modules())
    assert text.grad is None


def test_adapters_train_where_they_are(clip: Any, samples: list[Sample]) -> None:
    peft = pytest.importorskip("peft", reason="peft, of the extra test, is not installed")
    peft.get_peft_model(clip.visual, peft.LoraConfig(r=2, target_modules=["c_fc", "c_proj"]))
    with pytest.raises(ValueError, match="freeze='as_is'"):
        run(clip, samples)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    run(clip, samples, freeze="as_is")
    changed = {name for name, value in clip.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == 48 and all(".lora_" in name for name in changed)


def test_adapters_that_were_stopped_go_on(clip: Any, samples: list[Sample], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft, of the extra test, is not installed")
    peft.get_peft_model(clip.visual, peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["c_fc", "c_proj"]))
    whole, again = copy.deepcopy(clip), copy.deepcopy(clip)
    expected = run(whole, samples, freeze="as_is", iterations=4)
    with pytest.raises(KeyboardInterrupt):
        run(clip, samples, freeze="as_is", iterations=4, state=tmp_path / "state.pt", on_iteration=stop_at(2))
    assert run(again, samples, freeze="as_is", iterations=4, state=tmp_path / "state.pt") == expected
    assert same(again, whole)
    again = copy.deepcopy(create())
    peft.get_peft_model(again.visual, peft.LoraConfig(r=2, target_modules=["c_fc"]))
    with pytest.raises(ValueError, match="clip_model"):
        run(again, samples, freeze="as_is", iterations=4, state=tmp_path / "state.pt")


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
    def stop(iteration: int, _: object) -> None:
        if iteration == 2:
            raise KeyboardInterrupt

    clip.train()
    clip.transformer.eval()
    with pytest.raises(KeyboardInterrupt):
        run(clip, samples, iterations=5, checkpoint=tmp_path / "tower.safetensors", on_iteration=stop)
    saved = load_file(tmp_path / "tower.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in clip.visual.state_dict().items())
    assert clip.training and clip.visual.training and not clip.transformer.training


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.exists() else {}


def test_a_checkpoint_is_written_every_so_many_iterations(clip: Any, samples: list[Sample], tmp_path: Path) -> None:
    path, towers, files = tmp_path / "tower.safetensors", [], []

    def watch(iteration: int, _: object) -> None:  # called before the checkpoint of the iteration is written
        towers.append({name: value.clone() for name, value in clip.visual.state_dict().items()})
        files.append(weights(path))

    run(clip, samples, iterations=5, checkpoint=path, checkpoint_every=2, on_iteration=watch)
    files.append(weights(path))
    assert files[:2] == [{}, {}]
    for file, iteration in zip(files[2:], (2, 2, 4, 5), strict=True):
        assert all(torch.equal(file[name], value) for name, value in towers[iteration - 1].items())


@pytest.mark.parametrize("what", ["loss", "gradient", "weights", "huge weights", "huge lr"])
def test_divergence_leaves_the_last_good_checkpoint(
    what: str, clip: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = tmp_path / "tower.safetensors", {}
    good: dict[str, Tensor] = {}

    class Broken(MAFTLoss):
        def forward(self, *args: Any) -> dict[str, Tensor]:
            terms = super().forward(*args)
            return {**terms, "mask_aware": terms["mask_aware"] * (torch.nan if what == "loss" and good else 1)}

    def spoil(iteration: int, _: object) -> None:
        if iteration != 3:
            return
        good.update({name: value.clone() for name, value in weights(path).items()})  # after 2 iterations
        if what == "gradient":
            clip.visual.proj.register_hook(lambda gradient: gradient * torch.inf)
        if "weights" in what:
            with torch.no_grad():
                clip.visual.ln_post.weight.fill_(torch.nan if what == "weights" else 1e20)  # whose squares are infinite

    if what == "huge lr":

        class Leap(torch.optim.AdamW):
            def step(self, closure: Any = None) -> Any:
                self.param_groups[0]["lr"] = 1e30 if good else 1e-3
                return super().step(closure)

        monkeypatch.setattr(torch.optim, "AdamW", Leap)
        options["iterations"] = 4  # the leap is the last step: no forward pass follows it
    with pytest.raises(FloatingPointError, match=r"diverged after [34] iterations: .*lower lr"):
        run(
            clip, samples, checkpoint=path, checkpoint_every=2, on_iteration=spoil, loss=Broken(),
            **{"iterations": 6, **options},
        )  # fmt: skip
    assert good and all(torch.equal(value, good[name]) for name, value in weights(path).items())
    if what in ("loss", "gradient"):  # found out before the step
        assert all(value.isfinite().all() for value in clip.visual.state_dict().values())
    assert [file.name for file in tmp_path.iterdir()] == ["tower.safetensors"]


def test_ctrl_c_within_a_step_leaves_the_last_good_checkpoint(
    clip: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, good = tmp_path / "tower.safetensors", {}

    class Interrupted(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            if path.exists():
                good.update(weights(path))
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1)  # some are new, the others old
                raise KeyboardInterrupt
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(clip, samples, iterations=5, checkpoint=path, checkpoint_every=2)
    assert good and all(torch.equal(value, good[name]) for name, value in weights(path).items())


def test_a_broken_sample_leaves_the_checkpoint_of_the_last_step(
    clip: Any, samples: list[Sample], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="masks"):
        run(clip, [*samples, samples[0]._replace(masks=samples[0].masks + 3.0)], iterations=8, batch_size=1, seed=1,
            checkpoint=tmp_path / "tower.safetensors")  # fmt: skip
    saved = weights(tmp_path / "tower.safetensors")
    assert saved and all(torch.equal(saved[name], value) for name, value in clip.visual.state_dict().items())


@pytest.mark.parametrize("place", ["missing/tower.safetensors", "file/tower.safetensors", ""])
def test_a_checkpoint_that_can_not_be_written_is_refused_before_the_first_step(
    place: str, clip: Any, samples: list[Sample], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    before = copy.deepcopy(clip.state_dict())
    with pytest.raises(OSError, match=r"checkpoint .*(can't be written.*make its folder|is a folder)"):
        run(clip, samples, checkpoint=tmp_path / place)
    assert all(torch.equal(before[name], value) for name, value in clip.state_dict().items())
    assert all(parameter.requires_grad for parameter in clip.parameters())
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


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
        ({"teacher_scores": torch.full((3, 4), torch.nan)}, r"teacher_scores must lie in \[0, 1\]"),
        ({"teacher_scores": torch.full((3, 4), 30.0)}, r"teacher_scores must lie in \[0, 1\].*softmax"),
        ({"freeze": "most"}, "unknown freeze"),
        ({"lr": -1.0}, "lr is -1.0, expected a finite number"),
        ({"lr": math.nan}, "lr is nan"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
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
    with pytest.raises(ValueError, match="and finite"):
        finetune(clip, samples, TEXT * torch.nan, iterations=1)
    with pytest.raises(ValueError, match=r"VisionTransformer has no logit_scale.*pass logit_scale"):
        run(clip.visual, samples)
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
    assert ground_truth(torch.tensor([[4, 3, 0]]), num_classes=4)[1].tolist() == [0, 3]
    with pytest.raises(ValueError, match=r"\(H, W\), got \(1, 2, 2\)"):
        ground_truth(torch.zeros(1, 2, 2, dtype=torch.uint8), num_classes=4)


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


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def stop_at(number: int) -> Any:
    def stop(iteration: int, _: object) -> None:
        if iteration == number:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("freeze", ["paper", "released"])
def test_a_stopped_run_goes_on_to_the_same_bits(freeze: str, clip: Any, samples: list[Sample], tmp_path: Path) -> None:
    whole, again = copy.deepcopy(clip), copy.deepcopy(clip)
    options: dict[str, Any] = {"iterations": 6, "freeze": freeze}
    expected = run(whole, samples, **options)
    options |= {"state": tmp_path / "state.pt", "checkpoint": tmp_path / "tower.safetensors"}
    with pytest.raises(KeyboardInterrupt):
        run(clip, samples, **options, on_iteration=stop_at(3))
    calls: list[int] = []
    assert run(again, samples, **options, on_iteration=lambda n, _: calls.append(n)) == expected
    assert calls == [3, 4, 5, 6] and same(again, whole)  # the last that the stop may have cut off, again
    third = create()
    assert (
        run(third, samples, **options, on_iteration=lambda n, _: calls.append(n)) == expected
    )  # nothing is left to do
    assert calls == [3, 4, 5, 6, 6] and same(third, whole)
    with pytest.raises(ValueError, match="fine-tuned before"):  # whose copy is no frozen teacher
        run(third, samples, **options)


def test_what_is_called_again_after_a_stop_finds_the_model_as_it_was(samples: list[Sample], tmp_path: Path) -> None:
    modes: list[tuple[int, bool, bool]] = []
    clip = create().train()

    def watch(iteration: int, _: object) -> None:
        modes.append((iteration, clip.visual.training, "forward" in vars(clip.visual)))
        if len(modes) == 2:
            raise KeyboardInterrupt

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        options: dict[str, Any] = {
            "state": tmp_path / "state.pt",
            "accelerator": accelerate.Accelerator(cpu=True, mixed_precision="bf16"),
        }
        with pytest.raises(KeyboardInterrupt):
            run(clip, samples, **options, on_iteration=watch)
        clip = create().train()
        run(clip, samples, **options, on_iteration=watch)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    # In eval mode, and in bfloat16, which accelerate's own forward is.
    assert modes == [(iteration, False, True) for iteration in (1, 2, 2, 3)]
    assert clip.visual.training


def test_a_state_of_other_arguments_is_refused_by_name(clip: Any, samples: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run(copy.deepcopy(clip), samples, state=path)
    before, content = copy.deepcopy(clip.state_dict()), path.read_bytes()
    for options, name in (
        ({"lr": 1e-4}, "lr"),
        ({"seed": 4}, "seed"),
        ({"loss": MAFTLoss(distillation_weight=0.5)}, "loss"),
        ({"teacher_scores": torch.full((3, 4), 0.25)}, "teacher"),
    ):
        with pytest.raises(ValueError, match=rf"other arguments: {name} \(there"):
            run(clip, samples, state=path, **options)
    with pytest.raises(ValueError, match=r"len\(samples\) \(there 3, here 2\)"):
        run(clip, samples[:2], state=path)
    assert all(torch.equal(before[name], value) for name, value in clip.state_dict().items())
    other = create()
    with torch.no_grad():
        other.visual.proj.add_(1)
    with pytest.raises(ValueError, match=r"teacher .*clip_model"):
        run(other, samples, state=path)
    assert path.read_bytes() == content
    path.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        run(clip, samples, state=path)


KILLED = """
import sys
sys.path[:0] = ["tests"]
from test_finetune import *
import time
def watch(iteration, _):
    print(iteration, flush=True)
clip = create()
generator = torch.Generator().manual_seed(1)
samples = [Sample(torch.randn(3, 32, 32, generator=generator), torch.rand(3, 32, 32, generator=generator) > 0.5,
                  torch.full((32, 32), k)) for k in range(4)]
finetune(clip, samples, TEXT, iterations=12, batch_size=2, lr=1e-3, progress=False, on_iteration=watch,
         checkpoint_every=2, checkpoint=sys.argv[1] + "/tower.safetensors", state=sys.argv[1] + "/state.pt")
"""


def test_sigkill_at_any_moment_ends_in_the_same_bits(tmp_path: Path) -> None:
    def start(folder: str) -> subprocess.Popen[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        root = Path(__file__).parents[1]
        command = [sys.executable, "-c", KILLED, str(tmp_path / folder)]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=environment)

    assert start("whole").wait() == 0
    chance = random.Random(0)
    for _ in range(int(os.environ.get("MAFT_KILLS", "3"))):
        child = start("killed")
        assert child.stdout is not None
        for _ in range(chance.randint(1, 4)):  # iterations, and then somewhere in a step or a save
            child.stdout.readline()
        time.sleep(chance.random() * 0.05)
        child.kill()
        child.wait()
        for file in (tmp_path / "killed").glob("tower.safetensors"):
            assert load_file(file)  # whole at any time
    assert start("killed").wait() == 0
    ends = [load_file(tmp_path / folder / "tower.safetensors") for folder in ("whole", "killed")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def parallel(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    clip = create()
    history = finetune(
        clip, ragged(), TEXT, iterations=1, batch_size=5, lr=1e-3, progress=False, accelerator=accelerator,
        checkpoint=f"{folder}/tower.safetensors",
    )  # fmt: skip
    gradients = {name: p.grad for name, p in clip.visual.named_parameters() if p.grad is not None}
    torch.save((gradients, history), f"{folder}/{rank}.pt")


def ragged() -> list[Sample]:
    """Different numbers of proposals and of classes, none in one: a mean of processes' means would be wrong."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for k, proposals in enumerate((1, 6, 2, 4, 3)):
        labels = torch.full((32, 32), 255)
        for label in range(k):
            labels[8 * label : 8 * label + 8] = label
        masks = torch.rand(proposals, 32, 32, generator=generator) > 0.5
        samples.append(Sample(torch.randn(3, 32, 32, generator=generator), masks, labels))
    return samples


def test_two_processes_take_the_gradients_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(parallel, (port, str(tmp_path)), nprocs=2)
    clip = create()
    history = finetune(clip, ragged(), TEXT, iterations=1, batch_size=5, lr=1e-3, progress=False)
    for rank in range(2):
        gradients, losses = torch.load(tmp_path / f"{rank}.pt")
        assert losses[0] == pytest.approx(history[0], rel=1e-5, abs=1e-9)
        assert len(gradients) > 100
        for name, parameter in clip.visual.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=2e-7, msg=name)
    assert (tmp_path / "tower.safetensors").exists()


def test_bfloat16_stays_near_float32_and_leaves_the_tower_as_it_was(clip: Any, samples: list[Sample]) -> None:
    low = copy.deepcopy(clip)
    keys = set(vars(low.visual))
    before = copy.deepcopy(clip.visual.state_dict())
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        history = run(low, samples, accelerator=accelerate.Accelerator(cpu=True, mixed_precision="bf16"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for a, b in zip(run(clip, samples), history, strict=True):
        assert a != b and a == pytest.approx(b, abs=0.02)
    assert history[0]["self_distillation"] == pytest.approx(0, abs=1e-9)  # the teacher computes in bfloat16, too
    assert {parameter.dtype for parameter in low.parameters()} == {torch.float32}
    assert set(vars(low.visual)) <= keys | {"fine_tuned"}
    steps = [
        torch.cat([(model.visual.state_dict()[name] - value).flatten() for name, value in before.items()])
        for model in (clip, low)
    ]
    assert torch.cosine_similarity(steps[0], steps[1], dim=0) > 0.8
    copy.deepcopy(low.visual)(samples[0].image[None])


def test_a_batch_in_parts_and_gradient_checkpointing_change_rounding_only(clip: Any, samples: list[Sample]) -> None:
    parts, checkpointed = copy.deepcopy(clip), copy.deepcopy(clip)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    expected = run(clip, ragged(), batch_size=5, iterations=1)
    checkpointed.visual.set_grad_checkpointing(True)
    assert run(parts, ragged(), batch_size=5, iterations=1, accelerator=accelerator)[0] == pytest.approx(expected[0])
    assert run(checkpointed, ragged(), batch_size=5, iterations=1)[0] == pytest.approx(expected[0])
    for other in (parts, checkpointed):
        for a, b in zip(clip.visual.parameters(), other.visual.parameters(), strict=True):
            if a.grad is not None:
                assert b.grad is not None
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=2e-7)
    with pytest.raises(ValueError, match=r"batch_size is 1, too small .*at least 2"):
        run(parts, samples, batch_size=1, accelerator=accelerator, loss=MAFTLoss(distillation_weight=0))


def of_ground_truth() -> list[Sample]:
    """Samples with as many masks as classes, from none to four."""
    return [s._replace(masks=ground_truth(s.labels, 4)[0]) for s in ragged()]


def test_mask_classification_trains_on_ground_truth_masks(clip: Any) -> None:
    samples = of_ground_truth()
    expected = []
    for image, masks, labels in samples:
        if len(masks):
            with torch.no_grad():
                embeddings = encode_masks(clip.eval().visual, image[None], [masks])[0].double()
            logits = float(clip.logit_scale.detach().exp()) * normalize(embeddings, dim=-1) @ TEXT.double().T
            own = ground_truth(labels, 4)[1]
            expected.append(torch.nn.functional.cross_entropy(logits, own).item())
    assert len(expected) == 4  # one image has no class
    parts = copy.deepcopy(clip)
    options: dict[str, Any] = {"iterations": 12, "batch_size": 5, "loss": MaskClassificationLoss()}
    history = run(clip, samples, **options)
    assert set(history[0]) == {"mask_classification", "self_distillation"}
    assert history[0]["mask_classification"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert history[-1]["mask_classification"] < 0.7 * history[0]["mask_classification"]
    assert all(step["self_distillation"] == 0 for step in history)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    again = run(parts, samples, **{**options, "iterations": 1}, accelerator=accelerator)
    assert again[0] == pytest.approx(history[0], rel=1e-5)  # images count alike in whatever part they are


def test_mask_classification_keeps_to_the_frozen_clip_if_wanted(clip: Any) -> None:
    samples = of_ground_truth()
    images = torch.stack([sample.image for sample in samples])
    drift = []
    for weight in (0.0, 100.0):
        tuned = copy.deepcopy(clip)
        run(tuned, samples, iterations=10, loss=MaskClassificationLoss(weight))
        with torch.no_grad():
            scores = [class_scores(model.eval().visual(images), TEXT, 10.0) for model in (tuned, clip)]
        drift.append(float(self_distillation_loss(*scores)))
    assert 0 < drift[1] < 0.5 * drift[0]


def test_mask_classification_refuses_proposals_before_a_step(clip: Any, samples: list[Sample]) -> None:
    before = copy.deepcopy(clip.state_dict())
    with pytest.raises(ValueError, match=r"are not the regions of its 1 classes.*without propose"):
        run(clip, samples, loss=MaskClassificationLoss())
    assert all(torch.equal(before[name], value) for name, value in clip.state_dict().items())
