import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maft_adapter import classify
from maft_adapter.classify import class_scores, ensemble, label_map, semantic_scores, text_classifier

TEMPLATES = ("a photo of a {}.", "{}", "there is a {} in the scene")


@pytest.fixture(scope="module")
def clip_model() -> nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg=open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16),
        text_cfg=open_clip.CLIPTextCfg(layers=2, width=32, heads=2),
    ).eval()


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)


def random_masks(*shape: int, seed: int = 0) -> Tensor:
    """Bool masks that leave a good part of the pixels uncovered."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.75


class TestTextClassifier:
    def test_equals_open_clip_for_plain_names(self, clip_model: nn.Module) -> None:
        names = ["cat", "traffic light", "sky"]
        expected = open_clip.build_zero_shot_classifier(clip_model, open_clip.tokenize, names, TEMPLATES)
        torch.testing.assert_close(
            text_classifier(clip_model, open_clip.tokenize, names, TEMPLATES), expected.T, atol=1e-6, rtol=0
        )

    def test_synonyms_are_averaged_over_all_prompts(self, clip_model: nn.Module) -> None:
        synonyms = ("sofa", "couch", "settee")
        text = text_classifier(clip_model, open_clip.tokenize, ["cat", synonyms], TEMPLATES)

        total = np.zeros(16)
        for name in synonyms:
            for template in TEMPLATES:
                with torch.no_grad():
                    tokens = open_clip.tokenize([template.replace("{}", name)])
                    embedding = clip_model.encode_text(tokens)[0].double().numpy()  # type: ignore[operator]
                total += embedding / np.linalg.norm(embedding)
        np.testing.assert_allclose(text[1].numpy(), total / np.linalg.norm(total), atol=1e-6)
        alone = text_classifier(clip_model, open_clip.tokenize, ["cat"], TEMPLATES)
        torch.testing.assert_close(text[:1], alone)

    def test_rows_have_unit_length_and_no_gradient(self, clip_model: nn.Module) -> None:
        text = text_classifier(clip_model, open_clip.tokenize, ["cat", ("sofa", "couch")], TEMPLATES)
        torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
        assert not text.requires_grad

    def test_original_clip_has_no_normalize_argument(self, clip_model: nn.Module) -> None:
        class OriginalClip(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = clip_model

            def encode_text(self, text: Tensor) -> Tensor:
                return self.model.encode_text(text)  # type: ignore[operator]

        names = ["cat", "dog"]
        torch.testing.assert_close(
            text_classifier(OriginalClip(), open_clip.tokenize, names),
            text_classifier(clip_model, open_clip.tokenize, names),
        )

    def test_half_precision_model_gives_float32(self, clip_model: nn.Module) -> None:
        torch.manual_seed(0)
        half = open_clip.CLIP(
            embed_dim=16,
            vision_cfg=open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16),
            text_cfg=open_clip.CLIPTextCfg(layers=2, width=32, heads=2),
        ).bfloat16()
        text = text_classifier(half, open_clip.tokenize, ["cat", "dog"], TEMPLATES)
        assert text.dtype == torch.float32
        full = text_classifier(clip_model, open_clip.tokenize, ["cat", "dog"], TEMPLATES)
        torch.testing.assert_close(text, full, atol=0.02, rtol=0)

    def test_result_goes_to_the_device_asked_for(self, clip_model: nn.Module) -> None:
        text = text_classifier(clip_model, open_clip.tokenize, ["cat"], device="meta")
        assert text.device.type == "meta"

    @pytest.mark.parametrize(
        ("class_names", "templates", "error", "message"),
        [
            ([], TEMPLATES, ValueError, "class_names is empty"),
            ("cat", TEMPLATES, TypeError, r"use \['cat'\]"),
            (["cat", ""], TEMPLATES, ValueError, "class 1 has no name"),
            (["cat", ()], TEMPLATES, ValueError, "class 1 has no name"),
            (["cat", ("sofa", " ")], TEMPLATES, ValueError, "class 1 has no name"),
            (["cat", ("sofa", 3)], TEMPLATES, TypeError, "class 1 must be"),
            (["cat", 3], TEMPLATES, TypeError, "class 1 must be"),
            (["cat", "dog", "cat"], TEMPLATES, ValueError, "classes 0 and 2 are both named"),
            ([("a", "b"), ("b", "a")], TEMPLATES, ValueError, "classes 0 and 1 are both named"),
            (["cat"], (), ValueError, "templates is empty"),
            (["cat"], "a {}", TypeError, r"use \['a \{\}'\]"),
            (["cat"], ("{}", "a photo"), ValueError, "exactly one {} .*'a photo'"),
            (["cat"], ("{} and {}",), ValueError, "exactly one {}"),
            (["cat"], ("{} in {place}",), ValueError, "exactly one {}"),
            (["cat"], ("{} in {",), ValueError, "exactly one {}"),
            (["cat"], (str.upper,), TypeError, "every template must be a string"),
        ],
    )
    def test_refuses(
        self, clip_model: nn.Module, class_names: Any, templates: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            text_classifier(clip_model, open_clip.tokenize, class_names, templates)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer over the vocabulary of CLIP, which open_clip ships."""
    own = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in own.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [" ".join(pair) for pair in own.bpe_ranks]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def bert_tokenizer(folder: Path) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "##s", "猫", "狗"]
    words += ["a", "photo", "of", "cat", "dog", "sofa", "couch", "tv"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return transformers.BertTokenizer.from_pretrained(folder)


def piece_tokenizer(*special: str) -> Any:
    """Pieces of words as SigLIP's and XLM-R's tokenizers have, with `special` = padding, end and unknown."""
    words = ["▁", "▁a", "▁photo", "▁of", "▁cat", "▁dog", "▁sofa", "▁couch", ".", "s", "t", "v"]
    pieces = tokenizers.Tokenizer(
        tokenizers.models.Unigram([*((s, 0.0) for s in special), *((word, -1.0) for word in words)], unk_id=2)
    )
    pieces.normalizer = tokenizers.normalizers.Lowercase()
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    pieces.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {special[1]}", special_tokens=[(special[1], 1)]
    )
    padding, end, unknown = special
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token=padding, eos_token=end, unk_token=unknown
    )


