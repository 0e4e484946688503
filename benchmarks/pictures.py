"""What pictures cost beside the encoder: `python -m benchmarks.pictures [--out FILE]`.

Pictures lie in JPEG files, masks of each are at hand, as from SAM, and the CLIP has random weights. Compared for each
picture with `bare encoder`, the mask-aware tower alone, of an image and masks in memory:

- `embed`: from the file to the shard on disk: reading, resizing, run-length codes, areas, boxes, encoding, writing.
- `one masked crop at a time`: from the file to embeddings as croppers make them, nothing written.

And for one picture that has been segmented, with `plain forward`, CLIP's own forward pass:

- `relabel`: the class scores of all masks for other words, whose embeddings are there already.
- `label map`: the same and the label map at the picture's size.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.encoder import FEW_ROUNDS, Run, _progress, interleaved_seconds, random_masks
from maft_adapter import encode_masks, restore
from maft_adapter.baselines import merge
from maft_adapter.embed import Embedder, embed
from maft_adapter.models import image_tower
from maft_adapter.pictures import Segmenter, prepare, read_picture
from maft_adapter.proposals import Proposals


class Sizes(NamedTuple):
    """What is measured; the promises are about the defaults."""

    model: str = "ViT-B-16"
    size: int = 480
    proposals: int = 100
    pixels: int = 1024
    words: int = 1000
    pictures: int = 4
    repeats: int = 5


class Row(TypedDict):
    """Time of one way; the ratio is to the yardstick of its group, the median over the rounds."""

    name: str
    seconds: float
    time_ratio: float
    time_ratio_quartiles: list[float]  # first and third


class Target(TypedDict):
    """A promise and what was measured."""

    name: str
    limit: str
    measured: float
    met: bool


class Report(TypedDict):
    """What `benchmark` measures; `--out` writes it."""

    sizes: dict[str, str | int]
    threads: int
    torch: str
    collection: list[Row]
    crops: list[Row]
    relabelling: list[Row]
    targets: list[Target]


class Given(NamedTuple):
    """A proposer of masks that are there already."""

    masks: NDArray[np.bool_]
    settings: str = "given"

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        return Proposals(self.masks)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: expected at least 1")
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.parent} does not exist; make it first")
    report = benchmark(Sizes(repeats=options.repeats))
    print(as_markdown(report))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def benchmark(sizes: Sizes) -> Report:
    """Measure on this machine's CPU.

    Raises:
        ValueError: an unknown model.
    """
    masks = random_masks(sizes.proposals, sizes.pixels, torch.Generator().manual_seed(0))  # (1, N, H, W)
    given = Given(masks[0].numpy())
    embedder = Embedder(given, size=sizes.size, name=sizes.model, pretrained="random")
    model = embedder.model
    tower = image_tower(model.clip)
    unpatched = restore(copy.deepcopy(tower))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{i}.jpg") for i in range(sizes.pictures)]
        for i, file in enumerate(files):
            _photograph(sizes.pixels, i).save(file, quality=90)
        images = [prepare(read_picture(file), model.mean, model.std, sizes.size)[None] for file in files]
        runs = count()

        def encoder() -> None:
            for image in images:
                encode_masks(model.clip, image, masks, normalize=True)

        def from_files() -> None:
            summary = embed(files, Path(folder, f"out {next(runs)}"), embedder)
            assert summary.embedded == len(files), summary

        def crops() -> None:
            side = int(getattr(unpatched, "image_size", (224,))[0])
            image = prepare(read_picture(files[0]), model.mean, model.std, sizes.pixels)[None]  # (1, 3, H, W)
            for mask in masks[0].split(1):
                unpatched(merge(image, mask[None], size=side)[0])  # (1, 3, side, side)

        def first_of_files() -> None:
            embed(files[:1], Path(folder, f"out {next(runs)}"), embedder)

        collection = compare({"bare encoder": encoder, "embed": from_files}, sizes.repeats)
        one = compare({"embed": first_of_files, "one masked crop at a time": crops}, min(sizes.repeats, FEW_ROUNDS))
        segmenter = Segmenter(model.clip, model.tokenizer, ["thing"], proposals=given, size=sizes.size)
        result = segmenter(files[0])
        words = [f"thing {i}" for i in range(sizes.words)]
        _progress("embeddings of the words")
        segmenter.text(words)
        ways: dict[str, Run] = {
            "plain forward": lambda: tower(images[0]),
            "relabel": lambda: result.relabel(words).scores,
            "label map": lambda: result.relabel(words).label_map,
        }
        relabelling = compare(ways, sizes.repeats)
    report: Report = {
        "sizes": sizes._asdict(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "collection": collection,
        "crops": one,
        "relabelling": relabelling,
        "targets": [],
    }
    return {**report, "targets": targets(report)}


def compare(ways: dict[str, Callable[[], object]], repeats: int) -> list[Row]:
    """Time of every way and its ratio to the first one, in rounds that run each way once."""
    for name, run in ways.items():
        _progress(name)
        run()  # warms up
    seconds = interleaved_seconds(ways, repeats)
    yardstick = seconds[next(iter(ways))]
    rows: list[Row] = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, yardstick, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if repeats > 1 else ratios * 3
        rows.append(
            Row(
                name=name,
                seconds=statistics.median(own),
                time_ratio=statistics.median(ratios),
                time_ratio_quartiles=[quartiles[0], quartiles[2]],
            )
        )
    return rows


def targets(report: Report) -> list[Target]:
    """What was promised for the default sizes; empty for others."""
    if Sizes(**report["sizes"])._replace(repeats=Sizes().repeats) != Sizes():  # type: ignore[arg-type]
        return []
    rows = {row["name"]: row["time_ratio"] for row in (*report["collection"], *report["relabelling"], *report["crops"])}
    crops, beside, relabel = rows["one masked crop at a time"], report["collection"][1]["time_ratio"], rows["relabel"]
    return [
        Target(name="embed / bare encoder", limit="<= 1.15", measured=beside, met=beside <= 1.15),
        Target(name="one masked crop at a time / embed", limit=">= 15", measured=crops, met=crops >= 15),
        Target(name="relabel / plain forward", limit="<= 0.05", measured=relabel, met=relabel <= 0.05),
    ]


def as_markdown(report: Report) -> str:
    """The report as tables."""
    sizes = Sizes(**report["sizes"])  # type: ignore[arg-type]
    lines = [
        f"{sizes.model} at {sizes.size}x{sizes.size}, {sizes.proposals} masks of {sizes.pixels}x{sizes.pixels}, "
        f"{sizes.words} words; {report['threads']} thread(s), {sizes.repeats} rounds, torch {report['torch']}",
        "",
    ]
    groups = {
        f"{sizes.pictures} pictures": report["collection"],
        "1 picture": report["crops"],
        "1 picture, segmented": report["relabelling"],
    }
    for title, rows in groups.items():
        lines += [f"| {title} | seconds | ratio (quartiles) |", "|---|---:|---:|"]
        for row in rows:
            low, high = row["time_ratio_quartiles"]
            lines.append(f"| {row['name']} | {row['seconds']:.3f} | {row['time_ratio']:.3f} ({low:.3f}-{high:.3f}) |")
        lines.append("")
    if report["targets"]:
        lines += ["| target | limit | measured | met |", "|---|---|---:|---|"]
        for target in report["targets"]:
            met = "yes" if target["met"] else "no"
            lines.append(f"| {target['name']} | {target['limit']} | {target['measured']:.4g} | {met} |")
        lines.append("")
    return "\n".join(lines)


def _photograph(pixels: int, seed: int) -> Image.Image:
    """A picture as smooth as photographs are, so that its JPEG file is as long as theirs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (pixels // 8, pixels // 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main()
