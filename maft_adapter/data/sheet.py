"""Pictures of a data set with their labels, for a contact sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np

from ..contact_sheet import Entry
from ..extras import extra
from ..pictures import read_picture
from ..show import PALETTE, UNLABELLED, colorize
from .datasets import Item, SegmentationDataset

with extra("pictures"):
    from PIL import Image


def sheet_entries(dataset: SegmentationDataset, items: Sequence[Item], height: int = 200) -> list[Entry]:
    """Pictures with their label maps on the right, for a `contact_sheet` that can be filtered by class.

    The nine largest classes of a picture have colours, the others share a grey; what does not count is white.

    Args:
        dataset: whose items they are.
        items: some of them.
        height: of the thumbnails, in pixels.
    """
    entries = []
    for item in items:
        areas = np.bincount(item.labels.ravel(), minlength=dataset.ignore_index + 1)[: len(dataset.class_names)]  # (C,)
        present = [k for k in np.argsort(-areas, kind="stable").tolist() if areas[k]]
        palette = {**dict(zip(present, PALETTE, strict=False)), dataset.ignore_index: UNLABELLED}
        pages = [Image.fromarray(read_picture(item.picture)), Image.fromarray(colorize(item.labels, palette))]
        size = max(1, round(pages[0].width * height / pages[0].height)), height
        both = Image.new("RGB", (2 * size[0], height))
        both.paste(pages[0].resize(size), (0, 0))
        both.paste(pages[1].resize(size, Image.Resampling.NEAREST), (size[0], 0))
        jpeg = io.BytesIO()
        both.save(jpeg, "JPEG")
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
        names = [dataset.class_names[k][0] for k in present]
        shares = (f"{name} {100 * areas[k] / item.labels.size:.0f} %" for name, k in zip(names, present, strict=True))
        entries.append(Entry(url, f"{dataset.name} {dataset.split} {item.name}", names, ", ".join(shares)))
    return entries
