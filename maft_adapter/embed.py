"""Embeddings of every mask of a collection, on disk: made on one machine or on many, resumable, and read back.

A folder holds shards, Parquet files of one row a picture:

| column | type | |
|---|---|---|
| path | string | of the picture; TAR/MEMBER in a webdataset shard |
| stamp | string | what tells that its file or that of its masks changed; empty if its bytes were handed over |
| width, height | int32 | in pixels, after EXIF rotation |
| masks | list of string | COCO's compressed run-length codes, of the size (height, width) |
| areas | list of int32 | pixels of each mask |
| boxes | list of 4 int32 | XYXY in pixels, the right and lower edges exclusive, as `boxes_to_masks` takes them |
| scores | list of float32, or null | the generator's own, in [0, 1] |
| valid | list of bool | False where a mask contains no token, so that its embedding says nothing |
| embeddings | list of D float16 | of unit length |

The files' metadata say under "maft_adapter", as JSON, with which model and settings they were made.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import tarfile
import warnings
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from ._version import __version__
from .adapt import encode_masks, valid_masks
from .checkpoint import replace_file
from .extras import extra
from .models import Model, image_tower, is_of_open_clip, load_model
from .pictures import SUFFIXES, find_pictures, prepare, read_picture
from .proposals import Proposer, proposer
from .proposals.base import check_proposals, fingerprint, version_of
from .proposals.convert import to_rle

with extra("embed"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from pycocotools.mask import area, toBbox

__all__ = [
    "Embedder",
    "Embeddings",
    "Source",
    "Summary",
    "embed",
    "embed_on_ray",
    "find_sources",
    "model_of",
    "read_embeddings",
    "source_of",
]

FORMAT = 2  # of the files; another one is refused
_KEY = b"maft_adapter"  # of the settings among a file's metadata
_RAY = ".ray"  # where Ray writes, under `out`: what it was writing when it was killed is never taken for a shard
_PARQUET: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
_MATRIX = re.compile(r"embeddings-[0-9a-f]{16}\.npy(\.part)?")  # what `read_embeddings` writes, and removes again
_LOCAL = "local-dir:"  # before the folder of a model of open_clip
_AT_ONCE = 16  # pictures that Ray hands to a worker

Failed = Callable[[str, Exception], object]


class Source(NamedTuple):
    """Where a picture lies.

    Attributes:
        path: what it is known by: the file's absolute path, or that of a tar file with the member's name behind it.
        file: the file that holds it.
        offset, size: its bytes within the file; size -1 is all of it.
        stamp: as in the table.
    """

    path: str
    file: str
    offset: int = 0
    size: int = -1
    stamp: str = ""

    def read(self) -> bytes:
        """The picture's encoded bytes; raises OSError if the file is missing or shorter than it was."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if 0 <= self.size != len(data):
            raise OSError(f"{self.file} ends within it; copy or download it again")
        return data


def find_sources(arguments: Sequence[str | os.PathLike[str]], failed: Failed) -> list[Source]:
    """The pictures that files, folders, patterns and webdataset shards name, each once.

    Args:
        arguments: as `find_pictures` takes them. Files that end in .tar are shards: a member is a picture if all that
            follows the first dot of its name is a picture's suffix, as webdataset divides names: `a.jpg`, but not its
            mask `a.seg.png`. In folders, shards are not looked for: name them, or use a pattern.
        failed: called with the path and the error of a shard that is damaged, or holds no picture, or two of one name.

    Raises:
        OSError, ValueError: as `find_pictures`.
    """
    sources: dict[str, Source] = {}

    def add(source: Source) -> None:
        if source.path.encode(errors="replace").decode() != source.path:
            failed(source.path, ValueError("its name is not UTF-8; rename it"))
        elif source.path in sources:
            failed(source.path, ValueError("a second member of this name; rename it"))
        else:
            sources[source.path] = source

    for path in find_pictures(arguments):
        name = os.path.abspath(path)
        if path.suffix != ".tar":
            add(Source(name, name))
            continue
        empty = True
        try:
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    extension = os.path.basename(member.name).partition(".")[2].lower()
                    if member.isfile() and f".{extension}" in SUFFIXES:
                        empty = False
                        add(Source(f"{name}/{member.name}", name, member.offset_data, member.size))
            if empty:
                raise ValueError(f"no member has a picture's suffix behind its first dot: {', '.join(SUFFIXES)}")
        except (tarfile.TarError, OSError, ValueError) as error:
            failed(name, error)
    return list(sources.values())


