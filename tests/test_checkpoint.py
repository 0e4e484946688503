"""Checkpoints: what is written, what it loads into, and what is refused."""

import argparse
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip import CLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from zoo import DIM, HEADS, ZOO, OpenAIResNet, small_resnet, timm_vit, transformers_tower

from maft_adapter import __version__, is_mask_aware, load_mask_aware, make_mask_aware, save_mask_aware
from maft_adapter.checkpoint import load_visual, replace_file, save_weights, visual_weights
from maft_adapter.models import load_model
from maft_adapter.towers import class_token


def vit(width: int = 32, **options: Any) -> VisionTransformer:
    shape = {"image_size": 32, "patch_size": 8, "layers": 3, "heads": 4, "mlp_ratio": 2.0, "output_dim": 16}
    return VisionTransformer(**{**shape, "width": width, **options}).eval()


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tower.safetensors"


@torch.no_grad()
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (vit, {"start_layer": 1, "interpolation": "open_clip", "threshold": 0.3}),
        (lambda: ModifiedResNet((1, 1, 1, 1), 16, 4, 64, 8).eval(), {"interpolation": "open_clip", "threshold": 0.3}),
        (lambda: vit(pool_type="avg"), {"interpolation": "open_clip"}),
    ],
)
def test_weights_and_settings_come_back(path: Path, build: Any, settings: dict[str, Any], patched: bool) -> None:
    tower = make_mask_aware(build(), **settings)
    save_mask_aware(tower, path)
    other = build()
    if patched:
        make_mask_aware(other, start_layer=2 if "start_layer" in settings else 8)
    assert load_mask_aware(other, path) is other
    assert {name: getattr(other, name) for name in settings} == settings
    images, masks = torch.randn(1, 3, 64, 96), torch.rand(1, 4, 20, 30)
    assert torch.equal(other(images, masks), tower(images, masks))


def test_the_weights_load_into_an_unpatched_tower(path: Path) -> None:
    tower = vit()
    before = state(tower)
    save_mask_aware(make_mask_aware(tower, 1), path)
    plain = CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8, "mlp_ratio": 2.0},
        text_cfg={"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    ).visual
    plain.load_state_dict(load_file(path))
    assert equal(state(plain), before)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["maft_adapter"])
    settings = {"start_layer": 1, "interpolation": "maft", "threshold": 0.5}
    tower_of = {"version": __version__, "tower": "VisionTransformer"}
    assert header == {**tower_of, "settings": settings, "fine_tuned": False}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vit(width=64), "has in another shape class_embedding (32,) for (64,)"),
        (lambda: vit(layers=4), "it lacks transformer.resblocks.3.ln_1.weight"),
        (lambda: vit(layers=2), "it has besides transformer.resblocks.2.attn.in_proj_bias"),
        (lambda: vit(image_size=64), "has in another shape positional_embedding (17, 32) for (65, 32)"),
        (lambda: nn.Linear(2, 2), "a VisionTransformer, does not fit this Linear: it lacks weight, bias; has besides"),
    ],
)
def test_a_mismatch_is_refused_by_name_and_changes_nothing(path: Path, build: Any, message: str) -> None:
    save_mask_aware(make_mask_aware(vit(), 1), path)
    other = build()
    before = state(other)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_mask_aware(other, path)
    assert equal(state(other), before) and not is_mask_aware(other)


def test_plain_weights_are_not_taken_for_a_checkpoint(path: Path) -> None:
    save_file(vit().state_dict(), path)
    with pytest.raises(ValueError, match=r"holds no settings of maft_adapter; load_visual reads plain weights"):
        load_mask_aware(vit(), path)


def test_other_files_are_not_taken_for_a_checkpoint(path: Path) -> None:
    torch.save(vit().state_dict(), path)
    with pytest.raises(ValueError, match=r"holds no settings of maft_adapter"):
        load_mask_aware(vit(), path)
    header = {"version": "9.0", "tower": "VisionTransformer", "settings": {"start_layer": 1, "temperature": 2}}
    save_weights(vit(), path, {"maft_adapter": json.dumps(header)})
    with pytest.raises(ValueError, match=r"is of version 9\.0, whose settings {'temperature'} are unknown here"):
        load_mask_aware(vit(), path)


def test_load_visual_does_not_pass_over_the_settings_of_a_checkpoint(path: Path) -> None:
    save_mask_aware(make_mask_aware(vit(), 1, interpolation="open_clip"), path)
    other = make_mask_aware(vit(), 2)
    before = state(other)
    message = r"was saved with {'start_layer': 1, 'interpolation': 'open_clip'}.*call load_mask_aware"
    with pytest.raises(ValueError, match=message):
        load_visual(other, path)
    assert equal(state(other), before)
    load_visual(make_mask_aware(other, 1, interpolation="open_clip", threshold=0.4), path)
    assert equal(state(other), load_file(path))


