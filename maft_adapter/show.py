"""Pictures of proposals and label maps, for any dataset: matplotlib figures, and one picture with its labels on it.

Nothing here touches pyplot or its global state: every figure is an object of its own, with `savefig`.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .extras import extra

with extra("demo"):
    from matplotlib import get_data_path
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from PIL import Image, ImageDraw, ImageFont

__all__ = ["PALETTE", "class_colors", "colorize", "label_maps", "labelled", "overlay", "typical_proposals"]

# Paul Tol's "muted" scheme: nine colours that stay apart under every form of colour blindness. Further ones
# would not, which is why pictures with more classes show the rest as `OTHER`.
PALETTE = (
    (136, 204, 238),
    (204, 102, 119),
    (221, 204, 119),
    (17, 119, 51),
    (51, 34, 136),
    (170, 68, 153),
    (68, 170, 153),
    (153, 153, 51),
    (136, 34, 85),
)
OTHER = (214, 214, 214)
UNLABELLED = (255, 255, 255)
_CORRECT, _WRONG = "#117733", "#b9bec6"


def overlay(
    image: ArrayLike, mask: ArrayLike, color: tuple[int, int, int] = (0, 215, 90), fade: float = 0.72
) -> NDArray[np.uint8]:
    """Show one proposal: the region keeps its colours, the rest fades, the border is drawn.

    Args:
        image: (H, W, 3) uint8 RGB in [0, 255].
        mask: (H, W) bool or in [0, 1], inside from 0.5 on.
        color: RGB in [0, 255] of the border, the outermost pixels of the region.
        fade: in [0, 1], how much of the rest turns white.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: another shape or dtype, or a mask, a colour or a fade out of its range.

    Example:
        >>> mask = np.zeros((8, 8), bool)
        >>> mask[2:7, 2:7] = True
        >>> picture = overlay(np.zeros((8, 8, 3), np.uint8), mask)
        >>> picture[0, 0].tolist(), picture[2, 2].tolist(), picture[4, 4].tolist()
        ([183, 183, 183], [0, 215, 90], [0, 0, 0])
    """
    picture, region = _check_image(image), np.asarray(mask)
    if region.shape != picture.shape[:2]:
        raise ValueError(f"mask is {region.shape}, expected the image's {picture.shape[:2]}: resize one of them")
    if not ((region >= 0) & (region <= 1)).all():
        raise ValueError("mask must lie in [0, 1]: turn logits into probabilities with a sigmoid")
    if not 0 <= fade <= 1:
        raise ValueError(f"fade is {fade!r}, expected a number in [0, 1]")
    _check_color(color)
    inside = region >= 0.5
    padded = np.pad(inside, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    out = np.where(inside[..., None], picture, picture * (1 - fade) + 255 * fade)
    out[inside & ~inner] = color
    return out.astype(np.uint8)


def colorize(
    label_map: ArrayLike,
    palette: Mapping[int, tuple[int, int, int]],
    other: tuple[int, int, int] = OTHER,
) -> NDArray[np.uint8]:
    """Colour a label map.

    Args:
        label_map: (H, W) integers.
        palette: label -> RGB in [0, 255].
        other: RGB of the labels that the palette leaves out.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: the map is not two-dimensional or not of integers, or a colour is not RGB in [0, 255].

    Example:
        >>> colorize([[0, 7]], {7: (136, 204, 238)}).tolist()
        [[[214, 214, 214], [136, 204, 238]]]
    """
    labels = _check_label_map(label_map)
    for color in (other, *palette.values()):
        _check_color(color)
    out = np.empty((*labels.shape, 3), np.uint8)
    out[:] = other
    for label, color in palette.items():
        out[labels == label] = color
    return out


def class_colors(count: int) -> NDArray[np.uint8]:
    """A colour for each of `count` classes, the same in every picture, (count, 3) RGB in [0, 255].

    The first nine are `PALETTE`; of the others, neighbours differ in hue by the golden angle.

    Raises:
        ValueError: a negative count.

    Example:
        >>> class_colors(11).tolist()[8:]
        [[136, 34, 85], [217, 87, 87], [73, 106, 184]]
    """
    if count < 0:
        raise ValueError(f"count is {count}, expected at least 0")
    further = [
        colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.6, 0.6, 0.85, 0.4)[k % 4], (0.85, 0.72, 0.6, 0.95)[k % 4])
        for k in range(count - len(PALETTE))
    ]
    colors = [*PALETTE, *([round(255 * value) for value in color] for color in further)]
    return np.array(colors[:count], np.uint8).reshape(-1, 3)


def labelled(
    image: ArrayLike, label_map: ArrayLike, class_names: Sequence[str], ignore_index: int = 255
) -> Image.Image:
    """A picture with the colours of its label map laid over it, lines between the regions, and a legend below.

    The legend names the classes that are there, the largest first, with their share of the picture. Unlabelled pixels
    stay as they are.

    Args:
        image: (H, W, 3) uint8 RGB in [0, 255].
        label_map: (H, W) integers, indices into `class_names` or `ignore_index`.
        class_names: C names. Colours are those of `class_colors(C)`.
        ignore_index: unlabelled.

    Returns:
        As wide as the picture and higher by the legend; pictures of less than 320 pixels a side are enlarged by a
        whole number, and the legend is at least 320 pixels wide, and wider where a name needs it.

    Raises:
        ValueError: shapes that don't match, or other labels.

    Example:
        >>> picture, labels = np.zeros((200, 400, 3), np.uint8), np.zeros((200, 400), int)
        >>> labelled(picture, labels, ["grass"]).size
        (400, 227)
    """
    picture, labels = _check_image(image), np.asarray(label_map)
    _check_size(labels, picture)
    colors = class_colors(len(class_names))  # (C, 3)
    areas = np.zeros(len(class_names), np.int64)  # (C,)
    out = picture.copy()
    rows = max(1, 2**20 // max(1, picture.shape[1]))  # at a time, as integers and floats are wide
    for y in range(0, len(picture), rows):
        part, of_part = out[y : y + rows], _check_label_map(labels[y : y + rows])
        _check_labels(of_part, part, len(class_names), ignore_index)
        known = of_part != ignore_index
        areas += np.bincount(of_part[known], minlength=len(class_names))
        # On half grey, so that colours look as they do in the legend.
        pixels = part[known]  # (K, 3)
        part[known] = 0.16 * pixels + 0.24 * pixels.mean(1, keepdims=True) + 0.6 * colors[of_part[known]]
    total = labels.size
    factor = -(-320 // max(labels.shape))  # small pictures are enlarged
    if factor > 1:
        out, labels = (array.repeat(factor, 0).repeat(factor, 1) for array in (out, labels))
    height, width = labels.shape
    side = (height * width) ** 0.5  # of a square of as many pixels: neither side, where they differ much
    line = max(1, round(side / 500))
    out[line:][labels[line:] != labels[:-line]] = 255
    out[:, line:][labels[:, line:] != labels[:, :-line]] = 255

    size = max(13, round(side / 40))
    font = ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
    found = np.argsort(-areas, kind="stable")[: np.count_nonzero(areas)]
    texts = [f"{class_names[k]} {100 * areas[k] / total:.0f} %" for k in found]
    lengths = [round(1.4 * size + font.getlength(text)) for text in texts]
    room = max(320, width, *(length + size for length in lengths))
    entries, x, y = [], size // 2, size // 2
    for k, text, length in zip(found, texts, lengths, strict=True):
        if x > size // 2 and x + length > room:
            x, y = size // 2, y + round(1.5 * size)
        entries.append((x, y, text, tuple(colors[k].tolist())))
        x += length + size
    sheet = Image.new("RGB", (room, height + (y + round(1.6 * size) if entries else 0)), "white")
    sheet.paste(Image.fromarray(out))
    draw = ImageDraw.Draw(sheet)
    for x, y, text, color in entries:
        draw.rectangle((x, height + y, x + size, height + y + size), fill=color)
        draw.text((x + round(1.4 * size), height + y + size // 2), text, fill="black", font=font, anchor="lm")
    return sheet


def label_maps(
    images: Sequence[ArrayLike],
    maps: Mapping[str, Sequence[ArrayLike]],
    class_names: Sequence[str],
    ignore_index: int = 255,
) -> Figure:
    """Pictures beside their label maps, one row a picture, with a legend of what is there.

    Colours hold within a row: the classes of the first map (give the ground truth first) get theirs first,
    then those of the other maps, by area. Classes beyond the colours of `PALETTE` share one grey.

    Args:
        images: (H, W, 3) uint8 RGB in [0, 255] each.
        maps: column title -> one (H, W) integer label map a picture.
        class_names: C names; labels are indices into them or `ignore_index`, which is left white.
        ignore_index: unlabelled, or covered by no proposal.

    Raises:
        ValueError: no pictures or maps, columns of different lengths, shapes that don't match, other labels.

    Example:
        >>> image, truth = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), int)
        >>> label_maps([image], {"truth": [truth]}, ["grass"]).get_axes()[1].get_title()
        'truth'
    """
    lengths = {name: len(column) for name, column in maps.items()}
    if not images or not maps or set(lengths.values()) != {len(images)}:
        raise ValueError(f"expected one label map a column for each of {len(images)} >= 1 images, got {lengths}")
    pictures = [_check_image(image) for image in images]
    rows = [[_check_label_map(column[i]) for column in maps.values()] for i in range(len(images))]
    for picture, row in zip(pictures, rows, strict=True):
        for labels in row:
            _check_labels(labels, picture, len(class_names), ignore_index)

    columns = 1 + len(maps)
    figure = Figure(figsize=(1.95 * columns + 1.7, 1.95 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns + 1, squeeze=False, width_ratios=[1.0] * columns + [0.85])
    for cell, title in zip(axes[0], ["image", *maps], strict=False):
        cell.set_title(title, fontsize=11, parse_math=False)
    for cells, picture, row in zip(axes, pictures, rows, strict=True):
        palette, named = _row_palette(row, class_names, ignore_index)
        shown = [picture, *(colorize(labels, palette) for labels in row)]
        for cell, content in zip(cells, shown, strict=False):
            _picture(cell, content)
        cells[-1].axis("off")
        legend = cells[-1].legend(
            [Patch(fc=[v / 255 for v in color], ec="#888888", lw=0.5) for _, color in named], [" "] * len(named),
            loc="center left", frameon=False, fontsize=8.5, borderaxespad=0,
            handlelength=1.1, handleheight=1.1, labelspacing=0.35,
        )  # fmt: skip
        # Afterwards, because a legend leaves out names that begin with an underscore.
        for text, (name, _) in zip(legend.get_texts(), named, strict=True):
            text.set(text=name, parse_math=False)
    return figure


def _row_palette(
    row: list[NDArray[np.int64]], class_names: Sequence[str], ignore_index: int
) -> tuple[dict[int, tuple[int, int, int]], list[tuple[str, tuple[int, int, int]]]]:
    """Colours of one row's classes and the entries of its legend: the first map's classes by area, then the others'."""
    areas = np.stack([np.bincount(x[x != ignore_index], minlength=len(class_names)) for x in row])  # (M, C)
    first, total = areas[0], areas.sum(0)
    order = sorted(np.flatnonzero(total).tolist(), key=lambda k: (first[k] == 0, -first[k], -total[k], k))
    palette = dict(zip(order, PALETTE, strict=False))
    named = [(class_names[k], color) for k, color in palette.items()]
    if len(order) > len(palette):
        named.append((f"others ({len(order) - len(palette)})", OTHER))
    if any((labels == ignore_index).any() for labels in row):
        palette[ignore_index] = UNLABELLED
        named.append(("none", UNLABELLED))
    return palette, named


