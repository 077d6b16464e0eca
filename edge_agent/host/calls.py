"""One tool call from asking to evidence: gate, journal and runner, joined.

Owns: the order of things (audit-and-traces.md, "Journal"): asked and decided are written, then the intent of each step,
then the step is executed, then its result is written; only then is anybody told.
Deliberately does not know: sockets, leases, the worker. The owner's selector loop drives it.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import selectors
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from edge_agent.host.errors import JournalFailed, Refused
from edge_agent.host.home import Home
from edge_agent.host.journal import Journal
from edge_agent.host.pins import Pins
from edge_agent.host.runner import KILL_DEADLINE_S, Pipeline, access_file
from tools.gate import decide, decide_probe
from tools.observers.observer import BadParameters, Observer, Probe
from tools.observers.registry import OBSERVERS
from tools.paths import PathRefused, open_regular, resolve
from tools.policy import Policy
from tools.values import (
    ALLOW,
    DENY,
    OBSERVE,
    Decision,
    Evidence,
    FileAccess,
    JsonObject,
    Stage,
    Step,
    StepResult,
    ToolCall,
    digest,
)

# What stands of a call's arguments in the journal, bytes; longer ones are named by their digest.
ARGUMENTS_BYTES = 8192

# An observer asks many small questions; one that hangs (a bus nobody answers on) must not hold up the rest, seconds.
PROBE_S = 8.0

Tell = Callable[[JsonObject], None]


class HostFiles:
    """What the gate may ask about this machine (``tools.gate.HostView``)."""

    def __init__(self, pins: Pins, secret_roots: Tuple[str, ...]) -> None:
        self._pins = pins
        self.secret_roots = secret_roots

    def pinned(self, path: str) -> bool:
        """Whether ``path`` was an executable when the lease started."""
        return self._pins.real(path) is not None

    def resolve(self, path: str) -> str:
        """``path`` with every link followed. Raises ``PathRefused``."""
        return resolve(path)

    def expand(self, pattern: str, limit: int) -> List[str]:
        """At most ``limit + 1`` paths that match the glob, sorted; hidden names only if the pattern says so."""
        return sorted(itertools.islice(glob.iglob(pattern), limit + 1))


@dataclasses.dataclass
class _Call:
    """The call that is on now. ``todo``: what is left of the phase, each a step to execute or a result already known."""

    call: ToolCall
    decision: Decision
    tell_done: Tell
    started: float
    todo: List[Tuple[Optional[Step], Optional[StepResult]]]
    results: List[StepResult]
    observer: Optional[Observer] = None
    executed: int = 0
    cancelled: str = ""


class Calls:
    """Carries out one call at a time.

    Args:
        policy: the compiled policy of the lease (JSON form); raises ``Malformed`` if it is none.
        home: the installation, whose own directory no call may read.
        journal: the run's.
        selector: the owner's loop; it must call ``check_time`` at the latest at ``deadline`` (monotonic seconds).
    """

    def __init__(
        self, policy: Mapping[str, Any], home: Home, journal: Journal, selector: selectors.BaseSelector
    ) -> None:
        self._policy = Policy.from_json(policy)
        self._secret_roots = (home.root, os.path.realpath(home.root))
        self._pins = Pins(path for rule in self._policy.rules for path in rule.paths)
        self._files = HostFiles(self._pins, self._secret_roots)
        self._journal = journal
        self._selector = selector
        self._current: Optional[_Call] = None
        self._pipeline: Optional[Pipeline] = None
        self.counted = 0
        self._ended = ""

    @property
    def busy(self) -> bool:
        return self._current is not None

    @property
    def deadline(self) -> Optional[float]:
        """When ``check_time`` is due, on the monotonic clock; ``None`` while nothing runs."""
        return self._pipeline.deadline if self._pipeline is not None else None

    def catalogue(self) -> List[str]:
        """The names of the tools that a worker may ask for."""
        return ["exec", "read", "write", *sorted(OBSERVERS)]

    # -- deciding

    def submit(self, call: ToolCall, tell: Tell, tell_done: Tell) -> None:
        """Decide ``call``, tell the decision, execute it if it is allowed and tell its evidence.

        ``tell`` gets ``{"call_id", "decision"}``; ``tell_done`` gets ``{"call_id", "evidence"}`` or, when nothing is
        executed, ``{"call_id", "refused": true}``. Raises ``JournalFailed``: nothing was executed then.
        """
        self._journal.append("call.asked", {"tool": call.tool, "arguments": _brief(call.arguments)}, call.call_id)
        self.counted += 1
        todo: List[Tuple[Optional[Step], Optional[StepResult]]] = []
        observer = OBSERVERS.get(call.tool)
        if observer is not None:
            decision, todo = self._decide_observer(observer, call)
        else:
            decision = decide(self._policy, call, self._files)
            todo = [(step, None) for step in decision.steps]
        self._journal.append("call.decided", _decision_record(decision), call.call_id)
        tell({"call_id": call.call_id, "decision": decision.to_json()})
        if decision.outcome != ALLOW:
            tell_done({"call_id": call.call_id, "refused": True})
            return
        self._current = _Call(call, decision, tell_done, time.monotonic(), todo, [], observer)
        self._advance()

    def _decide_observer(
        self, observer: Observer, call: ToolCall
    ) -> Tuple[Decision, List[Tuple[Optional[Step], Optional[StepResult]]]]:
        try:
            probes = observer.probes(call.arguments)
        except BadParameters as error:
            return Decision(DENY, OBSERVE, "observer-parameters", str(error)), []
        todo, refusals = self._decide_probes(call.call_id, probes)
        steps = tuple(step for step, _ in todo if step is not None)
        rule = "observer:" + observer.name
        if not steps and refusals:
            first = refusals[0]
            return Decision(DENY, OBSERVE, first.rule, "observer %s: %s" % (observer.name, first.reason), first.hint), []
        return Decision(ALLOW, OBSERVE, rule, "a typed read-only observer", steps=steps), todo

    def _decide_probes(
        self, call_id: str, probes: Sequence[Probe]
    ) -> Tuple[List[Tuple[Optional[Step], Optional[StepResult]]], List[Decision]]:
        todo: List[Tuple[Optional[Step], Optional[StepResult]]] = []
        refusals: List[Decision] = []
        for probe in probes:
            decision = decide_probe(self._policy, probe, self._files)
            if decision.outcome == ALLOW:
                todo.extend((_with_output(step, probe.output_bytes), None) for step in decision.steps)
                continue
            refusals.append(decision)
            todo.append((None, StepResult(argv=(probe.argv,) if probe.argv else (), path=probe.path or None, error=decision.reason)))
        return todo, refusals

    # -- executing

    def _advance(self) -> None:
        current = self._current
        while current is not None and self._pipeline is None:
            if current.cancelled or not current.todo:
                if not current.cancelled and self._next_phase(current):
                    continue
                self._finish(current)
                return
            step, known = current.todo.pop(0)
            if step is None:
                current.results.append(known or StepResult(error="the probe was not carried out"))
                continue
            try:
                self._execute(current, step)
            except (Refused, OSError) as error:
                current.results.append(_failed(step, str(error)))
            except JournalFailed as error:
                current.results.append(_failed(step, str(error)))
                current.cancelled = str(error)

    def _execute(self, current: _Call, step: Step) -> None:
        current.executed += 1
        intent: JsonObject = {"step": current.executed, "digest": digest(step.to_json())}
        if step.file is not None:
            intent["path"] = step.file.path
            self._journal.append("call.intent", intent, current.call.call_id)
            current.results.append(access_file(step.file, self._open))
            return
        intent["argv"] = [list(stage.argv) for stage in step.stages]
        self._journal.append("call.intent", intent, current.call.call_id)
        self._pipeline = Pipeline(step.stages, self._pins, self._selector, self._step_done)

    def _open(self, access: FileAccess) -> int:
        policy = self._policy
        try:
            return open_regular(
                access.path,
                os.O_RDONLY,
                policy.read_roots,
                policy.secret_roots + self._secret_roots,
                policy.kernel_files,
            )
        except PathRefused as error:
            raise Refused(error.reason) from error

    def _step_done(self, result: StepResult) -> None:
        self._pipeline = None
        if self._current is not None:
            self._current.results.append(result)
            self._advance()

    def _next_phase(self, current: _Call) -> bool:
        if current.observer is None:
            return False
        probes = current.observer.next_probes(current.results, current.call.arguments)
        current.todo, _ = self._decide_probes(current.call.call_id, probes)
        return bool(current.todo)

    def _finish(self, current: _Call) -> None:
        data = None
        error = current.cancelled
        if current.observer is not None and not error:
            data = current.observer.parse(current.results, current.call.arguments)
        evidence = Evidence(
            current.call.call_id,
            current.call.tool,
            tuple(current.results),
            data,
            error,
            round((time.monotonic() - current.started) * 1000, 3),
        )
        try:
            self._journal.append("call.result", _result_record(evidence), current.call.call_id)
        except JournalFailed as failure:
            # It was executed and its intent is on disk; that the result is not, must be said.
            evidence = dataclasses.replace(evidence, error="the result could not be written to the journal: %s" % failure)
        self._current = None
        current.tell_done({"call_id": current.call.call_id, "evidence": evidence.to_json()})

    # -- ending

    def check_time(self, now: float) -> None:
        if self._pipeline is not None:
            self._pipeline.check_time(now)

    def cancel(self, call_id: Optional[str], reason: str) -> None:
        """Kill what runs for ``call_id`` (``None``: whatever runs); its evidence says that it was cancelled."""
        current = self._current
        if current is None or (call_id is not None and current.call.call_id != call_id):
            return
        current.cancelled = reason
        if self._pipeline is not None:
            self._pipeline.cancel(reason)

    def end(self, reason: str) -> None:
        """Kill what runs and write its result; afterwards nothing is executed any more."""
        self.cancel(None, reason)
        if self._pipeline is not None:
            self._pipeline.drain(KILL_DEADLINE_S)


def _with_output(step: Step, output_bytes: int) -> Step:
    if step.file is not None:
        return dataclasses.replace(step, file=dataclasses.replace(step.file, length=output_bytes))
    stages: Tuple[Stage, ...] = tuple(
        dataclasses.replace(stage, output_bytes=output_bytes, timeout_s=min(stage.timeout_s, PROBE_S)) for stage in step.stages
    )
    return dataclasses.replace(step, stages=stages)


def _failed(step: Step, error: str) -> StepResult:
    return StepResult(
        argv=tuple(stage.argv for stage in step.stages), path=step.file.path if step.file else None, error=error
    )


def _brief(arguments: JsonObject) -> JsonObject:
    """Arguments as the journal keeps them: file contents and very long ones by digest and size."""
    kept: Dict[str, Any] = {
        name: value if name != "content" else {"digest": digest(str(value)), "bytes": len(str(value).encode("utf-8", "replace"))}
        for name, value in arguments.items()
    }
    text = repr(kept)
    return kept if len(text) <= ARGUMENTS_BYTES else {"digest": digest(arguments), "bytes": len(text)}


def _decision_record(decision: Decision) -> JsonObject:
    return {
        "outcome": decision.outcome,
        "effect": decision.effect,
        "rule": decision.rule,
        "reason": decision.reason[:500],
        "digest": decision.digest,
        "steps": len(decision.steps),
    }


def _result_record(evidence: Evidence) -> JsonObject:
    """What the journal keeps of the evidence: digests and figures, no output."""
    return {
        "steps": [
            {
                "exit_status": step.exit_status,
                "exit_statuses": list(step.exit_statuses),
                "signal": step.signal,
                "stdout_digest": step.stdout_digest,
                "stdout_bytes": step.stdout_bytes,
                "stderr_digest": step.stderr_digest,
                "stderr_bytes": step.stderr_bytes,
                "cut": step.cut,
                "timed_out": step.timed_out,
                "cancelled": step.cancelled,
                "error": step.error[:300],
                "duration_ms": step.duration_ms,
            }
            for step in evidence.steps
        ],
        "data_digest": digest(evidence.data) if evidence.data is not None else None,
        "error": evidence.error[:500],
        "duration_ms": evidence.duration_ms,
    }
