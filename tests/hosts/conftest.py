"""Real checkouts of the hosts, named by environment variables; tests that need one skip without it.

detectron2 runs from its source tree, uncompiled, beside its requirements: fvcore, iopath, omegaconf, hydra-core,
pycocotools, termcolor, tabulate, and opencv-python-headless for its PointRend project.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stand_ins import HostRunner


def checkout(variable: str) -> Path:
    """The folder that `variable` names; the test is skipped where it names none."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout")
    path = Path(os.environ[variable]).resolve()
    assert path.is_dir(), f"{variable} is {path}, which is no folder"
    return path


@pytest.fixture(scope="module")
def start_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., HostRunner]]:
    """`start_host("ZSSEG_ROOT", "third_party/CLIP")`: a runner with the checkout, its folders named, and detectron2.

    Keywords become environment variables, with {folder} for the runner's own.
    """
    runners: list[HostRunner] = []

    def start(variable: str, *folders: str, **environment: str) -> HostRunner:
        root, detectron2 = checkout(variable), checkout("DETECTRON2_ROOT")
        paths = [root, *(root / folder for folder in folders), detectron2]
        folder = tmp_path_factory.mktemp("host")
        named = {name: value.format(folder=folder) for name, value in environment.items()}
        runners.append(HostRunner(paths, folder, **named))
        return runners[-1]

    yield start
    for runner in runners:
        runner.pool.shutdown()
