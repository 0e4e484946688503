import re
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from open_clip import CLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from maft_adapter import make_mask_aware
from maft_adapter.freezing import trainable_parameters

# Table 4d, from top to bottom: what each row freezes in addition
ROWS = {
    "none": (),
    "+cls": ("class_embedding",),
    "+pos": ("positional_embedding",),
    "+mlp": (".mlp.",),
    "+conv": ("conv1",),
    "+proj": ("proj",),
}


def tower(**options: object) -> VisionTransformer:
    return VisionTransformer(
        image_size=32, patch_size=16, width=16, layers=3, heads=2, mlp_ratio=2.0, output_dim=8, **options
    )


class OpenAIBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)


class OpenAITower(nn.Module):
    """The parameters of OpenAI's VisionTransformer, in its order and under its names."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 16, 16, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(OpenAIBlock(width), OpenAIBlock(width))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, 8))


TOWERS: dict[str, Callable[[], nn.Module]] = {
    "open_clip": tower,
    "layer scale": lambda: tower(ls_init_value=0.1),
    "custom blocks": lambda: tower(block_type="custom", qk_norm=True, scale_attn=True, scale_fc=True),
    "no ln_pre": lambda: tower(no_ln_pre=True),
    "OpenAI": OpenAITower,
}


def is_frozen(name: str, row: str) -> bool:
    marks: list[str] = []
    for freeze, added in ROWS.items():
        marks += added
        if freeze == row:
            break
    return any(name == mark or (mark in name and mark in (".mlp.", "conv1")) for mark in marks)


def trains_in_the_released_code(name: str) -> bool:
    return ("transformer.resblocks" in name and "mlp" not in name) or name.startswith("ln_post.")


def requires_grad(visual: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in visual.named_parameters()}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", TOWERS)
def test_rows_of_table_4d(kind: str, row: str) -> None:
    visual = TOWERS[kind]()
    trainable_parameters(visual, row)
    assert requires_grad(visual) == {name: not is_frozen(name, row) for name in requires_grad(visual)}


def test_each_row_freezes_what_it_adds_and_no_more() -> None:
    visual = tower()
    frozen: list[set[str]] = []
    for row in ROWS:
        trainable_parameters(visual, row)
        frozen.append({name for name, trains in requires_grad(visual).items() if not trains})
    assert frozen[0] == set()
    assert all(before < after for before, after in pairwise(frozen))
    added = [after - before for before, after in pairwise(frozen)]
    assert added[0] == {"class_embedding"}
    assert added[1] == {"positional_embedding"}
    assert {re.sub(r"\.\d+\.", ".*.", name) for name in added[2]} == {
        f"transformer.resblocks.*.mlp.{name}" for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")
    }
    assert added[3] == {"conv1.weight"}
    assert added[4] == {"proj"}


@pytest.mark.parametrize("kind", TOWERS)
def test_paper_is_the_default_and_the_row_conv(kind: str) -> None:
    visual = TOWERS[kind]()
    trainable_parameters(visual, "+conv")
    expected = requires_grad(visual)
    trainable_parameters(visual, "none")
    trainable_parameters(visual)
    assert requires_grad(visual) == expected
    trainable_parameters(visual, "paper")
    assert requires_grad(visual) == expected


@pytest.mark.parametrize("kind", TOWERS)
def test_released(kind: str) -> None:
    visual = TOWERS[kind]()
    trainable_parameters(visual, "released")
    got = requires_grad(visual)
    assert got == {name: trains_in_the_released_code(name) for name in got}


@pytest.mark.parametrize("freeze", [*ROWS, "paper", "released"])
def test_returns_the_training_parameters_in_order(freeze: str) -> None:
    visual = tower()
    visual.requires_grad_(False)
    trained = trainable_parameters(visual, freeze)
    assert [id(p) for p in trained] == [id(p) for p in visual.parameters() if p.requires_grad]


def test_one_optimizer_step_moves_exactly_the_returned_parameters() -> None:
    visual = tower()
    optimizer = torch.optim.AdamW(trainable_parameters(visual), lr=0.1)
    before = {name: parameter.clone() for name, parameter in visual.named_parameters()}
    visual(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = {name for name, parameter in visual.named_parameters() if not parameter.equal(before[name])}
    assert moved == {name for name, trains in requires_grad(visual).items() if trains}
    assert "ln_pre.weight" in moved
    assert "conv1.weight" not in moved


def timm_tower(name: str, pool: str, **options: Any) -> TimmModel:
    """open_clip's TimmModel around a trunk of two narrow blocks."""
    model = TimmModel("test_vit", 8, image_size=32, pool="token", proj="linear")
    shrunk: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2, **options}
    model.trunk = timm.create_model(name, num_classes=0, global_pool=pool, **shrunk)
    model.head = nn.Sequential(OrderedDict(proj=nn.Linear(16, 8)))
    return model


SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip


def transformers_tower(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers, of the extra test, is not installed")
    config = getattr(transformers, name.split("Vision")[0] + "VisionConfig")
    return getattr(transformers, name)(config(**SMALL, projection_dim=8))


OTHER_LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "CoCa": lambda: tower(attentional_pool=True, attn_pooler_heads=2),
    "timm ViT": lambda: timm_tower("vit_base_patch16_clip_224", "token"),
    "EVA02": lambda: timm_tower("eva02_base_patch16_clip_224", "token"),
    "SigLIP": lambda: timm_tower("vit_base_patch16_siglip_224", "map"),
    "Perception Encoder": lambda: timm_tower("vit_pe_core_base_patch16_224", "map", attn_pool_num_heads=2),
    "CLIPVisionModel": lambda: transformers_tower("CLIPVisionModel"),
    "CLIPVisionModelWithProjection": lambda: transformers_tower("CLIPVisionModelWithProjection"),
    "SiglipVisionModel": lambda: transformers_tower("SiglipVisionModel"),
}


@pytest.mark.parametrize("kind", OTHER_LAYOUTS)
def test_the_paper_trains_attention_norms_and_projections_in_every_layout(kind: str) -> None:
    visual = OTHER_LAYOUTS[kind]()
    trainable_parameters(visual)
    trains = requires_grad(visual)
    blocks = {name: grad for name, grad in trains.items() if re.search(r"(blocks|layers)\.\d", name)}
    assert blocks and all(grad == (".mlp." not in name) for name, grad in blocks.items())
    frozen = {name for name, grad in trains.items() if not grad and name not in blocks}
    units = r"class_embedding|cls_token|pos(itional|ition)?_embed(ding)?|conv1|patch_embed"
    assert frozen and all(re.search(units, name) for name in frozen)
    assert not any(re.search(units, name) for name, grad in trains.items() if grad)


def small_clip() -> CLIP:
    return CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
        text_cfg={"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    )


def without_class_token() -> VisionTransformer:
    visual = tower()
    del visual.class_embedding
    return visual


def with_registers() -> VisionTransformer:
    visual = tower()
    visual.register_parameter("registers", nn.Parameter(torch.zeros(4, 16)))
    return visual


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (with_registers, r"1 parameters of unknown role \['registers'\], units without parameters \[\]"),
        (lambda: ModifiedResNet((1, 1, 1, 1), 8, 2, 32, 4), r"ModifiedResNet is not laid out.*'bn1\.weight'"),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), r"unknown role \['cls_token'"),
        (small_clip, r"CLIP is not laid out.*unknown role.*pass the image tower itself \(model\.visual\)"),
        (lambda: nn.Sequential(tower()), "before torch.compile or DDP wraps it"),
        (without_class_token, r"0 parameters of unknown role \[\], units without parameters \['cls'\]"),
        (nn.Identity, r"without parameters \['attention', 'cls', 'conv', 'ln_post', 'mlp'\]"),
    ],
)
def test_unknown_towers_are_refused_and_left_alone(build: Callable[[], nn.Module], message: str) -> None:
    visual = build()
    first = next(visual.parameters(), torch.zeros(0))
    first.requires_grad = False
    before = requires_grad(visual)
    with pytest.raises(ValueError, match=f"(?i){message}"):
        trainable_parameters(visual)
    assert requires_grad(visual) == before


def test_unknown_name_lists_the_choices_and_changes_nothing() -> None:
    visual = tower()
    before = requires_grad(visual)
    choices = re.escape(r"none, +cls, +pos, +mlp, +conv, +proj, paper, released, as_is")
    with pytest.raises(ValueError, match=rf"unknown freeze 'mlp'.*{choices}"):
        trainable_parameters(visual, "mlp")
    assert requires_grad(visual) == before


