"""A model in the test's own process that says what a script says: for tests of the loop and of the line protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from inference.errors import InferenceError
from inference.protocol import END, TOOL_USE, Event, Finished, Request, TextDelta, ToolUse, Usage


class ScriptedModel:
    """``script``: one entry per inference. An entry is an ``InferenceError``, text, a list of ``(tool, arguments)``
    (arguments as object or raw text), a list of events, ``None`` (says nothing, for ever) or a function from the
    request to one of these."""

    provider = "scripted"

    def __init__(self, *script: Any, usage: Usage | None = None, context_tokens: int = 100_000) -> None:
        self.name = "script"
        self.context_tokens = context_tokens
        self.script = list(script)
        self.usage = usage or Usage(1000, 100, cost_usd=0.01)
        self.requests: list[Request] = []
        self.asked = asyncio.Event()
        self.closed = 0

    async def infer(self, request: Request) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.asked.set()
        entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(entry, Callable):  # type: ignore[arg-type]
            entry = entry(request)
        try:
            if entry is None:
                await asyncio.Event().wait()
            if isinstance(entry, InferenceError):
                raise entry
            for event in self._events(entry):
                await asyncio.sleep(0)
                yield event
        finally:
            self.closed += 1

    def _events(self, entry: Any) -> list[Event]:
        if isinstance(entry, str):
            return [TextDelta(entry), self.usage, Finished(END)]
        if entry and not isinstance(entry[0], tuple):
            return list(entry)
        calls: list[Event] = []
        for number, (name, arguments) in enumerate(entry):
            raw = arguments if isinstance(arguments, str) else json.dumps(arguments)
            calls.append(ToolUse.read(f"u{len(self.requests)}-{number}", name, raw))
        return [*calls, self.usage, Finished(TOOL_USE)]

    async def aclose(self) -> None:
        return None


def finding(*evidence: str, name: str = "disk", severity: str = "warning") -> dict[str, Any]:
    """A finding document that cites ``evidence``."""
    return {"id": name, "severity": severity, "title": "Disk fills", "detail": "91 %", "evidence": list(evidence)}


def reporting(*findings: dict[str, Any], summary: str = "Looked.", **more: Any) -> list[tuple[str, Any]]:
    """A script entry that calls ``report``."""
    return [("report", {"summary": summary, "findings": list(findings), **more})]
