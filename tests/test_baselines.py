import math
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from maft_adapter.baselines import MergeMode, encode_crops, merge

MODES: tuple[MergeMode, ...] = ("mask", "crop", "mask_crop")
TEXT = open_clip.CLIPTextCfg(layers=1, width=32, heads=2)


def tiny_clip(**vision: Any) -> nn.Module:
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32} | vision
    return open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), TEXT).eval()


@pytest.fixture(scope="module")
def clip_model() -> nn.Module:
    return tiny_clip()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masks() -> Tensor:
    """(2, 4, 40, 24) bool: rectangle, scattered pixels, everything, nothing."""
    masks = torch.zeros(2, 4, 40, 24, dtype=torch.bool)
    masks[0, 0, 10:30, 4:20] = True
    masks[1, 0, 0:7, 17:24] = True
    masks[:, 1, 5:25, 3:11] = torch.rand(2, 20, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    masks[:, 2] = True
    return masks


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """y0, y1, x0, x1, the ends exclusive."""
    if not mask.any():
        return 0, mask.shape[0], 0, mask.shape[1]
    ys, xs = np.nonzero(mask)
    return ys.min(), ys.max() + 1, xs.min(), xs.max() + 1


def bilinear(picture: np.ndarray, y: float, x: float) -> np.ndarray:
    """Value of a (3, H, W) picture at a point whose integers are pixel centres."""
    y = min(max(y, 0.0), picture.shape[1] - 1.0)
    x = min(max(x, 0.0), picture.shape[2] - 1.0)
    y0, x0 = math.floor(y), math.floor(x)
    y1, x1 = min(y0 + 1, picture.shape[1] - 1), min(x0 + 1, picture.shape[2] - 1)
    dy, dx = y - y0, x - x0
    top = (1 - dx) * picture[:, y0, x0] + dx * picture[:, y0, x1]
    bottom = (1 - dx) * picture[:, y1, x0] + dx * picture[:, y1, x1]
    return np.asarray((1 - dy) * top + dy * bottom)


def merge_one(image: np.ndarray, mask: np.ndarray, mode: str, size: tuple[int, int]) -> np.ndarray:
    """The slow way: fill, cut, and average evenly spread bilinear samples for every output pixel."""
    picture = image.copy()
    if mode != "crop" or not mask.any():
        picture[:, ~mask] = 0
    y0, y1, x0, x1 = (0, mask.shape[0], 0, mask.shape[1]) if mode == "mask" else bounding_box(mask)
    picture = picture[:, y0:y1, x0:x1]
    step_y, step_x = (y1 - y0) / size[0], (x1 - x0) / size[1]
    samples_y, samples_x = math.ceil(step_y), math.ceil(step_x)
    result = np.zeros((3, *size))
    for i, j in np.ndindex(*size):
        for a, b in np.ndindex(samples_y, samples_x):
            y = (i + (a + 0.5) / samples_y) * step_y - 0.5
            x = (j + (b + 0.5) / samples_x) * step_x - 0.5
            result[:, i, j] += bilinear(picture, y, x) / (samples_y * samples_x)
    return result


class TestMerge:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("size", [(8, 8), (30, 9), (48, 48)])
    def test_equals_the_slow_way(self, images: Tensor, masks: Tensor, mode: MergeMode, size: tuple[int, int]) -> None:
        crops = merge(images, masks, mode, size)
        assert crops.shape == (2, 4, 3, *size)
        for b, n in np.ndindex(2, 4):
            expected = merge_one(images[b].double().numpy(), masks[b, n].numpy(), mode, size)
            np.testing.assert_allclose(crops[b, n].numpy(), expected, atol=1e-4)

    def test_box_and_fill_pixel_by_pixel(self) -> None:
        """A box of the output's size isn't resampled: the pixels come through as they are."""
        image = torch.randn(1, 3, 12, 12)
        masks = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
        masks[0, 0, 2, 3:7] = masks[0, 0, 2:6, 5] = True  # box: rows 2..5, columns 3..6
        crop = merge(image, masks, "crop", 4)[0, 0]
        torch.testing.assert_close(crop, image[0, :, 2:6, 3:7])
        filled = merge(image, masks, "mask_crop", 4)[0, 0]
        torch.testing.assert_close(filled, image[0, :, 2:6, 3:7] * masks[0, 0, 2:6, 3:7])
        torch.testing.assert_close(merge(image, masks, "mask", 12)[0, 0], image[0] * masks[0, 0])

    def test_shrinking_averages(self) -> None:
        image = torch.randn(1, 3, 8, 8)
        blocks = image.view(1, 3, 4, 2, 4, 2).mean(dim=(3, 5))
        torch.testing.assert_close(merge(image, torch.ones(1, 1, 8, 8), "mask", 4)[:, 0], blocks)

    def test_soft_masks_are_cut_at_one_half(self, images: Tensor) -> None:
        soft = torch.rand(2, 3, 40, 24)
        soft[0, 0, 0, 0] = 0.5
        assert torch.equal(merge(images, soft, size=16), merge(images, soft >= 0.5, size=16))

    @pytest.mark.parametrize("mode", MODES)
    def test_empty_mask_gives_fill(self, images: Tensor, masks: Tensor, mode: MergeMode) -> None:
        assert (merge(images, masks, mode, 16)[:, 3] == 0).all()

    @pytest.mark.parametrize("mode", MODES)
    def test_one_pixel(self, images: Tensor, mode: MergeMode) -> None:
        masks = torch.zeros(2, 1, 40, 24)
        masks[:, :, 39, 23] = 1
        assert merge(images, masks, mode, 16).isfinite().all()
        if mode != "mask":
            for y, x in ((39, 23), (0, 0), (20, 10)):
                masks = torch.zeros(2, 1, 40, 24)
                masks[:, :, y, x] = 1
                enlarged = merge(images, masks, mode, 16)[:, 0]  # (2, 3, 16, 16)
                torch.testing.assert_close(enlarged, images[:, :, y, x, None, None].expand(2, 3, 16, 16))

    @pytest.mark.parametrize("mode", ["crop", "mask_crop"])
    @pytest.mark.parametrize("size", [3, 16, 64])
    def test_nothing_beyond_the_box_gets_in(self, images: Tensor, masks: Tensor, mode: MergeMode, size: int) -> None:
        others = images.clone()
        others[0, :, :10] = others[0, :, 30:] = others[0, :, :, :4] = others[0, :, :, 20:] = 1e6
        assert torch.equal(merge(images, masks, mode, size)[0, 0], merge(others, masks, mode, size)[0, 0])

    def test_gradients_reach_the_images(self, images: Tensor, masks: Tensor) -> None:
        merge(images.requires_grad_(), masks, "mask_crop", 8).sum().backward()
        assert images.grad is not None
        assert torch.equal((images.grad != 0).any(1)[0], masks[0].any(0))

    @pytest.mark.parametrize("mode", MODES)
    def test_a_proposal_does_not_depend_on_the_others(self, images: Tensor, masks: Tensor, mode: MergeMode) -> None:
        together = merge(images, masks, mode, 16)
        for b, n in np.ndindex(2, 4):
            alone = merge(images[b : b + 1], masks[b : b + 1, n : n + 1], mode, 16)
            assert torch.equal(alone[0, 0], together[b, n])

    @pytest.mark.parametrize("mode", MODES)
    def test_no_proposals(self, images: Tensor, mode: MergeMode) -> None:
        assert merge(images, torch.zeros(2, 0, 40, 24), mode, (16, 8)).shape == (2, 0, 3, 16, 8)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_keeps_the_images_dtype(self, images: Tensor, masks: Tensor, dtype: torch.dtype) -> None:
        crops = merge(images.to(dtype), masks, size=16)
        assert crops.dtype == dtype
        torch.testing.assert_close(crops.float(), merge(images, masks, size=16), atol=0.02, rtol=0)

    def test_inputs_stay_as_they_are(self, images: Tensor, masks: Tensor) -> None:
        before = images.clone(), masks.clone()
        merge(images, masks, size=16)
        assert torch.equal(images, before[0])
        assert torch.equal(masks, before[1])

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"images": torch.zeros(2, 3, 40, 24, dtype=torch.uint8)}, TypeError, "got torch.uint8"),
            ({"images": None}, TypeError, "got NoneType"),
            ({"images": torch.zeros(2, 1, 40, 24)}, ValueError, r"\(2, 1, 40, 24\)"),
            ({"images": torch.zeros(3, 40, 24)}, ValueError, r"must be \(B, 3, H, W\)"),
            ({"images": torch.zeros(0, 3, 40, 24)}, ValueError, "at least 1"),
            ({"images": torch.full((2, 3, 40, 24), torch.nan)}, ValueError, "NaN or infinite"),
            ({"masks": [torch.ones(1, 40, 24)] * 2}, TypeError, "got list"),
            ({"masks": torch.ones(2, 4, 40, 24).int()}, TypeError, "bool or float"),
            ({"masks": torch.ones(2, 4, 20, 12)}, ValueError, "resize the masks"),
            ({"masks": torch.ones(1, 4, 40, 24)}, ValueError, "1 images, but 2"),
            ({"masks": torch.ones(4, 40, 24)}, ValueError, r"\(B, N, H, W\)"),
            ({"masks": 3 * torch.ones(2, 4, 40, 24)}, ValueError, "sigmoid"),
            ({"masks": torch.full((2, 4, 40, 24), torch.nan)}, ValueError, "without NaN"),
            ({"mode": "both"}, ValueError, "got 'both'"),
            ({"size": 0}, ValueError, "size must be"),
            ({"size": (16, 16, 16)}, ValueError, "size must be"),
        ],
    )
    def test_refuses(
        self,
        images: Tensor,
        masks: Tensor,
        changes: dict[str, Any],
        error: type[Exception],
        message: str,
    ) -> None:
        given: dict[str, Any] = {"images": images, "masks": masks, "mode": "mask", "size": 16}
        with pytest.raises(error, match=message):
            merge(**(given | changes))


