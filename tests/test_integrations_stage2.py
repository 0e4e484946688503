"""Stage 2 on stand-ins of a host and of detectron2; tests/hosts runs the same in the real train_net.py."""

import copy
import importlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from region_hosts import CLASSES, DIM, SEMANTIC, MaskFormer, array, inputs, softmax
from torch import Tensor, nn

from maft_adapter.checkpoint import load_mask_aware, save_mask_aware
from maft_adapter.integrations import stage2
from maft_adapter.integrations.zsseg import HOST, add_maft_config, patch, unpatch, visual


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


def test_the_launcher_without_a_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stage2.main(HOST, [])
    assert "MODEL.MAFT.START_LAYER 8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"missing\.py is no file; the first argument is the host's train_net\.py"):
        stage2.main(HOST, ["missing.py"])
    monkeypatch.setattr(sys, "argv", ["python -m", "other.py", "--config-file", "x"])
    with pytest.raises(SystemExit, match=r"other\.py is no file"):
        stage2.main(HOST)


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


def test_a_stage_2_model_is_pickled_with_its_teacher(build: Any) -> None:
    model = prepared(build()).train()
    copied = pickle.loads(pickle.dumps(model))
    assert copied.training and copied(inputs()) == model(inputs())


def test_the_teacher_of_a_tower_that_gives_more_than_the_embedding(build: Any) -> None:
    expected = prepared(build()).train()(inputs())
    model = build()
    visual(model).output_tokens = True  # visual(images) is a tuple, as in CoCa
    losses = prepared(model).train()(inputs())
    assert losses == expected
    assert losses["loss_self_distillation"] < 1e-12  # student and teacher are the same still


def test_a_tower_in_half_precision_trains_in_float32(build: Any) -> None:
    model = build()
    visual(model).half()
    prepared(model)
    for tower in (visual(model), model.stage2.teacher):
        assert all(parameter.dtype == torch.float32 for parameter in tower.parameters())
    assert not any(parameter.requires_grad for parameter in model.stage2.teacher.parameters())


def test_a_resnet_is_refused(build: Any) -> None:
    model = patch(build(resnet=True), size=64)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"CLIP is a ResNet \(ModifiedResNet\).*build the host with ViT-B/16"):
        stage2.prepare(model, HOST)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_the_defaults_are_the_paper_s(build: Any) -> None:
    model = prepared(build()).train()
    assert (model.stage2.loss.kind, model.stage2.loss.distillation_weight) == ("smooth_l1", 1)
    frozen = {name for name, parameter in visual(model).named_parameters() if not parameter.requires_grad}
    assert frozen == {
        *("conv1.weight", "class_embedding", "positional_embedding"),
        *(name for name, _ in visual(model).named_parameters() if ".mlp." in name),
    }


# A run of train_net.py: detectron2's config, its registry of architectures, and how it loads weights.


class Node(dict[str, Any]):
    """The part of detectron2's CfgNode that is used; as there, a file may name declared keys only."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def merge_from_file(self, path: Any) -> None:
        self.merge(json.loads(Path(path).read_text(encoding="utf-8")), "")

    def merge(self, other: dict[str, Any], prefix: str) -> None:
        for key, value in other.items():
            if key not in self:
                raise KeyError(f"Non-existent config key: {prefix}{key}")
            if isinstance(value, dict):
                self[key].merge(value, f"{prefix}{key}.")
            else:
                self[key] = value


class Registry(dict[str, Any]):
    def register(self, builder: Any) -> None:
        self[builder.__name__] = builder


@pytest.fixture
def architectures(build: Any, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """detectron2's META_ARCH_REGISTRY, with the stand-in of ZSSeg in it."""
    registry = Registry(ZeroShotMaskFormer=lambda cfg: build())
    modules = {
        "config": SimpleNamespace(CfgNode=Node),
        "modeling": SimpleNamespace(META_ARCH_REGISTRY=registry),
        "data": SimpleNamespace(DatasetCatalog={}),
    }
    monkeypatch.setitem(sys.modules, "detectron2", SimpleNamespace(**modules))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"detectron2.{name}", module)
    return registry


