"""From mask proposals as users have them to a float attention bias on the token grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def check_masks(masks: Tensor, batch: int, device: torch.device | None = None) -> None:
    """Raise unless `masks` are proposals for `batch` images: (B, N, H, W), bool or float in [0, 1].

    Raises:
        TypeError: not a tensor, or neither bool nor floating point.
        ValueError: wrong shape or batch, another device than `device`, NaN, or values outside [0, 1] (logits).
    """
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks are a (B, N, H, W) tensor, got {type(masks).__name__}")
    if masks.dtype != torch.bool and not masks.is_floating_point():
        raise TypeError(f"masks are bool or float in [0, 1], got {masks.dtype}; 0 and 1 need .bool()")
    if masks.ndim != 4 or 0 in masks.shape[2:]:
        raise ValueError(f"masks are (B, N, H, W), got {tuple(masks.shape)}; one image's need masks[None]")
    if masks.shape[0] != batch:
        raise ValueError(f"masks are for {masks.shape[0]} images, but {batch} images were given")
    if device is not None and masks.device != device:
        raise ValueError(f"masks are on {masks.device}, images on {device}; call masks.to(images.device)")
    if masks.is_floating_point():
        check_unit_range("masks", masks, "logits need .sigmoid(), and masks are without NaN")


def check_unit_range(name: str, values: Tensor, cure: str) -> None:
    """Raise ValueError, which says what to do (`cure`), unless all values are in [0, 1] and none is NaN."""
    # A graph cannot branch on values, so a compiled model relies on the eager calls before it.
    if values.numel() and not torch.compiler.is_compiling():
        low, high = (float(extreme) for extreme in torch.aminmax(values.detach()))
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}: {cure}")


def masks_on_grid(masks: Tensor, grid: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Which patches each proposal contains, the authors' way: bilinear, align_corners=False, then >= threshold.

    Args:
        masks: (B, N, H, W) bool or float in [0, 1], 1 = inside, any H x W over the same picture as the image.
        grid: height and width of the token grid (h, w).
        threshold: in (0, 1].

    Returns:
        (B, N, h, w) bool. A small mask may vanish, which `valid_masks` reports.

    Example:
        >>> masks = torch.zeros(1, 2, 8, 8)
        >>> masks[0, 0, :, :4] = 1
        >>> masks_on_grid(masks, (2, 2)).int().tolist()
        [[[[1, 0], [1, 0]], [[0, 0], [0, 0]]]]
    """
    if masks.shape[1] == 0:
        return masks.new_zeros((masks.shape[0], 0, *grid), dtype=torch.bool)
    # One channel at a time torch resizes without a copy, and in portions bool masks never exist as floats all at once;
    # otherwise this step would need more memory than the whole encoder. A compiled graph has to hold for any N.
    single = masks.flatten(0, 1)[:, None]  # (B*N, 1, H, W)
    inside = [
        F.interpolate(part if part.is_floating_point() else part.float(), grid, mode="bilinear") >= threshold
        for part in ((single,) if torch.compiler.is_compiling() else single.split(16))
    ]
    return torch.cat(inside).view(*masks.shape[:2], *grid)  # (B, N, h, w)


def attention_bias(masks: Tensor, grid: tuple[int, int], dtype: torch.dtype, threshold: float = 0.5) -> Tensor:
    """Flat(M) of Eq. 2 as an additive bias, one for all heads and blocks.

    Args:
        masks, grid, threshold: as `masks_on_grid` takes them.
        dtype: of the attention logits.

    Returns:
        (B, 1, N, h*w): 0 inside the mask, -inf outside.

    Example:
        >>> attention_bias(torch.ones(1, 3, 8, 8), (2, 2), torch.float32).shape
        torch.Size([1, 1, 3, 4])
    """
    inside = masks_on_grid(masks, grid, threshold).flatten(2)[:, None]  # (B, 1, N, h*w)
    bias = torch.zeros(inside.shape, dtype=dtype, device=masks.device)
    return bias.masked_fill(~inside, float("-inf"))


def mean_weights(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Weights of a mean over each mask: the share of every cell that lies inside, made to sum to 1.

    Args:
        masks, grid: as `masks_on_grid` takes them.

    Returns:
        (B, N, h*w) float32. An empty mask has equal weights: what is left of it is the image as a whole.

    Example:
        >>> masks = torch.zeros(1, 2, 4, 4)
        >>> masks[0, 0, :, :3] = 1
        >>> mean_weights(masks, (1, 2))
        tensor([[[0.6667, 0.3333],
                 [0.5000, 0.5000]]])
    """
    share = F.adaptive_avg_pool2d(masks.float(), grid).flatten(2)  # (B, N, h*w)
    total = share.sum(-1, keepdim=True)  # (B, N, 1)
    return torch.where(total > 0, share / torch.where(total > 0, total, 1), 1 / share.shape[-1])


def pad_masks(masks: Sequence[Tensor]) -> Tensor:
    """Ragged proposals -> (B, max N, H, W), filled up with empty masks, which change nothing for the others.

    Args:
        masks: one (N_i, H, W) tensor an image, all of the same H x W and dtype.

    Raises:
        TypeError: not a sequence of tensors.
        ValueError: no images, or an entry that is not (N_i, H, W) of the first one's H x W and dtype.

    Example:
        >>> pad_masks([torch.ones(1, 4, 4), torch.ones(3, 4, 4)]).shape
        torch.Size([2, 3, 4, 4])
    """
    if not isinstance(masks, Sequence) or not all(isinstance(mask, Tensor) for mask in masks):
        raise TypeError(f"masks are a (B, N, H, W) tensor or a list of (N_i, H, W), got {masks!r:.60}")
    if not masks:
        raise ValueError("masks are an empty list; give one (N_i, H, W) tensor an image")
    for i, mask in enumerate(masks):
        if mask.ndim != 3 or mask.shape[1:] != masks[0].shape[1:] or mask.dtype != masks[0].dtype:
            raise ValueError(
                f"masks[{i}] is {tuple(mask.shape)} {mask.dtype}, masks[0] {tuple(masks[0].shape)} "
                f"{masks[0].dtype}; expected (N_i, H, W) of one H x W and one dtype"
            )
    most = max(len(mask) for mask in masks)
    return torch.stack([F.pad(mask, (0, 0, 0, 0, 0, most - len(mask))) for mask in masks])  # (B, max N, H, W)
