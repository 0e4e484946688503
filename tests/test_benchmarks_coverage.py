import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from maft_adapter.masks import mean_weights
from maft_adapter.towers import average, base, class_token
from maft_adapter.towers.base import MaskAwareTower

coverage: Any = pytest.importorskip("benchmarks.coverage", reason="benchmarks/ lies beside tests/ in a checkout only")

TOWERS = {
    "class token": ["ViT-B-32", "ViT-M-16-alt", "coca_base", "EVA02-B-16", "MobileCLIP2-L-14"],
    "learned query": ["coca_ViT-B-32", "ViT-B-32-SigLIP2-256", "PE-Core-T-16-384"],
    "attention pool": ["RN50"],
    "average": [
        "convnext_tiny",
        "MobileCLIP2-S3",  # a stride of 64, and a last stage that attends to everything: the least local of all
        "swin_base_patch4_window7_224",
        "ViT-L-14-CLIPA",
        "vit_medium_patch16_gap_256",
        "ViTamin-S",
    ],
}
REFUSED = "vit_relpos_medium_patch16_cls_224"


@pytest.mark.parametrize("family, name", [(family, name) for family, names in TOWERS.items() for name in names])
def test_verified(family: str, name: str) -> None:
    row = coverage.cover(name)
    assert (row["family"], row["status"], row["reason"]) == (family, "verified", "")
    responses = row["responses"]
    assert min(responses["textures"], responses["inside"]) > 100 * 1e-6
    if family in ("attention pool", "average"):
        assert responses["outside"] < responses["inside"]
        assert responses["full_mask"] < 1e-5


def test_small_tower_keeps_what_the_configuration_says() -> None:
    configuration = open_clip.get_model_config("ViT-bigG-14-CLIPA-336")
    before = copy.deepcopy(configuration)
    with torch.device("meta"):
        full = coverage.build(configuration)
    assert (len(full.transformer.resblocks), full.conv1.out_channels) == (48, 1664)
    small = coverage.build_small(configuration, full)
    assert configuration == before
    assert not small.training
    assert (small.image_size, small.patch_size) == ((336, 336), (14, 14))
    assert (small.pool_type, small.final_ln_after_pool, small.output_dim) == ("avg", True, 1280)
    assert sum(p.numel() for p in small.parameters()) < 1e6


def test_timm_is_left_as_it_was() -> None:
    create_model = coverage.timm.create_model
    with pytest.raises(TypeError, match="no_such_argument"):
        coverage.build(open_clip.get_model_config("convnext_tiny"), no_such_argument=1)
    assert coverage.timm.create_model is create_model


def test_unknown_timm_class_stays_as_it_is() -> None:
    assert coverage.small_timm_arguments(torch.nn.Linear(1, 1)) == {}


@pytest.mark.parametrize(
    ("name", "library", "family", "status"),
    [
        ("resnet18", "timm", "average", "verified"),
        ("resnet18 avg", "timm", "average", "verified"),
        ("mobilenetv3_small_050", "timm", None, None),
        ("beit_base_patch16_224", "timm", None, None),
        ("CLIPVisionModelWithProjection", "transformers", "class token", "verified"),
        ("SiglipVisionModel", "transformers", "learned query", "verified"),
        ("Siglip2VisionModel", "transformers", None, "refused"),
    ],
)
def test_towers_of_timm_and_transformers(name: str, library: str, family: str | None, status: str | None) -> None:
    row = coverage.cover(name, library)
    assert row["status"] != "failed", row["reason"]
    assert family is None or row["family"] == family
    assert status is None or row["status"] == status, row["reason"]


class GenLip(torch.nn.Module):
    """The image side of open_clip 4's `NaFlexGenLip`, of patches that were cut before; its trunk reads words, too."""

    def __init__(self, embed_dim: int, **configuration: Any) -> None:
        super().__init__()
        visual: Any = torch.nn.Module()
        visual.patch_embed, visual.trunk = torch.nn.Linear(768, embed_dim), torch.nn.Module()
        visual.trunk.layers = torch.nn.ModuleList([torch.nn.Linear(embed_dim, embed_dim)])
        visual.image_size, visual.pool_type = (256, 256), "avg"
        visual.proj = torch.nn.Identity()
        self.visual = visual


def test_towers_of_open_clip_4_are_refused_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    configurations: dict[str, Any] = {
        "naflexgenlip_test": {"embed_dim": 64, "genlip_cfg": {}, "vision_cfg": {"in_chans": 3}, "text_cfg": {}},
        "naflexclap_test": {"embed_dim": 64, "audio_cfg": {}, "text_cfg": {}},  # no image tower
    }
    monkeypatch.setitem(sys.modules, "open_clip.naflex_genlip_model", SimpleNamespace(NaFlexGenLip=GenLip))
    monkeypatch.setattr(open_clip, "list_models", lambda: list(configurations))
    monkeypatch.setattr(open_clip, "get_model_config", configurations.get)
    assert coverage.open_clip_names() == ["naflexgenlip_test"]
    row = coverage.cover("naflexgenlip_test")
    assert (row["status"], row["family"]) == ("refused", "none"), row["reason"]


