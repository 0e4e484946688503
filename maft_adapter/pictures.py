"""Pictures as users have them: read, found in folders, made the input of an image tower, and segmented with words."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .adapt import encode_features, encode_masks, valid_masks
from .checkpoint import replace_file
from .classify import class_scores, label_map, text_classifier
from .extras import extra
from .features import ImageFeatures
from .models import TEMPLATES, image_tower, smallest_side
from .proposals import Proposals, Proposer, check_proposals, proposer

with extra("pictures"):
    from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import supervision

__all__ = [
    "MARK",
    "OUTPUTS",
    "PROMPTS",
    "SUFFIXES",
    "Segmentation",
    "Segmenter",
    "find_pictures",
    "prepare",
    "prompts",
    "read_picture",
]

# Of the files that count as pictures in a folder; a file that is named is read whatever its suffix. They are those of
# what PIL reads without other programs, but for data and videos, and common ones of pictures that it reads with plugins
# only: without these, such files are reported when they are read, and not passed over.
SUFFIXES = tuple(
    sorted(
        {
            suffix
            for suffix, kind in Image.registered_extensions().items()
            if kind in Image.OPEN and kind not in ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
        }
        | {".avif", ".heic", ".heif", ".hif", ".jxl"}
    )
)

MARK = ".maft-adapter"  # the name of a file in folders that `maft-adapter segment` writes to
OUTPUTS = (".png", "_overlay.jpg", ".json")  # what `Segmentation.save` writes behind NAME

_JPEG = 65_500  # pixels a side that the format can hold
_PIXELS = 2**20  # of a label map that are made at a time
_TEXTS = 16  # lists of classes whose embeddings a segmenter keeps

# Prompts by their names in the literature: CLIP's one, and the 14 of ViLD, which MAFT and its hosts use.
_SIZES = ("small", "medium", "large")
PROMPTS = {
    "one": TEMPLATES,
    "vild": (
        "a photo of a {}.",
        "This is a photo of a {}",
        "There is a {} in the scene",
        "There is the {} in the scene",
        "a photo of a {} in the scene",
        *(f"a photo of a {size} {{}}." for size in _SIZES),
        *(f"This is a photo of a {size} {{}}." for size in _SIZES),
        *(f"There is a {size} {{}} in the scene." for size in _SIZES),
    ),
}


def read_picture(source: Any) -> NDArray[np.uint8]:
    """Read a picture as RGB, turned as its EXIF data say.

    Grey, palette, CMYK and other modes become RGB; what is transparent is laid on white; 16-bit grey is scaled to 8
    bits, 65535 to 255; of an animation comes the first frame. Colour profiles are not applied.

    Args:
        source: a path, the bytes of a file or a file open in binary mode, a PIL image, or an array: (H, W, 3) uint8
            RGB in [0, 255], or (H, W) uint8 grey.

    Returns:
        (H, W, 3) uint8 RGB in [0, 255].

    Raises:
        TypeError: `source` is something else.
        ValueError: no picture: empty, truncated, of an unknown format, with values whose range is not known, or of more
            pixels than PIL takes for harmless (`PIL.Image.MAX_IMAGE_PIXELS`, 89 million); or an array that is not as
            above. The path is named.
        OSError: the file is missing, a broken link, no regular file or not to be read. The path is named.

    Example:
        >>> read_picture(Image.new("CMYK", (4, 2))).shape
        (2, 4, 3)
    """
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    if isinstance(source, Image.Image):
        return _decoded(source, f"a PIL image of {source.width}x{source.height}")
    if isinstance(source, str | os.PathLike):
        what = str(source)
        if os.path.islink(source) and not os.path.exists(source):
            raise FileNotFoundError(f"{what} is a link to {os.readlink(what)}, which does not exist")
        if os.path.exists(source) and not os.path.isfile(source):  # to read a pipe may take for ever
            raise OSError(f"{what} is a folder, a pipe or a device, expected a file")
        data = Path(source).read_bytes()
    elif isinstance(source, bytes) or hasattr(source, "read"):
        data = source if isinstance(source, bytes) else source.read()
        what = str(getattr(source, "name", f"{len(data)} bytes"))
    else:
        raise TypeError(f"a picture is a path, bytes, a PIL image or an array, got {type(source).__name__}")
    if not data:
        raise ValueError(f"{what} is empty; copy or download it again")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError(f"{what} is no picture of a format that PIL knows; save it as PNG or JPEG") from error
    except Exception as error:  # of any kind, depending on which byte is damaged
        raise ValueError(f"{what} can't be read as a picture: {error or repr(error)}") from error
    return _decoded(image, what)


def find_pictures(
    arguments: Sequence[str | os.PathLike[str]], note: Callable[[str], object] = warnings.warn
) -> list[Path]:
    """The pictures that paths, folders and patterns name, each once.

    What `maft-adapter segment` has written is no picture, unless its file itself is named.

    Args:
        arguments: files, whatever their suffix; folders, whose files with a suffix of `SUFFIXES` are taken, sub-folders
            included, in alphabetic order, what begins with a dot left out; patterns as the shell has them, `**` for any
            sub-folders. Links to files are taken; links to folders inside folders are not followed. What
            `read_picture` reports is taken, too: broken links, pipes, formats that PIL can't read, and paths that lead
            nowhere, as long as one argument leads somewhere.
        note: called with a line about each folder that was passed over because it holds outputs.

    Returns:
        Paths in the order of the arguments; one that is named twice comes once, at its first place.

    Raises:
        OSError: no argument leads anywhere, or a folder can't be read.
        ValueError: a folder or a pattern without any picture, or no arguments.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (4, 4)).save(Path(folder, "a b.png"))
        ...     [path.name for path in find_pictures([folder, f"{folder}/*.png"])]
        ['a b.png']
    """
    found: dict[str, Path] = {}
    passed: dict[str, None] = {}
    for argument in arguments:
        text = os.fspath(argument)
        if os.path.isfile(text) or not (os.path.lexists(text) or glob.has_magic(text)):
            found.setdefault(os.path.abspath(text), Path(text))
            continue
        named = [text] if os.path.lexists(text) else sorted(glob.glob(text, recursive=True))
        pictures = [path for name in named for path in (_in_folder(name) if os.path.isdir(name) else (Path(name),))]
        if not pictures:
            raise ValueError(f"{text}: no pictures there; their suffixes are {', '.join(SUFFIXES)}")
        for path in pictures:
            whole = os.path.abspath(path)
            if (folder := _outputs(os.path.dirname(whole))) is None:
                found.setdefault(whole, path)
            else:
                passed[folder] = None
    if not found and passed:
        raise ValueError(f"no pictures are left: {', '.join(passed)} holds outputs of maft-adapter segment")
    if not found:
        raise ValueError("no pictures were named: give files, folders or patterns")
    for folder in passed:
        note(f"{folder} holds outputs of maft-adapter segment, which are not taken for pictures")
    if not any(map(os.path.lexists, found)):
        raise FileNotFoundError(f"{', '.join(map(str, found.values()))}: no such file or folder")
    return list(found.values())


def prepare(
    picture: NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    size: int = 480,
    keep_aspect: bool = False,
    multiple: int = 1,
) -> Tensor:
    """Make a picture the input of an image tower: all of it, so that masks keep their place.

    open_clip's own `preprocess` cuts out the centre, which masks of the whole picture would not fit. Resized is with
    PIL's bicubic filter, which smooths where it makes smaller.

    Args:
        picture: (H, W, 3) uint8 RGB in [0, 255].
        mean, std: the model's, three numbers each for pixels in [0, 1].
        size: side of the square that the picture becomes, in pixels; what `multiple` does not divide becomes the
            nearest that it does: for ViT-L/14, 480 becomes 476.
        keep_aspect: give both sides the picture's ratio instead, with about as many pixels as that square has; the
            nearest multiples, and at least one.
        multiple: what the tower's patch or stride divides images into, `Model.multiple`.

    Returns:
        (3, h, w) float32, normalised.

    Raises:
        ValueError: the picture is not as above, or a number is not positive.

    Example:
        >>> picture = np.zeros((100, 400, 3), np.uint8)
        >>> prepare(picture, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), multiple=14).shape
        torch.Size([3, 476, 476])
        >>> prepare(picture, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), keep_aspect=True, multiple=16).shape
        torch.Size([3, 240, 960])
    """
    picture = _checked_array(picture)
    if size < 1 or multiple < 1 or not all(value > 0 for value in std):
        raise ValueError(f"size {size}, multiple {multiple} and std {tuple(std)} must be positive")
    height, width = picture.shape[:2]
    ratio = (height / width) ** 0.5 if keep_aspect else 1.0
    h, w = (max(1, round(side / multiple)) * multiple for side in (size * ratio, size / ratio))
    resized = np.array(Image.fromarray(picture).resize((w, h), Image.Resampling.BICUBIC))  # (h, w, 3)
    pixels = torch.from_numpy(resized).movedim(-1, 0).float() / 255  # (3, h, w)
    return ((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).contiguous()


def prompts(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates by their name: "one", "vild" (14) or "imagenet" (80, CLIP's own, which open_clip ships).

    Args:
        templates: such a name, or templates, which stay what they are.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> [len(prompts(name)) for name in ("one", "vild", "imagenet")]
        [1, 14, 80]
    """
    if not isinstance(templates, str):
        return tuple(templates)
    if templates == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    if templates not in PROMPTS:
        raise ValueError(
            f"templates are {templates!r}, expected one, vild, imagenet or a list such as ['a photo of a {{}}.']"
        )
    return PROMPTS[templates]