def test_mode_and_link_of_a_file_stay(path: Path) -> None:
    save_weights(nn.Linear(2, 2), path)
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    link = path.with_name("link.safetensors")
    link.symlink_to(path)
    save_weights(nn.Linear(3, 3), link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert load_file(path)["weight"].shape == (3, 3)


def test_an_unpatched_tower_is_not_saved(path: Path) -> None:
    with pytest.raises(TypeError, match="VisionTransformer is not mask-aware; call make_mask_aware on it"):
        save_mask_aware(vit(), path)
    assert not path.exists()


def test_a_failing_write_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(nn.Linear(2, 2), path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_weights(nn.Linear(3, 3), path)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_parts_of_killed_runs_do_not_stay(path: Path) -> None:
    program = f"""
import os, signal
from maft_adapter.checkpoint import replace_file
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
replace_file({str(path)!r}, b"new")
"""
    path.write_bytes(b"old")
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
        assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 2
    others = {
        path.with_name(f"{path.name}.{os.getppid()}.part"),  # of a process that is still running
        path.with_name(f"{path.name}.another-machine.999999999.part"),
        path.with_name("other.safetensors.999999999.part"),
    }
    for other in others:
        other.touch()
    path.with_name(f"{path.name}.999999999.part").touch()  # as the first version called them
    replace_file(path, b"new")
    assert path.read_bytes() == b"new" and set(path.parent.iterdir()) == {path, *others}


# Towers out of other checkpoints


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_the_authors_released_layout_is_read(tmp_path: Path, nested: bool, patched: bool) -> None:
    tower = state(vit())
    # their segmenter holds frozen CLIPs beside the fine-tuned tower
    frozen = {f"clip_adapter.clip_model.visual.{name}": torch.zeros_like(value) for name, value in tower.items()}
    content = {**frozen, "logit_scale": torch.ones(()), **{f"IPCLIP.{name}": value for name, value in tower.items()}}
    torch.save({"model": content, "iteration": 999} if nested else content, tmp_path / "maft.pt")
    other = make_mask_aware(vit(), 2) if patched else vit()
    load_visual(other, tmp_path / "maft.pt")
    assert equal(state(other), tower) and is_mask_aware(other) == patched


def test_a_file_without_the_tower_or_of_another_changes_nothing(tmp_path: Path) -> None:
    other = vit(width=64)
    before = state(other)
    torch.save({f"IPCLIP.{name}": value for name, value in vit().state_dict().items()}, tmp_path / "maft.pt")
    with pytest.raises(ValueError, match=r"does not fit this VisionTransformer: it has in another shape"):
        load_visual(other, tmp_path / "maft.pt")
    torch.save({"model": {"sem_seg_head.weight": torch.zeros(2)}}, tmp_path / "maft.pt")
    with pytest.raises(ValueError, match=r"holds no CLIP image tower"):
        load_visual(other, tmp_path / "maft.pt")
    assert equal(state(other), before)


def test_files_are_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # the default of torch must not matter
    for legacy in (False, True):
        torch.save(
            {"IPCLIP.conv1.weight": Malicious()}, tmp_path / "maft.pt", _use_new_zipfile_serialization=not legacy
        )
        with pytest.raises(ValueError, match=r"maft\.pt needs code to be run \(.*\), which weights_only=True forbids"):
            load_visual(vit(), tmp_path / "maft.pt")
    with zipfile.ZipFile(tmp_path / "scripted.pt", "w") as archive:
        archive.writestr("scripted/constants.pkl", pickle.dumps(()))
        archive.writestr("scripted/data.pkl", pickle.dumps({"conv1.weight": Malicious()}))
    with pytest.raises(ValueError, match="holds no CLIP image tower"):
        load_visual(vit(), tmp_path / "scripted.pt")
    assert not (tmp_path / "executed").exists()


# The layouts of released checkpoints, read in their public code


def convnext() -> Any:
    return ZOO["timm-convnext-mlp"].build().eval()


def eva02() -> Any:
    return timm_vit("eva02_base_patch16_clip_224", "token", None).eval()


def fc_clip(tower: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """bytedance/fc-clip: open_clip's frozen CLIP as the backbone."""
    text = {"positional_embedding": torch.ones(4, DIM), "logit_scale": torch.ones(())}
    return {
        **prefixed("backbone.clip_model.", {**prefixed("visual.", tower), **text}),
        "sem_seg_head.pixel_decoder.input_proj.0.0.weight": torch.ones(2, 2, 1, 1),
        "void_embedding.weight": torch.ones(1, DIM),
    }


def maft_plus(tower: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """jiaosiyu1999/MAFT-Plus: FC-CLIP's, tuned, beside its frozen teacher and what adapts the words."""
    frozen = {name: torch.zeros_like(value) for name, value in tower.items()}
    teacher = prefixed("backbone_t.clip_model.visual.", frozen)
    return {**teacher, **fc_clip(tower), "cdt.decoder.layers.0.linear1.weight": torch.ones(2, 2)}


def maskclippp(tower: dict[str, torch.Tensor], **beside: torch.Tensor) -> dict[str, torch.Tensor]:
    """HVision-NKU/MaskCLIPpp: what its `saved_modules` names."""
    names = {name.replace("__", "."): value for name, value in beside.items()}
    return {**prefixed("visual_encoder.proxy.", tower), **names}


def as_eva_clip(tower: Any) -> dict[str, torch.Tensor]:
    """Under the names of EVA-CLIP's EVAVisionTransformer, with the buffers that its own releases hold."""
    names = {
        "attn.q_proj.bias": "attn.q_bias", "attn.v_proj.bias": "attn.v_bias", "attn.norm.": "attn.inner_attn_ln.",
        "mlp.fc1_g.": "mlp.w1.", "mlp.fc1_x.": "mlp.w2.", "mlp.fc2.": "mlp.w3.", "mlp.norm.": "mlp.ffn_ln.",
    }  # fmt: skip
    content = {}
    for name, value in state(tower.trunk).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        content[name] = value
    return {**content, "rope.freqs_cos": torch.ones(16, 8), "blocks.0.attn.rope.freqs_sin": torch.ones(16, 8)}


def ovseg(tower: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """facebookresearch/ov-seg: ZSSeg's place, and a prompt for each patch and depth inside the tower."""
    prompts = {"mask_embedding": torch.ones(3, 16, 32)}
    return {
        **prefixed("clip_adapter.clip_model.visual.", {**tower, **prompts}),
        "clip_adapter.clip_model.logit_scale": torch.ones(()),
        "clip_adapter.non_object_embedding": torch.ones(1, 16),
    }


IN_WORDS = torch.ones(2, 2)
RELEASED: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, Any]], str]] = {
    "FC-CLIP": (convnext, lambda tower: fc_clip(state(tower)), ""),
    "FC-CLIP ResNet": (small_resnet, lambda tower: fc_clip(state(tower)), ""),
    "MAFT+": (convnext, lambda tower: maft_plus(state(tower)), r"MAFT\+ adapts words to each picture \(cdt\)"),
    "MaskCLIP++ ConvNeXt": (
        convnext,
        lambda tower: maskclippp(state(tower), psm__img2text__in_proj_weight=IN_WORDS),
        r"adapts words to each picture \(psm\.img2text\)",
    ),
    "MaskCLIP++ RN50x16": (
        small_resnet,
        lambda tower: maskclippp(
            state(tower), visual_encoder__mask_logit_scale=torch.ones(4), psm__corr_proj_in__0__weight=torch.ones(2, 1)
        ),
        "attention pool sees the patches of a mask without the mean token",
    ),
    "MaskCLIP++ EVA-02": (
        eva02,
        lambda tower: maskclippp(as_eva_clip(tower), visual_encoder__mask_logit_scale=torch.ones(2, HEADS)),
        "masks begin at start_layer=1; from there on its mask tokens do not see themselves",
    ),
    "MaskCLIP++ EVA-02, words tuned": (
        eva02,
        lambda tower: maskclippp(as_eva_clip(tower), text_encoder__proxy__positional_embedding=IN_WORDS),
        r"tuned the text encoder with it \(text_encoder\)",
    ),
    "MaskCLIP++ EVA-01": (
        lambda: timm_vit("eva_giant_patch14_clip_224", "token", None).eval(),
        lambda tower: maskclippp(state(tower.trunk), visual_encoder__mask_logit_scale=torch.ones(3, HEADS)),
        "masks begin at start_layer=0",
    ),
    "OVSeg": (vit, lambda tower: ovseg(state(tower)), r"OVSeg trained it on masked crops.*\(mask_embedding\)"),
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("release", RELEASED)
def test_released_layouts(tmp_path: Path, release: str, patched: bool) -> None:
    build, lay_out, warning = RELEASED[release]
    tower, other = build(), build()
    if patched and class_token.recognise(other):
        make_mask_aware(other, start_layer=2)
    elif patched:
        make_mask_aware(other)
    with torch.no_grad():  # norms and biases begin as ones and zeros, in whichever place
        for parameter in tower.parameters():
            parameter.copy_(torch.randn_like(parameter))
    torch.save({"model": lay_out(tower), "iteration": 19999}, tmp_path / "released.pth")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_visual(other, tmp_path / "released.pth")
    assert equal(state(other), state(tower)) and other.fine_tuned and is_mask_aware(other) == patched
    assert len(caught) == bool(warning)
    for said in caught:
        assert re.search(rf"released\.pth the image tower alone is loaded: .*{warning}", str(said.message))
        assert said.filename == __file__
    if build is convnext:
        assert equal(visual_weights(tmp_path / "released.pth"), state(tower))


def test_a_release_as_the_checkpoint_of_a_command(tmp_path: Path) -> None:
    """What `--checkpoint` of segment, embed and evaluate does: a whole CLIP by its name, the tower out of the file."""
    tower = state(load_model("RN50", "random").clip.visual)
    tower["attnpool.c_proj.bias"] += 1
    torch.save({"model": maskclippp(tower, visual_encoder__mask_logit_scale=torch.ones(32))}, tmp_path / "rn50.pth")
    with pytest.warns(UserWarning, match="without the mean token, so embeddings differ"):
        model = load_model("RN50", "random", checkpoint=tmp_path / "rn50.pth")
    assert equal(state(model.clip.visual), tower) and "checkpoint rn50.pth" in model.source


def test_the_gate_of_eva_clip_is_the_gate(tmp_path: Path) -> None:
    """w3(norm(silu(w1 x) * w2 x)), as EVA-CLIP computes its MLP: swapped, the two would have the same shapes."""
    content = as_eva_clip(eva02())
    torch.save({"visual": content}, tmp_path / "eva.pt")
    tower = eva02()
    load_visual(tower, tmp_path / "eva.pt")
    assert not tower.fine_tuned
    own = {name.removeprefix("blocks.1.mlp."): value for name, value in content.items() if "blocks.1.mlp" in name}
    x = torch.randn(5, 32)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]

    hidden = torch.nn.functional.silu(linear("w1", x)) * linear("w2", x)
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected = linear("w3", hidden * own["ffn_ln.weight"] + own["ffn_ln.bias"])
    with torch.no_grad():
        torch.testing.assert_close(tower.trunk.blocks[1].mlp(x), expected)


def test_a_warning_that_is_an_error_changes_nothing(tmp_path: Path) -> None:
    torch.save(maft_plus(state(convnext())), tmp_path / "maftp.pth")
    tower = convnext()
    before = state(tower)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"MAFT\+"):
            load_visual(tower, tmp_path / "maftp.pth")
    assert equal(state(tower), before)


