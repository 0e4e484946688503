"""One small tower with random weights for every kind of image tower that `make_mask_aware` takes."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import open_clip.timm_model
import timm
import torch
import torch.nn.functional as F
import transformers
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from timm.models import vision_transformer_hybrid
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn

from maft_adapter import make_mask_aware
from maft_adapter.towers import attention_pool, average, class_token, learned_query

PATCH, WIDTH, DEPTH, HEADS, DIM = 8, 32, 3, 4, 16


# OpenAI's layout, which forks of CLIP inside other repositories keep


class OpenAIBlock(nn.Module):
    """A residual block under OpenAI's names; the sequence comes first: (T, B, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.ln_2 = nn.LayerNorm(width)
        self.attn_mask = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenAITransformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(OpenAIBlock(width, heads) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class OpenAITower(nn.Module):
    """An image tower laid out as OpenAI's `clip.model.VisionTransformer`, for square images only."""

    def __init__(self, resolution: int, patch: int, width: int, depth: int, heads: int, dim: int) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = resolution, dim
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = OpenAITransformer(width, depth, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).mT  # (B, hw, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, 1+hw, width)
        x = self.ln_pre(x + self.positional_embedding).transpose(0, 1)  # (1+hw, B, width)
        x = self.transformer(x).transpose(0, 1)  # (B, 1+hw, width)
        return self.ln_post(x[:, 0]) @ self.proj  # (B, D)


class OpenAIResNet(nn.Module):
    """A ResNet under OpenAI's names: relu1..3, or one relu as in CLIP's first release, and a stem inside forward."""

    def __init__(self, one_relu: bool = False) -> None:
        super().__init__()
        donor = small_resnet()
        for i in ("1", "2", "3"):
            setattr(self, f"conv{i}", getattr(donor, f"conv{i}"))
            setattr(self, f"bn{i}", getattr(donor, f"bn{i}"))
            if not one_relu:
                setattr(self, f"relu{i}", nn.ReLU(inplace=True))
        if one_relu:
            self.relu = nn.ReLU(inplace=True)
        self.avgpool = donor.avgpool
        self.layer1, self.layer2, self.layer3, self.layer4 = donor.layer1, donor.layer2, donor.layer3, donor.layer4
        self.attnpool = donor.attnpool

    def forward(self: Any, x: Tensor) -> Tensor:
        def stem(x: Tensor) -> Tensor:
            for i in ("1", "2", "3"):
                relu = getattr(self, f"relu{i}") if hasattr(self, f"relu{i}") else self.relu
                x = relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
            return self.avgpool(x)

        x = stem(x.type(self.conv1.weight.dtype))
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


# open_clip's next version has an attention of its own


class NextAttention(nn.Module):
    """The parameters of `nn.MultiheadAttention`, but tensors as results and no `batch_first`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.q_proj_weight = None
        self.attn_drop = nn.Dropout(0.0)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3 * width)
        q, k, v = qkv.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, T, d) each
        out = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(out.transpose(1, 2).reshape(batch, tokens, width))


class NextBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = NextAttention(width, heads)
        self.ls_1 = nn.Identity()
        self.ln_2 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 2 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(2 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls_2 = nn.Identity()

    def forward(self, x: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), attn_mask=attn_mask))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


# Small ones of every library


def open_clip_tower(**options: Any) -> VisionTransformer:
    return VisionTransformer(
        **{
            "image_size": 32,
            "patch_size": PATCH,
            "width": WIDTH,
            "layers": DEPTH,
            "heads": HEADS,
            "mlp_ratio": 2.0,
            "output_dim": DIM,
            **options,
        }
    )


def next_open_clip_tower() -> VisionTransformer:
    tower = open_clip_tower()
    tower.transformer.resblocks = nn.ModuleList(NextBlock(WIDTH, HEADS) for _ in range(DEPTH))
    return tower


def small_resnet() -> ModifiedResNet:
    return ModifiedResNet(layers=[1, 1, 1, 1], output_dim=DIM, heads=HEADS, image_size=64, width=8)


def timm_tower(
    name: str, pool: str, proj: str | None = "linear", size: int | tuple[int, int] = 32, **options: Any
) -> Any:
    """open_clip's `TimmModel`; the options, which make the trunk small, go to timm."""
    create = functools.partial(timm.create_model, **options)
    with mock.patch.object(open_clip.timm_model.timm, "create_model", create):
        return open_clip.timm_model.TimmModel(name, DIM, image_size=size, pool=pool, proj=proj)


def timm_vit(
    name: str, pool: str, proj: str | None = "linear", size: int | tuple[int, int] = 32, **options: Any
) -> Any:
    shape = {"img_size": size, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return timm_tower(name, pool, proj, size, **{**shape, **options})


def mobileclip_b() -> Any:
    stem = vision_transformer_hybrid.ConvStem
    small = mock.Mock(side_effect=lambda **options: stem(**{**options, "channels": (8, 8, WIDTH)}))
    with mock.patch.object(vision_transformer_hybrid, "ConvStem", small):
        return timm_tower(
            "vit_base_mci_224", "token", None, 64, img_size=64, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS
        )


def vitamin() -> Any:
    convolutions = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stages = VitCfg((8, 16, WIDTH), (1, 1, 1), stem_width=8, conv_cfg=convolutions, head_type="1d")
    return timm_tower(
        "vitamin_small_224", "", size=64, img_size=64, embed_cfg=stages, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS
    )


def transformers_tower(kind: str, size: int = 32, **options: Any) -> Any:
    """`kind` is CLIPVisionModel or another of transformers' vision models."""
    config = transformers.SiglipVisionConfig if kind.startswith("Siglip") else transformers.CLIPVisionConfig
    model = getattr(transformers, kind)(
        config(
            **{
                "hidden_size": WIDTH,
                "intermediate_size": 2 * WIDTH,
                "num_hidden_layers": DEPTH,
                "num_attention_heads": HEADS,
                "image_size": size,
                "patch_size": PATCH,
                "projection_dim": DIM,
                **options,
            }
        )
    )
    return model


def _encoder(kind: str) -> str:
    """Where a vision model of transformers holds its layers: from 5.6 on there is no `vision_model` around them."""
    names = (name for name, _ in transformers_tower(kind).named_modules())
    return next(name for name in names if name.endswith("encoder.layers"))


@dataclass(frozen=True)
class Kind:
    """How to build a small tower of one kind, and what a test needs to know of it."""

    family: ModuleType
    build: Callable[[], Any]
    blocks: tuple[str, ...]  # names of modules that run one after another, once a pass
    trains: str  # part of the names of its last attention's or, without attention, its last stage's parameters
    size: tuple[int, int] = (32, 32)  # of the images that it was made for
    other: tuple[int, int] = (24, 48)  # another size that its stride divides
    grid: tuple[int, int] = (4, 4)  # of the tokens at `size`

    @property
    def settings(self) -> dict[str, Any]:
        """For `make_mask_aware`: its default start layer is more than a small tower has."""
        return {"start_layer": 1} if self.family is class_token else {}


def _numbered(path: str, count: int = DEPTH) -> tuple[str, ...]:
    return tuple(f"{path}.{i}" for i in range(count))


_BLOCKS = _numbered("transformer.resblocks")
_TIMM_BLOCKS = _numbered("trunk.blocks")
STAGES = _numbered("trunk.stages", 4)  # of convolutions, which take images of any size
_RESNET: dict[str, Any] = {
    "blocks": ("layer1", "layer2", "layer3", "layer4"),
    "trains": "attnpool",
    "size": (64, 64),
    "other": (32, 96),
    "grid": (2, 2),
}
_MAP: dict[str, Any] = {"size": (64, 64), "other": (32, 96), "grid": (2, 2)}

ZOO: dict[str, Kind] = {
    # A: class token
    "open_clip": Kind(class_token, open_clip_tower, _BLOCKS, "attn"),
    "open_clip-layer_scale": Kind(class_token, lambda: open_clip_tower(ls_init_value=0.5), _BLOCKS, "attn"),
    "open_clip-no_ln_pre": Kind(class_token, lambda: open_clip_tower(no_ln_pre=True), _BLOCKS, "attn"),
    "open_clip-not_square": Kind(
        class_token, lambda: open_clip_tower(image_size=(32, 48)), _BLOCKS, "attn", size=(32, 48), grid=(4, 6)
    ),
    "open_clip-final_ln_after_pool": Kind(
        class_token, lambda: open_clip_tower(final_ln_after_pool=True), _BLOCKS, "attn"
    ),
    "open_clip-output_tokens": Kind(class_token, lambda: open_clip_tower(output_tokens=True), _BLOCKS, "attn"),
    "open_clip-next": Kind(class_token, next_open_clip_tower, _BLOCKS, "attn"),
    "openai": Kind(class_token, lambda: OpenAITower(32, PATCH, WIDTH, DEPTH, HEADS, DIM), _BLOCKS, "attn"),
    "timm-vit": Kind(class_token, lambda: timm_vit("vit_base_patch16_clip_224", "token"), _TIMM_BLOCKS, "attn"),
    "timm-vit-not_square": Kind(
        class_token,
        lambda: timm_vit("vit_base_patch16_clip_224", "token", size=(32, 48)),
        _TIMM_BLOCKS,
        "attn",
        size=(32, 48),
        grid=(4, 6),
    ),
    "timm-mobileclip_b": Kind(
        class_token,
        mobileclip_b,
        _TIMM_BLOCKS,
        "attn",
        size=(64, 64),
        other=(48, 96),
    ),
    "timm-eva": Kind(class_token, lambda: timm_vit("eva_giant_patch14_224", "token", None), _TIMM_BLOCKS, "attn"),
    "timm-eva02": Kind(
        class_token, lambda: timm_vit("eva02_base_patch16_clip_224", "token", None), _TIMM_BLOCKS, "attn"
    ),
    "timm-eva02-post_norm": Kind(
        class_token, lambda: timm_vit("eva02_enormous_patch14_clip_224", "token", None), _TIMM_BLOCKS, "attn"
    ),
    "transformers-clip": Kind(
        class_token, lambda: transformers_tower("CLIPVisionModel"), _numbered(_encoder("CLIPVisionModel")), "attn"
    ),
    "transformers-clip-projection": Kind(
        class_token,
        lambda: transformers_tower("CLIPVisionModelWithProjection"),
        _numbered("vision_model.encoder.layers"),
        "attn",
    ),
    # B: learned query
    "timm-siglip": Kind(
        learned_query, lambda: timm_vit("vit_base_patch16_siglip_224", "map", "none"), _TIMM_BLOCKS, "attn_pool"
    ),
    "timm-siglip-so400m": Kind(  # at 384 with patches of 14, so that some pixels are left over
        learned_query,
        lambda: timm_vit("vit_so400m_patch14_siglip_384", "map", "none", 34),
        _TIMM_BLOCKS,
        "attn_pool",
        size=(34, 34),
    ),
    "timm-pe": Kind(
        learned_query, lambda: timm_vit("vit_pe_core_base_patch16_224", "map", None), _TIMM_BLOCKS, "attn_pool"
    ),
    "open_clip-coca": Kind(
        learned_query,
        lambda: open_clip_tower(
            attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=HEADS, output_tokens=True
        ),
        _BLOCKS,
        "attn_pool",
    ),
    "transformers-siglip": Kind(
        learned_query,
        lambda: transformers_tower("SiglipVisionModel"),
        _numbered(_encoder("SiglipVisionModel")),
        "head.",
    ),
    "transformers-siglip-so400m": Kind(
        learned_query,
        lambda: transformers_tower("SiglipVisionModel", 34),
        _numbered(_encoder("SiglipVisionModel")),
        "head.",
        size=(34, 34),
    ),
    # C: attention pool
    "resnet": Kind(attention_pool, small_resnet, **_RESNET),
    "openai-resnet": Kind(attention_pool, OpenAIResNet, **_RESNET),
    "openai-resnet-one_relu": Kind(attention_pool, lambda: OpenAIResNet(one_relu=True), **_RESNET),
    # D: average
    "open_clip-clipa": Kind(
        average,
        lambda: open_clip_tower(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
        _BLOCKS,
        "attn",
    ),
    "open_clip-avg": Kind(average, lambda: open_clip_tower(pool_type="avg"), _BLOCKS, "attn"),
    "timm-gap": Kind(average, lambda: timm_vit("vit_medium_patch16_gap_256", ""), _TIMM_BLOCKS, "attn"),
    "timm-vitamin": Kind(
        average,
        vitamin,
        _TIMM_BLOCKS,
        "attn",
        size=(64, 64),
        other=(48, 96),
    ),
    "timm-convnext": Kind(
        average,
        lambda: timm_tower("convnext_tiny", "", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
        STAGES,
        "stages.3",
        **_MAP,
    ),
    "timm-convnext-mlp": Kind(
        average,
        lambda: timm_tower("convnext_large", "", "mlp", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
        STAGES,
        "stages.3",
        **_MAP,
    ),
    "timm-fastvit": Kind(
        average,
        lambda: timm_tower("fastvit_mci0", "avg", None, layers=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64)),
        STAGES,
        "stages.3",
        **_MAP,
    ),
    "timm-swin": Kind(
        average,
        lambda: timm_tower(
            "swin_base_patch4_window7_224",
            "",
            size=64,
            img_size=64,
            depths=(1, 1, 1, 1),
            embed_dim=8,
            num_heads=(1, 2, 4, 4),
            drop_path_rate=0.0,
        ),
        _numbered("trunk.layers", 4),
        "attn",
        **_MAP,
    ),
}


def randomize(module: nn.Module) -> Any:
    """Move every parameter off its initial value, so that no zero bias or unit gain hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@functools.cache
def _built(name: str) -> Any:
    torch.manual_seed(0)
    return randomize(ZOO[name].build())


def plain_tower(name: str) -> Any:
    """A tower of this kind, unpatched and in eval mode, with the same weights every time."""
    return copy.deepcopy(_built(name))


def mask_aware_tower(name: str, **settings: Any) -> Any:
    """The same tower, patched."""
    return make_mask_aware(plain_tower(name), **{**ZOO[name].settings, **settings})


def part(tower: Any, path: str) -> Any:
    """A module in a tower, by its path as transformers 5.6 has it: older ones have `vision_model` before."""
    return getattr(tower, "vision_model", tower).get_submodule(path) if path else tower


def embedding(output: Any) -> Tensor:
    """The image embedding (B, D) in what a tower gives: itself, the first of a tuple, or a field of transformers'."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return output[0]
    return output.image_embeds if "image_embeds" in output else output.pooler_output


def random_images(size: tuple[int, int], batch: int = 2, seed: int = 6) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def random_masks(n: int, size: tuple[int, int], batch: int = 2, seed: int = 7) -> Tensor:
    """Blobs over a quarter or so of the picture, as soft masks (B, n, H, W)."""
    coarse = torch.rand(batch, max(n, 1), 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bilinear")[:, :n]


def snapshot(module: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    """Name, class and attributes of every module in it."""
    return [(name, type(child), dict(vars(child))) for name, child in module.named_modules()]


def assert_same_modules(actual: list[Any], expected: list[Any]) -> None:
    """Two snapshots show the same classes and the very same attributes."""
    assert [(name, kind) for name, kind, _ in actual] == [(name, kind) for name, kind, _ in expected]
    for (name, _, new), (_, _, old) in zip(actual, expected, strict=True):
        assert new.keys() == old.keys(), name
        assert all(new[key] is old[key] for key in old), name
