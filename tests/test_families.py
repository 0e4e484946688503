"""What every kind of image tower keeps and gains by `make_mask_aware`: one list of behaviours over the zoo."""

import copy
import io
import pickle
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import (
    HEADS,
    STAGES,
    ZOO,
    Kind,
    assert_same_modules,
    embedding,
    mask_aware_tower,
    open_clip_tower,
    part,
    plain_tower,
    random_images,
    random_masks,
    snapshot,
    timm_tower,
    timm_vit,
)

from maft_adapter import (
    ImageFeatures,
    encode_features,
    encode_image,
    encode_masks,
    encode_masks_and_image,
    is_mask_aware,
    make_mask_aware,
    restore,
    valid_masks,
)
from maft_adapter.towers import FAMILIES, attention_pool, average, base, class_token, learned_query

OF_OPEN_CLIP = [name for name in ZOO if not name.startswith(("openai", "transformers"))]
# Tracing takes a second; these give the same graph as another kind, or one with a part less.
TRACED_AS_ANOTHER = {
    *("open_clip", "open_clip-no_ln_pre", "open_clip-not_square"),
    *("open_clip-final_ln_after_pool", "open_clip-output_tokens"),
    *(
        "timm-vit-not_square",
        "timm-eva",
        "timm-eva02-post_norm",
        "transformers-clip",
        "timm-siglip-so400m",
        "transformers-siglip-so400m",
    ),
    *("openai-resnet", "openai-resnet-one_relu", "open_clip-avg", "timm-convnext-mlp"),
}
TRACED = [name for name in ZOO if name not in TRACED_AS_ANOTHER]
OF_ANY_SIZE = [name for name in ZOO if name != "timm-swin"]


@pytest.fixture(params=ZOO)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kind(name: str) -> Kind:
    return ZOO[name]


@pytest.fixture
def plain(name: str) -> Any:
    return plain_tower(name)


@pytest.fixture
def tower(name: str) -> Any:
    return mask_aware_tower(name)


@pytest.fixture
def images(kind: Kind) -> Tensor:
    return random_images(kind.size)


