"""Checkpoints of mask-aware towers, weights and settings together, and towers out of other checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import platform
import re
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ._version import __version__
from .adapt import is_mask_aware, make_mask_aware

Tower = TypeVar("Tower", bound=nn.Module)

# Of the file's metadata
_KEY = "maft_adapter"
_ARITHMETIC = "maft_adapter.arithmetic"
_SETTINGS: dict[str, Any] = {"start_layer": int, "interpolation": str, "threshold": (int, float)}
# Where hosts keep the image tower, the fine-tuned one before frozen copies: the authors' released MAFT, ZSSeg and
# FreeSeg (two CLIPs, then one, as OVSeg), ZegFormer, MAFT+ (and FC-CLIP, whose one is frozen), MaskCLIP++.
_MAFT_PLUS, _MASKCLIPPP = "backbone.clip_model.visual.", "visual_encoder.proxy."
_HOSTS = (
    "IPCLIP.",
    "_region_clip_adapter.clip_model.visual.",
    "clip_adapter.clip_model.visual.",
    "sem_seg_head.predictor.clip_model.visual.",
    _MAFT_PLUS,
    _MASKCLIPPP,
)
# Of a bare tower: OpenAI's and open_clip's ViT and ResNet, timm's and transformers' towers.
_BARE = re.compile(
    r"((?:.+\.)?)(?:(?<!embeddings\.)class_embedding|attnpool\.positional_embedding|trunk\..+"
    r"|embeddings\.patch_embedding\.weight)"
)
# transformers keeps these parts of a CLIP beside the image tower's, not around them; last OVSeg's mask prompts.
_BESIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias", "mask_embedding")
# EVA-CLIP's own names, which MaskCLIP++ keeps, and those that timm gives the same weights.
_EVA = {
    "attn.q_bias": "attn.q_proj.bias", "attn.v_bias": "attn.v_proj.bias", "attn.inner_attn_ln": "attn.norm",
    "mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2", "mlp.ffn_ln": "mlp.norm",
}  # fmt: skip
_EVA_BUFFERS = re.compile(r"(?:^|\.)rope\.freqs_(?:cos|sin)$")
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What a tower computes with and no weight tells, by the names that torch and the hosts give it; last those of LoRA.
_NUMBERS = (
    *("num_heads", "scale", "eps", "stride", "padding", "dilation", "grid_size", "window_size", "shift_size"),
    *("global_pool", "pool_type", "pool_include_prefix", "final_ln_after_pool", "num_prefix_tokens"),
    *("temperature", "ref_feat_shape", "rotate_half", "grid_offset", "grid_indexing"),
    *("scaling", "merged_adapters"),
)


def save_mask_aware(visual: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a mask-aware tower as safetensors: its weights, and its settings in the file's metadata.

    The weights are under the keys of the unpatched tower: `visual.load_state_dict(safetensors.torch.load_file(path))`
    reads them into an open_clip model that knows nothing of this library. The metadata hold the settings of
    `make_mask_aware`, the name of the tower's class, what of its arithmetic no weight tells (activations, heads,
    epsilons, ...), and this library's version. `path` holds the old or the new file, never a part. Tied weights are
    written once a name.

    Args:
        visual: the tower, on any device.
        path: of the file; its folder exists.

    Raises:
        TypeError: `visual` is not mask-aware.
        ValueError: weights that are not plain tensors with values (quantized, sharded, sparse, on the meta device);
            they are named.
        OSError: the file can't be written.

    Example:
        >>> import open_clip, tempfile
        >>> visual = make_mask_aware(open_clip.create_model("ViT-S-32-alt").visual)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_mask_aware(visual, Path(folder, "tower.safetensors"))
        ...     other = open_clip.create_model("ViT-S-32-alt").visual
        ...     is_mask_aware(load_mask_aware(other, Path(folder, "tower.safetensors")))
        True
    """
    if not is_mask_aware(visual):
        name = type(visual).__name__
        raise TypeError(f"{name} is not mask-aware; call make_mask_aware on it, or pass the tower inside a wrapper")
    tower: Any = visual
    header = {
        "version": __version__,
        "tower": _host_name(visual),
        "settings": {name: getattr(tower, name) for name in tower.settings},
        "fine_tuned": getattr(tower, "fine_tuned", False),  # whether `finetune` may take a copy of it as the teacher
    }
    save_weights(visual, path, {_KEY: json.dumps(header), _ARITHMETIC: json.dumps(_arithmetic(visual))})