def test_mask_prompts_are_weights_of_a_tower_that_has_them(tmp_path: Path) -> None:
    def prompted() -> Any:
        tower: Any = vit()
        tower.mask_embedding = nn.Parameter(torch.randn(3, 16, 32))
        return tower

    tower, other = prompted(), prompted()
    torch.save({"model": prefixed("clip_adapter.clip_model.visual.", state(tower))}, tmp_path / "ovseg.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_visual(other, tmp_path / "ovseg.pth")
    assert equal(state(other), state(tower))


def test_a_released_tower_of_another_size_is_refused(tmp_path: Path) -> None:
    torch.save({"model": maskclippp(as_eva_clip(eva02()))}, tmp_path / "eva.pth")
    tower = timm_vit("eva02_base_patch16_clip_224", "token", None, size=48)
    with pytest.raises(ValueError, match=r"in another shape trunk\.pos_embed \(1, 17, 32\) for \(1, 37, 32\)"):
        load_visual(tower, tmp_path / "eva.pth")
    with pytest.raises(ValueError, match="holds no CLIP image tower such as this VisionTransformer"):
        load_visual(vit(), tmp_path / "eva.pth")


# What is not in the weights


def clip_tower(**options: Any) -> Any:
    return transformers_tower("CLIPVisionModelWithProjection", **options)


@pytest.mark.parametrize(
    ("saved", "other", "message"),
    [
        (lambda: vit(act_layer=QuickGELU), vit, "transformer.resblocks.*.mlp has QuickGELU() for GELU()"),
        (vit, lambda: vit(act_layer=lambda: nn.GELU("tanh")), "mlp has GELU() for GELU(approximate='tanh')"),
        (vit, lambda: vit(act_layer=nn.Identity), "mlp has GELU() for nothing"),
        (lambda: vit(act_layer=nn.Identity), vit, "mlp has nothing for GELU()"),
        (vit, lambda: vit(heads=2), "transformer.resblocks.*.attn.num_heads 4 for 2"),
        (vit, lambda: vit(norm_layer=lambda width: nn.LayerNorm(width, 1e-6)), "ln_1.eps 1e-05 for 1e-06"),
        (vit, lambda: vit(pool_type="avg"), "pool_type tok for avg"),
        (vit, lambda: vit(final_ln_after_pool=True), "final_ln_after_pool False for True"),
        (lambda: vit(image_size=(32, 48)), lambda: vit(image_size=(48, 32)), "grid_size (4, 6) for (6, 4)"),
        (small_resnet, lambda: ModifiedResNet([1, 1, 1, 1], 16, 8, 64, 8), "attnpool.num_heads 4 for 8"),
        (lambda: clip_tower(hidden_act="gelu"), clip_tower, "mlp has GELU() for QuickGELU()"),
        (lambda: clip_tower(layer_norm_eps=1e-6), clip_tower, "vision_model.pre_layrnorm.eps 1e-06 for 1e-05"),
        (lambda: clip_tower(num_attention_heads=2), clip_tower, "self_attn.num_heads 2 for 4"),
        (
            lambda: timm_vit("vit_base_patch16_clip_quickgelu_224", "token"),
            lambda: timm_vit("vit_base_patch16_clip_224", "token"),
            "trunk.blocks.*.mlp has QuickGELU() for GELU()",
        ),
        (
            lambda: timm_vit("eva02_base_patch16_clip_224", "token", None),
            lambda: timm_vit("eva02_base_patch16_clip_224", "token", None, num_heads=2),
            "attn.num_heads 4 for 2",
        ),
        (
            lambda: timm_vit("eva02_base_patch16_clip_224", "token", None),
            lambda: timm_vit("eva02_base_patch16_clip_224", "token", None, ref_feat_shape=(7, 7)),
            "trunk.rope.ref_feat_shape (16, 16) for (7, 7)",
        ),
    ],
)
def test_a_tower_that_computes_otherwise_is_refused(path: Path, saved: Any, other: Any, message: str) -> None:
    save_weights_of(saved(), path)
    tower = other()
    before = state(tower)
    for load in (load_mask_aware, load_visual):
        with pytest.raises(ValueError, match="computes otherwise than this") as refusal:
            load(tower, path)
        assert message in str(refusal.value) and str(path) in str(refusal.value)
    assert equal(state(tower), before) and not is_mask_aware(tower)


def save_weights_of(tower: Any, path: Path) -> None:
    has_start_layer = "attnpool" not in dict(tower.named_children()) and getattr(tower, "pool_type", "") != "avg"
    save_mask_aware(make_mask_aware(tower, start_layer=1) if has_start_layer else make_mask_aware(tower), path)


def test_files_that_do_not_tell_still_load(path: Path) -> None:
    quick = make_mask_aware(vit(act_layer=QuickGELU), 1)
    names = {"start_layer": 1, "interpolation": "maft", "threshold": 0.5}
    header = {"version": "0.1.0", "tower": "VisionTransformer", "settings": names}
    save_weights(quick, path, {"maft_adapter": json.dumps(header)})
    assert equal(state(load_mask_aware(vit(), path)), state(quick))


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_every_tower_takes_its_own_file(path: Path, name: str) -> None:
    kind = ZOO[name]
    tower = make_mask_aware(kind.build().eval(), **kind.settings)
    save_mask_aware(tower, path)
    images, masks = torch.randn(1, 3, *kind.size), torch.rand(1, 2, *kind.size)
    expected = tower(images, masks)
    assert torch.equal(load_mask_aware(kind.build().eval(), path)(images, masks), expected)
    for other in (kind.build().eval(), make_mask_aware(kind.build().eval(), **kind.settings)):
        load_visual(other, path)
        assert equal(state(other), state(tower))


@pytest.mark.parametrize("build", [OpenAIResNet, lambda: OpenAIResNet(one_relu=True)])
def test_names_of_activations_do_not_matter(path: Path, build: Any) -> None:
    save_mask_aware(make_mask_aware(build()), path)
    other = small_resnet()
    load_mask_aware(other, path)
    assert equal(state(other), load_file(path))


def test_the_scaling_of_lora_is_known(path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(alpha: int) -> Any:
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["c_fc"])
        return peft.inject_adapter_in_model(config, vit())

    save_mask_aware(make_mask_aware(adapted(4), 1), path)
    assert equal(state(load_mask_aware(adapted(4), path)), load_file(path))
    with pytest.raises(ValueError, match=r"c_fc\.scaling {'default': 2\.0} for {'default': 4\.0}"):
        load_mask_aware(adapted(8), path)
    with pytest.raises(ValueError, match=r"has besides .*merge LoRA into the weights"):
        load_visual(vit(), path)


# Weights that are not plain


@torch.no_grad()
def test_tied_weights(path: Path) -> None:
    def tied() -> Any:
        tower = vit()
        tower.transformer.resblocks[1].mlp = tower.transformer.resblocks[0].mlp
        return tower

    tower = make_mask_aware(tied(), 1)
    save_mask_aware(tower, path)
    images, masks = torch.randn(1, 3, 32, 32), torch.rand(1, 2, 32, 32)
    for other in (tied(), vit()):
        assert torch.equal(load_mask_aware(other, path)(images, masks), tower(images, masks))
    save_mask_aware(make_mask_aware(vit(), 1), path)
    with pytest.raises(ValueError, match=r"are one weight in this VisionTransformer, but differ in"):
        load_visual(tied(), path)


def quantized() -> Any:
    tower = make_mask_aware(vit(), 1)
    return torch.ao.quantization.quantize_dynamic(tower, {nn.Linear}, dtype=torch.qint8)


def on_meta() -> Any:
    with torch.device("meta"):
        return make_mask_aware(vit(), 1)


def sparse() -> Any:
    tower = make_mask_aware(vit(), 1)
    tower.proj = nn.Parameter(tower.proj.detach().to_sparse())
    return tower


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (quantized, r"mlp\.c_fc\._packed_params.* not a plain tensor: quantize after saving and loading"),
        (on_meta, r"class_embedding is on the meta device and has no values"),
        (sparse, r"proj is sparse: call \.to_dense\(\)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_can_not_be_saved(path: Path, build: Any, message: str) -> None:
    path.write_bytes(b"the last good checkpoint")
    with pytest.raises(ValueError, match=f"VisionTransformer can't be saved: .*{message}"):
        save_mask_aware(build(), path)
    assert path.read_bytes() == b"the last good checkpoint"


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_tower_takes_no_weights(path: Path) -> None:
    save_mask_aware(make_mask_aware(vit(), 1), path)
    with pytest.raises(ValueError, match=r"this VisionTransformer can't be loaded into: .* not a plain tensor"):
        load_visual(quantized(), path)


def test_sharded_towers_are_refused(path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}.store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tower = make_mask_aware(vit(), 1)
        save_mask_aware(tower, path)
        tower.proj = nn.Parameter(distribute_tensor(tower.proj.detach(), mesh))
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"can't be saved: proj is sharded \(DTensor\): gather it first"):
            save_mask_aware(tower, path)
        with pytest.raises(ValueError, match=r"can't be loaded into: proj is sharded .*load before sharding"):
            load_mask_aware(tower, path)
        assert path.read_bytes() == before
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
@pytest.mark.parametrize("load", [load_mask_aware, load_visual])
def test_a_tower_on_the_meta_device_gets_the_weights(path: Path, load: Any) -> None:
    tower = make_mask_aware(vit(), 1)
    save_mask_aware(tower, path)
    other = on_meta().bfloat16()
    load(other, path)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.bfloat16}
    assert equal(state(other), {name: value.bfloat16() for name, value in state(tower).items()})
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_meta_towers_that_would_stay_without_values(path: Path) -> None:
    save_mask_aware(make_mask_aware(clip_tower(), 1), path)
    with torch.device("meta"):
        tower = clip_tower()
    with pytest.raises(ValueError, match=r"position_ids on the meta device, which no checkpoint holds"):
        load_mask_aware(tower, path)
    offloaded = on_meta()
    offloaded.conv1._hf_hook = object()
    save_mask_aware(make_mask_aware(vit(), 1), path)
    with pytest.raises(ValueError, match="offloaded, and its hooks would undo loading: load before that"):
        load_mask_aware(offloaded, path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integers_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    content = state(vit())
    content["transformer.resblocks.1.mlp.c_fc.weight"] = torch.ones(64, 32, dtype=dtype)
    torch.save(content, tmp_path / "tower.pt")
    tower = vit()
    before = state(tower)
    message = rf"in another kind of number transformer\.resblocks\.1\.mlp\.c_fc\.weight {dtype} for torch\.float32"
    with pytest.raises(ValueError, match=message):
        load_visual(tower, tmp_path / "tower.pt")
    assert equal(state(tower), before)


def test_weights_that_are_not_finite_stay_what_they_are(tmp_path: Path) -> None:
    content = state(vit())
    content["proj"].fill_(torch.nan)
    torch.save(content, tmp_path / "tower.pt")
    tower = vit()
    load_visual(tower, tmp_path / "tower.pt")
    assert tower.proj is not None and tower.proj.isnan().all()


def test_other_floats_are_cast(tmp_path: Path) -> None:
    content = {name: value.half() for name, value in state(vit()).items()}
    torch.save(content, tmp_path / "tower.pt")
    tower = vit()
    load_visual(tower, tmp_path / "tower.pt")
    assert equal(state(tower), {name: value.float() for name, value in content.items()})


# Checkpoints as people have them


def small_clip(**options: Any) -> Any:
    return CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8, "mlp_ratio": 2.0},
        text_cfg={"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 3},
        **options,
    ).eval()


