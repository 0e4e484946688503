"""The training benchmark on tiny sizes: that both ways take the same steps, and what it writes."""

import json
from pathlib import Path

import pytest

from benchmarks import training


def test_it_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"model": "ViT-S-32-alt", "pixels": 64, "size": 64, "pictures": 2, "iterations": 1, "batch_size": 1}
    full = training.benchmark
    monkeypatch.setattr(training, "benchmark", lambda sizes: full(sizes._replace(**tiny)))
    training.main(["--rounds", "1", "--out", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["sizes"]["pixels"] == 64 and report["disk"] > 0 and report["memory"] > 0
    assert f"ratio {report['ratio']:.3f}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        training.main(["--rounds", "0"])
