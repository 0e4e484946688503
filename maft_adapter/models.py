"""A mask-aware CLIP by its name: the embedded one, or any of open_clip's or transformers'."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .adapt import is_mask_aware, make_mask_aware
from .checkpoint import load_mask_aware, load_visual
from .extras import extra
from .towers import class_token
from .towers.blocks import ProposalBlock

__all__ = ["Model", "image_tower", "load_model", "smallest_side", "weights_digest"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEMPLATES = ("a photo of a {}.",)
WORLD_TEMPLATES = ("a picture of {}", "a photo of {}", "{}")  # as the embedded CLIP's captions were
Triple = tuple[float, float, float]


class Model(NamedTuple):
    """A CLIP that is ready for masks, and what one has to know to feed it.

    Attributes:
        clip: the whole model, in eval mode, its image tower mask-aware.
        tokenizer: as `text_classifier` takes it.
        mean, std: of the model's images, a number in [0, 1] for red, green and blue.
        size: side in pixels of the square that pictures are resized to unless told otherwise: 480, as in the paper; 96
            for the embedded CLIP, whose world has that size.
        multiple: what the sides of its images are multiples of, the tower's patch or stride.
        class_names: the classes of the embedded world; None for others, which know all words.
        templates: prompts that suit the model.
        logit_scale: factor of the cosine similarities in the softmax of A^c.
        source: all that embeddings depend on besides picture and masks, in words, a digest of the weights included.
    """

    clip: Any
    tokenizer: Any
    mean: Triple
    std: Triple
    size: int
    multiple: int
    class_names: tuple[str, ...] | None
    templates: tuple[str, ...]
    logit_scale: float
    source: str


def load_model(
    name: str | None = None,
    pretrained: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    start_layer: int | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Model:
    """Load a CLIP by its name and make its image tower mask-aware.

    Args:
        name: None for the embedded CLIP of `maft_adapter.shapes`, fine-tuned by its demo; a model of open_clip, such as
            "ViT-B-16", "hf-hub:OWNER/NAME" or "local-dir:FOLDER"; else a name on the Hugging Face hub or a folder, such
            as "openai/clip-vit-base-patch16", of a CLIP that transformers loads.
        pretrained: for a plain name of open_clip, and only there: a tag, such as "openai", or a file of weights; or
            "random" for random weights, always the same ones, for trials. QuickGELU is put in where a tag wants it; a
            file does not tell, so its name has to end in "-quickgelu" where it was trained with it.
        checkpoint: a fine-tuned image tower that replaces the model's: `save_mask_aware`'s, with its settings, or any
            that `load_visual` reads, such as the authors' released ones.
        start_layer: L, for towers with a class token. By default that of the checkpoint, or two thirds of the depth,
            as in the paper (8 of 12) and the authors' code (16 of 24), and 0 for the embedded CLIP.
        device: where the model lies.
        precision: of the image tower: "fp32", "bf16" or "fp16". The text encoder stays in float32.

    Returns:
        See `Model`.

    Raises:
        ValueError: an unknown name, device or precision, weights that are missing or given twice, a checkpoint of
            another tower, a start layer that the tower does not have, or a model that can't be made mask-aware.
        OSError: the model can't be loaded: no network, damaged or missing files.

    Example:
        >>> model = load_model()
        >>> model.class_names[:2], model.size, model.multiple
        (('red ball', 'yellow ball'), 96, 8)
        >>> load_model("ViT-B-32", "random").source
        'ViT-B-32 random, start layer 8, fp32, weights ...'
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ValueError(f"device {str(device)!r} can't be used here: {error}") from error
    size, class_names = 480, None
    templates: tuple[str, ...] = TEMPLATES
    if name is None:
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        from .shapes import CLASSES, load_clip, tokenize

        if pretrained is not None:
            raise ValueError(f"pretrained is {pretrained!r} without a model; name one, such as ViT-B-16")
        clip, tokenizer, mean, std = load_clip(mask_aware=True), tokenize, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
        size, class_names, templates = 96, CLASSES, WORLD_TEMPLATES
    elif is_of_open_clip(name):
        clip, tokenizer = _open_clip(name, pretrained)
        mean, std = clip.visual.preprocess_cfg["mean"], clip.visual.preprocess_cfg["std"]
    else:
        clip, tokenizer, mean, std = _transformers(name, pretrained)
    clip.eval()
    tower = clip.visual if hasattr(clip, "visual") else clip.vision_model
    # Where open_clip keeps them, so that whoever has the model has them.
    tower.preprocess_cfg = {**getattr(tower, "preprocess_cfg", {}), "mean": tuple(mean), "std": tuple(std)}

    _patch(tower, checkpoint, start_layer)
    digest = weights_digest(clip)
    for part in (tower, getattr(clip, "visual_projection", None)):  # transformers keeps it beside the tower
        if part is not None:
            part.to(PRECISIONS[precision])
    clip.to(device)

    layer = getattr(tower, "start_layer", None)
    parts = [
        " ".join(filter(None, ("embedded CLIP" if name is None else name, pretrained))),
        f"checkpoint {Path(checkpoint).name}" if checkpoint else "",
        f"start layer {layer}" if layer is not None else "",
        precision,
        f"weights {digest}",
    ]
    return Model(
        clip, tokenizer, tuple(mean), tuple(std), size, smallest_side(tower), class_names, templates,
        float(clip.logit_scale.detach().exp()), ", ".join(filter(None, parts)),
    )  # fmt: skip


