"""What `make_mask_aware` promises of any tower, as checks for a tower that nobody here has seen."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapt import encode_features, encode_image, is_mask_aware, make_mask_aware, restore, valid_masks
from .towers import class_token, learned_query
from .towers.blocks import ProposalBlock

__all__ = ["CHECKS", "Check", "check_tower"]

# Relative to the largest number in what is compared. Float32 rounds to 1e-6 of it, and what masks do to small towers
# with random weights begins at 1e-3.
ROUNDING, RESPONSE = 2e-5, 1e-4


class Check(NamedTuple):
    """What came of one check.

    Attributes:
        name: the behaviour, in words.
        holds: whether the tower has it.
        why: it does not hold; "" where it does.
    """

    name: str
    holds: bool
    why: str


def check_tower(visual: nn.Module, size: tuple[int, int] | None = None, **settings: Any) -> list[Check]:
    """Find out whether a tower, made mask-aware, does what `make_mask_aware` promises.

    All is tried on copies on the CPU, in eval mode and in float32, with random images and masks; `visual` itself stays
    what it is. Its weights should be trained, or random everywhere: with layer scales next to 0 masks move nothing.
    Compiling, exporting and parallel wrappers are not tried.

    Args:
        visual: an unpatched image tower, as `make_mask_aware` takes it.
        size: height and width in pixels of the images that it was made for; None where it tells them itself, by
            `image_size`, `input_resolution` or `config.image_size`.
        settings: of `make_mask_aware`, such as `start_layer`.

    Returns:
        All checks, those that hold and those that do not. The first is whether the tower is taken; if it is refused,
        there are no others, and the reason is why.

    Raises:
        TypeError: `visual` is no module.
        ValueError: it is mask-aware already, or no size is given or told.

    Example:
        >>> import open_clip
        >>> tower = open_clip.create_model("ViT-S-32-alt").visual
        >>> [check.name for check in check_tower(tower) if not check.holds]
        []
        >>> check_tower(tower, start_layer=13)
        [Check(name='the tower is taken', holds=False, why='start_layer is 13, expected an int in 0..12 (the depth)')]
    """
    if not isinstance(visual, nn.Module):
        raise TypeError(f"expected a CLIP image tower (a torch.nn.Module), got {type(visual).__name__}")
    if is_mask_aware(visual):
        raise ValueError(f"{type(visual).__name__} is mask-aware already; call restore on it first")
    taken = _tried("the tower is taken", partial(_is_taken, visual, settings))
    if not taken.holds:
        return [taken]
    trial = _Trial(visual, size or _image_size(visual), settings)
    return [
        taken,
        *(
            _tried(name, partial(check, trial))
            for name, check in CHECKS.items()
            if check is not _full_mask or pools_patches_alone(visual)
        ),
    ]


def _unpatched(visual: nn.Module) -> Any:
    return copy.deepcopy(visual).cpu().float().eval()


class _Trial:
    """What a check works with: two images, six masks of each, and as many copies of the tower as it wants."""

    def __init__(self, visual: nn.Module, size: tuple[int, int], settings: dict[str, Any]) -> None:
        self._visual, self.size, self.settings = visual, size, settings
        self.images = _noise((2, 3), size, seed=0)  # (2, 3, H, W)
        self.masks = (_noise((2, 6), size, seed=1) > 0).float()  # (2, 6, H, W)
        self.masks[:, 4], self.masks[:, 5] = 1, 0

    def plain(self) -> Any:
        return _unpatched(self._visual)

    def tower(self) -> Any:
        return make_mask_aware(self.plain(), **self.settings)


def _noise(shape: tuple[int, int], size: tuple[int, int], seed: int) -> Tensor:
    """Blobs of an eighth of the picture under a finer grain, (*shape, H, W), the same ones for a seed."""
    generator = torch.Generator().manual_seed(seed)
    blobs = F.interpolate(torch.randn(*shape, 8, 8, generator=generator), size, mode="bilinear")
    return 2 * blobs + 0.2 * torch.randn(*shape, *size, generator=generator)


def pools_patches_alone(visual: Any) -> bool:
    """Whether a tower's image embedding is pooled from its patches, all of which a full mask contains.

    A class token's last block counts as such a pool. Among the towers with a learned query, CoCa and most Perception
    Encoders pool over a class token, too.
    """
    if learned_query.recognise(visual):
        return not hasattr(visual, "attn_pool") and getattr(getattr(visual, "trunk", None), "num_prefix_tokens", 0) == 0
    return True


def _image_size(visual: Any) -> tuple[int, int]:
    config = getattr(visual, "config", None)
    for owner, name in ((visual, "image_size"), (visual, "input_resolution"), (config, "image_size")):
        told = getattr(owner, name, None)
        if isinstance(told, int):
            return told, told
        if told is not None:
            height, width = told
            return height, width
    raise ValueError(f"{type(visual).__name__} does not tell the size of its images; give size=(height, width)")


def _tried(name: str, check: Callable[[], None]) -> Check:
    try:
        check()
    except _Missed as missed:
        return Check(name, False, str(missed))
    except Exception as error:  # of any kind, since the tower may be of any kind
        return Check(name, False, f"{type(error).__name__}: {error}")
    return Check(name, True, "")


class _Missed(Exception):
    """A behaviour that the tower does not have."""


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise _Missed(why)


def _close(actual: Tensor, expected: Tensor, what: str, tolerance: float = ROUNDING) -> None:
    _require(actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if expected.numel():
        off = ((actual.float() - expected.float()).abs().max() / expected.abs().max()).item()
        _require(off <= tolerance, f"{what}: off by {off:.1g} of the largest number, {tolerance:.0e} is rounding")


def _tensors(output: Any) -> list[Tensor]:
    """All tensors in a tower's own output: itself, those of a tuple, or those of transformers' output."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [tensor for value in values if value is not None for tensor in _tensors(value)]


