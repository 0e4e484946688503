"""Mask generators of transformers: SAM and SAM 2, Mask2Former and MaskFormer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..extras import extra
from .base import Proposals, check_picture, fingerprint
from .convert import stack

with extra("sam"):
    from PIL import Image
    from safetensors import SafetensorError
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForMaskGeneration,
        AutoModelForUniversalSegmentation,
        MaskGenerationPipeline,
    )

# Numbers in the masks of one batch of SAM's points, 256 MB, of which the pipeline holds a few copies.
_AT_ONCE = 2**26


class Sam:
    """A proposer: everything that SAM or SAM 2 finds under a grid of points, by transformers' mask generation.

    SAM 3 is not among them: it segments what words name, and a proposer is given none.

    Args:
        model: its name on the Hugging Face Hub (`facebook/sam-vit-huge`, `facebook/sam2.1-hiera-large`, ...) or a
            folder that `save_pretrained` wrote.
        device: that it runs on.
        points_per_side: of the grid.
        pred_iou_thresh: in [0, 1]; masks whose predicted IoU is not above it are left out. 0 keeps all.
        stability_score_thresh: in [0, 1]; masks that change more than this allows with the threshold of their logits
            are left out. 0 keeps all.
        box_nms_thresh: in [0, 1]; of two masks whose boxes overlap more than this the one with the better predicted
            IoU is kept.

    Raises:
        OSError: no such model.
        ValueError: a model of another kind, or of which weights are missing; or a number out of its range.
    """

    def __init__(
        self,
        model: str = "facebook/sam2.1-hiera-tiny",
        device: torch.device | str = "cpu",
        points_per_side: int = 32,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        box_nms_thresh: float = 0.7,
    ) -> None:
        if points_per_side < 1:
            raise ValueError(f"points_per_side is {points_per_side!r}, expected at least 1")
        thresholds = {
            "pred_iou_thresh": pred_iou_thresh,
            "stability_score_thresh": stability_score_thresh,
            "box_nms_thresh": box_nms_thresh,
        }
        for name, value in thresholds.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}, expected a number in [0, 1]")
        self._options: dict[str, Any] = {
            "points_per_crop": points_per_side,
            "pred_iou_thresh": pred_iou_thresh,
            "stability_score_thresh": stability_score_thresh,
            "crops_nms_thresh": box_nms_thresh,
        }
        network, processor, source = _load(AutoModelForMaskGeneration, model, ("sam", "sam2", "sam2_video"))
        self._pipeline = _MaskGeneration(model=network, image_processor=processor, device=device)
        self._size = processor.size
        self.settings = f"sam: {source} " + " ".join(f"{name}={value}" for name, value in self._options.items())

    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        """The masks of a picture, the best first.

        Args:
            picture: (H, W, 3) uint8 RGB.
            name: does not matter.

        Returns:
            Proposals with bool masks. Their scores are the predicted IoU, an estimate that may leave [0, 1] a little
            and is cut to it.

        Raises:
            ValueError: a picture of another form, or so narrow that it vanishes at the size at which the model sees it.
        """
        check_picture(picture)
        height, width = picture.shape[:2]
        longest = self._size.get("longest_edge") or self._size["height"]
        if longest * min(height, width) < max(height, width) / 2:
            raise ValueError(f"picture is {height} x {width}: {longest} pixels long it would be none wide; cut it up")
        # Three masks a point come at the picture's size before most are left out.
        points = max(1, min(64, _AT_ONCE // (3 * height * width)))
        found: Any = self._pipeline(Image.fromarray(picture), points_per_batch=points, **self._options)
        masks = stack((mask.numpy() for mask in found["masks"]), len(found["masks"]), (height, width))
        scores = found["scores"].float().clamp(0, 1).cpu().numpy()
        return Proposals(masks, scores)


class _MaskGeneration(MaskGenerationPipeline):
    def preprocess(self, *args: Any, **kwargs: Any) -> Any:
        """Batches of points all over the picture.

        SAM 2 sees it as a square, but the pipeline puts its points as if the aspect were kept: of a picture twice as
        wide as high, only the upper half would be asked for.
        """
        batches = list(super().preprocess(*args, **kwargs))
        processor: Any = self.image_processor
        if processor.size.get("height"):
            square = torch.tensor([processor.size["width"], processor.size["height"]])
            points = torch.cat([batch["input_points"] for batch in batches], dim=1)  # (1, P, 1, 2), x and y
            nearest, farthest = points.amin((0, 1, 2)), points.amax((0, 1, 2))
            # Of a grid, the margins at both ends are equal.
            for batch in batches:
                batch["input_points"] = batch["input_points"] * square / (nearest + farthest)
        return iter(batches)


class Mask2Former:
    """A proposer: the queries of Mask2Former or MaskFormer as soft masks with class scores.

    A picture of H x W pixels takes 4 HW bytes a query: 100 queries of 12 megapixels 4.8 GB.

    Args:
        model: its name on the Hugging Face Hub (`facebook/mask2former-swin-small-ade-semantic`,
            `facebook/maskformer-swin-base-coco`, ...), a folder that `save_pretrained` wrote, or `shapes`, the small
            one of the embedded world (`maft_adapter.shapes.generator`); a folder of that name is `./shapes`.
        device: that it runs on.

    Raises:
        OSError: no such model.
        ValueError: a model of another kind (OneFormer, DETR, ...), or of which weights are missing.
    """

    def __init__(
        self, model: str = "facebook/mask2former-swin-small-coco-instance", device: torch.device | str = "cpu"
    ) -> None:
        if model == "shapes":
            network, self._processor, source = _embedded()
        else:
            kinds = ("mask2former", "maskformer")
            network, self._processor, source = _load(AutoModelForUniversalSegmentation, model, kinds)
        self._network = network.to(device)
        self.settings = f"mask2former: {source}"

    @torch.no_grad()
    def __call__(self, picture: NDArray[np.uint8], name: str = "") -> Proposals:
        """The queries of a picture, in their order.

        Args:
            picture: (H, W, 3) uint8 RGB.
            name: does not matter.

        Returns:
            Proposals with soft masks. The class scores are a softmax over the model's classes and, in the last column,
            "no object". The score is that of the best class times the mean of the mask where it is above 0.5, as in
            the model's own instance segmentation; 0 where it never is.

        Raises:
            ValueError: a picture of another form.
        """
        check_picture(picture)
        inputs = self._processor(images=Image.fromarray(picture), return_tensors="pt")
        inputs = inputs.to(self._network.device, self._network.dtype)
        outputs = self._network(**inputs)
        seen = inputs["pixel_mask"][0].bool()  # (h', w'), the rest is padding at the right and at the bottom
        height, width = int(seen.any(1).sum()), int(seen.any(0).sum())
        class_scores = outputs.class_queries_logits[0].float().softmax(-1)  # (N, C+1)
        logits = outputs.masks_queries_logits[0].float()  # (N, h, w)
        masks = np.empty((len(logits), *picture.shape[:2]), np.float32)
        scores = class_scores[:, :-1].amax(-1).cpu().numpy()  # (N,)
        for n, query in enumerate(logits):  # one by one, since all at once would be there several times
            padded = F.interpolate(query[None, None], seen.shape, mode="bilinear", align_corners=False)
            whole = F.interpolate(
                padded[..., :height, :width], picture.shape[:2], mode="bilinear", align_corners=False
            ).sigmoid()[0, 0]  # (H, W)
            inside = whole[whole > 0.5]
            scores[n] *= float(inside.mean()) if len(inside) else 0.0
            masks[n] = whole.cpu().numpy()
        return Proposals(masks, scores, class_scores.cpu().numpy())


def _embedded() -> tuple[Any, Any, str]:
    """The generator of the embedded world, its image processor, and what tells it from others."""
    from ..shapes import generator

    version = Path(generator.__file__).with_name(f"{generator.WEIGHTS}.sha256").read_text()[:16]
    return generator.load_generator(), generator.image_processor(), f"shapes {version}"


def _load(auto: Any, name: str, kinds: tuple[str, ...]) -> tuple[Any, Any, str]:
    """A model of one of these kinds, its image processor, and what tells it from others."""
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in kinds:
            raise ValueError(f"it is a {config.model_type}")
        model, info = auto.from_pretrained(name, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"it lacks weights: {', '.join(sorted(info['missing_keys'])[:3])} ...")
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{name!r} is no model of transformers of the kind {' or '.join(kinds)}: {error}") from error
    version = fingerprint(Path(name)) if Path(name).is_dir() else getattr(config, "_commit_hash", None)
    return model.eval(), processor, f"{name} {version}"
