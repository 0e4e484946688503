"""Whole models of transformers: a tower patched inside, what `encode_masks` makes of it, and its text classifier."""

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import DEPTH, HEADS, PATCH, WIDTH, random_images, random_masks, randomize

from maft_adapter import encode_features, encode_image, encode_masks, encode_masks_and_image, make_mask_aware
from maft_adapter.masks import masks_on_grid

SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
}
VISION = {**SMALL, "image_size": 32, "patch_size": PATCH}
TEXT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 12}
WITH_CLASS_TOKEN = ["CLIP", "MetaClip2", "AltCLIP", "ChineseCLIP"]
IMAGES, MASKS = random_images((32, 32)), random_masks(5, (20, 28))


def whole(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")
    projected = {} if kind.startswith("Siglip") else {"projection_dim": 16}
    torch.manual_seed(0)
    text = {**TEXT, **({"project_dim": 16} if kind == "AltCLIP" else {})}
    return randomize(getattr(transformers, f"{kind}Model")(config(vision_config=VISION, text_config=text, **projected)))


def image_features(model: Any) -> Tensor:
    output = model.get_image_features(pixel_values=IMAGES)
    return output if isinstance(output, Tensor) else output.pooler_output


def one_at_a_time(model: Any, start_layer: int) -> Tensor:
    """IP-CLIP by an unpatched model's own layers, a sequence of tokens for each proposal; see tests/test_blocks.py."""
    vision = model.vision_model

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        encoder = copy.copy(vision.encoder)  # knows what its layers take besides tokens, in every version
        encoder._modules = {"layers": nn.ModuleList([layer])}
        return encoder(inputs_embeds=x).last_hidden_state

    tokens = vision.pre_layrnorm(vision.embeddings(IMAGES))  # (B, 1+hw, width)
    layers, inside = vision.encoder.layers, masks_on_grid(MASKS, (4, 4)).flatten(2)  # (B, N, hw)
    for layer in layers[:start_layer]:
        tokens = run(layer, tokens)
    rows = []
    for b, n in itertools.product(range(2), range(5)):
        class_token, patches = tokens[b : b + 1, :1], tokens[b : b + 1, 1:]
        for layer in layers[start_layer:]:
            both = torch.cat([class_token, patches[:, inside[b, n]]], dim=1)
            class_token, patches = run(layer, both)[:, :1], run(layer, patches)
        rows.append(model.visual_projection(vision.post_layernorm(class_token[:, 0])))
    return torch.cat(rows).unflatten(0, (2, 5))


@torch.no_grad()
@pytest.mark.parametrize("kind", [*WITH_CLASS_TOKEN, "Siglip"])
def test_masks_of_a_whole_model(kind: str) -> None:
    model = whole(kind)
    expected_image = image_features(model)
    expected = one_at_a_time(model, 1) if kind in WITH_CLASS_TOKEN else None
    settings: dict[str, Any] = {"start_layer": 1} if kind in WITH_CLASS_TOKEN else {}
    make_mask_aware(model.vision_model, **settings)
    assert torch.equal(image_features(model), expected_image)  # it stays itself
    embeddings, image = encode_masks_and_image(model, IMAGES, MASKS)
    assert embeddings.shape == (2, 5, expected_image.shape[1])  # as wide as the text's: projected
    torch.testing.assert_close(image, expected_image, rtol=0, atol=1e-4)
    torch.testing.assert_close(encode_image(model, IMAGES), expected_image)
    if expected is not None:
        torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-4)
    else:
        full = encode_masks(model, IMAGES, torch.ones(2, 1, 8, 8))[:, 0]
        torch.testing.assert_close(full, expected_image, rtol=0, atol=1e-4)
    features = encode_features(model, IMAGES)
    assert torch.equal(encode_masks(model, features, MASKS), embeddings)
    torch.testing.assert_close(encode_image(model, features), image)
    # The tower by itself knows nothing of the projection beside it.
    alone = model.vision_model(IMAGES, MASKS)
    projection = getattr(model, "visual_projection", nn.Identity())
    torch.testing.assert_close(projection(alone), embeddings)


@pytest.mark.parametrize("kind", [*WITH_CLASS_TOKEN, "Siglip", "Siglip2"])
def test_the_model_itself_is_refused_with_the_cure(kind: str) -> None:
    model = whole(kind) if kind != "Siglip2" else transformers.Siglip2Model(transformers.Siglip2Config())
    with pytest.raises(
        TypeError, match=r"is a whole model; pass its image tower: make_mask_aware\(model.vision_model\)"
    ):
        make_mask_aware(model)
    with pytest.raises(TypeError, match=r"clip_model\.vision_model is not mask-aware; call make_mask_aware"):
        encode_masks(model, IMAGES, MASKS)


def test_naflex_is_refused_by_name() -> None:
    config = transformers.Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=PATCH)
    with pytest.raises(ValueError, match=r"Siglip2Vision\w+ takes patches that were cut before.*NaFlex"):
        make_mask_aware(transformers.Siglip2VisionModel(config))


def test_a_tower_of_one_size_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CLIP's were in transformers before 4.46."""
    model = whole("CLIP")
    monkeypatch.delattr(type(model.vision_model.embeddings), "interpolate_pos_encoding")
    with pytest.raises(ValueError, match=r"takes images of 32x32 only in transformers before 4\.46; upgrade it"):
        make_mask_aware(model.vision_model, 1)