def whole_model(kind: str, folder: Path) -> tuple[Any, Any]:
    """A small whole model of transformers with random weights, and a tokenizer of its kind."""
    torch.manual_seed(0)
    vision = {**SMALL, "image_size": 32, "patch_size": 16}
    if kind in ("CLIP", "MetaClip2"):
        text: dict[str, Any] = {
            "vocab_size": 49408,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
        }
        tokenizer = clip_tokenizer(folder)
    elif kind == "ChineseCLIP":
        text, tokenizer = {"vocab_size": 17, "max_position_embeddings": 40}, bert_tokenizer(folder)
    elif kind == "AltCLIP":  # whose positions start behind that of the padding
        text = {"vocab_size": 20, "max_position_embeddings": 42, "pad_token_id": 1, "project_dim": 16}
        tokenizer = piece_tokenizer("<s>", "<pad>", "<unk>")
        tokenizer.pad_token, tokenizer.eos_token = "<pad>", "<s>"
    else:
        text, tokenizer = {"vocab_size": 20, "projection_size": 32}, piece_tokenizer("<pad>", "</s>", "<unk>")
        vision = {**SMALL, "patch_size": 16} if kind == "Siglip2" else vision
    both = {} if kind.startswith("Siglip") else {"projection_dim": 16}
    config = getattr(transformers, f"{kind}Config")(text_config={**SMALL, **text}, vision_config=vision, **both)
    return getattr(transformers, f"{kind}Model")(config), tokenizer


KINDS = ("CLIP", "MetaClip2", "Siglip", "Siglip2", "AltCLIP", "ChineseCLIP")


