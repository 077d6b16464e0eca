"""The ``anthropic`` provider: the Messages API.

Owns: the mapping between the protocol and Messages streams.
Deliberately does not know: why it was chosen, limits of a task, what the tools do. The SDK is imported on first use.

The SDK's retries are off (``inference.attempts`` says why), as is its own telemetry: spans are made at the centre. No
redirect is followed: the key stands in a header that redirects would carry to another host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator
from typing import Any

from inference import tokens
from inference.accumulate import TextJoiner
from inference.attempts import Retries, Timeouts, attempts
from inference.cost import Pricer
from inference.errors import BadAnswer, InferenceError, ModelTimeout, ModelUnavailable, RequestRefused, StreamCut
from inference.http_errors import error_fields, error_for
from inference.keys import Secret
from inference.openai_model import local_address
from inference.protocol import (
    ARGUMENTS_CHARS,
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

OFFICIAL_URL = "https://api.anthropic.com"
_STOP_REASONS = {
    "end_turn": END, "stop_sequence": END, "pause_turn": END, "tool_use": TOOL_USE, "max_tokens": LENGTH,
    "model_context_window_exceeded": LENGTH, "refusal": REFUSAL,
}  # fmt: skip
_KEPT_BLOCKS = ("thinking", "redacted_thinking")


def to_wire(request: Request, model: str) -> JsonObject:
    """The body of a Messages request, without ``stream``. Neighbours of the same role become one message: the API
    wants all results of a turn in the one message after it."""
    messages: list[JsonObject] = []
    for message in request.messages:
        role, blocks = _blocks(message)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"].extend(blocks)
        elif blocks:
            messages.append({"role": role, "content": blocks})
    body: JsonObject = {"model": model, "max_tokens": request.max_tokens, "messages": messages}
    if request.system:
        body["system"] = clean(request.system)
    if request.tools:
        body["tools"] = [
            {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}
            for tool in request.tools
        ]
    if request.stop:
        body["stop_sequences"] = list(request.stop)
    return body


def _blocks(message: Message) -> tuple[str, list[JsonObject]]:
    text = clean(message.text)
    if isinstance(message, ToolResult):
        result: JsonObject = {"type": "tool_result", "tool_use_id": message.tool_use_id, "content": text or "(empty)"}
        if message.is_error:
            result["is_error"] = True
        return "user", [result]
    # the API refuses empty text blocks
    blocks: list[JsonObject] = [{"type": "text", "text": text}] if text.strip() else []
    if not isinstance(message, AssistantMessage):
        return "user", blocks or [{"type": "text", "text": "(empty)"}]
    uses = [
        {"type": "tool_use", "id": use.id, "name": use.name or "unknown", "input": use.arguments_to_send()}
        for use in message.tool_uses
    ]
    return "assistant", [*(message.echo or {}).get("anthropic", []), *blocks, *uses]


@dataclasses.dataclass(slots=True)
class _Block:
    kind: str
    id: str = ""
    name: str = ""
    pieces: list[str] = dataclasses.field(default_factory=list)
    chars: int = 0
    done: bool = False
    kept: JsonObject = dataclasses.field(default_factory=dict)


class _Answer:
    """The events of one Messages stream, put together."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.joiner = TextJoiner()
        self.blocks: dict[int, _Block] = {}
        self.stop = ""
        self.detail = ""
        self.ended = False
        self.usage: dict[str, int] = {}
        self.chars = 0

    def take(self, event: Any) -> str:
        """The text that can be passed on."""
        kind = event.type
        if kind == "message_start":
            self.model = event.message.model or self.model
            self._count(event.message.usage)
        elif kind == "content_block_start":
            self._start(event.index, event.content_block)
        elif kind == "content_block_delta":
            return self._delta(self.blocks[event.index], event.delta)
        elif kind == "content_block_stop":
            self.blocks[event.index].done = True
        elif kind == "message_delta":
            self.stop = event.delta.stop_reason or self.stop
            details = getattr(event.delta, "stop_details", None)
            if details is not None:
                self.detail = str(getattr(details, "explanation", None) or getattr(details, "category", None) or "")
            self._count(getattr(event, "usage", None))
        elif kind == "message_stop":
            self.ended = True
        return ""

    def _count(self, usage: Any) -> None:
        for name in ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
            number = getattr(usage, name, None)
            if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
                self.usage[name] = number  # counts of a stream are cumulative
        thinking = getattr(getattr(usage, "output_tokens_details", None), "thinking_tokens", None)
        if isinstance(thinking, int):
            self.usage["thinking"] = thinking

    def _start(self, index: int, block: Any) -> None:
        found = self.blocks[index] = _Block(block.type)
        if block.type == "tool_use":
            found.id, found.name = str(block.id or ""), str(block.name or "")
        elif block.type in _KEPT_BLOCKS:
            found.kept = block.model_dump(exclude_none=True)

    def _delta(self, block: _Block, delta: Any) -> str:
        if delta.type == "text_delta":
            text = self.joiner.feed(delta.text)
            self.chars += len(text)
            return text
        if delta.type == "input_json_delta":
            if block.chars <= ARGUMENTS_CHARS:
                block.pieces.append(delta.partial_json)
            block.chars += len(delta.partial_json)
            self.chars += len(delta.partial_json)
        elif delta.type == "thinking_delta":
            block.kept["thinking"] = block.kept.get("thinking", "") + delta.thinking
            self.chars += len(delta.thinking)
        elif delta.type == "signature_delta":
            block.kept["signature"] = delta.signature
        return ""

    def tool_uses(self) -> tuple[ToolUse, ...]:
        calls = [(index, block) for index, block in sorted(self.blocks.items()) if block.kind == "tool_use"]
        last = max(self.blocks, default=-1)
        uses: list[ToolUse] = []
        taken: set[str] = set()
        for position, (index, block) in enumerate(calls):
            use_id, number = block.id, position
            while not use_id or use_id in taken:
                use_id, number = f"toolu_{number}", number + 1
            taken.add(use_id)
            cut = not block.done or (self.stop in ("max_tokens", "model_context_window_exceeded") and index == last)
            uses.append(ToolUse.read(use_id, clean(block.name), "".join(block.pieces), cut))
        return tuple(uses)

    def finished(self, uses: tuple[ToolUse, ...]) -> Finished:
        reason = _STOP_REASONS.get(self.stop, END)
        if uses and reason == END:
            reason = TOOL_USE
        elif reason == TOOL_USE and not uses:
            reason = END
        kept = [block.kept for _, block in sorted(self.blocks.items()) if block.kept]
        return Finished(reason, self.model, self.detail, {"anthropic": kept} if kept else None)

    def counted(self, request: Request) -> Usage:
        cached = self.usage.get("cache_read_input_tokens", 0)
        written = self.usage.get("cache_creation_input_tokens", 0)
        total = self.usage.get("input_tokens", 0) + cached + written
        if not total:
            return Usage(
                input_tokens=tokens.of_request(request),
                output_tokens=max(1, round(self.chars / tokens.CHARS_PER_TOKEN)),
                estimated=True,
            )
        return Usage(total, self.usage.get("output_tokens", 0), cached, written, self.usage.get("thinking", 0))


