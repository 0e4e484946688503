"""The ZegFormer shim on the real repository: ZEGFORMER_ROOT and DETECTRON2_ROOT name checkouts of both."""

import ast
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
import zegformer_stand_ins
from stand_ins import HostRunner, metrics, predictions, read
from torch import Tensor

SHIMS = ("zegformer", "zsseg", "freeseg")
CONFIG = "configs/pascal_voc/zegformer_R50_bs32_10k_vit16_voc_gzss_eval.yaml"
# A tenth of the width everywhere; the code that runs is the same.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", 32, "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 64, "MODEL.MASK_FORMER.DEC_LAYERS", 2),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 10, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
    *("MODEL.SEM_SEG_HEAD.MASK_DIM", 32),
]
ENSEMBLING, ALL_CLASSES = "MODEL.MASK_FORMER.ENSEMBLING", "MODEL.MASK_FORMER.ENSEMBLING_ALL_CLS"
BEFORE = "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE"
VARIANTS: dict[str, list[Any]] = {
    "CLIP alone": [],
    "seen and unseen": [ENSEMBLING, True],
    "all classes": [ALL_CLASSES, True],
    "calibrated": [ENSEMBLING, True, "MODEL.MASK_FORMER.GZERO_CALIBRATE", 0.3],
    "masks resized first": [ENSEMBLING, True, BEFORE, True],
    "other prompts": [ENSEMBLING, True, "MODEL.PROMPT_ENSEMBLE_TYPE", "imagenet_select"],
    "crops with context": [ALL_CLASSES, True, "MODEL.CLIP_CLS_STYLE", "crop"],
    "whole masked pictures": [ALL_CLASSES, True, "MODEL.CLIP_CLS_STYLE", "mask"],
}


@pytest.fixture(scope="module")
def zegformer(start_host: Callable[..., HostRunner]) -> HostRunner:
    runner = start_host("ZEGFORMER_ROOT")
    site = runner.folder / "site" / "sitecustomize.py"
    site.write_text("import zegformer_stand_ins\n\nzegformer_stand_ins.install()\n", encoding="utf-8")
    runner.call(zegformer_stand_ins.install)
    zegformer_stand_ins.write_voc(runner.folder)
    return runner


def small(runner: HostRunner) -> list[Any]:
    names = runner.folder / "datasets" / "VOCZERO"
    return [
        *SMALL,
        *("MODEL.SEM_SEG_HEAD.TRAIN_CLASS_JSON", str(names / "seen_classnames.json")),
        *("MODEL.SEM_SEG_HEAD.TEST_CLASS_JSON", str(names / "all_classnames.json")),
    ]


def build(runner: HostRunner, options: list[Any]) -> list[Any]:
    """Arguments of `stand_ins.build`."""
    return [f"{runner.paths[0]}/{CONFIG}", "mask_former", [*small(runner), *options]]


def segment(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [result["sem_seg"] for result in model(stand_ins.inputs("unread"))]


def patch_and_back(arguments: list[Any]) -> None:
    from maft_adapter.integrations.zegformer import patch, unpatch, visual

    model = stand_ins.build(*arguments)
    keys, types, attributes = list(model.state_dict()), [type(module) for module in model.modules()], set(vars(model))
    inputs: list[Any] = []
    hook = visual(model).register_forward_pre_hook(lambda _, args: inputs.append([tuple(x.shape) for x in args]))
    before = segment(model)
    assert inputs == [[(10, 3, 224, 224)]] * 2
    inputs.clear()
    assert patch(model, start_layer=2, size=96) is model
    patched = segment(model)
    assert inputs == [[(2, 3, 96, 96), (2, 10, 128, 160)]]  # one pass for the padded batch, no crops
    assert list(model.state_dict()) == keys
    patch(model, start_layer=3, size=96)  # a second call changes the settings
    assert not torch.equal(patched[0], segment(model)[0])
    inputs.clear()
    patch(model, start_layer=2, size=96, keep_aspect_ratio=True)
    segment(model)
    assert inputs == [[(2, 3, 96, 128), (2, 10, 128, 160)]]
    hook.remove()
    assert unpatch(model) is model
    assert [type(module) for module in model.modules()] == types
    assert set(vars(model)) == attributes
    for a, b, c in zip(before, patched, segment(model), strict=True):
        assert a.shape == b.shape
        assert b.isfinite().all()
        assert not torch.allclose(a, b, atol=1e-6)
        assert torch.equal(a, c)


def host_features_through_the_shim(arguments: list[Any]) -> float:
    """Largest difference between the host's output and the shim's, when CLIP gives the shim the host's features."""
    import maft_adapter.integrations.zegformer as shim

    model = stand_ins.build(*arguments)
    recorded: list[Tensor] = []
    hook = shim.visual(model).register_forward_hook(lambda _, args, output: recorded.append(output))
    expected = segment(model)
    hook.remove()
    assert recorded[0].dtype == torch.float16
    shim.patch(model, start_layer=2, size=96)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(shim, "encode_masks", lambda clip_model, images, masks: torch.stack(recorded))
        actual = segment(model)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, actual, strict=True))


