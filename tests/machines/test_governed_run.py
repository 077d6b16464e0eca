"""One governed run, end to end, on a real machine: systemd, Quadlet, rootless podman, sshd."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from supervisor.audit import kinds
from supervisor.audit.verify import verify
from supervisor.gateway import Gateway
from supervisor.runs.states import State
from supervisor.runs.verdict import calls_of
from supervisor.store.runs import Run
from tests.inference.scripted_server import ScriptedServer
from tests.machines.conftest import Installed
from tests.machines.installed import CHARGEHAND, ROOT, chargehand, gateway_on, ours, user_unit, write_config
from tests.runs.harness import ask, bodies_of, embedded_gateway, event, finished, told

pytestmark = pytest.mark.lab
# Of safety.md, "Inert until activated", 3: the lease and then five seconds.
GRACE_S = 5.0


def inactive(installed: Installed) -> None:
    """Nothing of the edge agent runs, and both units say so."""
    assert ours(installed.machine) == []
    for unit in ("chargehand-agent", "chargehand-broker"):
        assert user_unit(installed.machine, "is-active", unit).stdout.strip() == "inactive", unit


async def run_to_end(running: Gateway, installed: Installed, **request: Any) -> Run:
    return await finished(running, await ask(running, machine=installed.name, **request), 120)


async def until_nothing_runs(installed: Installed, seconds: float) -> float:
    """Seconds until the machine is inert; fails after ``seconds``."""
    began = time.monotonic()
    while left := await asyncio.to_thread(ours, installed.machine, False):
        assert time.monotonic() - began < seconds, left
        await asyncio.sleep(0.1)
    return time.monotonic() - began


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the gateway use a scripted model: ``scripted(server)``."""

    def use(server: ScriptedServer) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test-000000000000000000000")
        monkeypatch.setenv("OPENAI_BASE_URL", server.openai_url)

    return use


async def test_it_is_inactive_after_install_after_a_reboot_and_after_a_run(installed: Installed) -> None:
    inactive(installed)
    before = installed.machine.boot_id
    installed.machine.reboot()
    assert installed.machine.boot_id != before
    inactive(installed)
    async with gateway_on(installed.data_dir) as running:
        run = await run_to_end(running, installed, runbook="health")
        assert run.state is State.SUCCEEDED, told(run)
        assert (run.unit_after, run.processes_after) == ("inactive", 0)
        assert run.verdict["audit_gaps"] == []
        assert verify(running.services.ledger).verified
        granted = bodies_of(running, run, kinds.LEASE_GRANTED)[0]
        assert granted["landlock"]["abi"] >= 1
    inactive(installed)


async def test_nobody_on_the_machine_can_start_the_agent_by_hand(installed: Installed) -> None:
    for unit in ("chargehand-agent", "chargehand-broker"):
        assert user_unit(installed.machine, "start", unit).status != 0
        inactive_after = user_unit(installed.machine, "is-active", unit).stdout.strip()
        assert inactive_after in ("inactive", "failed")
    assert ours(installed.machine) == []
    assert user_unit(installed.machine, "enable", "chargehand-agent").status != 0
    user_unit(installed.machine, "reset-failed")


async def test_the_same_run_through_quadlet_and_through_plain_processes(installed: Installed, tmp_path: Path) -> None:
    async with gateway_on(installed.data_dir) as running:
        there = await run_to_end(running, installed, runbook="memory")
        there_calls = calls_of(running.services.store.events.streamed(there.id))
        there_journal = running.services.store.journals.get(there.id).lines
    async with embedded_gateway(tmp_path / "gw") as running:
        here = await finished(running, await ask(running, runbook="memory"))
        here_calls = calls_of(running.services.store.events.streamed(here.id))
        here_journal = running.services.store.journals.get(here.id).lines
    assert (there.state, here.state) == (State.SUCCEEDED, State.SUCCEEDED)

    def shape(calls: dict[str, Any]) -> list[tuple[str, str, str]]:
        return [(call.tool, call.decision, call.rule) for call in calls.values()]

    def lines(journal: list[str]) -> list[str]:
        return [json.loads(line)["kind"] for line in journal if '"kind":"call.intent"' not in line]

    assert shape(there_calls) == shape(here_calls)
    assert lines(there_journal) == lines(here_journal)
    inactive(installed)


