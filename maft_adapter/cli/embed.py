"""`maft-adapter embed`: embeddings of every mask of a collection."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .options import add_pictures, model_options


def add(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    embed = commands.add_parser(
        "embed",
        help="embeddings of every mask of a collection, to be searched",
        description=(
            "Embed every mask of pictures and write Parquet files of one row a picture: path, size, masks as COCO RLE, "
            "areas, boxes, scores, which masks are valid, and embeddings in float16 of unit length. A second run skips "
            "what is there, so that a run that was stopped goes on, tries again what failed, and embeds again pictures "
            "that changed or whose masks did; options must be the same. A picture that fails is named, the others go "
            "on, and the exit status is 1."
        ),
    )
    add_pictures(embed, "files, folders, patterns, webdataset shards (.tar)")
    embed.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to, made if missing")
    embed.add_argument(
        "--per-shard", type=int, default=256, metavar="N",
        help="pictures of a file; a run that is killed loses at most those of one (default: %(default)s)",
    )  # fmt: skip
    embed.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS",
        help="run in workers of Ray Data: on this machine, or on the cluster of that address, such as auto, where "
        "pictures and DIR need the same paths on all machines. Write it behind PICTURES",
    )  # fmt: skip
    embed.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    try:
        from ..embed import Embedder, embed, embed_on_ray

        options = {name: getattr(arguments, name) for name in ("proposals", "size", "keep_aspect", "device")}
        options |= model_options(arguments)
        pictures, out, per_shard = arguments.pictures, arguments.out, arguments.per_shard
        if arguments.ray is not None:
            summary = embed_on_ray(pictures, out, arguments.ray, per_shard=per_shard, **options)
        else:
            summary = embed(pictures, out, Embedder(**options), per_shard=per_shard, progress=True)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"maft-adapter embed: {error}", file=sys.stderr)
        return 1
    failed = len(summary.failed)
    print(f"{summary.embedded} pictures embedded, {summary.skipped} had been already, {failed} failed: {out}")
    return 1 if failed else 0
