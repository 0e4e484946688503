"""The paper's Table 4(a) on the embedded world: `maft-adapter demo`.

Four rows, evaluated alike on the same held-out scenes with the same proposals and the names of all classes:
the frozen CLIP with mask & crop; IP-CLIP without fine-tuning; fine-tuned with L_ma; fine-tuned with L_ma +
L_dis. The fine-tuning sees scenes of its own, and masks and names of seen classes only. Scenes, fine-tuning and
evaluation are those of `maft-adapter finetune` and `evaluate` on the data set shapes.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from .. import show
from ..adapt import make_mask_aware
from ..checkpoint import replace_file, save_mask_aware
from ..classify import class_scores, text_classifier
from ..data import Item, open_dataset
from ..data.datasets import ShapesDataset
from ..evaluate import Evaluator, Scorer, crop_scorer, figures, mask_aware_scorer
from ..extras import extra
from ..finetune import Sample, SegmentationSamples, finetune
from ..losses import MAFTLoss
from ..macs import count_macs
from ..models import Model, load_model, weights_digest
from ..pictures import read_picture
from ..proposals import Proposals, Proposer
from ..proposals.merging import Superpixels
from .clip import load_clip
from .report import SCORES, TITLES, curves_figure, report_page, table
from .scenes import CLASSES, THINGS, UNSEEN

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
        train_scenes, eval_scenes: scenes a seed, at most those of the data set shapes.
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
TOWER = "tower.safetensors"
COUNTED_SCENES = 8  # multiply-accumulates and times are of these; they vary with the number of proposals only
NAMES = [f"{name} *" if name in UNSEEN else name for name in CLASSES]  # as the figures show them


@dataclass(frozen=True)
class Scenes(ShapesDataset):
    """Scenes of the data set shapes that are drawn, and the proposer of the proposals that they have.

    Attributes:
        items: the scenes.
        proposals: of each scene, by its name.
        settings: of the proposals.
    """

    items: Sequence[Item] = field(repr=False)
    proposals: Mapping[str, Proposals] = field(repr=False)
    settings: str

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        return self.proposals[name]


class Evaluation(NamedTuple):
    """The figures of all scenes (see `maft_adapter.evaluate.FIGURES`) and each scene's (H, W) label map."""

    scores: dict[str, float]
    label_maps: list[NDArray[np.int64]]


class Row(NamedTuple):
    """One finished row of one seed.

    Attributes:
        name: key of `TITLES`.
        model: the row's CLIP, fine-tuned.
        scorer: what gives its class scores.
        evaluation: on the held-out scenes.
        gmacs: 1e9 multiply-accumulates for all proposals of an image.
        seconds: median time for all proposals of an image.
        losses: of every iteration; empty without fine-tuning.
        curve: "iterations", and "miou_seen" and "miou_unseen" after them; empty without fine-tuning.
    """

    name: str
    model: Model
    scorer: Scorer
    evaluation: Evaluation
    gmacs: float
    seconds: float
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
        "seconds_per_image" of the classification of all proposals of an image, and "per_seed"; "seeds"; "seconds"
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
    model = frozen_model(recipe.start_layer, clip)
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
            scenes = draw_scenes(seed, "val", recipe.eval_scenes, Superpixels())
            rows: dict[str, Row] = {}
            for row in run_seed(seed, scenes, recipe, model):
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
                save_mask_aware(rows["ip_clip_ma_dis"].model.clip.visual, out / TOWER)
                figures["figure1"] = _png(figure_1(scenes, rows))
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


def frozen_model(start_layer: int = RECIPE.start_layer, clip: Any = None) -> Model:
    """The small CLIP as it is before any fine-tuning, mask-aware.

    Args:
        start_layer: L in 0..12.
        clip: a CLIP of this world in eval mode, which is copied; by default `load_clip()`.

    Example:
        >>> frozen_model().source
        'embedded frozen CLIP, start layer 0, weights ...'
    """
    clip = load_clip() if clip is None else copy.deepcopy(clip)
    make_mask_aware(clip.visual, start_layer)
    source = f"embedded frozen CLIP, start layer {start_layer}, weights {weights_digest(clip)}"
    return load_model()._replace(clip=clip, logit_scale=float(clip.logit_scale.detach().exp()), source=source)


