"""The worker's A2A server over a real UNIX socket: our own client, the card, and a peer that speaks 0.3."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from a2a_bridge.client import TaskClient, TaskFailed
from a2a_bridge.codec import TASK_TYPE, read_task, task_message
from a2a_bridge.messages import TaskDocument, TaskResult
from a2a_bridge.server import Emit, Handler, application
from tools.values import Event, Finding, Report

DOCUMENT = TaskDocument("0192f0c1-2b3c-7abc-8abc-000000000001", "look", limits={"steps": 3, "exact": 2**60})
RESULT = TaskResult("reported", "done", Report("all well", (Finding("f", "ok", "t", evidence=("c1",)),)), steps=2)


class Worker:
    """A handler whose end the test decides."""

    def __init__(self, wait: bool = False) -> None:
        self.asked: list[TaskDocument] = []
        self.cancelled = asyncio.Event()
        self._wait = wait

    async def run(self, document: TaskDocument, emit: Emit) -> TaskResult:
        self.asked.append(document)
        for seq in range(1, 4):
            emit(Event(seq, "note", {"text": f"step {seq}", "number": 2**60 + seq}))
        if self._wait:
            await self.cancelled.wait()
            emit(Event(4, "note", {"text": "killed it"}))
            return TaskResult("cancelled", "the task was cancelled", None)
        return RESULT


@contextlib.asynccontextmanager
async def served(worker: Worker, directory: Path) -> AsyncIterator[str]:
    path = str(directory / "a2a")
    config = uvicorn.Config(
        application(Handler(worker.run, worker.cancelled.set), "edge", "1"), uds=path, log_level="error", lifespan="off"
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield path
    finally:
        server.should_exit = True
        await serving


async def test_events_and_result_arrive_exactly_as_they_were(tmp_path: Path) -> None:
    worker = Worker()
    async with served(worker, tmp_path) as path, TaskClient(path, 10) as client:
        updates = [update async for update in client.run(DOCUMENT)]
    assert worker.asked == [DOCUMENT]
    events = [event for update in updates for event in update.events]
    assert [event.seq for event in events] == [1, 2, 3]
    assert [event.body["number"] for event in events] == [2**60 + 1, 2**60 + 2, 2**60 + 3]
    assert [update.result for update in updates if update.result is not None][-1] == RESULT
    assert updates[-1].state == "completed"


async def test_a_cancel_waits_for_what_the_worker_says_it_killed(tmp_path: Path) -> None:
    worker = Worker(wait=True)
    updates = []
    async with served(worker, tmp_path) as path, TaskClient(path, 10) as client:
        async for update in client.run(DOCUMENT):
            updates.append(update)
            if any(event.seq == 3 for event in update.events):
                asking = asyncio.create_task(client.cancel(update.task_id))
        assert await asking == "canceled"
    said = [event.body["text"] for update in updates for event in update.events]
    assert said[-1] == "killed it"
    assert [u.result.outcome for u in updates if u.result is not None][-1] == "cancelled"
    assert updates[-1].state == "canceled"


async def test_the_card_names_both_protocol_versions(tmp_path: Path) -> None:
    async with served(Worker(), tmp_path) as path:
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=path), base_url="http://edge") as client:
            card = (await client.get("/.well-known/agent-card.json")).json()
    versions = {interface["protocolVersion"] for interface in card["supportedInterfaces"]}
    assert versions == {"1.0", "0.3"}
    assert card["capabilities"]["streaming"] is True


async def test_a_peer_that_speaks_0_3_gets_its_task_done(tmp_path: Path) -> None:
    worker = Worker()
    message = {
        "kind": "message", "messageId": str(uuid.uuid4()), "role": "user",
        "parts": [
            {"kind": "text", "text": "look"},
            {"kind": "text", "text": json.dumps(DOCUMENT.to_json()), "metadata": {"mediaType": TASK_TYPE}},
        ],
    }  # fmt: skip
    request = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": message}}
    async with served(worker, tmp_path) as path:
        async with httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=path), base_url="http://edge", timeout=20
        ) as client:
            answer = (await client.post("/", json=request)).json()
    assert "error" not in answer, answer
    task = answer["result"]
    assert task["kind"] == "task"
    assert task["status"]["state"] == "completed"
    assert worker.asked == [DOCUMENT]


async def test_a_message_without_a_task_document_is_rejected_in_words(tmp_path: Path) -> None:
    from a2a.client import ClientConfig, ClientFactory
    from a2a.helpers import new_text_message
    from a2a.types import Role, SendMessageRequest

    from a2a_bridge.card import agent_card
    from a2a_bridge.codec import read_update

    worker = Worker()
    async with served(worker, tmp_path) as path:
        http = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=path))
        client = ClientFactory(ClientConfig(streaming=True, httpx_client=http)).create(agent_card("edge", "1"))
        request = SendMessageRequest(message=new_text_message("hello", role=Role.ROLE_USER))
        updates = [read_update(response) async for response in client.send_message(request)]
        await http.aclose()
    assert updates[-1] is not None
    assert updates[-1].state == "rejected"
    assert TASK_TYPE in updates[-1].text
    assert worker.asked == []


async def test_a_server_that_goes_away_is_one_clear_error(tmp_path: Path) -> None:
    async with TaskClient(str(tmp_path / "nobody"), 5) as client:
        with pytest.raises(TaskFailed, match="conversation"):
            async for _ in client.run(DOCUMENT):
                pass


@given(st.text(max_size=200), st.dictionaries(st.text(max_size=8), st.integers(-(2**63), 2**63), max_size=4))
def test_any_task_document_survives_the_wire(prompt: str, limits: dict[str, int]) -> None:
    clean = prompt.encode("utf-8", "ignore").decode()
    document = TaskDocument("r", clean, limits={key.encode("utf-8", "ignore").decode(): n for key, n in limits.items()})
    assert read_task(task_message(document)) == document
