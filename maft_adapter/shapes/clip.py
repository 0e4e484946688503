"""The small CLIP of the embedded world: an ordinary open_clip model with a config and a word vocabulary of our own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load
from torch import Tensor

from ..checkpoint import load_mask_aware
from .scenes import COLORS, MATERIALS, SHAPES, TEMPLATES, TONES

WEIGHTS = "small_clip.safetensors"
MASK_AWARE = "small_clip_mask_aware.safetensors"  # tower.safetensors of `maft-adapter demo`
CONTEXT_LENGTH = 32
_WORDS = sorted({*COLORS, *SHAPES, *TONES, *MATERIALS, "and", *" ".join(TEMPLATES).replace("{}", "").split()})
_START, _END = len(_WORDS) + 1, len(_WORDS) + 2  # 0 pads; open_clip pools the text at the greatest id


def create_clip(patch_dropout: float = 0.0) -> Any:
    """The small CLIP with random weights: ViT of 12 blocks, width 64, patch 8, made for 64x64 pixels; D = 64.

    Args:
        patch_dropout: share of the patches that a training step leaves out, as FLIP does.

    Returns:
        `open_clip.CLIP`; logit_scale starts at 1 / 0.07 and is trained, as in CLIP.
    """
    vision = CLIPVisionCfg(layers=12, width=64, head_width=32, patch_size=8, image_size=64, patch_dropout=patch_dropout)
    text = CLIPTextCfg(context_length=CONTEXT_LENGTH, vocab_size=_END + 1, width=64, heads=2, layers=2)
    return CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)


def load_clip(path: str | Path | None = None, mask_aware: bool = False) -> Any:
    """The small CLIP with the shipped weights, or those of another run of `maft_adapter.shapes.train_clip`.

    Args:
        path: a safetensors file; by default the shipped one, whose SHA-256 has to agree with the file beside it.
        mask_aware: with the shipped tower that `maft-adapter demo` fine-tuned, mask-aware, in place of the frozen one.

    Returns:
        `open_clip.CLIP` in eval mode.

    Raises:
        ValueError: a shipped file is damaged; the shipped mask-aware tower for another run's CLIP.

    Example:
        >>> load_clip().visual.output_dim
        64
        >>> load_clip(mask_aware=True).visual.start_layer
        0
    """
    if path is not None and mask_aware:
        raise ValueError(f"the shipped mask-aware tower is not the one of {path}; fine-tune that one")
    model = create_clip()
    model.load_state_dict(load(_shipped(WEIGHTS).read_bytes() if path is None else Path(path).read_bytes()))
    if mask_aware:
        load_mask_aware(model.visual, _shipped(MASK_AWARE))
    return model.eval()


def _shipped(name: str) -> Path:
    """The file of this package, if its SHA-256 is the one beside it."""
    path = Path(__file__).parent / name
    wanted = path.with_suffix(".safetensors.sha256").read_text().split()[0]
    if hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        raise ValueError(f"{name} does not have the SHA-256 {wanted}; install maft-adapter again")
    return path


def tokenize(texts: str | Sequence[str]) -> Tensor:
    """Words to ids, as `open_clip.get_tokenizer` does for real models.

    Returns:
        (len(texts), 32) int64: start, words, end, zeros.

    Raises:
        ValueError: a word is not in the vocabulary, or the text is longer than the context.

    Example:
        >>> tokenize(["red ball", "a picture of pale sand"]).shape
        torch.Size([2, 32])
    """
    texts = [texts] if isinstance(texts, str) else texts
    ids = torch.zeros(len(texts), CONTEXT_LENGTH, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        words = text.lower().replace(".", "").split()
        unknown = [word for word in words if word not in _WORDS]
        if unknown:
            raise ValueError(f"the small CLIP's words are {_WORDS}; {text!r} also has {unknown}")
        if len(words) > CONTEXT_LENGTH - 2:
            raise ValueError(f"{text!r} has {len(words)} words; the context holds {CONTEXT_LENGTH - 2}")
        row[: len(words) + 2] = torch.tensor([_START, *(_WORDS.index(word) + 1 for word in words), _END])
    return ids


def preprocess(images: NDArray[np.uint8]) -> Tensor:
    """Pictures to the model's input: scaled to [0, 1] and normalised with CLIP's mean and standard deviation.

    Args:
        images: (..., H, W, 3) uint8 RGB in [0, 255].

    Returns:
        (..., 3, H, W) float32.

    Example:
        >>> preprocess(np.zeros((96, 96, 3), np.uint8)).shape
        torch.Size([3, 96, 96])
    """
    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    return ((torch.from_numpy(images).float() / 255 - mean) / std).movedim(-1, -3).contiguous()
