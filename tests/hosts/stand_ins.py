"""What the hosts need to run on today's Python, numpy and torch, on a CPU and without trained weights.

`install` is called in every process that runs a host, before the host is imported. No file of a host is changed.
"""

import importlib
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import maft_adapter
from maft_adapter.integrations.inference import region_adapter

# The VOC classes of the hosts, in their order: the last five are unseen.
VOC_SEEN, VOC_UNSEEN = 15, 5


def install() -> None:
    """Aliases that numpy dropped, modules that the hosts import and do not need here, DDP on a CPU."""
    for name, value in {"int": int, "float": float, "bool": bool}.items():
        if not hasattr(np, name):
            setattr(np, name, value)
    wandb: Any = types.ModuleType("wandb")  # train_net.py logs to it
    wandb.init = wandb.log = wandb.finish = lambda *args, **kwargs: None
    sys.modules.setdefault("wandb", wandb)
    # Empty: the hosts then fall back on deformable attention in plain torch.
    sys.modules.setdefault("MultiScaleDeformableAttention", types.ModuleType("MultiScaleDeformableAttention"))
    extension: Any = types.ModuleType("detectron2._C")  # FreeSeg's evaluators import it, detectron2 asks its version
    extension.get_compiler_version = extension.get_cuda_version = lambda: "none"
    extension.has_cuda = lambda: False
    extension.__spec__ = ModuleSpec("detectron2._C", None)
    sys.modules.setdefault("detectron2._C", extension)

    from torch.nn.parallel import DistributedDataParallel

    init: Any = DistributedDataParallel.__init__

    def on_cpu(self: Any, *args: Any, device_ids: Any = None, **kwargs: Any) -> None:
        init(self, *args, **kwargs)  # detectron2 passes device_ids, which torch takes on GPUs only

    if not torch.cuda.is_available():
        DistributedDataParallel.__init__ = on_cpu  # type: ignore[method-assign]

    if "SMALL_CLIP" in os.environ:  # FreeSeg takes CLIPs by name only, which clip.load would download
        clip: Any = importlib.import_module("clip")
        load = clip.load
        clip.load = lambda name, *args, **kwargs: load(os.environ["SMALL_CLIP"], *args, **kwargs)


