"""Make a CLIP image tower mask-aware in place, undo it, and encode mask proposals with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import ImageFeatures
from .masks import check_masks, pad_masks
from .towers import FAMILIES
from .towers.base import MaskAware, MaskAwareTower, mask_aware_modules, refuse_own_methods, restore_class
from .towers.layouts import INTERPOLATIONS

Tower = TypeVar("Tower", bound=nn.Module)

_PARALLEL = nn.parallel.DistributedDataParallel, nn.DataParallel


def make_mask_aware(
    clip_visual: Tower, start_layer: int = 8, *, interpolation: str = "maft", threshold: float = 0.5
) -> Tower:
    """Turn a CLIP image tower into the paper's IP-CLIP encoder (Sec. 4.1), in place, without new parameters.

    Returns the same object. Afterwards:

    - `visual(images)` is bit-identical to before at the tower's own image size, and other sizes work, too, with the
      `interpolation` below, also in hosts that had one of their own.
    - `visual(images, masks)` gives one embedding a proposal, (B, N, D).
    - `visual(images, masks, with_image=True)` gives the proposals' embeddings (B, N, D) and the plain image
      embedding (B, D), and runs what both share once.
    - `visual(features, masks)` asks masks of what `encode_features` has kept of images.

    Images are (B, 3, H, W) as the tower always took them, of any H x W that its patch or stride divides. Masks are
    (B, N, H', W') bool or float in [0, 1], N >= 0, over the same picture at any resolution. How a mask enters
    depends on the tower's family: class token (the paper's Sec. 4.1), learned query, attention pool (Sec. 5.5) or
    average; see the modules of `maft_adapter.towers`. A second call sets all settings anew: what it leaves out becomes
    the default again.

    With masks, the blocks of a class-token tower are called one by one, from the start layer on twice: with the patch
    tokens, which gives (patches, keys, values), and with the class tokens. Hooks on them fire each time. Modules that
    are computed around instead, the containers of the blocks and each block's attention, refuse masks while they
    have forward hooks or methods of their own.

    Blocks, pools and what is around them are proven before anything is changed: what this library computes from the
    parts of a block has to equal what the block itself computes, on a few random tokens.

    Args:
        clip_visual: `clip.visual` of an open_clip or OpenAI CLIP, or transformers' `CLIPVisionModel`,
            `CLIPVisionModelWithProjection` or `SiglipVisionModel`, or the `.vision_model` of a whole model of theirs.
        start_layer: L in 0..depth, for towers with a class token: blocks before it run as they always did, and from
            block L on class token n sees itself and the patches of mask n. 8 of 12 for ViT-B (Table 4e), 16 of 24
            for ViT-L.
        interpolation: of the position embedding, for images of another size than the tower's own. "maft" (bicubic,
            align_corners=True) is the authors' and the default, because their checkpoints and the paper's numbers
            need it; "open_clip" (antialias, align_corners=False) is what open_clip and timm do when they load
            weights for another size, for towers trained or fine-tuned that way.
        threshold: in (0, 1]: share of a token's cell from which on the mask contains it. Towers that average weigh
            every cell by its share instead and have none.

    Raises:
        TypeError: not an image tower (a whole CLIP, a compiled, scripted or distributed wrapper).
        ValueError: an unsupported tower or setting; nothing has been changed then.

    Example:
        >>> import open_clip
        >>> clip = open_clip.create_model("ViT-B-32")
        >>> visual = make_mask_aware(clip.visual.eval(), start_layer=8)
        >>> with torch.no_grad():
        ...     visual(torch.randn(1, 3, 224, 224), torch.ones(1, 5, 224, 224)).shape
        torch.Size([1, 5, 512])
    """
    _refuse_wrappers(clip_visual)
    name = type(clip_visual).__name__
    family = next((family for family in FAMILIES if family.recognise(clip_visual)), None)
    if family is None:
        raise ValueError(
            f"{name} is not supported: it has no class token, learned query, attention pool or average over a feature "
            "map that is known here"
        )
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation is {interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}, expected a number in (0, 1]")
    settings = {"start_layer": start_layer, "interpolation": interpolation, "threshold": threshold}
    for setting, default in (("start_layer", 8), ("threshold", 0.5)):
        if setting not in family.SETTINGS and settings[setting] != default:
            value = settings[setting]
            raise ValueError(f"{setting} is {value!r} but means nothing to {name}, which {family.POOLS}: leave it out")
    modules = mask_aware_modules(clip_visual)
    refuse_own_methods(clip_visual, "the tower")
    family.check(clip_visual, start_layer)
    for module in modules:
        restore_class(module)
    family.patch(clip_visual, start_layer)
    for module in clip_visual.modules():
        if isinstance(module, MaskAware):
            for setting in module.settings:
                setattr(module, setting, settings[setting])
    return clip_visual


def restore(visual: Tower) -> Tower:
    """Undo `make_mask_aware` exactly, in place: same classes, same attributes, same outputs.

    Raises ValueError if `visual` is not mask-aware, or if something else made a class out of one of ours (FSDP2, a
    parametrization): that has to be undone first. Nothing is changed then.

    Example:
        >>> import open_clip
        >>> visual = open_clip.create_model("ViT-B-32").visual
        >>> type(restore(make_mask_aware(visual))).__name__
        'VisionTransformer'
    """
    if not is_mask_aware(visual):
        raise ValueError(f"{type(visual).__name__} is not mask-aware: there is nothing to restore")
    for module in mask_aware_modules(visual):
        restore_class(module)
    return visual


def is_mask_aware(module: nn.Module) -> bool:
    """Whether `module` is a tower that `make_mask_aware` has patched.

    Example:
        >>> is_mask_aware(nn.Linear(2, 2))
        False
    """
    return isinstance(module, MaskAwareTower)


def encode_features(clip_model: Any, images: Tensor) -> ImageFeatures:
    """What images contribute to any mask, computed once, to ask masks of it at any time.

    From the start layer on, patch tokens see no proposal (Eq. 4), so this part of the work needs no mask. Asked of it,
    100 masks cost about a twentieth of a plain forward pass.

    Args:
        clip_model: as `encode_masks` takes it.
        images: (B, 3, H, W) normalised as the model wants them.

    Returns:
        Features of the B images, which `encode_masks`, `encode_masks_and_image`, `encode_image` and the tower itself
        take in place of images, as long as the tower's settings and weights stay what they are.

    Raises:
        TypeError, ValueError: the model is not mask-aware, or images are not as above.

    Example:
        >>> import open_clip
        >>> clip = open_clip.create_model("ViT-B-32").eval()
        >>> _ = make_mask_aware(clip.visual)
        >>> with torch.no_grad():
        ...     features = encode_features(clip, torch.randn(1, 3, 224, 224))
        ...     first = encode_masks(clip, features, torch.ones(1, 5, 64, 64))
        ...     more = encode_masks(clip, features, torch.ones(1, 300, 480, 480))
        >>> first.shape, more.shape
        (torch.Size([1, 5, 512]), torch.Size([1, 300, 512]))
    """
    visual = _tower(clip_model)
    tower = _unwrapped(visual)
    tensors = visual(images, features=True)
    return ImageFeatures(tower, tensors, tower.token_grid(images), tower.seen(images))


def encode_image(clip_model: Any, images: Tensor | ImageFeatures, normalize: bool = False) -> Tensor:
    """The plain image embedding (B, D), whatever else a tower's own call would give, of images or kept features.

    Self-distillation (Eq. 8) compares it with a frozen teacher's. Arguments and errors as `encode_masks`.

    Example:
        >>> import open_clip
        >>> clip = open_clip.create_model("ViT-B-32").eval()
        >>> _ = make_mask_aware(clip.visual)
        >>> with torch.no_grad():
        ...     encode_image(clip, encode_features(clip, torch.randn(2, 3, 224, 224))).shape
        torch.Size([2, 512])
    """
    output = _tower(clip_model)(images)
    if isinstance(output, tuple):  # open_clip's with output_tokens
        output = output[0]
    elif not isinstance(output, Tensor):  # transformers'
        output = output.image_embeds if "image_embeds" in output else output.pooler_output
    image = _projected(clip_model, output)  # (B, D)
    return F.normalize(image, dim=-1) if normalize else image


@overload
def encode_masks(clip_model: Any, images: Tensor | ImageFeatures, masks: Tensor, normalize: bool = False) -> Tensor: ...
@overload
def encode_masks(
    clip_model: Any, images: Tensor | ImageFeatures, masks: Sequence[Tensor], normalize: bool = False
) -> list[Tensor]: ...
def encode_masks(
    clip_model: Any, images: Tensor | ImageFeatures, masks: Tensor | Sequence[Tensor], normalize: bool = False
) -> Tensor | list[Tensor]:
    """Embed mask proposals as `encode_image` embeds images, with a CLIP model whose image tower is mask-aware.

    Args:
        clip_model: open_clip or OpenAI CLIP, patched by `make_mask_aware(clip_model.visual)`, or a whole model of
            transformers (`CLIPModel`, `SiglipModel`, ...), patched by `make_mask_aware(clip_model.vision_model)`, whose
            projection is applied, too, or a mask-aware tower that stands alone.
        images: (B, 3, H, W) normalised as the model wants them, or what `encode_features` has kept of them.
        masks: (B, N, H', W') bool or float in [0, 1], or a list of B tensors (N_i, H', W'), of any N: they are asked in
            chunks that bound the memory.
        normalize: scale embeddings to unit length.

    Returns:
        (B, N, D), or a list of B tensors (N_i, D) if `masks` is a list. A proposal that contains no patch
        (see `valid_masks`) gets a finite embedding that says nothing about its region.

    Raises:
        TypeError, ValueError: the model is not mask-aware, images or masks are not as above, or features are of another
            tower, settings or weights.

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
    embeddings = _projected(clip_model, _tower(clip_model)(images, padded))  # (B, N, D)
    return _unpad(F.normalize(embeddings, dim=-1) if normalize else embeddings, masks)


