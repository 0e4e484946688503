"""Pictures as users have them: what is read, what is refused and how, and what becomes of them."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import supervision
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from maft_adapter import encode_masks
from maft_adapter.classify import class_scores, label_map, text_classifier
from maft_adapter.models import load_model
from maft_adapter.pictures import MARK, SUFFIXES, Segmenter, find_pictures, prepare, prompts, read_picture
from maft_adapter.proposals import Proposals
from maft_adapter.shapes import CLASSES, load_clip, preprocess, render_scene
from maft_adapter.show import class_colors

RNG = np.random.default_rng(0)
HALF = (0.5, 0.5, 0.5)


def pixels(height: int = 5, width: int = 7) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "Ein Bild 白鳥.png"


def test_paths_bytes_files_pil_images_and_arrays_are_the_same_picture(path: Path) -> None:
    picture = pixels()
    Image.fromarray(picture).save(path)
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), file, Image.open(path), picture):
            read = read_picture(source)
            assert read.dtype == np.uint8 and read.flags.c_contiguous and (read == picture).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(orientation: int, path: Path) -> None:
    picture = pixels()
    # How a camera has to store the picture so that this orientation shows it upright: the inverse of what is specified.
    stored = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.swapaxes(0, 1),
        6: np.rot90(picture, 1),
        7: picture[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(picture, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert (read_picture(path) == picture).all()


def test_cmyk() -> None:
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    assert read_picture(Image.fromarray(ink, "CMYK")).tolist() == [[[255] * 3, [0, 255, 255], [0] * 3]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped(path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(path)
    expected = [round(v / 257) for v in values[0].tolist()]
    assert read_picture(path)[0, :, 1].tolist() == expected
    assert read_picture(path).shape == (1, 6, 3)


def test_ranges_that_are_not_known_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.1, 0.9]], np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "i.tif")
    for name in ("f.tif", "i.tif"):
        with pytest.raises(ValueError, match=rf"{name} can't be read.*range is not known: save it with 8 or 16 bits"):
            read_picture(tmp_path / name)


def test_transparency_is_laid_on_white(path: Path) -> None:
    rgba = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], np.uint8)
    expected = [[255] * 3, [10, 20, 30], [204] * 3]
    Image.fromarray(rgba).save(path)
    assert read_picture(path)[0].tolist() == expected
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 10, 20, 30, 0, 0, 0])
    palette.save(path, transparency=bytes([0, 255, 51]))
    assert Image.open(path).mode == "P"
    assert read_picture(path)[0].tolist() == expected
    Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)).save(path, transparency=(1, 2, 3))
    assert read_picture(path)[0].tolist() == [[255] * 3, [4, 5, 6]]
    Image.fromarray(np.array([[[7, 0], [7, 255]]], np.uint8), "LA").save(path)
    assert read_picture(path)[0].tolist() == [[255] * 3, [7] * 3]


def test_grey_and_bilevel() -> None:
    assert read_picture(np.array([[3, 250]], np.uint8)).tolist() == [[[3] * 3, [250] * 3]]
    assert read_picture(Image.fromarray(np.array([[False, True]]))).tolist() == [[[0] * 3, [255] * 3]]


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_picture(tmp_path / "a.gif") == (255, 0, 0)).all()


@pytest.mark.parametrize("shape", [(1, 1), (20, 20000), (20000, 20)])
def test_extreme_sizes(shape: tuple[int, int], path: Path) -> None:
    Image.fromarray(pixels(*shape)).save(path)
    picture = read_picture(path)
    assert picture.shape == (*shape, 3)
    assert prepare(picture, HALF, HALF, multiple=16).shape == (3, 480, 480)
    _, height, width = prepare(picture, HALF, HALF, keep_aspect=True, multiple=16).shape
    assert height * width <= 1.1 * 480 * 480 and height % 16 == width % 16 == 0
    assert min(height, width) >= 16


def bomb() -> bytes:
    """A PNG of a gigapixel, in its header."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def encoded(format: str, size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(*size)).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty; copy or download it again"),
        (b"a list of pictures\n" * 9, "is no picture of a format that PIL knows"),
        (encoded("JPEG")[:900], "can't be read as a picture: .*truncated"),
        (encoded("PNG")[:900], "can't be read as a picture"),
        (encoded("GIF")[:900], "can't be read as a picture"),
        (encoded("WEBP")[:900], "can't be read as a picture|no picture of a format"),
        (bomb(), "can't be read as a picture.*exceeds limit"),
    ],
)
def test_broken_files_are_named(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=rf"broken.jpg.*{message}"):
        read_picture(tmp_path / "broken.jpg")


