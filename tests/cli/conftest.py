"""The command line as tests call it: the real program in this process, a data directory of its own, real servers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from supervisor.cli.main import app
from supervisor.policy.loader import default_policy
from supervisor.runbooks import load_all
from supervisor.runs.services import Services, open_services
from supervisor.settings.load import load
from tests.cli.scripted_machine import ScriptedMachine
from tools.runbooks import Runbook


@dataclasses.dataclass
class Said:
    """What a command did: exit status, stdout, stderr."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        return json.loads(lines[0])


Command = Callable[..., Said]


_RUNBOOKS = load_all()
_POLICY = default_policy()


@pytest.fixture(autouse=True)
def _what_is_shipped_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading packs and runbooks takes most of the time of a command, and no test here changes them."""

    def runbooks(directories: Sequence[Path] = ()) -> Mapping[str, Runbook]:
        return load_all(directories) if directories else _RUNBOOKS

    for module in ("supervisor.runs.services", "supervisor.runbooks", "supervisor.cli.runbook"):
        monkeypatch.setattr(f"{module}.load_all", runbooks)
    for module in ("supervisor.runs.services", "supervisor.policy.loader"):
        monkeypatch.setattr(f"{module}.default_policy", lambda: _POLICY)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def command(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Calls ``chargehand --data-dir … ARGS``; ``stdin``: what it reads. No terminal, nothing of the developer's settings."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*words: str, stdin: str | bytes | None = None, shared: tuple[str, ...] | None = None) -> Said:
        before = ("--data-dir", str(data_dir)) if shared is None else shared
        done = CliRunner().invoke(app, [*before, *words], input=stdin, catch_exceptions=False)
        return Said(done.exit_code, done.stdout, done.stderr)

    return call


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person sits there: questions are asked, and answered from ``stdin``."""
    monkeypatch.setattr("supervisor.cli.ask.terminal", lambda: True)


@pytest.fixture
def services(data_dir: Path, command: Command) -> Iterator[Services]:
    """The same data directory, opened beside the command line."""
    opened = open_services(load(None, data_dir=data_dir))
    yield opened
    opened.spool.close()
    opened.ledger.close()
    opened.store.close()


@pytest.fixture
def ssh_machine() -> Iterator[ScriptedMachine]:
    """A real SSH server on loopback that answers the gatekeeper's verbs as a healthy machine ``web-01`` would."""
    with ScriptedMachine() as machine:
        yield machine
