"""Without the optional libraries: what the error says."""

import subprocess
import sys

MODULES = {
    "maft_adapter.show": ("matplotlib", "demo"),
    "maft_adapter.proposals.merging": ("skimage", "pictures"),
    "maft_adapter.shapes.report": ("matplotlib", "demo"),
    "maft_adapter.shapes.demo": ("matplotlib", "demo"),
    "maft_adapter.shapes.train_clip": ("torchmetrics", "demo"),
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
    for line, (library, extra) in zip(lines, MODULES.values(), strict=True):
        assert line.split(".")[0].split(" ")[0] == library
        assert line.endswith(f'is not installed; run: pip install "maft-adapter[{extra}]"')
