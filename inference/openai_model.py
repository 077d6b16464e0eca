"""The ``openai`` provider: any endpoint that speaks chat completions.

Owns: the mapping between the protocol and chat completions, and what is done about endpoints that imitate it in part.
Deliberately does not know: why it was chosen, limits of a task, what the tools do. The SDK is imported on first use.

The SDK's retries are off (``inference.attempts`` says why). No redirect is followed: a key goes to the host that was
named and to no other. For an address of this machine no proxy is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import re
import time
import urllib.parse
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from inference import tokens
from inference.accumulate import TextJoiner, ToolCallAccumulator
from inference.attempts import Retries, Timeouts, attempts
from inference.cost import Pricer
from inference.errors import BadAnswer, InferenceError, ModelTimeout, ModelUnavailable, RequestRefused, StreamCut
from inference.http_errors import error_fields, error_for
from inference.keys import Secret
from inference.protocol import (
    CONTENT_FILTER,
    END,
    LENGTH,
    REFUSAL,
    TOOL_USE,
    AssistantMessage,
    Event,
    Finished,
    Message,
    Notice,
    Request,
    TextDelta,
    ToolResult,
    ToolUse,
    Usage,
    clean,
)
from tools.values import JsonObject

OFFICIAL_URL = "https://api.openai.com/v1"
_STOP_REASONS = {
    "stop": END, "tool_calls": TOOL_USE, "function_call": TOOL_USE, "length": LENGTH, "content_filter": CONTENT_FILTER,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Which parts of the request an endpoint takes. Found out from its refusals and kept for the next request."""

    stream: bool = True
    usage_in_stream: bool = True
    max_name: str = "max_tokens"
    temperature: bool = True


def first_shape(base_url: str) -> Shape:
    """The official API knows only ``max_completion_tokens`` for its newer models, imitations mostly the older name."""
    host = urllib.parse.urlsplit(base_url).hostname or ""
    official = host == "openai.com" or host.endswith(".openai.com")
    return Shape(max_name="max_completion_tokens" if official else "max_tokens")


def reshaped(shape: Shape, param: str, message: str) -> tuple[Shape, str] | None:
    """What to send instead after a 400 or 422.

    ``param``: the parameter the endpoint names, if any; ``message``: its words. Returns the new shape and what changed,
    or ``None`` when the refusal is not about a part that can be left out. Each part changes once, so this ends.
    """
    words = f"{param} {message}".lower()
    if shape.stream and shape.usage_in_stream and re.search(r"stream_options|include_usage", words):
        return dataclasses.replace(shape, usage_in_stream=False), "asked again without usage in the stream"
    if shape.max_name == "max_tokens" and "max_completion_tokens" in words:
        return dataclasses.replace(shape, max_name="max_completion_tokens"), "asked again with max_completion_tokens"
    if (
        shape.max_name == "max_completion_tokens"
        and re.search(r"max_completion_tokens", words)
        and re.search(r"unknown|unrecogni[sz]ed|unsupported|not (supported|permitted|allowed)|extra|unexpected", words)
    ):
        return dataclasses.replace(shape, max_name=""), "asked again without a limit on the answer"
    if shape.temperature and "temperature" in words:
        return dataclasses.replace(shape, temperature=False), "asked again without a temperature"
    if shape.stream and re.search(r"\bstream(ing|ed)?\b", words):
        return dataclasses.replace(shape, stream=False, usage_in_stream=False), "asked again without streaming"
    return None


# --- the request -------------------------------------------------------------------------------------------------


def to_wire(request: Request, model: str, shape: Shape) -> JsonObject:
    """The body of a chat-completions request, without ``stream``."""
    messages: list[JsonObject] = []
    if request.system:
        messages.append({"role": "system", "content": clean(request.system)})
    messages.extend(_message(message) for message in request.messages)
    body: JsonObject = {"model": model, "messages": messages}
    if request.tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
            }
            for tool in request.tools
        ]
    if shape.max_name:
        body[shape.max_name] = request.max_tokens
    if request.temperature is not None and shape.temperature:
        body["temperature"] = request.temperature
    if request.stop:
        body["stop"] = list(request.stop)
    return body


