"""Blocks that are not what they seem, and what people put around or into them."""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from zoo import (
    ZOO,
    assert_same_modules,
    embedding,
    mask_aware_tower,
    part,
    plain_tower,
    random_images,
    random_masks,
    snapshot,
)

from maft_adapter import encode_features, encode_masks, make_mask_aware, restore
from maft_adapter.masks import masks_on_grid
from maft_adapter.towers import class_token

NAMES = [name for name in ZOO if ZOO[name].family is class_token]
LAYOUTS = [
    "open_clip",
    "open_clip-next",
    "openai",
    "timm-vit",
    "timm-eva02",
    "timm-eva02-post_norm",
    "transformers-clip",
]
# A tower of every forward that is taken to pieces.
TOWERS = [
    *LAYOUTS,
    *("open_clip-coca", "open_clip-clipa", "timm-siglip", "timm-gap", "transformers-clip-projection"),
    *("transformers-siglip", "resnet", "openai-resnet", "timm-convnext", "timm-swin"),
]
IMAGES, MASKS = random_images((32, 32)), random_masks(5, (32, 32))


def last_block(tower: Any, name: str) -> Any:
    return tower.get_submodule(ZOO[name].blocks[-1])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# Lies: each keeps every child, parameter and name


def changed(change: Callable[[Any, Any], Any]) -> Callable[[Any], None]:
    """A block of a subclass whose forward gives `change(what it would give, its input)`."""

    def lie(block: Any) -> None:
        host = type(block)

        def forward(self: Any, x: Any, *args: Any, **options: Any) -> Any:
            y = host.forward(self, x, *args, **options)
            return (change(y[0], x), *y[1:]) if isinstance(y, tuple) else change(y, x)

        block.__class__ = type(host.__name__, (host,), {"forward": forward})

    return lie


def is_class_token(y: torch.Tensor) -> torch.Tensor:
    """Of one image's tokens (1, T, D) or (T, 1, D)."""
    first = torch.zeros_like(y, dtype=torch.bool)
    first.narrow(0 if y.shape[1] == 1 else 1, 0, 1).fill_(True)
    return first


def scaled_logits(block: Any) -> None:
    attn = getattr(block, "attn", None) or block.self_attn
    if isinstance(attn, nn.MultiheadAttention):
        host = type(attn)

        def forward(self: Any, query: Any, key: Any, value: Any, **options: Any) -> Any:
            return host.forward(self, 2 * query, key, value, **options)

        attn.__class__ = type(host.__name__, (host,), {"forward": forward})
    elif hasattr(attn, "scale"):
        attn.fused_attn = False
        attn.scale = 2 * attn.scale
    else:
        attn.forward = lambda x, attn_mask=None: type(attn).forward(attn, x, attn_mask) * 2


def other_heads(block: Any) -> None:
    """As many numbers, cut into other heads, for the host alone."""
    attn = getattr(block, "attn", None) or block.self_attn
    host, heads = type(attn), attn.num_heads

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        self.num_heads, self.head_dim = heads // 2, 2 * self.head_dim
        try:
            return host.forward(self, *args, **options)
        finally:
            self.num_heads, self.head_dim = heads, self.head_dim // 2

    attn.__class__ = type(host.__name__, (host,), {"forward": forward})


