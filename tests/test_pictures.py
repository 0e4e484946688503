"""Pictures as users have them: what is read, what is refused and how, and what becomes of them."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from maft_adapter.pictures import find_pictures, prepare, read_picture

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


def test_nothing_to_find(tmp_path: Path) -> None:
    touch(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no pictures there; their suffixes are .*\.jpg"):
        find_pictures([tmp_path])
    with pytest.raises(ValueError, match=r"\*.png: no pictures there"):
        find_pictures([tmp_path / "*.png"])
    with pytest.raises(FileNotFoundError, match=r"missing.png: no such file or folder"):
        find_pictures([tmp_path / "missing.png"])
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
