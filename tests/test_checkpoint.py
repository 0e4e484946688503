"""Checkpoints: what is written, what it loads into, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import CLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from maft_adapter import __version__, is_mask_aware, load_mask_aware, make_mask_aware, save_mask_aware
from maft_adapter.checkpoint import load_visual, save_weights


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
    assert header == {"version": __version__, "tower": "VisionTransformer", "settings": settings}


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


def test_files_are_not_executed(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"IPCLIP.conv1.weight": Malicious()}, tmp_path / "maft.pt")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        load_visual(vit(), tmp_path / "maft.pt")
    assert not (tmp_path / "executed").exists()
