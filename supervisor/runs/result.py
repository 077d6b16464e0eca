"""A run's result as one document, for programs and for printing.

Owns: which facts make up the answer to "what happened", and their names (README, "JSON of a run").
Deliberately does not know: how it is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from supervisor.runs.verdict import Executed, calls_of
from supervisor.store.runs import Run
from tools.values import Event, JsonObject

STAGES = ("queue", "activate", "task", "stop", "seal", "total")


def result_document(
    run: Run, events: Sequence[Event], *, verified: bool, records: int, spans: int | None, mlflow_url: str | None
) -> JsonObject:
    """The document.

    ``events``: as the worker streamed them; ``verified``, ``records``: what the audit chain of the machine gave;
    ``spans``: counted in MLflow, ``None`` when it could not be asked; ``mlflow_url``: of the trace.
    """
    verdict: JsonObject = run.verdict if isinstance(run.verdict, dict) else {}
    report: JsonObject = run.report if isinstance(run.report, dict) else {}
    seconds = run.seconds or {}
    return {
        "run_id": run.id,
        "machine": run.machine,
        "state": str(run.state),
        "reason": verdict.get("reason"),
        "model": model_name(run),
        "runbook": run.runbook,
        "summary": report.get("summary"),
        "tool_calls": [call_row(call) for call in calls_of(events).values()],
        "findings": verdict.get("findings") or [],
        "refused_findings": verdict.get("refused") or [],
        "notes": report.get("notes") or [],
        "unit_after": run.unit_after,
        "processes_after": run.processes_after,
        "audit": {"verified": verified, "records": records, "gaps": verdict.get("audit_gaps") or []},
        "trace": {"trace_id": run.trace_id, "spans": spans, "mlflow_url": mlflow_url},
        "tokens": {"input": run.tokens_in, "output": run.tokens_out},
        "cost_usd": run.cost_usd,
        "seconds": {stage: seconds.get(stage) for stage in STAGES},
        "error": run.error,
    }


def model_name(run: Run) -> str | None:
    """``provider:model``, or ``runbook``; ``None`` before one was chosen."""
    model: Any = run.model
    if not isinstance(model, dict) or "provider" not in model:
        return None
    return "runbook" if model["provider"] == "runbook" else f"{model['provider']}:{model.get('model')}"


def call_row(call: Executed) -> JsonObject:
    """One tool call. ``argv`` and ``exit_status`` are of the first step that worked (else of the first); ``steps`` has
    all. Reading a file, which the broker does itself, stands as ``["read", PATH]``."""
    steps = [_step_row(step) for step in (call.evidence or {}).get("steps") or []]
    shown = next((step for step in steps if step["exit_status"] == 0), steps[0] if steps else None)
    return {
        "call_id": call.call_id,
        "tool": call.tool,
        "argv": shown["argv"] if shown else [],
        "decision": call.decision or None,
        "rule": call.rule or None,
        "reason": call.reason if call.decision != "allow" else None,
        "exit_status": shown["exit_status"] if shown else None,
        "duration_ms": (call.evidence or {}).get("duration_ms"),
        "steps": steps,
    }


def _step_row(step: JsonObject) -> JsonObject:
    argv = step.get("argv") or []
    if step.get("path"):
        words = ["read", step["path"]]
    elif len(argv) > 1:
        # A pipeline: the stages in order, a word "|" between them.
        words = [word for position, stage in enumerate(argv) for word in (["|"] if position else []) + list(stage)]
    else:
        words = list(argv[0]) if argv else []
    return {
        "argv": words,
        "exit_status": step.get("exit_status"),
        "stdout_digest": step.get("stdout_digest"),
        "error": step.get("error") or None,
    }
