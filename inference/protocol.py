"""What is said to a model and what it says back: one request, one stream of events.

Owns: the messages, the events, their JSON form (they cross the line between worker and gateway), how tool-call
arguments are read, and the ``Model`` protocol every provider implements.
Deliberately does not know: any SDK, any wire format of a provider, tools and their effects, limits of a task.

The order of a stream: any number of ``Notice`` and ``TextDelta``, then ``ToolUse`` …, at most one ``Usage``, and
exactly one ``Finished`` as the last event. A stream that ends without ``Finished`` was cut: nothing of it may be acted
on. Providers hold tool uses back until they have seen the answer's end, so a half tool call never leaves them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from tools.values import Evidence, JsonObject, Malformed, ToolCall, digest, want, want_strings

ARGUMENTS_CHARS = 262_144  # longest tool-call arguments read, characters: a `write` is capped far below this

END = "end"
TOOL_USE = "tool_use"
LENGTH = "length"
REFUSAL = "refusal"
CONTENT_FILTER = "content_filter"
STOP_REASONS = (END, TOOL_USE, LENGTH, REFUSAL, CONTENT_FILTER)


def clean(text: str) -> str:
    """``text`` as valid Unicode: surrogate pairs joined, lone surrogates replaced.

    Escaped output of commands and answers cut between two halves of a character both hold lone surrogates, which
    no provider's JSON accepts.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@dataclasses.dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as a model is told about it. ``parameters``: a JSON schema of an object."""

    name: str
    description: str
    parameters: JsonObject

    def to_json(self) -> JsonObject:
        return {"name": self.name, "description": self.description, "parameters": self.parameters}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ToolSpec:
        return cls(want(document, "name", str), want(document, "description", str), want(document, "parameters", dict))