def source_of(path: str) -> Source:
    """Where the picture lies that `Source.path` names.

    Raises:
        OSError: it is not there.
    """
    shard, is_member, member = path.rpartition(".tar/")
    if os.path.exists(path) or not is_member:
        return Source(path, path)
    try:
        with tarfile.open(f"{shard}.tar", "r:") as file:
            found = file.getmember(member)
    except (tarfile.TarError, KeyError) as error:
        raise FileNotFoundError(f"{path}: no such member") from error
    return Source(path, f"{shard}.tar", found.offset_data, found.size)


class Embedder:
    """From pictures to rows of the table: the step that runs in a loop, or in the workers of Ray Data.

    `embedder(batch)` is what `ray.data.Dataset.map_batches` calls with `batch_format="pyarrow"`. Batches have the
    columns `path` and `bytes`, as `ray.data.read_binary_files(..., include_paths=True)` makes them, or those of
    `Source`. Pictures that can't be embedded are left out and named on stderr. So a pipeline of your own is

        ray.data.read_binary_files("s3://BUCKET/FOLDER", include_paths=True).map_batches(
            Embedder, fn_constructor_kwargs={"name": "ViT-B-16", "pretrained": "openai", "device": "cuda"},
            batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(min_size=1, max_size=8), num_gpus=1,
        ).write_parquet("s3://BUCKET/EMBEDDINGS")

    Args:
        proposals: where masks come from: what `maft_adapter.proposals.proposer` takes, or a `Proposer`. Soft masks
            are kept as those pixels that are at least 0.5.
        size: side in pixels of the square that pictures become; by default the model's.
        keep_aspect: keep the ratio of a picture's sides, see `prepare`.
        device: of the model and of the proposals' generator.
        model: `name`, `pretrained`, `checkpoint`, `start_layer` and `precision`, as `load_model` takes them.

    Attributes:
        settings: all that the rows depend on, and what loads the model again; JSON.
        schema: of the rows, with the settings as metadata.

    Raises:
        ValueError, OSError: as `load_model` and `proposer`; `size` is not positive.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> Image.new("RGB", (64, 48), "red").save(file := io.BytesIO(), "png")
        >>> embedder = Embedder("superpixels", size=64)
        >>> rows = embedder(pa.table({"path": ["red.png"], "bytes": [file.getvalue()]}))
        >>> rows["boxes"].to_pylist(), len(rows["embeddings"][0][0])
        ([[[0, 0, 64, 48]]], 64)
    """

    def __init__(
        self,
        proposals: str | Proposer = "superpixels",
        *,
        size: int | None = None,
        keep_aspect: bool = False,
        device: torch.device | str = "cpu",
        **model: Any,
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size is {size}, expected at least 1 pixel")
        model = _lasting(model)
        self.model = load_model(device=device, **model)
        self.proposer = proposer(proposals, device) if isinstance(proposals, str) else proposals
        self.size, self.keep_aspect = size or self.model.size, keep_aspect
        self._tower = image_tower(self.model.clip)
        parameter = next(self._tower.parameters())
        self._place = {"device": parameter.device, "dtype": parameter.dtype}
        side = self.model.multiple
        dim = self._encode(torch.zeros(3, side, side), np.ones((1, 1, 1), bool))[0].shape[1]
        self.settings = {
            "format": FORMAT,
            "version": __version__,
            "model": model,
            "source": self.model.source,
            "proposals": self.proposer.settings,
            "size": self.size,
            "keep_aspect": keep_aspect,
            "dim": dim,
        }
        columns = {
            "path": pa.string(),
            "stamp": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "masks": pa.list_(pa.string()),
            "areas": pa.list_(pa.int32()),
            "boxes": pa.list_(pa.list_(pa.int32(), 4)),
            "scores": pa.list_(pa.float32()),
            "valid": pa.list_(pa.bool_()),
            "embeddings": pa.list_(pa.list_(pa.float16(), dim)),
        }
        self.schema = pa.schema(columns.items(), metadata={_KEY: json.dumps(self.settings)})

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The rows of a batch of pictures."""
        pictures: Iterable[tuple[Source, Callable[[], bytes]]]
        if "bytes" in batch.column_names:
            pairs = zip(batch["path"].to_pylist(), batch["bytes"], strict=True)
            pictures = ((Source(path, ""), data.as_py) for path, data in pairs)
        else:
            sources = (Source(**row) for row in batch.to_pylist())
            pictures = ((source, source.read) for source in sources)
        return self.table(list(self.rows(pictures, _Failures(show=True))))

    def stamp(self, source: Source) -> str:
        """What tells that a picture or its masks changed: sizes and times of their files.

        Raises:
            ValueError: there are no masks for this picture.
        """
        return f"{fingerprint(Path(source.file))} {version_of(self.proposer, source.path)}".strip()

    def rows(self, pictures: Iterable[tuple[Source, Callable[[], bytes]]], failed: Failed) -> Iterator[dict[str, Any]]:
        """One row a picture, in order; the next picture is prepared while one is encoded.

        Args:
            pictures: where each lies, and what gives its encoded bytes.
            failed: called with the path and the error of a picture that can't be embedded; the others go on.
        """
        coming = iter(pictures)
        with ThreadPoolExecutor(1) as worker:
            ahead: deque[tuple[str, Future[tuple[dict[str, Any], Tensor, NDArray[Any]]]]] = deque()
            while True:
                for source, read in itertools.islice(coming, 2 - len(ahead)):
                    ahead.append((source.path, worker.submit(self._prepare, source, read)))
                if not ahead:
                    return
                path, prepared = ahead.popleft()
                try:
                    row, image, masks = prepared.result()
                    row["embeddings"], row["valid"] = self._encode(image, masks)
                except Exception as error:  # of any kind, so that one bad picture does not stop the others
                    failed(path, error)
                else:
                    yield row

    def table(self, rows: Sequence[dict[str, Any]]) -> pa.Table:
        """Rows as a table of `schema`."""

        def column(field: pa.Field) -> pa.Array:
            values = [row[field.name] for row in rows]
            if not pa.types.is_list(field.type) or not pa.types.is_fixed_size_list(vector := field.type.value_type):
                return pa.array(values, field.type)
            flat = pa.array([value.reshape(-1) for value in values], pa.list_(vector.value_type))
            vectors = pa.FixedSizeListArray.from_arrays(flat.values, vector.list_size)
            return pa.ListArray.from_arrays(flat.offsets.to_numpy() // vector.list_size, vectors, field.type)

        return pa.table([column(field) for field in self.schema], schema=self.schema)

    def _prepare(self, source: Source, read: Callable[[], bytes]) -> tuple[dict[str, Any], Tensor, NDArray[Any]]:
        """All of a picture's row but what the tower says, and what the tower is asked: (3, h, w) and (N, H, W)."""
        picture = read_picture(read())  # (H, W, 3)
        proposals = self.proposer(picture, source.path)
        check_proposals(proposals, picture.shape[:2])
        masks = proposals.masks  # (N, H, W)
        rles = to_rle(np.asarray(masks if masks.dtype == bool else masks >= 0.5, bool))
        boxes = np.array(toBbox(rles), np.int32).reshape(-1, 4)  # (N, 4) XYWH
        boxes[:, 2:] += boxes[:, :2]
        row = {
            "path": source.path,
            "stamp": source.stamp,
            "width": picture.shape[1],
            "height": picture.shape[0],
            "masks": [rle["counts"] for rle in rles],
            "areas": np.array(area(rles), np.int32),
            "boxes": boxes,
            "scores": proposals.scores,
        }
        model = self.model
        return row, prepare(picture, model.mean, model.std, self.size, self.keep_aspect, model.multiple), masks

    @torch.inference_mode()
    def _encode(self, image: Tensor, masks: NDArray[Any]) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
        """(3, h, w), (N, H, W) -> (N, D) of unit length, (N,) valid."""
        images = image[None].to(**self._place)  # (1, 3, h, w)
        asked = torch.from_numpy(masks)[None].to(images.device)  # (1, N, H, W)
        embeddings = encode_masks(self.model.clip, images, asked)[0].float()  # (N, D)
        if not embeddings.isfinite().all():
            raise ValueError("the model gives embeddings that are not finite; try precision fp32, or check its weights")
        valid = valid_masks(self._tower, images, asked)[0]  # (N,)
        return normalize(embeddings, dim=-1).half().cpu().numpy(), valid.cpu().numpy()


class Summary(NamedTuple):
    """What became of the pictures.

    Attributes:
        embedded: how many were embedded by this run.
        skipped: how many were there already.
        failed: of those that could not be embedded the name and why; the next run tries them again.
    """

    embedded: int
    skipped: int
    failed: dict[str, str]


def embed(
    pictures: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    embedder: Embedder,
    *,
    per_shard: int = 256,
    progress: bool = False,
) -> Summary:
    """Embed every mask of a collection and write the shards of a folder.

    Pictures whose rows are there already, known by their paths, are skipped. Of those that changed since, or whose
    masks did, as size and time of the files tell, new rows take the place of the old ones, behind all others. A shard
    appears whole or not at all, so that a run that was killed loses at most the shard under way, and the next one ends
    with the rows of an undisturbed run, in the same order.

    Args:
        pictures: as `find_sources` takes them.
        out: the folder, made if it is missing.
        embedder: which model, masks and settings.
        per_shard: rows of a shard, at least 1; the last one holds what is left.
        progress: show a bar on stderr, and name pictures there as they fail.

    Raises:
        OSError: the folder can't be written, another run is writing it, the disk is full, or as `find_sources`.
        ValueError: the folder holds embeddings of other settings, foreign or damaged files; or as `find_sources`.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (64, 48), "red").save(f"{folder}/red.png")
        ...     embedder = Embedder("superpixels", size=64)
        ...     embed([folder], f"{folder}/out", embedder)
        ...     embed([folder], f"{folder}/out", embedder)
        ...     read_embeddings(f"{folder}/out").matrix.shape
        Summary(embedded=1, skipped=0, failed={})
        Summary(embedded=0, skipped=1, failed={})
        (1, 64)
    """
    if per_shard < 1:
        raise ValueError(f"per_shard is {per_shard}, expected at least 1 picture")
    failed = _Failures(progress)
    with _locked(out) as folder:
        written = _written(folder, embedder.settings)
        todo, skipped = _todo(find_sources(pictures, failed), embedder, written, failed)
        bar = tqdm(todo, disable=None if progress else True, unit="picture")
        rows = embedder.rows(((source, source.read) for source in bar), failed)
        embedded = 0
        while shard := list(itertools.islice(rows, per_shard)):
            _remove(written, (row["path"] for row in shard))
            _write(_next_shard(folder), embedder.table(shard))
            embedded += len(shard)
    return Summary(embedded, skipped, dict(failed))


def embed_on_ray(
    pictures: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    address: str = "local",
    *,
    per_shard: int = 256,
    **options: Any,
) -> Summary:
    """`embed` in the workers of Ray Data, one for each GPU or, on CPUs, for each of them.

    All machines need the pictures and the folder at the same paths. The rows are those of `embed`, in an order that
    depends on who was first. `embed` and this function go on with what the other one has written; the ids of pictures
    that are there are left out before Ray starts. What Ray had not written whole when it was killed is embedded again.

    Args:
        pictures, out: as `embed` takes them.
        address: of a running cluster, such as "auto"; by default Ray starts on this machine. Where this process is
            connected to one already, that is it.
        per_shard: the fewest rows of a shard but the last ones of each worker.
        options: the arguments of `Embedder`.

    Returns:
        As `embed`; why a picture failed is in the log of its worker.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        OSError, ValueError: as `embed` and `Embedder`.
    """
    with extra("ray"):
        import ray
    if per_shard < 1:
        raise ValueError(f"per_shard is {per_shard}, expected at least 1 picture")
    embedder = Embedder(**{**options, "device": "cpu"})  # for its settings
    failed = _Failures(show=True)
    with _locked(out) as folder:
        written = _written(folder, embedder.settings)
        todo, skipped = _todo(find_sources(pictures, failed), embedder, written, failed)
        if todo:
            ray.init(address, ignore_reinit_error=True)
            on_gpu = torch.device(options.get("device", "cpu")).type == "cuda"
            workers = int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1))
            rows = ray.data.from_items([source._asdict() for source in todo]).map_batches(
                Embedder,
                fn_constructor_kwargs={**options, **embedder.settings["model"]},
                batch_format="pyarrow",
                batch_size=_AT_ONCE,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, workers)),
                num_gpus=int(on_gpu),
            )
            rows.write_parquet(str(folder / _RAY), min_rows_per_file=per_shard, **_PARQUET)
            written = _written(folder, embedder.settings)
        stamps = {path: place.stamp for path, place in written.items()}
        lost = [source.path for source in todo if stamps.get(source.path) != source.stamp]
        for path in lost:
            failed(path, ValueError("no worker could embed it; see its message"))
    return Summary(len(todo) - len(lost), skipped, dict(failed))


