"""The journal of a machine: checking its chain, and holding it against what the worker streamed.

Owns: reading the lines (contracts.md, "Journal"), the breaks of their chain, and the list of gaps between journal and
events.
Deliberately does not know: where lines and events come from. Pure.

Broker and worker are two processes: the broker writes the journal, the worker streams the events. A worker that was
taken over can tell anything; the journal says what was really asked, decided and executed. Every difference is a finding
of its own (``audit.gap``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from supervisor.audit.chain import CHANGED, FOREIGN, GENESIS, REMOVED, REORDERED, TRUNCATED, Break
from tools.values import Event, JsonObject, canonical, digest

FIELDS = frozenset({"seq", "prev", "run_id", "call_id", "kind", "wall", "boot", "body"})
LEASE_STARTED = "lease.started"
ASKED, DECIDED, INTENT, RESULT = "call.asked", "call.decided", "call.intent", "call.result"

# What the journal and the streamed evidence must agree on, step by step; both come from the same execution.
_STEP_FIELDS = (
    "exit_status", "exit_statuses", "signal", "stdout_digest", "stdout_bytes", "stderr_digest", "stderr_bytes", "cut",
    "timed_out", "cancelled",
)  # fmt: skip
_DECISION_FIELDS = ("outcome", "effect", "rule", "digest")
_OBSERVER_RULE = "observer:"
_ESCAPED_BYTE = re.compile(rb"\\x([89a-f][0-9a-f])")


@dataclasses.dataclass(frozen=True)
class JournalReport:
    """``lines``: how many were checked; ``head``: hash of the last one; ``breaks``: where the chain does not hold."""

    run_id: str
    lines: int
    head: str
    lease_digest: str | None
    breaks: tuple[Break, ...]
    entries: tuple[JsonObject, ...] = dataclasses.field(default=(), repr=False)

    @property
    def verified(self) -> bool:
        return not self.breaks


@dataclasses.dataclass(frozen=True)
class Gap:
    """One difference between journal and events: its kind, the call it is about, and both sides."""

    kind: str
    call_id: str | None
    message: str
    journal: Any = None
    streamed: Any = None

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)


def verify_journal(
    lines: Sequence[str], run_id: str, *, head: str | None = None, lease_digest: str | None = None
) -> JournalReport:
    """Check the chain of a journal and that it belongs to the run.

    Args:
        lines: without their newlines, as they stand on the machine.
        run_id: the run it is to belong to.
        head: hash of the last line as the gatekeeper or the seal tells it; without it a cut tail cannot be seen.
        lease_digest: of the lease that the centre granted to this run.
    """
    chain = f"journal:{run_id}"
    breaks: list[Break] = []

    def report(kind: str, seq: int, message: str, expected: Any = "", got: Any = "", last: int | None = None) -> None:
        breaks.append(Break(kind, chain, seq, seq if last is None else last, message, str(expected), str(got)[:200]))

    entries: list[JsonObject] = []
    previous, expected, numbers = GENESIS, 1, _numbers(lines)
    for place, line in enumerate(lines, 1):
        entry = _entry(line)
        line_hash = hashlib.sha256(_bytes(line)).hexdigest()
        if entry is None:
            report(CHANGED, place, f"line {place} is not a journal line in canonical form", "canonical JSON", line)
            previous, expected = line_hash, expected + 1
            continue
        entries.append(entry)
        seq = entry["seq"]
        if entry["run_id"] != run_id:
            report(FOREIGN, place, f"line {place} belongs to another run", run_id, entry["run_id"])
        elif seq != expected and entry["prev"] == previous:
            report(CHANGED, place, f"the number of line {place} was changed to {seq}", expected, seq)
            seq = expected
        elif seq != expected:
            if seq > expected and not numbers & set(range(expected, min(seq, expected + len(lines) + 1))):
                report(REMOVED, expected, f"line {expected} is missing", entry["prev"], previous, last=seq - 1)
            else:
                report(REORDERED, seq, f"line {seq} stands at place {place}", place, seq)
        elif entry["prev"] != previous and (place == 1 or place - 1 not in {told.seq for told in breaks}):
            kind, where = (CHANGED, place - 1) if place > 1 else (FOREIGN, 1)
            message = f"line {where} is not the one that line {seq} was written after"
            report(kind, where, message, entry["prev"], previous)
        previous, expected = line_hash, seq + 1 if seq >= expected else expected
    started = entries[0]["body"].get("lease_digest") if entries and entries[0]["kind"] == LEASE_STARTED else None
    if lines and started is None:
        report(FOREIGN, 1, "the first line does not say under which lease the run was", LEASE_STARTED, lines[0][:80])
    elif lines and lease_digest is not None and started != lease_digest:
        report(FOREIGN, 1, "the journal was written under another lease", lease_digest, started)
    found_head = previous if lines else GENESIS
    if head is not None and found_head != head and not breaks:
        _report_end(report, len(lines), head, found_head)
    return JournalReport(run_id, len(lines), found_head, started, tuple(breaks), tuple(entries))


def _report_end(report: Any, count: int, head: str, found: str) -> None:
    # A cut tail and a last line written anew look the same from here: the head is the hash of a line we do not have.
    if count == 0:
        report(TRUNCATED, 1, "the journal is empty, but its head is known", head, found)
    else:
        report(
            TRUNCATED, count + 1, f"the journal ends with line {count}, which is not its known last line", head, found
        )


def _numbers(lines: Iterable[str]) -> set[int]:
    entries = (_entry(line) for line in lines)
    return {entry["seq"] for entry in entries if entry is not None}


def _entry(line: str) -> JsonObject | None:
    try:
        entry = json.loads(line)
        whole = isinstance(entry, dict) and set(entry) == FIELDS and canonical(entry).decode("ascii") == line
    except (ValueError, RecursionError):
        return None
    if not whole or not isinstance(entry["seq"], int) or isinstance(entry["seq"], bool):
        return None
    texts = all(isinstance(entry[name], str) for name in ("prev", "run_id", "kind"))
    call = entry["call_id"] is None or isinstance(entry["call_id"], str)
    return entry if texts and call and isinstance(entry["body"], dict) else None


# --- journal against events ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Told:
    """What one side tells about one call."""

    asked: JsonObject | None = None
    decided: JsonObject | None = None
    intents: list[JsonObject] = dataclasses.field(default_factory=list)
    result: JsonObject | None = None
    refused: bool = False


def compare(entries: Iterable[Mapping[str, Any]], events: Iterable[Event], *, complete: bool = True) -> list[Gap]:
    """Every difference between a (verified) journal and the events that the worker streamed.

    Args:
        entries: ``JournalReport.entries``.
        events: what the worker streamed, in order.
        complete: whether the journal was collected to its end; if not, that is a gap of its own and what only the
            worker tells about the last calls is not held against it.

    Returns gaps in the order of the calls; an empty list if both tell the same.
    """
    host, worker = _from_journal(entries), _from_events(events)
    gaps = [] if complete else [Gap("journal-incomplete", None, "the journal could not be collected to its end")]
    for call_id in _in_order([*host, *worker]):
        here, there = host.get(call_id), worker.get(call_id)
        if here is None or here.asked is None:
            if complete or here is not None:
                gaps.append(Gap("not-in-journal", call_id, f"the worker tells of call {call_id}, the journal does not"))
        elif there is None:
            gaps.append(
                Gap(
                    "not-streamed",
                    call_id,
                    f"the journal holds call {call_id}, the worker never told of it",
                    here.asked,
                )
            )
        else:
            gaps += _compare_call(call_id, here, there, complete)
    return gaps


def _from_journal(entries: Iterable[Mapping[str, Any]]) -> dict[str, _Told]:
    calls: dict[str, _Told] = {}
    for entry in entries:
        call_id, kind, body = entry["call_id"], entry["kind"], entry["body"]
        if call_id is None:
            continue
        told = calls.setdefault(call_id, _Told())
        if kind == ASKED:
            told.asked = body
        elif kind == DECIDED:
            told.decided = body
        elif kind == INTENT:
            told.intents.append(body)
        elif kind == RESULT:
            told.result = body
    return calls


def _from_events(events: Iterable[Event]) -> dict[str, _Told]:
    calls: dict[str, _Told] = {}
    for event in events:
        call_id = event.body.get("call_id")
        if not event.kind.startswith("call.") or not isinstance(call_id, str):
            continue
        told = calls.setdefault(call_id, _Told())
        if event.kind == ASKED:
            told.asked = event.body
        elif event.kind == DECIDED:
            told.decided = _object(event.body.get("decision"))
        elif event.kind == "call.finished":
            told.refused = bool(event.body.get("refused"))
            told.result = None if told.refused else _object(event.body.get("evidence"))
    return calls


def _compare_call(call_id: str, host: _Told, worker: _Told, complete: bool) -> list[Gap]:
    gaps: list[Gap] = []

    def gap(kind: str, message: str, journal: Any = None, streamed: Any = None) -> None:
        gaps.append(Gap(kind, call_id, f"call {call_id}: {message}", journal, streamed))

    asked, told_asked = host.asked or {}, worker.asked
    if told_asked is None:
        gap("asked-not-streamed", "the worker did not tell what it asked", asked)
    elif asked.get("tool") != told_asked.get("tool") or not _same_arguments(
        asked.get("arguments"), told_asked.get("arguments")
    ):
        gap("asked-differs", "what was asked is not what the worker tells", asked, told_asked)

    if host.decided is None:
        if complete:
            gap("undecided", "the journal holds no decision")
    elif worker.decided is None:
        gap("decision-not-streamed", "the worker did not tell the decision", host.decided)
    else:
        here = {name: host.decided.get(name) for name in _DECISION_FIELDS}
        there = {name: worker.decided.get(name) for name in _DECISION_FIELDS}
        steps = worker.decided.get("steps", [])
        if here != there or _digest(steps) != there["digest"]:
            gap("decision-differs", "the decision is not the one the worker tells", here, there)
        if host.intents and here["outcome"] == "deny":
            gap("executed-denied", "it was denied and executed", host.intents)
        elif not str(here["rule"]).startswith(_OBSERVER_RULE):
            # An observer may ask for more once it has seen its first results; every other call is what was decided.
            decided = {_digest(step) for step in steps} if isinstance(steps, list) else set()
            foreign = [intent for intent in host.intents if intent.get("digest") not in decided]
            if foreign and here == there:
                gap("executed-differs", "what was executed is not what was decided", foreign, steps)

    if host.result is not None and worker.result is not None:
        for message, left, right in _evidence_differences(host.result, worker.result):
            gap("evidence-differs", message, left, right)
    elif host.result is not None:
        gap("result-not-streamed", "it was executed, and the worker did not tell the result", host.result)
    elif host.intents and complete:
        gap("no-result", "it was begun, and the journal does not say how it ended", host.intents)
    elif worker.result is not None and complete:
        gap("result-not-in-journal", "the worker tells a result that the journal does not hold", None, worker.result)
    return gaps


def _same_arguments(journal: Any, streamed: Any) -> bool:
    """The journal keeps file contents, and arguments that are long, by digest and size only."""
    if journal == streamed:
        return True
    if not isinstance(journal, Mapping) or not isinstance(streamed, Mapping):
        return False
    if set(journal) == {"digest", "bytes"} and journal["digest"] == _digest(dict(streamed)):
        return True
    content = streamed.get("content")
    if "content" not in streamed or set(journal) != set(streamed):
        return False
    kept = {"digest": digest(_bytes(str(content))), "bytes": len(str(content).encode("utf-8", "replace"))}
    return dict(journal) == {**streamed, "content": kept}


def _evidence_differences(journal: Mapping[str, Any], streamed: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    here, there = _objects(journal.get("steps")), _objects(streamed.get("steps"))
    if len(here) != len(there):
        found.append(("the number of executed steps differs", len(here), len(there)))
    for number, (left, right) in enumerate(zip(here, there, strict=False), 1):
        for name in _STEP_FIELDS:
            if left.get(name) != right.get(name):
                found.append((f"{name} of step {number} differs", left.get(name), right.get(name)))
        for stream in ("stdout", "stderr"):
            if right.get(f"{stream}_digest") == left.get(f"{stream}_digest") and not _output_holds(right, stream):
                message = f"the {stream} of step {number} does not have its digest"
                found.append((message, left.get(f"{stream}_digest"), digest(_bytes(str(right.get(stream))))))
    data = streamed.get("data")
    told = _digest(data) if data is not None else None
    if journal.get("data_digest") != told:
        found.append(("the parsed data differs", journal.get("data_digest"), told))
    if bool(journal.get("error")) != bool(streamed.get("error")):
        found.append(("whether it failed differs", journal.get("error"), streamed.get("error")))
    return found


def _output_holds(step: Mapping[str, Any], stream: str) -> bool:
    """Whether the text is the output that was digested, as far as that can be told: not for one that was cut."""
    text, wanted = step.get(stream, ""), step.get(f"{stream}_digest")
    if not isinstance(text, str) or not wanted or step.get("cut"):
        return True
    raw = _bytes(text)
    # Bytes that are no UTF-8 are shown as \xNN; taking that back is the only other thing it can have been.
    unescaped = _ESCAPED_BYTE.sub(lambda match: bytes([int(match[1], 16)]), raw)
    return wanted in (digest(raw), digest(unescaped))


def _bytes(text: str) -> bytes:
    # What a worker sends may hold lone surrogates, which no UTF-8 has; it must not be able to stop the comparison.
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def _digest(value: Any) -> str:
    """Digest of a JSON value's canonical form; of one that has none (NaN, endless nesting) a word that equals no digest."""
    try:
        return digest(canonical(value))
    except (TypeError, ValueError, RecursionError):
        return "not JSON"


def _object(value: Any) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[JsonObject]:
    return [_object(item) for item in value] if isinstance(value, list) else []


def _in_order(call_ids: Iterable[str]) -> list[str]:
    """Calls as they were numbered (``c1``, ``c2``, … ``c10``), others behind them by name."""

    def place(call_id: str) -> tuple[int, str]:
        number = call_id[1:]
        return (int(number), "") if number.isascii() and number.isdigit() and len(number) < 10 else (10**10, call_id)

    return sorted(set(call_ids), key=place)
