"""Evaluation against the demo, independent computations in numpy and scikit-learn, and counts that survive anything."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score, recall_score
from torch import Tensor

from maft_adapter.adapt import encode_masks, valid_masks
from maft_adapter.baselines import MergeMode, encode_crops
from maft_adapter.classify import text_classifier
from maft_adapter.data import Item, class_list, open_dataset
from maft_adapter.evaluate import (
    FIGURES,
    PUBLISHED,
    Evaluator,
    Records,
    Result,
    crop_scorer,
    figures,
    mask_aware_scorer,
)
from maft_adapter.models import Model, load_model
from maft_adapter.proposals import Proposals
from maft_adapter.proposals.merging import propose_masks
from maft_adapter.shapes import CLASSES, clip, preprocess

SCENES = 4
SHAPES = open_dataset("shapes")
FROZEN = Path(clip.__file__).with_name(clip.WEIGHTS)
C = len(CLASSES)


class Known:
    """A proposer that has been given what it proposes, by the picture's name."""

    settings = "known"

    def __init__(self, proposals: dict[str, Proposals]) -> None:
        self.proposals = proposals

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        return self.proposals[name]


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [SHAPES[i] for i in range(SCENES)]


@pytest.fixture(scope="module")
def masks(items: list[Item]) -> dict[str, NDArray[np.bool_]]:
    return {item.name: propose_masks(item.picture) for item in items}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def known(masks: dict[str, NDArray[np.bool_]]) -> Known:
    return Known({name: Proposals(each) for name, each in masks.items()})


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(checkpoint=FROZEN)


@pytest.fixture(scope="module")
def text(model: Model) -> Tensor:
    return text_classifier(model.clip, model.tokenizer, SHAPES.class_names, model.templates)


def totals(results: list[Result]) -> tuple[Tensor, Tensor]:
    return sum((r.pixels for r in results), torch.tensor(0)), sum((r.masks for r in results), torch.tensor(0))


@torch.no_grad()
def label_map_by_hand(encode: Any, item: Item, masks: NDArray[np.bool_], text: Tensor, scale: float) -> Tensor:
    """(H, W): the small CLIP's input, embeddings, softmax of cosines, and votes of the masks it can see."""
    proposals = torch.from_numpy(masks)[None]
    embeddings, valid = encode(preprocess(np.asarray(item.picture))[None], proposals)
    scores = (scale * torch.nn.functional.normalize(embeddings[0], dim=-1) @ text.T).softmax(-1) * valid[0][:, None]
    votes = torch.einsum("nc,nhw->chw", scores, proposals[0].float())  # (C, H, W)
    return votes.argmax(0).where(votes.amax(0) > 0, 255)


