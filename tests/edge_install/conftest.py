"""Fixtures of the installation's lab tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quadlets import zipapp_build
from tests.edge_install.lab_image import agent_archive
from tests.edge_install.lab_machines import BOX_LIMITS
from tests.lab.machine import Lab, Machine
from tests.lab.ssh import make_key


@pytest.fixture(scope="module")
def archive(lab: Lab) -> Iterator[Path]:
    with agent_archive() as path:
        yield path


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gateway") / "key"
    make_key(path)
    return path


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The machine side as it is now: sources that are edited while a test runs must not look like a change."""
    archive = zipapp_build.host_zipapp()
    monkeypatch.setattr(zipapp_build, "host_zipapp", lambda: archive)
    return archive


@pytest.fixture
def bare(fresh_machine: Machine, packed: bytes) -> Machine:
    """A machine as it comes. /proc/sys is read-only in this box's machines, which podman's default sysctl needs."""
    fresh_machine.write(BOX_LIMITS, "[containers]\ndefault_sysctls = []\n")
    return fresh_machine
