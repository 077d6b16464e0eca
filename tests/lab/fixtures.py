"""The lab's pytest fixtures, for the tests of the lab and of everything that needs real machines.

A test that takes one of them carries the marker `lab` and is skipped, with one line of why, where the lab cannot run.
With CI=true such a skip is a failure: a green run there has seen real machines.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest

from tests.lab.available import lab_problem
from tests.lab.machine import Lab, Machine

FIXTURES = frozenset({"lab", "machine", "fresh_machine"})


@functools.cache
def problem() -> str | None:
    """The box does not change while tests run: it is asked once."""
    return lab_problem()


def require_lab() -> None:
    """Skip the running test where the lab cannot run; fail it there with CI=true."""
    if (why := problem()) is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"no lab, and CI=true: {why}", pytrace=False)
    pytest.skip(f"no lab: {why}")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "lab: needs real machines (root on Linux, see docs/lab.md)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes a machine, so `-m 'not lab'` leaves out exactly that."""
    for item in items:
        if FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("lab")


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """One lab for the whole session."""
    require_lab()
    with Lab(print) as opened:
        yield opened


@pytest.fixture(scope="session")
def machine(lab: Lab) -> Machine:
    """One machine for the whole session: leave it as it was found, or take `fresh_machine`."""
    return lab.machine("shared")


@pytest.fixture
def fresh_machine(lab: Lab) -> Iterator[Machine]:
    """A machine of this test's own, about 1 s away."""
    made = lab.machine()
    yield made
    lab.remove(made)
