"""Which image towers become mask-aware: `python -m benchmarks.coverage [NAME ...] [--out FILE]`.

Three tables: every configuration that the installed open_clip lists; a model of every architecture of timm, inside
open_clip's `TimmModel`, as it pools by itself and with an average; and every vision model of transformers.

A tower is built twice, without its text tower and with random weights. In full size, on the meta device,
`make_mask_aware` has to take it or to refuse it with a reason. Small, with the same classes and options but few blocks
and channels, it has to do what was said or to be refused:

- Without masks it gives what it gave unpatched, to the bit, and so it does after `restore`.
- Two masks over two textures give two embeddings, and an embedding moves with the region under its mask.
- If it pools its last feature map (attention pool, average), the same change moves a mask less that it lies outside of.
- A full mask gives the image's own embedding, if patches are all that is pooled.
- An empty mask gives a finite embedding.

A tower that misses one of these has failed, and so has one that comes back unpatched, is refused after it was changed,
or crashes. The exit status is 1 if any failed or too many of open_clip's were refused.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict
from unittest import mock

import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers
from open_clip.model import _build_vision_tower
from timm.models.vitamin import VitCfg
from torch import Tensor
from tqdm import tqdm

from maft_adapter import is_mask_aware, make_mask_aware, restore
from maft_adapter.towers import FAMILIES, attention_pool, average, class_token, learned_query

# Of open_clip 3.3's 144 at least 140 are promised. The NaFlex and GenLIP towers of its next version are refused.
MOST_REFUSED = 4
_REFUSED_KINDS = re.compile("naflex|genlip", re.IGNORECASE)

DEPTH, START_LAYER = 3, 1  # a block as it always was, one that the masks enter, and the last, which computes less
WIDTH, HEADS = 64, 4
STAGE_DEPTH = 2  # the first block of a stage is often unlike the others

# Distances relative to an embedding's length. With random weights the smallest response that counts was 8e-4 and the
# largest rounding 6e-7; a tower that ignores its masks responds by rounding alone.
RESPONSE, ROUNDING = 1e-4, 1e-5


VERSIONS = {
    "open_clip": open_clip.__version__,
    "timm": timm.__version__,
    "transformers": transformers.__version__,
}


class Failed(Exception):
    """A tower was taken, but does not do what `make_mask_aware` says."""


class Responses(TypedDict):
    """Distances between two embeddings, relative to the length of one: but for the last the left mask's."""

    textures: float  # of two masks over two textures
    inside: float  # of the left mask, before and after a change under it
    outside: float  # of the right mask, before and after that change
    full_mask: float  # of a full mask and the image


class Row(TypedDict):
    """What became of one configuration."""

    name: str
    library: str  # whose tower it is
    family: str
    classes: list[str]  # that the tower is made of: the same for towers that differ in their size only
    status: Literal["verified", "refused", "failed"]
    reason: str  # of a refusal or a failure
    responses: Responses | None  # of a verified tower


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="configurations, models, classes (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a row for every tower as JSON, too")
    options = parser.parse_args(arguments)
    listed = {**dict.fromkeys(transformers_names(), "transformers"), **dict.fromkeys(timm_names(), "timm")}
    listed |= dict.fromkeys(open_clip_names(), "open_clip")
    unknown = ", ".join(name for name in options.names if name not in listed)
    if unknown:
        parser.error(f"nothing listed by the installed open_clip, timm and transformers is called {unknown}")
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.parent} does not exist; make it first")

    start = time.perf_counter()
    rows: list[Row] = []
    for name in tqdm(options.names or listed, unit="tower"):
        if not any(name == f"{row['name']} avg" and row["family"] == "average" for row in rows):  # the same tower
            rows.append(cover(name, listed[name]))
    seconds = time.perf_counter() - start
    for library, version in VERSIONS.items():
        found = [row for row in rows if row["library"] == library]
        if found:
            print(f"## {library} {version}\n\n{as_markdown(found)}\n")
    print(f"in {seconds:.0f} s; torch {torch.__version__}")
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return exit_status(rows)


def open_clip_names() -> list[str]:
    """open_clip's configurations with an image tower; its next version has some for audio alone."""
    return [name for name in open_clip.list_models() if "vision_cfg" in open_clip.get_model_config(name)]


def timm_names() -> list[str]:
    """A small model of every architecture of timm, as it pools by itself, and again with an average ("NAME avg")."""

    def size(name: str) -> tuple[int, int, str]:
        words = ("test_", "atto", "nano", "xx", "tiny", "050", "18", "small")
        return next((i for i, word in enumerate(words) if word in name), len(words)), len(name), name

    smallest = [min(timm.list_models(module=module), key=size) for module in timm.list_modules()]
    return [f"{name}{pool}" for name in smallest for pool in ("", " avg")]


