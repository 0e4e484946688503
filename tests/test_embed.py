"""Embeddings on disk: what a row says, killed and resumed runs, broken folders, tar files, Ray."""

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from test_models import small_open_clip, small_transformers  # noqa: F401

from maft_adapter import cli, encode_masks, save_mask_aware
from maft_adapter.models import load_model
from maft_adapter.pictures import prepare
from maft_adapter.proposals import Proposals
from maft_adapter.shapes import render_scene

pa = pytest.importorskip("pyarrow")
pq: Any = pytest.importorskip("pyarrow.parquet")
coco = pytest.importorskip("pycocotools.mask")

from maft_adapter import embed as module  # noqa: E402
from maft_adapter.embed import Embedder, Source, embed, find_sources, model_of, read_embeddings, source_of  # noqa: E402


class Halves(NamedTuple):
    """A proposer: the left half, the lower third, and one pixel, which no token sees; nothing in grey pictures."""

    settings: str = "halves"
    soft: bool = False

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        height, width = picture.shape[:2]
        masks = np.zeros((3, height, width), bool)
        masks[0, :, : width // 2] = masks[1, height * 2 // 3 :] = masks[2, 0, 0] = True
        if (picture == 128).all():
            masks = masks[:0]
        scores = np.linspace(0.25, 0.75, len(masks), dtype=np.float32)
        return Proposals(masks * np.float32(0.75), None) if self.soft else Proposals(masks, scores)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(Halves())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of seven pictures, not square, one of them grey."""
    folder = tmp_path / "ä pictures"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(render_scene(i).image[: 60 + i]).save(folder / f"{i} 画.png")
    Image.new("RGB", (40, 30), (128, 128, 128)).save(folder / "grey.png")
    return folder


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_a_row_says_what_its_picture_holds(pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    assert embed([pictures], tmp_path / "out", embedder, per_shard=3) == (7, 0, {})
    assert list(shards(tmp_path / "out")) == ["000000.parquet", "000001.parquet", "000002.parquet"]
    found, model = rows(tmp_path / "out"), load_model()
    assert [row["path"] for row in found] == [str(path.absolute()) for path in sorted(pictures.iterdir())]
    for row in found:
        picture = np.array(Image.open(row["path"]))
        masks, scores, _ = Halves()(picture)
        size = [row["height"], row["width"]]
        assert size == list(picture.shape[:2])
        assert row["scores"] == ([] if scores is None else scores.tolist())
        assert row["areas"] == masks.sum((1, 2)).tolist()
        assert row["valid"] == [True, True, False][: len(masks)]
        for mask, code, box in zip(masks, row["masks"], row["boxes"], strict=True):
            assert np.array_equal(coco.decode({"size": size, "counts": code}), mask)
            y, x = np.nonzero(mask)
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        image = prepare(picture, model.mean, model.std, model.size)[None]
        with torch.no_grad():
            expected = encode_masks(model.clip, image, torch.from_numpy(masks)[None], normalize=True)[0]
        assert np.shape(row["embeddings"]) in ((3, 64), (0,))
        np.testing.assert_allclose(np.reshape(row["embeddings"], (-1, 64)), expected, atol=1e-3)


def test_soft_masks_without_scores(pictures: Path, tmp_path: Path) -> None:
    embed([pictures], tmp_path / "out", Embedder(Halves("soft", soft=True)))
    row = rows(tmp_path / "out")[0]
    assert row["scores"] is None
    assert row["areas"] == Halves()(np.array(Image.open(row["path"]))).masks.sum((1, 2)).tolist()


def test_the_matrix_and_its_keys(pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    out = tmp_path / "out"
    embed([pictures], out, embedder, per_shard=4)
    found, embeddings = rows(out), read_embeddings(out)
    keys = [(p, m) for p, row in enumerate(found) for m, valid in enumerate(row["valid"]) if valid]
    assert list(zip(embeddings.pictures.tolist(), embeddings.masks.tolist(), strict=True)) == keys
    assert embeddings.matrix.dtype == np.float16 and isinstance(embeddings.matrix, np.memmap)
    assert np.array_equal(embeddings.matrix, np.array([found[p]["embeddings"][m] for p, m in keys], np.float16))
    np.testing.assert_allclose(np.linalg.norm(embeddings.matrix.astype(float), axis=1), 1, atol=1e-3)
    assert embeddings.paths == [row["path"] for row in found]
    assert embeddings.settings == json.loads(pq.read_schema(out / "000000.parquet").metadata[b"maft_adapter"])
    assert embeddings.rows([5, 0]) == [{k: v for k, v in found[p].items() if k != "embeddings"} for p in (5, 0)]
    assert keys[embeddings.find(found[4]["path"], 1)] == (4, 1)
    assert keys[embeddings.find(os.path.relpath(found[4]["path"]), 1)] == (4, 1)
    for path, mask, message in [
        ("none.png", 0, "none.png is none of the 7 pictures"),
        (found[4]["path"], 3, "has 3 masks, and 3 is none"),
        (found[4]["path"], 2, "mask 2 of .* contains no token"),
    ]:
        with pytest.raises(ValueError, match=message):
            embeddings.find(path, mask)


def test_the_mapped_file_is_made_again_after_a_change(pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    out = tmp_path / "out"
    first, *others = sorted(pictures.iterdir())
    embed([first], out, embedder)
    before = read_embeddings(out).matrix
    embed([first, *others], out, embedder)
    with module._locked(out):  # another process is writing, so no file can be made
        held = read_embeddings(out).matrix
    assert not isinstance(held, np.memmap)
    after = read_embeddings(out).matrix
    assert isinstance(after, np.memmap) and len(after) > len(before) == 2
    assert np.array_equal(held, after) and np.array_equal(after[:2], before)
    assert len(list(out.glob("embeddings-*"))) == 1


def test_files_of_others_stay(pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    out = tmp_path / "out"
    embed([pictures], out, embedder)
    foreign = ["embeddings-mine.npy", "embeddings-0123456789abcdef.npy.bak", "my embeddings-0123456789abcdef.npy"]
    stale = ["embeddings-0123456789abcdef.npy", "embeddings-0123456789abcdef.npy.part"]
    for name in (*foreign, *stale):
        (out / name).write_text(name)
    read_embeddings(out)
    assert [(out / name).read_text() for name in foreign] == foreign
    assert not any((out / name).exists() for name in stale)


READ = """
import resource, sys
from maft_adapter.embed import read_embeddings
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
matrix = read_embeddings(sys.argv[1]).matrix
print(type(matrix).__name__, matrix.shape, float(abs(matrix.astype(float)).sum()))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can't be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", ["small_disk", "limit"])
def test_without_room_the_matrix_is_held(
    kind: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Read by a process of its own, which a full disk would kill where the file is written through a map."""

    class Many(Halves):
        def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
            return Proposals(np.ones((50, *picture.shape[:2]), bool))

    folder = request.getfixturevalue(kind) if kind == "small_disk" else tmp_path / "out"
    embed([pictures], folder, Embedder(Many()))
    if kind == "small_disk":
        with (folder / "filler").open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            file.truncate(file.tell() - 2 * 4096)  # room for the beginning alone
    child = subprocess.run([sys.executable, "-c", READ, folder, kind], capture_output=True, text=True)
    assert child.returncode == 0, child
    assert not list(folder.glob("embeddings-*"))
    with module._locked(folder):
        expected = read_embeddings(folder).matrix
    assert child.stdout.split(maxsplit=1) == ["ndarray", f"(350, 64) {abs(expected.astype(float)).sum()}\n"]


def test_only_invalid_masks(tmp_path: Path, embedder: Embedder) -> None:
    Image.new("RGB", (40, 30), (128, 128, 128)).save(tmp_path / "grey.png")
    embed([tmp_path / "grey.png"], tmp_path / "out", embedder)
    embeddings = read_embeddings(tmp_path / "out")
    assert embeddings.matrix.shape == (0, 64) and len(embeddings.paths) == 1


def test_a_second_run_skips_and_tries_bad_pictures_again(pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    out, bad, empty = tmp_path / "out", pictures / "3b.png", pictures / "empty.jpg"
    bad.write_text("not a picture")
    empty.touch()
    (pictures / "link.png").symlink_to("nowhere")
    (pictures / os.fsdecode(b"\xff.png")).write_bytes((pictures / "grey.png").read_bytes())
    summary = embed([pictures], out, embedder, per_shard=3)
    assert summary[:2] == (7, 0)
    assert {os.fsencode(Path(name).name) for name in summary.failed} == {
        b"3b.png",
        b"empty.jpg",
        b"link.png",
        b"\xff.png",
    }
    assert (
        "no picture" in summary.failed[str(bad)] and "UTF-8" in summary.failed[str(pictures / os.fsdecode(b"\xff.png"))]
    )
    whole = shards(out)
    Image.fromarray(render_scene(9).image).save(bad)
    summary = embed([pictures], out, embedder, per_shard=3)
    assert (summary.embedded, summary.skipped, len(summary.failed)) == (1, 7, 3)
    assert {name: shards(out)[name] for name in whole} == whole and len(rows(out)) == 8
    assert rows(out)[-1]["path"] == str(bad)


def test_pictures_that_changed_are_embedded_again(pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    out, changed, broken = tmp_path / "out", pictures / "2 画.png", pictures / "4 画.png"
    embed([pictures], out, embedder, per_shard=2)
    before = {row["path"]: row for row in rows(out)}
    Image.fromarray(render_scene(9).image[:50]).save(changed)
    broken.write_text("no picture now")
    summary = embed([pictures], out, embedder, per_shard=2)
    assert summary[:2] == (1, 5) and list(summary.failed) == [str(broken)]
    found = rows(out)
    assert [row["path"] for row in found] == [path for path in before if path != str(changed)] + [str(changed)]
    assert all(before[row["path"]] == row for row in found[:-1])  # that of the broken one, too: nothing has replaced it
    embed([changed], tmp_path / "alone", embedder)
    assert rows(tmp_path / "alone") == found[-1:]
    assert len(read_embeddings(out).paths) == 7

    for path in (pictures / "0 画.png", pictures / "1 画.png"):  # a whole shard
        os.utime(path, (1, 1))
    assert embed([pictures], out, embedder, per_shard=2)[:2] == (2, 4)
    assert "000000.parquet" not in shards(out) and len(rows(out)) == 7
    assert embed([pictures], out, embedder)[:2] == (0, 6)


def test_masks_from_files_beside_the_pictures(pictures: Path) -> None:
    """The folder that is written lies below that of the masks, and only pictures whose masks changed are embedded."""
    for path in list(pictures.iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        np.save(path.with_suffix(".npy"), Halves()(np.array(Image.open(path))).masks)
        path.unlink()
    out, files = pictures / "out", f"files:{pictures}"
    assert embed([pictures], out, Embedder(files)) == (7, 0, {})
    assert embed([pictures], out, Embedder(files)) == (0, 7, {})
    changed = np.ones((1, 61, 96), bool)
    np.save(pictures / "1 画.npy", changed)
    (pictures / "3 画.npy").unlink()
    summary = embed([pictures], out, Embedder(files))
    assert summary[:2] == (1, 5) and list(summary.failed) == [str(pictures / "3 画.jpg")]
    assert "holds no masks of" in summary.failed[str(pictures / "3 画.jpg")]
    assert rows(out)[-1]["path"] == str(pictures / "1 画.jpg") and rows(out)[-1]["areas"] == [changed.sum()]


def test_embeddings_that_are_not_finite_are_refused(pictures: Path, tmp_path: Path) -> None:
    embedder = Embedder(Halves())
    encode, calls = embedder.model.clip.visual.ln_post.forward, []

    def damaged(x: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return encode(x) * (float("nan") if len(calls) == 2 else 1)

    embedder.model.clip.visual.ln_post.forward = damaged
    summary = embed([pictures], tmp_path / "out", embedder)
    assert summary.embedded == 6 and list(summary.failed) == [str(pictures / "1 画.png")]
    assert "embeddings that are not finite" in summary.failed[str(pictures / "1 画.png")]
    assert all(np.isfinite(row["embeddings"]).all() for row in rows(tmp_path / "out"))


def test_a_proposer_that_fails_is_reported_by_the_picture(pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    class Fails(Halves):
        def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
            if Path(name).name.startswith("2"):
                raise RuntimeError("no memory")
            if Path(name).name.startswith("3"):
                return Proposals(np.ones((1, 5, 5), bool))
            return super().__call__(picture, name)

    summary = embed([pictures], tmp_path / "out", Embedder(Fails()))
    assert summary.embedded == 5
    assert summary.failed[str(pictures / "2 画.png")] == "RuntimeError: no memory"
    assert "masks are 5 x 5" in summary.failed[str(pictures / "3 画.png")]


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_embed import Halves
from maft_adapter.embed import Embedder, embed
embedder = Embedder(Halves())
print("ready", flush=True)
embed([{pictures!r}], {out!r}, embedder, per_shard=2)
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes(pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    for i in range(6, 20):
        Image.fromarray(render_scene(i).image).save(pictures / f"{i}.png")
    (pictures / "bad.png").write_text("no")
    start = time.perf_counter()
    embed([pictures], tmp_path / "undisturbed", embedder, per_shard=2)
    seconds, out = time.perf_counter() - start, tmp_path / "killed"
    code = CHILD.format(path=[os.getcwd(), str(Path(__file__).parent)], pictures=str(pictures), out=str(out))
    moments = random.Random(os.environ.get("KILLS_SEED", "0"))
    for _ in range(int(os.environ.get("KILLS", "2"))):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, seconds))
            child.send_signal(signal.SIGKILL)
        for path in out.glob("*.parquet"):
            pq.read_table(path)  # whole
        if len(shards(out)) == len(shards(tmp_path / "undisturbed")):  # it was done; begin again
            for path in out.iterdir():
                path.unlink()
    assert len(embed([pictures], out, embedder, per_shard=2).failed) == 1
    assert shards(out) == shards(tmp_path / "undisturbed")
    assert {path.name for path in out.iterdir()} == {*shards(out), ".lock"}


def test_a_full_disk_leaves_whole_shards(
    pictures: Path, tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def full(path: Path, data: bytes) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(module, "replace_file", full)
        with pytest.raises(OSError, match="No space left"):
            embed([pictures], tmp_path / "out", embedder, per_shard=3)
    assert embed([pictures], tmp_path / "out", embedder, per_shard=3) == (4, 3, {})
    assert len(rows(tmp_path / "out")) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 64}, r"000000.parquet was made with size 96, not 64; .* folders of their own"),
        ({"keep_aspect": True}, "made with keep_aspect False, not True"),
        ({"proposals": Halves("others")}, "made with proposals 'halves', not 'others'"),
        ({"precision": "bf16"}, "made with source 'embedded CLIP, .*fp32.*', not '.*bf16"),
        ({"start_layer": 8}, "start layer 0.*start layer 8"),
    ],
)
def test_other_settings_are_refused(
    options: dict[str, Any], message: str, pictures: Path, tmp_path: Path, embedder: Embedder
) -> None:
    out = tmp_path / "out"
    embed([pictures], out, embedder)
    before = shards(out)
    with pytest.raises(ValueError, match=message):
        embed([pictures], out, Embedder(**{"proposals": Halves(), **options}))
    assert shards(out) == before


def rewrite(path: Path, **settings: Any) -> None:
    table = pq.read_table(path)
    table = table.replace_schema_metadata(
        {"maft_adapter": json.dumps({**json.loads(table.schema.metadata[b"maft_adapter"]), **settings})}
    )
    pq.write_table(table, path)


def foreign(out: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), out / "000001.parquet")


def flipped(out: Path) -> None:
    data = bytearray((out / "000001.parquet").read_bytes())
    data[data.index(b"PAR1", 4) // 3] ^= 1
    (out / "000001.parquet").write_bytes(data)


def cut(out: Path) -> None:
    os.truncate(out / "000001.parquet", 1000)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (foreign, "000001.parquet was not written by maft-adapter embed"),
        (flipped, "000001.parquet is damaged .*; delete it, and embed its pictures again"),
        (cut, "000001.parquet is damaged"),
        (lambda out: rewrite(out / "000001.parquet", size=64), "000001.parquet was made with size 64, not 96"),
        (lambda out: rewrite(out / "000000.parquet", format=1), "000000.parquet has format 1"),
        (lambda out: os.link(out / "000000.parquet", out / "7.parquet"), "holds .*0 画.png twice"),
    ],
)
def test_broken_and_mixed_folders_are_refused_by_name(
    break_it: Callable[[Path], None], message: str, pictures: Path, tmp_path: Path, embedder: Embedder
) -> None:
    embed([pictures], tmp_path / "out", embedder, per_shard=4)
    break_it(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        read_embeddings(tmp_path / "out")


def test_another_version_of_the_library_is_a_warning(pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    out = tmp_path / "out"
    embed([pictures], out, embedder, per_shard=4)
    rewrite(out / "000001.parquet", version="0.0.1")
    with pytest.warns(UserWarning, match=r"out holds embeddings of maft-adapter 0.0.1 beside those of \d"):
        assert embed([pictures], out, embedder).skipped == 7
    with pytest.warns(UserWarning, match=r"out holds embeddings of maft-adapter 0.0.1 beside those of \d"):
        read_embeddings(out)


def test_folders_that_cannot_be_read_or_written(pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    with pytest.raises(FileNotFoundError):
        read_embeddings(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no embeddings"):
        read_embeddings(pictures)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        embed([pictures], tmp_path / "file" / "out", embedder)
    with module._locked(tmp_path / "out"), pytest.raises(OSError, match="another process is writing"):
        embed([pictures], tmp_path / "out", embedder)
    with pytest.raises(ValueError, match="per_shard is 0"):
        embed([pictures], tmp_path / "out", embedder, per_shard=0)
    with pytest.raises(ValueError, match="size is 0"):
        Embedder(size=0)
    with pytest.raises(ValueError, match="no pictures"):
        embed([tmp_path / "out"], tmp_path / "out", embedder)


def test_the_model_of_embeddings_is_loaded_and_checked(embedder: Embedder, tmp_path: Path) -> None:
    assert model_of(embedder.settings).source == embedder.model.source
    with pytest.raises(
        ValueError, match="the embeddings are of the model 'another', what is loaded now 'embedded CLIP"
    ):
        model_of({**embedder.settings, "source": "another"})


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_models_in_folders_are_found_from_anywhere(
    kind: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(str(request.getfixturevalue(f"small_{kind}")).removeprefix("local-dir:"))
    prefix = "local-dir:" if kind == "open_clip" else ""
    if prefix:
        save_mask_aware(load_model(f"{prefix}{folder}").clip.visual, folder / "tower.safetensors")
    (tmp_path / "elsewhere").mkdir()
    for place in (folder.parent, tmp_path / "elsewhere"):
        monkeypatch.chdir(place)
        name = os.path.relpath(folder)
        checkpoint = Path(name, "tower.safetensors") if prefix else None
        embed([pictures], tmp_path / "out", Embedder(Halves(), size=64, name=prefix + name, checkpoint=checkpoint))
    settings = read_embeddings(tmp_path / "out").settings
    assert settings["model"]["name"] == f"{prefix}{folder}"
    assert model_of(settings).source == settings["source"]


def test_names_that_are_no_paths_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-32").mkdir()
    for name in ("random", "openai", "weights.pt"):
        (tmp_path / name).touch()
    for weights in ("random", "openai"):
        given = {"name": "ViT-B-32", "pretrained": weights}
        assert module._lasting({**given, "checkpoint": None}) == given
    given = {"name": "ViT-B-32", "pretrained": "weights.pt"}
    assert module._lasting(given) == {**given, "pretrained": str(tmp_path / "weights.pt")}


@pytest.fixture
def shard(pictures: Path, tmp_path: Path) -> Path:
    """A webdataset shard of the pictures with a text beside each."""
    with tarfile.open(tmp_path / "shard.tar", "w") as file:
        for i, path in enumerate(sorted(pictures.iterdir())):
            (tmp_path / "text").write_text("a caption")
            file.add(tmp_path / "text", f"sub/{i}.txt")
            file.add(path, f"sub/{i}.PNG")
    return tmp_path / "shard.tar"


def test_members_of_tar_files_are_pictures(shard: Path, pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    embed([pictures], tmp_path / "files", embedder)
    assert embed([shard], tmp_path / "tar", embedder) == (7, 0, {})
    names = [f"{shard}/sub/{i}.PNG" for i in range(7)]
    assert [row.pop("path") for row in rows(tmp_path / "tar")] == names
    without = [[{**row, "path": None, "stamp": None} for row in rows(tmp_path / folder)] for folder in ("files", "tar")]
    assert without[0] == without[1]
    assert source_of(names[2]).read() == sorted(pictures.iterdir())[2].read_bytes()
    assert source_of(str(pictures / "grey.png")).read() == (pictures / "grey.png").read_bytes()
    with pytest.raises(FileNotFoundError, match="no such member"):
        source_of(f"{shard}/none.png")


def test_masks_beside_pictures_in_tar_files_are_none(pictures: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name in ("1.5/a.jpg", "1.5/a.seg.png", "1.5/a.txt", "b.PNG", "._b.PNG"):
            file.add(pictures / "grey.png", name)
    found = find_sources([tmp_path / "a.tar"], lambda *error: pytest.fail(str(error)))
    assert [source.path for source in found] == [str(tmp_path / "a.tar" / name) for name in ("1.5/a.jpg", "b.PNG")]


def test_broken_tar_files_are_reported_and_the_others_go_on(shard: Path, tmp_path: Path, embedder: Embedder) -> None:
    data = shard.read_bytes()
    last = find_sources([shard], lambda *_: None)[-1]
    (tmp_path / "cut.tar").write_bytes(data[: last.offset + last.size // 2])
    (tmp_path / "text.tar").write_text("not a tar file")
    (tmp_path / "empty.tar").touch()
    with tarfile.open(tmp_path / "captions.tar", "w") as file:
        file.add(tmp_path / "text", "a.txt")
    with tarfile.open(tmp_path / "twice.tar", "w") as file:
        for _ in range(2):
            file.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    summary = embed([tmp_path / "*.tar"], tmp_path / "out", embedder)
    assert summary.embedded == 7 + 6
    reasons = {str(Path(name).relative_to(tmp_path)): reason for name, reason in summary.failed.items()}
    assert set(reasons) >= {"cut.tar/sub/6.PNG", "text.tar", "empty.tar", "captions.tar", "twice.tar/a.png"}
    assert "ends within it" in reasons["cut.tar/sub/6.PNG"]
    assert "no member has a picture's suffix" in reasons["captions.tar"]


def test_rows_of_ray_that_were_written_whole_are_taken_over(pictures: Path, tmp_path: Path, embedder: Embedder) -> None:
    first, second, *_ = sorted(pictures.iterdir())
    (tmp_path / "out" / ".ray").mkdir(parents=True)
    for path in (first, second):
        batch = pa.table({"path": [str(path)], "bytes": [path.read_bytes()]})
        pq.write_table(embedder(batch), tmp_path / "out" / ".ray" / f"{path.stem}.parquet")
    os.truncate(tmp_path / "out" / ".ray" / f"{second.stem}.parquet", 5000)
    assert embed([pictures], tmp_path / "out", embedder) == (6, 1, {})
    assert sorted(row["path"] for row in rows(tmp_path / "out")) == sorted(map(str, pictures.iterdir()))
    assert not (tmp_path / "out" / ".ray").exists()


def test_batches_name_pictures_or_hold_them(
    pictures: Path, embedder: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in sorted(pictures.iterdir())]
    named = embedder(pa.Table.from_pylist([Source(path, path)._asdict() for path in [*paths, "gone.png"]]))
    held = embedder(pa.table({"path": paths, "bytes": [Path(path).read_bytes() for path in paths]}))
    assert named.equals(held, check_metadata=True) and named["path"].to_pylist() == paths
    assert set(named["stamp"].to_pylist()) == {""}
    assert "failed: gone.png: " in capsys.readouterr().err
    assert embedder(held.select(["path"]).append_column("bytes", pa.array([b"x"] * 7))).schema == embedder.schema


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray on this machine with two workers."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), str(Path(__file__).parent)]))
    ray.init("local", num_cpus=2, include_dashboard=False, configure_logging=False)
    yield
    ray.shutdown()


def test_ray_gives_the_rows_of_a_plain_run(workers: None, pictures: Path, shard: Path, tmp_path: Path) -> None:
    (pictures / "bad.png").write_text("no")
    options: dict[str, Any] = {"proposals": Halves()}
    embed([pictures, shard], tmp_path / "plain", Embedder(**options))
    embed([pictures / "grey.png"], tmp_path / "ray", Embedder(**options))  # Ray goes on with what is there
    summary = module.embed_on_ray([pictures, shard], tmp_path / "ray", per_shard=4, **options)
    assert summary[:2] == (13, 1) and list(summary.failed) == [str(pictures / "bad.png")]
    by_path = [sorted(rows(tmp_path / folder), key=lambda row: row["path"]) for folder in ("plain", "ray")]
    assert by_path[0] == by_path[1]
    assert read_embeddings(tmp_path / "ray").settings == read_embeddings(tmp_path / "plain").settings
    assert embed([pictures, shard], tmp_path / "ray", Embedder(**options)).skipped == 14


def test_commands(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, bad = tmp_path / "out", pictures / "bad.png"
    bad.write_text("no")
    assert cli.main(["embed", str(pictures), "--out", str(out), "--per-shard", "4"]) == 1
    captured = capsys.readouterr()
    assert f"7 pictures embedded, 0 had been already, 1 failed: {out}" in captured.out
    assert f"failed: {bad}: " in captured.err
    bad.unlink()
    assert cli.main(["embed", str(pictures), "--out", str(out)]) == 0
    assert "0 pictures embedded, 7 had been already, 0 failed" in capsys.readouterr().out
    assert cli.main(["embed", str(pictures), "--out", str(out), "--size", "64"]) == 1
    assert "made with size 96, not 64" in capsys.readouterr().err

    assert cli.main(["search", str(out), "red ball", "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines[1:4]]
    assert scores == sorted(scores, reverse=True) and len(lines) == 5
    page = (out / "search.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 3

    page_file = tmp_path / "like.html"
    like = f"{pictures / '2 画.png'}:0"
    assert cli.main(["search", str(out), "--like", like, "-k", "2", "--html", str(page_file)]) == 0
    first = capsys.readouterr().out.splitlines()[1]
    assert first.startswith(" 1.000      0      0     0") and first.endswith("2 画.png")
    (pictures / "2 画.png").unlink()  # is reported where it would be shown
    assert cli.main(["search", str(out), "--like", like, "-k", "1", "--html", str(page_file)]) == 0
    assert "can&#x27;t be shown" in page_file.read_text()

    for arguments, message in [
        (["search", str(out), "flying fish"], "'flying', 'fish'"),
        (["search", str(out), "--like", "none.png:1"], "none.png is none of the 7 pictures"),
        (["search", str(pictures), "red ball"], "holds no embeddings"),
        (["embed", str(tmp_path / "none"), "--out", str(out)], "no such file or folder"),
    ]:
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "x"], "give words or --like PATH:INDEX, one of them"),
        (["search", "x", "red ball", "--like", "a.png:1"], "one of them"),
        (["search", "x", "red ball", "-k", "0"], "-k 0: expected at least 1"),
        (["search", "x", "--like", "a.png"], "expected a path, a colon and a number"),
        (["embed", "x"], "--out"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
