"""What an image contributes to its proposals, kept, so that masks can be asked of it at any time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 8  # values of each tensor that are compared


class ImageFeatures:
    """The part of B images that no mask changes (Eq. 4), from `maft_adapter.encode_features`.

    `encode_masks(clip_model, features, masks)` and `visual(features, masks)` take it in place of images. What it holds
    depends on the tower's family: of a class-token tower the tokens at the start layer and the patches' keys and values
    of the blocks from there on (25 MB an image for ViT-B/16 at 480 x 480 with L = 8, in float32), of others the feature
    map that they pool.

    Features belong to one state of one tower. They refuse to be asked after its settings or weights have changed, also
    if a weight was changed through its `.data`, and they cannot be pickled. Swapping what the tower computes in another
    way, such as a hook set on it, goes unnoticed.

    Attributes:
        tensors: with the images along the first axis.
        grid: height and width of the token grid (h, w).
        seen: share of the picture's height and width that the tokens see, less than 1 where a stride does not divide
            the tower's native size.

    Example:
        >>> import open_clip
        >>> from maft_adapter import encode_features, encode_masks, make_mask_aware
        >>> clip = open_clip.create_model("ViT-B-32").eval()
        >>> _ = make_mask_aware(clip.visual)
        >>> with torch.no_grad():
        ...     features = encode_features(clip, torch.randn(2, 3, 224, 224))
        ...     encode_masks(clip, features[:1], torch.ones(1, 7, 64, 64)).shape
        torch.Size([1, 7, 512])
        >>> features
        ImageFeatures(2 images, 7x7 tokens of VisionTransformer, 2.7 MB in torch.float32 on cpu)
    """

    def __init__(
        self, tower: Any, tensors: tuple[Tensor, ...], grid: tuple[int, int], seen: tuple[float, float]
    ) -> None:
        self.tensors, self.grid, self.seen = tensors, grid, seen
        self._dtypes, self._device = [tensor.dtype for tensor in tensors], tensors[0].device
        self._tower, self._settings, self._weights = weakref.ref(tower), _settings(tower), _weights(tower)
        self._name = type(tower).__name__

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int | slice) -> ImageFeatures:
        """The features of one image (a batch of one) or of several."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"image {index} of {len(self)}")
            index = slice(index, index + 1 or None)
        return self._map(lambda tensor: tensor[index])

    def to(self, *args: Any, **options: Any) -> ImageFeatures:
        """Kept on another device or in another float dtype, as `Tensor.to` takes them.

        Asked, they are computed with in the dtype that the tower gave them; the device has to be the tower's again.
        """
        return self._map(lambda tensor: tensor.to(*args, **options))

    def detach(self) -> ImageFeatures:
        """The same values without their graph."""
        return self._map(Tensor.detach)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes that all its tensors take up."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def __repr__(self) -> str:
        (h, w), dtypes = self.grid, ", ".join(sorted({str(tensor.dtype) for tensor in self.tensors}))
        images = f"{len(self)} image" + "s" * (len(self) != 1)
        return (
            f"ImageFeatures({images}, {h}x{w} tokens of {self._name}, {self.nbytes / 1e6:.1f} MB in {dtypes} "
            f"on {self.device})"
        )

    def __reduce__(self) -> Any:
        raise TypeError("ImageFeatures belong to a tower in memory and can't be pickled; keep embeddings instead")

    def checked(self, tower: Any) -> tuple[Tensor, ...]:
        """The tensors as `tower` computes with them.

        Raises:
            ValueError: they are another tower's, or another state's of this one, or lie on another device.
        """
        # A graph holds one state of the tower; whether features are of it is seen outside.
        if not torch.compiler.is_compiling():
            again = "call encode_features again"
            if self._tower() is not tower:
                raise ValueError(
                    f"these features are of another {self._name}, not of this tower; {again} with this one"
                )
            if self._settings != (now := _settings(tower)):
                raise ValueError(f"features were made with {self._settings}, the tower now has {now}; {again}")
            if not _same(self._weights, _weights(tower)):
                raise ValueError(f"the weights of {self._name} have changed since these features were made; {again}")
            if self.device != self._device:
                raise ValueError(f"features are on {self.device}, made on {self._device}; call .to({self._device})")
        return tuple(tensor.to(dtype) for tensor, dtype in zip(self.tensors, self._dtypes, strict=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> ImageFeatures:
        other = object.__new__(ImageFeatures)
        vars(other).update(vars(self), tensors=tuple(function(tensor) for tensor in self.tensors))
        return other


def _settings(tower: Any) -> dict[str, Any]:
    return {name: getattr(tower, name) for name in tower.settings}


def _weights(tower: Any) -> tuple[list[Any], Tensor | None]:
    """What tells one state of the tower's parts and weights from another, without reading them all."""
    marks: list[Any] = [type(module) for module in tower.modules()]
    samples = []
    for tensor in (*tower.parameters(), *tower.buffers()):
        # An update in place counts the version up, unless it goes through .data: values tell these.
        marks.append((0 if tensor.is_inference() else tensor._version, tensor.shape, tensor.dtype, tensor.device))
        if type(tensor) in (Tensor, nn.Parameter) and tensor.numel() and not tensor.is_meta:
            flat = tensor.detach().flatten()
            samples.append(flat[:: -(-len(flat) // _SAMPLES)].float())
    return marks, torch.cat(samples) if samples else None


def _same(before: tuple[list[Any], Tensor | None], now: tuple[list[Any], Tensor | None]) -> bool:
    (marks, values), (marks_now, values_now) = before, now
    if marks != marks_now or values is None or values_now is None:
        return marks == marks_now and values is values_now
    return torch.equal(values.nan_to_num(), values_now.to(values.device).nan_to_num())