async def test_a_cancel_in_the_middle_of_a_command_kills_it(installed: Installed, scripted: Any) -> None:
    slow = {"tool_calls": [{"name": "exec", "arguments": {"argv": ["vmstat", "1", "20"]}}]}
    async with ScriptedServer([slow], repeat_last=True) as server:
        scripted(server)
        async with gateway_on(installed.data_dir) as running:
            run = await ask(running, machine=installed.name, text="watch the memory")
            decision = (await event(running, run, "call.decided", 60))["decision"]
            assert decision["outcome"] == "allow", decision
            assert any(words.endswith("vmstat 1 20") for words in ours(installed.machine))
            running.services.store.runs.request_cancel(run.id, "operator:test")
            run = await finished(running, run)
            assert run.state is State.CANCELLED, told(run)
            evidence = (await event(running, run, "call.finished"))["evidence"]
            assert evidence["steps"][0]["cancelled"] is True
            assert run.verdict["audit_gaps"] == []
    inactive(installed)


async def test_a_dead_broker_takes_the_worker_with_it(installed: Installed, scripted: Any) -> None:
    async with ScriptedServer([{"text": "hm", "fault": "hang", "after": 1}], repeat_last=True) as server:
        scripted(server)
        async with gateway_on(installed.data_dir) as running:
            run = await ask(running, machine=installed.name)
            await event(running, run, "inference.started", 60)
            pid = user_unit(installed.machine, "show", "-P", "MainPID", "chargehand-broker").stdout.strip()
            installed.machine.run(["kill", "-KILL", pid])
            run = await finished(running, run)
            assert run.state is State.FAILED, told(run)
            assert (run.unit_after, run.processes_after) == ("inactive", 0)
            assert "found dead" in running.services.store.journals.get(run.id).lines[-1]
    inactive(installed)


async def test_a_worker_that_hangs_and_ignores_sigterm_is_killed(installed: Installed, scripted: Any) -> None:
    async with ScriptedServer([{"text": "hm", "fault": "hang", "after": 1}], repeat_last=True) as server:
        scripted(server)
        async with gateway_on(installed.data_dir) as running:
            run = await ask(running, machine=installed.name)
            await event(running, run, "inference.started", 60)
            # Stopped, it takes no signal but SIGKILL.
            listed = installed.machine.processes()
            worker = next(p for p in listed if "/opt/chargehand" in " ".join(p.argv) and "python" in p.argv[0])
            installed.machine.run(["kill", "-STOP", str(worker.pid)])
            running.services.store.runs.request_cancel(run.id, "operator:test")
            run = await finished(running, run, 90)
            print(run.seconds)
            assert run.state is State.CANCELLED, told(run)
            assert (run.unit_after, run.processes_after) == ("inactive", 0)
    inactive(installed)


