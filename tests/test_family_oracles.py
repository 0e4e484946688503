"""Every family against a slow computation of its own, from the paper's equations or by the host library's own parts."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn
from zoo import (
    HEADS,
    WIDTH,
    ZOO,
    embedding,
    mask_aware_tower,
    next_open_clip_tower,
    part,
    plain_tower,
    random_images,
    random_masks,
    timm_vit,
)

from maft_adapter import make_mask_aware

CONVENTIONS: dict[str, dict[str, Any]] = {
    "maft": {"align_corners": True},
    "open_clip": {"align_corners": False, "antialias": True},
}


def close(actual: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest value; the slow computations run in float64, the towers in float32."""
    largest = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=1e-5 * largest)


def random_cells(grid: tuple[int, int]) -> Tensor:
    """(2, 5, h, w) bool: three blobs, everything and nothing."""
    cells = random_masks(5, grid) > 0.5
    cells[:, 3], cells[:, 4] = True, False
    return cells


def drawn_finer(cells: Tensor, factor: int = 6) -> Tensor:
    return cells.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def position_on(grid: tuple[int, int], position: Tensor, prefix: int, interpolation: str) -> Tensor:
    """Position embedding (prefix+hw, width) of a square tower on another grid."""
    side = round((len(position) - prefix) ** 0.5)
    if grid == (side, side):
        return position
    spatial = position[prefix:].T.reshape(1, -1, side, side)
    spatial = F.interpolate(spatial.float(), grid, mode="bicubic", **CONVENTIONS[interpolation]).to(position.dtype)
    return torch.cat([position[:prefix], spatial[0].flatten(1).T])


# A: class token. One proposal at a time, every token by itself, from Eq. 2-4.


