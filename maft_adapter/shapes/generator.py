"""The mask generator of the embedded world: a small Mask2Former of transformers with a classifier of the seen classes.

It stands where the hosts of the paper have MaskFormer: soft masks and A^p. `mask2former:shapes` is its proposer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load

from ..extras import extra
from .clip import _shipped
from .scenes import SEEN

with extra("sam"):
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

WEIGHTS = "small_generator.safetensors"
_SIDE, _PATCH = 96, 3  # of the world's pictures and of the backbone's first grid
_STRIDE = _PATCH * 2**3  # of its last


def create_generator() -> Any:
    """The generator with random weights: a Swin of 5 blocks, a decoder of 3 layers, 20 queries, masks of 32x32.

    Returns:
        `transformers.Mask2FormerForUniversalSegmentation`, whose labels are the indices of `SEEN`.
    """
    backbone: dict[str, Any] = {
        "image_size": _SIDE, "patch_size": _PATCH, "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8],
        "window_size": 4, "drop_path_rate": 0.0, "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }  # fmt: skip
    options: dict[str, Any] = {
        "feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "encoder_layers": 1,
        "encoder_feedforward_dim": 128, "decoder_layers": 4, "dim_feedforward": 128, "num_attention_heads": 4,
        "num_queries": 20, "train_num_points": 512, "num_labels": len(SEEN),
    }  # fmt: skip
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=SwinConfig(**backbone), **options))


def load_generator(path: str | Path | None = None) -> Any:
    """The generator with the shipped weights, or those of another run of `maft_adapter.shapes.train_generator`.

    Args:
        path: a safetensors file; by default the shipped one, whose SHA-256 has to agree with the file beside it.

    Returns:
        `transformers.Mask2FormerForUniversalSegmentation` in eval mode. It takes what `image_processor` or `preprocess`
        makes of a picture; its labels are the indices of `SEEN`.

    Raises:
        ValueError: the shipped file is damaged; a file that is no generator's.

    Example:
        >>> load_generator().config.num_labels
        32
    """
    file = _shipped(WEIGHTS) if path is None else Path(path)
    # Not load_state_dict: transformers 4 and 5 name some weights differently, and know each other's names.
    network: Any = Mask2FormerForUniversalSegmentation
    model, info = network.from_pretrained(
        None, config=create_generator().config, state_dict=load(file.read_bytes()), output_loading_info=True
    )
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise ValueError(f"{file} is no generator of this world, it lacks weights: {', '.join(missing[:3])} ...")
    return model.eval()


def image_processor() -> Any:
    """What makes the generator's input of a picture of any size: `transformers.Mask2FormerImageProcessor`.

    The shorter side becomes 96 pixels, as in this world, and the longer at most 384.

    Example:
        >>> import numpy as np
        >>> image_processor()(images=np.zeros((32, 64, 3), np.uint8), return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 96, 192])
    """
    return Mask2FormerImageProcessor(
        size={"shortest_edge": _SIDE, "longest_edge": 4 * _SIDE}, size_divisor=_STRIDE,
        image_mean=OPENAI_DATASET_MEAN, image_std=OPENAI_DATASET_STD,
    )  # fmt: skip
