"""The worker's three sockets, all listened on by the worker; nothing of it ever connects to the host.

Owns: the sockets in the one directory that the container shares with the host, and the conversation with the broker
(docs/contracts.md, "Broker ⇄ worker"). Deliberately does not know: what a call means, models, A2A.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.values import ALLOW, Decision, Evidence, JsonObject, Malformed, ToolCall, want

# One line of the broker's: an evidence with two capped outputs and its parsed data.
MAX_LINE = 4 * 1024 * 1024
# How long to wait for the evidence of a call that was cancelled, seconds; the broker kills first and answers then.
CANCEL_S = 8.0


class BrokerGone(Exception):
    """The broker closed its connection: the lease is over, nothing can be executed any more."""


def listen(directory: Path, name: str) -> socket.socket:
    """A listening UNIX socket in ``directory`` that only this user may connect to."""
    path = directory / name
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o077)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(16)
    listener.setblocking(False)
    return listener


class ToolsChannel:
    """The conversation with the broker, which connects once. ``call`` carries one tool call to the gate and back.

    Args:
        directory: where ``tools.sock`` is made.
        on_decision: told each decision the moment it comes.
    """

    def __init__(self, directory: Path) -> None:
        self._listener = listen(directory, "tools.sock")
        self.on_decision: Callable[[str, Decision], None] = lambda call_id, decision: None
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._hello: asyncio.Future[JsonObject] = asyncio.get_running_loop().create_future()
        self._waiting: dict[str, asyncio.Future[JsonObject]] = {}
        self._decided: dict[str, Decision] = {}
        self.gone = asyncio.Event()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, sock=self._listener, limit=MAX_LINE)

    async def hello(self) -> JsonObject:
        """What the broker says first: run, limits, model, the names of the tools."""
        return await asyncio.shield(self._hello)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            writer.close()
            return
        self._writer = writer
        try:
            while line := await reader.readline():
                self._line(json.loads(line))
        except (OSError, ValueError, asyncio.LimitOverrunError) as error:
            self._fail(BrokerGone(f"the conversation with the broker broke: {error}"))
        finally:
            self._fail(BrokerGone("the broker has gone"))
            self.gone.set()
            writer.close()

    def _line(self, document: Any) -> None:
        if not isinstance(document, dict):
            raise Malformed(f"the broker's line must be an object, got {document!r:.80}")
        if "hello" in document:
            if not self._hello.done():
                self._hello.set_result(want(document, "hello", dict))
            return
        if "call_id" not in document:
            # An error about a line of ours: whoever waits must not wait for ever.
            said = want(document, "error", dict)
            self._fail(BrokerGone(f"the broker refused a line: {said.get('message')}"))
            return
        call_id = want(document, "call_id", str)
        if "decision" in document:
            decision = Decision.from_json(want(document, "decision", dict))
            self._decided[call_id] = decision
            self.on_decision(call_id, decision)
            return
        future = self._waiting.get(call_id)
        if future is not None and not future.done():
            future.set_result(document)

    def _fail(self, error: BrokerGone) -> None:
        for future in [*self._waiting.values(), self._hello]:
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: nobody may be waiting for it

    def _send(self, document: JsonObject) -> None:
        if self._writer is None or self._writer.is_closing():
            raise BrokerGone("the broker has gone")
        self._writer.write(json.dumps(document, separators=(",", ":")).encode("ascii") + b"\n")

    def say_ready(self, details: JsonObject) -> None:
        """Tell the broker that tasks can come now."""
        self._send({"ready": True, **details})

    async def call(self, call: ToolCall) -> tuple[Decision, Evidence | None]:
        """Carry ``call`` through the gate; the evidence is ``None`` if it was not executed.

        When the caller is cancelled the broker is asked to kill the call, and what it says then is still returned.
        Raises ``BrokerGone``.
        """
        future = self._waiting[call.call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send({"call": call.to_json()})
            try:
                done = await asyncio.shield(future)
            except asyncio.CancelledError:
                self._send({"cancel": call.call_id})
                done = await asyncio.wait_for(future, CANCEL_S)
        finally:
            del self._waiting[call.call_id]
            decision = self._decided.pop(call.call_id, None)
        if decision is None:
            raise BrokerGone(f"the broker answered call {call.call_id} without a decision")
        if decision.outcome != ALLOW or "evidence" not in done:
            return decision, None
        return decision, Evidence.from_json(want(done, "evidence", dict))

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
