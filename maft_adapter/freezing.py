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
# What the names of those parameters are made of, beside the numbers of blocks. Any other word is of something that was
# put into the tower, such as an adapter: it would train or freeze with the unit that it lies in, in silence.
_WORDS = """
    vision_model encoder layers transformer resblocks trunk blocks weight bias gamma
    class_embedding cls_token positional_embedding pos_embed embeddings position_embedding patch_embedding
    conv1 patch_embed proj backbone conv bn pool norm stages stem conv2 norm1 pre_norm conv1_1x1 conv2_kxk conv3_1x1
    shortcut expand
    ln_1 ln_2 ls_1 ls_2 norm2 ls1 ls2 layer_norm1 layer_norm2
    attn self_attn in_proj_weight in_proj_bias out_proj qkv q_proj k_proj v_proj q_bias v_bias q_norm k_norm ln_q ln_k
    ln_attn logit_scale head_scale rel_pos
    mlp c_fc ln c_proj fc1 fc2 fc1_g fc1_x w0 w1 w2
    attn_pool q_proj_weight k_proj_weight v_proj_weight query latent q kv probe head attention layernorm
    ln_pre norm_pre pre_layrnorm ln_post fc_norm post_layernorm visual_projection
"""
# A weight that torch's pruning, weight norm or parametrizations compute is trained through what they keep of it.
_KEPT = re.compile(r"parametrizations\.(weight|bias)\.original\d?$|(weight|bias)_(?:orig|g|v)$")
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

    "as_is" changes nothing: what requires gradients now is what trains. It is for towers that the rows say nothing of:
    those with adapters (LoRA and its like), whose library has frozen the base already, ResNets and other convolutions.

    Args:
        visual: a ViT with a class token or a pool with a learned query, mask-aware or not; with "as_is" any module. It
            is changed in place, whatever `requires_grad` was before; values stay.
        freeze: one of the names above.

    Returns:
        The parameters to hand to an optimizer. Half-precision towers want `visual.float()` first.

    Raises:
        ValueError: an unknown name; a tower that is no such ViT or holds parameters that are not its own, such as
            adapters; "as_is" where nothing requires gradients. The tower stays as it is then.

    Example:
        >>> from open_clip.transformer import VisionTransformer
        >>> visual = VisionTransformer(
        ...     image_size=32, patch_size=16, width=8, layers=1, heads=2, mlp_ratio=2.0, output_dim=4)
        >>> len(trainable_parameters(visual)), visual.conv1.weight.requires_grad
        (13, False)
    """
    if freeze != "as_is" and freeze not in _FROZEN:
        raise ValueError(f"unknown freeze {freeze!r}: choose one of {', '.join(_FROZEN)}, as_is")
    if freeze != "as_is":
        unit_of = _units(visual)
        for name, parameter in visual.named_parameters():
            parameter.requires_grad = unit_of[name] not in _FROZEN[freeze]
    trained = [parameter for parameter in visual.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            f"no parameter of {type(visual).__name__} requires gradients, so freeze='as_is' trains nothing: set "
            "requires_grad of what shall train, or activate the adapters"
        )
    return trained


def _units(visual: nn.Module) -> dict[str, str]:
    """The unit of each parameter, or ValueError."""
    names = [name for name, _ in visual.named_parameters()]
    own = {name: _KEPT.sub(lambda match: match[1] or match[2], name) for name in names}
    unit_of = {name: unit for name in names for unit, regex in _UNITS.items() if re.fullmatch(regex, own[name])}
    unknown = [name for name in names if name not in unit_of]
    present = set(unit_of.values())
    required = _REQUIRED if "pool" in present else _REQUIRED | {"cls"}
    missing = sorted(required - present)
    if unknown or missing:
        raise ValueError(
            f"{type(visual).__name__} is not laid out as a CLIP ViT: "
            f"{len(unknown)} parameters of unknown role {unknown[:4]}, units without parameters {missing}. "
            "Pass the image tower itself (model.visual), before torch.compile or DDP wraps it, and what is inside "
            "peft's wrapper (.get_base_model()); for other towers set requires_grad yourself and give freeze='as_is'"
        )
    words = set(_WORDS.split())
    added = [name for name in names if not all(part in words or part.isdigit() for part in own[name].split("."))]
    if added:
        raise ValueError(
            f"{type(visual).__name__} holds {len(added)} parameters that are not a CLIP ViT's own, such as "
            f"{', '.join(added[:4])}; the rows of Table 4d do not say whether adapters and what they wrap train. Give "
            "freeze='as_is' to train what requires gradients now, or merge them into the weights"
        )
    return unit_of
