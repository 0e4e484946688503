"""Stand-ins for ZSSeg and FreeSeg, with the hosts' names, signatures, shapes and order of calls, and their oracle."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from maft_adapter import make_mask_aware

CLASSES, DIM, PROPOSALS = ("cat", "dog", "grass", "sky"), 16, 6
SEMANTIC, INSTANCE, PANOPTIC = (f"{name} segmentation." for name in ("semantic", "instance", "panoptic"))
# trainable_flag of the metadata: 1 for seen classes; "plain" has none.
METADATA: dict[str, Any] = {"flags": [1, 0, 1, 0], "plain": None}

Array = npt.NDArray[np.float64]


class Clip(nn.Module):
    def __init__(self, resnet: bool = False) -> None:
        super().__init__()
        self.size = 64 if resnet else 32
        self.visual: Any = (
            ModifiedResNet([1, 1, 1, 1], DIM, 4, 64, width=4)
            if resnet
            else VisionTransformer(32, 8, 32, 3, 4, mlp_ratio=2.0, output_dim=DIM)
        )


class MaskFormerClipAdapter(nn.Module):
    """The classifier of both hosts; FreeSeg's takes a task's name, too."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, with_tasks: bool, mask_thr: float = 0.5, resnet: bool = False) -> None:
        super().__init__()
        self.clip_model, self.with_tasks, self.mask_thr = Clip(resnet), with_tasks, mask_thr
        self.prompts = nn.Parameter(torch.randn(3, len(CLASSES), DIM))  # one set of class embeddings a task
        self.non_object_embedding = nn.Parameter(torch.randn(1, DIM))
        self.register_buffer("pixel_mean", torch.tensor([120.0, 110.0, 100.0]).reshape(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([60.0, 65.0, 70.0]).reshape(1, 3, 1, 1))
        self.crops = 0

    def forward(self, image: Tensor, text: list[str], *rest: Any, normalize: bool = True) -> Any:
        task, mask = rest if self.with_tasks else (SEMANTIC, *rest)
        regions, valid = self._preprocess_image(image, mask, normalize=normalize)
        if regions is None:
            return None, valid
        features = self.get_image_features(regions)  # (n, D)
        text_features = self.get_text_features(text, task) if self.with_tasks else self.get_text_features(text)
        return self.get_sim_logits(text_features, features), valid

    def _preprocess_image(self, image: Tensor, mask: Tensor, normalize: bool = True) -> Any:
        inside = mask > self.mask_thr
        valid = inside.sum(dim=(-1, -2)) > 0
        self.crops += int(valid.sum())
        if not valid.any():
            return None, valid
        regions = image.type(mask.dtype) * inside[valid, None]  # (n, 3, h, w)
        if normalize:
            regions = (regions - self.pixel_mean) / self.pixel_std
        return F.interpolate(regions, size=(self.clip_model.size,) * 2, mode="bicubic"), valid

    def get_image_features(self, image: Tensor) -> Tensor:
        features = self.clip_model.visual(image)
        return features / features.norm(dim=-1, keepdim=True)

    def get_text_features(self, noun_list: list[str], task_name: str = SEMANTIC) -> Tensor:
        task = (SEMANTIC, INSTANCE, PANOPTIC).index(task_name)
        rows = self.prompts[task, [CLASSES.index(noun) for noun in noun_list]]  # (K, D)
        return F.normalize(torch.cat([rows, self.non_object_embedding]), dim=-1)  # (K+1, D)

    def get_sim_logits(self, text_features: Tensor, image_features: Tensor, temperature: float = 100) -> Tensor:
        return temperature * image_features @ text_features.T

    def normalize_feature(self, feat: Tensor) -> Tensor:
        return feat / feat.norm(dim=-1, keepdim=True)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * F.avg_pool2d(images, 4)


class Head(nn.Module):
    """Proposals that depend on the image; FreeSeg's head takes text features and returns a tuple."""

    def __init__(self, with_tasks: bool) -> None:
        super().__init__()
        self.with_tasks, self.dropout = with_tasks, nn.Dropout(0.5)
        self.masks = nn.Conv2d(3, PROPOSALS, 1)
        self.embeddings = nn.Parameter(torch.randn(1, PROPOSALS, DIM))

    def forward(self, features: Tensor, text: Tensor | None = None) -> Any:
        assert (text is not None) == self.with_tasks
        masks = self.dropout(4 * self.masks(features))  # (B, N, h, w)
        outputs = {"pred_logits": self.embeddings + features.mean(), "pred_masks": masks}
        return (outputs, text) if self.with_tasks else outputs


class MaskFormer(nn.Module):
    """`ZeroShotMaskFormer` of ZSSeg, or with `with_tasks` FreeSeg's `OpenVocabulary`."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        with_tasks: bool,
        weight: float = 0.8,
        mask_thr: float = 0.5,
        two_clips: bool = False,
        resnet: bool = False,
    ) -> None:
        super().__init__()
        self.with_tasks, self.align_corners, self.size_divisibility = with_tasks, with_tasks, 32
        self.backbone, self.sem_seg_head = Backbone(), Head(with_tasks)
        self.clip_adapter = MaskFormerClipAdapter(with_tasks, mask_thr, resnet)
        self._region_clip_adapter = MaskFormerClipAdapter(with_tasks, mask_thr, resnet) if two_clips else None
        self.clip_ensemble, self.clip_ensemble_weight = True, weight
        if with_tasks:
            self.task_names = [SEMANTIC, INSTANCE, PANOPTIC]
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 127.0), False)
        self.register_buffer("pixel_std", torch.full((3, 1, 1), 58.0), False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def region_clip_adapter(self) -> Any:
        return self.clip_adapter if self._region_clip_adapter is None else self._region_clip_adapter

    def get_class_name_list(self, dataset_name: str) -> list[str]:
        return list(CLASSES)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        if self.training:
            return {"loss_ce": self.sem_seg_head.embeddings.sum()}
        (dataset,) = {x["meta"]["dataset_name"] for x in batched_inputs}
        names, results = self.get_class_name_list(dataset), []
        for x in batched_inputs:
            image, size = x["image"], x["image"].shape[-2:]
            padded = F.pad((image - self.pixel_mean) / self.pixel_std, (0, -size[1] % 32, 0, -size[0] % 32))[None]
            result = {}
            for task in self.task_names if self.with_tasks else [SEMANTIC]:
                text = [task] if self.with_tasks else []
                rows = self.clip_adapter.get_text_features(names, *text)
                outputs = self.sem_seg_head(self.backbone(padded), *([rows] if self.with_tasks else []))
                outputs = outputs[0] if self.with_tasks else outputs
                logits = self.clip_adapter.get_sim_logits(
                    rows, self.clip_adapter.normalize_feature(outputs["pred_logits"])
                )[0]  # (N, K+1)
                masks = F.interpolate(
                    outputs["pred_masks"], padded.shape[-2:], mode="bilinear", align_corners=self.align_corners
                )[0, :, : size[0], : size[1]]  # (N, h, w)
                result[task] = self.semantic_inference(logits, masks, image, names, *text, dataset)
            results.append(result)
        return results

    def semantic_inference(self, mask_cls: Tensor, mask_pred: Tensor, image: Tensor, names: Any, *rest: Any) -> Tensor:
        *task, dataset = rest
        mask_cls, mask_pred = mask_cls.softmax(-1)[..., :-1], mask_pred.sigmoid()  # (N, K), (N, h, w)
        if self.clip_ensemble:
            clip_cls, valid = self.region_clip_adapter(image, names, *task, mask_pred, normalize=True)
            if clip_cls is None:
                clip_cls = torch.empty(0, mask_cls.shape[-1] + 1)
            clip_cls = clip_cls[:, :-1].softmax(-1)
            if self.clip_ensemble_weight <= 0:
                return torch.einsum("qc,qhw->chw", clip_cls, mask_pred[valid])
            everywhere = torch.ones_like(mask_cls)
            everywhere[valid] = clip_cls
            flags, weight = METADATA[dataset], self.clip_ensemble_weight
            seen = torch.zeros(len(names)) if flags is None else torch.tensor(flags, dtype=torch.float32)
            mask_cls = (
                seen * mask_cls**weight * everywhere ** (1 - weight)
                + (1 - seen) * mask_cls ** (1 - weight) * everywhere**weight
            )
        return torch.einsum("qc,qhw->chw", mask_cls, mask_pred)

    def prepare_targets(self, targets: list[Any], images: Any) -> list[dict[str, Tensor]]:
        height, width = images.tensor.shape[-2:]
        return [
            {
                "labels": t.gt_classes,
                "masks": F.pad(t.gt_masks, (0, width - t.gt_masks.shape[2], 0, height - t.gt_masks.shape[1])),
            }
            for t in targets
        ]


class Instances(SimpleNamespace):
    def to(self, device: Any) -> "Instances":
        return self


def inputs(dataset: str = "flags", key: str = "instances") -> list[dict[str, Any]]:
    """Two images of one size, no multiple of 32, each with two classes; the second has only one."""
    generator = torch.Generator().manual_seed(3)
    result = []
    for classes in ([0, 2], [3]):
        image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8, generator=generator)
        label_map = torch.randint(0, 2, (40, 56), generator=generator)
        gt_masks = torch.stack([label_map == i for i in range(len(classes))])
        truth = Instances(gt_classes=torch.tensor(classes), gt_masks=gt_masks)
        result.append({"image": image, "meta": {"dataset_name": dataset}, key: truth})
    return result


def softmax(logits: Array) -> Array:
    exponential = np.exp(logits - logits.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def oracle(model: Any, image: Tensor, dataset: str, task: str, start_layer: int, size: int) -> Array:
    """Label scores (K, h, w) of an unpatched model with a mask-aware classifier, written out in numpy.

    Only the towers, interpolation and the generator's outputs are torch's.
    """
    region, index = model.region_clip_adapter, (SEMANTIC, INSTANCE, PANOPTIC).index(task)
    h, w = image.shape[1:]
    below, right = -h % 32, -w % 32
    padded = F.pad((image - model.pixel_mean) / model.pixel_std, (0, right, 0, below))[None]
    text = {
        adapter: array(torch.cat([adapter.prompts[index], adapter.non_object_embedding]))
        for adapter in (model.clip_adapter, region)
    }  # (K+1, D)
    text = {adapter: rows / np.linalg.norm(rows, axis=1, keepdims=True) for adapter, rows in text.items()}
    raw = model.sem_seg_head.embeddings[0] + model.backbone(padded).mean()  # (N, D)
    proposal = array(raw) / np.linalg.norm(array(raw), axis=1, keepdims=True)
    a_p = softmax(100 * proposal @ text[model.clip_adapter].T)[:, :-1]  # (N, K)
    logits = 4 * model.sem_seg_head.masks(model.backbone(padded))  # (1, N, h', w')
    full = F.interpolate(logits, padded.shape[-2:], mode="bilinear", align_corners=model.align_corners)
    masks = full[:, :, :h, :w].sigmoid()  # (1, N, h, w)
    valid = array((masks[0] > region.mask_thr).flatten(1).any(1)) > 0  # (N,)

    pixels = F.pad((image - region.pixel_mean[0]) / region.pixel_std[0], (0, right, 0, below))[None]
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
    tower = make_mask_aware(copy.deepcopy(region.clip_model.visual), start_layer, threshold=region.mask_thr)
    features = array(tower(pixels, F.pad(masks, (0, right, 0, below))))[0]  # (N, D)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    a_c = softmax(100 * (features @ text[region].T)[:, :-1])  # (N, K)

    m, weight = array(masks[0]), model.clip_ensemble_weight
    if weight <= 0:
        return np.einsum("nk,nhw->khw", a_c[valid], m[valid])
    a_c[~valid] = 1
    seen = np.array(METADATA[dataset] or [0] * len(CLASSES), dtype=bool)
    scores = np.where(seen, a_p**weight * a_c ** (1 - weight), a_p ** (1 - weight) * a_c**weight)
    return np.einsum("nk,nhw->khw", scores, m)
