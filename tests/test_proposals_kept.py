"""Proposals kept on disk: found again, damaged, stale, shared."""

import errno
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from maft_adapter.proposals import Files, Kept, Proposals, check_proposals
from maft_adapter.proposals.merging import Superpixels

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 8, 3)).astype(np.uint8)
MASKS = arrays(bool, array_shapes(min_dims=3, max_dims=3, max_side=12)) | arrays(
    np.float32, array_shapes(min_dims=3, max_dims=3, max_side=12), elements=st.floats(0, 1, width=32)
)


class Maker:
    """A proposer that counts its calls."""

    def __init__(self, masks: NDArray[Any], settings: str = "a maker", **scores: Any) -> None:
        self.settings = settings
        self.calls = 0
        self._proposals = Proposals(masks, **scores)

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        self.calls += 1
        return self._proposals


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def equal(a: Proposals, b: Proposals) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def test_each_picture_is_asked_for_once(tmp_path: Path) -> None:
    class_scores = np.full((2, 5), 0.2, np.float32)
    maker = Maker(np.array([PICTURE[..., 0] > 9, PICTURE[..., 1] > 99]), class_scores=class_scores)
    maker._proposals = maker._proposals._replace(scores=np.array([0.1, 0.7], np.float32))
    kept = Kept(maker, tmp_path / "new" / "folder")
    first = kept(PICTURE, "dog.jpg")
    assert equal(first, maker._proposals)
    again = Kept(maker, tmp_path / "new" / "folder")
    assert equal(again(PICTURE, "moved/cat.jpg"), first) and maker.calls == 1 and again.settings == "a maker"
    again(PICTURE[:, ::-1])  # other pixels
    assert maker.calls == 2
    kept.proposer = other = Maker(np.zeros((0, 5, 8), bool), "another maker")
    assert kept(PICTURE).masks.shape == kept(PICTURE).masks.shape == (0, 5, 8)
    assert other.calls == 1 and len(entries(tmp_path)) == 3


def test_pictures_of_the_same_bytes_and_another_shape_differ(tmp_path: Path) -> None:
    kept = Kept(Superpixels(), tmp_path)
    for shape in ((5, 8, 3), (8, 5, 3), (1, 40, 3)):
        assert kept(PICTURE.reshape(shape)).masks.shape[1:] == shape[:2]
    assert equal(kept(PICTURE), Superpixels()(PICTURE))


@given(masks=MASKS)
def test_bool_masks_are_exact_and_soft_ones_near(masks: NDArray[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("kept")
    picture = np.zeros((*masks.shape[1:], 3), np.uint8)
    kept = Kept(Maker(masks), folder)
    first, later = kept(picture), kept(picture)
    assert equal(first, later) and first.masks.dtype == masks.dtype
    check_proposals(first, picture.shape[:2])
    if masks.dtype == bool:
        assert np.array_equal(first.masks, masks)
    else:
        assert np.abs(first.masks - masks).max() <= 0.5 / 255 + 1e-6
        assert np.array_equal(first.masks >= 0.5, masks >= 0.5)
    shutil.rmtree(folder)


@pytest.mark.parametrize("soft", [False, True])
def test_every_damaged_byte_is_noticed(soft: bool, tmp_path: Path) -> None:
    masks = np.stack([PICTURE[..., 0] > 9, PICTURE[..., 1] > 99])
    maker = Maker(masks.astype(np.float32) if soft else masks, scores=np.array([0.1, 0.7], np.float32))
    kept = Kept(maker, tmp_path)
    kept(PICTURE)
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 150)] + [whole + b"\0"]
    damaged += [whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :] for i in range(0, len(whole), 30)]
    for calls, content in enumerate(damaged, 2):
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=r"\.masks is damaged; its proposals are made again"):
            assert equal(kept(PICTURE), maker._proposals)
        assert maker.calls == calls and path.read_bytes() == whole


def test_entries_of_other_pictures_and_settings_are_not_taken(tmp_path: Path) -> None:
    kept = Kept(Maker(np.zeros((1, 5, 8), bool)), tmp_path)
    kept(PICTURE)
    (one,) = entries(tmp_path)
    kept.proposer = Maker(np.ones((1, 5, 8), bool), "other settings")
    kept(PICTURE)
    (other,) = set(entries(tmp_path)) - {one}
    other.write_bytes(one.read_bytes())
    with pytest.warns(UserWarning, match="damaged"):
        assert kept(PICTURE).masks.all()


