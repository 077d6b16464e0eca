"""A scripted model endpoint that speaks both wire formats, for tests: chat completions and Messages, streamed or not.

Owns: answers as they are written in a script, and every way an endpoint can fail half-way.
Deliberately does not know: the code under test; it is spoken to over HTTP by the official SDKs.

A script is a list of answers, taken one after another (the last one again and again when ``repeat_last``). An answer:

``text``, ``reasoning``          what the model says; ``chunk_chars`` characters a piece (default 7)
``tool_calls``                   ``[{"id"?, "name", "arguments": object or raw text}]``
``stop``                         the wire's own stop reason (default fits the answer)
``usage``                        ``{"input", "output", "cached"?}``, ``null`` for none
``refusal``                      a refusal with this text
``status``, ``headers``, ``body``  an HTTP error (or anything else) instead of an answer
``when``                         the answer is only taken when this text stands in the request's body
``unsupported``                  ``["stream_options", …]``: 400 as long as the request holds one of these
``ignore_stream``                the answer comes as one document although a stream was asked for
``fault``                        ``reset`` (before the header), ``cut`` (after ``after`` pieces, connection aborted),
                                 ``end`` (after ``after`` pieces, stream ends in good order), ``hang`` (after ``after``
                                 pieces, nothing more), ``silent`` (no header at all), ``garbage`` (a piece that is no
                                 JSON after ``after`` pieces), ``error_event`` (an error inside the stream)
``delay_s``                      seconds between two pieces

Run it by itself with ``python -m tests.inference.scripted_server --script FILE --port N``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, Self

HEADER_BYTES = 65536


@dataclasses.dataclass
class Seen:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class ScriptedServer:
    """``async with ScriptedServer([...]) as server``: listens on a free port of the loopback address."""

    def __init__(self, script: list[dict[str, Any]], *, repeat_last: bool = False, port: int = 0) -> None:
        self.script = list(script)
        self.repeat_last = repeat_last
        self.port = port
        self.seen: list[Seen] = []
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._asked = asyncio.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._open):
            task.cancel()
        if self._open:
            await asyncio.wait(self._open)
        await self._server.wait_closed()

    async def asked(self, times: int) -> None:
        """Returns as soon as ``times`` requests have come."""
        async with self._asked:
            await self._asked.wait_for(lambda: len(self.seen) >= times)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the test is over
        finally:
            self._open.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        raw = await reader.readexactly(int(headers.get("content-length") or 0))
        if method == "GET" and path.endswith("/models"):
            return self._whole(writer, 200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})
        body = json.loads(raw)
        async with self._asked:
            self.seen.append(Seen(path, headers, body))
            self._asked.notify_all()
        answer = self._next(raw.decode())
        if answer is None:
            return self._whole(writer, 500, {"error": {"message": "the script is at its end", "type": "server_error"}})
        return await _answer(writer, path, body, answer, self._whole)

    def _next(self, raw: str) -> dict[str, Any] | None:
        for position, answer in enumerate(self.script):
            if "when" in answer and answer["when"] not in raw:
                continue
            unsupported = [name for name in answer.get("unsupported", ()) if f'"{name}"' in raw]
            if unsupported:
                message = f"Unsupported parameter: {unsupported[0]!r} is not supported with this model"
                error = {"message": message, "type": "invalid_request_error", "param": unsupported[0]}
                return {"status": 400, "body": {"error": error}}
            if not (self.repeat_last and position == len(self.script) - 1):
                del self.script[position]
            return answer
        return None

    def _whole(
        self, writer: asyncio.StreamWriter, status: int, body: Any, headers: dict[str, str] | None = None
    ) -> bool:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        fields = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
        head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(head.encode() + b"\r\n" + content)
        return True


async def _answer(
    writer: asyncio.StreamWriter, path: str, body: dict[str, Any], answer: dict[str, Any], whole: Any
) -> bool:
    fault = answer.get("fault", "")
    if fault == "reset":
        writer.transport.abort()
        return False
    if fault == "silent":
        await asyncio.Event().wait()
    if "status" in answer:
        return bool(whole(writer, answer["status"], answer.get("body", {}), answer.get("headers")))
    messages = path.endswith("/messages")
    if not body.get("stream") or answer.get("ignore_stream"):
        return bool(whole(writer, 200, _anthropic_whole(answer) if messages else _openai_whole(answer)))
    usage = messages or bool((body.get("stream_options") or {}).get("include_usage"))
    pieces = _anthropic_pieces(answer) if messages else _openai_pieces(answer, usage)
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    after = answer.get("after", 3)
    for number, piece in enumerate(pieces):
        if fault and number == after:
            if fault == "cut":
                await writer.drain()
                writer.transport.abort()
                return False
            if fault == "end":
                break
            if fault == "hang":
                await asyncio.Event().wait()
            if fault == "garbage":
                piece = "event: content_block_delta\ndata: {not json\n\n" if messages else "data: {not json\n\n"
            if fault == "error_event":
                error = {"type": "overloaded_error", "message": "Overloaded"}
                piece = f"event: error\ndata: {json.dumps({'type': 'error', 'error': error})}\n\n"
        data = piece.encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()
        if answer.get("delay_s"):
            await asyncio.sleep(answer["delay_s"])
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return True


def _split(text: str, answer: dict[str, Any]) -> list[str]:
    size = answer.get("chunk_chars", 7)
    return [text[at : at + size] for at in range(0, len(text), size)]


def _calls(answer: dict[str, Any], prefix: str) -> list[tuple[str, str, str]]:
    calls = []
    for number, call in enumerate(answer.get("tool_calls", ())):
        arguments = call["arguments"]
        raw = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append((call.get("id", f"{prefix}{number}"), call["name"], raw))
    return calls


# --- chat completions ----------------------------------------------------------------------------------------------


def _openai_stop(answer: dict[str, Any]) -> str:
    default = "tool_calls" if answer.get("tool_calls") else "stop"
    return str(answer.get("stop", default))


def _openai_usage(answer: dict[str, Any]) -> dict[str, Any] | None:
    usage = answer.get("usage", {"input": 100, "output": 20})
    if usage is None:
        return None
    return {
        "prompt_tokens": usage["input"],
        "completion_tokens": usage["output"],
        "total_tokens": usage["input"] + usage["output"],
        "prompt_tokens_details": {"cached_tokens": usage.get("cached", 0)},
    }


def _openai_pieces(answer: dict[str, Any], with_usage: bool) -> list[str]:
    common = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "scripted-1"}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    chunks = [chunk({"role": "assistant", "content": ""})]
    chunks += [chunk({"reasoning_content": piece}) for piece in _split(answer.get("reasoning", ""), answer)]
    chunks += [chunk({"content": piece}) for piece in _split(answer.get("text", ""), answer)]
    chunks += [chunk({"refusal": piece}) for piece in _split(answer.get("refusal", ""), answer)]
    for index, (use_id, name, raw) in enumerate(_calls(answer, "call_x")):
        start = {"index": index, "id": use_id, "type": "function", "function": {"name": name, "arguments": ""}}
        chunks.append(chunk({"tool_calls": [start]}))
        chunks += [
            chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}) for piece in _split(raw, answer)
        ]
    chunks.append(chunk({}, _openai_stop(answer)))
    usage = _openai_usage(answer)
    if with_usage and usage:
        chunks.append({**common, "choices": [], "usage": usage})
    return [f"data: {json.dumps(piece)}\n\n" for piece in chunks] + ["data: [DONE]\n\n"]


def _openai_whole(answer: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {"id": use_id, "type": "function", "function": {"name": name, "arguments": raw}}
        for use_id, name, raw in _calls(answer, "call_x")
    ]
    message: dict[str, Any] = {"role": "assistant", "content": answer.get("text") or None}
    if calls:
        message["tool_calls"] = calls
    if answer.get("refusal"):
        message["refusal"] = answer["refusal"]
    choice = {"index": 0, "message": message, "finish_reason": _openai_stop(answer)}
    document = {"id": "x", "object": "chat.completion", "created": 0, "model": "scripted-1", "choices": [choice]}
    usage = _openai_usage(answer)
    return {**document, "usage": usage} if usage else document


# --- Messages ------------------------------------------------------------------------------------------------------

_TO_ANTHROPIC = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens", "content_filter": "refusal"}


def _anthropic_stop(answer: dict[str, Any]) -> str:
    if answer.get("refusal"):
        return "refusal"
    stop = _openai_stop(answer)
    return _TO_ANTHROPIC.get(stop, stop)


def _anthropic_usage(answer: dict[str, Any]) -> dict[str, int]:
    usage = answer.get("usage", {"input": 100, "output": 20}) or {"input": 0, "output": 0}
    cached = usage.get("cached", 0)
    return {
        "input_tokens": usage["input"] - cached,
        "output_tokens": usage["output"],
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }


def _anthropic_blocks(answer: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    if answer.get("reasoning"):
        deltas = [{"type": "thinking_delta", "thinking": piece} for piece in _split(answer["reasoning"], answer)]
        deltas.append({"type": "signature_delta", "signature": "signed"})
        blocks.append(({"type": "thinking", "thinking": "", "signature": ""}, deltas))
    text = answer.get("text", "") or answer.get("refusal", "")
    if text:
        deltas = [{"type": "text_delta", "text": piece} for piece in _split(text, answer)]
        blocks.append(({"type": "text", "text": ""}, deltas))
    for use_id, name, raw in _calls(answer, "toolu_x"):
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in _split(raw, answer)]
        blocks.append(({"type": "tool_use", "id": use_id, "name": name, "input": {}}, deltas))
    return blocks


def _anthropic_pieces(answer: dict[str, Any]) -> list[str]:
    usage = _anthropic_usage(answer)
    message: dict[str, Any] = {
        "id": "m", "type": "message", "role": "assistant", "model": "scripted-1", "content": [], "stop_reason": None,
        "stop_sequence": None, "usage": {**usage, "output_tokens": min(1, usage["output_tokens"])},
    }  # fmt: skip
    events: list[dict[str, Any]] = [{"type": "message_start", "message": message}, {"type": "ping"}]
    for index, (start, deltas) in enumerate(_anthropic_blocks(answer)):
        events.append({"type": "content_block_start", "index": index, "content_block": start})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    delta = {"stop_reason": _anthropic_stop(answer), "stop_sequence": None}
    events.append({"type": "message_delta", "delta": delta, "usage": {"output_tokens": usage["output_tokens"]}})
    events.append({"type": "message_stop"})
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]


def _anthropic_whole(answer: dict[str, Any]) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if answer.get("text"):
        content.append({"type": "text", "text": answer["text"]})
    content += [
        {"type": "tool_use", "id": use_id, "name": name, "input": json.loads(raw)}
        for use_id, name, raw in _calls(answer, "toolu_x")
    ]
    return {
        "id": "m", "type": "message", "role": "assistant", "model": "scripted-1", "content": content,
        "stop_reason": _anthropic_stop(answer), "stop_sequence": None, "usage": _anthropic_usage(answer),
    }  # fmt: skip


async def _serve(script: Path, port: int) -> None:
    async with ScriptedServer(json.loads(script.read_text("utf-8")), repeat_last=True, port=port) as server:
        print(json.dumps({"url": server.url, "openai": server.openai_url}), flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Serve a script until the process is ended; says its URL in one JSON line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--script", type=Path, required=True, help="JSON file with a list of answers")
    parser.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1, 0 for a free one")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(options.script, options.port))


if __name__ == "__main__":
    main()
