"""The paper's tables by one command: every row is a run of `maft-adapter finetune` and one of `evaluate`.

So the rows are what these commands give, on the embedded world or on any data set, and a run that was stopped goes on.
Rows that share a run make it once. One table came after the paper, `bank`, a memory of labelled masks beside the words.
"""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import replace_file
from .evaluate import PUBLISHED
from .extras import extra

with extra("demo"):
    from matplotlib.figure import Figure

__all__ = ["NAMES", "TABLES", "World", "claim", "measure", "page", "plot", "text", "write"]

# Stands in the options of a row for the folder of the run with the defaults.
DEFAULT_RUN = "DEFAULT_RUN"
ENSEMBLE = "0.7"
# The generator of the embedded world; on a data set it is what the user names.
GENERATOR = "mask2former:shapes"


class Column(NamedTuple):
    """A figure of `maft_adapter.evaluate.FIGURES`, its heading, and options of `evaluate` that it has to itself."""

    heading: str
    figure: str
    options: tuple[str, ...] = ()


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        name: as it is printed.
        tune: options of `finetune`; None: the CLIP is not fine-tuned.
        score: options of `evaluate`.
        published: the paper's figures, one for each column; empty if it has none.
    """

    name: str
    tune: tuple[str, ...] | None
    score: tuple[str, ...] = ()
    published: tuple[float | None, ...] = ()


class Table(NamedTuple):
    """One table.

    Attributes:
        title: what it shows.
        source: of the published figures.
        columns, rows: of it.
        others: rows that others published, with their figures.
        said: what the paper concludes.
        x: for each row, where it is plotted; empty for a plot of bars.
    """

    title: str
    source: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    others: tuple[tuple[str, tuple[float | None, ...]], ...] = ()
    said: str = ""
    x: tuple[float, ...] = ()


@dataclass(frozen=True)
class World:
    """What the experiments run on.

    Attributes:
        data: a data set, see `maft_adapter.data.open_dataset`; the embedded world's seed is the run's.
        where: options that say where it is, such as --root.
        model: options that say which CLIP it is, such as --model.
        proposals: of both, where a table does not say otherwise.
        generator: proposals with class scores (A^p), for Tables 1 and 2, and another generator for Table 5; None for
            the embedded world's own. On data sets Tables 1 and 2 need one, Table 5 takes SAM without.
        tune: options of `finetune` alone, such as --iterations.
        score: options of `evaluate` alone, such as --trained-on.
        quick: few iterations and pictures, for a first look; the figures mean nothing.
    """

    data: str = "shapes"
    where: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    proposals: str = "superpixels"
    generator: str | None = None
    tune: tuple[str, ...] = ()
    score: tuple[str, ...] = ()
    quick: bool = False

    @property
    def drawn(self) -> bool:
        """Whether it is the embedded world."""
        return self.data == "shapes"


_ZERO_SHOT = (Column("seen", "miou_seen"), Column("unseen", "miou_unseen"), Column("hIoU", "hiou"))
_ALL = (*_ZERO_SHOT, Column("mIoU", "miou"))
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#666666", "#CC79A7", "#E69F00")  # of the columns, in the plots
_CROPS = ("--encoder", "mask-and-crop")
_UPPER_BOUND = "upper-bound"


def _table_1(world: World) -> Table:
    return _with_generator(world, "1", ("--ensemble", ENSEMBLE), "with the ensemble of Eq. 9")


def _table_2(world: World) -> Table:
    return _with_generator(world, "2", (), "without the ensemble, CLIP's scores alone")


def _with_generator(world: World, number: str, ensemble: tuple[str, ...], how: str) -> Table:
    generator = world.generator or (GENERATOR if world.drawn else None)
    if generator is None:
        raise ValueError(f"Table {number} on {world.data} needs --generator, proposals with class scores")
    proposals = ("--proposals", generator)
    published = {
        row.method: (row.miou_seen, row.miou_unseen, row.hiou)
        for row in PUBLISHED.get("coco-stuff" if world.drawn else world.data, ())
        if row.source.endswith(f"Table {number}")
    }
    of = "FreeSeg" if number == "1" else "FreeSeg, no ensemble"
    with_maft = of.replace("FreeSeg", "FreeSeg + MAFT")
    return Table(
        title=f"A mask generator's proposals with and without MAFT, {how}",
        source=f"Table {number}, FreeSeg's rows",
        columns=_ZERO_SHOT,
        rows=(
            Row("generator, frozen CLIP", None, (*_CROPS, *proposals, *ensemble), published.get(of, ())),
            Row("generator + MAFT", proposals, (*proposals, *ensemble), published.get(with_maft, ())),
        ),
        others=tuple((name, figures) for name, figures in published.items() if name not in (of, with_maft)),
        said="MAFT raises every host, unseen classes most, with the ensemble and, further, without.",
    )


def _table_3(world: World) -> Table:
    if world.drawn:
        # Fine-tuned on balls, boxes and stars on grass, sand and water.
        columns = tuple(
            Column(heading, "miou", ("--data", name))
            for heading, name in (
                ("the same words", "shapes-a"), ("other nouns", "shapes-b"), ("all", "shapes"),
                ("nouns alone", "shapes-nouns"),
            )
        )  # fmt: skip
        rows: tuple[Row, ...] = (
            Row("frozen CLIP", None, _CROPS),
            Row("IP-CLIP", None),
            Row("+ MAFT", ("--data", "shapes-a")),
        )
        others: tuple[tuple[str, tuple[float | None, ...]], ...] = ()
    else:
        columns, published = _open_vocabulary("Table 3")
        rows = (
            Row("frozen CLIP", None, _CROPS, published.pop("FreeSeg")),
            Row("+ MAFT", (), (), published.pop("FreeSeg + MAFT")),
        )
        others = tuple(published.items())
    return Table(
        title="Open vocabulary: fine-tuned on one vocabulary, evaluated on others",
        source="Table 3, FreeSeg's rows",
        columns=columns,
        rows=rows,
        others=others,
        said="What is learned on one vocabulary holds for others.",
    )


def _table_4a(world: World) -> Table:
    return Table(
        title="Components",
        source="Table 4(a), COCO-Stuff",
        columns=_ZERO_SHOT,
        rows=(
            Row("frozen CLIP, mask & crop", None, _CROPS, (22.3, 29.3, 25.3)),
            Row("+ IP-CLIP", None, (), (29.4, 36.2, 32.4)),
            Row("+ L_ma", ("--distillation-weight", "0"), (), (39.9, 47.1, 43.1)),
            Row("+ L_ma + L_dis", (), (), (40.1, 49.7, 44.4)),
        ),
        said="Masks alone help, fine-tuning helps most, L_dis keeps the unseen classes.",
    )


def _table_4b(world: World) -> Table:
    kinds = {
        "L1": ("l1", (38.6, 45.8, 41.8)), "L2": ("l2", (40.0, 45.8, 42.7)),
        "SmoothL1": ("smooth_l1", (39.9, 47.1, 43.1)), "KL": ("kl", (40.9, 41.8, 41.3)),
    }  # fmt: skip
    without = ("--distillation-weight", "0")
    return Table(
        title="Kinds of L_ma, without L_dis",
        source="Table 4(b), COCO-Stuff",
        columns=_ZERO_SHOT,
        rows=tuple(
            Row(name, without if kind == "smooth_l1" else (*without, "--loss", kind), (), published)
            for name, (kind, published) in kinds.items()
        ),
        said="SmoothL1 is best on unseen classes, KL on seen ones and worst on unseen ones.",
    )


def _table_4c(world: World) -> Table:
    published = {
        500: (37.7, 47.0), 1000: (40.0, 49.7), 2000: (41.1, 47.6), 3000: (41.4, 46.5), 4000: (41.5, 46.1),
        5000: (42.0, 45.7),
    }  # fmt: skip
    # The recipe of the embedded world has a fifth of the paper's iterations.
    default, counts = (200, (50, 100, 200, 400)) if world.drawn else (None, tuple(published))
    own = {count: published.get(5 * count if world.drawn else count, ()) for count in counts}
    return Table(
        title="Iterations",
        source="Table 4(c), COCO-Stuff" + (", of five times the iterations" if world.drawn else ""),
        columns=_ZERO_SHOT[:2],
        rows=tuple(
            Row(str(count), () if count == default else ("--iterations", str(count)), (), figures)
            for count, figures in own.items()
        ),
        said="Seen classes go on rising, unseen ones are best early and fall.",
        x=counts,
    )


def _table_4d(world: World) -> Table:
    rows = {
        "none": (40.6, 44.7, 42.5), "+cls": (40.7, 44.7, 42.7), "+pos": (40.6, 44.9, 42.8), "+mlp": (40.3, 48.7, 44.1),
        "+conv": (40.0, 49.7, 44.3), "+proj": (40.2, 49.1, 44.2),
    }  # fmt: skip
    return Table(
        title="Frozen units, each row freezing one more",
        source="Table 4(d), COCO-Stuff",
        columns=_ZERO_SHOT,
        rows=tuple(
            Row(name, () if name == "+conv" else ("--freeze", name), (), published) for name, published in rows.items()
        ),
        said="Freezing the MLPs is what keeps the unseen classes.",
    )


def _table_4e(world: World) -> Table:
    rows = {
        0: (39.3, 46.4, 42.6), 2: (39.2, 46.4, 42.5), 4: (39.5, 46.6, 42.6), 6: (40.0, 47.8, 43.6),
        8: (40.0, 49.7, 44.3), 10: (39.9, 45.7, 42.6),
    }  # fmt: skip
    default = 0 if world.drawn and not world.model else None
    return Table(
        title="Start layer L",
        source="Table 4(e), COCO-Stuff, of 12 blocks",
        columns=_ZERO_SHOT,
        rows=tuple(
            Row(f"L = {layer}", () if layer == default else ("--start-layer", str(layer)), (), published)
            for layer, published in rows.items()
        ),
        said="A late start keeps context, L = 8 is best, and L = 10 loses the mask.",
        x=tuple(rows),
    )


def _table_5(world: World) -> Table:
    published = {
        row.method: (row.miou_seen, row.miou_unseen, row.hiou, row.miou)
        for row in PUBLISHED.get("coco-stuff" if world.drawn else world.data, ())
        if row.source.endswith("Table 5(a)")
    }
    other = world.generator or (GENERATOR if world.drawn else "sam")
    proposals = ("--proposals", other)
    return Table(
        title=f"Another mask generator: {other}",
        source="Table 5(a), SAM-H" + (" on COCO-Stuff" if world.drawn else ""),
        columns=_ALL,
        rows=(
            Row("frozen CLIP", None, (*_CROPS, *proposals), published.get("SAM-H", ())),
            Row("+ MAFT", proposals, proposals, published.get("SAM-H + MAFT", ())),
        ),
        said="MAFT takes any generator's masks, and gains from better ones.",
    )


def _table_6(world: World) -> Table:
    if world.drawn:
        raise ValueError("the embedded world has one CLIP, no other was trained: Table 6 needs a data set, give --data")
    columns, others = _open_vocabulary("Table 6")
    towers = {
        "ViT-L": ("--model", "ViT-L-14-quickgelu", "--pretrained", "openai"),
        "RN50": ("--model", "RN50-quickgelu", "--pretrained", "openai"),
    }
    rows = []
    for tower, options in towers.items():
        rows.append(Row(f"frozen CLIP, {tower}", None, (*_CROPS, *options), others.pop(f"FreeSeg, {tower}")))
        rows.append(Row(f"+ MAFT, {tower}", options, options, others.pop(f"FreeSeg + MAFT, {tower}")))
    return Table(
        title="Other towers",
        source="Table 6, FreeSeg's rows",
        columns=columns,
        rows=tuple(rows),
        others=tuple(others.items()),
        said="MAFT raises larger towers and ResNets, too.",
    )


def _open_vocabulary(source: str) -> tuple[tuple[Column, ...], dict[str, tuple[float | None, ...]]]:
    """A column for each of the paper's five sets, and what a table of it published for them, by method."""
    sets = {"A-847": "ade20k-847", "A-150": "ade20k-150", "PC-459": "context-459", "PC-59": "context-59",
            "PAS-20": "voc-20"}  # fmt: skip
    mious = [{row.method: row.miou for row in PUBLISHED[name] if row.source.endswith(source)} for name in sets.values()]
    methods = dict.fromkeys(method for rows in mious for method in rows)
    columns = tuple(Column(heading, "miou", ("--data", name)) for heading, name in sets.items())
    return columns, {method: tuple(rows.get(method) for rows in mious) for method in methods}


