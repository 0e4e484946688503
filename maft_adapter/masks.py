"""From mask proposals as users have them to what acts on the token grid: an attention bias, or weights of a mean.

The token grid need not see the whole picture: a stride that does not divide the image leaves pixels at the right and
at the bottom over. `seen` is the share of height and width that it does see, and masks are read only there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = (1.0, 1.0)
# Floats that whole masks may take up at once where every pixel of them counts: 64 MiB.
_FLOATS = 2**24


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
    # A graph cannot branch on values, so a compiled model relies on the eager calls before it; meta has none.
    if values.numel() and not torch.compiler.is_compiling() and not values.is_meta:
        low, high = (float(extreme) for extreme in torch.aminmax(values.detach()))
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}: {cure}")


def masks_on_grid(
    masks: Tensor, grid: tuple[int, int], threshold: float = 0.5, seen: tuple[float, float] = WHOLE
) -> Tensor:
    """Which patches each proposal contains, the authors' way: bilinear, align_corners=False, then >= threshold.

    Bilinear sampling reads at most two rows and two columns of a mask for each cell. Only these are gathered, so the
    cost is that of the grid, whatever the size of the masks.

    Args:
        masks: (B, N, H, W) bool or float in [0, 1], 1 = inside, any H x W over the same picture as the image.
        grid: height and width of the token grid (h, w).
        threshold: in (0, 1].
        seen: share of the picture's height and width that the grid covers, from the top left corner, in (0, 1].

    Returns:
        (B, N, h, w) bool. A small mask may vanish, which `valid_masks` reports.

    Example:
        >>> masks = torch.zeros(1, 2, 8, 8)
        >>> masks[0, 0, :, :4] = 1
        >>> masks_on_grid(masks, (2, 2)).int().tolist()
        [[[[1, 0], [1, 0]], [[0, 0], [0, 0]]]]
    """
    dtype = torch.promote_types(masks.dtype, torch.float32)
    (rows, down), (columns, right) = (
        _neighbours(size, cells, share, dtype, masks.device)
        for size, cells, share in zip(masks.shape[2:], grid, seen, strict=True)
    )
    read = masks[:, :, rows.flatten()[:, None], columns.flatten()].to(dtype)  # (B, N, 2h, 2w)
    read = read.unflatten(3, (2, -1)).unflatten(2, (2, -1))  # (B, N, 2, h, 2, w)
    # Not as a sum of two products: that would round what is 1 on both sides below a threshold of 1.
    read = torch.lerp(read[..., 0, :], read[..., 1, :], right)  # (B, N, 2, h, w)
    return torch.lerp(read[:, :, 0], read[:, :, 1], down[:, None]) >= threshold


def _neighbours(size: int, cells: int, share: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels (2, cells) between which each cell's centre lies, and how far (cells,), as `F.interpolate` has them."""
    scale = torch.full((), size * share, dtype=dtype, device=device) / cells
    centre = (scale * (torch.arange(cells, dtype=dtype, device=device) + 0.5) - 0.5).clamp(min=0)  # (cells,)
    first = centre.floor().clamp(max=size - 1)  # (cells,)
    return torch.stack([first, (first + 1).clamp(max=size - 1)]).long(), (centre - first).clamp(max=1)


def attention_bias(
    masks: Tensor,
    grid: tuple[int, int],
    dtype: torch.dtype,
    threshold: float = 0.5,
    seen: tuple[float, float] = WHOLE,
) -> Tensor:
    """Flat(M) of Eq. 2 as an additive bias, one for all heads and blocks.

    Args:
        masks, grid, threshold, seen: as `masks_on_grid` takes them.
        dtype: of the attention logits.

    Returns:
        (B, 1, N, h*w): 0 inside the mask, -inf outside.

    Example:
        >>> attention_bias(torch.ones(1, 3, 8, 8), (2, 2), torch.float32).shape
        torch.Size([1, 1, 3, 4])
    """
    inside = masks_on_grid(masks, grid, threshold, seen).flatten(2)[:, None]  # (B, 1, N, h*w)
    bias = torch.zeros(inside.shape, dtype=dtype, device=masks.device)
    return bias.masked_fill(~inside, float("-inf"))


