"""The command line, `maft-adapter COMMAND`: one module for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import app, data, demo, embed, evaluate, finetune, search, segment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        0; 1 if something failed, such as a missing library; 130 after Ctrl-C. Wrong arguments exit with 2, as argparse
        does.
    """
    parser = argparse.ArgumentParser(prog="maft-adapter", description="Mask-aware CLIP (MAFT, NeurIPS 2023).")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (segment, embed, search, data, finetune, evaluate, app, demo):
        command.add(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
