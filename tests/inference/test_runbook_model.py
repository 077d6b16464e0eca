"""The model that is no language model, through the same loop as the others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from inference.choice import open_model, parse_spec
from inference.loop import Limits, LoopResult, LoopTask, run_loop
from inference.protocol import ToolSpec
from inference.runbook_model import RunbookModel
from tools.observers.registry import OBSERVERS
from tools.values import ALLOW, DENY, OBSERVE, Decision, Evidence, Malformed, StepResult, ToolCall

RUNBOOK: dict[str, Any] = {
    "name": "small",
    "title": "Small look",
    "description": "Two observers.",
    "steps": [
        {"id": "space", "observer": "disk_space", "title": "Disk space", "ok": "All have room."},
        {"id": "memory", "observer": "memory", "title": "Memory"},
    ],
    "checks": [
        {
            "id": "full", "step": "space", "for_each": "filesystems", "key": "mount",
            "when": {"field": "used_percent", "op": "ge", "value": 90},
            "severity": "critical", "title": "{mount} is full", "detail": "{used_percent} used",
        }
    ],
}  # fmt: skip
TOOLS = tuple(ToolSpec(name, name, {"type": "object"}) for name in ("disk_space", "memory", "exec"))


class Machine:
    """Answers the observers with data; ``refused`` tools are denied, ``broken`` ones give no data."""

    def __init__(self, refused: str = "", broken: str = "") -> None:
        self.refused, self.broken = refused, broken
        self.calls: list[ToolCall] = []

    async def __call__(self, call: ToolCall) -> tuple[Decision, Evidence | None]:
        self.calls.append(call)
        if call.tool == self.refused:
            return Decision(DENY, OBSERVE, "default-deny", "not in the policy"), None
        allowed = Decision(ALLOW, OBSERVE, call.tool, "allowed")
        if call.tool == self.broken:
            return allowed, Evidence(call.call_id, call.tool, (StepResult(error="killed"),), error="timed out")
        data: dict[str, Any] = dict.fromkeys(OBSERVERS[call.tool].returns)
        if call.tool == "disk_space":
            data["filesystems"] = [{"mount": "/", "used_percent": 97}, {"mount": "/var", "used_percent": 10}]
        return allowed, Evidence(call.call_id, call.tool, (), data)


async def follow(model: RunbookModel, machine: Machine, tools: Any = TOOLS, **limits: Any) -> LoopResult:
    task = LoopTask("", "How is this machine?", tools, Limits(**limits))
    return await run_loop(model, task, machine, lambda kind, body: None, asyncio.Event())


async def test_it_asks_for_its_observers_and_reports_from_their_evidence() -> None:
    machine = Machine()
    result = await follow(RunbookModel(RUNBOOK), machine)
    assert (result.outcome, result.steps) == ("reported", 2)
    assert [call.tool for call in machine.calls] == ["disk_space", "memory"]
    assert result.report is not None
    assert result.report.model == "runbook:small"
    first = result.report.findings[0]
    assert (first.id, first.severity, first.evidence) == ("full:/", "critical", ("c1",))


async def test_it_says_plainly_that_no_language_model_took_part_and_why() -> None:
    model = open_model(parse_spec("runbook"), {}, runbook=RUNBOOK, why="no language model is configured")
    result = await follow(model, Machine())  # type: ignore[arg-type]
    assert result.report is not None
    assert "No language model took part" in result.report.notes[0]
    assert "no language model is configured" in result.report.notes[0]
    chosen = await follow(RunbookModel(RUNBOOK), Machine())
    assert chosen.report is not None
    assert "the runbook was chosen" in chosen.report.notes[0]


async def test_it_takes_no_tokens_and_its_cost_is_known_to_be_nothing() -> None:
    result = await follow(RunbookModel(RUNBOOK), Machine(), cost_usd=0.01)
    assert result.usage.tokens == 0
    assert result.usage.to_json()["cost_usd"] == 0.0


async def test_one_observer_a_turn_gives_the_same_report() -> None:
    slow, fast = [await follow(RunbookModel(RUNBOOK, per_turn=turns), Machine()) for turns in (1, 0)]
    assert (slow.steps, fast.steps) == (3, 2)
    assert slow.report == fast.report


async def test_a_refused_observer_is_a_note_and_no_evidence() -> None:
    result = await follow(RunbookModel(RUNBOOK), Machine(refused="memory"))
    assert result.outcome == "reported"
    assert result.report is not None
    assert any("Memory was not observed: not in the policy" in note for note in result.report.notes)
    assert all("c2" not in found.evidence for found in result.report.findings)


async def test_an_observer_without_data_is_a_finding_that_cites_the_call() -> None:
    result = await follow(RunbookModel(RUNBOOK), Machine(broken="memory"))
    assert result.report is not None
    (found,) = [found for found in result.report.findings if found.id == "memory-unobserved"]
    assert found.evidence == ("c2",)
    assert "timed out" in found.detail


async def test_an_observer_that_is_not_offered_is_said() -> None:
    result = await follow(RunbookModel(RUNBOOK), Machine(), tools=TOOLS[:1])
    assert result.report is not None
    assert any("Memory was not observed" in note and "not offered" in note for note in result.report.notes)


async def test_a_limit_of_calls_gives_a_report_of_what_was_seen() -> None:
    result = await follow(RunbookModel(RUNBOOK), Machine(), tool_calls=1)
    assert result.outcome == "reported"
    assert result.report is not None
    assert result.report.findings[0].id == "full:/"


async def test_large_results_are_no_reason_to_stop_a_model_that_reads_no_text() -> None:
    result = await follow(RunbookModel(RUNBOOK, per_turn=1), Machine(), tokens=1500)
    assert result.outcome == "reported"


def test_what_is_no_runbook_is_refused() -> None:
    with pytest.raises(Malformed):
        RunbookModel({"name": "x"})
