"""`maft-adapter finetune`: the paper's second stage on a data set, on one process or many."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

from ..checkpoint import replace_file, save_mask_aware
from .options import masks_of

# The paper's iterations (Sec. 5.1); past them seen classes go on rising while unseen ones fall.
_ITERATIONS = {"voc-20": 100, "voc-20b": 100, "voc-21": 100, "coco-stuff": 1000, "ade20k-150": 5000, "ade20k-847": 5000}
_TRUTH = "ground-truth"
_MASKCLIPPP = "maskclip++"
_LEAST = {
    "workers": 0, "validate_every": 0, "validate_on": 1, "accumulate": 1, "limit": 1, "size": 1, "batch_size": 1,
    "checkpoint_every": 1, "iterations": 1,
}  # fmt: skip
_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_KEPT, _LOG, _SETTINGS, _STATE = ".proposals", "log.jsonl", "settings.json", "state.pt"
_TOWER, _BEST = "tower.safetensors", "best.safetensors"


def add(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a CLIP on a data set, as the paper does",
        description=(
            "Fine-tune the image tower of a CLIP with the paper's losses and, unless told otherwise, its recipe. "
            "DIR/tower.safetensors is the tower, as evaluate and segment take it with --checkpoint; log.jsonl has the "
            "losses of every iteration; state.pt is what --resume goes on from. Several GPUs: torchrun --no-python "
            "--nproc-per-node N maft-adapter finetune ..."
        ),
    )
    finetune.add_argument(
        "--data", required=True, metavar="NAME", help="data set, as in data check, such as coco-stuff"
    )
    finetune.add_argument("--root", type=Path, metavar="DIR", help="folder that holds it; shapes needs none")
    finetune.add_argument("--layout", metavar="NAME", help="take this layout rather than the first that is there")
    finetune.add_argument("--names", default="plain", help="class names: plain, prompted or a file (default: plain)")
    finetune.add_argument(
        "--setting", choices=("zero-shot", "all"),
        help="zero-shot: unseen classes are ignored; all: train on all (default: zero-shot if some are unseen)",
    )  # fmt: skip
    finetune.add_argument("--limit", type=int, metavar="N", help="the first N pictures only")
    finetune.add_argument(
        "--self-training", type=Path, metavar="RUN",
        help="folder of an earlier run, whose tower labels the unseen classes that this one then trains on, too "
        "(Table 8)",
    )  # fmt: skip
    finetune.add_argument(
        "--model", metavar="NAME", help="frozen CLIP, of open_clip or transformers (default: the embedded one)"
    )
    finetune.add_argument("--pretrained", metavar="TAG", help="weights of an open_clip model: a tag, a file, or random")
    finetune.add_argument("--start-layer", type=int, metavar="L", help="(default: two thirds of the depth)")
    finetune.add_argument("--size", type=int, metavar="PIXELS", help="side of the square (default: the model's, 480)")
    finetune.add_argument(
        "--recipe", choices=("maft", _MASKCLIPPP), default="maft",
        help=f"maft: L_ma and L_dis; {_MASKCLIPPP}: the cross-entropy of ground-truth masks, as MaskCLIP++ has it, and "
        "L_dis if --distillation-weight is given (default: maft)",
    )  # fmt: skip
    finetune.add_argument(
        "--proposals", metavar="KIND",
        help=f"superpixels, sam[:MODEL], mask2former[:MODEL], files:PATH; {_TRUTH}, the regions of the labels; or "
        f"KIND+{_TRUTH}, both (default: superpixels; of {_MASKCLIPPP}: {_TRUTH}, which is all that it takes)",
    )  # fmt: skip
    finetune.add_argument("--keep", type=Path, metavar="DIR", help=f"keep proposals there (default: {_KEPT} in --out)")
    finetune.add_argument(
        "--iterations", type=int, metavar="N", help="(default: the paper's: VOC 100, COCO-Stuff 1000, ADE20K 5000)"
    )
    finetune.add_argument("--batch-size", type=int, default=16, metavar="N", help="of all processes (default: 16)")
    finetune.add_argument("--lr", type=float, help="(default: 1e-5; of shapes, the demo's)")
    finetune.add_argument("--weight-decay", type=float, default=1e-5, help="(default: 1e-5)")
    finetune.add_argument(
        "--loss", choices=("smooth_l1", "l1", "l2", "kl"), help="kind of L_ma (Table 4b; default: smooth_l1)"
    )  # fmt: skip
    finetune.add_argument("--distillation-weight", type=float, help=f"lambda (default: 1; of {_MASKCLIPPP}: 0)")
    finetune.add_argument("--freeze", default="paper", help="row of Table 4(d), released or as_is (default: paper)")
    finetune.add_argument("--seed", type=int, default=0, help="of the order of the pictures (default: 0)")
    finetune.add_argument("--precision", choices=_PRECISIONS, default="fp32", help="weights stay fp32 (default: fp32)")
    finetune.add_argument("--accumulate", type=int, default=1, metavar="N", help="take batches in N parts (default: 1)")
    finetune.add_argument("--grad-checkpointing", action="store_true", help="less memory, more time")
    finetune.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    finetune.add_argument("--workers", type=int, default=2, metavar="N", help="that load pictures (default: 2)")
    finetune.add_argument("--checkpoint-every", type=int, default=500, metavar="K", help="iterations (default: 500)")
    finetune.add_argument(
        "--validate-every", type=int, default=0, metavar="K",
        help=f"iterations between two validations; {_BEST} is the tower with the highest hIoU of them, the first of "
        "equals, or the highest mIoU where no class is unseen (default: 0, none)",
    )  # fmt: skip
    finetune.add_argument("--validate-on", type=int, default=100, metavar="N", help="first pictures (default: 100)")
    finetune.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard, too")
    finetune.add_argument("--out", type=Path, required=True, metavar="DIR", help="new, empty, or to be resumed")
    finetune.add_argument("--resume", action="store_true", help="go on with what is in --out, if there is anything")
    finetune.set_defaults(run=run, error=finetune.error)


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    for name, least in _LEAST.items():
        if (value := getattr(arguments, name)) is not None and value < least:
            option = name.replace("_", "-")
            arguments.error(f"--{option} {value}: expected at least {least}")
    try:
        return _run(arguments)
    except (OSError, ValueError, TypeError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"maft-adapter finetune: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from ..classify import text_classifier
    from ..data import open_dataset
    from ..data.datasets import FileDataset
    from ..evaluate import Evaluator, PseudoLabelled, mask_aware_scorer
    from ..extras import extra
    from ..finetune import SegmentationSamples, drawn, finetune
    from ..losses import MAFTLoss, MaskClassificationLoss
    from ..models import image_tower, load_model
    from ..proposals import Files, Kept, proposer
    from ..proposals.merging import Superpixels

    with extra("train"):
        from accelerate import Accelerator

    out: Path = arguments.out
    shapes = arguments.data.startswith("shapes")
    if shapes and arguments.root is not None:
        raise ValueError(f"--root {arguments.root}: {arguments.data} is drawn and lies in no folder, leave it out")
    train, val = (
        open_dataset(arguments.data, arguments.root, split, names=arguments.names, layout=arguments.layout)
        if split == "train" or arguments.validate_every
        else None
        for split in ("train", "val")
    )
    assert train is not None
    setting = arguments.setting or ("zero-shot" if train.unseen else "all")
    if setting == "zero-shot" and not train.unseen:
        raise ValueError(f"{arguments.data} has no unseen classes: --setting all trains on all of them")
    if arguments.self_training is not None and not train.unseen:
        raise ValueError(f"{arguments.data} has no unseen classes: leave --self-training out")
    ignoring = setting == "zero-shot" and arguments.self_training is None
    classes = train.seen if ignoring else tuple(range(len(train.class_names)))
    iterations, lr, superpixels = arguments.iterations, arguments.lr, Superpixels()
    if shapes:
        from ..shapes.demo import RECIPE, image_scores

        iterations, lr = iterations or RECIPE.iterations, RECIPE.lr if lr is None else lr
        superpixels = Superpixels(min_contrast=RECIPE.min_contrast)
    iterations = _ITERATIONS.get(arguments.data) if iterations is None else iterations
    if iterations is None:
        raise ValueError(f"the paper names no iterations for {arguments.data}: give --iterations")
    lr = 1e-5 if lr is None else lr
    weight, proposals = arguments.distillation_weight, arguments.proposals
    if arguments.keep is not None and (proposals or (_TRUTH if arguments.recipe == _MASKCLIPPP else "")) == _TRUTH:
        raise ValueError(f"--keep: {_TRUTH} masks are not kept, leave it out")
    if arguments.recipe == _MASKCLIPPP:
        if arguments.loss is not None:
            raise ValueError(f"--loss {arguments.loss}: --recipe {_MASKCLIPPP} has a loss of its own, leave it out")
        loss: MAFTLoss = MaskClassificationLoss(0.0 if weight is None else weight)
        proposals = proposals or _TRUTH
        if proposals != _TRUTH:
            raise ValueError(
                f"--proposals {proposals}: --recipe {_MASKCLIPPP} trains on ground-truth masks alone; leave the option "
                "out, or take --recipe maft"
            )
    else:
        loss = MAFTLoss(arguments.loss or "smooth_l1", 1.0 if weight is None else weight)
        proposals = proposals or "superpixels"
    kind = proposals.removesuffix(f"+{_TRUTH}")
    truth = proposals.endswith(_TRUTH)

    accelerator = Accelerator(
        mixed_precision=_PRECISIONS[arguments.precision],
        gradient_accumulation_steps=arguments.accumulate,
        cpu=arguments.cpu or None,
    )
    model, labeller = _frozen_model(arguments), None
    if arguments.self_training is not None:
        tower_file = arguments.self_training / _TOWER
        if not tower_file.is_file():
            raise FileNotFoundError(f"--self-training {arguments.self_training} has no {_TOWER}: name a finished run")
        labeller = load_model(
            arguments.model, arguments.pretrained, checkpoint=tower_file, start_layer=arguments.start_layer
        )
    tower = image_tower(model.clip)
    if not hasattr(model.clip, "visual") and hasattr(model.clip, "visual_projection"):
        raise ValueError(
            f"{arguments.model} is transformers' {type(model.clip).__name__}, whose projection lies outside the tower "
            "that is trained: name the same weights of open_clip, such as ViT-B-16-quickgelu with --pretrained openai"
        )
    if arguments.grad_checkpointing:
        if not hasattr(tower, "set_grad_checkpointing"):
            raise ValueError(f"{type(tower).__name__} has no gradient checkpointing: leave --grad-checkpointing out")
        tower.set_grad_checkpointing(True)
    pictures = len(train) if arguments.limit is None else min(arguments.limit, len(train))
    keep = arguments.keep or out / _KEPT
    given = None if kind == _TRUTH else superpixels if kind == "superpixels" else proposer(kind, accelerator.device)
    indices = sorted(set(drawn(pictures, iterations * arguments.batch_size, arguments.seed)))
    if isinstance(given, Files) and isinstance(train, FileDataset):
        # Here, since workers don't know whose masks another one took.
        files = [train.pairs[index].picture for index in indices]
        if isinstance(val, FileDataset):
            files += [pair.picture for pair in val.pairs[: arguments.validate_on]]
        for file in files:
            given.version(str(file))
    settings = {
        "data": arguments.data, "names": train.names, "layout": train.layout, "setting": setting,
        "pictures": pictures, "self_training": arguments.self_training and str(arguments.self_training.resolve()),
        "model": model.source, "templates": list(model.templates),
        "size": arguments.size or model.size, "proposals": given.settings if given else _TRUTH, "masks": masks_of(kind),
        "ground_truth_masks": truth, "iterations": iterations, "lr": lr, "batch_size": arguments.batch_size,
        "weight_decay": arguments.weight_decay, "recipe": arguments.recipe, "loss": loss.kind,
        "distillation_weight": loss.distillation_weight,
        "freeze": arguments.freeze, "seed": arguments.seed, "precision": arguments.precision,
        "validate_every": arguments.validate_every, "validate_on": arguments.validate_on,
    }  # fmt: skip
    if accelerator.is_main_process:
        _claim(out, settings, arguments.resume)
    accelerator.wait_for_everyone()
    model.clip.to(accelerator.device)
    every_text = text_classifier(model.clip, model.tokenizer, train.class_names, model.templates)  # (C, D)
    text = text_classifier(model.clip, model.tokenizer, [train.class_names[k] for k in classes], model.templates)
    kept = None if given is None else Kept(given, keep)
    shown = None if given is None else Kept(Superpixels() if kind == "superpixels" else given, keep)
    workers, source = arguments.workers, cast(Any, train)
    if labeller is not None:
        labeller.clip.to(accelerator.device)
        seen_by = shown or Kept(Superpixels(), keep)  # ground-truth masks would tell the unseen classes' regions
        source = PseudoLabelled(Evaluator(train, seen_by, mask_aware_scorer(labeller, every_text, arguments.size)))
        workers = 0  # networks don't run in workers
    all_samples = SegmentationSamples(source, model, classes, kept, truth, arguments.size)
    samples: Any = torch.utils.data.Subset(all_samples, range(pictures))
    rank, processes = accelerator.process_index, accelerator.num_processes
    if given is not None and kind.partition(":")[0] in ("sam", "mask2former"):  # nor do these
        for index in indices[rank::processes]:
            samples[index]
        accelerator.wait_for_everyone()
    teacher_scores = None
    if shapes:  # few and small: once is enough
        samples = list(torch.utils.data.DataLoader(samples, batch_size=None, num_workers=workers))
        workers = 0
        if model.class_names is not None and loss.distillation_weight:
            teacher_scores = image_scores(model.clip.cpu(), samples, text.cpu(), model.logit_scale)
    if val is not None:
        evaluator = Evaluator(val, shown, mask_aware_scorer(model, every_text, arguments.size))
    unseen = train.unseen if setting == "zero-shot" else ()
    log = _Log(out, accelerator.is_main_process, arguments.tensorboard, unseen)
    started = time.monotonic()

    def watch(iteration: int, losses: dict[str, float]) -> None:
        entry: dict[str, float] = {"iteration": iteration, **losses, "seconds": round(time.monotonic() - started, 3)}
        if val is not None and (iteration % arguments.validate_every == 0 or iteration == iterations):
            entry |= _validate(evaluator, min(arguments.validate_on, len(val)), accelerator, unseen)
        if log.add(entry):
            save_mask_aware(tower, out / _BEST)

    finetune(
        model.clip if hasattr(model.clip, "visual") else tower, samples, text,
        iterations=iterations, batch_size=arguments.batch_size, lr=lr, weight_decay=arguments.weight_decay,
        freeze=arguments.freeze, loss=loss, logit_scale=model.logit_scale,
        teacher_scores=teacher_scores,
        seed=arguments.seed, num_workers=workers, checkpoint=out / _TOWER,
        checkpoint_every=arguments.checkpoint_every, state=out / _STATE, accelerator=accelerator, on_iteration=watch,
    )  # fmt: skip
    if accelerator.is_main_process:
        print(f"{iterations} iterations: {out / _TOWER}")
    return 0


def _frozen_model(arguments: argparse.Namespace) -> Any:
    """The model as it is before any fine-tuning; the embedded one is fine-tuned otherwise."""
    from ..models import load_model

    if arguments.model is None and arguments.pretrained is None:
        from ..shapes.demo import frozen_model

        return frozen_model() if arguments.start_layer is None else frozen_model(arguments.start_layer)
    return load_model(arguments.model, arguments.pretrained, start_layer=arguments.start_layer)


def _claim(out: Path, settings: dict[str, Any], resume: bool) -> None:
    """Make the folder this run's, or see that it is.

    Raises:
        ValueError: it holds another run, or something else.
        OSError: it can't be made or written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / _SETTINGS
    if (out / _LOG).exists() and path.exists():  # otherwise no iteration was finished
        before = json.loads(path.read_bytes())
        if not resume:
            raise ValueError(f"--out {out} holds a run: --resume goes on with it, or name a new folder")
        differ = [name for name, value in settings.items() if before.get(name) != value]
        if differ:
            values = ", ".join(f"{name} (there {before.get(name)}, here {settings[name]})" for name in differ)
            raise ValueError(f"--out {out} holds a run with other settings: {values}; give the same, or a new folder")
    elif any(not file.name.startswith((_KEPT, _SETTINGS, f"{_LOG}.")) for file in out.iterdir()):
        raise ValueError(f"--out {out} holds other files, which could be replaced: name a new or empty folder")
    else:
        replace_file(path, (json.dumps(settings, indent=1) + "\n").encode())