def _table_7(world: World) -> Table:
    return Table(
        title="Upper bound: the IoU with the ground truth in place of A^c",
        source="Table 7, COCO-Stuff",
        columns=_ALL,
        rows=(
            Row("MAFT", (), (), (43.3, 50.4, 46.5, 43.9)),
            Row("upper bound", None, ("--encoder", _UPPER_BOUND), (77.2, 82.1, 79.6, 77.6)),
        ),
        said="The proposals would allow far more than any classifier makes of them.",
    )


def _table_8(world: World) -> Table:
    voc = world.data.startswith("voc")
    return Table(
        title="Self-training: pseudo-labels of the unseen classes",
        source=f"Table 8, {'Pascal-VOC' if voc else 'COCO-Stuff'}",
        columns=_ALL,
        rows=(
            Row("MAFT", (), (), (91.4, 81.8, 86.3, 89.0) if voc else (43.3, 50.4, 46.5, 43.9)),
            Row(
                "MAFT + ST", ("--self-training", DEFAULT_RUN), (),
                (90.0, 86.3, 88.1, 89.1) if voc else (44.1, 55.2, 49.0, 45.0),
            ),
        ),
        said="Pseudo-labels of unseen classes raise them, where training pictures show them.",
    )  # fmt: skip


TABLES: dict[str, Callable[[World], Table]] = {
    "1": _table_1, "2": _table_2, "3": _table_3, "4a": _table_4a, "4b": _table_4b, "4c": _table_4c, "4d": _table_4d,
    "4e": _table_4e, "5": _table_5, "6": _table_6,
    "7": _table_7, "8": _table_8,
}  # fmt: skip
BANK = "bank"
NAMES = (*TABLES, BANK)
_BANK_SEED = 600  # of the embedded world's seed 0: scenes that no other table looks at, and no choice was made on
_BANK_SIZES = (0, 1, 5, 20)  # masks a class
_FEW = 24  # pictures of a quick run