def prefixed(prefix: str, content: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in content.items()}


WRAPPED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "alone": lambda clip: clip,
    "ordered": OrderedDict,
    "ddp": lambda clip: {
        "epoch": 3,
        "name": "run",
        "state_dict": prefixed("module.", clip),
        "optimizer": {"state": {}},
    },
    "name": lambda clip: {"model": "ViT-B-16", "state_dict": clip},
    "model_state_dict": lambda clip: {"model_state_dict": clip, "optimizer_state_dict": {"state": {0: torch.ones(2)}}},
    "ema": lambda clip: {"ema": prefixed("module.", clip)},
    "lightning": lambda clip: {"state_dict": prefixed("net.clip.", clip), "hyper_parameters": {"lr": 1e-5}},
    "maft+": lambda clip: {"model": prefixed("backbone.clip_model.", clip)},
    "compiled": lambda clip: prefixed("_orig_mod.", clip),
    "compiled tower": lambda clip: {n.replace("visual.", "visual._orig_mod."): v for n, v in clip.items()},
    "compiled blocks": lambda clip: {re.sub(r"(resblocks\.\d+\.)", r"\1_orig_mod.", n): v for n, v in clip.items()},
    "peft": lambda clip: prefixed("base_model.model.", clip),
    "parameters": lambda clip: {name: nn.Parameter(value) for name, value in clip.items()},
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "bin"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_checkpoints_of_training_scripts(tmp_path: Path, wrapped: str, suffix: str) -> None:
    clip = small_clip()
    torch.save(WRAPPED[wrapped](state(clip)), tmp_path / f"clip.{suffix}")
    tower = vit()
    load_visual(tower, tmp_path / f"clip.{suffix}")
    assert equal(state(tower), state(clip.visual))
    assert equal(visual_weights(tmp_path / f"clip.{suffix}"), state(clip.visual))