def mean_weights(masks: Tensor, grid: tuple[int, int], seen: tuple[float, float] = WHOLE) -> Tensor:
    """Weights of a mean over each mask: the share of every cell that lies inside, made to sum to 1.

    The share is exact for any H x W: a pixel across the border of two cells counts for each with the part that lies
    in it. Beyond its input and its result this takes 64 MiB or one mask as float, whichever is more.

    Args:
        masks, grid, seen: as `masks_on_grid` takes them.

    Returns:
        (B, N, h*w) float32 or wider. An empty mask has equal weights: what is left of it is the image as a whole.

    Example:
        >>> masks = torch.zeros(1, 2, 4, 4)
        >>> masks[0, 0, :, :3] = 1
        >>> mean_weights(masks, (1, 2))
        tensor([[[0.6667, 0.3333],
                 [0.5000, 0.5000]]])
    """
    dtype = torch.promote_types(masks.dtype, torch.float32)
    rows, columns = (
        _overlap(size, cells, share, masks.device).to(dtype)
        for size, cells, share in zip(masks.shape[2:], grid, seen, strict=True)
    )
    portion = max(1, _FLOATS // (masks.shape[0] * masks[0, 0].numel())) if masks.shape[1] else 1
    portions = (masks,) if torch.compiler.is_compiling() else masks.split(portion, dim=1)
    with torch.autocast(masks.device.type, enabled=False):
        share = torch.cat([rows @ (part.to(dtype) @ columns.T) for part in portions], dim=1)  # (B, N, h, w)
    share = share.flatten(2)  # (B, N, h*w)
    total = share.sum(-1, keepdim=True)  # (B, N, 1)
    return torch.where(total > 0, share / torch.where(total > 0, total, 1), 1 / share.shape[-1])


def _overlap(size: int, cells: int, share: float, device: torch.device) -> Tensor:
    """How much of each pixel lies in each cell along one axis, (cells, size) float64."""
    edges = torch.arange(cells + 1, dtype=torch.float64, device=device) * (size * share / cells)  # (cells+1,)
    pixels = torch.arange(size, dtype=torch.float64, device=device)  # (size,)
    return (torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)).clamp(min=0)


def boxes_to_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes as mask proposals: a pixel is inside if its centre is.

    Args:
        boxes: (..., 4) XYXY in pixels, float or integer, the right and lower edges exclusive: (0, 0, W, H) is the
            whole picture. What reaches beyond the picture is left out.
        size: height and width (H, W) of the picture that the boxes are in.

    Returns:
        (..., H, W) bool; (N, H, W) for (N, 4).

    Raises:
        TypeError: `boxes` is not a numeric tensor.
        ValueError: another shape, NaN, or a box whose right or lower edge comes before its left or upper one, as XYWH
            boxes have.

    Example:
        >>> boxes_to_masks(torch.tensor([[1, 0, 3, 1]]), (2, 4)).int().tolist()
        [[[0, 1, 1, 0], [0, 0, 0, 0]]]
    """
    if not isinstance(boxes, Tensor) or boxes.dtype == torch.bool or boxes.is_complex():
        raise TypeError(f"boxes are a tensor of numbers (N, 4), got {getattr(boxes, 'dtype', type(boxes).__name__)}")
    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes are (N, 4) XYXY in pixels, got {tuple(boxes.shape)}")
    left, top, right, bottom = boxes.double().unbind(-1)  # (...) each
    wrong = ~((left <= right) & (top <= bottom))  # NaN compares False
    if wrong.any():
        raise ValueError(f"box {boxes[wrong][0].tolist()} is not XYXY: x1 <= x2 and y1 <= y2; XYWH needs x2 = x1 + w")
    y, x = (torch.arange(length, dtype=torch.float64, device=boxes.device) + 0.5 for length in size)  # (H,), (W,)
    rows = (top[..., None] <= y) & (y < bottom[..., None])  # (..., H)
    columns = (left[..., None] <= x) & (x < right[..., None])  # (..., W)
    return rows[..., :, None] & columns[..., None, :]


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
