"""Delivery against a scripted OTLP endpoint in the test process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from otel.delivery import Deliverer, DeliveryLimits, Endpoint, MlflowTarget, OtlpTarget, Unreachable
from otel.spans import trace_id
from otel.spool import Spool
from tests.otel.conftest import ScriptedEndpoint, accepted, make_span, partly_refused

QUICK = DeliveryLimits(batch=10, linger_s=0.01, poll_s=0.05, backoff_s=0.01, backoff_max_s=0.05, request_s=2.0)


@contextlib.asynccontextmanager
async def deliverer(
    spool: Spool, endpoint: ScriptedEndpoint, limits: DeliveryLimits = QUICK
) -> AsyncIterator[Deliverer]:
    made = Deliverer(spool, OtlpTarget(endpoint.url), limits)
    try:
        yield made
    finally:
        await made.aclose()


@contextlib.asynccontextmanager
async def mute_server() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A server that takes requests and never answers: its address, and the event of the first connection."""
    connected, over = asyncio.Event(), asyncio.Event()
    tasks: set[asyncio.Task[None] | None] = set()

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        connected.set()
        await over.wait()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/traces", connected
    finally:
        server.close()
        over.set()
        await asyncio.gather(*(task for task in tasks if task is not None))
        await server.wait_closed()


def fill(spool: Spool, run: str, count: int) -> list[str]:
    spans = [make_span(run, f"c{number}") for number in range(count)]
    spool.put(spans)
    return [span.span_id for span in spans]


async def test_every_span_arrives_once_in_order_and_in_batches(
    spool: Spool, endpoint: ScriptedEndpoint, run_id: str
) -> None:
    ids = fill(spool, run_id, 35)
    async with deliverer(spool, endpoint) as sender:
        assert await sender.flush(5) == 0
        assert endpoint.held == ids
        assert [len(request) for request in endpoint.requests] == [10, 10, 10, 5]
        assert sender.state.sent == 35
        assert await sender.flush(5) == 0
    assert len(endpoint.requests) == 4


async def test_run_delivers_what_comes_while_it_runs_and_stops_when_asked(
    spool: Spool, endpoint: ScriptedEndpoint, run_id: str
) -> None:
    stop = asyncio.Event()
    arrived = asyncio.Event()

    def answer(ids: list[str]) -> tuple[int, dict[str, str], bytes]:
        arrived.set()
        return accepted(ids)

    endpoint.answer = answer
    async with deliverer(spool, endpoint) as sender:
        running = asyncio.create_task(sender.run(stop))
        for number in range(3):
            await asyncio.to_thread(spool.put, [make_span(run_id, f"c{number}")])
            await asyncio.wait_for(arrived.wait(), 5)
            arrived.clear()
        stop.set()
        await asyncio.wait_for(running, 5)
    assert len(endpoint.held) == 3


async def test_spans_another_process_put_are_found(spool: Spool, endpoint: ScriptedEndpoint, run_id: str) -> None:
    stop = asyncio.Event()
    endpoint.answer = lambda ids: (stop.set(), accepted(ids))[1]
    async with deliverer(spool, endpoint) as sender:
        listeners, spool._listeners = spool._listeners, []  # as if put elsewhere: nobody here is told
        running = asyncio.create_task(sender.run(stop))
        await asyncio.sleep(0)
        spool._listeners = listeners
        fill(spool, run_id, 1)
        await asyncio.wait_for(running, 5)
    assert len(endpoint.held) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 401, 403, 404])
async def test_an_endpoint_that_refuses_everything_for_a_while_loses_nothing(
    spool: Spool, endpoint: ScriptedEndpoint, run_id: str, status: int
) -> None:
    ids = fill(spool, run_id, 12)
    answers = iter([status] * 4)
    endpoint.answer = lambda _: (next(answers, 200), {}, b"")
    async with deliverer(spool, endpoint) as sender:
        assert await sender.flush(5) == 0
        assert sender.state.trouble == ""
    assert endpoint.held == ids
    assert spool.rejected() == []