def _message(message: Message) -> JsonObject:
    if isinstance(message, ToolResult):
        return {"role": "tool", "tool_call_id": message.tool_use_id, "content": clean(message.text)}
    if not isinstance(message, AssistantMessage):
        return {"role": "user", "content": clean(message.text)}
    echo = (message.echo or {}).get("openai", {})
    extras = echo.get("tool_calls", {})
    document: JsonObject = {"role": "assistant", "content": clean(message.text) or None}
    if echo.get("reasoning_content"):
        document["reasoning_content"] = echo["reasoning_content"]
    if message.tool_uses:
        document["tool_calls"] = [
            {
                "id": use.id,
                "type": "function",
                "function": {"name": use.name or "unknown", "arguments": json.dumps(use.arguments_to_send())},
                **({"extra_content": extras[use.id]} if use.id in extras else {}),
            }
            for use in message.tool_uses
        ]
    elif not message.text:
        document["content"] = ""
    return document


# --- the answer --------------------------------------------------------------------------------------------------


def _field(value: Any, name: str) -> Any:
    """A field of an SDK object or a plain one: the SDK does not check what an endpoint sends."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _count(value: Any, name: str) -> int:
    number = _field(value, name)
    return number if isinstance(number, int) and not isinstance(number, bool) and number > 0 else 0


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, (list, tuple)) and values else None


class _Answer:
    """The pieces of one answer, whether they came in a stream or at once."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.joiner = TextJoiner()
        self.calls = ToolCallAccumulator()
        self.chars = 0
        self.refusal: list[str] = []
        self.reasoning: list[str] = []
        self.call_extras: dict[int, Any] = {}
        self.stop = ""
        self.usage: Any = None

    def take(self, chunk: Any, part: str) -> str:
        """The text that can be passed on of a chunk (``part`` = ``delta``) or whole answer (``part`` = ``message``)."""
        if isinstance(_field(chunk, "model"), str):
            self.model = _field(chunk, "model") or self.model
        if _field(chunk, "usage") is not None:
            self.usage = _field(chunk, "usage")
        choice = _first(_field(chunk, "choices"))
        if choice is None:
            return ""
        delta = _field(choice, part)
        text = _field(delta, "content")
        text = self.joiner.feed(text) if isinstance(text, str) else ""
        for name, target in (("refusal", self.refusal), ("reasoning_content", self.reasoning)):
            piece = _field(delta, name)
            if isinstance(piece, str):
                target.append(piece)
                self.chars += len(piece)
        calls = _field(delta, "tool_calls")
        for position, call in enumerate(calls if isinstance(calls, (list, tuple)) else ()):
            function = _field(call, "function")
            index = position if part == "message" else _field(call, "index")
            arguments = _field(function, "arguments")
            self.chars += len(arguments) if isinstance(arguments, str) else 0
            self.calls.feed(index, _field(call, "id"), _field(function, "name"), arguments)
            if _field(call, "extra_content") is not None and isinstance(index, int):
                self.call_extras[index] = _field(call, "extra_content")
        stop = _field(choice, "finish_reason")
        if isinstance(stop, str) and stop:
            self.stop = stop
        self.chars += len(text)
        return text

    def tool_uses(self) -> tuple[ToolUse, ...]:
        return self.calls.finish(cut=self.stop == "length")

    def finished(self, uses: tuple[ToolUse, ...]) -> Finished:
        refusal = clean("".join(self.refusal)).strip()
        reason = _STOP_REASONS.get(self.stop, END)
        if refusal:
            reason = REFUSAL
        elif uses and reason == END:
            reason = TOOL_USE  # several servers say "stop" after a tool call
        elif reason == TOOL_USE and not uses:
            reason = END
        echo: JsonObject = {}
        if self.reasoning:
            echo["reasoning_content"] = clean("".join(self.reasoning))
        extras = {uses[index].id: extra for index, extra in self.call_extras.items() if index < len(uses)}
        if extras:
            echo["tool_calls"] = extras
        return Finished(reason, self.model, refusal, {"openai": echo} if echo else None)

    def counted(self, request: Request) -> Usage:
        if self.usage is None or not _count(self.usage, "prompt_tokens"):
            return Usage(
                input_tokens=tokens.of_request(request),
                output_tokens=max(1, round(self.chars / tokens.CHARS_PER_TOKEN)),
                estimated=True,
            )
        prompt, answer = (_field(self.usage, "prompt_tokens_details"), _field(self.usage, "completion_tokens_details"))
        total = _count(self.usage, "prompt_tokens")
        cached = min(total, _count(prompt, "cached_tokens"))
        return Usage(
            input_tokens=total,
            output_tokens=_count(self.usage, "completion_tokens"),
            cached_tokens=cached,
            cache_write_tokens=min(total - cached, _count(prompt, "cache_write_tokens")),
            reasoning_tokens=_count(answer, "reasoning_tokens"),
        )


