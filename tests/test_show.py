"""Pictures: what is drawn where, from figure objects alone."""

import io
from typing import Any

import matplotlib._pylab_helpers
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import ImageDraw

from maft_adapter.show import (
    OTHER,
    PALETTE,
    UNLABELLED,
    class_colors,
    colorize,
    label_maps,
    labelled,
    overlay,
    typical_proposals,
)

RNG = np.random.default_rng(0)


def picture(height: int = 12, width: int = 16) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def titles(figure: Figure) -> list[str]:
    return [cell.get_title() for cell in figure.get_axes() if cell.get_title()]


def legend_of(figure: Figure) -> list[tuple[str, tuple[int, ...]]]:
    """Name and RGB in [0, 255] of the entries of a one-row figure."""
    legend = figure.get_axes()[-1].get_legend()
    assert legend is not None
    handles: list[Any] = legend.legend_handles
    return [
        (text.get_text(), tuple(round(255 * v) for v in to_rgb(handle.get_facecolor())))
        for text, handle in zip(legend.get_texts(), handles, strict=True)
    ]


def test_overlay_keeps_the_region_fades_the_rest_and_draws_the_border() -> None:
    image, mask = picture(), np.zeros((12, 16), bool)
    mask[3:9, 0:7] = True  # touches the picture's edge, which is no border
    out = overlay(image, mask, color=(1, 2, 3), fade=0.5)
    for y in range(12):
        for x in range(16):
            neighbours = [(y + dy, x + dx) for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]
            on_edge = any(not mask[a, b] for a, b in neighbours if 0 <= a < 12 and 0 <= b < 16)
            if not mask[y, x]:
                expected = (image[y, x] * 0.5 + 127.5).astype(np.uint8).tolist()
            else:
                expected = [1, 2, 3] if on_edge else image[y, x].tolist()
            assert out[y, x].tolist() == expected


def test_overlay_takes_soft_masks() -> None:
    image, soft = picture(), RNG.random((12, 16))
    assert (overlay(image, soft) == overlay(image, soft >= 0.5)).all()


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (picture().astype(float), np.ones((12, 16)), r"uint8 RGB in \[0, 255\], got \(12, 16, 3\) float64"),
        (picture().transpose(2, 0, 1), np.ones((12, 16)), r"\(H, W, 3\).*got \(3, 12, 16\)"),
        (picture(), np.ones((16, 12)), r"mask is \(16, 12\), expected the image's \(12, 16\)"),
        (picture(), np.full((12, 16), 3.0), "sigmoid"),
        (picture(), np.full((12, 16), np.nan), "sigmoid"),
    ],
)
def test_overlay_refuses(image: Any, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(image, mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fade": 3.0}, r"fade is 3.0, expected a number in \[0, 1\]"),
        ({"fade": np.nan}, "fade is nan"),
        ({"color": (0, 300, 0)}, r"in \[0, 255\], got \(0, 300, 0\)"),
        ({"color": (0, 0)}, r"\(red, green, blue\)"),
    ],
)
def test_overlay_refuses_options_out_of_their_range(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(picture(), np.ones((12, 16)), **options)


def test_colorize_refuses_what_is_no_colour() -> None:
    with pytest.raises(ValueError, match=r"got \(0, -1, 0\)"):
        colorize([[0]], {0: (0, -1, 0)})


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64])
def test_label_maps_of_every_integer_dtype(dtype: Any) -> None:
    assert colorize(np.array([[0, 7]], dtype), {7: (1, 2, 3)}).tolist() == [[list(OTHER), [1, 2, 3]]]


def test_colorize_looks_every_label_up() -> None:
    labels = RNG.integers(0, 5, (7, 9))
    palette = {0: (1, 2, 3), 3: (4, 5, 6)}
    out = colorize(labels, palette, other=(7, 8, 9))
    expected = [[list(palette.get(int(k), (7, 8, 9))) for k in row] for row in labels]
    assert out.tolist() == expected
    with pytest.raises(ValueError, match=r"\(H, W\) of integers, got \(7, 9\) float64"):
        colorize(labels.astype(float), palette)


