"""The two providers through their official SDKs, against a scripted HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from inference.anthropic_model import AnthropicModel
from inference.anthropic_model import to_wire as anthropic_wire
from inference.attempts import Retries, Timeouts, delay_before
from inference.errors import (
    BadAnswer,
    ContextTooLong,
    InferenceError,
    KeyRefused,
    ModelRefused,
    ModelTimeout,
    ModelUnavailable,
    QuotaExhausted,
    RateLimited,
    RequestRefused,
    StreamCut,
    UnknownModel,
)
from inference.http_errors import retry_after
from inference.keys import Secret
from inference.openai_model import OpenAIModel
from inference.protocol import (
    AssistantMessage,
    Completion,
    Notice,
    Request,
    ToolResult,
    ToolSpec,
    ToolUse,
    Usage,
    UserMessage,
)
from tests.inference.scripted_server import ScriptedServer

KEY = "sk-canary-7f3a"
FAST = Retries(attempts=3, first_delay=0.01, longest_delay=0.02, longest_retry_after=0.3)
TIMEOUTS = Timeouts(connect=2.0, first_event=5.0, between_events=5.0, total=10.0)
DF = ToolSpec("disk_space", "Free space", {"type": "object", "properties": {"path": {"type": "string"}}})
ASK = Request("You look after a machine.", (UserMessage("How full are the disks?"),), (DF,), 500)

Provider = Callable[..., Any]


def openai_model(server: ScriptedServer, **options: Any) -> OpenAIModel:
    settings = {"retries": FAST, "timeouts": TIMEOUTS, **options}
    return OpenAIModel("scripted", base_url=server.openai_url, key=Secret(KEY), **settings)


def anthropic_model(server: ScriptedServer, **options: Any) -> AnthropicModel:
    settings = {"retries": FAST, "timeouts": TIMEOUTS, **options}
    return AnthropicModel("scripted", base_url=server.url, key=Secret(KEY), **settings)


@pytest.fixture(params=[openai_model, anthropic_model], ids=["openai", "anthropic"])
def provider(request: pytest.FixtureRequest) -> Provider:
    return request.param  # type: ignore[no-any-return]


async def answer(model: Any, request: Request = ASK) -> tuple[Completion, list[str]]:
    completion, notices = Completion(), []
    try:
        async with contextlib.aclosing(model.infer(request)) as events:
            async for event in events:
                completion.add(event)
                if isinstance(event, Notice):
                    notices.append(event.text)
    finally:
        await model.aclose()
    return completion, notices


async def failure(model: Any, request: Request = ASK) -> InferenceError:
    with pytest.raises(InferenceError) as caught:
        await answer(model, request)
    return caught.value


async def test_text_and_usage_come_through(provider: Provider) -> None:
    script = [
        {"text": "All disks are fine. ☃ 😀", "usage": {"input": 1000, "output": 50, "cached": 400}, "chunk_chars": 1}
    ]
    async with ScriptedServer(script) as server:
        completion, _ = await answer(provider(server, price=lambda usage: usage.tokens / 1000))
    assert completion.text == "All disks are fine. ☃ 😀"
    assert completion.usage == Usage(1000, 50, 400, cost_usd=1.05)
    assert completion.finished is not None
    assert (completion.finished.stop_reason, completion.finished.model) == ("end", "scripted-1")


async def test_several_tool_calls_of_one_answer_come_out_in_order(provider: Provider) -> None:
    calls = [{"name": "disk_space", "arguments": {"path": "/"}}, {"name": "disk_space", "arguments": ""}]
    async with ScriptedServer([{"text": "Looking.", "tool_calls": calls, "chunk_chars": 2}]) as server:
        completion, _ = await answer(provider(server))
    assert [use.arguments for use in completion.tool_uses] == [{"path": "/"}, {}]
    assert len({use.id for use in completion.tool_uses}) == 2
    assert completion.finished is not None
    assert completion.finished.stop_reason == "tool_use"


async def test_malformed_arguments_are_surfaced_and_not_repaired(provider: Provider) -> None:
    script = [{"tool_calls": [{"name": "disk_space", "arguments": '{"path": "/'}]}]
    async with ScriptedServer(script) as server:
        completion, _ = await answer(provider(server))
    (use,) = completion.tool_uses
    assert use.arguments is None
    assert use.raw == '{"path": "/'
    assert "not valid JSON" in use.problem


async def test_a_call_cut_at_the_token_limit_is_malformed_even_if_its_text_is_valid(provider: Provider) -> None:
    script = [{"tool_calls": [{"name": "disk_space", "arguments": {"path": "/"}}], "stop": "length"}]
    async with ScriptedServer(script) as server:
        completion, _ = await answer(provider(server))
    assert completion.finished is not None
    assert completion.finished.stop_reason == "length"
    assert completion.tool_uses[0].malformed


async def test_a_refusal_is_surfaced(provider: Provider) -> None:
    async with ScriptedServer([{"refusal": "I will not do that."}]) as server:
        completion, _ = await answer(provider(server))
    assert completion.finished is not None
    assert completion.finished.stop_reason == "refusal"
    assert "I will not" in completion.text + completion.finished.detail


async def test_usage_that_is_not_sent_is_estimated_and_its_cost_unknown(provider: Provider) -> None:
    async with ScriptedServer([{"text": "Fine.", "usage": None}]) as server:
        completion, _ = await answer(provider(server, price=lambda usage: None if usage.estimated else 1.0))
    assert completion.usage is not None
    assert completion.usage.estimated
    assert completion.usage.input_tokens > 20
    assert completion.usage.cost_usd is None


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
async def test_a_passing_failure_is_tried_again_and_said(provider: Provider, status: int) -> None:
    error = {"error": {"message": "try later", "type": "x"}}
    async with ScriptedServer([{"status": status, "body": error}, {"text": "Fine."}]) as server:
        completion, notices = await answer(provider(server))
        assert len(server.seen) == 2
    assert completion.text == "Fine."
    assert "attempt 1 of 3" in notices[0]


async def test_retry_after_is_honoured(provider: Provider) -> None:
    limited = {"status": 429, "headers": {"retry-after": "0.2"}, "body": {"error": {"message": "slow down"}}}
    async with ScriptedServer([limited, {"text": "Fine."}]) as server:
        began = time.monotonic()
        completion, _ = await answer(provider(server))
    assert completion.text == "Fine."
    assert time.monotonic() - began >= 0.2


async def test_a_wait_longer_than_the_limit_is_not_waited(provider: Provider) -> None:
    limited = {"status": 429, "headers": {"retry-after": "3600"}, "body": {"error": {"message": "slow down"}}}
    async with ScriptedServer([limited], repeat_last=True) as server:
        error = await failure(provider(server))
        assert len(server.seen) == 1
    assert isinstance(error, RateLimited)
    assert error.retry_after == 3600
    assert not error.retryable


async def test_attempts_are_bounded(provider: Provider) -> None:
    async with ScriptedServer([{"status": 503, "body": "down"}], repeat_last=True) as server:
        error = await failure(provider(server))
        assert len(server.seen) == 3
    assert isinstance(error, ModelUnavailable)
    assert error.status == 503
    assert not error.retryable


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, KeyRefused),
        (403, {"error": {"message": "no"}}, KeyRefused),
        (404, {"error": {"message": "no such model"}}, UnknownModel),
        (400, {"error": {"message": "bad schema"}}, RequestRefused),
        (400, {"error": {"message": "x", "code": "context_length_exceeded"}}, ContextTooLong),
        (400, {"error": {"message": "prompt is too long: 9 tokens > 8 maximum", "type": "invalid"}}, ContextTooLong),
        (413, {"error": {"message": "too large"}}, ContextTooLong),
        (400, {"error": {"message": "blocked", "code": "content_filter"}}, ModelRefused),
        (429, {"error": {"message": "no money", "code": "insufficient_quota"}}, QuotaExhausted),
        (301, {"error": {"message": "elsewhere"}}, RequestRefused),
    ],
)
async def test_a_lasting_failure_is_not_repeated_and_never_shows_the_key(
    provider: Provider, status: int, body: dict[str, Any], kind: type[InferenceError]
) -> None:
    headers = {"location": "http://127.0.0.1:1/stolen"} if status == 301 else {}
    async with ScriptedServer([{"status": status, "body": body, "headers": headers}], repeat_last=True) as server:
        error = await failure(provider(server))
        assert len(server.seen) == 1
    assert type(error) is kind
    assert not error.retryable
    assert KEY not in json.dumps(error.to_json())


async def test_a_connection_reset_before_the_answer_is_tried_again(provider: Provider) -> None:
    async with ScriptedServer([{"fault": "reset"}, {"text": "Fine."}]) as server:
        completion, _ = await answer(provider(server))
    assert completion.text == "Fine."


async def test_nobody_listening_is_unavailable_and_says_where(provider: Provider) -> None:
    async with ScriptedServer([]) as server:
        model = provider(server)
    error = await failure(model)
    assert isinstance(error, ModelUnavailable)
    assert str(server.port) in error.message


@pytest.mark.parametrize("fault", ["cut", "end"])
async def test_a_stream_that_breaks_off_inside_a_tool_call_gives_no_tool_call(provider: Provider, fault: str) -> None:
    calls = [{"name": "disk_space", "arguments": {"path": "/very/long/path/to/cut"}}]
    script = [{"text": "Looking at it.", "tool_calls": calls, "fault": fault, "after": 7}]
    async with ScriptedServer(script) as server:
        model = provider(server)
        completion = Completion()
        with pytest.raises(StreamCut) as caught:
            async for event in model.infer(ASK):
                completion.add(event)
        await model.aclose()
        assert len(server.seen) == 1
    assert caught.value.retryable
    assert completion.text
    assert not completion.tool_uses


async def test_a_stream_cut_before_its_first_event_is_tried_again(provider: Provider) -> None:
    async with ScriptedServer([{"text": "x", "fault": "cut", "after": 0}, {"text": "Fine."}]) as server:
        completion, _ = await answer(provider(server))
    assert completion.text == "Fine."


async def test_an_error_inside_the_stream_is_mapped(provider: Provider) -> None:
    async with ScriptedServer([{"text": "some words here", "fault": "error_event", "after": 5}]) as server:
        error = await failure(provider(server))
    assert isinstance(error, ModelUnavailable)
    assert "Overloaded" in error.message


async def test_a_piece_that_is_no_json_is_a_bad_answer(provider: Provider) -> None:
    async with ScriptedServer([{"text": "some words", "fault": "garbage", "after": 4}], repeat_last=True) as server:
        error = await failure(provider(server))
    assert isinstance(error, BadAnswer)


async def test_a_web_page_is_no_answer(provider: Provider) -> None:
    page = {"status": 200, "body": "<html>login</html>", "headers": {"content-type": "text/html"}}
    async with ScriptedServer([page], repeat_last=True) as server:
        error = await failure(provider(server))
    assert isinstance(error, (BadAnswer, StreamCut))


async def test_silence_before_the_first_event_times_out(provider: Provider) -> None:
    limits = Timeouts(first_event=0.1, total=0.5)
    async with ScriptedServer([{"fault": "silent"}], repeat_last=True) as server:
        error = await failure(provider(server, timeouts=limits))
        assert len(server.seen) > 1
    assert isinstance(error, ModelTimeout)


async def test_silence_inside_the_answer_times_out_and_is_not_tried_again(provider: Provider) -> None:
    limits = Timeouts(between_events=0.15)
    async with ScriptedServer([{"text": "some words here", "fault": "hang", "after": 5}], repeat_last=True) as server:
        error = await failure(provider(server, timeouts=limits))
        assert len(server.seen) == 1
    assert isinstance(error, ModelTimeout)
    assert error.phase == "between events"


async def test_slow_pieces_do_not_time_out_but_the_whole_does(provider: Provider) -> None:
    slow = {"text": "a" * 200, "chunk_chars": 1, "delay_s": 0.02}
    async with ScriptedServer([slow]) as server:
        error = await failure(provider(server, timeouts=Timeouts(between_events=0.5, total=0.4)))
    assert isinstance(error, ModelTimeout)
    assert error.phase == "total"


async def test_an_answer_without_end_is_given_up(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.attempts.ANSWER_CHARS", 100)
    async with ScriptedServer([{"text": "x" * 200}]) as server:
        error = await failure(provider(server))
    assert isinstance(error, BadAnswer)
    assert "longer than 100" in error.message


async def test_closing_the_generator_ends_the_request(provider: Provider) -> None:
    async with ScriptedServer([{"text": "some words here", "fault": "hang", "after": 5}]) as server:
        model = provider(server)
        events = model.infer(ASK)
        await anext(events)
        await events.aclose()
        await model.aclose()


async def test_cancelling_the_task_ends_the_request(provider: Provider) -> None:
    async with ScriptedServer([{"fault": "silent"}]) as server:
        model = provider(server)
        task = asyncio.ensure_future(answer(model))
        await server.asked(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_whole_conversation_reaches_the_endpoint(provider: Provider) -> None:
    uses = (ToolUse("t1", "disk_space", {"path": "/"}), ToolUse("t2", "disk_space", None, "{broken", "not JSON"))
    request = Request(
        "system",
        (
            UserMessage("look"),
            AssistantMessage("", uses),
            ToolResult("t1", "91 %\udc80"),
            ToolResult("t2", "malformed", is_error=True),
            UserMessage("go on"),
        ),
        (DF,),
        77,
        stop=("STOP",),
        metadata={"run_id": "never sent"},
    )
    async with ScriptedServer([{"text": "ok"}]) as server:
        await answer(provider(server), request)
        (seen,) = server.seen
    text = json.dumps(seen.body)
    assert "never sent" not in text
    assert "t1" in text and "91 %" in text and "go on" in text and "STOP" in text
    assert KEY in json.dumps(seen.headers)


def test_results_of_one_turn_and_what_is_said_after_are_one_message_for_anthropic() -> None:
    request = Request(
        "",
        (
            UserMessage("look"),
            AssistantMessage("", (ToolUse("a", "x", {}), ToolUse("b", "y", {}))),
            ToolResult("a", "1"),
            ToolResult("b", "2", is_error=True),
            UserMessage("go on"),
        ),
    )
    messages = anthropic_wire(request, "m")["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [block["type"] for block in messages[2]["content"]] == ["tool_result", "tool_result", "text"]
    assert messages[2]["content"][1]["is_error"] is True


async def test_reasoning_goes_back_to_the_provider_it_came_from(provider: Provider) -> None:
    script: Any = [
        {"reasoning": "let me think", "tool_calls": [{"name": "disk_space", "arguments": {}}]},
        {"text": "done"},
    ]
    async with ScriptedServer(script) as server:
        model = provider(server)
        completion = Completion()
        async for event in model.infer(ASK):
            completion.add(event)
        said = completion.message()
        assert "think" not in completion.text
        await answer(model, Request("s", (*ASK.messages, said, ToolResult(said.tool_uses[0].id, "ok"))))
        assert "let me think" in json.dumps(server.seen[1].body)


async def test_temperature_is_left_out_where_it_is_refused(provider: Provider) -> None:
    request = Request("s", ASK.messages, (), 100, temperature=0.2)
    async with ScriptedServer([{"text": "Fine.", "unsupported": ["temperature"]}]) as server:
        completion, notices = await answer(provider(server), request)
        assert [("temperature" in seen.body) for seen in server.seen] == [True, False]
    assert completion.text == "Fine."
    assert "temperature" in notices[0]


# --- endpoints that imitate chat completions in part -----------------------------------------------------------------


async def test_an_endpoint_without_usage_in_streams_is_asked_without_it_and_remembered() -> None:
    strict: Any = {"text": "Fine.", "unsupported": ["stream_options"]}
    async with ScriptedServer([strict, strict]) as server:
        model = openai_model(server)
        first, second = Completion(), Completion()
        for completion in (first, second):
            async for event in model.infer(ASK):
                completion.add(event)
        await model.aclose()
        assert len(server.seen) == 3
    assert first.usage is not None
    assert first.usage.estimated


async def test_an_endpoint_that_cannot_stream_with_tools_is_asked_for_the_whole_answer() -> None:
    refusal: Any = {"status": 400, "body": {"error": {"message": "Streaming is not supported with tools"}}}
    whole: Any = {"text": "Looking.", "tool_calls": [{"name": "disk_space", "arguments": {"path": "/"}}]}
    async with ScriptedServer([refusal, whole]) as server:
        completion, notices = await answer(openai_model(server))
        assert "stream" not in server.seen[1].body
    assert completion.tool_uses[0].arguments == {"path": "/"}
    assert completion.usage == Usage(100, 20)
    assert "without streaming" in notices[0]


async def test_a_whole_answer_where_a_stream_was_asked_for_is_read() -> None:
    async with ScriptedServer([{"text": "Fine.", "ignore_stream": True}]) as server:
        completion, _ = await answer(openai_model(server))
    assert completion.text == "Fine."


async def test_newer_and_older_names_of_the_answer_limit_are_tried() -> None:
    error = {"message": "'max_tokens' is not supported, use 'max_completion_tokens'", "param": "max_tokens"}
    async with ScriptedServer([{"status": 400, "body": {"error": error}}, {"text": "Fine."}]) as server:
        await answer(openai_model(server))
        assert server.seen[0].body["max_tokens"] == server.seen[1].body["max_completion_tokens"] == 500


async def test_an_endpoint_without_a_key_gets_none() -> None:
    async with ScriptedServer([{"text": "Fine."}]) as server:
        await answer(OpenAIModel("m", base_url=server.openai_url))
        assert server.seen[0].headers["authorization"] == "Bearer none"


async def test_no_proxy_is_asked_for_an_address_of_this_machine(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with ScriptedServer([{"text": "Fine."}]) as server:
        completion, _ = await answer(provider(server))
    assert completion.text == "Fine."


# --- pure parts ------------------------------------------------------------------------------------------------------


def test_waits_grow_are_spread_and_end() -> None:
    retries = Retries(attempts=4, first_delay=0.5, longest_delay=1.5)
    error = ModelUnavailable("down")
    assert [delay_before(number, error, retries, 0.999999) for number in (2, 3, 4)] == pytest.approx([0.5, 1.0, 1.5])
    assert delay_before(2, error, retries, 0.0) == 0.25
    assert delay_before(5, error, retries, 0.5) is None
    assert delay_before(2, KeyRefused("no"), retries, 0.5) is None


def test_retry_after_is_read_in_each_of_its_forms() -> None:
    assert retry_after({"retry-after": "7"}, 0) == 7
    assert retry_after({"retry-after-ms": "250"}, 0) == 0.25
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, 10) == 50
    assert retry_after({"retry-after": "soon"}, 0) is None
    assert retry_after({"retry-after": "inf"}, 0) is None
    assert retry_after({}, 0) is None


def test_no_sdk_is_loaded_until_a_model_is_asked() -> None:
    code = (
        "import sys, inference.loop, inference.remote, inference.choice, inference.openai_model\n"
        "import inference.anthropic_model, inference.cost\n"
        "print([name for name in ('openai', 'anthropic', 'httpx2', 'genai_prices') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_model_does_not_show_its_key() -> None:
    assert KEY not in repr(OpenAIModel("m", key=Secret(KEY))) + repr(vars(AnthropicModel("m", key=Secret(KEY))))