def test_masks_from_files_are_told_by_name_and_content(tmp_path: Path) -> None:
    masks = np.zeros((2, 5, 8), bool)
    masks[0, 0, 0] = masks[1, 1, 1] = True
    for name, mask in zip(("dog", "cat"), masks, strict=True):
        np.save(tmp_path / f"{name}.npy", mask)
    folder = tmp_path / "kept"
    for _ in range(2):
        kept = Kept(Files(tmp_path / "dog.npy"), folder)
        assert np.array_equal(kept(PICTURE, "dog.jpg").masks, masks[:1])
    two = tmp_path / "two"
    two.mkdir()
    for name in ("dog", "cat"):
        shutil.move(tmp_path / f"{name}.npy", two)
    for _ in range(2):  # the same picture under two names
        kept = Kept(Files(two), folder)
        for name, mask in zip(("dog", "cat"), masks, strict=True):
            assert np.array_equal(kept(PICTURE, f"{name}.jpg").masks, mask[None])
    np.save(two / "dog.npy", masks)
    assert np.array_equal(Kept(Files(two), folder)(PICTURE, "dog.jpg").masks, masks)


def _ask(folder: Path) -> int:
    """How many entries of ten pictures are damaged, or others than what was kept."""
    masks = np.random.default_rng(1).random((9, 40, 40)) > 0.5
    kept, wrong = Kept(Maker(masks), folder), 0
    for brightness in range(10):
        with warnings.catch_warnings(record=True) as caught:
            proposals = kept(np.full((40, 40, 3), brightness, np.uint8))
        wrong += len(caught) + (not np.array_equal(proposals.masks, masks))
    return wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_processes_share_a_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_ask, [tmp_path] * 20, chunksize=1) == [0] * 20
    assert len(entries(tmp_path)) == 10 and all(path.suffix == ".masks" for path in entries(tmp_path))


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OSError, match=rf"proposals can't be kept in .*{folder.name}: "):
            Kept(Superpixels(), folder)
    kept = Kept(Superpixels(), tmp_path / "full")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"proposals can't be kept in .*full: No space left on device") as caught:
            kept(PICTURE)
    assert caught.value.errno == errno.ENOSPC and not entries(tmp_path / "full")
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write anywhere
    with pytest.raises(PermissionError, match=r"can't be kept in .*folder: it can't be written to"):
        Kept(Superpixels(), tmp_path / "folder")


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 8), (5, 8, 4), (3, 5, 8)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    for proposer in (Superpixels(), Files(tmp_path), Kept(Superpixels(), tmp_path)):
        with pytest.raises(ValueError, match=re.escape(f"uint8 RGB of at least one pixel, got {shape} uint8")):
            proposer(np.zeros(shape, np.uint8), "dog.jpg")


def test_a_missing_library_names_the_extra() -> None:
    program = """
import sys
for library in ("pycocotools", "transformers", "skimage"):
    sys.modules[library] = None  # as if it were not installed
from maft_adapter.proposals import proposer
from maft_adapter.proposals.convert import to_rle
import numpy as np
for use in (lambda: to_rle(np.ones((1, 2, 2), bool)), lambda: proposer("sam"), lambda: proposer("superpixels")):
    try:
        use()
    except ModuleNotFoundError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        f'{library} is not installed; run: pip install "maft-adapter[{extra}]"'
        for library, extra in (("pycocotools", "pictures"), ("transformers", "sam"), ("skimage", "pictures"))
    ], run.stderr


@pytest.mark.parametrize(
    ("proposals", "error", "message"),
    [
        (np.zeros((1, 5, 8), bool), TypeError, "a proposer gives Proposals, got ndarray"),
        (Proposals([[[True]]]), TypeError, "got list"),  # type: ignore[arg-type]
        (Proposals(np.zeros((1, 5, 8), np.uint8)), TypeError, r"got uint8; 0 and 1 need .astype\(bool\)"),  # type: ignore[arg-type]
        (Proposals(np.zeros((5, 8), bool)), ValueError, r"masks are \(N, H, W\), got \(5, 8\)"),
        (Proposals(np.zeros((1, 8, 5), bool)), ValueError, "masks are 8 x 5 .* the picture 5 x 8, turned as its EXIF"),
        (Proposals(np.full((1, 5, 8), 2, np.float32)), ValueError, "from 2 to 2: logits need a sigmoid"),
        (Proposals(np.zeros((1, 5, 8), bool), np.zeros(1)), TypeError, "scores are a float32 array, got float64"),  # type: ignore[arg-type]
        (Proposals(np.zeros((1, 5, 8), bool), np.zeros(2, np.float32)), ValueError, r"scores are \(2,\) for 1 masks"),
        (Proposals(np.zeros((1, 5, 8), bool), np.full(1, np.nan, np.float32)), ValueError, "scores must lie"),
        (
            Proposals(np.zeros((1, 5, 8), bool), None, np.zeros((1, 3), np.float32)),
            ValueError,
            "class_scores must sum to 1",
        ),
    ],
)
def test_what_is_no_proposals_is_not_kept(proposals: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    maker = Maker(np.zeros((0, 5, 8), bool))
    maker._proposals = proposals
    with pytest.raises(error, match=message):
        Kept(maker, tmp_path)(PICTURE)
    assert not entries(tmp_path)
