"""Label files of every kind that people have, written by independent libraries where there is one."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from maft_adapter.data.labels import lay_on_picture, read_values, to_classes
from maft_adapter.pictures import read_picture

Pixels = NDArray[Any]
VALUES = np.array([[0, 1, 19], [20, 254, 255]])


def palette_png(path: Path) -> None:
    image = Image.fromarray(VALUES.astype(np.uint8), "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tolist())
    image.save(path)


@pytest.mark.parametrize(
    "write",
    [
        palette_png,
        lambda path: Image.fromarray(VALUES.astype(np.uint8)).save(path),
        lambda path: Image.fromarray(VALUES.astype(np.uint16)).save(path),
        lambda path: Image.fromarray(VALUES.astype(np.int32)).save(path.with_suffix(".tif")),
        lambda path: tifffile.imwrite(path.with_suffix(".tif"), VALUES.astype(np.uint8)),
        lambda path: tifffile.imwrite(path.with_suffix(".tif"), VALUES.astype(np.uint16)),
        lambda path: tifffile.imwrite(path.with_suffix(".tif"), VALUES.astype(np.uint16), byteorder=">"),
        lambda path: Image.fromarray(VALUES.astype(np.uint16)).save(path.with_suffix(".tif"), compression="tiff_lzw"),
        lambda path: savemat(path.with_suffix(".mat"), {"LabelMap": VALUES.astype(np.uint16)}),
    ],
)
def test_values_come_back_unchanged(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (path,) = tmp_path.iterdir()
    np.testing.assert_array_equal(read_values(path), VALUES)


def test_16_bits(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 846, 65534, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", values)
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_values(path), values)


def test_one_bit_is_two_classes(tmp_path: Path) -> None:
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "a.png")
    assert read_values(tmp_path / "a.png").tolist() == [[0, 1]]


def test_numbers_of_ade20k(tmp_path: Path) -> None:
    """ADE20K's own loader: R / 10 without its fraction, times 256, plus G; B tells instances apart."""
    red, green = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    expected = (red / 10).astype(np.int32) * 256 + green
    pixels = np.stack([red, green, np.full_like(red, 77)], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "ADE_val_1_seg.png")
    np.testing.assert_array_equal(read_values(tmp_path / "ADE_val_1_seg.png"), expected)


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def png(values: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(VALUES.astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", "can't be read as a label map"),
        ("a.png", b"no picture", "can't be read as a label map"),
        ("a.png", cut(png(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))), "can't be read"),
        ("a.png", png(np.zeros((2, 3, 3), np.uint8)), "one channel of integers: a picture in colour shows labels"),
        ("a.png", png(np.zeros((2, 3, 2), np.uint8)), "one channel"),
        ("a.png", jpeg(), "is a JPEG, which changes the values"),
        ("a.mat", b"no matrix", "can't be read as a MATLAB file"),
    ],
)
def test_damaged_and_unsuitable_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_values(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_missing_file_and_other_matrix(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_values(tmp_path / "a.png")
    savemat(tmp_path / "a.mat", {"other": VALUES})
    with pytest.raises(ValueError, match="has no LabelMap"):
        read_values(tmp_path / "a.mat")
    tifffile.imwrite(tmp_path / "a.tif", VALUES.astype(np.float32))
    with pytest.raises(ValueError, match="float32, expected one channel of integers"):
        read_values(tmp_path / "a.tif")


@pytest.mark.parametrize(("ignore", "dtype"), [(255, np.uint8), (65535, np.uint16)])
def test_classes_of_values(ignore: int, dtype: type) -> None:
    """Against a loop over the pixels."""
    rng = np.random.default_rng(0)
    of_classes = rng.permutation(3000)[:200].tolist()
    values = rng.choice([*of_classes, 4000, 65535], size=(20, 30))
    expected = [[of_classes.index(v) if v in of_classes else ignore for v in row] for row in values.tolist()]
    labels = to_classes(values, of_classes, (4000, 65535), ignore)
    assert labels.dtype == dtype
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(to_classes(values, of_classes, None, ignore), expected)


@pytest.mark.parametrize("values", [[[3]], [[-1]], [[70000]], [[0, 1, 200]]])
def test_values_of_no_class_are_named(values: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=rf"the values \[.*{values[0][-1]}\] stand for no class; there are 2 classes"):
        to_classes(np.array(values), [0, 1], (255,), 255)


# What each EXIF orientation does to the stored pixels when a picture is shown.
SHOWN: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90,
}  # fmt: skip


# Of labels on the stored pixels, only the swapped sides tell.
@pytest.mark.parametrize(
    ("orientation", "drawn_on"), [(one, "shown") for one in SHOWN] + [(one, "stored") for one in (1, 5, 6, 7, 8)]
)
def test_labels_lie_on_the_picture_whatever_its_orientation(orientation: int, drawn_on: str, tmp_path: Path) -> None:
    stored = np.zeros((16, 40), np.uint8)
    stored[:5, :9] = 1
    stored[12:, 30:] = 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored * 255).convert("RGB").save(tmp_path / "a.jpg", exif=exif, quality=100)
    labels = (stored if drawn_on == "stored" else SHOWN[orientation](stored)).astype(np.uint16)
    laid = lay_on_picture(np.ascontiguousarray(labels), tmp_path / "a.jpg", tmp_path / "a.png")
    np.testing.assert_array_equal(laid, read_picture(tmp_path / "a.jpg")[..., 0] > 127)


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    Image.new("RGB", (40, 16)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a.png is 8x20 .*, its picture .*a.jpg 16x40: .*one was resized"):
        lay_on_picture(np.zeros((8, 20), np.uint8), tmp_path / "a.jpg", tmp_path / "a.png")
    with pytest.raises(ValueError, match="is 40x16"):  # turned without an orientation that says so
        lay_on_picture(np.zeros((40, 16), np.uint8), tmp_path / "a.jpg", tmp_path / "a.png")