@dataclass
class Runs:
    """Runs of the two commands below one folder, each made once.

    Attributes:
        out: the folder; `runs/` and `scores/` are made in it.
        world: what they run on.
        seed: of data and training.
    """

    out: Path
    world: World
    seed: int
    made: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def scores(self, row: Row, column: Column) -> dict[str, Any]:
        """metrics.json of a row under a column's options, read or made.

        Raises:
            RuntimeError: a command failed; it has said why.
        """
        options = (*row.score, *column.options)
        if row.tune is not None:
            run = self.run(row.tune)
            options = (*options, "--checkpoint", str(run))
        # A tower that was not fine-tuned has no checkpoint to say where it starts.
        folder = self.out / "scores" / self._name(options)
        if folder not in self.made:
            if not (folder / "metrics.json").exists():
                given = [*self.world.score, *(("--limit", "6") if self.world.quick else ())]
                model = () if _UPPER_BOUND in options else self.world.model
                self._call("evaluate", [*self._shared(options, model), *given], folder, folder / "metrics.json")
            self.made[folder] = json.loads((folder / "metrics.json").read_bytes())
        return self.made[folder]

    def run(self, options: Sequence[str]) -> Path:
        """The folder of a fine-tuning with these options, read or made.

        Raises:
            RuntimeError: as `scores`.
        """
        options = [str(self.run(())) if option == DEFAULT_RUN else option for option in options]
        folder = self.out / "runs" / self._name(options)
        if not (folder / "finished").exists():
            given = [*self._shared([*self.world.tune, *options], self.world.model)]
            given += ["--seed", str(self.seed), "--resume"]
            if self.world.quick:
                most = int(options[options.index("--iterations") + 1]) if "--iterations" in options else 200
                given += ["--limit", "16", "--batch-size", "4", "--iterations", str(max(1, most // 50))]
            self._call("finetune", given, folder, folder / "tower.safetensors")
            (folder / "finished").touch()
        return folder

    def _shared(self, options: Sequence[str], model: Sequence[str]) -> list[str]:
        options, proposals = list(options), self.world.proposals
        if "--proposals" in options:
            proposals = options[options.index("--proposals") + 1]
        given = [*self.world.where, *model, "--proposals", self.world.proposals]
        if proposals != "ground-truth":  # which are not kept
            given += ["--keep", str(self.out / "proposals")]
        data = self.world.data
        if "--data" in options:  # the last one would win, but for the seed of the embedded world
            at = options.index("--data")
            data = options[at + 1]
            del options[at : at + 2]
        if data.startswith("shapes"):
            data = f"{data}:{self.seed}"
        return ["--data", data, *given, *options]

    def _name(self, options: Sequence[str]) -> str:
        words = [Path(option).name if "/" in option else option for option in options]
        first = f"{'quick-' if self.world.quick else ''}{self.world.data}-seed-{self.seed}"
        return "_".join([first, *(re.sub(r"[^\w.+=-]", "-", word.strip("-")) for word in words)])

    def _call(self, command: str, options: Sequence[str], folder: Path, made: Path) -> None:
        from .cli import main

        arguments = [command, *options, "--out", str(folder)]
        with redirect_stdout(io.StringIO()):
            status = main(arguments)
        if status == 130:
            raise KeyboardInterrupt
        if status and not made.exists():  # else some pictures failed, which the result says
            raise RuntimeError(
                f"maft-adapter {' '.join(arguments)} failed with exit status {status}; it says why above"
            )


def measure(name: str, world: World, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Run a table's rows, or read what of them is in `out`.

    Args:
        name: one of `NAMES`.
        world: what it runs on.
        seeds: of data and training, at least one.
        out: folder of all runs, made if it is missing.

    Returns:
        "table", "title", "source", "said", "columns" (headings), "seeds", "quick", and "rows": "name", "published" and
        "per_seed", a list for each seed with a figure for each column, in percent, None where there is none; "failed",
        how many pictures at most a row is without, because they could not be evaluated.

    Raises:
        RuntimeError: a run failed.
    """
    if name == BANK:
        return _measure_bank(world, seeds, out)
    table = TABLES[name](world)
    runs = [Runs(out, world, seed) for seed in seeds]
    rows, failed = [], 0
    for row in table.rows:
        metrics = [[one.scores(row, column) for column in table.columns] for one in runs]
        per_seed = [[each[column.figure] for each, column in zip(of, table.columns, strict=True)] for of in metrics]
        failed = max(failed, *(len(each.get("failed", ())) for of in metrics for each in of))
        rows.append({"name": row.name, "published": list(row.published), "per_seed": per_seed})
    return {
        "table": name, "title": table.title, "source": table.source, "said": table.said, "data": world.data,
        "columns": [column.heading for column in table.columns], "seeds": list(seeds), "quick": world.quick,
        "failed": failed, "x": list(table.x), "rows": rows,
        "others": [[method, list(figures)] for method, figures in table.others],
    }  # fmt: skip


def _measure_bank(world: World, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """`measure` of the table `bank`; figures of a seed are kept in scores/, and read where they are there.

    Raises:
        RuntimeError: those that are there are of another world.
    """
    per_seed, about = [], json.loads(json.dumps(asdict(world)))
    for seed in seeds:
        path = out / "scores" / f"{'quick-' if world.quick else ''}{world.data}-seed-{seed}_{BANK}.json"
        if not path.exists():
            figures = _bank_figures(world, seed, out)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({"world": about, "figures": figures}).encode())
        kept = json.loads(path.read_bytes())
        if kept["world"] != about:
            raise RuntimeError(f"{path} was measured on {kept['world']}, not on {about}: name another folder")
        per_seed.append(kept["figures"])
    names = ["words alone", "1 mask a class", *(f"{size} masks a class" for size in _BANK_SIZES[2:])]
    return {
        "table": BANK, "title": "A memory of labelled masks beside the words, frozen CLIP and fine-tuned",
        "source": "nothing like it by the paper; on ADE20K-150, with all masks of its training part, kNN-CLIP "
        "(arXiv:2404.09447) reports 7.2 and RetCLIP (arXiv:2601.12779) 10.0 points of mIoU for FC-CLIP",
        "said": "It has no memory.", "data": world.data,
        "columns": [f"{tower}: {column.heading}" for tower in ("frozen", "tuned") for column in _ZERO_SHOT],
        "seeds": list(seeds), "quick": world.quick, "failed": 0, "x": list(range(len(_BANK_SIZES))),
        "rows": [
            {"name": name, "published": [], "per_seed": list(rows)}
            for name, *rows in zip(names, *per_seed, strict=True)
        ],
        "others": [],
    }  # fmt: skip


def _bank_figures(world: World, seed: int, out: Path) -> list[list[float | None]]:
    """A row of figures for each size, of the frozen CLIP, then of the fine-tuned one."""
    import torch
    from tqdm import tqdm

    from .bank import MaskBank, bank_scorer, labelled_embeddings
    from .classify import text_classifier
    from .data import open_dataset
    from .evaluate import Evaluator
    from .metrics import evaluation_scores
    from .models import load_model
    from .proposals import Kept, proposer
    from .shapes.demo import frozen_model

    if world.drawn and not world.model:
        models = [frozen_model(), load_model()]
    else:
        options = _options(world.model)
        tower = Runs(out, world, seed).run(()) / "tower.safetensors"
        models = [load_model(**options), load_model(**options, checkpoint=tower)]
    data = f"shapes:{_BANK_SEED + seed}" if world.drawn else world.data
    train, val = (open_dataset(data, **_options(world.where), split=split) for split in ("train", "val"))
    proposals = Kept(proposer(world.proposals), out / "proposals")
    pictures = range(min(len(val), _FEW) if world.quick else len(val))
    found: list[list[float | None]] = [[] for _ in _BANK_SIZES]
    for model in models:
        text = text_classifier(model.clip, model.tokenizer, val.class_names, model.templates)  # (C, D)
        embeddings, labels = labelled_embeddings(model, train, max(_BANK_SIZES), seed)  # (M, D)
        nth = [labels[:i].count(label) for i, label in enumerate(labels)]  # how many of its class come before
        for size, row in zip(_BANK_SIZES, found, strict=True):
            rows = [i for i, before in enumerate(nth) if before < size]
            bank = MaskBank(model.source)
            bank.add(embeddings[rows], [labels[i] for i in rows])
            evaluator = Evaluator(val, proposals, bank_scorer(model, text, bank, val.class_names))
            pixels = torch.zeros(len(text) + 1, len(text) + 1, dtype=torch.int64)
            for i in tqdm(pictures, desc=f"{size} masks a class", leave=False, disable=None):
                pixels += evaluator(val[i]).pixels
            scores: Mapping[str, Any] = evaluation_scores(pixels, evaluator.unseen)
            values = (scores[column.figure] for column in _ZERO_SHOT)
            row += [None if value != value else value for value in values]  # no unseen classes: NaN
    return found


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Options of the command line as arguments of `load_model` and `open_dataset`."""
    names = (word.lstrip("-") for word in words[::2])
    return {{"model": "name"}.get(name, name): value for name, value in zip(names, words[1::2], strict=True)}


def _cells(per_seed: Sequence[Sequence[float | None]]) -> list[str]:
    """Means over the seeds, with their sample standard deviation if there are several."""
    cells = []
    for values in zip(*per_seed, strict=True):
        known = [value for value in values if value is not None]
        if not known:
            cells.append("-")
        elif len(known) == 1:
            cells.append(f"{known[0]:.1f}")
        else:
            cells.append(f"{statistics.mean(known):.1f} ± {statistics.stdev(known):.1f}")
    return cells


def _lines(result: Mapping[str, Any]) -> list[list[str]]:
    """The table as cells: heading first, then rows, then rows that others published; theirs in columns of their own."""
    blank = ["-"] * len(result["columns"])
    if not result["others"] and not any(row["published"] for row in result["rows"]):
        blank = []

    def published(figures: Sequence[float | None]) -> list[str]:
        return ["-" if figure is None else f"{figure:.1f}" for figure in figures] or blank

    papers = [f"paper: {heading}" for heading in result["columns"][: len(blank)]]
    lines = [["", *result["columns"], *papers]]
    for row in result["rows"]:
        figures = published(row["published"])
        lines.append([row["name"], *_cells(row["per_seed"]), *figures, *blank[len(figures) :]])
    lines += [[method, *blank, *published(figures)] for method, figures in result["others"]]
    return lines


def text(result: Mapping[str, Any]) -> str:
    """What `measure` gave, as aligned text beside the paper's figures."""
    lines = _lines(result)
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    seeds = len(result["seeds"])
    spread = f"; mean ± sample standard deviation over {seeds} seeds" if seeds > 1 else ""
    quick = "; a quick run, which means nothing" if result["quick"] else ""
    quick += f"; without up to {result['failed']} pictures that failed" if result["failed"] else ""
    return "\n".join([
        f"{result['table']}. {result['title']}",
        *("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines),
        f"in %, on {result['data']}{spread}{quick}; published: {result['source']}",
    ])  # fmt: skip


def plot(result: Mapping[str, Any]) -> bytes:
    """The rows as a PNG, ours beside the published ones: lines where a number changes, else bars."""
    rows, columns = result["rows"], result["columns"]
    ours = [[cell.split(" ± ") for cell in _cells(row["per_seed"])] for row in rows]
    means = [[float(cell[0]) if cell[0] != "-" else float("nan") for cell in row] for row in ours]  # (rows, columns)
    spreads = [[float(cell[1]) if len(cell) > 1 else 0.0 for cell in row] for row in ours]
    panels = {f"here: {result['data']}, %": (means, spreads)}
    if any(row["published"] for row in rows):
        blank = [None] * len(columns)
        published = [[figure or float("nan") for figure in row["published"] or blank] for row in rows]
        panels["published, %"] = (published, [[0.0] * len(columns)] * len(rows))
    figure = Figure(figsize=(4.5 * len(panels), 3), layout="constrained")
    for cell, (title, (values, errors)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for k, heading in enumerate(columns):
            heights, bars = [row[k] for row in values], [row[k] for row in errors]
            color, error = _COLORS[k], bars if any(bars) else None
            if result["x"]:
                cell.errorbar(result["x"], heights, error, color=color, marker="o", ms=4, capsize=3, label=heading)
            else:
                width = 0.8 / len(columns)
                places = [i + (k - (len(columns) - 1) / 2) * width for i in range(len(rows))]
                cell.bar(places, heights, width, yerr=error, color=color, label=heading)
        cell.set_title(title, fontsize=10)
        cell.tick_params(labelsize=8)
        cell.grid(axis="y", color="#e3e3e3", lw=0.6)
        cell.set_axisbelow(True)
        cell.spines[["top", "right"]].set_visible(False)
        names = [row["name"].replace(" + ", "\n+ ").replace(", ", ",\n") for row in rows]
        cell.set_xticks(result["x"] or range(len(rows)), names, fontsize=7)
    handles, labels = cell.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, ncols=min(3, len(columns)), loc="outside lower center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def page(results: Sequence[Mapping[str, Any]], notes: Mapping[str, str]) -> str:
    """All tables as Markdown; each plot is `table-NAME.png` beside it.

    Args:
        results: of `measure`.
        notes: by table, what of the paper's conclusion holds here.
    """
    parts = ["# The paper's tables\n"]
    for result in results:
        heading, *lines = _lines(result)
        table = [heading, ["---"] + ["---:"] * (len(heading) - 1), *lines]
        seeds = len(result["seeds"])
        how = f"mean ± sample standard deviation over {seeds} seeds" if seeds > 1 else f"seed {result['seeds'][0]}"
        parts.append(
            f"## Table {result['table']}: {result['title']}\n\n"
            + "\n".join("| " + " | ".join(line) + " |" for line in table)
            + f"\n\nIn %, on {result['data']}, {how}; published: {result['source']}."
            + (" A quick run, which means nothing." if result["quick"] else "")
            + (f" Without up to {result['failed']} pictures that failed." if result["failed"] else "")
            + f"\n\nThe paper: {result['said']} {notes.get(result['table'], '')}".rstrip()
            + f"\n\n![Table {result['table']}](table-{result['table']}.png)\n"
        )
    return "\n".join(parts)


def claim(out: Path, world: World) -> None:
    """Make a folder one of this world's, or see that it is.

    Raises:
        ValueError: it holds what was measured on another world, or other files, which could be replaced.
        OSError: it can't be made or written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, about = out / "world.json", json.loads(json.dumps(asdict(world)))
    if path.exists():
        before = json.loads(path.read_bytes())
        if before != about:
            raise ValueError(f"{out} holds tables measured on {before}, not on {about}: name another folder")
    elif any(file.name != "notes.json" for file in out.iterdir()):
        raise ValueError(f"{out} holds other files, which could be replaced: name a new or empty folder")
    else:
        replace_file(path, (json.dumps(about, indent=1) + "\n").encode())


def write(result: Mapping[str, Any], out: Path) -> None:
    """Add a table to tables.json and README.md, the page, of a folder that `claim` made, with a PNG of its own.

    What notes.json there says of a table, by its name, comes below it.

    Raises:
        OSError: it can't be written to.
        ValueError: tables.json or notes.json is damaged.
    """
    said, kept = out / "notes.json", out / "tables.json"
    notes = json.loads(said.read_bytes()) if said.exists() else {}
    results = json.loads(kept.read_bytes()) if kept.exists() else []
    tables = {each["table"]: each for each in results} | {result["table"]: result}
    ordered = [tables[name] for name in NAMES if name in tables]
    replace_file(out / f"table-{result['table']}.png", plot(result))
    replace_file(out / "tables.json", (json.dumps(ordered, indent=1) + "\n").encode())
    replace_file(out / "README.md", page(ordered, notes).encode())
