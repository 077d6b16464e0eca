"""The tree of a trace as rows and text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from otel import names
from otel.spans import Span
from otel.tree import duration, render, rows
from tests.otel.conftest import make_span

RUN = "01920000-0000-7000-8000-000000000001"


def _trace() -> list[Span]:
    def at(key: str, parent: str, start_ms: int, ms: float, **changes: object) -> Span:
        start = 10**18 + start_ms * 10**6
        return make_span(RUN, key, parent, start_ns=start, end_ns=start + int(ms * 1e6), **changes)

    return [
        at(
            "c2", "task", 900, 0.4, status="error", status_message="exit 1\x1b[31m", attributes={names.DECISION: "deny"}
        ),
        at(
            "i1", "task", 300, 312, name=names.MODEL_INFERENCE, attributes={names.GEN_AI_REQUEST_MODEL: "m", "other": 1}
        ),
        at("task", "run", 200, 4210, name=names.TASK, attributes={}),
        at("root", "root", 0, 185_000, attributes={names.MACHINE: "web-01"}),
        at("run", "root", 100, 5000, name=names.RUN_COMPLETED, attributes={}),
        at("stop", "run", 4800, 80, name=names.AGENT_STOP, attributes={}),
    ]


def test_a_trace_is_shown_as_a_tree() -> None:
    assert render(rows(_trace())) == [
        "message.processed         3 min 05 s  machine=web-01",
        "└─ run.completed              5.00 s",
        "   ├─ task                    4.21 s",
        "   │  ├─ model.inference      312 ms  model=m",
        "   │  └─ tool.execution       0.4 ms  error: exit 1�[31m  decision=deny",
        "   └─ agent.stop               80 ms",
    ]


def test_a_span_without_its_parent_stands_at_the_root_and_is_marked() -> None:
    [task, *_] = rows([span for span in _trace() if span.name not in (names.MESSAGE_PROCESSED, names.RUN_COMPLETED)])
    assert (task.name, task.depth, task.orphan) == ("task", 0, True)
    assert "(parent missing)" in render([task])[0]


def test_no_spans_are_no_lines() -> None:
    assert render(rows([])) == []


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 50)), max_size=20))
def test_every_span_has_exactly_one_row_whatever_the_parents_say(links: list[tuple[int, int, int]]) -> None:
    spans = [
        make_span(RUN, f"s{child}", f"s{parent}", start_ns=start, end_ns=start)
        for child, parent, start in links
        if child != parent
    ]
    found = rows(spans)
    assert sorted(row.span_id for row in found) == sorted({span.span_id for span in spans})
    assert len(render(found)) == len(found)


def test_a_very_deep_trace_does_not_exhaust_the_stack() -> None:
    chain = [make_span(RUN, f"s{n}", None if n == 0 else f"s{n - 1}", start_ns=n, end_ns=n) for n in range(5000)]
    assert rows(chain)[-1].depth == 4999


def test_durations_read_well() -> None:
    assert [duration(ms) for ms in (0, 9.94, 10, 999.4, 1000, 59_990, 60_000, 3_600_000)] == [
        "0.0 ms", "9.9 ms", "10 ms", "999 ms", "1.00 s", "59.99 s", "1 min 00 s", "60 min 00 s",
    ]  # fmt: skip
