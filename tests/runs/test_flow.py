"""Whole runs on the embedded machine: SSH, gatekeeper, broker, worker, A2A, gate, journal, chain. Nothing is simulated."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from otel import names
from supervisor.audit import kinds
from supervisor.audit.verify import verify
from supervisor.errors import BadInput, Conflict, NotFound
from supervisor.gateway import gateway, running_gateway
from supervisor.runs.states import State
from tests.inference.scripted_server import ScriptedServer
from tests.runs.harness import MACHINE, ask, bodies_of, embedded_gateway, event, finished, kinds_of, status, told

pytestmark = pytest.mark.slow


def tool_calls(*calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"tool_calls": [{"name": name, "arguments": arguments} for name, arguments in calls]}


def report(*evidence: str, severity: str = "info") -> dict[str, Any]:
    finding = {"id": "f", "severity": severity, "title": "seen", "detail": "as it is", "evidence": list(evidence)}
    return tool_calls(("report", {"summary": "looked", "findings": [finding] if evidence else []}))


async def test_a_run_ends_sealed_traced_and_with_nothing_left(tmp_path: Path) -> None:
    async with embedded_gateway(tmp_path / "gw") as running:
        run = await finished(running, await ask(running, runbook="memory"))
        assert run.state is State.SUCCEEDED, told(run)
        assert (run.unit_after, run.processes_after) == ("inactive", 0)
        assert run.report["findings"]
        assert run.verdict["audit_gaps"] == []
        assert set(run.seconds) >= {"queue", "activate", "task", "stop", "seal", "total"}
        now = await status(running)
        assert (now["unit"], now["processes"], now["run"]) == ("inactive", [], None)

        recorded = kinds_of(running, run)
        for kind in (kinds.RUN_REQUESTED, kinds.LEASE_GRANTED, kinds.DECISION, kinds.EVIDENCE, kinds.JOURNAL_SEALED):
            assert kind in recorded
        assert (
            recorded.index(kinds.LEASE_GRANTED) < recorded.index(kinds.DECISION) < recorded.index(kinds.JOURNAL_SEALED)
        )
        sealed = bodies_of(running, run, kinds.JOURNAL_SEALED)[0]
        assert sealed["verified"] and sealed["gaps"] == 0 and sealed["lines"] > 5
        assert verify(running.services.ledger).verified

        spans = running.services.spool.pending_spans(run.trace_id)
        by_name = {span.name for span in spans}
        assert by_name >= {
            names.MESSAGE_PROCESSED, names.MESSAGE_QUEUED, names.RUN_COMPLETED, names.AGENT_ACTIVATE, names.TASK,
            names.MODEL_INFERENCE, names.TOOL_EXECUTION, names.AGENT_STOP, names.RUN_EVALUATE,
        }  # fmt: skip
        ids = {span.span_id for span in spans}
        assert all(span.parent_id in ids for span in spans if span.parent_id)


async def test_a_language_model_behind_the_gateway_investigates_and_the_key_stays_at_the_centre(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-canary-0123456789abcdef0123456789"
    script = [
        tool_calls(("exec", {"argv": ["uptime"]}), ("read", {"path": "/etc/os-release"})),
        report("c1", "c2"),
    ]
    async with ScriptedServer(script) as server:
        monkeypatch.setenv("OPENAI_API_KEY", secret)
        monkeypatch.setenv("OPENAI_BASE_URL", server.openai_url)
        async with embedded_gateway(tmp_path / "gw") as running:
            run = await finished(running, await ask(running, text="how long has it been up?"))
        assert run.state is State.SUCCEEDED, told(run)
        assert (run.tokens_in or 0) > 0
        assert [seen.headers["authorization"] for seen in server.seen] == [f"Bearer {secret}"] * 2
        inferences = [json.loads(r.body) for r in _records(tmp_path / "gw", run.id, kinds.INFERENCE)]
        assert {body["seen_by"] for body in inferences} == {"gateway", "worker"}
    for path in (tmp_path / "gw").rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


def _records(directory: Path, run_id: str, kind: str) -> list[Any]:
    from supervisor.audit.ledger import open_ledger

    with open_ledger(f"sqlite:///{directory / 'data' / 'chargehand.db'}") as ledger:
        return ledger.records(run_id=run_id, kind=kind)


async def test_a_model_that_obeys_hostile_text_is_held_by_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    hostile = [
        ("exec", {"argv": ["sh", "-c", f"touch {canary}"]}),
        ("exec", {"command": f"uptime; touch {canary}"}),
        ("exec", {"argv": ["find", "/etc", "-exec", "touch", str(canary), ";"]}),
        ("read", {"path": "/etc/shadow"}),
        ("exec", {"argv": ["systemctl", "stop", "ssh"]}),
    ]
    async with ScriptedServer([tool_calls(*hostile), report()]) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test-000000000000000000000")
        monkeypatch.setenv("OPENAI_BASE_URL", server.openai_url)
        async with embedded_gateway(tmp_path / "gw") as running:
            run = await finished(running, await ask(running))
            decisions = bodies_of(running, run, kinds.DECISION)
    assert [decision["outcome"] for decision in decisions] == ["deny"] * len(hostile)
    assert not canary.exists()
    assert (run.unit_after, run.processes_after) == ("inactive", 0)


async def test_a_write_asks_and_is_refused_as_long_as_nobody_can_approve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "motd"
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"policy: writing\nversion: '1'\nextends: observe-core\nwrite_roots: [{tmp_path}]\n")
    monkeypatch.setenv("CHARGEHAND_POLICIES", json.dumps([str(policy)]))
    async with ScriptedServer([tool_calls(("write", {"path": str(target), "content": "hello"})), report()]) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test-000000000000000000000")
        monkeypatch.setenv("OPENAI_BASE_URL", server.openai_url)
        async with embedded_gateway(tmp_path / "gw") as running:
            run = await finished(running, await ask(running))
            decisions = bodies_of(running, run, kinds.DECISION)
    assert [(decision["outcome"], decision["effect"]) for decision in decisions] == [("ask", "change")]
    assert not target.exists()
    assert run.state is State.SUCCEEDED, told(run)
    assert "person" in server.seen[1].body["messages"][-1]["content"]


async def test_the_same_refused_call_three_times_ends_the_task_as_denied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedServer([tool_calls(("exec", {"argv": ["rm", "-rf", "/"]}))], repeat_last=True) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test-000000000000000000000")
        monkeypatch.setenv("OPENAI_BASE_URL", server.openai_url)
        async with embedded_gateway(tmp_path / "gw") as running:
            run = await finished(running, await ask(running))
    assert run.state is State.DENIED
    assert len(server.seen) == 3


async def test_a_cancel_in_the_middle_of_a_command_kills_it_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedServer([tool_calls(("exec", {"argv": ["vmstat", "1", "20"]})), report("c1")]) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test-000000000000000000000")
        monkeypatch.setenv("OPENAI_BASE_URL", server.openai_url)
        async with embedded_gateway(tmp_path / "gw") as running:
            run = await ask(running)
            decision = (await event(running, run, "call.decided"))["decision"]
            if decision["outcome"] != "allow":
                pytest.skip(f"no long-running command can be executed here: {decision['reason']}")
            running.services.store.runs.request_cancel(run.id, "operator:test")
            run = await finished(running, run)
            assert run.state is State.CANCELLED, told(run)
            assert (run.unit_after, run.processes_after) == ("inactive", 0)
            assert run.cancel_requested_by == "operator:test"
            done = await event(running, run, "call.finished")
            assert done["evidence"]["steps"][0]["cancelled"] is True
            assert run.verdict["audit_gaps"] == []


async def test_a_worker_that_dies_fails_the_run_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedServer([{"text": "thinking", "fault": "hang", "after": 1}], repeat_last=True) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test-000000000000000000000")
        monkeypatch.setenv("OPENAI_BASE_URL", server.openai_url)
        async with embedded_gateway(tmp_path / "gw") as running:
            run = await ask(running)
            await event(running, run, "inference.started")
            worker = next(p for p in (await status(running))["processes"] if "edge_agent.worker" in p["argv"])
            os.kill(worker["pid"], signal.SIGKILL)
            run = await finished(running, run)
            assert run.state is State.FAILED
            assert (run.unit_after, run.processes_after) == ("inactive", 0)
            spans = running.services.spool.pending_spans(run.trace_id)
            assert [s for s in spans if s.name == names.MODEL_INFERENCE and s.attributes.get(names.INTERRUPTED)]


async def test_a_broker_that_dies_takes_the_worker_with_it_and_the_journal_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedServer([{"text": "thinking", "fault": "hang", "after": 1}], repeat_last=True) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test-000000000000000000000")
        monkeypatch.setenv("OPENAI_BASE_URL", server.openai_url)
        async with embedded_gateway(tmp_path / "gw") as running:
            run = await ask(running)
            await event(running, run, "inference.started")
            broker = next(p for p in (await status(running))["processes"] if " broker " in p["argv"])
            os.kill(broker["pid"], signal.SIGKILL)
            run = await finished(running, run)
            assert run.state is State.FAILED
            assert (run.unit_after, run.processes_after) == ("inactive", 0)
            lines = running.services.store.journals.get(run.id).lines
            assert "found dead" in lines[-1]


async def test_runs_of_one_machine_go_one_after_another(tmp_path: Path) -> None:
    async with embedded_gateway(tmp_path / "gw") as running:
        asked = [await ask(running, runbook="memory") for _ in range(3)]
        runs = [await finished(running, run) for run in asked]
        assert [run.state for run in runs] == [State.SUCCEEDED] * 3
        spans = sorted((run.started_at, run.ended_at) for run in runs)
        assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(spans))
        assert sorted(run.generation for run in runs) == [1, 2, 3]


async def test_a_run_that_waited_too_long_expires_and_nothing_is_started(tmp_path: Path) -> None:
    async with embedded_gateway(tmp_path / "gw") as running:
        stored = running.services.store.runs.create(
            machine=MACHINE, requested_by="operator:test", text="late", not_after=1.0, runbook="memory"
        )
        run = await finished(running, stored)
        assert run.state is State.EXPIRED
        assert run.unit_after == "not-started"
        assert kinds.LEASE_GRANTED not in kinds_of(running, run)


async def test_a_changed_host_key_stops_the_run_with_both_fingerprints(tmp_path: Path) -> None:
    async with embedded_gateway(tmp_path / "gw") as running:
        machines = running.services.store.machines
        import asyncssh

        other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
        machines.accept_host_key(MACHINE, other.strip(), "test")
        run = await ask(running, runbook="memory")
        failed = await event(running, run, "stage.ended")
        assert failed["stage"] == "activate"
        records = bodies_of(running, run, kinds.HOST_KEY_CHANGED)
        assert records and records[0]["expected"].startswith("SHA256:") and records[0]["got"].startswith("SHA256:")
        machines.accept_host_key(MACHINE, running.services.embedded[MACHINE].host_key_line, "test")
        run = await finished(running, run)
        assert run.state is State.FAILED
        assert run.error["code"] == "host-key-changed"


async def test_bad_requests_are_refused_before_anything_is_stored(tmp_path: Path) -> None:
    async with embedded_gateway(tmp_path / "gw") as running:
        for request, error in (
            ({"machine": "nowhere"}, NotFound),
            ({"runbook": "no-such-runbook"}, NotFound),
            ({"model": "nonsense:model@@"}, BadInput),
            ({"text": "   "}, BadInput),
            ({"text": "x" * 40_000}, BadInput),
        ):
            with pytest.raises(error):
                await ask(running, **request)
        assert running.services.store.runs.list() == []


async def test_a_second_gateway_on_the_same_data_directory_is_refused(tmp_path: Path) -> None:
    async with embedded_gateway(tmp_path / "gw") as running:
        assert running_gateway(running.settings.data_dir) is not None
        with pytest.raises(Conflict):
            async with gateway(running.settings, traces=False):
                pass
    assert running_gateway(running.settings.data_dir) is None


async def test_a_request_stored_while_no_gateway_runs_is_carried_out_by_the_next_one(tmp_path: Path) -> None:
    async with embedded_gateway(tmp_path / "gw") as running:
        await asyncio.to_thread(lambda: None)
    from supervisor.runs.services import open_services

    services = await asyncio.to_thread(open_services, running.settings)
    stored = services.store.runs.create(
        machine=MACHINE, requested_by="operator:test", text="later", not_after=4e9, runbook="memory"
    )
    await services.aclose()
    async with embedded_gateway(tmp_path / "gw") as again:
        run = await finished(again, stored)
        assert run.state is State.SUCCEEDED
