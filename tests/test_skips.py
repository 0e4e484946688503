"""Skipped tests that should have run make CI fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEGITIMATE = 'import pytest\ndef test_host(): pytest.skip("ZSSEG_ROOT names no checkout")\ndef test_runs(): ...\n'
WRONG = 'import pytest\ndef test_lora(): pytest.skip("peft is not installed")\ndef test_runs(): ...\n'
MODULE = 'import pytest\npytest.importorskip("no_such_library")\ndef test_it(): ...\n'


@pytest.mark.parametrize(
    ("files", "options", "wanted", "should_have_run"),
    [
        ({"test_host": LEGITIMATE}, ["-n0"], "1", []),
        ({"test_host": LEGITIMATE, "test_lora": WRONG}, ["-n0"], "0", []),
        ({"test_host": LEGITIMATE, "test_lora": WRONG}, ["-n0"], "1", ["test_lora.py::test_lora"]),
        ({"test_lora": WRONG, "test_module": MODULE}, ["-n2"], "1", ["test_lora.py::test_lora", "test_module.py"]),
    ],
)
def test_only_legitimate_skips_pass(
    tmp_path: Path, files: dict[str, str], options: list[str], wanted: str, should_have_run: list[str]
) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-p", "skips", "-p", "xdist", *options]
    environment = {**os.environ, **plugins, "MAFT_NO_SKIPS": wanted}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == bool(should_have_run), run.stdout + run.stderr
    named = [line.split()[3] for line in run.stdout.splitlines() if line.startswith("should have run:")]
    assert sorted(named) == should_have_run
