"""`maft-adapter demo`: the paper's Table 4(a) on the embedded world."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MODULES = ("matplotlib", "safetensors", "skimage", "torchmetrics", "torchvision", "tqdm")


def add(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    demo = commands.add_parser(
        "demo",
        help="the paper's Table 4(a) on an embedded world, with pictures",
        description=(
            "Compare a frozen CLIP with mask & crop, IP-CLIP without fine-tuning, and IP-CLIP fine-tuned "
            "with L_ma and with L_ma + L_dis, on held-out scenes of the embedded world. Prints the table "
            "beside the paper's Table 4(a); writes report.html, its figures as PNG, metrics.json, and the "
            "fine-tuned tower as tower.safetensors. "
            "Nothing is downloaded. Takes minutes on two cores; Ctrl-C leaves what was finished."
        ),
    )
    seeding = demo.add_mutually_exclusive_group()
    seeding.add_argument(
        "--seed", type=int, default=0, metavar="S",
        help="seed of the scenes, evaluation and training, and of the fine-tuning (default: %(default)s)",
    )  # fmt: skip
    seeding.add_argument("--seeds", type=int, metavar="K", help="run seeds 0 to K-1 and give the mean and its spread")
    demo.add_argument("--quick", action="store_true", help="few scenes and iterations, under a minute")
    demo.add_argument(
        "--start-layer", type=int, choices=range(13), metavar="L",
        help="block from which on a proposal sees its mask only, 0 to 12 (Table 4e; default: the recipe's)",
    )  # fmt: skip
    demo.add_argument(
        "--out", type=Path, default=Path("maft-demo"), metavar="DIR",
        help="folder to write to, made if it is missing (default: %(default)s)",
    )  # fmt: skip
    demo.set_defaults(run=run, error=demo.error)


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    if arguments.seeds is not None and arguments.seeds < 1:
        arguments.error(f"--seeds {arguments.seeds}: expected at least 1")
    if arguments.seed < 0:
        arguments.error(f"--seed {arguments.seed}: expected at least 0")
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'maft-adapter[demo]'", file=sys.stderr)
        return 1
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        arguments.error(f"--out {arguments.out}: can't be made a folder ({error.strerror})")
    seeds = [arguments.seed] if arguments.seeds is None else range(arguments.seeds)
    from ..shapes.demo import run_demo

    run_demo(arguments.out, seeds, quick=arguments.quick, start_layer=arguments.start_layer)
    return 0
