"""The benchmark of pictures, with small sizes."""

import json
from pathlib import Path
from typing import Any

import pytest

pictures: Any = pytest.importorskip("benchmarks.pictures", reason="benchmarks/ lies beside tests/ in a checkout only")

SMALL = {"model": "ViT-S-32-alt", "size": 64, "proposals": 3, "pixels": 48, "words": 4, "pictures": 2, "repeats": 1}


def test_every_way_is_measured_and_nothing_promised_for_other_sizes() -> None:
    report = pictures.benchmark(pictures.Sizes(**SMALL))
    names = [[row["name"] for row in report[group]] for group in ("collection", "crops", "relabelling")]
    assert names == [
        ["bare encoder", "embed"],
        ["embed", "one masked crop at a time"],
        ["plain forward", "relabel", "label map"],
    ]
    for group in ("collection", "crops", "relabelling"):
        first = report[group][0]
        for row in report[group]:
            assert row["time_ratio"] == pytest.approx(row["seconds"] / first["seconds"])  # of one round
    assert report["targets"] == []
    json.dumps(report)
    assert "| one masked crop at a time |" in pictures.as_markdown(report)


@pytest.mark.parametrize(("embed", "crops", "relabel"), [(1.15, 15, 0.05), (1.16, 14.9, 0.051)])
def test_targets(embed: float, crops: float, relabel: float) -> None:
    def row(name: str, ratio: float) -> dict[str, Any]:
        return {"name": name, "seconds": 1.0, "time_ratio": ratio, "time_ratio_quartiles": [ratio, ratio]}

    report = {
        "sizes": pictures.Sizes(repeats=9)._asdict(),
        "threads": 2,
        "torch": "0",
        "collection": [row("bare encoder", 1), row("embed", embed)],
        "crops": [row("embed", 1), row("one masked crop at a time", crops)],
        "relabelling": [row("plain forward", 1), row("relabel", relabel), row("label map", 5)],
    }
    targets = pictures.targets(report)
    assert [target["measured"] for target in targets] == [embed, crops, relabel]
    assert {target["met"] for target in targets} == {embed == 1.15}
    assert "| embed / bare encoder | <= 1.15 |" in pictures.as_markdown({**report, "targets": targets})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--repeats", "0"], "expected at least 1"), (["--out", "none/x.json"], "does not exist")],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        pictures.main(arguments)
    assert message in capsys.readouterr().err