@given(data=st.data(), format=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"]))
def test_damaged_bytes_give_a_picture_or_a_value_error(data: st.DataObject, format: str) -> None:
    damaged = bytearray(SAMPLES[format])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        picture = read_picture(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]))
    except ValueError:
        return
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3


SAMPLES = {format: encoded(format, (9, 11)) for format in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP")}


def test_more_pixels_than_pil_takes_for_harmless(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(pixels(10, 13)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 129)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="has 13x10 pixels, more than"):
        read_picture(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_picture(path).shape == (10, 13, 3)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(OSError, match=r"link.jpg is a link to .*gone.jpg, which does not exist"):
        read_picture(tmp_path / "link.jpg")
    with pytest.raises(OSError, match=r"missing\.jpg"):
        read_picture(tmp_path / "missing.jpg")
    with pytest.raises(OSError, match=str(tmp_path)):
        read_picture(tmp_path)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((4, 4, 3)), ValueError, r"uint8 in \[0, 255\], got an array of float64: \(255 \* x\)"),
        (np.zeros((4, 4, 3), np.uint16), ValueError, "got an array of uint16: scale it"),
        (np.zeros((3, 4, 5), np.uint8), ValueError, r"got \(3, 4, 5\); move the channels to the end"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"got \(4, 4, 4\); lay transparency on something"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"at least one pixel, got \(0, 4, 3\)"),
        (torch.zeros(4, 4, 3), TypeError, "a path, bytes, a PIL image or an array, got Tensor"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_other_sources_are_refused(source: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        read_picture(source)


# Finding


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folders_files_and_patterns(tmp_path: Path) -> None:
    names = ["b.JPG", "a b.png", "deep/er/白鳥.webp", "notes.txt", ".hidden.png", ".thumbs/t.png", "deep/link.jpg"]
    touch(*(tmp_path / name for name in names[:-1]))
    (tmp_path / "deep" / "link.jpg").symlink_to(tmp_path / "gone")
    found = [str(path.relative_to(tmp_path)) for path in find_pictures([tmp_path])]
    assert found == ["a b.png", "b.JPG", "deep/link.jpg", "deep/er/白鳥.webp"]
    assert [path.name for path in find_pictures([tmp_path / "*.JPG"])] == ["b.JPG"]
    assert [path.name for path in find_pictures([str(tmp_path / "**" / "*.webp")])] == ["白鳥.webp"]
    assert find_pictures([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]  # named, so meant


def test_each_picture_once_at_its_first_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.png", tmp_path / "b.png")
    monkeypatch.chdir(tmp_path)
    found = find_pictures(["b.png", ".", tmp_path, "*.png", "./a.png"])
    assert found == [Path("b.png"), Path("a.png")]


def test_a_file_with_a_pattern_in_its_name(tmp_path: Path) -> None:
    touch(tmp_path / "a[1].png", tmp_path / "a1.png")
    assert find_pictures([tmp_path / "a[1].png"]) == [tmp_path / "a[1].png"]


def test_every_format_that_pil_reads_and_no_data(tmp_path: Path) -> None:
    Image.init()
    for suffix in (".jfif", ".jpe", ".tga", ".webp", ".psd", ".heic", ".avif"):
        assert suffix in SUFFIXES
    assert not {".h5", ".mpg", ".ps", ".pdf", ".txt", ".json", ".npy"} & set(SUFFIXES)
    for suffix in set(SUFFIXES) & set(Image.registered_extensions()):
        if Image.registered_extensions()[suffix] in Image.SAVE:
            with contextlib.suppress(OSError, ValueError):  # of formats that hold no RGB
                Image.new("RGB", (16, 16), "red").save(tmp_path / f"x{suffix}")
    written = sorted(path for path in tmp_path.iterdir() if path.stat().st_size)
    assert len(written) > 20 and sorted(find_pictures([tmp_path])) == sorted(tmp_path.iterdir())
    for path in written:
        assert read_picture(path).shape[2] == 3


def test_outputs_of_segment_are_passed_over_and_said(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "out" / MARK, tmp_path / "out" / "sub" / "a.png")
    with pytest.warns(UserWarning, match=rf"{tmp_path}/out holds outputs of maft-adapter segment"):
        assert find_pictures([tmp_path]) == [tmp_path / "a.png"]
    with pytest.raises(ValueError, match=rf"no pictures are left: {tmp_path}/out holds outputs"):
        find_pictures([tmp_path / "out" / "sub"])


def test_nothing_to_find(tmp_path: Path) -> None:
    touch(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no pictures there; their suffixes are .*\.jpg"):
        find_pictures([tmp_path])
    with pytest.raises(ValueError, match=r"\*.png: no pictures there"):
        find_pictures([tmp_path / "*.png"])
    missing = tmp_path / "missing.png"
    with pytest.raises(FileNotFoundError, match=r"missing.png, .*gone.png: no such file or folder"):
        find_pictures([missing, tmp_path / "gone.png"])
    assert find_pictures([missing, tmp_path / "notes.txt"]) == [missing, tmp_path / "notes.txt"]  # to be reported
    with pytest.raises(ValueError, match="no pictures were named"):
        find_pictures([])


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "closed" / "b.png")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(OSError, match="closed"):
            find_pictures([tmp_path])
    finally:
        (tmp_path / "closed").chmod(0o700)


# Preparing


def test_prepare_normalises_and_squeezes_the_whole_picture() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    picture = np.full((30, 50, 3), (51, 102, 255), np.uint8)
    expected = (torch.tensor([0.2, 0.4, 1.0]) - torch.tensor(mean)) / torch.tensor(std)
    prepared = prepare(picture, mean, std, size=32, multiple=16)
    assert prepared.dtype == torch.float32 and prepared.shape == (3, 32, 32)
    torch.testing.assert_close(prepared, expected[:, None, None].expand(3, 32, 32))
    # Nothing is cut off: what is in a corner stays there.
    picture = np.zeros((90, 40, 3), np.uint8)
    picture[-9:, :4] = 255
    corner = prepare(picture, (0, 0, 0), (1, 1, 1), size=40)[0]
    assert corner[-3:, :3].min() > 0.9 and corner[:-6].max() < 0.1 and corner[:, 6:].max() < 0.1


def test_prepare_at_the_pictures_own_size_changes_no_pixel() -> None:
    picture = pixels(32, 32)
    prepared = prepare(picture, (0, 0, 0), (1, 1, 1), size=32, multiple=8)
    assert ((prepared * 255).round().byte().movedim(0, -1).numpy() == picture).all()


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.integers(1, 200),
    multiple=st.integers(1, 40),
)
def test_sides_are_the_nearest_multiples(height: int, width: int, size: int, multiple: int) -> None:
    picture = np.zeros((height, width, 3), np.uint8)
    square = prepare(picture, HALF, HALF, size, multiple=multiple)
    assert square.shape[1] == square.shape[2] >= multiple and square.shape[1] % multiple == 0
    assert abs(square.shape[1] - size) <= max(multiple / 2, multiple - size)
    kept = prepare(picture, HALF, HALF, size, keep_aspect=True, multiple=multiple)
    for side, wanted in zip(
        kept.shape[1:], (size * (height / width) ** 0.5, size * (width / height) ** 0.5), strict=True
    ):
        assert side % multiple == 0 and side >= multiple
        assert abs(side - wanted) <= max(multiple / 2, multiple - wanted) + 1e-6


@pytest.mark.parametrize("options", [{"size": 0}, {"multiple": 0}, {"std": (0.5, 0.0, 0.5)}])
def test_prepare_refuses(options: Any) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        prepare(pixels(), **{"mean": HALF, "std": HALF, **options})


# Segmenting

MODEL = load_model()


class Given:
    """A proposer that gives what it was made with."""

    settings = "given"

    def __init__(self, masks: NDArray[Any], **scores: Any) -> None:
        self.proposals = Proposals(masks, **scores)

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        return self.proposals


def segmenter(**options: Any) -> Segmenter:
    settings: dict[str, Any] = {"size": 96, "templates": MODEL.templates, **options}
    names = settings.pop("class_names", MODEL.class_names)
    return Segmenter(MODEL.clip, MODEL.tokenizer, names, **settings)


SCENE = render_scene(8)
MASKS = np.stack([SCENE.labels == k for k in SCENE.present])


def test_a_picture_from_end_to_end_equals_its_parts() -> None:
    result = segmenter(proposals=Given(MASKS))(SCENE.image)
    images, masks = preprocess(SCENE.image)[None], torch.from_numpy(MASKS)[None]
    text = text_classifier(MODEL.clip, MODEL.tokenizer, CLASSES, MODEL.templates)
    with torch.no_grad():
        embeddings = encode_masks(MODEL.clip, images, masks)
    scores = class_scores(embeddings, text, MODEL.logit_scale)
    torch.testing.assert_close(torch.from_numpy(result.scores), scores[0])
    assert (result.label_map == label_map(scores, masks)[0].numpy()).all()
    assert result.label_map.dtype == np.uint8 and (result.masks == MASKS).all() and result.valid.all()
    for n, best in enumerate(result.top(3)):
        order = scores[0, n].argsort(descending=True)[:3].tolist()
        assert [name for name, _ in best] == [CLASSES[k] for k in order]
        assert [score for _, score in best] == pytest.approx(scores[0, n, order].tolist())


def test_other_words_and_masks_without_encoding_the_image_again(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["red ball", ("blue star", "green star"), "pale water"]
    fresh = segmenter(class_names=words, proposals=Given(MASKS[::-1].copy()))(SCENE.image)
    result = segmenter(proposals=Given(MASKS))(SCENE.image)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("maft_adapter.pictures.encode_features", refuse)
    calls: list[Any] = []

    def count(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return text_classifier(*arguments)

    monkeypatch.setattr("maft_adapter.pictures.text_classifier", count)
    for same in (tuple(words), (word for word in words), [*words[:1], [*words[1]], *words[2:]]):
        np.testing.assert_array_equal(result.relabel(same).scores, result.relabel(words).scores)
    assert len(calls) == 1  # the words are not encoded again, either
    other = result.relabel(words).ask(MASKS[::-1].copy())
    assert other.names == ["red ball", "blue star", "pale water"]
    np.testing.assert_allclose(other.scores, fresh.scores, atol=1e-6)
    assert (other.label_map == fresh.label_map).all()
    assert result.scores.shape[1] == len(CLASSES)  # the first result stays what it was
    with pytest.raises(ValueError, match=r"masks are 5 x 5 .*the picture 96 x 96"):
        result.ask(np.ones((1, 5, 5), bool))
    with pytest.raises(TypeError, match="got one string"):
        result.relabel("red ball")


def test_masks_given_with_the_picture_are_taken_in_place_of_the_proposers() -> None:
    words = ["red ball", "pale grass"]
    given = segmenter(class_names=words, proposals=Given(MASKS))(SCENE.image)

    class Never:
        settings = "never"

        def __call__(self, picture: Any, name: str = "") -> Any:
            raise AssertionError("the proposer was asked")

    never = segmenter(class_names=words, proposals=Never())
    for masks in (MASKS, Proposals(MASKS)):
        result = never(SCENE.image, masks)
        assert torch.equal(result.embeddings, given.embeddings)
        np.testing.assert_array_equal(result.label_map, given.label_map)
    with pytest.raises(ValueError, match="masks are 3 x 4"):
        never(SCENE.image, MASKS[:, :3, :4])


def test_embeddings_of_old_words_are_forgotten() -> None:
    segment = segmenter(class_names=["red ball"], proposals=Given(MASKS))
    result = segment(SCENE.image)
    for first, second in itertools.pairwise(CLASSES):
        result.relabel([first, second])
    assert len(segment._texts) <= 16
    assert (result.scores == 1).all()  # words that were forgotten are encoded again


def test_background_takes_pixels_but_is_no_class() -> None:
    words = ["red ball"]
    alone = segmenter(class_names=words, proposals=Given(MASKS))(SCENE.image)
    assert (alone.label_map == 0).all() and (alone.scores == 1).all()
    result = segmenter(class_names=words, background=("pale grass", "dark grass"), proposals=Given(MASKS))(SCENE.image)
    both = segmenter(class_names=[*words, ("pale grass", "dark grass")], proposals=Given(MASKS))(SCENE.image)
    assert (result.scores == both.scores[:, :1]).all()
    assert (result.label_map == np.where(both.label_map == 1, 255, both.label_map)).all()
    assert set(np.unique(both.label_map)) == {0, 1}  # or the test says nothing
    assert {name for best in result.top() for name, _ in best} == {"red ball"}


def test_soft_masks_class_scores_and_scores_pass_through() -> None:
    soft = MASKS.astype(np.float32) * 0.9
    scores = np.linspace(0, 1, len(soft), dtype=np.float32)
    class_scores = np.full((len(soft), 4), 0.25, np.float32)
    result = segmenter(proposals=Given(soft, scores=scores, class_scores=class_scores))(SCENE.image)
    hard = segmenter(proposals=Given(MASKS))(SCENE.image)
    assert (result.label_map == hard.label_map).all()
    assert result.proposal_scores is scores and result.proposals.class_scores is class_scores
    coco, expected = result.coco()["annotations"], hard.coco()["annotations"]
    assert [a["segmentation"] for a in coco] == [a["segmentation"] for a in expected]
    assert [a["proposal_score"] for a in coco] == pytest.approx(scores.tolist(), abs=1e-6)


def test_masks_without_a_patch_and_no_masks_at_all() -> None:
    masks = np.zeros((2, 96, 96), bool)
    masks[0, :48] = True
    masks[1, 60, 60] = True  # vanishes on the grid
    result = segmenter(proposals=Given(masks))(SCENE.image)
    assert result.valid.tolist() == [True, False]
    assert (result.label_map[48:] == 255).all() and (result.label_map[:48] != 255).all()
    coco, detections = result.coco(), result.detections()
    assert len(coco["annotations"]) == len(detections) == 1
    assert coco["annotations"][0]["proposal"] == detections.data["proposal"][0] == 0
    assert coco["info"]["left_out"] == detections.metadata["left_out"] == [1]
    nothing = result.ask(masks[:0])
    assert (nothing.label_map == 255).all() and nothing.scores.shape == (0, 40) and nothing.top() == []
    assert nothing.coco()["annotations"] == [] and len(nothing.detections()) == 0
    assert nothing.overlay().size == (384, 384)


def test_coco_is_what_pycocotools_reads(tmp_path: Path) -> None:
    scores = np.full(len(MASKS), 0.5, np.float32)
    result = segmenter(proposals=Given(MASKS, scores=scores))(SCENE.image, name="folder/scene 8.png")
    (tmp_path / "coco.json").write_text(json.dumps(result.coco()))
    coco = COCO(str(tmp_path / "coco.json"))
    assert coco.loadImgs(1)[0] == {"id": 1, "file_name": "scene 8.png", "width": 96, "height": 96}
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=1))
    assert len(annotations) == len(MASKS)
    for n, annotation in enumerate(annotations):
        mask = coco.annToMask(annotation)
        assert (mask == MASKS[n]).all() and annotation["area"] == mask.sum()
        rows, columns = np.nonzero(mask)
        left, top, width, height = annotation["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())
        top5 = [(coco.cats[category]["name"], score) for category, score in annotation["top5"]]
        assert top5 == [(name, pytest.approx(score, abs=1e-6)) for name, score in result.top(5)[n]]
        assert (annotation["category_id"], annotation["score"]) == tuple(annotation["top5"][0])


def test_detections() -> None:
    result = segmenter(proposals=Given(MASKS))(SCENE.image)
    detections: Any = result.detections()
    assert (detections.mask == MASKS).all()
    inclusive = supervision.mask_to_xyxy(MASKS)
    assert (detections.xyxy - inclusive == [0, 0, 1, 1]).all()
    assert detections.data["class_name"].tolist() == [best[0][0] for best in result.top(1)]
    assert detections.confidence == pytest.approx([best[0][1] for best in result.top(1)])


def test_saved_files_open_and_say_the_same(tmp_path: Path) -> None:
    result = segmenter(proposals=Given(MASKS))(SCENE.image, name="photos/scene 8.jpg")
    paths = result.save(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["scene 8.png", "scene 8_overlay.jpg", "scene 8.json"]
    labels = Image.open(paths[0])
    assert labels.mode == "P" and (np.asarray(labels) == result.label_map).all()
    palette = np.array(labels.getpalette()).reshape(-1, 3)
    assert (palette[:40] == class_colors(40)).all() and (palette[255] == 255).all()
    assert Image.open(paths[1]).size == result.overlay().size
    coco = json.loads(paths[2].read_bytes())
    assert coco["annotations"] == json.loads(json.dumps(result.coco()["annotations"]))
    counts = {str(k + 1): int((result.label_map == k).sum()) for k in np.unique(result.label_map)}
    assert coco["info"]["pixels"] == counts
    for path in paths[:2]:
        assert coco["info"]["sha256"][path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    again = result.save(tmp_path / "again", "sub/other", {"run": 1})
    assert again[0] == tmp_path / "again" / "sub" / "other.png"
    assert [path.read_bytes() for path in again[:2]] == [path.read_bytes() for path in paths[:2]]
    with pytest.raises(ValueError, match="came without a file's name: give name="):
        segmenter(proposals=Given(MASKS))(SCENE.image).save(tmp_path)


@pytest.mark.parametrize("linked", [False, True])
def test_the_picture_itself_is_never_replaced(linked: bool, tmp_path: Path) -> None:
    path = tmp_path / "photos" / "p.png"
    path.parent.mkdir()
    Image.fromarray(SCENE.image).save(path)
    folder = path.parent
    if linked:  # the folder by another name
        folder = tmp_path / "link"
        folder.symlink_to(path.parent)
    before = path.read_bytes()
    result = segmenter(proposals=Given(MASKS))(path)
    with pytest.raises(ValueError, match=r"p\.png would replace the picture .*p\.png: give another folder or name="):
        result.save(folder)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["p.png"]
    assert result.save(folder, "p_labels")[0].name == "p_labels.png"
    assert path.read_bytes() == before


def test_more_than_255_classes_have_16_bits(tmp_path: Path) -> None:
    pairs = itertools.islice(itertools.combinations(CLASSES, 2), 300)
    names = [f"{first} and {second}" for first, second in pairs]
    result = segmenter(class_names=names, proposals=Given(MASKS[:1]))(SCENE.image)
    assert result.label_map.dtype == np.uint16
    assert set(np.unique(result.label_map)) == {result.scores[0].argmax(), 65535}
    path = result.save(tmp_path, "x")[0]
    assert (np.asarray(Image.open(path)) == result.label_map).all()
    assert json.loads((tmp_path / "x.json").read_bytes())["info"]["unlabelled"] == 65535


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (20, 20000), (64, 64)])
@pytest.mark.parametrize("keep_aspect", [False, True])
def test_one_colour_and_pictures_of_every_shape(shape: tuple[int, int], keep_aspect: bool, tmp_path: Path) -> None:
    result = segmenter(keep_aspect=keep_aspect)(np.full((*shape, 3), 90, np.uint8), name="x.png")
    assert result.label_map.shape == shape and (result.label_map != 255).all()  # the whole picture is a proposal
    result.save(tmp_path)
    assert np.asarray(Image.open(tmp_path / "x.png")).shape == shape


def test_pictures_that_jpeg_cannot_hold(tmp_path: Path) -> None:
    result = segmenter(proposals=Given(np.ones((1, 4, 70_000), bool)))(np.zeros((4, 70_000, 3), np.uint8), name="x.png")
    labels, overlay = (Image.open(path) for path in result.save(tmp_path)[:2])
    assert labels.size == (70_000, 4) and overlay.width == 65_500
    overlay.load()


MEMORY = """
import itertools, resource, sys, tempfile
import numpy as np
from maft_adapter.models import load_model
from maft_adapter.pictures import Segmenter
from maft_adapter.proposals import Proposals
from maft_adapter.shapes import CLASSES

class Given:
    settings = "given"
    def __init__(self):
        self.masks = np.empty((80, 3000, 4000), bool)
        for n, mask in enumerate(self.masks):
            mask[:] = False
            mask[30 * n : 30 * n + 600, 40 * n : 40 * n + 800] = True
    def __call__(self, picture, name=""):
        return Proposals(self.masks)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

model = load_model()
words = [f"{first} and {second}" for first, second in itertools.islice(itertools.permutations(CLASSES, 2), 847)]
segmenter = Segmenter(model.clip, model.tokenizer, words, size=model.size, proposals=Given())
before = peak()
result = segmenter(np.zeros((3000, 4000, 3), np.uint8), name="x.png")
with tempfile.TemporaryDirectory() as folder:
    result.save(folder)
assert len(result.detections()) == 80
print(before, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_847_classes_on_12_megapixels_take_little_beside_the_masks() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    # Half of what a copy of the masks takes; with the libraries' 0.8 GB and the masks' 1 GB mostly 2.0 GB in all, but
    # that depends on the allocator and on what else runs.
    assert peak - before < 500 * 2**20


def test_photographs_and_a_tower_of_another_patch_size() -> None:
    model = load_model("ViT-S-32-alt", "random")
    words = ["cat", ("sofa", "couch"), "grass"]
    for keep_aspect in (False, True):
        segment = Segmenter(model.clip, model.tokenizer, words, size=224, keep_aspect=keep_aspect)
        result = segment(Image.fromarray(skimage.data.chelsea()))
        assert result.label_map.shape == (300, 451) and set(np.unique(result.label_map)) <= {0, 1, 2, 255}
        grid = result.features.grid
        assert grid == ((6, 9) if keep_aspect else (7, 7))


@pytest.mark.parametrize(("name", "count"), [("one", 1), ("vild", 14), ("imagenet", 80)])
def test_templates_by_name(name: str, count: int) -> None:
    found = prompts(name)
    assert len(set(found)) == count and all(template.count("{}") == 1 for template in found)
    with pytest.raises(ValueError, match="templates are 'two', expected one, vild, imagenet"):
        prompts("two")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_names": "red ball"}, TypeError, r"got one string: use \['red ball'\]"),
        ({"class_names": []}, ValueError, "class_names is empty"),
        ({"class_names": ["swan"]}, ValueError, r"'a picture of swan' also has"),
        ({"background": "red ball"}, ValueError, "are both named"),
        ({"size": 0}, ValueError, "size is 0, expected at least 1"),
        ({"proposals": "magic"}, ValueError, "proposals are 'magic'"),
    ],
)
def test_segmenter_refuses(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        segmenter(**options)


def test_mean_and_std_are_never_guessed() -> None:
    clip = load_clip()
    with pytest.raises(TypeError, match="has no mask-aware image tower"):
        Segmenter(clip, MODEL.tokenizer, ["red ball"])
    clip = load_clip(mask_aware=True)
    with pytest.raises(ValueError, match="the mean and std of this VisionTransformer's images are not known"):
        Segmenter(clip, MODEL.tokenizer, ["red ball"])
    given = Segmenter(clip, MODEL.tokenizer, CLASSES, mean=MODEL.mean, std=MODEL.std, size=96, proposals=Given(MASKS))
    own = segmenter(templates="one", proposals=Given(MASKS))
    np.testing.assert_array_equal(given(SCENE.image).scores, own(SCENE.image).scores)


def test_a_proposer_that_lies_is_refused() -> None:
    with pytest.raises(ValueError, match=r"masks are 96 x 96 .*, the picture 50 x 96"):
        segmenter(proposals=Given(MASKS))(SCENE.image[:50])


def test_half_precision() -> None:
    model = load_model(precision="bf16")
    result = Segmenter(model.clip, model.tokenizer, CLASSES, size=96, proposals=Given(MASKS))(SCENE.image)
    own = segmenter(templates="one", proposals=Given(MASKS))(SCENE.image)
    assert result.scores.dtype == np.float32
    # 8 bits of cosines of at most 1, times the scale, in the exponent of a probability.
    assert np.abs(result.scores - own.scores).max() < MODEL.logit_scale * 2**-6