def _require_same(actual: Any, expected: Any, why: str) -> None:
    same = all(torch.equal(a, b) for a, b in zip(_tensors(actual), _tensors(expected), strict=True))
    _require(same, why)


def _classes(visual: nn.Module) -> list[type]:
    return [type(module) for module in visual.modules()]


# The checks


def _is_taken(visual: nn.Module, settings: dict[str, Any]) -> None:
    tower = _unpatched(visual)
    before = _classes(tower)
    try:
        make_mask_aware(tower, **settings)
    except (TypeError, ValueError) as error:
        _require(_classes(tower) == before, f"refused, but changed nevertheless: {error}")
        raise _Missed(str(error)) from error


@torch.no_grad()
def _without_masks(trial: _Trial) -> None:
    plain, tower = trial.plain(), trial.tower()
    _require_same(tower(trial.images), plain(trial.images), "the output differs")
    tower(trial.images, trial.masks)
    _require_same(tower(trial.images), plain(trial.images), "the output differs after a pass with masks")


@torch.no_grad()
def _keys(trial: _Trial) -> None:
    tower = trial.plain()
    keys, held = list(tower.state_dict()), [*tower.parameters(), *tower.buffers()]
    make_mask_aware(tower, **trial.settings)(trial.images, trial.masks)
    differ = sorted(set(keys) ^ set(tower.state_dict()))
    _require(list(tower.state_dict()) == keys, f"other keys: {', '.join(differ) or 'another order'}")
    now = [*tower.parameters(), *tower.buffers()]
    _require(len(now) == len(held) and all(a is b for a, b in zip(now, held, strict=True)), "other tensors")


@torch.no_grad()
def _restored(trial: _Trial) -> None:
    plain, tower = trial.plain(), trial.tower()
    tower(trial.images, trial.masks)
    restore(tower)
    _require(_classes(tower) == _classes(plain), "other classes")
    for before, after in zip(plain.modules(), tower.modules(), strict=True):
        differ = sorted(vars(before).keys() ^ vars(after).keys())
        _require(not differ, f"{type(after).__name__} has other attributes: {', '.join(differ)}")
    _require_same(tower(trial.images), plain(trial.images), "the output differs")