def typical_proposals(
    image: ArrayLike,
    masks: ArrayLike,
    scores: Mapping[str, ArrayLike],
    class_names: Sequence[str],
    correct: Sequence[Sequence[int]],
    titles: Sequence[str],
) -> Figure:
    """Proposals of one picture and the five best classes of each under each model (paper's Figure 1).

    Bars of correct classes are dark green, the others grey; correct names are also in bold type.

    Args:
        image: (H, W, 3) uint8 RGB in [0, 255].
        masks: (N, H, W) bool or in [0, 1], the proposals to show, one row each.
        scores: model's title -> (N, C) probabilities.
        class_names: C names.
        correct: the classes that each of the N proposals contains, as indices into `class_names`.
        titles: of the N proposals.

    Raises:
        ValueError: no proposals or no scores, lengths and shapes that don't match, scores outside [0, 1], or correct
            classes that have no name.

    Example:
        >>> image, masks = np.zeros((8, 8, 3), np.uint8), np.ones((1, 8, 8), bool)
        >>> figure = typical_proposals(image, masks, {"CLIP": [[0.9, 0.1]]}, ["cat", "dog"], [[0]], ["all"])
        >>> [label.get_text() for label in figure.get_axes()[1].get_yticklabels()]
        ['cat', 'dog']
    """
    picture, regions = _check_image(image), np.asarray(masks)
    tables = {name: np.asarray(table) for name, table in scores.items()}
    n = len(regions)
    wanted = (n, len(class_names))
    if not n or not tables or any(table.shape != wanted for table in tables.values()):
        given = {name: table.shape for name, table in tables.items()}
        raise ValueError(f"expected scores {wanted} of at least one model and proposal, got {given}")
    if len(correct) != n or len(titles) != n:
        raise ValueError(f"expected {n} titles and lists of correct classes, got {len(titles)} and {len(correct)}")
    for name, table in tables.items():
        if not ((table >= 0) & (table <= 1)).all():  # also catches NaN
            raise ValueError(
                f"scores of {name!r} must be probabilities in [0, 1], got values from {table.min():.4g} to "
                f"{table.max():.4g}: pass logits through softmax, and divide percentages by 100"
            )
    unknown = sorted({int(k) for row in correct for k in row if not 0 <= k < len(class_names)})
    if unknown:
        raise ValueError(f"correct classes are indices in 0..{len(class_names) - 1}, got {unknown[:8]}")

    figure = Figure(figsize=(2.3 + 3.1 * len(tables), 2.15 * n + 0.3), layout="constrained")
    axes = figure.subplots(n, 1 + len(tables), squeeze=False, width_ratios=[1.0] + [1.25] * len(tables))
    for i, cells in enumerate(axes):
        _picture(cells[0], overlay(picture, regions[i]))
        cells[0].set_title(titles[i], fontsize=10.5, parse_math=False)
        for cell, (name, table) in zip(cells[1:], tables.items(), strict=True):
            _bars(cell, table[i], class_names, correct[i])
            if i == 0:
                cell.set_title(name, fontsize=11, parse_math=False)
    return figure