def test_patched_and_unpatched(zegformer: HostRunner) -> None:
    zegformer.call(patch_and_back, build(zegformer, [ENSEMBLING, True]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_classifier_changes(zegformer: HostRunner, variant: str) -> None:
    assert zegformer.call(host_features_through_the_shim, build(zegformer, VARIANTS[variant])) < 1e-5


def padding(arguments: list[Any]) -> None:
    """The padded batch is detectron2's own."""
    from detectron2.structures import ImageList

    from maft_adapter.integrations.zegformer import patch

    model = patch(stand_ins.build(*arguments), start_layer=2)
    images = [torch.randn(3, 100, 60), torch.randn(3, 33, 140)]
    assert torch.equal(model.clip_input.pad(images), ImageList.from_tensors(images, 32).tensor)


def test_padding(zegformer: HostRunner) -> None:
    zegformer.call(padding, build(zegformer, []))


def refusals(arguments: list[Any]) -> None:
    shims = {name: importlib.import_module(f"maft_adapter.integrations.{name}") for name in SHIMS}
    model = stand_ins.build(*arguments)
    with pytest.raises(ValueError, match="CLIP_CLASSIFICATION True"):
        shims.pop("zegformer").patch(model)
    for shim in shims.values():
        with pytest.raises(TypeError, match="a model of zegformer"):
            shim.patch(model)


def test_wrong_models_are_refused(zegformer: HostRunner) -> None:
    zegformer.call(refusals, build(zegformer, ["MODEL.SEM_SEG_HEAD.CLIP_CLASSIFICATION", False]))


# Stage 2 through the real train_net.py.
TINY = [
    *("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TRAIN", "(96,)"),
    *("INPUT.CROP.SIZE", "(64, 64)", "INPUT.SIZE_DIVISIBILITY", 64, "INPUT.MIN_SIZE_TEST", 96),
    *("MODEL.MAFT.START_LAYER", 2, "MODEL.MAFT.SIZE", 96, "SEED", 1),
]
FIGURES = ("mIoU", "seen_IoU", "unseen_IoU", "harmonic mean")
VISUAL = "sem_seg_head.predictor.clip_model.visual."


def stage2(runner: HostRunner, output: str, weights: Any, *flags: str) -> str:
    return runner.command(
        *("-m", "maft_adapter.integrations.zegformer", f"{runner.paths[0]}/train_net.py", *flags),
        *("--config-file", f"{runner.paths[0]}/{CONFIG}", *small(runner), *TINY),
        *("MODEL.WEIGHTS", weights, "OUTPUT_DIR", runner.folder / output),
    )


def figures(output: str) -> dict[str, float]:
    """What the host's evaluator printed last."""
    return {name: float(re.findall(rf"'{name}': (?:np\.float64\()?([\d.naif]+)", output)[-1]) for name in FIGURES}


def save_model(arguments: list[Any], path: Path) -> None:
    torch.save({"model": stand_ins.build(*arguments).state_dict()}, path)


@pytest.fixture(scope="module")
def untrained(zegformer: HostRunner) -> Path:
    """A checkpoint as the host's own first stage leaves it, without CLIP, with random weights."""
    path = zegformer.folder / "stage1.pth"
    zegformer.call(save_model, build(zegformer, ["MODEL.SEM_SEG_HEAD.CLIP_CLASSIFICATION", False]), path)
    return path


@pytest.fixture(scope="module")
def trained(zegformer: HostRunner, untrained: Path) -> str:
    """The output of two iterations on one process."""
    return stage2(zegformer, "one", untrained)


def test_stage_2_trains_the_attention_and_saves_no_teacher(
    zegformer: HostRunner, untrained: Path, trained: str
) -> None:
    path = zegformer.folder / "with_clip.pth"
    zegformer.call(save_model, build(zegformer, []), path)
    before, after = read(path), read(zegformer.folder / "one" / "model_final.pth")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])}
    assert all(name.startswith(VISUAL) for name in changed)
    changed = {name.removeprefix(VISUAL) for name in changed}
    assert {"proj", "ln_post.weight", "transformer.resblocks.0.attn.in_proj_weight"} <= changed
    assert all(re.match(r"proj$|ln_|transformer\.resblocks\.\d+\.(ln_|attn\.)", name) for name in changed)
    assert all(after[name].dtype == torch.float32 for name in after if name.startswith(VISUAL))
    written = metrics(zegformer.folder / "one")
    assert 0 < written["loss_mask_aware"] < 1
    assert written["total_loss"] == pytest.approx(written["loss_mask_aware"] + written["loss_self_distillation"])
    assert written["lr"] < 1e-5  # the paper's, decayed by the host