@pytest.fixture
def masks(kind: Kind) -> Tensor:
    """(2, 6, H, W) proposals: two soft ones, a full one, an empty one, a single cell and a single pixel."""
    (height, width), (rows, columns) = kind.size, kind.grid
    masks = torch.zeros(2, 6, height, width)
    masks[:, 0] = torch.linspace(0, 1, width)  # to the right
    masks[:, 1] = torch.linspace(0, 1, height)[:, None]  # downwards
    masks[1, :2] = 1 - masks[1, :2] ** 2
    masks[:, 2] = 1
    masks[:, 4, : height // rows, width - width // columns :] = 1
    masks[:, 5, height // 2 + 1, width // 2 + 1] = 1
    return masks


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Within `tolerance` of the largest value; towers differ in scale."""
    largest = max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)


def leaves(output: Any) -> list[Tensor]:
    """All tensors in a tower's own output."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [tensor for value in values if value is not None for tensor in leaves(value)]


def assert_identical(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    assert all(torch.equal(a, b) for a, b in zip(leaves(actual), leaves(expected), strict=True))


# The tower stays what it was


def test_one_family_recognises_it(plain: Any, kind: Kind) -> None:
    assert [family for family in FAMILIES if family.recognise(plain)] == [kind.family]


@torch.no_grad()
def test_without_masks_it_is_bit_identical(plain: Any, tower: Any, images: Tensor) -> None:
    assert isinstance(tower, type(plain))
    assert_identical(tower(images), plain(images))
    for _ in range(2):  # the second pass sees what the first did to running statistics
        assert_identical(tower.train()(images), plain.train()(images))
    assert_identical(tower.eval()(images), plain.eval()(images))


def test_no_parameter_buffer_or_key_is_added(plain: Any, kind: Kind) -> None:
    keys, parameters, buffers = list(plain.state_dict()), dict(plain.named_parameters()), dict(plain.named_buffers())
    assert make_mask_aware(plain, **kind.settings) is plain
    assert is_mask_aware(plain)
    assert list(plain.state_dict()) == keys
    for after, before in ((dict(plain.named_parameters()), parameters), (dict(plain.named_buffers()), buffers)):
        assert list(after) == list(before)
        assert all(after[key] is before[key] for key in before)


@torch.no_grad()
def test_restore_is_exact(plain: Any, kind: Kind, name: str, images: Tensor, masks: Tensor) -> None:
    modules, expected = snapshot(plain), plain(images)
    make_mask_aware(plain, **kind.settings)(images, masks, with_image=True)
    if name in OF_ANY_SIZE:
        plain(random_images(kind.other), masks, with_image=True)
        plain(random_images(kind.other))
    plain(images)
    assert restore(plain) is plain
    assert not is_mask_aware(plain)
    assert_same_modules(snapshot(plain), modules)
    assert_identical(plain(images), expected)


@torch.no_grad()
def test_a_deepcopy_is_independent(tower: Any, images: Tensor, masks: Tensor) -> None:
    before = tower(images, masks)
    student = copy.deepcopy(tower)
    assert [type(module) for module in student.modules()] == [type(module) for module in tower.modules()]
    assert torch.equal(student(images, masks), before)
    for parameter in student.parameters():
        parameter += 0.1
    assert torch.equal(tower(images, masks), before)
    assert not torch.equal(student(images, masks), before)
    restore(student)
    assert is_mask_aware(tower)
    assert torch.equal(tower(images, masks), before)


@torch.no_grad()
@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_the_whole_module_can_be_stored(plain: Any, tower: Any, images: Tensor, masks: Tensor, way: str) -> None:
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(tower))
    else:
        torch.save(tower, buffer := io.BytesIO())
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in tower.modules()]
    assert torch.equal(loaded(images, masks), tower(images, masks))
    assert [type(module) for module in restore(loaded).modules()] == [type(module) for module in plain.modules()]
    assert_identical(loaded(images), plain(images))


@torch.no_grad()
def test_patching_again_only_changes_the_settings(plain: Any, name: str, kind: Kind, masks: Tensor) -> None:
    modules = snapshot(plain)
    settings: dict[str, Any] = {"interpolation": "open_clip"}
    if "start_layer" in kind.family.SETTINGS:
        settings["start_layer"] = 2
    if "threshold" in kind.family.SETTINGS:
        settings["threshold"] = 0.7
    images = random_images(kind.other if name in OF_ANY_SIZE else kind.size)
    first = make_mask_aware(plain, **kind.settings)(images, masks)
    fresh = mask_aware_tower(name, **settings)
    assert make_mask_aware(plain, **settings) is plain
    assert [(n, t, list(d)) for n, t, d in snapshot(plain)] == [(n, t, list(d)) for n, t, d in snapshot(fresh)]
    assert torch.equal(plain(images, masks), fresh(images, masks))
    assert len(settings) == 1 or not torch.equal(plain(images, masks), first)
    assert_same_modules(snapshot(restore(plain)), modules)


@torch.no_grad()
def test_hooks_on_its_blocks_fire(plain: Any, kind: Kind, images: Tensor, masks: Tensor) -> None:
    calls: list[str] = []
    blocks = [(name, plain.get_submodule(name)) for name in kind.blocks]
    blocks[-1][1].register_forward_hook(lambda *_: calls.append(kind.blocks[-1]))  # before patching and after it
    make_mask_aware(plain, **kind.settings)
    calls.clear()
    for name, block in blocks[:-1]:
        block.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    plain(images)
    assert calls == list(kind.blocks)
    calls.clear()
    plain(images, masks)
    asked = kind.blocks[plain.start_layer :] if kind.family is class_token else ()  # once more, by class tokens
    assert calls == [*kind.blocks, *asked]
    before = plain(images, masks)
    # what it gives is heard
    blocks[-1][1].register_forward_hook(
        lambda module, args, output: (output[0].cos(), *output[1:]) if isinstance(output, tuple) else output.cos()
    )
    assert not torch.equal(plain(images, masks), before)


def test_gradient_checkpointing_changes_nothing(plain: Any, kind: Kind, images: Tensor, masks: Tensor) -> None:
    calls: list[nn.Module] = []
    for name, module in plain.get_submodule(kind.blocks[-1]).named_modules():
        if name not in ("attn", "self_attn"):  # which masked passes compute around, and refuse hooks on
            module.register_forward_hook(lambda module, *_: calls.append(module))

    def run(*arguments: Tensor) -> tuple[Tensor, list[Any], int]:
        calls.clear()
        output = embedding(plain(*arguments))
        weights = [parameter for parameter in plain.parameters() if parameter.requires_grad]
        grads = list(torch.autograd.grad(output.square().sum(), weights, allow_unused=True))
        return output, grads, max(calls.count(module) for module in calls)

    make_mask_aware(plain.train(), **kind.settings)
    expected, gradients, once = run(images, masks)
    if hasattr(plain, "set_grad_checkpointing"):
        plain.set_grad_checkpointing()
    elif hasattr(plain, "activation_checkpointing_enable"):
        plain.activation_checkpointing_enable()
    actual, again, times = run(images, masks)
    close(actual, expected)
    for grad, wanted in zip(again, gradients, strict=True):
        assert (grad is None) == (wanted is None)
        if grad is not None:
            close(grad, wanted, 1e-4)
    assert (times > once) == (run(images)[2] > 1)  # where the tower computes its blocks again on the way back


@pytest.mark.parametrize(
    ("name", "groups"),  # open_clip's ResNet locks all or nothing
    [(name, groups) for name in OF_OPEN_CLIP for groups in (0, 1) if not groups or name != "resnet"],
)
def test_lock(plain: Any, tower: Any, images: Tensor, masks: Tensor, groups: int) -> None:
    for visual in (plain, tower):
        visual.lock(unlocked_groups=groups, freeze_bn_stats=True)
    wanted = {key: parameter.requires_grad for key, parameter in plain.named_parameters()}
    assert {key: parameter.requires_grad for key, parameter in tower.named_parameters()} == wanted
    assert tower(images, masks).requires_grad == any(wanted.values())
    assert_identical(tower(images), plain(images))


@torch.no_grad()
@pytest.mark.parametrize("name", OF_OPEN_CLIP)
def test_forward_intermediates(plain: Any, tower: Any, name: str, kind: Kind, images: Tensor) -> None:
    expected, actual = plain.forward_intermediates(images), tower.forward_intermediates(images)
    assert actual.keys() == expected.keys()
    assert_identical(actual, expected)
    if name not in OF_ANY_SIZE:
        return
    other = random_images(kind.other)
    resized = tower.forward_intermediates(other, indices=1)
    close(resized["image_features"], embedding(tower(other)))
    stride = kind.size[0] // kind.grid[0]
    assert resized["image_intermediates"][0].shape[2:] == (kind.other[0] // stride, kind.other[1] // stride)


@torch.no_grad()
@pytest.mark.parametrize("name", ["open_clip-output_tokens", "open_clip-coca"])
def test_output_tokens(plain: Any, tower: Any, kind: Kind, images: Tensor, masks: Tensor) -> None:
    pooled, tokens = tower(images)
    assert torch.equal(tokens, plain(images)[1])
    both = tower(images, masks, with_image=True)
    assert [tuple(tensor.shape) for tensor in both] == [(2, 6, 16), (2, 16)]  # embeddings only
    close(both[1], pooled)
    assert [len(tensor.shape) for tensor in tower(random_images(kind.other))] == [2, 3]


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith("transformers")])
def test_options_of_transformers(plain: Any, tower: Any, images: Tensor, masks: Tensor) -> None:
    options = {"output_hidden_states": True, "output_attentions": False}
    expected = plain(pixel_values=images, **options)
    assert len(expected.hidden_states) == 4
    assert_identical(tower(pixel_values=images, **options), expected)
    message = "with masks the tower gives embeddings only and takes no output_hidden_states, output_attentions"
    with pytest.raises(TypeError, match=message):
        tower(images, masks, **options)
    fused = tower(images, masks)
    tower.set_attn_implementation("eager")
    assert tower.config._attn_implementation == "eager"
    close(tower(images, masks), fused)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith("timm") and ZOO[name].blocks != STAGES])