def model_of(settings: dict[str, Any], device: torch.device | str = "cpu") -> Model:
    """Load the model that made embeddings, to ask them for words.

    Args:
        settings: of `Embedder` or `Embeddings`.
        device: where it shall lie.

    Raises:
        ValueError: what has that name now is another model; or as `load_model`.
        OSError: as `load_model`.

    Example:
        >>> model_of(Embedder().settings).source
        'embedded CLIP, start layer 0, fp32, weights ...'
    """
    model = load_model(device=device, **settings["model"])
    if model.source != settings["source"]:
        raise ValueError(f"the embeddings are of the model {settings['source']!r}, what is loaded now {model.source!r}")
    return model


class Embeddings(NamedTuple):
    """The valid masks of a collection, M of P pictures.

    Attributes:
        matrix: (M, D) float16 of unit length, memory-mapped where the folder could be written.
        pictures: (M,) int32, whose mask it is, in 0..P-1.
        masks: (M,) int32, which of its picture's masks, counted with those that are not valid.
        paths: of the P pictures.
        settings: with which model and settings they were made, see `Embedder.settings`.
        shards: the files, and how many pictures come before each.
    """

    matrix: NDArray[np.float16]
    pictures: NDArray[np.int32]
    masks: NDArray[np.int32]
    paths: list[str]
    settings: dict[str, Any]
    shards: list[tuple[Path, int]]

    def find(self, path: str, mask: int) -> int:
        """The row of the matrix of one picture's mask.

        Args:
            path: the picture's, as in `paths`, or relative to the current folder.
            mask: its index among the picture's masks.

        Raises:
            ValueError: there is no such picture or mask, or the mask is not valid.
        """
        name = next((name for name in (path, os.path.abspath(path)) if name in self.paths), None)
        if name is None:
            raise ValueError(f"{path} is none of the {len(self.paths)} pictures there; embed it first")
        picture = self.paths.index(name)
        masks = self.masks[self.pictures == picture]
        if mask not in masks:
            total = len(self.rows([picture])[0]["masks"])
            raise ValueError(
                f"{path} has {total} masks, and {mask} is none of them; they count from 0"
                if not 0 <= mask < total
                else f"mask {mask} of {path} contains no token, so that its embedding says nothing; choose another"
            )
        return int(np.flatnonzero((self.pictures == picture) & (self.masks == mask))[0])

    def rows(self, pictures: Sequence[int]) -> list[dict[str, Any]]:
        """All that the files say of some pictures, embeddings left out: one dictionary each."""
        columns = [name for name in pq.read_schema(self.shards[0][0]).names if name != "embeddings"]
        firsts = [first for _, first in self.shards]
        tables: dict[int, pa.Table] = {}
        rows = []
        for picture in pictures:
            shard = bisect_right(firsts, picture) - 1
            if shard not in tables:
                tables[shard] = _read(self.shards[shard][0], columns)
            rows.append(tables[shard].slice(picture - firsts[shard], 1).to_pylist()[0])
        return rows


