"""Models by their names: the embedded one, open_clip's and transformers', and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file, save_file
from test_classify import clip_tokenizer
from zoo import DEPTH, HEADS, PATCH, WIDTH, randomize

from maft_adapter import encode_masks, make_mask_aware, save_mask_aware
from maft_adapter.classify import text_classifier
from maft_adapter.models import image_tower, load_model, smallest_side
from maft_adapter.pictures import prepare
from maft_adapter.shapes import CLASSES, load_clip, preprocess, render_scene

MASKS = torch.rand(1, 3, 24, 24) > 0.5


def test_the_embedded_clip_is_the_demos() -> None:
    model, clip = load_model(), load_clip(mask_aware=True)
    images = preprocess(render_scene(3).image)[None]
    with torch.no_grad():
        assert torch.equal(encode_masks(model.clip, images, MASKS), encode_masks(clip, images, MASKS))
    assert (model.class_names, model.size, model.multiple) == (CLASSES, 96, 8)
    assert model.logit_scale == pytest.approx(clip.logit_scale.exp().item())
    text_classifier(model.clip, model.tokenizer, CLASSES, model.templates)  # knows all the words


@pytest.fixture
def small_open_clip(tmp_path: Path) -> str:
    """The name of an open_clip model in a folder, 6 blocks deep, with a mean and a std of its own."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 6, "width": 32, "head_width": 8, "patch_size": 14, "image_size": 28},
        "text_cfg": {"layers": 1, "width": 16, "heads": 2},
    }
    images = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": images}))
    torch.manual_seed(0)
    vision, text = open_clip.CLIPVisionCfg(**config["vision_cfg"]), open_clip.CLIPTextCfg(**config["text_cfg"])  # type: ignore[arg-type]
    torch.save(randomize(open_clip.CLIP(16, vision, text)).state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def test_open_clip(small_open_clip: str) -> None:
    model = load_model(small_open_clip)
    tower = image_tower(model.clip)
    assert tower is model.clip.visual and tower.start_layer == 4  # two thirds of 6
    assert (model.mean, model.std, model.multiple, model.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 14, 480)
    assert tower.preprocess_cfg["mean"] == model.mean and not tower.training
    assert load_model(small_open_clip, start_layer=2).clip.visual.start_layer == 2
    assert text_classifier(model.clip, model.tokenizer, ["swan"]).shape == (1, 16)


def test_random_weights_only_by_that_word_and_always_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"RN50 has no weights yet: give pretrained= one of openai, .*or random"):
        load_model("RN50")
    state = torch.get_rng_state()
    with caplog.at_level(logging.CRITICAL):
        first, second = (load_model("ViT-S-32-alt", "random") for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.source == second.source
    weights = [dict(model.clip.named_parameters()) for model in (first, second)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize(("name", "tag", "quick"), [("RN50", "openai", True), ("ViT-B/32", "laion2b_e16", False)])
def test_quick_gelu_where_the_tag_wants_it(name: str, tag: str, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: "weights.pt")
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", lambda *_, **__: {})
    clip = load_model(name, tag).clip
    assert isinstance(clip.transformer.resblocks[0].mlp.gelu, QuickGELU) == quick


@pytest.fixture
def small_transformers(tmp_path: Path) -> Path:
    """A folder with a CLIP of transformers, its tokenizer and its image processor."""
    small = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    vision = {**small, "image_size": 32, "patch_size": PATCH}
    config = transformers.CLIPConfig(
        vision_config=vision, text_config={**small, "vocab_size": 49408, "eos_token_id": 49407}, projection_dim=16
    )
    torch.manual_seed(0)
    folder = tmp_path / "owner" / "clip"
    randomize(transformers.CLIPModel(config)).half().save_pretrained(folder)
    clip_tokenizer(folder).save_pretrained(folder)
    transformers.CLIPImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.3]).save_pretrained(folder)
    return folder


def test_transformers(small_transformers: Path) -> None:
    model = load_model(str(small_transformers))
    assert (model.mean, model.std, model.multiple) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.3), PATCH)
    assert image_tower(model.clip).start_layer == 2 * DEPTH // 3
    assert next(model.clip.parameters()).dtype == torch.float32  # whatever the file holds
    text = text_classifier(model.clip, model.tokenizer, ["swan", "river"])
    with torch.no_grad():
        embeddings = encode_masks(model.clip, torch.randn(1, 3, 32, 48), MASKS)
    assert embeddings.shape[-1] == text.shape[-1] == 16


