"""`check_tower`: good towers of every family, and towers that are broken in one way each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, assert_same_modules, plain_tower, snapshot

import maft_adapter.adapt
import maft_adapter.testing
from maft_adapter import make_mask_aware
from maft_adapter.features import ImageFeatures
from maft_adapter.testing import CHECKS, check_tower
from maft_adapter.towers import class_token
from maft_adapter.towers.base import MaskAware, swap_class

GOOD = ["open_clip", "openai", "transformers-clip", "timm-siglip", "open_clip-coca", "resnet", "open_clip-clipa"]
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("name", GOOD)
def test_good_towers(name: str) -> None:
    tower = plain_tower(name).train()
    before, weights = snapshot(tower), {key: value.clone() for key, value in tower.state_dict().items()}
    random = torch.get_rng_state()
    checks = check_tower(tower, ZOO[name].size, **ZOO[name].settings)
    assert [check for check in checks if not check.holds] == []
    omitted = {"a full mask is the image"} if name == "open_clip-coca" else set()  # its pool sees a class token, too
    assert {check.name for check in checks} == {"the tower is taken", *CHECKS} - omitted
    assert_same_modules(snapshot(tower), before)
    assert all(torch.equal(value, weights[key]) for key, value in tower.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_tower_that_takes_one_size_says_so() -> None:
    (check,) = [check for check in check_tower(plain_tower("timm-swin")) if not check.holds]
    assert check.name == "images of other sizes"
    assert "the windows of SwinTransformer are made for (64, 64)" in check.why


def test_refused_towers() -> None:
    (check,) = check_tower(nn.Linear(2, 2))
    assert (check.name, check.holds) == ("the tower is taken", False)
    assert check.why.startswith("Linear is not supported: it has no class token")
    clip = nn.Module()
    clip.visual = plain_tower("open_clip")
    assert "a whole CLIP model; pass its image tower" in check_tower(clip)[0].why


def test_a_refusal_that_changes_the_tower(monkeypatch: Patch) -> None:
    def check(visual: Any, start_layer: int) -> None:
        swap_class(visual, MaskAware)
        raise ValueError("no")

    monkeypatch.setattr(class_token, "check", check)
    assert check_tower(plain_tower("open_clip"))[0].why == "refused, but changed nevertheless: no"


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"expected a CLIP image tower \(a torch.nn.Module\), got str"):
        check_tower("ViT-B-16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="VisionTransformer is mask-aware already; call restore on it first"):
        check_tower(make_mask_aware(plain_tower("open_clip"), 1))
    with pytest.raises(ValueError, match=r"OpenAIResNet does not tell the size .* give size=\(height, width\)"):
        check_tower(plain_tower("openai-resnet"))


# Mutants: each does to the mixin of class-token towers what a mistake in a new family would do.


def pool(change: Callable[[Tensor], Tensor]) -> Callable[[Patch, Any], None]:
    """Embeddings (B, N, D) are changed."""

    def mutate(monkeypatch: Patch, mixin: Any) -> None:
        original = mixin._pool_masks
        monkeypatch.setattr(mixin, "_pool_masks", lambda self, features, bias: change(original(self, features, bias)))

    return mutate


def ask(change: Callable[[Any, Any, Tensor], tuple[Any, Tensor]]) -> Callable[[Patch, Any], None]:
    """What goes into the pool is changed: the features or the bias (B, 1, N, h*w)."""

    def mutate(monkeypatch: Patch, mixin: Any) -> None:
        original = mixin._pool_masks
        monkeypatch.setattr(mixin, "_pool_masks", lambda self, *asked: original(self, *change(self, *asked)))

    return mutate


def attribute(target: Any, name: str, change: Callable[[Any], Any]) -> Callable[[Patch, Any], None]:
    """An attribute is replaced by what `change` makes of it; the target is the mixin if it is None."""

    def mutate(monkeypatch: Patch, mixin: Any) -> None:
        owner = mixin if target is None else target
        monkeypatch.setattr(owner, name, change(getattr(owner, name, None)), raising=False)

    return mutate


def needs_a_mask(embeddings: Tensor) -> Tensor:
    return embeddings.reshape(len(embeddings), embeddings.shape[1], -1)  # an error for N = 0


def adds_a_buffer(tower: Any, features: Any, bias: Tensor) -> Any:
    tower.register_buffer("last_bias", bias)
    return features, bias


def class_alone(module: Any) -> None:
    module.__class__ = type(module).__bases__[1]  # and leave the settings where they are


def native_only(token_grid: Any) -> Any:
    def refuse(self: Any, images: Tensor) -> Any:
        if images.shape[2:] != (32, 32):
            raise ValueError("only 32x32")
        return token_grid(self, images)

    return refuse


def another_image(forward: Any) -> Any:
    def changed(self: Any, *asked: Any, with_image: bool = False, **options: Any) -> Any:
        output = forward(self, *asked, with_image=with_image, **options)
        return (output[0], output[1] + 1) if with_image else output

    return changed


def top_left(on_grid: Any) -> Any:
    return lambda self, masks, *rest: on_grid(self, masks[..., :9, :9], *rest)


def without_a_patch(_: Any, features: Any, bias: Tensor) -> Any:
    return features, bias.index_fill(-1, torch.tensor(0), -torch.inf)


MUTANTS: dict[str, Callable[[Patch, Any], None]] = {
    "without masks the output is the same to the bit": attribute(
        None, "plain", lambda plain: lambda self, images: plain(self, images) * (1 + 2**-22)
    ),
    "parameters, buffers and state_dict keys stay": ask(adds_a_buffer),
    "restore undoes it": attribute(maft_adapter.adapt, "restore_class", lambda _: class_alone),
    "a deepcopy is independent": attribute(MaskAware, "__deepcopy__", lambda _: lambda self, memo: self),
    "it can be pickled": attribute(MaskAware, "__reduce_ex__", lambda _: object.__reduce_ex__),
    "masks and what is under them matter": ask(lambda _, features, bias: (features, torch.zeros_like(bias))),
    "masks do not influence each other": pool(lambda e: e - 0.1 * e.mean(1, keepdim=True)),
    "their order does not matter": pool(lambda e: e.cumsum(1)),
    "the same mask twice gives the same embedding": pool(lambda e: e + torch.arange(e.shape[1])[:, None]),
    "images do not influence each other": pool(lambda e: e + e.mean(0)),
    "any number of masks": pool(needs_a_mask),
    "masks of any resolution and dtype": attribute(None, "_on_grid", top_left),
    "images of other sizes": attribute(None, "token_grid", native_only),
    "with_image=True gives both": attribute(None, "forward", another_image),
    "kept features give what images give": attribute(
        ImageFeatures, "checked", lambda checked: lambda self, tower: tuple(2 * x for x in checked(self, tower))
    ),
    "empty masks are finite and reported": pool(lambda e: e.where(torch.arange(e.shape[1])[:, None] != 5, torch.nan)),
    "a full mask is the image": ask(without_a_patch),
    "gradients reach all that an image's reach": ask(
        lambda _, features, bias: (tuple(tensor.detach() for tensor in features), bias)
    ),
    "half precision": pool(Tensor.float),
}


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_finds_its_mutant(name: str, monkeypatch: Patch) -> None:
    MUTANTS[name](monkeypatch, type(make_mask_aware(plain_tower("open_clip"), 1)).__bases__[0])
    monkeypatch.setattr(maft_adapter.testing, "CHECKS", {name: CHECKS[name]})
    taken, check = check_tower(plain_tower("open_clip"), start_layer=1)
    assert taken.holds
    assert (check.name, check.holds) == (name, False)
    assert check.why