def test_safetensors_of_any_name(tmp_path: Path) -> None:
    save_file(state(small_clip()), tmp_path / "clip.pt")
    assert len(visual_weights(tmp_path / "clip.pt")) == len(state(vit()))


def test_towers_inside_other_wrappers(tmp_path: Path) -> None:
    torch.save(state(vit()), tmp_path / "tower.pt")
    for wrap in (torch.compile, nn.DataParallel):
        tower = vit()
        wrapped: Any = wrap(tower)
        load_visual(wrapped, tmp_path / "tower.pt")
        assert equal(state(tower), visual_weights(tmp_path / "tower.pt"))


def test_towers_of_timm(tmp_path: Path) -> None:
    def build() -> Any:
        return timm_vit("vit_base_patch16_siglip_224", "map", "none")

    tower = build()
    torch.save(prefixed("visual.", state(tower)), tmp_path / "clip.pt")
    torch.save(state(tower.trunk), tmp_path / "bare.pt")
    for name in ("clip.pt", "bare.pt"):
        other = build()
        load_visual(other, tmp_path / name)
        assert equal(state(other), state(tower))
    assert equal(visual_weights(tmp_path / "clip.pt"), state(tower))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["CLIPVisionModelWithProjection", "CLIPVisionModel", "SiglipVisionModel"])
