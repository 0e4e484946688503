"""Which parameters of a CLIP image tower mask-aware fine-tuning trains (paper Sec. 5.3, Table 4d)."""

import re

from torch import nn

_BLOCKS = r"(transformer\.resblocks|trunk\.blocks|(vision_model\.)?encoder\.layers)\.\d+"
_EMBEDDINGS = r"(vision_model\.)?embeddings"
# Every parameter of a ViT belongs to exactly one unit, in open_clip's and OpenAI's layout, in timm's inside
# open_clip's TimmModel, and in transformers'. The first five units are those of Table 4d.
_UNITS = {
    "cls": rf"class_embedding|trunk\.cls_token|{_EMBEDDINGS}\.class_embedding",
    "pos": rf"positional_embedding|trunk\.pos_embed|{_EMBEDDINGS}\.position_embedding\.weight",
    "mlp": rf"{_BLOCKS}\.mlp\..+",
    "conv": rf"(conv1|trunk\.patch_embed|{_EMBEDDINGS}\.patch_embedding)\..+",
    "proj": r"proj|(head\.proj|trunk\.head|visual_projection)\..+",
    "attention": rf"{_BLOCKS}\.(?!mlp\.).+",
    "pool": r"((trunk\.)?attn_pool|(vision_model\.)?head\.(attention|layernorm|mlp))\..+|(vision_model\.)?head\.probe",
    "ln_post": r"(ln_post|trunk\.norm|trunk\.fc_norm|(vision_model\.)?post_layernorm)\..+",
    "ln_pre": r"(ln_pre|trunk\.norm_pre|(vision_model\.)?pre_layrnorm)\..+",
}
_REQUIRED = {"mlp", "conv", "attention", "ln_post"}

_FROZEN: dict[str, set[str]] = {
    "none": set(),
    "+cls": {"cls"},
    "+pos": {"cls", "pos"},
    "+mlp": {"cls", "pos", "mlp"},
    "+conv": {"cls", "pos", "mlp", "conv"},
    "+proj": {"cls", "pos", "mlp", "conv", "proj"},
    "paper": {"cls", "pos", "mlp", "conv"},
    "released": {"cls", "pos", "mlp", "conv", "proj", "ln_pre"},
}


def trainable_parameters(visual: nn.Module, freeze: str = "paper") -> list[nn.Parameter]:
    """Set `requires_grad` on every parameter of a tower and return those that train, in their order.

    The rows of Table 4d freeze one unit after the other: "none", "+cls" (class embedding), "+pos" (position
    embedding), "+mlp" (the blocks' MLPs), "+conv" (patch embedding), "+proj" (final projection). "paper" is
    the paper's choice, "+conv". "released" is what the authors' code does: only the blocks without their MLPs
    and ln_post train. A pool with a learned query trains in every row.

    Args:
        visual: a ViT with a class token or a pool with a learned query, adapted or not. It is changed in place,
            whatever `requires_grad` was before; values stay.
        freeze: one of the names above.

    Returns:
        The parameters to hand to an optimizer. Half-precision towers want `visual.float()` first.

    Raises:
        ValueError: on an unknown name, or on a tower that is no such ViT, which stays as it is. For ResNets and
            other convolutions neither paper nor code says what trains: set `requires_grad` yourself.

    >>> from open_clip.transformer import VisionTransformer
    >>> visual = VisionTransformer(
    ...     image_size=32, patch_size=16, width=8, layers=1, heads=2, mlp_ratio=2.0, output_dim=4)
    >>> len(trainable_parameters(visual)), visual.conv1.weight.requires_grad
    (13, False)
    """
    if freeze not in _FROZEN:
        raise ValueError(f"unknown freeze {freeze!r}: choose one of {', '.join(_FROZEN)}")
    names = [name for name, _ in visual.named_parameters()]
    unit_of = {name: unit for name in names for unit, regex in _UNITS.items() if re.fullmatch(regex, name)}
    unknown = [name for name in names if name not in unit_of]
    present = set(unit_of.values())
    required = _REQUIRED if "pool" in present else _REQUIRED | {"cls"}
    missing = sorted(required - present)
    if unknown or missing:
        raise ValueError(
            f"{type(visual).__name__} is not laid out as a CLIP ViT: "
            f"{len(unknown)} parameters of unknown role {unknown[:4]}, units without parameters {missing}. "
            "Pass the image tower itself (model.visual), before torch.compile or DDP wraps it"
        )
    for name, parameter in visual.named_parameters():
        parameter.requires_grad = unit_of[name] not in _FROZEN[freeze]
    return [parameter for parameter in visual.parameters() if parameter.requires_grad]