def test_set_input_size(plain: Any, tower: Any, name: str, kind: Kind, masks: Tensor) -> None:
    size = (128, 64) if name == "timm-swin" else kind.other
    for visual in (plain, tower):
        visual.set_input_size(size)
    images = random_images(size)
    assert_identical(tower(images), plain(images))
    embeddings, image = tower(images, masks, with_image=True)
    close(image, plain(images))
    assert torch.equal(embeddings, make_mask_aware(plain, **kind.settings)(images, masks))


# Compiled, exported, parallel, trained, in other precisions

any_number = pytest.mark.skipif(
    torch.__version__ < "2.8",  # of a class that compares numbers
    reason="graphs for any number of proposals need torch 2.8",
)


@any_number
@torch.no_grad()
@pytest.mark.parametrize("name", TRACED)
def test_compiles_to_one_graph_for_any_number_of_proposals(tower: Any, images: Tensor) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(tower, fullgraph=True, backend=backend)
    for n in (5, 11):
        masks = random_masks(n, (20, 20))
        torch._dynamo.mark_dynamic(masks, 1)  # an error if the graph holds for one number only
        for actual, expected in zip(
            compiled(images, masks, with_image=True), tower(images, masks, with_image=True), strict=True
        ):
            close(actual, expected)
    assert len(graphs) == 1


@any_number
@torch.no_grad()
@pytest.mark.parametrize("name", TRACED)
def test_exports_for_any_number_of_proposals(tower: Any, images: Tensor) -> None:
    n = torch.export.Dim("n", min=2, max=1000)
    program = torch.export.export(tower, (images, random_masks(5, (20, 20))), dynamic_shapes=(None, {1: n})).module()
    for count in (5, 11):
        masks = random_masks(count, (20, 20))
        close(program(images, masks), tower(images, masks))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("name", ["open_clip", "timm-eva02", "transformers-siglip", "resnet", "timm-convnext"])