def test_label_maps_gives_classes_their_colours_truth_first() -> None:
    truth = np.zeros((10, 10), int)
    truth[:3] = 2  # 70 pixels of class 0, 30 of class 2
    prediction = np.full((10, 10), 3)
    prediction[0] = 255
    figure = label_maps([picture(10, 10)], {"truth": [truth], "ours": [prediction]}, ["a", "b", "c", "d"])
    assert titles(figure) == ["image", "truth", "ours"]
    expected = [("a", PALETTE[0]), ("c", PALETTE[1]), ("d", PALETTE[2]), ("none", UNLABELLED)]
    assert legend_of(figure) == expected
    shown = [np.asarray(cell.get_images()[0].get_array()) for cell in figure.get_axes()[1:3]]
    assert (shown[0] == np.array(PALETTE)[truth // 2]).all()
    assert (shown[1][0] == 255).all()
    assert (shown[1][1:] == PALETTE[2]).all()


def test_label_maps_with_more_classes_than_colours_share_one_grey() -> None:
    truth = np.arange(12).repeat(12).reshape(12, 12)  # equal areas: ties go to the smaller index
    figure = label_maps([picture(12, 12)], {"truth": [truth]}, [f"class {k}" for k in range(12)])
    entries = legend_of(figure)
    assert [name for name, _ in entries] == [f"class {k}" for k in range(9)] + ["others (3)"]
    assert entries[-1][1] == OTHER
    assert len({color for _, color in entries}) == 10
    shown = np.asarray(figure.get_axes()[1].get_images()[0].get_array())
    assert (shown[9:] == OTHER).all()


def test_every_row_has_its_own_legend_and_only_the_first_its_titles() -> None:
    maps = {"truth": [np.full((12, 16), k) for k in range(3)]}
    figure = label_maps([picture() for _ in range(3)], maps, ["a", "b", "c"])
    assert titles(figure) == ["image", "truth"]
    legends = [cell.get_legend() for cell in figure.get_axes()]
    names = [[text.get_text() for text in legend.get_texts()] for legend in legends if legend is not None]
    assert names == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({}, "one label map a column for each of 1"),
        ({"truth": []}, r"got \{'truth': 0\}"),
        ({"truth": [np.zeros((16, 12), int)]}, r"a label map is \(16, 12\), its image \(12, 16\)"),
        ({"truth": [np.full((12, 16), 7)]}, r"labels are 0..1 or 255, got \[7\]"),
        ({"truth": [np.full((12, 16), -1)]}, r"labels are 0..1 or 255, got \[-1\]"),
    ],
)
def test_label_maps_refuses(maps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_maps([picture()], maps, ["a", "b"])


def test_typical_proposals_shows_the_five_best_and_marks_the_correct_ones() -> None:
    names = [f"class {k}" for k in range(8)]
    scores = {"frozen": RNG.dirichlet(np.ones(8), 2), "ours": RNG.dirichlet(np.ones(8), 2)}
    correct = [[int(scores["frozen"][0].argmax())], [0, 1]]
    figure = typical_proposals(picture(), np.ones((2, 12, 16)), scores, names, correct, ["one", "two"])
    assert titles(figure) == ["one", "frozen", "ours", "two"]
    cells = np.array(figure.get_axes()).reshape(2, 3)
    for i in range(2):
        for cell, table in zip(cells[i, 1:], scores.values(), strict=True):
            best = sorted(range(8), key=lambda k: -table[i, k])[:5]
            labels = cell.get_yticklabels()
            assert [label.get_text() for label in labels] == [names[k] for k in best]
            assert [patch.get_width() for patch in cell.patches] == pytest.approx([100 * table[i, k] for k in best])
            assert [label.get_fontweight() == "bold" for label in labels] == [k in correct[i] for k in best]
            colors = {k in correct[i]: patch.get_facecolor() for k, patch in zip(best, cell.patches, strict=True)}
            assert len(set(colors.values())) == len(colors)  # correct and wrong ones differ


@pytest.mark.parametrize(
    ("scores", "correct", "message"),
    [
        ({}, [[0]], "expected scores"),
        ({"CLIP": np.ones((2, 3))}, [[0]], r"expected scores \(1, 3\).*'CLIP': \(2, 3\)"),
        (
            {"CLIP": np.ones((1, 3))},
            [[0], [1]],
            "expected 1 titles and lists of correct classes, got 1 and 2",
        ),
    ],
)
def test_typical_proposals_refuses(scores: Any, correct: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        typical_proposals(picture(), np.ones((1, 12, 16)), scores, ["a", "b", "c"], correct, ["all"])


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "nan"), (3.0, "to 3: pass logits through softmax, and divide percentages by 100"), (-0.1, "from -0.1")],
)
def test_typical_proposals_shows_probabilities_only(value: float, message: str) -> None:
    scores = {"CLIP": np.full((1, 2), 0.5), "ours": np.array([[0.5, value]])}
    with pytest.raises(ValueError, match=rf"scores of 'ours' must be probabilities in \[0, 1\].*{message}"):
        typical_proposals(picture(), np.ones((1, 12, 16)), scores, ["a", "b"], [[0]], ["all"])


@pytest.mark.parametrize("wrong", [2, -1])
def test_typical_proposals_refuses_correct_classes_without_a_name(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"indices in 0..1, got \[{wrong}\]"):
        typical_proposals(picture(), np.ones((1, 12, 16)), {"CLIP": [[0.5, 0.5]]}, ["a", "b"], [[wrong]], ["all"])