@overload
def encode_masks_and_image(
    clip_model: Any, images: Tensor | ImageFeatures, masks: Tensor, normalize: bool = False
) -> tuple[Tensor, Tensor]: ...
@overload
def encode_masks_and_image(
    clip_model: Any, images: Tensor | ImageFeatures, masks: Sequence[Tensor], normalize: bool = False
) -> tuple[list[Tensor], Tensor]: ...
def encode_masks_and_image(
    clip_model: Any, images: Tensor | ImageFeatures, masks: Tensor | Sequence[Tensor], normalize: bool = False
) -> tuple[Tensor | list[Tensor], Tensor]:
    """`encode_masks` and `encode_image` of the same images in one pass, which runs what both share once.

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
    both = _tower(clip_model)(images, padded, with_image=True)  # (B, N, D), (B, D)
    embeddings, image = (_projected(clip_model, output) for output in both)
    if normalize:
        embeddings, image = F.normalize(embeddings, dim=-1), F.normalize(image, dim=-1)
    return _unpad(embeddings, masks), image


def valid_masks(visual: Any, images: Tensor | ImageFeatures, masks: Tensor) -> Tensor:
    """Which proposals contain a patch of the token grid -> (B, N) bool; the embeddings of others say nothing.

    Towers that average weigh every cell by its share, so for them it is every mask that is not 0 throughout; binarise
    soft proposals for them, `masks > 0.5`.

    Args:
        visual: a mask-aware tower.
        images: (B, 3, H, W), of which only the shape is read, or kept features.
        masks: (B, N, H', W') bool or float in [0, 1].

    Raises:
        TypeError, ValueError: `visual` is not mask-aware, or images or masks are not as above.

    Example:
        >>> import open_clip
        >>> visual = make_mask_aware(open_clip.create_model("ViT-B-32").visual)
        >>> valid_masks(visual, torch.zeros(1, 3, 224, 224), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1))
        tensor([[ True, False]])
    """
    visual = _unwrapped(visual)
    if not is_mask_aware(visual):
        raise TypeError(f"{type(visual).__name__} is not mask-aware; call make_mask_aware on it first")
    check_masks(masks, batch=len(images))
    if isinstance(images, ImageFeatures):
        return visual.valid_masks(masks, images.grid, images.seen)
    return visual.valid_masks(masks, visual.token_grid(images), visual.seen(images))


def _tower(clip_model: Any) -> Any:
    """The mask-aware image tower of a CLIP, inside whatever wraps it."""
    if is_mask_aware(_unwrapped(clip_model)):
        return clip_model
    if isinstance(clip_model, _PARALLEL):
        raise TypeError(f"clip_model is a {type(clip_model).__name__}; pass its .module, or wrap the image tower alone")
    name = "vision_model" if hasattr(clip_model, "vision_model") and not hasattr(clip_model, "visual") else "visual"
    visual = getattr(clip_model, name, None)
    if visual is None or not is_mask_aware(_unwrapped(visual)):
        raise TypeError(f"clip_model.{name} is not mask-aware; call make_mask_aware(clip_model.{name}) first")
    return visual


def _unwrapped(visual: Any) -> Any:
    """The tower inside torch.compile's, a parallel or peft's wrapper."""
    visual = getattr(visual, "_orig_mod", visual)
    visual = visual.module if isinstance(visual, _PARALLEL) else visual
    return visual.get_base_model() if hasattr(visual, "get_base_model") else visual


def _projected(clip_model: Any, embeddings: Tensor) -> Tensor:
    """transformers' whole models project what their tower gives."""
    whole = hasattr(clip_model, "vision_model") and hasattr(clip_model, "text_model")
    project = getattr(clip_model, "visual_projection", None) if whole else None
    return embeddings if project is None else project(embeddings)


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
    if isinstance(visual, _PARALLEL):
        raise TypeError(f"{name} is a parallel wrapper; patch before wrapping, or pass its .module")
    if isinstance(getattr(visual, "visual", None), nn.Module):
        raise TypeError(f"{name} is a whole CLIP model; pass its image tower: make_mask_aware(model.visual)")
    if hasattr(visual, "vision_model") and hasattr(visual, "text_model"):
        raise TypeError(
            f"{name} is a whole model; pass its image tower: make_mask_aware(model.vision_model), then "
            "encode_masks(model, ...), which projects what the tower gives"
        )
    if hasattr(visual, "get_base_model"):
        raise TypeError(f"{name} is peft's wrapper; patch before get_peft_model, or pass its .get_base_model()")
