"""What the mask-aware classifier saves inside the real hosts: `python -m benchmarks.hosts [--out FILE]`.

For ZegFormer, ZSSeg and FreeSeg, two ways to classify the same 100 proposals of the same image:

- `host`: the host's own code, 100 crops of 224x224 through its CLIP;
- `mask-aware`: the same after `patch`, one pass of the image at 480x480.

CLIP is the host's ViT-B/16 in full size. Costs don't depend on the values of the weights, so these are random. The
proposals are rectangles that stand for what the generator found, and the text embeddings were made before. In ZSSeg
and FreeSeg the call of the classifier is measured. ZegFormer has it inline in `forward`, so there it is all that
follows the generator, also the sum over the masks, which is the same both ways. CLIP runs in float32; ZegFormer uses
float16, which is made for GPUs.

It needs checkouts, named by ZEGFORMER_ROOT, ZSSEG_ROOT, FREESEG_ROOT and DETECTRON2_ROOT.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import PAPER_PROPOSALS, Row, Run, Target, _positive, _progress, compare, random_masks

# What each host's checkout is called, and which of its folders have to be on the path.
HOSTS = {
    "zegformer": ("ZEGFORMER_ROOT", ()),
    "zsseg": ("ZSSEG_ROOT", ("third_party/CLIP",)),
    "freeseg": ("FREESEG_ROOT", ("third_party/CLIP",)),
}
DETECTRON2 = "DETECTRON2_ROOT"
# Its stand_ins make the hosts run on the Python, numpy and torch of today.
TESTS = Path(__file__).parents[1] / "tests" / "hosts"
CLASSES, EMBED, WIDTH, LAYERS, PATCH = 20, 512, 768, 12, 16  # VOC's classes; CLIP ViT-B/16
AT_LEAST = {"multiply-accumulates": 10.0, "time": 6.0}


class Report(TypedDict):
    """What `benchmark` measures and `--out` writes."""

    image: list[int]  # height and width in pixels
    repeats: int
    threads: int
    torch: str
    hosts: dict[str, list[Row]]  # "mask-aware", the yardstick, and "host"
    targets: list[Target]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts", description=__doc__.split("\n")[0])
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS), help="(default: all)")
    parser.add_argument(
        "--image", type=_positive, nargs=2, default=[480, 640], metavar=("H", "W"),
        help="pixels (default: 480 640)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=_positive, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    options = parser.parse_args(arguments)
    variables = [*(HOSTS[host][0] for host in options.hosts), DETECTRON2]
    missing = [variable for variable in variables if not os.path.isdir(os.environ.get(variable, ""))]
    if missing:
        parser.error(f"{', '.join(missing)} must name a checkout; --hosts leaves hosts out")
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.parent} does not exist; make it first")

    height, width = options.image
    report = benchmark(options.hosts, (height, width), options.repeats)
    print(as_markdown(report))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def benchmark(hosts: Sequence[str], image: tuple[int, int], repeats: int) -> Report:
    """Measure every host in a process of its own, since two of them share a package name.

    Args:
        hosts: keys of `HOSTS`; the environment names their checkouts and detectron2's.
        image: height and width in pixels.
        repeats: timed rounds; every round runs each way once.
    """
    rows = {}
    for host in hosts:
        _progress(host)
        variable, folders = HOSTS[host]
        root = Path(os.environ[variable]).resolve()
        paths = [
            str(path) for path in (TESTS, root, *(root / f for f in folders), Path(os.environ[DETECTRON2]).resolve())
        ]
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            rows[host] = pool.submit(measure, host, paths, image, repeats).result()
    return {
        "image": list(image),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "hosts": rows,
        "targets": targets(rows),
    }


@torch.no_grad()
def measure(host: str, paths: Sequence[str], size: tuple[int, int], repeats: int) -> list[Row]:
    """The rows of one host, in a process that has imported none before."""
    sys.path[:0] = paths
    importlib.import_module("stand_ins").install()
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    masks = F.interpolate(random_masks(PAPER_PROPOSALS, 480, generator).float(), size)[0]  # (N, H, W)
    ways = zegformer(image, masks) if host == "zegformer" else clip_adapter(host, image, masks)
    return compare(ways, PAPER_PROPOSALS, repeats)


def zegformer(image: Tensor, masks: Tensor) -> dict[str, Run]:
    """ZegFormer's `forward` from the generator's output on."""
    stand_ins: Any = importlib.import_module("zegformer_stand_ins")
    stand_ins.install()
    torch.Tensor.half = torch.Tensor.float  # type: ignore[method-assign]
    patch = importlib.import_module("maft_adapter.integrations.zegformer").patch
    head = Generator(stand_ins.small_clip(WIDTH, LAYERS, PATCH).float(), masks)
    metadata = SimpleNamespace(stuff_classes=list(range(CLASSES)), val_extra_classes=list(range(15, CLASSES)))
    mean_std = {f"{clip}pixel_{name}": [100.0] * 3 for clip in ("", "clip_") for name in ("mean", "std")}
    host: Any = importlib.import_module("mask_former").MaskFormer(
        backbone=nn.Identity(), sem_seg_head=head, criterion=None, num_queries=len(masks), panoptic_on=False,
        object_mask_threshold=0.0, overlap_threshold=0.0, metadata=metadata, metadata_val_all=metadata,
        size_divisibility=32, sem_seg_postprocess_before_inference=False, gzero_calibrate=-1.0,
        clip_classification=True, ensembling=True, ensembling_all_cls=False, train_class_json="", test_class_json="",
        clip_cls_style="cropmask", **mean_std,
    ).eval()  # fmt: skip
    ours, batch = patch(copy.deepcopy(host)), [{"image": image}]
    return {"mask-aware": lambda: ours(batch), "host": lambda: host(batch)}


class Generator(nn.Module):
    """ZegFormer's head after its work: logits and masks at a quarter of the size."""

    def __init__(self, clip_model: nn.Module, masks: Tensor) -> None:
        super().__init__()
        self.predictor: Any = nn.Module()
        self.predictor.clip_model = clip_model
        self.predictor.text_features_test_clip = F.normalize(torch.randn(CLASSES, EMBED), dim=-1)
        self.outputs = {
            "pred_logits": torch.randn(1, len(masks), CLASSES + 1),
            "pred_masks": 10 * F.interpolate(masks[None], scale_factor=0.25) - 5,  # (1, N, H/4, W/4)
        }

    def forward(self, features: Tensor, images_tensor: None = None, ori_sizes: None = None) -> dict[str, Tensor]:
        return self.outputs


