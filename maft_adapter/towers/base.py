"""What every mask-aware tower is: classes swapped in place, and one way from images to embeddings.

A tower is patched by giving the same object another class, made once per host class and registered nowhere:
parameters, hooks, optimizers and state_dict keys stay what they were, and undoing it is exact.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..features import ImageFeatures
from ..masks import attention_bias, check_masks, masks_on_grid

# Cells of the token grid that are asked at once, images x proposals x h x w: what a chunk of proposals needs beyond
# its embeddings are a few tensors of this many numbers a head, about 100 MB for 12 heads in float32.
_CELLS = 2**19


class MaskAware:
    """Mixed in, before the host's class, into every module that `make_mask_aware` touches."""

    settings: tuple[str, ...] = ()  # instance attributes that `restore_class` removes

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The made class has no importable name, so pickle and deepcopy build it again from its two parents.
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(2))
        return (_new, type(self).__bases__, *state)

    def __prepare_scriptable__(self) -> Any:
        # Called by torch.jit.script, which says nothing that helps of what it then fails to compile.
        raise TypeError(
            f"{type(self).__name__} is mask-aware, which torch.jit.script can't compile; use torch.compile, "
            "torch.export or torch.jit.trace(tower, (images, masks)), or call restore before"
        )


class MaskAwareTower(MaskAware):
    """The mixin of whole towers: features of the images, then masks asked of them.

    A family gives `token_grid`, `_features`, `_pool_masks` and `_pool_image`, and `_on_grid` if masks enter it as
    something else than an attention bias.
    """

    interpolation: str
    threshold: float

    def forward(
        self,
        images: Any,
        masks: Tensor | None = None,
        *,
        with_image: bool = False,
        features: bool = False,
        **options: Any,
    ) -> Any:
        """See `maft_adapter.make_mask_aware`; `options` are the host's own and go with images alone."""
        kept = images if isinstance(images, ImageFeatures) else None
        if masks is None and not features:
            if with_image:
                raise ValueError("with_image=True gives mask and image embeddings together and needs masks")
            return self.plain(images, **options) if kept is None else self._pool_image(kept.checked(self), kept.grid)
        if options:
            raise TypeError(f"with masks the tower gives embeddings only and takes no {', '.join(options)}")
        if features and (kept is not None or masks is not None or with_image):
            raise ValueError("features=True gives what encode_features keeps of images, and takes images alone")
        grid, seen = (self.token_grid(images), self.seen(images)) if kept is None else (kept.grid, kept.seen)
        if masks is not None:
            check_masks(masks, batch=len(images), device=images.device)
        if not torch.compiler.is_compiling():
            self._refuse_changes()
        tensors = self._features(images) if kept is None else kept.checked(self)
        if masks is None:
            return tensors
        embeddings = self._ask(tensors, masks, grid, seen)  # (B, N, D)
        return (embeddings, self._pool_image(tensors, grid)) if with_image else embeddings

    def plain(self, images: Tensor, **options: Any) -> Any:
        """What the tower gives for images (B, 3, H, W) alone."""
        self.token_grid(images)
        return super().forward(images, **options)  # type: ignore[misc]

    def token_grid(self, images: Tensor) -> tuple[int, int]:
        """Height and width of the token grid for `images` (B, 3, H, W), or ValueError if they do not fit."""
        raise NotImplementedError

    def seen(self, images: Tensor) -> tuple[float, float]:
        """Share of the height and width of `images` (B, 3, H, W) that the token grid covers."""
        return 1.0, 1.0

    def valid_masks(self, masks: Tensor, grid: tuple[int, int], seen: tuple[float, float]) -> Tensor:
        """Which of the masks (B, N, H', W') contain anything that the tower can see -> (B, N) bool."""
        return masks_on_grid(masks, grid, self.threshold, seen).flatten(2).any(-1)

    def _ask(
        self, features: tuple[Tensor, ...], masks: Tensor, grid: tuple[int, int], seen: tuple[float, float]
    ) -> Tensor:
        """Embeddings (B, N, D) of masks (B, N, H', W'), a chunk of proposals after the other."""
        # A graph has to hold for any N.
        chunk = masks.shape[1] if torch.compiler.is_compiling() else _CELLS // (len(masks) * grid[0] * grid[1])
        embeddings = [
            self._pool_masks(features, self._on_grid(part, grid, seen, features[0].dtype))
            for part in ((masks,) if torch.compiler.is_compiling() else masks.split(max(1, chunk), dim=1))
        ]
        return embeddings[0] if len(embeddings) == 1 else torch.cat(embeddings, dim=1)

    def _on_grid(self, masks: Tensor, grid: tuple[int, int], seen: tuple[float, float], dtype: torch.dtype) -> Tensor:
        """Masks (B, N, H', W') as this family takes them: a bias (B, 1, N, h*w)."""
        return attention_bias(masks, grid, dtype, self.threshold, seen)

    def _features(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the images contribute without any mask, images along the first axis of every tensor."""
        raise NotImplementedError

    def _pool_masks(self, features: tuple[Tensor, ...], on_grid: Tensor) -> Tensor:
        """Features and what `_on_grid` gives of N masks -> embeddings (B, N, D)."""
        raise NotImplementedError

    def _pool_image(self, features: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        """The tower's own embedding of the image, (B, D)."""
        raise NotImplementedError

    def _refuse_changes(self) -> None:
        """Raise ValueError if something was set on a module since the patching that a masked pass would leave out."""
        refuse_bypassed(self._bypassed())

    def _bypassed(self) -> Iterator[tuple[str, Any]]:
        """Names and modules that a masked pass computes around, from their parts."""
        yield from ()


@functools.cache
def _mask_aware_class(mixin: type, host: type) -> type:
    # The host's name and place: transformers looks up by them what a model can record and whether its attention can be
    # set, and save_pretrained writes the name down.
    names = {"__module__": host.__module__, "__qualname__": host.__qualname__}
    return type(host.__name__, (mixin, host), names)


def _new(mixin: type, host: type) -> Any:
    return object.__new__(_mask_aware_class(mixin, host))


def swap_class(module: Any, mixin: type) -> None:
    """Make `module` an instance of `mixin` as well as of its own class."""
    module.__class__ = _mask_aware_class(mixin, module.__class__)


def restore_class(module: Any) -> None:
    """Undo `swap_class` and drop the settings."""
    for name in module.settings:
        delattr(module, name)
    module.__class__ = type(module).__bases__[1]


def mask_aware_modules(visual: nn.Module) -> list[Any]:
    """The modules of a patched tower that `swap_class` changed.

    Raises ValueError if somebody swapped a class again on top of ours, as FSDP2 and torch's parametrizations do: taking
    ours away would take theirs.
    """
    modules = [module for module in visual.modules() if isinstance(module, MaskAware)]
    for module in modules:
        if len(bases := type(module).__bases__) != 2 or type(module) is not _mask_aware_class(*bases):
            raise ValueError(
                f"{type(module).__name__} was made out of the mask-aware class by something else (fully_shard, a "
                "parametrization, ...); undo that first, then restore or patch again"
            )
    return modules


@contextlib.contextmanager
def computing(module: nn.Module, device: torch.device) -> Iterator[None]:
    """For a proof: in eval mode, in the module's own precision and without gradients, and back again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def divide_into_patches(
    images: Tensor, stride: tuple[int, int], native: tuple[Any, Any] = (None, None), channels: int = 3
) -> tuple[int, int]:
    """Height and width of the token grid of images (B, 3, H, W), or an error that says what is wrong.

    `native` is the image size that the tower was made for, which the stride need not divide, and its grid.
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images are a (B, {channels}, H, W) float tensor normalised for the tower, got {type(images).__name__}"
        )
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}; give floats normalised for the tower, not pixel values")
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] != channels:
        raise ValueError(f"images are (B, {channels}, H, W) with B >= 1, got {tuple(images.shape)}")
    (h, w), (height, width) = images.shape[2:], stride
    if (h, w) == native[0]:
        return native[1]
    if h % height or w % width or not h or not w:
        raise ValueError(f"images of {h}x{w} do not divide into {height}x{width} patches; resize or pad")
    return h // height, w // width


