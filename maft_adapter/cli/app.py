"""`maft-adapter app`: a page in the browser, to click at pictures and see what the mask-aware CLIP says of regions."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    app = commands.add_parser(
        "app",
        help="click at a picture in the browser: a region's classes before and after mask-awareness",
        description=(
            "Serve a page on this machine: choose a picture, type words, and click a region, draw a box or paint over "
            "something; the five best classes of the frozen CLIP, which sees a cut-out, stand beside those of the "
            "mask-aware CLIP. Without --model it works offline, with the small CLIP of the drawn scenes and their "
            "classes. Ctrl-C ends it."
        ),
    )
    app.add_argument(
        "--model", metavar="NAME",
        help="of open_clip, such as ViT-B-16, or of transformers, or its folder; of the latter there is no 'before' "
        "(default: the small CLIP that comes with this library, which knows drawn scenes only)",
    )  # fmt: skip
    app.add_argument(
        "--pretrained", metavar="TAG", help="weights of an open_clip model: a tag, such as openai, a file, or random"
    )
    app.add_argument(
        "--checkpoint", metavar="FILE", help="fine-tuned image tower: one of this library's or a released one"
    )
    app.add_argument(
        "--proposals", default="superpixels", metavar="KIND",
        help="where regions come from: superpixels, sam[:MODEL], mask2former[:MODEL] or files:PATH "
        "(default: %(default)s)",
    )  # fmt: skip
    app.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    app.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    app.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="to listen on; 0.0.0.0 lets everybody who reaches this machine use it (default: this machine alone)",
    )  # fmt: skip
    app.set_defaults(run=run, error=app.error)


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    if arguments.port is not None and not 1 <= arguments.port <= 65535:
        arguments.error(f"--port {arguments.port}: expected 1 to 65535")
    try:
        from ..app import CSS, build
        from ..models import load_model
        from ..shapes import load_clip

        weights = {"name": arguments.model, "pretrained": arguments.pretrained, "device": arguments.device}
        model = load_model(checkpoint=arguments.checkpoint, **weights)
        frozen = load_model(**weights) if arguments.model and arguments.checkpoint else model
        if arguments.model is None:
            frozen = model._replace(clip=load_clip().to(arguments.device))
        page = build(model, frozen if hasattr(frozen.clip, "encode_image") else None, arguments.proposals)
        # Rendering on the server would be a second one, with a port of its own.
        _, url, _ = page.launch(
            server_name=arguments.host, server_port=arguments.port, share=False, ssr_mode=False, css=CSS, quiet=True,
            prevent_thread_lock=True,
        )  # fmt: skip
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"maft-adapter app: {error}", file=sys.stderr)
        return 1
    print(f"maft-adapter app: {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0