LIES: dict[str, Callable[[Any], None]] = {
    "extra bias": changed(lambda y, x: y + 0.05),
    "another activation": changed(lambda y, x: y.relu()),
    "no residual": changed(lambda y, x: y - x),
    "residual twice": changed(lambda y, x: y + x),
    "one feature swapped": changed(lambda y, x: torch.cat([y[..., 1:2], y[..., :1], y[..., 2:]], dim=-1)),
    "a tenth of a percent": changed(lambda y, x: 1.001 * y),
    "class token alone": changed(lambda y, x: y + 0.05 * is_class_token(y)),
    "patches alone": changed(lambda y, x: y + 0.05 * ~is_class_token(y)),
    "scaled logits": scaled_logits,
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_block_that_lies_is_refused_by_name(name: str, lie: str) -> None:
    tower = plain_tower(name)
    LIES[lie](last_block(tower, name))
    modules, random_state = snapshot(tower), torch.get_rng_state()
    where = re.escape(ZOO[name].blocks[-1].removeprefix("vision_model."))
    with pytest.raises(ValueError, match=f"{where}.* (computes something else|its own forward)"):
        make_mask_aware(tower, 1)
    assert_same_modules(snapshot(tower), modules)
    assert torch.equal(torch.get_rng_state(), random_state)


def other_images(host: Any) -> Any:
    return lambda self, x, *args, **options: host(self, 1.5 * x + 0.2, *args, **options)


def other_outputs(host: Any) -> Any:
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        output = host(self, *args, **options)
        if isinstance(output, Tensor):
            return (3 * output).cos()
        if isinstance(output, tuple):
            return ((3 * output[0]).cos(), *output[1:])
        for key in [key for key in ("last_hidden_state", "pooler_output", "image_embeds") if key in output]:
            output[key] = (3 * output[key]).cos()
        return output

    return forward


@pytest.mark.parametrize(
    ("name", "path", "method", "change"),
    [
        *((name, "", "forward", other_images) for name in TOWERS),
        *((name, "", "forward", other_outputs) for name in TOWERS),
        *((name, "", "_embeds", other_outputs) for name in ("open_clip", "open_clip-coca", "open_clip-clipa")),
        ("resnet", "", "stem", other_outputs),
        ("timm-vit", "trunk", "forward_features", other_outputs),
        ("timm-vit", "trunk", "forward", other_outputs),
        ("open_clip", "transformer", "forward", other_outputs),
        ("openai", "transformer", "forward", other_outputs),
        ("transformers-clip", "encoder", "forward", other_outputs),
    ],
)
def test_a_subclass_that_changes_what_is_around_the_blocks_is_refused(
    name: str, path: str, method: str, change: Callable[[Any], Any]
) -> None:
    tower = plain_tower(name)
    module = part(tower, path)
    host = type(module)
    module.__class__ = type(host.__name__, (host,), {method: change(getattr(host, method))})
    modules, random_state = snapshot(tower), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"the tower .* does something else around its blocks than its parts say"):
        make_mask_aware(tower, **ZOO[name].settings)
    assert_same_modules(snapshot(tower), modules)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", ["timm-vit", "transformers-clip"])
