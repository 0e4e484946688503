"""Whether loading makes the encoder wait: `python -m benchmarks.training [--out FILE]`.

The same steps of `finetune`, with random weights: with pictures and labels in files and proposals kept on disk, loaded
by two workers, and with the same samples as tensors in memory. Both in turn, twice as many times as there are rounds;
the ratio is the median over the rounds. Starting the workers is within the time.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from maft_adapter.classify import text_classifier
from maft_adapter.data import open_dataset
from maft_adapter.finetune import SegmentationSamples, finetune
from maft_adapter.losses import MAFTLoss
from maft_adapter.models import load_model
from maft_adapter.proposals import Kept, proposer

LIMIT = 1.1


class Sizes(NamedTuple):
    """What is measured; the promise is about the defaults."""

    model: str = "ViT-B-16"
    pixels: int = 512
    size: int = 480
    pictures: int = 24
    iterations: int = 12  # starting the workers counts once, and a run has hundreds
    batch_size: int = 2
    workers: int = 2
    rounds: int = 1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=Sizes().rounds, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: its folder does not exist; make it first")
    report = benchmark(Sizes(rounds=options.rounds))
    print(f"{'in memory':>12} {report['memory']:.2f} s\n{'from disk':>12} {report['disk']:.2f} s")
    print(f"{'ratio':>12} {report['ratio']:.3f} (promised: at most {LIMIT})")
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def benchmark(sizes: Sizes) -> dict[str, Any]:
    """Measure on this machine's CPU: medians of the seconds of all steps, and of their ratio."""
    model = load_model(sizes.model, "random")
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), sizes)
        dataset = open_dataset("folder", folder, "train")
        kept = Kept(proposer("superpixels"), Path(folder, "proposals"))
        from_disk = SegmentationSamples(dataset, model, dataset.seen, kept, size=sizes.size)
        in_memory = [from_disk[i] for i in tqdm(range(len(from_disk)), desc="proposing masks")]
        text = text_classifier(model.clip, model.tokenizer, dataset.class_names)

        def seconds(samples: Any, workers: int) -> float:
            clip = copy.deepcopy(model.clip)
            started = time.perf_counter()
            finetune(
                clip, samples, text, iterations=sizes.iterations, batch_size=sizes.batch_size, num_workers=workers,
                loss=MAFTLoss(distillation_weight=0), progress=False,
            )  # fmt: skip
            return time.perf_counter() - started

        seconds(in_memory, 0)
        rounds = []
        for i in tqdm(range(2 * sizes.rounds), desc="training"):
            ways = [(from_disk, sizes.workers), (in_memory, 0)]
            pair = {workers: seconds(samples, workers) for samples, workers in (ways if i % 2 else ways[::-1])}
            rounds.append((pair[sizes.workers], pair[0]))
    return {
        "sizes": sizes._asdict(),
        "memory": statistics.median(memory for _, memory in rounds),
        "disk": statistics.median(disk for disk, _ in rounds),
        "ratio": statistics.median(disk / memory for disk, memory in rounds),
    }


def write_pictures(root: Path, sizes: Sizes) -> None:
    """Coloured rectangles on noise, as JPEG, with their label maps."""
    chance = np.random.default_rng(0)
    for i in range(sizes.pictures):
        labels = np.zeros((sizes.pixels, sizes.pixels), np.uint8)
        for k in range(1, 8):
            y, x = chance.integers(0, sizes.pixels * 3 // 4, 2)
            labels[y : y + sizes.pixels // 4, x : x + sizes.pixels // 4] = k
        colors = chance.integers(0, 200, (8, 3))
        picture = colors[labels] + chance.integers(0, 40, (*labels.shape, 3))
        for kind, name, values in (("images", f"{i}.jpg", picture), ("labels", f"{i}.png", labels)):
            path = root / kind / "train" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(path)
    (root / "classes.txt").write_text("\n".join(f"thing {k}" for k in range(8)))


if __name__ == "__main__":
    main()
