import json
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import open_clip_tower, plain_tower, random_images

from maft_adapter import make_mask_aware

encoder: Any = pytest.importorskip("benchmarks.encoder", reason="benchmarks/ lies beside tests/ in a checkout only")

WIDTH, DEPTH, PATCH, NATIVE, EMBED = 32, 4, 8, 32, 16
SIZE, LAYER = 48, 2


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the promised model, small, with small masks for its photographs."""
    monkeypatch.setitem(encoder.MODELS, encoder.PROMISED, lambda: open_clip_tower(layers=DEPTH, mlp_ratio=4.0))
    monkeypatch.setattr(encoder, "MASK_SIZES", ((20, 20), (30, 40)))
    return encoder.PROMISED


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
    n, p = 100, (SIZE // PATCH) ** 2
    crop = (NATIVE // PATCH) ** 2  # patches of one crop
    plain_block = block(1 + p, 1 + p, (1 + p) ** 2)
    # Of the last block nothing is needed of the patches but keys and values.
    features = stem(p) + LAYER * plain_block + block(p, p, p * p) + block(0, p, 0)
    # Logits have a place for the class token itself, which is another product.
    asked = 2 * block(n, n, n * p) + 2 * n * WIDTH + head(n)
    dense_block = block(n + p, n + p, (n + p) ** 2)
    crops = n * (stem(crop) + DEPTH * block(1 + crop, 1 + crop, (1 + crop) ** 2) + head(1))
    expected = {
        "plain": stem(p) + DEPTH * plain_block + head(1),
        "mask-aware": features + asked,
        "kept features": asked,
        "dense form": stem(p) + LAYER * plain_block + 2 * dense_block + head(n),
        "features alone": features,
        "masks of 20x20": 0,
        "masks of 30x40": 0,
        "mask & crop": crops,
        "one crop at a time": crops,
    }
    report = encoder.benchmark(tiny, SIZE, LAYER, [n], repeats=1)
    assert {row["name"]: round(row["gmacs"] * 1e9) for row in report["encoder"]} == expected
    for row in report["encoder"]:
        assert row["proposals"] == n
        assert row["macs_ratio"] == pytest.approx(expected[row["name"]] / expected["plain"])

    plain_block = block(1 + p, 1 + p, (1 + p) ** 2, trained=3, frozen=2)
    split = block(p, p, p * p, trained=3, frozen=2) + block(0, p, 0, trained=3)
    asked = 2 * block(n, n, n * p, trained=3, frozen=2) + 3 * (2 * n * WIDTH + head(n))
    dense_block = block(n + p, n + p, (n + p) ** 2, trained=3, frozen=2)
    plain_step = stem(p) + DEPTH * plain_block + 3 * head(1)
    expected = {
        "two dense passes": plain_step + stem(p) + LAYER * plain_block + 2 * dense_block + 3 * head(n),
        "mask-aware": plain_step + split + asked,
    }
    assert {row["name"]: round(row["gmacs"] * 1e9) for row in report["training"]} == expected


@pytest.mark.parametrize("model", list(encoder.MODELS))
def test_the_models_keep_what_is_promised_of_multiply_accumulates(model: str) -> None:
    """In full size, on the meta device, where nothing is computed."""
    visual = make_mask_aware(encoder.MODELS[model]().eval().to("meta"))
    images, masks = torch.empty(1, 3, 480, 480, device="meta"), torch.empty(1, 100, 480, 480, device="meta")
    with torch.no_grad():
        plain = encoder.count_macs(lambda: visual(images))
        ours = encoder.count_macs(lambda: visual(images, masks))
    assert plain == 92_020_475_904
    assert ours / plain <= (0.967 if model == encoder.PROMISED else 0.98)


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


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@pytest.mark.parametrize(
    "name",
    [
        "open_clip",
        "open_clip-layer_scale",
        "timm-vit",
        "timm-eva",
        "timm-eva02",
        "timm-eva02-post_norm",
        "transformers-clip",
        "transformers-clip-projection",
    ],
)
def test_dense_form_gives_the_same_embeddings(name: str, size: tuple[int, int], n: int) -> None:
    visual, images = make_mask_aware(plain_tower(name), 1), random_images(size)
    masks = torch.rand(2, n, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = visual(images, masks)
        actual = encoder.dense_encode(visual, images, masks)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_random_masks_are_rectangles_inside_the_image() -> None:
    masks = encoder.random_masks(50, (SIZE, 2 * SIZE), torch.Generator().manual_seed(0))
    assert masks.shape == (1, 50, SIZE, 2 * SIZE)
    assert masks.dtype == torch.bool
    rows, columns = masks[0].any(2).sum(1), masks[0].any(1).sum(1)  # (50,) heights and widths
    assert torch.equal(masks[0].sum((1, 2)), rows * columns)
    for sides, length in ((rows, SIZE), (columns, 2 * SIZE)):
        assert sides.min() >= length // 8 - 1
        assert length // 2 < sides.max() <= length * 7 // 8 + 1


@pytest.mark.parametrize("name", ["open_clip", "timm-vit", "timm-eva02", "transformers-clip-projection"])
def test_crops_are_those_of_the_mask_one_by_one_or_many(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "CROPS_AT_ONCE", 3)
    tower, shapes = plain_tower(name), []
    tower.register_forward_pre_hook(lambda tower, args: shapes.append(tuple(args[0].shape)))
    images, masks = random_images((SIZE, SIZE), batch=1), torch.ones(1, 4, SIZE, SIZE, dtype=torch.bool)
    with torch.no_grad():
        rows = encoder.crop_rows(tower, make_mask_aware(plain_tower(name), 1), images, masks, repeats=1)
    assert [row["name"] for row in rows] == ["mask & crop", "one crop at a time"]
    batches, single = [(3, 3, 32, 32), (1, 3, 32, 32)], [(1, 3, 32, 32)] * 4
    assert shapes == 2 * (batches + single) + batches + single  # counted, watched, timed


@pytest.mark.parametrize("name", ["open_clip", "timm-vit", "timm-eva02", "transformers-clip-projection"])
def test_every_library_runs_in_bfloat16(name: str, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoder.MODELS, "another", lambda: plain_tower(name))
    monkeypatch.setattr(encoder, "PAPER_PROPOSALS", 5)
    report = encoder.benchmark("another", SIZE, 1, [2, 5], repeats=2, dtype=torch.bfloat16)
    assert (report["device"], report["dtype"]) == ("cpu", "bfloat16")
    names = ["plain", "mask-aware", "kept features", "dense form"]
    parts = ["features alone", "masks of 20x20", "masks of 30x40", "mask & crop", "one crop at a time"]
    assert [(row["name"], row["proposals"]) for row in report["encoder"]] == [
        *((row, 2) for row in names), *((row, 5) for row in names + parts)
    ]  # fmt: skip
    assert report["training"] == report["targets"] == []


def test_thousands_of_proposals_have_no_dense_form(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    compare = encoder.compare

    def watched(ways: dict[str, Any], proposals: int, repeats: int, device: torch.device) -> Any:
        rounds.append(repeats)
        return compare(ways, proposals, repeats, device)

    monkeypatch.setattr(encoder, "compare", watched)
    monkeypatch.setattr(encoder, "training_rows", lambda *_: [])
    report = encoder.benchmark(tiny, SIZE, LAYER, [300, 301], repeats=4)
    assert [(row["name"], row["proposals"]) for row in report["encoder"]] == [
        *((name, 300) for name in ("plain", "mask-aware", "kept features", "dense form")),
        *((name, 301) for name in ("plain", "mask-aware", "kept features")),
    ]
    assert rounds == [4, encoder.FEW_ROUNDS]


class StandInGPU:
    """Records when it is waited for, and what a run allocates on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.allocated, self.most = 100, 900
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.events.append("wait"))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.allocated)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(self, "most", self.allocated))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.most)

    def run(self) -> None:
        self.events.append("run")
        self.most = self.allocated + 250