def test_refused() -> None:
    row = coverage.cover(REFUSED)
    assert (row["family"], row["status"], row["responses"]) == ("class token", "refused", None)
    assert "RelPosAttention) has rel_pos, unknown here" in row["reason"]


def test_refusal_that_changes_the_tower_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_patched(visual: Any, **settings: Any) -> None:
        class_token.patch(visual, 0)
        raise ValueError("too late")

    monkeypatch.setattr(coverage, "make_mask_aware", half_patched)
    row = coverage.cover("ViT-B-32")
    assert (row["status"], row["reason"]) == ("failed", "refused, but changed nevertheless: too late")


def small(name: str) -> Any:
    configuration = open_clip.get_model_config(name)
    with torch.device("meta"):
        full = coverage.build(configuration)
    return coverage.build_small(configuration, full)


def attention_bias_without_masks(masks: Tensor, grid: tuple[int, int], dtype: torch.dtype, *_: Any) -> Tensor:
    return torch.zeros(len(masks), 1, masks.shape[1], grid[0] * grid[1], dtype=dtype)


def mean_weights_without_masks(masks: Tensor, grid: tuple[int, int], seen: Any) -> Tensor:
    cells = grid[0] * grid[1]
    return torch.full((*masks.shape[:2], cells), 1 / cells)


@pytest.mark.parametrize(
    "family, name, function, replacement",
    [
        (base, "ViT-B-32", "attention_bias", attention_bias_without_masks),
        (base, "EVA02-B-16", "attention_bias", attention_bias_without_masks),
        (base, "ViT-B-32-SigLIP2-256", "attention_bias", attention_bias_without_masks),
        (base, "RN50", "attention_bias", attention_bias_without_masks),
        (average, "convnext_tiny", "mean_weights", mean_weights_without_masks),
        (average, "ViT-L-14-CLIPA", "mean_weights", mean_weights_without_masks),
    ],
)
def test_family_that_ignores_its_masks_fails(
    family: Any, name: str, function: str, replacement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, function, replacement)
    row = coverage.cover(name)
    assert row["status"] == "failed"
    assert row["reason"].startswith("two masks over two textures give one embedding")
    assert coverage.exit_status([row]) == 1


def test_masks_upside_down_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average, "mean_weights", lambda masks, *grid: mean_weights(1 - masks, *grid))
    row = coverage.cover("convnext_tiny")
    assert row["reason"].startswith("a change outside the mask moves its embedding as much as one under it")


def test_tower_that_embeds_masks_but_no_images_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = class_token._ClassTokenTower._ask

    def blind(self: Any, features: tuple[Tensor, ...], *on: Any) -> Tensor:
        same = [torch.arange(x[0].numel()).sin().view_as(x[0]).expand_as(x) for x in features]  # whatever the image
        return ask(self, tuple(same), *on)

    monkeypatch.setattr(class_token._ClassTokenTower, "_ask", blind)
    row = coverage.cover("ViT-B-32")
    assert row["reason"].startswith("a change under the mask does not move its embedding")


def test_wrong_weights_of_a_mean_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average, "mean_weights", lambda *masks: 1.001 * mean_weights(*masks))
    row = coverage.cover("RN50")
    assert row["status"] == "verified"  # another family
    row = coverage.cover("vit_medium_patch16_gap_256")  # without a norm after the mean, which would hide the factor
    assert row["status"] == "refused"
    assert "a full mask does not give" in row["reason"]


def test_unpatched_tower_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "make_mask_aware", lambda visual, **settings: visual)
    monkeypatch.setattr(coverage, "restore", lambda visual: visual)
    row = coverage.cover("RN50")
    assert (row["status"], row["reason"]) == ("failed", "came back unpatched, without a refusal")


def test_output_without_masks_off_by_one_bit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MaskAwareTower.plain

    def off(self: Any, images: Tensor, **options: Any) -> Tensor:
        output = plain(self, images, **options)
        output[-1, -1] = torch.nextafter(output[-1, -1], torch.tensor(torch.inf))
        return output

    monkeypatch.setattr(MaskAwareTower, "plain", off)
    with pytest.raises(coverage.Failed, match="without masks the output is not what it was"):
        coverage.verify(small("ViT-B-32"), class_token)


def test_not_finite_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty_is_nan(masks: Tensor, grid: tuple[int, int], seen: Any) -> Tensor:
        share = torch.nn.functional.adaptive_avg_pool2d(masks, grid).flatten(2)  # (B, N, hw)
        return share / share.sum(-1, keepdim=True)

    monkeypatch.setattr(average, "mean_weights", empty_is_nan)
    assert coverage.cover("convnext_tiny")["reason"] == "embeddings are not finite"


def leave_it(visual: Any) -> None:
    pass


def move_a_weight(visual: Any) -> None:
    restore(visual)
    with torch.no_grad():
        visual.conv1.weight[0, 0, 0, 0] += 1


