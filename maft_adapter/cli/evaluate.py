"""`maft-adapter evaluate`: all figures of the field on a data set, beside those that were published."""

from __future__ import annotations

import argparse
import csv
import errno
import io
import json
import math
import re
import reprlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import replace_file
from .options import masks_of, model_options

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import SegmentationDataset
    from ..evaluate import Evaluator, Scorer
    from ..proposals import Proposer

_KEPT, _SETTINGS = ".proposals", "settings.json"
_CROPS = {"mask": "mask", "crop": "crop", "mask-and-crop": "mask_crop"}  # the baselines, as `merge` calls them
_UPPER_BOUND, _TRUTH = "upper-bound", "ground-truth"
_CONVENTIONS = {
    "absent": "classes that no ground truth has are left out of the means, as in detectron2 since July 2022; under "
    "absent_as_zero, those that were predicted anyway count as IoU 0, as in detectron2 before",
    "uncovered": "pixels that no proposal covers are misses",
    "mask_accuracy": "ground-truth masks in, one for each class and picture, best class out; a mask without a patch on "
    "the token grid is a miss; accuracy averaged over the classes that are there",
}
# Figures and their headings.
_HEADINGS = {
    "miou": "mIoU", "miou_seen": "seen", "miou_unseen": "unseen", "hiou": "hIoU", "fwiou": "fwIoU",
    "pixel_accuracy": "pixels", "mask_accuracy": "masks",
}  # fmt: skip
# Errors that concern all pictures: no room, or a folder that can't be written to.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def add(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    evaluate = commands.add_parser(
        "evaluate",
        help="mIoU of seen and unseen classes, mask accuracy and more on a data set",
        description=(
            "Segment the validation part of a data set and score it: mIoU of all, seen and unseen classes, hIoU, "
            "frequency-weighted IoU, accuracy of pixels and of ground-truth masks. DIR gets metrics.json, "
            "per_class.csv and worst.html, the worst pictures beside their ground truth; published figures are "
            "printed, too. A second run with the same options goes on with what an earlier one left. A picture that "
            "fails is named, the others go on, and the exit status is 1."
        ),
    )
    evaluate.add_argument(
        "--data", required=True, metavar="NAME", help="data set, as in data check, such as ade20k-150, or shapes"
    )
    evaluate.add_argument("--root", type=Path, metavar="DIR", help="folder that holds it; shapes needs none")
    evaluate.add_argument("--layout", metavar="NAME", help="take this layout rather than the first that is there")
    evaluate.add_argument("--names", default="plain", help="class names: plain, prompted or a file (default: plain)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N pictures only")
    evaluate.add_argument(
        "--encoder", choices=("mask-aware", *_CROPS, _UPPER_BOUND), default="mask-aware",
        help="what classifies the masks: the mask-aware CLIP; the paper's baselines, the frozen CLIP on a sub-image of "
        "each; or the ground truth, the upper bound of the proposals (default: %(default)s)",
    )  # fmt: skip
    evaluate.add_argument(
        "--model", metavar="NAME", help="CLIP, of open_clip or transformers (default: the small one of shapes)"
    )
    evaluate.add_argument("--pretrained", metavar="TAG", help="weights of an open_clip model: a tag, a file, or random")
    evaluate.add_argument(
        "--checkpoint", metavar="PATH",
        help="fine-tuned image tower: what finetune --out wrote, or a file of this library or a released one; shipped: "
        "the one that comes with the small CLIP (default: the CLIP as it is without fine-tuning)",
    )  # fmt: skip
    evaluate.add_argument(
        "--start-layer", type=int, metavar="L", help="(default: the checkpoint's, or two thirds of the depth)"
    )
    evaluate.add_argument("--size", type=int, metavar="PIXELS", help="side of the square (default: the model's, 480)")
    evaluate.add_argument("--keep-aspect", action="store_true", help="keep the ratio of a picture's sides instead")
    evaluate.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the image tower (default: fp32)"
    )
    evaluate.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    evaluate.add_argument(
        "--templates", metavar="NAME", help="prompts: one, vild (14), imagenet (80), or your own, with {} for the name"
    )
    evaluate.add_argument(
        "--proposals", default="superpixels", metavar="KIND",
        help="superpixels, sam[:MODEL], mask2former[:MODEL], files:PATH, or ground-truth: one mask for each class that "
        "is there (default: %(default)s)",
    )  # fmt: skip
    evaluate.add_argument("--keep", type=Path, metavar="DIR", help=f"keep proposals there (default: {_KEPT} in --out)")
    evaluate.add_argument(
        "--ensemble", type=float, metavar="WEIGHT",
        help="join the proposals' own class scores (Eq. 9) with this weight, 0.6 to 0.8 in the literature (default: "
        "the CLIP's scores alone)",
    )  # fmt: skip
    evaluate.add_argument(
        "--ensemble-form",
        choices=("paper", "released"),
        help="unseen classes as in the paper, or as in the released code of its hosts (default: paper)",
    )
    evaluate.add_argument(
        "--trained-on", metavar="NAMES",
        help="data set (of embedded worlds the seen classes) or file of names that the training knew: seen is what "
        "shares a name with one of them, and the proposals' class scores are theirs (default: the seen classes of the "
        "zero-shot setting)",
    )  # fmt: skip
    evaluate.add_argument(
        "--part", default="1/1", metavar="I/N",
        help="every Nth picture, from the Ith on, for N processes with one --out; whichever ends last sums up",
    )  # fmt: skip
    evaluate.add_argument("--worst", type=int, default=20, metavar="N", help="pictures in worst.html (default: 20)")
    evaluate.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write to, new, empty or of such a run"
    )
    evaluate.set_defaults(run=run, error=evaluate.error)


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    _check(arguments)
    try:
        return _run(arguments)
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        print(_printable(f"maft-adapter evaluate: {error}"), file=sys.stderr)
        return 1


