"""Our embeddings beside those of the authors' released code, with the same weights, images and masks.

MAFT_ROOT names a checkout of that code; its CLIP is imported from the file, nothing of it is installed.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor

from maft_adapter import make_mask_aware

pytestmark = pytest.mark.skipif(
    "MAFT_ROOT" not in os.environ, reason="MAFT_ROOT names no checkout of the authors' code"
)

NATIVE, PATCH, WIDTH, DEPTH, HEADS, DIM = 64, 8, 64, 4, 4, 32
SIZES = [NATIVE, 120]  # grids of 8x8, the native one, and 15x15
N = 100  # the only number of proposals that their code takes


@pytest.fixture(scope="module")
def authors_model() -> Any:
    path = Path(os.environ["MAFT_ROOT"], "third_party", "CLIP", "clip", "model.py")
    spec = importlib.util.spec_from_file_location("authors_clip_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def authors(authors_model: Any) -> Any:
    """Their tower, anew for every test: its blocks cache a mask that fits one resolution only."""
    torch.manual_seed(0)
    tower = authors_model.IP_CLIP(NATIVE, PATCH, WIDTH, DEPTH, HEADS, DIM)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tower.eval()


@pytest.fixture
def ours(authors: Any) -> VisionTransformer:
    tower = VisionTransformer(NATIVE, PATCH, WIDTH, DEPTH, HEADS, mlp_ratio=4.0, output_dim=DIM, act_layer=QuickGELU)
    tower.load_state_dict(authors.state_dict())
    return tower.eval()


def random_images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def soft_masks() -> Tensor:
    """(2, 100, 48, 48), among them a full and an empty one."""
    coarse = torch.rand(2, N, 5, 5, generator=torch.Generator().manual_seed(2))
    masks = F.interpolate(coarse, size=(48, 48), mode="bilinear")
    masks[:, 0], masks[:, 1] = 1, 0
    return masks


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("start_layer", range(DEPTH))
def test_embeddings_of_proposals(authors: Any, ours: Any, size: int, start_layer: int) -> None:
    images, masks = random_images(size), soft_masks()
    authors.transformer.start_layers = start_layer
    expected = authors(images, masks)  # (2, 100, D)
    actual = make_mask_aware(ours, start_layer)(images, masks)
    assert expected.std(dim=1).min() > 0.01  # the proposals differ
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_embeddings_of_images(authors: Any, ours: Any, size: int) -> None:
    images, masks = random_images(size), soft_masks()
    expected = authors(images)  # (2, D)
    make_mask_aware(ours, 2)
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(images, masks, with_image=True)[1], expected, rtol=0, atol=1e-5)
