"""OVSeg's shim on a stand-in: mask prompts, three values instead of two, one weight for all classes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer
from region_hosts import DIM, SEMANTIC, MaskFormer, MaskFormerClipAdapter, array, inputs, oracle
from torch import Tensor, nn

from maft_adapter import is_mask_aware
from maft_adapter.checkpoint import load_mask_aware, save_mask_aware
from maft_adapter.integrations import stage2, zsseg
from maft_adapter.integrations.ovseg import HOST, load_visual, patch, unpatch, visual, without_mask_prompts

PROMPTS = "clip_adapter.clip_model.visual.mask_embedding"


class PromptedViT(VisionTransformer):  # type: ignore[misc]
    """OVSeg's: patches outside of a mask are replaced by what was learned."""

    def __init__(self) -> None:
        super().__init__(32, 8, 32, 3, 4, mlp_ratio=2.0, output_dim=DIM)
        self.grid_size = 4  # open_clip's is a pair
        self.mask_pool = nn.AvgPool2d(8, stride=8)
        self.mask_embedding = nn.Parameter(torch.randn(3, 16, 32))

    def forward(self, x: Tensor, m: Tensor | None = None) -> Any:
        if m is not None:
            inside = nn.functional.interpolate(self.mask_pool(m).ceil(), scale_factor=8)
            x = x * inside + self.mask_embedding.mean() * (1 - inside)
        return super().forward(x)


class OVSegAdapter(MaskFormerClipAdapter):
    def __init__(self, mask_thr: float, mask_prompt_fwd: bool) -> None:
        super().__init__(False, mask_thr)
        self.clip_model.visual, self.mask_prompt_fwd = PromptedViT(), mask_prompt_fwd

    def forward(self, image: Tensor, text: list[str], mask: Tensor, normalize: bool = True) -> Any:  # type: ignore[override]
        (regions, unnorm), region_masks, valid = self._preprocess_image(image, mask, normalize=normalize)
        if regions is None:
            return None, valid
        features = self.get_image_features(regions, *([region_masks] if self.mask_prompt_fwd else []))
        return self.get_sim_logits(self.get_text_features(text), features), unnorm, valid

    def _preprocess_image(self, image: Tensor, mask: Tensor, normalize: bool = True) -> Any:
        regions, valid = super()._preprocess_image(image, mask, normalize)
        if regions is None:
            return None, valid
        masks = nn.functional.interpolate(1.0 * (mask > self.mask_thr)[valid, None], regions.shape[-2:])
        return (regions, 255 * regions), masks, valid

    def get_image_features(self, image: Tensor, region_masks: Tensor | None = None) -> Tensor:
        features = self.clip_model.visual(image, region_masks)
        return features / features.norm(dim=-1, keepdim=True)


class OVSeg(MaskFormer):
    """With one CLIP under one name only, and one weight for seen and unseen classes."""

    def __init__(self, weight: float = 0.7, mask_thr: float = 0.5, mask_prompt_fwd: bool = True) -> None:
        super().__init__(with_tasks=False, weight=weight)
        self.clip_adapter = OVSegAdapter(mask_thr, mask_prompt_fwd)

    @property
    def region_clip_adapter(self) -> Any:
        raise AttributeError("OVSeg has none")

    def semantic_inference(self, mask_cls: Tensor, mask_pred: Tensor, image: Tensor, names: Any, *_: Any) -> Tensor:
        mask_cls, mask_pred = mask_cls.softmax(-1)[..., :-1], mask_pred.sigmoid()  # (N, K), (N, h, w)
        clip_cls, _, valid = self.clip_adapter(image, names, mask_pred, normalize=True)
        if clip_cls is None:
            clip_cls = torch.empty(0, mask_cls.shape[-1] + 1)
        clip_cls = clip_cls[:, :-1].softmax(-1)
        if self.clip_ensemble_weight <= 0:
            return torch.einsum("qc,qhw->chw", clip_cls, mask_pred[valid])
        everywhere = torch.ones_like(mask_cls)
        everywhere[valid] = clip_cls
        mask_cls = mask_cls ** (1 - self.clip_ensemble_weight) * everywhere**self.clip_ensemble_weight
        return torch.einsum("qc,qhw->chw", mask_cls, mask_pred)