def _check(arguments: argparse.Namespace) -> None:
    """Options that are wrong whatever the data are, or that would have no effect."""
    part = re.fullmatch(r"(\d+)/(\d+)", arguments.part)
    if part is None or not 1 <= int(part[1]) <= int(part[2]):
        arguments.error(f"--part {arguments.part}: expected I/N with I from 1 to N, such as 2/4")
    for name, least in {"limit": 1, "size": 1, "worst": 0}.items():
        if (value := getattr(arguments, name)) is not None and value < least:
            arguments.error(f"--{name} {value}: expected at least {least}")
    if arguments.ensemble is not None and not 0 <= arguments.ensemble <= 1:
        arguments.error(f"--ensemble {arguments.ensemble}: expected a weight in [0, 1]")
    if arguments.ensemble_form is not None and arguments.ensemble is None:
        arguments.error("--ensemble-form needs --ensemble")
    for name in ("ensemble", "keep"):
        if getattr(arguments, name) is not None and arguments.proposals == _TRUTH:
            arguments.error(f"--{name}: ground-truth masks have no class scores and are not kept, leave it out")
    ineffective = {
        "mask-aware": (),
        _UPPER_BOUND: (
            *("model", "pretrained", "checkpoint", "start_layer", "size", "keep_aspect", "templates", "ensemble"),
        ),
    }.get(arguments.encoder, ("checkpoint", "start_layer", "size", "keep_aspect"))
    for name in ineffective:
        value = getattr(arguments, name)
        if value is not None and value is not False:  # 0 has been given, too
            option = "--" + name.replace("_", "-")
            why = "has no CLIP" if arguments.encoder == _UPPER_BOUND else "is the frozen CLIP on sub-images"
            arguments.error(f"{option}: --encoder {arguments.encoder} {why}, leave it out")
    kind = arguments.proposals.partition(":")[0]
    if arguments.ensemble is not None and kind in ("superpixels", "sam"):
        arguments.error(f"--ensemble: {kind} have no class scores (A^p), leave it out or take mask2former")