def test_a_gpu_is_waited_for_and_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = StandInGPU(monkeypatch)
    assert encoder.peak_memory(gpu.run, "cuda") == 250
    gpu.events.clear()
    encoder.interleaved_seconds({"one": gpu.run}, 2, torch.device("cuda"))
    assert gpu.events == ["wait", "run", "wait"] * 2


@pytest.mark.parametrize("gpu", [False, True])
def test_everything_runs_on_a_gpu_too_in_bfloat16(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(encoder, "benchmark", lambda *arguments: runs.append(arguments))
    monkeypatch.setattr(encoder, "as_markdown", str)
    encoder.main(["--models", "timm-ViT-B-16", "ViT-B-16", "--proposals", "3"])
    cpu = [(name, 480, 8, [3], 5, "cpu", torch.float32) for name in ("timm-ViT-B-16", "ViT-B-16")]
    cuda = [(*run[:5], "cuda", torch.bfloat16) for run in cpu]
    assert runs == cpu + cuda * gpu


def test_command_prints_tables_and_writes_json(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "encoder.json"
    arguments = ["--models", tiny, "--image-size", str(SIZE), "--start-layer", str(LAYER), "--repeats", "1"]
    encoder.main([*arguments, "--proposals", "1", "100", "300", "10000", "--out", str(out)])
    (report,) = json.loads(out.read_text())
    assert (report["model"], report["device"], report["dtype"]) == (tiny, "cpu", "float32")
    assert [row["name"] for row in report["training"]] == ["two dense passes", "mask-aware"]
    measured = {(row["name"], row["proposals"]): row for row in report["encoder"]}
    found = {target["name"]: target for target in report["targets"]}
    assert list(found) == [
        "multiply-accumulates, N = 100, mask-aware / plain",
        "time, N = 100, mask-aware / plain",
        "time, N = 300, mask-aware / plain",
        "time, N = 100, kept features / plain",
        "GMACs of each further mask of kept features",
        "time, N = 100, masks of 30x40 / plain",
        "peak MB, N = 100, masks of 30x40",
        "peak GB, N = 10000, mask-aware - plain",
        "peak memory, N = 100, mask-aware / plain",
        "time, N = 100, mask-aware / dense form",
        "time of a training step, mask-aware / two dense passes",
        "multiply-accumulates, N = 100, mask & crop / mask-aware",
    ]
    limits = [0.967, 0.95, 1, 0.06, 0.035, 0.03, 64, 1, 1.1, 1, 0.64]
    assert [target["limit"] for target in report["targets"]] == [*(f"<= {limit:g}" for limit in limits), ">= 18"]
    # Of one further mask: two blocks and the head, by hand.
    patches = (SIZE // PATCH) ** 2
    further = 2 * block(1, 1, patches) + 2 * WIDTH + head(1)
    assert found["GMACs of each further mask of kept features"]["measured"] == pytest.approx(further / 1e9)
    more = (measured["mask-aware", 10000]["peak_mib"] - measured["plain", 10000]["peak_mib"]) * 2**20
    assert found["peak GB, N = 10000, mask-aware - plain"]["measured"] == pytest.approx(more / 1e9)
    assert more >= 10000 * EMBED * 4  # the embeddings, in float32
    printed = capsys.readouterr().out
    for row in report["encoder"] + report["training"]:
        assert f"| {row['name']} | {row['proposals']} |" in printed
    for target in report["targets"]:
        assert f"| {target['name']} | {target['limit']} | {target['measured']:.4g} |" in printed


def row(name: str, proposals: int, ratio: float, gmacs: float = 0.0, peak_mib: float = 0.0) -> dict[str, Any]:
    ratios = dict.fromkeys(("macs_ratio", "time_ratio", "peak_ratio"), ratio)
    return {"name": name, "proposals": proposals, "gmacs": gmacs, "peak_mib": peak_mib, **ratios}


def report_of(scale: float) -> dict[str, Any]:
    """Just met in everything with scale 1."""
    return {
        "model": encoder.PROMISED,
        "device": "cpu",
        "encoder": [
            row("mask-aware", 1, 1),
            row("kept features", 1, 0, gmacs=0.1),
            {**row("mask-aware", 100, 0.95 * scale, gmacs=10 * scale), "macs_ratio": 0.967 * scale},
            row("kept features", 100, 0.06 * scale, gmacs=0.1 + 0.0349 * 99 * scale),
            row("dense form", 100, 0.96),
            row("masks of 3000x4000", 100, 0.03 * scale, peak_mib=61 * scale),
            row("mask & crop", 100, 20, gmacs=180),
            row("mask-aware", 300, scale),
            row("mask-aware", 10_000, 20, peak_mib=1000 * scale),  # 950 more than plain
        ],
        "training": [row("two dense passes", 100, 1), row("mask-aware", 100, 0.64 * scale)],
    }


@pytest.mark.parametrize("scale, missed", [(1.0, 0), (1.2, 12)])
def test_targets_say_whether_they_are_met(scale: float, missed: int) -> None:
    found = encoder.targets(report_of(scale))
    assert len(found) == 12
    assert [target["name"] for target in found if not target["met"]] == [target["name"] for target in found][:missed]


def test_targets_of_another_model_on_a_gpu_or_of_fewer_numbers() -> None:
    report = report_of(1.0)
    (other,) = encoder.targets({**report, "model": "another"})
    assert (other["name"], other["limit"], other["measured"], other["met"]) == (
        "multiply-accumulates, N = 100, mask-aware / plain", "<= 0.98", 0.967, True
    )  # fmt: skip
    assert encoder.targets({**report, "device": "cuda"}) == []
    assert encoder.targets({**report, "encoder": report["encoder"][:-1]}) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "RN50"], "invalid choice: 'RN50'"),
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
