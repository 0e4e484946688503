"""Train the mask generator from scratch on masks of seen classes: `python -m maft_adapter.shapes.train_generator`.

A quarter of an hour on one core. Its scenes show seen classes only, so no pixel of an unseen class is ever looked at;
that it proposes masks of them nonetheless is generalisation. (As pixels without a label, which ZegFormer's lineage has,
they would belong to no mask; in a short trial that was worse for them the longer it went on.) The losses are
Mask2Former's own, on one mask for each class that is visible.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ..checkpoint import replace_file
from ..losses import mask_iou
from .clip import preprocess
from .generator import WEIGHTS, create_generator
from .scenes import CLASSES, SEEN, UNSEEN, render_scene

TRAIN, VALIDATION = 10_000_000, 11_000_000  # first entries of the scenes' seeds, which nothing else uses

# Images (S, 96, 96, 3) and labels (S, 96, 96), uint8.
Scenes = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def _training_scene(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    scene = render_scene((TRAIN, number), exclude=UNSEEN)
    return scene.image, scene.labels


def _validation_scene(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    scene = render_scene((VALIDATION, number))
    return scene.image, scene.labels


def _stacked(scenes: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> Scenes:
    return np.stack([image for image, _ in scenes]), np.stack([labels for _, labels in scenes])


def seen_masks(labels: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """What Mask2Former's losses take of a label map: a mask for each seen class that is visible.

    Args:
        labels: (H, W) indices into `CLASSES`.

    Returns:
        (K, H, W) float32 masks, 0 or 1, and (K,) int64 indices into `SEEN`. Pixels of unseen classes are in no mask.

    Example:
        >>> masks, classes = seen_masks(np.array([[CLASSES.index("red star"), CLASSES.index(UNSEEN[0])]], np.uint8))
        >>> masks, [SEEN[k] for k in classes]
        (tensor([[[1., 0.]]]), ['red star'])
    """
    present = [k for k in np.unique(labels) if CLASSES[k] in SEEN]
    masks = torch.from_numpy(labels == np.array(present)[:, None, None]).float()  # (K, H, W)
    return masks, torch.tensor([SEEN.index(CLASSES[k]) for k in present], dtype=torch.int64)


@torch.no_grad()
def evaluate(model: Any, scenes: Scenes) -> dict[str, float]:
    """How good the masks and A^p are on scenes of all classes, in percent.

    Returns:
        "seen" and "unseen": mean over the regions of the label maps, one for each class and scene, of the best IoU that
        a mask above 0.5 has with it. "accuracy": of A^p, the pixels of seen classes that it names rightly, alone among
        the seen.
    """
    model.eval()
    best: dict[bool, list[float]] = {True: [], False: []}
    right = counted = 0
    row = torch.tensor([SEEN.index(name) if name in SEEN else -1 for name in CLASSES])  # (C,)
    for image, labels in zip(*map(torch.from_numpy, scenes), strict=True):
        outputs = model(pixel_values=preprocess(image.numpy())[None])
        masks = torch.nn.functional.interpolate(outputs.masks_queries_logits, labels.shape, mode="bilinear")[0]
        present = labels.unique().long()  # (K,)
        iou = mask_iou(masks > 0, labels == present[:, None, None])  # (K, N)
        for k, value in zip(present.tolist(), iou.amax(1).tolist(), strict=True):
            best[CLASSES[k] in SEEN].append(value)
        named = torch.einsum("nc,nhw->chw", outputs.class_queries_logits[0].softmax(-1)[:, :-1], masks.sigmoid())
        truth = row[labels.long()]  # (H, W)
        right += int((named.argmax(0) == truth)[truth >= 0].sum())
        counted += int((truth >= 0).sum())
    model.train()
    return {
        "seen": 100 * float(np.mean(best[True])),
        "unseen": 100 * float(np.mean(best[False])),
        "accuracy": 100 * right / counted,
    }


def save_generator(model: Any, path: Path) -> None:
    """Write the weights, named as every version of transformers knows them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        replace_file(path, Path(folder, "model.safetensors").read_bytes())


def train(total: int, scenes: int, batch_size: int, lr: float, seed: int, out: Path) -> None:
    """Train on `total` images drawn from `scenes` scenes and write the weights to `out`, with their SHA-256."""
    started = time.monotonic()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        images, labels = _stacked(pool.map(_training_scene, range(scenes), 100))
        validation = _stacked(pool.map(_validation_scene, range(200), 20))
    print(f"rendered {scenes} scenes in {time.monotonic() - started:.0f} s", flush=True)

    model = create_generator()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], lr=lr
    )
    steps = total // batch_size
    schedule = LambdaLR(optimizer, lambda i: min(1, (i + 1) / 100) * (1 + math.cos(math.pi * i / steps)) / 2)
    model.train()
    for step in range(steps):
        chosen = rng.choice(scenes, batch_size)
        batch, maps = images[chosen], labels[chosen]
        flip = rng.random(batch_size) < 0.5
        batch[flip], maps[flip] = batch[flip, :, ::-1], maps[flip, :, ::-1]
        masks, classes = zip(*map(seen_masks, maps), strict=True)
        loss = model(pixel_values=preprocess(batch), mask_labels=list(masks), class_labels=list(classes)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 10) == 0:
            found = evaluate(model, validation)
            print(
                f"{(step + 1) * batch_size:>8} images {time.monotonic() - started:>6.0f} s  loss {loss.item():.2f}  "
                f"best IoU of seen {found['seen']:.1f}, of unseen {found['unseen']:.1f}  A^p {found['accuracy']:.1f}",
                flush=True,
            )
            save_generator(model, out)
    save_generator(model, out)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    out.with_name(out.name + ".sha256").write_text(f"{digest}  {out.name}\n")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24_000, help="images seen in all (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=6_000, help="scenes they are drawn from (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(WEIGHTS), help="file to write (%(default)s)")
    arguments = parser.parse_args()
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