def run_seed(seed: int, scenes: Scenes, recipe: Recipe, model: Model) -> Iterator[Row]:
    """The rows of one seed, in the order of the table, each as soon as it is finished.

    Args:
        seed: of the fine-tuning and its scenes.
        scenes: held out, for the evaluation.
        recipe: sizes and settings.
        model: of `frozen_model`, which stays unchanged.
    """
    text = text_classifier(model.clip, model.tokenizer, scenes.class_names, model.templates)  # (C, D)

    def finish(name: str, model: Model, scorer: Scorer, losses: Any = None, curve: Any = None) -> Row:
        evaluation = evaluate(scenes, scorer, TITLES[name])
        if curve:
            _extend(curve, recipe.iterations, evaluation)
        gmacs, seconds = cost(scenes, scorer)
        return Row(name, model, scorer, evaluation, gmacs, seconds, losses or {}, curve or {})

    yield finish("frozen_mask_crop", model, crop_scorer(model, text, "mask_crop"))
    untuned = finish("ip_clip", model, mask_aware_scorer(model, text))
    yield untuned

    train = draw_scenes(seed, "train", recipe.train_scenes, Superpixels(min_contrast=recipe.min_contrast))
    dataset = SegmentationSamples(train, model, train.seen, train)
    samples = [dataset[i] for i in range(len(dataset))]
    seen_names = [train.class_names[k] for k in train.seen]
    seen_text = text_classifier(model.clip, model.tokenizer, seen_names, model.templates)  # (C_seen, D)
    teacher_scores = image_scores(model.clip, samples, seen_text, model.logit_scale)  # (S, C_seen)
    for name, weight in {"ip_clip_ma": 0.0, "ip_clip_ma_dis": recipe.distillation_weight}.items():
        student = model._replace(clip=copy.deepcopy(model.clip))
        scorer = mask_aware_scorer(student, text)
        curve: dict[str, list[float]] = {"iterations": [], "miou_seen": [], "miou_unseen": []}
        _extend(curve, 0, untuned.evaluation)

        def watch(done: int, _: object, scorer: Scorer = scorer, curve: dict[str, list[float]] = curve) -> None:
            if done % recipe.curve_every == 0 and done < recipe.iterations:
                _extend(curve, done, evaluate(scenes, scorer, f"after {done} iterations"))

        history = finetune(
            student.clip, samples, seen_text,
            iterations=recipe.iterations, batch_size=recipe.batch_size, lr=recipe.lr,
            loss=MAFTLoss(distillation_weight=weight), teacher_scores=teacher_scores,
            seed=seed, on_iteration=watch,
        )  # fmt: skip
        losses = {key: [step[key] for step in history] for key in history[0]}
        yield finish(name, student, scorer, losses, curve)


def draw_scenes(seed: int, split: str, count: int, proposals: Proposer) -> Scenes:
    """Draw the first scenes of a seed and propose masks, on all cores.

    Args:
        seed: non-negative.
        split: "train" or "val"; the two share no scene, and neither do two seeds.
        count: number of scenes, 96x96 pixels each.
        proposals: what proposes, the same whatever process it runs in.
    """
    dataset = open_dataset(f"shapes:{seed}", split=split)
    # Ctrl-C reaches every process of the terminal: the workers inherit that it is not theirs to handle.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pool = multiprocessing.get_context("spawn").Pool(min(count, os.cpu_count() or 1))
    finally:
        signal.signal(signal.SIGINT, handler)
    with pool:
        items = [dataset[i] for i in tqdm(range(count), desc=f"drawing scenes ({split})")]
        made = pool.imap(proposals, [read_picture(item.picture) for item in items], chunksize=4)
        bar = tqdm(made, desc=f"proposing masks ({split})", total=count)
        named = {item.name: each for item, each in zip(items, bar, strict=True)}
    return Scenes(**vars(dataset), items=items, proposals=named, settings=proposals.settings)


@torch.no_grad()
def image_scores(clip_model: Any, samples: Sequence[Sample], text: Tensor, logit_scale: float) -> Tensor:
    """(len(samples), C) class scores of whole images: the teacher's, if the model is not fine-tuned yet."""
    images = torch.stack([sample.image for sample in samples])  # (S, 3, H, W)
    batches = tqdm(images.split(16), desc="scores of the teacher")
    embeddings = torch.cat([clip_model.encode_image(batch) for batch in batches])  # (S, D)
    return class_scores(embeddings, text, logit_scale)


