"""ZegFormer's shim on a stand-in with the host's names, signatures, shapes and call order.

The stand-in's ensemble is the formulas of ZegFormer's classifier written out in numpy, so it is the oracle, too. The
same behaviours on the real host are in hosts/test_zegformer.py.
"""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from maft_adapter import encode_masks, is_mask_aware, make_mask_aware
from maft_adapter.integrations.stage2 import prepare
from maft_adapter.integrations.zegformer import HOST, _class_scores, patch, unpatch

N, K, D = 100, 7, 16  # proposals, classes, width of the embeddings
SEEN, UNSEEN = [0, 2, 3, 6], [1, 4, 5]
HEIGHT, WIDTH = 100, 150  # of the image, padded to 128 x 160
MODES = {"ensembling": (True, False), "ensembling_all_cls": (False, True), "clip alone": (False, False)}
CLIP_MEAN, CLIP_STD = (122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.3231630)

Array = npt.NDArray[Any]


def softmax(logits: Array) -> Array:
    exponential = np.exp(logits - logits.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


def transcribed_scores(model: Any, mask_cls: Array, features: Array) -> Array:
    """Logits of A^p (N, K+1), CLIP's embeddings (N, D) -> the scores that multiply the masks, (N, K) float64."""
    predictor = model.sem_seg_head.predictor
    text = predictor.text_features_test_clip.double().numpy()  # (K, D)
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)  # (N, D)
    logits = math.exp(predictor.clip_model.logit_scale.item()) * unit @ text.T  # (N, K)
    clip = softmax(np.concatenate([logits, mask_cls[:, -1:]], axis=1))[:, :-1]  # (N, K)
    generator = softmax(mask_cls)[:, :-1]  # (N, K)
    if model.ensembling:
        clip[:, model.seen_indexes] = clip[:, model.seen_indexes].mean(1, keepdims=True)
        scores = generator.copy()
        for k in model.seen_indexes:
            scores[:, k] = generator[:, k] ** (2 / 3) * clip[:, k] ** (1 / 3)
        for k in model.unseen_indexes:
            scores[:, k] = generator[:, k] ** (1 / 3) * clip[:, k] ** (2 / 3)
        return scores
    return generator ** (1 / 3) * clip ** (2 / 3) if model.ensembling_all_cls else clip


def sem_seg_postprocess(result: Tensor, image_size: tuple[int, int], height: int, width: int) -> Tensor:
    result = result[None, :, : image_size[0], : image_size[1]]  # (1, C, h, w)
    return F.interpolate(result, size=(height, width), mode="bilinear", align_corners=False)[0]


def pad(images: list[Tensor]) -> Tensor:
    padded = torch.zeros(len(images), 3, 128, 160)
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return padded