class TestWholeModelsOfTransformers:
    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_one_prompt_at_a_time(self, kind: str, tmp_path: Path) -> None:
        model, tokenizer = whole_model(kind, tmp_path)  # in training mode, with dropout in some
        templates = ("a photo of a {}.", "{}")
        text = text_classifier(model, tokenizer, ["cat", ("sofa", "couch dog")], templates)
        assert text.shape == (2, 32 if kind.startswith("Siglip") else 16) and model.training

        model.eval()
        total = torch.zeros(text.shape[1])
        for prompt in ("a photo of a sofa.", "sofa", "a photo of a couch dog.", "couch dog"):
            tokens = tokenizer(prompt)["input_ids"]
            if kind.startswith("Siglip"):
                tokens = tokens + [tokenizer.pad_token_id] * (64 - len(tokens))
            with torch.no_grad():
                output = model.get_text_features(torch.tensor([tokens]))
            embedding = output if isinstance(output, Tensor) else output.pooler_output
            total += embedding[0] / embedding[0].norm()
        torch.testing.assert_close(text[1], total / total.norm(), atol=1e-5, rtol=0)
        assert (text[0] - text[1]).abs().max() > 1e-3

    def test_a_tensor_as_older_versions_give(self, tmp_path: Path) -> None:
        model, tokenizer = whole_model("CLIP", tmp_path)
        expected = text_classifier(model, tokenizer, ["cat", "dog"])
        new = model.get_text_features

        def old(**tokens: Tensor) -> Tensor:
            output = new(**tokens)
            return output if isinstance(output, Tensor) else output.pooler_output

        model.get_text_features = old
        assert torch.equal(text_classifier(model, tokenizer, ["cat", "dog"]), expected)

    def test_tokenizers_of_both_libraries_give_the_same(self, tmp_path: Path, clip_model: nn.Module) -> None:
        model, tokenizer = whole_model("CLIP", tmp_path)
        names = ["cat", ("sofa", "traffic light")]
        for whole in (model, clip_model):
            torch.testing.assert_close(
                text_classifier(whole, tokenizer, names), text_classifier(whole, open_clip.tokenize, names)
            )

    def test_bert_needs_a_mask(self, tmp_path: Path) -> None:
        model, _ = whole_model("ChineseCLIP", tmp_path)
        with pytest.raises(TypeError, match="ChineseCLIPModel needs an attention mask; pass transformers' tokenizer"):
            text_classifier(model, open_clip.tokenize, ["cat"])

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_the_tokenizer_loses(self, kind: str, tmp_path: Path) -> None:
        model, tokenizer = whole_model(kind, tmp_path)
        context = {"CLIP": 77, "MetaClip2": 77, "Siglip": 64, "Siglip2": 64}.get(kind, 40)
        room = context - len(tokenizer("")["input_ids"])
        fits = " ".join(["cat"] * room)
        assert len(tokenizer(fits)["input_ids"]) == context
        assert text_classifier(model, tokenizer, [fits], ["{}"]).isfinite().all()
        with pytest.raises(ValueError, match="longer than the text encoder's context"):
            text_classifier(model, tokenizer, ["dog", f"{fits} cat"], ["{}"])
        with pytest.raises(ValueError, match=r"classes 1 and 2, \('CATS',\) and \('cats',\), give the same tokens"):
            text_classifier(model, tokenizer, ["dog", "CATS", "cats"])
        assert text_classifier(model, tokenizer, [("Cat", "cat"), "dog"]).shape[0] == 2

    @pytest.mark.parametrize("kind", ["Siglip", "AltCLIP", "ChineseCLIP"])
    @pytest.mark.parametrize("name", ["жук", "жук жаба"])
    def test_unknown_names(self, kind: str, name: str, tmp_path: Path) -> None:
        model, tokenizer = whole_model(kind, tmp_path)
        with pytest.raises(ValueError, match=f"'{name}' says nothing to the tokenizer"):
            text_classifier(model, tokenizer, ["cat", ("dog", name)])
        assert text_classifier(model, tokenizer, ["cat", f"{name} dog"]).shape[0] == 2

    def test_unknown_characters(self, tmp_path: Path) -> None:
        model, tokenizer = whole_model("ChineseCLIP", tmp_path)
        assert text_classifier(model, tokenizer, ["猫", "狗"], ["{}"]).shape[0] == 2
        with pytest.raises(ValueError, match="'鳥鳥鳥' says nothing to the tokenizer"):
            text_classifier(model, tokenizer, ["猫", "鳥鳥鳥"], ["{}"])

    def test_another_object_than_a_tokenizer(self, tmp_path: Path, clip_model: nn.Module) -> None:
        model, tokenizer = whole_model("CLIP", tmp_path)
        processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer)
        with pytest.raises(TypeError, match=r"CLIPProcessor is no tokenizer; .* a processor's \.tokenizer"):
            text_classifier(model, processor, ["cat"])
        with pytest.raises(TypeError, match=r"CLIPVisionModel has neither encode_text .* pass the whole CLIP model"):
            text_classifier(transformers.CLIPVisionModel(model.config.vision_config), tokenizer, ["cat"])
        with pytest.raises(TypeError, match="must give a tensor of 1 rows of tokens, got list"):
            text_classifier(clip_model, lambda texts: [[1, 2]], ["cat"])


