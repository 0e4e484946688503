"""The memory of labelled masks: numpy's word for it, what it must not change, files, data sets."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import maft_adapter.bank
from maft_adapter import encode_masks
from maft_adapter.bank import MaskBank, bank_scorer, labelled_embeddings
from maft_adapter.classify import class_scores, text_classifier
from maft_adapter.data import Item, open_dataset
from maft_adapter.data.datasets import ShapesDataset
from maft_adapter.evaluate import mask_aware_scorer
from maft_adapter.models import Model, load_model
from maft_adapter.pictures import prepare

NAMES = ["cat", ("sofa", "couch"), "dog", "bird"]
LABELS = ["cat", "cat", "couch", "dog", "sofa", "cow", "cat"]  # no bird, and a cow that nobody asks for


def rows(count: int, dim: int = 6, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.4, 1, (count, dim))).float()


def bank_of(embeddings: Tensor, labels: Sequence[str]) -> MaskBank:
    bank = MaskBank()
    bank.add(embeddings, labels)
    return bank


@pytest.fixture
def bank() -> MaskBank:
    return bank_of(rows(len(LABELS)), LABELS)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model()


# By hand


def unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def whitened_by_hand(x: NDArray[Any], labels: Sequence[str], asked: NDArray[Any]) -> list[NDArray[np.float64]]:
    """Class means of first and second moments, a symmetric root: another way than the bank's."""
    x, asked = unit(x.astype(float)), unit(asked.astype(float))
    groups = [x[[label == name for label in labels]] for name in sorted(set(labels))]
    centre = np.mean([group.mean(0) for group in groups], axis=0)
    moment = np.mean([group.T @ group / len(group) for group in groups], axis=0)
    covariance = moment - np.outer(centre, centre)
    masks, dim = x.shape
    share = dim / (masks + dim)
    shrunk = (1 - share) * covariance + share * np.trace(covariance) / dim * np.eye(dim)
    values, vectors = np.linalg.eigh(shrunk)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    return [unit((each - centre) @ root) for each in (x, asked)]


def fused_by_hand(x: Tensor, labels: Sequence[str], asked: Tensor, by_words: Tensor, words: float) -> NDArray[Any]:
    memory, queries = whitened_by_hand(x.numpy(), labels, asked.numpy())
    fused = np.zeros(by_words.shape)
    for i, query in enumerate(queries):
        weights, near = np.zeros(len(NAMES)), np.zeros(len(NAMES))
        for k, names in enumerate(NAMES):
            own = [m for m, label in zip(memory, labels, strict=True) if label == names or label in tuple(names)]
            weights[k] = len(own) / (len(own) + words)
            near[k] = np.mean([np.exp(5 * query @ m) for m in own]) if own else 0
        given = by_words[i].numpy().astype(float)
        fused[i] = (1 - weights) * given + (weights @ given) * (weights * near) / (weights @ near)
    return fused


@pytest.mark.parametrize("at_once", [2**24, 10])
def test_equals_a_computation_by_hand(bank: MaskBank, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maft_adapter.bank, "_AT_ONCE", at_once)  # few at a time: in many parts
    asked, by_words = rows(5, seed=1), torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    for words in (0.5, 1.0, 3.0):
        fused = bank.fuse(by_words, asked, NAMES, words)
        np.testing.assert_allclose(fused, fused_by_hand(rows(len(LABELS)), LABELS, asked, by_words, words), atol=1e-5)
    memory, queries = whitened_by_hand(rows(len(LABELS)).numpy(), LABELS, asked.numpy())
    near = np.exp(5 * queries @ memory.T)
    own = [[0, 1, 6], [2, 4], [3]]
    means = np.stack([near[:, k].mean(1) for k in own], 1)
    scores = bank.scores(asked, NAMES).numpy()
    np.testing.assert_allclose(scores[:, :3], means / means.sum(1, keepdims=True), atol=1e-5)
    assert (scores[:, 3] == 0).all()


# What does not matter, and what must not change


def test_embeddings_count_by_direction_alone(bank: MaskBank) -> None:
    asked, turn = rows(5, seed=1), torch.linalg.qr(rows(6, seed=2))[0]
    scores = bank.scores(asked, NAMES)
    turned = bank_of(rows(len(LABELS)) * torch.arange(1, 8)[:, None] @ turn, LABELS)
    torch.testing.assert_close(turned.scores(3 * asked @ turn, NAMES), scores, atol=1e-5, rtol=0)