def _bars(cell: Axes, scores: NDArray[np.float64], class_names: Sequence[str], correct: Sequence[int]) -> None:
    best = np.argsort(-scores, kind="stable")[:5]
    values = 100 * scores[best]
    bars = cell.barh(range(len(best)), values, color=[_CORRECT if k in correct else _WRONG for k in best], height=0.7)
    cell.bar_label(bars, [f"{value:.0f} %" for value in values], padding=3, fontsize=9)
    cell.set_yticks(range(len(best)), [class_names[k] for k in best], fontsize=9.5, parse_math=False)
    for tick, k in zip(cell.get_yticklabels(), best, strict=True):
        tick.set_fontweight("bold" if k in correct else "normal")
    cell.invert_yaxis()
    cell.set_xlim(0, 122)  # room for "100 %"
    cell.set_xticks([])
    cell.tick_params(left=False)
    cell.spines[["top", "right", "bottom"]].set_visible(False)


def _picture(cell: Axes, content: NDArray[np.uint8]) -> None:
    cell.imshow(content, interpolation="nearest")
    cell.set_xticks([])
    cell.set_yticks([])
    for spine in cell.spines.values():
        spine.set_color("#888888")
        spine.set_linewidth(0.6)


def _check_image(image: ArrayLike) -> NDArray[np.uint8]:
    picture = np.asarray(image)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"an image is (H, W, 3) uint8 RGB in [0, 255], got {picture.shape} {picture.dtype}")
    return picture


def _check_color(color: tuple[int, int, int]) -> None:
    if len(color) != 3 or not all(0 <= value <= 255 for value in color):
        raise ValueError(f"a colour is (red, green, blue) in [0, 255], got {color!r}")


def _check_label_map(label_map: ArrayLike) -> NDArray[np.int64]:
    labels = np.asarray(label_map)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"a label map is (H, W) of integers, got {labels.shape} {labels.dtype}")
    return labels.astype(np.int64)


def _check_labels(labels: NDArray[np.int64], picture: NDArray[np.uint8], count: int, ignore_index: int) -> None:
    _check_size(labels, picture)
    bad = labels[((labels < 0) | (labels >= count)) & (labels != ignore_index)]
    if bad.size:
        raise ValueError(f"labels are 0..{count - 1} or {ignore_index}, got {np.unique(bad).tolist()[:8]}")


def _check_size(labels: NDArray[Any], picture: NDArray[np.uint8]) -> None:
    if labels.shape != picture.shape[:2]:
        raise ValueError(f"a label map is {labels.shape}, its image {picture.shape[:2]}: resize one of them")