def _run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..data import open_dataset
    from ..evaluate import Evaluator, Records
    from ..metrics import evaluation_scores
    from ..proposals import Kept, proposer

    out: Path = arguments.out
    dataset = open_dataset(arguments.data, arguments.root, names=arguments.names, layout=arguments.layout)
    pictures = len(dataset) if arguments.limit is None else min(arguments.limit, len(dataset))
    truth = arguments.proposals == _TRUTH
    proposals = None if truth else proposer(arguments.proposals, arguments.device)
    scorer, about_scorer = _scorer(arguments, dataset)
    evaluator = Evaluator(
        dataset, proposals, scorer,
        weight=arguments.ensemble,
        unseen_form=arguments.ensemble_form or "paper",
        trained_on=_trained_on(arguments),
    )  # fmt: skip
    settings = {
        "data": arguments.data, "split": dataset.split, "layout": dataset.layout,
        "folder": str(dataset.folder.resolve()) if dataset.folder else None, "pictures": pictures,
        "names": dataset.names, "class_names": [list(names) for names in dataset.class_names],
        "unseen": [dataset.class_names[k][0] for k in evaluator.unseen], "trained_on": arguments.trained_on,
        "encoder": arguments.encoder, **about_scorer, "proposals": proposals.settings if proposals else _TRUTH,
        "masks": masks_of(arguments.proposals),
        "ensemble": arguments.ensemble,
        "ensemble_form": None if arguments.ensemble is None else evaluator.unseen_form,
    }  # fmt: skip
    _claim(out, settings)
    if proposals:
        evaluator.proposals = Kept(proposals, arguments.keep or out / _KEPT)

    records = Records(out, len(dataset.class_names))
    done, _ = records.read()
    first, parts = map(int, arguments.part.split("/"))
    mine = [index for index in range(first - 1, pictures, parts) if index not in done]
    if evaluator.proposals and arguments.ensemble is not None and mine:
        _check_class_scores(evaluator, evaluator.proposals, mine[0])
    for index in tqdm(mine, unit="picture", disable=None):
        try:
            records.add(f"{first}-of-{parts}", index, evaluator(dataset[index]))
        except Exception as error:  # of any kind, so that one bad picture does not stop the others
            if isinstance(error, ModuleNotFoundError) or (isinstance(error, OSError) and error.errno in _DISK):
                raise
            known = isinstance(error, OSError | ValueError)
            reason = f"picture {index}: {error if known else f'{type(error).__name__}: {error}'}"
            tqdm.write(_printable(f"failed: {reason}"), file=sys.stderr)
            records.add(f"{first}-of-{parts}", index, reason)

    pixels, masks = records.read()
    missing = pictures - len(pixels) - len(records.failed)
    if missing:
        print(f"part {arguments.part} is finished; {missing} of {pictures} pictures are left to other parts")
        return 1 if records.failed else 0
    if not pixels:
        raise ValueError(f"all {pictures} pictures failed")
    sums = records.summed(pixels.values()), records.summed(masks.values())  # (C + 1, C + 1) each
    failed = [records.failed[index] for index in sorted(records.failed)]
    metrics, table = _summary(settings, evaluator, *sums, len(pixels), failed)
    replace_file(out / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
    replace_file(out / "per_class.csv", table.encode())
    scores = {
        index: evaluation_scores(records.summed([counts]))["miou"] for index, counts in pixels.items() if counts.numel()
    }
    page = _worst(evaluator, scores, arguments.worst)
    replace_file(out / "worst.html", page.encode(errors="replace"))
    print(_printable(_report(metrics)))
    print(f"{len(pixels)} pictures evaluated, {len(records.failed)} failed: {out / 'metrics.json'}")
    return 1 if records.failed else 0


def _scorer(arguments: argparse.Namespace, dataset: SegmentationDataset) -> tuple[Scorer | None, dict[str, Any]]:
    """What gives A^c, and what it depends on."""
    from ..classify import text_classifier
    from ..evaluate import crop_scorer, mask_aware_scorer
    from ..models import load_model
    from ..pictures import prompts
    from ..shapes import clip as small_clip

    if arguments.encoder == _UPPER_BOUND:
        return None, {"model": None}
    weights = Path(small_clip.__file__).parent
    given = arguments.checkpoint
    if given == "shipped":
        if arguments.model is not None:
            raise ValueError(f"--checkpoint shipped is of the small CLIP of shapes, not of {arguments.model}")
        arguments.checkpoint = weights / small_clip.MASK_AWARE
    elif given is None and arguments.model is None:
        arguments.checkpoint = weights / small_clip.WEIGHTS
    model = load_model(**model_options(arguments), start_layer=arguments.start_layer, device=arguments.device)
    templates = arguments.templates or model.templates
    templates = prompts([templates] if isinstance(templates, str) and "{" in templates else templates)
    text = text_classifier(model.clip, model.tokenizer, dataset.class_names, templates)  # (C, D)
    about: dict[str, Any] = {"model": model.source, "templates": list(templates)}
    if arguments.encoder in _CROPS:
        return crop_scorer(model, text, _CROPS[arguments.encoder]), about  # type: ignore[arg-type]
    size = arguments.size or model.size
    about |= {"size": size, "keep_aspect": arguments.keep_aspect}
    return mask_aware_scorer(model, text, size, arguments.keep_aspect), about


def _trained_on(arguments: argparse.Namespace) -> Sequence[Sequence[str]] | None:
    from ..data import DATASETS, class_list, open_dataset, read_classes
    from ..data.layouts import LAYOUTS

    if arguments.trained_on is None:
        return None
    kind = arguments.trained_on.partition(":")[0]
    if kind in DATASETS and kind not in LAYOUTS:
        drawn = open_dataset(arguments.trained_on)
        return [drawn.class_names[k] for k in drawn.seen]
    if arguments.trained_on in DATASETS:
        return class_list(arguments.trained_on, "prompted" if arguments.names == "prompted" else "plain").names
    return read_classes(arguments.trained_on).names


def _check_class_scores(evaluator: Evaluator, proposals: Proposer, index: int) -> None:
    """See that the ensemble finds class scores (A^p) that fit, before the first picture is encoded.

    Raises:
        ValueError: there are none, or they are of other classes.
    """
    from ..pictures import read_picture

    try:
        item = evaluator.dataset[index]
        scores = proposals(read_picture(item.picture), item.file).class_scores
    except Exception:  # of any kind: this picture's own, which is named when its turn comes
        return
    if scores is None:
        raise ValueError("--ensemble: these --proposals have no class scores (A^p), leave it out")
    try:
        evaluator._class_scores(scores)
    except ValueError as error:
        raise ValueError(f"{error} with --trained-on") from error


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder this evaluation's, or see that it is.

    Raises:
        ValueError: it holds another evaluation, or something else.
        OSError: it can't be made or written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / _SETTINGS
    others = [file.name for file in out.iterdir() if not file.name.startswith((_SETTINGS, _KEPT))]
    if not path.exists():
        if others:
            raise ValueError(f"--out {out} holds other files, which could be replaced: name a new or empty folder")
    elif others:  # otherwise no picture was finished
        try:
            before = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): name a new folder") from error
        differ = [name for name, value in settings.items() if before.get(name) != value]
        if differ:
            values = (f"{k} (there {reprlib.repr(before.get(k))}, here {reprlib.repr(settings[k])})" for k in differ)
            raise ValueError(
                f"--out {out} holds an evaluation with other settings: {', '.join(values)}; give the same, or a new "
                "folder"
            )
        return
    replace_file(path, (json.dumps(settings, indent=1) + "\n").encode())


