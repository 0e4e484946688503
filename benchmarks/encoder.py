"""What the mask-aware encoder and its training step cost: `python -m benchmarks.encoder [--out FILE]`.

Ways through one image, compared in towers of every library whose class token is asked. Costs don't depend on the
values of the weights, so these are random.

- `plain`: CLIP's own forward pass of the whole image, one embedding: the yardstick.
- `mask-aware`: images and N masks to N embeddings in one go.
- `kept features`: the same of `encode_features`' result, as every further call for the same image costs.
- `dense form`: the same embeddings with the (N+hw)^2 bias of Eq. 2 written out and every block computed in full.
- `features alone`: what is kept of the image, without any mask.
- `masks of HxW`: N proposals of that size to their attention bias on the token grid, without the tower.
- `mask & crop`: N sub-images at the tower's native size through the unpatched tower, 64 at a time.
- `one crop at a time`: the same, as croppers do it.

And of the training step, forward and backward, with the paper's frozen units:

- `two dense passes`: one pass with masks in the dense form and one without; the yardstick.
- `mask-aware`: `encode_masks_and_image`, which runs the blocks before the start layer once.

Where there is a GPU, everything runs a second time there, in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import functools
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
from open_clip.timm_model import TimmModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from maft_adapter import (
    encode_features,
    encode_masks,
    encode_masks_and_image,
    make_mask_aware,
    trainable_parameters,
)
from maft_adapter.attention import dense_bias, dense_block
from maft_adapter.baselines import merge
from maft_adapter.macs import count_macs
from maft_adapter.masks import attention_bias
from maft_adapter.towers.blocks import run_block

Run = Callable[[], object]


def transformers_clip() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=16))


# ViT-B/16 of every library; most promises are about the first.
PROMISED = "ViT-B-16"
MODELS: dict[str, Callable[[], Any]] = {
    PROMISED: lambda: open_clip.create_model("ViT-B-16").visual,
    "timm-EVA02-B-16": lambda: open_clip.create_model("EVA02-B-16").visual,
    "timm-ViT-B-16": lambda: TimmModel("vit_base_patch16_clip_224", 512, image_size=224, pool="token", proj=None),
    "transformers-ViT-B-16": transformers_clip,
}
PAPER_PROPOSALS = 100  # the paper's N
DENSE_PROPOSALS = 300  # the most whose (N+hw)^2 bias is written out
MASK_SIZES = (120, 120), (1024, 1024), (3000, 4000)  # of a generator, of SAM, of a photograph
CROPS_AT_ONCE = 64
# What costs many forwards, crops and thousands of proposals, needs few rounds for its ratio.
FEW_ROUNDS = 2


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
    """A promise and what was measured."""

    name: str
    limit: str
    measured: float
    met: bool


class Report(TypedDict):
    """What `benchmark` measures; `--out` writes a list of them."""

    model: str
    device: str  # "cpu", or the name of the GPU
    dtype: str
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
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--image-size", type=_positive, default=480, help="pixels a side (default: %(default)s)")
    parser.add_argument("--start-layer", type=int, default=8, help="L (default: %(default)s)")
    parser.add_argument(
        "--proposals", type=_positive, nargs="+", default=[1, 10, PAPER_PROPOSALS, 300, 1000, 10_000], metavar="N",
        help="numbers of proposals (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=_positive, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    options = parser.parse_args(arguments)
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.parent} does not exist; make it first")

    places = [("cpu", torch.float32)] + [("cuda", torch.bfloat16)] * torch.cuda.is_available()
    reports = []
    for device, dtype in places:
        for model in options.models:
            sizes = options.image_size, options.start_layer, options.proposals, options.repeats
            reports.append(benchmark(model, *sizes, device, dtype))
            print(as_markdown(reports[-1]), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")


def benchmark(
    model: str,
    image_size: int,
    start_layer: int,
    proposals: Sequence[int],
    repeats: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Measure the encoder for every N and, of the promised model, the training step for N = 100, on one image.

    Args:
        model: a key of `MODELS`.
        image_size: of the square image in pixels, a multiple of the patch size.
        start_layer: L, see `make_mask_aware`.
        proposals: the values of N. The parts of the encoder and the crops are measured where 100 is among them.
        repeats: timed rounds; every round runs each way once. `FEW_ROUNDS` of them run what is slow.
        device: "cpu" or "cuda".
        dtype: of the tower and the image.

    Raises:
        KeyError: an unknown `model`.
        ValueError: as `make_mask_aware`, and an image size that the patch size doesn't divide.
    """
    unpatched = MODELS[model]().eval().to(device, dtype)
    visual = make_mask_aware(copy.deepcopy(unpatched), start_layer)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, image_size, image_size, generator=generator).to(device, dtype)
    visual.token_grid(images)  # refuses a wrong image size before anything is measured
    encoder, training = [], []
    with torch.no_grad():
        for n in proposals:
            _progress(f"{model}, {device}, N = {n}")
            masks = random_masks(n, image_size, generator).to(device)
            encoder += encoder_rows(visual, images, masks, repeats)
            if n == PAPER_PROPOSALS:
                encoder += part_rows(visual, images, generator, repeats)
                encoder += crop_rows(unpatched, visual, images, masks, repeats)
    if model == PROMISED:
        _progress(f"{model}, {device}, training step")
        training = training_rows(visual, images, random_masks(PAPER_PROPOSALS, image_size, generator), repeats)
    report: Report = {
        "model": model,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": str(dtype).removeprefix("torch."),
        "image_size": image_size,
        "start_layer": start_layer,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "encoder": encoder,
        "training": training,
        "targets": [],
    }
    return {**report, "targets": targets(report)}


