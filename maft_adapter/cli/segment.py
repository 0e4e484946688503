"""`maft-adapter segment`: from pictures and words to label maps, overlays and annotations."""

from __future__ import annotations

import argparse
import errno
import glob
import hashlib
import json
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import replace_file
from ..contact_sheet import Entry, contact_sheet
from .options import add_pictures, model_options

KEPT = ".proposals"  # in the folder that is written to
_TEXT = (".csv", ".json", ".list", ".lst", ".md", ".names", ".tsv", ".txt", ".yaml", ".yml")  # of files of classes


def add(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    segment = commands.add_parser(
        "segment",
        help="label maps, overlays and COCO annotations of pictures, with your own words",
        description=(
            "Label the regions of pictures with words. For each picture NAME.png (label map: indices of the classes, "
            "with a palette, 255 where nothing is; 16 bits and 65535 for more than 255 classes), NAME_overlay.jpg with "
            "a legend, and NAME.json (COCO: RLE, area, box, the five best classes with their scores) are written, and "
            "index.html, which shows all of them and can be filtered by class. Sub-folders are kept; where two "
            "pictures have the same stem, NAME is the file's whole name. Outputs of an earlier run are not taken for "
            "pictures. Without --model, the small CLIP of the drawn "
            "scenes in examples/pictures is used, with their classes. A second run with the same options skips what is "
            "finished; a picture that fails is named, the others go on, and the exit status is 1."
        ),
    )
    add_pictures(segment)
    segment.add_argument(
        "--classes", metavar="LIST",
        help="names with commas between them, or a file: a class a line, synonyms with commas between them, also with "
        "INDEX: before each, or a JSON list; labels count the classes from 0 in the order of the file, whatever INDEX "
        "says (default: those of the embedded world, which needs no --model)",
    )  # fmt: skip
    segment.add_argument("--background", metavar="WORDS", help="one more class, whose pixels are left unlabelled")
    segment.add_argument(
        "--templates", metavar="NAME",
        help="prompts: one, vild (14), imagenet (80), or your own, such as 'a painting of a {}.' (default: one)",
    )  # fmt: skip
    segment.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write to, new, empty or of an earlier run"
    )
    segment.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    try:
        return _run(arguments)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(_printable(f"maft-adapter segment: {error}"), file=sys.stderr)
        return 1


def read_classes(given: str) -> list[tuple[str, ...]]:
    """The classes of `--classes`.

    Args:
        given: names with commas between them, or the path of a file, whose forms are those of
            `maft_adapter.data.read_classes`. Label k is the file's k-th class, from 0 on; numbers in it don't count.

    Raises:
        ValueError: no classes, an empty name or one that comes twice; or what looks like a path but leads to no file.
        OSError: the file can't be read.

    Example:
        >>> read_classes("swan, red river")
        [('swan',), ('red river',)]
    """
    from ..data import read_classes as read_file

    if os.path.isfile(given):  # of a long list, Path.is_file raises
        return list(read_file(given).names)
    # One word may be a class; one that is written as paths are is a file that was mistyped.
    if os.path.isdir(given) or ("," not in given and (os.sep in given or Path(given).suffix in _TEXT)):
        raise ValueError(f"--classes {given}: no such file; a class of that name has to stand in a file")
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise ValueError(f"--classes {given}: no classes, or an empty name; is there a comma too much?")
    return [(name,) for name in names]


def root_of(arguments: Sequence[str]) -> Path:
    """The folder that PICTURES share: of folders themselves, of files theirs, of patterns what comes before the first
    sign of a pattern. It depends on what was given, not on what was found, so that names of outputs stay.

    Example:
        >>> root_of(["/p/x/*.jpg", "/p/a.jpg"]).as_posix()
        '/p'
    """
    folders = []
    for argument in arguments:
        if not os.path.isdir(argument):
            pattern = glob.has_magic(argument) and not os.path.lexists(argument)
            argument = os.path.dirname(argument)
            while pattern and glob.has_magic(argument):
                argument = os.path.dirname(argument)
        folders.append(os.path.abspath(argument))
    return Path(os.path.commonpath(folders))


def output_names(pictures: Sequence[Path], root: Path) -> list[str]:
    """What the outputs of pictures are called: their paths below `root`, without suffixes.

    Names that would fall together (of `a.jpg` and `a.png`, of `A.jpg` on some disks, or of `a.jpg` and a folder
    `a.png`) keep their suffix.

    Example:
        >>> output_names([Path("/p/a.jpg"), Path("/p/b/a.jpg"), Path("/p/b/a.png")], Path("/p"))
        ['a', 'b/a.jpg', 'b/a.png']
    """
    from ..pictures import OUTPUTS

    def key(name: object) -> str:
        return unicodedata.normalize("NFC", str(name)).casefold()

    full = [Path(os.path.abspath(picture)).relative_to(root) for picture in pictures]
    folders = {key(folder) for path in full for folder in path.parents}
    names = [path.with_suffix("") for path in full]
    for i, name in enumerate(names):
        if any(key(f"{name}{end}") in folders for end in OUTPUTS):
            names[i] = full[i]
    for _ in range(2):  # what has its suffix now may be the stem of another
        alike: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            alike.setdefault(key(name), []).append(i)
        for group in alike.values():
            if len(group) > 1:
                for i in group:
                    names[i] = full[i]
    return [name.as_posix() for name in names]


