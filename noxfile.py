"""The versions that setup.cfg promises: `nox -l` lists the sessions, `make matrix` runs all of them.

What follows `--` goes to pytest: `nox -s newest-3.13 -- tests/test_masks.py`. A session whose interpreter is not there
is skipped, and nox says so.
"""

import configparser

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
# The first whose towers are supported; setup.cfg has no bound, since the library does without it.
OLDEST_TRANSFORMERS = "transformers==4.46.0"
# What make_mask_aware promises, and the core. Other tests need what newer libraries have: see setup.cfg's extra `test`.
CORE = [f"tests/test_{name}.py" for name in ("testing", "adapt", "attention", "masks", "losses", "freezing", "towers")]

setup = configparser.ConfigParser()
setup.read("setup.cfg")


def requirements(section: str, option: str) -> list[str]:
    return setup[section][option].split()


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """The newest of everything."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs, env={"MAFT_NO_SKIPS": "1"})


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The oldest of everything that has a bound, and a numpy of that time."""
    bounds = [line.replace(">=", "==") for line in requirements("options", "install_requires")]
    session.install("-e", ".", *bounds, OLDEST_TRANSFORMERS, "numpy<2", "hypothesis", "pytest", "pytest-xdist")
    session.run("pytest", *(session.posargs or CORE))


@nox.session(python=PYTHONS[-3])
@nox.parametrize("below", ["5", "6"])
def transformers(session: nox.Session, below: str) -> None:
    """The newest transformers 4 and 5, with the newest of everything else."""
    session.install("-e", ".[all]", f"transformers<{below}", "hypothesis", "peft", "pytest", "pytest-xdist")
    session.run("pytest", *(session.posargs or [*CORE, "tests/test_families.py", "tests/test_whole_models.py"]))