def test_towers_of_transformers(tmp_path: Path, kind: str, file: str) -> None:
    tower = transformers_tower(kind)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    names = ("SiglipConfig", "SiglipModel") if kind.startswith("Siglip") else ("CLIPConfig", "CLIPModel")
    config, model = (getattr(transformers, name) for name in names)
    projection = {} if kind.startswith("Siglip") else {"projection_dim": 16}
    whole = model(config(text_config=text, vision_config=tower.config.to_dict(), **projection))
    if file == "model.safetensors":
        whole.save_pretrained(tmp_path)
    else:
        # as versions before 4.31 wrote them
        ids = {f"{part}.embeddings.position_ids": torch.arange(17)[None] for part in ("vision_model", "text_model")}
        torch.save({**whole.state_dict(), **ids}, tmp_path / file)
    load_visual(tower, tmp_path / file)
    expected = whole.state_dict()
    # Beside a projection, and around every tower of transformers before 5.6, there is a `vision_model`.
    place = "" if hasattr(tower, "vision_model") else "vision_model."
    assert all(torch.equal(value, expected[place + name]) for name, value in tower.state_dict().items())
    alone = visual_weights(tmp_path / file)
    assert all(
        torch.equal(alone[name], expected[f"vision_model.{name}"]) for name in alone if "position_ids" not in name
    )
    assert "embeddings.patch_embedding.weight" in alone


def test_a_part_that_the_tower_lacks_is_not_passed_over(tmp_path: Path) -> None:
    torch.save(prefixed("visual.", {**state(vit()), "ln_extra.weight": torch.ones(32)}), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"it has besides ln_extra\.weight"):
        load_visual(vit(), tmp_path / "clip.pt")
    save_mask_aware(make_mask_aware(clip_tower(), 1), tmp_path / "projected.safetensors")
    with pytest.raises(ValueError, match=r"CLIPVisionModel: it (has besides|lacks)"):
        load_mask_aware(transformers_tower("CLIPVisionModel"), tmp_path / "projected.safetensors")