def test_a_processor_of_transformers_that_does_not_normalise(small_transformers: Path) -> None:
    transformers.CLIPImageProcessor(do_normalize=False).save_pretrained(small_transformers)
    model = load_model(str(small_transformers))
    assert (model.mean, model.std) == ((0, 0, 0), (1, 1, 1))
    picture = render_scene(0).image[:32, :32]
    processor = transformers.AutoImageProcessor.from_pretrained(small_transformers)
    expected = processor(picture, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(prepare(picture, model.mean, model.std, 32, multiple=32), expected)


def test_missing_weights_of_transformers_are_named(small_transformers: Path) -> None:
    file = small_transformers / "model.safetensors"
    weights = load_file(file)
    gone = ["text_projection.weight", "visual_projection.weight"]
    save_file({name: weight for name, weight in weights.items() if name not in gone}, file, {"format": "pt"})
    with pytest.raises(OSError, match=rf"can't be loaded by transformers: its file lacks weights: {', '.join(gone)};"):
        load_model(str(small_transformers))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["small_open_clip", "small_transformers"])
def test_half_precision_is_the_towers_alone(kind: str, precision: str, request: pytest.FixtureRequest) -> None:
    name = str(request.getfixturevalue(kind))
    full, half = load_model(name), load_model(name, precision=precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert torch.equal(*(text_classifier(model.clip, model.tokenizer, ["swan"]) for model in (full, half)))
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encode_masks(full.clip, images, MASKS, normalize=True)
        embeddings = encode_masks(half.clip, images.to(dtype), MASKS, normalize=True)
    assert embeddings.dtype == dtype
    assert torch.cosine_similarity(embeddings.float(), expected, dim=-1).min() > 0.99
    assert full.source != half.source and precision in half.source


def test_checkpoints_of_ours_bring_their_settings(small_open_clip: str, tmp_path: Path) -> None:
    tower = load_model(small_open_clip).clip.visual
    make_mask_aware(tower, 3, threshold=0.25)
    with torch.no_grad():
        tower.proj += 1
    save_mask_aware(tower, tmp_path / "tower.safetensors")
    model = load_model(small_open_clip, checkpoint=tmp_path / "tower.safetensors")
    assert torch.equal(model.clip.visual.proj, tower.proj)
    assert (model.clip.visual.start_layer, model.clip.visual.threshold) == (3, 0.25)
    assert "checkpoint tower.safetensors, start layer 3" in model.source
    assert model.source.split()[-1] != load_model(small_open_clip).source.split()[-1]  # the weights' digest
    with pytest.raises(ValueError, match=r"start_layer is 4, but .*tower.safetensors was saved with 3"):
        load_model(small_open_clip, checkpoint=tmp_path / "tower.safetensors", start_layer=4)


def test_a_fine_tuned_embedded_tower_with_another_start_layer(tmp_path: Path) -> None:
    save_mask_aware(make_mask_aware(load_clip().visual, 8), tmp_path / "tower.safetensors")
    assert load_model(checkpoint=tmp_path / "tower.safetensors").clip.visual.start_layer == 8


def test_released_checkpoints(small_open_clip: str, tmp_path: Path) -> None:
    tower = load_model(small_open_clip).clip.visual
    weights = {f"IPCLIP.{name}": weight + 1 for name, weight in tower.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "maft.pth")
    model = load_model(small_open_clip, checkpoint=tmp_path / "maft.pth", start_layer=2)
    assert torch.equal(model.clip.visual.proj, tower.proj + 1)
    assert model.clip.visual.start_layer == 2


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("ViT-B-61",), {}, ValueError, r"'ViT-B-61' is no model of open_clip \(near: ViT-B-16"),
        ((None, "openai"), {}, ValueError, "'openai' without a model"),
        (("ViT-B-16", "openia"), {}, ValueError, "'openia' is neither a tag of ViT-B-16 nor a file: .*openai"),
        (("local-dir:x", "openai"), {}, ValueError, "comes with its weights: leave it out"),
        (("owner/clip", "openai"), {}, ValueError, "comes with its weights: leave it out"),
        (("local-dir:missing",), {}, OSError, "local-dir:missing can't be loaded by open_clip: .*not found"),
        ((), {"precision": "int8"}, ValueError, "'int8', expected one of fp32, bf16, fp16"),
        ((), {"device": "abacus"}, ValueError, "device 'abacus' can't be used here"),
        ((), {"start_layer": 13}, ValueError, r"start_layer is 13, expected an int in 0..12"),
        ((), {"checkpoint": "missing.pth"}, OSError, "missing.pth"),
        (("RN50", "random"), {"start_layer": 3}, ValueError, "start_layer is 3 but means nothing"),
    ],
)
def test_refusals(arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(*arguments, **options)


def test_folders_of_other_things(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"can't be loaded by transformers"):
        load_model(str(tmp_path))
    config = transformers.BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=9)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(OSError, match="a BertModel is no CLIP"):
        load_model(str(tmp_path / "bert"))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="write local-dir:"):
        load_model(str(tmp_path))


def test_sides_of_every_kind_of_tower(build_tower: Any) -> None:
    assert smallest_side(make_mask_aware(build_tower(), 1)) == PATCH
    with pytest.raises(TypeError, match="has no mask-aware image tower"):
        image_tower(build_tower())