def encoder_rows(visual: Any, images: Tensor, masks: Tensor, repeats: int) -> list[Row]:
    """From the image, or from what is kept of it, to the embeddings of one set of proposals."""
    features, n = encode_features(visual, images), masks.shape[1]
    ways: dict[str, Run] = {
        "plain": lambda: visual(images),
        "mask-aware": lambda: encode_masks(visual, images, masks),
        "kept features": lambda: encode_masks(visual, features, masks),
    }
    if n <= DENSE_PROPOSALS:
        ways["dense form"] = lambda: dense_encode(visual, images, masks)
    else:
        repeats = min(repeats, FEW_ROUNDS)
    return compare(ways, n, repeats, images.device)


def part_rows(visual: Any, images: Tensor, generator: torch.Generator, repeats: int) -> list[Row]:
    """The image's step alone, and the masks' own step for 100 proposals of several sizes."""
    grid = visual.token_grid(images)
    ways: dict[str, Run] = {"plain": lambda: visual(images), "features alone": lambda: encode_features(visual, images)}
    for height, width in MASK_SIZES:
        masks = random_masks(PAPER_PROPOSALS, (height, width), generator).to(images.device)
        ways[f"masks of {height}x{width}"] = functools.partial(attention_bias, masks, grid, images.dtype)
    return compare(ways, PAPER_PROPOSALS, repeats, images.device)[1:]


def crop_rows(unpatched: Any, visual: Any, images: Tensor, masks: Tensor, repeats: int) -> list[Row]:
    """A sub-image for every proposal. Apart from the others: hundreds of them would disturb ways that differ little."""
    size = unpatched.image_size if hasattr(unpatched, "image_size") else unpatched.config.image_size

    def crops(at_once: int) -> None:
        for part in masks.split(at_once, dim=1):
            unpatched(merge(images, part, size=size)[0])  # (at_once, 3, size, size)

    ways: dict[str, Run] = {
        "plain": lambda: visual(images),
        "mask & crop": lambda: crops(CROPS_AT_ONCE),
        "one crop at a time": lambda: crops(1),
    }
    return compare(ways, masks.shape[1], min(repeats, FEW_ROUNDS), images.device)[1:]