def _run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..models import load_model
    from ..pictures import OUTPUTS, Segmenter, find_pictures
    from ..proposals import Kept, proposer
    from ..proposals.base import version_of

    out: Path = arguments.out
    notes: list[str] = []
    pictures = find_pictures(arguments.pictures, notes.append)
    inside = [path for path in pictures if out.resolve() in path.resolve().parents]
    if inside:
        raise ValueError(f"{inside[0]} is in --out {out}, where it could be replaced: name another folder")
    classes = None if arguments.classes is None else read_classes(arguments.classes)
    root = root_of(arguments.pictures)
    names = output_names(pictures, root)
    _claim(out, root)
    model = load_model(device=arguments.device, **model_options(arguments))
    if classes is None and model.class_names is not None:
        classes = [(name,) for name in model.class_names]
    if classes is None:
        raise ValueError("--model needs --classes: a list, such as 'swan, river, grass', or a file")
    templates = arguments.templates or model.templates
    segmenter = Segmenter(
        model.clip, model.tokenizer, classes,
        proposals=Kept(proposer(arguments.proposals, arguments.device), out / KEPT),
        templates=[templates] if isinstance(templates, str) and "{" in templates else templates,
        background=arguments.background, size=model.size if arguments.size is None else arguments.size,
        keep_aspect=arguments.keep_aspect,
    )  # fmt: skip
    settings = {
        "model": model.source,
        "proposals": segmenter.proposals.settings,
        "templates": list(segmenter.templates),
        "background": segmenter.background,
        "size": segmenter.size,
        "keep_aspect": segmenter.keep_aspect,
    }

    entries, failed, made = [], 0, 0
    for path, name in tqdm(list(zip(pictures, names, strict=True)), unit="picture", disable=None):
        try:
            masks = version_of(segmenter.proposals, str(path))
            info = {"settings": settings, "picture_sha256": _digest(path), "masks": masks}
            coco = _finished(out, name, info, segmenter.class_names)
            if coco is None:
                segmenter(path).save(out, name, info)
                coco = json.loads((out / f"{name}.json").read_bytes())
                made += 1
            entries.append(_entry(name, coco))
        except Exception as error:  # of any kind, so that one bad picture does not stop the others
            if isinstance(error, OSError) and error.errno in _DISK:
                raise OSError(f"--out {out} can't be written to: {error}") from error
            reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
            reason = reason if str(path) in reason else f"{path}: {reason}"
            if any((out / f"{name}{end}").exists() for end in OUTPUTS):
                reason += f"; what {out} holds of {name} is of an earlier run"
            tqdm.write(_printable(f"failed: {reason}"), file=sys.stderr)
            failed += 1
    page = contact_sheet(entries, "maft-adapter segment")
    replace_file(out / "index.html", page.encode(errors="replace"))
    already = len(entries) - made
    print(_printable(f"{made} pictures segmented, {already} had been already, {failed} failed: {out / 'index.html'}"))
    for note in notes:
        print(_printable(f"passed over: {note}"))
    return 1 if failed else 0


# Of errors that concern all pictures: no room, or a folder that can't be written to.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _claim(out: Path, root: Path) -> None:
    """Make the folder this command's, for pictures below `root`.

    Raises:
        ValueError: it holds files of something else, or outputs of other pictures, which could be replaced.
        OSError: it can't be made or written to.
    """
    from ..pictures import MARK

    mark = f"written by maft-adapter segment for pictures in\n{root}\n".encode(errors="surrogateescape")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / MARK).exists():
            if (out / MARK).read_bytes() != mark:
                other = "holds outputs of pictures of another folder"
                raise ValueError(f"--out {out} {other}, which {MARK} in it names: name a new folder")
        elif not all(path.match(f"{MARK}.*.part") for path in out.iterdir()):  # which a run that was killed may leave
            raise ValueError(f"--out {out} holds other files, which could be replaced: name a new or empty folder")
        replace_file(out / MARK, mark)
    except OSError as error:
        raise OSError(f"--out {out} can't be written to: {error.strerror}") from error


def _digest(path: Path) -> str:
    """Of the file, "" where it can't be read, which `read_picture` explains."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    except OSError:
        return ""


def _finished(out: Path, name: str, info: Mapping[str, Any], classes: Sequence[Sequence[str]]) -> dict[str, Any] | None:
    """The annotations of an earlier run, if its files are whole and of the same picture, settings and classes."""
    try:
        coco = json.loads((out / f"{name}.json").read_bytes())
        whole = all(
            _digest(out / Path(name).parent / file) == digest for file, digest in coco["info"]["sha256"].items()
        )
        same = all(coco["info"][key] == value for key, value in info.items())
        if whole and same and [entry["synonyms"] for entry in coco["categories"]] == [list(names) for names in classes]:
            return coco
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        pass
    return None


def _entry(name: str, coco: Mapping[str, Any]) -> Entry:
    names = {str(category["id"]): category["name"] for category in coco["categories"]}
    pixels = coco["info"]["pixels"]
    found = [names[key] for key in sorted(pixels, key=lambda key: -pixels[key])]
    image, left_out = coco["images"][0], len(coco["info"]["left_out"])
    note = f"{image['width']} × {image['height']}, {len(coco['annotations'])} masks"
    return Entry(
        f"{name}_overlay.jpg",
        name,
        found,
        f"{note}, {left_out} more are too small" if left_out else note,
        {"labels": f"{name}.png", "COCO": f"{name}.json"},
    )


def _printable(text: str) -> str:
    """Without what names of files may hold and no stream takes."""
    return text.encode(errors="replace").decode()