class _Log:
    """The log of a run, one JSON object a line, of which a run that goes on drops what it does again."""

    def __init__(self, out: Path, main: bool, tensorboard: bool, unseen: Any) -> None:
        self.path, self.main, self.tensorboard = out / _LOG, main, tensorboard
        self.rule = "hiou" if unseen else "miou"
        self.best: float | None = None
        self.writer: Any = None
        self.begun = False

    def add(self, entry: dict[str, float]) -> bool:
        """Whether it is the best so far."""
        if not self.main:
            return False
        if not self.begun:
            self._begin(int(entry["iteration"]))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.writer is not None:
            for name, value in entry.items():
                self.writer.add_scalar(name, value, entry["iteration"])
        score = entry.get(self.rule)
        better = score is not None and (self.best is None or score > self.best)
        self.best = score if better else self.best
        return better

    def _begin(self, iteration: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        # A last line that was cut off is of an iteration that is done again.
        done = [entry for line in lines if line.endswith("}") and (entry := json.loads(line))["iteration"] < iteration]
        replace_file(self.path, "".join(json.dumps(entry) + "\n" for entry in done).encode())
        self.best = max((entry[self.rule] for entry in done if self.rule in entry), default=None)
        self.begun = True
        if self.tensorboard:
            from ..extras import extra

            with extra("train"):
                from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(self.path.parent / "tensorboard", purge_step=iteration)


def _validate(evaluator: Any, count: int, accelerator: Any, unseen: Any) -> dict[str, float]:
    """mIoU of seen, unseen and all classes over the first pictures, each process its share of them."""
    import torch

    from ..metrics import evaluation_scores

    classes = len(evaluator.dataset.class_names)
    pixels = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)
    for index in range(accelerator.process_index, count, accelerator.num_processes):
        pixels += evaluator(evaluator.dataset[index]).pixels
    found = evaluation_scores(accelerator.reduce(pixels.to(accelerator.device)).cpu(), unseen)
    return {key: value for key in ("miou", "miou_seen", "miou_unseen", "hiou") if (value := found[key]) == value}