def training_rows(visual: Any, images: Tensor, masks: Tensor, repeats: int) -> list[Row]:
    """Forward and backward of the student, whose masked and unmasked embeddings both enter the loss."""
    masks = masks.to(images.device)
    trainable_parameters(visual, "paper")

    def two_dense_passes() -> None:
        backward(dense_encode(visual, images, masks), visual(images))

    def mask_aware() -> None:
        backward(*encode_masks_and_image(visual, images, masks))

    def backward(embeddings: Tensor, image: Tensor) -> None:
        # Any loss that reads both would do: its own cost is nothing beside the tower's.
        (embeddings.square().mean() + image.square().mean()).backward()
        visual.zero_grad()

    ways: dict[str, Run] = {"two dense passes": two_dense_passes, "mask-aware": mask_aware}
    return compare(ways, masks.shape[1], repeats, images.device)


def dense_encode(visual: Any, images: Tensor, masks: Tensor) -> Tensor:
    """The encoder as the paper writes it down; the numbers of `visual(images, masks)` at its own cost.

    Args:
        visual: a mask-aware class-token tower.
        images: (B, 3, H, W) float.
        masks: (B, N, H', W') bool or float in [0, 1], N >= 1.

    Returns:
        (B, N, D) proposal embeddings.
    """
    grid, n, blocks = visual.token_grid(images), masks.shape[1], visual._blocks()
    tokens = visual._run(visual._embed(images), grid, blocks[: visual.start_layer])  # (B, 1+hw, width)
    tokens = torch.cat([tokens[:, :1].expand(-1, n, -1), tokens[:, 1:]], dim=1)  # (B, N+hw, width)
    bias = attention_bias(masks, grid, tokens.dtype)  # (B, 1, N, hw)
    if hasattr(visual, "transformer"):  # whose attention wants such a mask for every head
        for block in blocks[visual.start_layer :]:
            tokens = dense_block(block, tokens, bias)
    else:
        options = dense_options(visual, grid, bias)
        for block in blocks[visual.start_layer :]:
            tokens = run_block(block, block, tokens, options)
    return visual._head(tokens[:, :n])  # (B, N, D)


