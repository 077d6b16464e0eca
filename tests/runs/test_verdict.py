"""The judgement of a task, and what becomes of findings without evidence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2a_bridge.messages import TaskResult
from supervisor.runs.states import State
from supervisor.runs.verdict import calls_of, judge
from tools.values import SEVERITIES, Event, Finding, Report


def executed(*call_ids: str) -> list[Event]:
    events = []
    for call_id in call_ids:
        asked = {"call_id": call_id, "tool": "exec", "arguments": {"argv": ["uptime"]}}
        events.append(Event(len(events) + 1, "call.asked", asked))
        decision = {"outcome": "allow", "effect": "observe", "rule": "uptime", "reason": "", "steps": []}
        events.append(Event(len(events) + 1, "call.decided", {"call_id": call_id, "decision": decision}))
        evidence = {"call_id": call_id, "tool": "exec", "steps": [], "data": None, "error": "", "duration_ms": 1.0}
        events.append(Event(len(events) + 1, "call.finished", {"call_id": call_id, "evidence": evidence}))
    return events


def reported(*findings: Finding) -> TaskResult:
    return TaskResult("reported", "the model reported", Report("done", findings))


def test_a_finding_that_cites_an_executed_call_is_accepted() -> None:
    verdict = judge(reported(Finding("f", "warning", "t", evidence=("c1",))), executed("c1"))
    assert [finding.id for finding in verdict.findings] == ["f"]
    assert (verdict.state, verdict.severity, verdict.escalate) == (State.SUCCEEDED, "warning", False)


def test_a_finding_without_a_call_id_is_refused() -> None:
    verdict = judge(reported(Finding("f", "critical", "t")), executed("c1"))
    assert verdict.findings == ()
    assert verdict.refused[0]["why"] == "it cites no tool call"
    assert verdict.severity == "none"
    assert verdict.escalate


def test_a_finding_that_cites_a_call_which_was_never_executed_is_refused() -> None:
    verdict = judge(reported(Finding("f", "ok", "t", evidence=("c1", "c9"))), executed("c1"))
    assert verdict.findings == ()
    assert "c9" in verdict.refused[0]["why"]


def test_a_refused_call_is_no_evidence() -> None:
    events = [*executed("c1")[:2], Event(3, "call.finished", {"call_id": "c1", "refused": True})]
    assert judge(reported(Finding("f", "ok", "t", evidence=("c1",))), events).findings == ()


@pytest.mark.parametrize(
    ("outcome", "reason", "state"),
    [
        ("reported", "", State.SUCCEEDED),
        ("cancelled", "", State.CANCELLED),
        ("error", "", State.FAILED),
        ("limit", "limit steps: 30", State.FAILED),
        ("limit", "limit same_refusal: refused 3 times", State.DENIED),
        ("refused", "", State.FAILED),
        ("something new", "", State.FAILED),
    ],
)
def test_each_outcome_leads_to_its_state(outcome: str, reason: str, state: State) -> None:
    assert judge(TaskResult(outcome, reason, None), []).state is state


_bodies = st.dictionaries(
    st.sampled_from(["call_id", "tool", "arguments", "decision", "evidence", "refused"]),
    st.one_of(st.none(), st.text(max_size=5), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)),
)


@given(
    st.lists(
        st.builds(Event, st.integers(1, 9), st.sampled_from(["call.asked", "call.decided", "call.finished"]), _bodies)
    ),
    st.lists(st.builds(Finding, st.text(max_size=3), st.sampled_from(SEVERITIES), st.text(max_size=3))),
)
def test_whatever_was_streamed_an_uncited_finding_is_never_accepted(
    events: list[Event], findings: list[Finding]
) -> None:
    assert judge(reported(*findings), events).findings == ()
    calls_of(events)
