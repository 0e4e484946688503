"""Which parameters of a CLIP image tower mask-aware fine-tuning trains (paper Sec. 5.3, Table 4d)."""

import re

from torch import nn

# Every parameter of a tower belongs to exactly one unit. The first five are those of Table 4d.
_UNITS = {
    "cls": r"class_embedding",
    "pos": r"positional_embedding",
    "mlp": r"transformer\.resblocks\.\d+\.mlp\..+",
    "conv": r"conv1\..+",
    "proj": r"proj",
    "attention": r"transformer\.resblocks\.\d+\.(ln_1|attn|ln_attn|ls_1|ln_2|ls_2)\..+",
    "ln_post": r"ln_post\..+",
    "ln_pre": r"ln_pre\..+",
}
_OPTIONAL = {"ln_pre"}  # some open_clip configurations go without

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
    and ln_post train.

    Args:
        visual: the image tower of an open_clip or OpenAI CLIP (`VisionTransformer`), adapted or not. It is
            changed in place, whatever `requires_grad` was before; values stay.
        freeze: one of the names above.

    Returns:
        The parameters to hand to an optimizer. Half-precision towers want `visual.float()` first.

    Raises:
        ValueError: on an unknown name, or on a tower that is not laid out as those two, which stays as it is.

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
    missing = sorted(_UNITS.keys() - set(unit_of.values()) - _OPTIONAL)
    if unknown or missing:
        raise ValueError(
            f"{type(visual).__name__} is not laid out as a CLIP VisionTransformer: "
            f"{len(unknown)} parameters of unknown role {unknown[:4]}, units without parameters {missing}. "
            "Pass the image tower itself (model.visual), before torch.compile or DDP wraps it"
        )
    for name, parameter in visual.named_parameters():
        parameter.requires_grad = unit_of[name] not in _FROZEN[freeze]
    return [parameter for parameter in visual.parameters() if parameter.requires_grad]
