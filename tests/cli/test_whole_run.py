"""What a real run leaves behind, seen through the commands: nothing here was made by a test."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest

from supervisor.runs.services import Services
from tests.cli.conftest import Command
from tests.cli.scripted_machine import ScriptedMachine
from tests.cli.scripted_mlflow import ScriptedMlflow
from tests.cli.test_audit import external
from tests.runs.harness import ask, embedded_gateway, finished

pytestmark = pytest.mark.slow


def test_a_governed_run_is_complete_on_record_in_its_trace_and_for_the_doctor(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "gw" / "data"
    shared = ("--data-dir", str(data))

    async def run() -> str:
        async with embedded_gateway(tmp_path / "gw") as running:
            done = await finished(running, await ask(running, runbook="memory"))
            with_spans.put(running.services.spool.pending_spans(done.trace_id))
            return done.id

    with ScriptedMlflow() as with_spans:
        run_id = asyncio.run(run())
        spooled = command("trace", run_id, "--json", shared=shared).json
        assert spooled["source"] == "spool"
        external(monkeypatch, with_spans.url)
        verified = command("audit", "verify", "--against-mlflow", "--json", shared=shared)
        assert verified.status == 0, verified.out
        assert verified.json["journals"] == 1 and verified.json["mlflow"]["runs"] == 1
        traced = command("trace", run_id, "--json", shared=shared).json
        assert traced["source"] == "mlflow"
        assert [row["name"] for row in traced["spans"]] == [row["name"] for row in spooled["spans"]]
        assert command("doctor", "--full", "--json", shared=shared).status == 0
    monkeypatch.delenv("CHARGEHAND_MLFLOW__URL")
    monkeypatch.delenv("CHARGEHAND_MLFLOW__MODE")
    checked = command("machine", "check", "m1", "--json", shared=shared)
    assert checked.status == 0 and checked.json["run"] is None and checked.json["processes"] == 0


def test_at_a_real_terminal_the_question_is_asked_and_answered(
    ssh_machine: ScriptedMachine, data_dir: Path, services: Services
) -> None:
    words = ["machine", "add", "web-01", "127.0.0.1", "--port", str(ssh_machine.port)]
    child, terminal = pty.fork()
    if child == 0:
        program = [sys.executable, "-m", "supervisor.cli.main", "--data-dir", str(data_dir), *words]
        os.chdir(Path(__file__).parents[2])
        os.execv(sys.executable, program)
    said, deadline = b"", time.monotonic() + 60
    answered = False
    while time.monotonic() < deadline and select.select([terminal], [], [], 60)[0]:
        try:
            block = os.read(terminal, 4096)
        except OSError:  # the other side of the terminal has closed
            break
        said += block
        if b"[y/N]" in said and not answered:
            answered = True
            assert ssh_machine.shown.fingerprint.encode() in said
            assert services.store.machines.list() == []
            os.write(terminal, b"y\n")
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, said
    assert services.store.machines.get("web-01").host_key == ssh_machine.shown.text