def test_torchscript_by_tracing_but_not_by_compiling(
    plain: Any, tower: Any, name: str, images: Tensor, masks: Tensor
) -> None:
    modules = snapshot(tower)
    for scripted in (tower, nn.ModuleDict({"visual": tower})):
        with pytest.raises(TypeError, match=r"is mask-aware, which torch\.jit\.script can't compile; use torch\."):
            torch.jit.script(scripted)
    assert_same_modules(snapshot(tower), modules)
    traced = torch.jit.trace(tower, (images, masks), check_trace=False)
    close(traced(images.flip(0), masks.flip(0)), tower(images.flip(0), masks.flip(0)))
    if name == "open_clip":  # of which torch.jit.script takes the unpatched tower
        assert_identical(torch.jit.script(restore(tower))(images), plain(images))


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_inside_distributed_data_parallel(plain: Any, kind: Kind, images: Tensor, masks: Tensor) -> None:
    expected_image = embedding(plain(images))
    wrapper = nn.parallel.DistributedDataParallel(plain, find_unused_parameters=True)
    with pytest.raises(TypeError, match=r"is a parallel wrapper; patch before wrapping, or pass its \.module"):
        make_mask_aware(wrapper, **kind.settings)
    make_mask_aware(wrapper.module, **kind.settings)  # in place, so the wrapper has it
    alone = copy.deepcopy(plain)
    expected = alone(images, masks)
    expected.square().sum().backward()
    embeddings = wrapper(images, masks)
    assert torch.equal(embeddings, expected)
    embeddings.square().sum().backward()
    for (key, parameter), other in zip(plain.named_parameters(), alone.parameters(), strict=True):
        if other.grad is not None:  # the wrapper gives what is left out a gradient of zero
            assert torch.equal(parameter.grad, other.grad), key
    close(wrapper(images, masks, with_image=True)[1], expected_image)
    restore(plain)
    assert torch.equal(embedding(wrapper(images)), expected_image)


@torch.no_grad()
def test_in_training_mode(plain: Any, tower: Any, images: Tensor, masks: Tensor) -> None:
    evaluated = tower(images, masks)
    image = embedding(plain.train()(images))
    embeddings, actual = tower.train()(images, masks, with_image=True)
    close(actual, image)
    for (key, buffer), expected in zip(tower.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, expected), key  # running statistics see the images once
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in tower.modules()):
        close(embeddings, evaluated)
    assert not any(isinstance(module, nn.Dropout) and module.p for module in tower.modules())


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=["bf16", "fp16"])
def test_half_precision(
    tower: Any, name: str, kind: Kind, images: Tensor, masks: Tensor, dtype: torch.dtype, tolerance: float
) -> None:
    other = random_images(kind.other if name in OF_ANY_SIZE else kind.size)
    masks = masks.round()  # nothing lies near the threshold, where rounding decides
    expected = tower(images, masks), tower(other, masks)
    with torch.autocast("cpu", dtype=dtype):
        mixed = tower(images, masks)
    tower.to(dtype)
    actual = tower(images.to(dtype), masks), tower(other.to(dtype), masks.to(dtype))
    assert actual[0].dtype == actual[1].dtype == dtype
    for low, high in zip((mixed, *actual), (expected[0], *expected), strict=True):
        assert (low - high).abs().max() < tolerance * high.abs().max()


def test_gradients_reach_what_trains_and_nothing_else(tower: Any, kind: Kind, images: Tensor, masks: Tensor) -> None:
    for key, parameter in tower.named_parameters():
        parameter.requires_grad_(kind.trains in key)
    tower.train()(images, masks).square().sum().backward()
    for key, parameter in tower.named_parameters():
        if kind.trains not in key:
            assert parameter.grad is None, key
            continue
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # a bias on all keys moves no attention weight
        assert parameter.ndim < 2 or parameter.grad.abs().max() > 0, key


# What masks are to it


@torch.no_grad()
def test_any_number_of_proposals(tower: Any, images: Tensor) -> None:
    masks = random_masks(300, (20, 28))
    expected = tower(images, masks)
    assert expected.shape == (2, 300, embedding(tower(images)).shape[1])
    for n in (0, 1, 7, 100):
        close(tower(images, masks[:, :n]), expected[:, :n])
        embeddings, image = tower(images, masks[:, :n], with_image=True)
        close(embeddings, expected[:, :n])
        close(image, embedding(tower(images)))


@torch.no_grad()
def test_ragged_lists_equal_one_image_at_a_time(tower: Any, images: Tensor, masks: Tensor) -> None:
    clip = SimpleNamespace(visual=tower)
    batch, ragged = torch.cat([images, -images]), [masks[0], masks[1, :2], masks[0, :0], masks[1, 4:]]
    embeddings = encode_masks(clip, batch, ragged)
    assert [len(e) for e in embeddings] == [6, 2, 0, 2]
    for b in range(4):
        close(embeddings[b], encode_masks(clip, batch[b : b + 1], ragged[b][None])[0])
    both, image = encode_masks_and_image(clip, batch, ragged, normalize=True)
    close(torch.cat(list(both)), nn.functional.normalize(torch.cat(embeddings), dim=-1))
    close(image, nn.functional.normalize(embedding(tower(batch)), dim=-1))


