"""The protocol's values: JSON there and back, tool-call arguments, errors."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference import errors
from inference.accumulate import TextJoiner, ToolCallAccumulator
from inference.protocol import (
    STOP_REASONS,
    AssistantMessage,
    CallRecord,
    Completion,
    Finished,
    Notice,
    Request,
    TextDelta,
    ToolResult,
    ToolSpec,
    ToolUse,
    Usage,
    UserMessage,
    clean,
    event_from_json,
    event_to_json,
    read_arguments,
)
from tools.values import Evidence, Malformed, ToolCall

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
any_json: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, any_json, max_size=4)
uses = st.builds(ToolUse.read, texts, texts, st.one_of(objects.map(json.dumps), texts), st.booleans())
counts = st.integers(0, 10**9)
events = st.one_of(
    st.builds(TextDelta, texts),
    st.builds(Notice, texts),
    uses,
    st.builds(Usage, counts, counts, counts, counts, counts, st.none() | st.floats(0, 1e6), st.booleans()),
    st.builds(Finished, st.sampled_from(STOP_REASONS), texts, texts, st.none() | objects),
)
records = st.builds(
    lambda call_id, tool, arguments, refused: CallRecord(
        ToolCall(call_id, tool, arguments), None if refused else Evidence(call_id, tool), refused, "because"
    ),
    texts, texts, objects, st.booleans(),
)  # fmt: skip
messages = st.one_of(
    st.builds(UserMessage, texts),
    st.builds(AssistantMessage, texts, st.lists(uses, max_size=2).map(tuple), st.none() | objects),
    st.builds(ToolResult, texts, texts, st.booleans(), st.none() | records),
)
requests = st.builds(
    Request,
    texts,
    st.lists(messages, max_size=4).map(tuple),
    st.lists(st.builds(ToolSpec, texts, texts, objects), max_size=2).map(tuple),
    st.integers(1, 10**6),
    st.none() | st.floats(0, 2),
    st.lists(texts, max_size=2).map(tuple),
    objects,
)


@given(requests)
def test_a_request_survives_its_json_form(request: Request) -> None:
    again = Request.from_json(json.loads(json.dumps(request.to_json())))
    assert again == request
    assert again.prompt_digest == request.prompt_digest


@given(requests)
def test_records_of_calls_do_not_change_what_a_model_reads(request: Request) -> None:
    assert Request.from_json(request.to_json(with_records=False)).prompt_digest == request.prompt_digest


@given(events)
def test_an_event_survives_its_json_form(event: Any) -> None:
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


@given(any_json)
def test_any_document_is_a_request_and_an_event_or_malformed(document: Any) -> None:
    for read in (event_from_json, Request.from_json):
        with contextlib.suppress(Malformed):
            read(document if isinstance(document, dict) else {"type": document, "messages": document})


@given(objects)
def test_arguments_are_read_back_as_they_were_written(arguments: dict[str, Any]) -> None:
    assert read_arguments(json.dumps(arguments)) == (arguments, "")


@given(st.text(max_size=60))
def test_any_text_is_arguments_or_a_problem_said_in_words(raw: str) -> None:
    arguments, problem = read_arguments(raw)
    assert (arguments is None) == bool(problem)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ('{"argv": ["df"', "not valid JSON"),
        ('["df"]', "one JSON object, got list"),
        ('"{}"', "one JSON object, got str"),
        ('{"argv": ["ls"], "argv": ["rm"]}', "occurs twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "' + "x" * 300_000 + '"}', "at most 262144"),
    ],
)
def test_arguments_that_cannot_be_read_say_why(raw: str, words: str) -> None:
    arguments, problem = read_arguments(raw)
    assert arguments is None
    assert words in problem


def test_no_arguments_are_an_empty_object_unless_the_answer_was_cut() -> None:
    assert ToolUse.read("1", "uptime", "").arguments == {}
    assert ToolUse.read("1", "uptime", "", cut=True).malformed


@given(st.text(max_size=40))
def test_cleaned_text_is_always_valid_unicode(text: str) -> None:
    clean(text).encode("utf-8")


@given(texts, st.data())
def test_text_cut_anywhere_comes_out_whole(text: str, data: st.DataObject) -> None:
    units = text.encode("utf-16-le")
    pieces = [
        units[at : at + 2].decode("utf-16-le", "surrogatepass") for at in range(0, len(units), 2)
    ]  # as JSON escapes come: one UTF-16 unit each
    joiner = TextJoiner()
    assert "".join(joiner.feed(piece) for piece in pieces) + joiner.rest() == text


@given(
    st.lists(st.tuples(texts.filter(bool), objects), min_size=1, max_size=4),
    st.integers(1, 9),
    st.sampled_from(["index", "zero", "none"]),
)
def test_tool_calls_come_out_of_fragments_as_they_were_written(
    calls: list[tuple[str, dict[str, Any]]], size: int, style: str
) -> None:
    accumulator = ToolCallAccumulator()
    for number, (name, arguments) in enumerate(calls):
        index = {"index": number, "zero": 0, "none": None}[style]
        raw = json.dumps(arguments)
        accumulator.feed(index, f"id{number}", name, "")
        for at in range(0, len(raw), size):
            accumulator.feed(index, None, None, raw[at : at + size])
    found = accumulator.finish()
    assert [(use.id, use.name, use.arguments) for use in found] == [
        (f"id{number}", name, arguments) for number, (name, arguments) in enumerate(calls)
    ]


@given(
    st.lists(
        st.tuples(st.none() | st.integers(-1, 3) | texts, st.none() | texts, st.none() | texts, any_json), max_size=12
    )
)
def test_any_fragments_give_calls_with_ids_of_their_own(fragments: list[tuple[Any, Any, Any, Any]]) -> None:
    accumulator = ToolCallAccumulator()
    for fragment in fragments:
        accumulator.feed(*fragment)
    found = accumulator.finish()
    assert len({use.id for use in found}) == len(found)
    assert all(use.id for use in found)


def test_the_last_call_of_an_answer_cut_at_its_limit_is_never_whole() -> None:
    accumulator = ToolCallAccumulator()
    accumulator.feed(0, "a", "df", '{"a": 1}')
    accumulator.feed(1, "b", "exec", '{"argv": ["rm"]}')
    first, second = accumulator.finish(cut=True)
    assert first.arguments == {"a": 1}
    assert second.malformed


def test_arguments_without_end_do_not_fill_the_memory() -> None:
    accumulator = ToolCallAccumulator()
    for _ in range(2000):
        accumulator.feed(0, "a", "exec", "x" * 1000)
    assert "at most" in accumulator.finish()[0].problem
    assert len(accumulator.finish()[0].raw) <= 262_144


@pytest.mark.parametrize("kind", sorted(errors.KINDS))
def test_every_error_survives_its_json_form(kind: str) -> None:
    error = errors.KINDS[kind]("went wrong", provider="openai", model="m", status=418, request_id="q")
    error.retryable = not error.retryable
    again = errors.error_from_json(json.loads(json.dumps(error.to_json())))
    assert type(again) is type(error)
    assert again.to_json() == error.to_json()


@given(objects)
def test_any_document_is_an_error_or_malformed(document: dict[str, Any]) -> None:
    with contextlib.suppress(Malformed):
        errors.error_from_json({"code": "rate_limited", "message": "m", **document})


def test_an_error_message_has_a_longest_length() -> None:
    assert len(errors.BadAnswer("x" * 10_000).message) < 2100


def test_a_completion_holds_what_was_said() -> None:
    completion = Completion()
    for event in (
        TextDelta("a"),
        TextDelta("b"),
        ToolUse("1", "df", {}),
        Usage(3, 4),
        Finished("tool_use", echo={"x": 1}),
    ):
        completion.add(event)
    assert completion.message() == AssistantMessage("ab", (ToolUse("1", "df", {}),), {"x": 1})
    assert completion.usage == Usage(3, 4)
