"""README and documentation: their Python runs as a reader would type it, their commands and links are right."""

import os
import re
import shlex
from pathlib import Path
from urllib.parse import urldefrag

import pytest

from maft_adapter import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "integrations").rglob("*.md"))]

if not PAGES[0].exists():
    pytest.skip("no README.md beside tests/: these tests run away from the checkout", allow_module_level=True)


def blocks(page: Path, language: str) -> list[re.Match[str]]:
    text = page.read_text(encoding="utf-8")
    return list(re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Those of the hosts' pages need the hosts: tests/hosts.
PYTHON = [page for page in PAGES if blocks(page, "python") and "integrations" not in page.parts]


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks(page, "python"):
        # Leading newlines make a traceback's line numbers those of the page.
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], str(page), "exec"), namespace)


def test_readme_and_its_pages_have_python() -> None:
    assert len(PYTHON) >= 5


def commands(page: Path) -> list[str]:
    found = [block[1] for language in ("bash", "text") for block in blocks(page, language)]
    lines = [line for block in found for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.partition("  #")[0].strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("maft-adapter ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_have_options_that_exist(page: Path) -> None:
    for command in commands(page):
        if "..." not in command and "TABLE" not in command:
            cli.parser().parse_args(shlex.split(command)[1:])  # exits where it does not understand


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
        path = urldefrag(target[0] or target[1]).url
        if path and "://" not in path:
            assert os.path.exists(page.parent / path), f"{name(page)} links to {path}"
