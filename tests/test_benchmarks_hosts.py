"""What of the host benchmark runs without checkouts of the hosts."""

from pathlib import Path
from typing import Any

import pytest

hosts: Any = pytest.importorskip("benchmarks.hosts", reason="benchmarks/ lies beside tests/ in a checkout only")


def rows(macs: float, time: float) -> list[dict[str, Any]]:
    def row(name: str, macs: float, time: float) -> dict[str, Any]:
        ratios = {"macs_ratio": macs, "time_ratio": time, "time_ratio_quartiles": [time, time], "peak_ratio": 2.0}
        return {"name": name, "proposals": 100, "gmacs": 90 * macs, "peak_mib": 64.0, "seconds": time, **ratios}

    return [row("mask-aware", 1, 1), row("host", macs, time)]


def test_targets_and_tables() -> None:
    measured = {"zegformer": rows(19, 8), "zsseg": rows(9.9, 5.9)}
    targets = hosts.targets(measured)
    assert [target["met"] for target in targets] == [True, True, False, False]
    assert [target["limit"] for target in targets] == [">= 10", ">= 6"] * 2
    report = {"image": [480, 640], "repeats": 3, "threads": 2, "torch": "2", "hosts": measured, "targets": targets}
    printed = hosts.as_markdown(report)
    assert "one 480x640 image, N = 100" in printed
    assert "| zegformer, host | 1710.0 | 19.00 | 8.00 | 8.00 (8.00-8.00) | 64 | 2.00 |" in printed
    assert "| zsseg: time, host / mask-aware | >= 6 | 5.90 | no |" in printed


def test_missing_checkouts_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZEGFORMER_ROOT", str(tmp_path))
    monkeypatch.setenv("ZSSEG_ROOT", str(tmp_path / "missing"))
    for variable in ("FREESEG_ROOT", "DETECTRON2_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit):
        hosts.main([])
    assert "ZSSEG_ROOT, FREESEG_ROOT, DETECTRON2_ROOT must name a checkout" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        hosts.main(["--hosts", "zegformer"])
    assert "error: DETECTRON2_ROOT must name" in capsys.readouterr().err
    monkeypatch.setenv("DETECTRON2_ROOT", str(tmp_path))
    with pytest.raises(SystemExit):
        hosts.main(["--hosts", "zegformer", "--out", str(tmp_path / "no" / "report.json")])
    assert f"the folder {tmp_path / 'no'} does not exist" in capsys.readouterr().err