def huggingface(folder: Path) -> Any:
    bert_tokenizer(folder).save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=77)


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "open_clip": lambda _: open_clip.tokenize,
    "canonicalize": lambda _: SimpleTokenizer(clean="canonicalize"),
    "huggingface": huggingface,
    "function": lambda _: lambda texts: open_clip.tokenize(texts),  # as users write it
}


class TestWords:
    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_a_name_that_is_cut_off(self, kind: str, clip_model: nn.Module, tmp_path: Path) -> None:
        tokenizer = TOKENIZERS[kind](tmp_path)
        # 77 places for the start, a, photo, of, a, the name, a point (which canonicalize leaves out) and the end
        room = {"canonicalize": 71, "function": 69}.get(kind, 70)
        fits = " ".join(["cat"] * room)
        assert text_classifier(clip_model, tokenizer, [fits, "dog"]).shape == (2, 16)
        if kind == "function":  # can't be told from one that is cut off, so refused
            fits += " cat"
        for name in (f"{fits} cat", f"{fits} cat dog", " ".join([fits] * 4)):
            with pytest.raises(ValueError, match="longer than the text encoder's context and would be cut off"):
                text_classifier(clip_model, tokenizer, ["dog", ("sofa", name)])

    @pytest.mark.parametrize("kind", TOKENIZERS)
    @pytest.mark.parametrize(
        ("first", "second"),
        [("TV", "tv"), ("cat", "cat "), ("a  cat", "a cat"), (("cat", "TV"), ("tv", "Cat")), ("cat", ("Cat", "cat"))],
    )
    def test_classes_that_no_score_can_tell_apart(
        self, kind: str, first: Any, second: Any, clip_model: nn.Module, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=r"classes 1 and 2, .* give the same tokens"):
            text_classifier(clip_model, TOKENIZERS[kind](tmp_path), ["dog", first, second], TEMPLATES[:1])

    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_classes_may_share_a_name(self, kind: str, clip_model: nn.Module, tmp_path: Path) -> None:
        names = [("cat", "dog"), ("Cat", "sofa"), "cat"]
        assert text_classifier(clip_model, TOKENIZERS[kind](tmp_path), names).shape == (3, 16)

    def test_a_name_of_which_nothing_is_left(self, clip_model: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"'\+' says nothing to the tokenizer"):
            text_classifier(clip_model, TOKENIZERS["canonicalize"](tmp_path), ["cat", "+"])
        with pytest.raises(ValueError, match="'жук' says nothing to the tokenizer"):
            text_classifier(clip_model, TOKENIZERS["huggingface"](tmp_path), ["cat", "жук"])
        assert text_classifier(clip_model, open_clip.tokenize, ["+", "жук", "猫"]).shape == (3, 16)

    def test_a_tokenizer_that_refuses_by_itself(self, clip_model: nn.Module) -> None:
        def strict(texts: list[str]) -> Tensor:
            if any(len(text.split()) > 7 for text in texts):
                raise ValueError("too long")
            return open_clip.tokenize(texts)

        assert text_classifier(clip_model, strict, ["cat", "very old dog"]).shape == (2, 16)
        with pytest.raises(ValueError, match="too long"):
            text_classifier(clip_model, strict, ["a very very old dog"])

    def test_dropout_is_off_and_modes_stay(self, clip_model: nn.Module) -> None:
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.clip, self.dropout = clip_model, nn.Dropout(0.5)

            def encode_text(self, text: Tensor) -> Tensor:
                return self.dropout(self.clip.encode_text(text))  # type: ignore[operator]

        model = Noisy().train()
        model.clip.eval()
        expected = text_classifier(clip_model, open_clip.tokenize, ["cat", "dog"])
        assert torch.equal(text_classifier(model, open_clip.tokenize, ["cat", "dog"]), expected)
        assert model.training and model.dropout.training and not model.clip.training