class Segmenter:
    """Labels the regions of pictures with words: proposals, their embeddings by a mask-aware CLIP, their classes.

    Args:
        clip: a CLIP whose image tower is mask-aware, such as `load_model(...).clip`.
        tokenizer: the model's own, as `text_classifier` takes it.
        class_names: C classes, each a name or a sequence of synonyms, of which the first is shown.
        proposals: what makes the masks: a `Proposer`, or its name as `maft_adapter.proposals.proposer` takes it. Class
            scores that it gives are of its own classes and are not used: `result.proposals` has them for `ensemble`.
        templates: prompts, or their name: see `prompts`.
        background: words of one more class for all that is none of the others, such as "background"; its pixels become
            unlabelled.
        size, keep_aspect: of the tower's input, see `prepare`.
        mean, std: of the tower's input, three numbers each. By default those that `load_model` and open_clip leave in
            the tower's `preprocess_cfg`.

    Raises:
        TypeError, ValueError: as `text_classifier`; the tower is not mask-aware, or mean and std are not known.

    Example:
        >>> from maft_adapter.models import load_model
        >>> from maft_adapter.shapes import render_scene
        >>> model = load_model()
        >>> segmenter = Segmenter(model.clip, model.tokenizer, model.class_names, size=model.size)
        >>> result = segmenter(render_scene(8).image)
        >>> result.label_map.shape, [model.class_names[k] for k in np.unique(result.label_map)]
        ((96, 96), [...])
    """

    def __init__(
        self,
        clip: Any,
        tokenizer: Any,
        class_names: Sequence[str | Sequence[str]],
        *,
        proposals: Proposer | str = "superpixels",
        templates: str | Sequence[str] = "one",
        background: str | Sequence[str] | None = None,
        size: int = 480,
        keep_aspect: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.clip, self.tokenizer, self.tower = clip, tokenizer, image_tower(clip)
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1")
        known = getattr(self.tower, "preprocess_cfg", {})
        mean, std = known.get("mean") if mean is None else mean, known.get("std") if std is None else std
        if mean is None or std is None:
            raise ValueError(
                f"the mean and std of this {type(self.tower).__name__}'s images are not known: give mean= and std= of "
                "its image processor, or load it with maft_adapter.models.load_model"
            )
        self.mean, self.std = mean, std
        weight = next(self.tower.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.proposals = proposer(proposals, self.device) if isinstance(proposals, str) else proposals
        self.templates, self.background = prompts(templates), background
        self.size, self.keep_aspect, self.multiple = size, keep_aspect, smallest_side(self.tower)
        self.logit_scale = float(clip.logit_scale.detach().exp()) if hasattr(clip, "logit_scale") else 100.0
        self._texts: dict[str, Tensor] = {}
        self.class_names = _listed(class_names)
        self.text(self.class_names)

    @torch.no_grad()
    def __call__(
        self, picture: Any, masks: NDArray[Any] | Proposals | None = None, *, name: str | None = None
    ) -> Segmentation:
        """Segment one picture.

        Args:
            picture: as `read_picture` takes it.
            masks: (N, H, W) bool or float32 in [0, 1] of the picture's size, or `Proposals`, such as
                `maft_adapter.proposals.convert.from_sam` gives; None for those of the segmenter's proposer.
            name: of its file, for masks that come from files and for what is saved; by default the path, if it is one.

        Raises:
            TypeError, ValueError, OSError: as `read_picture`, and as the proposer and what it gives say.
        """
        if name is None:
            name = os.fspath(picture) if isinstance(picture, str | os.PathLike) else ""
        pixels = read_picture(picture)
        proposals = self.proposals(pixels, name) if masks is None else _as_proposals(masks)
        check_proposals(proposals, pixels.shape[:2])
        image = prepare(pixels, self.mean, self.std, self.size, self.keep_aspect, self.multiple)
        features = encode_features(self.clip, image[None].to(self.device, self.dtype))
        return self._asked(pixels, name, features, proposals, self.class_names)

    def text(self, class_names: Iterable[str | Sequence[str]]) -> Tensor:
        """The embeddings (C, D) of classes, or (C + 1, D) with the background's; kept for the latest few lists."""
        classes = _listed(class_names)
        key = repr(classes)
        text = self._texts.pop(key, None)
        if text is None:
            background = [] if self.background is None else [self.background]
            listed = classes if isinstance(classes, str) else [*classes, *background]
            text = text_classifier(self.clip, self.tokenizer, listed, self.templates, self.device)
        self._texts[key] = text
        if len(self._texts) > _TEXTS:
            self._texts.pop(next(iter(self._texts)))
        return text

    def _asked(
        self, picture: NDArray[np.uint8], name: str, features: ImageFeatures, proposals: Proposals, class_names: Any
    ) -> Segmentation:
        masks = torch.from_numpy(proposals.masks)[None].to(self.device)  # (1, N, H, W)
        embeddings = encode_masks(self.clip, features, masks)[0].float()  # (N, D)
        valid = valid_masks(self.tower, features, masks)[0].cpu().numpy()  # (N,)
        return Segmentation(picture, name, proposals, embeddings, valid, class_names, features, self)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a `Segmenter` found in one picture, with C classes and N masks.

    It holds what the image contributes to any mask (22 MB for ViT-B/16 at 480), so new words and new masks cost
    milliseconds: `relabel`, `ask`. The masks take N x H x W bytes, four times that if they are soft; beside them and
    the models, a picture of 12 megapixels needs 0.3 GB at most, whatever the number of classes.

    Attributes:
        picture: (H, W, 3) uint8 RGB.
        name: of its file, "" if it has none.
        proposals: masks, scores and class scores as the proposer gave them.
        embeddings: (N, D) float32.
        valid: (N,) bool: a mask that contains no patch of the token grid has an embedding that says nothing. Such masks
            have no part in the label map and in what is exported.
        class_names: as they were given.
    """

    picture: NDArray[np.uint8]
    name: str
    proposals: Proposals
    embeddings: Tensor = field(repr=False)
    valid: NDArray[np.bool_]
    class_names: Sequence[str | Sequence[str]]
    features: ImageFeatures
    segmenter: Segmenter

    @property
    def masks(self) -> NDArray[Any]:
        """(N, H, W) bool, or float32 in [0, 1]."""
        return self.proposals.masks

    @property
    def proposal_scores(self) -> NDArray[np.float32] | None:
        """(N,) in [0, 1], how good the proposer finds each mask; None if it does not say."""
        return self.proposals.scores

    @property
    def names(self) -> list[str]:
        """C names to show, the first synonym of each class."""
        return [name if isinstance(name, str) else name[0] for name in self.class_names]

    @property
    def ignore_index(self) -> int:
        """What unlabelled pixels have in the label map: 255, or 65535 for more than 255 classes."""
        return 255 if len(self.class_names) <= 255 else 65535

    @cached_property
    def scores(self) -> NDArray[np.float32]:
        """A^c, (N, C) float32 in [0, 1]; a row's sum is 1, or what the background leaves of it."""
        return self._scores[:, : len(self.class_names)].cpu().numpy()

    @cached_property
    def _scores(self) -> Tensor:
        """With the background's column, if there is one."""
        return class_scores(self.embeddings, self.segmenter.text(self.class_names), self.segmenter.logit_scale)

    @cached_property
    def label_map(self) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """(H, W) uint8, or uint16 for more than 255 classes: indices of classes and `ignore_index`.

        Unlabelled are pixels of the background and those that no valid mask covers.
        """
        masks, valid, scores = torch.from_numpy(self.masks), torch.from_numpy(self.valid), self._scores.cpu()
        height, width = self.picture.shape[:2]
        labels = np.empty((height, width), np.uint8 if self.ignore_index == 255 else np.uint16)
        rows = max(1, _PIXELS // width)  # at a time, as `label_map` gives int64
        for y in range(0, height, rows):
            part = label_map(scores, masks[:, y : y + rows], ignore_index=-1, valid=valid)  # (rows, W)
            part[(part < 0) | (part >= len(self.class_names))] = self.ignore_index
            labels[y : y + rows] = part.numpy()
        return labels

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """The k best classes of each mask with their scores, best first.

        Raises:
            ValueError: k is less than 1.
        """
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        order = np.argsort(-self.scores, axis=1, kind="stable")[:, :k]  # (N, k)
        return [[(self.names[c], float(row[c])) for c in best] for row, best in zip(self.scores, order, strict=True)]

    def relabel(self, class_names: Iterable[str | Sequence[str]]) -> Segmentation:
        """The same picture and masks with other words; the image is not encoded again.

        Raises:
            TypeError, ValueError: as `text_classifier`.
        """
        classes = _listed(class_names)
        self.segmenter.text(classes)
        return replace(self, class_names=classes)

    @torch.no_grad()
    def ask(self, masks: NDArray[Any] | Proposals) -> Segmentation:
        """The same picture and words with other masks; the image is not encoded again.

        Args:
            masks: (N, H, W) bool or float32 in [0, 1] of the picture's size, or `Proposals`, such as the converters of
                `maft_adapter.proposals` give.

        Raises:
            TypeError, ValueError: masks that are not as above.
        """
        proposals = _as_proposals(masks)
        check_proposals(proposals, self.picture.shape[:2])
        return self.segmenter._asked(self.picture, self.name, self.features, proposals, self.class_names)

    def overlay(self) -> Image.Image:
        """The picture with the label map's colours, and a legend below: `maft_adapter.show.labelled`."""
        from .show import labelled

        return labelled(self.picture, self.label_map, self.names, self.ignore_index)

    def coco(self) -> dict[str, Any]:
        """COCO's annotations of the picture: a dictionary for `json.dump`.

        Every valid mask is one annotation: `segmentation` (compressed RLE of where it is at least 0.5), `area`, `bbox`
        XYWH, `category_id` of its best class, `score`, `top5` (pairs of a category's id and its score), `proposal` (its
        index in `masks`), and `proposal_score` where the proposer says one. The indices of the others, which are empty
        or contain no patch of the token grid, stand under "info" as `left_out`. Ids begin at 1, as COCO's do: category
        k + 1 is label k of the label map.
        """
        from .proposals.convert import to_rle

        height, width = self.picture.shape[:2]
        best = np.argsort(-self.scores, axis=1, kind="stable")[:, :5]  # (N, 5)
        annotations: list[dict[str, Any]] = []
        for n in self._shown:
            (rle,) = to_rle(self._inside(n)[None])
            top5 = [[int(c) + 1, round(float(self.scores[n, c]), 6)] for c in best[n]]
            annotation = {
                "id": len(annotations) + 1, "image_id": 1, "category_id": top5[0][0], "segmentation": rle,
                "area": int(self._inside(n).sum()), "bbox": _box(self._inside(n)), "iscrowd": 0,
                "score": top5[0][1], "top5": top5, "proposal": n,
            }  # fmt: skip
            if self.proposal_scores is not None:
                annotation["proposal_score"] = round(float(self.proposal_scores[n]), 6)
            annotations.append(annotation)
        return {
            "info": {
                "description": "category k + 1 is label k of the label map",
                "unlabelled": self.ignore_index,
                "left_out": self._left_out,
            },
            "images": [{"id": 1, "file_name": Path(self.name).name, "width": width, "height": height}],
            "categories": [
                {"id": k + 1, "name": name, "synonyms": [name] if isinstance(given, str) else list(given)}
                for k, (name, given) in enumerate(zip(self.names, self.class_names, strict=True))
            ],
            "annotations": annotations,
        }

    def detections(self) -> supervision.Detections:
        """Every valid mask as one of `supervision.Detections`: its box XYXY, class and score.

        `class_id` are labels of the label map, `data["class_name"]` their names, `data["proposal"]` the indices of the
        masks in `masks`; those of the masks that are left out stand in `metadata["left_out"]`.
        """
        with extra("pictures"):
            import supervision

        shown, masks = self._shown, self.masks
        if self._left_out:  # else not copied, as many large ones are gigabytes
            masks = masks[shown]
        masks = masks if masks.dtype == np.bool_ else masks >= 0.5
        boxes = np.array([_box(mask) for mask in masks], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = self.scores[shown].argmax(1)
        return supervision.Detections(
            boxes, masks, self.scores[shown].max(1), classes,
            data={"class_name": np.array(self.names)[classes], "proposal": np.array(shown, int)},
            metadata={"left_out": self._left_out},
        )  # fmt: skip

    def save(
        self, folder: str | os.PathLike[str], name: str | None = None, info: Mapping[str, Any] | None = None
    ) -> list[Path]:
        """Write NAME.png, NAME_overlay.jpg and NAME.json; files of these names are replaced.

        - NAME.png: the label map, 8 bits with the palette of `show.class_colors`, or 16 bits for more than 255 classes;
          unlabelled is 255 or 65535.
        - NAME_overlay.jpg: `overlay()`; of more than 65,500 pixels a side, which JPEG can't hold, made smaller.
        - NAME.json: `coco()`, with the SHA-256 of the other two under "info". It is written last, so where it is, the
          others are, too.

        Each file is written whole or not at all, and equal results give equal bytes.

        Args:
            folder: made if it is missing.
            name: NAME, with slashes for sub-folders; by default the stem of the picture's file.
            info: what else shall stand under "info" of the JSON.

        Returns:
            The three paths.

        Raises:
            ValueError: the picture has no name and none was given, or a file would replace the picture itself.
            OSError: a file can't be written.
        """
        name = Path(self.name).stem if name is None else name
        if not name:
            raise ValueError("the picture came without a file's name: give name=")
        paths = [Path(folder, f"{name}{end}") for end in OUTPUTS]
        for path in paths:
            if path.exists() and os.path.exists(self.name) and path.samefile(self.name):
                raise ValueError(f"{path} would replace the picture {self.name}: give another folder or name=")
        labels, overlay = io.BytesIO(), io.BytesIO()
        picture = Image.fromarray(self.label_map)
        if self.ignore_index == 255:
            from .show import class_colors

            palette = np.full((256, 3), 255, np.uint8)
            palette[: len(self.class_names)] = class_colors(len(self.class_names))
            picture.putpalette(palette.tobytes())
        picture.save(labels, "PNG")
        shown = self.overlay()
        shown.thumbnail((_JPEG, _JPEG))
        shown.save(overlay, "JPEG", quality=90)
        coco = self.coco()
        pixels = np.bincount(self.label_map.ravel(), minlength=len(self.class_names))
        files = [labels.getvalue(), overlay.getvalue()]
        coco["info"] |= {
            "pixels": {str(k + 1): int(pixels[k]) for k in np.flatnonzero(pixels[: len(self.class_names)])},
            "sha256": {path.name: hashlib.sha256(data).hexdigest() for path, data in zip(paths, files, strict=False)},
            **(info or {}),
        }
        files.append((json.dumps(coco, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="replace"))
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path, data in zip(paths, files, strict=True):
            replace_file(path, data)
        return paths

    @cached_property
    def _shown(self) -> list[int]:
        """The valid masks that are not empty."""
        return [n for n in np.flatnonzero(self.valid).tolist() if self._inside(n).any()]

    @property
    def _left_out(self) -> list[int]:
        return sorted(set(range(len(self.masks))) - set(self._shown))

    def _inside(self, n: int) -> NDArray[np.bool_]:
        mask = self.masks[n]  # (H, W)
        return mask if mask.dtype == np.bool_ else mask >= 0.5


def _listed(class_names: Iterable[str | Sequence[str]]) -> Any:
    """Classes as a list, whose `repr` tells equal ones; what is none of it is left to `text_classifier`'s errors."""
    if isinstance(class_names, str):
        return class_names
    return [tuple(names) if isinstance(names, list) else names for names in class_names]


# Reading


def _as_proposals(masks: NDArray[Any] | Proposals) -> Proposals:
    return masks if isinstance(masks, Proposals) else Proposals(masks)


def _checked_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, W, 3) of an array that is a picture; TypeError or ValueError with the cure for any other."""
    if array.dtype != np.uint8:
        cure = "(255 * x).round().astype(np.uint8) if they are in [0, 1]" if array.dtype.kind == "f" else "scale it"
        raise ValueError(f"a picture is uint8 in [0, 255], got an array of {array.dtype}: {cure}")
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        cure = {
            array.shape[:1] == (3,): "; move the channels to the end: np.moveaxis(x, 0, -1)",
            array.shape[2:] == (4,): "; lay transparency on something first: PIL.Image.fromarray(x) does for this",
        }.get(True, "")
        raise ValueError(f"a picture is (H, W, 3) RGB or (H, W) grey of at least one pixel, got {array.shape}{cure}")
    return np.ascontiguousarray(array)


def _decoded(image: Image.Image, what: str) -> NDArray[np.uint8]:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{what} has {image.width}x{image.height} pixels, more than {limit}; make it smaller, or set "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )
    try:
        return np.array(_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # of any kind, depending on which byte is damaged
        raise ValueError(f"{what} can't be read as a picture: {error or repr(error)}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"it has pixels of mode {image.mode}, whose range is not known: save it with 8 or 16 bits")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _outputs(folder: str) -> str | None:
    """The folder itself or one around it, if `maft-adapter segment` writes to it."""
    around = (folder, *map(str, Path(folder).parents))
    return next((each for each in around if os.path.isfile(os.path.join(each, MARK))), None)


def _in_folder(folder: str) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(parent, name)


def _box(mask: NDArray[np.bool_]) -> list[int]:
    """XYWH in pixels of a mask (H, W) that is not empty."""
    (rows,), (columns,) = np.nonzero(mask.any(axis=1)), np.nonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