def load_mask_aware(visual: Tower, path: str | os.PathLike[str]) -> Tower:
    """Load what `save_mask_aware` wrote into a tower of the same architecture, in place, and make it mask-aware.

    Args:
        visual: the tower, patched or not; all of its weights are replaced, in its own dtype and where they lie. Those
            on the meta device become tensors on the CPU.
        path: of the file.

    Returns:
        `visual`.

    Raises:
        ValueError: the file was not written by `save_mask_aware`; its weights are not this tower's (missing,
            unexpected and misshapen ones are named); the tower computes with another activation, other heads or the
            like; or the tower can't take weights: sharded, quantized, offloaded. The tower is unchanged then.

    Example:
        >>> import open_clip, tempfile
        >>> visual = make_mask_aware(open_clip.create_model("ViT-S-32-alt").visual, start_layer=6)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_mask_aware(visual, Path(folder, "tower.safetensors"))
        ...     other = open_clip.create_model("ViT-S-32-alt").visual
        ...     load_mask_aware(other, Path(folder, "tower.safetensors")).start_layer
        6
    """
    file = _read(path)
    if file.header is None:
        raise ValueError(f"{path} holds no settings of maft_adapter; load_visual reads plain weights")
    settings = file.header["settings"]
    unknown = settings.keys() - _SETTINGS.keys()
    if unknown:
        raise ValueError(f"{path} is of version {file.header['version']}, whose settings {unknown} are unknown here")
    weights = _fitting(visual, file.tensors, f"{path}, a {file.header['tower']},")
    _check_arithmetic(visual, file, path)
    try:
        make_mask_aware(visual, **settings)
    except ValueError as error:
        raise ValueError(f"{path} can't be loaded: {error}") from error
    _replace_weights(visual, weights)
    # Files from before this was written came out of fine-tuning.
    visual.fine_tuned = file.header.get("fine_tuned", True)
    return visual