class Clip(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual: Any = visual
        self.logit_scale = nn.Parameter(torch.tensor(math.log(20)))
        self.encoded: list[Tensor] = []

    def encode_image(self, image: Tensor, masks: None = None) -> Tensor:
        self.encoded.append(self.visual(image.type(self.visual.conv1.weight.dtype)))
        return self.encoded[-1]


class Predictor(nn.Module):
    def __init__(self, clip_model: Clip, clip_classification: bool) -> None:
        super().__init__()
        with torch.no_grad():  # like trained text, near to what images give: no class and no background always wins
            image = F.normalize(clip_model.visual(torch.zeros(1, 3, 224, 224)), dim=-1)  # (1, D)
        self.text_features_test = self.text_features_test_clip = F.normalize(image + 0.3 * torch.randn(K, D), dim=-1)
        self.text_features = self.text_features_clip = self.text_features_test[SEEN]
        if clip_classification:
            self.clip_model = clip_model


class Head(nn.Module):
    """Stands for pixel decoder and transformer: logits and masks that depend on the image, one mask empty."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor
        self.classes = nn.Parameter(torch.randn(N, K + 1) + 10)
        self.masks = nn.Parameter(torch.randn(N, 3))

    def forward(self, features: Tensor, images_tensor: None = None, ori_sizes: None = None) -> dict[str, Tensor]:
        coarse = F.interpolate(features, size=(4, 5), mode="area")  # (B, 3, 4, 5)
        masks = torch.einsum("nc,bchw->bnhw", self.masks, coarse - coarse.mean((2, 3), keepdim=True))
        masks = F.interpolate(masks * 20, size=(32, 40), mode="bilinear")  # (B, N, 32, 40) logits
        masks = torch.cat([masks[:, :-1], torch.full_like(masks[:, :1], -9)], dim=1)
        return {"pred_logits": self.classes + 3 * features.mean((1, 2, 3))[:, None, None], "pred_masks": masks}


class MaskFormer(nn.Module):
    def __init__(self, visual: nn.Module, clip_classification: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Identity()
        self.sem_seg_head = Head(Predictor(Clip(visual), clip_classification))
        self.clip_classification, self.clip_cls_style = clip_classification, "mask"
        self.size_divisibility, self.sem_seg_postprocess_before_inference = 32, False
        for name, value in {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}.items():
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), False)
        if clip_classification:
            self.register_buffer("clip_pixel_mean", torch.tensor(CLIP_MEAN).view(-1, 1, 1), False)
            self.register_buffer("clip_pixel_std", torch.tensor(CLIP_STD).view(-1, 1, 1), False)
        self.gzero_calibrate, self.ensembling, self.ensembling_all_cls = -1.0, True, False
        self.seen_indexes, self.unseen_indexes = SEEN, UNSEEN

    @property
    def device(self) -> torch.device:
        return self.get_buffer("pixel_mean").device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        raw = [x["image"] for x in batched_inputs]
        images = pad([(x - self.get_buffer("pixel_mean")) / self.get_buffer("pixel_std") for x in raw])
        outputs = self.sem_seg_head(self.backbone(images), None, None)
        if self.training:
            return {"loss_ce": outputs["pred_logits"].mean(), "loss_mask": outputs["pred_masks"].mean()}
        masks = F.interpolate(outputs["pred_masks"], size=(128, 160), mode="bilinear", align_corners=False)
        if self.clip_classification:
            clip_images = pad(
                [(x - self.get_buffer("clip_pixel_mean")) / self.get_buffer("clip_pixel_std") for x in raw]
            )
            inside = F.interpolate(masks, size=(224, 224), mode="bilinear").sigmoid() > 0.5
            merged = F.interpolate(clip_images, size=(224, 224), mode="bilinear")[:, None] * inside[:, :, None]
        results = []
        for i, (mask_cls, mask_pred, sample) in enumerate(
            zip(outputs["pred_logits"], masks, batched_inputs, strict=True)
        ):
            image_size = sample["image"].shape[1:]
            height, width = sample.get("height", image_size[0]), sample.get("width", image_size[1])
            if self.clip_classification:
                features = self.sem_seg_head.predictor.clip_model.encode_image(merged[i])  # type: ignore[operator, union-attr]
                scores = transcribed_scores(self, mask_cls.double().numpy(), features.double().numpy())
                mask_cls = torch.from_numpy(scores).float()
            if self.sem_seg_postprocess_before_inference:
                mask_pred = sem_seg_postprocess(mask_pred, image_size, height, width)
            r = (self.semantic_inference2 if self.clip_classification else self.semantic_inference)(mask_cls, mask_pred)
            if not self.sem_seg_postprocess_before_inference:
                r = sem_seg_postprocess(r, image_size, height, width)
            if self.gzero_calibrate > 0:
                r[self.seen_indexes, :, :] = r[self.seen_indexes, :, :] - self.gzero_calibrate
            results.append({"sem_seg": r})
        return results

    def prepare_targets(self, targets: list[Any], images: Any) -> list[dict[str, Tensor]]:
        return [
            {
                "labels": t.gt_classes,
                "masks": F.pad(t.gt_masks, (0, 160 - t.gt_masks.shape[2], 0, 128 - t.gt_masks.shape[1])),
            }
            for t in targets
        ]

    def semantic_inference(self, mask_cls: Tensor, mask_pred: Tensor) -> Tensor:
        return self.semantic_inference2(mask_cls.softmax(-1)[..., :-1], mask_pred)

    def semantic_inference2(self, mask_cls: Tensor, mask_pred: Tensor) -> Tensor:
        return torch.einsum("qc,qhw->chw", mask_cls, mask_pred.sigmoid())


@pytest.fixture
def model(build_tower: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    return MaskFormer(build_tower(image_size=224, patch_size=32)).eval()


@pytest.fixture
def batch() -> list[dict[str, Any]]:
    """Two images, the second smaller than the first, with an output size of its own."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)
    second = torch.randint(0, 256, (3, HEIGHT - 30, WIDTH - 9), dtype=torch.uint8, generator=generator)
    first[:, :40, :70] //= 4
    second[0, :, 80:] //= 3
    return [{"image": first, "height": 50, "width": 75}, {"image": second}]


def run(model: Any, batch: list[dict[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        return [result["sem_seg"] for result in model(batch)]


class Instances(NamedTuple):
    """The part of detectron2's that the host reads in training."""

    gt_classes: Tensor
    gt_masks: Tensor

    def to(self, device: torch.device) -> "Instances":
        return Instances(self.gt_classes.to(device), self.gt_masks.to(device))


def predictor_outputs(model: Any, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    return model.sem_seg_head(pad([(x["image"] - model.pixel_mean) / model.pixel_std for x in batch]))


def rounding(scale: float, dtype: torch.dtype) -> float:
    """The largest relative error of a pixel's scores when CLIP computes its logits in `dtype`.

    A logit is scale * <features, text> of unit vectors. Six values are rounded to `dtype` on the way, the norm, the
    features, scale, their product, the text and the logit, each to half a unit in the last place: so it is off by at
    most 6 * eps / 2 * scale, and by the sum of D products in float32. The softmax makes exp(2 * error) of it; what
    follows are powers below 1 and sums of positive terms, which keep relative errors.
    """
    error = scale * (6 * torch.finfo(dtype).eps + D * torch.finfo(torch.float32).eps) / 2
    return math.expm1(2 * error) + 1e-5  # the rest is float32


def set_mode(model: Any, mode: str) -> None:
    model.ensembling, model.ensembling_all_cls = MODES[mode]


def independent_embeddings(
    visual: Any, raw_model: Any, batch: list[dict[str, Any]], size: int | tuple[int, int]
) -> Tensor:
    """(B, N, D): the paper's squash of the padded image, and the proposals of the stand-in's head."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    images = F.interpolate(pad([(x["image"] - mean) / std for x in batch]), size=size, mode="bilinear")
    logits = predictor_outputs(raw_model, batch)["pred_masks"]
    masks = F.interpolate(logits, size=(128, 160), mode="bilinear").sigmoid()
    return encode_masks(SimpleNamespace(visual=visual), images.to(visual.conv1.weight.dtype), masks)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("calibrate, before", [(-1.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("mode", MODES)
def test_output_is_the_hosts_formulas_on_mask_aware_embeddings(
    model: Any, batch: list[dict[str, Any]], mode: str, calibrate: float, before: bool, dtype: torch.dtype
) -> None:
    set_mode(model, mode)
    model.gzero_calibrate, model.sem_seg_postprocess_before_inference = calibrate, before
    visual = model.sem_seg_head.predictor.clip_model.visual.to(dtype)
    embeddings = independent_embeddings(make_mask_aware(copy.deepcopy(visual), 1), model, batch, (480, 480))
    # the stand-in, with these embeddings in place of those of its crops
    expected_model = copy.deepcopy(model)
    waiting = list(embeddings)
    expected_model.sem_seg_head.predictor.clip_model.encode_image = lambda image: waiting.pop(0)
    expected = run(expected_model, batch)

    actual = run(patch(model, start_layer=1), batch)
    assert [tuple(r.shape) for r in actual] == [(K, 50, 75), (K, HEIGHT - 30, WIDTH - 9)]
    for ours, theirs in zip(actual, expected, strict=True):
        assert theirs.std() > 0.1
        for scores in (ours, theirs) if calibrate > 0 else ():
            scores[SEEN] += calibrate  # subtracted after the sums; near 0 no relative error would be small
        torch.testing.assert_close(ours, theirs, rtol=rounding(20, dtype), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_only_the_classifier_changed(
    model: Any, batch: list[dict[str, Any]], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_mode(model, mode)
    expected = run(model, batch)
    features = torch.stack(model.sem_seg_head.predictor.clip_model.encoded)  # (B, N, D) of the host's own crops
    patch(model, start_layer=1)
    different = run(model, batch)
    monkeypatch.setattr("maft_adapter.integrations.zegformer.encode_masks", lambda clip, images, masks: features)
    for ours, theirs, with_masks in zip(run(model, batch), expected, different, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (with_masks - theirs).abs().max() > 0.1


def test_unpatch_is_exact(model: Any, batch: list[dict[str, Any]]) -> None:
    before = run(model, batch)
    attributes, keys, classes = set(vars(model)), list(model.state_dict()), [type(m) for m in model.modules()]
    assert patch(model, start_layer=1) is model
    assert isinstance(model, MaskFormer)
    assert is_mask_aware(HOST.visual(model))
    assert list(model.state_dict()) == keys
    run(model, batch)
    assert unpatch(model) is model
    assert set(vars(model)) == attributes
    assert model.clip_classification
    assert [type(m) for m in model.modules()] == classes
    assert not model.sem_seg_head._forward_hooks
    assert all(torch.equal(a, b) for a, b in zip(run(model, batch), before, strict=True))


def test_one_pass_a_batch_instead_of_crops(model: Any, batch: list[dict[str, Any]]) -> None:
    patch(model, start_layer=1)
    clip_model = model.sem_seg_head.predictor.clip_model
    shapes: list[tuple[int, ...]] = []
    clip_model.visual.register_forward_pre_hook(lambda tower, arguments: shapes.append(tuple(arguments[0].shape)))
    run(model, batch)
    assert shapes == [(2, 3, 480, 480)]
    assert clip_model.encoded == []


@pytest.mark.parametrize(
    "keep, size, expected",
    [(False, 480, (480, 480)), (True, 480, (480, 608)), (False, 96, (96, 96)), (True, 96, (96, 128))],
)
@torch.no_grad()
def test_size_and_aspect_ratio(
    model: Any, batch: list[dict[str, Any]], keep: bool, size: int, expected: tuple[int, int]
) -> None:
    # 128 x 160 padded: 480 * 160 / 128 = 600 and 96 * 160 / 128 = 120 in whole patches of 32
    visual = model.sem_seg_head.predictor.clip_model.visual
    wanted = independent_embeddings(make_mask_aware(copy.deepcopy(visual), 1), model, batch, expected)
    patch(model, start_layer=1, size=size, keep_aspect_ratio=keep)
    found: list[Tensor] = []
    visual.register_forward_hook(lambda tower, arguments, output: found.append(output))
    run(model, batch)
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)


def test_second_call_changes_the_settings_only(model: Any, batch: list[dict[str, Any]]) -> None:
    fresh = run(patch(copy.deepcopy(model), start_layer=2, size=96), batch)
    before = run(model, batch)
    patch(patch(model, start_layer=1), start_layer=2, size=96)
    assert all(torch.equal(a, b) for a, b in zip(run(model, batch), fresh, strict=True))
    unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(run(model, batch), before, strict=True))


@torch.no_grad()
def test_masks_are_those_of_the_padded_image_in_both_orders(model: Any, batch: list[dict[str, Any]]) -> None:
    patch(model, start_layer=1)
    embeddings: list[Tensor] = []
    model.sem_seg_head.predictor.clip_model.visual.register_forward_hook(lambda *call: embeddings.append(call[2]))
    for before in (False, True):
        model.sem_seg_postprocess_before_inference = before
        run(model, batch)
    assert torch.equal(*embeddings)


@torch.no_grad()
def test_classes_beyond_the_data_sets_own_keep_the_generators_score(model: Any, batch: list[dict[str, Any]]) -> None:
    model.unseen_indexes = UNSEEN[:-1]
    features = torch.randn(N, D)
    mask_cls = torch.randn(N, K + 1)
    expected = transcribed_scores(model, mask_cls.double().numpy(), features.double().numpy())
    actual = _class_scores(patch(model, start_layer=1), mask_cls, features)
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual[:, UNSEEN[-1]], mask_cls.softmax(-1)[:, UNSEEN[-1]])


def test_training_forward_is_the_hosts(model: Any, batch: list[dict[str, Any]]) -> None:
    expected = model.train()(batch)
    actual = patch(model, start_layer=1)(batch)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_one_training_batch(model: Any, batch: list[dict[str, Any]]) -> None:
    patch(model, start_layer=1)
    for sample, labels in zip(batch, ([0, 3], []), strict=True):
        height, width = sample["image"].shape[1:]
        masks = torch.rand(len(labels), height, width) > 0.5
        sample["instances"] = Instances(torch.tensor(labels, dtype=torch.int64), masks)
    made = HOST.training_batch(model.train(), batch)
    predictor = model.sem_seg_head.predictor
    expected = F.interpolate(predictor_outputs(model, batch)["pred_masks"], size=(128, 160), mode="bilinear").sigmoid()
    torch.testing.assert_close(made.masks, expected)
    assert made.images.shape == (2, 3, 480, 480)
    assert made.text is predictor.text_features_clip
    assert made.logit_scale == pytest.approx(20)
    assert [label.tolist() for label in made.labels] == [[0, 3], []]
    assert [tuple(target.shape) for target in made.targets] == [(2, 128, 160), (0, 128, 160)]
    assert torch.equal(made.targets[0][:, :HEIGHT, :WIDTH], batch[0]["instances"].gt_masks)


def test_stage_2_trains_the_tower_alone_and_is_undone(model: Any, batch: list[dict[str, Any]]) -> None:
    for sample in batch:
        height, width = sample["image"].shape[1:]
        sample["instances"] = Instances(torch.tensor([1]), torch.rand(1, height, width) > 0.5)
    before, classes, keys = run(model, batch), [type(m) for m in model.modules()], list(model.state_dict())
    prepare(patch(model, start_layer=1), HOST).train()
    assert list(model.state_dict()) == keys
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert set(losses) == {"loss_mask_aware", "loss_self_distillation"}
    assert losses["loss_self_distillation"] > 0  # the teacher stayed behind
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("sem_seg_head.predictor.clip_model.visual.") for name in trained)
    assert not torch.equal(run(model.eval(), batch)[0], before[0])

    unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert model.clip_classification


def test_deepcopy_is_independent(model: Any, batch: list[dict[str, Any]]) -> None:
    original = run(patch(model, start_layer=1), batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.sem_seg_head.predictor.clip_model.visual.parameters():
            parameter.mul_(0.5)
    assert all(torch.equal(a, b) for a, b in zip(run(model, batch), original, strict=True))
    assert not torch.equal(run(twin, batch)[0], original[0])
    unpatch(twin)
    assert not model.clip_classification


def test_failing_forward_leaves_nothing_behind(model: Any, batch: list[dict[str, Any]]) -> None:
    patch(model, start_layer=1)
    expected = run(model, batch)
    with pytest.raises(RuntimeError, match="size"):
        run(model, [batch[0], {"image": torch.zeros(4, 100, 150)}])
    assert not model.sem_seg_head._forward_hooks
    assert model.embeddings == []
    assert all(torch.equal(a, b) for a, b in zip(run(model, batch), expected, strict=True))


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda model: delattr(model, "clip_classification"), TypeError, "no model of ZegFormer"),
        (lambda model: setattr(model, "region_clip_adapter", None), TypeError, "a model of zsseg, not of zegformer"),
        (lambda model: setattr(model, "clip_classification", False), ValueError, "CLIP_CLASSIFICATION True"),
        (
            lambda model: model.__dict__.update(ensembling=True, ensembling_all_cls=True),
            ValueError,
            "ENSEMBLING and ENSEMBLING_ALL_CLS",
        ),
        (lambda model: delattr(model.sem_seg_head.predictor, "clip_model"), ValueError, "no CLIP is attached"),
        (lambda model: delattr(model.sem_seg_head.predictor, "text_features_test_clip"), ValueError, "WORDVEC"),
        (
            lambda model: setattr(
                model.sem_seg_head.predictor.clip_model, "visual", ModifiedResNet([1, 1, 1, 1], D, 4, 224, width=4)
            ),
            ValueError,
            "CLIP is a ModifiedResNet.*build it with a ViT",
        ),
    ],
)
def test_wrong_models_are_refused_and_stay(
    model: Any, spoil: Callable[[Any], None], error: type[Exception], message: str
) -> None:
    spoil(model)
    attributes, classes = dict(vars(model)), [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        patch(model)
    assert vars(model) == attributes
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"start_layer": 4}, "start_layer is 4"),
        ({}, "start_layer is 8"),  # the default, of 3
        ({"start_layer": 1, "size": 0}, "size is 0, expected a multiple of the patch size 32"),
        ({"start_layer": 1, "size": 500}, "size is 500, expected a multiple of the patch size 32"),
    ],
)
def test_wrong_settings_are_refused_and_the_model_stays(model: Any, settings: dict[str, Any], message: str) -> None:
    attributes = dict(vars(model))
    for patched in (False, True):
        with pytest.raises(ValueError, match=message):
            patch(model, **settings)
        assert is_mask_aware(HOST.visual(model)) is patched
        assert vars(model) == attributes
        attributes = dict(vars(patch(model, start_layer=1)))


def test_wrappers_and_unpatched_models_are_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"patch before wrapping, or pass its \.module"):
        patch(nn.DataParallel(model))
    with pytest.raises(ValueError, match="MaskFormer is not patched"):
        unpatch(model)
