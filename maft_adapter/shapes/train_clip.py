"""Train the small CLIP from scratch on image-level captions: `python -m maft_adapter.shapes.train_clip`.

Under an hour on two cores. No mask, box or position is ever used, and seen and unseen classes are treated alike, as
they are in web-trained CLIPs. Contrastive learning with CLIP's symmetric loss, in which captions that name the same
classes are all right answers (UniCL, Yang et al., 2022), half of the patches dropped (FLIP, Li et al., 2023), scenes
of a single thing first, and batches of things of one colour, which make the noun count.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ..checkpoint import save_weights
from ..extras import extra
from .clip import WEIGHTS, create_clip, preprocess, tokenize
from .scenes import CLASSES, COLORS, THINGS, Scene, caption, named_classes, render_scene

with extra("demo"):
    from torchmetrics.functional.classification import multilabel_average_precision

TRAIN, VALIDATION = 1_000_000, 2_000_000  # first entries of the scenes' seeds, far from those of the demo
SINGLE_EVERY = 3  # every third scene shows a single thing


def pretraining_scene(seed: tuple[int, int]) -> Scene:
    """A 64x64 scene; every third one shows a single thing."""
    if seed[1] % SINGLE_EVERY == 0:
        return render_scene(seed, size=64, things=(1, 1), radius=(0.14, 0.32))
    return render_scene(seed, size=64)


def _render(seed: tuple[int, int]) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    scene = pretraining_scene(seed)
    return scene.image, scene.present


def render_pool(first: int, count: int) -> tuple[NDArray[np.uint8], list[tuple[int, ...]]]:
    """`count` scenes on all cores: images (count, 64, 64, 3) and the classes present in each."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        rows = pool.map(_render, [(first, i) for i in range(count)], chunksize=100)
    return np.stack([image for image, _ in rows]), [present for _, present in rows]


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, named: Sequence[tuple[int, ...]]) -> Tensor:
    """CLIP's loss over a batch; rows whose captions name the same classes share the target.

    Args:
        image: (B, D) unit-length image embeddings.
        text: (B, D) unit-length caption embeddings.
        scale: scalar, 1 / temperature.
        named: what each caption names.
    """
    same = torch.tensor([[a == b for b in named] for a in named], dtype=torch.float32)  # (B, B)
    target = same / same.sum(1, keepdim=True)
    logits = scale * image @ text.T  # (B, B)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def evaluate(model: Any, images: NDArray[np.uint8], present: list[tuple[int, ...]]) -> tuple[float, float]:
    """Image-level zero-shot mAP over all classes, and accuracy on scenes of a single thing among all things."""
    model.eval()
    text = model.encode_text(tokenize([f"a picture of {name}" for name in CLASSES]), normalize=True)  # (C, D)
    scores = model.encode_image(preprocess(images), normalize=True) @ text.T  # (S, C)
    model.train()
    truth = torch.zeros(scores.shape, dtype=torch.int64)  # (S, C)
    for row, classes in zip(truth, present, strict=True):
        row[list(classes)] = 1
    precision = multilabel_average_precision(scores.sigmoid(), truth, num_labels=len(CLASSES))
    single, best = truth[::SINGLE_EVERY, : len(THINGS)], scores[::SINGLE_EVERY, : len(THINGS)].argmax(1)
    return float(precision), float(single.gather(1, best[:, None]).float().mean())


def train(total: int, scenes: int, batch_size: int, lr: float, seed: int, out: Path) -> None:
    """Train on `total` images drawn from a pool of `scenes` and write the weights to `out`, with their SHA-256."""
    started = time.monotonic()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, present = render_pool(TRAIN, scenes)
    validation = render_pool(VALIDATION, 600)
    print(f"rendered {scenes} scenes in {time.monotonic() - started:.0f} s", flush=True)
    single = np.arange(0, scenes, SINGLE_EVERY)
    several = np.setdiff1d(np.arange(scenes), single)
    # A thing that left the picture or hides behind nothing still leaves its stuff to be named.
    of_color = [
        np.array([i for i in single if present[i][0] < len(THINGS) and present[i][0] % len(COLORS) == color])
        for color in range(len(COLORS))
    ]

    model = create_clip(patch_dropout=0.5)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
    )
    steps = total // batch_size
    schedule = LambdaLR(optimizer, lambda i: min(1, (i + 1) / 200) * (1 + math.cos(math.pi * i / steps)) / 2)
    model.train()
    for step in range(steps):
        if rng.random() < max(0.3, 1 - 2 * step / steps):
            source = of_color[int(rng.integers(len(COLORS)))] if rng.random() < 0.5 else single
        else:
            source = several
        chosen = rng.choice(source, batch_size)
        named = [named_classes(present[i], rng) for i in chosen]
        batch = preprocess(images[chosen])  # (B, 3, 64, 64)
        flip = torch.from_numpy(rng.random(batch_size) < 0.5)
        batch[flip] = batch[flip].flip(-1)
        text = model.encode_text(tokenize([caption(classes, rng) for classes in named]), normalize=True)
        image = model.encode_image(batch, normalize=True)
        loss = contrastive_loss(image, text, model.logit_scale.exp(), named)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if (step + 1) % max(1, steps // 40) == 0:
            mean_precision, accuracy = evaluate(model, *validation)
            seconds = time.monotonic() - started
            print(
                f"{(step + 1) * batch_size:>8} images {seconds:>6.0f} s  loss {loss.item():.3f}  mAP "
                f"{mean_precision:.3f}  single things {accuracy:.3f}  logit scale {model.logit_scale.exp().item():.1f}",
                flush=True,
            )
            save_weights(model, out)
    save_weights(model, out)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    out.with_name(out.name + ".sha256").write_text(f"{digest}  {out.name}\n")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=450_000, help="images seen in all (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=30_000, help="scenes they are drawn from (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(WEIGHTS), help="file to write (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    train(
        arguments.images,
        arguments.scenes,
        arguments.batch_size,
        arguments.lr,
        arguments.seed,
        arguments.out,
    )


if __name__ == "__main__":
    main()