def test_other_heads_are_a_lie_too(name: str) -> None:
    tower = plain_tower(name)
    other_heads(last_block(tower, name))
    with pytest.raises(ValueError, match="computes something else"):
        make_mask_aware(tower, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_honest_blocks_are_taken_in_every_dtype_and_mode(name: str, dtype: torch.dtype) -> None:
    tower = plain_tower(name).to(dtype).train()
    modes = [module.training for module in tower.modules()]
    make_mask_aware(tower, 0)
    assert [module.training for module in tower.modules()] == modes
    restore(tower)


def test_towers_without_values_are_taken() -> None:
    with torch.device("meta"):
        make_mask_aware(ZOO["open_clip"].build(), 1)
    tower = plain_tower("open_clip")
    for parameter in tower.parameters():
        nn.init.constant_(parameter, torch.nan)
    make_mask_aware(tower, 1)


# Neighbours: before or after the patching


def adapters(tower: Any, targets: list[str]) -> Any:
    """peft's LoRA in a tower, with weights that are not zero."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(tower, peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.2)
    return wrapped.eval()


def one_at_a_time(name: str, tower: Any, start_layer: int) -> Tensor:
    """Embeddings (B, N, D) by an unpatched tower's own modules, a sequence of tokens for each proposal.

    Patches run by themselves; a class token runs in the host's block together with the patches that its mask contains.
    """
    assert name in ("open_clip", "openai")
    batch_first = name == "open_clip"
    inside = masks_on_grid(MASKS, (4, 4)).flatten(2)  # (B, N, hw)

    def run(block: Any, x: Tensor) -> Tensor:
        return block(x) if batch_first else block(x.transpose(0, 1)).transpose(0, 1)

    patches = tower.conv1(IMAGES).flatten(2).mT
    tokens = torch.cat([tower.class_embedding.expand(2, 1, -1), patches], dim=1) + tower.positional_embedding
    tokens = tower.ln_pre(tokens)  # (B, 1+hw, width)
    blocks = tower.transformer.resblocks
    for block in blocks[:start_layer]:
        tokens = run(block, tokens)
    rows = []
    for b in range(2):
        for seen in inside[b]:
            class_token, patches = tokens[b : b + 1, :1], tokens[b : b + 1, 1:]
            for block in blocks[start_layer:]:
                both = torch.cat([class_token, patches[:, seen]], dim=1)
                class_token, patches = run(block, both)[:, :1], run(block, patches)
            rows.append(tower.ln_post(class_token[:, 0]) @ tower.proj)
    return torch.cat(rows).unflatten(0, (2, 5))


@torch.no_grad()
@pytest.mark.parametrize("targets", [["attn"], ["c_fc", "c_proj"], ["attn", "c_fc"]])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_of_open_clip_is_what_its_own_modules_compute(targets: list[str], when: str) -> None:
    expected = one_at_a_time("open_clip", adapters(plain_tower("open_clip"), targets).base_model.model, 1)
    if when == "before":
        wrapped = adapters(plain_tower("open_clip"), targets)
        make_mask_aware(wrapped.get_base_model(), 1)
    else:
        wrapped = adapters(mask_aware_tower("open_clip"), targets)
    close(wrapped(IMAGES, MASKS), expected)
    features = encode_features(wrapped, IMAGES)
    close(encode_masks(wrapped, features, MASKS), expected)
    close(encode_masks(wrapped, features, MASKS), expected)
    with wrapped.disable_adapter():
        close(wrapped(IMAGES, MASKS), mask_aware_tower("open_clip")(IMAGES, MASKS))
    close(wrapped(IMAGES, MASKS), expected)
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="the weights of VisionTransformer have changed"):
        encode_masks(wrapped, features, MASKS)
    merged = wrapped(IMAGES, MASKS)
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "targets"),
    [("timm-vit", ["qkv", "proj"]), ("timm-eva", ["proj"]), ("transformers-clip", ["q_proj", "v_proj", "out_proj"])],
)
def test_lora_in_layers_that_are_called(name: str, targets: list[str]) -> None:
    wrapped = adapters(mask_aware_tower(name), targets)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    with torch.no_grad():
        answer = wrapped(IMAGES, MASKS)
        close(answer, merged(IMAGES, MASKS), 1e-4)
        assert (answer - mask_aware_tower(name)(IMAGES, MASKS)).abs().max() > 1e-2
    wrapped.train()(IMAGES, MASKS).square().sum().backward()
    asked = [key for key, p in wrapped.named_parameters() if p.requires_grad and p.grad is None]
    assert asked == []


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers-siglip", "open_clip-coca"])
def test_adapters_that_the_pool_never_calls_change_it_as_little_as_the_host(name: str) -> None:
    tower = adapters(mask_aware_tower(name), ["out_proj"])
    full = torch.ones(2, 1, 32, 32)
    expected = embedding(tower(IMAGES))
    if name == "transformers-siglip":
        close(tower(IMAGES, full)[:, 0], expected)
    close(tower(IMAGES, full, with_image=True)[1], expected)


class Scale(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


@torch.no_grad()
def test_parametrizations_of_a_block_are_what_its_own_modules_compute() -> None:
    def parametrized(tower: Any) -> Any:
        for block in tower.transformer.resblocks:
            parametrize.register_parametrization(block.attn, "in_proj_weight", Scale())
            parametrize.register_parametrization(block.mlp[0], "weight", Scale())
        return tower

    expected = one_at_a_time("open_clip", parametrized(plain_tower("open_clip")), 1)
    after = parametrized(mask_aware_tower("open_clip"))
    for tower in (after, make_mask_aware(parametrized(plain_tower("open_clip")), 1)):
        # the class of the attention says by its children that something is behind its weights
        close(tower(IMAGES, MASKS), expected)


@torch.no_grad()
def test_pruning_is_what_its_own_modules_compute() -> None:
    def pruned(tower: Any) -> Any:
        for block in tower.transformer.resblocks:
            prune.l1_unstructured(block.mlp[0], "weight", amount=0.5)
        return tower

    expected = one_at_a_time("open_clip", pruned(plain_tower("open_clip")), 1)
    close(pruned(mask_aware_tower("open_clip"))(IMAGES, MASKS), expected)
    close(make_mask_aware(pruned(plain_tower("open_clip")), 1)(IMAGES, MASKS), expected)


@torch.no_grad()
def test_the_oracle_of_these_tests_is_the_encoder() -> None:
    for name in ("open_clip", "openai"):
        close(mask_aware_tower(name)(IMAGES, MASKS), one_at_a_time(name, plain_tower(name), 1))


@pytest.mark.parametrize("place", ["tower", "block", "attention"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_forward_on_the_instance_is_refused(name: str, place: str) -> None:
    def module(tower: Any) -> Any:
        block = last_block(tower, name)
        return {"tower": tower, "block": block, "attention": getattr(block, "attn", None) or block.self_attn}[place]

    tower = plain_tower(name)
    module(tower).forward = module(tower).forward
    with pytest.raises(ValueError, match="its own forward set on the instance"):
        make_mask_aware(tower, 1)
    tower = mask_aware_tower(name)
    module(tower).forward = module(tower).forward  # calls ours, unless it is computed around
    if place == "tower":
        close(tower(IMAGES, MASKS), mask_aware_tower(name)(IMAGES, MASKS))
    else:
        with pytest.raises(ValueError, match="its own forward set on the instance"):
            tower(IMAGES, MASKS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_hooks_that_a_masked_pass_would_leave_out_are_refused(name: str) -> None:
    tower = mask_aware_tower(name)
    block = last_block(tower, name)
    attn = getattr(block, "attn", None) or block.self_attn
    handle = attn.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ValueError, match=r"has forward hooks, which a masked pass would leave out"):
        tower(IMAGES, MASKS)
    tower(IMAGES)
    handle.remove()
    tower(IMAGES, MASKS)
    container = getattr(tower, "trunk", None) or getattr(tower, "transformer", None)
    if container is not None:  # of transformers' lists the forward is never called
        list_of_blocks = container.blocks if hasattr(container, "blocks") else container.resblocks
        list_of_blocks.register_forward_hook(lambda module, args, output: None)
        with pytest.raises(ValueError, match=r"(trunk\.blocks|transformer\.resblocks) .* has forward hooks"):
            tower(IMAGES, MASKS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["open_clip", "timm-vit", "transformers-clip", "transformers-siglip", "timm-convnext"])
def test_offloading_is_right_or_refused(name: str) -> None:
    tower = mask_aware_tower(name)
    size = ZOO[name].size
    images, masks = random_images(size), random_masks(5, size)
    expected = tower(images, masks)
    accelerate.cpu_offload(tower, execution_device=torch.device("cpu"))
    try:
        close(tower(images, masks), expected)
    except ValueError as error:
        assert "its own forward set on the instance" in str(error)


def test_classes_swapped_on_top_are_not_taken_away() -> None:
    tower = mask_aware_tower("open_clip")
    parametrize.register_parametrization(tower, "proj", Scale())
    before = snapshot(tower)
    for undo in (restore, make_mask_aware):
        with pytest.raises(ValueError, match="ParametrizedVisionTransformer was made out of the mask-aware class by"):
            undo(tower)
        assert_same_modules(snapshot(tower), before)
    parametrize.remove_parametrizations(tower, "proj")
    restore(tower)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if torch.distributed.is_initialized():
        pytest.skip("another module's process group is open")
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_fsdp_on_top(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    tower = mask_aware_tower("open_clip")
    expected = tower(IMAGES, MASKS).detach()
    for block in tower.transformer.resblocks:
        fully_shard(block, mesh=mesh)
    fully_shard(tower, mesh=mesh)
    actual = tower(IMAGES, MASKS)
    close(actual.detach(), expected)
    actual.square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    with pytest.raises(ValueError, match="FSDPVisionTransformer was made out of the mask-aware class by"):
        restore(tower)


@torch.no_grad()
def test_quantized_layers_are_called() -> None:
    tower = mask_aware_tower("open_clip")
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(tower), {nn.Linear}, dtype=torch.qint8)
    similar = torch.cosine_similarity(quantized(IMAGES, MASKS), tower(IMAGES, MASKS), dim=-1)
    assert similar.min() > 0.98