def image_tower(clip: Any) -> Any:
    """The mask-aware image tower inside a CLIP.

    Raises:
        TypeError: there is none.

    Example:
        >>> type(image_tower(load_model().clip)).__name__
        'VisionTransformer'
    """
    for module in clip.modules() if isinstance(clip, nn.Module) else ():
        if is_mask_aware(module):
            return module
    raise TypeError(f"{type(clip).__name__} has no mask-aware image tower; call make_mask_aware on its tower first")


def smallest_side(tower: Any) -> int:
    """What the sides of a mask-aware tower's images are multiples of: its patch or stride, or its only size.

    Example:
        >>> smallest_side(image_tower(load_model().clip))
        8
    """
    for side in range(1, 4096):
        try:
            tower.token_grid(torch.empty(1, 3, side, side, device="meta"))
        except ValueError:
            continue
        return side
    raise ValueError(f"{type(tower).__name__} takes no square images of less than 4096 pixels")


def is_of_open_clip(name: str) -> bool:
    """Whether open_clip loads a model of this name; if not, transformers does.

    Raises:
        ValueError: neither does.
    """
    import open_clip

    known = open_clip.list_models()
    if name.startswith(("hf-hub:", "local-dir:")) or name.replace("/", "-") in known:
        return True
    if "/" not in name and not Path(name).is_dir():
        near = ", ".join(difflib.get_close_matches(name, known, cutoff=0.5))
        raise ValueError(
            f"{name!r} is no model of open_clip ({f'near: {near}' if near else 'see open_clip.list_models()'}) and no "
            "folder; names on the Hugging Face hub are OWNER/NAME for transformers and hf-hub:OWNER/NAME for open_clip"
        )
    if (Path(name) / "open_clip_config.json").is_file():
        raise ValueError(f"{name} is a model of open_clip: write local-dir:{name}")
    return False


def _open_clip(name: str, pretrained: str | None) -> tuple[Any, Any]:
    import open_clip

    options: dict[str, Any] = {"require_pretrained": True}
    if name.startswith(("hf-hub:", "local-dir:")):
        if pretrained is not None:
            raise ValueError(f"pretrained is {pretrained!r}, but {name} comes with its weights: leave it out")
    else:
        name = name.replace("/", "-")
        tags = open_clip.list_pretrained_tags_by_model(name)
        choice = f"give pretrained= one of {', '.join(tags) or '(it has no tags)'}, a file, or random"
        if pretrained is None:
            raise ValueError(f"{name} has no weights yet: {choice}")
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        if pretrained == "random":
            options = {"pretrained_text": False}
        elif not tag and not Path(pretrained).is_file():
            raise ValueError(f"pretrained {pretrained!r} is neither a tag of {name} nor a file: {choice}")
        elif tag.get("quick_gelu"):
            options["force_quick_gelu"] = True
        options["pretrained"] = None if pretrained == "random" else pretrained
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return open_clip.create_model(name, **options), open_clip.get_tokenizer(name)
    except Exception as error:  # of any kind: the hub's, urllib's, pickle's, torch's ...
        raise OSError(f"{name} can't be loaded by open_clip: {error or repr(error)}") from error


def _transformers(name: str, pretrained: str | None) -> tuple[Any, Any, Triple, Triple]:
    with extra("sam"):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    if pretrained is not None:
        raise ValueError(f"pretrained is {pretrained!r}, but {name} comes with its weights: leave it out")
    try:
        clip, info = AutoModel.from_pretrained(name, output_loading_info=True)
        if not hasattr(clip, "get_text_features") or not hasattr(clip, "vision_model"):
            raise ValueError(f"a {type(clip).__name__} is no CLIP with a text encoder and a vision_model")
        # transformers makes up what the file lacks, at random; position_ids, which old files hold, are just counted.
        missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"its file lacks weights: {', '.join(missing[:3])}{more}; save or download all of it again"
            )
        images = AutoImageProcessor.from_pretrained(name)
        normalized = getattr(images, "do_normalize", True)
        mean, std = (images.image_mean, images.image_std) if normalized else ((0.0,) * 3, (1.0,) * 3)
        return clip.float(), AutoTokenizer.from_pretrained(name), mean, std
    except Exception as error:  # of any kind: the hub's, json's, safetensors' ...
        raise OSError(f"{name} can't be loaded by transformers: {error or repr(error)}") from error


def _patch(tower: Any, checkpoint: str | Path | None, start_layer: int | None) -> None:
    """Make the tower mask-aware with its checkpoint's weights, at the layer that is wanted or else the right one."""
    if checkpoint is not None and _saved_by_us(checkpoint):
        load_mask_aware(tower, checkpoint)
        saved = getattr(tower, "start_layer", None)
        if start_layer not in (None, saved):
            raise ValueError(f"start_layer is {start_layer}, but {checkpoint} was saved with {saved}: leave it out")
        return
    layer = start_layer
    if layer is None and is_mask_aware(tower):  # the embedded CLIP's
        layer = tower.start_layer
    elif layer is None and class_token.recognise(tower):
        make_mask_aware(tower, 0)
        layer = 2 * sum(isinstance(module, ProposalBlock) for module in tower.modules()) // 3
    settings: dict[str, Any] = {} if layer is None else {"start_layer": layer}
    make_mask_aware(tower, **settings)
    if checkpoint is not None:
        load_visual(tower, checkpoint)


def _saved_by_us(checkpoint: str | Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, framework="pt") as file:
            return "maft_adapter" in (file.metadata() or {})
    except (SafetensorError, OSError):  # load_visual says what it is instead
        return False


def weights_digest(clip: nn.Module) -> str:
    """Of all weights, so that what was computed with others is not taken for theirs."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in clip.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