# --- tool uses ---------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    found: JsonObject = {}
    for name, value in pairs:
        if name in found:
            # two readers may take different ones of the two: what was judged would not be what is meant
            raise ValueError(f"the name {name!r} occurs twice in one object")
        found[name] = value
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def read_arguments(raw: str) -> tuple[JsonObject | None, str]:
    """Tool-call arguments as a model wrote them.

    ``raw``: the text, empty for a call without arguments. Returns ``(arguments, "")`` or ``(None, problem)`` with one
    sentence for the model. Strict: one JSON object, no name twice, no NaN, valid Unicode, bounded.
    """
    if not raw.strip():
        return {}, ""
    if len(raw) > ARGUMENTS_CHARS:
        return (None, f"the arguments are {len(raw)} characters long, at most {ARGUMENTS_CHARS} are read")
    try:
        value = json.loads(raw, object_pairs_hook=_object, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return None, "the arguments hold half of a surrogate pair: send valid Unicode"
    except RecursionError:
        return None, "the arguments are nested too deeply"
    except ValueError as error:
        return None, f"the arguments are not valid JSON: {error}"
    if not isinstance(value, dict):
        return (None, f"the arguments must be one JSON object, got {type(value).__name__}")
    return value, ""


@dataclasses.dataclass(frozen=True, slots=True)
class ToolUse:
    """A tool call as the model asks for it. ``id`` is the provider's id of it (not the ``call_id`` of the run).

    ``arguments`` is ``None`` when what the model wrote cannot be read; then ``raw`` holds its text and ``problem``
    says what is wrong: the loop answers it to the model and executes nothing.
    """

    id: str
    name: str
    arguments: JsonObject | None
    raw: str = ""
    problem: str = ""

    @classmethod
    def read(cls, use_id: str, name: str, raw: str, cut: bool = False) -> ToolUse:
        """From the text of the arguments; ``cut``: the answer ended inside this call, so it is never executed."""
        raw = clean(raw)
        if cut:
            return cls(use_id, name, None, raw[:ARGUMENTS_CHARS], "the answer reached its token limit inside this call")
        arguments, problem = read_arguments(raw)
        return cls(use_id, name, arguments, "" if arguments is not None else raw[:ARGUMENTS_CHARS], problem)

    @property
    def malformed(self) -> bool:
        return self.arguments is None

    def arguments_to_send(self) -> JsonObject:
        """Valid arguments for the conversation's history: endpoints parse them again and fail on broken JSON."""
        return self.arguments if self.arguments is not None else {"malformed": self.raw[:2000]}

    def to_json(self) -> JsonObject:
        return {
            "id": self.id, "name": self.name, "arguments": self.arguments, "raw": self.raw, "problem": self.problem,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ToolUse:
        return cls(
            want(document, "id", str), want(document, "name", str), want(document, "arguments", (dict, type(None))),
            want(document, "raw", str, ""), want(document, "problem", str, ""),
        )  # fmt: skip


# --- messages ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class UserMessage:
    text: str

    def to_json(self, with_records: bool = True) -> JsonObject:
        return {"role": "user", "text": self.text}


@dataclasses.dataclass(frozen=True, slots=True)
class AssistantMessage:
    """What the model said. ``echo``: what its provider wants back unread with the next request (signed reasoning and
    the like), by provider name."""

    text: str
    tool_uses: tuple[ToolUse, ...] = ()
    echo: JsonObject | None = None

    def to_json(self, with_records: bool = True) -> JsonObject:
        return {
            "role": "assistant", "text": self.text, "tool_uses": [use.to_json() for use in self.tool_uses],
            "echo": self.echo,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class CallRecord:
    """The machine form of what came of a tool use, for a model that is no language model.

    ``refused``: the gate, or the loop itself, did not let it run; then ``evidence`` is ``None`` and ``reason`` says why.
    """

    call: ToolCall
    evidence: Evidence | None
    refused: bool
    reason: str = ""

    def to_json(self) -> JsonObject:
        return {
            "call": self.call.to_json(), "evidence": None if self.evidence is None else self.evidence.to_json(),
            "refused": self.refused, "reason": self.reason,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> CallRecord:
        evidence = want(document, "evidence", (dict, type(None)))
        return cls(
            ToolCall.from_json(want(document, "call", dict)),
            None if evidence is None else Evidence.from_json(evidence),
            want(document, "refused", bool), want(document, "reason", str, ""),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class ToolResult:
    """The answer to one tool use. ``text`` is what a language model reads; ``record`` never goes to one."""

    tool_use_id: str
    text: str
    is_error: bool = False
    record: CallRecord | None = None

    def to_json(self, with_records: bool = True) -> JsonObject:
        document: JsonObject = {
            "role": "tool", "tool_use_id": self.tool_use_id, "text": self.text, "is_error": self.is_error,
        }  # fmt: skip
        if with_records and self.record is not None:
            document["record"] = self.record.to_json()
        return document


Message: TypeAlias = UserMessage | AssistantMessage | ToolResult


def message_from_json(document: Mapping[str, Any]) -> Message:
    """Raises ``Malformed`` naming the field, what was expected and what came."""
    if not isinstance(document, Mapping):
        raise Malformed(f"a message must be an object, got {document!r:.80}")
    role = want(document, "role", str)
    if role == "user":
        return UserMessage(want(document, "text", str))
    if role == "assistant":
        uses = [ToolUse.from_json(_mapping(use, "tool_uses")) for use in want(document, "tool_uses", list, [])]
        return AssistantMessage(
            want(document, "text", str), tuple(uses), want(document, "echo", (dict, type(None)), None)
        )
    if role == "tool":
        record = want(document, "record", (dict, type(None)), None)
        return ToolResult(
            want(document, "tool_use_id", str), want(document, "text", str), want(document, "is_error", bool, False),
            None if record is None else CallRecord.from_json(record),
        )  # fmt: skip
    raise Malformed(f"field 'role' must be user, assistant or tool, got {role!r:.80}")


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Malformed(f"field {name!r} must hold objects, got {type(value).__name__} {value!r:.80}")
    return value


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One inference. ``max_tokens``: most tokens of the answer; ``temperature`` ``None``: the provider's default;
    ``metadata``: for accounting (``run_id``, ``inference_id``…), never sent to a provider."""

    system: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    max_tokens: int = 4096
    temperature: float | None = None
    stop: tuple[str, ...] = ()
    metadata: JsonObject = dataclasses.field(default_factory=dict)

    def to_json(self, with_records: bool = True) -> JsonObject:
        """``with_records=False`` leaves out the machine form of tool results: a language model never reads it."""
        return {
            "system": self.system, "messages": [message.to_json(with_records) for message in self.messages],
            "tools": [tool.to_json() for tool in self.tools], "max_tokens": self.max_tokens,
            "temperature": self.temperature, "stop": list(self.stop), "metadata": self.metadata,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Request:
        """Raises ``Malformed``."""
        max_tokens = want(document, "max_tokens", int)
        if max_tokens < 1:
            raise Malformed(f"field 'max_tokens' must be at least 1, got {max_tokens!r}")
        temperature = want(document, "temperature", (int, float, type(None)), None)
        return cls(
            want(document, "system", str),
            tuple(message_from_json(message) for message in want(document, "messages", list)),
            tuple(ToolSpec.from_json(_mapping(tool, "tools")) for tool in want(document, "tools", list, [])),
            max_tokens,
            None if temperature is None else float(temperature),
            want_strings(document, "stop", ()),
            want(document, "metadata", dict, {}),
        )

    @property
    def prompt_digest(self) -> str:
        """Digest of all that a language model reads; worker and gateway get the same one from the same request."""
        return digest({
            "system": self.system, "messages": [message.to_json(False) for message in self.messages],
            "tools": [tool.to_json() for tool in self.tools],
        })  # fmt: skip


# --- events ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of text as it comes."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Notice:
    """Something the operator should know about how the answer was got (a retry, a parameter an endpoint refused)."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What an inference took.

    ``input_tokens`` counts the whole prompt, ``cached_tokens`` (read from a cache) and ``cache_write_tokens`` of it;
    ``output_tokens`` counts the whole answer, ``reasoning_tokens`` of it. ``cost_usd``: US dollars, ``None`` where it
    is not known (never 0 for that). ``estimated``: the endpoint sent no usage and the counts are Chargehand's estimate.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: float | None = None
    estimated: bool = False

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def to_json(self) -> JsonObject:
        return {
            "input_tokens": self.input_tokens, "output_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens, "cache_write_tokens": self.cache_write_tokens,
            "reasoning_tokens": self.reasoning_tokens, "cost_usd": self.cost_usd, "estimated": self.estimated,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Usage:
        counts = {}
        for name in ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens"):
            counts[name] = want(document, name, int, 0)
            if counts[name] < 0:
                raise Malformed(f"field {name!r} must not be negative, got {counts[name]!r}")
        cost = want(document, "cost_usd", (int, float, type(None)), None)
        return cls(
            **counts, cost_usd=None if cost is None else float(cost), estimated=want(document, "estimated", bool, False)
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer. ``stop_reason`` is one of ``STOP_REASONS``; ``model``: the name the endpoint gave;
    ``detail``: what a refusal said; ``echo``: see ``AssistantMessage``."""

    stop_reason: str
    model: str = ""
    detail: str = ""
    echo: JsonObject | None = None


Event: TypeAlias = TextDelta | Notice | ToolUse | Usage | Finished


def event_to_json(event: Event) -> JsonObject:
    """``{"type": …, fields…}``."""
    if isinstance(event, TextDelta):
        return {"type": "text", "text": event.text}
    if isinstance(event, Notice):
        return {"type": "notice", "text": event.text}
    if isinstance(event, ToolUse):
        return {"type": "tool_use", **event.to_json()}
    if isinstance(event, Usage):
        return {"type": "usage", **event.to_json()}
    return {
        "type": "finished", "stop_reason": event.stop_reason, "model": event.model, "detail": event.detail,
        "echo": event.echo,
    }  # fmt: skip


def event_from_json(document: Mapping[str, Any]) -> Event:
    """Raises ``Malformed``."""
    if not isinstance(document, Mapping):
        raise Malformed(f"an event must be an object, got {document!r:.80}")
    kind = want(document, "type", str)
    if kind == "text":
        return TextDelta(want(document, "text", str))
    if kind == "notice":
        return Notice(want(document, "text", str))
    if kind == "tool_use":
        return ToolUse.from_json(document)
    if kind == "usage":
        return Usage.from_json(document)
    if kind == "finished":
        stop_reason = want(document, "stop_reason", str)
        if stop_reason not in STOP_REASONS:
            raise Malformed(f"field 'stop_reason' must be one of {', '.join(STOP_REASONS)}, got {stop_reason!r:.80}")
        return Finished(
            stop_reason, want(document, "model", str, ""), want(document, "detail", str, ""),
            want(document, "echo", (dict, type(None)), None),
        )  # fmt: skip
    raise Malformed(f"field 'type' must be text, notice, tool_use, usage or finished, got {kind!r:.80}")


class Completion:
    """The events of one answer, put together."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.tool_uses: list[ToolUse] = []
        self.usage: Usage | None = None
        self.finished: Finished | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._texts.append(event.text)
        elif isinstance(event, ToolUse):
            self.tool_uses.append(event)
        elif isinstance(event, Usage):
            self.usage = event
        elif isinstance(event, Finished):
            self.finished = event

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def digest(self) -> str:
        """Digest of what was said: text and tool uses."""
        return digest({"text": self.text, "tool_uses": [use.to_json() for use in self.tool_uses]})

    def message(self) -> AssistantMessage:
        return AssistantMessage(self.text, tuple(self.tool_uses), self.finished.echo if self.finished else None)


@runtime_checkable
class Model(Protocol):
    """A language model, or what stands in for one.

    ``name`` and ``provider`` identify it in events and audit records; ``context_tokens`` is its window, prompt and
    answer together.
    """

    @property
    def name(self) -> str: ...

    @property
    def provider(self) -> str: ...

    @property
    def context_tokens(self) -> int: ...

    def infer(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of one answer; raises an ``InferenceError``. Closing the generator ends the inference."""
        ...

    async def aclose(self) -> None:
        """Let go of connections. The model cannot be used afterwards."""
        ...
