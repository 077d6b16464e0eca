"""One zipapp for all tests of the machine side, and machines made of it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from quadlets.zipapp_build import build_host_zipapp
from tests.host.machine import Machine, machine
from tests.host.processes import PYTHON


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``host.pyz`` and its bytecode, nothing else."""
    directory = tmp_path_factory.mktemp("template")
    build_host_zipapp(directory / "host.pyz")
    configuration = {"protocol": 1, "machine": "m1", "units": "process", "worker_argv": ["/bin/true"]}
    (directory / "host.json").write_text(json.dumps(configuration), encoding="utf-8")
    subprocess.run(
        [PYTHON, "-I", "-S", str(directory / "host.pyz"), "gatekeeper", "--home", str(directory)],
        env={"SSH_ORIGINAL_COMMAND": "hello", "XDG_RUNTIME_DIR": str(directory)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    for name in os.listdir(directory):
        if not name.startswith("host") or name == "host.json":
            (directory / name).unlink()
    return directory


@pytest.fixture
def machines(template: Path) -> Callable[..., AbstractContextManager[Machine]]:
    """Makes machines: ``with machines("stubborn", max_lease_s=5) as m``."""
    return partial(machine, template)


@pytest.fixture
def host(template: Path) -> Iterator[Machine]:
    """A machine with a sound worker."""
    with machine(template) as made:
        yield made
