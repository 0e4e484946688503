"""The distribution: what it contains, what it requires, what importing it costs."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import maft_adapter

CHECKOUT = Path(__file__).parent.parent
PACKAGE = Path(maft_adapter.__file__).parent
HOSTS = ("freeseg", "ovseg", "zegformer", "zsseg")

needs_checkout = pytest.mark.skipif(
    not (CHECKOUT / "setup.cfg").exists(),
    reason="no setup.cfg beside tests/: these tests run away from the checkout",
)


@pytest.fixture
def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("maft-adapter")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip('maft-adapter is not installed: pip install -e ".[test]"')


@needs_checkout
def test_wheel_built_from_the_sdist_has_every_file_of_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in ("maft_adapter", "integrations"):
        shutil.copytree(CHECKOUT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(CHECKOUT / name, source)
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    expected = {file.as_posix() for file in files if file.parts[0] == "maft_adapter"}
    expected |= {f"maft_adapter/{file.as_posix()}" for file in files if file.parts[0] == "integrations"}

    # build's default way: an sdist from the source, then a wheel from the sdist
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "source"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr

    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.startswith("maft_adapter/")} == expected
    assert any(name.endswith("/LICENSE") for name in names)

    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    assert imported_shims(tmp_path / "installed") == {
        host: tmp_path / "installed" / "maft_adapter" / "integrations" / host for host in HOSTS
    }


@needs_checkout
def test_shims_come_from_the_checkout() -> None:
    assert imported_shims(CHECKOUT) == {host: CHECKOUT / "integrations" / host for host in HOSTS}


def imported_shims(root: Path) -> dict[str, Path]:
    """The folders that the shims are imported from when `root` is on the path."""
    program = f"""
import importlib, pathlib, sys
sys.path.insert(0, {str(root)!r})
for host in {HOSTS}:
    module = importlib.import_module(f"maft_adapter.integrations.{{host}}")
    print(pathlib.Path(module.__file__).resolve().parent)
assert not [name for name in sys.modules if name.partition(".")[0] == "detectron2"]
"""
    # In the folder above: neither root nor the checkout may be the current one.
    run = subprocess.run([sys.executable, "-c", program], cwd=root.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(zip(HOSTS, map(Path, run.stdout.split()), strict=True))


@needs_checkout
def test_one_version_everywhere() -> None:
    version = maft_adapter.__version__
    assert f"\nversion: {version}\n" in (CHECKOUT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{version}]" in (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_requirements_are_few_and_none_is_capped(distribution: importlib.metadata.Distribution) -> None:
    requirements = [Requirement(line) for line in distribution.requires or []]
    assert {r.name for r in requirements if r.marker is None} == {
        "einops",
        "numpy",
        "open_clip_torch",
        "safetensors",
        "timm",
        "torch",
        "torchvision",
        "tqdm",
    }
    assert [str(r) for r in requirements if any(s.operator != ">=" for s in r.specifier)] == []


def test_console_script(distribution: importlib.metadata.Distribution) -> None:
    (script,) = distribution.entry_points.select(group="console_scripts", name="maft-adapter")
    assert callable(script.load())


def test_import_needs_torch_and_einops_only() -> None:
    """`import maft_adapter` and the core must work beside a CLIP fork, without open_clip and the extras."""
    program = """
import sys
import torch, einops, einops.layers.torch
before = set(sys.modules)
import maft_adapter, maft_adapter.adapt, maft_adapter.attention, maft_adapter.freezing
import maft_adapter.losses, maft_adapter.masks, maft_adapter.towers
added = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(*sorted(added - {"maft_adapter", "torch", "einops"}))
"""
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.split() == []
