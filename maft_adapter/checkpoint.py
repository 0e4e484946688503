"""Checkpoints of mask-aware towers, weights and settings together, and towers out of other checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import __version__
from .adapt import is_mask_aware, make_mask_aware

Tower = TypeVar("Tower", bound=nn.Module)

_KEY = "maft_adapter"  # of the file's metadata
# Where the image tower lies in a checkpoint, the fine-tuned one before frozen copies: the authors' released MAFT,
# ZSSeg and FreeSeg (two CLIPs, then one), ZegFormer, a whole CLIP, the tower alone.
_PREFIXES = (
    "IPCLIP.",
    "_region_clip_adapter.clip_model.visual.",
    "clip_adapter.clip_model.visual.",
    "sem_seg_head.predictor.clip_model.visual.",
    "visual.",
    "",
)


def save_mask_aware(visual: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a mask-aware tower as safetensors: its weights, and its settings in the file's metadata.

    The weights are under the keys of the unpatched tower: `visual.load_state_dict(safetensors.torch.load_file(path))`
    reads them into an open_clip model that knows nothing of this library. The settings are those of
    `make_mask_aware`, the name of the tower's class and this library's version. `path` holds the old or the new file,
    never a part.

    Raises:
        TypeError: `visual` is not mask-aware.

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
    settings = {name: getattr(tower, name) for name in tower.settings}
    header = {"version": __version__, "tower": _host_name(visual), "settings": settings}
    save_weights(visual, path, {_KEY: json.dumps(header)})


def load_mask_aware(visual: Tower, path: str | os.PathLike[str]) -> Tower:
    """Load what `save_mask_aware` wrote into a tower of the same architecture, in place, and make it mask-aware.

    Args:
        visual: the tower, patched or not; all of its weights are replaced, in its own dtype.
        path: of the file.

    Raises:
        ValueError: the file was not written by `save_mask_aware`, or its weights are not this tower's: missing,
            unexpected and misshapen ones are named. The tower is unchanged then.
    """
    from safetensors.torch import load_file

    written = _header(path)
    if written is None:
        raise ValueError(f"{path} holds no settings of maft_adapter; load_visual reads plain weights")
    unknown = written["settings"].keys() - {"start_layer", "interpolation", "threshold"}
    if unknown:
        raise ValueError(f"{path} is of version {written['version']}, whose settings {unknown} are unknown here")
    weights = load_file(path)
    _check_weights(visual, weights, f"{path}, a {written['tower']},")
    make_mask_aware(visual, **written["settings"])
    visual.load_state_dict(weights)
    return visual


def visual_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The image tower in a checkpoint, under the keys of the tower alone, on the CPU.

    Args:
        path: the authors' released MAFT checkpoint (its `IPCLIP.`), a checkpoint of a host's stage 2 (the CLIP that
            classifies proposals is taken), the state_dict of a CLIP or tower in open_clip's or OpenAI's own layout, ViT
            or ResNet; safetensors, or what torch.save wrote, which is read with `weights_only=True`: nothing in it is
            executed.

    Raises:
        ValueError: no image tower in the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state = {"IPCLIP.conv1.weight": torch.zeros(1), "backbone.stem": torch.zeros(1)}
        ...     torch.save({"model": state}, Path(folder, "maft.pth"))
        ...     list(visual_weights(Path(folder, "maft.pth")))
        ['conv1.weight']
    """
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        state: dict[str, Any] = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state.get("state_dict", state)) if isinstance(state, Mapping) else {}
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}conv1.weight" in state), None)
    if prefix is None:
        places = ", ".join(f"{prefix}conv1.weight" for prefix in _PREFIXES)
        raise ValueError(f"{path} holds no CLIP image tower; looked for {places}")
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def load_visual(visual: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load `visual_weights(path)` into an image tower, patched or not; its settings stay what they are.

    The authors' released checkpoints want the tower's defaults, and L = 8 whatever their configuration says.

    Raises ValueError if names or shapes differ, or a file of `save_mask_aware` was saved with another start layer or
    interpolation than a patched tower has; the tower is left as it was then.

    Example:
        >>> import tempfile
        >>> tower = nn.Sequential()
        >>> tower.conv1 = nn.Conv2d(3, 2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({k: v + 1 for k, v in tower.state_dict().items()}, Path(folder, "tower.pth"))
        ...     load_visual(tower, Path(folder, "tower.pth"))
    """
    weights = visual_weights(path)
    _check_weights(visual, weights, str(path))
    written = _header(path)
    if written is not None and is_mask_aware(visual):
        # Not the threshold, which is a host's own.
        differ = {n: v for n, v in written["settings"].items() if n != "threshold" and getattr(visual, n) != v}
        if differ:
            raise ValueError(f"{path} was saved with {differ}, unlike this tower; set that, or call load_mask_aware")
    visual.load_state_dict(weights)


def save_weights(module: nn.Module, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write a state_dict as safetensors, atomically: `path` holds the old or the new file, never a part.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(nn.Linear(2, 2), Path(folder, "layer.safetensors"))
        ...     [file.name for file in Path(folder).iterdir()]
        ['layer.safetensors']
    """
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, metadata)
    replace_file(path, data)


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: `path` holds the old or the new one, never a part. A link stays one, the mode stays.

    Raises OSError, and leaves nothing behind, if the folder is missing or can't be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(Path(folder, "report.html"), b"all of it")
        ...     Path(folder, "report.html").read_text()
        'all of it'
    """
    path = Path(path).resolve()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _header(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `save_mask_aware` wrote beside the weights; None for other files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
    except SafetensorError:
        return None
    return None if header is None else json.loads(header)


def _host_name(visual: nn.Module) -> str:
    return (type(visual).__bases__[1] if is_mask_aware(visual) else type(visual)).__name__


def _check_weights(visual: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    own = visual.state_dict()
    problems = {
        "lacks": [name for name in own if name not in weights],
        "has besides": [name for name in weights if name not in own],
        "has in another shape": [
            f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ],
    }
    found = "; ".join(f"{problem} {_few(names)}" for problem, names in problems.items() if names)
    if found:
        raise ValueError(f"{what} does not fit this {_host_name(visual)}: it {found}")


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
