"""The baselines of the paper: every proposal becomes a sub-image of its own, classified by a frozen CLIP.

Notation: B images, N mask proposals an image, H x W the images' and masks' size, D the embedding's width.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from .masks import check_masks

__all__ = ["MergeMode", "encode_crops", "merge"]

MergeMode = Literal["mask", "crop", "mask_crop"]


def merge(images: Tensor, masks: Tensor, mode: MergeMode = "mask_crop", size: int | tuple[int, int] = 224) -> Tensor:
    """Make one sub-image of every proposal.

    - "mask": the whole picture, everything outside the mask filled;
    - "crop": the mask's bounding box with its context;
    - "mask_crop": the bounding box, everything outside the mask filled.

    The fill is 0, the mean colour of CLIP's training data after normalisation (as in ZegFormer). Boxes are cut out,
    then resized bilinearly (averaging where they shrink) without keeping their aspect ratio, so nothing beyond a box
    gets into its sub-image. An empty mask gives a sub-image of fill in every mode.

    Source: appendix A and Fig. 6 of the paper.

    Args:
        images: (B, 3, H, W) float, normalised with CLIP's mean and standard deviation.
        masks: (B, N, H, W) bool or float in [0, 1], inside where at least 0.5. N = 0 works.
        mode: the merge operation.
        size: height and width of the sub-images in pixels, one number if square.

    Returns:
        (B, N, 3, size, size) in the images' dtype. All N at once: to run many proposals through CLIP,
        `encode_crops` makes them batch by batch.

    Raises:
        TypeError: `images` is not a float tensor, or `masks` neither a bool nor a float tensor.
        ValueError: wrong or differing shapes, an empty batch, masks outside [0, 1], NaN or infinite pixels,
            an unknown mode, a size below 1.

    Example:
        >>> images = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
        >>> masks = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        >>> masks[..., 1, 1:3] = masks[..., 2, 1] = True
        >>> merge(images, masks, "crop", size=2)[0, 0, 0]
        tensor([[ 5.,  6.],
                [ 9., 10.]])
        >>> merge(images, masks, "mask_crop", size=2)[0, 0, 0]
        tensor([[5., 6.],
                [9., 0.]])
    """
    height_width = _check(images, masks, mode, size)
    crops = [_sub_image(image, mask, mode, height_width) for image, mask in _pairs(images, masks)]
    stacked = torch.stack(crops) if crops else images.new_empty(0, 3, *height_width)  # (B*N, 3, h, w)
    return stacked.view(*masks.shape[:2], 3, *height_width)  # (B, N, 3, h, w)


@torch.no_grad()
def encode_crops(
    clip_model: nn.Module,
    images: Tensor,
    masks: Tensor,
    mode: MergeMode = "mask_crop",
    size: int | tuple[int, int] | None = None,
    batch_size: int = 64,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Embed every proposal with a frozen CLIP: `merge`, then `encode_image` on each sub-image.

    No gradient flows to CLIP. Beside what CLIP itself needs, memory holds at most `batch_size` sub-images and what
    cutting out and resizing a single box takes, at most 60 bytes for each of its pixels.

    Source: the "frozen CLIP" pipeline, Sec. 3 and appendix A of the paper.

    Args:
        clip_model: a CLIP in eval mode with `encode_image` and `visual`, such as open_clip's or OpenAI's.
        images: (B, 3, H, W) float, as for `merge`, in a dtype that `encode_image` takes.
        masks: (B, N, H, W) bool or float in [0, 1], as for `merge`. N = 0 works.
        mode: the merge operation.
        size: of the sub-images in pixels; by default `clip_model.visual.image_size`, the tower's own.
        batch_size: sub-images per forward pass, over the proposals of all images together.
        normalize: scale the embeddings to unit length.

    Returns:
        (B, N, D) embeddings, and (B, N) bool, False where the mask is empty: that embedding is of plain fill
        and says nothing; pass the flags to `label_map`.

    Raises:
        TypeError: as `merge`.
        ValueError: as `merge`; a model in training mode, a `batch_size` below 1, or no `size` for a tower
            that has no `image_size`.

    Example:
        >>> import open_clip
        >>> clip_model = open_clip.CLIP(
        ...     embed_dim=8,
        ...     vision_cfg=open_clip.CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=8, image_size=16),
        ...     text_cfg=open_clip.CLIPTextCfg(layers=1, width=16, heads=2),
        ... ).eval()
        >>> masks = torch.zeros(1, 2, 20, 30)
        >>> masks[:, 0, 5:15, 10:] = 1
        >>> embeddings, valid = encode_crops(clip_model, torch.randn(1, 3, 20, 30), masks)
        >>> embeddings.shape, valid
        (torch.Size([1, 2, 8]), tensor([[ True, False]]))
    """
    visual = cast(nn.Module, clip_model.visual)
    if size is None:
        size = cast("int | tuple[int, int] | None", getattr(visual, "image_size", None))
        if size is None:
            raise ValueError("clip_model.visual has no image_size: pass its input size, such as size=224")
    height_width = _check(images, masks, mode, size)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if visual.training:
        # Batch statistics would change the frozen model, and dropout would make the result random.
        raise ValueError("the frozen CLIP is in training mode: call clip_model.eval() first")

    def encode(sub_images: Tensor) -> Tensor:
        output = cast(Any, clip_model).encode_image(sub_images)
        return output[0] if isinstance(output, tuple) else output  # open_clip's with output_tokens

    batch, num_proposals = masks.shape[:2]
    proposals = _pairs(images, masks)
    embeddings = []
    for start in range(0, len(proposals), batch_size):
        chunk = proposals[start : start + batch_size]
        crops = torch.stack([_sub_image(image, mask, mode, height_width) for image, mask in chunk])  # (K, 3, h, w)
        embeddings.append(encode(crops))  # (K, D)
    if not embeddings:
        # Some towers can't reshape an empty batch; one blank sub-image tells D.
        embeddings = [encode(images.new_zeros(1, 3, *height_width))[:0]]
    encoded = torch.cat(embeddings)  # (B*N, D)
    if normalize:
        encoded = F.normalize(encoded, dim=-1)
    valid = masks.amax((2, 3)) >= 0.5  # (B, N)
    return encoded.view(batch, num_proposals, encoded.shape[1]), valid