@pytest.fixture
def config(architectures: Registry, tmp_path: Path) -> Callable[..., Node]:
    """`config(train, **maft)`: a merged config of ZSSeg, turned into one of stage 2 that suits the stand-in."""

    def config(train: str = "voc_base_sem_seg_train", **maft: Any) -> Node:
        cfg = host_config(tmp_path, train)
        add_maft_config(cfg)
        cfg.MODEL.MAFT.update({"START_LAYER": 1, "SIZE": 64, **maft})
        return cfg

    return config


def host_config(folder: Path, train: str = "voc_base_sem_seg_train") -> Node:
    return Node(
        MODEL=Node(META_ARCHITECTURE="ZeroShotMaskFormer", WEIGHTS=""),
        DATASETS=Node(TRAIN=(train,), TEST=("voc_sem_seg_test",)),
        SOLVER=Node(
            BASE_LR=0.1, WEIGHT_DECAY=0.1, IMS_PER_BATCH=32, WARMUP_ITERS=1500, MAX_ITER=1, CHECKPOINT_PERIOD=5000
        ),
        OUTPUT_DIR=str(folder),
    )


def built(architectures: Registry, cfg: Node) -> Any:
    """What train_net.py builds: `DefaultTrainer.build_model`."""
    return architectures[cfg.MODEL.META_ARCHITECTURE](cfg)


def generator_of(build: Any) -> dict[str, Tensor]:
    """What stage 1 of ZegFormer leaves: everything but CLIP."""
    return {name: value for name, value in build().state_dict().items() if ".clip_model." not in name}


@pytest.mark.parametrize(
    "train, iterations",
    [
        ("voc_base_sem_seg_train", 100),
        ("coco_2017_train_stuff_base_sem_seg", 1000),
        ("ade20k_full_base_sem_seg_train", 5000),
        ("my_own_train", 1000),
    ],
)
def test_the_solver_is_the_paper_s(config: Any, monkeypatch: pytest.MonkeyPatch, train: str, iterations: int) -> None:
    solver = config(train).SOLVER
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.IMS_PER_BATCH) == (1e-5, 1e-5, 16)
    assert (iterations, 0) == (solver.MAX_ITER, solver.WARMUP_ITERS)
    assert iterations % solver.CHECKPOINT_PERIOD == 0 and iterations // solver.CHECKPOINT_PERIOD == 5


def test_the_keys_and_what_they_are_by_default(architectures: Registry, tmp_path: Path) -> None:
    cfg = host_config(tmp_path)
    add_maft_config(cfg)
    assert cfg.MODEL.META_ARCHITECTURE == "MAFT_zsseg"
    assert cfg.MODEL.MAFT == {
        "START_LAYER": 8, "SIZE": 480, "KEEP_ASPECT_RATIO": False, "FREEZE": "paper", "LOSS": "smooth_l1",
        "DISTILLATION_WEIGHT": 1.0, "STUDENT": "", "TEACHER": "", "TOWER": "",
        "HOST_ARCHITECTURE": "ZeroShotMaskFormer",
    }  # fmt: skip


def test_every_key_arrives(architectures: Registry, config: Any) -> None:
    cfg = config(START_LAYER=2, SIZE=96, KEEP_ASPECT_RATIO=True, FREEZE="released", LOSS="l1", DISTILLATION_WEIGHT=0.1)
    model = built(architectures, cfg)
    clip_input = model.clip_adapter.clip_input
    assert (visual(model).start_layer, clip_input.size, clip_input.keep_aspect_ratio) == (2, 96, True)
    assert (model.stage2.loss.kind, model.stage2.loss.distillation_weight) == ("l1", 0.1)
    assert not visual(model).proj.requires_grad and visual(model).ln_post.weight.requires_grad


