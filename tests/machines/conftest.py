"""One machine with the edge installed, for all tests of this folder; they leave it as they found it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.machine import Lab, Machine
from tests.machines.installed import install, worker_image

NAME = "web-01"


@dataclasses.dataclass(frozen=True)
class Installed:
    """A lab machine, the data directory of the gateway it belongs to, and its id there."""

    machine: Machine
    data_dir: Path
    name: str
    report: dict[str, object]


@pytest.fixture(scope="session")
def image(lab: Lab) -> Iterator[Path]:
    with worker_image() as archive:
        yield archive


@pytest.fixture(scope="session")
def installed(lab: Lab, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    machine = lab.machine(NAME)
    data_dir = tmp_path_factory.mktemp("gateway") / "data"
    return Installed(machine, data_dir, NAME, install(data_dir, machine, NAME, image))