def leave_a_setting(visual: Any) -> None:
    restore(visual)
    visual.register_buffer("start_layer", torch.tensor(1))


restore = coverage.restore


@pytest.mark.parametrize(
    "undo, message",
    [
        (leave_it, "restore leaves other classes"),
        (move_a_weight, "changes the state_dict"),
        (leave_a_setting, "changes the state_dict"),
    ],
)
def test_restore_that_does_not_fails(undo: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = small("ViT-B-32")
    monkeypatch.setattr(coverage, "restore", undo)
    with pytest.raises(coverage.Failed, match=message):
        coverage.verify(tower, class_token)


def test_small_tower_of_other_classes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    other = small("ViT-M-16-alt")  # with LayerScale
    monkeypatch.setattr(coverage, "build_small", lambda configuration, full: other)
    row = coverage.cover("ViT-M-16")
    assert row["status"] == "failed"
    assert "LayerScale" in row["reason"]


def test_configuration_that_cannot_be_built_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = open_clip.get_model_config("convnext_tiny")
    configuration["vision_cfg"]["timm_model_name"] = "convnext_of_another_timm"
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: configuration)
    row = coverage.cover("convnext_tiny")
    assert (row["family"], row["status"]) == ("none", "failed")
    assert row["reason"].startswith("RuntimeError: Unknown model (convnext_of_another_timm)")


def test_scene_changes_what_the_masks_show() -> None:
    images, masks = coverage.scene((20, 40))
    assert images.shape == (2, 3, 20, 40)
    assert masks.shape == (2, 4, 20, 40)
    assert torch.equal(masks.sum((2, 3)), torch.tensor([13 * 20, 13 * 20, 40 * 20, 0.0]).expand(2, 4))
    assert not (masks[0, 0] * masks[0, 1]).any()
    moved = (images[1] - images[0]).abs().sum(0)  # (H, W)
    assert (moved * masks[0, 0]).sum() > 0
    assert not (moved * (1 - masks[0, 0])).any()


def row(name: str, family: str, status: str, classes: str = "") -> dict[str, Any]:
    reason = "" if status == "verified" else f"why {name}"
    described = {"name": name, "library": "open_clip", "family": family, "classes": [classes]}
    return {**described, "status": status, "reason": reason, "responses": None}


ROWS = [
    row("roberta-a", "class token", "verified", "ViT"),
    row("a", "class token", "verified", "ViT"),
    row("b-of-another-kind", "class token", "verified", "EVA"),
    row("c", "class token", "refused", "RelPos"),
    row("e", "none", "failed"),
    row("d", "average", "verified", "ConvNeXt"),
]


def test_table() -> None:
    assert coverage.as_markdown(ROWS).splitlines() == [
        "| family | towers, one of each kind | towers in all | verified | refused | failed |",
        "|---|---|---:|---:|---:|---:|",
        "| class token | a, b-of-another-kind | 4 | 3 | 1 | 0 |",
        "| average | d | 1 | 1 | 0 | 0 |",
        "| none |  | 1 | 0 | 0 | 1 |",
        "",
        "- refused: why c: `c`",
        "- failed: why e: `e`",
        "",
        "4 of 6 towers verified",
    ]


@pytest.mark.parametrize(
    "verified, refused, failed, status", [(140, 4, 0, 0), (139, 5, 0, 1), (143, 0, 1, 1), (0, 0, 1, 1), (1, 0, 0, 0)]
)
def test_exit_status(verified: int, refused: int, failed: int, status: int) -> None:
    counts = {"verified": verified, "refused": refused, "failed": failed}
    rows = [row(f"{name}-{i}", "average", name) for name, count in counts.items() for i in range(count)]
    assert coverage.exit_status(rows) == status


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "coverage.json"
    assert coverage.main(["ViT-B-32", REFUSED, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["name"], row["status"]) for row in rows] == [("ViT-B-32", "verified"), (REFUSED, "refused")]
    captured = capsys.readouterr()
    assert "| class token | ViT-B-32 | 2 | 1 | 1 | 0 |" in captured.out
    assert "- refused: trunk.blocks.0.attn (RelPosAttention) has rel_pos, unknown here" in captured.out
    assert f": `{REFUSED}`" in captured.out
    assert "1 of 2 towers verified\n\nin " in captured.out
    assert "2/2" in captured.err


def test_command_over_all_that_open_clip_lists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_fails(name: str, library: str) -> dict[str, Any]:
        return {**row(name, "average", "failed" if name == "RN50" else "verified"), "library": library}

    monkeypatch.setattr(coverage, "cover", one_fails)
    assert coverage.main([]) == 1
    count, printed = len(coverage.open_clip_names()), capsys.readouterr().out
    assert f"{count - 1} of {count} towers verified" in printed
    assert all(f"## {library} " in printed for library in ("open_clip", "timm", "transformers"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ViT-B-32", "ViT-Z-1"], "is called ViT-Z-1"),
        (["--out", "missing-folder/coverage.json"], "missing-folder does not exist"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        coverage.main(arguments)
    assert message in capsys.readouterr().err