def evaluate(scenes: Scenes, scorer: Scorer, title: str) -> Evaluation:
    """Segment every scene, the same way for every row, as `Evaluator` does.

    Args:
        scenes: held out.
        scorer: what gives the row's A^c.
        title: of the progress bar.
    """
    evaluator = Evaluator(scenes, scenes, scorer)
    results = [evaluator(item) for item in tqdm(scenes, desc=title, leave=None)]
    pixels, masks = (torch.stack(counts).sum(0) for counts in zip(*((r.pixels, r.masks) for r in results), strict=True))
    return Evaluation(figures(pixels, masks, scenes.unseen), [result.prediction.numpy() for result in results])


def cost(scenes: Scenes, scorer: Scorer) -> tuple[float, float]:
    """1e9 multiply-accumulates, and median seconds, for all proposals of a scene, over `COUNTED_SCENES` of them."""
    counts, seconds = [], []
    for item in tqdm(scenes.items[:COUNTED_SCENES], desc="counting multiply-accumulates", leave=False):
        ask = partial(scorer, read_picture(item.picture), torch.from_numpy(scenes.proposals[item.name].masks))
        started = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - started)
        counts.append(count_macs(ask))
    return statistics.mean(counts) / 1e9, statistics.median(seconds)


def typical_proposals(scenes: Scenes) -> tuple[Item, list[int], list[list[int]]]:
    """The paper's three typical proposals, chosen by the ground truth alone, whatever any model says of them.

    Of all things in all scenes, the one for which the worst of three proposals is best by IoU: the thing; one
    stuff beside it, holding less than a tenth of the thing; both together, each at least a quarter of it.

    Returns:
        The scene, the indices of the three, and the classes of each.
    """
    best: tuple[float, Item, list[int], list[list[int]]] | None = None
    for item in scenes:
        masks, present = scenes.proposals[item.name].masks, np.unique(item.labels).tolist()
        pixels = np.eye(len(CLASSES))[item.labels.ravel()]  # (H*W, C)
        counts = masks.reshape(len(masks), -1) @ pixels  # (N, C)
        areas, totals = counts.sum(1), pixels.sum(0)  # (N,), (C,)
        for thing in (k for k in present if k < len(THINGS)):
            for stuff in (k for k in present if k >= len(THINGS)):
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
                    best = quality, item, indices, [[thing], [stuff], [thing, stuff]]
    assert best is not None, "every scene has a thing and a stuff"
    return best[1:]


def figure_1(scenes: Scenes, rows: dict[str, Row]) -> Figure:
    """The paper's Figure 1: an object, its background, and both, for the frozen and the fine-tuned CLIP."""
    item, indices, correct = typical_proposals(scenes)
    picture, masks = read_picture(item.picture), scenes.proposals[item.name].masks[indices]  # (H, W, 3), (3, H, W)
    scores = {
        title: rows[name].scorer(picture, torch.from_numpy(masks))[0].numpy()  # (3, C)
        for title, name in (
            ("frozen CLIP (mask & crop)", "frozen_mask_crop"),
            ("mask-aware CLIP", "ip_clip_ma_dis"),
        )
    }
    titles = ["object", "background", "object + background"]
    return show.typical_proposals(picture, masks, scores, NAMES, correct, titles)


def label_maps_figure(scenes: Scenes, rows: dict[str, Row], count: int = 4) -> Figure:
    """Label maps of the first `count` scenes in which an unseen class is visible."""
    shown = [i for i, item in enumerate(scenes) if np.isin(item.labels, scenes.unseen).any()][:count] or [0]
    maps: dict[str, list[ArrayLike]] = {"ground truth": [scenes[i].labels for i in shown]}
    titles = {
        "frozen_mask_crop": "frozen, mask & crop",
        "ip_clip": "IP-CLIP",
        "ip_clip_ma_dis": "+ L_ma + L_dis",
    }
    for name, title in titles.items():
        maps[title] = [rows[name].evaluation.label_maps[i] for i in shown]
    return show.label_maps([read_picture(scenes[i].picture) for i in shown], maps, NAMES)


def _extend(curve: dict[str, list[float]], iterations: int, evaluation: Evaluation) -> None:
    curve["iterations"].append(iterations)
    curve["miou_seen"].append(evaluation.scores["miou_seen"])
    curve["miou_unseen"].append(evaluation.scores["miou_unseen"])


def _numbers(seed: int, row: Row) -> dict[str, float]:
    scores = {key: row.evaluation.scores[key] for key in SCORES}
    return {"seed": seed, **scores, "gmacs": row.gmacs, "seconds_per_image": row.seconds}


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
