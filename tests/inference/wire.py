"""Two ends of a stream in the test's own process: a socket pair as asyncio streams."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from inference.protocol import Model, Request
from inference.remote import InferenceRecord, RemoteModel, serve

End = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def pair() -> tuple[End, End]:
    """Two connected ends."""
    left, right = socket.socketpair()
    return await asyncio.open_connection(sock=left), await asyncio.open_connection(sock=right)


class Gateway:
    """A gateway that answers from ``model``; ``dial`` connects it to a worker's ``RemoteModel``."""

    def __init__(self, model: Model, admit: Callable[[Request], Awaitable[Request]] | None = None) -> None:
        self.model = model
        self.admit = admit
        self.records: list[InferenceRecord] = []
        self.refuse_records = False

    async def record(self, record: InferenceRecord) -> None:
        await asyncio.sleep(0)
        if self.refuse_records:
            raise OSError("disk full")
        self.records.append(record)

    @contextlib.asynccontextmanager
    async def dial(self, remote: RemoteModel, **options: Any) -> AsyncGenerator[asyncio.Task[None], None]:
        """The connection stands inside the block; the value is the gateway's task."""
        worker, gateway = await pair()
        worker_task = asyncio.ensure_future(remote.serve_connection(*worker))
        gateway_task = asyncio.ensure_future(
            serve(*gateway, lambda _: self.model, self.record, admit=self.admit, **options)
        )
        try:
            yield gateway_task
        finally:
            gateway_task.cancel()
            await asyncio.wait({gateway_task, worker_task})
            for writer in (worker[1], gateway[1]):
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
