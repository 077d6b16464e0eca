"""The value of a span, its ids and its JSON form."""

from __future__ import annotations

import json
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel import names
from otel.spans import Span, SpanEvent, SpanMalformed, span_id, trace_id
from tests.otel.conftest import make_span

RUN = "01920000-0000-7000-8000-000000000001"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
attributes = st.dictionaries(st.text(min_size=1), json_values, max_size=6)
spans = st.builds(
    Span,
    trace_id=st.uuids(allow_nil=False).map(lambda value: value.hex),
    span_id=st.integers(1, 2**63).map(lambda value: f"{value:016x}"),
    parent_id=st.none() | st.integers(2**63 + 1, 2**64 - 1).map(lambda value: f"{value:016x}"),
    name=st.text(min_size=1, max_size=40),
    start_ns=st.integers(0, 2**62),
    end_ns=st.integers(2**62, 2**63 - 1),
    attributes=attributes,
    events=st.lists(
        st.builds(SpanEvent, st.text(min_size=1, max_size=20), st.integers(0, 2**63 - 1), attributes), max_size=2
    ).map(tuple),
    status=st.sampled_from(["ok", "error", "unset"]),
    status_message=st.text(max_size=40),
    kind=st.sampled_from(["internal", "server", "client", "producer", "consumer"]),
)


@given(spans)
def test_a_span_survives_its_json_form(span: Span) -> None:
    assert Span.from_json(json.loads(json.dumps(span.to_json()))) == span


@given(st.dictionaries(st.sampled_from(list(make_span(RUN, "c1").to_json())), json_values) | json_values)
def test_any_json_is_a_span_or_a_clear_refusal(document: object) -> None:
    whole = {**make_span(RUN, "c1").to_json(), **document} if isinstance(document, dict) else document
    try:
        span = Span.from_json(whole)  # type: ignore[arg-type]
    except SpanMalformed as error:
        assert str(error)
    else:
        assert Span.from_json(span.to_json()) == span


def test_the_run_id_without_dashes_is_the_trace_id() -> None:
    assert trace_id(RUN) == RUN.replace("-", "")
    assert trace_id(uuid.UUID(RUN)) == trace_id(RUN)


def test_making_a_span_again_gives_the_same_id_and_other_keys_or_runs_give_others() -> None:
    assert span_id(RUN, "c1") == span_id(RUN, "c1")
    assert len({span_id(RUN, f"c{number}") for number in range(1000)}) == 1000
    assert span_id(RUN, "c1") != span_id(str(uuid.uuid4()), "c1")


@pytest.mark.parametrize("bad", ["", "nonsense", "00000000-0000-0000-0000-000000000000", None, 7])
def test_a_run_id_that_is_no_uuid_is_refused(bad: object) -> None:
    with pytest.raises(SpanMalformed, match="run_id"):
        trace_id(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"trace_id": "xyz"}, "trace_id"), ({"trace_id": "0" * 32}, "trace_id"), ({"span_id": "0" * 16}, "span_id"),
        ({"span_id": "AB" * 8}, "span_id"), ({"parent_id": "1"}, "parent_id"),
        ({"parent_id": span_id(RUN, "c1")}, "itself"), ({"name": ""}, "name"), ({"start_ns": -1}, "start_ns"),
        ({"start_ns": True}, "start_ns"), ({"end_ns": 2**63}, "end_ns"), ({"end_ns": 0}, "before"),
        ({"status": "fine"}, "status"), ({"kind": "odd"}, "kind"), ({"attributes": [1]}, "attributes"),
        ({"attributes": {"": 1}}, "key"), ({"attributes": {"x": 2**63}}, "64 bits"),
        ({"attributes": {"x": float("nan")}}, "finite"), ({"attributes": {"x": b"bytes"}}, "JSON value"),
        ({"attributes": {"x": {1: 2}}}, "key"), ({"events": (SpanEvent("", 1),)}, "event"),
    ],
)  # fmt: skip
def test_a_span_that_is_wrong_names_the_field(change: dict[str, object], word: str) -> None:
    with pytest.raises(SpanMalformed, match=word):
        make_span(RUN, "c1", **change)


def test_nesting_without_end_is_refused_before_the_interpreter_gives_up() -> None:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(SpanMalformed, match="nested deeper"):
        make_span(RUN, "c1", attributes={"x": value})


def test_every_span_name_has_a_type_for_mlflow() -> None:
    assert set(names.SPAN_TYPES) == set(names.SPAN_NAMES)