async def test_the_endpoint_may_ask_for_a_longer_pause(spool: Spool, endpoint: ScriptedEndpoint, run_id: str) -> None:
    fill(spool, run_id, 1)
    endpoint.answer = lambda _: (503, {"retry-after": "7"}, b"")
    async with deliverer(spool, endpoint, DeliveryLimits(backoff_s=0.01, backoff_max_s=5.0)) as sender:
        assert await sender._step() == 5.0
        assert "503" in sender.state.trouble


async def test_nobody_listening_is_trouble_and_not_a_loss(
    spool: Spool, endpoint: ScriptedEndpoint, run_id: str
) -> None:
    fill(spool, run_id, 3)
    sender = Deliverer(spool, OtlpTarget("http://127.0.0.1:1/v1/traces"), QUICK)
    assert await sender.flush(0.2) == 3
    assert "ConnectError" in sender.state.trouble
    assert sender.state.failures > 1
    await sender.aclose()
    async with deliverer(spool, endpoint) as second:
        assert await second.flush(5) == 0


async def test_a_span_that_is_refused_is_set_aside_and_the_others_arrive(
    spool: Spool, endpoint: ScriptedEndpoint, run_id: str
) -> None:
    ids = fill(spool, run_id, 25)
    poison = {ids[3], ids[17]}
    endpoint.answer = lambda batch: (422, {}, b"cannot convert") if poison & set(batch) else accepted(batch)
    async with deliverer(spool, endpoint) as sender:
        assert await sender.flush(10) == 0
        assert sender.state.set_aside == 2
    assert set(endpoint.held) == set(ids) - poison
    assert len(endpoint.held) == len(ids) - 2
    assert {span.span_id for span in spool.rejected()} == poison
    assert all("cannot convert" in span.reason for span in spool.rejected())


async def test_a_partial_success_isolates_the_refused_span_too(
    spool: Spool, endpoint: ScriptedEndpoint, run_id: str
) -> None:
    ids = fill(spool, run_id, 8)
    endpoint.answer = lambda batch: (200, {}, partly_refused(1, "too big")) if ids[5] in batch else accepted(batch)
    async with deliverer(spool, endpoint) as sender:
        assert await sender.flush(10) == 0
    assert [span.reason for span in spool.rejected()] == ["200 too big"]


async def test_an_endpoint_that_never_accepted_anything_sets_nothing_aside(
    spool: Spool, endpoint: ScriptedEndpoint, run_id: str
) -> None:
    ids = fill(spool, run_id, 10)
    endpoint.answer = lambda _: (400, {}, b"no such thing")
    async with deliverer(spool, endpoint) as sender:
        assert await sender.flush(0.5) == 10
        assert "refuse" in sender.state.trouble
        assert spool.rejected() == []
        endpoint.answer = accepted
        assert await sender.flush(5) == 0
    assert sorted(endpoint.held) == sorted(ids)


async def test_a_batch_too_large_for_the_endpoint_is_halved(
    spool: Spool, endpoint: ScriptedEndpoint, run_id: str
) -> None:
    ids = fill(spool, run_id, 10)
    endpoint.answer = lambda batch: (413, {}, b"too large") if len(batch) > 3 else accepted(batch)
    async with deliverer(spool, endpoint) as sender:
        assert await sender.flush(5) == 0
    assert endpoint.held == ids
    assert spool.rejected() == []


async def test_a_request_stays_below_its_cap_in_bytes(spool: Spool, endpoint: ScriptedEndpoint, run_id: str) -> None:
    spool.put([make_span(run_id, f"c{number}", attributes={"x": "y" * 5000}) for number in range(6)])
    async with deliverer(spool, endpoint, DeliveryLimits(batch_bytes=12_000)) as sender:
        assert await sender.flush(5) == 0
    assert [len(request) for request in endpoint.requests] == [2, 2, 2]