def visual_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The image tower in a checkpoint, under the keys of the tower alone, on the CPU.

    Args:
        path: as `load_visual` takes it. The tower is the one that a host of MAFT fine-tunes or classifies proposals
            with, or else lies under `visual.`, or is one of OpenAI's, open_clip's, timm's or transformers' alone; of
            transformers' towers come those weights that are under `vision_model.`.

    Raises:
        ValueError: the file can't be read, or no image tower is in it, or different ones.
        OSError: no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state = {"IPCLIP.conv1.weight": torch.zeros(1), "backbone.stem": torch.zeros(1)}
        ...     torch.save({"model": state}, Path(folder, "maft.pth"))
        ...     list(visual_weights(Path(folder, "maft.pth")))
        ['conv1.weight']
    """
    tensors = _read(path).tensors
    for place in (*_HOSTS, "visual."):
        pattern = re.compile(rf"((?:.+?\.)??{re.escape(place)}).")
        prefixes = {match[1] for name in tensors if (match := pattern.match(name))}
        if prefixes:
            return _only(tensors, prefixes, path)
    prefixes = {match[1] for name in tensors if (match := _BARE.fullmatch(name))}
    if not prefixes:
        raise ValueError(f"{path} holds no CLIP image tower; it holds {_few(tensors) or 'no tensors'}")
    return _only(tensors, prefixes, path)


def load_visual(visual: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load an image tower out of somebody's checkpoint, patched or not; its settings stay what they are.

    The tower is found by its own keys, under whatever prefix and in whatever dictionaries they lie. In the authors'
    released checkpoints and in those of a host's stage 2 several towers are of this kind: the fine-tuned one (their
    `IPCLIP.`, or the CLIP that classifies proposals) is taken. The authors' released checkpoints want the tower's
    defaults, and L = 8 whatever their configuration says.

    FC-CLIP's, MAFT+'s, MaskCLIP++'s and OVSeg's checkpoints are read, too, into open_clip's tower of the name that
    their configuration gives; EVA-CLIP's own names become timm's. FC-CLIP, MAFT+ and MaskCLIP++'s ConvNeXts average
    over masks as the tower here does, up to the cells on a mask's edge. Where a checkpoint was trained with more than
    its tower computes, or otherwise, a warning names it: words that are adapted to the picture or come from a tuned
    text encoder, mask tokens that do not see themselves, masked crops.

    Args:
        visual: the tower; all of its weights are replaced, in its own dtype and where they lie. Those on the meta
            device become tensors on the CPU.
        path: a file of safetensors, `save_mask_aware`'s among them; what torch.save wrote, which is read with
            `weights_only=True`; or a TorchScript archive such as OpenAI's, of which only the tensors are read. What
            kind of file it is its content tells, not its name, and nothing in it is executed.

    Raises:
        ValueError: the file is of another kind, damaged, or needs code to be run; it holds no such tower, or several
            that differ; names or shapes differ; the file tells of another activation or the like than the tower has;
            it is `save_mask_aware`'s with another start layer or interpolation than a patched tower has; or the tower
            can't take weights: sharded, quantized, offloaded. The tower is unchanged then.
        OSError: no such file.

    Example:
        >>> import tempfile
        >>> tower = nn.Sequential()
        >>> tower.conv1 = nn.Conv2d(3, 2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({k: v + 1 for k, v in tower.state_dict().items()}, Path(folder, "tower.pth"))
        ...     load_visual(tower, Path(folder, "tower.pth"))
    """
    file = _read(path)
    own = [_unwrapped(name) for name in visual.state_dict()]
    root = own[0].partition(".")[0] + "." if own else ""
    if root == "trunk.":
        file = file._replace(tensors=_timm_names(file.tensors, own))
    prefixes = _prefixes(file.tensors, own)
    if all(name.startswith(root) for name in own) and not prefixes:
        # A tower inside one more module than in the file: timm's trunk, or transformers' `vision_model`.
        prefixes = _prefixes(file.tensors, [name.removeprefix(root) for name in own])
    else:
        root = ""
    if not prefixes:
        raise ValueError(
            f"{path} holds no CLIP image tower such as this {_host_name(visual)}, whose weights are {_few(own)}; "
            f"it holds {_few(file.tensors) or 'no tensors'}"
        )
    if len(prefixes) > 1:
        shapes = {_unwrapped(name): value.shape for name, value in visual.state_dict().items()}
        like = [p for p in prefixes if all(file.tensors[p + n.removeprefix(root)].shape == shapes[n] for n in own)]
        prefixes = like or prefixes
    found = {root + name: value for name, value in _only(file.tensors, prefixes, path).items()}
    beside = () if file.header else tuple(name for name in found if name.startswith(_BESIDE) and name not in own)
    weights = _fitting(visual, {name: value for name, value in found.items() if name not in beside}, str(path))
    _check_arithmetic(visual, file, path)
    if file.header is not None and is_mask_aware(visual):
        settings = file.header["settings"]
        # Not the threshold, which is a host's own.
        differ = {n: v for n, v in settings.items() if n != "threshold" and getattr(visual, n, None) != v}
        if differ:
            raise ValueError(f"{path} was saved with {differ}, unlike this tower; set that, or call load_mask_aware")
    place = next((host for host in _HOSTS if f".{prefixes[0]}".endswith(f".{host}")), "")
    trained_with = list(_trained_with(file.tensors, prefixes[0], place, own))
    if trained_with:
        warnings.warn(f"of {path} the image tower alone is loaded: {'; '.join(trained_with)}", stacklevel=2)
    _replace_weights(visual, weights)
    # A host's may be the frozen CLIP still, but it can't be told.
    fine_tuned = file.header.get("fine_tuned", True) if file.header else bool(place)
    visual.fine_tuned = fine_tuned  # type: ignore[assignment]