def test_a_config_that_stage_2_wrote_is_taken_as_it_is(architectures: Registry, config: Any, tmp_path: Path) -> None:
    written = config(START_LAYER=3)
    written.SOLVER.MAX_ITER = 7
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    cfg = host_config(tmp_path)
    with pytest.raises(KeyError, match=r"MODEL\.MAFT"):
        host_config(tmp_path).merge_from_file(tmp_path / "config.json")
    add_maft_config(cfg, tmp_path / "config.json")
    assert cfg.MODEL == written.MODEL and cfg.SOLVER == written.SOLVER


def test_a_config_of_the_host_is_merged_before_it_is_turned(architectures: Registry, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"SOLVER": {"BASE_LR": 0.5}, "DATASETS": {"TRAIN": ["coco_train"]}}), encoding="utf-8"
    )
    cfg = host_config(tmp_path)
    add_maft_config(cfg, tmp_path / "config.json")
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (1e-5, 1000)


def lacks_all(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("sem_seg_head.")}


def lacks_one(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "sem_seg_head.masks.bias"}


def lacks_the_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("backbone.")}


@pytest.mark.parametrize("spoil", [lacks_all, lacks_one, lacks_the_backbone])
def test_weights_that_leave_the_generator_random_are_refused(
    architectures: Registry, config: Any, build: Any, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """Whatever file they are from: R-101.pkl, a Swin, or a checkpoint of another configuration."""
    model = built(architectures, config())
    missing = r"these weights lack \d of the 4 parameters that make proposals.* stage 2 needs a trained zsseg model"
    with pytest.raises(ValueError, match=missing):
        model.load_state_dict(spoil(generator_of(build)), strict=False)
    with pytest.raises(ValueError, match="no weights were loaded"):
        model.train()(inputs())


@pytest.mark.parametrize("training", [True, False])
def test_no_weights_at_all_are_refused(architectures: Registry, config: Any, training: bool) -> None:
    """MODEL.WEIGHTS "" loads nothing, so nothing but a forward can tell."""
    model = built(architectures, config()).train(training)
    with pytest.raises(ValueError, match=r"no weights were loaded; stage 2 needs a trained zsseg model"):
        model(inputs())


def test_a_trained_host_without_clip_trains(architectures: Registry, config: Any, build: Any) -> None:
    def with_clip_in_the_head(cfg: Any) -> Any:
        model = build()
        model.sem_seg_head.clip_model = nn.Linear(1, 1)  # where ZegFormer has it
        return model

    architectures["ZeroShotMaskFormer"] = with_clip_in_the_head
    model = built(architectures, config())
    model.load_state_dict(generator_of(build), strict=False)
    assert model.train()(inputs()).keys() == {"loss_mask_aware", "loss_self_distillation"}
    assert model.eval()(inputs())[0].keys() == {SEMANTIC}


@pytest.mark.parametrize("weights", ["detectron2://ImageNetPretrained/torchvision/R-50.pkl", "tower.safetensors"])
def test_what_is_no_trained_host_by_its_name_is_refused_before_anything_is_built(
    architectures: Registry, config: Any, tmp_path: Path, weights: str
) -> None:
    cfg = config()
    cfg.MODEL.WEIGHTS = weights
    architectures["ZeroShotMaskFormer"] = lambda cfg: pytest.fail("was built")
    with pytest.raises(ValueError, match=rf"MODEL\.WEIGHTS is {weights}.*stage 2 needs a trained zsseg model"):
        built(architectures, cfg)


def test_resuming_needs_no_weights(architectures: Registry, config: Any, build: Any, tmp_path: Path) -> None:
    """The config's own backbone is not read then; the teacher is the CLIP that was loaded, not the student so far."""
    (tmp_path / "last_checkpoint").write_text("model_0000019.pth", encoding="utf-8")
    cfg = config()
    cfg.MODEL.WEIGHTS = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    model = built(architectures, cfg)
    state = {name: value + 0.1 * (".clip_model." in name) for name, value in build().state_dict().items()}
    model.load_state_dict(state, strict=False)
    assert model.train()(inputs())["loss_self_distillation"] > 1e-4


def test_the_authors_checkpoint_is_a_tower_to_evaluate(
    architectures: Registry, config: Any, build: Any, tmp_path: Path
) -> None:
    tower = {f"IPCLIP.{name}": value + 0.1 for name, value in visual(build()).state_dict().items()}
    torch.save({"model": {**build().state_dict(), **tower}}, tmp_path / "maft.pth")
    model = built(architectures, config())
    with pytest.raises(ValueError, match=r"IPCLIP.*name the file in MODEL\.MAFT\.TOWER"):
        model.load_state_dict(torch.load(tmp_path / "maft.pth")["model"], strict=False)

    model = built(architectures, config(TOWER=str(tmp_path / "maft.pth")))
    plain = built(architectures, config())
    for each in (model, plain):
        each.load_state_dict(build().state_dict())  # with a CLIP of its own, which comes first
    assert all(torch.equal(value, tower[f"IPCLIP.{name}"]) for name, value in visual(model).state_dict().items())
    assert not torch.equal(segment(model.eval())[0], segment(plain.eval())[0])
    with pytest.raises(ValueError, match=r"MODEL\.MAFT\.TOWER is .*maft\.pth, a tower to evaluate; add --eval-only"):
        model.train()(inputs())


@pytest.mark.parametrize("iteration", [0, 7])
def test_student_and_teacher_from_files(
    architectures: Registry, config: Any, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int
) -> None:
    """The student is read where a run begins: later it is in the run's own checkpoint."""
    iterations = SimpleNamespace(get_event_storage=lambda: SimpleNamespace(iter=iteration))
    monkeypatch.setitem(sys.modules, "detectron2.utils", SimpleNamespace(events=iterations))
    monkeypatch.setitem(sys.modules, "detectron2.utils.events", iterations)
    weights = {name: copy.deepcopy(visual(build()).state_dict()) for name in ("student", "teacher")}
    for shift, (name, state) in enumerate(weights.items(), 1):
        state["proj"] += shift
        torch.save(state, tmp_path / f"{name}.pth")
    files = {name.upper(): str(tmp_path / f"{name}.pth") for name in weights}
    model = built(architectures, config(**files))
    model.load_state_dict(build().state_dict())
    assert torch.equal(model.stage2.teacher.proj, weights["teacher"]["proj"])
    segment(model.eval())
    assert torch.equal(visual(model).proj, visual(build()).proj)  # what is evaluated is in MODEL.WEIGHTS
    model.train()(inputs())
    expected = weights["student"]["proj"] if iteration == 0 else visual(build()).proj
    assert torch.equal(visual(model).proj, expected)
    with torch.no_grad():
        visual(model).proj.add_(1)  # as a step of training
    model(inputs())
    assert torch.equal(visual(model).proj, expected + 1)


@pytest.mark.parametrize("key", ["STUDENT", "TEACHER", "TOWER"])
def test_a_tower_s_file_that_is_none(architectures: Registry, config: Any, key: str) -> None:
    architectures["ZeroShotMaskFormer"] = lambda cfg: pytest.fail("was built")
    with pytest.raises(ValueError, match=rf"MODEL\.MAFT\.{key} is no\.pth, which is no file"):
        built(architectures, config(**{key: "no.pth"}))


def test_a_tower_file_of_other_settings(architectures: Registry, config: Any, build: Any, tmp_path: Path) -> None:
    save_mask_aware(visual(prepared(build())), tmp_path / "tower.safetensors")  # start_layer 1
    with pytest.raises(ValueError, match=r"saved with \{'start_layer': 1\}"):
        built(architectures, config(TOWER=str(tmp_path / "tower.safetensors"), START_LAYER=2)).load_state_dict(
            build().state_dict()
        )


@pytest.mark.parametrize("start_layer", [1, 8])
def test_a_resnet_in_train_net_is_refused_as_such(
    architectures: Registry, config: Any, build: Any, start_layer: int
) -> None:
    architectures["ZeroShotMaskFormer"] = lambda cfg: build(resnet=True)
    with pytest.raises(ValueError, match=r"CLIP is a ResNet \(ModifiedResNet\).*build the host with ViT-B/16"):
        built(architectures, config(START_LAYER=start_layer))


def test_a_model_without_clip_is_refused_by_patch(architectures: Registry, config: Any) -> None:
    architectures["ZeroShotMaskFormer"] = lambda cfg: nn.Linear(1, 1)
    with pytest.raises(TypeError, match="Linear is no model of ZegFormer, ZSSeg, FreeSeg or OVSeg"):
        built(architectures, config())


TRAIN_NET = """
import beside

def main(args):
    args.config.merge_from_file(args.config_file)
    return args.config
"""


def test_train_net_gets_a_config_of_stage_2(
    architectures: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "train_net", raising=False)
    (tmp_path / "train_net.py").write_text(TRAIN_NET, encoding="utf-8")
    (tmp_path / "beside.py").touch()
    written = {"MODEL": {"MAFT": {"SIZE": 96}}, "DATASETS": {"TRAIN": ["ade20k_full_base_sem_seg_train"]}}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    merge = Node.merge_from_file
    args = SimpleNamespace(config=host_config(tmp_path), config_file=tmp_path / "config.json")
    cfg = stage2.run_train_net("zsseg", str(tmp_path / "train_net.py"), args)
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MAFT.SIZE, cfg.SOLVER.MAX_ITER) == ("MAFT_zsseg", 96, 5000)
    assert "MAFT_zsseg" in architectures
    args.config_file = tmp_path / "missing.json"
    with pytest.raises(FileNotFoundError):
        stage2.run_train_net("zsseg", str(tmp_path / "train_net.py"), args)
    assert Node.merge_from_file is merge
    (tmp_path / "train_net.txt").touch()
    with pytest.raises(ValueError, match=r"train_net\.txt is no Python file; give the train_net\.py of zsseg"):
        stage2.run_train_net("zsseg", str(tmp_path / "train_net.txt"), args)