async def test_a_killed_gateway_leaves_nothing_running_past_the_lease(installed: Installed, tmp_path: Path) -> None:
    lease_s = 6
    config = write_config(tmp_path / "chargehand.toml", lease_s=lease_s, renew_s=2)
    slow = {"tool_calls": [{"name": "exec", "arguments": {"argv": ["vmstat", "1", "30"]}}]}
    async with ScriptedServer([slow], repeat_last=True) as server:
        environment = {
            **os.environ, "OPENAI_API_KEY": "sk-test-000000000000000000000", "OPENAI_BASE_URL": server.openai_url,
        }  # fmt: skip
        words = ["--config", str(config), "--data-dir", str(installed.data_dir), "run", installed.name, "watch it"]
        gone = subprocess.Popen([*CHARGEHAND, *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        try:
            async with asyncio.timeout(60):
                while not any("vmstat" in words for words in await asyncio.to_thread(ours, installed.machine)):
                    await asyncio.sleep(0.05)
        finally:
            gone.send_signal(signal.SIGKILL)
            gone.communicate()
        seconds = await until_nothing_runs(installed, lease_s + GRACE_S)
        print(f"inert {seconds:.1f} s after the gateway was killed, lease {lease_s} s")
    # The next gateway finds the run, proves the machine inert and says what happened.
    async with gateway_on(installed.data_dir) as running:
        run = running.services.store.runs.list(limit=1)[0]
        run = await finished(running, run, 60)
        assert run.state is State.FAILED, told(run)
        assert (run.unit_after, run.processes_after) == ("inactive", 0)
        kinds_told = [json.loads(line)["kind"] for line in running.services.store.journals.get(run.id).lines]
        # The command that ran was killed and its result written before the journal was closed.
        assert kinds_told[-3:] == ["lease.expired", "call.result", "stopped"]
        again = await run_to_end(running, installed, runbook="memory")
        assert again.state is State.SUCCEEDED, told(again)
    inactive(installed)


async def test_a_cut_cable_ends_the_run_on_the_machine_and_the_gateway_says_so(
    installed: Installed, scripted: Any
) -> None:
    slow = {"tool_calls": [{"name": "exec", "arguments": {"argv": ["vmstat", "1", "30"]}}]}
    async with ScriptedServer([slow], repeat_last=True) as server:
        scripted(server)
        async with gateway_on(
            installed.data_dir, lease_s=6, renew_s=2, connect_s=3, verb_s=4, keepalive_s=2
        ) as running:
            run = await ask(running, machine=installed.name)
            await event(running, run, "call.decided", 60)
            installed.machine.cut()
            try:
                # The lease is over on both sides before the cable comes back.
                await asyncio.sleep(6 + GRACE_S)
            finally:
                installed.machine.mend()
            assert ours(installed.machine, pause=False) == []
            run = await finished(running, run, 90)
            assert run.state is State.FAILED, told(run)
            assert (run.unit_after, run.processes_after) == ("inactive", 0)
    inactive(installed)


async def test_a_changed_host_key_stops_everything(installed: Installed) -> None:
    machine = installed.machine
    known = machine.known_hosts.read_text()
    machine.run(["cp", "-a", "/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/ssh_host_ed25519_key.pub", "/root/"])
    machine.run(
        [
            "sh",
            "-c",
            "rm /etc/ssh/ssh_host_ed25519_key* && ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key",
        ]
    )
    changed = machine.read("/etc/ssh/ssh_host_ed25519_key.pub").decode()
    # The lab's own ssh must go on working: it is told both keys.
    machine.known_hosts.write_text(known + f"{machine.address} {changed}")
    machine.run(["systemctl", "restart", "ssh"])
    try:
        done = await asyncio.to_thread(chargehand, installed.data_dir, "machine", "check", installed.name)
        assert done.returncode == 3, done.stdout + done.stderr
        assert done.stderr.count("SHA256:") >= 2
        async with gateway_on(installed.data_dir) as running:
            run = await ask(running, machine=installed.name, runbook="memory")
            assert (await event(running, run, "stage.ended"))["stage"] == "activate"
            machine.run(["sh", "-c", "cp -a /root/ssh_host_ed25519_key* /etc/ssh/ && systemctl restart ssh"])
            run = await finished(running, run, 60)
            assert (run.state, run.error["code"]) == (State.FAILED, "host-key-changed"), told(run)
            assert (await run_to_end(running, installed, runbook="memory")).state is State.SUCCEEDED
    finally:
        machine.run(["sh", "-c", "cp -a /root/ssh_host_ed25519_key* /etc/ssh/ && systemctl restart ssh"])
        machine.known_hosts.write_text(known)
    inactive(installed)