@pytest.mark.parametrize("checkpoint", [FROZEN, None], ids=["IP-CLIP", "fine-tuned"])
def test_equals_a_computation_by_hand(
    checkpoint: Path | None, items: list[Item], masks: dict[str, NDArray[np.bool_]], known: Known
) -> None:
    model = load_model(checkpoint=checkpoint)
    text = text_classifier(model.clip, model.tokenizer, SHAPES.class_names, model.templates)
    evaluator = Evaluator(SHAPES, known, mask_aware_scorer(model, text))

    def encode(images: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
        return model.clip.visual(images, proposals), valid_masks(model.clip.visual, images, proposals)

    for item in items:
        expected = label_map_by_hand(encode, item, masks[item.name], text, model.logit_scale)
        assert (evaluator(item).prediction != expected).sum() <= 2  # ties that rounding decides


@pytest.mark.parametrize("mode", ["mask", "crop", "mask_crop"])
def test_baselines_equal_crops_of_the_frozen_clip(
    mode: MergeMode, items: list[Item], masks: dict[str, NDArray[np.bool_]], model: Model, text: Tensor
) -> None:
    few = {name: each[:5] for name, each in masks.items()}
    given = Known({name: Proposals(each) for name, each in few.items()})
    evaluator = Evaluator(SHAPES, given, crop_scorer(model, text, mode))
    encode = partial(encode_crops, clip.load_clip(), mode=mode)
    for item in items[:2]:
        expected = label_map_by_hand(encode, item, few[item.name], text, model.logit_scale)
        assert (evaluator(item).prediction != expected).sum() <= 2


def test_ground_truth_masks_as_proposals(items: list[Item], model: Model, text: Tensor) -> None:
    evaluator = Evaluator(SHAPES, None, mask_aware_scorer(model, text))
    for item in items:
        result = evaluator(item)
        for k in np.unique(item.labels):
            there = result.prediction[torch.from_numpy(item.labels == k)]
            assert (there == there[0]).all()  # a mask has one class
            assert result.masks[k, there[0]] == 1 or there[0] == 255
    with pytest.raises(ValueError, match="the ensemble needs class scores"):
        replace(evaluator, weight=0.7)(items[0])
    perfect = Evaluator(SHAPES, None)(items[0])
    np.testing.assert_array_equal(perfect.prediction, items[0].labels)


def test_figures_equal_scikit_learn_and_numpy(items: list[Item], known: Known, model: Model, text: Tensor) -> None:
    results = [Evaluator(SHAPES, known, mask_aware_scorer(model, text))(item) for item in items]
    said, true = [], []  # of ground-truth masks, encoded one by one
    for item in items:
        for k in np.unique(item.labels):
            one = torch.from_numpy(item.labels == k)[None, None]
            with torch.no_grad():
                embedding = encode_masks(model.clip, preprocess(np.asarray(item.picture))[None], one)[0]
            said.append(int((embedding @ text.T).argmax()))
            true.append(int(k))
    prediction = np.stack([result.prediction.numpy() for result in results])
    target = np.stack([item.labels for item in items])
    prediction = np.where(prediction == 255, C, prediction)  # nowhere the truth, so a miss
    pixels, counted = totals(results)
    np.testing.assert_array_equal(pixels, sklearn_confusion(target.ravel(), prediction.ravel(), labels=range(C + 1)))
    np.testing.assert_array_equal(counted, sklearn_confusion(true, said, labels=range(C + 1)))

    there = np.unique(target)
    everywhere = np.union1d(there, np.unique(prediction[prediction < C]))
    for absent, classes in (("ignore", there), ("zero", everywhere)):
        iou = 100 * jaccard_score(target.ravel(), prediction.ravel(), labels=classes, average=None)
        unseen = np.isin(classes, SHAPES.unseen)
        weights = np.array([(target == k).mean() for k in classes])
        expected = {
            "miou": iou.mean(),
            "miou_seen": iou[~unseen].mean(),
            "miou_unseen": iou[unseen].mean(),
            "hiou": 2 / (1 / iou[~unseen].mean() + 1 / iou[unseen].mean()),
            "fwiou": (weights * iou).sum(),
            "pixel_accuracy": 100 * (prediction == target).mean(),
            "mask_accuracy": 100 * recall_score(true, said, labels=np.unique(true), average="macro", zero_division=0),
        }
        assert figures(pixels, counted, SHAPES.unseen, absent) == pytest.approx(expected, abs=1e-6)
    assert len(everywhere) > len(there)  # the conventions differ here


def test_upper_bound(items: list[Item], masks: dict[str, NDArray[np.bool_]], known: Known) -> None:
    for item in items[:2]:
        votes = np.zeros((C, *item.labels.shape))  # S_IoU of every class, summed over the proposals at a pixel
        for mask in masks[item.name]:
            for k in np.unique(item.labels):
                truth = item.labels == k
                votes[k] += mask * ((mask & truth).sum() / (mask | truth).sum())
        result = Evaluator(SHAPES, known)(item)
        agree = result.prediction.numpy() == votes.argmax(0)
        assert agree.mean() > 0.999  # sums in another order
        assert not result.masks.any()
    truth = np.stack([item.labels == k for k in np.unique(item.labels)])
    assert (Evaluator(SHAPES, Known({item.name: Proposals(truth)}))(item).prediction.numpy() == item.labels).all()


def test_nothing_proposed_is_nothing_found(items: list[Item], model: Model, text: Tensor) -> None:
    nothing = Known({items[0].name: Proposals(np.zeros((0, 96, 96), bool))})
    for scorer in (mask_aware_scorer(model, text), crop_scorer(model, text, "crop"), None):
        result = Evaluator(SHAPES, nothing, scorer)(items[0])
        assert (result.prediction == 255).all()
        assert result.pixels[:, C].sum() == 96 * 96


def test_soft_masks_vote_by_their_weight(items: list[Item], model: Model, text: Tensor) -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((3, 96, 96)).astype(np.float32)
    masks[:, 0, 0] = 0
    scorer = mask_aware_scorer(model, text)
    result = Evaluator(SHAPES, Known({items[0].name: Proposals(masks)}), scorer)(items[0])
    scores = scorer(np.asarray(items[0].picture), torch.from_numpy(masks))[0].numpy()
    votes = np.einsum("nc,nhw->chw", scores, masks)
    agree = result.prediction.numpy() == np.where(votes.max(0) > 0, votes.argmax(0), 255)
    assert agree[0, 0] and agree.mean() > 0.999
    binary = Evaluator(SHAPES, Known({items[0].name: Proposals(masks > 0.5)}), scorer)(items[0])
    np.testing.assert_array_equal(result.masks, binary.masks)  # ground-truth masks stay what they are


def test_a_mask_without_a_patch_is_missed(items: list[Item], known: Known, model: Model, text: Tensor) -> None:
    labels = items[0].labels.copy()
    labels[0, 0] = new = min(set(range(C)) - set(labels.ravel().tolist()))
    result = Evaluator(SHAPES, known, mask_aware_scorer(model, text))(items[0]._replace(labels=labels))
    assert result.masks[new].tolist() == [0] * C + [1]
    labels[:] = 255  # no class at all
    result = Evaluator(SHAPES, known, mask_aware_scorer(model, text))(items[0]._replace(labels=labels))
    assert not result.pixels.any() and not result.masks.any()


# The ensemble


def probabilities(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    scores = rng.random(shape).astype(np.float32) ** 4
    return scores / scores.sum(-1, keepdims=True)


def ensembled(
    a_p: NDArray[Any], a_c: NDArray[Any], seen: list[bool], masks: NDArray[np.bool_], weight: float, form: str
) -> NDArray[np.int64]:
    """Eq. 9 and O, class by class."""
    output = np.zeros((len(seen), *masks.shape[1:]))
    for k, is_seen in enumerate(seen):
        if is_seen:
            score = a_p[:, k] ** weight * a_c[:, k] ** (1 - weight)
        else:
            score = a_c[:, k] ** weight * (a_p[:, k] ** (1 - weight) if form == "released" else 1)
        output[k] = (score[:, None, None] * masks).sum(0)
    return output.argmax(0)


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("columns", ["all", "seen", "names"])
def test_ensemble(form: Literal["paper", "released"], columns: str, items: list[Item]) -> None:
    rng = np.random.default_rng(3)
    masks = np.concatenate([np.ones((1, 96, 96), bool), rng.random((5, 96, 96)) < 0.5])
    a_c = probabilities(rng, 6, C)
    trained: list[tuple[str, ...]] | None = None
    seen = [k not in SHAPES.unseen for k in range(C)]
    if columns == "names":  # two known classes are one here, one is two, one is none
        trained = [("Red Ball", "apple"), ("ball", "red ball"), ("yellow ball", "green ball"), ("cat",)]
        seen = [name in ("red ball", "yellow ball", "green ball") for name in CLASSES]
    count = {"all": C, "seen": sum(seen), "names": 4}[columns]
    given = probabilities(rng, 6, count + 1)
    a_p: NDArray[Any] = np.zeros((6, C))
    of_objects = given[:, :-1] / given[:, :-1].sum(1, keepdims=True)  # given that there is one
    if columns == "all":
        a_p = of_objects
    elif columns == "seen":
        a_p[:, seen] = of_objects
    else:
        for name, of in (("red ball", [0, 1]), ("yellow ball", [2]), ("green ball", [2])):
            a_p[:, CLASSES.index(name)] = of_objects[:, of].sum(1)

    def scorer(_: Any, asked: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.full((len(asked), C), 1 / C)
        scores[:6] = torch.from_numpy(a_c)
        return scores, torch.ones(len(asked), dtype=torch.bool)

    proposals = Known({items[0].name: Proposals(masks, class_scores=given)})
    evaluator = Evaluator(SHAPES, proposals, scorer, 0.7, form, trained)
    assert evaluator.unseen == tuple(np.flatnonzero(~np.array(seen)))
    expected = ensembled(a_p, a_c, seen, masks, 0.7, form)
    assert (evaluator(items[0]).prediction.numpy() == expected).mean() > 0.999
    without = ensembled(np.ones_like(a_p), a_c, [True] * C, masks, 0.0, form)
    assert (Evaluator(SHAPES, proposals, scorer)(items[0]).prediction.numpy() == without).mean() > 0.999
    assert (without != expected).any()


def test_masks_without_a_patch_have_no_vote_in_the_ensemble(items: list[Item]) -> None:
    masks = np.ones((2, 96, 96), bool)
    given = np.eye(C + 1, dtype=np.float32)[[3, 4]]

    def scorer(_: Any, asked: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.full((len(asked), C), 1 / C)
        scores[0] = torch.nan
        return scores, torch.arange(len(asked)) > 0

    evaluator = Evaluator(SHAPES, Known({items[0].name: Proposals(masks, class_scores=given)}), scorer, 0.5, "released")
    assert (evaluator(items[0]).prediction == 4).all()


def test_seen_by_overlapping_synonyms() -> None:
    known = class_list("coco-stuff", "prompted").names
    ade = replace(SHAPES, class_names=class_list("ade20k-150", "prompted").names, unseen=())
    everything = Evaluator(ade, Known({}))
    assert everything.unseen == ()
    unseen = Evaluator(ade, Known({}), trained_on=known).unseen
    every = {name for names in known for name in names}
    assert unseen == tuple(k for k, names in enumerate(ade.class_names) if not every & set(names))
    assert 0 < len(unseen) < 150


@pytest.mark.parametrize(
    ("class_scores", "message"),
    [
        (None, "needs class scores"),
        (np.full((1, 8), 1 / 8, np.float32), "are of 7 classes: expected the 32 that the training knew, or the 40"),
    ],
)
def test_class_scores_that_do_not_fit(
    class_scores: NDArray[np.float32] | None, message: str, items: list[Item], model: Model, text: Tensor
) -> None:
    proposals = Known({items[0].name: Proposals(np.ones((1, 96, 96), bool), class_scores=class_scores)})
    with pytest.raises(ValueError, match=message):
        Evaluator(SHAPES, proposals, mask_aware_scorer(model, text), weight=0.5)(items[0])


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_weights_that_are_none(weight: float, known: Known, model: Model, text: Tensor) -> None:
    with pytest.raises(ValueError, match="expected one in"):
        Evaluator(SHAPES, known, mask_aware_scorer(model, text), weight=weight)
    with pytest.raises(ValueError, match="none for the upper bound"):
        Evaluator(SHAPES, known, None, weight=0.5)


def test_crops_of_transformers_are_refused(model: Model, text: Tensor) -> None:
    with pytest.raises(ValueError, match="crops need a CLIP of open_clip"):
        crop_scorer(model._replace(clip=torch.nn.Linear(1, 1)), text, "crop")


def test_masks_of_another_size(items: list[Item]) -> None:
    with pytest.raises(ValueError, match="masks are 8 x 9"):
        Evaluator(SHAPES, Known({items[0].name: Proposals(np.ones((1, 8, 9), bool))}))(items[0])


def test_figures_without_unseen_classes_or_masks() -> None:
    counts = torch.tensor([[3, 1], [0, 0]])
    found = figures(counts, torch.zeros_like(counts), unseen=[])
    assert {name for name in FIGURES if np.isnan(found[name])} == {"miou_unseen", "hiou", "mask_accuracy"}
    with pytest.raises(ValueError, match="nothing was counted"):
        figures(torch.zeros_like(counts), counts, unseen=[])


# Counts on disk


@settings(max_examples=25, deadline=None)
@given(
    writes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1),
    random=st.randoms(),
    cut=st.integers(0, 200),
)
def test_counts_come_back_whoever_kept_them_and_whatever_was_cut_off(
    writes: list[tuple[int, int]], random: Any, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("records")
    matrices = {i: torch.from_numpy(np.random.default_rng(i).integers(0, 3, (2, 4, 4))) for i in range(6)}
    for part, index in writes:
        result: Result | str = Result(torch.zeros(1, 1), *matrices[index]) if random.random() < 0.7 else "broken"
        Records(folder, 3).add(str(part), index, result)
    files = sorted(folder.iterdir())
    before = set(Records(folder, 3).read()[0])
    files[0].write_bytes(files[0].read_bytes()[: -1 - cut])  # as a kill does
    left = set(Records(folder, 3).read()[0])
    assert left <= before
    for index in before - left:  # again, as the next run does
        Records(folder, 3).add(files[0].name.split(".")[1], index, Result(torch.zeros(1, 1), *matrices[index]))
    records = Records(folder, 3)
    pixels, masks = records.read()
    assert set(pixels) == set(masks) == before
    assert not set(records.failed) & before
    for index in before:
        np.testing.assert_array_equal(records.summed([pixels[index]]), matrices[index][0])
    total = sum((matrices[index][1] for index in before), torch.zeros(4, 4))
    np.testing.assert_array_equal(records.summed(masks.values()), total)


def test_counts_beyond_32_bits_stay_exact(tmp_path: Path) -> None:
    counts = torch.tensor([[2**53 + 1, 0], [0, 0]])
    Records(tmp_path, 1).add("1", 0, Result(torch.zeros(1, 1), counts, counts))
    assert Records(tmp_path, 1).summed(Records(tmp_path, 1).read()[0].values()).tolist() == counts.tolist()


# Published figures


def test_published_figures_are_consistent() -> None:
    count = 0
    for name, rows in PUBLISHED.items():
        for row in rows:
            scores = [score for score in row[2:] if score is not None]
            assert scores and all(0 < score < 100 for score in scores)
            assert row.source
            if row.hiou is not None and (name, row.method) not in {("voc-20", "STRICT"), ("voc-20", "ZSSeg")}:
                assert row.miou_seen and row.miou_unseen
                assert row.hiou == pytest.approx(2 / (1 / row.miou_seen + 1 / row.miou_unseen), abs=0.2)
                count += 1
            if row.miou and row.miou_seen and row.miou_unseen and not row.method.startswith("SAM-H"):
                assert min(row.miou_seen, row.miou_unseen) <= row.miou <= max(row.miou_seen, row.miou_unseen)
    assert count == 48
    maft = [
        next(row.miou for row in PUBLISHED[name] if row.method == "FreeSeg + MAFT" and row.miou is not None)
        for name in ("ade20k-847", "ade20k-150", "context-459", "context-59", "voc-20")
    ]
    assert maft == [10.1, 29.1, 12.8, 53.5, 90.0]
