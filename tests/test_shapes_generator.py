"""The mask generator of the embedded world: its weights, its training's parts, and its proposals."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maft_adapter.data import datasets, open_dataset
from maft_adapter.evaluate import Evaluator
from maft_adapter.proposals import check_proposals, proposer
from maft_adapter.shapes import clip as clip_module
from maft_adapter.shapes import train_clip, train_generator
from maft_adapter.shapes.clip import preprocess
from maft_adapter.shapes.generator import WEIGHTS, create_generator, load_generator
from maft_adapter.shapes.scenes import CLASSES, SEEN, UNSEEN, render_scene
from maft_adapter.shapes.train_generator import evaluate, save_generator, seen_masks

SHIPPED = Path(clip_module.__file__).with_name(WEIGHTS)


def scenes(count: int) -> Any:
    drawn = [render_scene((78, i)) for i in range(count)]
    return np.stack([scene.image for scene in drawn]), np.stack([scene.labels for scene in drawn])


def test_shipped_weights_propose_seen_and_unseen_things_and_random_ones_do_not() -> None:
    """Stated with a wide margin; the training script prints the exact figures of its run."""
    found = evaluate(load_generator(), scenes(40))
    assert found["seen"] > 75 and found["unseen"] > 65 and found["accuracy"] > 85, found
    torch.manual_seed(0)
    found = evaluate(create_generator(), scenes(10))
    assert found["seen"] < 40 and found["unseen"] < 40 and found["accuracy"] < 30, found


def test_what_is_shipped_is_small_and_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert SHIPPED.stat().st_size < 6e6
    (tmp_path / WEIGHTS).write_bytes(SHIPPED.read_bytes()[:-1])
    (tmp_path / f"{WEIGHTS}.sha256").write_bytes(SHIPPED.with_name(f"{WEIGHTS}.sha256").read_bytes())
    monkeypatch.setattr(clip_module, "__file__", str(tmp_path / "clip.py"))
    with pytest.raises(ValueError, match=f"{WEIGHTS} does not have the SHA-256"):
        load_generator()


def test_saved_weights_give_the_same_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_generator().eval()
    save_generator(model, tmp_path / "g.safetensors")
    loaded = load_generator(tmp_path / "g.safetensors")
    images = preprocess(render_scene(0).image)[None]
    with torch.no_grad():
        expected, found = model(pixel_values=images), loaded(pixel_values=images)
    assert torch.equal(found.masks_queries_logits, expected.masks_queries_logits)
    assert torch.equal(found.class_queries_logits, expected.class_queries_logits)

    weights = load_file(tmp_path / "g.safetensors")
    save_file({name: value for name, value in weights.items() if "class_predictor" not in name}, tmp_path / "part")
    with pytest.raises(ValueError, match=r"part is no generator of this world, it lacks weights: class_predictor"):
        load_generator(tmp_path / "part")


def test_training_never_meets_an_unseen_class_nor_anybody_elses_scene() -> None:
    met: set[int] = set()
    for i in range(60):
        _, labels = train_generator._training_scene(i)
        met |= set(np.unique(labels).tolist())
    assert {CLASSES[k] for k in met} <= set(SEEN) and len(met) > 25
    streams = {train_generator.TRAIN, train_generator.VALIDATION}
    assert not streams & {*datasets._SEEDS.values(), train_clip.TRAIN, train_clip.VALIDATION}
    assert len(streams) == 2


def test_masks_of_the_losses_are_the_seen_part_of_the_label_map() -> None:
    labels = np.stack([render_scene((79, i)).labels for i in range(20)])
    assert {CLASSES[k] for k in np.unique(labels)} & set(UNSEEN)
    for one in labels:
        masks, classes = seen_masks(one)
        expected = {k: one == CLASSES.index(name) for k, name in enumerate(SEEN) if (one == CLASSES.index(name)).any()}
        assert sorted(expected) == sorted(classes.tolist())
        for mask, k in zip(masks.numpy(), classes.tolist(), strict=True):
            assert np.array_equal(mask, expected[k])
    masks, classes = seen_masks(np.full((2, 3), CLASSES.index(UNSEEN[0]), np.uint8))
    assert masks.shape == (0, 2, 3) and classes.shape == (0,)


class Oracle(nn.Module):
    """Gives masks and classes that were made by hand."""

    def __init__(self, masks: Tensor, classes: Tensor) -> None:
        super().__init__()
        self.outputs = SimpleNamespace(masks_queries_logits=masks[None], class_queries_logits=classes[None])

    def forward(self, pixel_values: Tensor) -> Any:
        return self.outputs


def test_figures_of_the_training_by_hand() -> None:
    """Three columns of four pixels: a seen class, another, an unseen one."""
    labels = np.repeat(np.array([CLASSES.index(n) for n in (SEEN[3], SEEN[8], UNSEEN[0])], np.uint8), 4).reshape(3, 4).T
    masks = torch.full((2, 4, 3), -9.0)
    masks[0, :, 0] = 9  # the first column: IoU 1
    masks[1, :2, 1:] = 9  # half of the second and of the third: IoU 2 / 6 with each
    classes = torch.full((2, len(SEEN) + 1), -9.0)
    classes[0, 3] = classes[1, 8] = 9
    found = evaluate(Oracle(masks, classes), (np.zeros((1, 4, 3, 3), np.uint8), labels[None]))
    assert found["seen"] == pytest.approx(100 * (1 + 1 / 3) / 2) and found["unseen"] == pytest.approx(100 / 3)
    # Below both masks, the second column is a tie of the two names, which the first takes.
    assert found["accuracy"] == pytest.approx(100 * 6 / 8)


@pytest.mark.parametrize("size", [(96, 96), (60, 200), (1, 1), (400, 90)])
def test_its_proposals_are_soft_masks_with_scores_of_the_seen_classes(size: tuple[int, int]) -> None:
    picture = np.ascontiguousarray(np.resize(render_scene((78, 0)).image, (*size, 3)))
    found = proposer("mask2former:shapes")(picture)
    check_proposals(found, size)
    assert found.masks.dtype == np.float32 and found.class_scores is not None
    assert found.class_scores.shape == (len(found.masks), len(SEEN) + 1)


def test_a_picture_of_the_world_reaches_the_network_as_it_did_in_training() -> None:
    image = render_scene((78, 1)).image
    found = proposer("mask2former:shapes")(image)
    with torch.no_grad():
        outputs = load_generator()(pixel_values=preprocess(image)[None])
    masks = nn.functional.interpolate(outputs.masks_queries_logits, (96, 96), mode="bilinear")[0].sigmoid()
    assert found.class_scores is not None
    np.testing.assert_allclose(found.masks, masks, atol=1e-4)
    np.testing.assert_allclose(found.class_scores, outputs.class_queries_logits[0].softmax(-1), atol=1e-4)


def test_the_proposers_settings_name_the_weights() -> None:
    digest = SHIPPED.with_name(f"{WEIGHTS}.sha256").read_text()
    assert re.fullmatch(r"mask2former: shapes [0-9a-f]{16}", proposer("mask2former:shapes").settings)
    assert proposer("mask2former:shapes").settings.endswith(digest[:16])


def test_an_evaluation_joins_its_scores_with_clips() -> None:
    """With A^c that knows nothing, the ensemble names what A^p does: seen regions rightly, by the columns' order."""
    dataset = open_dataset("shapes:78")
    assert [dataset.class_names[k][0] for k in dataset.seen] == list(SEEN)
    item = next(item for item in dataset if all(k in dataset.seen for k in np.unique(item.labels)))

    def nothing(picture: Any, masks: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(masks), len(CLASSES)), 1e-3), torch.ones(len(masks), dtype=torch.bool)

    result = Evaluator(dataset, proposer("mask2former:shapes"), nothing, weight=0.7)(item)
    assert (result.prediction.numpy() == item.labels).mean() > 0.7