class HostRunner:
    """Runs functions and commands with a host's checkout on the path, away from this process: two hosts share names.

    Args:
        paths: put before everything else on the path: the checkout, its CLIP, detectron2.
        folder: for data, weights and results; "datasets" in it is what DETECTRON2_DATASETS names.
        environment: more variables.
    """

    def __init__(self, paths: Sequence[Path], folder: Path, **environment: str) -> None:
        self.paths, self.folder = [str(path) for path in paths], folder
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text("import stand_ins\n\nstand_ins.install()\n", encoding="utf-8")
        here, package = Path(__file__).parent, Path(maft_adapter.__file__).parents[1]
        path = os.pathsep.join([str(site), str(here), *self.paths, str(package)])
        self.environment = {"PYTHONPATH": path, "DETECTRON2_DATASETS": str(folder / "datasets"), **environment}
        self.pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_prepare, initargs=(self.paths, self.environment)
        )

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` in the host's process, which stays the same for all calls."""
        return self.pool.submit(function, *args).result()

    def command(self, *args: Any) -> str:
        """Output of `python -m ...` or `python ...` in a process of its own; an error shows the output's end."""
        command = [sys.executable, *(str(arg) for arg in args)]
        result = subprocess.run(
            command, env={**os.environ, **self.environment}, cwd=self.folder, capture_output=True, text=True
        )
        output = result.stdout + result.stderr
        assert result.returncode == 0, output[-6000:]
        return output


def _prepare(paths: Sequence[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.path[:0] = paths
    torch.set_num_threads(1)
    install()


def write_voc(folder: Path, images: int = 4) -> None:
    """A data set laid out as the hosts' VOC: pictures of two coloured halves, each a class, both seen and unseen.

    Training labels have the seen classes only (0..14, 255 elsewhere), test labels all 20.
    """
    root = folder / "datasets" / "VOC2012"
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for i in range(images):
            name = f"{split}_{i}"
            picture = generator.integers(0, 256, (96, 128, 3), dtype=np.uint8)
            labels = np.full((96, 128), i % VOC_SEEN, dtype=np.uint8)
            labels[:, 64:] = VOC_SEEN + i % VOC_UNSEEN
            seen = np.where(labels < VOC_SEEN, labels, 255).astype(np.uint8)
            for part, array, suffix in (
                ("JPEGImages", picture, "jpg"),
                (f"annotations_detectron2/{split}", labels, "png"),
                (f"annotations_detectron2/{split}_base", seen, "png"),
            ):
                (root / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / part / f"{name}.{suffix}")


def write_clip(path: Path, width: int = 64, layers: int | tuple[int, ...] = 4, embed: int = 64) -> None:
    """A small CLIP with random weights as a state_dict that the hosts' `clip.load(path)` reads; runs in a host.

    Four numbers of layers make a ResNet of it.
    """
    import clip.model

    torch.manual_seed(0)
    prompts = (0,) if "mask_prompt_depth" in inspect.signature(clip.model.CLIP).parameters else ()  # OVSeg's
    model = clip.model.CLIP(embed, 224, layers, width, 32, *prompts, 77, 49408, 64, 1, 2)
    model.token_embedding.weight.data.mul_(20)  # else all names mean nearly the same
    weights = {name: value for name, value in model.state_dict().items() if "mask_embedding" not in name}
    torch.save(weights, path)


def link_for_ovseg(folder: Path) -> None:
    """What `write_voc` wrote, where OVSeg looks for COCO-Stuff, which it trains on, and for VOC."""
    datasets = folder / "datasets"
    (datasets / "coco" / "stuffthingmaps_detectron2").mkdir(parents=True)
    for link, target in (
        ("VOCdevkit", "."),
        ("coco/train2017", "VOC2012/JPEGImages"),
        ("coco/stuffthingmaps_detectron2/train2017", "VOC2012/annotations_detectron2/train_base"),
    ):
        (datasets / link).symlink_to(datasets / target)


def build(config_file: str, package: str, options: Sequence[Any], add_config: str = "add_mask_former_config") -> Any:
    """A host's own model on the CPU with random weights, in eval mode; runs in its process.

    `add_config` is the function of its package that declares its keys.
    """
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    getattr(importlib.import_module(package), add_config)(cfg)
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(options))
    torch.manual_seed(0)
    return build_model(cfg).eval()


def inputs(dataset_name: str) -> list[dict[str, Any]]:
    """Two images of different sizes, neither a multiple of 32, as the hosts' test loaders give them."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((100, 140), (90, 60))
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    meta = {"dataset_name": dataset_name}
    return [{"image": x, "height": 2 * x.shape[1], "width": 2 * x.shape[2], "meta": meta} for x in images]


def small(clip: Path | str) -> tuple[Any, ...]:
    """Options that make ZSSeg and FreeSeg small."""
    return (
        *small_ovseg(clip),
        *("MODEL.CLIP_ADAPTER.PROMPT_DIM", 64, "MODEL.CLIP_ADAPTER.REGION_CLIP_ADAPTER.PROMPT_DIM", 64),
        *("MODEL.CLIP_ADAPTER.REGION_CLIP_ADAPTER.CLIP_MODEL_NAME", str(clip)),
    )


def small_ovseg(clip: Path | str) -> tuple[Any, ...]:
    """Options that make OVSeg small, which has no prompts to learn and no second CLIP."""
    return (
        *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        *("MODEL.MASK_FORMER.HIDDEN_DIM", 32, "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 64),
        *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 10, "MODEL.MASK_FORMER.DEC_LAYERS", 2),
        *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.MASK_DIM", 32),
        *("MODEL.SEM_SEG_HEAD.EMBEDDING_DIM", 64, "MODEL.CLIP_ADAPTER.CLIP_MODEL_NAME", str(clip)),
    )


@dataclass(frozen=True)
class Host:
    """A host that classifies its proposals in a `MaskFormerClipAdapter`, small: the code that runs is the same.

    Attributes:
        name: of the shim.
        package: the host's.
        config: path of a config file.
        options: what makes the model small, as config keys and values in turn.
        dataset: its test set.
        add_config: see `build`.
        class_names: given with each image, if any.
    """

    name: str
    package: str
    config: str
    options: tuple[Any, ...]
    dataset: str = "voc_sem_seg_test"
    add_config: str = "add_mask_former_config"
    class_names: tuple[str, ...] = ()

    def but(self, *options: Any, **changes: Any) -> "Host":
        return replace(self, options=(*self.options, *options), **changes)

    @property
    def shim(self) -> Any:
        return importlib.import_module(f"maft_adapter.integrations.{self.name}")

    def build(self) -> Any:
        """The host's own model on the CPU with random weights, in eval mode; runs in its process."""
        return build(self.config, self.package, self.options, self.add_config)

    def build_random(self) -> Any:
        """`build`, but with weights far enough from the initial ones that not every pixel gets the same class."""
        model = self.build()
        with torch.no_grad():
            for part in (model.sem_seg_head, region_adapter(model).clip_model.visual):
                for parameter in part.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    def segment(self, model: Any) -> list[Any]:
        """Every tensor and number in the model's results, in their order."""
        batch = inputs(self.dataset)
        for x in batch if self.class_names else ():
            x["class_names"] = list(self.class_names)
        with torch.no_grad():
            return _flat(model(batch))


def _flat(results: Any) -> list[Any]:
    if hasattr(results, "get_fields"):  # detectron2's Instances
        return _flat(results.get_fields())
    if hasattr(results, "tensor"):  # its Boxes
        return [results.tensor]
    if isinstance(results, dict):
        return _flat(list(results.values()))
    if isinstance(results, list | tuple):
        return [leaf for item in results for leaf in _flat(item)]
    return [results]


def equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two results of `Host.segment` are the same to the bit."""
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def patch_and_back(host: Host) -> None:
    """The whole of `patch` and `unpatch`; runs in the host's process."""
    model, shim = host.build_random(), host.shim
    keys, types = list(model.state_dict()), [type(module) for module in model.modules()]
    before = host.segment(model)
    host_module = region_adapter(model)._preprocess_image.__globals__
    seen: list[Any] = []
    hook = shim.visual(model).register_forward_pre_hook(lambda _, args: seen.append([tuple(x.shape) for x in args]))
    assert shim.patch(model, start_layer=2, size=96) is model
    with mock.patch.dict(host_module, crop_with_mask=None):  # must not be called
        patched = host.segment(model)
        tasks = len(seen) // 2  # the host's inference tasks; one pass for each of them and each of two images
        assert tasks >= 1 and [shapes[0] for shapes in seen] == [(1, 3, 96, 96)] * 2 * tasks
        assert all(0 < shapes[1][1] <= 10 for shapes in seen)
        assert list(model.state_dict()) == keys
        shim.patch(model, start_layer=3, size=96)  # a second call changes the settings
        assert not torch.equal(patched[0], host.segment(model)[0])
        seen.clear()
        shim.patch(model, start_layer=2, size=96, keep_aspect_ratio=True)
        host.segment(model)
        assert {shapes[0] for shapes in seen} == {(1, 3, 96, 128), (1, 3, 128, 96)}  # of 128x160 and 96x64 pixels
    hook.remove()
    assert shim.unpatch(model) is model
    assert [type(module) for module in model.modules()] == types
    assert not torch.allclose(before[0], patched[0], atol=1e-6) and patched[0].isfinite().all()
    assert equal(before, host.segment(model))


def host_features_through_the_shim(host: Host) -> tuple[int, float]:
    """CLIP gives the shim the embeddings that the host made of its crops: how the host's and the shim's outputs differ.

    Returns the number of results that the host gives, and the largest relative difference.
    """
    model, shim = host.build_random(), host.shim
    adapter = type(region_adapter(model))
    recorded: list[list[Tensor]] = []
    encode, prepare = adapter.get_image_features, adapter._preprocess_image

    def note_image(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorded.append([])
        return prepare(self, *args, **kwargs)

    def note_features(self: Any, image: Tensor, *args: Any) -> Tensor:
        recorded[-1].append(encode(self, image, *args))  # once an image, or once a crop where those are not resized
        return recorded[-1][-1]

    with mock.patch.multiple(adapter, get_image_features=note_features, _preprocess_image=note_image):
        expected = host.segment(model)
    features = [torch.cat(crops) for crops in recorded if crops]
    shim.patch(model, start_layer=2, size=96)
    hook = shim.visual(model).register_forward_hook(lambda *_: 3 * features.pop(0)[None])  # of any length
    actual = host.segment(model)
    hook.remove()
    assert not features and len(expected) == len(actual)
    pairs = [(torch.as_tensor(a).float(), torch.as_tensor(b).float()) for a, b in zip(expected, actual, strict=True)]
    return len(pairs), max(float(((a - b).abs() / a.abs().amax()).nan_to_num().max()) for a, b in pairs if a.numel())


def save_model(host: Host, path: Path) -> None:
    """A checkpoint as the host's own first stage would leave it, with random weights."""
    torch.save({"model": host.build_random().state_dict()}, path)


def write_backbone(checkpoint: Path, path: Path) -> None:
    """A backbone as detectron2's model zoo has it, R-101.pkl for one: arrays without the host's prefix."""
    weights = {
        name.removeprefix("backbone."): value.numpy() for name, value in read(checkpoint).items() if "backbone." in name
    }
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "torchvision", "matching_heuristics": True}))


def embed(host: Host, path: Path, image: Tensor) -> Tensor:
    """What the host's own tower makes of an image with the weights of a checkpoint."""
    tower = host.shim.visual(host.build())
    host.shim.load_visual(tower, path)
    with torch.no_grad():
        return tower(image)


def stage2(runner: HostRunner, host: Host, output: str, weights: Any, *flags: str) -> str:
    """Two iterations, or an evaluation, through the real train_net.py; returns what it printed.

    `weights` are MODEL.WEIGHTS; None leaves those that the configuration names.
    """
    script, folder = f"{runner.paths[0]}/train_net.py", runner.folder / output
    tiny = ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "MODEL.MAFT.START_LAYER", 2, "MODEL.MAFT.SIZE", 96)
    given = () if weights is None else ("MODEL.WEIGHTS", weights)
    options = (*host.options, *TINY_DATA, *tiny, *given, "OUTPUT_DIR", folder)
    module = f"maft_adapter.integrations.{host.name}"
    return runner.command("-m", module, script, "--config-file", host.config, *flags, *options)


TINY_DATA = (
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.CROP.SIZE", "(64, 64)", "INPUT.SIZE_DIVISIBILITY", 64),
    *("INPUT.MIN_SIZE_TEST", 96, "DATALOADER.NUM_WORKERS", 0, "SEED", 1),
)


def figures(output: str, names: Sequence[str] = ("mIoU", "mIoU-base", "mIoU-unbase", "hIoU-base")) -> dict[str, float]:
    """What the hosts' GeneralizedSemSegEvaluator printed last."""
    return {name: float(re.findall(rf"'{name}': (?:np\.float64\()?([\d.naif]+)", output)[-1]) for name in names}


def stop_after_one(folder: Path) -> None:
    """Leave a finished run's folder as if it had been stopped after its first checkpoint."""
    (folder / "model_final.pth").unlink()
    (folder / "model_0000001.pth").unlink()
    (folder / "metrics.json").unlink()
    (folder / "last_checkpoint").write_text("model_0000000.pth", encoding="utf-8")


def metrics(folder: Path) -> dict[str, Any]:
    """The last values in metrics.json."""
    lines = (folder / "metrics.json").read_text(encoding="utf-8").splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


def predictions(folder: Path) -> str:
    return (folder / "inference" / "sem_seg_predictions.json").read_text(encoding="utf-8")


def read(path: Path) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint."""
    return dict(torch.load(path, weights_only=True)["model"])