@torch.no_grad()
def test_with_image_is_both_at_once(tower: Any, images: Tensor, masks: Tensor) -> None:
    embeddings, image = tower(images, masks, with_image=True)
    assert torch.equal(embeddings, tower(images, masks))
    close(image, embedding(tower(images)))


@torch.no_grad()
def test_proposals_do_not_influence_each_other(tower: Any, images: Tensor, masks: Tensor) -> None:
    together = tower(images, masks)
    order = torch.tensor([3, 1, 5, 4, 0, 2])
    close(tower(images, masks[:, order]), together[:, order])
    close(tower(images, masks[:, 1:3]), together[:, 1:3])
    close(tower(images, torch.cat([masks, masks], dim=1))[:, 6:], together)
    close(tower(images[1:], masks[1:]), together[1:])
    different = (together[:, :5, None] - together[:, None, :5]).abs().amax(-1)  # (B, 5, 5)
    soft_full_and_cell = [0, 1, 2, 4]  # but the masks matter
    for i in soft_full_and_cell:
        for j in soft_full_and_cell[:i]:
            assert i == j or different[:, i, j].min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", OF_ANY_SIZE)
@pytest.mark.parametrize("interpolation", ["maft", "open_clip"])
def test_other_image_sizes(name: str, kind: Kind, interpolation: str) -> None:
    tower = mask_aware_tower(name, interpolation=interpolation)
    stride = kind.size[0] // kind.grid[0]
    for size in (kind.other, kind.other[::-1], (96, 96)):
        images, masks = random_images(size), random_masks(4, (30, 50))
        assert tower.token_grid(images) == (size[0] // stride, size[1] // stride)
        embeddings, image = tower(images, masks, with_image=True)
        close(image, embedding(tower(images)))
        assert embeddings.isfinite().all()
        assert (embeddings[:, 0] - embeddings[:, 1]).abs().max() > 1e-3
        assert valid_masks(tower, images, torch.ones(2, 1, 7, 7)).all()


@torch.no_grad()
def test_masks_of_any_resolution(tower: Any, kind: Kind, images: Tensor) -> None:
    cells = random_masks(6, kind.grid) > 0.5
    expected = tower(images, cells)
    for factor in (2, 3, 40):  # the same cells, drawn finer
        finer = cells.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        close(tower(images, finer), expected)
        close(tower(images, finer.to(torch.float64)), expected)
    assert tower(images, random_masks(3, (1, 1))).isfinite().all()
    assert tower(images, random_masks(3, (301, 7))).isfinite().all()


@torch.no_grad()
def test_full_empty_and_tiny_masks_are_finite(tower: Any, kind: Kind, images: Tensor, masks: Tensor) -> None:
    for mode in (tower.eval(), tower.train()):
        assert mode(images, masks).isfinite().all()
    pixel = kind.family is average  # which weighs every cell by its share
    assert valid_masks(tower, images, masks).tolist() == [[True, True, True, False, True, pixel]] * 2
    assert torch.equal(valid_masks(tower, images, masks.bool()), valid_masks(tower, images, masks.bool().float()))
    if not pixel:
        embeddings = tower.eval()(images, masks)
        close(embeddings[:, 5], embeddings[:, 3])


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].family in (learned_query, attention_pool, average)])
def test_a_full_mask_is_the_image(name: str, tower: Any, images: Tensor) -> None:
    embeddings, image = tower(images, torch.ones(2, 1, 8, 8), with_image=True)
    if name in ("timm-pe", "open_clip-coca"):  # whose pool sees a class token, too
        assert (embeddings[:, 0] - image).abs().max() > 1e-3
    else:
        close(embeddings[:, 0], image)


# Features kept of images, masks asked of them


