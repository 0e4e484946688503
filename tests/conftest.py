"""Small image towers with random weights in both layouts, open_clip's and OpenAI's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

PATCH, WIDTH, DEPTH, HEADS, DIM = 8, 32, 3, 4, 16


class OpenAIBlock(nn.Module):
    """A residual block under OpenAI's names; the sequence comes first: (T, B, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.ln_2 = nn.LayerNorm(width)
        self.attn_mask = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenAITransformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(OpenAIBlock(width, heads) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class OpenAITower(nn.Module):
    """An image tower laid out as OpenAI's `clip.model.VisionTransformer`, for square images only."""

    def __init__(self, resolution: int, patch: int, width: int, depth: int, heads: int, dim: int) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = resolution, dim
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = OpenAITransformer(width, depth, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).mT  # (B, hw, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, 1+hw, width)
        x = self.ln_pre(x + self.positional_embedding).transpose(0, 1)  # (1+hw, B, width)
        x = self.transformer(x).transpose(0, 1)  # (B, 1+hw, width)
        return self.ln_post(x[:, 0]) @ self.proj  # (B, D)


def open_clip_tower(**options: Any) -> VisionTransformer:
    return VisionTransformer(
        **{
            "image_size": 32,
            "patch_size": PATCH,
            "width": WIDTH,
            "layers": DEPTH,
            "heads": HEADS,
            "mlp_ratio": 2.0,
            "output_dim": DIM,
            **options,
        }
    )


LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "open_clip": open_clip_tower,
    "open_clip-layer_scale": lambda: open_clip_tower(ls_init_value=0.5),
    "open_clip-no_ln_pre": lambda: open_clip_tower(no_ln_pre=True),
    "open_clip-custom_blocks": lambda: open_clip_tower(block_type="custom"),
    "open_clip-not_square": lambda: open_clip_tower(image_size=(32, 48)),
    "openai": lambda: OpenAITower(32, PATCH, WIDTH, DEPTH, HEADS, DIM),
}


def randomize(module: nn.Module) -> Any:
    """Move every parameter off its initial value, so that no zero bias or unit gain hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


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
