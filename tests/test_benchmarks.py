import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from maft_adapter import make_mask_aware

encoder: Any = pytest.importorskip("benchmarks.encoder", reason="benchmarks/ lies beside tests/ in a checkout only")

WIDTH, DEPTH, PATCH, NATIVE, EMBED = 32, 4, 8, 32, 16
CONFIG = {
    "embed_dim": EMBED,
    "vision_cfg": {
        "layers": DEPTH,
        "width": WIDTH,
        "head_width": 16,
        "patch_size": PATCH,
        "image_size": NATIVE,
    },
    "text_cfg": {"layers": 1, "width": 16, "heads": 2, "context_length": 8, "vocab_size": 64},
}
SIZE, LAYER = 48, 2


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """Name of a small model that open_clip knows."""
    path = tmp_path / "maft-adapter-tiny.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)
    return path.stem


def block(queries: int, keys: int, pairs: int, trained: int = 1, frozen: int = 1) -> int:
    """Multiply-accumulates of one block by hand; `pairs` is how many logits attention computes.

    A backward pass costs as much again for the gradient of each input and of each trained weight. So in
    training everything counts three times (attention's products have two inputs), and the frozen MLP twice.
    """
    projections = queries * WIDTH**2 + keys * 2 * WIDTH**2 + queries * WIDTH**2  # q; k and v; out
    attention = 2 * pairs * WIDTH  # logits and weighted sums
    mlp = 2 * queries * WIDTH * 4 * WIDTH
    return trained * (projections + attention) + frozen * mlp


def stem(patches: int) -> int:
    """The frozen patch embedding, whose input needs no gradient: never counted in a backward pass."""
    return patches * 3 * PATCH**2 * WIDTH


def head(embeddings: int) -> int:
    return embeddings * WIDTH * EMBED


def test_macs_by_hand(tiny: str) -> None:
    n, p = 7, (SIZE // PATCH) ** 2
    crop = (NATIVE // PATCH) ** 2  # patches of one crop
    plain_block = block(1 + p, 1 + p, (1 + p) ** 2)
    split_block = block(n + p, n + p, p * p + n * p)
    last_block = block(n, n + p, n * p)
    dense_block = block(n + p, n + p, (n + p) ** 2)
    expected = {
        "plain": stem(p) + DEPTH * plain_block + head(1),
        "mask-aware": stem(p) + LAYER * plain_block + split_block + last_block + head(n),
        "dense form": stem(p) + LAYER * plain_block + 2 * dense_block + head(n),
        "mask & crop": n * (stem(crop) + DEPTH * block(1 + crop, 1 + crop, (1 + crop) ** 2) + head(1)),
    }
    report = encoder.benchmark(tiny, SIZE, LAYER, [n], repeats=1)
    assert {row["name"]: round(row["gmacs"] * 1e9) for row in report["encoder"]} == expected
    for row in report["encoder"]:
        assert row["proposals"] == n
        assert row["macs_ratio"] == pytest.approx(expected[row["name"]] / expected["plain"])

    n = 100  # of the training step
    plain_block = block(1 + p, 1 + p, (1 + p) ** 2, trained=3, frozen=2)
    split_block = block(n + p, n + p, p * p + n * p, trained=3, frozen=2)
    last_block = block(n, n + p, n * p, trained=3, frozen=2)
    dense_block = block(n + p, n + p, (n + p) ** 2, trained=3, frozen=2)
    plain_step = stem(p) + DEPTH * plain_block + 3 * head(1)
    expected = {
        "two dense passes": plain_step + stem(p) + LAYER * plain_block + 2 * dense_block + 3 * head(n),
        "mask-aware": plain_step + split_block + last_block + 3 * head(n),
    }
    assert {row["name"]: round(row["gmacs"] * 1e9) for row in report["training"]} == expected


def test_fast_path_is_left_as_it_was(tiny: str) -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError):
        encoder.count_macs(lambda: 1 / 0)
    assert torch.backends.mha.get_fastpath_enabled()


def test_peak_memory_counts_what_lives_together() -> None:
    before = torch.empty(3000, dtype=torch.uint8)

    def run() -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        second = before.clone()  # 4000 bytes here
        del first, second
        torch.empty(3500, dtype=torch.uint8)

    assert encoder.peak_memory(run) == 4000


def test_every_round_runs_every_way_and_starts_with_another() -> None:
    runs: list[str] = []
    ways = {name: lambda name=name: runs.append(name) for name in "abc"}
    seconds = encoder.interleaved_seconds(ways, 4)
    assert "".join(runs) == "abcbcacababc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_ratios_are_to_the_first_way() -> None:
    small, large = torch.ones(8, 8), torch.ones(16, 16)
    one, four = encoder.compare({"one": lambda: small @ small, "four": lambda: large @ large}, 0, 3)
    assert (one["macs_ratio"], one["time_ratio"], one["peak_ratio"]) == (1, 1, 1)
    assert (four["macs_ratio"], four["peak_ratio"]) == (8, 4)
    low, high = four["time_ratio_quartiles"]
    assert low <= four["time_ratio"] <= high


def test_dense_form_gives_the_same_embeddings(tiny: str) -> None:
    visual = make_mask_aware(open_clip.create_model(tiny).visual.eval(), LAYER)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, SIZE, SIZE, generator=generator)
    masks = encoder.random_masks(5, SIZE, generator)
    with torch.no_grad():
        expected = visual(images, masks)
        actual = encoder.dense_encode(visual, images, masks)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_random_masks_are_rectangles_inside_the_image() -> None:
    masks = encoder.random_masks(50, SIZE, torch.Generator().manual_seed(0))
    assert masks.shape == (1, 50, SIZE, SIZE)
    assert masks.dtype == torch.bool
    rows, columns = masks[0].any(2).sum(1), masks[0].any(1).sum(1)  # (50,) heights and widths
    assert torch.equal(masks[0].sum((1, 2)), rows * columns)
    assert rows.min() >= SIZE // 8 - 1
    assert rows.max() <= SIZE * 7 // 8 + 1


