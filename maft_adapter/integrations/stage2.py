"""The paper's second training stage inside a host's own train_net.py (Sec. 4.2), on one process or many.

detectron2 is imported where it is used: the training step itself runs without it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapt import encode_image, is_mask_aware
from ..classify import class_scores
from ..freezing import trainable_parameters
from ..losses import MAFTLoss
from ..towers.base import MaskAware, swap_class
from .inference import load_visual, region_adapter, without_mask_prompts

# The paper's iterations (Sec. 5.1), found by what the names of the training sets hold.
ITERATIONS = {"voc": 100, "coco": 1000, "ade20k": 5000}
_DEFAULT_ITERATIONS = 1000

# A fifth of the iterations: what a stop costs at the most, and five checkpoints on disk.
_CHECKPOINTS = 5

_USAGE = """\
usage: python -m maft_adapter.integrations.{host} train_net.py --config-file FILE [options of train_net.py]
         MODEL.WEIGHTS TRAINED_HOST.pth [KEY VALUE ...]

Runs the host's train_net.py with mask-aware fine-tuning in place of its losses, and evaluates with the mask-aware
classifier; with --eval-only MODEL.MAFT.TOWER FILE, with the tower in that file. Keys of its own, with their defaults:
{options}
"""
OPTIONS: dict[str, Any] = {
    "START_LAYER": 8,
    "SIZE": 480,
    "KEEP_ASPECT_RATIO": False,
    "FREEZE": "paper",
    "LOSS": "smooth_l1",
    "DISTILLATION_WEIGHT": 1.0,
    "STUDENT": "",
    "TEACHER": "",
    "TOWER": "",
}


@dataclass(frozen=True)
class TrainingBatch:
    """What a host gives for one step of B images; made without gradients.

    Attributes:
        images: (B, 3, S, S) the CLIP's input, see `ClipInput`.
        masks: (B, N, H, W) proposals in [0, 1] over the padded images.
        targets: one (K_b, H, W) of ground-truth masks an image, 0 or 1.
        labels: one (K_b,) an image, rows of `text`.
        text: (C, D) the host's class embeddings, without its background row.
        logit_scale: the host's, 1 / temperature.
    """

    images: Tensor
    masks: Tensor
    targets: Sequence[Tensor]
    labels: Sequence[Tensor]
    text: Tensor
    logit_scale: float


@dataclass(frozen=True)
class Host:
    """What stage 2 needs to know of a host; each shim has one as `HOST`.

    Attributes:
        name: of the package under `maft_adapter.integrations`.
        patch: `patch(model, start_layer=8, size=480, keep_aspect_ratio=False)`, called before anything else.
        visual: model -> the image tower that classifies proposals.
        training_batch: model and the host's list of input dicts -> `TrainingBatch`.
        configure: sets in a config what stage 2 needs of the host, if anything.
    """

    name: str
    patch: Callable[..., Any]
    visual: Callable[[Any], Any]
    training_batch: Callable[[Any, list[dict[str, Any]]], TrainingBatch]
    configure: Callable[[Any], None] | None = None

    @property
    def architecture(self) -> str:
        """What `MODEL.META_ARCHITECTURE` becomes."""
        return f"MAFT_{self.name}"


@dataclass
class Stage2:
    """The state of a model in stage 2. It is no module, so the teacher stays out of checkpoints.

    Attributes:
        host: of the model.
        loss: L_ma + lambda * L_dis.
        teacher: the frozen tower.
        student: file of the tower to train, read at the first iteration of a run; "" for the host's own.
        tower: file of the tower to evaluate, read after each load of the host's weights; "" for the host's own.
        trained: whether the host has its weights; a run of train_net.py loads them after the model was built.
    """

    host: Host
    loss: MAFTLoss
    teacher: Any
    student: str = ""
    tower: str = ""
    trained: bool = True


class MaskAwareTraining(MaskAware):
    """Mixed into a host's model: in training its forward gives L_ma and lambda * L_dis, else what it always gave."""

    settings = ("stage2",)
    stage2: Stage2

    def forward(self: Any, batched_inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        if not self.stage2.trained:
            raise ValueError(f"no weights were loaded; {_needs(self.stage2.host)}")
        if not self.training:
            return super().forward(batched_inputs, *args, **kwargs)  # type: ignore[misc]
        if self.stage2.tower:
            raise ValueError(
                f"MODEL.MAFT.TOWER is {self.stage2.tower}, a tower to evaluate; add --eval-only, or leave the key out: "
                "stage 2 starts from the CLIP in MODEL.WEIGHTS, or from MODEL.MAFT.STUDENT"
            )
        if self.stage2.student:
            from detectron2.utils.events import get_event_storage

            if get_event_storage().iter == 0:  # later, a run goes on and has it in its checkpoint
                load_visual(self.stage2.host.visual(self), self.stage2.student)
            self.stage2.student = ""
        with torch.no_grad():
            batch = self.stage2.host.training_batch(self, batched_inputs)
        visual, teacher = self.stage2.host.visual(self), self.stage2.teacher.to(batch.images.device)
        embeddings, image = visual(batch.images, batch.masks, with_image=True)  # (B, N, D), (B, D)
        with torch.no_grad():
            teacher_scores = class_scores(encode_image(teacher, batch.images), batch.text, batch.logit_scale)  # (B, C)
        terms = self.stage2.loss(
            class_scores(embeddings, batch.text, batch.logit_scale),  # (B, N, C)
            batch.masks,
            batch.targets,
            batch.labels,
            class_scores(image, batch.text, batch.logit_scale),  # (B, C)
            teacher_scores,
        )
        return {f"loss_{name}": term for name, term in terms.items()}

    def load_state_dict(self: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Refuse weights that leave a part of the proposal generator random, such as a backbone's."""
        host = self.stage2.host
        if any(name.startswith("IPCLIP.") for name in state_dict):
            raise ValueError(
                "these are weights of the authors' MAFT, whose fine-tuned tower (IPCLIP.) has no place in "
                f"{host.name}; name the file in MODEL.MAFT.TOWER, and in MODEL.WEIGHTS a trained {host.name} model"
            )
        result = super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        generator = {
            name
            for name, _ in self.named_parameters()
            if name.startswith(("backbone.", "sem_seg_head.")) and ".clip_model." not in name
        }
        missing = [name for name in result.missing_keys if name in generator]
        if missing:
            raise ValueError(
                f"these weights lack {len(missing)} of the {len(generator)} parameters that make proposals, such as "
                f"{missing[-1]}; {_needs(host)}"
            )
        if self.stage2.tower:
            load_visual(host.visual(self), self.stage2.tower)
        self.stage2.trained = True
        return result

    def train(self: Any, mode: bool = True) -> Any:
        """Only this module's flag follows: dropout and running statistics of the frozen host stay in eval mode."""
        super().train(False)  # type: ignore[misc]
        self.training = mode
        return self


def _needs(host: Host) -> str:
    return (
        f"stage 2 needs a trained {host.name} model: add MODEL.WEIGHTS path/to/model.pth to the command, or --resume "
        "where OUTPUT_DIR has a last_checkpoint. A tower alone belongs in MODEL.MAFT.TOWER"
    )


def prepare(
    model: Any, host: Host, freeze: str = "paper", loss: str = "smooth_l1", distillation_weight: float = 1.0
) -> Any:
    """Make a patched host model train mask-aware, in place: its forward in training mode gives the paper's losses.

    Everything but the image tower's parameters named by `freeze` is frozen. The teacher of self-distillation is a
    copy of the tower as it is now, before any checkpoint is loaded.

    Args:
        model: the host's model, after `patch`.
        host: the shim's `HOST`.
        freeze: see `maft_adapter.trainable_parameters`.
        loss: L_ma's kind, see `maft_adapter.MAFTLoss`.
        distillation_weight: lambda.

    Raises:
        TypeError: the model is not patched.
        ValueError: CLIP is a ResNet, unknown `freeze` or `loss`, or a negative weight; the model is left as it was
            then.
    """
    visual = host.visual(model)
    if not is_mask_aware(visual):
        raise TypeError(f"{type(model).__name__} is not patched; call {host.name}.patch(model) first")
    _refuse_resnet(visual)
    losses = MAFTLoss(loss, distillation_weight)
    with without_mask_prompts(visual):
        parameters = trainable_parameters(visual, freeze)
    visual.float()  # AdamW loses updates below float32
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad = True
    teacher = copy.deepcopy(visual).requires_grad_(False).eval()
    if not isinstance(model, MaskAwareTraining):
        swap_class(model, MaskAwareTraining)
    model.stage2 = Stage2(host, losses, teacher)
    return model.train(model.training)


def _refuse_resnet(visual: Any) -> None:
    if hasattr(visual, "attnpool"):
        raise ValueError(
            f"CLIP is a ResNet ({type(visual).__name__}), and neither the paper nor its code says what trains there: "
            "build the host with ViT-B/16 or ViT-L/14. To evaluate a ResNet, patch(model) alone is enough"
        )


def region_batch(
    model: Any,
    batched_inputs: list[dict[str, Any]],
    *,
    head: Callable[[Any], dict[str, Tensor]],
    text: Tensor,
    ground_truth: str,
    align_corners: bool,
) -> TrainingBatch:
    """`training_batch` of ZSSeg, FreeSeg and OVSeg, whose CLIP's pixel statistics and temperature are in the adapter.

    Args:
        model: patched.
        batched_inputs: the host's list of input dicts.
        head: backbone features -> the head's outputs with `pred_masks` (B, N, h, w), logits.
        text: (C+1, D) the adapter's text features, the background last.
        ground_truth: the inputs' key of the ground truth of semantic segmentation.
        align_corners: as the host resizes mask logits to the padded image.
    """
    adapter = region_adapter(model)
    raw = [x["image"].to(model.device) for x in batched_inputs]  # (3, h, w), 0..255
    padded = adapter.clip_input.pad([(x - model.pixel_mean) / model.pixel_std for x in raw])  # (B, 3, H, W)
    pred_masks = head(model.backbone(padded))["pred_masks"]  # (B, N, h', w')
    masks = F.interpolate(pred_masks, size=padded.shape[-2:], mode="bilinear", align_corners=align_corners)
    instances = [x[ground_truth].to(model.device) for x in batched_inputs]
    targets = model.prepare_targets(instances, SimpleNamespace(tensor=padded))
    one = torch.ones(1, 1)
    return TrainingBatch(
        images=adapter.clip_input([(x - adapter.pixel_mean[0]) / adapter.pixel_std[0] for x in raw]),  # (B, 3, S, S)
        masks=masks.sigmoid(),  # (B, N, H, W)
        targets=[target["masks"] for target in targets],
        labels=[target["labels"] for target in targets],
        text=text[:-1],  # (C, D)
        logit_scale=float(adapter.get_sim_logits(one, one)),
    )


def add_maft_config(cfg: Any, host: Host, config_file: str | os.PathLike[str] | None = None) -> None:
    """Turn a host's config into one that builds, trains and evaluates mask-aware models.

    Adds MODEL.MAFT (see `OPTIONS`), puts `host.architecture` before MODEL.META_ARCHITECTURE, and sets SOLVER's
    BASE_LR and WEIGHT_DECAY 1e-5, IMS_PER_BATCH 16, WARMUP_ITERS 0, MAX_ITER for the training set: 100 for VOC, 1000
    for COCO-Stuff and what is unknown, 5000 for ADE20K, and CHECKPOINT_PERIOD a fifth of it. What follows, such as
    `merge_from_list(args.opts)`, overrides them. A config that stage 2 has written is taken as it is.

    Args:
        cfg: the host's, with its own keys declared.
        host: the shim's `HOST`.
        config_file: what `cfg.merge_from_file` would be given. It is merged between declaring MODEL.MAFT, which the
            config.yaml of a stage 2 names, and setting the rest. Without it `cfg` is taken as merged already.
    """
    _declare(cfg, host)
    if config_file is not None:
        cfg.merge_from_file(config_file)
    _set(cfg, host)


def _set(cfg: Any, host: Host) -> None:
    if host.architecture == cfg.MODEL.META_ARCHITECTURE:
        return
    cfg.MODEL.MAFT.HOST_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = host.architecture
    if host.configure is not None:
        host.configure(cfg)
    names = " ".join(cfg.DATASETS.TRAIN).lower()
    iterations = next((n for part, n in ITERATIONS.items() if part in names), _DEFAULT_ITERATIONS)
    cfg.SOLVER.BASE_LR = cfg.SOLVER.WEIGHT_DECAY = 1e-5
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.MAX_ITER = iterations
    cfg.SOLVER.CHECKPOINT_PERIOD = iterations // _CHECKPOINTS


def _declare(cfg: Any, host: Host) -> None:
    from detectron2.config import CfgNode
    from detectron2.modeling import META_ARCH_REGISTRY

    if "MAFT" not in cfg.MODEL:
        cfg.MODEL.MAFT = CfgNode({**OPTIONS, "HOST_ARCHITECTURE": ""})
    if host.architecture in META_ARCH_REGISTRY:
        return

    def build(cfg: Any) -> Any:
        _refuse_early(cfg, host)
        _register_ade20k_847(cfg)
        options = cfg.MODEL.MAFT
        model = META_ARCH_REGISTRY.get(options.HOST_ARCHITECTURE)(cfg)
        # Before `patch`, which has a start layer to complain of first, and says best if there is no CLIP at all.
        with contextlib.suppress(AttributeError):
            _refuse_resnet(host.visual(model))
        host.patch(model, options.START_LAYER, options.SIZE, options.KEEP_ASPECT_RATIO)
        prepare(model, host, options.FREEZE, options.LOSS, options.DISTILLATION_WEIGHT)
        if options.TEACHER:
            load_visual(model.stage2.teacher, options.TEACHER)
        model.stage2.student, model.stage2.tower, model.stage2.trained = options.STUDENT, options.TOWER, False
        logging.getLogger("detectron2.maft").info(
            "mask-aware %s: %s, %d iterations of %d images, learning rate %g, weight decay %g",
            host.name, dict(options), cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR,
            cfg.SOLVER.WEIGHT_DECAY,
        )  # fmt: skip
        return model

    build.__name__ = host.architecture
    META_ARCH_REGISTRY.register(build)


def _refuse_early(cfg: Any, host: Host) -> None:
    """What `load_state_dict` would refuse, or never see, before anything is downloaded or built."""
    weights, options = cfg.MODEL.WEIGHTS, cfg.MODEL.MAFT
    for key in ("STUDENT", "TEACHER", "TOWER"):
        if options[key] and not os.path.isfile(options[key]):
            raise ValueError(f"MODEL.MAFT.{key} is {options[key]}, which is no file; give a tower's or a checkpoint's")
    if os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        return  # with --resume, which a config does not know, that is loaded instead
    if weights.startswith("detectron2://") or weights.endswith(".safetensors"):
        raise ValueError(f"MODEL.WEIGHTS is {weights}, a backbone or a tower alone; {_needs(host)}")


def _register_ade20k_847(cfg: Any) -> None:
    from detectron2.data import DatasetCatalog

    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if any(name.startswith("ade20k_full_") and name not in DatasetCatalog for name in names):
        from ..data import register_ade20k_847

        register_ade20k_847()


def run_train_net(host_name: str, script: str, args: Any) -> Any:
    """What each process runs, spawned ones included: the host's `main(args)` with a mask-aware config."""
    from detectron2.config import CfgNode

    host: Host = importlib.import_module(f"maft_adapter.integrations.{host_name}").HOST
    sys.path.insert(0, str(Path(script).resolve().parent))  # where `python train_net.py` would look first
    spec = importlib.util.spec_from_file_location("train_net", script)
    if spec is None or spec.loader is None:
        raise ValueError(f"{script} is no Python file; give the train_net.py of {host_name}")
    train_net = sys.modules["train_net"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_net)
    host_merge = CfgNode.merge_from_file

    def merge_from_file(cfg: Any, *args: Any, **kwargs: Any) -> None:
        _declare(cfg, host)  # a config that stage 2 has written names MODEL.MAFT
        host_merge(cfg, *args, **kwargs)
        _set(cfg, host)

    CfgNode.merge_from_file = merge_from_file
    try:
        return train_net.main(args)
    finally:
        CfgNode.merge_from_file = host_merge


def main(host: Host, argv: Sequence[str] | None = None) -> None:
    """`python -m maft_adapter.integrations.<host> train_net.py ...`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    usage = _USAGE.format(host=host.name, options=" ".join(f"MODEL.MAFT.{k} {v}" for k, v in OPTIONS.items()))
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return
    if not os.path.isfile(argv[0]):
        raise SystemExit(f"{argv[0]} is no file; the first argument is the host's train_net.py\n\n{usage}")
    from detectron2.engine import default_argument_parser, launch

    args = default_argument_parser(usage).parse_args(argv[1:])
    print("Command Line Args:", args)
    launch(
        run_train_net,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(host.name, argv[0], args),
    )
