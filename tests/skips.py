"""With MAFT_NO_SKIPS=1, as CI sets it, a run fails if a test was skipped that should have run there."""

import os
import re
from pathlib import Path

import pytest

# What an installation with the extra `test` does not bring. Whatever else is missing is a mistake.
LEGITIMATE = [
    r"\w+ names no checkout",  # of a host or of the authors' code
    "mess-benchmark is not installed",
    "chromium is not installed",
    "GPU",
    "root reads everything",
]
if not (Path(__file__).parent.parent / "setup.cfg").exists():  # tests of an installed wheel
    LEGITIMATE += ["run away from the checkout", "in a checkout only"]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Name the tests that were skipped for any other reason, and let the run fail."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("MAFT_NO_SKIPS") != "1" or reporter is None:  # pytest-xdist's workers have none
        return
    skipped = reporter.stats.get("skipped", [])
    wrong = [report for report in skipped if not re.search("|".join(LEGITIMATE), str(report.longrepr))]
    for report in wrong:
        path, line, reason = report.longrepr
        reporter.write_line(f"\nshould have run: {report.nodeid} ({path}:{line}: {reason})", red=True)
    if wrong:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
