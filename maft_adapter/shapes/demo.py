"""The paper's Table 4(a) on the embedded world: `maft-adapter demo`.

Four rows, evaluated alike on the same held-out scenes with the same proposals and the names of all classes:
the frozen CLIP with mask & crop; IP-CLIP without fine-tuning; fine-tuned with L_ma; fine-tuned with L_ma +
L_dis. The fine-tuning sees scenes of its own, and masks and names of seen classes only.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from .. import show
from ..adapt import make_mask_aware, valid_masks
from ..baselines import encode_crops
from ..classify import class_scores, label_map, text_classifier
from ..finetune import Sample, finetune
from ..losses import MAFTLoss
from ..macs import count_macs
from ..metrics import SegmentationMetrics, SegmentationScores
from ..proposals.merging import propose_masks
from .clip import load_clip, preprocess, tokenize
from .scenes import CLASSES, SEEN, THINGS, UNSEEN, Scene, render_scene


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings of one run; everything that is not here is the default of `finetune`.

    Attributes:
        start_layer: L of the small CLIP's 12 blocks.
        iterations, lr, batch_size: of the fine-tuning.
        train_scenes, eval_scenes: scenes a seed.
        curve_every: iterations between two evaluations of the curves.
    """

    start_layer: int = 0
    iterations: int = 200
    lr: float = 1e-3
    batch_size: int = 8
    train_scenes: int = 240
    eval_scenes: int = 200
    curve_every: int = 50


RECIPE = Recipe()
QUICK = replace(RECIPE, iterations=12, train_scenes=48, eval_scenes=24, curve_every=4)
TEMPLATES = ("a picture of {}", "a photo of {}", "{}")
# First entries of the scenes' seeds: no scene serves twice, nor did one serve in `train_clip`.
SPLITS = {"evaluation": 3_000_000, "fine-tuning": 4_000_000}
COUNTED_SCENES = 8  # multiply-accumulates are the mean of these; they vary with the number of proposals only