def transformers_names() -> list[str]:
    """Classes of transformers that are image towers: of one configuration, without a language model beside it."""
    names = [name for name in dir(transformers) if re.search("Vision(Model|ModelWithProjection|Transformer)$", name)]
    return [name for name in names if not getattr(transformers, name).config_class.sub_configs]


def exit_status(rows: Sequence[Row]) -> int:
    """0 if no tower failed and at most `MOST_REFUSED` of open_clip's were refused, else 1."""
    refusals = [row for row in rows if (row["library"], row["status"]) == ("open_clip", "refused")]
    refusals = [row for row in refusals if not _REFUSED_KINDS.search(row["name"])]
    return int(any(row["status"] == "failed" for row in rows) or len(refusals) > MOST_REFUSED)


def cover(name: str, library: str = "open_clip") -> Row:
    """Build one tower in full size and small, and find out whether it becomes mask-aware.

    Args:
        name: as `open_clip_names`, `timm_names` or `transformers_names` gives it.
        library: which of them.
    """
    row: Row = {
        "name": name,
        "library": library,
        "family": "none",
        "classes": [],
        "status": "failed",
        "reason": "",
        "responses": None,
    }
    try:
        configuration = configured(name, library)
        try:
            with torch.device("meta"):
                full = build(configuration)
        except AssertionError as error:  # so timm says which pools a model has not
            row["status"], row["reason"] = "refused", f"{library} builds none: {error}"
            return row
        row["classes"] = class_names(full)
        family = next((family for family in FAMILIES if family.recognise(full)), None)
        row["family"] = family_name(family)
        row["reason"] = refused(full, family)
        if not row["reason"]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                small = build_small(configuration, full)
            if class_names(small) != row["classes"]:
                raise Failed(f"the small tower is made of {class_names(small)}, not of {row['classes']}")
            row["reason"] = refused(small, family)  # with numbers in it there is more to see
        if row["reason"]:
            row["status"] = "refused"
        else:
            fit_statistics(small)
            row["responses"] = verify(small, family)
            row["status"] = "verified"
    except Failed as failure:
        row["reason"] = str(failure)
    except Exception as error:  # whatever it is, the other towers still have to be looked at
        row["reason"] = f"{type(error).__name__}: {error}"
    return row