def configure(config_file: str, options: list[Any]) -> None:
    """The way without the launcher, from a config of the first stage, which attaches no CLIP."""
    import mask_former
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.projects.deeplab import add_deeplab_config

    from maft_adapter import is_mask_aware
    from maft_adapter.integrations.zegformer import add_maft_config, visual

    cfg = get_cfg()
    add_deeplab_config(cfg)
    mask_former.add_mask_former_config(cfg)
    cfg.merge_from_file(config_file)
    assert not cfg.MODEL.SEM_SEG_HEAD.CLIP_CLASSIFICATION
    add_maft_config(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.CLIP_CLASSIFICATION
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.IMS_PER_BATCH) == (1e-5, 1e-5, 16)
    assert cfg.SOLVER.MAX_ITER == 100  # of VOC
    cfg.merge_from_list([*options, "MODEL.MAFT.START_LAYER", 3, "MODEL.MAFT.SIZE", 96, "MODEL.WEIGHTS", ""])
    model = build_model(cfg)
    assert is_mask_aware(visual(model))
    assert (visual(model).start_layer, model.clip_input.size) == (3, 96)


def test_config_of_the_first_stage_without_the_launcher(zegformer: HostRunner) -> None:
    stage1 = CONFIG.replace("_gzss_eval", "")
    zegformer.call(configure, f"{zegformer.paths[0]}/{stage1}", small(zegformer))


def test_evaluation_is_mask_aware(zegformer: HostRunner, trained: str) -> None:
    assert all(value >= 0 for value in figures(trained).values())
    checkpoint = zegformer.folder / "one" / "model_final.pth"
    assert figures(stage2(zegformer, "evaluated", checkpoint, "--eval-only")) == figures(trained)
    plain = zegformer.command(
        *(f"{zegformer.paths[0]}/train_net.py", "--config-file", f"{zegformer.paths[0]}/{CONFIG}", "--eval-only"),
        *(*small(zegformer), "INPUT.MIN_SIZE_TEST", 96, "DATALOADER.NUM_WORKERS", 0),
        *("MODEL.WEIGHTS", checkpoint, "OUTPUT_DIR", zegformer.folder / "plain"),
    )
    assert "not found in the model" not in plain
    results = [predictions(zegformer.folder / name) for name in ("one", "evaluated", "plain")]
    assert results[0] == results[1] != results[2]