@torch.no_grad()
def test_masks_asked_of_kept_features(tower: Any, kind: Kind, name: str, images: Tensor, masks: Tensor) -> None:
    clip = SimpleNamespace(visual=tower)
    for x in (images, random_images(kind.other if name in OF_ANY_SIZE else kind.size)):
        features = encode_features(clip, x)
        assert len(features) == 2
        assert features.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in features.tensors)  # nothing else
        assert torch.equal(encode_masks(clip, features, masks), tower(x, masks))
        assert torch.equal(tower(features, masks[:, :2]), tower(x, masks[:, :2]))
        embeddings, image = encode_masks_and_image(clip, features, masks)
        close(embeddings, tower(x, masks))
        close(image, embedding(tower(x)))
        assert torch.equal(encode_image(clip, features), image)
        assert torch.equal(encode_image(clip, x), embedding(tower(x)))
        assert torch.equal(valid_masks(tower, features, masks), valid_masks(tower, x, masks))
        close(encode_masks(clip, features[1], masks[1:]), embeddings[1:])
        assert torch.equal(features[-1].tensors[0], features.tensors[0][1:])
        assert torch.equal(features[-2].tensors[0], features.tensors[0][:1])
        ragged = encode_masks(clip, features, [masks[0], masks[1, :2]])
        close(ragged[0], embeddings[0])
        close(ragged[1], embeddings[1, :2])
        kept = features.to(torch.float16)
        assert kept.nbytes * 2 == features.nbytes
        answer = encode_masks(clip, kept, masks)
        assert answer.dtype == embeddings.dtype
        assert (answer - embeddings).abs().max() < 0.02 * embeddings.abs().max()


def test_features_are_of_one_tower_and_one_state_of_it(tower: Any, kind: Kind, images: Tensor, masks: Tensor) -> None:
    clip = SimpleNamespace(visual=tower)
    with torch.no_grad():
        features = encode_features(clip, images)
    name = type(tower).__name__

    def refused(message: str, visual: Any = tower) -> None:
        for ask in (lambda: visual(features, masks), lambda: encode_image(SimpleNamespace(visual=visual), features)):
            with pytest.raises(ValueError, match=re.escape(message)):
                ask()

    refused(f"these features are of another {name}, not of this tower", copy.deepcopy(tower))
    make_mask_aware(tower, **kind.settings, interpolation="open_clip")
    refused("features were made with {")
    make_mask_aware(tower, **kind.settings)
    tower(features, masks)  # of the settings that it has again
    changed = f"the weights of {name} have changed since these features were made; call encode_features again"
    weights = copy.deepcopy(tower.state_dict())
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    tower(images, masks).square().sum().backward()
    optimizer.step()
    refused(changed)
    with torch.no_grad():
        features = encode_features(clip, images)
    tower.load_state_dict(weights)
    refused(changed)
    with torch.no_grad():
        features = encode_features(clip, images)
    for parameter in tower.parameters():
        parameter.data = parameter.data * 1.01  # counts no version up
    refused(changed)
    with torch.no_grad():
        features = encode_features(clip, images)
    tower.double()
    refused(changed)
    tower.float()
    restore(tower)
    with pytest.raises(TypeError, match="is not mask-aware"):
        encode_masks(clip, features, masks)


def test_gradients_through_kept_features(tower: Any, images: Tensor, masks: Tensor) -> None:
    weights = list(tower.parameters())

    def gradients(asked: Any) -> list[Tensor | None]:
        return list(torch.autograd.grad(tower(asked, masks).square().sum(), weights, allow_unused=True))

    features = encode_features(tower, images)
    for actual, expected in zip(gradients(features), gradients(images), strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            close(actual, expected)
    assert not any(tensor.requires_grad for tensor in features.detach().tensors)


@torch.no_grad()
@pytest.mark.parametrize("name", TRACED)
def test_both_steps_compile_and_export(tower: Any, images: Tensor, masks: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(tower, fullgraph=True, backend="eager", dynamic=False)
    clip = SimpleNamespace(visual=compiled)
    features = encode_features(clip, images)
    for kept, expected in zip(features.tensors, encode_features(tower, images).tensors, strict=True):
        close(kept, expected)
    close(encode_masks(clip, features, masks), tower(images, masks))

    class Ask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, tensors: tuple[Tensor, ...], masks: Tensor) -> Any:
            return self.tower(ImageFeatures(self.tower, tensors, features.grid, features.seen), masks)

    encode = torch.export.export(tower, (images,), {"features": True}).module()
    tensors = encode(images, features=True)
    ask = torch.export.export(Ask(), (tensors, masks), strict=False).module()
    close(ask(tensors, masks), tower(images, masks))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_kept_features_in_half_precision(tower: Any, images: Tensor, masks: Tensor, dtype: torch.dtype) -> None:
    masks = masks.round()
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(tower(encode_features(tower, images), masks), tower(images, masks))
    tower.to(dtype)
    assert torch.equal(tower(encode_features(tower, images.to(dtype)), masks), tower(images.to(dtype), masks))


@torch.no_grad()
def test_chunks_of_proposals_change_nothing(tower: Any, kind: Kind, images: Tensor, monkeypatch: Any) -> None:
    masks = random_masks(11, (20, 28))
    expected = tower(images, masks)
    asked: list[int] = []
    pool = type(tower)._pool_masks

    def count(self: Any, features: Any, on_grid: Tensor) -> Tensor:
        asked.append(on_grid.shape[-2])
        return pool(self, features, on_grid)

    monkeypatch.setattr(type(tower), "_pool_masks", count)
    monkeypatch.setattr(base, "_CELLS", 2 * 4 * kind.grid[0] * kind.grid[1])  # four proposals of two images
    close(tower(images, masks), expected)
    assert asked == [4, 4, 3]


# Refusals, each of which leaves the tower as it was


@pytest.mark.parametrize("setting", ["start_layer", "threshold"])
def test_settings_that_mean_nothing_are_refused(plain: Any, kind: Kind, setting: str) -> None:
    if setting in kind.family.SETTINGS:
        make_mask_aware(plain, **{**kind.settings, setting: 1})
        assert getattr(plain, setting) == 1
        return
    modules = snapshot(plain)
    means_nothing = f"{setting} is 1 but means nothing to {type(plain).__name__}, which {kind.family.POOLS}: leave it"
    with pytest.raises(ValueError, match=re.escape(means_nothing)):
        make_mask_aware(plain, **{setting: 1})  # type: ignore[arg-type]
    assert_same_modules(snapshot(plain), modules)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolation": "bilinear"}, "interpolation is 'bilinear', expected one of maft, open_clip"),
        ({"threshold": 0}, "threshold is 0, expected a number in (0, 1]"),
        ({"threshold": 1.5}, "threshold is 1.5, expected a number in (0, 1]"),
    ],
)
def test_bad_settings_are_refused(plain: Any, kind: Kind, settings: dict[str, Any], message: str) -> None:
    modules = snapshot(plain)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mask_aware(plain, **{**kind.settings, **settings})
    assert_same_modules(snapshot(plain), modules)


