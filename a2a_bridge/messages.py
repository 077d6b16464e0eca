"""The messages of a task as plain values: what the gateway asks and what the worker answers.

Owns: their shape and JSON form. Deliberately does not know: the A2A SDK (``codec``), transports, what a model does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tools.values import Event, JsonObject, Malformed, Report, want

# States of a task as A2A names them, in lower case and without the prefix.
SUBMITTED, WORKING, COMPLETED, FAILED = "submitted", "working", "completed", "failed"
CANCELED, REJECTED, INPUT_REQUIRED = "canceled", "rejected", "input_required"
ENDED = frozenset({COMPLETED, FAILED, CANCELED, REJECTED})

# Bounds of what a task message may hold, characters: a request is a person's words or an alert, not a file.
MAX_PROMPT = 32768
MAX_INSTRUCTIONS = 65536


@dataclasses.dataclass(frozen=True)
class TaskDocument:
    """What a run asks of its worker.

    ``prompt``: the request in words; ``runbook``: the runbook as JSON when the run follows one; ``instructions``: the
    system prompt; ``model``: the model choice (a ``ModelSpec`` as JSON, without secrets); ``limits``: named limits;
    ``profile``: what the supervisor knows of its machine (role, expected state, labels).
    """

    run_id: str
    prompt: str
    instructions: str = ""
    runbook: JsonObject | None = None
    model: JsonObject = dataclasses.field(default_factory=dict)
    limits: JsonObject = dataclasses.field(default_factory=dict)
    profile: JsonObject = dataclasses.field(default_factory=dict)
    traceparent: str = ""

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TaskDocument:
        prompt = want(document, "prompt", str)
        instructions = want(document, "instructions", str, "")
        for name, text, limit in (("prompt", prompt, MAX_PROMPT), ("instructions", instructions, MAX_INSTRUCTIONS)):
            if len(text) > limit:
                raise Malformed(f"field {name!r} must be at most {limit} characters, got {len(text)}")
        return cls(
            run_id=want(document, "run_id", str),
            prompt=prompt,
            instructions=instructions,
            runbook=want(document, "runbook", (dict, type(None)), None),
            model=want(document, "model", dict, {}),
            limits=want(document, "limits", dict, {}),
            profile=want(document, "profile", dict, {}),
            traceparent=want(document, "traceparent", str, ""),
        )


@dataclasses.dataclass(frozen=True)
class TaskUpdate:
    """One thing the worker said about a task. ``result`` comes once, with or before the last update.

    ``state``: one of the states above; ``text``: what the worker says in words.
    """

    task_id: str
    state: str
    events: tuple[Event, ...] = ()
    result: TaskResult | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """How the loop ended. ``outcome``: the loop's word for it; ``reason``: a sentence; totals of the whole task."""

    outcome: str
    reason: str
    report: Report | None
    steps: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None

    def to_json(self) -> JsonObject:
        return {
            "outcome": self.outcome,
            "reason": self.reason,
            "report": self.report.to_json() if self.report is not None else None,
            "steps": self.steps,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cost_usd": self.cost_usd,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TaskResult:
        report = want(document, "report", (dict, type(None)), None)
        cost = want(document, "cost_usd", (int, float, type(None)), None)
        return cls(
            outcome=want(document, "outcome", str),
            reason=want(document, "reason", str, ""),
            report=Report.from_json(report) if report is not None else None,
            steps=want(document, "steps", int, 0),
            input_tokens=want(document, "input_tokens", (int, type(None)), None),
            output_tokens=want(document, "output_tokens", (int, type(None)), None),
            cost_usd=float(cost) if cost is not None else None,
        )
