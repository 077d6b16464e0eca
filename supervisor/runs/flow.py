"""The flow of a run, stage by stage: admit, activate, task, evaluate, stop, seal.

Owns: the order, what each stage does and records, and that a run ends only when its unit is proven inactive.
Deliberately does not know: DBOS (``durable`` makes the stages durable), SSH, how judgements are made (``verdict``).

Each stage may be executed again after a crash of the gateway: it looks at the stored state and at the machine first,
and finds its own work done. Only ``task`` is never repeated: what a worker did once is not done twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from a2a_bridge.client import TaskClient, TaskFailed
from a2a_bridge.messages import ENDED, TaskDocument, TaskResult
from inference.choice import Choice, ModelSpec, open_model
from inference.errors import InferenceDenied, InferenceError
from inference.protocol import Model, Request
from inference.remote import InferenceRecord, serve
from otel.spans import span_id
from supervisor.activation.gatekeeper import Gatekeeper
from supervisor.audit import kinds
from supervisor.errors import (
    Busy,
    ChargehandError,
    LeaseLost,
    MachineError,
    MachineUnreachable,
    Refused,
)
from supervisor.machines import Machine
from supervisor.runs.plan import Plan, choose_model, plan_of, task_document
from supervisor.runs.services import Services
from supervisor.runs.states import State
from supervisor.runs.verdict import Verdict, judge
from supervisor.store.ids import trace_id
from supervisor.store.runs import Run
from tools.values import Event, JsonObject, Malformed, digest

logger = logging.getLogger(__name__)

# How often a waiting side task looks whether somebody wants the run cancelled, seconds.
CANCEL_LOOK_S = 0.25
# How long the worker may take to end its task in order after it was asked to cancel, seconds.
CANCEL_S = 15.0
# How long a worker may take to answer that question at all, seconds: one that hangs is not waited for.
CANCEL_ASK_S = 10.0
# After a renewal that failed, seconds until the next try; the lease is three renewals long.
RENEW_RETRY_S = 1.0
# Between two tries to stop a machine that does not answer, seconds: first, most.
STOP_RETRY_S = (0.5, 5.0)


class Flow:
    """The stages of runs, with everything they need handed in."""

    def __init__(self, services: Services) -> None:
        self._services = services

    # -- small things

    async def _run(self, run_id: str) -> Run:
        return await asyncio.to_thread(self._services.store.runs.get, run_id)

    async def _move(self, run: Run, to: State, limit_s: float | None, **outcome: Any) -> Run:
        """Move the run and record it; does nothing if it is there already."""
        if run.state == to:
            return run
        deadline = time.time() + limit_s if limit_s is not None else None
        moved = await asyncio.to_thread(
            self._services.store.runs.move, run.id, run.state, to, deadline=deadline, **outcome
        )
        await self._services.record(
            run.machine, kinds.RUN_STATE, {"from": str(run.state), "to": str(to)}, run_id=run.id, key=f"{run.id}:{to}"
        )
        await self._event(run.id, "state", {"state": str(to)}, key=f"state:{to}")
        return moved.run

    async def _event(self, run_id: str, kind: str, body: Mapping[str, Any], key: str | None = None) -> None:
        await asyncio.to_thread(self._services.store.events.add, run_id, kind, dict(body), key=key)

    @contextlib.asynccontextmanager
    async def _stage(self, run_id: str, stage: str) -> AsyncIterator[None]:
        await self._event(run_id, "stage.started", {"stage": stage}, key=f"{stage}:started")
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = round(time.monotonic() - began, 4)
            await self._event(run_id, "stage.ended", {"stage": stage, "seconds": seconds}, key=f"{stage}:ended")

    def _seconds(self, run: Run, **more: float) -> JsonObject:
        return {**(run.seconds or {}), **{name: round(value, 4) for name, value in more.items()}}

    # -- admit

    async def admit(self, run_id: str) -> bool:
        """From ``queued`` to ``activating``; ``False`` if the run ended here: too late, cancelled, machine gone."""
        run = await self._run(run_id)
        limits = self._services.settings.limits
        if run.final:
            return False
        if run.state in (State.REQUESTED, State.QUEUED):
            if run.cancel_requested_at is not None:
                await self._end_unstarted(run, State.CANCELLED, "cancelled before it started")
                return False
            if time.time() > run.not_after:
                await self._end_unstarted(run, State.EXPIRED, "it waited longer than it may before it could start")
                return False
            if run.state is State.REQUESTED:
                run = await self._move(run, State.QUEUED, limits.queue_s)
            generation = await asyncio.to_thread(self._services.store.machines.next_generation, run.machine)
            seconds = self._seconds(run, queue=time.time() - run.created_at)
            await self._move(run, State.ACTIVATING, limits.activate_s, generation=generation, seconds=seconds)
        return True

    async def _end_unstarted(self, run: Run, state: State, reason: str) -> None:
        verdict = {"state": str(state), "reason": reason, "severity": "none", "findings": [], "refused": []}
        seconds = self._seconds(run, queue=time.time() - run.created_at, total=time.time() - run.created_at)
        await self._move(
            run, state, None, verdict=verdict, unit_after="not-started", processes_after=0, seconds=seconds
        )
        await self._seal_trace(run.id)

    # -- activate

    async def activate(self, run_id: str) -> JsonObject:
        """Start the edge agent; returns ``{"started": bool, …}``. An error is a result: the run goes on to ``stop``."""
        run = await self._run(run_id)
        if run.state is not State.ACTIVATING:
            return {"started": run.state is State.RUNNING, "error": None}
        async with self._stage(run_id, "activate"):
            began = time.monotonic()
            try:
                machine, gatekeeper = await self._services.door(run.machine)
                plan = await self._plan(run)
                run = await self._start(run, machine, gatekeeper, plan)
            except ChargehandError as error:
                if error.code == "host-key-changed":
                    await self._services.record(
                        run.machine,
                        kinds.HOST_KEY_CHANGED,
                        {"expected": error.expected, "got": error.got},
                        run_id=run_id,
                    )
                return {"started": False, "error": error.to_json()["error"]}
            seconds = self._seconds(run, activate=time.monotonic() - began)
            model = dict(plan.spec.to_json(), why=plan.why)
            runbook = plan.runbook.name if plan.runbook is not None else None
            await self._move(
                run, State.RUNNING, self._services.settings.limits.task_s + 60, seconds=seconds, model=model
            )
            await self._event(
                run_id, "plan", {"model": str(plan.spec), "why": plan.why, "runbook": runbook}, key="plan"
            )
        return {"started": True, "error": None}

    async def _plan(self, run: Run) -> Plan:
        name = run.model.get("name") if isinstance(run.model, Mapping) else None
        choice: Choice = await choose_model(name, self._services.settings, self._services.environment)
        return plan_of(run, choice, self._services.runbooks)

    async def _start(self, run: Run, machine: Machine, gatekeeper: Gatekeeper, plan: Plan) -> Run:
        limits = self._services.settings.limits
        hello = await gatekeeper.hello()
        self._check_hello(machine, hello)
        await asyncio.to_thread(self._services.store.machines.seen, machine.id, str(hello["boot_id"]))
        live = hello.get("run")
        if live and live.get("run_id") == run.id:
            return run  # started before a crash of the gateway
        if live:
            raise Busy(f"run {live.get('run_id')} is on machine {machine.id}", next_step="wait for it or stop it")
        generation = run.generation or 0
        if int(hello.get("generation", 0)) >= generation:
            # The machine has seen more than this store knows of (restored backup, another gateway): go past it.
            generation = await asyncio.to_thread(
                self._services.store.machines.raise_generation, machine.id, int(hello["generation"])
            )
            generation = await asyncio.to_thread(self._services.store.machines.next_generation, machine.id)
            run = await asyncio.to_thread(self._services.store.runs.note, run.id, generation=generation)
        policy, policy_digest = self._services.policy_for(machine)
        document: JsonObject = {
            "run_id": run.id,
            "machine": machine.id,
            "generation": generation,
            "boot_id": hello["boot_id"],
            "not_after": hello["boottime"] + limits.activate_s,
            "lease_s": limits.lease_s,
            "hard_stop_s": limits.hard_stop_s,
            "policy": policy,
            "policy_digest": policy_digest,
            "limits": {"task_s": limits.task_s},
            "model": {"provider": plan.spec.provider, "via": plan.spec.via},
            "traceparent": _traceparent(run.id),
        }
        await self._services.record(
            run.machine,
            kinds.LEASE_GRANTED,
            {
                "generation": generation,
                "lease_s": limits.lease_s,
                "hard_stop_s": limits.hard_stop_s,
                "policy_digest": policy_digest,
                "boot_id": hello["boot_id"],
                "landlock": (hello.get("capabilities") or {}).get("landlock"),
            },
            run_id=run.id,
            key=f"{run.id}:lease:{generation}",
        )
        answer = await gatekeeper.start(document, limits.activate_s)
        await self._event(
            run.id, "activated", {"seconds": answer.get("seconds"), "worker": answer.get("worker")}, "activated"
        )
        return run

    def _check_hello(self, machine: Machine, hello: JsonObject) -> None:
        if hello.get("machine") != machine.id:
            raise Refused(
                f"the machine at {machine.address} says it is another one",
                expected=machine.id,
                got=hello.get("machine"),
                next_step="check the address; chargehand edge install writes the machine's id",
            )

    # -- task

    async def task(self, run_id: str) -> JsonObject:
        """Give the worker its task and follow it; returns the ``TaskResult`` as JSON. Never repeated."""
        run = await self._run(run_id)
        told = await asyncio.to_thread(self._services.store.events.events, run_id, 0, source="gateway")
        if any(event.kind == "task.sent" for event in told):
            reason = "the gateway was restarted while the task was on; what was done is in the journal"
            return TaskResult("error", reason, None).to_json()
        async with self._stage(run_id, "task"):
            began = time.monotonic()
            result = await self._follow(run)
            run = await self._run(run_id)
            await asyncio.to_thread(
                self._services.store.runs.note,
                run_id,
                seconds=self._seconds(run, task=time.monotonic() - began),
                tokens_in=result.input_tokens,
                tokens_out=result.output_tokens,
                cost_usd=result.cost_usd,
            )
        return result.to_json()

    async def _follow(self, run: Run) -> TaskResult:
        limits = self._services.settings.limits
        try:
            machine, gatekeeper = await self._services.door(run.machine)
            plan = await self._plan(run)
        except ChargehandError as error:
            return TaskResult("error", error.message, None)
        document = task_document(run, machine, plan, self._services.settings, _traceparent(run.id))
        directory = Path(tempfile.mkdtemp(prefix="chargehand-run-"))
        talk = _Conversation(self._services, run, document)
        renewing = asyncio.create_task(self._renew(run, gatekeeper))
        watching = asyncio.create_task(self._watch_cancel(run.id))
        talking = asyncio.create_task(talk.hold(gatekeeper, directory, plan.spec))
        try:
            await asyncio.wait(
                {renewing, watching, talking}, timeout=limits.task_s, return_when=asyncio.FIRST_COMPLETED
            )
            if talking.done():
                return _uncalled(talking.result())
            if renewing.done():
                return talk.partial("error", f"the lease could not be renewed: {renewing.exception()}")
            reason = "cancelled" if watching.done() else f"the task took longer than {limits.task_s} s"
            if await talk.cancel():
                await asyncio.wait({talking, renewing}, timeout=CANCEL_S, return_when=asyncio.FIRST_COMPLETED)
            outcome = "cancelled" if watching.done() else "limit"
            if talking.done() and talking.exception() is None:
                said = talking.result()
                # The task may have been done before the cancel came through: then it is what it is.
                return said if said.outcome == "reported" else dataclasses.replace(said, outcome=outcome, reason=reason)
            return talk.partial(outcome, f"{reason}; the worker did not end its task in order")
        finally:
            for side in (renewing, watching, talking):
                side.cancel()
            await asyncio.gather(renewing, watching, talking, return_exceptions=True)
            shutil.rmtree(directory, ignore_errors=True)

    async def _renew(self, run: Run, gatekeeper: Gatekeeper) -> None:
        """Renew the lease until cancelled; raises when it is lost."""
        limits = self._services.settings.limits
        seq = 0
        renewed = time.monotonic()
        wait = float(limits.renew_s)
        while True:
            await asyncio.sleep(wait)
            seq += 1
            try:
                await gatekeeper.renew(run.id, run.generation or 0, seq, limits.lease_s)
                renewed, wait = time.monotonic(), float(limits.renew_s)
            except MachineUnreachable as error:
                if time.monotonic() - renewed > limits.lease_s:
                    raise LeaseLost(
                        f"the machine could not be reached for {limits.lease_s} s: {error.message}"
                    ) from error
                wait = RENEW_RETRY_S

    async def _watch_cancel(self, run_id: str) -> None:
        """Returns when somebody wants the run cancelled."""
        while True:
            run = await self._run(run_id)
            if run.cancel_requested_at is not None:
                return
            await asyncio.sleep(CANCEL_LOOK_S)

    # -- evaluate

    async def evaluate(self, run_id: str, result: JsonObject) -> JsonObject:
        """The verdict on the task's result, as JSON."""
        run = await self._run(run_id)
        async with self._stage(run_id, "evaluate"):
            if run.state is State.RUNNING:
                run = await self._move(run, State.EVALUATING, self._services.settings.limits.evaluate_s)
            events = await asyncio.to_thread(self._services.store.events.streamed, run_id)
            verdict = judge(TaskResult.from_json(result), events)
        return verdict.to_json()

    # -- stop

    async def stop(self, run_id: str, reason: str) -> JsonObject:
        """Stop the edge agent and prove it; returns ``{unit, processes, proven, journal_…}``. Retried until proven, or
        until lease and hard stop have both passed without the machine being reached."""
        run = await self._run(run_id)
        if run.final:
            return {"proven": run.unit_after is not None, "unit": run.unit_after, "processes": run.processes_after}
        async with self._stage(run_id, "stop"):
            began = time.monotonic()
            if run.state is not State.STOPPING:
                run = await self._move(run, State.STOPPING, self._services.settings.limits.stop_s)
            answer = await self._stop(run, reason)
            run = await self._run(run_id)
            seconds = self._seconds(run, stop=time.monotonic() - began)
            outcome: JsonObject = {"seconds": seconds}
            if answer["proven"]:
                outcome.update(unit_after=answer["unit"], processes_after=answer["processes"])
            await asyncio.to_thread(self._services.store.runs.note, run_id, **outcome)
        return answer

    async def _stop(self, run: Run, reason: str) -> JsonObject:
        limits = self._services.settings.limits
        started = run.started_at or run.created_at
        # After this nothing can run there any more, whatever the network does: the hard stop is enforced on the machine.
        over_at = max(started, run.state_since) + limits.hard_stop_s + limits.lease_s
        wait = STOP_RETRY_S[0]
        while True:
            try:
                _, gatekeeper = await self._services.door(run.machine)
                answer = await gatekeeper.stop(run.id, run.generation or 0, reason, limits.stop_s)
                return {"proven": True, **answer}
            except LeaseLost as error:
                # Another run, of another gateway, owns the machine now: ours cannot be there any more.
                return {"proven": True, "unit": "inactive", "processes": 0, "note": error.message}
            except ChargehandError as error:
                logger.warning("run %s could not be stopped yet: %s", run.id, error)
                last = error
            if isinstance(last, MachineError | Refused) and time.time() > over_at:
                return {"proven": False, "error": last.to_json()["error"]}
            await asyncio.sleep(wait)
            wait = min(wait * 2, STOP_RETRY_S[1])

    # -- seal

    async def seal(self, run_id: str, verdict: JsonObject, result: JsonObject | None, stopped: JsonObject) -> str:
        """Check the journal against what was streamed, seal the chain, move to the final state; returns that state."""
        run = await self._run(run_id)
        if run.final:
            await self._seal_trace(run_id)
            return str(run.state)
        began = time.monotonic()
        gaps: list[JsonObject] = []
        head = None
        if stopped.get("proven"):
            head, gaps = await self._collect_journal(run)
        report = (result or {}).get("report")
        verdict = dict(verdict, audit_gaps=gaps)
        state = State(verdict["state"]) if stopped.get("proven") else State.UNREACHABLE
        seconds = self._seconds(run, seal=time.monotonic() - began, total=time.time() - run.created_at)
        outcome: JsonObject = {"verdict": verdict, "report": report, "journal_head": head, "seconds": seconds}
        error = verdict.get("error")
        if error:
            outcome["error"] = error
        if stopped.get("proven"):
            outcome.update(unit_after=stopped["unit"], processes_after=stopped["processes"])
        await self._services.record(
            run.machine,
            kinds.LEASE_ENDED,
            {"proven": bool(stopped.get("proven")), "unit": stopped.get("unit"), "processes": stopped.get("processes")},
            run_id=run_id,
            key=f"{run_id}:lease-ended",
        )
        await self._move(run, state, None, **outcome)
        await self._seal_trace(run_id)
        return str(state)

    async def _collect_journal(self, run: Run) -> tuple[str | None, list[JsonObject]]:
        """Fetch the journal, check it, compare it with the stream, record both. Returns its head and the gaps."""
        try:
            _, gatekeeper = await self._services.door(run.machine)
            lines = await gatekeeper.journal(run.id)
        except ChargehandError as error:
            lines = []
            missing = error.message
        else:
            missing = ""
        events = await asyncio.to_thread(self._services.store.events.streamed, run.id)
        sealed = await asyncio.to_thread(self._services.check_journal, run, lines, events, missing)
        await self._services.record(
            run.machine, kinds.JOURNAL_SEALED, sealed.record, run_id=run.id, key=f"{run.id}:journal"
        )
        for number, gap in enumerate(sealed.gaps):
            await self._services.record(run.machine, kinds.AUDIT_GAP, gap, run_id=run.id, key=f"{run.id}:gap:{number}")
        return sealed.head, sealed.gaps

    async def _seal_trace(self, run_id: str) -> None:
        """Put the run's spans into the spool; deriving them again gives the same spans, which it holds once."""
        run = await self._run(run_id)
        events = await asyncio.to_thread(self._services.store.events.events, run_id)
        await asyncio.to_thread(self._services.put_trace, run, events)
        await self._event(run_id, "sealed", {"state": str(run.state)}, key="sealed")


