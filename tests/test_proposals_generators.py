"""SAM, SAM 2, Mask2Former and MaskFormer of transformers: small ones with random weights, loaded from folders."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hugging_face
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from maft_adapter.proposals import base, check_proposals, proposer
from maft_adapter.proposals import generators as generators_module
from maft_adapter.proposals.generators import Mask2Former, Sam

SIDE = 64
transformers: Any = hugging_face  # its configurations take more than their signatures say
DECODER = {
    "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16
}  # fmt: skip
PROMPTS = {"hidden_size": 16, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4}
SWIN: dict[str, Any] = {
    "image_size": 32, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
HIERA = {
    "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [SIDE, SIDE], "blocks_per_stage": [1] * 4,
    "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1] * 4, "window_size_per_stage": [4] * 4,
    "global_attention_blocks": [], "window_positional_embedding_background_size": [2, 2],
}  # fmt: skip
SAM2_VISION = {
    "backbone_config": HIERA, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 16,
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}  # fmt: skip


def sam() -> tuple[Any, Any]:
    vision = {
        "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16,
        "image_size": SIDE, "patch_size": 16, "window_size": 0, "global_attn_indexes": [0], "num_pos_feats": 8,
    }  # fmt: skip
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER)
    processor = transformers.SamImageProcessor(
        size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE}, mask_size={"longest_edge": 16}
    )
    return transformers.SamModel(config), processor


def sam2() -> tuple[Any, Any]:
    config = transformers.Sam2Config(
        vision_config=SAM2_VISION, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER
    )
    return transformers.Sam2Model(config), transformers.Sam2ImageProcessor(size={"height": SIDE, "width": SIDE})


def mask2former(**processing: Any) -> tuple[Any, Any]:
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16,
        num_queries=7, num_labels=5,
    )  # fmt: skip
    processing = {"size": {"shortest_edge": 64, "longest_edge": 128}, "size_divisor": 32, **processing}
    processor = transformers.Mask2FormerImageProcessor(**processing)
    return transformers.Mask2FormerForUniversalSegmentation(config), processor


def maskformer() -> tuple[Any, Any]:
    decoder = transformers.DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, num_queries=6, decoder_attention_heads=2,
        encoder_attention_heads=2, decoder_ffn_dim=16, encoder_ffn_dim=16,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=transformers.SwinConfig(**SWIN),
        decoder_config=decoder, num_labels=5,
    )  # fmt: skip
    processor = transformers.MaskFormerImageProcessor(size={"height": 64, "width": 96}, size_divisor=32)
    return transformers.MaskFormerForInstanceSegmentation(config), processor


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(build)`: the folder of a model with random weights and its image processor."""

    def save(build: Callable[[], tuple[Any, Any]], name: str = "model") -> Path:
        torch.manual_seed(0)
        model, processor = build()
        for parameter in model.parameters():  # the libraries' own initial weights hardly tell pictures apart
            torch.nn.init.normal_(parameter, std=0.4)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def picture(height: int, width: int) -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return noise[np.arange(height) * 4 // height][:, np.arange(width) * 4 // width]


@pytest.mark.parametrize("build", [sam, sam2])
@pytest.mark.parametrize("size", [(40, 90), (90, 40), (50, 50)])
def test_sam_is_asked_all_over_the_picture(
    build: Callable[[], Any], size: tuple[int, int], saved: Callable[..., Path]
) -> None:
    """Against the model's own processor, asked point by point, without the pipeline."""
    folder = saved(build)
    generator = Sam(str(folder), points_per_side=3, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1)
    model = generator._pipeline.model
    asked: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, __, inputs: asked.append(inputs["input_points"]), with_kwargs=True)
    found = generator(picture(*size))
    hook.remove()
    check_proposals(found, size)

    images = transformers.AutoImageProcessor.from_pretrained(folder)
    processor: Any = transformers.SamProcessor(images) if build is sam else transformers.Sam2Processor(images, SIDE)
    height, width = size
    points, logits, scores = [], [], []
    for y, x in itertools.product((1 / 6, 3 / 6, 5 / 6), repeat=2):
        point = [[x * width, y * height]]
        inputs = processor(picture(*size), input_points=[point if build is sam else [point]], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**{name: value for name, value in inputs.items() if "sizes" not in name})
        sizes = [inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
        logits.append(processor.post_process_masks(outputs.pred_masks, *sizes, binarize=False)[0][0])
        scores.append(outputs.iou_scores[0, 0])
        points.append(inputs["input_points"])
    assert torch.allclose(torch.cat(asked, 1).flatten().double(), torch.cat(points).flatten().double(), atol=1e-3)
    order = torch.cat(scores).argsort(descending=True)
    assert found.scores is not None and len(found.scores) == 9 * 3
    assert np.allclose(found.scores, torch.cat(scores)[order].clamp(0, 1), atol=1e-4)
    assert (found.masks == (torch.cat(logits)[order] > 0).numpy()).mean() > 0.99  # scores may be nearly equal


@pytest.mark.parametrize("build", [sam, sam2])
def test_sam_takes_pictures_of_any_size(
    build: Callable[[], Any], saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(saved(build))
    generator = Sam(folder, points_per_side=2, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    for size in ((1, 1), (1, 30), (3, 20), (300, 7)):
        found = generator(picture(*size))
        check_proposals(found, size)
        assert found.masks.dtype == bool and len(found.masks)
    whole = generator(picture(30, 50))
    monkeypatch.setattr(generators_module, "_AT_ONCE", 1)  # one point at a time, as for large pictures
    assert np.array_equal(generator(picture(30, 50)).masks, whole.masks)
    with pytest.raises(ValueError, match="picture is 1 x 129: 64 pixels long it would be none wide"):
        generator(picture(1, 129))
    nothing = Sam(folder, points_per_side=2, stability_score_thresh=1.0)(picture(30, 50))
    check_proposals(nothing, (30, 50))
    assert nothing.masks.shape == (0, 30, 50) and nothing.scores is not None and nothing.scores.shape == (0,)


def test_checkpoints_of_sam_2_for_videos(saved: Callable[..., Path]) -> None:
    """The released checkpoints of SAM 2 are such: the model for pictures is part of it."""

    def video() -> tuple[Any, Any]:
        config = transformers.Sam2VideoConfig(
            vision_config=SAM2_VISION, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER,
            image_size=SIDE, memory_attention_hidden_size=16, memory_attention_num_layers=1,
            memory_attention_feed_forward_hidden_size=16, memory_encoder_hidden_size=16, memory_fuser_embed_dim=16,
            memory_encoder_output_channels=16, memory_fuser_intermediate_dim=16,
            mask_downsampler_embed_dim=16,
            memory_attention_rope_feat_sizes=[4, 4],
        )  # fmt: skip
        return transformers.Sam2VideoModel(config), sam2()[1]

    found = Sam(str(saved(video)), points_per_side=2, pred_iou_thresh=0.0, stability_score_thresh=0.0)(picture(9, 12))
    check_proposals(found, (9, 12))
    assert len(found.masks)


@pytest.mark.parametrize("build", [mask2former, maskformer])
@pytest.mark.parametrize("size", [(40, 60), (1, 1), (90, 33), (1, 40)])
def test_queries_are_soft_masks_with_class_scores(
    build: Callable[[], Any], size: tuple[int, int], saved: Callable[..., Path]
) -> None:
    folder = saved(build)
    masks, scores, class_scores = found = proposer(f"mask2former:{folder}")(picture(*size))
    check_proposals(found, size)
    model = transformers.AutoModelForUniversalSegmentation.from_pretrained(folder).eval()
    processor: Any = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = processor(
        images=torch.from_numpy(picture(*size)).permute(2, 0, 1),
        return_tensors="pt",
        input_data_format="channels_first",
    )
    with torch.no_grad():
        outputs = model(pixel_values=inputs["pixel_values"])
    logits = outputs.masks_queries_logits  # (1, N, h, w)
    logits = F.interpolate(logits, inputs["pixel_values"].shape[-2:], mode="bilinear", align_corners=False)
    expected = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].sigmoid()
    assert masks.dtype == np.float32 and np.allclose(masks, expected, atol=1e-4)
    probabilities = outputs.class_queries_logits[0].softmax(-1).numpy()
    assert class_scores is not None and np.allclose(class_scores, probabilities, atol=1e-5)
    assert class_scores.shape == (len(masks), 5 + 1)  # five labels; "no object" is the last of the model's, too
    quality = [mask[mask > 0.5].mean() if (mask > 0.5).any() else 0 for mask in masks]
    assert scores is not None and np.allclose(scores, probabilities[:, :-1].max(1) * quality, atol=1e-4)


def test_queries_of_a_huge_picture_are_refused(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Mask2Former(str(saved(mask2former)))
    monkeypatch.setattr(base, "MOST_PIXELS", 7 * 40 * 60 - 1)
    with pytest.raises(ValueError, match="masks of 7 x 40 x 60 pixels are more than a picture may have"):
        generator(picture(40, 60))


def test_padding_is_cut_off(saved: Callable[..., Path]) -> None:
    padded = saved(lambda: mask2former(pad_size={"height": 160, "width": 192}), "padded")
    generator = Mask2Former(str(padded))
    shape = (64, 96)
    inputs = generator._processor(images=torch.from_numpy(picture(*shape)).permute(2, 0, 1), return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (160, 192) and inputs["pixel_mask"].sum() == 64 * 96
    with torch.no_grad():
        logits = generator._network(**inputs).masks_queries_logits
    whole = F.interpolate(logits, (160, 192), mode="bilinear", align_corners=False)[0].sigmoid()
    assert np.allclose(generator(picture(*shape)).masks, whole[:, :64, :96], atol=1e-4)


def test_settings_tell_models_apart(saved: Callable[..., Path]) -> None:
    folder = saved(sam)
    one = Sam(str(folder), points_per_side=2).settings
    assert Sam(str(folder), points_per_side=2).settings == one
    assert Sam(str(folder), points_per_side=3).settings != one
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert Sam(str(folder), points_per_side=2).settings != one


def test_models_of_another_kind_and_damaged_ones_are_refused(saved: Callable[..., Path]) -> None:
    folder = saved(sam)
    with pytest.raises(
        ValueError, match="is no model of transformers of the kind mask2former or maskformer: it is a sam"
    ):
        proposer(f"mask2former:{folder}")
    with pytest.raises(OSError, match=r"'/no/such/folder' is no model of transformers of the kind sam or sam2"):
        proposer("sam:/no/such/folder")
    weights = load_file(folder / "model.safetensors")
    part = {name: tensor for name, tensor in weights.items() if "mask_decoder.transformer" not in name}
    save_file(part, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks weights: mask_decoder.transformer"):
        proposer(f"sam:{folder}")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ValueError, OSError), match=f"'{folder}' is no model"):
        proposer(f"sam:{folder}")


@pytest.mark.parametrize(
    "spec", ["", "sam:", "mask2former:", "superpixels:", "superpixels:3", "files", "files:", "SAM"]
)
def test_a_wrong_spec_names_the_choices(spec: str) -> None:
    with pytest.raises(ValueError, match=f"proposals are '{spec}'; expected superpixels, sam, sam:MODEL, mask2former"):
        proposer(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points_per_side": 0}, "points_per_side is 0, expected at least 1"),
        ({"pred_iou_thresh": 88}, r"pred_iou_thresh is 88, expected a number in \[0, 1\]"),
        ({"box_nms_thresh": float("nan")}, "is nan, expected"),
    ],
)
def test_numbers_out_of_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sam("/no/such/folder", **options)
