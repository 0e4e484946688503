"""What the commands that read pictures have in common: which model, which masks, at what size, where."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_pictures(parser: argparse.ArgumentParser, kinds: str = "files, folders, patterns") -> None:
    """Add PICTURES and the options of the model and the masks to a command."""
    parser.add_argument("pictures", nargs="+", metavar="PICTURES", help=kinds)
    parser.add_argument(
        "--model", metavar="NAME",
        help="of open_clip, such as ViT-B-16, or of transformers, such as openai/clip-vit-base-patch16, or its folder "
        "(default: the small CLIP that comes with this library, which knows drawn scenes only)",
    )  # fmt: skip
    parser.add_argument(
        "--pretrained", metavar="TAG", help="weights of an open_clip model: a tag, such as openai, a file, or random"
    )
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="fine-tuned image tower: what finetune --out wrote, or a released one"
    )
    parser.add_argument(
        "--proposals", default="superpixels", metavar="KIND",
        help="where masks come from: superpixels, sam[:MODEL], mask2former[:MODEL] or files:PATH "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, metavar="PIXELS",
        help="side of the square that a picture becomes (default: the model's, 480 for most)",
    )  # fmt: skip
    parser.add_argument("--keep-aspect", action="store_true", help="keep the ratio of its sides instead")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of the image tower (default: %(default)s)",
    )


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of the model, as `load_model` takes it."""
    checkpoint = arguments.checkpoint
    if checkpoint is not None and Path(checkpoint).is_dir():
        checkpoint = Path(checkpoint) / "tower.safetensors"
        if not checkpoint.is_file():
            raise FileNotFoundError(
                f"--checkpoint {arguments.checkpoint} has no {checkpoint.name}: name a folder that finetune wrote"
            )
    options = {name: getattr(arguments, name) for name in ("pretrained", "precision")}
    return options | {"name": arguments.model, "checkpoint": checkpoint}


def masks_of(proposals: str) -> str | None:
    """What tells that the masks of files:PATH changed; None for proposals that are made of the picture alone."""
    from ..proposals.base import fingerprint

    kind, _, path = proposals.partition(":")
    return fingerprint(Path(path)) if kind == "files" else None