class TestClassScores:
    @pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (3, 2, 5, 8)])
    def test_equals_numpy(self, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        embeddings, text = torch.randn(*shape), torch.randn(4, 8)
        scores = class_scores(embeddings, text, logit_scale=10.0)

        e, t = embeddings.double().numpy(), text.double().numpy()
        cosine = (e @ t.T) / np.linalg.norm(e, axis=-1, keepdims=True) / np.linalg.norm(t, axis=-1)
        expected = np.exp(10 * cosine)
        expected /= expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)

    def test_no_proposals(self) -> None:
        assert class_scores(torch.zeros(2, 0, 8), torch.ones(4, 8)).shape == (2, 0, 4)

    def test_length_of_the_embeddings_does_not_matter(self) -> None:
        torch.manual_seed(0)
        embeddings, text = torch.randn(2, 5, 8), torch.randn(4, 8)
        torch.testing.assert_close(class_scores(3 * embeddings, text / 7), class_scores(embeddings, text))

    @pytest.mark.parametrize("logit_scale", [torch.tensor(20.0), torch.tensor([20.0])])
    def test_tensor_logit_scale(self, logit_scale: Tensor) -> None:
        torch.manual_seed(0)
        embeddings, text = torch.randn(2, 5, 8), torch.randn(4, 8)
        torch.testing.assert_close(class_scores(embeddings, text, logit_scale), class_scores(embeddings, text, 20.0))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        embeddings, text = torch.randn(2, 5, 8).to(dtype), torch.randn(4, 8).to(dtype)
        scores = class_scores(embeddings, text)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, class_scores(embeddings.float(), text.float()))

    def test_autocast_changes_nothing(self) -> None:
        torch.manual_seed(0)
        embeddings, text = torch.randn(50, 64), torch.randn(20, 64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = class_scores(embeddings, text)
            summed = semantic_scores(scores, torch.rand(50, 4, 4) > 0.5)
        assert scores.dtype == summed.dtype == torch.float32
        assert torch.equal(scores, class_scores(embeddings, text))

    @pytest.mark.parametrize("length", [1e-35, 1e-20, 1e20, 1e35])
    def test_no_length_is_too_small_or_too_large(self, length: float) -> None:
        torch.manual_seed(0)
        embeddings, text = torch.randn(5, 8), torch.randn(4, 8)
        torch.testing.assert_close(class_scores(length * embeddings, text * length), class_scores(embeddings, text))

    def test_an_embedding_that_is_not_finite_shows(self) -> None:
        embeddings = torch.randn(3, 8)
        embeddings[1, 2] = torch.inf
        scores = class_scores(embeddings, torch.randn(4, 8))
        assert scores.isnan().all(dim=1).tolist() == [False, True, False]
        with pytest.raises(ValueError, match="without NaN"):
            label_map(scores, torch.ones(3, 2, 2))

    def test_gradient_equals_finite_differences(self) -> None:
        torch.manual_seed(0)
        embeddings = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        text = torch.randn(3, 4, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda e: class_scores(e, text, 5.0), embeddings)

    @pytest.mark.parametrize(
        ("embeddings", "text", "logit_scale", "error", "message"),
        [
            ([[1.0]], torch.ones(2, 1), 1.0, TypeError, "embeddings must be a float tensor, got list"),
            (torch.ones(3, 8), torch.ones(4, 8).int(), 1.0, TypeError, "text must be a float tensor"),
            (torch.ones(3, 8), torch.ones(4, 6), 1.0, ValueError, r"D = 6, got \(3, 8\)"),
            (torch.ones(8), torch.ones(4, 8), 1.0, ValueError, r"\(\.\.\., N, D\)"),
            (torch.ones(3, 8), torch.ones(0, 8), 1.0, ValueError, "at least one class"),
            (torch.ones(3, 8), torch.ones(8), 1.0, ValueError, r"text must be \(C, D\)"),
            (torch.ones(3, 8), torch.ones(4, 8), 0.0, ValueError, "positive"),
            (torch.ones(3, 8), torch.ones(4, 8), float("nan"), ValueError, "positive"),
            (torch.ones(3, 8), torch.ones(4, 8), torch.ones(4), ValueError, "one number"),
            (torch.ones(3, 8), torch.ones(4, 8), torch.tensor(100.0).exp(), ValueError, r"needs \.exp\(\), once"),
            (torch.ones(3, 8), torch.ones(4, 8), 1e39, ValueError, "positive and finite"),
            (torch.ones(3, 8), torch.full((4, 8), torch.nan), 1.0, ValueError, "text holds NaN"),
        ],
    )
    def test_refuses(
        self, embeddings: Any, text: Tensor, logit_scale: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            class_scores(embeddings, text, logit_scale)


class TestEnsemble:
    seen = torch.tensor([True, False, True, False])

    @pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
    @pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
    @pytest.mark.parametrize("unseen", ["paper", "released"])
    def test_equals_equation_9_class_by_class(self, shape: tuple[int, ...], weight: float, unseen: Any) -> None:
        a_p, a_c = random_scores(*shape, seed=1), random_scores(*shape, seed=2)
        result = ensemble(a_p, a_c, self.seen, weight, unseen)

        assert result.shape == shape
        for index in np.ndindex(shape):
            p, c = a_p[index].item(), a_c[index].item()
            if self.seen[index[-1]]:
                expected = p**weight * c ** (1 - weight)
            elif unseen == "paper":
                expected = c**weight
            else:
                expected = p ** (1 - weight) * c**weight
            assert result[index].item() == pytest.approx(expected, abs=1e-6)

    def test_papers_form_ignores_the_generator_on_unseen_classes(self) -> None:
        a_p, a_c = random_scores(3, 4, seed=1), random_scores(3, 4, seed=2)
        other = torch.where(self.seen, a_p, torch.zeros(()))
        assert torch.equal(ensemble(a_p, a_c, self.seen, 0.7), ensemble(other, a_c, self.seen, 0.7))
        assert (ensemble(other, a_c, self.seen, 0.7, "released")[:, ~self.seen] == 0).all()

    @pytest.mark.parametrize("unseen", ["paper", "released"])
    def test_half_precision_is_computed_in_float32(self, unseen: Any) -> None:
        a_p, a_c = (random_scores(3, 4, seed=seed).half() for seed in (1, 2))
        result = ensemble(a_p, a_c, self.seen, 0.7, unseen)
        assert torch.equal(result, ensemble(a_p.float(), a_c.float(), self.seen, 0.7, unseen))

    def test_no_proposals(self) -> None:
        assert ensemble(torch.zeros(0, 4), torch.zeros(0, 4), self.seen, 0.7).shape == (0, 4)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"weight": -0.1}, ValueError, r"weight \(λ\) must lie in \[0, 1\], got -0.1"),
            ({"weight": 1.5}, ValueError, "got 1.5"),
            ({"weight": float("nan")}, ValueError, "got nan"),
            ({"unseen": "both"}, ValueError, "'paper' or 'released', got 'both'"),
            ({"seen": torch.ones(4)}, TypeError, "bool tensor of shape"),
            ({"seen": [True, False, True, False]}, TypeError, "got list"),
            ({"seen": torch.ones(3, dtype=torch.bool)}, ValueError, r"\(4,\), got \(3,\)"),
            ({"proposal_scores": torch.ones(2, 4)}, ValueError, r"\(2, 4\) and \(3, 4\)"),
            ({"proposal_scores": 5 * torch.ones(3, 4)}, ValueError, r"proposal_scores must be in \[0, 1\]"),
            ({"clip_scores": -torch.ones(3, 4)}, ValueError, r"clip_scores must be in \[0, 1\]"),
            ({"clip_scores": torch.full((3, 4), torch.nan)}, ValueError, "without NaN"),
            ({"clip_scores": torch.ones(3, 4).int()}, TypeError, "clip_scores must be a float tensor"),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        given: dict[str, Any] = {
            "proposal_scores": random_scores(3, 4),
            "clip_scores": random_scores(3, 4),
            "seen": self.seen,
            "weight": 0.7,
        }
        with pytest.raises(error, match=message):
            ensemble(**(given | changes))