def test_batches_and_half_precision(bank: MaskBank) -> None:
    asked = rows(6, seed=1).half()
    by_words = torch.full((6, 4), 0.25).half()
    fused = bank.fuse(by_words, asked, NAMES)
    assert fused.dtype == torch.float32
    assert torch.equal(bank.fuse(by_words.view(2, 3, 4), asked.view(2, 3, 6), NAMES), fused.view(2, 3, 4))
    assert bank.fuse(by_words[:0], asked[:0], NAMES).shape == (0, 4)
    assert bank.scores(asked.view(2, 3, 6)[:, :0], NAMES).shape == (2, 0, 4)


def test_it_does_not_matter_when_masks_are_added(bank: MaskBank) -> None:
    asked = rows(5, seed=1)
    slowly, x = MaskBank(), rows(len(LABELS))
    for i in range(len(LABELS)):
        slowly.add(x[i : i + 1].numpy(), LABELS[i : i + 1])
        slowly.scores(asked, NAMES)  # what is kept of it must not outlive the next mask
    assert slowly.counts == bank.counts == {"cat": 3, "couch": 1, "dog": 1, "sofa": 1, "cow": 1}
    assert torch.equal(slowly.embeddings, bank.embeddings)
    assert torch.equal(slowly.scores(asked, NAMES), bank.scores(asked, NAMES))


@given(
    st.lists(st.sampled_from(["cat", "couch", "sofa", "dog", "cow"]), max_size=12),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**31),
)
def test_probabilities_stay_probabilities(labels: list[str], words: float, seed: int) -> None:
    bank = bank_of(rows(len(labels), seed=seed), labels)
    asked = rows(4, seed=seed + 1)
    by_words = class_scores(asked, rows(4, seed=seed + 2), logit_scale=10)
    fused, scores = bank.fuse(by_words, asked, NAMES, words), bank.scores(asked, NAMES)
    assert (fused >= 0).all() and (scores >= 0).all()
    torch.testing.assert_close(fused.sum(1), torch.ones(4))
    assert torch.equal(fused[:, 3], by_words[:, 3])  # a class without masks keeps its words' score
    known = {{"couch": "sofa"}.get(label, label) for label in labels} - {"cow"}
    torch.testing.assert_close(scores.sum(1), torch.full((4,), float(bool(known))))
    if len(known) < 2:  # nothing to be told apart
        torch.testing.assert_close(fused, by_words, atol=1e-6, rtol=0)


def test_more_masks_count_for_more_and_words_can_count_for_all(bank: MaskBank) -> None:
    asked = bank.embeddings[3:4]  # the dog
    by_words = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    dogs = [bank_of(torch.cat([bank.embeddings, asked.repeat(n, 1)]), [*LABELS, *["dog"] * n]) for n in (0, 4, 40)]
    dog = [one.fuse(by_words, asked, NAMES)[0, 2].item() for one in dogs]
    assert 0.1 < dog[0] < dog[1] < dog[2]
    torch.testing.assert_close(bank.fuse(by_words, asked, NAMES, words=1e9), by_words, atol=1e-6, rtol=0)


def test_masks_that_are_all_alike_say_nothing() -> None:
    alike = bank_of(rows(1).repeat(3, 1), ["cat", "dog", "dog"])
    by_words = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    for asked in (rows(1), rows(1, seed=1)):
        scores = alike.scores(asked, NAMES)
        torch.testing.assert_close(scores, torch.tensor([[0.5, 0.0, 0.5, 0.0]]), atol=1e-3, rtol=0)
        assert alike.fuse(by_words, asked, NAMES).isfinite().all()


def test_an_embedding_that_is_not_finite_has_no_scores(bank: MaskBank) -> None:
    asked = rows(3, seed=1)
    asked[1, 0] = torch.nan
    fused = bank.fuse(torch.full((3, 4), 0.25), asked, NAMES)
    assert fused[1, :3].isnan().all() and fused[[0, 2]].isfinite().all()