def failed_verdict(error: JsonObject) -> JsonObject:
    """The verdict on a run whose agent could not be started."""
    state = State.EXPIRED if error.get("code") == "stale" else State.FAILED
    return {**Verdict(state, str(error.get("message", "")), "none", escalate=True).to_json(), "error": error}


def _uncalled(result: TaskResult) -> TaskResult:
    """A task that was cancelled without anybody here having asked for it was ended by the machine: that is a failure."""
    if result.outcome != "cancelled":
        return result
    return dataclasses.replace(
        result,
        outcome="error",
        reason="the edge agent ended the task: its broker or its unit was stopped on the machine",
    )


def _traceparent(run_id: str) -> str:
    return f"00-{trace_id(run_id)}-{span_id(run_id, 'task')}-01"


class _Conversation:
    """The talk with one worker: the A2A stream, and answering its inferences."""

    def __init__(self, services: Services, run: Run, document: TaskDocument) -> None:
        self._services = services
        self._run = run
        self._document = document
        self._client: TaskClient | None = None
        self._task_id = ""
        self._result: TaskResult | None = None

    async def hold(self, gatekeeper: Gatekeeper, directory: Path, spec: ModelSpec) -> TaskResult:
        """Send the task and follow it to its end. Failures of the conversation come back as a result."""
        silence_s = float(self._services.settings.limits.task_s)
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(gatekeeper.dial("a2a", directory / "a2a"))
                if spec.provider != "runbook" and spec.via == "gateway":
                    await stack.enter_async_context(gatekeeper.dial("inference", directory / "inference"))
                    await stack.enter_async_context(_serving(self._serve_inference(directory / "inference", spec)))
                self._client = await stack.enter_async_context(TaskClient(str(directory / "a2a"), silence_s))
                await asyncio.to_thread(self._services.store.events.add, self._run.id, "task.sent", {}, key="task.sent")
                async for update in self._client.run(self._document):
                    self._task_id = update.task_id or self._task_id
                    await self._take(update.events)
                    if update.result is not None:
                        self._result = update.result
                    if update.state in ENDED and self._result is None:
                        self._result = TaskResult(
                            "error", update.text or f"the worker ended the task as {update.state}", None
                        )
            except (TaskFailed, Malformed, ChargehandError) as error:
                return self.partial("error", f"the conversation with the worker ended early: {error}")
        return self._result or TaskResult("error", "the worker ended the task without a result", None)

    async def cancel(self) -> bool:
        """Ask the worker to cancel; ``False`` if it could not be asked: it is stopped with its unit then."""
        if self._client is None or not self._task_id:
            return False
        try:
            await asyncio.wait_for(self._client.cancel(self._task_id), CANCEL_ASK_S)
        except (TaskFailed, TimeoutError):
            return False
        return True

    def partial(self, outcome: str, reason: str) -> TaskResult:
        """What is known when the conversation did not come to its end."""
        if self._result is not None:
            return dataclasses.replace(self._result, outcome=outcome, reason=reason)
        return TaskResult(outcome, reason, None)

    async def _take(self, events: tuple[Event, ...]) -> None:
        """Store what was streamed and record decisions, results and inferences in the audit chain."""
        if not events:
            return
        fresh = await asyncio.to_thread(self._services.store.events.append, self._run.id, events)
        records = []
        for event in fresh:
            record = _audited(event.kind, event.body)
            if record is not None:
                records.append((*record, f"{self._run.id}:{event.kind}:{event.key}"))
        await self._services.record_all(self._run.machine, records, run_id=self._run.id)

    async def _serve_inference(self, socket_path: Path, spec: ModelSpec) -> None:
        """Answer the worker's inferences with the centre's own key."""
        model: Model | None = None
        limits = self._services.settings.limits
        used = 0
        spent = 0.0

        async def open_once(_: Request) -> Model:
            nonlocal model
            if model is None:
                model = open_model(spec, self._services.environment)
            return model

        async def admit(request: Request) -> Request:
            if used < limits.tokens and not (limits.cost_usd and spent >= limits.cost_usd):
                return request
            reason = f"{used} of {limits.tokens} tokens and {spent:.4f} of {limits.cost_usd:g} US dollars are used"
            await self._services.record(
                self._run.machine, kinds.INFERENCE, {"denied": reason, "seen_by": "gateway"}, run_id=self._run.id
            )
            raise InferenceDenied(f"the run may not infer any more: {reason}")

        async def recorded(record: InferenceRecord) -> None:
            nonlocal used, spent
            if record.usage is not None:
                used += record.usage.tokens
                spent += record.usage.cost_usd or 0.0
            number = str(record.metadata.get("inference_id", ""))
            body = dict(record.to_json(), seen_by="gateway")
            body.pop("metadata")
            await self._services.record(
                self._run.machine, kinds.INFERENCE, {"inference_id": number, **body}, run_id=self._run.id
            )

        reader, writer = await asyncio.open_unix_connection(str(socket_path), limit=1 << 20)
        try:
            await serve(reader, writer, open_once, recorded, admit=admit)
        except InferenceError as error:
            logger.warning("inference for run %s: %s", self._run.id, error)
        finally:
            writer.close()
            if model is not None:
                await model.aclose()


@contextlib.asynccontextmanager
async def _serving(work: Any) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _audited(kind: str, body: Mapping[str, Any]) -> tuple[str, JsonObject] | None:
    """What of a streamed event goes into the audit chain: metadata and digests, no content."""
    if kind == "call.decided":
        decision = body.get("decision") or {}
        named = {name: decision.get(name) for name in ("outcome", "effect", "rule", "reason", "digest")}
        return kinds.DECISION, {"call_id": body.get("call_id"), **named}
    if kind == "call.finished" and isinstance(body.get("evidence"), Mapping):
        evidence = body["evidence"]
        steps = [
            {
                name: step.get(name)
                for name in ("argv", "path", "exit_status", "signal", "stdout_digest", "stdout_bytes")
            }
            for step in evidence.get("steps") or []
        ]
        return kinds.EVIDENCE, {
            "call_id": body.get("call_id"),
            "steps": steps,
            "evidence_digest": digest(dict(evidence)),
        }
    if kind == "inference.finished":
        return kinds.INFERENCE, {**dict(body), "seen_by": "worker"}
    return None