@pytest.mark.parametrize("where", [("model", "ema"), ("student", "teacher"), ("a.visual", "b.visual")])
def test_which_of_two_towers_is_not_guessed(tmp_path: Path, where: tuple[str, str]) -> None:
    first, second, tower = state(vit()), state(vit()), vit()
    before = state(tower)
    torch.save({where[0]: first, where[1]: second}, tmp_path / "two.pt")
    names = f"under '{where[0]}.' and '{where[1]}.'" if "model" not in where else r"under 'ema\.' and 'model\.'"
    with pytest.raises(ValueError, match=f"holds image towers that differ, {names}"):
        load_visual(tower, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="holds image towers that differ"):
        visual_weights(tmp_path / "two.pt")
    assert equal(state(tower), before)
    torch.save({where[0]: first, where[1]: {n: v.clone() for n, v in first.items()}}, tmp_path / "same.pt")
    load_visual(tower, tmp_path / "same.pt")
    assert equal(state(tower), first)
    torch.save({where[0]: first, where[1]: state(vit(width=64))}, tmp_path / "one_fits.pt")
    load_visual(vit(), tmp_path / "one_fits.pt")
    assert equal(state(tower), first)


def test_a_frozen_copy_is_not_taken_for_the_tuned_tower(tmp_path: Path) -> None:
    tuned = prefixed("IPCLIP.", state(vit(layers=2)))
    torch.save({**tuned, **prefixed("clip_adapter.clip_model.visual.", state(vit()))}, tmp_path / "maft.pt")
    with pytest.raises(ValueError, match=r"it lacks transformer\.resblocks\.2\.ln_1\.weight"):
        load_visual(vit(), tmp_path / "maft.pt")
    assert visual_weights(tmp_path / "maft.pt").keys() == state(vit(layers=2)).keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("half", [False, True])