class AnthropicModel:
    """A model behind the Messages API.

    ``name``: as the API knows it; ``key``: what the reference resolved to; ``context_tokens``: its window; ``price``:
    US dollars of a usage or ``None`` for unknown.
    """

    provider = "anthropic"

    def __init__(
        self,
        name: str,
        *,
        key: Secret,
        base_url: str = OFFICIAL_URL,
        context_tokens: int = 200_000,
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
        self._temperature = True
        self._client: Any = None

    def __repr__(self) -> str:
        return f"AnthropicModel({self.name!r}, base_url={self.base_url!r})"

    def infer(self, request: Request) -> AsyncGenerator[Event, None]:
        """See ``Model``. Raises an ``InferenceError``."""
        return attempts(lambda: self._attempt(request), self._timeouts, self._retries)

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _sdk(self) -> Any:
        if self._client is None:
            import anthropic
            import httpx2

            timeout = httpx2.Timeout(None, connect=self._timeouts.connect)
            self._client = anthropic.AsyncAnthropic(
                api_key=self._key.reveal(),
                base_url=self.base_url,
                max_retries=0,
                timeout=timeout,
                open_telemetry=False,
                http_client=httpx2.AsyncClient(
                    timeout=timeout, follow_redirects=False, trust_env=not local_address(self.base_url)
                ),
            )
        return self._client

    async def _attempt(self, request: Request) -> AsyncGenerator[Event, None]:
        answer = _Answer(self.name)
        streaming = False
        try:
            body = to_wire(request, self.name)
            messages = self._sdk().messages
            while True:
                extra = {}
                if request.temperature is not None and self._temperature:
                    # no parameter of this SDK any more, but the older models still take it
                    extra["temperature"] = request.temperature
                try:
                    stream = await messages.create(**body, stream=True, extra_body=extra or None)
                    break
                except Exception as error:
                    if not extra or getattr(error, "status_code", None) != 400 or "temperature" not in str(error):
                        raise
                    self._temperature = False
                yield Notice("the endpoint refused the temperature and was asked again without it")
            streaming = True
            async with contextlib.aclosing(_iterate(stream)) as events:
                async for event in events:
                    text = answer.take(event)
                    if text:
                        yield TextDelta(text)
                    if answer.ended:
                        break
        except Exception as error:
            raise self._mapped(error, streaming) from error
        if not answer.ended or not answer.stop:
            raise StreamCut(
                f"the answer of anthropic model {self.name!r} stopped before its end: it was cut off and nothing of it "
                "is acted on; asking again may help",
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

    def _mapped(self, error: Exception, streaming: bool) -> Exception:
        """The SDK's exception as one of ours; what is not the endpoint's doing stays what it is."""
        import anthropic
        import httpx2

        who: dict[str, Any] = {"provider": self.provider, "model": self.name}
        if isinstance(error, InferenceError):
            return error
        if isinstance(error, (anthropic.APITimeoutError, httpx2.TimeoutException)):
            return ModelTimeout(
                f"no connection to {self.base_url} within {self._timeouts.connect:g} s; check the address and the "
                "network",
                phase="connect",
                seconds=self._timeouts.connect,
                **who,
            )
        if isinstance(error, (anthropic.APIConnectionError, httpx2.TransportError)):
            cause = error.__cause__ or error
            if streaming:
                return StreamCut(
                    f"the connection to anthropic model {self.name!r} broke inside the answer: {type(cause).__name__} "
                    f"{self._key.scrub(str(cause))!r}; nothing of it is acted on, asking again may help",
                    **who,
                )
            return ModelUnavailable(
                f"asked anthropic model {self.name!r} at {self.base_url}, the connection failed: "
                f"{type(cause).__name__} {self._key.scrub(str(cause))!r}; check the address and the network",
                **who,
            )
        if isinstance(error, anthropic.APIError):
            code, message = error_fields(error.body)
            response = getattr(error, "response", None)
            status = getattr(error, "status_code", None)
            return error_for(
                # an error event arrives inside a stream that began with 200
                None if status == 200 else status,
                code,
                self._key.scrub(message or error.message),
                response.headers if response is not None else {},
                time.time(),
                request_id=str(getattr(error, "request_id", None) or ""),
                **who,
            )
        if isinstance(error, anthropic.AnthropicError):
            return RequestRefused(
                f"asked anthropic model {self.name!r} at {self.base_url}, its SDK refused: {type(error).__name__} "
                f"{self._key.scrub(str(error))!r}; check the model's settings",
                **who,
            )
        if isinstance(error, (ValueError, TypeError, AttributeError, KeyError, RecursionError)):
            return BadAnswer(
                f"the answer of anthropic model {self.name!r} at {self.base_url} is not a Messages stream: "
                f"{type(error).__name__} {self._key.scrub(str(error))!r}; check the base URL",
                raw=self._key.scrub(str(getattr(error, "doc", ""))),
                **who,
            )
        return error


async def _iterate(stream: Any) -> AsyncGenerator[Any, None]:
    """The events of an SDK stream, closed whatever happens."""
    try:
        async for event in stream:
            yield event
    finally:
        await stream.close()