TITLES = {
    "frozen_mask_crop": "frozen CLIP, mask & crop",
    "ip_clip": "IP-CLIP, no fine-tuning",
    "ip_clip_ma": "IP-CLIP + L_ma",
    "ip_clip_ma_dis": "IP-CLIP + L_ma + L_dis",
}
# Table 4(a): COCO-Stuff with FreeSeg; mIoU seen, mIoU unseen, hIoU, GFLOPs of the image encoder.
PAPER = {
    "frozen_mask_crop": (22.3, 29.3, 25.3, 1127.0),
    "ip_clip": (29.4, 36.2, 32.4, 53.4),
    "ip_clip_ma": (39.9, 47.1, 43.1, 53.4),
    "ip_clip_ma_dis": (40.1, 49.7, 44.4, 53.4),
}
SCORES = {"miou_seen": "seen", "miou_unseen": "unseen", "hiou": "hIoU"}
NAMES = [f"{name} *" if name in UNSEEN else name for name in CLASSES]  # as the figures show them
# Weight of L_dis in the rows with fine-tuning: 0.1 as in the released configuration, where the paper says 1.
LAMBDAS = {"ip_clip_ma": 0.0, "ip_clip_ma_dis": 0.1}
LOSS_TERMS = ("mask_aware", "self_distillation")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.7rem; line-height: 1.2 }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; font-weight: 400 }
thead th { font-weight: 600 }
th:first-child { text-align: left }
th[colspan] { text-align: center }
tbody tr { border-top: 1px solid #ddd }
tbody tr:last-child { background: #eef6f0 }
.paper { color: #666 }
:not(.paper) + .paper { border-left: 1px solid #ddd }
img { display: block; max-width: 100%; height: auto; margin: 1rem auto }
.scroll { overflow-x: auto }
.note { color: #555; font-size: .92rem }
"""

# A scene and its proposals, (N, H, W) bool.
Example = tuple[Scene, NDArray[np.bool_]]
# Images (1, 3, H, W), masks (1, N, H, W) -> embeddings (1, N, D) and which are valid, (1, N) bool.
Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Evaluation(NamedTuple):
    """Scores over all scenes, each scene's (H, W) label map, and the encoder's median time for an image."""

    scores: SegmentationScores
    label_maps: list[NDArray[np.int64]]
    seconds: float


class Row(NamedTuple):
    """One finished row of one seed.

    Attributes:
        name: key of `TITLES`.
        encode: the row's encoder, fine-tuned.
        evaluation: on the held-out scenes.
        gmacs: 1e9 multiply-accumulates of the encoder for all proposals of an image.
        losses: of every iteration; empty without fine-tuning.
        curve: "iterations", and "miou_seen" and "miou_unseen" after them; empty without fine-tuning.
    """

    name: str
    encode: Encode
    evaluation: Evaluation
    gmacs: float
    losses: dict[str, list[float]]
    curve: dict[str, list[float]]


def run_demo(
    out: Path, seeds: Sequence[int], quick: bool = False, clip: Any = None, start_layer: int | None = None
) -> dict[str, Any]:
    """Run all rows for every seed and write metrics.json, report.html and its figures to `out`.

    metrics.json is written after every row, the report after every seed, each replaced as a whole, so a run
    that is stopped leaves what was finished, and of an earlier run in `out` what it did not come to replace.
    Prints the table.

    Args:
        out: folder, made if it is missing.
        seeds: distinct, non-negative; a seed changes the scenes, of the evaluation and of the fine-tuning,
            and the order in which the fine-tuning sees them.
        quick: few scenes and iterations, for a first look and for CI.
        clip: a CLIP of this world in eval mode, which stays unchanged; by default `load_clip()`.
        start_layer: L in 0..12 (Table 4e); by default the recipe's.

    Returns:
        What metrics.json holds. "rows": "name", "miou_seen", "miou_unseen", "hiou" (percent, means over the
        seeds), their "std" (sample standard deviation over the seeds, 0 for a single one), "gmacs" and
        "seconds_per_image" of the encoder for all proposals of an image, and "per_seed"; "seeds"; "seconds"
        of the whole run; "recipe"; the losses of every iteration as "history"; mIoU over them as "curves".

    Raises:
        ValueError: no seeds, or seeds that are not as above.
        KeyboardInterrupt: after a line that says what was finished.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds are at least one non-negative number and no two are equal, got {seeds}")
    started = time.monotonic()
    recipe = QUICK if quick else RECIPE
    if start_layer is not None:
        recipe = replace(recipe, start_layer=start_layer)
    clip = load_clip() if clip is None else clip
    out.mkdir(parents=True, exist_ok=True)

    result: dict[str, Any] = {
        "rows": [], "seeds": seeds, "seconds": 0.0, "recipe": asdict(recipe), "history": [], "curves": [],
    }  # fmt: skip
    finished: dict[str, list[dict[str, float]]] = {}
    figures: dict[str, bytes] = {}

    def save() -> None:
        result["seconds"] = time.monotonic() - started
        _write(out / "metrics.json", (json.dumps(result, indent=1) + "\n").encode())

    try:
        for seed in seeds:
            scenes = prepare(seed, "evaluation", recipe.eval_scenes)
            rows: dict[str, Row] = {}
            for row in run_seed(seed, scenes, recipe, clip):
                rows[row.name] = row
                numbers = _numbers(seed, row)
                finished.setdefault(row.name, []).append(numbers)
                result["rows"] = [_summary(name, per_seed) for name, per_seed in finished.items()]
                if row.losses:
                    result["history"].append({"name": row.name, "seed": seed, **row.losses})
                    result["curves"].append({"name": row.name, "seed": seed, **row.curve})
                save()
                scores = ", ".join(f"{heading} {numbers[key]:.1f}" for key, heading in SCORES.items())
                print(f"seed {seed}: {TITLES[row.name]}: {scores}", flush=True)
            if not figures:
                figures["figure1"] = _png(figure_1(scenes, rows, clip))
                figures["label_maps"] = _png(label_maps_figure(scenes, rows))
            figures["curves"] = _png(curves_figure(result))
            for name, png in figures.items():
                _write(out / f"{name}.png", png)
            _write(out / "report.html", report(result, figures).encode())
            save()
    except KeyboardInterrupt:
        count = sum(len(per_seed) for per_seed in finished.values())
        kept = f": {out / 'metrics.json'}" if count else ""
        print(f"\n{count} of {len(TITLES) * len(seeds)} rows were finished{kept}", flush=True)
        raise
    print(f"\n{table(result)}\n\n{result['seconds']:.0f} s; the report: {out / 'report.html'}", flush=True)
    return result


def run_seed(seed: int, scenes: Sequence[Example], recipe: Recipe, clip: Any) -> Iterator[Row]:
    """The rows of one seed, in the order of the table, each as soon as it is finished.

    Args:
        seed: of the fine-tuning and its scenes.
        scenes: held out, for the evaluation.
        recipe: sizes and settings.
        clip: the frozen CLIP, which stays unchanged.
    """
    scale = float(clip.logit_scale.detach().exp())
    text = text_classifier(clip, tokenize, CLASSES, TEMPLATES)  # (C, D)

    def score(encode: Encode, title: str) -> Evaluation:
        return evaluate(encode, scenes, text, scale, title)

    def finish(name: str, encode: Encode, losses: Any = None, curve: Any = None) -> Row:
        evaluation = score(encode, TITLES[name])
        if curve:
            _extend(curve, recipe.iterations, evaluation)
        bar = tqdm(scenes[:COUNTED_SCENES], desc="counting multiply-accumulates", leave=False)
        counts = [count_encoder(encode, example) for example in bar]
        return Row(name, encode, evaluation, statistics.mean(counts) / 1e9, losses or {}, curve or {})

    yield finish("frozen_mask_crop", partial(encode_crops, clip))
    ip_clip = copy.deepcopy(clip)
    make_mask_aware(ip_clip.visual, recipe.start_layer)
    untuned = finish("ip_clip", partial(encode_mask_aware, ip_clip))
    yield untuned

    samples = finetuning_samples(prepare(seed, "fine-tuning", recipe.train_scenes))
    seen_text = text_classifier(clip, tokenize, SEEN, TEMPLATES)  # (C_seen, D)
    teacher_scores = image_scores(ip_clip, samples, seen_text, scale)  # (S, C_seen)
    for name, weight in LAMBDAS.items():
        student = copy.deepcopy(ip_clip)
        encode = partial(encode_mask_aware, student)
        curve: dict[str, list[float]] = {"iterations": [], "miou_seen": [], "miou_unseen": []}
        _extend(curve, 0, untuned.evaluation)

        def watch(done: int, encode: Encode = encode, curve: dict[str, list[float]] = curve) -> None:
            if done % recipe.curve_every == 0 and done < recipe.iterations:
                _extend(curve, done, score(encode, f"after {done} iterations"))

        history = finetune(
            student, samples, seen_text,
            iterations=recipe.iterations, batch_size=recipe.batch_size, lr=recipe.lr,
            loss=MAFTLoss(distillation_weight=weight), teacher_scores=teacher_scores,
            seed=seed, on_iteration=watch,
        )  # fmt: skip
        losses = {key: [step[key] for step in history] for key in history[0]}
        yield finish(name, encode, losses, curve)


def prepare(seed: int, split: Literal["evaluation", "fine-tuning"], count: int) -> list[Example]:
    """Draw the scenes of a seed and propose masks, on all cores.

    Args:
        seed: non-negative.
        split: the two share no scene, and neither do two seeds.
        count: number of scenes, 96x96 pixels each.
    """
    keys = [(SPLITS[split], seed, i) for i in range(count)]
    # Ctrl-C reaches every process of the terminal: the workers inherit that it is not theirs to handle.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pool = multiprocessing.get_context("spawn").Pool(min(count, os.cpu_count() or 1))
    finally:
        signal.signal(signal.SIGINT, handler)
    with pool:
        scenes = [render_scene(key) for key in tqdm(keys, desc=f"drawing scenes ({split})")]
        proposals = pool.imap(propose_masks, [scene.image for scene in scenes], chunksize=4)
        return list(zip(scenes, tqdm(proposals, desc=f"proposing masks ({split})", total=count), strict=True))


def finetuning_samples(examples: Sequence[Example]) -> list[Sample]:
    """What the fine-tuning sees: labels are rows of `SEEN`, and 255 where an unseen class is."""
    row = torch.full((len(CLASSES),), 255)  # (C,)
    row[[CLASSES.index(name) for name in SEEN]] = torch.arange(len(SEEN))
    return [
        Sample(preprocess(scene.image), torch.from_numpy(masks), row[torch.from_numpy(scene.labels).long()])
        for scene, masks in examples
    ]


@torch.no_grad()
def image_scores(clip_model: Any, samples: Sequence[Sample], text: Tensor, logit_scale: float) -> Tensor:
    """(len(samples), C) class scores of whole images: the teacher's, if the model is not fine-tuned yet."""
    images = torch.stack([sample.image for sample in samples])  # (S, 3, H, W)
    batches = tqdm(images.split(16), desc="scores of the teacher")
    embeddings = torch.cat([clip_model.encode_image(batch) for batch in batches])  # (S, D)
    return class_scores(embeddings, text, logit_scale)


def encode_mask_aware(clip_model: Any, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, N, D) of the proposals, and (B, N) bool, which of them contain a patch."""
    return clip_model.visual(images, masks), valid_masks(clip_model.visual, images, masks)


@torch.no_grad()
def evaluate(encode: Encode, scenes: Sequence[Example], text: Tensor, logit_scale: float, title: str) -> Evaluation:
    """Segment every scene, the same way for every row: A^c over all classes, O = A^c^T M, argmax.

    Args:
        encode: the row's encoder; proposals that it calls invalid don't vote.
        scenes: held-out scenes with their proposals.
        text: (C, D) text embeddings of all classes, seen and unseen.
        logit_scale: 1 / temperature of A^c.
        title: of the progress bar.
    """
    metrics = SegmentationMetrics(len(CLASSES), [CLASSES.index(name) for name in UNSEEN])
    maps, seconds = [], []
    for scene, proposals in tqdm(scenes, desc=title, leave=None):
        images, masks = preprocess(scene.image)[None], torch.from_numpy(proposals)[None]
        started = time.perf_counter()
        embeddings, valid = encode(images, masks)
        seconds.append(time.perf_counter() - started)
        prediction = label_map(class_scores(embeddings, text, logit_scale), masks, valid=valid)  # (1, H, W)
        metrics.update(prediction, torch.from_numpy(scene.labels)[None])
        maps.append(prediction[0].numpy())
    return Evaluation(metrics.compute(), maps, statistics.median(seconds))


@torch.no_grad()
def count_encoder(encode: Encode, example: Example) -> int:
    """Multiply-accumulates for all proposals of one scene."""
    scene, proposals = example
    images, masks = preprocess(scene.image)[None], torch.from_numpy(proposals)[None]
    return count_macs(lambda: encode(images, masks))


def typical_proposals(scenes: Sequence[Example]) -> tuple[Example, list[int], list[list[int]]]:
    """The paper's three typical proposals, chosen by the ground truth alone, whatever any model says of them.

    Of all things in all scenes, the one for which the worst of three proposals is best by IoU: the thing; one
    stuff beside it, holding less than a tenth of the thing; both together, each at least a quarter of it.

    Returns:
        The scene with its proposals, the indices of the three, and the classes of each.
    """
    best: tuple[float, Example, list[int], list[list[int]]] | None = None
    for scene, masks in scenes:
        pixels = np.eye(len(CLASSES))[scene.labels.ravel()]  # (H*W, C)
        counts = masks.reshape(len(masks), -1) @ pixels  # (N, C)
        areas, totals = counts.sum(1), pixels.sum(0)  # (N,), (C,)
        for thing in (k for k in scene.present if k < len(THINGS)):
            for stuff in (k for k in scene.present if k >= len(THINGS)):
                of_thing, of_stuff = counts[:, thing], counts[:, stuff]
                object_iou = of_thing / (areas + totals[thing] - of_thing)
                stuff_iou = of_stuff / (areas + totals[stuff] - of_stuff)
                stuff_iou[of_thing >= 0.1 * totals[thing]] = 0
                both_iou = (of_thing + of_stuff) / (areas + totals[thing] + totals[stuff] - of_thing - of_stuff)
                both_iou[np.minimum(of_thing, of_stuff) < 0.25 * areas] = 0
                chosen = [object_iou, stuff_iou, both_iou]
                quality = float(min(iou.max() for iou in chosen))
                if best is None or quality > best[0]:
                    indices = [int(iou.argmax()) for iou in chosen]
                    best = quality, (scene, masks), indices, [[thing], [stuff], [thing, stuff]]
    assert best is not None, "every scene has a thing and a stuff"
    return best[1:]


@torch.no_grad()
def figure_1(scenes: Sequence[Example], rows: dict[str, Row], clip: Any) -> Figure:
    """The paper's Figure 1: an object, its background, and both, for the frozen and the fine-tuned CLIP."""
    (scene, proposals), indices, correct = typical_proposals(scenes)
    images, masks = preprocess(scene.image)[None], torch.from_numpy(proposals[indices])[None]
    text, scale = text_classifier(clip, tokenize, CLASSES, TEMPLATES), float(clip.logit_scale.exp())
    scores = {
        title: class_scores(rows[name].encode(images, masks)[0][0], text, scale).numpy()  # (3, C)
        for title, name in (
            ("frozen CLIP (mask & crop)", "frozen_mask_crop"),
            ("mask-aware CLIP", "ip_clip_ma_dis"),
        )
    }
    titles = ["object", "background", "object + background"]
    return show.typical_proposals(scene.image, proposals[indices], scores, NAMES, correct, titles)


def label_maps_figure(scenes: Sequence[Example], rows: dict[str, Row], count: int = 4) -> Figure:
    """Label maps of the first `count` scenes in which an unseen class is visible."""
    unseen = {CLASSES.index(name) for name in UNSEEN}
    shown = [i for i, (scene, _) in enumerate(scenes) if unseen & set(scene.present)][:count] or [0]
    maps: dict[str, list[ArrayLike]] = {"ground truth": [scenes[i][0].labels for i in shown]}
    titles = {
        "frozen_mask_crop": "frozen, mask & crop",
        "ip_clip": "IP-CLIP",
        "ip_clip_ma_dis": "+ L_ma + L_dis",
    }
    for name, title in titles.items():
        maps[title] = [rows[name].evaluation.label_maps[i] for i in shown]
    return show.label_maps([scenes[i][0].image for i in shown], maps, NAMES)


def curves_figure(result: dict[str, Any]) -> Figure:
    """Both losses, and mIoU over the iterations (Table 4c): means of the seeds so far, each seed faintly."""
    styles = {"ip_clip_ma": "--", "ip_clip_ma_dis": "-"}
    labels = {"ip_clip_ma": "L_ma only", "ip_clip_ma_dis": "L_ma + L_dis"}
    colors = {
        "mask_aware": "#333333",
        "self_distillation": "#333333",
        "miou_seen": "#0072B2",
        "miou_unseen": "#D55E00",
    }
    figure = Figure(figsize=(11.2, 3.3), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
    titles = ("mask-aware loss L_ma", "self-distillation loss L_dis", "mIoU on the evaluation scenes, %")

    def draw(cell: Axes, runs: list[dict[str, Any]], key: str, name: str, label: str) -> None:
        values = np.array([_smooth(run[key]) if key in LOSS_TERMS else run[key] for run in runs])  # (seeds, points)
        x = runs[0].get("iterations", range(1, values.shape[1] + 1))
        if len(runs) > 1:
            cell.plot(x, values.T, styles[name], color=colors[key], lw=0.7, alpha=0.3)
        cell.plot(x, values.mean(0), styles[name], color=colors[key], lw=1.9, label=label)

    for name in LAMBDAS:
        history = [run for run in result["history"] if run["name"] == name]
        curves = [run for run in result["curves"] if run["name"] == name]
        draw(panels[0], history, "mask_aware", name, labels[name])
        if name == "ip_clip_ma_dis":
            draw(panels[1], history, "self_distillation", name, labels[name])
        for key in ("miou_seen", "miou_unseen"):
            draw(panels[2], curves, key, name, f"{SCORES[key]}, {labels[name]}")
    for cell, title in zip(panels, titles, strict=True):
        cell.set_title(title, fontsize=11)
        cell.set_xlabel("iterations", fontsize=10)
        cell.xaxis.set_major_locator(MaxNLocator(integer=True))
        cell.tick_params(labelsize=9)
        cell.grid(color="#e3e3e3", lw=0.6)
        cell.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=9, frameon=False)
    panels[2].legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def table(result: dict[str, Any]) -> str:
    """The rows beside the paper's, as aligned text."""
    several = len(result["seeds"]) > 1
    wide = 12 if several else 7

    def line(title: str, ours: list[str], macs: str, ms: str, paper: list[str]) -> str:
        scores = "".join(cell.rjust(wide) for cell in ours)
        return f"{title:<25}{scores}{macs:>8}{ms:>10}  " + "".join(cell.rjust(8) for cell in paper)

    headings = list(SCORES.values())
    lines = [
        f"{'':<25}{'embedded world':^{3 * wide + 18}}  {'paper: COCO-Stuff, FreeSeg':^32}",
        line("", headings, "GMACs", "ms/image", [*headings, "GFLOPs"]),
    ]
    for row in result["rows"]:
        ours = [_score(row, key, several) for key in SCORES]
        macs, ms = f"{row['gmacs']:.3f}", f"{1000 * row['seconds_per_image']:.0f}"
        lines.append(line(TITLES[row["name"]], ours, macs, ms, [f"{x:.1f}" for x in PAPER[row["name"]]]))
    lines.append("mIoU of seen and unseen classes and their harmonic mean hIoU in %" + _spread(result))
    return "\n".join(lines)


def report(result: dict[str, Any], figures: dict[str, bytes]) -> str:
    """The report as one HTML page that needs no other file.

    Args:
        result: what `run_demo` returns, all four rows of at least one seed.
        figures: PNG files under "figure1", "label_maps" and "curves".
    """
    recipe, several = Recipe(**result["recipe"]), len(result["seeds"]) > 1
    rows = {row["name"]: row for row in result["rows"]}
    first, last = rows["frozen_mask_crop"], rows["ip_clip_ma_dis"]
    seeds = ", ".join(str(numbers["seed"]) for numbers in last["per_seed"])
    ours = "".join(f"<th>{heading}</th>" for heading in SCORES.values())
    body = "".join(
        f"<tr><th>{TITLES[name].replace('&', '&amp;')}</th>"
        + "".join(f"<td>{_score(row, key, several)}</td>" for key in SCORES)
        + f"<td>{row['gmacs']:.3f}</td><td>{1000 * row['seconds_per_image']:.0f}</td>"
        + "".join(f'<td class="paper">{value:.1f}</td>' for value in PAPER[name])
        + "</tr>\n"
        for name, row in rows.items()
    )
    image = {
        name: f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in figures.items()
    }
    curve = next(run for run in result["curves"] if run["name"] == "ip_clip_ma_dis")
    seen, unseen = (f"{curve[key][0]:.1f} to {curve[key][-1]:.1f}" for key in ("miou_seen", "miou_unseen"))
    quick = "This was a quick run: few scenes, few iterations. " if recipe.iterations == QUICK.iterations else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>maft-adapter: Table 4(a) on the embedded world</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Mask-aware CLIP: the paper's Table 4(a) on the embedded world</h1>
<p>Four ways to classify the same mask proposals with the same small CLIP, on {recipe.eval_scenes} held-out
scenes a seed (seeds: {seeds}). From the first row to the last, hIoU goes from {first["hiou"]:.1f} to
{last["hiou"]:.1f}, and the mIoU of unseen classes, whose masks and names the fine-tuning does not know, from
{first["miou_unseen"]:.1f} to {last["miou_unseen"]:.1f}.</p>

<h2>Table</h2>
<div class="scroll"><table>
<thead>
<tr><th></th><th colspan="5">embedded world</th><th colspan="4" class="paper">paper, Table 4(a)</th></tr>
<tr><th></th>{ours}<th>GMACs</th><th>ms/image</th>
<th class="paper">seen</th><th class="paper">unseen</th><th class="paper">hIoU</th>
<th class="paper">GFLOPs</th></tr>
</thead>
<tbody>
{body}</tbody>
</table></div>
<p class="note">mIoU of seen and unseen classes and their harmonic mean hIoU, in %{_spread(result)}.
Multiply-accumulates (attention included) and median time of the image encoder for all proposals of an image.
The paper's numbers are those of COCO-Stuff with FreeSeg; its GFLOPs leave attention out.</p>

<h2>Figure 1: one image, three proposals</h2>
{image["figure1"]}
<p class="note">Each row is a proposal of the same image, outlined in green, with its five best classes of all
{len(CLASSES)} under the frozen and under the fine-tuned CLIP. Green bars and bold names are what the proposal
contains; * marks unseen classes. Scene and proposals are chosen by the ground truth alone, not by what a
model says.</p>

<h2>Label maps</h2>
{image["label_maps"]}
<p class="note">The first evaluation scenes that show an unseen class (*): the image, the ground truth, and
what three of the rows make of the same proposals. Colours hold within a row.</p>

<h2>Losses, and mIoU over the iterations (Table 4c)</h2>
{image["curves"]}
<p class="note">Left and middle: the losses, running means over 10 iterations. Right: both fine-tunings,
followed on the evaluation scenes; with L_ma + L_dis (seed {curve["seed"]}) {recipe.iterations} iterations
bring seen classes from {seen} and unseen ones from {unseen}. In the paper unseen classes are best early, and
fall while seen ones go on rising. The number of iterations is part of the recipe and was not chosen on these
scenes.</p>

<h2>Recipe</h2>
<p>{quick}L = {recipe.start_layer} of 12 blocks; {recipe.iterations} iterations of AdamW with learning rate
{recipe.lr:g} and {recipe.batch_size} images each, from {recipe.train_scenes} scenes; SmoothL1, &lambda; =
{LAMBDAS["ip_clip_ma_dis"]:g}; MLPs, patch convolution, class and position embedding frozen. {len(SEEN)}
classes are seen, {len(UNSEEN)} unseen: combinations of two words that both occur in seen classes. The
fine-tuning knows names and masks of seen classes only. The whole run took {result["seconds"]:.0f} s.</p>

<h2>What differs from the paper</h2>
<ul>
<li>The data: drawn scenes of 96&times;96 pixels and a CLIP of 12 blocks but only 64 channels, trained on
captions of such scenes, instead of COCO-Stuff and ViT-B/16 at 480&times;480.</li>
<li>The start layer is {recipe.start_layer}; the paper's is 8 of 12. In so small a tower the patches mix
within a few blocks, and a late start loses the region.</li>
<li>The learning rate is {recipe.lr:g}, the batch {recipe.batch_size} and the weights move {recipe.iterations}
times; the paper has 1e-5, 16 and 1000 (COCO-Stuff). So small a tower needs larger steps. &lambda; is
{LAMBDAS["ip_clip_ma_dis"]:g}; it is 1 in the paper and 0.1 in the released configuration.</li>
<li>The proposals are superpixels merged into regions, made from pixels alone. The paper's come from a trained
generator, whose scores then join the ensemble of Eq. 9; here the scores are CLIP's alone, as in the paper's
Table 2.</li>
<li>Sub-images of mask &amp; crop have 64&times;64 pixels, the small CLIP's native size, so their cost
compares otherwise than 224&times;224 with 480&times;480.</li>
</ul>
</body>
</html>
"""


def _extend(curve: dict[str, list[float]], iterations: int, evaluation: Evaluation) -> None:
    curve["iterations"].append(iterations)
    curve["miou_seen"].append(evaluation.scores["miou_seen"])
    curve["miou_unseen"].append(evaluation.scores["miou_unseen"])


def _numbers(seed: int, row: Row) -> dict[str, float]:
    scores = {key: float(row.evaluation.scores[key]) for key in SCORES}  # type: ignore[literal-required]
    return {"seed": seed, **scores, "gmacs": row.gmacs, "seconds_per_image": row.evaluation.seconds}


def _summary(name: str, per_seed: list[dict[str, float]]) -> dict[str, Any]:
    """One entry of metrics.json's "rows"."""
    columns = {key: [numbers[key] for numbers in per_seed] for key in per_seed[0] if key != "seed"}
    means = {key: statistics.mean(column) for key, column in columns.items()}
    std = {key: statistics.stdev(columns[key]) if len(per_seed) > 1 else 0.0 for key in SCORES}
    return {"name": name, **means, "std": std, "per_seed": per_seed}


def _score(row: dict[str, Any], key: str, several: bool) -> str:
    return f"{row[key]:.1f} ± {row['std'][key]:.1f}" if several else f"{row[key]:.1f}"


def _spread(result: dict[str, Any]) -> str:
    seeds = {len(row["per_seed"]) for row in result["rows"]}
    count = " to ".join(str(n) for n in sorted(seeds))
    return f"; mean ± sample standard deviation over {count} seeds" if len(result["seeds"]) > 1 else ""


def _smooth(values: list[float], window: int = 10) -> list[float]:
    """Mean of the last `window` values."""
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Replace the file as a whole."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