def dense_options(visual: Any, grid: tuple[int, int], bias: Tensor) -> dict[str, Any]:
    """What the blocks of timm and transformers take for N copies of the class token, with `bias` (B, 1, N, hw)."""
    options = visual._options(grid)
    if "rope" in options:
        # A block rotates all but its first token: sine 0 and cosine 1 leave the other copies where they were.
        rope = options["rope"]  # (hw, 2 * head width)
        sine = rope.new_zeros(bias.shape[2] - 1, rope.shape[1] // 2)  # (N-1, head width)
        options["rope"] = torch.cat([torch.cat([sine, sine + 1], dim=1), rope])  # (N-1+hw, 2 * head width)
    return {**options, "attn_mask" if hasattr(visual, "trunk") else "attention_mask": dense_bias(bias)}


def random_masks(n: int, size: int | tuple[int, int], generator: torch.Generator) -> Tensor:
    """Proposals (1, n, *size), bool as from SAM: rectangles of 1/8 to 7/8 of each side."""
    height, width = (size, size) if isinstance(size, int) else size
    masks = torch.zeros(1, n, height, width, dtype=torch.bool)
    sides = torch.empty(n, 2).uniform_(1 / 8, 7 / 8, generator=generator)  # (n, 2)
    starts = torch.rand(n, 2, generator=generator) * (1 - sides)  # (n, 2)
    edges = torch.tensor([height, width, height, width])
    boxes = torch.cat([starts, starts + sides], dim=1).mul(edges).int()  # (n, 4) YXYX in pixels
    for mask, (top, left, bottom, right) in zip(masks[0], boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = True
    return masks


def compare(ways: dict[str, Run], proposals: int, repeats: int, device: torch.device | str = "cpu") -> list[Row]:
    """Cost of every way and its ratio to the first one, the yardstick."""
    macs = {name: count_macs(run) for name, run in ways.items()}
    peak = {name: peak_memory(run, device) for name, run in ways.items()}  # also warms up what is timed next
    seconds = interleaved_seconds(ways, repeats, device)
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


def peak_memory(run: Run, device: torch.device | str = "cpu") -> int:
    """Most bytes that tensors made by `run` take up at any moment on `device`.

    Read from the allocator's own record: it sees tensors that live inside a fused kernel, and repeats to the
    byte. The size of the process would add the weights, the interpreter and what the system's allocator keeps
    for later, which are the same for every way and would draw the ratios towards 1. For this reason weights,
    images and masks, which exist before the run, are left out. Scratch space of BLAS and oneDNN isn't seen.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in changes))


def interleaved_seconds(
    ways: dict[str, Run], repeats: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Wall time of every way in every round: what slows the machine for a while slows all ways alike."""
    # A GPU works on after the call that gave it the work.
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        # The first changes, so that no way always runs right behind the most expensive one.
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait()
            start = time.perf_counter()
            ways[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def targets(report: Report) -> list[Target]:
    """What was promised for 480x480, L = 8 and a CPU; empty if some N that it is about wasn't measured."""
    rows = {(row["name"], row["proposals"]): row for row in report["encoder"]}
    if report["device"] != "cpu" or not {("mask-aware", n) for n in (1, 100, 300, 10_000)} <= rows.keys():
        return []
    ours, dense = rows["mask-aware", 100], rows["dense form", 100]
    if report["model"] != PROMISED:
        return [_at_most("multiply-accumulates, N = 100, mask-aware / plain", ours["macs_ratio"], 0.98)]
    one, kept, most = rows["kept features", 1], rows["kept features", 100], rows["mask-aware", 10_000]
    height, width = MASK_SIZES[-1]
    large = rows[f"masks of {height}x{width}", 100]
    beyond = most["peak_mib"] - most["peak_mib"] / most["peak_ratio"]  # plain's
    fewer = rows["mask & crop", 100]["gmacs"] / ours["gmacs"]
    crops = "multiply-accumulates, N = 100, mask & crop / mask-aware"
    return [
        _at_most("multiply-accumulates, N = 100, mask-aware / plain", ours["macs_ratio"], 0.967),
        _at_most("time, N = 100, mask-aware / plain", ours["time_ratio"], 0.95),
        _at_most("time, N = 300, mask-aware / plain", rows["mask-aware", 300]["time_ratio"], 1.0),
        _at_most("time, N = 100, kept features / plain", kept["time_ratio"], 0.06),
        _at_most("GMACs of each further mask of kept features", (kept["gmacs"] - one["gmacs"]) / 99, 0.035),
        _at_most(f"time, N = 100, masks of {height}x{width} / plain", large["time_ratio"], 0.03),
        _at_most(f"peak MB, N = 100, masks of {height}x{width}", large["peak_mib"] * 2**20 / 1e6, 64),
        _at_most("peak GB, N = 10000, mask-aware - plain", beyond * 2**20 / 1e9, 1.0),
        _at_most("peak memory, N = 100, mask-aware / plain", ours["peak_ratio"], 1.1),
        _at_most("time, N = 100, mask-aware / dense form", ours["time_ratio"] / dense["time_ratio"], 1.0),
        _at_most("time of a training step, mask-aware / two dense passes", report["training"][1]["time_ratio"], 0.64),
        Target(name=crops, limit=">= 18", measured=fewer, met=fewer >= 18),
    ]


def _at_most(name: str, measured: float, limit: float) -> Target:
    return Target(name=name, limit=f"<= {limit:g}", measured=measured, met=measured <= limit)


def as_markdown(report: Report) -> str:
    """The report as tables."""
    size, layer = report["image_size"], report["start_layer"]
    lines = [
        f"## {report['model']}",
        f"one {size}x{size} image, L = {layer}; {report['device']}, {report['dtype']}, {report['threads']} thread(s), "
        f"{report['repeats']} rounds, torch {report['torch']}",
        "",
        *_table("encoder", report["encoder"]),
        "",
    ]
    if report["training"]:
        lines += [*_table("training step", report["training"]), ""]
    if report["targets"]:
        lines += ["| target | limit | measured | met |", "|---|---|---:|---|"]
        for target in report["targets"]:
            met = "yes" if target["met"] else "no"
            lines.append(f"| {target['name']} | {target['limit']} | {target['measured']:.4g} | {met} |")
        lines.append("")
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