def read_embeddings(folder: str | os.PathLike[str]) -> Embeddings:
    """Read what `embed` has written, as one matrix.

    The first call after a change copies the matrix into a file of its own beside the shards, embeddings-*.npy, which is
    mapped from then on: a million masks open at once and cost no memory until they are read. Where that file can't be
    written, the matrix is held in memory.

    Raises:
        OSError: no such folder, or it can't be read.
        ValueError: the folder holds no shards, shards of different settings, foreign or damaged ones, or one picture
            twice. The file is named.

    Example: see `embed`.
    """
    folder = Path(folder)
    files = _shards(folder)
    if not files:
        raise FileNotFoundError(f"{folder} holds no embeddings; write them with maft-adapter embed")
    settings = _settings(files[0])
    for file in files:
        _check(file, settings)
    paths: list[str] = []
    shards, counts, flags = [], [], []
    for file in files:
        table = _read(file, ["path", "valid"]).combine_chunks()
        shards.append((file, len(paths)))
        paths += table["path"].to_pylist()
        counts.append(pc.list_value_length(table["valid"]).to_numpy())  # (P of the shard,)
        flags.append(pc.list_flatten(table["valid"]).to_numpy())  # (masks of the shard,)
    if len(set(paths)) < len(paths):
        twice = next(path for path, times in Counter(paths).items() if times > 1)
        raise ValueError(f"{folder} holds {twice} twice; embed the pictures again, into another folder")
    lengths, valid = np.concatenate(counts), np.concatenate(flags).astype(bool)
    firsts = np.cumsum(lengths) - lengths  # (P,)
    pictures = np.arange(len(paths), dtype=np.int32).repeat(lengths)  # (masks,)
    masks = (np.arange(len(valid)) - firsts.repeat(lengths)).astype(np.int32)  # (masks,)
    matrix = _matrix(folder, files, (int(valid.sum()), settings["dim"]))
    return Embeddings(matrix, pictures[valid], masks[valid], paths, settings, shards)