def save_weights(module: nn.Module, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write a state_dict as safetensors, atomically: `path` holds the old or the new file, never a part.

    Args:
        module: whose state_dict is written; tied weights once a name.
        path: of the file; its folder exists.
        metadata: what else the file's header holds.

    Raises:
        ValueError: weights that are not plain tensors with values; they are named.
        OSError: the file can't be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(nn.Linear(2, 2), Path(folder, "layer.safetensors"))
        ...     [file.name for file in Path(folder).iterdir()]
        ['layer.safetensors']
    """
    from safetensors.torch import save

    state = module.state_dict()
    _refuse_unlike_tensors(state, f"{type(module).__name__} can't be saved")
    # Clones, since safetensors takes no two tensors that share memory.
    tensors = {_unwrapped(n): tensor.clone(memory_format=torch.contiguous_format) for n, tensor in state.items()}
    replace_file(path, save(tensors, metadata))


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: `path` holds the old or the new one, never a part. A link stays one, the mode stays.

    The part that is written is called `NAME.MACHINE.PROCESS.part`. Those that processes of this machine left behind
    when they were killed are removed.

    Args:
        path: of the file; its folder exists.
        data: all that it shall hold.

    Raises:
        OSError: the folder is missing or can't be written to; nothing is left behind.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(Path(folder, "report.html"), b"all of it")
        ...     Path(folder, "report.html").read_text()
        'all of it'
    """
    path = Path(path).resolve()
    machine = re.sub(r"[^\w-]", "-", platform.node())
    for part in path.parent.glob("*.part"):
        match = re.fullmatch(rf"{re.escape(path.name)}\.(?:{machine}\.)?(\d+)\.part", part.name)
        if match and not _runs(int(match[1])):
            part.unlink(missing_ok=True)
    part = path.with_name(f"{path.name}.{machine}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _runs(process: int) -> bool:
    """Whether a process of this number runs here; yes where that can't be told without harm (Windows)."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


# Reading


class _File(NamedTuple):
    """What a checkpoint holds: tensors by their names, dictionaries within one another joined by dots."""

    tensors: dict[str, Tensor]
    header: dict[str, Any] | None = None  # what `save_mask_aware` wrote beside the weights ...
    arithmetic: dict[str, dict[str, str]] | None = None  # ... and what `_arithmetic` gave
    classes: frozenset[str] = frozenset()  # the modules of a TorchScript archive


def _read(path: str | os.PathLike[str]) -> _File:
    """Raise ValueError, with the path and what to do, unless the file holds tensors that can be read safely."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; name the file in it that holds the weights, such as model.safetensors")
    with open(path, "rb") as opened:
        start = opened.read(512)
    is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= os.path.getsize(path) - 8
    if not is_safetensors and start[:1] not in (b"P", b"\x80"):  # as zip archives and pickles begin
        raise ValueError(f"{path} can't be read: {_foreign(start)}")
    try:
        if is_safetensors:
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return _read_torchscript(archive)
        with open(path, "rb") as opened:  # given a path, torch goes by its suffix
            return _File(dict(_named_tensors(torch.load(opened, map_location="cpu", weights_only=True))))
    except pickle.UnpicklingError as error:
        needed = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
        if needed is None:
            raise ValueError(f"{path} can't be read; it is damaged, or no checkpoint: {error}") from error
        raise ValueError(
            f"{path} needs code to be run ({needed[1]}), which weights_only=True forbids. If you trust the file, write "
            'its tensors alone: torch.save(torch.load(path, weights_only=False)["state_dict"], new_path), with the '
            "name that they have in there, or with .state_dict() if it is a whole model"
        ) from error
    except Exception as error:  # of any kind, depending on which byte is damaged
        raise ValueError(f"{path} can't be read; it is damaged, or no checkpoint: {error!r}") from error


def _foreign(start: bytes) -> str:
    """What a file is that begins like this and is no checkpoint, and what to do."""
    text = start.lstrip().lower()
    if not start:
        return "it is empty; download or copy it again"
    if text.startswith(b"<"):
        return "it is a web page, which the server sent instead of the file; open the link in a browser and download it"
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs, not the file itself; run git lfs pull"
    if b'"weight_map"' in text or b'"metadata"' in text:
        return (
            "it is the index of a checkpoint in several files; save the model in one, or load it with its own library"
        )
    return "it is neither safetensors nor what torch.save wrote, or it is damaged"


def _read_safetensors(path: str | os.PathLike[str]) -> _File:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        metadata = file.metadata() or {}
    header, arithmetic = (json.loads(metadata.get(key, "null")) for key in (_KEY, _ARITHMETIC))
    well_formed = header is None or (
        {"version", "tower"} <= header.keys()
        and all(isinstance(value, _SETTINGS.get(name, object)) for name, value in header["settings"].items())
    )
    if arithmetic is not None:
        well_formed &= all(isinstance(arithmetic[part], dict) for part in ("functions", "numbers"))
    if not well_formed:
        raise ValueError("its metadata are not those that save_mask_aware writes")
    return _File(dict(_named_tensors(tensors)), header, arithmetic)


def _named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in dictionaries within one another, as training scripts save them."""
    if isinstance(value, Tensor):
        yield _unwrapped(name), value.detach()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _named_tensors(inner, f"{name}.{key}" if name else str(key))


class _Stored(dict[Any, Any]):
    """Stands for every object of a TorchScript archive, whose class is never looked up: its attributes, and no code."""

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.update(state)


_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _strided(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


class _TorchScriptUnpickler(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive. Of the names in it none is imported, so none is called."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        super().__init__(archive.open(name))
        self.archive, self.folder = archive, name.removesuffix(".pkl")
        self.storages: dict[str, Tensor] = {}
        self.classes: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _strided
        self.classes.add(name)
        return type(name, (_Stored,), {})

    def persistent_load(self, pid: Any) -> Tensor:
        _, kind, key, *_ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}/{key}"))
            self.storages[key] = torch.frombuffer(data or bytearray(8), dtype=_DTYPES[kind.__name__])
        return self.storages[key]


def _read_torchscript(archive: zipfile.ZipFile) -> _File:
    (name,) = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    reader = _TorchScriptUnpickler(archive, name)
    return _File(dict(_named_tensors(reader.load())), classes=frozenset(reader.classes))


# Finding the tower


def _prefixes(tensors: Collection[str], own: Collection[str]) -> list[str]:
    """Under which prefixes a tower of these own names lies, complete or, if none is, the nearest to it."""
    known = set(own)
    counts = Counter(
        name[:i]
        for name in tensors
        for i in (0, *(match.end() for match in re.finditer(r"\.", name)))
        if name[i:] in known
    )
    for host in _HOSTS:
        towers = [prefix for prefix in counts if f".{prefix}".endswith(f".{host}")]
        if towers:
            return towers
    complete = [prefix for prefix, count in counts.items() if count == len(known)]
    return complete or [prefix for prefix, count in counts.most_common(1) if count > len(known) / 2]


def _only(tensors: Mapping[str, Tensor], prefixes: Iterable[str], path: Any) -> dict[str, Tensor]:
    """The tensors under one prefix, after making sure that those under the others are the same."""
    first, *others = sorted(prefixes)
    chosen = {name.removeprefix(first): value for name, value in tensors.items() if name.startswith(first)}
    for prefix in others:
        other = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if chosen.keys() != other.keys() or not all(_equal(chosen[name], other[name]) for name in chosen):
            raise ValueError(
                f"{path} holds image towers that differ, under {first!r} and {prefix!r}; save the tensors of the one "
                "that you mean to a file of their own"
            )
    return chosen


def _timm_names(tensors: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """EVA-CLIP's weights under the names of timm's tower, without the rotary embedding, which is computed."""
    # One projection for queries, keys and values, as in EVA-01, leaves the biases their names.
    names = {old: new for old, new in _EVA.items() if not any(f".{old}" in name for name in own)}
    pattern = re.compile(rf"(?<=\.)(?:{'|'.join(map(re.escape, names))})(?=\.|$)")
    return {
        pattern.sub(lambda match: names[match[0]], name): value
        for name, value in tensors.items()
        if not _EVA_BUFFERS.search(name)
    }


def _trained_with(tensors: Mapping[str, Tensor], prefix: str, place: str, own: Collection[str]) -> Iterator[str]:
    """What a released checkpoint was trained with that its tower does not compute here, one reason after the other.

    Args:
        tensors: of the whole file.
        prefix: of the tower in them.
        place: which of `_HOSTS` it ends in, "" if in none.
        own: names of the tower's weights.
    """
    root = prefix.removesuffix(place)

    def holds(part: str) -> bool:
        return any(name.startswith(root + part) for name in tensors)

    if prefix + "mask_embedding" in tensors and "mask_embedding" not in own:
        yield "OVSeg trained it on masked crops, with mask prompts (mask_embedding) for what is blank in them"
    if place == _MAFT_PLUS and holds("cdt."):
        yield "MAFT+ adapts words to each picture (cdt), so scores with words as they are differ"
    if place != _MASKCLIPPP:
        return
    if holds("psm.img2text."):
        yield "MaskCLIP++ adapts words to each picture (psm.img2text), so scores with words as they are differ"
    if holds("text_encoder."):
        yield "MaskCLIP++ tuned the text encoder with it (text_encoder), whose words it expects"
    scale = tensors.get(f"{root}visual_encoder.mask_logit_scale")
    if scale is not None and scale.ndim == 1:
        yield "MaskCLIP++'s attention pool sees the patches of a mask without the mean token, so embeddings differ"
    elif scale is not None:
        depth = 1 + max(int(index) for name in own for index in re.findall(r"blocks\.(\d+)\.", name))
        yield (
            f"MaskCLIP++'s masks begin at start_layer={depth - len(scale)}; from there on its mask tokens do not see "
            "themselves, and its patches go on seeing the class token, so embeddings differ"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# Checking before anything is changed


def _fitting(visual: nn.Module, weights: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The weights under this tower's own names; ValueError if they do not fit, or the tower can't take them."""
    own = visual.state_dict()
    _refuse_unlike_tensors(own, f"this {_host_name(visual)} can't be loaded into", meta=True)
    names = {_unwrapped(name): name for name in own}
    buffers = {_unwrapped(name): buffer for name, buffer in visual.named_buffers()}
    if any(tensor.is_meta for tensor in own.values()):
        if any(hasattr(module, "_hf_hook") for module in visual.modules()):
            raise ValueError("the tower's weights are offloaded, and its hooks would undo loading: load before that")
        lost = [name for name, buffer in buffers.items() if buffer.is_meta and name not in names]
        if lost:
            raise ValueError(f"{_few(lost)} on the meta device, which no checkpoint holds: build the tower on the CPU")
    # Checkpoints of old versions hold buffers that are now computed.
    extra = [n for n in weights if n not in names and n not in buffers]
    shared = [n for n in names if n in weights]
    shape = [n for n in shared if weights[n].shape != own[names[n]].shape]
    kind = [n for n in shared if weights[n].is_floating_point() != own[names[n]].is_floating_point()]
    problems = {
        "lacks": [n for n in names if n not in weights],
        "has besides": extra,
        "has in another shape": [f"{n} {tuple(weights[n].shape)} for {tuple(own[names[n]].shape)}" for n in shape],
        "has in another kind of number": [f"{n} {weights[n].dtype} for {own[names[n]].dtype}" for n in kind],
    }
    found = "; ".join(f"{problem} {_few(found)}" for problem, found in problems.items() if found)
    if found:
        lora = any(".lora_" in name for name in (*weights, *names))
        cure = "; merge LoRA into the weights that it belongs to first (merge_and_unload)" if lora else ""
        raise ValueError(f"{what} does not fit this {_host_name(visual)}: it {found}{cure}")
    fitting = {names[n]: weights[n] for n in names}
    _refuse_unlike_tensors(fitting, f"{what} can't be loaded")
    first: dict[int, str] = {}
    for name, parameter in visual.named_parameters(remove_duplicate=False):
        twin = first.setdefault(id(parameter), name)
        if twin != name and not _equal(fitting[twin], fitting[name]):
            raise ValueError(f"{twin} and {name} are one weight in this {_host_name(visual)}, but differ in {what}")
    return fitting


def _refuse_unlike_tensors(state: Mapping[str, Any], what: str, meta: bool = False) -> None:
    """Raise ValueError if a state_dict holds more than plain tensors; those of the meta device pass if `meta`."""
    for name, value in state.items():
        if hasattr(value, "full_tensor"):
            problem = "is sharded (DTensor): gather it first (full_tensor), and load before sharding"
        elif not isinstance(value, Tensor) or value.is_quantized or type(value) not in (Tensor, nn.Parameter):
            problem = f"is a {type(value).__name__}, not a plain tensor: quantize after saving and loading"
        elif value.layout != torch.strided:
            problem = "is sparse: call .to_dense() on it"
        elif value.is_meta and not meta:
            problem = "is on the meta device and has no values: load or bring back the weights first"
        else:
            continue
        raise ValueError(f"{what}: {name} {problem}")


def _arithmetic(visual: nn.Module) -> dict[str, dict[str, str]]:
    """What a tower computes with and no weight tells.

    Returns:
        "functions": by module, its parts without weights (activations, pools); "numbers": by module and name.
    """
    functions: dict[str, str] = {}
    numbers: dict[str, str] = {}
    for path, module in visual.named_modules(remove_duplicate=False):
        # Hosts of the same weights name their activations differently (relu1, act1), so as a set.
        kinds = {_function(child) for child in module.children()} - {""}
        if kinds:
            functions[_unwrapped(path)] = ", ".join(sorted(kinds))
        for name in () if _function(module) else _NUMBERS:
            value = vars(module).get(name)
            if isinstance(value, bool | int | float | str | tuple | list | dict):
                plain = tuple(value) if isinstance(value, tuple) else value  # torch.Size has a name of its own
                numbers[_unwrapped(f"{path}.{name}" if path else name)] = str(plain)
    return {"functions": functions, "numbers": numbers}


def _function(module: nn.Module) -> str:
    """How a module without weights is written; "" if it has some, or does nothing where a tower is used."""
    if any(True for _ in (*module.children(), *module.parameters(), *module.buffers())):
        return ""
    idle = isinstance(module, nn.Identity | nn.Sequential | nn.ModuleList) or "Drop" in type(module).__name__
    return "" if idle else _plain_name(repr(module))


def _plain_name(function: str) -> str:
    """The name of an activation in every host and version: GELU for GELU(approximate='none') and GELUActivation."""
    return re.sub(r"Pytorch|Activation|(?:, )?inplace=\w+|approximate='none'", "", function)


def _check_arithmetic(visual: nn.Module, file: _File, path: Any) -> None:
    own = _arithmetic(visual)
    saved = file.arithmetic or own  # files of the first version do not tell
    differ = {
        f"{_any_block(name) or 'the tower'} has {there or 'nothing'} for {here or 'nothing'}"
        for name in (*saved["functions"], *own["functions"])
        if (there := saved["functions"].get(name)) != (here := own["functions"].get(name))
    }
    differ |= {
        f"{_any_block(name)} {there} for {own['numbers'][name]}"
        for name, there in saved["numbers"].items()
        if own["numbers"].get(name, there) != there  # what only one version of a host keeps says nothing
    }
    # Of a scripted model the classes are known, and GELU instead of QuickGELU goes unnoticed otherwise.
    scripted = {_plain_name(name) for name in file.classes if "GELU" in name}
    gelus = {_plain_name(type(module).__name__) for module in visual.modules() if "GELU" in type(module).__name__}
    if scripted and gelus and scripted != gelus:
        differ.add(f"{', '.join(sorted(scripted))} for {', '.join(sorted(gelus))}")
    if differ:
        raise ValueError(
            f"{path} is of a tower that computes otherwise than this {_host_name(visual)}: {_few(sorted(differ))}; "
            "build it as that one was (in open_clip, OpenAI's weights want a name that ends in -quickgelu)"
        )


# Small things


def _replace_weights(visual: nn.Module, weights: Mapping[str, Tensor]) -> None:
    own = visual.state_dict()
    meta = any(tensor.is_meta for tensor in own.values())  # copying into those does nothing
    visual.load_state_dict({n: w.to(own[n].dtype) for n, w in weights.items()} if meta else weights, assign=meta)


def _host_name(visual: nn.Module) -> str:
    return (type(visual).__bases__[1] if is_mask_aware(visual) else type(visual)).__name__


def _unwrapped(name: str) -> str:
    """A weight's name without what compiling and other wrappers put into it."""
    return _WRAPPERS.sub("", name)


def _any_block(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