def configured(name: str, library: str) -> dict[str, Any]:
    """What `build` makes a tower of: a configuration as open_clip has them, or the name of a transformers class."""
    if library == "open_clip":
        return open_clip.get_model_config(name)
    if library == "transformers":
        return {"class": name}
    model, _, pool = name.partition(" ")
    pretrained: Any = timm.get_pretrained_cfg(model)
    size = pretrained.input_size[1:]
    proj = "" if pool else "linear"  # a trunk's own head is a projection only where it pools
    vision = {"timm_model_name": model, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    return {"embed_dim": WIDTH, "vision_cfg": {**vision, "timm_model_pretrained": False}}


def build(configuration: dict[str, Any], **small: Any) -> Any:
    """The image tower of a configuration; `small` goes to the timm model or the configuration of transformers in it."""
    if "class" in configuration:
        tower = getattr(transformers, configuration["class"])
        return tower(tower.config_class(**small))
    if "genlip_cfg" in configuration:  # of open_clip 4: one trunk for pictures and words, in a model of its own
        from open_clip.naflex_genlip_model import NaFlexGenLip

        return NaFlexGenLip(**configuration).visual
    # TimmModel hands on a few arguments of its own and no others.
    with mock.patch.object(timm, "create_model", partial(timm.create_model, **small)):
        quick_gelu = configuration.get("quick_gelu", False)
        return _build_vision_tower(configuration["embed_dim"], configuration["vision_cfg"], quick_gelu)


def build_small(configuration: dict[str, Any], full: Any) -> Any:
    """A tower as `full`, but shallow and narrow, in eval mode, with every parameter moved off its initial value."""
    if "class" in configuration:
        small = build(
            configuration,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            projection_dim=WIDTH,
        )
    elif hasattr(full, "trunk"):
        small = build(configuration, **small_timm_arguments(full.trunk))
    else:
        vision = dict(configuration["vision_cfg"])
        if isinstance(vision["layers"], list):
            vision |= {"layers": [min(depth, STAGE_DEPTH) for depth in vision["layers"]], "width": 8}
        else:
            vision |= {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS}
        small = build({**configuration, "vision_cfg": vision})
    with torch.no_grad():
        # Weights of zero and layer scales of 1e-6 would hide what a block does.
        for parameter in small.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return small.eval()


def fit_statistics(visual: Any) -> None:
    """Give batch norms the statistics of the scene: without, a deep tower of random weights gives one thing for all."""
    norms = [module for module in visual.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches, of which there is one
    if norms:
        with torch.no_grad():
            visual.train()(scene(native_size(visual))[0])
        visual.eval()


def small_timm_arguments(trunk: Any) -> dict[str, Any]:
    """Arguments for `timm.create_model` that make a small model of `trunk`'s class, none where none are known.

    `timm_names` takes the smallest of such a class.
    """
    stem = type(getattr(getattr(trunk, "patch_embed", None), "backbone", None)).__name__
    if stem == "MbConvStages":  # of ViTamin
        embed = VitCfg(embed_dim=(16, 32, WIDTH), depths=(STAGE_DEPTH, STAGE_DEPTH, 1), stem_width=16)
        return {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, "embed_cfg": embed}
    if stem == "ConvStem":  # of MobileCLIP-B, which fixes the width
        return {"depth": DEPTH}
    name = type(trunk).__name__
    if name == "ConvNeXt":
        return {"depths": (STAGE_DEPTH,) * 4, "dims": (16, 32, 64, 128)}
    if name == "FastVit":
        stages = len(trunk.stages)
        return {"layers": (STAGE_DEPTH,) * stages, "embed_dims": tuple(16 << stage for stage in range(stages))}
    if name == "SwinTransformer":
        return {"depths": (STAGE_DEPTH,) * 4, "embed_dim": 16, "num_heads": (1, 2, 4, 8)}
    arguments = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS}
    parameters = inspect.signature(type(trunk)).parameters
    taken = all(name in parameters and isinstance(parameters[name].default, int) for name in arguments)
    return arguments if taken else {}


def settings(family: Any) -> dict[str, Any]:
    """For `make_mask_aware`, of small towers, too."""
    return {"start_layer": START_LAYER} if family is class_token else {}


def refused(visual: Any, family: Any) -> str:
    """Patch `visual` and restore it; if it is refused, the reason, else "".

    Raises Failed if a refused tower is not as it was.
    """
    before = [type(module) for module in visual.modules()]
    try:
        make_mask_aware(visual, **settings(family))
    except (TypeError, ValueError) as error:
        if [type(module) for module in visual.modules()] != before:
            raise Failed(f"refused, but changed nevertheless: {error}") from error
        return str(error)
    restore(visual)
    return ""


def verify(visual: Any, family: Any) -> Responses:
    """Patch `visual`, look at what it gives with and without masks, and undo it.

    Args:
        visual: an unpatched tower in eval mode.
        family: the module of `maft_adapter.towers` that recognises it.

    Raises:
        Failed: it does not do what the head of this module says.
    """
    images, masks = scene(native_size(visual))  # (2, 3, H, W), (2, 4, H, W)
    classes = [type(module) for module in visual.modules()]
    weights = {key: value.clone() for key, value in visual.state_dict().items()}
    with torch.no_grad():
        unpatched = outputs(visual(images))
        make_mask_aware(visual, **settings(family))
        if not is_mask_aware(visual):
            raise Failed("came back unpatched, without a refusal")
        if not equal(outputs(visual(images)), unpatched):
            raise Failed("without masks the output is not what it was before patching")
        embeddings, image = visual(images, masks, with_image=True)  # (2, 4, D), (2, D)
        restore(visual)
        if [type(module) for module in visual.modules()] != classes:
            raise Failed("restore leaves other classes")
        if list(visual.state_dict()) != list(weights) or not equal(visual.state_dict().values(), weights.values()):
            raise Failed("patching and restoring changes the state_dict")
        if not equal(outputs(visual(images)), unpatched):
            raise Failed("after restore the output is not what it was before patching")

    if not embeddings.isfinite().all():
        raise Failed("embeddings are not finite")
    if distance(image, unpatched[0]) > ROUNDING:
        raise Failed("with_image=True gives another image embedding than the tower alone")
    scene_left, scene_right, scene_full, _ = embeddings[0]  # (D,) each
    responses: Responses = {
        "textures": distance(scene_right, scene_left),
        "inside": distance(embeddings[1, 0], scene_left),
        "outside": distance(scene_left + embeddings[1, 1] - scene_right, scene_left),
        "full_mask": distance(scene_full, unpatched[0][0]),
    }
    said = ", ".join(f"{name} {value:.2g}" for name, value in responses.items())
    if responses["textures"] < RESPONSE:
        raise Failed(f"two masks over two textures give one embedding ({said})")
    if responses["inside"] < RESPONSE:
        raise Failed(f"a change under the mask does not move its embedding ({said})")
    if family in (attention_pool, average) and responses["outside"] >= responses["inside"]:
        raise Failed(f"a change outside the mask moves its embedding as much as one under it ({said})")
    if pools_patches_alone(visual, family) and responses["full_mask"] > ROUNDING:
        raise Failed(f"a full mask does not give the image's embedding ({said})")
    return responses


def scene(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two images and the same four masks for each.

    The first image has two textures, in its left and in its right third, on a smooth ground. In the second something
    is added to the left third.

    Args:
        size: height and width in pixels.

    Returns:
        images (2, 3, H, W) and masks (2, 4, H, W): the left third, the right third, all, nothing.
    """
    height, width = size
    third = width // 3
    generator = torch.Generator().manual_seed(0)

    def texture(cell: int) -> Tensor:
        coarse = torch.randn(1, 3, -(-height // cell), -(-third // cell), generator=generator)
        return F.interpolate(coarse, scale_factor=cell)[0, :, :height, :third]  # (3, H, W/3)

    plain = torch.linspace(-0.5, 0.5, width).expand(3, height, width).clone()  # (3, H, W)
    plain[..., :third] += texture(8)
    plain[..., -third:] += texture(32)
    changed = plain.clone()
    changed[..., :third] += 2 * texture(16) + 2
    masks = torch.zeros(4, height, width)
    masks[0, :, :third] = 1
    masks[1, :, -third:] = 1
    masks[2] = 1
    return torch.stack([plain, changed]), masks.expand(2, -1, -1, -1)


def native_size(visual: Any) -> tuple[int, int]:
    """Height and width of the images that the configuration says, or the next that a convolutional trunk divides."""
    size = visual.config.image_size if hasattr(visual, "config") else visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if not hasattr(visual, "trunk") or hasattr(getattr(visual.trunk, "patch_embed", None), "grid_size"):
        return size
    stride = visual.trunk.feature_info[-1]["reduction"]
    return -(-size[0] // stride) * stride, -(-size[1] // stride) * stride


def pools_patches_alone(visual: Any, family: Any) -> bool:
    """Whether the image's embedding is pooled from its patches, all of which a full mask contains, and nothing else."""
    if family is learned_query:  # over a class token, too, in CoCa and in most Perception Encoders
        return not hasattr(visual, "attn_pool") and getattr(getattr(visual, "trunk", None), "num_prefix_tokens", 0) == 0
    return family in (attention_pool, average)


def family_name(family: Any) -> str:
    """In words, of a module of `maft_adapter.towers` or of None."""
    return "none" if family is None else family.__name__.rpartition(".")[2].replace("_", " ")


def class_names(module: torch.nn.Module) -> list[str]:
    """Names of all classes that `module` is made of."""
    return sorted({type(part).__name__ for part in module.modules()})


def outputs(output: Any) -> list[Tensor]:
    """What a tower gives, the embedding first: some give their tokens, too."""
    if hasattr(output, "last_hidden_state"):  # transformers'
        return [output.image_embeds if "image_embeds" in output else output.pooler_output, output.last_hidden_state]
    return [output] if isinstance(output, Tensor) else list(output)


def equal(actual: Any, expected: Any) -> bool:
    """Whether two series of tensors are the same to the bit."""
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def distance(actual: Tensor, expected: Tensor) -> float:
    """Length of the difference, relative to the length of `expected`."""
    return ((actual - expected).norm() / expected.norm()).item()


def as_markdown(rows: Sequence[Row]) -> str:
    """A table of families, a line for every reason why towers are not verified, and the sum."""
    lines = [
        "| family | towers, one of each kind | towers in all | verified | refused | failed |",
        "|---|---|---:|---:|---:|---:|",
    ]
    families: dict[str, list[Row]] = defaultdict(list)
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        families[row["family"]].append(row)
        if row["status"] != "verified":
            reasons[f"{row['status']}: {row['reason']}"].append(row["name"])
    for family in sorted(families, key=[family_name(family) for family in (*FAMILIES, None)].index):
        found = families[family]
        statuses = [row["status"] for row in found]
        counts = " | ".join(str(statuses.count(status)) for status in ("verified", "refused", "failed"))
        lines.append(f"| {family} | {', '.join(examples(found))} | {len(found)} | {counts} |")
    if reasons:
        lines += ["", *(f"- {reason}: {', '.join(f'`{name}`' for name in names)}" for reason, names in reasons.items())]
    verified = sum(row["status"] == "verified" for row in rows)
    return "\n".join([*lines, "", f"{verified} of {len(rows)} towers verified"])


def examples(rows: Sequence[Row]) -> list[str]:
    """The shortest name of every kind of verified tower, the most frequent kind first."""
    kinds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        if row["status"] == "verified":
            kinds[tuple(row["classes"])].append(row["name"])
    return [min(names, key=len) for names in sorted(kinds.values(), key=len, reverse=True)]


if __name__ == "__main__":
    sys.exit(main())
