"""Whether every inference and tool call that is on record has its span in MLflow, and the other way round.

Owns: the comparison (pure) and its findings. Deliberately does not know: how records and spans are read.

From audit-and-traces.md: completeness is checked, not assumed. On record is what the audit chain says or the journal
that was sealed into it. What a span's absence means is told from the spool: it waits, MLflow refused it, it was
dropped, or it was delivered and is gone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping

from otel import names
from otel.spans import Span, span_id
from supervisor.audit import kinds
from supervisor.audit.chain import Record
from tools.values import JsonObject

TOOL_CALL, INFERENCE = "tool call", "inference"
NO_SPAN, NO_RECORD = "record-without-span", "span-without-record"
_CALL_KINDS = frozenset({kinds.DECISION, kinds.EVIDENCE})


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """``kind``: which side is missing; ``what``: ``tool call`` or ``inference``; ``item``: its id in the run."""

    kind: str
    run_id: str
    what: str
    item: str
    message: str

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)


def recorded(records: Iterable[Record], journal: Iterable[str]) -> dict[str, str]:
    """Id → ``tool call`` or ``inference`` of everything that the audit records and the journal lines of one run
    hold."""
    found: dict[str, str] = {}
    for record in records:
        body = _object(record.body)
        if record.kind in _CALL_KINDS and body.get("call_id"):
            found[str(body["call_id"])] = TOOL_CALL
        elif record.kind == kinds.INFERENCE and body.get("inference_id"):
            found[str(body["inference_id"])] = INFERENCE
    for line in journal:
        entry = _object(line)
        if str(entry.get("kind", "")).startswith("call.") and entry.get("call_id"):
            found.setdefault(str(entry["call_id"]), TOOL_CALL)
    return found


def traced(spans: Iterable[Span]) -> dict[str, str]:
    """Id → ``tool call`` or ``inference`` of the spans of one trace."""
    found: dict[str, str] = {}
    for span in spans:
        for name, attribute, what in (
            (names.TOOL_EXECUTION, names.CALL_ID, TOOL_CALL),
            (names.MODEL_INFERENCE, names.INFERENCE_ID, INFERENCE),
        ):
            if span.name == name and span.attributes.get(attribute):
                found[str(span.attributes[attribute])] = what
    return found


def compare(
    run_id: str, on_record: Mapping[str, str], in_trace: Mapping[str, str], spool: Mapping[str, str], dropped: str = ""
) -> list[Mismatch]:
    """Every inference or tool call of one run that stands on one side only, in order of its id.

    Args:
        on_record, in_trace: what ``recorded`` and ``traced`` gave.
        spool: span id → ``pending``, ``delivered`` or ``rejected``, as the spool knows them.
        dropped: why the spool did not accept spans of this trace, empty if it accepted all.
    """
    found = []
    for item in sorted(set(on_record) | set(in_trace), key=_order):
        if item not in in_trace:
            reason = _why_no_span(spool.get(span_id(run_id, item)), dropped)
            message = f"{on_record[item]} {item} is on record and has no span in MLflow: {reason}"
            found.append(Mismatch(NO_SPAN, run_id, on_record[item], item, message))
        elif item not in on_record:
            message = (
                f"{in_trace[item]} {item} has a span in MLflow and is on no record: neither audit chain nor journal"
            )
            found.append(Mismatch(NO_RECORD, run_id, in_trace[item], item, message))
    return found


def _why_no_span(state: str | None, dropped: str) -> str:
    if state == "pending":
        return "it waits in the spool (chargehand up delivers it)"
    if state == "rejected":
        return "MLflow refused it; it is set aside in the spool"
    if state == "delivered":
        return "it was delivered, and is not there any more"
    return f"the spool did not take it ({dropped})" if dropped else "it never came into the spool"


def _order(item: str) -> tuple[str, int, str]:
    digits = item[1:]
    return (
        (item[:1], int(digits), "")
        if digits.isascii() and digits.isdecimal() and len(digits) < 10
        else (item[:1], 0, item)
    )


def _object(text: str) -> JsonObject:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