def share_seen(images: Tensor, stride: tuple[int, int], grid: tuple[int, int]) -> tuple[float, float]:
    """Share of the height and width of images (B, 3, H, W) that a grid of non-overlapping patches covers."""
    (h, w), (height, width), (rows, columns) = images.shape[2:], stride, grid
    return rows * height / h, columns * width / w


def refuse_unknown(module: Any, known: tuple[str, ...], where: str) -> None:
    """Raise ValueError, naming them, if `module` has parameters or working children that are not known."""
    held = {**dict(module.named_children()), **dict(module.named_parameters(recurse=False))}
    idle = [n for n, x in held.items() if isinstance(x, nn.Identity | nn.Dropout) and not getattr(x, "p", 0)]
    unknown = ", ".join(name for name in held if name not in (*known, *idle))
    if unknown:
        name = type(module).__name__
        raise ValueError(f"{where} ({name}) has {unknown}, unknown here: patching it would leave that out")


def refuse_own_methods(module: Any, where: str) -> None:
    """Raise ValueError if a method was set on the instance, which another class would not change."""
    own = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    if own:
        raise ValueError(
            f"{where} ({type(module).__name__}) has its own {', '.join(own)} set on the instance, as accelerate's "
            "prepare and offload hooks do; call make_mask_aware before them, or remove them"
        )


def refuse_bypassed(modules: Iterator[tuple[str, Any]]) -> None:
    """Raise ValueError if a module that a masked pass computes around has hooks or methods of its own.

    What they do (load offloaded weights, change an output) would be left out. `modules` are names with modules.
    """
    for where, module in modules:
        refuse_own_methods(module, where)
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # transformers leaves hooks behind that only record outputs.
        if not all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            raise ValueError(
                f"{where} ({type(module).__name__}) has forward hooks, which a masked pass would leave out since it "
                "computes from this module's parts; remove them, or set them on its block or its children"
            )
