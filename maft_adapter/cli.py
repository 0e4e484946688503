"""The command line: `maft-adapter demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_DEMO_MODULES = ("matplotlib", "safetensors", "skimage", "torchmetrics", "torchvision", "tqdm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        0; 1 if a library is missing; 130 after Ctrl-C. Wrong arguments exit with 2, as argparse does.
    """
    parser = argparse.ArgumentParser(prog="maft-adapter", description="Mask-aware CLIP (MAFT, NeurIPS 2023).")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="the paper's Table 4(a) on an embedded world, with pictures",
        description=(
            "Compare a frozen CLIP with mask & crop, IP-CLIP without fine-tuning, and IP-CLIP fine-tuned "
            "with L_ma and with L_ma + L_dis, on held-out scenes of the embedded world. Prints the table "
            "beside the paper's Table 4(a); writes report.html, its figures as PNG, and metrics.json. "
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
    arguments = parser.parse_args(argv)

    if arguments.seeds is not None and arguments.seeds < 1:
        demo.error(f"--seeds {arguments.seeds}: expected at least 1")
    if arguments.seed < 0:
        demo.error(f"--seed {arguments.seed}: expected at least 0")
    missing = [name for name in _DEMO_MODULES if find_spec(name) is None]
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'maft-adapter[demo]'", file=sys.stderr)
        return 1
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        demo.error(f"--out {arguments.out}: can't be made a folder ({error.strerror})")
    seeds = [arguments.seed] if arguments.seeds is None else range(arguments.seeds)
    try:
        from .shapes.demo import run_demo

        run_demo(arguments.out, seeds, quick=arguments.quick, start_layer=arguments.start_layer)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
