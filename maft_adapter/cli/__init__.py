"""The command line, `maft-adapter COMMAND`: one module for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import app, data, demo, embed, evaluate, finetune, paper, search, segment


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    whole = argparse.ArgumentParser(prog="maft-adapter", description="Mask-aware CLIP (MAFT, NeurIPS 2023).")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (segment, embed, search, data, app, finetune, evaluate, paper, demo):
        command.add(commands)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        0; 1 if something failed, such as a missing library; 130 after Ctrl-C. Wrong arguments exit with 2, as argparse
        does.
    """
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except ModuleNotFoundError as error:
        print(f"maft-adapter: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
