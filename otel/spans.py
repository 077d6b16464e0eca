"""A finished span as a value, its ids and its JSON form.

Owns: the shape of a span, what makes one valid, and how ids are derived so that making a span again gives the same id.
Deliberately does not know: clocks, redaction, where spans are kept or sent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import uuid
from collections.abc import Mapping
from typing import Any, Final, Literal

JsonObject = dict[str, Any]
Status = Literal["ok", "error", "unset"]
Kind = Literal["internal", "server", "client", "producer", "consumer"]

STATUSES: Final[tuple[Status, ...]] = ("ok", "error", "unset")
KINDS: Final[tuple[Kind, ...]] = ("internal", "server", "client", "producer", "consumer")

_TRACE_ID = re.compile(r"[0-9a-f]{32}\Z")
_SPAN_ID = re.compile(r"[0-9a-f]{16}\Z")
_INT64: Final = 2**63  # OTLP integers and its nanosecond times are 64 bits
_MAX_NESTING: Final = 64  # deeper than any of our values; keeps the recursive walks far from the interpreter's limit


class SpanMalformed(ValueError):
    """A span, or the JSON form of one, does not have the shape it must have; the message names the field."""


def trace_id(run_id: str | uuid.UUID) -> str:
    """The trace id of a run: its UUID as 32 hex digits. Raises ``SpanMalformed`` for anything that is no UUID."""
    try:
        value = run_id if isinstance(run_id, uuid.UUID) else uuid.UUID(run_id)
    except (ValueError, AttributeError, TypeError) as error:
        raise SpanMalformed(f"run_id must be a UUID, got {run_id!r}") from error
    if value.int == 0:
        raise SpanMalformed("run_id must not be the nil UUID: a trace id of zeros is invalid in OpenTelemetry")
    return value.hex


def span_id(run_id: str | uuid.UUID, key: str) -> str:
    """The id of the span ``key`` (a call id, an inference id, the name of a stage) of a run: 16 hex digits.

    Derived, so that a step executed again after a crash makes the same span and the spool holds it once (decision
    0002). Raises ``SpanMalformed`` for a run id that is no UUID or an empty key.
    """
    if not key:
        raise SpanMalformed("the key of a span must not be empty")
    digest = hashlib.sha256(f"chargehand span\0{trace_id(run_id)}\0{key}".encode("utf-8", "surrogatepass")).hexdigest()
    first = digest[:16]
    return first if first != "0" * 16 else digest[16:32]


@dataclasses.dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened at one moment within a span: ``at_ns`` in nanoseconds since the epoch."""

    name: str
    at_ns: int
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> JsonObject:
        return {"name": self.name, "at_ns": self.at_ns, "attributes": dict(self.attributes)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SpanEvent:
        if not isinstance(document, Mapping):
            raise SpanMalformed(f"an event must be an object, got {type(document).__name__}")
        return cls(_text(document, "name"), _integer(document, "at_ns"), _object(document, "attributes"))


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A span that has ended.

    ``trace_id`` 32 and ``span_id`` 16 lower-case hex digits, not all zero; ``parent_id`` the span id of the parent,
    ``None`` for the root; ``start_ns`` and ``end_ns`` nanoseconds since the epoch on the centre's clock, end not before
    start; ``attributes`` plain JSON values (text, 64-bit integers, finite numbers, booleans, null, lists, objects).
    Raises ``SpanMalformed`` when made with anything else.
    """

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    events: tuple[SpanEvent, ...] = ()
    status: Status = "unset"
    status_message: str = ""
    kind: Kind = "internal"

    def __post_init__(self) -> None:
        if not isinstance(self.trace_id, str) or not _TRACE_ID.match(self.trace_id) or not int(self.trace_id, 16):
            raise SpanMalformed(f"trace_id must be 32 lower-case hex digits, not all zero, got {self.trace_id!r}")
        if not isinstance(self.span_id, str) or not _SPAN_ID.match(self.span_id) or not int(self.span_id, 16):
            raise SpanMalformed(f"span_id must be 16 lower-case hex digits, not all zero, got {self.span_id!r}")
        parent = self.parent_id
        if parent is not None and (not isinstance(parent, str) or not _SPAN_ID.match(parent) or not int(parent, 16)):
            raise SpanMalformed(f"parent_id must be null or 16 lower-case hex digits, not all zero, got {parent!r}")
        if parent == self.span_id:
            raise SpanMalformed(f"span {self.span_id} names itself as its parent")
        if not isinstance(self.name, str) or not self.name:
            raise SpanMalformed(f"name must be a text that is not empty, got {self.name!r}")
        _check_time("start_ns", self.start_ns)
        _check_time("end_ns", self.end_ns)
        if self.end_ns < self.start_ns:
            raise SpanMalformed(f"end_ns {self.end_ns} lies before start_ns {self.start_ns} in span {self.name!r}")
        if self.status not in STATUSES:
            raise SpanMalformed(f"status must be one of {', '.join(STATUSES)}, got {self.status!r}")
        if not isinstance(self.status_message, str):
            raise SpanMalformed(f"status_message must be a text, got {self.status_message!r}")
        if self.kind not in KINDS:
            raise SpanMalformed(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        _check_object("attributes", self.attributes)
        for event in self.events:
            if not isinstance(event.name, str) or not event.name:
                raise SpanMalformed(f"the name of an event must be a text that is not empty, got {event.name!r}")
            _check_time("at_ns of an event", event.at_ns)
            _check_object("attributes of an event", event.attributes)

    @property
    def duration_ms(self) -> float:
        """Milliseconds from start to end."""
        return (self.end_ns - self.start_ns) / 1e6

    def to_json(self) -> JsonObject:
        return {
            "trace_id": self.trace_id, "span_id": self.span_id, "parent_id": self.parent_id, "name": self.name,
            "kind": self.kind, "start_ns": self.start_ns, "end_ns": self.end_ns, "attributes": dict(self.attributes),
            "events": [event.to_json() for event in self.events], "status": self.status,
            "status_message": self.status_message,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Span:
        """The span of a JSON form. Raises ``SpanMalformed`` naming the field, what was expected and what came."""
        if not isinstance(document, Mapping):
            raise SpanMalformed(f"a span must be an object, got {type(document).__name__}")
        events = document.get("events", [])
        if not isinstance(events, list):
            raise SpanMalformed(f"field 'events' must be a list, got {type(events).__name__}")
        status = _text(document, "status", "unset")
        if status not in STATUSES:
            raise SpanMalformed(f"field 'status' must be one of {', '.join(STATUSES)}, got {status!r}")
        kind = _text(document, "kind", "internal")
        if kind not in KINDS:
            raise SpanMalformed(f"field 'kind' must be one of {', '.join(KINDS)}, got {kind!r}")
        return cls(
            trace_id=_text(document, "trace_id"),
            span_id=_text(document, "span_id"),
            parent_id=None if document.get("parent_id") is None else _text(document, "parent_id"),
            name=_text(document, "name"),
            start_ns=_integer(document, "start_ns"),
            end_ns=_integer(document, "end_ns"),
            attributes=_object(document, "attributes"),
            events=tuple(SpanEvent.from_json(event) for event in events),
            status=status,
            status_message=_text(document, "status_message", ""),
            kind=kind,
        )


def _text(document: Mapping[str, Any], field: str, default: str | None = None) -> str:
    value = document.get(field, default)
    if not isinstance(value, str):
        raise SpanMalformed(f"field {field!r} must be a text, got {value!r:.80}")
    return value


def _integer(document: Mapping[str, Any], field: str) -> int:
    value = document.get(field)
    if not isinstance(value, int) or isinstance(value, bool):
        raise SpanMalformed(f"field {field!r} must be an integer, got {value!r:.80}")
    return value


def _object(document: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = document.get(field, {})
    if not isinstance(value, Mapping):
        raise SpanMalformed(f"field {field!r} must be an object, got {value!r:.80}")
    return dict(value)


def _check_time(field: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _INT64:
        raise SpanMalformed(f"{field} must be nanoseconds since the epoch (0 to 2^63-1), got {value!r}")


def _check_object(field: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise SpanMalformed(f"{field} must be an object, got {type(value).__name__}")
    for key, item in value.items():
        if not isinstance(key, str) or not key:
            raise SpanMalformed(f"{field} has a key that is no text or is empty: {key!r:.80}")
        if type(item) is not str:  # the common case, checked first: this runs for every attribute of every span
            _check_value(field, key, item, 0)


def _check_value(field: str, key: str, value: Any, depth: int) -> None:
    if value is None or isinstance(value, (str, bool)):
        return
    if isinstance(value, int):
        if not -_INT64 <= value < _INT64:
            raise SpanMalformed(f"{field}[{key!r}] must fit in 64 bits, got {value!r:.80}; send it as text")
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SpanMalformed(f"{field}[{key!r}] must be a finite number, got {value!r}; send it as text")
        return
    if depth >= _MAX_NESTING:
        raise SpanMalformed(f"{field}[{key!r}] is nested deeper than {_MAX_NESTING} levels")
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_value(field, key, item, depth + 1)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise SpanMalformed(f"{field}[{key!r}] has a key that is no text: {name!r:.80}")
            _check_value(field, key, item, depth + 1)
    else:
        raise SpanMalformed(
            f"{field}[{key!r}] must be a JSON value, got {type(value).__name__}; turn it into text or a number first"
        )
