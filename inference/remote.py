"""Both ends of the line protocol of ``inference.sock`` (contracts.md, "Gateway ⇄ worker: inference").

Owns: the frames, their limits, what happens when the connection comes, goes or falls silent, the order of accounting
and answering at the gateway.
Deliberately does not know: how the connection is made (sockets, SSH), budgets (it is handed ``admit``), where records
go (it is handed ``on_inference``), any provider.

Frames, one JSON object a line. Worker → gateway: ``{"id", "request", "deadline_s"}``, ``{"id", "cancel": true}``.
Gateway → worker: ``{"id", "event"}``, and last ``{"id", "end": true}`` or ``{"id", "error"}``.

At the gateway tool uses, usage and end are held back until ``on_inference`` has recorded the inference: a worker cannot
act on an inference that the centre has no record of.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

from inference import tokens
from inference.errors import (
    BadAnswer,
    ContextTooLong,
    GatewayGone,
    InferenceDenied,
    InferenceError,
    ModelTimeout,
    RequestRefused,
    error_from_json,
)
from inference.protocol import (
    Completion,
    Event,
    Finished,
    Model,
    Request,
    ToolUse,
    Usage,
    event_from_json,
    event_to_json,
)
from tools.values import JsonObject, Malformed, canonical, want

LINE_BYTES = 8 * 1024 * 1024  # longest line, bytes: a window of a million tokens is about 4 MB of text
IN_FLIGHT = 2  # inferences of one connection at a time: the loop makes one, a cancelled one may still be ending
CONNECT_WAIT_S = 30.0  # seconds a request waits for the gateway to dial in (again): a reconnect takes about one
DEADLINE_S = 660.0  # seconds for one answer: the gateway's own limit (600 s, `attempts.Timeouts.total`) and a margin
READ_BYTES = 65536


class LineDecoder:
    """Bytes in, complete lines out. ``limit``: bytes of the longest line, without its newline."""

    def __init__(self, limit: int = LINE_BYTES) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Raises ``BadAnswer`` as soon as a line is longer than the limit; nothing can be read after that."""
        lines: list[bytes] = []
        *complete, rest = data.split(b"\n")
        for piece in complete:
            self._keep(piece)
            lines.append(b"".join(self._pieces))
            self._pieces, self._size = [], 0
        self._keep(rest)
        return lines

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit:
            raise BadAnswer(
                f"a line of the inference channel is longer than {self._limit} bytes; the connection is given up",
                raw=b"".join([*self._pieces, piece])[:200].decode("ascii", "replace"),
            )
        if piece:
            self._pieces.append(piece)

    @property
    def incomplete(self) -> bool:
        """Whether a line has begun and not ended."""
        return self._size > 0


def read_frame(line: bytes) -> JsonObject:
    """One line as a frame. Raises ``Malformed``."""
    try:
        frame = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"a line of the inference channel is not JSON: {error}, got {line!r:.80}") from error
    if not isinstance(frame, dict):
        raise Malformed(f"a line of the inference channel must be an object, got {line!r:.80}")
    return frame


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def write_frame(frame: JsonObject) -> bytes:
    return canonical(frame) + b"\n"


async def _frames(reader: asyncio.StreamReader, limit: int) -> AsyncGenerator[JsonObject, None]:
    """The frames of a connection until it ends. Raises ``BadAnswer`` or ``Malformed``."""
    decoder = LineDecoder(limit)
    while True:
        try:
            data = await reader.read(READ_BYTES)
        except (ConnectionError, OSError):
            return
        if not data:
            return
        for line in decoder.feed(data):
            if line.strip():
                yield read_frame(line)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError, OSError, TimeoutError):
        async with asyncio.timeout(2.0):
            await writer.wait_closed()


# --- the worker's end ---------------------------------------------------------------------------------------------