@pytest.fixture
def build() -> Callable[..., OVSeg]:
    """`build(**options)`: a stand-in of OVSeg's model in eval mode, with the same weights in every test."""

    def build(**options: Any) -> OVSeg:
        torch.manual_seed(0)
        return OVSeg(**options).eval()

    return build


def as_zsseg(model: OVSeg) -> MaskFormer:
    """The same model as its forebear, whose tower has no mask prompts."""
    other = MaskFormer(with_tasks=False, weight=model.clip_ensemble_weight, mask_thr=model.clip_adapter.mask_thr)
    other.load_state_dict({name: value for name, value in model.state_dict().items() if name != PROMPTS})
    return other.eval()


@torch.no_grad()
def segment(model: Any) -> list[Tensor]:
    return [result[SEMANTIC] for result in model(inputs("plain"))]


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"mask_prompt_fwd": False}, {"weight": 0.0}, {"mask_thr": 0.9}, {"weight": 0.0, "mask_thr": 0.9}],
    ids=str,
)  # fmt: skip
def test_scores_are_those_of_the_formulas(build: Any, options: dict[str, Any]) -> None:
    model = build(**options)
    expected = [oracle(as_zsseg(model), x["image"], "plain", SEMANTIC, 1, 64) for x in inputs()]
    crops = segment(model)
    model.clip_adapter.crops = 0
    for a, b, c in zip(segment(patch(model, start_layer=1, size=64)), expected, crops, strict=True):
        np.testing.assert_allclose(array(a), b, rtol=0, atol=1e-5)
        assert not torch.allclose(a, c, atol=1e-3)
    assert model.clip_adapter.crops == 0


@torch.no_grad()
def test_no_valid_proposal(build: Any) -> None:
    """OVSeg fails; patched, A^c is 1 for all proposals, as in ZSSeg, and CLIP does not run."""
    model = build(mask_thr=1.0)
    with pytest.raises(ValueError, match="unpack"):
        segment(model)
    expected = [oracle(as_zsseg(model), x["image"], "plain", SEMANTIC, 1, 64) for x in inputs()]
    patch(model, start_layer=1, size=64)
    visual(model).register_forward_pre_hook(lambda *_: pytest.fail("CLIP ran"))
    for a, b in zip(segment(model), expected, strict=True):
        np.testing.assert_allclose(array(a), b, rtol=0, atol=1e-5)


def test_unpatched_again(build: Any) -> None:
    model = build()
    before, keys, types = segment(model), list(model.state_dict()), [type(m) for m in model.modules()]
    prompts = visual(model).mask_embedding
    assert patch(model, start_layer=1, size=64) is model
    assert is_mask_aware(visual(model)) and list(model.state_dict()) == keys
    first = segment(model)
    patch(model, start_layer=3, size=64)  # a second call changes the settings
    assert not torch.equal(segment(model)[0], first[0])
    assert unpatch(model) is model
    assert [type(m) for m in model.modules()] == types and visual(model).mask_embedding is prompts
    assert all(torch.equal(a, b) for a, b in zip(before, segment(model), strict=True))
    with pytest.raises(ValueError, match="nothing to undo"):
        unpatch(model)