@torch.no_grad()
def _copied(trial: _Trial) -> None:
    tower = trial.tower()
    before = tower(trial.images, trial.masks)
    student = copy.deepcopy(tower)
    _require_same(student(trial.images, trial.masks), before, "the copy gives other embeddings")
    for parameter in student.parameters():
        parameter += 0.1
    _require_same(tower(trial.images, trial.masks), before, "other weights in the copy change the original")


@torch.no_grad()
def _pickled(trial: _Trial) -> None:
    tower = trial.tower()
    loaded = pickle.loads(pickle.dumps(tower))
    _require_same(loaded(trial.images, trial.masks), tower(trial.images, trial.masks), "other embeddings")


@torch.no_grad()
def _masks_matter(trial: _Trial) -> None:
    tower = trial.tower()
    first, second = tower(trial.images, trial.masks)[:, :2].unbind(1)  # (2, D) each
    largest = first.abs().max()
    off = ((first - second).abs().amax(-1).min() / largest).item()
    _require(off > RESPONSE, f"two masks give the same embedding up to {off:.1g} of the largest number")
    changed = trial.images + 2 * trial.masks[:, :1]  # (2, 3, H, W)
    off = ((tower(changed, trial.masks)[:, 0] - first).abs().amax(-1).min() / largest).item()
    _require(off > RESPONSE, f"a change under a mask moves its embedding by no more than {off:.1g}")


@torch.no_grad()
def _alone(trial: _Trial) -> None:
    tower = trial.tower()
    together = tower(trial.images, trial.masks)  # (2, 6, D)
    for n in range(6):
        _close(tower(trial.images, trial.masks[:, n : n + 1]), together[:, n : n + 1], "a mask without the others")


@torch.no_grad()
def _any_order(trial: _Trial) -> None:
    tower, order = trial.tower(), [3, 1, 5, 4, 0, 2]
    expected = tower(trial.images, trial.masks)[:, order]  # (2, 6, D)
    _close(tower(trial.images, trial.masks[:, order]), expected, "the same masks in another order")


@torch.no_grad()
def _twice(trial: _Trial) -> None:
    tower = trial.tower()
    both = tower(trial.images, torch.cat([trial.masks, trial.masks], dim=1))  # (2, 12, D)
    _close(both[:, 6:], both[:, :6], "the same masks for the second time")


@torch.no_grad()
def _images_alone(trial: _Trial) -> None:
    tower = trial.tower()
    expected = tower(trial.images, trial.masks)[1:]  # (1, 6, D)
    _close(tower(trial.images[1:], trial.masks[1:]), expected, "an image without the other")


@torch.no_grad()
def _any_number(trial: _Trial) -> None:
    tower = trial.tower()
    masks = (_noise((2, 300), (24, 24), seed=2) > 0).float()  # (2, 300, 24, 24)
    expected = tower(trial.images, masks)  # (2, 300, D)
    for n in (0, 1, 100):
        _close(tower(trial.images, masks[:, :n]), expected[:, :n], f"{n} masks of 300")


@torch.no_grad()
def _any_resolution(trial: _Trial) -> None:
    tower = trial.tower()
    cells = _noise((2, 6), tower.token_grid(trial.images), seed=3) > 0  # (2, 6, h, w)
    expected = tower(trial.images, cells)
    finer = cells.repeat_interleave(3, 2).repeat_interleave(3, 3)  # (2, 6, 3h, 3w)
    _close(tower(trial.images, finer), expected, "the same masks, three times as fine")
    _close(tower(trial.images, finer.float()), expected, "the same masks as floats")


@torch.no_grad()
def _any_image_size(trial: _Trial) -> None:
    tower, (height, width) = trial.tower(), trial.size
    rows, columns = tower.token_grid(trial.images)
    size = height // rows * (rows + 1), width // columns * 2 * columns
    images = _noise((2, 3), size, seed=4)
    embeddings, image = tower(images, trial.masks, with_image=True)
    _require(bool(embeddings.isfinite().all()), f"images of {size} give embeddings that are not finite")
    _close(image, encode_image(tower, images), f"with_image=True at {size}")


