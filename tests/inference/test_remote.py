"""Both ends of the line protocol between worker and gateway."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.errors import (
    BadAnswer,
    ContextTooLong,
    GatewayGone,
    InferenceDenied,
    InferenceError,
    ModelTimeout,
    RateLimited,
    StreamCut,
)
from inference.protocol import Completion, Finished, Request, TextDelta, ToolUse, Usage, UserMessage
from inference.remote import LineDecoder, RemoteModel, read_frame, serve, write_frame
from tests.inference.scripted_model import ScriptedModel
from tests.inference.wire import Gateway, pair
from tools.values import Malformed

ASK = Request("system", (UserMessage("hello"),), metadata={"inference_id": "i1"})


def remote(**options: Any) -> RemoteModel:
    return RemoteModel("script", "scripted", 100_000, **{"connect_wait_s": 2.0, **options})


async def answer(model: RemoteModel, request: Request = ASK) -> Completion:
    completion = Completion()
    async with contextlib.aclosing(model.infer(request)) as events:
        async for event in events:
            completion.add(event)
    return completion


async def test_an_answer_comes_through_and_is_recorded_with_the_same_digests() -> None:
    gateway, worker = Gateway(ScriptedModel("Hello ☃")), remote()
    async with gateway.dial(worker):
        completion = await answer(worker)
    assert completion.text == "Hello ☃"
    (record,) = gateway.records
    assert record.prompt_digest == ASK.prompt_digest
    assert record.completion_digest == completion.digest
    assert record.usage == completion.usage == Usage(1000, 100, cost_usd=0.01)
    assert (record.stop_reason, record.error, record.metadata) == ("end", None, {"inference_id": "i1"})
    assert "Hello" not in json.dumps(record.to_json())


async def test_a_request_waits_for_the_gateway_to_dial_in() -> None:
    gateway, worker = Gateway(ScriptedModel("Hello")), remote()
    waiting = asyncio.ensure_future(answer(worker))
    await asyncio.sleep(0)
    assert not worker.connected
    async with gateway.dial(worker):
        assert (await waiting).text == "Hello"


async def test_a_gateway_that_does_not_come_is_a_retryable_error() -> None:
    with pytest.raises(GatewayGone) as caught:
        await answer(remote(connect_wait_s=0.05))
    assert caught.value.retryable
    assert "0.05 s" in caught.value.message


async def test_a_connection_lost_inside_an_answer_fails_it_and_the_next_one_works() -> None:
    gateway, worker = Gateway(ScriptedModel(None, "Hello")), remote()
    async with gateway.dial(worker):
        waiting = asyncio.ensure_future(answer(worker))
        await gateway.model.asked.wait()  # type: ignore[attr-defined]
    with pytest.raises(GatewayGone) as caught:
        await waiting
    assert caught.value.retryable
    async with gateway.dial(worker):
        assert (await answer(worker)).text == "Hello"
    assert [record.stop_reason for record in gateway.records] == ["cancelled", "end"]


async def test_a_new_connection_takes_the_place_of_the_one_before() -> None:
    first, second, worker = Gateway(ScriptedModel(None)), Gateway(ScriptedModel("from the second")), remote()
    async with first.dial(worker):
        waiting = asyncio.ensure_future(answer(worker))
        await first.model.asked.wait()  # type: ignore[attr-defined]
        async with second.dial(worker):
            with pytest.raises(GatewayGone):
                await waiting
            assert (await answer(worker)).text == "from the second"


async def test_an_inference_nobody_waits_for_is_cancelled_at_the_gateway_and_recorded() -> None:
    gateway, worker = Gateway(ScriptedModel([TextDelta("a"), TextDelta("b"), Finished("end")], None)), remote()
    endless = ScriptedModel(None)
    gateway.model = endless
    async with gateway.dial(worker):
        task = asyncio.ensure_future(answer(worker))
        await endless.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not gateway.records:
            await asyncio.sleep(0.001)
        assert endless.closed == 1
    assert gateway.records[0].stop_reason == "cancelled"
    assert gateway.records[0].usage is not None
    assert gateway.records[0].usage.estimated


@pytest.mark.parametrize("error", [RateLimited("slow", retry_after=7.0, status=429), StreamCut("cut")])
async def test_an_error_of_the_model_reaches_the_worker_as_it_is(error: InferenceError) -> None:
    gateway, worker = Gateway(ScriptedModel(error)), remote()
    async with gateway.dial(worker):
        with pytest.raises(type(error)) as caught:
            await answer(worker)
    assert caught.value.to_json() == error.to_json()
    assert gateway.records[0].error == error.to_json()


async def test_what_is_wrong_at_the_gateway_is_not_told_to_the_worker() -> None:
    gateway, worker = Gateway(ScriptedModel(lambda _: 1 / 0)), remote()
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with gateway.dial(worker):
        with pytest.raises(InferenceError) as caught:
            await answer(worker)
    assert "division" not in caught.value.message
    assert isinstance(told[0]["exception"], ZeroDivisionError)


async def test_the_budget_is_asked_first_and_may_refuse_or_shorten() -> None:
    async def admit(request: Request) -> Request:
        if request.metadata.get("inference_id") == "i2":
            raise InferenceDenied("the run's budget is spent", limit="cost_usd")
        return dataclasses.replace(request, max_tokens=7)

    model = ScriptedModel("Hello")
    gateway, worker = Gateway(model, admit), remote()
    async with gateway.dial(worker):
        await answer(worker)
        with pytest.raises(InferenceDenied) as caught:
            await answer(worker, dataclasses.replace(ASK, metadata={"inference_id": "i2"}))
    assert caught.value.limit == "cost_usd"
    assert [request.max_tokens for request in model.requests] == [7]


async def test_an_inference_that_cannot_be_recorded_gives_nothing_to_act_on() -> None:
    events = [TextDelta("I will"), ToolUse("u", "exec", {"argv": ["df"]}), Usage(1, 1), Finished("tool_use")]
    gateway, worker = Gateway(ScriptedModel(events)), remote()
    gateway.refuse_records = True
    completion = Completion()
    async with gateway.dial(worker):
        with pytest.raises(InferenceDenied) as caught:
            async for event in worker.infer(ASK):
                completion.add(event)
    assert "could not be recorded" in caught.value.message
    assert not completion.tool_uses
    assert completion.finished is None


async def test_a_gateway_that_is_silent_times_out_on_the_workers_side() -> None:
    worker_end, gateway_end = await pair()
    worker = remote(deadline_s=0.05)
    task = asyncio.ensure_future(worker.serve_connection(*worker_end))
    with pytest.raises(ModelTimeout) as caught:
        await answer(worker)
    assert caught.value.phase == "gateway"
    sent = (await gateway_end[0].readline(), await gateway_end[0].readline())
    assert json.loads(sent[1]) == {"id": "r1", "cancel": True}
    gateway_end[1].close()
    await task


async def test_the_deadline_of_a_request_holds_at_the_gateway() -> None:
    gateway, worker = Gateway(ScriptedModel(None)), remote()
    async with gateway.dial(worker, deadline_s=0.05):
        with pytest.raises(ModelTimeout):
            await answer(worker)
    assert gateway.records[0].error is not None


async def test_a_request_longer_than_a_line_is_refused_and_the_connection_stays() -> None:
    gateway, worker = Gateway(ScriptedModel("Hello")), remote(line_bytes=2000)
    async with gateway.dial(worker):
        with pytest.raises(ContextTooLong):
            await answer(worker, Request("x" * 3000, ()))
        assert (await answer(worker)).text == "Hello"


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[]\n",
        b'{"id": 1}\n',
        b'{"id": "a", "request": 3}\n',
        b'{"id": "a"}\n',
        b"[" * 10_000 + b"\n",
        b"x" * 5000,
    ],
)
async def test_the_gateway_answers_what_is_no_frame_and_hangs_up(line: bytes) -> None:
    worker_end, gateway_end = await pair()
    gateway = Gateway(ScriptedModel("Hello"))
    task = asyncio.ensure_future(serve(*gateway_end, lambda _: gateway.model, gateway.record, line_bytes=4096))
    worker_end[1].write(line)
    document = json.loads(await worker_end[0].readline())
    assert document["error"]["code"] == "request_refused"
    assert await worker_end[0].read() == b""
    await task
    worker_end[1].close()
    assert not gateway.records


async def test_a_request_that_cannot_be_read_is_refused_and_the_connection_stays() -> None:
    worker_end, gateway_end = await pair()
    gateway = Gateway(ScriptedModel("Hello"))
    task = asyncio.ensure_future(serve(*gateway_end, lambda _: gateway.model, gateway.record))
    for document in ({"system": 3}, {**ASK.to_json(), "messages": [{"role": "wizard"}]}):
        worker_end[1].write(write_frame({"id": "a", "request": document}))
        assert json.loads(await worker_end[0].readline())["error"]["code"] == "request_refused"
    worker_end[1].write(write_frame({"id": "a", "request": ASK.to_json()}))
    assert "event" in json.loads(await worker_end[0].readline())
    worker_end[1].close()
    await task


async def test_a_worker_that_floods_the_gateway_is_held_to_two_at_a_time() -> None:
    worker_end, gateway_end = await pair()
    model = ScriptedModel(None)
    gateway = Gateway(model)
    task = asyncio.ensure_future(serve(*gateway_end, lambda _: model, gateway.record))
    for number in range(5):
        worker_end[1].write(write_frame({"id": f"f{number}", "request": ASK.to_json()}))
    denied = [json.loads(await worker_end[0].readline()) for _ in range(3)]
    assert {document["error"]["code"] for document in denied} == {"inference_denied"}
    worker_end[1].close()
    await task
    assert len(model.requests) == len(gateway.records) == 2


@pytest.mark.parametrize(
    "frames",
    [
        [{"end": True}],
        [{"event": {"type": "text", "text": "a"}}, {"end": True}],
        [{"event": {"type": "wizard"}}],
        [{"event": 7}],
        [{}],
        [{"error": {"code": 7}}],
        [{"event": {"type": "finished", "stop_reason": "end"}}, {"event": {"type": "text", "text": "more"}}],
    ],
)
async def test_an_answer_of_the_gateway_that_makes_no_sense_is_a_bad_answer(frames: list[dict[str, Any]]) -> None:
    worker_end, gateway_end = await pair()
    worker = remote()
    task = asyncio.ensure_future(worker.serve_connection(*worker_end))
    waiting = asyncio.ensure_future(answer(worker))
    asked = json.loads(await gateway_end[0].readline())["id"]
    for frame in frames:
        gateway_end[1].write(write_frame({"id": asked, **frame}))
    with pytest.raises(BadAnswer):
        await waiting
    gateway_end[1].close()
    await task


async def test_a_gateway_that_sends_no_frames_is_hung_up_on() -> None:
    worker_end, gateway_end = await pair()
    worker = remote()
    task = asyncio.ensure_future(worker.serve_connection(*worker_end))
    waiting = asyncio.ensure_future(answer(worker))
    await gateway_end[0].readline()
    gateway_end[1].write(b"HTTP/1.1 200 OK\r\n\r\n")
    with pytest.raises(BadAnswer):
        await waiting
    await task
    assert not worker.connected
    gateway_end[1].close()


async def test_a_closed_model_answers_nothing_any_more() -> None:
    gateway, worker = Gateway(ScriptedModel(None)), remote()
    async with gateway.dial(worker):
        waiting = asyncio.ensure_future(answer(worker))
        await gateway.model.asked.wait()  # type: ignore[attr-defined]
        await worker.aclose()
        with pytest.raises(GatewayGone):
            await waiting
        with pytest.raises(GatewayGone):
            await answer(worker)


@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line), max_size=8), st.data())
def test_lines_come_out_as_they_went_in_wherever_they_are_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    decoder, found = LineDecoder(20), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += decoder.feed(stream[:size])
        stream = stream[size:]
    assert found == lines
    assert not decoder.incomplete


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 7))
def test_a_line_is_refused_exactly_when_it_is_longer_than_the_limit(limit: int, length: int, size: int) -> None:
    decoder = LineDecoder(limit)
    data = b"x" * length + b"\n"
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    if length > limit:
        with pytest.raises(BadAnswer):
            for piece in pieces:
                decoder.feed(piece)
    else:
        assert [line for piece in pieces for line in decoder.feed(piece)] == [b"x" * length]


@given(st.binary(max_size=80))
def test_any_line_is_a_frame_or_malformed(line: bytes) -> None:
    with contextlib.suppress(Malformed):
        assert isinstance(read_frame(line), dict)
