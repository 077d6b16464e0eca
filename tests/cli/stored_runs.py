"""Runs as the flow leaves them behind, made without a machine: store, events, audit records, journal, spans."""

from __future__ import annotations

import time

from supervisor.audit import kinds
from supervisor.audit.ledger import Entry
from supervisor.machines import Machine
from supervisor.runs.services import Services
from supervisor.runs.states import State
from supervisor.store.runs import Run
from tools.values import Decision, Event, Evidence, StepResult, ToolCall

MACHINE = "web-01"


def added_machine(services: Services) -> Machine:
    """The machine, in the store without a host key."""
    known = services.store.machines.list()
    return known[0] if known else services.store.machines.add(Machine(MACHINE, "192.0.2.7"))


def open_run(services: Services, state: State = State.RUNNING) -> Run:
    """A run that is on, in ``state`` (one of queued, activating, running)."""
    added_machine(services)
    runs = services.store.runs
    run = runs.create(
        machine=MACHINE, requested_by="operator:anna", text="why is it slow?", not_after=time.time() + 900
    )
    for before, after in (
        (State.REQUESTED, State.QUEUED),
        (State.QUEUED, State.ACTIVATING),
        (State.ACTIVATING, State.RUNNING),
    ):
        if run.state == state:
            break
        run = runs.move(run.id, before, after, deadline=time.time() + 60).run
    return run


def sealed_run(services: Services, calls: int = 2) -> Run:
    """A run with ``calls`` tool calls and one inference that succeeded and was sealed; its spans wait in the spool."""
    run = open_run(services)
    add = services.store.events.add
    for stage in ("activate", "task"):
        add(run.id, "stage.started", {"stage": stage}, key=f"{stage}:started")
    events = [Event(1, "inference.started", {"inference_id": "i1", "provider": "openai", "model": "m", "step": 1})]
    usage = {"input_tokens": 7, "output_tokens": 5, "cost_usd": None}
    events.append(
        Event(2, "inference.finished", {"inference_id": "i1", "usage": usage, "stop_reason": "end", "duration_ms": 3.0})
    )
    records = [Entry(kinds.INFERENCE, {"inference_id": "i1", "seen_by": "worker"}, MACHINE, run.id, f"agent:{MACHINE}")]
    for number in range(1, calls + 1):
        call = ToolCall(f"c{number}", "exec", {"argv": ["df", "-h"]})
        decision = Decision("allow", "observe", "df", "free space")
        step = StepResult(argv=(("/usr/bin/df", "-h"),), exit_status=0, exit_statuses=(0,), stdout="x")
        evidence = Evidence(call.call_id, "exec", (step,), duration_ms=2.0)
        seq = 3 * number
        events += [
            Event(seq, "call.asked", call.to_json()),
            Event(seq + 1, "call.decided", {"call_id": call.call_id, "decision": decision.to_json()}),
            Event(seq + 2, "call.finished", {"call_id": call.call_id, "evidence": evidence.to_json()}),
        ]
        said = {"call_id": call.call_id, "outcome": "allow", "rule": "df"}
        records.append(Entry(kinds.DECISION, said, MACHINE, run.id, f"agent:{MACHINE}"))
        done = {"call_id": call.call_id, "steps": [{"exit_status": 0}]}
        records.append(Entry(kinds.EVIDENCE, done, MACHINE, run.id, f"agent:{MACHINE}"))
    services.store.events.append(run.id, events)
    services.ledger.append(records)
    for stage in ("task", "activate"):
        add(run.id, "stage.ended", {"stage": stage, "seconds": 0.1}, key=f"{stage}:ended")
    runs = services.store.runs
    runs.move(run.id, State.RUNNING, State.EVALUATING)
    runs.move(run.id, State.EVALUATING, State.STOPPING)
    run = runs.move(run.id, State.STOPPING, State.SUCCEEDED, unit_after="inactive", processes_after=0).run
    services.put_trace(run, services.store.events.events(run.id))
    add(run.id, "sealed", {"state": "succeeded"}, key="sealed")
    return run