class TestEncodeCrops:
    def test_full_mask_at_native_size_is_plain_clip(self, clip_model: nn.Module) -> None:
        images = torch.randn(2, 3, 32, 32)
        embeddings, valid = encode_crops(clip_model, images, torch.ones(2, 1, 32, 32), "mask")
        with torch.no_grad():
            expected = clip_model.encode_image(images)  # type: ignore[operator]
        torch.testing.assert_close(embeddings[:, 0], expected)
        assert valid.all()

    @pytest.mark.parametrize("mode", MODES)
    def test_encodes_what_merge_makes(
        self, clip_model: nn.Module, images: Tensor, masks: Tensor, mode: MergeMode
    ) -> None:
        embeddings, _ = encode_crops(clip_model, images, masks, mode)
        with torch.no_grad():
            crops = merge(images, masks, mode, 32)
            for b, n in np.ndindex(2, 4):
                expected = clip_model.encode_image(crops[b, n : n + 1])[0]  # type: ignore[operator]
                torch.testing.assert_close(embeddings[b, n], expected, atol=1e-5, rtol=1e-5)

    def test_no_batch_is_larger_than_asked_for(self, clip_model: nn.Module, images: Tensor, masks: Tensor) -> None:
        seen: list[tuple[int, ...]] = []
        visual: Any = clip_model.visual
        handle = visual.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
        try:
            by_three, valid_by_three = encode_crops(clip_model, images, masks, batch_size=3)
        finally:
            handle.remove()
        assert seen == [(3, 3, 32, 32), (3, 3, 32, 32), (2, 3, 32, 32)]
        at_once, valid = encode_crops(clip_model, images, masks)
        torch.testing.assert_close(by_three, at_once, atol=1e-5, rtol=1e-5)
        assert torch.equal(valid_by_three, valid)

    @pytest.mark.parametrize("mode", MODES)
    def test_soft_masks_are_cut_at_one_half(self, clip_model: nn.Module, images: Tensor, mode: MergeMode) -> None:
        soft = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(2))
        soft[0, 0], soft[0, 1] = 0, 0.49  # one pixel of exactly a half is inside, and nothing below
        soft[0, 0, 7, 9] = 0.5
        embeddings, valid = encode_crops(clip_model, images, soft, mode)
        expected, _ = encode_crops(clip_model, images, soft >= 0.5, mode)
        assert torch.equal(embeddings, expected)
        assert valid.tolist() == [[True, False, True], [True] * 3]

    def test_memory_does_not_grow_with_the_number_of_proposals(self, clip_model: nn.Module) -> None:
        """64 boxes of 8x8 pixels: no step on the way takes more than the picture itself."""
        images, masks = torch.randn(1, 3, 400, 500), torch.zeros(1, 64, 400, 500, dtype=torch.bool)
        for n in range(64):
            masks[0, n, 5 * n : 5 * n + 8, 100:108] = True
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            encode_crops(clip_model, images, masks, batch_size=4)
        assert max(event.cpu_memory_usage for event in record.events()) <= images.nbytes

    def test_towers_that_give_tokens_besides(self, clip_model: nn.Module, images: Tensor, masks: Tensor) -> None:
        both = tiny_clip(output_tokens=True)
        both.load_state_dict(clip_model.state_dict())
        for actual, expected in zip(
            encode_crops(both, images, masks), encode_crops(clip_model, images, masks), strict=True
        ):
            assert torch.equal(actual, expected)
        assert encode_crops(both, images, masks[:, :0])[0].shape == (2, 0, 16)

    def test_empty_masks_are_reported(self, clip_model: nn.Module, images: Tensor, masks: Tensor) -> None:
        embeddings, valid = encode_crops(clip_model, images, masks)
        assert valid.tolist() == [[True, True, True, False]] * 2
        assert embeddings.isfinite().all()
        _, faint = encode_crops(clip_model, images, 0.4 * masks.float())
        assert not faint.any()

    def test_no_proposals(self, clip_model: nn.Module, images: Tensor) -> None:
        embeddings, valid = encode_crops(clip_model, images, torch.zeros(2, 0, 40, 24))
        assert embeddings.shape == (2, 0, 16)
        assert valid.shape == (2, 0)
        assert valid.dtype == torch.bool

    def test_normalize(self, clip_model: nn.Module, images: Tensor, masks: Tensor) -> None:
        plain, _ = encode_crops(clip_model, images, masks)
        unit, _ = encode_crops(clip_model, images, masks, normalize=True)
        torch.testing.assert_close(unit, plain / plain.norm(dim=-1, keepdim=True))

    def test_no_gradient(self, clip_model: nn.Module, images: Tensor, masks: Tensor) -> None:
        assert not encode_crops(clip_model, images, masks)[0].requires_grad

    @pytest.mark.parametrize(
        "vision",
        [
            {"image_size": (32, 16)},
            {"layers": (1, 1, 1, 1), "width": 8, "head_width": 16},
            {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
        ],
        ids=["non-square ViT", "ResNet", "timm"],
    )
    def test_other_towers(self, images: Tensor, masks: Tensor, vision: dict[str, Any]) -> None:
        model = tiny_clip(**vision)
        embeddings, _ = encode_crops(model, images, masks)
        native = vision.get("image_size", 32)
        with torch.no_grad():
            expected = model.encode_image(merge(images, masks, size=native).flatten(0, 1))  # type: ignore[operator]
        torch.testing.assert_close(embeddings.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
        assert encode_crops(model, images, masks[:, :0])[0].shape == (2, 0, 16)

    def test_original_clip_needs_a_size(self, clip_model: nn.Module, images: Tensor, masks: Tensor) -> None:
        class OriginalVisual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tower = clip_model.visual

            def forward(self, x: Tensor) -> Tensor:
                return self.tower(x)  # type: ignore[operator]

        class OriginalClip(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.visual = OriginalVisual()

            def encode_image(self, image: Tensor) -> Tensor:
                return self.visual(image)

        original = OriginalClip().eval()
        with pytest.raises(ValueError, match="size=224"):
            encode_crops(original, images, masks)
        torch.testing.assert_close(
            encode_crops(original, images, masks, size=32), encode_crops(clip_model, images, masks)
        )

    def test_training_mode_is_refused_and_nothing_changes(self, images: Tensor, masks: Tensor) -> None:
        model = tiny_clip(layers=(1, 1, 1, 1), width=8).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"call clip_model.eval\(\)"):
            encode_crops(model, images, masks)
        assert model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    @pytest.mark.parametrize("batch_size", [0, -1])
    def test_refuses_batch_size(self, clip_model: nn.Module, images: Tensor, masks: Tensor, batch_size: int) -> None:
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
            encode_crops(clip_model, images, masks, batch_size=batch_size)

    def test_refuses_what_merge_refuses(self, clip_model: nn.Module, images: Tensor) -> None:
        with pytest.raises(ValueError, match="resize the masks"):
            encode_crops(clip_model, images, torch.ones(2, 4, 20, 12))
