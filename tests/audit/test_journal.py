"""The journal of a machine: its chain, and what it says against what the worker streamed."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from supervisor.audit import chain as chains
from supervisor.audit.chain import GENESIS
from supervisor.audit.journal import Gap, compare, verify_journal
from tools.values import (
    ALLOW,
    DENY,
    OBSERVE,
    Decision,
    Event,
    Evidence,
    Stage,
    Step,
    StepResult,
    ToolCall,
    canonical,
    digest,
)

RUN = "01a1fc37-b038-7fb6-80d8-1f418525ac3a"
LEASE = "sha256:lease"
OUTPUT = "active (running)\n"

CALL = ToolCall("c1", "exec", {"argv": ["/usr/bin/systemctl", "status", "nginx"]})
STEP = Step((Stage("/usr/bin/systemctl", ("/usr/bin/systemctl", "status", "nginx")),))
ALLOWED = Decision(ALLOW, OBSERVE, "systemctl:status", "reading", steps=(STEP,))
EVIDENCE = Evidence(
    "c1",
    "exec",
    (
        StepResult(
            argv=(STEP.stages[0].argv,), exit_status=0, exit_statuses=(0,), stdout=OUTPUT, stdout_bytes=len(OUTPUT),
            stdout_digest=digest(OUTPUT), stderr_digest=digest(b""), duration_ms=12.5,
        ),
    ),
    duration_ms=13.0,
)  # fmt: skip
REFUSED = ToolCall("c2", "exec", {"argv": ["/usr/bin/rm", "-rf", "/"]})
DENIED = Decision(DENY, "never", "default-deny", "no rule", "use an observer")


def entries() -> list[tuple[str, str | None, dict[str, Any]]]:
    """What the broker writes for one allowed and one denied call."""
    result = EVIDENCE.to_json()["steps"][0]
    kept = {name: result[name] for name in (
        "exit_status", "exit_statuses", "signal", "stdout_digest", "stdout_bytes", "stderr_digest", "stderr_bytes", "cut",
        "timed_out", "cancelled", "error", "duration_ms")}  # fmt: skip
    intent = {"step": 1, "digest": digest(STEP.to_json()), "argv": [list(STEP.stages[0].argv)]}
    return [
        ("lease.started", None, {"lease_digest": LEASE, "machine": "web-01", "generation": 1}),
        ("call.asked", "c1", {"tool": "exec", "arguments": CALL.arguments}),
        ("call.decided", "c1", _decision(ALLOWED)),
        ("call.intent", "c1", intent),
        ("call.result", "c1", {"steps": [kept], "data_digest": None, "error": "", "duration_ms": 13.0}),
        ("lease.renewed", None, {"seq": 1, "left_s": 30.0}),
        ("call.asked", "c2", {"tool": "exec", "arguments": REFUSED.arguments}),
        ("call.decided", "c2", _decision(DENIED)),
        ("stopped", None, {"reason": "done", "calls": 2}),
    ]


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "outcome": decision.outcome, "effect": decision.effect, "rule": decision.rule, "reason": decision.reason,
        "digest": decision.digest, "steps": len(decision.steps),
    }  # fmt: skip


def lines_of(items: list[tuple[str, str | None, dict[str, Any]]], run_id: str = RUN) -> tuple[list[str], str]:
    lines, prev = [], GENESIS
    for seq, (kind, call_id, body) in enumerate(items, 1):
        line = canonical({"seq": seq, "prev": prev, "run_id": run_id, "call_id": call_id, "kind": kind, "wall": 1.5,
                          "boot": 2.5, "body": body})  # fmt: skip
        lines.append(line.decode("ascii"))
        prev = hashlib.sha256(line).hexdigest()
    return lines, prev


def journal() -> tuple[list[str], str]:
    return lines_of(entries())


def events() -> list[Event]:
    told = [
        ("call.asked", CALL.to_json()),
        ("call.decided", {"call_id": "c1", "decision": ALLOWED.to_json()}),
        ("call.finished", {"call_id": "c1", "evidence": EVIDENCE.to_json()}),
        ("text", {"text": "hm"}),
        ("call.asked", REFUSED.to_json()),
        ("call.decided", {"call_id": "c2", "decision": DENIED.to_json()}),
        ("call.finished", {"call_id": "c2", "refused": True}),
    ]
    return [Event(seq, kind, copy.deepcopy(body)) for seq, (kind, body) in enumerate(told, 1)]


def found(lines: list[str], **more: Any) -> list[tuple[str, int]]:
    return [(item.kind, item.seq) for item in verify_journal(lines, RUN, **more).breaks]


# --- the chain -------------------------------------------------------------------------------------------------------


def test_a_whole_journal_verifies() -> None:
    lines, head = journal()
    report = verify_journal(lines, RUN, head=head, lease_digest=LEASE)
    assert report.breaks == ()
    assert (report.lines, report.head, report.lease_digest) == (9, head, LEASE)


def test_the_brokers_own_journal_verifies(tmp_path: Path) -> None:
    from edge_agent.host.journal import Journal, read_lines

    path = str(tmp_path / f"{RUN}.jsonl")
    written = Journal(path, RUN)
    for kind, call_id, body in entries():
        written.append(kind, body, call_id)
    written.close()
    report = verify_journal(read_lines(path), RUN, head=written.head, lease_digest=LEASE)
    assert report.breaks == ()
    assert compare(report.entries, events()) == []


@given(st.data())
def test_every_flipped_bit_is_found_at_its_line(data: st.DataObject) -> None:
    lines, head = journal()
    place = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[place]) - 1))
    bit = 1 << data.draw(st.integers(0, 6))
    lines[place] = lines[place][:at] + chr(ord(lines[place][at]) ^ bit) + lines[place][at + 1 :]
    breaks = verify_journal(lines, RUN, head=head, lease_digest=LEASE).breaks
    assert breaks
    # A changed `prev` can only be seen from the two lines it ties together.
    assert breaks[0].seq - 1 in (place - 1, place, place + 1)


@given(st.integers(0, 7), st.integers(1, 3))
def test_removed_lines_are_found(first: int, count: int) -> None:
    lines, head = journal()
    assume(first + count < len(lines))
    kept = lines[:first] + lines[first + count :]
    assert (chains.REMOVED, first + 1) in found(kept, head=head)


def test_exchanged_lines_a_cut_tail_and_an_empty_journal_are_found() -> None:
    lines, head = journal()
    assert chains.REORDERED in {kind for kind, _ in found([*lines[:2], lines[3], lines[2], *lines[4:]], head=head)}
    assert found(lines[:-1], head=head) == [(chains.TRUNCATED, 9)]
    assert found([], head=head) == [(chains.TRUNCATED, 1)]
    assert found([]) == []


def test_a_journal_of_another_run_or_another_lease_is_foreign() -> None:
    other, head = lines_of(entries(), RUN.replace("1", "2"))
    assert {kind for kind, _ in found(other, head=head)} == {chains.FOREIGN}
    lines, head = journal()
    assert found(lines, head=head, lease_digest="sha256:other") == [(chains.FOREIGN, 1)]
    without, head = lines_of(entries()[1:])
    assert found(without, head=head) == [(chains.FOREIGN, 1)]


def test_a_journal_computed_anew_is_found_by_its_head() -> None:
    _, head = journal()
    forged, _ = lines_of(entries()[:6] + entries()[8:])
    assert found(forged, head=head) == [(chains.TRUNCATED, 8)]


@given(st.lists(st.text(max_size=30) | st.sampled_from(["{}", "[]", "null", '{"seq":1}', "[" * 3000]), max_size=4))
def test_no_text_makes_the_reader_fail(lines: list[str]) -> None:
    report = verify_journal(lines, RUN, head=GENESIS)
    assert report.verified == (not lines)


# --- against the events ----------------------------------------------------------------------------------------------


def gaps(change: Callable[[list[Event]], object] = lambda _: None, items: Any = None, **more: Any) -> list[Gap]:
    told = events()
    change(told)
    lines, _ = lines_of(items if items is not None else entries())
    return compare(verify_journal(lines, RUN).entries, told, **more)


def kinds_of(found_gaps: list[Gap]) -> list[tuple[str, str | None]]:
    return [(gap.kind, gap.call_id) for gap in found_gaps]


def step_of(told: list[Event]) -> dict[str, Any]:
    step: dict[str, Any] = told[2].body["evidence"]["steps"][0]
    return step


def test_a_worker_that_tells_the_truth_has_no_gaps() -> None:
    assert gaps() == []


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda told: told.__delitem__(slice(0, 3)), ("not-streamed", "c1")),
        (lambda told: told.append(Event(9, "call.asked", {**CALL.to_json(), "call_id": "c3"})), ("not-in-journal", "c3")),
        (lambda told: told.pop(0), ("asked-not-streamed", "c1")),
        (lambda told: told[0].body["arguments"].update(argv=["/usr/bin/uptime"]), ("asked-differs", "c1")),
        (lambda told: told[0].body.update(tool="read"), ("asked-differs", "c1")),
        (lambda told: told.pop(1), ("decision-not-streamed", "c1")),
        (lambda told: told[5].body["decision"].update(outcome="allow"), ("decision-differs", "c2")),
        (lambda told: told[1].body["decision"].update(rule="other"), ("decision-differs", "c1")),
        (lambda told: told[1].body["decision"].update(steps=[]), ("decision-differs", "c1")),
        (lambda told: told.pop(2), ("result-not-streamed", "c1")),
        (lambda told: step_of(told).update(exit_status=1), ("evidence-differs", "c1")),
        (lambda told: step_of(told).update(stdout_digest=digest("x")), ("evidence-differs", "c1")),
        (lambda told: step_of(told).update(stdout="inactive (dead)\n"), ("evidence-differs", "c1")),
        (lambda told: told[2].body["evidence"].update(data={"units": 0}), ("evidence-differs", "c1")),
        (lambda told: told[2].body["evidence"].update(steps=[]), ("evidence-differs", "c1")),
        (lambda told: told[2].body["evidence"].update(error="killed"), ("evidence-differs", "c1")),
        (lambda told: told[6].body.update(refused=False, evidence=EVIDENCE.to_json()), ("result-not-in-journal", "c2")),
    ],
)  # fmt: skip
def test_each_lie_of_a_worker_is_one_gap(change: Callable[[list[Event]], object], wanted: tuple[str, str]) -> None:
    assert wanted in kinds_of(gaps(change))


def test_what_was_executed_must_be_what_was_decided() -> None:
    items = entries()
    items[3] = ("call.intent", "c1", {"step": 1, "digest": digest("something else")})
    assert kinds_of(gaps(items=items)) == [("executed-differs", "c1")]


def test_an_observer_may_go_on_after_what_was_decided_first() -> None:
    rule = "observer:disk"
    items = entries()
    items[2] = ("call.decided", "c1", {**items[2][2], "rule": rule})
    items[3] = ("call.intent", "c1", {"step": 1, "digest": digest("a second phase")})
    assert gaps(lambda told: told[1].body["decision"].update(rule=rule), items) == []


def test_a_denied_call_that_was_executed_is_found() -> None:
    items = [*entries()[:8], ("call.intent", "c2", {"step": 1, "digest": "sha256:x"}), entries()[8]]
    assert ("executed-denied", "c2") in kinds_of(gaps(items=items))


def test_a_call_that_was_begun_and_has_no_result_is_found() -> None:
    items = [item for item in entries() if item[0] != "call.result"]
    assert kinds_of(gaps(lambda told: told.pop(2), items)) == [("no-result", "c1")]


def test_of_an_incomplete_journal_only_that_is_told() -> None:
    assert kinds_of(gaps(items=entries()[:4], complete=False)) == [("journal-incomplete", None)]


def test_a_written_files_content_is_held_against_its_digest() -> None:
    kept = {"path": "/etc/motd", "content": {"digest": digest("hello"), "bytes": 5}}
    items = entries()
    items[1] = ("call.asked", "c1", {"tool": "exec", "arguments": kept})

    def say(content: str) -> Callable[[list[Event]], object]:
        return lambda told: told[0].body.update(arguments={"path": "/etc/motd", "content": content})

    assert gaps(say("hello"), items) == []
    assert kinds_of(gaps(say("hullo"), items)) == [("asked-differs", "c1")]
    long = {"argv": ["x" * 9000]}
    items[1] = ("call.asked", "c1", {"tool": "exec", "arguments": {"digest": digest(long), "bytes": 9000}})
    assert gaps(lambda told: told[0].body.update(arguments=long), items) == []


def test_output_that_is_no_text_and_output_that_was_cut_are_no_lies() -> None:
    raw = b"caf\xe9 \xff\n"
    items = entries()
    items[4][2]["steps"][0].update(stdout_digest=digest(raw), stdout_bytes=len(raw))
    shown = {"stdout": raw.decode("utf-8", "backslashreplace"), "stdout_digest": digest(raw), "stdout_bytes": len(raw)}
    assert gaps(lambda told: step_of(told).update(shown), items) == []
    items[4][2]["steps"][0]["cut"] = True
    assert gaps(lambda told: step_of(told).update(shown, cut=True, stdout="caf"), items) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from(["call.asked", "call.decided", "call.finished"]),
    st.fixed_dictionaries(
        {"call_id": st.sampled_from(["c1", "c2", "", "c\udc80"])},
        optional={"tool": json_values, "arguments": json_values, "decision": json_values, "evidence": json_values},
    ),
)
def test_nothing_a_worker_says_can_stop_the_comparison(kind: str, body: dict[str, Any]) -> None:
    lines, _ = journal()
    told = [*events(), Event(8, kind, body)]
    for gap in compare(verify_journal(lines, RUN).entries, told):
        assert gap.message


def test_calls_are_told_in_the_order_they_were_numbered() -> None:
    told = [Event(n, "call.asked", {"call_id": f"c{n}", "tool": "exec", "arguments": {}}) for n in (10, 9, 3)]
    assert [gap.call_id for gap in compare([], told)] == ["c3", "c9", "c10"]
    assert json.dumps([gap.to_json() for gap in compare([], told)])