NAMES = ["$5 bill, $10 bill", "_hidden", "a_b^c", r"$\frac{1", "back\\slash", "100 % {}", "$x^2$", "#&~"]


def test_names_are_shown_letter_by_letter() -> None:
    truth = np.arange(8).repeat(16).reshape(8, 16)
    maps = label_maps([picture(8, 16)], {"$truth$": [truth]}, NAMES)
    assert [name for name, _ in legend_of(maps)] == NAMES
    proposals = typical_proposals(
        picture(), np.ones((2, 12, 16)), {"$m_1$": np.eye(8)[[0, 3]]}, NAMES, [[0], [3]], ["$t$", "_"]
    )
    for figure in (maps, proposals):
        figure.savefig(io.BytesIO(), format="png")  # where mathtext is parsed
        shown = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text() in NAMES]
        assert len(shown) >= 8
        assert not any(text.get_parse_math() for text in shown)


def test_figures_stay_out_of_pyplot() -> None:
    label_maps([picture()], {"truth": [np.zeros((12, 16), int)]}, ["a"])
    assert matplotlib._pylab_helpers.Gcf.get_all_fig_managers() == []


def test_class_colors_begin_with_the_palette_and_never_change() -> None:
    colors = class_colors(847)
    assert colors.dtype == np.uint8 and [tuple(c) for c in colors[:9].tolist()] == list(PALETTE)
    assert (colors[:40] == class_colors(40)).all() and class_colors(0).shape == (0, 3)
    assert len({tuple(color) for color in colors[:100].tolist()}) == 100
    with pytest.raises(ValueError, match="count is -1"):
        class_colors(-1)


def test_labelled_lays_colours_on_and_leaves_the_unlabelled_alone() -> None:
    image = np.full((400, 600, 3), (200, 100, 50), np.uint8)
    labels = np.full((400, 600), 255)
    labels[:, :200], labels[:, 200:350] = 1, 0
    sheet = np.asarray(labelled(image, labels, ["sky", "sea"]))
    assert sheet.shape[1] == 600 and sheet.shape[0] > 400
    assert (sheet[:400, 360:] == image[:, 360:]).all()  # nothing is known there
    colors = class_colors(2).astype(int)
    left, middle = sheet[200, 50].astype(int), sheet[200, 300].astype(int)
    assert np.abs(left - colors[1]).sum() < np.abs(left - colors[0]).sum()
    assert np.abs(middle - colors[0]).sum() < np.abs(middle - colors[1]).sum()
    assert (sheet[200, 200] == 255).all()  # the line between them
    legend = sheet[400:].reshape(-1, 3)
    for color in colors:
        assert (legend == color).all(axis=1).sum() >= 150  # a swatch
    assert not (legend == class_colors(3)[2]).all(axis=1).any()


def test_labelled_names_classes_by_area_with_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, **_: written.append(text))
    labels = np.full((10, 10), 2)
    labels[0], labels[1, :5] = 7, 255
    labelled(picture(10, 10), labels, [f"class {k}" for k in range(8)])
    assert written == ["class 2 85 %", "class 7 10 %"]


@pytest.mark.parametrize("shape", [(1, 1), (20, 3000), (3000, 20), (96, 96)])
def test_labelled_of_every_shape(shape: tuple[int, int]) -> None:
    width = labelled(picture(*shape), np.zeros(shape, int), ["a name that is rather long"]).width
    assert width >= 320 and (width == shape[1] or max(shape) < 320 or shape[1] < 320)


@pytest.mark.parametrize("shape", [(20_000, 20), (20, 20_000), (400, 330)])
def test_the_legend_is_in_proportion_and_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float, float]] = []
    draw = ImageDraw.ImageDraw.text

    def record(self: Any, xy: tuple[float, float], text: str, **options: Any) -> None:
        drawn.append((xy[0] + options["font"].getlength(text), xy[1] + options["font"].size, options["font"].size))
        draw(self, xy, text, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    labels = np.zeros(shape, int)
    labels[: shape[0] // 2, : shape[1] // 2] = 1
    names = ["a very long name of a class, " * 3, "sky"]
    sheet = labelled(np.zeros((*shape, 3), np.uint8), labels, names)
    assert len(drawn) == 2
    for right, bottom, size in drawn:
        assert right <= sheet.width and bottom <= sheet.height and 13 <= size <= 20


def test_labelled_refuses() -> None:
    with pytest.raises(ValueError, match=r"labels are 0..0 or 65535, got \[255\]"):
        labelled(picture(4, 4), np.full((4, 4), 255), ["a"], ignore_index=65535)
    with pytest.raises(ValueError, match="resize one of them"):
        labelled(picture(4, 4), np.zeros((4, 5), int), ["a"])
