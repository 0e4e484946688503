"""Fine-tuned towers on the Hugging Face hub, each with the name of its CLIP and a model card."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .checkpoint import save_mask_aware
from .extras import extra
from .models import Model, image_tower, load_model

__all__ = ["from_pretrained", "push_to_hub"]

_TOWER, _CONFIG, _CARD = "tower.safetensors", "config.json", "README.md"
# Figures of metrics.json and what a card calls them.
_FIGURES = {
    "miou": "mIoU",
    "miou_seen": "mIoU of seen classes",
    "miou_unseen": "mIoU of unseen classes",
    "hiou": "hIoU",
    "fwiou": "frequency-weighted IoU",
    "pixel_accuracy": "pixel accuracy",
    "mask_accuracy": "mask accuracy",
}


def push_to_hub(
    clip: Any,
    repo: str,
    *,
    model: str | None,
    pretrained: str | None = None,
    license: str,
    data: str,
    metrics: str | os.PathLike[str] | None = None,
    private: bool = False,
) -> str:
    """Publish a mask-aware tower as a repository of the Hugging Face hub, in one commit.

    The repository gets the tower as `save_mask_aware` writes it, the name of its CLIP, and a model card. Before
    anything is sent, the CLIP is loaded by that name with the tower in it, so what is published can be loaded again.
    An existing repository keeps what it had in its history. Log in before, with `hf auth login` or `HF_TOKEN`.

    Args:
        clip: the tower, or the CLIP that it is in; the text encoder is not published.
        repo: "user/name".
        model: the CLIP's name, as `load_model` takes it; None for the embedded CLIP.
        pretrained: the tag of its weights, as `load_model` takes it.
        license: what the weights and the data allow, one of the hub's identifiers, such as "mit".
        data: what the tower was fine-tuned on, for the card, in words.
        metrics: metrics.json of `maft-adapter evaluate --checkpoint`, of this tower, for the card.
        private: whether a new repository is for its owner only.

    Returns:
        The commit's address.

    Raises:
        TypeError: no mask-aware tower is in `clip`.
        ValueError: `repo` is no such name; model or weights lie in a folder or file, which others don't have; the tower
            does not fit that CLIP; or the metrics are not evaluate's, or another tower's.
        OSError: the CLIP can't be loaded, the metrics can't be read, or the hub can't be reached or refuses.
        ModuleNotFoundError: huggingface_hub is missing.

    Example:
        >>> push_to_hub(load_model().clip, "name", model=None, license="apache-2.0", data="the embedded world")
        Traceback (most recent call last):
        ValueError: repo is 'name', expected "user/name"
    """
    with extra("hub"):
        from huggingface_hub import HfApi

    if len(parts := repo.split("/")) != 2 or not all(parts):
        raise ValueError(f'repo is {repo!r}, expected "user/name"')
    _check_names(model, pretrained)
    tower = image_tower(clip)
    figures = None if metrics is None else _read_metrics(metrics)
    with tempfile.TemporaryDirectory() as folder:
        save_mask_aware(tower, Path(folder, _TOWER))
        config = {"model": model, "pretrained": pretrained, "maft_adapter": __version__}
        Path(folder, _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        loaded = from_pretrained(folder)
        if figures and _weights(of := figures["settings"]["model"]) != _weights(loaded.source):
            raise ValueError(f"{metrics} is of other weights: {of}; these are {loaded.source}")
        card = _card(loaded, repo, config, license, data, figures)
        Path(folder, _CARD).write_text(card, encoding="utf-8")
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            message = f"Mask-aware tower, by maft-adapter {__version__}"
            return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url)
        except ValueError:
            raise
        except Exception as error:  # of any kind: the hub's, httpx', requests' ...
            raise OSError(f"{repo} can't be published: {error or repr(error)}") from error


def from_pretrained(
    repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Model:
    """Load a CLIP with the fine-tuned tower that `push_to_hub` published.

    Args:
        repo: "user/name" on the hub, or a folder with what such a repository holds.
        revision: a branch, tag or commit of the repository; the newest by default.
        device, precision: as `load_model` takes them.

    Returns:
        See `Model`.

    Raises:
        ValueError: the repository or folder does not hold what `push_to_hub` wrote, or the tower does not fit its CLIP;
            a revision of a folder.
        OSError: the repository or its CLIP can't be loaded: no network, no such name, damaged or missing files.
        ModuleNotFoundError: huggingface_hub is missing.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     from_pretrained(folder)
        Traceback (most recent call last):
        ValueError: ... has no tower.safetensors and no config.json, which push_to_hub writes
    """
    folder = Path(repo)
    if not folder.is_dir():
        with extra("hub"):
            from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(str(repo), revision=revision, allow_patterns=[_TOWER, _CONFIG]))
        except Exception as error:  # of any kind: the hub's, httpx', requests' ...
            raise OSError(f"{repo} is no folder and can't be loaded from the hub: {error or repr(error)}") from error
    elif revision is not None:
        raise ValueError(f"revision is {revision!r}, but {repo} is a folder: leave it out")
    missing = [name for name in (_TOWER, _CONFIG) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{repo} has no {' and no '.join(missing)}, which push_to_hub writes")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        model, pretrained = config["model"], config["pretrained"]
        if not all(isinstance(name, str | None) for name in (model, pretrained)):
            raise TypeError("model and pretrained are names")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{_CONFIG} of {repo} is not what push_to_hub writes: {error!r}") from error
    _check_names(model, pretrained)
    return load_model(model, pretrained, checkpoint=folder / _TOWER, device=device, precision=precision)


def _check_names(model: str | None, pretrained: str | None) -> None:
    """Names that mean the same on every machine: a repository must not make anybody load local files."""
    if model is not None and (model.startswith("local-dir:") or Path(model).is_dir()):
        raise ValueError(f"model is {model!r}, a folder of one machine; expected the name of a public model")
    if pretrained is not None and Path(pretrained).is_file():
        raise ValueError(f"pretrained is {pretrained!r}, a file of one machine; expected a tag that open_clip knows")


def _read_metrics(path: str | os.PathLike[str]) -> Any:
    try:
        metrics = json.loads(Path(path).read_text(encoding="utf-8"))
        about = {name: metrics["settings"][name] for name in ("data", "model", "proposals", "names", "pictures")}
        if metrics["settings"]["encoder"] != "mask-aware":
            raise ValueError(f"its encoder is {metrics['settings']['encoder']}")
        # None where a data set has no such classes
        shown = {title: metrics[key] for key, title in _FIGURES.items() if metrics[key] is not None}
        return {"settings": about, "figures": shown}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what maft-adapter evaluate writes of a mask-aware CLIP: {error!r}") from error


def _weights(source: str) -> str:
    """The digest that `Model.source` ends with; files and precision may have other names."""
    return source.rpartition(" ")[2]


def _card(
    model: Model, repo: str, config: Mapping[str, Any], license: str, data: str, metrics: Mapping[str, Any] | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    tower = image_tower(model.clip)
    name = "the small CLIP that maft-adapter ships" if config["model"] is None else f"`{config['model']}`"
    name += f" with the weights `{config['pretrained']}`" if config["pretrained"] else ""
    settings = ", ".join(f"{setting} {getattr(tower, setting)}" for setting in tower.settings)
    results, figures = None, ""
    if metrics:
        about, shown = metrics["settings"], metrics["figures"]
        results = [
            EvalResult(
                task_type="image-segmentation", dataset_type=about["data"], dataset_name=about["data"],
                metric_type=title, metric_value=round(value, 2),
            )
            for title, value in shown.items()
        ]  # fmt: skip
        rows = "\n".join(f"| {title} | {value:.1f} |" for title, value in shown.items())
        figures = f"""
