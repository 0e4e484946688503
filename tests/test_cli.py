"""The command line: arguments, errors and exit statuses."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import maft_adapter.shapes.demo
from maft_adapter import cli


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the demo was called with, instead of its running for minutes."""
    recorded: list[dict[str, Any]] = []

    def run_demo(out: Path, seeds: Any, quick: bool, start_layer: int | None) -> None:
        recorded.append({"out": out, "seeds": list(seeds), "quick": quick, "start_layer": start_layer})

    monkeypatch.setattr(maft_adapter.shapes.demo, "run_demo", run_demo)
    return recorded


@pytest.mark.parametrize(
    ("arguments", "seeds", "quick", "start_layer"),
    [
        ([], [0], False, None),
        (["--seed", "7", "--start-layer", "8"], [7], False, 8),
        (["--seeds", "3", "--quick"], [0, 1, 2], True, None),
    ],
)
def test_demo(
    arguments: list[str],
    seeds: list[int],
    quick: bool,
    start_layer: int | None,
    calls: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "new" / "folder"
    assert cli.main(["demo", *arguments, "--out", str(out)]) == 0
    assert calls == [{"out": out, "seeds": seeds, "quick": quick, "start_layer": start_layer}]


def test_default_folder(calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 0
    assert calls[0]["out"] == Path("maft-demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["train"], "invalid choice"),
        (["demo", "--seed", "-1"], "--seed -1: expected at least 0"),
        (["demo", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["demo", "--seeds", "two"], "invalid int value"),
        (["demo", "--seed", "1", "--seeds", "2"], "not allowed with"),
        (["demo", "--start-layer", "13"], "invalid choice: 13"),
        (["demo", "--out", __file__], "can't be made a folder"),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_why(
    arguments: list[str], message: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not calls


def test_help_names_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # argparse wraps at hyphens, too
    with pytest.raises(SystemExit) as error:
        cli.main(["demo", "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert all(
        option in text for option in ("--seed S", "--seeds K", "--quick", "--start-layer L", "--out DIR", "maft-demo")
    )


def test_missing_extras_are_named(
    calls: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(cli.demo, "find_spec", lambda name: None if name in ("skimage", "tqdm") else find(name))
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "the demo needs skimage, tqdm: pip install 'maft-adapter[demo]'" in capsys.readouterr().err
    assert not calls and not (tmp_path / "out").exists()


def test_ctrl_c_exits_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(maft_adapter.shapes.demo, "run_demo", interrupted)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    assert "stopped" in capsys.readouterr().err


def test_a_missing_library_is_a_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "maft_adapter.paper", None)
    assert cli.main(["paper", "4a"]) == 1
    assert capsys.readouterr().err.startswith("maft-adapter: ")


def test_python_m_is_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "maft_adapter", "--help"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("usage: maft-adapter")
