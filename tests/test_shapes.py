"""The embedded world: scenes, captions, the small CLIP's tokenizer and weights."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import image_transform
from PIL import Image
from scipy import ndimage

from maft_adapter.shapes import clip as clip_module
from maft_adapter.shapes.clip import create_clip, load_clip, preprocess, tokenize
from maft_adapter.shapes.scenes import CLASSES, SEEN, STUFF, THINGS, UNSEEN, caption, named_classes, render_scene
from maft_adapter.shapes.train_clip import contrastive_loss, evaluate, pretraining_scene


def test_a_seed_gives_the_same_bytes_on_every_machine() -> None:
    digest = hashlib.sha256()
    for seed in range(8):
        scene = render_scene(seed)
        digest.update(scene.image.tobytes())
        digest.update(scene.labels.tobytes())
    assert digest.hexdigest() == "d055cbbc29fe2abe5f386be6caf81d282e9649f8d81296fd147bc99a0e8133c6"


def test_unseen_classes_are_new_combinations_of_seen_words() -> None:
    assert set(SEEN) | set(UNSEEN) == set(CLASSES) and not set(SEEN) & set(UNSEEN)
    assert len(UNSEEN) / len(CLASSES) == pytest.approx(0.2)
    words = {word for name in SEEN for word in name.split()}
    assert all(word in words for name in UNSEEN for word in name.split())
    assert any(name in STUFF for name in UNSEEN)


@pytest.mark.parametrize("size", [64, 96])
def test_scenes_are_what_their_labels_say(size: int) -> None:
    counts = []
    for seed in range(30):
        scene = render_scene((9, seed), size=size)
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert scene.present == tuple(np.unique(scene.labels)) and max(scene.present) < len(CLASSES)
        assert any(CLASSES[k] in STUFF for k in scene.present)
        counts.append(sum(CLASSES[k] in THINGS for k in scene.present))
    assert min(counts) >= 1 and max(counts) == 4


def test_a_thing_keeps_at_least_about_half_of_its_area() -> None:
    """Occlusion is at most 45 %: next to every thing alone, its visible part is no sliver."""
    for seed in range(40):
        labels = render_scene((10, seed)).labels
        for k in np.unique(labels[labels < len(THINGS)]):
            parts, count = ndimage.label(labels == k)
            largest = max((parts == i + 1).sum() for i in range(count))
            assert largest >= 15, (seed, CLASSES[k], largest)


def test_excluded_classes_do_not_appear() -> None:
    for seed in range(20):
        scene = render_scene(seed, exclude=UNSEEN)
        assert not {CLASSES[k] for k in scene.present} & set(UNSEEN)


def test_pretraining_meets_every_class_and_every_third_scene_has_one_thing() -> None:
    met: set[int] = set()
    for i in range(150):
        present = pretraining_scene((1, i)).present
        met |= set(present)
        if i % 3 == 0:
            assert sum(k < len(THINGS) for k in present) <= 1
    assert met == set(range(len(CLASSES)))


def test_captions_name_present_classes_only_and_the_tokenizer_knows_their_words() -> None:
    rng = np.random.default_rng(0)
    for i in range(200):
        present = render_scene((8, i), size=16).present
        named = named_classes(present, rng)
        assert named and set(named) <= set(present)
        text = caption(named, rng)
        assert all((CLASSES[k] in text) == (k in named) for k in present)
        assert tokenize(text).shape == (1, 32)


def test_tokenizer_ends_every_text_with_the_greatest_id() -> None:
    ids = tokenize(["red ball", "a picture of pale sand and dark sand"])
    assert ids.argmax(1).tolist() == [3, 9] and (ids[0, 4:] == 0).all()
    with pytest.raises(ValueError, match="'lion'"):
        tokenize("red lion")
    with pytest.raises(ValueError, match="40 words; the context holds 30"):
        tokenize("red " * 40)


def test_preprocess_agrees_with_open_clip() -> None:
    image = render_scene(3, size=64).image
    expected = image_transform(64, is_train=False)(Image.fromarray(image))
    torch.testing.assert_close(preprocess(image), expected, atol=1e-6, rtol=0)


def test_captions_that_name_the_same_share_the_target() -> None:
    """Two rows with the same names: swapping their captions changes nothing, and the minimum is log 2, not 0."""
    image = torch.eye(3)[[0, 0, 1]]
    scale, named = torch.tensor(100.0), [(1,), (1,), (2,)]
    loss = contrastive_loss(image, image, scale, named)
    assert loss == pytest.approx(2 / 3 * np.log(2), abs=1e-5)
    assert contrastive_loss(image, image[[1, 0, 2]], scale, named) == loss


def test_damaged_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / clip_module.WEIGHTS).write_bytes(b"damaged")
    (tmp_path / f"{clip_module.WEIGHTS}.sha256").write_text("0" * 64)
    monkeypatch.setattr(clip_module, "__file__", str(tmp_path / "clip.py"))
    with pytest.raises(ValueError, match="does not have the SHA-256"):
        load_clip()


def test_shipped_weights_know_the_world_and_random_ones_do_not() -> None:
    """Stated with a wide margin; the training script prints the exact figures of its run."""
    scenes = [pretraining_scene((77, i)) for i in range(240)]
    images, present = np.stack([scene.image for scene in scenes]), [scene.present for scene in scenes]
    precision, accuracy = evaluate(load_clip(), images, present)
    assert precision > 0.55 and accuracy > 0.9
    torch.manual_seed(0)
    precision, accuracy = evaluate(create_clip(), images, present)
    assert precision < 0.3 and accuracy < 0.2