def adapters(**options: Any) -> Callable[[nn.Module], Any]:
    """Puts peft's adapters of these options into a tower; the result is the wrapper around it."""
    peft = pytest.importorskip("peft", reason="peft, of the extra test, is not installed")
    kind = getattr(peft, options.pop("kind", "LoraConfig"))
    return lambda visual: peft.get_peft_model(visual, kind(**options))


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA on the MLP": {"target_modules": ["c_fc", "c_proj"]},
    "LoRA on attention": {"target_modules": ["out_proj"]},
    "LoRA on everything": {"target_modules": ["attn", "c_fc", "conv1"]},
    "DoRA": {"target_modules": ["c_fc"], "use_dora": True},
    "biases too": {"target_modules": ["c_fc"], "bias": "lora_only"},
    "modules_to_save": {"target_modules": ["c_fc"], "modules_to_save": ["ln_post"]},
    "IA3": {"kind": "IA3Config", "target_modules": ["c_fc"], "feedforward_modules": ["c_fc"]},
    "LoHa": {"kind": "LoHaConfig", "target_modules": ["c_proj"]},
}


@pytest.mark.parametrize("patched", ["before", "after", "never"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_train_where_they_are_or_are_refused_by_name(kind: str, patched: str) -> None:
    visual: Any = tower()
    if patched == "before":
        make_mask_aware(visual, 1)
    wrapper = adapters(**ADAPTERS[kind])(visual)
    if patched == "after" and "attention" not in kind and "everything" not in kind:
        make_mask_aware(visual, 1)
    by_peft = requires_grad(visual)
    assert 0 < sum(by_peft.values()) < len(by_peft)
    for freeze in [*ROWS, "paper", "released"]:
        with pytest.raises(ValueError, match=r"not a CLIP ViT's own, such as .*\.default.*freeze='as_is'"):
            trainable_parameters(visual, freeze)
        assert requires_grad(visual) == by_peft
    with pytest.raises(ValueError, match=r"get_base_model\(\)"):
        trainable_parameters(wrapper)
    trained = trainable_parameters(visual, "as_is")
    assert requires_grad(visual) == by_peft
    assert [id(p) for p in trained] == [id(p) for p in visual.parameters() if p.requires_grad]


class HandMadeLoRA(nn.Module):
    """As many repositories have it: no word in its names that a list of libraries would hold."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


class LowRank(nn.Module):
    """LoRA as a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 16))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.weight


def test_adapters_of_no_library_are_refused_as_well() -> None:
    visual: Any = tower()
    block = visual.transformer.resblocks[1]
    block.mlp.c_fc = HandMadeLoRA(block.mlp.c_fc)
    with pytest.raises(ValueError, match=r"4 parameters that are not.*resblocks\.1\.mlp\.c_fc\.linear\.weight"):
        trainable_parameters(visual)
    visual = tower()
    parametrize.register_parametrization(visual.transformer.resblocks[0].mlp.c_fc, "weight", LowRank())
    with pytest.raises(ValueError, match=r"1 parameters that are not.*c_fc\.parametrizations\.weight\.0\.weight"):
        trainable_parameters(visual)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda module: prune.random_unstructured(module, "weight", 0.5),
        lambda module: parametrizations.spectral_norm(module),
        lambda module: parametrizations.weight_norm(module),
    ],
    ids=["pruning", "spectral norm", "weight norm"],
)
def test_a_computed_weight_trains_through_what_is_kept_of_it(wrap: Callable[[nn.Module], Any]) -> None:
    visual: Any = tower()
    plain = sum(p.numel() for p in trainable_parameters(visual))
    block = visual.transformer.resblocks[0]
    wrap(block.mlp.c_fc)
    wrap(block.attn.out_proj)
    gain = sum(p.numel() for p in block.attn.out_proj.parameters()) - 16 * 16 - 16  # weight norm's magnitudes
    assert sum(p.numel() for p in trainable_parameters(visual)) == plain + gain
    assert not any(p.requires_grad for p in block.mlp.parameters())
    assert all(p.requires_grad for p in block.attn.parameters())


def test_as_is_trains_what_requires_gradients() -> None:
    resnet = ModifiedResNet((1, 1, 1, 1), 8, 2, 32, 4).requires_grad_(False)
    with pytest.raises(ValueError, match="trains nothing: set requires_grad"):
        trainable_parameters(resnet, "as_is")
    resnet.attnpool.requires_grad_(True)
    trained = trainable_parameters(resnet, "as_is")
    assert [id(p) for p in trained] == [id(p) for p in resnet.attnpool.parameters()]