@pytest.mark.parametrize("start_layer", [-1, 4, 8, 1.0])
@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].family is class_token])
def test_start_layers_out_of_range_are_refused(plain: Any, start_layer: Any) -> None:
    with pytest.raises(ValueError, match=rf"start_layer is {start_layer}, expected an int in 0\.\.3 \(the depth\)"):
        make_mask_aware(plain, start_layer)
    assert not is_mask_aware(plain)


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_sizes_that_the_stride_does_not_divide_are_refused(tower: Any, kind: Kind, with_masks: bool) -> None:
    height, width = kind.other
    stride = kind.size[0] // kind.grid[0]
    masks = (random_masks(2, (8, 8)),) if with_masks else ()
    images = random_images((height + 4, width))
    if kind.blocks == STAGES and not with_masks:  # as before
        assert torch.equal(tower(images), restore(copy.deepcopy(tower))(images))
        return
    message = f"images of {height + 4}x{width} do not divide into {stride}x{stride} patches; resize or pad"
    with pytest.raises(ValueError, match=message):
        tower(images, *masks)


def test_swins_windows_are_made_for_one_size() -> None:
    tower = mask_aware_tower("timm-swin")
    message = "images are (2, 3, 128, 64), but the windows of SwinTransformer are made for (64, 64); call"
    with pytest.raises(ValueError, match=re.escape(message)):
        tower(random_images((128, 64)), random_masks(2, (8, 8)))
    with pytest.raises(AssertionError, match="Input height"):  # timm's own, as before
        tower(random_images((128, 64)))


