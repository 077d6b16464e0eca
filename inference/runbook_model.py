"""The ``runbook`` provider: works through a runbook without any language model.

Owns: turning a runbook into the turns of a conversation (ask for the observers, then report), and saying that no
language model took part.
Deliberately does not know: what observers do, what the checks mean (``tools.runbooks``), the loop that drives it.

It implements the same protocol as the others, so the loop, the gate, the audit and the traces are the same. It keeps no
state: everything it needs stands in the request, as for every other model.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from inference.protocol import (
    END,
    TOOL_USE,
    AssistantMessage,
    CallRecord,
    Event,
    Finished,
    Request,
    TextDelta,
    ToolResult,
    ToolUse,
    Usage,
)
from inference.report import REPORT
from tools.runbooks import Observed, PlannedCall, Runbook, evaluate, plan
from tools.values import JsonObject, Report

_STEP = "step-"
_REPORT_ID = "report"
NO_TOKENS = Usage(cost_usd=0.0)  # known to be nothing: no model is asked


class RunbookModel:
    """A model that follows ``runbook``.

    ``runbook``: a ``Runbook`` or its JSON form; ``why``: one sentence that says why no language model is used, for the
    report's notes; ``per_turn``: calls asked for in one turn, 0 for all. Raises ``Malformed`` for a runbook that is none.
    """

    provider = "runbook"
    context_tokens = 10_000_000  # it reads records, not text: nothing needs shortening for it

    def __init__(self, runbook: Runbook | JsonObject, *, why: str = "", per_turn: int = 0) -> None:
        self._runbook = runbook if isinstance(runbook, Runbook) else Runbook.from_json(runbook)
        self._why = why
        self._per_turn = per_turn
        self.name = self._runbook.name

    async def infer(self, request: Request) -> AsyncGenerator[Event, None]:
        """See ``Model``. Never fails."""
        asked, results, rejected = _conversation(request)
        offered = {tool.name for tool in request.tools}
        open_calls = [call for call in plan(self._runbook) if call.step_id not in asked and call.observer in offered]
        if rejected:
            yield TextDelta(f"The report of runbook {self.name!r} was not accepted: {rejected}")
            yield NO_TOKENS
            yield Finished(END, self.name)
            return
        if open_calls:
            for call in open_calls[: self._per_turn or None]:
                yield ToolUse(_STEP + call.step_id, call.observer, dict(call.parameters))
            yield NO_TOKENS
            yield Finished(TOOL_USE, self.name)
            return
        report = self._report(results)
        if REPORT in offered:
            document = report.to_json()
            del document["model"]  # the loop says which model it was
            yield ToolUse(_REPORT_ID, REPORT, document)
        else:
            yield TextDelta(report.summary)
        yield NO_TOKENS
        yield Finished(TOOL_USE if REPORT in offered else END, self.name)

    async def aclose(self) -> None:
        """There is nothing to let go of."""

    def _report(self, results: Mapping[str, ToolResult]) -> Report:
        report = evaluate(self._runbook, {call.step_id: _observed(call, results) for call in plan(self._runbook)})
        said = self._why or "the runbook was chosen"
        note = f"No language model took part: this is the deterministic runbook {self.name!r} ({said})."
        return Report(report.summary, report.findings, "", (note, *report.notes))


def _conversation(request: Request) -> tuple[set[str], dict[str, ToolResult], str]:
    """Step ids that were asked for, their results, and why a report was handed back (empty: none was)."""
    asked: set[str] = set()
    results: dict[str, ToolResult] = {}
    rejected = ""
    for message in request.messages:
        if isinstance(message, AssistantMessage):
            asked.update(use.id.removeprefix(_STEP) for use in message.tool_uses if use.id.startswith(_STEP))
        elif isinstance(message, ToolResult):
            if message.tool_use_id == _REPORT_ID:
                rejected = message.text
            elif message.tool_use_id.startswith(_STEP):
                results[message.tool_use_id.removeprefix(_STEP)] = message
    return asked, results, rejected


def _observed(call: PlannedCall, results: Mapping[str, ToolResult]) -> Observed:
    """What came of a step. A call that was not executed has no id a finding could cite."""
    result = results.get(call.step_id)
    if result is None:
        return "", None, f"the observer {call.observer!r} was not asked, it is not offered or the task had to end"
    record: CallRecord | None = result.record
    if record is None or record.evidence is None:
        return "", None, (record.reason if record else "") or result.text
    evidence = record.evidence
    if evidence.data is None:
        status = f"exit status {evidence.exit_status}"
        return record.call.call_id, None, evidence.error or next((s.error for s in evidence.steps if s.error), status)
    return record.call.call_id, evidence.data, evidence.error
