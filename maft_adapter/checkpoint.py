"""Checkpoints of mask-aware towers, weights and settings together, and the authors' released ones."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import __version__
from .adapt import is_mask_aware, make_mask_aware

Tower = TypeVar("Tower", bound=nn.Module)

_KEY = "maft_adapter"  # of the file's metadata
_PREFIX = "IPCLIP."  # of the tower in the authors' checkpoints


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
        raise TypeError(f"{type(visual).__name__} is not mask-aware; call make_mask_aware on it first")
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
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(_KEY)
    if header is None:
        raise ValueError(f"{path} holds no settings of maft_adapter; read plain weights with load_state_dict")
    weights = load_file(path)
    written = json.loads(header)
    _check_weights(visual, weights, f"{path}, a {written['tower']},")
    make_mask_aware(visual, **written["settings"])
    visual.load_state_dict(weights)
    return visual


def load_released(visual: Tower, path: str | os.PathLike[str], start_layer: int = 8) -> Tower:
    """Load the tower of one of the authors' released MAFT checkpoints, in place, and make it mask-aware.

    Args:
        visual: the image tower of the same CLIP in open_clip's or OpenAI's layout, for example ViT-B/16 at 224.
        path: a `.pt` or `.pth` file with the tower's weights under `IPCLIP.`, at the top or under "model". It is read
            with `weights_only=True`: nothing in it is executed.
        start_layer: the authors' code uses 8 whatever its configuration says.

    Raises:
        ValueError: the file holds no such weights, or not this tower's; `visual` is unchanged then.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    content = content.get("model", content) if isinstance(content, Mapping) else {}
    weights = {name.removeprefix(_PREFIX): value for name, value in content.items() if name.startswith(_PREFIX)}
    if not weights:
        raise ValueError(f"{path} has no weights under {_PREFIX!r}, where MAFT's code keeps its tower: {_few(content)}")
    _check_weights(visual, weights, str(path))
    make_mask_aware(visual, start_layer)
    visual.load_state_dict(weights)
    return visual


def save_weights(module: nn.Module, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write a state_dict as safetensors, atomically: `path` holds the old or the new file, never a part.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(nn.Linear(2, 2), Path(folder, "layer.safetensors"))
        ...     [file.name for file in Path(folder).iterdir()]
        ['layer.safetensors']
    """
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, metadata)
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


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
