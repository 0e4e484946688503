"""`maft-adapter search`: the masks of a collection that are nearest to words, or to one of them."""

from __future__ import annotations

import argparse
import base64
import io
import sys
from pathlib import Path
from typing import Any

_THUMBNAIL = 320  # pixels of its longer side


def add(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    search = commands.add_parser(
        "search",
        help="the masks of an embedded collection that are nearest to words or to a mask",
        description=(
            "Compare all masks that maft-adapter embed has written with words, or with one of them, print the nearest "
            "with their cosine similarity, and write a page that shows them. The model is the one that they were "
            "embedded with."
        ),
    )
    search.add_argument("folder", type=Path, metavar="DIR", help="what maft-adapter embed wrote")
    search.add_argument("words", nargs="?", metavar="WORDS", help="such as 'red ball'")
    search.add_argument(
        "--like", metavar="PATH:INDEX", help="instead of words: a picture of the collection and the index of its mask"
    )
    search.add_argument("-k", type=int, default=10, help="how many masks (default: %(default)s)")
    search.add_argument("--html", type=Path, metavar="FILE", help="the page, replaced (default: DIR/search.html)")
    search.add_argument("--device", default="cpu", help="of the text encoder, such as cuda (default: %(default)s)")
    search.set_defaults(run=run, error=search.error)


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    if (arguments.words is None) == (arguments.like is None):
        arguments.error("give words or --like PATH:INDEX, one of them")
    if arguments.k < 1:
        arguments.error(f"-k {arguments.k}: expected at least 1")
    path, _, index = (arguments.like or ":0").rpartition(":")
    if not index.isdecimal():
        arguments.error(f"--like {arguments.like}: expected a path, a colon and a number, such as a.jpg:3")
    try:
        return _run(arguments, path, int(index))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"maft-adapter search: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace, path: str, index: int) -> int:
    from ..checkpoint import replace_file
    from ..classify import text_classifier
    from ..contact_sheet import contact_sheet
    from ..embed import model_of, read_embeddings
    from ..search import search

    embeddings = read_embeddings(arguments.folder)
    if arguments.like is not None:
        query = embeddings.matrix[[embeddings.find(path, index)]]  # (1, D)
    else:
        model = model_of(embeddings.settings, arguments.device)
        query = text_classifier(model.clip, model.tokenizer, [arguments.words], model.templates).cpu().numpy()  # (1, D)
    scores, found = (each[0] for each in search(embeddings.matrix, query, arguments.k))  # (k,) each
    rows = embeddings.rows(embeddings.pictures[found].tolist())
    hits = list(zip(scores.tolist(), embeddings.masks[found].tolist(), rows, strict=True))
    print(f"{'score':>6}  {'mask':>5}  {'box (XYXY)':23}  picture")
    for score, mask, row in hits:
        box = " ".join(f"{edge:5}" for edge in row["boxes"][mask])
        print(f"{score:6.3f}  {mask:5}  {box}  {row['path']}")
    page = arguments.html or arguments.folder / "search.html"
    title = arguments.words or f"like {arguments.like}"
    replace_file(page, contact_sheet([_entry(*hit) for hit in hits], title).encode(errors="replace"))
    print(f"{len(hits)} of {len(embeddings.matrix)} masks: {page}")
    return 0


def _entry(score: float, mask: int, row: dict[str, Any]) -> Any:
    """A hit on the page: the picture with its mask."""
    from ..contact_sheet import Entry
    from ..embed import source_of
    from ..pictures import read_picture
    from ..proposals.convert import from_rle
    from ..show import overlay

    note = f"mask {mask}, {score:.3f}"
    size = row["height"], row["width"]
    try:
        picture = read_picture(source_of(row["path"]).read())  # (H, W, 3)
        shown = overlay(picture, from_rle([{"size": size, "counts": row["masks"][mask]}], picture.shape[:2])[0])
    except (OSError, ValueError) as error:
        return Entry("", row["path"], note=f"{note}; can't be shown: {error}")
    from PIL import Image

    image = Image.fromarray(shown)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(file := io.BytesIO(), "jpeg")
    return Entry(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", row["path"], note=note)