def rotated(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Neighbouring channels of (tokens, heads, d) as complex numbers, turned by the angle of their token."""
    turn = torch.complex(cosine[:, ::2], sine[:, ::2])[:, None]  # (tokens, 1, d / 2)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def rotation(grid: tuple[int, int], rope: Any) -> tuple[Tensor, Tensor]:
    """Sine and cosine (hw, d) of every cell's angles: a quarter of the frequencies by row, a quarter by column."""
    rows, columns = (
        torch.arange(cells) * reference / cells for cells, reference in zip(grid, rope.ref_feat_shape, strict=True)
    )
    frequencies = 10000.0 ** -torch.linspace(0, 1, rope.dim // 4 + 1, dtype=torch.float64)[:-1]
    angles = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)[..., None] * frequencies
    angles = angles.flatten(2).flatten(0, 1).repeat_interleave(2, dim=1)  # (hw, d)
    return angles.sin(), angles.cos()


def timm_block(block: Any, x: Tensor, seen: Callable[[int], list[int]], rope: Any) -> Tensor:
    attn, y = block.attn, block.norm1(x)
    if getattr(attn, "qkv", None) is not None:
        q, k, v = attn.qkv(y).unflatten(-1, (3, HEADS, -1)).unbind(1)  # (T, heads, d) each
    else:
        q, k, v = (project(y).unflatten(-1, (HEADS, -1)) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
    if rope is not None:  # the class token comes first and has no place
        q, k = (torch.cat([t[:1], rotated(t[1:], *rope)]) for t in (q, k))
    x = x + block_scale(block, 1)(attn.proj(attn.norm(attended(q, k, v, seen))))
    return x + block_scale(block, 2)(block.mlp(block.norm2(x)))


def block_scale(block: Any, i: int) -> Any:
    return getattr(block, f"ls{i}", nn.Identity())


def transformers_block(block: Any, x: Tensor, seen: Callable[[int], list[int]], rope: None) -> Tensor:
    attn, y = block.self_attn, block.layer_norm1(x)
    q, k, v = (project(y).unflatten(-1, (HEADS, -1)) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
    x = x + attn.out_proj(attended(q, k, v, seen))
    return x + block.mlp(block.layer_norm2(x))


def attended(q: Tensor, k: Tensor, v: Tensor, seen: Callable[[int], list[int]]) -> Tensor:
    """Attention of every token t to the tokens `seen(t)` alone, (T, heads, d) -> (T, heads * d)."""
    rows = []
    for t in range(len(q)):
        logits = torch.einsum("hd,shd->hs", q[t], k[seen(t)]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hs,shd->hd", logits.softmax(1), v[seen(t)]).flatten())
    return torch.stack(rows)


def class_token_oracle(tower: Any, images: Tensor, cells: Tensor, start_layer: int, interpolation: str) -> Tensor:
    """Embeddings (B, N, D) of a plain timm or transformers tower, in float64."""
    tower, grid = copy.deepcopy(tower).double(), (cells.shape[2], cells.shape[3])
    rope = None
    if hasattr(tower, "trunk"):
        trunk = tower.trunk
        conv, class_token, position = trunk.patch_embed.proj, trunk.cls_token[0], trunk.pos_embed[0]
        pre, blocks, run = trunk.norm_pre, trunk.blocks, timm_block
        if getattr(trunk, "rope", None) is not None:
            rope = rotation(grid, trunk.rope)

        def head(token: Tensor) -> Tensor:
            return tower.head(trunk.head(trunk.fc_norm(trunk.norm(token))))
    else:
        inner = getattr(tower, "vision_model", tower)
        held = inner.embeddings
        conv, class_token, position = held.patch_embedding, held.class_embedding[None], held.position_embedding.weight
        pre, blocks, run = inner.pre_layrnorm, inner.encoder.layers, transformers_block

        def head(token: Tensor) -> Tensor:
            return getattr(tower, "visual_projection", nn.Identity())(inner.post_layernorm(token))

    embeddings = []
    for image, proposals in zip(images.double(), cells, strict=True):
        patches = conv(image[None])[0].flatten(1).T  # (hw, width)
        tokens = pre(torch.cat([class_token, patches]) + position_on(grid, position, 1, interpolation))
        everything = list(range(len(tokens)))
        for block in blocks[:start_layer]:
            tokens = run(block, tokens, lambda t: everything, rope)  # noqa: B023
        for proposal in proposals.flatten(1).tolist():
            inside = [0] + [1 + i for i, holds in enumerate(proposal) if holds]  # Eq. 3
            mine = tokens
            for block in blocks[start_layer:]:
                mine = run(block, mine, lambda t: everything[1:] if t else inside, rope)  # noqa: B023  (Eq. 4)
            embeddings.append(head(mine[0]))
    return torch.stack(embeddings).reshape(*cells.shape[:2], -1)


OF_CLASS_TOKEN = ["timm-vit", "timm-eva02", "transformers-clip", "transformers-clip-projection"]


@torch.no_grad()
@pytest.mark.parametrize("start_layer", range(4))
@pytest.mark.parametrize("name", OF_CLASS_TOKEN)
def test_class_token(name: str, start_layer: int) -> None:
    images, cells = random_images((32, 32)), random_cells((4, 4))
    expected = class_token_oracle(plain_tower(name), images, cells, start_layer, "maft")
    close(mask_aware_tower(name, start_layer=start_layer)(images, drawn_finer(cells)), expected)


@torch.no_grad()
@pytest.mark.parametrize("interpolation", CONVENTIONS)
@pytest.mark.parametrize("grid", [(3, 6), (7, 5)])
@pytest.mark.parametrize("name", OF_CLASS_TOKEN)
def test_class_token_on_another_grid(name: str, grid: tuple[int, int], interpolation: str) -> None:
    images, cells = random_images((grid[0] * 8, grid[1] * 8)), random_cells(grid)
    expected = class_token_oracle(plain_tower(name), images, cells, 1, interpolation)
    close(mask_aware_tower(name, interpolation=interpolation)(images, drawn_finer(cells)), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_rotating_halves_is_rotating_pairs_of_other_channels(size: tuple[int, int]) -> None:
    """Of every head channels 0, 2, 4 ... make the first half, and 1, 3, 5 ... the second."""
    halves = timm_vit("eva02_base_patch16_clip_224", "token", None, rope_rotate_half=True).eval()
    halves.load_state_dict(plain_tower("timm-eva02").state_dict())
    channels = torch.arange(WIDTH).unflatten(0, (HEADS, -1, 2)).mT.flatten()  # (width,)
    for block in halves.trunk.blocks:
        for layer in (block.attn.q_proj, block.attn.k_proj):
            for weight in layer.parameters():
                weight.copy_(weight[channels])
    images, masks = random_images(size), random_masks(4, (20, 20))
    for start_layer in (0, 2):
        expected = mask_aware_tower("timm-eva02", start_layer=start_layer)(images, masks)
        close(make_mask_aware(halves, start_layer)(images, masks), expected)


# B: learned query. One mask at a time, given to the library's own pool as its attention mask.


def bias_of(cells: Tensor, prefix: int) -> Tensor:
    """(B, prefix+hw) for one proposal (B, h, w): not the leading tokens; everything where the mask is empty."""
    inside = cells.flatten(1)
    inside = inside | ~inside.any(1, keepdim=True)
    bias = torch.zeros(inside.shape).masked_fill(~inside, float("-inf"))
    return torch.cat([bias.new_full((len(bias), prefix), float("-inf")), bias], dim=1)


def timm_query(tower: Any, images: Tensor, cells: Tensor) -> Tensor:
    trunk = tower.trunk
    features = trunk.forward_features(images)  # (B, P+hw, width)
    bias = bias_of(cells, trunk.num_prefix_tokens)[:, None, None]  # (B, 1, 1, P+hw)
    return tower.head(trunk.head(trunk.fc_norm(trunk.attn_pool(features, attn_mask=bias))))


def coca_query(tower: Any, images: Tensor, cells: Tensor) -> Tensor:
    pool, features = tower.attn_pool, tower.transformer(tower._embeds(images))  # (B, 1+hw, width)
    query = pool.ln_q(pool.query).expand(len(images), -1, -1)  # (B, Q, width)
    bias = bias_of(cells, 1)[:, None, None].expand(-1, HEADS, query.shape[1], -1)  # (B, heads, Q, 1+hw)
    keys = pool.ln_k(features)
    if isinstance(pool.attn, nn.MultiheadAttention):
        pooled = pool.attn(query, keys, keys, attn_mask=bias.flatten(0, 1))[0]
    else:  # open_clip's next version has its own
        pooled = pool.attn(query, keys, keys, attn_mask=bias)
    return tower.ln_post(pooled)[:, 0] @ tower.proj


def transformers_query(tower: Any, images: Tensor, cells: Tensor) -> Tensor:
    head, features = part(tower, "head"), tower(images).last_hidden_state  # (B, hw, width)
    bias = bias_of(cells, 0)[:, None].repeat_interleave(HEADS, dim=0)  # (B*heads, 1, hw)
    probe = head.probe.expand(len(images), -1, -1)
    pooled = head.attention(probe, features, features, attn_mask=bias)[0]
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]


QUERIES = {
    "timm-siglip": timm_query,
    "timm-siglip-so400m": timm_query,
    "timm-pe": timm_query,
    "open_clip-coca": coca_query,
    "transformers-siglip": transformers_query,
    "transformers-siglip-so400m": transformers_query,
}


@torch.no_grad()
@pytest.mark.parametrize("name", QUERIES)
def test_learned_query(name: str) -> None:
    plain, images, cells = plain_tower(name), random_images(ZOO[name].size), random_cells((4, 4))
    expected = torch.stack([QUERIES[name](plain, images, cells[:, n]) for n in range(cells.shape[1])], dim=1)
    close(mask_aware_tower(name)(images, drawn_finer(cells)), expected)


# C: attention pool (Sec. 5.5). The mean token of every proposal sees itself and its patches.


def attention_pool_oracle(tower: Any, images: Tensor, cells: Tensor, interpolation: str) -> Tensor:
    """Embeddings (B, N, D) of a plain ResNet in float64."""
    tower, features = copy.deepcopy(tower).double(), []
    tower.layer4.register_forward_hook(lambda module, args, output: features.append(output))
    pool, position = tower.attnpool, tower.attnpool.positional_embedding
    tower.attnpool = nn.Identity()
    tower(images.double())
    grid, embeddings = (cells.shape[2], cells.shape[3]), []
    for image, proposals in zip(features[0].flatten(2), cells, strict=True):
        tokens = torch.cat([image.mean(1)[None], image.T]) + position_on(grid, position, 1, interpolation)  # (1+hw, C)
        q, k, v = (project(tokens).unflatten(-1, (HEADS, -1)) for project in (pool.q_proj, pool.k_proj, pool.v_proj))
        for proposal in proposals.flatten(1).tolist():
            inside = [0] + [1 + i for i, holds in enumerate(proposal) if holds]
            heads = []
            for h in range(HEADS):
                weights = torch.stack([q[0, h] @ k[i, h] / q.shape[-1] ** 0.5 for i in inside]).softmax(0)
                heads.append(sum(weight * v[i, h] for weight, i in zip(weights, inside, strict=True)))
            embeddings.append(pool.c_proj(torch.cat(heads)))
    return torch.stack(embeddings).reshape(*cells.shape[:2], -1)


@torch.no_grad()
@pytest.mark.parametrize("interpolation", CONVENTIONS)
@pytest.mark.parametrize("grid", [(2, 2), (1, 3), (3, 4)])
@pytest.mark.parametrize("name", ["resnet", "openai-resnet", "openai-resnet-one_relu"])
def test_attention_pool(name: str, grid: tuple[int, int], interpolation: str) -> None:
    images, cells = random_images((grid[0] * 32, grid[1] * 32)), random_cells(grid)
    expected = attention_pool_oracle(plain_tower(name), images, cells, interpolation)
    tower = mask_aware_tower(name, interpolation=interpolation)
    embeddings, image = tower(images, drawn_finer(cells), with_image=True)
    close(embeddings, expected)
    close(image, expected[:, 3])  # the full mask
    close(tower(images), expected[:, 3])


# D: average. Means over the masks in numpy, then the tower's own head on a map that holds the mean everywhere.


def numpy_means(features: Tensor, masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features (B, hw, C) and masks (B, N, k*h, k*w) -> (B, N, C)."""
    cells, shares = features.double().numpy(), masks.double().numpy()
    (h, w), (height, width) = grid, masks.shape[2:]
    means = np.empty((*masks.shape[:2], cells.shape[2]))
    for b, n in np.ndindex(*masks.shape[:2]):
        share = shares[b, n].reshape(h, height // h, w, width // w).mean(axis=(1, 3)).flatten()  # (hw,)
        means[b, n] = np.average(cells[b], axis=0, weights=share if share.any() else None)
    return torch.from_numpy(means)


def average_oracle(tower: Any, images: Tensor, masks: Tensor, grid: tuple[int, int]) -> Tensor:
    if not hasattr(tower, "trunk"):
        features = tower.transformer(tower._embeds(images))[:, 1:]
        if tower.final_ln_after_pool:
            return tower.ln_post(numpy_means(features, masks, grid).float()) @ tower.proj
        return numpy_means(tower.ln_post(features), masks, grid).float() @ tower.proj
    features = tower.trunk.forward_features(images)
    if features.ndim == 3:  # (B, hw, C)
        means = numpy_means(features, masks, grid).float()
        everywhere = means[:, :, None].expand(-1, -1, 5, -1)  # (B, N, 5, C)
    elif getattr(tower.trunk, "output_fmt", "NCHW") == "NHWC":
        means = numpy_means(features.flatten(1, 2), masks, grid).float()
        everywhere = means[:, :, None, None].expand(-1, -1, 3, 2, -1)  # (B, N, 3, 2, C)
    else:
        means = numpy_means(features.flatten(2).mT, masks, grid).float()
        everywhere = means[..., None, None].expand(-1, -1, -1, 3, 2)  # (B, N, C, 3, 2)
    return torch.stack([tower.head(tower.trunk.forward_head(one)) for one in everywhere])


OF_AVERAGE = [name for name in ZOO if ZOO[name].family.__name__.endswith("average")]


@torch.no_grad()
@pytest.mark.parametrize("name", OF_AVERAGE)
def test_average(name: str) -> None:
    kind, plain = ZOO[name], plain_tower(name)
    images = random_images(kind.size)
    soft = random_masks(4, (kind.grid[0] * 5, kind.grid[1] * 3))
    soft[:, 1], soft[0, 2], soft[1, 2, :1, :1] = 0, 1, 0.25
    expected = average_oracle(plain, images, soft, kind.grid)
    close(mask_aware_tower(name)(images, soft), expected)
    close(mask_aware_tower(name)(images, soft > 0.5), average_oracle(plain, images, soft > 0.5, kind.grid))


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm-convnext", "timm-fastvit"])
def test_average_on_another_grid(name: str) -> None:
    images, masks = random_images((96, 160)), random_masks(3, (9, 10))
    close(mask_aware_tower(name)(images, masks), average_oracle(plain_tower(name), images, masks, (3, 5)))


# Images of other sizes, without masks, against the libraries' own ways


OF_TIMM = ["timm-vit", "timm-mobileclip_b", "timm-eva", "timm-eva02", "timm-siglip", "timm-pe", "timm-gap"]
OTHER_GRIDS = [(3, 6), (9, 5)]


@torch.no_grad()
@pytest.mark.parametrize("grid", OTHER_GRIDS)
@pytest.mark.parametrize("interpolation", CONVENTIONS)
@pytest.mark.parametrize("name", [*OF_TIMM, "timm-siglip-so400m", "timm-vitamin"])
def test_other_sizes_equal_a_timm_tower_of_that_size(name: str, interpolation: str, grid: tuple[int, int]) -> None:
    kind, resized = ZOO[name], plain_tower(name)
    stride = kind.size[0] // kind.grid[0]
    size = (grid[0] * stride, grid[1] * stride)
    trunk = resized.trunk
    if trunk.pos_embed is not None:
        prefix = trunk.pos_embed.shape[1] - trunk.patch_embed.num_patches
        position = position_on(grid, trunk.pos_embed[0], prefix, interpolation)[None]
    resized.set_input_size(size)
    if trunk.pos_embed is not None:
        assert trunk.pos_embed.shape == position.shape
        trunk.pos_embed.copy_(position)
    images, masks = random_images(size), random_masks(4, (30, 50))
    tower = mask_aware_tower(name, interpolation=interpolation)
    close(tower(images), resized(images))
    close(tower(images, masks), make_mask_aware(resized, **kind.settings)(images, masks))


DYNAMIC: dict[str, Callable[[], Any]] = {
    "timm-vit": lambda: timm_vit("vit_base_patch16_clip_224", "token", dynamic_img_size=True),
    "timm-eva02": lambda: timm_vit("eva02_base_patch16_clip_224", "token", None, dynamic_img_size=True),
    "timm-siglip": lambda: timm_vit("vit_base_patch16_siglip_224", "map", "none", dynamic_img_size=True),
    "timm-pe": lambda: timm_vit("vit_pe_core_base_patch16_224", "map", None, dynamic_img_size=True),
    "timm-gap": lambda: timm_vit("vit_medium_patch16_gap_256", "", dynamic_img_size=True),
}


@torch.no_grad()
@pytest.mark.parametrize("grid", OTHER_GRIDS)
@pytest.mark.parametrize("name", DYNAMIC)
def test_open_clips_interpolation_is_timms_dynamic_image_size(name: str, grid: tuple[int, int]) -> None:
    dynamic = DYNAMIC[name]().eval()
    dynamic.load_state_dict(plain_tower(name).state_dict())
    images = random_images((grid[0] * 8, grid[1] * 8))
    tower = mask_aware_tower(name, interpolation="open_clip")
    close(tower(images), dynamic(images))
    features = dynamic.trunk.forward_features(images)
    close(tower.trunk.forward_features(images), features)
    masks, native = random_masks(4, (30, 50)), random_images((32, 32))
    expected = dynamic(native)
    make_mask_aware(dynamic, **ZOO[name].settings, interpolation="open_clip")
    assert torch.equal(dynamic(native), expected)
    close(dynamic(images, masks), tower(images, masks))


@pytest.mark.parametrize("name", ["timm-vit", "timm-eva02"])
def test_patch_dropout_at_other_sizes_is_timms(name: str) -> None:
    dynamic, tower = DYNAMIC[name](), plain_tower(name)
    dynamic.load_state_dict(tower.state_dict())
    for visual in (dynamic, tower):
        visual.trunk.patch_drop = PatchDropoutWithIndices() if name == "timm-eva02" else PatchDropout()
        visual.train()
    make_mask_aware(tower, 1, interpolation="open_clip")
    images = random_images((48, 24))
    torch.manual_seed(0)
    expected = dynamic(images)
    torch.manual_seed(0)
    close(tower(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("grid", OTHER_GRIDS)
@pytest.mark.parametrize("interpolation", CONVENTIONS)
@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith("transformers")])
def test_other_sizes_of_transformers(name: str, interpolation: str, grid: tuple[int, int]) -> None:
    plain = plain_tower(name)
    embeddings = getattr(plain, "vision_model", plain).embeddings
    weight = embeddings.position_embedding.weight
    position = position_on(grid, weight, len(weight) - 16, interpolation)
    embeddings.interpolate_pos_encoding = lambda *_: position[None]
    images = random_images((grid[0] * 8, grid[1] * 8))
    expected = plain(images, interpolate_pos_encoding=True)
    tower = mask_aware_tower(name, interpolation=interpolation)
    close(embedding(tower(images)), embedding(expected))
    close(embedding(tower(images, interpolate_pos_encoding=True)), embedding(expected))


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers-siglip", "transformers-siglip-so400m"])
def test_other_sizes_of_transformers_siglip_with_masks(name: str) -> None:
    images, cells = random_images((24, 48)), random_cells((3, 6))
    tower = mask_aware_tower(name)
    plain = plain_tower(name)
    embeddings = part(plain, "embeddings")
    position = position_on((3, 6), embeddings.position_embedding.weight, 0, "maft")
    embeddings.interpolate_pos_encoding = lambda *_: position[None]
    features = plain(images, interpolate_pos_encoding=True).last_hidden_state
    plain.forward = lambda images: type("Output", (), {"last_hidden_state": features})
    expected = torch.stack([transformers_query(plain, images, cells[:, n]) for n in range(cells.shape[1])], dim=1)
    close(tower(images, drawn_finer(cells)), expected)


# open_clip's next version


@torch.no_grad()
@pytest.mark.parametrize("start_layer", range(4))
def test_open_clips_next_attention_gives_the_same(start_layer: int) -> None:
    tower = next_open_clip_tower().eval()
    tower.load_state_dict(plain_tower("open_clip").state_dict())
    make_mask_aware(tower, start_layer)
    today = mask_aware_tower("open_clip", start_layer=start_layer)
    for size in ((32, 32), (24, 48)):
        images, masks = random_images(size), random_masks(5, (20, 20))
        for actual, expected in zip(
            tower(images, masks, with_image=True), today(images, masks, with_image=True), strict=True
        ):
            close(actual, expected)