@pytest.mark.parametrize("engine", ["numpy", "faiss"])
def test_nearest(bank: MaskBank, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "faiss" and not importlib.util.find_spec("faiss"):
        pytest.skip("faiss is not installed")
    monkeypatch.setattr("maft_adapter.search.find_spec", lambda name: engine == name)
    asked = rows(5, seed=1)
    memory, queries = whitened_by_hand(rows(len(LABELS)).numpy(), LABELS, asked.numpy())
    cosines, found = bank.nearest(asked, 3)
    expected = np.argsort(-queries @ memory.T, axis=1)[:, :3]
    assert (found == expected).all()
    np.testing.assert_allclose(cosines, np.take_along_axis(queries @ memory.T, expected, 1), atol=1e-5)
    assert bank.nearest(bank.embeddings, 1)[1].ravel().tolist() == list(range(len(LABELS)))
    with pytest.raises(ValueError, match="the bank is empty"):
        MaskBank().nearest(asked, 3)


# Wrong input


@pytest.mark.parametrize(
    ("embeddings", "labels", "error"),
    [
        (rows(2), ["cat"], "M labels, got (2, 6) and 1"),
        (rows(2)[0], ["cat"], "expected embeddings (M, D)"),
        (rows(1, dim=5), ["cat"], "D = 6, got (1, 5)"),
        (torch.zeros(2, 6), ["cat", "dog"], "2 of 2 embeddings are 0 or not finite"),
        (torch.full((1, 6), torch.inf), ["cat"], "1 of 1 embeddings"),
        (rows(2), ["cat", " "], "an empty name"),
        (rows(1), "c", "a list of class names"),
        (rows(1), [3], "a list of class names"),
        (torch.ones(1, 6, dtype=torch.int64), ["cat"], "floats, got torch.int64"),
        (np.ones((1, 6), bool), ["cat"], "floats, got torch.bool"),
    ],
)
def test_refused_masks_leave_the_bank_as_it_was(bank: MaskBank, embeddings: Any, labels: Any, error: str) -> None:
    before = bank.embeddings.clone()
    with pytest.raises((TypeError, ValueError)) as caught:
        bank.add(embeddings, labels)
    assert error in str(caught.value)
    assert torch.equal(bank.embeddings, before) and bank.labels == LABELS


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"embeddings": rows(2, dim=5)}, "D = 6, got (2, 5)"),
        ({"embeddings": rows(2)[0]}, "must be (..., N, D)"),
        ({"embeddings": torch.ones(2, 6, dtype=torch.int64)}, "float tensor, got torch.int64"),
        ({"clip_scores": torch.ones(2, 3)}, "must be (2, 4)"),
        ({"clip_scores": torch.ones(2, 4, dtype=torch.int64)}, "float tensor, got torch.int64"),
        ({"class_names": []}, "at least one class"),
        ({"class_names": "cat"}, "at least one class, got 'cat'"),
        ({"class_names": ["cat", ("dog", "cat"), "a", "b"]}, "'cat' names both class 0 and class 1"),
        ({"words": 0.0}, "words must be positive and finite, got 0.0"),
        ({"words": float("nan")}, "words must be positive"),
    ],
)
def test_refused_questions(bank: MaskBank, change: dict[str, Any], error: str) -> None:
    good: dict[str, Any] = {"clip_scores": torch.ones(2, 4), "embeddings": rows(2), "class_names": NAMES}
    bank.fuse(**good)
    with pytest.raises((TypeError, ValueError)) as caught:
        bank.fuse(**good | change)
    assert error in str(caught.value)


# Files


def test_a_saved_bank_is_the_same(bank: MaskBank, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    bank.source = "ViT-B-16 openai, Füße"
    bank.save(path)
    loaded = MaskBank.load(path, source=bank.source)
    assert (loaded.labels, loaded.source) == (LABELS, bank.source)
    torch.testing.assert_close(loaded.embeddings, bank.embeddings, atol=1e-7, rtol=0)
    torch.testing.assert_close(loaded.scores(rows(5, seed=1), NAMES), bank.scores(rows(5, seed=1), NAMES))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    MaskBank().save(path)
    assert len(MaskBank.load(path)) == 0


def test_files_that_are_no_banks(bank: MaskBank, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    with pytest.raises(FileNotFoundError):
        MaskBank.load(path)
    with pytest.raises(OSError):
        MaskBank.load(tmp_path)
    bank.save(path)
    with pytest.raises(ValueError, match=r"embedded by None, not by 'ViT-B-16'"):
        MaskBank.load(path, source="ViT-B-16")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"bank\.safetensors is damaged"):
        MaskBank.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        MaskBank.load(path)
    tensors = {"embeddings": rows(2)}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="no bank of masks"):
        MaskBank.load(path)
    header = {"version": "0", "source": None, "labels": ["cat"]}
    for metadata in ("{", json.dumps([1]), json.dumps({"version": "0"}), json.dumps(header)):
        save_file(tensors, path, {maft_adapter.bank._KEY: metadata})
        with pytest.raises(ValueError, match=r"bank\.safetensors is damaged"):
            MaskBank.load(path)
    save_file({"other": rows(1)}, path, {maft_adapter.bank._KEY: json.dumps(header)})
    with pytest.raises(ValueError, match=r"bank\.safetensors is damaged"):
        MaskBank.load(path)