def test_refusals_change_nothing(build: Any) -> None:
    model = build()
    before, types, keys = segment(model), [type(m) for m in model.modules()], list(model.state_dict())
    for arguments, message in [
        ({"size": 60}, "size is 60, expected a multiple of the patch size 8; take 64"),
        ({"start_layer": 4}, "start_layer is 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            patch(model, **{"start_layer": 1, "size": 64, **arguments})
    model.clip_ensemble = False
    with pytest.raises(ValueError, match=r"ovseg never asks CLIP here: .*CLIP_ENSEMBLE True"):
        patch(model)
    assert [type(m) for m in model.modules()] == types and list(model.state_dict()) == keys
    assert torch.equal(segment(model)[0], before[0])
    with pytest.raises(TypeError, match=r"model of zsseg, not of ovseg; use maft_adapter\.integrations\.zsseg"):
        patch(as_zsseg(model))
    with pytest.raises(TypeError, match=r"model of ovseg, not of zsseg; use maft_adapter\.integrations\.ovseg"):
        zsseg.patch(model)


def test_stage_2_is_zsseg_s_without_the_mask_prompts(build: Any) -> None:
    model, other = build(), as_zsseg(build())
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    stage2.prepare(patch(model, start_layer=1, size=64), HOST)
    stage2.prepare(zsseg.patch(other, start_layer=1, size=64), zsseg.HOST)
    for each in (model, other):
        with torch.no_grad():
            visual(each).proj.add_(torch.eye(32, DIM))  # as if trained: it differs from the teacher
    losses = model.train()(inputs())
    assert losses == other.train()(inputs()) and losses["loss_self_distillation"] > 1e-6
    sum(losses.values()).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert PROMPTS not in trained
    # Every one gets a gradient: DDP, as detectron2 sets it up, would wait for it.
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert list(model.state_dict()) == keys and torch.equal(model.state_dict()[PROMPTS], before[PROMPTS])


@pytest.mark.parametrize("prefix", ["visual.", "clip_adapter.clip_model.visual.", "module.visual."])
@pytest.mark.parametrize("patched", [True, False])
def test_towers_with_and_without_mask_prompts_are_loaded(
    build: Any, tmp_path: Path, prefix: str, patched: bool
) -> None:
    model = patch(build(), start_layer=1, size=64) if patched else build()
    keys, prompts = list(model.state_dict()), visual(model).mask_embedding.detach().clone()
    weights = {name: value + 1 for name, value in visual(model).state_dict().items()}
    full = {f"{prefix}{name}": value for name, value in weights.items()}
    bare = {name: value for name, value in full.items() if "mask_embedding" not in name}

    torch.save({"state_dict": bare}, tmp_path / "clip.pt")
    load_visual(visual(model), tmp_path / "clip.pt")
    assert torch.equal(visual(model).proj, weights["proj"])
    assert torch.equal(visual(model).mask_embedding, prompts)

    torch.save({"model": full}, tmp_path / "ovseg.pth")
    load_visual(visual(model), tmp_path / "ovseg.pth")
    assert torch.equal(visual(model).mask_embedding, prompts + 1)
    assert list(model.state_dict()) == keys


def test_a_tower_that_does_not_fit_changes_nothing(build: Any, tmp_path: Path) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    weights = {name: value + 1 for name, value in visual(model).state_dict().items()}
    for spoiled, message in (
        ({**weights, "mask_embedding": torch.zeros(0, 16, 32)}, r"mask_embedding \(0, 16, 32\) for \(3, 16, 32\)"),
        ({name: value for name, value in weights.items() if name not in ("mask_embedding", "proj")}, "lacks proj"),
    ):
        torch.save(spoiled, tmp_path / "tower.pth")
        with pytest.raises(ValueError, match=message):
            load_visual(visual(model), tmp_path / "tower.pth")
        assert list(before) == list(model.state_dict())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_export_to_another_host(build: Any, tmp_path: Path) -> None:
    model = patch(build(), start_layer=1, size=64)
    with without_mask_prompts(visual(model)) as tower:
        save_mask_aware(tower, tmp_path / "tower.safetensors")
    other = MaskFormer(with_tasks=False).eval()
    load_mask_aware(visual(other), tmp_path / "tower.safetensors")
    images, masks = torch.randn(1, 3, 64, 64), torch.ones(1, 2, 8, 8)
    with torch.no_grad():
        assert torch.equal(visual(model)(images, masks), visual(other)(images, masks))
    load_visual(visual(model), tmp_path / "tower.safetensors")  # and back


def test_mask_prompts_are_put_back_after_an_error(build: Any) -> None:
    tower = visual(build())
    with pytest.raises(KeyError), without_mask_prompts(tower):
        raise KeyError
    assert list(tower.state_dict()) == list(visual(build()).state_dict())
    assert isinstance(tower.mask_pool, nn.AvgPool2d)