class TestSemanticScores:
    @pytest.mark.parametrize("soft", [False, True])
    def test_equals_a_loop_over_pixels(self, soft: bool) -> None:
        scores = random_scores(2, 5, 3)
        masks = torch.rand(2, 5, 4, 6) if soft else random_masks(2, 5, 4, 6)
        result = semantic_scores(scores, masks)

        assert result.shape == (2, 3, 4, 6)
        for b, c, y, x in np.ndindex(2, 3, 4, 6):
            expected = sum(scores[b, n, c].item() * float(masks[b, n, y, x]) for n in range(5))
            assert result[b, c, y, x].item() == pytest.approx(expected, abs=1e-6)

    def test_one_image_equals_its_place_in_the_batch(self) -> None:
        scores, masks = random_scores(2, 5, 3), random_masks(2, 5, 4, 6)
        torch.testing.assert_close(semantic_scores(scores[1], masks[1]), semantic_scores(scores, masks)[1])

    def test_half_precision_does_not_round_small_scores_away(self) -> None:
        scores = torch.full((1, 1), 1e-4, dtype=torch.float16)
        masks = torch.full((1, 1, 1), 1e-4, dtype=torch.float16)
        assert semantic_scores(scores, masks).item() == pytest.approx(1e-8, rel=1e-2)

    @pytest.mark.parametrize(
        ("scores", "masks", "error", "message"),
        [
            (torch.ones(5, 3), [torch.ones(4, 6)], TypeError, "got list; .*loop"),
            (torch.ones(5, 3), torch.ones(5, 4, 6).int(), TypeError, "bool or float"),
            (torch.ones(5, 3), torch.ones(6, 4, 6), ValueError, r"\(5, 3\) and \(6, 4, 6\)"),
            (torch.ones(5, 3), torch.ones(1, 5, 4, 6), ValueError, "expected scores"),
            (torch.ones(2, 5, 3), torch.ones(1, 5, 4, 6), ValueError, "expected scores"),
            (torch.ones(5, 3), 4 * torch.ones(5, 4, 6), ValueError, "sigmoid"),
            (torch.ones(5, 3), torch.full((5, 4, 6), torch.nan), ValueError, "without NaN"),
            (20 * torch.ones(5, 3), torch.ones(5, 4, 6), ValueError, "call .softmax"),
        ],
    )
    def test_refuses(self, scores: Tensor, masks: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            semantic_scores(scores, masks)


class TestLabelMap:
    @pytest.mark.parametrize("with_valid", [False, True])
    def test_equals_a_loop_over_pixels(self, with_valid: bool) -> None:
        scores, masks = random_scores(2, 6, 3), random_masks(2, 6, 5, 7)
        valid = torch.tensor([[True, False, True, False, False, True], [False] * 3 + [True] * 3])
        labels = label_map(scores, masks, valid=valid if with_valid else None)

        assert labels.shape == (2, 5, 7)
        assert labels.dtype == torch.int64
        for b, y, x in np.ndindex(2, 5, 7):
            voters = [n for n in range(6) if masks[b, n, y, x] and (valid[b, n] or not with_valid)]
            expected = 255
            if voters:
                expected = int(np.argmax(scores[b, voters].double().numpy().sum(0)))
            assert labels[b, y, x].item() == expected
        assert {0, 2, 255} <= set(labels.unique().tolist())

    def test_order_of_the_proposals_does_not_matter(self) -> None:
        scores, masks = random_scores(1, 6, 3), random_masks(1, 6, 5, 7)
        order = torch.tensor([3, 5, 0, 1, 4, 2])
        assert torch.equal(label_map(scores[:, order], masks[:, order]), label_map(scores, masks))

    def test_invalid_proposals_may_hold_nan(self) -> None:
        scores, masks = random_scores(2, 3), random_masks(2, 5, 7)
        labels = label_map(scores[:1], masks[:1])
        scores[1] = torch.nan
        assert torch.equal(label_map(scores, masks, valid=torch.tensor([True, False])), labels)

    @pytest.mark.parametrize("ignore_index", [255, -1, 65535])
    def test_nobody_votes(self, ignore_index: int) -> None:
        expected = torch.full((5, 7), ignore_index)
        everywhere = torch.ones(2, 5, 7)
        assert torch.equal(label_map(torch.zeros(0, 3), torch.zeros(0, 5, 7), ignore_index), expected)
        none_valid = torch.tensor([False, False])
        assert torch.equal(label_map(random_scores(2, 3), everywhere, ignore_index, valid=none_valid), expected)
        assert torch.equal(label_map(torch.zeros(2, 3), everywhere, ignore_index), expected)

    def test_faint_soft_masks_still_cover(self) -> None:
        masks = torch.tensor([[[0.0, 1e-6, 0.4]]])
        assert label_map(torch.tensor([[0.2, 0.8]]), masks).tolist() == [[255, 1, 1]]

    @given(data=st.data())
    def test_any_scores_masks_and_parts_equal_a_dense_sum(self, data: st.DataObject) -> None:
        b, n, c, h, w = (data.draw(st.integers(low, high)) for low, high in ((1, 2), (0, 4), (1, 5), (1, 9), (1, 9)))
        seed, ignore_index = data.draw(st.integers(0, 2**16)), data.draw(st.sampled_from([255, -1, 65535, 5]))
        floats = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
        # of few values, whose sums are exact, so that ties are ties
        scores = torch.randint(0, 5, (b, n, c), generator=torch.Generator().manual_seed(seed)) / 4
        soft = torch.randint(0, 5, (b, n, h, w), generator=torch.Generator().manual_seed(seed + 1)) / 4
        masks = soft.to(data.draw(floats)) if data.draw(st.booleans()) else soft > 0.5
        vote = torch.rand(b, n, generator=torch.Generator().manual_seed(seed + 2)) > 0.3
        valid = vote if data.draw(st.booleans()) else None
        given, counted = scores.to(data.draw(floats)), scores
        if valid is not None:  # what the others hold says nothing
            given, counted = given.masked_fill(~vote[..., None], torch.nan), scores * vote[..., None]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(classify, "_AT_ONCE", data.draw(st.integers(1, 300)))
            labels = label_map(given, masks, ignore_index, valid)
            alone = label_map(given[-1], masks[-1], ignore_index, None if valid is None else valid[-1])
        assert torch.equal(alone, labels[-1])
        dense = np.einsum("bnc,bnhw->bchw", counted.double().numpy(), masks.double().numpy())
        expected = np.where(dense.max(1) > 0, dense.argmax(1), ignore_index)  # of equal ones the first
        np.testing.assert_array_equal(labels.numpy(), expected)

    def test_memory_does_not_grow_with_the_classes(self) -> None:
        class Largest(TorchDispatchMode):
            numbers = 0

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                for value in result if isinstance(result, tuple) else (result,):
                    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in given_in:
                        self.numbers = max(self.numbers, value.numel())
                return result

        scores, masks = random_scores(30, 847), random_masks(30, 600, 800)
        given_in = {value.untyped_storage().data_ptr() for value in (scores, masks)}
        with Largest() as largest:
            label_map(scores.requires_grad_(), masks, ignore_index=65535)
        assert largest.numbers <= 2**22  # all scores at once are 97 times that

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"ignore_index": 2}, ValueError, "ignore_index 2 is one of the 3 classes"),
            ({"ignore_index": 0}, ValueError, "ignore_index 0"),
            ({"valid": torch.ones(5)}, TypeError, "valid must be a bool tensor"),
            ({"valid": torch.ones(1, 5, dtype=torch.bool)}, ValueError, r"\(5,\), one flag per proposal"),
            ({"scores": torch.ones(5, 0)}, ValueError, "C at least 1"),
            ({"scores": None}, TypeError, "got NoneType"),
            ({"scores": torch.full((5, 3), torch.nan)}, ValueError, "without NaN"),
            ({"masks": torch.ones(4, 4, 6)}, ValueError, "expected scores"),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        given: dict[str, Any] = {"scores": random_scores(5, 3), "masks": random_masks(5, 4, 6)}
        with pytest.raises(error, match=message):
            label_map(**(given | changes))