def test_torchscript_archives(tmp_path: Path, half: bool) -> None:
    clip = small_clip(quick_gelu=True)
    if half:
        clip.visual.half().float()
    traced = torch.jit.trace_module(clip, {"encode_image": (torch.randn(1, 3, 32, 32),)}, check_trace=False)
    (traced.half() if half else traced).save(tmp_path / "whole.pt")
    # Without its code: that it loads all the same shows that none of it is run.
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "clip.pt", "w") as part:
        for name in whole.namelist():
            part.writestr(name, b"no code" if "/code/" in name else whole.read(name))
    for name in ("whole.pt", "clip.pt"):
        tower = vit(act_layer=QuickGELU)
        load_visual(tower, tmp_path / name)
        expected = state(clip.visual)
        assert equal(state(tower), {n: v.half().float() for n, v in expected.items()} if half else expected)
        gelu = vit()
        before = state(gelu)
        with pytest.raises(ValueError, match=r"QuickGELU for GELU.*a name that ends in -quickgelu"):
            load_visual(gelu, tmp_path / name)
        assert equal(state(gelu), before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty; download or copy it again"),
        (b"\n<!DOCTYPE html><html>Google Drive can't scan this file for viruses</html>", "it is a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "a pointer of git-lfs.* run git lfs pull",
        ),
        (b'{"metadata": {"total_size": 1}, "weight_map": {}}', "it is the index of a checkpoint in several files"),
        (b"not a checkpoint at all", "it is neither safetensors nor what torch.save wrote"),
        (b"PK\x03\x04 and no more of the archive", "can't be read"),
        (b"\x80\x02 and no pickle", "can't be read"),
        (b"\xff\x00\x00\x00\x00\x00\x00\x00{ and no more of the header", "it is neither safetensors nor"),
        (pickle.dumps({"a": [1]}), "can't be read"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "tower.safetensors"
    file.write_bytes(content)
    for read in (lambda: load_visual(vit(), file), lambda: load_mask_aware(vit(), file), lambda: visual_weights(file)):
        with pytest.raises(ValueError, match=rf"tower\.safetensors.*{message}"):
            read()


def test_folders_and_archives_and_pickles(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; name the file in it"):
        load_visual(vit(), tmp_path)
    with pytest.raises(FileNotFoundError):
        load_visual(vit(), tmp_path / "missing.pt")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("one.txt", "1")
    with pytest.raises(ValueError, match=r"photos\.zip can't be read; it is damaged, or no checkpoint"):
        load_visual(vit(), tmp_path / "photos.zip")
    torch.save({"state_dict": state(vit()), "args": argparse.Namespace(lr=1e-5)}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"needs code to be run \(argparse\.Namespace\).*write its tensors alone"):
        load_visual(vit(), tmp_path / "run.pt")
    torch.save(vit(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"needs code to be run \(open_clip\.transformer\.VisionTransformer\)"):
        load_visual(vit(), tmp_path / "model.pt")
    for nothing in ([1, 2], torch.ones(2), {}, {"a": None}):
        torch.save(nothing, tmp_path / "nothing.pt")
        with pytest.raises(ValueError, match=r"nothing\.pt holds no CLIP image tower"):
            load_visual(vit(), tmp_path / "nothing.pt")


@pytest.mark.parametrize(
    "header",
    ["[]", "{}", "3", "not json", '{"version": "1", "tower": "x"}', '{"version": 1, "tower": 1, "settings": 1}'],
)
@pytest.mark.parametrize("key", ["maft_adapter", "maft_adapter.arithmetic"])
def test_damaged_settings(path: Path, header: str, key: str) -> None:
    save_weights(vit(), path, {key: header})
    with pytest.raises(ValueError, match=r"tower\.safetensors can't be read"):
        load_mask_aware(vit(), path)


@pytest.mark.parametrize(
    "damaged",
    [
        {"start_layer": 99}, {"start_layer": "1"}, {"start_layer": None}, {"start_layer": True}, {"threshold": "0.5"},
        {"threshold": 7}, {"interpolation": [1]}, {"interpolation": "nearest"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_no_tower_has(path: Path, damaged: dict[str, Any]) -> None:
    header = {"version": __version__, "tower": "VisionTransformer", "settings": {"start_layer": 1, **damaged}}
    save_weights(vit(), path, {"maft_adapter": json.dumps(header)})
    tower = vit()
    before = state(tower)
    with pytest.raises(ValueError, match=r"tower\.safetensors can't be (read|loaded)"):
        load_mask_aware(tower, path)
    assert equal(state(tower), before) and not is_mask_aware(tower)


@pytest.mark.parametrize("arithmetic", [{"functions": [], "numbers": {}}, {"functions": {}, "numbers": 3}], ids=str)
def test_arithmetic_that_tells_nothing(path: Path, arithmetic: Any) -> None:
    save_weights(vit(), path, {"maft_adapter.arithmetic": json.dumps(arithmetic)})
    for load in (load_mask_aware, load_visual):
        with pytest.raises(ValueError, match=r"tower\.safetensors can't be read.*metadata are not those"):
            load(vit(), path)


# Any weights, and any bytes in place of a file

in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Tree(nn.Module):
    """Parameters under any dotted names, such as "blocks.0.weight"."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            *path, leaf = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.register_parameter(leaf, nn.Parameter(value))


def draw_weights(data: st.DataObject) -> dict[str, torch.Tensor]:
    folders = st.lists(st.sampled_from(["blocks", "0", "1", "attn", "visual"]), max_size=3)
    leaves = st.sampled_from(["weight", "bias", "proj"])
    names = data.draw(st.lists(st.tuples(folders, leaves), min_size=1, max_size=6, unique_by=str))
    return {
        ".".join([*folder, leaf]): torch.randn(
            data.draw(st.lists(st.integers(0, 3), max_size=3)), dtype=data.draw(st.sampled_from(DTYPES))
        )
        for folder, leaf in names
    }


@in_one_folder
@given(data=st.data())
def test_any_weights_come_back_from_wherever_they_lie(path: Path, data: st.DataObject) -> None:
    weights = draw_weights(data)
    saved, loaded = Tree(weights), Tree({name: torch.zeros_like(value) for name, value in weights.items()})
    if data.draw(st.booleans()):
        save_weights(saved, path)
        assert equal(load_file(path), state(saved))
    else:
        content: dict[str, Any] = state(saved)
        for part in data.draw(st.lists(st.sampled_from(["module", "state_dict", "IPCLIP", "_orig_mod"]), max_size=3)):
            content = {part: content} if data.draw(st.booleans()) else prefixed(f"{part}.", content)
        if data.draw(st.booleans()):
            content = {
                "model": content,
                "epoch": 3,
                "optimizer": {"state": {0: torch.ones(2)}},
                "scale": torch.ones(()),
            }
        torch.save(content, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    load_visual(loaded, path)
    assert equal(state(loaded), weights)


SMALL: dict[str, Any] = {"image_size": 16, "width": 8, "heads": 2, "layers": 1, "output_dim": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small tower in every kind of file that is read."""
    path, tower = tmp_path_factory.mktemp("files") / "tower", vit(**SMALL)
    files = {}
    for zipped in (True, False):
        torch.save({"visual": tower.state_dict()}, path, _use_new_zipfile_serialization=zipped)
        files["zip" if zipped else "legacy"] = path.read_bytes()
    torch.jit.trace(tower, torch.randn(1, 3, 16, 16), check_trace=False).save(str(path))
    files["TorchScript"] = path.read_bytes()
    save_mask_aware(make_mask_aware(tower, 1), path)
    return {**files, "safetensors": path.read_bytes()}


@in_one_folder
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")  # of torch.jit
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "TorchScript", "nothing known"])
def test_damaged_files_say_so_and_change_nothing(
    tmp_path: Path, files: dict[str, bytes], kind: str, data: st.DataObject
) -> None:
    if kind == "nothing known":
        start = data.draw(st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x08" + b"\0" * 7 + b"{"]))
        content = bytearray(start + data.draw(st.binary(max_size=300)))
    else:
        content = bytearray(files[kind])
        for _ in range(data.draw(st.integers(1, 3))):
            # half of the places among the first, where headers are, or the last, where archives have theirs
            near = data.draw(st.sampled_from([len(content), 2000, -2000]))
            place = data.draw(st.integers(0, max(1, min(abs(near), len(content))) - 1)) * (1 if near > 0 else -1)
            change = data.draw(st.sampled_from(["cut off", "left out", "put in", "changed"]))
            if change == "cut off":
                del content[place:]
            elif change == "left out":
                del content[place : place + data.draw(st.integers(1, 40))]
            elif change == "put in":
                content[place:place] = data.draw(st.binary(min_size=1, max_size=40))
            elif content:
                content[place] = data.draw(st.integers(0, 255))
    file = tmp_path / "tower"
    file.write_bytes(content)
    for load in (load_visual, load_mask_aware):
        tower = vit(**SMALL)
        before = state(tower)
        try:
            load(tower, file)
        except ValueError as error:
            assert str(file) in str(error) and equal(state(tower), before) and not is_mask_aware(tower)


def test_a_file_knows_whether_its_tower_was_fine_tuned(path: Path) -> None:
    tower = make_mask_aware(vit(), 1)
    save_mask_aware(tower, path)
    assert load_mask_aware(vit(), path).fine_tuned is False
    tower.fine_tuned = True  # as finetune marks it
    save_mask_aware(tower, path)
    assert load_mask_aware(vit(), path).fine_tuned is True
    other = make_mask_aware(vit(), 1)
    load_visual(other, path)
    assert other.fine_tuned
    torch.save(vit().state_dict(), path)
    load_visual(other, path)  # an old mark does not stay
    assert not other.fine_tuned
    torch.save({f"IPCLIP.{name}": value for name, value in vit().state_dict().items()}, path)
    load_visual(other, path)
    assert other.fine_tuned
