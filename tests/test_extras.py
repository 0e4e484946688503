"""Without the optional libraries: what the error says."""

import subprocess
import sys

MODULES = {
    "maft_adapter.show": "matplotlib",
    "maft_adapter.proposals.merging": "skimage",
    "maft_adapter.shapes.report": "matplotlib",
    "maft_adapter.shapes.demo": "matplotlib",
    "maft_adapter.shapes.train_clip": "torchmetrics",
}


def test_a_missing_library_names_the_extra() -> None:
    program = f"""
import importlib, sys
for library in ("matplotlib", "skimage", "torchmetrics"):
    sys.modules[library] = None  # as if it were not installed
import maft_adapter.shapes, maft_adapter.finetune, maft_adapter.baselines, maft_adapter.metrics  # need none of them
for module in {list(MODULES)}:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split(".")[0].split(" ")[0] for line in lines] == list(MODULES.values())
    assert all(line.endswith('is not installed; run: pip install "maft-adapter[demo]"') for line in lines)