DROPOUT: dict[str, Any] = {
    "open_clip-coca": lambda: open_clip_tower(attentional_pool=True, attn_pooler_heads=HEADS, patch_dropout=0.5),
    "open_clip-clipa": lambda: open_clip_tower(pool_type="avg", patch_dropout=0.5),
    "timm-vit": lambda: timm_vit("vit_base_patch16_clip_224", "token", patch_drop_rate=0.5),
    "timm-eva02": lambda: timm_vit("eva02_base_patch16_clip_224", "token", None, patch_drop_rate=0.5),
    "timm-siglip": lambda: timm_vit("vit_base_patch16_siglip_224", "map", "none", patch_drop_rate=0.5),
    "timm-gap": lambda: timm_vit("vit_medium_patch16_gap_256", "", patch_drop_rate=0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("name", DROPOUT)
def test_active_patch_dropout_is_refused_with_masks(kind: Kind, name: str, images: Tensor, masks: Tensor) -> None:
    plain = DROPOUT[name]()
    tower = make_mask_aware(copy.deepcopy(plain), **kind.settings)
    attribute = "patch_drop" if name.startswith("timm") else "patch_dropout"
    with pytest.raises(ValueError, match=f"{attribute} would drop patches under the masks; call .eval()"):
        tower(images, masks)
    outputs = []
    for visual in (plain, tower):  # without masks it goes on
        torch.manual_seed(0)
        outputs.append(visual(images))
    assert_identical(*outputs)
    assert not torch.equal(tower(images), tower(images))
    other = random_images(kind.other)
    assert not torch.equal(tower(other), tower(other))
    assert torch.equal(tower.eval()(images, masks), tower(images, masks))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: timm_tower("vit_relpos_medium_patch16_cls_224", "", depth=1),
            "trunk.blocks.0.attn (RelPosAttention) has rel_pos, unknown here",
        ),
        (
            lambda: timm_vit("vit_base_patch16_clip_224", "token", reg_tokens=2),
            "trunk (VisionTransformer) has reg_token, unknown here",
        ),
        (
            lambda: timm_vit("vit_medium_patch16_gap_256", "", reg_tokens=2),
            "trunk averages its patches beside 2 tokens without a place",
        ),
        (
            lambda: timm_vit("eva02_base_patch16_clip_224", "token", None, rope_type="mixed"),
            "trunk has a rotary embedding of its own for every block (rope_mixed)",
        ),
    ],
)
def test_timm_options_that_are_not_computed_are_refused(build: Any, message: str) -> None:
    tower = build()
    modules = snapshot(tower)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mask_aware(tower, 1) if class_token.recognise(tower) else make_mask_aware(tower)
    assert_same_modules(snapshot(tower), modules)


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("timm-vit", "trunk", "trunk (VisionTransformer) has"),
        ("timm-vit", "trunk.patch_embed", "trunk.patch_embed (PatchEmbed) has"),
        ("timm-mobileclip_b", "trunk.patch_embed", "trunk.patch_embed (HybridEmbed) has"),
        ("timm-siglip", "trunk.attn_pool", "trunk.attn_pool (AttentionPoolLatent) has"),
        ("open_clip-coca", "attn_pool", "attn_pool (AttentionalPooler) has"),
        ("open_clip-coca", "attn_pool.attn", "attn_pool.attn ("),
        ("open_clip-clipa", "", "the tower (VisionTransformer) has"),
        ("transformers-clip", "", "CLIPVisionModel (CLIPVisionModel) has"),
        ("transformers-clip", "embeddings", "embeddings (CLIPVisionEmbeddings) has"),
        ("transformers-clip", "encoder", "encoder (CLIPEncoder) has"),
        ("transformers-clip-projection", "", "CLIPVisionModelWithProjection (CLIPVisionModelWith"),
        ("transformers-siglip", "head", "head (SiglipMultiheadAttentionPoolingHead) has"),
        ("resnet", "", "the tower (ModifiedResNet) has"),
        ("resnet", "attnpool", "attnpool (AttentionPool2d) has"),
        ("timm-convnext", "head", "head (Sequential) has"),
    ],
)
def test_unknown_children_are_refused_by_name(plain: Any, kind: Kind, path: str, message: str) -> None:
    part(plain, path).add_module("fresh", nn.LayerNorm(4))
    modules = snapshot(plain)
    with pytest.raises(
        ValueError, match=re.escape(message) + ".*fresh, unknown here: patching it would leave that out"
    ):
        make_mask_aware(plain, **kind.settings)
    assert_same_modules(snapshot(plain), modules)


@pytest.mark.parametrize(
    ("name", "path", "values", "message"),
    [
        ("resnet", "attnpool", {"positional_embedding": nn.Parameter(torch.ones(7, 4))}, "has 7 rows, expected 1 + a"),
        ("open_clip-coca", "attn_pool.attn", {"dropout": 0.1}, "attn_pool.attn has dropout or an extra key"),
        ("transformers-siglip", "head.attention", {"add_zero_attn": True}, "head.attention has dropout or an extra"),
        ("timm-siglip", "trunk.attn_pool", {"latent_len": 2}, "trunk.attn_pool has 2 queries (pool 'token'); expected"),
        ("timm-siglip", "trunk.attn_pool", {"pool": "avg"}, "trunk.attn_pool has 1 queries (pool 'avg'); expected one"),
        ("timm-gap", "trunk", {"pos_embed": nn.Parameter(torch.ones(1, 5, 32))}, "trunk.pos_embed has 5 rows"),
        ("timm-gap", "trunk", {"attn_pool": nn.Identity()}, "trunk has an attention pool beside its average"),
        ("timm-convnext", "trunk", {"feature_info": []}, "trunk (ConvNeXt) has no feature_info, which tells its"),
    ],
)
def test_what_is_computed_otherwise_is_refused(
    plain: Any, kind: Kind, path: str, values: dict[str, Any], message: str
) -> None:
    for attribute, value in values.items():
        setattr(part(plain, path), attribute, value)
    modules = snapshot(plain)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mask_aware(plain, **kind.settings)
    assert_same_modules(snapshot(plain), modules)


def test_with_image_needs_masks(tower: Any, images: Tensor) -> None:
    with pytest.raises(ValueError, match="with_image=True gives mask and image embeddings together and needs masks"):
        tower(images, with_image=True)
