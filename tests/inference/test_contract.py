"""What holds for every model, whichever stands behind the protocol."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from inference.anthropic_model import AnthropicModel
from inference.keys import Secret
from inference.loop import LoopTask, run_loop
from inference.openai_model import OpenAIModel
from inference.protocol import (
    STOP_REASONS,
    AssistantMessage,
    Completion,
    Finished,
    Model,
    Notice,
    Request,
    TextDelta,
    ToolResult,
    ToolSpec,
    ToolUse,
    Usage,
    UserMessage,
    event_from_json,
    event_to_json,
)
from inference.remote import RemoteModel
from inference.report import REPORT_TOOL
from inference.runbook_model import RunbookModel
from tests.inference.scripted_server import ScriptedServer
from tests.inference.test_runbook_model import RUNBOOK, Machine
from tests.inference.wire import Gateway

PROVIDERS = ("openai", "anthropic", "runbook", "remote-openai", "remote-anthropic", "remote-runbook")
TOOLS = (ToolSpec("disk_space", "Disks", {"type": "object"}), ToolSpec("memory", "Memory", {"type": "object"}))
ASK = Request("You look after a machine.", (UserMessage("How is it?"),), (*TOOLS, REPORT_TOOL), 500)
FULL = {"id": "full", "severity": "critical", "title": "/ is full", "detail": "97 %", "evidence": ["c1"]}
SCRIPT: list[dict[str, Any]] = [
    {"tool_calls": [{"name": "disk_space", "arguments": {}}, {"name": "memory", "arguments": {}}]},
    {"tool_calls": [{"name": "report", "arguments": {"summary": "One disk is full.", "findings": [FULL]}}]},
]


@contextlib.asynccontextmanager
async def opened(kind: str) -> AsyncGenerator[Model, None]:
    """A model of ``kind`` that looks at disks and memory and then reports a full disk."""
    where, _, inner = kind.rpartition("-")
    async with ScriptedServer(SCRIPT) as server:
        models: dict[str, Any] = {
            "openai": lambda: OpenAIModel("scripted", base_url=server.openai_url),
            "anthropic": lambda: AnthropicModel("scripted", base_url=server.url, key=Secret("k")),
            "runbook": lambda: RunbookModel(RUNBOOK),
        }
        model: Model = models[inner]()
        try:
            if where == "remote":
                gateway = Gateway(model)
                remote = RemoteModel(model.name, model.provider, model.context_tokens, send_records=inner == "runbook")
                async with gateway.dial(remote):
                    yield remote
                await remote.aclose()
                assert all(record.error is None for record in gateway.records)
            else:
                yield model
        finally:
            await model.aclose()


@pytest.fixture(params=PROVIDERS)
async def model(request: pytest.FixtureRequest) -> AsyncGenerator[Model, None]:
    async with opened(request.param) as found:
        yield found


async def answer(model: Model, request: Request) -> list[Any]:
    async with contextlib.aclosing(model.infer(request)) as events:
        return [event async for event in events]


async def test_it_is_a_model(model: Model) -> None:
    assert isinstance(model, Model)
    assert model.name and model.provider
    assert model.context_tokens >= 1024


async def test_an_answer_has_its_parts_in_order_and_one_end(model: Model) -> None:
    events = await answer(model, ASK)
    kinds = [type(event) for event in events]
    assert kinds.count(Finished) == kinds.count(Usage) == 1
    assert kinds[-1] is Finished
    assert events[-1].stop_reason in STOP_REASONS
    order = {Notice: 0, TextDelta: 0, ToolUse: 1, Usage: 2, Finished: 3}
    assert [order[kind] for kind in kinds] == sorted(order[kind] for kind in kinds)


async def test_every_event_survives_its_json_form(model: Model) -> None:
    for event in await answer(model, ASK):
        assert event_from_json(event_to_json(event)) == event


async def test_tool_uses_are_of_offered_tools_and_have_ids_of_their_own(model: Model) -> None:
    completion = Completion()
    for event in await answer(model, ASK):
        completion.add(event)
    assert [use.name for use in completion.tool_uses] == ["disk_space", "memory"]
    assert len({use.id for use in completion.tool_uses}) == 2
    assert completion.finished is not None
    assert completion.finished.stop_reason == "tool_use"


async def test_the_conversation_goes_on_from_the_request_alone(model: Model) -> None:
    completion = Completion()
    for event in await answer(model, ASK):
        completion.add(event)
    said = completion.message()
    assert isinstance(said, AssistantMessage)
    results = tuple(ToolResult(use.id, "no data", is_error=True) for use in said.tool_uses)
    events = await answer(model, Request(ASK.system, (*ASK.messages, said, *results), ASK.tools, 500))
    assert [event.name for event in events if isinstance(event, ToolUse)] == ["report"]


async def test_a_closed_generator_leaves_the_model_usable(model: Model) -> None:
    events = model.infer(ASK)
    await anext(events)
    await events.aclose()
    assert [type(event) for event in await answer(model, ASK)][-1] is Finished


async def test_the_loop_brings_it_to_a_report_from_evidence(model: Model) -> None:
    task = LoopTask("You look after a machine.", "How is it?", TOOLS)
    events: list[str] = []
    result = await run_loop(model, task, Machine(), lambda kind, _: events.append(kind), asyncio.Event())
    assert (result.outcome, result.steps, result.usage.tool_calls) == ("reported", 2, 2)
    assert result.report is not None
    assert result.report.model == f"{model.provider}:{model.name}"
    assert [found.evidence for found in result.report.findings if found.severity == "critical"] == [("c1",)]
    assert events.count("inference.finished") == 2
