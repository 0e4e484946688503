"""Families of image towers, one module each: `recognise(visual)`, then `check` and `patch`, of (visual, start_layer).

A tower is patched by giving the same object another class, made once per host class and registered nowhere:
parameters, hooks, optimizers and state_dict keys stay what they were, and undoing it is exact.
"""

from __future__ import annotations

import functools
from typing import Any, cast

from torch import Tensor, nn

from ..masks import check_masks, masks_on_grid


class MaskAware:
    """Mixed in, before the host's class, into every module that `make_mask_aware` touches."""

    settings: tuple[str, ...] = ()  # instance attributes that `restore_class` removes

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The made class has no importable name, so pickle and deepcopy build it again from its two parents.
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(2))
        return (_new, type(self).__bases__, *state)


class MaskAwareTower(MaskAware):
    """The mixin of whole towers; a family gives `token_grid` and `encode`."""

    interpolation: str
    threshold: float

    def forward(self, x: Tensor, masks: Tensor | None = None, *, with_image: bool = False, **options: Any) -> Any:
        """See `maft_adapter.make_mask_aware`; `options` are the host's own and go with images alone."""
        if masks is None:
            if with_image:
                raise ValueError("with_image=True gives mask and image embeddings together and needs masks")
            return self.plain(x, **options)
        if options:
            raise TypeError(f"with masks the tower gives embeddings only and takes no {', '.join(options)}")
        grid = self.token_grid(x)
        check_masks(masks, batch=x.shape[0], device=x.device)
        return self.encode(x, masks, grid, with_image)

    def plain(self, images: Tensor, **options: Any) -> Any:
        """What the tower gives for images (B, 3, H, W) alone."""
        self.token_grid(images)
        return super().forward(images, **options)  # type: ignore[misc]

    def token_grid(self, images: Tensor) -> tuple[int, int]:
        """Height and width of the token grid for `images` (B, 3, H, W), or ValueError if they do not fit."""
        raise NotImplementedError

    def encode(self, images: Tensor, masks: Tensor, grid: tuple[int, int], with_image: bool) -> Any:
        """Embeddings (B, N, D), and the image's (B, D) too if `with_image`; arguments have been checked."""
        raise NotImplementedError

    def valid_masks(self, masks: Tensor, grid: tuple[int, int]) -> Tensor:
        """Which of the masks (B, N, H', W') contain anything that the tower can see -> (B, N) bool."""
        return masks_on_grid(masks, grid, self.threshold).flatten(2).any(-1)


class PoolingTower(MaskAwareTower):
    """The mixin of towers which the masks enter only where they pool: the features before it are the image's."""

    def encode(self, images: Tensor, masks: Tensor, grid: tuple[int, int], with_image: bool) -> Any:
        features = self._features(images)
        embeddings = self._pool_masks(features, masks, grid)  # (B, N, D)
        return (embeddings, self._pool_image(features)) if with_image else embeddings

    def _features(self, images: Tensor) -> Tensor:
        """What the tower pools, in the host's own layout."""
        raise NotImplementedError

    def _pool_masks(self, features: Tensor, masks: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features and masks (B, N, H', W') -> embeddings (B, N, D)."""
        raise NotImplementedError

    def _pool_image(self, features: Tensor) -> Tensor:
        """The tower's own embedding of the image, (B, D)."""
        raise NotImplementedError


@functools.cache
def _mask_aware_class(mixin: type, host: type) -> type:
    # The host's name and place: transformers looks up by them what a model can record and whether its attention can be
    # set, and save_pretrained writes the name down.
    return type(host.__name__, (mixin, host), {"__module__": host.__module__, "__qualname__": host.__qualname__})


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


def divide_into_patches(
    images: Tensor, stride: tuple[int, int], native: tuple[Any, Any] = (None, None), channels: int = 3
) -> tuple[int, int]:
    """Height and width of the token grid of images (B, 3, H, W), or ValueError that says what is wrong.

    `native` is the image size that the tower was made for, which the stride need not divide, and its grid.
    """
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] != channels:
        raise ValueError(f"images are (B, {channels}, H, W) with B >= 1, got {tuple(images.shape)}")
    (h, w), (height, width) = images.shape[2:], stride
    if (h, w) == native[0]:
        return native[1]
    if h % height or w % width or not h or not w:
        raise ValueError(f"images of {h}x{w} do not divide into {height}x{width} patches; resize or pad")
    return h // height, w // width


def refuse_unknown(module: Any, known: tuple[str, ...], where: str) -> None:
    """Raise ValueError, naming them, if `module` has parameters or working children that are not known."""
    held = {**dict(module.named_children()), **dict(module.named_parameters(recurse=False))}
    idle = [n for n, x in held.items() if isinstance(x, nn.Identity | nn.Dropout) and not getattr(x, "p", 0)]
    unknown = ", ".join(name for name in held if name not in (*known, *idle))
    if unknown:
        name = type(module).__name__
        raise ValueError(f"{where} ({name}) has {unknown}, unknown here: patching it would leave that out")


from . import attention_pool, average, class_token, learned_query  # noqa: E402  (they build on the mixins above)

FAMILIES = (class_token, learned_query, attention_pool, average)
