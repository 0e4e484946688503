"""From embeddings to a label map: text classifier, class scores, ensemble, masks x scores.

Notation: B images, N mask proposals an image, C classes, D the embedding's width, H x W the masks' size.
Every function below takes proposals of one image as well as of a batch. Images with different numbers of
proposals don't stack into one tensor: call these functions once per image, in a loop.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masks import check_masks

__all__ = ["class_scores", "ensemble", "label_map", "semantic_scores", "text_classifier"]

_AT_ONCE = 2**22  # numbers that `label_map` holds at a time: 16 MB in float32, which was faster than more


@torch.no_grad()
def text_classifier(
    clip_model: nn.Module,
    tokenizer: Callable[..., Any],
    class_names: Sequence[str | Sequence[str]],
    templates: Sequence[str] = ("a photo of a {}.",),
    device: torch.device | str | None = None,
) -> Tensor:
    """Embed class names with CLIP's text encoder, one row per class.

    Every synonym of a class is put into every template; the class's row is the mean of the unit-length
    embeddings of all these prompts, scaled back to unit length. No gradient flows to the text encoder, and its dropout
    is off.

    Args:
        clip_model: a CLIP with `encode_text(tokens) -> (P, D)`, such as open_clip's or OpenAI's, or a whole model of
            transformers with `get_text_features`, such as `CLIPModel`, `SiglipModel`, `AltCLIPModel`.
        tokenizer: the model's own. Of open_clip and OpenAI, a function of a list of P strings that gives the (P,
            context) integer tensor which `encode_text` takes, for example `open_clip.get_tokenizer("ViT-B-16")`; of
            transformers, such as `AutoTokenizer` loads. SigLIP's prompts are padded as in its training.
        class_names: C classes, each a name or a sequence of synonyms: `["cat", ("sofa", "couch")]`.
        templates: prompts with one `{}` where the name goes.
        device: where the result shall lie; by default where the model's parameters lie.

    Returns:
        (C, D) float32 (float64 for a float64 model), rows of unit length.

    Raises:
        TypeError: `class_names` or `templates` is a single string, or holds something else than strings; the model has
            no text encoder; the tokenizer gives something else than tokens.
        ValueError: no classes, no synonyms or no templates; an empty name; a template without exactly one `{}`. What
            the tokenizer loses: two classes with the same names, or whose names give the same tokens ("TV" and "tv"); a
            prompt that is longer than the context; a name that it knows nothing of.

    Source: prompt ensembling of CLIP (Radford et al., 2021, Sec. 3.1.4), as MAFT and its hosts use it.

    Example:
        >>> import open_clip
        >>> clip_model = open_clip.CLIP(
        ...     embed_dim=8,
        ...     vision_cfg=open_clip.CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=8, image_size=16),
        ...     text_cfg=open_clip.CLIPTextCfg(layers=1, width=16, heads=2),
        ... )
        >>> text_classifier(clip_model, open_clip.tokenize, ["cat", ("sofa", "couch")]).shape
        torch.Size([2, 8])
    """
    classes = _checked_class_names(class_names)
    _check_templates(templates)
    _check_encoder(clip_model, tokenizer)
    _check_words(clip_model, tokenizer, classes, templates)
    model_device = next(clip_model.parameters()).device

    rows = []
    training = [module for module in clip_model.modules() if module.training]
    clip_model.eval()
    try:
        for synonyms in classes:
            prompts = [template.format(name) for name in synonyms for template in templates]
            embeddings = _encode(clip_model, tokenizer, prompts, model_device)  # (synonyms * templates, D)
            embeddings = embeddings.to(_at_least_float32(embeddings.dtype))
            rows.append(F.normalize(embeddings, dim=-1).mean(dim=0))  # (D,)
    finally:
        for module in training:
            module.training = True
    return F.normalize(torch.stack(rows), dim=-1).to(device or model_device)  # (C, D)


def class_scores(embeddings: Tensor, text: Tensor, logit_scale: float | Tensor = 100.0) -> Tensor:
    """A^c: the probability of every class for every proposal.

    A softmax over the classes of `logit_scale` times the cosine similarity. Differentiable; half-precision
    inputs are computed and returned in float32, also under autocast.

    Args:
        embeddings: (..., N, D) float, proposal embeddings of any length; N = 0 works.
        text: (C, D) float, class embeddings of any length, such as `text_classifier` returns.
        logit_scale: positive factor, the inverse of the softmax temperature. 100 is where CLIP's own
            training ends. A model's parameter holds the logarithm: pass `clip_model.logit_scale.exp()`.

    Returns:
        (..., N, C) in [0, 1], summing to 1 over the classes; float32 or wider. A proposal whose embedding is not
        finite has NaN throughout, which `label_map` and `ensemble` refuse unless told to leave that proposal out.

    Raises:
        TypeError: `embeddings` or `text` is not a float tensor.
        ValueError: wrong shapes, different D, no classes; `text` is not finite; `logit_scale` is not one positive
            finite number.

    Source: Eq. 1 of the paper.

    Example:
        >>> text = torch.eye(2)
        >>> class_scores(torch.tensor([[5.0, 0.0], [1.0, 1.0]]), text)
        tensor([[1.0000e+00, 3.7835e-44],
                [5.0000e-01, 5.0000e-01]])
    """
    _check_float_tensor("embeddings", embeddings)
    _check_float_tensor("text", text)
    if text.ndim != 2 or text.shape[0] == 0:
        raise ValueError(f"text must be (C, D) with at least one class, got {tuple(text.shape)}")
    if embeddings.ndim < 2 or embeddings.shape[-1] != text.shape[1]:
        raise ValueError(
            f"embeddings must be (..., N, D) with the text's D = {text.shape[1]}, got "
            f"{tuple(embeddings.shape)}; both must come from the same CLIP"
        )
    # A graph cannot branch on values, so a compiled function relies on the eager calls before it.
    if not torch.compiler.is_compiling() and not text.isfinite().all():
        raise ValueError("text holds NaN or infinite numbers, which would make every score NaN")
    if isinstance(logit_scale, Tensor) and logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must be one number, got a tensor of shape {tuple(logit_scale.shape)}")
    if not 0 < logit_scale < 1e38:
        raise ValueError(
            f"logit_scale must be positive and finite, got {logit_scale}; a model's parameter needs .exp(), once"
        )

    dtype = _at_least_float32(embeddings.dtype)
    proposals, classes = _unit_length(embeddings.to(dtype)), _unit_length(text.to(dtype))  # (..., N, D), (C, D)
    with torch.autocast(embeddings.device.type, enabled=False):
        return (proposals @ classes.T * logit_scale).softmax(dim=-1)  # (..., N, C)


def ensemble(
    proposal_scores: Tensor,
    clip_scores: Tensor,
    seen: Tensor,
    weight: float,
    unseen: Literal["paper", "released"] = "paper",
) -> Tensor:
    """The geometric mean of the proposal generator's scores A^p and CLIP's scores A^c.

    With λ = `weight`: seen classes get `A^p^λ * A^c^(1-λ)`. Unseen classes get `A^c^λ` as the paper
    prints it, or `A^p^(1-λ) * A^c^λ` as the released code of ZegFormer, ZSSeg and FreeSeg computes it.

    Args:
        proposal_scores: (..., N, C) probabilities A^p of the generator. With `unseen="paper"` the columns
            of unseen classes have no effect.
        clip_scores: (..., N, C) probabilities A^c, such as `class_scores` returns.
        seen: (C,) bool, True for classes of the training set.
        weight: λ in [0, 1]; the literature takes 0.6 to 0.8. At 0 the paper's form gives unseen classes 1.
        unseen: which of the two forms unseen classes take.

    Returns:
        (..., N, C) in [0, 1], float32 or wider; rows do not sum to 1.

    Raises:
        TypeError: the scores are not float tensors or `seen` is not a bool tensor.
        ValueError: shapes that don't match, scores outside [0, 1], a weight outside [0, 1], an unknown form.

    Source: Eq. 9 of the paper (appendix A).

    Example:
        >>> a_p, a_c = torch.tensor([[0.25, 0.5]]), torch.tensor([[1.0, 0.25]])
        >>> seen = torch.tensor([True, False])
        >>> ensemble(a_p, a_c, seen, weight=0.5)
        tensor([[0.5000, 0.5000]])
        >>> ensemble(a_p, a_c, seen, weight=0.5, unseen="released")
        tensor([[0.5000, 0.3536]])
    """
    _check_probabilities("proposal_scores", proposal_scores)
    _check_probabilities("clip_scores", clip_scores)
    if proposal_scores.shape != clip_scores.shape or clip_scores.ndim < 2:
        raise ValueError(
            "proposal_scores and clip_scores must both be (..., N, C), "
            f"got {tuple(proposal_scores.shape)} and {tuple(clip_scores.shape)}"
        )
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        raise TypeError(f"seen must be a bool tensor of shape (C,), got {_describe(seen)}")
    if seen.shape != clip_scores.shape[-1:]:
        raise ValueError(f"seen must be one flag per class, ({clip_scores.shape[-1]},), got {tuple(seen.shape)}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight (λ) must lie in [0, 1], got {weight}")
    if unseen not in ("paper", "released"):
        raise ValueError(f"unseen must be 'paper' or 'released', got {unseen!r}")

    dtype = _at_least_float32(torch.promote_types(proposal_scores.dtype, clip_scores.dtype))
    proposal_scores, clip_scores = proposal_scores.to(dtype), clip_scores.to(dtype)
    seen_scores = proposal_scores**weight * clip_scores ** (1 - weight)  # (..., N, C)
    unseen_scores = clip_scores**weight  # (..., N, C)
    if unseen == "released":
        unseen_scores = proposal_scores ** (1 - weight) * unseen_scores
    return torch.where(seen, seen_scores, unseen_scores)


def semantic_scores(scores: Tensor, masks: Tensor) -> Tensor:
    """O = Âᵀ·M: every pixel's score for every class, summed over the proposals that cover it.

    Args:
        scores: (B, N, C) or, for one image, (N, C); probabilities from `class_scores` or `ensemble`.
        masks: (B, N, H, W) or (N, H, W), bool or float in [0, 1] (1 = inside).

    Returns:
        (B, C, H, W) or (C, H, W), float32 or wider, at least 0; all 0 where no mask covers the pixel.

    Raises:
        TypeError: something else than tensors of these types; a list means images of different N: loop.
        ValueError: shapes that don't match, scores or masks outside [0, 1].

    Source: appendix A of the paper, below Eq. 9.

    Example:
        >>> scores = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
        >>> masks = torch.tensor([[[True, True, False]], [[False, True, False]]])
        >>> semantic_scores(scores, masks)
        tensor([[[0.7500, 0.7500, 0.0000]],
        <BLANKLINE>
                [[0.2500, 1.2500, 0.0000]]])
    """
    dtype = _check_scores_and_masks(scores, masks)
    with torch.autocast(masks.device.type, enabled=False):
        return torch.einsum("...nc,...nhw->...chw", scores.to(dtype), masks.to(dtype))


@torch.no_grad()
def label_map(scores: Tensor, masks: Tensor, ignore_index: int = 255, valid: Tensor | None = None) -> Tensor:
    """The best class of every pixel.

    An argmax over the classes of `semantic_scores`. A pixel that no valid proposal with any score covers has
    no best class and gets `ignore_index`, never class 0. What it needs beyond its inputs and its result is at most
    64 MB, whatever their sizes: at most 2**22 numbers, pixels x (classes + proposals), exist at a time.

    Args:
        scores: (B, N, C) or (N, C), as for `semantic_scores`.
        masks: (B, N, H, W) or (N, H, W), as for `semantic_scores`. A soft mask covers where it is above 0.
        ignore_index: label of uncovered pixels; no class may have it.
        valid: (B, N) or (N,) bool, False for proposals that must not vote, such as those whose mask vanished
            on the token grid; their scores may be anything. By default all vote.

    Returns:
        (B, H, W) or (H, W) int64, class indices 0..C-1 and `ignore_index`.

    Raises:
        TypeError: as `semantic_scores`; `valid` is not a bool tensor.
        ValueError: as `semantic_scores`; no classes; `ignore_index` is one of the classes; `valid` has
            another shape than `scores` without C.

    Source: appendix A of the paper, below Eq. 9.

    Example:
        >>> scores = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
        >>> masks = torch.tensor([[[True, True, False]], [[False, True, False]]])
        >>> label_map(scores, masks)
        tensor([[  0,   1, 255]])
        >>> label_map(scores, masks, valid=torch.tensor([True, False]))
        tensor([[  0,   0, 255]])
    """
    _check_float_tensor("scores", scores)
    num_classes = scores.shape[-1] if scores.ndim else 0
    if num_classes == 0:
        raise ValueError(f"scores must be (B, N, C) or (N, C) with C at least 1, got {tuple(scores.shape)}")
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index {ignore_index} is one of the {num_classes} classes; choose another, such as 65535"
        )
    if valid is not None:
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
            raise TypeError(f"valid must be a bool tensor, got {_describe(valid)}")
        if valid.shape != scores.shape[:-1]:
            raise ValueError(
                f"valid must be {tuple(scores.shape[:-1])}, one flag per proposal, got {tuple(valid.shape)}"
            )
        scores = scores.masked_fill(~valid.unsqueeze(-1), 0)

    dtype = _check_scores_and_masks(scores, masks)
    (n, c), (height, width) = scores.shape[-2:], masks.shape[-2:]
    columns = min(width, max(1, _AT_ONCE // (n + c)))
    rows = max(1, _AT_ONCE // ((n + c) * columns))
    labels = torch.empty((*masks.shape[:-3], height, width), dtype=torch.int64, device=masks.device)
    of_images = (scores, masks, labels) if scores.ndim == 3 else (scores[None], masks[None], labels[None])
    with torch.autocast(masks.device.type, enabled=False):
        for image_scores, image_masks, image_labels in zip(*of_images, strict=True):
            by_class = image_scores.to(dtype).T  # (C, N)
            for y in range(0, height, rows):
                for x in range(0, width, columns):
                    part = image_masks[:, y : y + rows, x : x + columns].to(dtype)  # (N, h, w)
                    best, label = (by_class @ part.flatten(1)).max(dim=0)  # (h*w,) each
                    label = label.masked_fill(best <= 0, ignore_index).view(part.shape[1:])  # (h, w)
                    image_labels[y : y + rows, x : x + columns] = label
    return labels


# Words -> tokens -> embeddings. A tokenizer of open_clip or OpenAI is a function of texts that cuts off what is too
# long; one of transformers is an object that pads and cuts off only if it is asked to.


def _of_transformers(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "convert_tokens_to_ids")


def _check_encoder(clip_model: Any, tokenizer: Any) -> None:
    name = type(clip_model).__name__
    if not hasattr(clip_model, "encode_text") and not hasattr(clip_model, "get_text_features"):
        raise TypeError(
            f"{name} has neither encode_text (open_clip, OpenAI) nor get_text_features (transformers); pass the whole "
            "CLIP model"
        )
    if not callable(tokenizer) or hasattr(tokenizer, "image_processor"):
        raise TypeError(
            f"{type(tokenizer).__name__} is no tokenizer; pass the tokenizer itself, a processor's .tokenizer"
        )
    if _of_transformers(tokenizer) or hasattr(clip_model, "encode_text"):
        return
    # Without an attention mask, BERT and its kin would read the padding as words.
    if any("token_type" in parameter for parameter, _ in clip_model.text_model.named_parameters()):
        raise TypeError(f"{name} needs an attention mask; pass transformers' tokenizer, which makes one")


def _context(clip_model: Any) -> int:
    """Tokens that the text encoder can see at a time."""
    if hasattr(clip_model, "context_length"):
        return int(clip_model.context_length)
    modules = clip_model.text_model.named_modules()
    position = next(m for name, m in modules if name.endswith(("position_embedding", "position_embeddings")))
    # RoBERTa's positions start behind that of the padding.
    return position.num_embeddings - (0 if position.padding_idx is None else position.padding_idx + 1)


def _token_rows(tokenizer: Any, texts: list[str]) -> list[tuple[int, ...]]:
    """The tokens of each text, to be compared."""
    if _of_transformers(tokenizer):
        return [tuple(row) for row in tokenizer(texts)["input_ids"]]
    tokens = tokenizer(texts)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or len(tokens) != len(texts):
        raise TypeError(f"the tokenizer must give a tensor of {len(texts)} rows of tokens, got {_describe(tokens)}")
    return [tuple(row) for row in tokens.tolist()]


def _encode(clip_model: Any, tokenizer: Any, prompts: list[str], device: torch.device) -> Tensor:
    """P prompts -> embeddings (P, D)."""
    if _of_transformers(tokenizer):
        # SigLIP's head is that of the last position, and was trained without an attention mask on padded texts.
        siglip = hasattr(clip_model, "text_model") and hasattr(clip_model.text_model, "head")
        padded: dict[str, Any] = {"padding": True}
        if siglip or hasattr(clip_model, "encode_text"):
            padded = {"padding": "max_length", "max_length": _context(clip_model)}
        tokens = dict(tokenizer(prompts, **padded, truncation=False, return_tensors="pt"))
        if siglip:
            tokens = {"input_ids": tokens["input_ids"]}
    else:
        tokens = {"input_ids": tokenizer(prompts)}
    tokens = {name: value.to(device) for name, value in tokens.items()}  # (P, context) each
    # OpenAI's original encode_text has no `normalize` argument, so unit length is not made in here.
    if hasattr(clip_model, "encode_text"):
        return clip_model.encode_text(tokens["input_ids"])
    output = clip_model.get_text_features(**tokens)
    return output if isinstance(output, Tensor) else output.pooler_output  # a tensor before transformers 5


def _check_words(clip_model: Any, tokenizer: Any, classes: Sequence[tuple[str, ...]], templates: Sequence[str]) -> None:
    """Raise ValueError, by comparing tokens, if the tokenizer loses something that the names say."""
    names = [name for synonyms in classes for name in synonyms]
    prompts = [template.format(name) for name in names for template in templates]
    rows = _token_rows(tokenizer, prompts)
    for prompt, cut_off in zip(prompts, _cut_off(clip_model, tokenizer, prompts, rows), strict=True):
        if cut_off:
            raise ValueError(f"{prompt!r} is longer than the text encoder's context and would be cut off: shorten it")

    # What unknown names become: of a letter that hardly any vocabulary holds, one a word or one a character.
    has_unknown = getattr(getattr(tokenizer, "tokenizer", tokenizer), "unk_token_id", None) is not None
    counts = {count for name in names for count in (len(name.split()), len(name))} if has_unknown else set()
    unknown = ["", *(" ".join(["\N{CUNEIFORM SIGN A}"] * count) for count in sorted(counts))]
    nothing = set(_token_rows(tokenizer, [templates[0].format(name) for name in unknown if name not in names]))
    of_name = dict(zip(names, rows[:: len(templates)], strict=True))
    for name, row in of_name.items():
        if row in nothing:
            raise ValueError(f"{name!r} says nothing to the tokenizer, which knows none of its characters: rename it")

    taken: dict[frozenset[tuple[int, ...]], int] = {}
    for index, synonyms in enumerate(classes):
        first = taken.setdefault(frozenset(of_name[name] for name in synonyms), index)
        if first != index:
            raise ValueError(
                f"classes {first} and {index}, {classes[first]!r} and {synonyms!r}, give the same tokens, so that no "
                "score can tell them apart: rename or remove one"
            )


def _cut_off(clip_model: Any, tokenizer: Any, prompts: list[str], rows: list[tuple[int, ...]]) -> list[bool]:
    """Which prompts have more tokens than the text encoder can see."""
    if _of_transformers(tokenizer):
        context = _context(clip_model)
        return [len(row) > context for row in rows]
    width = len(rows[0])
    if "context_length" in inspect.signature(tokenizer).parameters:
        # With one place more, a prompt that is whole gets one token of padding more, as no words at all do.
        longer = tokenizer([*prompts, ""], context_length=width + 1)  # (P + 1, width + 1)
        tokens = torch.tensor([*rows, *_token_rows(tokenizer, [""])])  # (P + 1, width)
        padding = longer[-1].sum() - tokens[-1].sum()
        padded = torch.cat([tokens, padding.expand(len(tokens), 1)], dim=1)  # (P + 1, width + 1)
        return (padded.sort().values != longer.sort().values).any(dim=1)[:-1].tolist()
    # Without that choice a prompt that just fills the context can't be told from one that is cut off.
    try:
        longer = _token_rows(tokenizer, [f"{prompt} {prompt.split()[-1]}" for prompt in prompts])
    except (ValueError, RuntimeError):  # it refuses what is too long by itself
        return [False] * len(rows)
    return [row == more for row, more in zip(rows, longer, strict=True)]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _unit_length(vectors: Tensor) -> Tensor:
    # Scaled first, so that squares neither overflow nor vanish.
    largest = vectors.detach().abs().amax(dim=-1, keepdim=True)
    return F.normalize(vectors / largest.clamp_min(torch.finfo(vectors.dtype).tiny), dim=-1)


def _check_scores_and_masks(scores: Tensor, masks: Tensor) -> torch.dtype:
    """Raise unless they are as `semantic_scores` says; the dtype to compute in."""
    _check_probabilities("scores", scores)
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks must be a tensor, got {_describe(masks)}; images of different N: loop")
    if scores.ndim not in (2, 3) or masks.ndim != scores.ndim + 1 or masks.shape[:-2] != scores.shape[:-1]:
        raise ValueError(
            "expected scores (B, N, C) with masks (B, N, H, W), or (N, C) with (N, H, W), "
            f"got {tuple(scores.shape)} and {tuple(masks.shape)}"
        )
    batched = masks if masks.ndim == 4 else masks[None]  # (B, N, H, W)
    check_masks(batched, len(batched), scores.device)
    return _at_least_float32(torch.promote_types(scores.dtype, masks.dtype))


def _describe(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _check_float_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {_describe(value)}")


def _check_probabilities(name: str, scores: Tensor) -> None:
    _check_float_tensor(name, scores)
    # A softmax in half precision may exceed 1 by rounding.
    if not ((scores >= 0) & (scores <= 1.001)).all():
        raise ValueError(f"{name} must be in [0, 1] without NaN; if these are logits, call .softmax(-1) first")


def _checked_class_names(class_names: Sequence[str | Sequence[str]]) -> list[tuple[str, ...]]:
    if isinstance(class_names, str):
        raise TypeError(f"class_names must be a sequence of classes, got one string: use [{class_names!r}]")
    if len(class_names) == 0:
        raise ValueError("class_names is empty: give at least one class")
    classes: list[tuple[str, ...]] = []
    taken: dict[frozenset[str], int] = {}
    for index, names in enumerate(class_names):
        synonyms = (names,) if isinstance(names, str) or not isinstance(names, Sequence) else tuple(names)
        if not all(isinstance(name, str) for name in synonyms):
            raise TypeError(f"class {index} must be a name or a sequence of names, got {names!r}")
        if not synonyms or not all(name.strip() for name in synonyms):
            raise ValueError(f"class {index} has no name or an empty one: {synonyms!r}")
        first = taken.setdefault(frozenset(synonyms), index)
        if first != index:
            raise ValueError(f"classes {first} and {index} are both named {synonyms!r}: remove or rename one")
        classes.append(synonyms)
    return classes


def _check_templates(templates: Sequence[str]) -> None:
    if isinstance(templates, str):
        raise TypeError(f"templates must be a sequence of strings, got one string: use [{templates!r}]")
    if len(templates) == 0:
        raise ValueError("templates is empty: give at least one, such as 'a photo of a {}.'")
    for template in templates:
        if not isinstance(template, str):
            raise TypeError(f"every template must be a string, got {template!r}")
        if not re.fullmatch(r"[^{}]*\{\}[^{}]*", template):
            raise ValueError(f"a template needs exactly one {{}} where the name goes, got {template!r}")
