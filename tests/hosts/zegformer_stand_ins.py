"""What ZegFormer needs besides `stand_ins`: it calls `.cuda()` everywhere and loads CLIP by name from the web."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import stand_ins
import torch
from PIL import Image

SEEN = 15
# The VOC classes as ZegFormer names them, the last five unseen.
NAMES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tvmonitor"),
]


def install() -> None:
    """`stand_ins.install`, a CPU in place of a GPU, and a small CLIP with random weights in place of every CLIP."""
    stand_ins.install()
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    from mask_former.third_party import clip

    clip.load = lambda name, device="cpu", jit=True: (small_clip(), None)


def small_clip(width: int = 64, layers: int = 4, patch: int = 32) -> Any:
    """ZegFormer's own CLIP in float16, with patches of 32 and the width of text that its head asks for, 512."""
    from mask_former.third_party.model import CLIP, convert_weights

    torch.manual_seed(0)
    model = CLIP(512, 224, layers, width, patch, 77, 49408, width, 1, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("text_projection", "positional_embedding", "token_embedding.weight")):
                parameter.normal_(std=0.5)  # torch.empty in the host's code, which always loads weights
        model.logit_scale.fill_(np.log(100))
    convert_weights(model)
    return model.eval()


def write_voc(folder: Path) -> None:
    """A data set laid out as ZegFormer's VOC: four pictures a split, each of five stripes, a class each.

    Training labels have the seen classes only (0..14, 255 elsewhere), validation labels all 20.
    """
    root = folder / "datasets" / "VOCZERO"
    generator = np.random.default_rng(0)
    for split, labels_of in (("train", "train_seen"), ("val", "val_all")):
        for i in range(4):
            classes = np.arange(5 * i, 5 * i + 5)
            picture = generator.integers(0, 64, (96, 130, 3)) + 37 * np.repeat(classes, 26)[None, :, None] % 192
            labels = np.repeat(classes, 26)[None].repeat(96, axis=0)  # (96, 130)
            if split == "train":
                labels[labels >= SEEN] = 255
            for part, array, suffix in (
                (f"images/{split}", picture, "jpg"),
                (f"annotations_detectron2/{labels_of}", labels, "png"),
            ):
                (root / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(root / part / f"{i}.{suffix}")
    (root / "all_classnames.json").write_text(json.dumps(NAMES), encoding="utf-8")
    (root / "seen_classnames.json").write_text(json.dumps(NAMES[:SEEN]), encoding="utf-8")
