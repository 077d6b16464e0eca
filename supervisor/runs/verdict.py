"""The judgement of a task: from its result and its evidence to a verdict.

Owns: the rule that a finding without executed evidence is refused, and which state a run is heading for. Pure.
Deliberately does not know: the store, the machine, how the result was made.

Rule (architecture.md, "Evidence before prose"): the worker has checked its report too, but the worker may have been
taken over; what counts is what the gateway itself saw streamed and, at sealing, what the host's journal says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from a2a_bridge.messages import TaskResult
from supervisor.runs.states import State
from tools.values import SEVERITIES, Event, Finding, JsonObject


@dataclasses.dataclass(frozen=True)
class Executed:
    """One tool call as it was streamed. ``decision`` ``""``: none came; ``finished``: its end was told."""

    call_id: str
    tool: str
    arguments: JsonObject
    decision: str = ""
    rule: str = ""
    reason: str = ""
    effect: str = ""
    executed: bool = False
    finished: bool = False
    evidence: JsonObject | None = None


def calls_of(events: Iterable[Event]) -> dict[str, Executed]:
    """The tool calls of a run by id, in the order of asking, from its streamed events."""
    calls: dict[str, Executed] = {}
    for event in events:
        call_id = str(event.body.get("call_id", ""))
        if event.kind == "call.asked":
            arguments = event.body.get("arguments")
            tool = str(event.body.get("tool", ""))
            calls[call_id] = Executed(call_id, tool, dict(arguments) if isinstance(arguments, Mapping) else {})
        elif event.kind == "call.decided" and call_id in calls:
            said = event.body.get("decision")
            decision = said if isinstance(said, Mapping) else {}
            calls[call_id] = dataclasses.replace(
                calls[call_id],
                decision=str(decision.get("outcome", "")),
                rule=str(decision.get("rule", "")),
                reason=str(decision.get("reason", "")),
                effect=str(decision.get("effect", "")),
            )
        elif event.kind == "call.finished" and call_id in calls:
            evidence = event.body.get("evidence")
            calls[call_id] = dataclasses.replace(
                calls[call_id],
                finished=True,
                executed=isinstance(evidence, dict),
                evidence=evidence if isinstance(evidence, dict) else None,
            )
    return calls


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is made of a task. ``state``: where the run is heading once its unit is proven inactive; ``reason``: a
    sentence; ``severity``: the worst of the accepted findings (``none`` without any); ``refused``: findings that were
    not accepted, each with why; ``escalate``: whether a person should look."""

    state: State
    reason: str
    severity: str
    findings: tuple[Finding, ...] = ()
    refused: tuple[JsonObject, ...] = ()
    escalate: bool = False

    def to_json(self) -> JsonObject:
        return {
            "state": str(self.state),
            "reason": self.reason,
            "severity": self.severity,
            "findings": [finding.to_json() for finding in self.findings],
            "refused": list(self.refused),
            "escalate": self.escalate,
        }


# How the loop ended → where the run goes. A limit that the policy set off is a denial, every other one a failure.
_OUTCOMES: Mapping[str, State] = {
    "reported": State.SUCCEEDED,
    "cancelled": State.CANCELLED,
    "refused": State.FAILED,
    "limit": State.FAILED,
    "error": State.FAILED,
}


def judge(result: TaskResult, events: Iterable[Event]) -> Verdict:
    """The verdict on ``result`` in the light of what was streamed."""
    executed = {call.call_id for call in calls_of(events).values() if call.executed}
    accepted: list[Finding] = []
    refused: list[JsonObject] = []
    for finding in result.report.findings if result.report is not None else ():
        missing = [call_id for call_id in finding.evidence if call_id not in executed]
        if not finding.evidence:
            refused.append({"id": finding.id, "title": finding.title, "why": "it cites no tool call"})
        elif missing:
            why = f"it cites {', '.join(missing)}, which was not executed in this run"
            refused.append({"id": finding.id, "title": finding.title, "why": why})
        else:
            accepted.append(finding)
    severity = max((finding.severity for finding in accepted), key=SEVERITIES.index, default="none")
    state = _OUTCOMES.get(result.outcome, State.FAILED)
    if result.outcome == "limit" and "same_refusal" in result.reason:
        state = State.DENIED
    escalate = severity == "critical" or bool(refused) or state in (State.FAILED, State.DENIED)
    return Verdict(state, result.reason, severity, tuple(accepted), tuple(refused), escalate)