def test_command_prints_tables_and_writes_json(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "encoder.json"
    arguments = ["--model", tiny, "--image-size", str(SIZE), "--start-layer", str(LAYER), "--repeats", "1"]
    encoder.main([*arguments, "--proposals", "2", "100", "--out", str(out)])
    report = json.loads(out.read_text())
    names = ["plain", "mask-aware", "dense form", "mask & crop"]
    assert [(row["name"], row["proposals"]) for row in report["encoder"]] == [
        (name, n) for n in (2, 100) for name in names
    ]
    assert [row["name"] for row in report["training"]] == ["two dense passes", "mask-aware"]
    limits = [target["limit"] for target in report["targets"]]
    assert limits == ["<= 0.97", "<= 1", "<= 1", "<= 1.1", "<= 0.7", ">= 18"]
    printed = capsys.readouterr().out
    for row in report["encoder"] + report["training"]:
        assert f"| {row['name']} | {row['proposals']} |" in printed
    for target in report["targets"]:
        assert f"| {target['name']} | {target['limit']} | {target['measured']:.3f} |" in printed


@pytest.mark.parametrize("measured, met", [(0.9, True), (1.3, False)])
def test_targets_say_whether_they_are_met(measured: float, met: bool) -> None:
    def row(name: str, ratio: float, gmacs: float) -> dict[str, Any]:
        ratios = dict.fromkeys(("macs_ratio", "time_ratio", "peak_ratio"), ratio)
        return {"name": name, "proposals": 100, "gmacs": gmacs} | ratios

    rows = [
        row("plain", 1, 1),
        row("mask-aware", measured, measured),
        row("dense form", 1.2, 1),
        row("mask & crop", 18, 18),
    ]
    training = [row("two dense passes", 1, 1), row("mask-aware", measured - 0.25, 1)]
    found = encoder.targets(rows, training)
    assert [target["met"] for target in found] == [met] * len(found)
    assert len(found) == 6
    assert encoder.targets(rows[:0], training) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--proposals", "0"], "0 is not a positive number"),
        (["--repeats", "-1"], "-1 is not a positive number"),
        (["--out", "missing-folder/encoder.json"], "missing-folder does not exist"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        encoder.main(arguments)
    assert message in capsys.readouterr().err


def test_bad_image_size_is_refused_first(tiny: str) -> None:
    with pytest.raises(ValueError, match="50x50"):
        encoder.benchmark(tiny, 50, LAYER, [1], repeats=1)
