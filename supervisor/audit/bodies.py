"""What the bodies of audit records hold: metadata and digests; content only where the settings say so.

Owns: the fields of each kind of body and the one rule about content.
Deliberately does not know: where the values come from, how a record is written. Pure.

``Content(False)`` is the default (audit-and-traces.md, "Privacy default"): a text is its digest and its size. With
``Content(True, cap)`` the first ``cap`` bytes stand beside them, and ``cut`` says whether that is all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from supervisor.audit.journal import Gap, JournalReport
from tools.values import Decision, Evidence, JsonObject, ToolCall, canonical, digest


@dataclasses.dataclass(frozen=True)
class Content:
    """Whether texts are kept, and how many bytes of each."""

    keep: bool = False
    cap_bytes: int = 65536

    def of(self, value: Any) -> JsonObject:
        """``{"digest", "bytes"}`` of a text or any JSON value, with ``text`` and ``cut`` if content is kept."""
        raw = value.encode("utf-8", "replace") if isinstance(value, str) else canonical(value)
        body: JsonObject = {"digest": digest(raw), "bytes": len(raw)}
        if self.keep:
            body["text"] = raw[: self.cap_bytes].decode("utf-8", "ignore")
            body["cut"] = len(raw) > self.cap_bytes
        return body


def run_requested(content: Content, *, trigger: str, text: str, runbook: str | None, model: Any) -> JsonObject:
    """For ``run.requested``. ``model``: the model's specification without its key."""
    return {"trigger": trigger, "text": content.of(text), "runbook": runbook, "model": model}


def run_state(before: str, after: str, **facts: Any) -> JsonObject:
    """For ``run.state``. ``facts``: such as ``reason``, ``unit_after``, ``processes_after``."""
    return {"from": before, "to": after, **facts}


def lease_granted(
    *, lease_digest: str, generation: int, lease_s: float, hard_stop_s: float, policy_digest: str
) -> JsonObject:
    """For ``lease.granted``."""
    return {
        "lease_digest": lease_digest, "generation": generation, "lease_s": lease_s, "hard_stop_s": hard_stop_s,
        "policy_digest": policy_digest,
    }  # fmt: skip


def decision(content: Content, call: ToolCall, decided: Decision) -> JsonObject:
    """For ``decision``: which programs or paths are metadata, their arguments are content."""
    stages = [stage for step in decided.steps for stage in step.stages]
    return {
        "call_id": call.call_id,
        "tool": call.tool,
        "call_digest": call.digest,
        "arguments": content.of(call.arguments),
        "outcome": decided.outcome,
        "effect": decided.effect,
        "rule": decided.rule,
        "digest": decided.digest,
        "binaries": list(dict.fromkeys(stage.binary for stage in stages)),
        "paths": list(dict.fromkeys(step.file.path for step in decided.steps if step.file is not None)),
    }


def evidence(content: Content, given: Evidence) -> JsonObject:
    """For ``evidence``: exit status, digests and sizes of every step; outputs only with content."""
    body: JsonObject = {
        "call_id": given.call_id,
        "tool": given.tool,
        "exit_status": given.exit_status,
        "duration_ms": given.duration_ms,
        "failed": bool(given.error),
        "data": None if given.data is None else content.of(given.data),
        "steps": [
            {
                "exit_status": step.exit_status, "signal": step.signal, "cut": step.cut, "timed_out": step.timed_out,
                "cancelled": step.cancelled, "stdout_digest": step.stdout_digest, "stdout_bytes": step.stdout_bytes,
                "stderr_digest": step.stderr_digest, "stderr_bytes": step.stderr_bytes,
            }
            for step in given.steps
        ],
    }  # fmt: skip
    if content.keep:
        for kept, step in zip(body["steps"], given.steps, strict=True):
            kept["stdout"] = content.of(step.stdout)
            kept["stderr"] = content.of(step.stderr)
    return body


def inference(
    *, inference_id: str, provider: str, model: str, usage: Mapping[str, Any], cost_usd: float | None, stop_reason: str,
    duration_ms: float, prompt_digest: str, completion_digest: str, error: str = "",
) -> JsonObject:  # fmt: skip
    """For ``inference``. ``cost_usd`` is ``None`` when the price is not known, never 0 for that."""
    return {
        "inference_id": inference_id, "provider": provider, "model": model, "usage": dict(usage), "cost_usd": cost_usd,
        "stop_reason": stop_reason, "duration_ms": duration_ms, "prompt_digest": prompt_digest,
        "completion_digest": completion_digest, "error": error[:500],
    }  # fmt: skip


def journal_sealed(report: JournalReport, *, complete: bool, gaps: Sequence[Gap] = ()) -> JsonObject:
    """For ``journal.sealed``: which journal this was, and whether it held."""
    return {
        "lines": report.lines,
        "head": report.head,
        "lease_digest": report.lease_digest,
        "complete": complete,
        "verified": report.verified,
        "breaks": len(report.breaks),
        "gaps": len(gaps),
    }


def gap(found: Gap) -> JsonObject:
    """For ``audit.gap``: what differs, with both sides by digest (they may hold outputs)."""
    return {
        "gap": found.kind,
        "call_id": found.call_id,
        "message": found.message,
        "journal_digest": None if found.journal is None else digest(canonical(found.journal)),
        "streamed_digest": None if found.streamed is None else digest(canonical(found.streamed)),
    }


def machine_changed(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> JsonObject:
    """For ``machine.added``, ``machine.changed`` and ``machine.removed``: the fields that differ, both sides."""
    old, new = before or {}, after or {}
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return {"changed": {name: {"from": old.get(name), "to": new.get(name)} for name in names}}


def host_key(fingerprint: str | None, previous: str | None) -> JsonObject:
    """For ``host_key.accepted`` (the new pin and the old) and ``host_key.changed`` (what was shown and what is pinned)."""
    return {"fingerprint": fingerprint, "previous": previous}


def setting(key: str, old: Any, new: Any) -> JsonObject:
    """For ``settings.changed``. Secrets are references in the settings, so their values cannot come by here."""
    return {"key": key, "from": old, "to": new}


def call_ids(gaps: Iterable[Gap]) -> list[str]:
    """The calls that gaps are about, each once, in their order."""
    return list(dict.fromkeys(found.call_id for found in gaps if found.call_id is not None))
