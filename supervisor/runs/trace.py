"""The trace of a run, made from its record and its events.

Owns: which spans a run has, their parents, times and attributes (audit-and-traces.md, "Traces").
Deliberately does not know: where spans go (``otel``), the store.

Everything is derived: the same run gives the same spans with the same ids, however often it is made. Positions are on
the gateway's clock; lengths measured on the host stay as they were measured (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from otel import names
from otel.spans import Span, span_id, trace_id
from supervisor.runs.verdict import calls_of
from supervisor.store.events import RunEvent
from supervisor.store.runs import Run
from tools.values import Event

NANO = 1_000_000_000
# States in which the run did what was asked; the others are errors in the trace.
_GOOD = frozenset({"succeeded", "cancelled"})


def spans_of(run: Run, events: Sequence[RunEvent], environment: str, content: bool) -> list[Span]:
    """Every span of a run that has ended.

    ``events``: all of the run, the gateway's and the worker's. ``content``: whether texts, arguments and outputs go
    into the trace (they pass redaction afterwards either way).
    """
    maker = _Maker(run, environment, content)
    ended = run.ended_at or run.state_since
    stages = _stages(events)
    queued_until = stages.get("activate", (ended, ended))[0]
    maker.span("queued", names.MESSAGE_QUEUED, "root", run.created_at, queued_until, {})
    if "activate" in stages:
        maker.span("run", names.RUN_COMPLETED, "root", queued_until, ended, _outcome(run), failed=_failure(run))
        for stage, name in (
            ("activate", names.AGENT_ACTIVATE),
            ("task", names.TASK),
            ("evaluate", names.RUN_EVALUATE),
            ("stop", names.AGENT_STOP),
        ):
            if stage in stages:
                begin, end = stages[stage]
                maker.span(stage, name, "run", begin, end, maker.stage_attributes(stage))
    task_end = stages.get("task", (ended, ended))[1]
    maker.work([event for event in events if event.source == "worker"], task_end)
    # Last: with the root MLflow takes the trace for complete, and spans are delivered in this order.
    maker.root(ended)
    return maker.spans


def _stages(events: Iterable[RunEvent]) -> dict[str, tuple[float, float]]:
    """Begin and end of each stage, on the gateway's clock, from its own events; the first try counts as the begin."""
    found: dict[str, tuple[float, float]] = {}
    for event in events:
        if event.kind in ("stage.started", "stage.ended"):
            stage = str(event.body.get("stage"))
            begin, end = found.get(stage, (event.at, event.at))
            found[stage] = (min(begin, event.at), max(end, event.at))
    return found


def _outcome(run: Run) -> dict[str, Any]:
    known = run.tokens_in is not None or run.tokens_out is not None
    return {
        names.OUTCOME: str(run.state),
        names.TOKENS: (run.tokens_in or 0) + (run.tokens_out or 0) if known else "unknown",
        names.COST_USD: run.cost_usd if run.cost_usd is not None else "unknown",
    }


def _failure(run: Run) -> str:
    if str(run.state) in _GOOD:
        return ""
    verdict = run.verdict if isinstance(run.verdict, Mapping) else {}
    error = run.error if isinstance(run.error, Mapping) else {}
    return str(error.get("message") or verdict.get("reason") or run.state)


