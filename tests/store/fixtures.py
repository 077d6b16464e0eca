"""Fixtures that several folders use: a database of each kind, its store and its ledger."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from supervisor.audit.ledger import Ledger, open_ledger
from supervisor.machines import Machine
from supervisor.store.store import Store, open_store
from tests.store import postgres

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    if not postgres.available():
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    with postgres.running() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database: SQLite always, PostgreSQL in the slow run."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'data' / 'test.db'}"
    server: str = request.getfixturevalue("postgres_server")
    name = f"test_{next(_numbers)}"
    with psycopg.connect((server % "postgres").replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server % name


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with open_store(url, clock=Clock()) as opened:
        yield opened


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    with open_ledger(url) as opened:
        yield opened


@pytest.fixture
def machine(store: Store) -> Machine:
    return store.machines.add(Machine("web-01", "192.0.2.1", labels={"role": "web"}))


class Clock:
    """Seconds since the epoch that pass when the test says so."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def clock_of(store: Store) -> Clock:
    clock: Callable[[], float] = store.runs._clock
    assert isinstance(clock, Clock)
    return clock