@torch.no_grad()
def _with_image(trial: _Trial) -> None:
    tower = trial.tower()
    embeddings, image = tower(trial.images, trial.masks, with_image=True)
    _close(embeddings, tower(trial.images, trial.masks), "the masks' embeddings")
    _close(image, encode_image(tower, trial.images), "the image's embedding")


@torch.no_grad()
def _kept_features(trial: _Trial) -> None:
    tower = trial.tower()
    features = encode_features(tower, trial.images)
    _close(tower(features, trial.masks), tower(trial.images, trial.masks), "masks asked of kept features")
    _close(encode_image(tower, features), encode_image(tower, trial.images), "the image of kept features")


@torch.no_grad()
def _empty_mask(trial: _Trial) -> None:
    tower = trial.tower()
    _require(bool(tower(trial.images, trial.masks).isfinite().all()), "embeddings that are not finite")
    valid = valid_masks(tower, trial.images, trial.masks)[:, 4:].tolist()
    _require(valid == [[True, False]] * 2, f"valid_masks says {valid[0]} of a full and an empty mask")


@torch.no_grad()
def _full_mask(trial: _Trial) -> None:
    tower = trial.tower()
    if class_token.recognise(trial.plain()):
        # In the last block a class token is asked as ever, since nothing asks the patches any more.
        depth = sum(isinstance(module, ProposalBlock) for module in make_mask_aware(tower, 0).modules())
        make_mask_aware(tower, **{**trial.settings, "start_layer": depth - 1})
    embeddings, image = tower(trial.images, trial.masks, with_image=True)
    _close(embeddings[:, 4], image, "a full mask")


def _gradients(trial: _Trial) -> None:
    tower = trial.tower().requires_grad_(True)

    def reached(embedding: Tensor) -> dict[str, Tensor]:
        named = dict(tower.named_parameters())
        gradients = torch.autograd.grad(embedding.square().sum(), list(named.values()), allow_unused=True)
        return {name: grad for name, grad in zip(named, gradients, strict=True) if grad is not None}

    expected, actual = reached(encode_image(tower, trial.images)), reached(tower(trial.images, trial.masks))
    missing = [name for name in expected if name not in actual]
    _require(not missing, f"none for {', '.join(missing[:4])}{' and others' * (len(missing) > 4)}")
    bad = [name for name, grad in actual.items() if not grad.isfinite().all()]
    _require(not bad, f"not finite for {', '.join(bad[:4])}{' and others' * (len(bad) > 4)}")


@torch.no_grad()
def _half_precision(trial: _Trial) -> None:
    tower = trial.tower()
    expected = tower(trial.images, trial.masks)
    actual = tower.bfloat16()(trial.images.bfloat16(), trial.masks)
    _require(actual.dtype == torch.bfloat16, f"embeddings are {actual.dtype}")
    _close(actual, expected, "in bfloat16", 0.1)


CHECKS: dict[str, Callable[[_Trial], None]] = {
    "without masks the output is the same to the bit": _without_masks,
    "parameters, buffers and state_dict keys stay": _keys,
    "restore undoes it": _restored,
    "a deepcopy is independent": _copied,
    "it can be pickled": _pickled,
    "masks and what is under them matter": _masks_matter,
    "masks do not influence each other": _alone,
    "their order does not matter": _any_order,
    "the same mask twice gives the same embedding": _twice,
    "images do not influence each other": _images_alone,
    "any number of masks": _any_number,
    "masks of any resolution and dtype": _any_resolution,
    "images of other sizes": _any_image_size,
    "with_image=True gives both": _with_image,
    "kept features give what images give": _kept_features,
    "empty masks are finite and reported": _empty_mask,
    "a full mask is the image": _full_mask,
    "gradients reach all that an image's reach": _gradients,
    "half precision": _half_precision,
}