def test_zegformers_configs_of_stage_1_get_a_clip(architectures: Registry, tmp_path: Path) -> None:
    from maft_adapter.integrations import zegformer

    cfg = host_config(tmp_path)
    cfg.MODEL.SEM_SEG_HEAD = Node(CLIP_CLASSIFICATION=False)
    zegformer.add_maft_config(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.CLIP_CLASSIFICATION


@pytest.mark.parametrize(
    ("train", "known", "times"),
    [
        ("ade20k_full_base_sem_seg_train", [], 1),
        ("ade20k_full_base_sem_seg_train", ["ade20k_full_base_sem_seg_train"], 0),
        ("voc_base_sem_seg_train", [], 0),
    ],
)
def test_ade20k_847_is_registered_where_a_config_names_it(
    architectures: Registry, config: Any, monkeypatch: pytest.MonkeyPatch, train: str, known: list[str], times: int
) -> None:
    calls: list[None] = []
    monkeypatch.setattr("maft_adapter.data.register_ade20k_847", lambda: calls.append(None))
    monkeypatch.setattr(sys.modules["detectron2.data"], "DatasetCatalog", known)
    built(architectures, config(train))
    assert len(calls) == times


# What the READMEs say.


@pytest.fixture
def readmes() -> list[str]:
    hosts = ("zegformer", "zsseg", "freeseg", "ovseg")
    modules = [importlib.import_module(f"maft_adapter.integrations.{host}") for host in hosts]
    return [Path(str(module.__file__)).with_name("README.md").read_text(encoding="utf-8") for module in modules]


def test_the_table_of_differences_is_one(readmes: list[str]) -> None:
    title = "## Where the defaults differ from the authors' code\n"
    tables = {readme.partition(title)[2].partition("\n## ")[0] for readme in readmes}
    assert len(tables) == 1
    assert tables.pop().count("\n| ") == 10  # nine differences and their heading


def test_the_tables_of_keys_name_all(readmes: list[str]) -> None:
    for readme in readmes:
        row = "".join(line for line in readme.splitlines() if line.startswith("| `MODEL.MAFT."))
        assert all(f"{key}`" in row for key in stage2.OPTIONS)
