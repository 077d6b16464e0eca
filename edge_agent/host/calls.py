"""One tool call from asking to evidence: gate, journal and runner, joined.

Owns: the order of things (audit-and-traces.md, "Journal"): asked and decided are written, then the intent of each step,
then the step is executed, then its result is written; only then is anybody told.
Deliberately does not know: sockets, leases, the worker. The owner's selector loop drives it.
"""

from __future__ import annotations

import dataclasses
import os
import selectors
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from edge_agent.host.errors import JournalFailed, Refused
from edge_agent.host.home import Home
from edge_agent.host.journal import Journal
from edge_agent.host.pins import Pins
from edge_agent.host.runner import KILL_DEADLINE_S, Pipeline, access_file
from tools.catalogue import catalogue
from tools.gate import decide, decide_probe
from tools.observers.observer import BadParameters, Observer, Probe
from tools.observers.registry import OBSERVERS
from tools.paths import PathRefused, expand, open_by_rules, resolve
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
    canonical,
    digest,
)

# What stands of a call's arguments in the journal, bytes; longer ones are named by their digest.
ARGUMENTS_BYTES = 8192

# An observer asks many small questions; one that hangs (a bus nobody answers on) must not hold up the rest, seconds.
PROBE_S = 8.0

Tell = Callable[[JsonObject], None]
# What is left of a call's phase: each a step to execute or a result already known.
_Todo = List[Tuple[Optional[Step], Optional[StepResult]]]
# The rule of a refusal whose reason is that the journal could not be written.
JOURNAL_RULE = "journal"
# Characters of output that one evidence may hold, all steps together; what is over is cut and says so. A line to the
# worker then stays below 1 MiB even if every character is written as six.
EVIDENCE_CHARACTERS = 160_000


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
        return expand(pattern, limit)


@dataclasses.dataclass
class _Call:
    """The call that is on now. ``todo``: what is left of the phase, each a step to execute or a result already known."""

    call: ToolCall
    decision: Decision
    tell_done: Tell
    started: float
    todo: _Todo
    results: List[StepResult]
    observer: Optional[Observer] = None
    executed: int = 0
    cancelled: str = ""
    broken: str = ""


