"""Small image towers with random weights in both layouts, open_clip's and OpenAI's."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from skips import pytest_sessionfinish  # noqa: F401  (a hook)
from torch import Tensor, nn
from zoo import DEPTH, DIM, HEADS, PATCH, WIDTH, OpenAITower, open_clip_tower, randomize

# No deadline and no complaint of slow drawing: a busy machine is no failure.
PATIENT: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fast", max_examples=30, derandomize=True, **PATIENT)
settings.register_profile("fuzz", max_examples=10_000, **PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "open_clip": open_clip_tower,
    "open_clip-layer_scale": lambda: open_clip_tower(ls_init_value=0.5),
    "open_clip-no_ln_pre": lambda: open_clip_tower(no_ln_pre=True),
    "open_clip-custom_blocks": lambda: open_clip_tower(block_type="custom"),
    "open_clip-not_square": lambda: open_clip_tower(image_size=(32, 48)),
    "openai": lambda: OpenAITower(32, PATCH, WIDTH, DEPTH, HEADS, DIM),
}


@pytest.fixture
def build_tower() -> Callable[..., Any]:
    """`build_tower(**options)`: an open_clip tower in eval mode, its defaults overridden by the options."""
    return lambda **options: randomize(open_clip_tower(**options))


@pytest.fixture(params=LAYOUTS)
def tower(request: pytest.FixtureRequest) -> Any:
    """One tower of every layout, in eval mode, with the same weights in every test."""
    torch.manual_seed(0)
    return randomize(LAYOUTS[request.param]())


@pytest.fixture
def images(tower: Any) -> Tensor:
    """(2, 3, H, W) of the size the tower was made for."""
    height, width = getattr(tower, "image_size", (32, 32))
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def masks(images: Tensor) -> Tensor:
    """(2, 5, H, W) proposals: two soft ones, a full one, an empty one and one of a single patch."""
    height, width = images.shape[-2:]
    masks = torch.zeros(2, 5, height, width)
    masks[:, 0] = torch.linspace(0, 1, width)  # to the right
    masks[:, 1] = torch.linspace(0, 1, height)[:, None]  # downwards
    masks[1, :2] = 1 - masks[1, :2] ** 2
    masks[:, 2] = 1
    masks[:, 4, PATCH : 2 * PATCH, :PATCH] = 1
    return masks
