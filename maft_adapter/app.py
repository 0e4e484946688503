"""The app: a picture, your own words, and what a CLIP says of a region before and after it became mask-aware."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .evaluate import crop_scorer
from .extras import extra
from .masks import boxes_to_masks
from .models import Model
from .pictures import Segmentation, Segmenter, read_picture
from .proposals import Proposer
from .shapes import render_scene
from .show import overlay

with extra("app"):
    import gradio as gr
    from PIL import Image

__all__ = ["CSS", "build", "region_at", "words_of"]

SIDE = 1024  # pixels: larger pictures become as long as that, which is more than a CLIP sees
SHOWN = 512  # pixels: smaller ones are shown enlarged, by a whole number
CORNER = (230, 0, 80)
HINTS = {
    "region": "Click something in the picture.",
    "box": "Click two opposite corners of a box.",
    "brush": "Paint over something.",
}
ABOUT = f"""## What does CLIP say of a region?
Choose a picture, then click something in it. **Before**: the frozen CLIP looks at a cut-out of the region. **After**:
the mask-aware CLIP looks at the whole picture, once, and is asked of the region. Your own pictures
become at most {SIDE} pixels long."""
CSS = """
footer {display: none !important}
#picture img {cursor: crosshair}
"""


def words_of(text: str) -> list[str]:
    """The classes that a user typed, with commas or line ends between them.

    Raises:
        ValueError: there are none, or nothing stands between two commas.

    Example:
        >>> words_of("red ball, pale sand")
        ['red ball', 'pale sand']
    """
    words = [word.strip() for word in re.split(r"[,\n]", text.strip())]
    if not all(words):
        raise ValueError("a word is missing: type words with commas between them, such as: red ball, pale sand")
    return words


def region_at(result: Segmentation, x: int, y: int) -> NDArray[Any]:
    """The proposal at a pixel that speaks loudest for the class that the label map has there.

    Args:
        result: of a `Segmenter`.
        x, y: column and row of the pixel.

    Returns:
        (H, W) bool, or float32 in [0, 1] where the proposals are soft.

    Raises:
        ValueError: no proposal that the tower can see covers the pixel.

    Example:
        >>> from maft_adapter.models import load_model
        >>> model = load_model()
        >>> segmenter = Segmenter(model.clip, model.tokenizer, model.class_names, size=model.size)
        >>> region_at(segmenter(render_scene(8).image), 48, 48).shape
        (96, 96)
    """
    label = result.label_map[y, x]
    if label == result.ignore_index:
        raise ValueError("no proposal covers this place: draw a box around it, or paint over it")
    voices = result.masks[:, y, x] * result.valid * result.scores[:, label]  # (N,), as in the label map
    return result.masks[voices.argmax()]


def enlargement(picture: NDArray[np.uint8]) -> int:
    """By what a picture (H, W, 3) is enlarged: the browser, which is asked where a click was, must not do it."""
    return max(1, SHOWN // max(picture.shape))


def enlarged(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) -> (factor * H, factor * W, 3)."""
    factor = enlargement(picture)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def build(model: Model, frozen: Model | None, proposals: Proposer | str = "superpixels") -> gr.Blocks:
    """The page; every browser that opens it has its own picture, words and regions.

    Args:
        model: of `load_model`, the mask-aware CLIP that says "after".
        frozen: the CLIP that says "before" of the region's cut-out (`evaluate.crop_scorer`), with the same text
            encoder; None leaves that out, as a model of transformers needs, which takes no crops.
        proposals: where masks come from, as for `Segmenter`.

    Returns:
        What `launch(css=CSS)` serves; it sends nothing to anybody.

    Raises:
        TypeError, ValueError, OSError: as `Segmenter`.

    Example:
        >>> from maft_adapter.models import load_model
        >>> model = load_model()
        >>> page = build(model, model)
    """
    # Words that suit the samples; the embedded CLIP knows no others.
    words = model.class_names or ("ball", "box", "star", "heart", "ring", "moon", "grass", "sand", "water", "wood")
    segmenter = Segmenter(
        model.clip, model.tokenizer, words, proposals=proposals, templates=model.templates, size=model.size
    )
    # Those of examples/pictures, which are not installed.
    samples = [
        render_scene((7_000_000, seed), size=256, things=(2, 4), radius=(0.16, 0.28)).image
        for seed in (8, 17, 32, 51, 55, 58)
    ]  # (256, 256, 3) each

    with gr.Blocks(title="maft-adapter", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        result, region, corner = gr.State(), gr.State(), gr.State()
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=5):
                gallery = gr.Gallery(
                    samples, label="Samples", columns=6, height=120, allow_preview=False, object_fit="cover",
                    interactive=False, buttons=[],
                )  # fmt: skip
                with gr.Row(equal_height=True):
                    tool = gr.Radio(list(HINTS), value="region", label="Ask of a", scale=3)
                    upload = gr.UploadButton("Your own picture", file_types=["image"], scale=1)
                shown = gr.Image(
                    label=HINTS["region"], elem_id="picture", interactive=False, height=520, format="png", buttons=[]
                )
                canvas = gr.ImageEditor(
                    label=HINTS["brush"], visible=False, height=520, sources=(), transforms=(),
                    layers=gr.LayerOptions(allow_additional_layers=False),
                    brush=gr.Brush(colors=["#e60050"], color_mode="fixed"),
                )  # fmt: skip
            with gr.Column(scale=4):
                with gr.Row():
                    before = gr.Label(
                        label="Before: frozen CLIP, cut-out", elem_id="before", num_top_classes=5,
                        visible=frozen is not None,
                    )  # fmt: skip
                    after = gr.Label(label="After: mask-aware CLIP", elem_id="after", num_top_classes=5)
                text = gr.Textbox(", ".join(words), label="Words, with commas between them", lines=3, max_lines=3)
                use = gr.Button("Use these words", variant="primary")
                labelled = gr.Image(
                    label="All regions", elem_id="labelled", interactive=False, height=380, format="png", buttons=[]
                )
        answer = [result, region, corner, shown, before, after, labelled]
        # Never the canvas after a stroke: handing it back would wipe it.
        everything = [*answer, canvas]
        quietly: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}

        def answered(found: Segmentation, mask: NDArray[Any] | None) -> dict[Any, Any]:
            """Of a picture and a region in it, or none."""
            if mask is None:
                return {region: None, corner: None, shown: enlarged(found.picture), before: None, after: None}
            asked = found.ask(mask[None])
            if not asked.valid[0]:
                raise ValueError("the region is too small for this CLIP to see: choose a larger one")
            answer = {
                region: mask,
                corner: None,
                shown: enlarged(overlay(found.picture, mask)),
                after: dict(zip(found.names, asked.scores[0].tolist(), strict=True)),
            }
            if frozen is not None:
                score = crop_scorer(frozen, segmenter.text(found.class_names), "mask_crop")
                scores, _ = score(found.picture, torch.from_numpy(mask[None]))  # (1, C)
                answer[before] = dict(zip(found.names, scores[0].tolist(), strict=True))
            return answer

        def opened(picture: NDArray[np.uint8], typed: str, name: str = "") -> dict[Any, Any]:
            names = words_of(typed)
            small = Image.fromarray(picture)
            small.thumbnail((SIDE, SIDE))
            found = segmenter(np.array(small), name=name).relabel(names)
            return {result: found, canvas: found.picture, labelled: found.overlay(), **answered(found, None)}

        @told
        def on_load(typed: str) -> dict[Any, Any]:
            return opened(samples[0], typed)

        @told
        def on_sample(typed: str, event: gr.SelectData) -> dict[Any, Any]:
            return opened(samples[event.index], typed)

        @told
        def on_upload(path: str, typed: str) -> dict[Any, Any]:
            try:
                picture = read_picture(path)
            except (OSError, ValueError) as error:  # which name the path on this machine
                raise ValueError(str(error).replace(path, Path(path).name)) from error
            return opened(picture, typed, Path(path).name)

        @told
        def on_words(found: Segmentation | None, mask: NDArray[Any] | None, typed: str) -> dict[Any, Any]:
            if found is None:
                raise ValueError("there is no picture yet: choose one first")
            found = found.relabel(words_of(typed))
            return {result: found, labelled: found.overlay(), **answered(found, mask)}

        @told
        def on_click(
            found: Segmentation, first: tuple[int, int] | None, kind: str, event: gr.SelectData
        ) -> dict[Any, Any]:
            x, y = (place // enlargement(found.picture) for place in event.index)
            if kind == "region":
                return answered(found, region_at(found, x, y))
            if first is None:
                marked = found.picture.copy()
                arm = max(marked.shape) // 50
                marked[max(0, y - arm) : y + arm + 1, x] = marked[y, max(0, x - arm) : x + arm + 1] = CORNER
                return {corner: (x, y), shown: enlarged(marked)}
            (left, right), (top, bottom) = sorted((first[0], x)), sorted((first[1], y))
            box = torch.tensor([left, top, right + 1, bottom + 1])
            return answered(found, boxes_to_masks(box, found.picture.shape[:2]).numpy())

        @told
        def on_stroke(found: Segmentation, painted: dict[str, Any]) -> dict[Any, Any]:
            stroke = np.any([layer[..., 3] > 0 for layer in painted["layers"]], axis=0)  # (H, W)
            return answered(found, stroke if stroke.any() else None)

        def on_tool(found: Segmentation | None, kind: str) -> dict[Any, Any]:
            picture = None if found is None else found.picture
            large = None if picture is None else enlarged(picture)
            return {
                corner: None,
                shown: gr.Image(large, label=HINTS[kind], visible=kind != "brush"),
                canvas: gr.ImageEditor(picture, visible=kind == "brush"),
            }

        page.load(on_load, text, everything, **quietly)
        gallery.select(on_sample, text, everything, **quietly)
        upload.upload(on_upload, [upload, text], everything, **quietly)
        gr.on([use.click, text.submit], on_words, [result, region, text], answer, **quietly)
        shown.select(on_click, [result, corner, tool], answer, **quietly)
        canvas.input(on_stroke, [result, canvas], answer, **quietly)
        tool.change(on_tool, [result, tool], [corner, shown, canvas], **quietly)
    return page


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler of an event; what is wrong becomes a message on the page, which stays as it was."""

    @functools.wraps(handler)
    def handled(*arguments: Any) -> Any:
        try:
            return handler(*arguments)
        except (OSError, TypeError, ValueError) as error:
            gr.Warning(html.escape(str(error), quote=False))
            return gr.skip()

    return handled