class Calls:
    """Carries out one call at a time.

    Args:
        policy: the compiled policy of the lease.
        home: the installation, whose own directory no call may read.
        journal: the run's.
        selector: the owner's loop; it must call ``check_time`` at the latest at ``deadline`` (monotonic seconds).
        may_act: asked at the last moment before each execution, after its intent was written: whether the right to act
            still lasts. Writing may take long on a slow disk.
    """

    def __init__(
        self,
        policy: Policy,
        home: Home,
        journal: Journal,
        selector: selectors.BaseSelector,
        may_act: Callable[[], bool],
    ) -> None:
        self._policy = policy
        secret_roots = (home.root, os.path.realpath(home.root))
        self._pins = Pins(path for rule in policy.rules for path in rule.paths)
        self._files = HostFiles(self._pins, secret_roots)
        self._path_rules = policy.path_rules(secret_roots)
        self._journal = journal
        self._selector = selector
        self._may_act = may_act
        self._current: Optional[_Call] = None
        self._pipeline: Optional[Pipeline] = None
        self.counted = 0

    @property
    def busy(self) -> bool:
        return self._current is not None

    @property
    def deadline(self) -> Optional[float]:
        """When ``check_time`` is due, on the monotonic clock; ``None`` while nothing runs."""
        return self._pipeline.deadline if self._pipeline is not None else None

    def catalogue(self) -> List[JsonObject]:
        """The tools a worker may ask for under this policy, as models are told about them."""
        return [tool.to_json() for tool in catalogue(self._policy, OBSERVERS)]

    # -- deciding

    def submit(self, call: ToolCall, tell: Tell, tell_done: Tell) -> None:
        """Decide ``call``, tell the decision, execute it if it is allowed and tell its evidence.

        ``tell`` gets ``{"call_id", "decision"}``; ``tell_done`` gets ``{"call_id", "evidence"}`` or, when nothing is
        executed, ``{"call_id", "refused": true}``. What cannot be written to the journal is refused.
        """
        self.counted += 1
        try:
            self._write_asked(call)
            decision, observer, todo = self._decide(call)
            self._journal.append("call.decided", _decision_record(decision), call.call_id)
        except JournalFailed as error:
            decision = Decision(DENY, OBSERVE, JOURNAL_RULE, "what cannot be recorded is not done: %s" % error)
        tell({"call_id": call.call_id, "decision": decision.to_json()})
        if decision.outcome != ALLOW:
            tell_done({"call_id": call.call_id, "refused": True})
            return
        self._current = _Call(call, decision, tell_done, time.monotonic(), todo, [], observer)
        self._advance()

    def refuse(self, call: ToolCall, rule: str, reason: str, tell: Tell, tell_done: Tell) -> None:
        """Refuse ``call`` without asking the gate; told and written like any other refusal."""
        self.counted += 1
        decision = Decision(DENY, OBSERVE, rule, reason)
        try:
            self._write_asked(call)
            self._journal.append("call.decided", _decision_record(decision), call.call_id)
        except JournalFailed as error:
            decision = dataclasses.replace(decision, reason="%s (and the journal: %s)" % (reason, error))
        tell({"call_id": call.call_id, "decision": decision.to_json()})
        tell_done({"call_id": call.call_id, "refused": True})

    def _write_asked(self, call: ToolCall) -> None:
        self._journal.append("call.asked", {"tool": call.tool, "arguments": _brief(call.arguments)}, call.call_id)

    def _decide(self, call: ToolCall) -> Tuple[Decision, Optional[Observer], _Todo]:
        todo: _Todo = []
        observer = OBSERVERS.get(call.tool)
        if observer is not None:
            decision, todo = self._decide_observer(observer, call)
        else:
            decision = decide(self._policy, call, self._files)
            todo = [(step, None) for step in decision.steps]
        return decision, observer, todo

    def _decide_observer(self, observer: Observer, call: ToolCall) -> Tuple[Decision, _Todo]:
        try:
            probes = observer.probes(call.arguments)
        except BadParameters as error:
            return Decision(DENY, OBSERVE, "observer-parameters", str(error)), []
        todo, refusals = self._decide_probes(probes)
        steps = tuple(step for step, _ in todo if step is not None)
        rule = "observer:" + observer.name
        if not steps and refusals:
            first = refusals[0]
            return Decision(
                DENY, OBSERVE, first.rule, "observer %s: %s" % (observer.name, first.reason), first.hint
            ), []
        return Decision(ALLOW, OBSERVE, rule, "a typed read-only observer", steps=steps), todo

    def _decide_probes(self, probes: Sequence[Probe]) -> Tuple[_Todo, List[Decision]]:
        todo: _Todo = []
        refusals: List[Decision] = []
        for probe in probes:
            decision = decide_probe(self._policy, probe, self._files)
            if decision.outcome == ALLOW:
                todo.extend((_with_output(step, probe.output_bytes), None) for step in decision.steps)
                continue
            refusals.append(decision)
            todo.append(
                (
                    None,
                    StepResult(
                        argv=(probe.argv,) if probe.argv else (), path=probe.path or None, error=decision.reason
                    ),
                )
            )
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
            self._write_intent(current, intent)
            current.results.append(access_file(step.file, self._open))
            return
        intent["argv"] = [list(stage.argv) for stage in step.stages]
        intent["binaries"] = [self._pins.sha256(stage.binary) for stage in step.stages]
        self._write_intent(current, intent)
        self._pipeline = Pipeline(step.stages, self._pins, self._selector, self._step_done)

    def _write_intent(self, current: _Call, intent: JsonObject) -> None:
        self._journal.append("call.intent", intent, current.call.call_id)
        if not self._may_act():
            raise Refused("the right to act ended before this could be executed")

    def _open(self, access: FileAccess) -> int:
        try:
            return open_by_rules(access.path, self._path_rules)
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
        try:
            probes = current.observer.next_probes(current.results, current.call.arguments)
        except Exception as error:  # noqa: BLE001 - see _finish
            current.broken = "observer %s could not go on: %r" % (current.observer.name, error)
            return False
        current.todo, _ = self._decide_probes(probes)
        return bool(current.todo)

    def _finish(self, current: _Call) -> None:
        data = None
        error = current.cancelled or current.broken
        if current.observer is not None and not error:
            # An observer reads what a hostile machine printed. If it stumbles, one call has no data; the run goes on.
            try:
                data = current.observer.parse(current.results, current.call.arguments)
                canonical(data)
            except Exception as stumble:  # noqa: BLE001
                data, error = None, "the output could not be parsed: %r" % stumble
        evidence = Evidence(
            current.call.call_id,
            current.call.tool,
            _bounded(current.results),
            data,
            error[:2000],
            round((time.monotonic() - current.started) * 1000, 3),
        )
        try:
            self._journal.append("call.result", _result_record(evidence), current.call.call_id)
        except JournalFailed as failure:
            # It was executed and its intent is on disk; that the result is not, must be said.
            evidence = dataclasses.replace(
                evidence, error="the result could not be written to the journal: %s" % failure
            )
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
        dataclasses.replace(stage, output_bytes=output_bytes, timeout_s=min(stage.timeout_s, PROBE_S))
        for stage in step.stages
    )
    return dataclasses.replace(step, stages=stages)


def _bounded(results: Sequence[StepResult]) -> Tuple[StepResult, ...]:
    """``results`` with outputs that fit one line to the worker; sizes and digests stay those of everything."""
    if sum(len(result.stdout) + len(result.stderr) for result in results) <= EVIDENCE_CHARACTERS:
        return tuple(results)
    share = EVIDENCE_CHARACTERS // (2 * len(results))
    return tuple(
        dataclasses.replace(
            result,
            stdout=result.stdout[:share],
            stderr=result.stderr[:share],
            cut=result.cut or len(result.stdout) > share or len(result.stderr) > share,
        )
        for result in results
    )


def _failed(step: Step, error: str) -> StepResult:
    return StepResult(
        argv=tuple(stage.argv for stage in step.stages), path=step.file.path if step.file else None, error=error
    )


def _brief(arguments: JsonObject) -> JsonObject:
    """Arguments as the journal keeps them: file contents and very long ones by digest and size."""
    try:
        kept: Dict[str, Any] = {
            name: value if name != "content" else _content_record(str(value)) for name, value in arguments.items()
        }
        size = len(canonical(kept))
        return kept if size <= ARGUMENTS_BYTES else {"digest": digest(arguments), "bytes": size}
    except (ValueError, TypeError, RecursionError) as error:
        # Not JSON after all (NaN), or too deep. The gate will refuse it; that it was asked for is on record.
        return {"unreadable": str(error)[:200]}


def _content_record(text: str) -> JsonObject:
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = text.encode("utf-8", "backslashreplace")
    return {"digest": digest(data), "bytes": len(text.encode("utf-8", "replace"))}


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
