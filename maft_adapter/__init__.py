"""MAFT: mask-aware CLIP. Embeddings and labels of mask proposals, all in one forward pass, without new parameters.

Glossary: B images, N mask proposals an image, C classes, K ground-truth classes present in an image, h x w the token
grid, H x W the mask's own size, D the embedding's width, L the start layer.
"""

from ._version import __version__
from .adapt import (
    encode_features,
    encode_image,
    encode_masks,
    encode_masks_and_image,
    is_mask_aware,
    make_mask_aware,
    restore,
    valid_masks,
)
from .checkpoint import load_mask_aware, save_mask_aware
from .features import ImageFeatures
from .freezing import trainable_parameters
from .losses import MAFTLoss

__all__ = [
    "ImageFeatures",
    "MAFTLoss",
    "__version__",
    "encode_features",
    "encode_image",
    "encode_masks",
    "encode_masks_and_image",
    "is_mask_aware",
    "load_mask_aware",
    "make_mask_aware",
    "restore",
    "save_mask_aware",
    "trainable_parameters",
    "valid_masks",
]
