"""The paper's Table 4(a) on the embedded world: `maft-adapter demo`.

Four rows, evaluated alike on the same held-out scenes with the same proposals and the names of all classes:
the frozen CLIP with mask & crop; IP-CLIP without fine-tuning; fine-tuned with L_ma; fine-tuned with L_ma +
L_dis. The fine-tuning sees scenes of its own, and masks and names of seen classes only.
"""

from __future__ import annotations

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
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from .. import show
from ..adapt import make_mask_aware, valid_masks
from ..baselines import encode_crops
from ..checkpoint import replace_file, save_mask_aware
from ..classify import class_scores, label_map, text_classifier
from ..extras import extra
from ..finetune import Sample, finetune
from ..losses import MAFTLoss
from ..macs import count_macs
from ..metrics import SegmentationMetrics, SegmentationScores
from ..proposals.merging import propose_masks
from .clip import load_clip, preprocess, tokenize
from .report import SCORES, TITLES, curves_figure, report_page, table
from .scenes import CLASSES, SEEN, THINGS, UNSEEN, Scene, render_scene

with extra("demo"):
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings of one run; everything that is not here is the default of `finetune`.

    Attributes:
        start_layer: L of the small CLIP's 12 blocks.
        iterations, lr, batch_size: of the fine-tuning.
        distillation_weight: lambda of the row with L_dis.
        min_contrast: of the proposals that the fine-tuning sees, see `propose_masks`; every row is evaluated with
            all proposals.
        train_scenes, eval_scenes: scenes a seed.
        curve_every: iterations between two evaluations of the curves.
    """

    start_layer: int = 0
    iterations: int = 200
    lr: float = 1e-3
    batch_size: int = 16
    distillation_weight: float = 1.0
    min_contrast: float = 0.5  # fragments would teach to deny what they are part of, against the teacher's word
    train_scenes: int = 480
    eval_scenes: int = 200
    curve_every: int = 50


RECIPE = Recipe()
QUICK = replace(RECIPE, iterations=16, train_scenes=32, eval_scenes=24, curve_every=8)
TEMPLATES = ("a picture of {}", "a photo of {}", "{}")
# First entries of the scenes' seeds: no scene serves twice, nor did one serve in `train_clip`.
SPLITS = {"evaluation": 8_000_000, "fine-tuning": 9_000_000}
TOWER = "tower.safetensors"
COUNTED_SCENES = 8  # multiply-accumulates are the mean of these; they vary with the number of proposals only
NAMES = [f"{name} *" if name in UNSEEN else name for name in CLASSES]  # as the figures show them

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
        clip: the row's CLIP, fine-tuned.
        encode: its encoder.
        evaluation: on the held-out scenes.
        gmacs: 1e9 multiply-accumulates of the encoder for all proposals of an image.
        losses: of every iteration; empty without fine-tuning.
        curve: "iterations", and "miou_seen" and "miou_unseen" after them; empty without fine-tuning.
    """

    name: str
    clip: Any
    encode: Encode
    evaluation: Evaluation
    gmacs: float
    losses: dict[str, list[float]]
    curve: dict[str, list[float]]


def run_demo(
    out: Path, seeds: Sequence[int], quick: bool = False, clip: Any = None, start_layer: int | None = None
) -> dict[str, Any]:
    """Run all rows for every seed and write metrics.json, report.html, its figures and a tower to `out`.

    tower.safetensors is what the first seed's last row, L_ma + L_dis, was fine-tuned to; that of seed 0 is the one that
    `load_clip(mask_aware=True)` has. metrics.json is written after every row, the rest after every seed, each replaced
    as a whole, so a run that is stopped leaves what was finished, and of an earlier run in `out` what it did not come
    to replace.
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
        of the whole run; "quick"; "recipe"; the losses of every iteration as "history"; mIoU over them as "curves".

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
        "rows": [], "seeds": seeds, "seconds": 0.0, "quick": quick, "recipe": asdict(recipe),
        "history": [], "curves": [],
    }  # fmt: skip
    finished: dict[str, list[dict[str, float]]] = {}
    figures: dict[str, bytes] = {}

    def save() -> None:
        result["seconds"] = time.monotonic() - started
        replace_file(out / "metrics.json", (json.dumps(result, indent=1) + "\n").encode())

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
                save_mask_aware(rows["ip_clip_ma_dis"].clip.visual, out / TOWER)
                figures["figure1"] = _png(figure_1(scenes, rows, clip))
                figures["label_maps"] = _png(label_maps_figure(scenes, rows))
            figures["curves"] = _png(curves_figure(result))
            for name, png in figures.items():
                replace_file(out / f"{name}.png", png)
            replace_file(out / "report.html", report_page(result, figures).encode())
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

    def finish(name: str, clip: Any, encode: Encode, losses: Any = None, curve: Any = None) -> Row:
        evaluation = score(encode, TITLES[name])
        if curve:
            _extend(curve, recipe.iterations, evaluation)
        bar = tqdm(scenes[:COUNTED_SCENES], desc="counting multiply-accumulates", leave=False)
        counts = [count_encoder(encode, example) for example in bar]
        return Row(name, clip, encode, evaluation, statistics.mean(counts) / 1e9, losses or {}, curve or {})

    yield finish("frozen_mask_crop", clip, partial(encode_crops, clip))
    ip_clip = copy.deepcopy(clip)
    make_mask_aware(ip_clip.visual, recipe.start_layer)
    untuned = finish("ip_clip", ip_clip, partial(encode_mask_aware, ip_clip))
    yield untuned

    samples = finetuning_samples(prepare(seed, "fine-tuning", recipe.train_scenes, recipe.min_contrast))
    seen_text = text_classifier(clip, tokenize, SEEN, TEMPLATES)  # (C_seen, D)
    teacher_scores = image_scores(ip_clip, samples, seen_text, scale)  # (S, C_seen)
    for name, weight in {"ip_clip_ma": 0.0, "ip_clip_ma_dis": recipe.distillation_weight}.items():
        student = copy.deepcopy(ip_clip)
        encode = partial(encode_mask_aware, student)
        curve: dict[str, list[float]] = {"iterations": [], "miou_seen": [], "miou_unseen": []}
        _extend(curve, 0, untuned.evaluation)

        def watch(done: int, _: object, encode: Encode = encode, curve: dict[str, list[float]] = curve) -> None:
            if done % recipe.curve_every == 0 and done < recipe.iterations:
                _extend(curve, done, score(encode, f"after {done} iterations"))

        history = finetune(
            student, samples, seen_text,
            iterations=recipe.iterations, batch_size=recipe.batch_size, lr=recipe.lr,
            loss=MAFTLoss(distillation_weight=weight), teacher_scores=teacher_scores,
            seed=seed, on_iteration=watch,
        )  # fmt: skip
        losses = {key: [step[key] for step in history] for key in history[0]}
        yield finish(name, student, encode, losses, curve)


def prepare(
    seed: int, split: Literal["evaluation", "fine-tuning"], count: int, min_contrast: float = 0.0
) -> list[Example]:
    """Draw the scenes of a seed and propose masks, on all cores.

    Args:
        seed: non-negative.
        split: the two share no scene, and neither do two seeds.
        count: number of scenes, 96x96 pixels each.
        min_contrast: of the proposals, see `propose_masks`.
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
        propose = partial(propose_masks, min_contrast=min_contrast)
        proposals = pool.imap(propose, [scene.image for scene in scenes], chunksize=4)
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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