def _matrix(folder: Path, files: list[Path], shape: tuple[int, int]) -> NDArray[np.float16]:
    """The embeddings of the valid masks of all shards, (M, D), from a file that is made if it is missing or stale."""

    def parts() -> Iterator[NDArray[np.float16]]:
        for file in files:
            table = _read(file, ["valid", "embeddings"]).combine_chunks()
            vectors = pc.list_flatten(table["embeddings"]).combine_chunks().flatten()  # of all masks, one after another
            valid = pc.list_flatten(table["valid"]).to_numpy().astype(bool)  # (masks of the shard,)
            yield vectors.to_numpy().reshape(-1, shape[1])[valid]

    marks = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = hashlib.blake2b(repr(marks).encode(), digest_size=8).hexdigest()
    path = folder / f"embeddings-{name}.npy"
    if not path.exists():
        if not shape[0]:
            return np.empty(shape, np.float16)  # which can't be mapped
        part = path.with_suffix(".npy.part")
        try:
            with _locked(folder):
                for stale in folder.iterdir():
                    if _MATRIX.fullmatch(stale.name):
                        stale.unlink()
                try:
                    # Not through a map, which a full disk ends with SIGBUS instead of an error.
                    with part.open("wb") as file:
                        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                        for values in parts():
                            file.write(values.tobytes())
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
        except OSError:
            matrix, start = np.empty(shape, np.float16), 0
            for values in parts():
                matrix[start : start + len(values)] = values
                start += len(values)
            return matrix
    return np.load(path, mmap_mode="r")


