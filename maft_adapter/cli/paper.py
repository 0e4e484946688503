"""`maft-adapter paper`: the paper's tables, on the embedded world or on a data set, beside what was published."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    paper = commands.add_parser(
        "paper",
        help="the tables of the paper, measured here, beside the published figures",
        description=(
            "Fine-tune and evaluate what a table of the paper compares, with the commands finetune and evaluate, and "
            "print it beside the published figures. DIR gets README.md, a page with its tables so far and a plot of "
            "each, and tables.json; its folders runs/ and scores/ hold what the two commands wrote. A second run with "
            "the same DIR goes on with what is there. On the embedded world a seed of a table takes up to ten minutes "
            "on two cores."
        ),
    )
    paper.add_argument(
        "tables", nargs="+", metavar="TABLE",
        help="1, 2, 3, 4a, 4b, 4c, 4d, 4e, 5, 6 (on data sets), 7, 8, bank (a memory of labelled masks, which came "
        "after the paper), or all",
    )  # fmt: skip
    paper.add_argument(
        "--data", default="shapes", metavar="NAME", help="data set, as in data check (default: the embedded world)"
    )
    paper.add_argument("--root", metavar="DIR", help="folder that holds the data sets")
    paper.add_argument("--model", metavar="NAME", help="frozen CLIP, of open_clip or transformers, for a data set")
    paper.add_argument("--pretrained", metavar="TAG", help="weights of an open_clip model: a tag, a file, or random")
    paper.add_argument(
        "--proposals", default="superpixels", metavar="KIND",
        help="of all tables but 1, 2 and 5, as in evaluate (default: %(default)s)",
    )  # fmt: skip
    paper.add_argument(
        "--generator", metavar="KIND",
        help="proposals with class scores, for Tables 1 and 2, and the other generator of Table 5 (default: the "
        "embedded world's own; for Table 5 on a data set, sam)",
    )  # fmt: skip
    paper.add_argument(
        "--iterations", metavar="N", help="of fine-tuning, where a table does not say (default: as finetune)"
    )
    paper.add_argument("--trained-on", metavar="NAMES", help="as in evaluate, for the generator's class scores")
    paper.add_argument("--seeds", type=int, default=1, metavar="K", help="seeds 0 to K-1 (default: 1)")
    paper.add_argument("--quick", action="store_true", help="few pictures and iterations: figures that mean nothing")
    paper.add_argument("--out", type=Path, default=Path("maft-paper"), metavar="DIR", help="(default: %(default)s)")
    paper.set_defaults(run=run, error=paper.error)


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    from ..paper import NAMES, TABLES, World, claim, measure, text, write

    if arguments.seeds < 1:
        arguments.error(f"--seeds {arguments.seeds}: expected at least 1")
    names = arguments.tables
    if names == ["all"]:
        names = [name for name in NAMES if name != "6" or arguments.data != "shapes"]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        arguments.error(f"unknown table {', '.join(unknown)}: expected {', '.join(NAMES)}, or all alone")
    where = ("--root", arguments.root) if arguments.root else ()
    model = [("--model", arguments.model), ("--pretrained", arguments.pretrained)]
    world = World(
        arguments.data, where, tuple(word for option in model if option[1] for word in option),
        arguments.proposals, arguments.generator,
        ("--iterations", arguments.iterations) if arguments.iterations else (),
        ("--trained-on", arguments.trained_on) if arguments.trained_on else (), arguments.quick,
    )  # fmt: skip
    try:
        for name in names:
            if name in TABLES:
                TABLES[name](world)  # which may need other options, said before hours of others
        claim(arguments.out, world)
        for name in names:
            result = measure(name, world, range(arguments.seeds), arguments.out)
            write(result, arguments.out)
            print(text(result) + "\n", flush=True)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"maft-adapter paper: {error}", file=sys.stderr)
        return 1
    print(f"the page: {arguments.out / 'README.md'}")
    return 0