## Figures

`maft-adapter evaluate` on {about["data"]}, {about["pictures"]} pictures, {about["names"]} class names, proposals:
{about["proposals"]}.

| figure | % |
|---|---:|
{rows}
"""
    head = ModelCardData(
        license=license,
        library_name="maft-adapter",
        pipeline_tag="image-segmentation",
        tags=["clip", "mask-aware", "open-vocabulary-segmentation"],
        model_name=repo,
        eval_results=results,
    )
    words = json.dumps(list(model.class_names[:2] if model.class_names else ("swan", "river")))
    return f"""---
{head.to_yaml()}
---
# {repo}

The image tower of {name}, mask-aware and fine-tuned: one embedding for every mask of a picture, in one forward pass
([MAFT](https://arxiv.org/abs/2310.00240)).

```python
from maft_adapter.hub import from_pretrained
from maft_adapter.pictures import Segmenter

model = from_pretrained("{repo}")
segmenter = Segmenter(model.clip, model.tokenizer, {words}, templates=model.templates, size=model.size)
segmenter("photo.jpg").overlay()
```

- Tower: {type(tower).__name__}, {settings}
- Fine-tuned on: {data}
- Licence: {license}
- Written by maft-adapter {config["maft_adapter"]}; loaded as {model.source}
{figures}"""