def clip_adapter(host: str, image: Tensor, masks: Tensor) -> dict[str, Run]:
    """The `MaskFormerClipAdapter` of ZSSeg and FreeSeg."""
    package, task = ("mask2former", ["semantic segmentation."]) if host == "freeseg" else ("mask_former", [])
    clip: Any = importlib.import_module("clip")
    clip_model = clip.model.CLIP(EMBED, 224, LAYERS, WIDTH, PATCH, 77, 49408, 64, 1, 1)
    clip.load = lambda name, **options: (clip_model, None)  # in place of a download
    adapters: Any = importlib.import_module(f"{package}.modeling.clip_adapter.adapter")
    adapter = adapters.MaskFormerClipAdapter("ViT-B/16", Prompts()).eval()
    names = [str(i) for i in range(CLASSES)]
    patched = copy.deepcopy(adapter)
    model = SimpleNamespace(region_clip_adapter=patched, clip_ensemble=True, size_divisibility=32)
    if host == "freeseg":
        model.task_names = task
    importlib.import_module(f"maft_adapter.integrations.{host}").patch(model)
    return {
        "mask-aware": lambda: patched(image, names, *task, masks),
        "host": lambda: adapter(image, names, *task, masks),
    }


class Prompts(nn.Module):
    """The hosts' prompt learner after its work: text embeddings that the adapter keeps."""

    with_trainable_params = False

    def init_buffer(self, clip_model: nn.Module) -> None: ...

    def init_task_prompt(self, clip_model: nn.Module) -> None: ...

    def forward(self, names: Sequence[str], clip_model: nn.Module, task_name: str = "") -> Tensor:
        return F.normalize(torch.randn(len(names), EMBED), dim=-1)


def targets(rows: dict[str, list[Row]]) -> list[Target]:
    """What was promised for every host, at N = 100 and ViT-B/16."""
    found = []
    for host, (_, theirs) in rows.items():
        measured = {"multiply-accumulates": theirs["macs_ratio"], "time": theirs["time_ratio"]}
        for what, limit in AT_LEAST.items():
            name, met = f"{host}: {what}, host / mask-aware", measured[what] >= limit
            found.append(Target(name=name, limit=f">= {limit:g}", measured=measured[what], met=met))
    return found


def as_markdown(report: Report) -> str:
    """The report as tables."""
    height, width = report["image"]
    lines = [
        f"CLIP ViT-B/16, one {height}x{width} image, N = {PAPER_PROPOSALS}, {CLASSES} classes; {report['threads']} "
        f"thread(s), {report['repeats']} rounds, torch {report['torch']}",
        "",
        "| | GMACs | ratio | seconds | ratio (quartiles) | peak MiB | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for host, rows in report["hosts"].items():
        for row in rows:
            low, high = row["time_ratio_quartiles"]
            lines.append(
                f"| {host}, {row['name']} | {row['gmacs']:.1f} | {row['macs_ratio']:.2f} | {row['seconds']:.2f} "
                f"| {row['time_ratio']:.2f} ({low:.2f}-{high:.2f}) | {row['peak_mib']:.0f} | {row['peak_ratio']:.2f} |"
            )
    lines += ["", "| target | limit | measured | met |", "|---|---|---:|---|"]
    for target in report["targets"]:
        met = "yes" if target["met"] else "no"
        lines.append(f"| {target['name']} | {target['limit']} | {target['measured']:.2f} | {met} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