class _Connection:
    """One connection of the gateway, with the answers that are under way on it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.waiting: dict[str, asyncio.Queue[JsonObject | InferenceError]] = {}

    def send(self, frame: JsonObject) -> None:
        self.writer.write(write_frame(frame))

    def fail(self, error: Callable[[], InferenceError]) -> None:
        for queue in self.waiting.values():
            queue.put_nowait(error())
        self.waiting.clear()


class RemoteModel:
    """The gateway's model as the worker sees it.

    ``name``, ``provider``, ``context_tokens``: as the task document says. The worker listens; hand each connection of
    the gateway to ``serve_connection`` (it is a callback for ``asyncio.start_unix_server``). A new connection takes the
    place of the one before. ``connect_wait_s`` seconds: how long a request waits while there is none; ``deadline_s``
    seconds: for one answer; ``send_records``: also send the machine form of tool results (only a runbook reads it).
    """

    def __init__(
        self,
        name: str,
        provider: str,
        context_tokens: int,
        *,
        connect_wait_s: float = CONNECT_WAIT_S,
        deadline_s: float = DEADLINE_S,
        line_bytes: int = LINE_BYTES,
        send_records: bool = False,
    ) -> None:
        self.name = name
        self.provider = provider
        self.context_tokens = context_tokens
        self._connect_wait_s = connect_wait_s
        self._deadline_s = deadline_s
        self._line_bytes = line_bytes
        self._send_records = send_records
        self._connection: _Connection | None = None
        self._arrived = asyncio.Event()
        self._count = 0
        self._closed = False

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Own one connection of the gateway until it ends. Answers under way on it fail with ``GatewayGone``."""
        if self._closed:
            await _close(writer)
            return
        connection = _Connection(writer)
        before, self._connection = self._connection, connection
        self._arrived.set()
        if before is not None:
            before.fail(lambda: self._gone("a new connection of the gateway took its place"))
            before.writer.close()
        problem: InferenceError | None = None
        try:
            async with contextlib.aclosing(_frames(reader, self._line_bytes)) as frames:
                async for frame in frames:
                    self._deliver(connection, frame)
        except (BadAnswer, Malformed) as error:
            problem = BadAnswer(f"the gateway sent what is no frame: {error}", provider=self.provider, model=self.name)
        finally:
            if self._connection is connection:
                self._connection = None
                self._arrived.clear()
            connection.fail(lambda: problem or self._gone("it closed the connection"))
            await _close(writer)

    def _deliver(self, connection: _Connection, frame: JsonObject) -> None:
        queue = connection.waiting.get(str(frame.get("id")))
        if queue is not None:  # an answer nobody waits for any more was cancelled: its last frames are still coming
            queue.put_nowait(frame)

    def _gone(self, how: str) -> GatewayGone:
        return GatewayGone(
            f"asked the gateway for an answer of {self.provider}:{self.name}, but {how} before the answer was complete; "
            "nothing of it is acted on, asking again is safe",
            provider=self.provider,
            model=self.name,
        )

    async def infer(self, request: Request) -> AsyncGenerator[Event, None]:
        """See ``Model``. Raises ``GatewayGone`` (retryable), ``ModelTimeout`` and whatever the gateway answers."""
        connection = await self._connected()
        self._count += 1
        frame_id = f"r{self._count}"
        frame = {"id": frame_id, "request": request.to_json(self._send_records), "deadline_s": self._deadline_s}
        line = write_frame(frame)
        if len(line) > self._line_bytes:
            raise ContextTooLong(
                f"the request takes {len(line)} bytes, a line of the inference channel has at most {self._line_bytes}",
                provider=self.provider,
                model=self.name,
            )
        queue: asyncio.Queue[JsonObject | InferenceError] = asyncio.Queue()
        connection.waiting[frame_id] = queue
        over = False
        try:
            async with asyncio.timeout(self._deadline_s) as limit:
                # the deadline is checked at each wait, never inside a `yield`
                deadline = limit.when() or 0.0
                connection.writer.write(line)
                try:
                    await connection.writer.drain()
                except (ConnectionError, OSError) as error:
                    raise self._gone("the connection broke") from error
            async with contextlib.aclosing(self._answer(queue, deadline)) as events:
                async for event in events:
                    yield event
            over = True
        except TimeoutError as error:
            raise self._late() from error
        except InferenceError as error:
            over = not isinstance(error, (ModelTimeout, BadAnswer))
            raise
        finally:
            connection.waiting.pop(frame_id, None)
            if not over and not connection.writer.is_closing():
                connection.send({"id": frame_id, "cancel": True})

    async def _answer(
        self, queue: asyncio.Queue[JsonObject | InferenceError], deadline: float
    ) -> AsyncGenerator[Event, None]:
        finished = False
        while True:
            async with asyncio.timeout_at(deadline):
                frame = await queue.get()
            if isinstance(frame, InferenceError):
                raise frame
            try:
                if "error" in frame:
                    raise error_from_json(want(frame, "error", dict))
                if frame.get("end") is True:
                    if not finished:
                        raise Malformed("the answer ended without saying how")
                    return
                event = event_from_json(want(frame, "event", dict))
                if finished:
                    raise Malformed("an event came after the answer's end")
            except (Malformed, OverflowError, RecursionError) as error:
                raise BadAnswer(
                    f"the gateway's answer cannot be read: {error}", provider=self.provider, model=self.name
                ) from error
            finished = isinstance(event, Finished)
            yield event

    def _late(self) -> ModelTimeout:
        return ModelTimeout(
            f"the gateway gave no complete answer of {self.provider}:{self.name} within {self._deadline_s:g} s",
            phase="gateway",
            seconds=self._deadline_s,
            provider=self.provider,
            model=self.name,
        )

    async def _connected(self) -> _Connection:
        deadline = asyncio.get_running_loop().time() + self._connect_wait_s
        while not self._closed:
            if self._connection is not None and not self._connection.writer.is_closing():
                return self._connection
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
                    if self._connection is not None and self._connection.writer.is_closing():
                        # its reader has not seen the end yet
                        self._arrived.clear()
            except TimeoutError as error:
                raise GatewayGone(
                    f"waited {self._connect_wait_s:g} s for the gateway to connect to the inference socket and it did "
                    "not; it dials in again by itself when it is there",
                    provider=self.provider,
                    model=self.name,
                ) from error
        raise self._gone("the model was closed")

    async def aclose(self) -> None:
        self._closed = True
        self._arrived.set()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.fail(lambda: self._gone("the worker is stopping"))
            await _close(connection.writer)