class _Maker:
    def __init__(self, run: Run, environment: str, content: bool) -> None:
        self._run = run
        self._environment = environment
        self._content = content
        self._trace_id = trace_id(run.id)
        self.spans: list[Span] = []

    def span(
        self,
        key: str,
        name: str,
        parent: str | None,
        begin: float,
        end: float,
        attributes: Mapping[str, Any],
        failed: str = "",
        edge: bool = False,
    ) -> None:
        base = {
            names.MLFLOW_SPAN_TYPE: names.SPAN_TYPES[name],
            names.RUN_ID: self._run.id,
            names.MACHINE: self._run.machine,
            names.HOST_NAME: self._run.machine,
            names.DEPLOYMENT_ENVIRONMENT: names.EDGE if edge else self._environment,
        }
        start_ns = int(begin * NANO)
        self.spans.append(
            Span(
                trace_id=self._trace_id,
                span_id=span_id(self._run.id, key),
                parent_id=span_id(self._run.id, parent) if parent else None,
                name=name,
                kind="internal",
                start_ns=start_ns,
                end_ns=max(start_ns, int(end * NANO)),
                attributes={**base, **attributes},
                status="error" if failed else "ok",
                status_message=failed[:500],
            )
        )

    def root(self, ended: float) -> None:
        run = self._run
        report = run.report if isinstance(run.report, Mapping) else {}
        attributes: dict[str, Any] = {
            names.SESSION_ID: run.machine,
            names.USER_ID: run.requested_by,
            names.TRIGGER: run.trigger,
            names.STATE: str(run.state),
            names.RUNBOOK: run.runbook or "",
            names.MLFLOW_TRACE_NAME: f"run on {run.machine}",
            names.trace_tag("machine"): run.machine,
            names.trace_tag("run_id"): run.id,
            names.trace_tag("state"): str(run.state),
            names.trace_tag("trigger"): run.trigger,
        }
        if self._content:
            attributes[names.MLFLOW_SPAN_INPUTS] = {"text": run.text, "runbook": run.runbook}
            attributes[names.MLFLOW_SPAN_OUTPUTS] = {"state": str(run.state), "report": dict(report)}
        self.span("root", names.MESSAGE_PROCESSED, None, run.created_at, ended, attributes, failed=_failure(run))

    def stage_attributes(self, stage: str) -> dict[str, Any]:
        run = self._run
        if stage == "task":
            found: dict[str, Any] = {
                names.GEN_AI_OPERATION_NAME: names.OPERATION_INVOKE_AGENT,
                names.GEN_AI_AGENT_NAME: "edge",
            }
            if self._content:
                found[names.MLFLOW_SPAN_INPUTS] = {"text": run.text}
            return found
        if stage == "evaluate" and isinstance(run.verdict, Mapping):
            verdict = run.verdict
            return {names.MLFLOW_SPAN_OUTPUTS: {"state": verdict.get("state"), "severity": verdict.get("severity")}}
        if stage == "stop":
            return {names.MLFLOW_SPAN_OUTPUTS: {"unit": run.unit_after, "processes": run.processes_after}}
        return {}

    # -- what the worker did

    def work(self, events: Sequence[RunEvent], task_end: float) -> None:
        """Spans of inferences and tool calls. What was begun and never ended is closed as interrupted."""
        begun: dict[str, RunEvent] = {}
        calls = calls_of(Event(int(event.key or 0), event.kind, event.body) for event in events)
        for event in events:
            inference_id = str(event.body.get("inference_id", ""))
            call_id = str(event.body.get("call_id", ""))
            if event.kind == "inference.started":
                begun[inference_id] = event
            elif event.kind == "inference.finished" and inference_id in begun:
                self._inference(begun.pop(inference_id), event)
            elif event.kind == "call.asked":
                begun[call_id] = event
            elif event.kind == "call.finished" and call_id in begun:
                self._call(begun.pop(call_id), event.at, calls[call_id].evidence, calls)
        for key, event in begun.items():
            if event.kind == "call.asked":
                self._call(event, task_end, None, calls, interrupted=True)
            else:
                attributes = self._inference_attributes(event.body)
                attributes[names.INTERRUPTED] = True
                self.span(key, names.MODEL_INFERENCE, "task", event.at, task_end, attributes, names.INTERRUPTED_MESSAGE)

    def _inference_attributes(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {
            names.GEN_AI_OPERATION_NAME: names.OPERATION_CHAT,
            names.GEN_AI_PROVIDER_NAME: str(body.get("provider", "")),
            names.GEN_AI_REQUEST_MODEL: str(body.get("model", "")),
            names.INFERENCE_ID: str(body.get("inference_id", "")),
        }

    def _inference(self, started: RunEvent, finished: RunEvent) -> None:
        body = finished.body
        usage = body.get("usage") or {}
        attributes = self._inference_attributes(started.body)
        attributes[names.GEN_AI_RESPONSE_FINISH_REASONS] = [str(body.get("stop_reason", ""))]
        attributes[names.GEN_AI_USAGE_INPUT_TOKENS] = int(usage.get("input_tokens") or 0)
        attributes[names.GEN_AI_USAGE_OUTPUT_TOKENS] = int(usage.get("output_tokens") or 0)
        attributes[names.COST_USD] = usage["cost_usd"] if usage.get("cost_usd") is not None else "unknown"
        if usage.get("cost_usd") is not None:
            # Without it MLflow would compute one from its own list of prices.
            attributes[names.MLFLOW_LLM_COST] = {"total_cost": float(usage["cost_usd"])}
        attributes[names.MLFLOW_CHAT_TOKEN_USAGE] = {
            "input_tokens": int(usage.get("input_tokens") or 0),
            "output_tokens": int(usage.get("output_tokens") or 0),
            "total_tokens": int(usage.get("input_tokens") or 0) + int(usage.get("output_tokens") or 0),
        }
        error = body.get("error") or {}
        begin, end = _placed(started.at, finished.at, body.get("duration_ms"))
        self.span(
            str(body["inference_id"]),
            names.MODEL_INFERENCE,
            "task",
            begin,
            end,
            attributes,
            str(error.get("message", "")),
        )

    def _call(
        self,
        asked: RunEvent,
        ended: float,
        evidence: Mapping[str, Any] | None,
        calls: Mapping[str, Any],
        interrupted: bool = False,
    ) -> None:
        call = calls[str(asked.body["call_id"])]
        steps = list((evidence or {}).get("steps") or [])
        attributes: dict[str, Any] = {
            names.GEN_AI_OPERATION_NAME: names.OPERATION_EXECUTE_TOOL,
            names.GEN_AI_TOOL_NAME: call.tool,
            names.GEN_AI_TOOL_CALL_ID: call.call_id,
            names.CALL_ID: call.call_id,
            names.DECISION: call.decision or "none",
            names.RULE: call.rule,
            names.EFFECT: call.effect,
        }
        failed = ""
        if evidence is not None:
            statuses = [step["exit_status"] for step in steps if isinstance(step.get("exit_status"), int)]
            attributes[names.EXIT_STATUS] = max(statuses, key=abs, default=0 if not steps else -1)
            attributes[names.OUTPUT_DIGEST] = [str(step.get("stdout_digest", "")) for step in steps][:16]
            attributes[names.HOST_DURATION_MS] = float(evidence.get("duration_ms") or 0.0)
            failed = str(evidence.get("error") or "")
        elif interrupted:
            attributes[names.INTERRUPTED] = True
            failed = names.INTERRUPTED_MESSAGE
        else:
            failed = f"not allowed: {call.reason}"
        if self._content:
            attributes[names.MLFLOW_SPAN_INPUTS] = {"tool": call.tool, "arguments": call.arguments}
            if evidence is not None:
                data = evidence.get("data")
                shown = (
                    data
                    if data is not None
                    else [{"stdout": s.get("stdout"), "stderr": s.get("stderr")} for s in steps]
                )
                attributes[names.MLFLOW_SPAN_OUTPUTS] = {"decision": call.decision, "result": shown}
            else:
                attributes[names.MLFLOW_SPAN_OUTPUTS] = {"decision": call.decision, "reason": call.reason}
        begin, end = _placed(asked.at, ended, (evidence or {}).get("duration_ms"))
        self.span(call.call_id, names.TOOL_EXECUTION, "task", begin, end, attributes, failed, edge=True)


def _placed(begin: float, end: float, duration_ms: Any) -> tuple[float, float]:
    """Where a span lies: it ends when the gateway heard so, and is as long as it was measured, within what is possible.

    Events of one moment arrive in one message, so the gateway's own begin may be too late by a little.
    """
    if isinstance(duration_ms, int | float) and not isinstance(duration_ms, bool) and duration_ms >= 0:
        return end - duration_ms / 1000.0, end
    return begin, end
