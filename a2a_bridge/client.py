"""The gateway's end: sends a task to a worker over a UNIX socket and reads what it says.

Owns: the A2A client of one run. Deliberately does not know: SSH (whoever owns the socket splices it to the machine),
runs, verdicts.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Self

import httpx
from a2a.client import ClientConfig, ClientFactory
from a2a.client.errors import A2AClientError
from a2a.types import CancelTaskRequest, SendMessageRequest

from a2a_bridge.card import agent_card
from a2a_bridge.codec import read_update, state_name, task_message
from a2a_bridge.messages import ENDED, TaskDocument, TaskUpdate

# Until the worker has taken the connection and the message, seconds; the stream itself is bounded by the task's limits.
CONNECT_S = 10.0


class TaskFailed(Exception):
    """The conversation with the worker broke: it went away, or said something that is no A2A."""


class TaskClient:
    """A2A client of one worker. Use as an async context manager.

    Args:
        socket_path: the UNIX socket that leads to the worker's A2A server.
        silence_s: seconds without a byte after which the worker counts as gone.
    """

    def __init__(self, socket_path: str, silence_s: float) -> None:
        timeout = httpx.Timeout(silence_s, connect=CONNECT_S)
        self._http = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=socket_path), timeout=timeout)
        # The card is known: both ends come from the same release, so one round trip is saved.
        factory = ClientFactory(ClientConfig(streaming=True, httpx_client=self._http))
        self._client = factory.create(agent_card("edge", "1"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(httpx.HTTPError, A2AClientError):
            await self._client.close()
        await self._http.aclose()

    async def run(self, document: TaskDocument) -> AsyncIterator[TaskUpdate]:
        """Send ``document`` and yield what the worker says until the task has ended.

        Raises ``TaskFailed`` if the stream breaks before that, ``Malformed`` if the worker says what it may not.
        """
        ended = False
        try:
            async for response in self._client.send_message(SendMessageRequest(message=task_message(document))):
                update = read_update(response)
                if update is None:
                    continue
                ended = ended or update.state in ENDED
                yield update
        except (httpx.HTTPError, A2AClientError) as error:
            raise TaskFailed(f"the conversation with the worker broke: {type(error).__name__}: {error}") from error
        if not ended:
            raise TaskFailed("the worker closed the stream before the task had ended")

    async def cancel(self, task_id: str) -> str:
        """Ask the worker to cancel; returns the task's state afterwards. Raises ``TaskFailed``."""
        try:
            task = await self._client.cancel_task(CancelTaskRequest(id=task_id))
        except (httpx.HTTPError, A2AClientError) as error:
            raise TaskFailed(f"the worker could not be asked to cancel: {error}") from error
        return state_name(task.status.state)
