"""Pools that compute something else than their parts say are refused by name; honest ones are taken as they are."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import Tensor, nn
from zoo import (
    ZOO,
    assert_same_modules,
    mask_aware_tower,
    plain_tower,
    random_images,
    random_masks,
    snapshot,
    timm_tower,
)

from maft_adapter import make_mask_aware
from maft_adapter.towers import class_token

NAMES = [name for name, kind in ZOO.items() if kind.family is not class_token]


def part(tower: Any, path: str) -> Any:
    """The module at the end of a path, however deep in the tower."""
    return next(module for name, module in tower.named_modules() if f".{name}".endswith(f".{path}"))


def override(module: Any, name: str, method: Callable[..., Any]) -> None:
    """Give `module` a class of its own; `method` takes the host's before its arguments."""
    host = type(module)
    own = getattr(host, name)
    module.__class__ = type(host.__name__, (host,), {name: lambda *args, **options: method(own, *args, **options)})


def rolled(own: Any, *args: Any, **options: Any) -> Any:
    return own(*args, **options).roll(1, -1)


def broken(own: Any, *args: Any, **options: Any) -> Any:
    raise RuntimeError("out of order")


# Where each kind of tower pools, and the name by which it is refused
POOLS = {
    "timm-siglip": ("trunk.attn_pool", "forward", "trunk.attn_pool"),
    "timm-pe": ("trunk.attn_pool", "forward", "trunk.attn_pool"),
    "open_clip-coca": ("attn_pool", "forward", "attn_pool"),
    "transformers-siglip": ("head", "forward", "(head|SiglipVisionModel)"),
    "resnet": ("attnpool", "forward", "attnpool"),
    "openai-resnet": ("attnpool", "forward", "attnpool"),
    "open_clip-clipa": ("", "_pool", "the tower's average"),
    "timm-gap": ("trunk", "pool", r"trunk \(VisionTransformer\)"),
    "timm-swin": ("trunk.head.global_pool", "forward", r"trunk \(SwinTransformer\)"),
}
LARGEST: dict[str, Callable[..., Any]] = {  # in place of the mean
    "open_clip-clipa": lambda own, self, x: (self.ln_post(x[:, 1:].amax(1)), x),
    "timm-gap": lambda own, self, x, pool_type=None: x.amax(1),
    "timm-swin": lambda own, self, x: x.amax((1, 2)),
}


@pytest.mark.parametrize(
    ("lie", "says"),
    [("lies", "computes something else.*not supported"), ("breaks", "(can't pool|takes no images).*order")],
)
@pytest.mark.parametrize("name", POOLS)
def test_a_pool_that_does_not_do_what_its_parts_say(name: str, lie: str, says: str) -> None:
    tower, (path, method, where) = plain_tower(name), POOLS[name]
    pool = part(tower, path) if path else tower
    override(pool, method, broken if lie == "breaks" else LARGEST.get(name, rolled))
    tower.train()
    modules, modes = snapshot(tower), [module.training for module in tower.modules()]
    with pytest.raises(ValueError, match=f"{where} {says}"):
        make_mask_aware(tower)
    assert_same_modules(snapshot(tower), modules)
    assert [module.training for module in tower.modules()] == modes


@pytest.mark.parametrize("size", [32, 64])
def test_a_maximum_is_no_mean_though_the_towers_own_map_be_one_cell(size: int) -> None:
    tower = timm_tower("convnext_tiny", "", size=size, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    tower.trunk.head.global_pool.pool = nn.AdaptiveMaxPool2d(1)
    with pytest.raises(ValueError, match=r"trunk \(ConvNeXt\) computes something else"):
        make_mask_aware(tower)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_an_honest_one_is_taken_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    tower, state = plain_tower(name).to(dtype), torch.random.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        make_mask_aware(tower.train())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in tower.modules())
    if dtype == torch.float64:
        images, masks = random_images(ZOO[name].size), random_masks(3, (9, 9))
        expected = mask_aware_tower(name)(images, masks)
        actual = tower.eval()(images.double(), masks)
        largest = float(expected.abs().max())
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=1e-4 * max(1, largest))


@pytest.mark.parametrize("name", ["timm-siglip", "timm-pe", "timm-gap", "timm-vitamin"])
def test_what_embeds_the_patches_of_a_pooling_trunk_is_known(name: str) -> None:
    tower = plain_tower(name)
    tower.trunk.patch_embed.add_module("extra", nn.Linear(2, 2))
    modules = snapshot(tower)
    with pytest.raises(ValueError, match=r"trunk\.patch_embed \(\w+\) has extra, unknown here"):
        make_mask_aware(tower)
    assert_same_modules(snapshot(tower), modules)


class HostResNet(ModifiedResNet):  # type: ignore[misc]
    """As in the CLIPs of ZSSeg, FreeSeg and OVSeg: it gives its pool two arguments more."""

    def forward(self, x: Tensor, mask: Any = None, return_cls: bool = True) -> Any:
        for name in ("stem", "layer1", "layer2", "layer3", "layer4"):
            x = getattr(self, name)(x)
        return self.attnpool(x, mask, return_cls)


class HostPool(AttentionPool2d):  # type: ignore[misc]
    def forward(self, x: Tensor, mask: Any = None, return_cls: bool = True) -> Any:
        return super().forward(x) if return_cls else x


@torch.no_grad()
def test_a_pool_with_arguments_of_a_host() -> None:
    torch.manual_seed(0)
    plain = ModifiedResNet([1, 1, 1, 1], 8, 4, 64, width=4).eval()
    host = copy.deepcopy(plain)
    host.__class__, host.attnpool.__class__ = HostResNet, HostPool
    images, masks = torch.randn(2, 3, 64, 64), torch.rand(2, 3, 2, 2)
    before = host(images), host(images, return_cls=False)
    make_mask_aware(host)
    assert torch.equal(host(images), before[0])
    assert torch.equal(host(images, return_cls=False), before[1])
    assert torch.equal(host(images, masks), make_mask_aware(plain)(images, masks))
    assert host(torch.randn(1, 3, 96, 64)).shape == (1, 8)