def _summary(
    settings: dict[str, Any], evaluator: Evaluator, of_pixels: Tensor, of_masks: Tensor, pictures: int,
    failed: list[str],
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """What metrics.json and per_class.csv hold."""
    from ..evaluate import PUBLISHED, figures
    from ..metrics import evaluation_scores

    seven, as_zero = (
        {key: _number(value) for key, value in figures(of_pixels, of_masks, evaluator.unseen, absent).items()}
        for absent in ("ignore", "zero")
    )
    metrics = {
        **seven,
        "absent_as_zero": {key: as_zero[key] for key in ("miou", "miou_seen", "miou_unseen", "hiou")},
        "pictures": pictures,
        "failed": failed,
        "conventions": _CONVENTIONS,
        "settings": settings,
        "published": [row._asdict() for row in PUBLISHED.get(evaluator.dataset.name, ())],
    }

    ignored, zero = (evaluation_scores(of_pixels, absent=absent) for absent in ("ignore", "zero"))
    accuracy = evaluation_scores(of_masks)["accuracy"] if of_masks.any() else [math.nan] * len(of_masks)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["class", "name", "unseen", "iou", "iou_absent_as_zero", "accuracy", "mask_accuracy", "pixels",
         "predicted_pixels", "right_pixels", "masks"]
    )  # fmt: skip
    for k, names in enumerate(evaluator.dataset.class_names):
        scores = (ignored["iou"][k], zero["iou"][k], ignored["accuracy"][k], accuracy[k])
        counts = (of_pixels[k].sum(), of_pixels[:, k].sum(), of_pixels[k, k], of_masks[k].sum())
        writer.writerow(
            [k, names[0], int(k in evaluator.unseen), *map(_number, scores), *(int(count) for count in counts)]
        )
    return metrics, text.getvalue()


