"""Families of image towers, one module each: `recognise(visual)`, `check(visual, start_layer)`, `patch(...)`.

A tower is patched by giving the same object another class, made once per host class and registered nowhere:
parameters, hooks, optimizers and state_dict keys stay what they were, and undoing it is exact.
"""

from __future__ import annotations

import functools
from typing import Any, cast

from torch import Tensor


class MaskAware:
    """Mixed in, before the host's class, into every module that `make_mask_aware` touches."""

    settings: tuple[str, ...] = ()  # instance attributes that `restore_class` removes

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The made class has no importable name, so pickle and deepcopy build it again from its two parents.
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(2))
        return (_new, type(self).__bases__, *state)


class MaskAwareTower(MaskAware):
    """The mixin of whole towers; `forward(x, masks=None, *, with_image=False)` is as in `make_mask_aware`."""

    def token_grid(self, images: Tensor) -> tuple[int, int]:
        """Height and width of the token grid for `images` (B, 3, H, W), or ValueError if they do not fit."""
        raise NotImplementedError


@functools.cache
def _mask_aware_class(mixin: type, host: type) -> type:
    return type(f"MaskAware{host.__name__}", (mixin, host), {"__module__": mixin.__module__})


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


from . import clip_vit  # noqa: E402  (the families build on the mixin above)

FAMILIES = (clip_vit,)
