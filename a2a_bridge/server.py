"""The worker's end: an A2A 1.0 agent (0.3 compatible) whose one skill is to carry out a task.

Owns: the ASGI application, the life of an A2A task around a handler that is handed in.
Deliberately does not know: sockets, models, tools.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable

from a2a.helpers import new_task_from_user_message, new_text_message
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes
from a2a.server.tasks import InMemoryTaskStore, TaskUpdater
from a2a.types import TaskState
from starlette.applications import Starlette

from a2a_bridge.card import agent_card
from a2a_bridge.codec import REPORT_NAME, events_message, read_task, result_parts
from a2a_bridge.messages import TaskDocument, TaskResult
from tools.values import Event, Malformed

logger = logging.getLogger(__name__)

# Events that come within this time travel in one message, seconds: less to send, and nobody sees the difference.
GATHER_S = 0.02
# How long a cancel waits for the handler to have killed what runs and to say so, seconds.
CANCEL_S = 8.0

Emit = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class Handler:
    """What carries tasks out. ``run`` emits events and returns the result; ``cancel`` asks a running one to end, which
    ``run`` then does by itself with a result that says what was killed."""

    run: Callable[[TaskDocument, Emit], Awaitable[TaskResult]]
    cancel: Callable[[], None]


class _Executor(AgentExecutor):
    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._over: dict[str, asyncio.Event] = {}

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        message = context.message
        if message is None:
            raise Malformed("a task needs a message")
        task = context.current_task or new_task_from_user_message(message)
        if context.current_task is None:
            await event_queue.enqueue_event(task)
        updater = TaskUpdater(event_queue, task.id, task.context_id)
        try:
            document = read_task(message)
        except Malformed as error:
            await updater.reject(new_text_message(str(error)))
            return
        over = self._over[task.id] = asyncio.Event()
        pending: list[Event] = []
        wake = asyncio.Event()

        def emit(event: Event) -> None:
            pending.append(event)
            wake.set()

        async def send() -> None:
            while pending:
                batch, pending[:] = list(pending), []
                await updater.update_status(
                    TaskState.TASK_STATE_WORKING, events_message(batch, task.id, task.context_id)
                )

        async def pump() -> None:
            while True:
                await wake.wait()
                await asyncio.sleep(GATHER_S)
                wake.clear()
                await send()

        sender = asyncio.create_task(pump())
        try:
            await updater.start_work()
            # The framework cancels this coroutine on tasks/cancel; the handler must end by itself and say what it
            # killed, so it runs as a task of its own and is waited for.
            running = asyncio.ensure_future(self._handler.run(document, emit))
            try:
                result = await asyncio.shield(running)
            except asyncio.CancelledError:
                self._handler.cancel()
                result = await asyncio.wait_for(asyncio.shield(running), CANCEL_S)
        finally:
            sender.cancel()
            over.set()
        await send()
        await updater.add_artifact(result_parts(result), name=REPORT_NAME, artifact_id=REPORT_NAME)
        text = new_text_message(result.reason or result.outcome)
        if result.outcome == "cancelled":
            await updater.cancel(text)
        elif result.outcome == "error":
            await updater.failed(text)
        else:
            await updater.complete(text)

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        self._handler.cancel()


def application(handler: Handler, name: str, version: str) -> Starlette:
    """The ASGI application: agent card and JSON-RPC, A2A 1.0 with 0.3 compatibility."""
    card = agent_card(name, version)
    requests = DefaultRequestHandler(_Executor(handler), InMemoryTaskStore(), card)
    routes = [*create_agent_card_routes(card), *create_jsonrpc_routes(requests, "/", enable_v0_3_compat=True)]
    return Starlette(routes=routes)