def test_the_launcher_refuses_an_untrained_host(zegformer: HostRunner, untrained: Path) -> None:
    """R-101.pkl is what its configurations with a ResNet-101 name."""
    stand_ins.write_backbone(untrained, zegformer.folder / "R-101.pkl")
    message = "these weights lack .* that make proposals.* stage 2 needs a trained zegformer model"
    with pytest.raises(AssertionError, match=message):
        stage2(zegformer, "refused", zegformer.folder / "R-101.pkl")


def test_two_processes(zegformer: HostRunner, untrained: Path, trained: str) -> None:
    output = stage2(zegformer, "two", untrained, "--num-gpus", "2", "--dist-url", "auto")
    assert all(value >= 0 for value in figures(output).values())
    after = read(zegformer.folder / "two" / "model_final.pth")
    assert after.keys() == read(zegformer.folder / "one" / "model_final.pth").keys()
    assert 0 < metrics(zegformer.folder / "two")["loss_mask_aware"] < 1


# The 572 / 275 split of ADE20K-847.
REGISTRATION = "mask_former/data/datasets/register_ade20k_full_zero_freq.py"


def split_by_the_host() -> tuple[list[str], list[str], list[str]]:
    import mask_former  # noqa: F401  (registers)
    from detectron2.data import MetadataCatalog

    names = [f"ade20k_full_sem_seg_freq_{part}" for part in ("train", "val_all")]
    train, val = (MetadataCatalog.get(name) for name in names)
    return train.stuff_classes, val.stuff_classes, val.val_extra_classes


def register(root: Path) -> Any:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from maft_adapter.data import register_ade20k_847

    train, val = register_ade20k_847(root)
    assert (train, val) == register_ade20k_847(root)
    files = [[Path(record["file_name"]).name for record in DatasetCatalog.get(name)] for name in (train, val)]
    return (*(MetadataCatalog.get(name).as_dict() for name in (train, val)), files)


def test_ade20k_847_split_is_the_hosts(zegformer: HostRunner, tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "ADE20K_2021_17_01"
    folder.mkdir(parents=True)
    script = zegformer.paths[0] + "/datasets/ade20k-full-frequency-split/create_ade-frequency_json.py"
    zegformer.command("-c", f"import os, runpy; os.chdir({str(tmp_path)!r}); runpy.run_path({script!r})")
    for images, labels in (("training", "training_seen"), ("validation", "val_all")):
        for path in (
            folder / "images_detectron2_freq" / images / "a.jpg",
            folder / "annotations_detectron2_freq" / labels / "a.tif",
        ):
            path.parent.mkdir(parents=True)
            path.touch()
    train, val, files = zegformer.call(register, tmp_path / "datasets")
    seen_names, names, unseen_names = zegformer.call(split_by_the_host)
    assert (train["stuff_classes"], val["stuff_classes"]) == (seen_names, names)
    assert [len(seen_names), len(names), len(unseen_names)] == [572, 847, 275]
    assert val["val_extra_classes"] == unseen_names
    assert [names[i] for i in val["evaluation_set"]["base"]] == seen_names
    assert [name for name, flag in zip(names, val["trainable_flag"], strict=True) if not flag] == unseen_names
    assert train["ignore_label"] == val["ignore_label"] == 65535
    assert files == [["a.jpg"], ["a.jpg"]]


def test_rare_means_at_most_ten_images(zegformer: HostRunner) -> None:
    """What maft_adapter.data says of the split."""
    tree = ast.parse(Path(zegformer.paths[0], REGISTRATION).read_text(encoding="utf-8"))
    lists = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    classes = ast.literal_eval(lists["ADE20K_SEM_SEG_FULL_CATEGORIES"])
    assert len(classes) == 847
    assert all((entry["frequency"] == "rare") == (entry["image_count"] <= 10) for entry in classes)
