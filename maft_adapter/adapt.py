"""Make a CLIP image tower mask-aware in place, undo it, and encode mask proposals with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masks import check_masks, masks_on_grid, pad_masks
from .towers import FAMILIES, MaskAware, MaskAwareTower, restore_class

Tower = TypeVar("Tower", bound=nn.Module)


def make_mask_aware(visual: Tower, start_layer: int = 8) -> Tower:
    """Turn a CLIP image tower into the paper's IP-CLIP encoder (Sec. 4.1), in place, without new parameters.

    Returns the same object. Afterwards:

    - `visual(images)` is bit-identical to before, and images of other sizes work, too.
    - `visual(images, masks)` gives one embedding a proposal, (B, N, D).
    - `visual(images, masks, with_image=True)` gives the proposals' embeddings (B, N, D) and the plain image
      embedding (B, D), and runs the blocks before `start_layer` once for both.

    Images are (B, 3, H, W) as the tower always took them, of any H x W that the patch size divides (the
    position embedding is interpolated as the authors do: bicubic, align_corners=True). Masks are
    (B, N, H', W') bool or float in [0, 1], N >= 0, over the same picture at any resolution.
    A second call only changes `start_layer`.

    Args:
        visual: `clip.visual`, a ViT with a class token: open_clip's `VisionTransformer` or OpenAI's layout.
        start_layer: L in 0..depth: blocks before it run as they always did, and from block L on class token n
            sees itself and the patches of mask n. 8 of 12 for ViT-B (Table 4e), 16 of 24 for ViT-L.

    Raises:
        TypeError: not an image tower (a whole CLIP, a compiled, scripted or distributed wrapper).
        ValueError: an unsupported tower or `start_layer`; nothing has been changed then.

    Example:
        >>> import open_clip
        >>> clip = open_clip.create_model("ViT-B-32")
        >>> visual = make_mask_aware(clip.visual.eval(), start_layer=8)
        >>> with torch.no_grad():
        ...     visual(torch.randn(1, 3, 224, 224), torch.ones(1, 5, 224, 224)).shape
        torch.Size([1, 5, 512])
    """
    _refuse_wrappers(visual)
    family = next((family for family in FAMILIES if family.recognise(visual)), None)
    if family is None:
        name, supported = (
            type(visual).__name__,
            "open_clip's VisionTransformer and OpenAI's (class token) are",
        )
        raise ValueError(f"{name} is not supported yet; {supported}")
    family.check(visual, start_layer)
    if is_mask_aware(visual):
        restore(visual)
    family.patch(visual, start_layer)
    return visual


def restore(visual: Tower) -> Tower:
    """Undo `make_mask_aware` exactly, in place: same classes, same attributes, same outputs.

    Raises ValueError if `visual` is not mask-aware.

    Example:
        >>> import open_clip
        >>> visual = open_clip.create_model("ViT-B-32").visual
        >>> type(restore(make_mask_aware(visual))).__name__
        'VisionTransformer'
    """
    if not is_mask_aware(visual):
        raise ValueError(f"{type(visual).__name__} is not mask-aware: there is nothing to restore")
    for module in visual.modules():
        if isinstance(module, MaskAware):
            restore_class(module)
    return visual


def is_mask_aware(module: nn.Module) -> bool:
    """Whether `module` is a tower that `make_mask_aware` has patched.

    Example:
        >>> is_mask_aware(nn.Linear(2, 2))
        False
    """
    return isinstance(module, MaskAwareTower)


@overload
def encode_masks(clip_model: Any, images: Tensor, masks: Tensor, normalize: bool = False) -> Tensor: ...
@overload
def encode_masks(clip_model: Any, images: Tensor, masks: Sequence[Tensor], normalize: bool = False) -> list[Tensor]: ...
def encode_masks(
    clip_model: Any, images: Tensor, masks: Tensor | Sequence[Tensor], normalize: bool = False
) -> Tensor | list[Tensor]:
    """Embed mask proposals as `encode_image` embeds images, with a CLIP model whose `.visual` is mask-aware.

    Args:
        clip_model: open_clip or OpenAI CLIP, patched by `make_mask_aware(clip_model.visual)`.
        images: (B, 3, H, W) normalised as the model wants them.
        masks: (B, N, H', W') bool or float in [0, 1], or a list of B tensors (N_i, H', W').
        normalize: scale embeddings to unit length.

    Returns:
        (B, N, D), or a list of B tensors (N_i, D) if `masks` is a list. A proposal that contains no patch
        (see `valid_masks`) gets a finite embedding that says nothing about its region.

    Raises:
        TypeError, ValueError: the model is not mask-aware, or images or masks are not as above.

    Example:
        >>> import open_clip
        >>> clip = open_clip.create_model("ViT-B-32").eval()
        >>> _ = make_mask_aware(clip.visual)
        >>> masks = [torch.ones(2, 64, 64), torch.ones(3, 64, 64)]
        >>> with torch.no_grad():
        ...     [tuple(e.shape) for e in encode_masks(clip, torch.randn(2, 3, 224, 224), masks)]
        [(2, 512), (3, 512)]
    """
    padded = masks if isinstance(masks, Tensor) else pad_masks(masks)  # (B, N, H', W')
    embeddings = _tower(clip_model)(images, padded)  # (B, N, D)
    return _unpad(F.normalize(embeddings, dim=-1) if normalize else embeddings, masks)


def encode_masks_and_image(
    clip_model: Any, images: Tensor, masks: Tensor | Sequence[Tensor], normalize: bool = False
) -> tuple[Tensor | list[Tensor], Tensor]:
    """`encode_masks` and `encode_image` of the same images in one pass, which runs the blocks before L once.

    Self-distillation (Eq. 8) needs both. Arguments and errors as `encode_masks`; returns its result and the
    plain image embeddings (B, D).

    Example:
        >>> import open_clip
        >>> clip = open_clip.create_model("ViT-B-32").eval()
        >>> _ = make_mask_aware(clip.visual)
        >>> with torch.no_grad():
        ...     out = encode_masks_and_image(clip, torch.randn(1, 3, 224, 224), torch.ones(1, 2, 64, 64))
        >>> [tuple(embeddings.shape) for embeddings in out]
        [(1, 2, 512), (1, 512)]
    """
    padded = masks if isinstance(masks, Tensor) else pad_masks(masks)  # (B, N, H', W')
    embeddings, image = _tower(clip_model)(images, padded, with_image=True)  # (B, N, D), (B, D)
    if normalize:
        embeddings, image = F.normalize(embeddings, dim=-1), F.normalize(image, dim=-1)
    return _unpad(embeddings, masks), image


def valid_masks(visual: Any, images: Tensor, masks: Tensor) -> Tensor:
    """Which proposals contain a patch of the token grid -> (B, N) bool; the embeddings of others say nothing.

    Args:
        visual: a mask-aware tower.
        images: (B, 3, H, W); only the shape is read.
        masks: (B, N, H', W') bool or float in [0, 1].

    Raises:
        TypeError, ValueError: `visual` is not mask-aware, or images or masks are not as above.

    Example:
        >>> import open_clip
        >>> visual = make_mask_aware(open_clip.create_model("ViT-B-32").visual)
        >>> valid_masks(visual, torch.zeros(1, 3, 224, 224), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1))
        tensor([[ True, False]])
    """
    if not is_mask_aware(visual):
        raise TypeError(f"{type(visual).__name__} is not mask-aware; call make_mask_aware on it first")
    check_masks(masks, batch=len(images))
    return masks_on_grid(masks, visual.token_grid(images)).flatten(2).any(-1)


def _tower(clip_model: Any) -> Any:
    visual = getattr(clip_model, "visual", None)
    if visual is None or not is_mask_aware(visual):
        raise TypeError("clip_model.visual is not mask-aware; call make_mask_aware(clip_model.visual) first")
    return visual


def _unpad(embeddings: Tensor, masks: Tensor | Sequence[Tensor]) -> Any:
    if isinstance(masks, Tensor):
        return embeddings
    return [embedding[: len(mask)] for embedding, mask in zip(embeddings, masks, strict=True)]


def _refuse_wrappers(visual: Any) -> None:
    name = type(visual).__name__
    if not isinstance(visual, nn.Module):
        raise TypeError(f"expected a CLIP image tower (a torch.nn.Module), got {name}")
    if isinstance(visual, torch.jit.ScriptModule):
        raise TypeError(f"{name} is TorchScript, whose code is fixed; patch the eager model (jit=False)")
    if hasattr(visual, "_orig_mod"):
        raise TypeError(f"{name} is a torch.compile wrapper; patch before compiling, or pass its ._orig_mod")
    if isinstance(visual, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TypeError(f"{name} is a parallel wrapper; patch before wrapping, or pass its .module")
    if isinstance(getattr(visual, "visual", None), nn.Module):
        raise TypeError(f"{name} is a whole CLIP model; pass its image tower: make_mask_aware(model.visual)")
