"""The spans of a trace as a tree of rows, and the rows as plain text.

Owns: the order and depth of spans and which attributes are worth a place in a line.
Deliberately does not know: where the spans came from, colours, the width of a terminal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Final

from otel import names
from otel.spans import Span, Status

# What a line shows of a span, in this order, where present.
KEY_ATTRIBUTES: Final = (
    names.MACHINE, names.CALL_ID, names.GEN_AI_TOOL_NAME, names.DECISION, names.RULE, names.EXIT_STATUS,
    names.INFERENCE_ID, names.GEN_AI_REQUEST_MODEL, names.GEN_AI_USAGE_INPUT_TOKENS, names.GEN_AI_USAGE_OUTPUT_TOKENS,
    names.COST_USD, names.OUTCOME, names.STATE, names.APPROVED_BY, names.INTERRUPTED,
)  # fmt: skip
_VALUE_WIDTH: Final = 60


@dataclasses.dataclass(frozen=True)
class TreeRow:
    """One span of the tree: ``depth`` 0 for a root; ``last``: for each level from 1 to ``depth`` whether that ancestor
    (or the span itself) is the last of its siblings; ``start_ms`` after the start of the trace and ``ms`` long;
    ``attributes``: name without prefix → value, short; ``orphan``: its parent is not among the spans."""

    depth: int
    last: tuple[bool, ...]
    name: str
    start_ms: float
    ms: float
    status: Status
    status_message: str
    attributes: tuple[tuple[str, str], ...]
    orphan: bool
    span_id: str


def rows(spans: Iterable[Span]) -> list[TreeRow]:
    """The spans as rows, parents before children, siblings by start time.

    A span whose parent is missing stands at the root, marked as orphan; so does one whose ancestors form a circle.
    """
    by_id = {span.span_id: span for span in spans}
    if not by_id:
        return []
    origin = min(span.start_ns for span in by_id.values())
    children: dict[str | None, list[Span]] = {}
    for span in by_id.values():
        children.setdefault(span.parent_id if span.parent_id in by_id else None, []).append(span)
    for siblings in children.values():
        siblings.sort(key=lambda span: (span.start_ns, -span.end_ns, span.span_id))

    found: list[TreeRow] = []
    seen: set[str] = set()

    def walk(root: Span) -> None:
        # A stack, not recursion: the depth is in the hands of whoever made the spans.
        stack: list[tuple[Span, tuple[bool, ...]]] = [(root, ())]
        while stack:
            span, last = stack.pop()
            if span.span_id in seen:
                continue
            seen.add(span.span_id)
            found.append(_row(span, last, origin, orphan=not last and span.parent_id is not None))
            below = children.get(span.span_id, [])
            stack.extend((child, (*last, number == 0)) for number, child in enumerate(reversed(below)))

    for root in children.get(None, []):
        walk(root)
    for span in sorted(by_id.values(), key=lambda span: (span.start_ns, span.span_id)):
        if span.span_id not in seen:
            walk(span)
    return found


def render(tree: Sequence[TreeRow]) -> list[str]:
    """The rows as lines of plain text: branches, name, duration, status unless ok, attributes."""
    heads = [_branch(row) + row.name for row in tree]
    width = max((len(head) for head in heads), default=0)
    times = [duration(row.ms) for row in tree]
    column = max((len(text) for text in times), default=0)
    lines = []
    for row, head, text in zip(tree, heads, times, strict=True):
        line = f"{head:<{width}}  {text:>{column}}"
        if row.status == "error":
            line += "  error" + (f": {_short(row.status_message)}" if row.status_message else "")
        if row.orphan:
            line += "  (parent missing)"
        if row.attributes:
            line += "  " + " ".join(f"{name}={value}" for name, value in row.attributes)
        lines.append(line)
    return lines


def duration(ms: float) -> str:
    """Milliseconds as people read them: ``0.4 ms``, ``312 ms``, ``4.21 s``, ``3 min 05 s``."""
    if ms < 10:
        return f"{ms:.1f} ms"
    if ms < 1000:
        return f"{ms:.0f} ms"
    if ms < 60_000:
        return f"{ms / 1000:.2f} s"
    minutes, seconds = divmod(round(ms / 1000), 60)
    return f"{minutes} min {seconds:02d} s"


def _branch(row: TreeRow) -> str:
    if not row.last:
        return ""
    return "".join("   " if last else "│  " for last in row.last[:-1]) + ("└─ " if row.last[-1] else "├─ ")


def _row(span: Span, last: tuple[bool, ...], origin: int, orphan: bool) -> TreeRow:
    return TreeRow(
        depth=len(last),
        last=last,
        name=_printable(span.name),
        start_ms=(span.start_ns - origin) / 1e6,
        ms=span.duration_ms,
        status=span.status,
        status_message=_printable(span.status_message),
        attributes=tuple(
            (name.rsplit(".", 1)[-1] if name.startswith("chargehand.") else _tail(name), _short(span.attributes[name]))
            for name in KEY_ATTRIBUTES
            if span.attributes.get(name) is not None
        ),
        orphan=orphan,
        span_id=span.span_id,
    )


def _tail(name: str) -> str:
    return {
        names.GEN_AI_TOOL_NAME: "tool",
        names.GEN_AI_REQUEST_MODEL: "model",
        names.GEN_AI_USAGE_INPUT_TOKENS: "tokens_in",
        names.GEN_AI_USAGE_OUTPUT_TOKENS: "tokens_out",
    }.get(name, name)


def _short(value: Any) -> str:
    text = _printable(str(value))
    return text if len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 1] + "…"


def _printable(text: str) -> str:
    """One line without terminal escapes: what stands in a span may come from a machine that lies."""
    return "".join(character if character.isprintable() else "�" for character in text)