def _lasting(model: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `load_model` that were given, with paths that hold in any working directory."""
    import open_clip

    model = {key: value for key, value in model.items() if value is not None}
    name, weights = model.get("name", ""), model.get("pretrained")
    if name.startswith(_LOCAL):
        model["name"] = _LOCAL + os.path.abspath(name.removeprefix(_LOCAL))
    elif os.path.isdir(name) and not is_of_open_clip(name):
        model["name"] = os.path.abspath(name)
    # As for `load_model`, a file is what is neither that word nor a tag.
    if weights not in (None, "random") and os.path.isfile(weights) and not open_clip.get_pretrained_cfg(name, weights):
        model["pretrained"] = os.path.abspath(weights)
    if "checkpoint" in model:
        model["checkpoint"] = os.path.abspath(model["checkpoint"])
    return model


class _Failures(dict[str, str]):
    """Collects names and reasons, and shows them at once if that is wanted."""

    def __init__(self, show: bool) -> None:
        self.show = show

    def __call__(self, name: str, error: Exception) -> None:
        self[name] = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        if self.show:
            tqdm.write(f"failed: {name}: {self[name]}", file=sys.stderr)


@contextmanager
def _locked(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder, made if it is missing, while no other process writes there; the system frees it of one that dies."""
    import fcntl

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another process is writing {folder}; wait until it is done") from error
        yield folder


class _Place(NamedTuple):
    """Where the row of a picture is, and its stamp."""

    shard: Path
    stamp: str


def _written(folder: Path, settings: dict[str, Any]) -> dict[str, _Place]:
    """The pictures that shards of these settings hold, those among them that Ray has written whole."""
    written: dict[str, _Place] = {}
    for shard in _shards(folder):
        _check(shard, settings)
        written |= {path: _Place(shard, stamp) for path, stamp in _stamps(shard)}
    if (folder / _RAY).exists():
        for file in sorted((folder / _RAY).iterdir()):
            try:
                pq.read_metadata(file)  # lies at its end
            except pa.ArrowInvalid:
                file.unlink()
                continue
            _check(file, settings)
            stamps, shard = _stamps(file), _next_shard(folder)
            _remove(written, (path for path, _ in stamps))
            os.replace(file, shard)
            written |= {path: _Place(shard, stamp) for path, stamp in stamps}
        (folder / _RAY).rmdir()
    return written


def _todo(
    sources: Sequence[Source], embedder: Embedder, written: dict[str, _Place], failed: Failed
) -> tuple[list[Source], int]:
    """What has no row yet or changed since, with its stamp, and how many others there are."""
    todo, skipped = [], 0
    for source in sources:
        try:
            stamp = embedder.stamp(source)
        except (OSError, ValueError) as error:
            failed(source.path, error)
            continue
        if source.path in written and written[source.path].stamp in (stamp, ""):
            skipped += 1
        else:
            todo.append(source._replace(stamp=stamp))
    return todo, skipped


def _remove(written: dict[str, _Place], paths: Iterable[str]) -> None:
    """Take pictures' rows, where they have some, out of the shards; a shard without rows goes."""
    gone: dict[Path, list[str]] = defaultdict(list)
    for path in paths:
        if path in written:
            gone[written.pop(path).shard].append(path)
    for shard, names in gone.items():
        table = _read(shard)
        rest = table.filter(pc.invert(pc.is_in(table["path"], pa.array(names))))
        if len(rest):
            _write(shard, rest)
        else:
            shard.unlink()


def _write(shard: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **_PARQUET)
    replace_file(shard, sink.getvalue())


def _stamps(shard: Path) -> list[tuple[str, str]]:
    """Path and stamp of each row."""
    table = _read(shard, ["path", "stamp"])
    return list(zip(table["path"].to_pylist(), table["stamp"].to_pylist(), strict=True))


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".parquet")