def test_masks_that_embed_wrote(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from maft_adapter.embed import Embedder, embed, read_embeddings

    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{name}.png")
    embed([tmp_path], tmp_path / "out", Embedder("superpixels"))
    known = read_embeddings(tmp_path / "out")
    bank = MaskBank(known.settings["source"])
    row = known.find(str(tmp_path / "b.png"), 0)
    bank.add(known.matrix[[row]], ["blue"])
    bank.add(known.matrix[[1 - row]], ["red"])
    picture = np.array(Image.open(tmp_path / "b.png"))
    text = text_classifier(model.clip, model.tokenizer, ["red", "blue"])
    scores, _ = bank_scorer(model, text, bank, ["red", "blue"])(picture, torch.ones(1, 32, 32, dtype=torch.bool))
    by_words, _ = mask_aware_scorer(model, text)(picture, torch.ones(1, 32, 32, dtype=torch.bool))
    assert bank.source == model.source
    assert scores[0, 1] > by_words[0, 1]


# Data sets


class Drawn(ShapesDataset):
    """A few scenes; in the first one class is a single pixel, which no token sees."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Item:
        item = super().__getitem__(index)
        if index == 0:
            item.labels[:] = 38
            item.labels[0, 0] = 39
        return item


@pytest.fixture(scope="module")
def scenes() -> Drawn:
    return Drawn(**vars(open_dataset("shapes:700", split="train")))


def test_ground_truth_of_a_data_set(model: Model, scenes: Drawn) -> None:
    everything, labels = labelled_embeddings(model, scenes, per_class=100)
    present: dict[str, int] = {}
    by_hand = []
    for index in range(12):
        item = scenes[index]
        assert isinstance(item.picture, np.ndarray)
        image = prepare(item.picture, model.mean, model.std, 96, multiple=8)[None]
        for k in sorted({*item.labels.ravel().tolist()} - ({39} if index == 0 else set())):
            (name,) = scenes.class_names[k]
            present[name] = present.get(name, 0) + 1
            mask = torch.from_numpy(item.labels == k)[None, None]
            with torch.no_grad():
                by_hand.append((name, encode_masks(model.clip, image, mask)[0, 0]))
    assert MaskBank().counts == {} and dict(sorted(bank_of(everything, labels).counts.items())) == dict(
        sorted(present.items())
    )
    for name, embedding in by_hand:
        same = [x for x, label in zip(everything, labels, strict=True) if label == name]
        assert min((x - embedding).abs().max() for x in same) < 1e-4


def test_fewer_masks_are_the_first_of_more(model: Model, scenes: Drawn) -> None:
    two, labels = labelled_embeddings(model, scenes, per_class=2, seed=5)
    assert max(bank_of(two, labels).counts.values()) == 2
    one, first_labels = labelled_embeddings(model, scenes, per_class=1, seed=5)
    assert set(first_labels) == set(labels) and len(set(first_labels)) == len(first_labels)
    for name, embedding in zip(first_labels, one, strict=True):
        torch.testing.assert_close(embedding, two[labels.index(name)], atol=1e-5, rtol=1e-4)
    other, _ = labelled_embeddings(model, scenes, per_class=1, seed=6)
    assert other.shape != one.shape or not torch.allclose(other, one)
    with pytest.raises(ValueError, match="per_class is 0"):
        labelled_embeddings(model, scenes, per_class=0)


def test_five_masks_a_class_name_more_masks_rightly_than_words_do(model: Model) -> None:
    """Ground-truth masks of scenes apart from those in the bank: the mask accuracy must rise."""
    names = open_dataset("shapes").class_names
    bank = bank_of(*labelled_embeddings(model, open_dataset("shapes:700", split="train"), per_class=5))
    text = text_classifier(model.clip, model.tokenizer, names, model.templates)
    asked, labels = labelled_embeddings(model, Drawn(**vars(open_dataset("shapes:701", split="train"))), per_class=100)
    truth = torch.tensor([names.index((label,)) for label in labels])
    by_words = class_scores(asked, text, model.logit_scale)
    right = [(scores.argmax(1) == truth).float().mean() for scores in (by_words, bank.fuse(by_words, asked, names))]
    assert right[1] > right[0]
