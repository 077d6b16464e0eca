"""The values that travel between worker, gate, runner, journal and gateway.

Owns: their shape, their JSON form, canonical JSON and digests.
Deliberately does not know: where a value came from, what a policy allows, how anything is executed.

Every value is a frozen dataclass with ``to_json`` (a plain ``dict``) and ``from_json`` (raises ``Malformed`` that
names the field, what was expected and what came). Standard library only, Python 3.9.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Dict, Mapping, Optional, Tuple

JsonObject = Dict[str, Any]


class Malformed(ValueError):
    """A document does not have the shape it must have; the message names the field and what came."""


def canonical(value: Any) -> bytes:
    """The one byte form of a JSON value that digests are taken of: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def digest(value: Any) -> str:
    """``sha256:<hex>`` of bytes as they are, of text as UTF-8, of anything else in its canonical form."""
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogateescape")
    elif not isinstance(value, (bytes, bytearray, memoryview)):
        value = canonical(value)
    return "sha256:" + hashlib.sha256(value).hexdigest()


def want(document: Mapping[str, Any], name: str, kind: Any, default: Any = dataclasses.MISSING) -> Any:
    """The field ``name`` of ``document`` if it is of ``kind`` (a type or tuple of types).

    ``bool`` is never taken for a number. Raises ``Malformed`` naming the field, the expectation and what came.
    """
    if name not in document:
        if default is not dataclasses.MISSING:
            return default
        raise Malformed("field %r is missing" % name)
    value = document[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise Malformed("field %r must be %s, got %s %.80r" % (name, wanted, type(value).__name__, value))
    return value


def want_strings(document: Mapping[str, Any], name: str, default: Any = dataclasses.MISSING) -> Tuple[str, ...]:
    """The field ``name`` as a tuple of strings; raises ``Malformed`` naming the position that is not one."""
    value = want(document, name, (list, tuple), default)
    for position, item in enumerate(value):
        if not isinstance(item, str):
            raise Malformed("field %r[%d] must be str, got %s %.80r" % (name, position, type(item).__name__, item))
    return tuple(value)


# Outcomes of a decision (architecture.md, "tool call / decision") and effect classes (safety.md, "The gate").
ALLOW, ASK, DENY = "allow", "ask", "deny"
OBSERVE, CHANGE, NEVER = "observe", "change", "never"


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """What the worker asks for.

    ``tool`` is ``exec`` (arguments ``{"argv": [...]}`` or ``{"command": "text"}``), ``read`` (``{"path", "offset"?,
    "length"?}``, bytes), ``write`` (``{"path", "content", "mode"?}``) or the name of an observer (its parameters).
    ``call_id`` is unique in the run, ``c1``, ``c2``, … in the order of asking.
    """

    call_id: str
    tool: str
    arguments: JsonObject

    def to_json(self) -> JsonObject:
        return {"call_id": self.call_id, "tool": self.tool, "arguments": self.arguments}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "ToolCall":
        return cls(want(document, "call_id", str), want(document, "tool", str), want(document, "arguments", dict))

    @property
    def digest(self) -> str:
        """Digest of what is asked, without its id: two calls that ask for the same thing share it."""
        return digest({"tool": self.tool, "arguments": self.arguments})


@dataclasses.dataclass(frozen=True)
class Stage:
    """One process of a decided exec: what will be given to ``execve``, complete.

    ``binary`` is the absolute path as the policy names it; ``argv`` holds the words after the gate added what its rule
    always adds (``argv[0]`` is the policy's absolute path); ``env`` is the whole environment. ``timeout_s`` seconds,
    ``output_bytes`` the cap on stdout and on stderr each. ``stdout``/``stderr``: ``keep`` or ``discard``;
    ``stderr`` may also be ``stdout`` (merged). ``writes``: absolute paths the process may write below.
    ``network``: whether the process needs the network.
    """

    binary: str
    argv: Tuple[str, ...]
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    timeout_s: float = 30.0
    output_bytes: int = 65536
    stderr: str = "keep"
    writes: Tuple[str, ...] = ()
    network: bool = True

    def to_json(self) -> JsonObject:
        return {
            "binary": self.binary, "argv": list(self.argv), "env": dict(self.env), "timeout_s": self.timeout_s,
            "output_bytes": self.output_bytes, "stderr": self.stderr, "writes": list(self.writes),
            "network": self.network,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Stage":
        return cls(
            want(document, "binary", str), want_strings(document, "argv"), want(document, "env", dict, {}),
            float(want(document, "timeout_s", (int, float), 30.0)), want(document, "output_bytes", int, 65536),
            want(document, "stderr", str, "keep"), want_strings(document, "writes", ()),
            want(document, "network", bool, True),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FileAccess:
    """A decided read or write of one regular file.

    ``path`` is absolute, normal and free of links as the gate resolved it; ``root`` is the policy root it lies under.
    For ``read``: ``offset`` and ``length`` in bytes. For ``write``: ``content`` (bytes as text, UTF-8) and ``mode``.
    """

    kind: str
    path: str
    root: str
    offset: int = 0
    length: int = 65536
    content: Optional[str] = None
    mode: Optional[int] = None

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "FileAccess":
        return cls(
            want(document, "kind", str), want(document, "path", str), want(document, "root", str),
            want(document, "offset", int, 0), want(document, "length", int, 65536),
            want(document, "content", (str, type(None)), None), want(document, "mode", (int, type(None)), None),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing the runner does for a call: a pipeline of processes (``stages``) or one file access (``file``)."""

    stages: Tuple[Stage, ...] = ()
    file: Optional[FileAccess] = None

    def to_json(self) -> JsonObject:
        if self.file is not None:
            return {"file": self.file.to_json()}
        return {"stages": [stage.to_json() for stage in self.stages]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Step":
        if "file" in document:
            return cls(file=FileAccess.from_json(want(document, "file", dict)))
        return cls(tuple(Stage.from_json(stage) for stage in want(document, "stages", list)))


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the gate says about one call.

    ``outcome``: ``allow``, ``ask`` or ``deny``; ``effect``: ``observe``, ``change`` or ``never``; ``rule``: the name of
    the rule that gave it (``default-deny`` where none did); ``reason``: one sentence for people and models; ``hint``:
    what would be allowed instead (empty when allowed); ``steps``: what the runner is to do, empty unless the outcome
    is ``allow`` or ``ask``; ``digest``: of the resolved steps, what an approval is bound to.
    """

    outcome: str
    effect: str
    rule: str
    reason: str
    hint: str = ""
    steps: Tuple[Step, ...] = ()

    @property
    def digest(self) -> str:
        return digest([step.to_json() for step in self.steps])

    def to_json(self) -> JsonObject:
        return {
            "outcome": self.outcome, "effect": self.effect, "rule": self.rule, "reason": self.reason,
            "hint": self.hint, "steps": [step.to_json() for step in self.steps], "digest": self.digest,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Decision":
        outcome = want(document, "outcome", str)
        if outcome not in (ALLOW, ASK, DENY):
            raise Malformed("field 'outcome' must be allow, ask or deny, got %.80r" % outcome)
        return cls(
            outcome, want(document, "effect", str), want(document, "rule", str), want(document, "reason", str),
            want(document, "hint", str, ""), tuple(Step.from_json(step) for step in want(document, "steps", list, [])),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What came of one step. Output texts are capped; digests and sizes are of everything that was read.

    ``exit_status``: of the last stage, ``None`` if it was killed (then ``signal`` says by which) or for a file access
    that failed (then ``error`` says why; a file access that worked has ``exit_status`` 0). ``exit_statuses``: of every
    stage, ``None`` where killed by a signal. ``duration_ms`` milliseconds, ``cpu_ms`` milliseconds of CPU time,
    ``max_rss_kb`` KiB.
    """

    argv: Tuple[Tuple[str, ...], ...] = ()
    path: Optional[str] = None
    exit_status: Optional[int] = None
    exit_statuses: Tuple[Optional[int], ...] = ()
    signal: Optional[int] = None
    stdout: str = ""
    stderr: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_digest: str = ""
    stderr_digest: str = ""
    cut: bool = False
    timed_out: bool = False
    cancelled: bool = False
    error: str = ""
    duration_ms: float = 0.0
    cpu_ms: float = 0.0
    max_rss_kb: int = 0

    def to_json(self) -> JsonObject:
        document = dataclasses.asdict(self)
        document["argv"] = [list(words) for words in self.argv]
        document["exit_statuses"] = list(self.exit_statuses)
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "StepResult":
        known = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in document.items() if name in known}
        values["argv"] = tuple(tuple(words) for words in want(document, "argv", (list, tuple), ()))
        values["exit_statuses"] = tuple(want(document, "exit_statuses", (list, tuple), ()))
        return cls(**values)

    @property
    def ok(self) -> bool:
        """Whether every stage ended by itself with status 0 (a file access: whether it worked)."""
        return not self.error and self.exit_status == 0 and all(status == 0 for status in self.exit_statuses)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What an executed call leaves behind. ``data`` is an observer's parsed output, ``None`` for other tools.

    ``error`` is empty unless the call as a whole could not be carried out (killed, cancelled, output not parsed).
    """

    call_id: str
    tool: str
    steps: Tuple[StepResult, ...] = ()
    data: Optional[JsonObject] = None
    error: str = ""
    duration_ms: float = 0.0

    def to_json(self) -> JsonObject:
        return {
            "call_id": self.call_id, "tool": self.tool, "steps": [step.to_json() for step in self.steps],
            "data": self.data, "error": self.error, "duration_ms": self.duration_ms,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Evidence":
        return cls(
            want(document, "call_id", str), want(document, "tool", str),
            tuple(StepResult.from_json(step) for step in want(document, "steps", list, [])),
            want(document, "data", (dict, type(None)), None), want(document, "error", str, ""),
            float(want(document, "duration_ms", (int, float), 0.0)),
        )  # fmt: skip

    @property
    def exit_status(self) -> Optional[int]:
        """0 when every step worked, else the exit status of the first step that did not (``None``: killed)."""
        for step in self.steps:
            if not step.ok:
                return step.exit_status
        return None if self.error else 0


SEVERITIES = ("ok", "info", "warning", "critical")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One statement of a report. ``evidence`` names the ``call_id`` values it rests on and is never empty: a finding
    that cites no executed call is refused (architecture.md, "Evidence before prose")."""

    id: str
    severity: str
    title: str
    detail: str = ""
    evidence: Tuple[str, ...] = ()
    suggestion: str = ""

    def to_json(self) -> JsonObject:
        return {
            "id": self.id, "severity": self.severity, "title": self.title, "detail": self.detail,
            "evidence": list(self.evidence), "suggestion": self.suggestion,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Finding":
        severity = want(document, "severity", str)
        if severity not in SEVERITIES:
            raise Malformed("field 'severity' must be one of %s, got %r" % (", ".join(SEVERITIES), severity))
        return cls(
            want(document, "id", str), severity, want(document, "title", str), want(document, "detail", str, ""),
            want_strings(document, "evidence", ()), want(document, "suggestion", str, ""),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """The structured result of a task, the A2A artifact ``report``."""

    summary: str
    findings: Tuple[Finding, ...] = ()
    model: str = ""
    notes: Tuple[str, ...] = ()

    def to_json(self) -> JsonObject:
        return {
            "summary": self.summary, "findings": [finding.to_json() for finding in self.findings],
            "model": self.model, "notes": list(self.notes),
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Report":
        return cls(
            want(document, "summary", str),
            tuple(Finding.from_json(finding) for finding in want(document, "findings", list, [])),
            want(document, "model", str, ""), want_strings(document, "notes", ()),
        )  # fmt: skip


# What the loop tells the outside as it goes on. ``kind`` is one of these; ``body`` is plain JSON.
EVENT_KINDS = (
    "inference.started",  # {inference_id, provider, model, step}
    "inference.finished",  # {inference_id, usage: Usage JSON, stop_reason, duration_ms, prompt_digest, completion_digest, error?}
    "text",  # {text}: what the model says, as it comes
    "call.asked",  # ToolCall JSON
    "call.decided",  # {call_id, decision: Decision JSON}
    "call.finished",  # {call_id, evidence: Evidence JSON} or {call_id, refused: true}
    "note",  # {text}: something the operator should know (output shortened, retry, limit near)
)


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of progress of a task. ``seq`` counts from 1 in a run; ``at`` is the host's wall clock (informative)."""

    seq: int
    kind: str
    body: JsonObject
    at: float = 0.0

    def to_json(self) -> JsonObject:
        return {"seq": self.seq, "kind": self.kind, "body": self.body, "at": self.at}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Event":
        return cls(
            want(document, "seq", int), want(document, "kind", str), want(document, "body", dict),
            float(want(document, "at", (int, float), 0.0)),
        )  # fmt: skip