def _next_shard(folder: Path) -> Path:
    numbers = [int(path.stem) for path in _shards(folder) if path.stem.isdecimal()]
    return folder / f"{max(numbers, default=-1) + 1:06}.parquet"


def _settings(file: Path) -> dict[str, Any]:
    with _reading(file):
        metadata = pq.read_metadata(file).metadata or {}
    if _KEY not in metadata:
        raise ValueError(f"{file} was not written by maft-adapter embed; keep embeddings in a folder of their own")
    settings = json.loads(metadata[_KEY])
    if settings["format"] != FORMAT:
        raise ValueError(
            f"{file} has format {settings['format']} of maft-adapter {settings['version']}, this version has format "
            f"{FORMAT}; embed the pictures again, into another folder"
        )
    return settings


def _check(file: Path, expected: dict[str, Any]) -> None:
    """Raise ValueError unless a shard's rows were made as those of `expected`; another version is a warning."""
    settings = _settings(file)
    if settings["version"] != expected["version"]:
        warnings.warn(
            f"{file.parent} holds embeddings of maft-adapter {settings['version']} beside those of "
            f"{expected['version']}, which may differ a little; to have one kind, embed into a new folder",
            stacklevel=4,
        )
    for key in sorted(expected.keys() - {"model", "version"}):  # `source` says what the model is
        if settings.get(key) != expected[key]:
            raise ValueError(
                f"{file} was made with {key} {settings.get(key)!r}, not {expected[key]!r}; embeddings of different "
                "settings need folders of their own"
            )


def _read(file: Path, columns: list[str] | None = None) -> pa.Table:
    with _reading(file):
        return pq.read_table(file, columns=columns, partitioning=None, page_checksum_verification=True)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{file} is damaged ({error}); delete it, and embed its pictures again") from error