# --- the gateway's end --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class InferenceRecord:
    """What the centre records of one inference, whatever came of it.

    ``provider``, ``model``: who was asked (``model`` as the endpoint named itself where it did); ``usage`` ``None``:
    nothing is known to have been used; ``stop_reason``: of the answer, ``error`` or ``cancelled``; ``duration_ms``
    milliseconds; ``metadata``: of the request, as the worker sent it (a claim, not a fact).
    """

    provider: str
    model: str
    stop_reason: str
    prompt_digest: str
    completion_digest: str
    duration_ms: float
    usage: Usage | None
    error: JsonObject | None
    metadata: JsonObject

    def to_json(self) -> JsonObject:
        return {
            "provider": self.provider, "model": self.model, "stop_reason": self.stop_reason,
            "prompt_digest": self.prompt_digest, "completion_digest": self.completion_digest,
            "duration_ms": self.duration_ms, "usage": self.usage.to_json() if self.usage else None,
            "error": self.error, "metadata": self.metadata,
        }  # fmt: skip


ModelForRequest = Callable[[Request], "Model | Awaitable[Model]"]
Admit = Callable[[Request], Awaitable[Request]]
OnInference = Callable[[InferenceRecord], Awaitable[None]]


async def serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    model_for_request: ModelForRequest,
    on_inference: OnInference,
    *,
    admit: Admit | None = None,
    line_bytes: int = LINE_BYTES,
    deadline_s: float = DEADLINE_S,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Answer the requests of one worker until the connection ends or something comes that is no frame.

    ``model_for_request``: the model for a request, plain or awaitable; it stays the caller's, it is not closed here.
    ``admit``: called before; returns the request as it may be made (fewer tokens, say) or raises ``InferenceDenied``.
    ``on_inference``: called after each inference, also one that failed or was cancelled, and before the worker gets
    what it could act on; when it raises, the worker gets an error instead. ``deadline_s``: the longest the worker may
    ask for. When the connection ends, answers under way are cancelled, recorded, and no more money is spent.
    """
    end = _GatewayEnd(writer, model_for_request, on_inference, admit, deadline_s, now)
    try:
        async with contextlib.aclosing(_frames(reader, line_bytes)) as frames:
            async for frame in frames:
                end.take(frame)
    except (BadAnswer, Malformed) as error:
        await end.send({"id": None, "error": RequestRefused(f"not a frame: {error}; the connection ends").to_json()})
    finally:
        await _finish(end.close())
        await _close(writer)


async def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` to its end even if the waiting for it is cancelled: what was spent must be recorded."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


class _GatewayEnd:
    def __init__(
        self,
        writer: asyncio.StreamWriter,
        model_for_request: ModelForRequest,
        on_inference: OnInference,
        admit: Admit | None,
        deadline_s: float,
        now: Callable[[], float],
    ) -> None:
        self.writer = writer
        self.model_for_request = model_for_request
        self.on_inference = on_inference
        self.admit = admit
        self.deadline_s = deadline_s
        self.now = now
        self.running: dict[str, asyncio.Task[None]] = {}
        self.recording: set[asyncio.Future[None]] = set()
        self.sending = asyncio.Lock()
        self.closing = False

    def take(self, frame: JsonObject) -> None:
        """One frame of the worker. Raises ``Malformed``."""
        frame_id = want(frame, "id", str)
        if len(frame_id) > 64:
            raise Malformed(f"field 'id' must have at most 64 characters, got {len(frame_id)}")
        if "cancel" in frame:
            task = self.running.get(frame_id)
            if task is not None:
                task.cancel()
            return
        document = want(frame, "request", dict)
        seconds = want(frame, "deadline_s", (int, float), self.deadline_s)
        if frame_id in self.running:
            raise Malformed(f"field 'id' names a request that is under way: {id!r}")
        room = len(self.running) < IN_FLIGHT
        task = asyncio.ensure_future(self._answer(frame_id, document, float(min(seconds, self.deadline_s)), room))
        self.running[frame_id] = task
        task.add_done_callback(lambda done: self._ended(frame_id, done))

    def _ended(self, frame_id: str, task: asyncio.Task[None]) -> None:
        if self.running.get(frame_id) is task:
            del self.running[frame_id]
        if not task.cancelled():
            task.exception()

    async def close(self) -> None:
        """Cancel what is under way and wait until it is recorded."""
        self.closing = True
        tasks = list(self.running.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self.recording:
            await asyncio.wait(self.recording)

    async def send(self, frame: JsonObject) -> None:
        with contextlib.suppress(ConnectionError, OSError):
            async with self.sending:
                if not self.writer.is_closing():
                    self.writer.write(write_frame(frame))
                    await self.writer.drain()

    async def _answer(self, frame_id: str, document: JsonObject, deadline_s: float, room: bool) -> None:
        try:
            if not room:
                raise InferenceDenied(f"{IN_FLIGHT} inferences of this connection are under way; wait for one to end")
            try:
                request = Request.from_json(document)
            except (Malformed, OverflowError, RecursionError) as error:
                raise RequestRefused(f"the request cannot be read: {error}") from error
            await self._infer(frame_id, request, deadline_s)
        except InferenceError as error:
            await self.send({"id": frame_id, "error": error.to_json()})
        except Exception as error:  # noqa: BLE001 - it is passed on to the event loop's handler
            # what is wrong at the centre is for its log; the worker, which is not trusted, learns that and no more
            await self.send({"id": frame_id, "error": InferenceError("the gateway failed; its log says why").to_json()})
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"an inference at the gateway failed: {type(error).__name__}", "exception": error}
            )

    async def _infer(self, frame_id: str, request: Request, deadline_s: float) -> None:
        if self.admit is not None:
            request = await self.admit(request)
        chosen = self.model_for_request(request)
        model = await chosen if inspect.isawaitable(chosen) else chosen
        started = self.now()
        completion = Completion()
        held: list[Event] = []
        failed: InferenceError | None = None
        cancelled = False
        try:
            async with asyncio.timeout(deadline_s):
                await self._relay(frame_id, model, request, completion, held)
            if completion.finished is None:
                failed = BadAnswer("the model's answer ended without saying how")
        except InferenceError as error:
            failed = error
        except TimeoutError:
            failed = ModelTimeout(f"no complete answer within {deadline_s:g} s", phase="gateway", seconds=deadline_s)
        except asyncio.CancelledError:
            cancelled = True
        record = self._record(model, request, completion, failed, cancelled, started)
        try:
            await self._recorded(record)
        except InferenceError as error:
            failed = error
        except Exception as error:
            raise InferenceDenied("the inference could not be recorded, so its answer is not given") from error
        if cancelled:
            ended = (
                GatewayGone("the gateway ends this connection; asking again on the next one is safe")
                if self.closing
                else InferenceDenied("the inference was cancelled")
            )
            await self.send({"id": frame_id, "error": ended.to_json()})
            return
        if failed is not None:
            raise failed
        for event in held:
            await self.send({"id": frame_id, "event": event_to_json(event)})
        await self.send({"id": frame_id, "end": True})

    async def _recorded(self, record: InferenceRecord) -> None:
        """In a task of its own: a second cancel must not lose the record."""
        task = asyncio.ensure_future(_awaited(self.on_inference(record)))
        self.recording.add(task)
        task.add_done_callback(self.recording.discard)
        await asyncio.shield(task)

    async def _relay(
        self, frame_id: str, model: Model, request: Request, completion: Completion, held: list[Event]
    ) -> None:
        async with contextlib.aclosing(model.infer(request)) as events:
            async for event in events:
                completion.add(event)
                if isinstance(event, (ToolUse, Usage, Finished)):
                    held.append(event)
                else:
                    await self.send({"id": frame_id, "event": event_to_json(event)})

    def _record(
        self,
        model: Model,
        request: Request,
        completion: Completion,
        failed: InferenceError | None,
        cancelled: bool,
        started: float,
    ) -> InferenceRecord:
        finished = completion.finished
        usage = completion.usage
        if usage is None and (completion.text or cancelled or finished):
            # asked for and perhaps paid for: an estimate counts against a budget, silence would not
            usage = tokens.estimated(request, completion)
        return InferenceRecord(
            model.provider,
            (finished.model if finished else "") or model.name,
            "cancelled" if cancelled else "error" if failed else finished.stop_reason if finished else "error",
            request.prompt_digest,
            completion.digest,
            round((self.now() - started) * 1000, 3),
            usage,
            failed.to_json() if failed else None,
            request.metadata,
        )


async def _awaited(value: Awaitable[None]) -> None:
    await value
