"""What the mask-aware encoder and its training step cost: `python -m benchmarks.encoder [--out FILE]`.

Four ways through one image, the last three of which embed N mask proposals. The costs don't depend on the
values of the weights, so these are random.

- `plain`: CLIP's own forward pass of the whole image, one embedding: the yardstick.
- `mask-aware`: `visual(images, masks)` of this library, N embeddings.
- `dense form`: the same embeddings with the (N+hw)^2 bias of Eq. 2 written out for every head and every block
  computed in full.
- `mask & crop`: N sub-images at the tower's native size through the unpatched tower.

And of the training step, forward and backward, with the paper's frozen units:

- `two dense passes`: one pass with masks in the dense form and one without; the yardstick.
- `mask-aware`: `encode_masks_and_image`, which runs the blocks before the start layer once.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

import open_clip
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from maft_adapter import encode_masks_and_image, make_mask_aware, trainable_parameters
from maft_adapter.attention import dense_block
from maft_adapter.baselines import encode_crops
from maft_adapter.macs import count_macs
from maft_adapter.masks import attention_bias
from maft_adapter.towers.layouts import interpolate_position, native_grid

Run = Callable[[], object]

PAPER_PROPOSALS = 100  # the paper's N, at which the targets are stated
# Crops cost tens of forwards: a ratio that large needs few rounds.
CROP_ROUNDS = 3


class Row(TypedDict):
    """Cost of one way; the ratios are to the yardstick of its group, measured in the same rounds."""

    name: str
    proposals: int
    gmacs: float  # 1e9 multiply-accumulates
    peak_mib: float
    seconds: float  # median
    macs_ratio: float
    time_ratio: float  # median of the rounds
    time_ratio_quartiles: list[float]  # first and third
    peak_ratio: float


class Target(TypedDict):
    """A promise about N = 100 and what was measured."""

    name: str
    limit: str
    measured: float
    met: bool


class Report(TypedDict):
    """What `benchmark` measures and `--out` writes."""

    model: str
    image_size: int
    start_layer: int
    repeats: int
    threads: int
    torch: str
    encoder: list[Row]
    training: list[Row]
    targets: list[Target]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B-16", help="open_clip ViT, random weights (default: %(default)s)")
    parser.add_argument("--image-size", type=_positive, default=480, help="pixels a side (default: %(default)s)")
    parser.add_argument("--start-layer", type=int, default=8, help="L (default: %(default)s)")
    parser.add_argument(
        "--proposals", type=_positive, nargs="+", default=[1, 10, PAPER_PROPOSALS, 300], metavar="N",
        help="numbers of proposals (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=_positive, default=11, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    options = parser.parse_args(arguments)
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.parent} does not exist; make it first")

    report = benchmark(options.model, options.image_size, options.start_layer, options.proposals, options.repeats)
    print(as_markdown(report))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def benchmark(model: str, image_size: int, start_layer: int, proposals: Sequence[int], repeats: int) -> Report:
    """Measure the encoder for every N and the training step for N = 100, on one image.

    Args:
        model: one of open_clip's whose image tower is a ViT that pools by its class token.
        image_size: of the square image in pixels, a multiple of the patch size.
        start_layer: L, see `make_mask_aware`.
        proposals: the values of N.
        repeats: timed rounds; every round runs each way once. At most 3 of them run the crops.

    Raises:
        RuntimeError: open_clip doesn't know `model`.
        ValueError: as `make_mask_aware`, and an image size that the patch size doesn't divide.
    """
    clip_model: Any = open_clip.create_model(model).eval()
    unpatched = copy.deepcopy(clip_model)
    visual = make_mask_aware(clip_model.visual, start_layer)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, image_size, image_size, generator=generator)
    visual.token_grid(images)  # refuses a wrong image size before anything is measured
    encoder = []
    with torch.no_grad():
        for n in proposals:
            _progress(f"encoder, N = {n}")
            encoder += encoder_rows(visual, unpatched, images, random_masks(n, image_size, generator), repeats)
    _progress(f"training step, N = {PAPER_PROPOSALS}")
    training = training_rows(clip_model, images, random_masks(PAPER_PROPOSALS, image_size, generator), repeats)
    return {
        "model": model,
        "image_size": image_size,
        "start_layer": start_layer,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "encoder": encoder,
        "training": training,
        "targets": targets(encoder, training),
    }


def encoder_rows(visual: Any, unpatched: Any, images: Tensor, masks: Tensor, repeats: int) -> list[Row]:
    """The four ways for one set of proposals; `unpatched` is the whole CLIP model without our changes."""

    def plain() -> Tensor:
        return visual(images)

    def mask_aware() -> Tensor:
        return visual(images, masks)

    def dense_form() -> Tensor:
        return dense_encode(visual, images, masks)

    def mask_and_crop() -> tuple[Tensor, Tensor]:
        return encode_crops(unpatched, images, masks)

    n = masks.shape[1]
    rows = compare({"plain": plain, "mask-aware": mask_aware, "dense form": dense_form}, n, repeats)
    # Timed by themselves: hundreds of sub-images would disturb the ways that differ by a few percent.
    crops = compare({"plain": plain, "mask & crop": mask_and_crop}, n, min(repeats, CROP_ROUNDS))
    return rows + crops[1:]


def training_rows(clip_model: Any, images: Tensor, masks: Tensor, repeats: int) -> list[Row]:
    """Forward and backward of the student, whose masked and unmasked embeddings both enter the loss."""
    visual = clip_model.visual
    trainable_parameters(visual, "paper")

    def two_dense_passes() -> None:
        backward(dense_encode(visual, images, masks), visual(images))

    def mask_aware() -> None:
        embeddings, image = encode_masks_and_image(clip_model, images, masks)
        backward(embeddings, image)

    def backward(embeddings: Any, image: Tensor) -> None:
        # Any loss that reads both would do: its own cost is nothing beside the tower's.
        (embeddings.square().mean() + image.square().mean()).backward()
        visual.zero_grad()

    return compare({"two dense passes": two_dense_passes, "mask-aware": mask_aware}, masks.shape[1], repeats)


def dense_encode(visual: Any, images: Tensor, masks: Tensor) -> Tensor:
    """The encoder as the paper writes it down; the numbers of `visual(images, masks)` at its own cost.

    Args:
        visual: a mask-aware `VisionTransformer` of open_clip.
        images: (B, 3, H, W) float.
        masks: (B, N, H', W') bool or float in [0, 1].

    Returns:
        (B, N, D) proposal embeddings.
    """
    grid, n = visual.token_grid(images), masks.shape[1]
    patches = visual.conv1(images).flatten(2).mT  # (B, hw, width)
    class_token = visual.class_embedding.expand(len(images), 1, -1)  # (B, 1, width)
    position = interpolate_position(visual.positional_embedding, native_grid(visual), grid)  # (1+hw, width)
    tokens = visual.ln_pre(torch.cat([class_token, patches], dim=1) + position)  # (B, 1+hw, width)
    blocks = visual.transformer.resblocks
    for block in blocks[: visual.start_layer]:
        tokens = block(tokens)
    bias = attention_bias(masks, grid, tokens.dtype)  # (B, 1, N, hw)
    tokens = torch.cat([tokens[:, :1].expand(-1, n, -1), tokens[:, 1:]], dim=1)  # (B, N+hw, width)
    for block in blocks[visual.start_layer :]:
        tokens = dense_block(block, tokens, bias)
    return visual.ln_post(tokens[:, :n]) @ visual.proj  # (B, N, D)


def random_masks(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Proposals (1, n, size, size), bool as from SAM: rectangles of 1/8 to 7/8 of each side."""
    masks = torch.zeros(1, n, size, size, dtype=torch.bool)
    sides = torch.empty(n, 2).uniform_(1 / 8, 7 / 8, generator=generator)  # (n, 2)
    starts = torch.rand(n, 2, generator=generator) * (1 - sides)  # (n, 2)
    boxes = torch.cat([starts, starts + sides], dim=1).mul(size).int()  # (n, 4) YXYX in pixels
    for mask, (top, left, bottom, right) in zip(masks[0], boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = True
    return masks


def compare(ways: dict[str, Run], proposals: int, repeats: int) -> list[Row]:
    """Cost of every way and its ratio to the first one, the yardstick."""
    macs = {name: count_macs(run) for name, run in ways.items()}
    peak = {name: peak_memory(run) for name, run in ways.items()}  # also warms up what is timed next
    seconds = interleaved_seconds(ways, repeats)
    yardstick = next(iter(ways))
    rows: list[Row] = []
    for name in ways:
        ratios = [own / other for own, other in zip(seconds[name], seconds[yardstick], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if repeats > 1 else ratios * 3
        rows.append(
            {
                "name": name,
                "proposals": proposals,
                "gmacs": macs[name] / 1e9,
                "peak_mib": peak[name] / 2**20,
                "seconds": statistics.median(seconds[name]),
                "macs_ratio": macs[name] / macs[yardstick],
                "time_ratio": statistics.median(ratios),
                "time_ratio_quartiles": [quartiles[0], quartiles[2]],
                "peak_ratio": peak[name] / peak[yardstick],
            }
        )
    return rows


def peak_memory(run: Run) -> int:
    """Most bytes that tensors made by `run` take up at any moment, on the CPU.

    Read from the allocator's own record: it sees tensors that live inside a fused kernel, and repeats to the
    byte. The size of the process would add the weights, the interpreter and what the system's allocator keeps
    for later, which are the same for every way and would draw the ratios towards 1. For this reason weights,
    images and masks, which exist before the run, are left out. Scratch space of BLAS and oneDNN isn't seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in changes))


def interleaved_seconds(ways: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Wall time of every way in every round: what slows the machine for a while slows all ways alike."""
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        # The first changes, so that no way always runs right behind the most expensive one.
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def targets(encoder: list[Row], training: list[Row]) -> list[Target]:
    """What was promised for N = 100 of ViT-B/16 at 480x480 with L = 8; empty if that N wasn't measured."""
    rows = {row["name"]: row for row in encoder if row["proposals"] == PAPER_PROPOSALS}
    if not rows:
        return []
    ours, dense, crops = rows["mask-aware"], rows["dense form"], rows["mask & crop"]
    at_most = [
        ("multiply-accumulates, mask-aware / plain", ours["macs_ratio"], 0.97),
        ("time, mask-aware / plain", ours["time_ratio"], 1.0),
        ("time, mask-aware / dense form", ours["time_ratio"] / dense["time_ratio"], 1.0),
        ("peak memory, mask-aware / plain", ours["peak_ratio"], 1.1),
        ("time of a training step, mask-aware / two dense passes", training[1]["time_ratio"], 0.7),
    ]
    fewer = crops["gmacs"] / ours["gmacs"]
    return [
        *(
            Target(name=name, limit=f"<= {limit:g}", measured=measured, met=measured <= limit)
            for name, measured, limit in at_most
        ),
        Target(
            name="multiply-accumulates, mask & crop / mask-aware",
            limit=">= 18",
            measured=fewer,
            met=fewer >= 18,
        ),
    ]


def as_markdown(report: Report) -> str:
    """The report as tables."""
    size, layer = report["image_size"], report["start_layer"]
    lines = [
        f"{report['model']}, one {size}x{size} image, L = {layer}; {report['threads']} thread(s), "
        f"{report['repeats']} rounds, torch {report['torch']}",
        "",
        *_table("encoder", report["encoder"]),
        "",
        *_table("training step", report["training"]),
    ]
    if report["targets"]:
        lines += ["", f"| target at N = {PAPER_PROPOSALS} | limit | measured | met |", "|---|---|---:|---|"]
        for target in report["targets"]:
            met = "yes" if target["met"] else "no"
            lines.append(f"| {target['name']} | {target['limit']} | {target['measured']:.3f} | {met} |")
    return "\n".join(lines)


def _table(title: str, rows: list[Row]) -> list[str]:
    return [
        f"| {title} | N | GMACs | ratio | seconds | ratio (quartiles) | peak MiB | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['name']} | {row['proposals']} | {row['gmacs']:.1f} | {row['macs_ratio']:.3f} "
            f"| {row['seconds']:.3f} | {row['time_ratio']:.3f} ({low:.3f}-{high:.3f}) "
            f"| {row['peak_mib']:.1f} | {row['peak_ratio']:.2f} |"
            for row in rows
            for low, high in [row["time_ratio_quartiles"]]
        ),
    ]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _progress(what: str) -> None:
    print(f"measuring: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
