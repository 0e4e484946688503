"""`maft-adapter data check`: what is there of the data sets in a folder, and what is wrong with it."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    data = commands.add_parser("data", help="check data sets on disk", description="Data sets on disk.")
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="layout, counts and label values of the data sets in a folder",
        description=(
            "Look for data sets in every layout that people have them in, count their pictures, compare with what is "
            "published, and read a sample of pictures and labels. Exits with 1 if something is wrong or nothing is "
            "there."
        ),
    )
    check.add_argument(
        "root", type=Path, metavar="ROOT", help="the folder that holds the data sets, or a data set's own"
    )
    check.add_argument(
        "--data", metavar="NAME",
        help="check this one only: voc-20, voc-20b, voc-21, coco-stuff, ade20k-150, ade20k-847, context-59, "
        "context-459, folder (ROOT holds images/ and labels/), shapes or mess:NAME",
    )  # fmt: skip
    check.add_argument(
        "--classes", default="plain", metavar="NAMES",
        help="class names: plain, prompted (those of prompt engineering), or a file (default: %(default)s)",
    )  # fmt: skip
    check.add_argument("--layout", metavar="NAME", help="check this layout rather than the first that is there")
    check.add_argument(
        "--sample", type=int, default=32, metavar="N", help="pictures and labels to read of each split (default: 32)"
    )
    check.add_argument("--out", type=Path, metavar="FILE.html", help="write the sample there as a contact sheet")
    check.set_defaults(run=run, error=check.error)


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    from ..data.check import check_dataset
    from ..data.datasets import DATASETS, open_dataset
    from ..data.layouts import LAYOUTS, SPLITS, find_layouts

    if arguments.sample < 1:
        arguments.error(f"--sample {arguments.sample}: expected at least 1")
    if not arguments.root.is_dir():
        arguments.error(f"{arguments.root} is no folder")
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        arguments.error(f"--out {arguments.out}: its folder does not exist")
    if arguments.data is not None and arguments.data.partition(":")[0] not in (*DATASETS, "mess"):
        arguments.error(f"--data {arguments.data}: expected one of {', '.join(DATASETS)}, or mess:NAME")
    names = [arguments.data] if arguments.data else [name for name in LAYOUTS if name != "folder"]

    missing, faults, samples = [], 0, []
    parts = [(name, split) for name in names for split in SPLITS if not (name.startswith("mess:") and split == "train")]
    for name, split in parts:
        try:
            found = find_layouts(name, arguments.root, split) if name in LAYOUTS else []
            if name in LAYOUTS and not found:
                missing.append(f"{name} {split}")
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the report says the same
                dataset = open_dataset(name, arguments.root, split, names=arguments.classes, layout=arguments.layout)
            report = check_dataset(dataset, arguments.sample)
        except (ImportError, OSError, ValueError) as error:
            print(f"{name} {split}\n  WRONG: {error}")
            faults += 1
            continue
        print(f"{name} {split}: {dataset.layout} layout" + (f", in {dataset.folder}" if dataset.folder else ""))
        print(f"  {len(dataset.class_names)} classes, {dataset.names} names, {len(dataset.unseen)} of them unseen")
        also = [f"{one.layout.name}, in {one.folder}" for one in found if one.layout.name != dataset.layout]
        facts = [*report.facts, *(f"not taken: {one}" for one in also), *(f"WRONG: {one}" for one in report.faults)]
        print("".join(f"  {fact}\n" for fact in facts), end="")
        faults += len(report.faults)
        samples.append((dataset, report.sample))

    if missing:
        print(f"not there: {', '.join(missing)}")
    if len(missing) == len(parts):
        folders = sorted({folder for name in names for layout in LAYOUTS[name] for folder in layout.folders if folder})
        print(f"nothing found in {arguments.root}: looked for {', '.join(folders) or 'images/ and labels/'}")
        return 1
    if arguments.out is not None:
        from ..contact_sheet import contact_sheet
        from ..data.sheet import sheet_entries

        entries = [entry for dataset, items in samples for entry in sheet_entries(dataset, items)]
        arguments.out.write_text(contact_sheet(entries, f"Data sets in {arguments.root}"), encoding="utf-8")
        print(f"{len(entries)} pictures with their labels: {arguments.out}")
    print(f"wrong: {faults}" if faults else "nothing is wrong")
    return 1 if faults else 0