def local_address(base_url: str) -> bool:
    """Whether ``base_url`` is on this machine (a proxy of the environment must not be asked for it)."""
    host = urllib.parse.urlsplit(base_url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class OpenAIModel:
    """A model behind a chat-completions endpoint.

    ``name``: as the endpoint knows it; ``base_url``: up to and with ``/v1``; ``key``: ``None`` for endpoints without
    one; ``context_tokens``: its window; ``price``: US dollars of a usage or ``None`` for unknown.
    """

    provider = "openai"

    def __init__(
        self,
        name: str,
        *,
        base_url: str = OFFICIAL_URL,
        key: Secret | None = None,
        context_tokens: int = 128_000,
        timeouts: Timeouts | None = None,
        retries: Retries | None = None,
        price: Pricer | None = None,
    ) -> None:
        self.name = name
        self.base_url = base_url
        self.context_tokens = context_tokens
        self._key = key
        self._timeouts = timeouts or Timeouts()
        self._retries = retries or Retries()
        self._price = price
        self._shape = first_shape(base_url)
        self._client: Any = None

    def __repr__(self) -> str:
        return f"OpenAIModel({self.name!r}, base_url={self.base_url!r})"

    def infer(self, request: Request) -> AsyncGenerator[Event, None]:
        """See ``Model``. Raises an ``InferenceError``."""
        return attempts(lambda: self._attempt(request), self._timeouts, self._retries)

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _sdk(self) -> Any:
        if self._client is None:
            import httpx2
            import openai

            timeout = httpx2.Timeout(None, connect=self._timeouts.connect)
            self._client = openai.AsyncOpenAI(
                # the SDK refuses to start without a key; endpoints that need none ignore it
                api_key=self._key.reveal() if self._key else "none",
                base_url=self.base_url,
                max_retries=0,
                timeout=timeout,
                http_client=httpx2.AsyncClient(
                    timeout=timeout, follow_redirects=False, trust_env=not local_address(self.base_url)
                ),
            )
        return self._client

    async def _attempt(self, request: Request) -> AsyncGenerator[Event, None]:
        answer = _Answer(self.name)
        streaming = False
        try:
            while True:
                shape = self._shape
                try:
                    opened = await self._open(to_wire(request, self.name, shape), shape)
                    break
                except Exception as error:
                    changed = self._changed(shape, error)
                    if changed is None:
                        raise
                    self._shape, what = changed
                yield Notice(f"the endpoint refused a part of the request and was {what}")
            streaming = shape.stream
            if shape.stream and _is_document(opened):
                opened, shape = (await _document(opened), dataclasses.replace(shape, stream=False))
            if shape.stream:
                async with contextlib.aclosing(_iterate(opened)) as chunks:
                    async for chunk in chunks:
                        text = answer.take(chunk, "delta")
                        if text:
                            yield TextDelta(text)
            else:
                text = answer.take(opened, "message")
                if text:
                    yield TextDelta(text)
        except Exception as error:
            raise self._mapped(error, streaming) from error
        if not answer.stop:
            raise StreamCut(
                f"the answer of openai model {self.name!r} at {self.base_url} stopped without a finish reason: it was "
                "cut off and nothing of it is acted on; asking again may help",
                provider=self.provider,
                model=self.name,
            )
        rest = answer.joiner.rest()
        if rest:
            yield TextDelta(rest)
        uses = answer.tool_uses()
        for use in uses:
            yield use
        usage = answer.counted(request)
        yield dataclasses.replace(usage, cost_usd=self._price(usage) if self._price else None)
        yield answer.finished(uses)

    async def _open(self, body: JsonObject, shape: Shape) -> Any:
        """A stream, or the whole answer where the endpoint does not stream."""
        completions = self._sdk().chat.completions
        if not shape.stream:
            return await completions.create(**body)
        if shape.usage_in_stream:
            body["stream_options"] = {"include_usage": True}
        return await completions.create(**body, stream=True)

    def _changed(self, shape: Shape, error: Exception) -> tuple[Shape, str] | None:
        if getattr(error, "status_code", None) not in (400, 422):
            return None
        _, message = error_fields(getattr(error, "body", None))
        return reshaped(shape, str(getattr(error, "param", None) or ""), message or str(error))

    def _mapped(self, error: Exception, streaming: bool) -> Exception:
        """The SDK's exception as one of ours; what is not the endpoint's doing stays what it is."""
        import httpx2
        import openai

        who: dict[str, Any] = {"provider": self.provider, "model": self.name}
        if isinstance(error, InferenceError):
            return error
        if isinstance(error, openai.APITimeoutError):
            return ModelTimeout(
                f"no connection to {self.base_url} within {self._timeouts.connect:g} s; check the address and that the "
                "endpoint runs",
                phase="connect",
                seconds=self._timeouts.connect,
                **who,
            )
        if isinstance(error, (openai.APIConnectionError, httpx2.TransportError)):
            cause = error.__cause__ or error
            if streaming:
                return StreamCut(
                    f"the connection to openai model {self.name!r} at {self.base_url} broke inside the answer: "
                    f"{type(cause).__name__} {self._scrub(str(cause))!r}; nothing of it is acted on, asking again may "
                    "help",
                    **who,
                )
            return ModelUnavailable(
                f"asked openai model {self.name!r} at {self.base_url}, the connection failed: "
                f"{type(cause).__name__} {self._scrub(str(cause))!r}; check the address and that the endpoint runs",
                **who,
            )
        if isinstance(error, openai.APIError):
            code, message = error_fields(error.body)
            response = getattr(error, "response", None)
            status = getattr(error, "status_code", None)
            return error_for(
                status,
                code,
                self._scrub(message or error.message),
                response.headers if response is not None else {},
                time.time(),
                request_id=str(getattr(error, "request_id", None) or ""),
                **who,
            )
        if isinstance(error, openai.OpenAIError):
            return RequestRefused(
                f"asked openai model {self.name!r} at {self.base_url}, its SDK refused: {type(error).__name__} "
                f"{self._scrub(str(error))!r}; check the model's settings",
                **who,
            )
        if isinstance(error, (ValueError, TypeError, AttributeError, KeyError, RecursionError)):
            return BadAnswer(
                f"the answer of openai model {self.name!r} at {self.base_url} is not a chat completion: "
                f"{type(error).__name__} {self._scrub(str(error))!r}; check that the base URL is that of an "
                "OpenAI-compatible API",
                raw=self._scrub(str(getattr(error, "doc", ""))),
                **who,
            )
        return error

    def _scrub(self, text: str) -> str:
        return self._key.scrub(text) if self._key else text


def _is_document(stream: Any) -> bool:
    """Whether an endpoint that was asked for a stream sent the whole answer as one document instead."""
    return str(stream.response.headers.get("content-type", "")).partition(";")[0].strip() == "application/json"


async def _document(stream: Any) -> Any:
    try:
        return json.loads(await stream.response.aread())
    finally:
        await stream.close()


async def _iterate(stream: Any) -> AsyncGenerator[Any, None]:
    """The chunks of an SDK stream, closed whatever happens."""
    try:
        async for chunk in stream:
            yield chunk
    finally:
        await stream.close()