def _pairs(images: Tensor, masks: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each of the B*N masks (H, W) with its image (3, H, W); no copies."""
    return [(image, mask) for image, of_image in zip(images, masks, strict=True) for mask in of_image]


def _sub_image(image: Tensor, mask: Tensor, mode: MergeMode, size: tuple[int, int]) -> Tensor:
    """One image (3, H, W) and one mask (H, W) -> (3, h, w)."""
    inside = mask >= 0.5  # (H, W)
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    if not len(rows):
        return image.new_zeros(3, *size)
    if mode != "mask":
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        image, inside = image[(slice(None), *box)], inside[box]  # (3, H', W') and (H', W')
    # float32: torchvision has no bfloat16 kernel on the CPU, and float16 can't place samples to the pixel.
    picture = image.to(torch.promote_types(image.dtype, torch.float32))
    if mode != "crop":
        picture = picture.masked_fill(~inside, 0)
    height, width = inside.shape
    whole = picture.new_tensor([[0, 0, 0, width, height]])  # of picture 0, XYXY in pixels
    crop: Tensor = roi_align(picture[None], whole, size, aligned=True)[0]  # (3, h, w)
    return crop.to(image.dtype)


def _check(images: Tensor, masks: Tensor, mode: str, size: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a float tensor normalised with CLIP's mean and std, got {given}")
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images must be (B, 3, H, W) with B, H, W at least 1, got {tuple(images.shape)}")
    check_masks(masks, len(images))
    if masks.shape[2:] != images.shape[2:]:
        raise ValueError(
            f"masks must have the images' H x W, {tuple(images.shape[2:])}, got {tuple(masks.shape[2:])}: "
            "resize the masks to the images"
        )
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinite values")
    if mode not in get_args(MergeMode):
        raise ValueError(f"mode must be one of {get_args(MergeMode)}, got {mode!r}")
    height_width = (size, size) if isinstance(size, int) else tuple(size)
    if len(height_width) != 2 or min(height_width) < 1:
        raise ValueError(f"size must be a positive number or (height, width), got {size!r}")
    return height_width[0], height_width[1]