def _worst(evaluator: Evaluator, scores: Mapping[int, float], count: int) -> str:
    """A page of the pictures with the lowest scores: their mIoU of the classes in their ground truth."""
    import base64

    from ..contact_sheet import Entry, contact_sheet
    from ..pictures import read_picture
    from ..show import label_maps

    dataset, entries = evaluator.dataset, []
    names = [names[0] for names in dataset.class_names]
    for index in sorted(scores, key=lambda index: (scores[index], index))[:count]:
        item = dataset[index]
        maps = {"ground truth": [item.labels], "prediction": [evaluator(item).prediction.numpy()]}
        png = io.BytesIO()
        label_maps([read_picture(item.picture)], maps, names, dataset.ignore_index).savefig(png, format="png", dpi=100)
        there = [names[k] for k in sorted(set(item.labels.ravel().tolist()) - {dataset.ignore_index})]
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        entries.append(Entry(url, item.name, there, f"mIoU {scores[index]:.1f} %"))
    return contact_sheet(entries, f"The worst pictures of {dataset.name}")


def _report(metrics: Mapping[str, Any]) -> str:
    """The figures beside those that were published, as lines of text."""
    settings = metrics["settings"]
    rows = [("", "", dict(_HEADINGS)), ("this evaluation", "", dict(metrics))]
    rows.append(("absent classes as IoU 0", "", metrics["absent_as_zero"]))
    rows += [(row["method"], row["source"], row) for row in metrics["published"]]
    width = max(len(title) for title, _, _ in rows)
    ensemble = "" if settings["ensemble"] is None else f", ensemble {settings['ensemble']} {settings['ensemble_form']}"
    lines = [
        f"{settings['data']}, {settings['names']} names, {settings['pictures']} pictures",
        f"{settings['encoder']}: {settings['model'] or 'no model'}{ensemble}",
        settings["proposals"],
    ]
    for title, source, values in rows:
        cells = (values.get(key) for key in _HEADINGS)
        texts = ("-" if cell is None else cell if isinstance(cell, str) else f"{cell:.1f}" for cell in cells)
        lines.append(f"{title:{width}}" + "".join(f"{text:>8}" for text in texts) + f"  {source}")
    if metrics["published"]:
        lines.append("published figures have other proposals, models and names than this evaluation")
    return "\n".join(line.rstrip() for line in lines)


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value


def _printable(text: str) -> str:
    """Without what names of files may hold and no stream takes."""
    return text.encode(errors="replace").decode()