async def test_no_answer_in_time_makes_batches_smaller_and_nothing_is_lost(spool: Spool, run_id: str) -> None:
    fill(spool, run_id, 10)
    async with mute_server() as (url, _):
        sender = Deliverer(spool, OtlpTarget(url), DeliveryLimits(batch=10, request_s=0.05, backoff_s=0.01))
        assert await sender._step() is not None
        assert "no answer" in sender.state.trouble
        assert len(sender._next_batch()) == 5
        await sender.aclose()
    assert spool.depth() == 10


async def test_flush_of_one_trace_waits_for_that_trace_only(
    spool: Spool, endpoint: ScriptedEndpoint, run_id: str
) -> None:
    fill(spool, run_id, 3)
    other = "01920000-0000-7000-8000-00000000000f"
    fill(spool, other, 30)
    async with deliverer(spool, endpoint) as sender:
        assert await sender.flush(5, trace_id(run_id)) == 0
    assert spool.pending_of(trace_id(other)) > 0


async def test_stop_cuts_off_a_request_that_hangs(spool: Spool, run_id: str) -> None:
    fill(spool, run_id, 1)
    async with mute_server() as (url, connected):
        stop = asyncio.Event()
        running = asyncio.create_task(Deliverer(spool, OtlpTarget(url)).run(stop))
        await asyncio.wait_for(connected.wait(), 5)
        stop.set()
        await asyncio.wait_for(running, 4)
    assert spool.depth() == 1


async def test_stop_does_not_wait_for_the_end_of_a_pause(spool: Spool, run_id: str) -> None:
    fill(spool, run_id, 1)
    limits = DeliveryLimits(backoff_s=60.0, backoff_max_s=60.0)
    sender = Deliverer(spool, OtlpTarget("http://127.0.0.1:1/v1/traces"), limits)
    stop = asyncio.Event()
    running = asyncio.create_task(sender.run(stop))
    async with asyncio.timeout(5):
        while not sender.state.failures:
            await asyncio.sleep(0.01)
        stop.set()
        await running


async def test_a_broken_spool_file_is_trouble_and_not_an_end(spool: Spool, endpoint: ScriptedEndpoint) -> None:
    spool.close()
    async with deliverer(spool, endpoint) as sender:
        assert await sender._step() is not None
        assert "cannot be read" in sender.state.trouble


async def test_the_experiment_is_asked_for_again_when_the_endpoint_forgot_it(
    spool: Spool, endpoint: ScriptedEndpoint, run_id: str
) -> None:
    fill(spool, run_id, 1)

    class Counting:
        asked = 0

        async def endpoint(self) -> Endpoint:
            if not self.asked:
                self.asked += 1
                raise Unreachable("not yet")
            return Endpoint(endpoint.url, {"x-mlflow-experiment-id": str(self.asked)})

        def forget(self) -> None:
            self.asked += 1

    endpoint.answer = lambda ids: (
        accepted(ids) if endpoint.headers[-1]["x-mlflow-experiment-id"] == "2" else (404, {}, b"")
    )
    sender = Deliverer(spool, Counting(), QUICK)
    assert await sender.flush(5) == 0
    await sender.aclose()
    assert [headers["x-mlflow-experiment-id"] for headers in endpoint.headers] == ["1", "2"]


@pytest.mark.parametrize("bad", ["", "127.0.0.1:5000", "ftp://host/", "http://"])
def test_an_address_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        OtlpTarget(bad)
    with pytest.raises(ValueError, match="must look like"):
        MlflowTarget(bad, "x")


def test_an_address_with_a_password_is_never_shown() -> None:
    endpoint = Endpoint("http://127.0.0.1/", {"authorization": "hunter2"})
    assert "hunter2" not in repr(endpoint)
    assert "hunter2" not in repr(MlflowTarget("http://u:hunter2@127.0.0.1:5000", "x"))
    with pytest.raises(ValueError, match="must look like") as caught:
        OtlpTarget("ftp://u:hunter2@host/")
    assert "hunter2" not in str(caught.value)
