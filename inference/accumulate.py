"""Putting streamed pieces together: text cut between two halves of a character, tool calls in fragments.

Owns: the rules for fragments of chat-completions streams, as the official API and its many imitations send them.
Deliberately does not know: SDK types (it is fed plain values, whatever their type), when a stream is complete.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from inference.protocol import ARGUMENTS_CHARS, ToolUse, clean

TOOL_CALLS_PER_ANSWER = 64  # an answer with more is a stuck model; the rest is dropped and said to be malformed


class TextJoiner:
    """Text pieces in, valid text out: a high surrogate at the end of a piece waits for its other half."""

    def __init__(self) -> None:
        self._waiting = ""

    def feed(self, piece: str) -> str:
        text = self._waiting + piece
        self._waiting = ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._waiting = text[:-1], text[-1]
        return clean(text)

    def rest(self) -> str:
        text, self._waiting = self._waiting, ""
        return clean(text)


@dataclasses.dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    pieces: list[str] = dataclasses.field(default_factory=list)
    chars: int = 0


class ToolCallAccumulator:
    """Fragments of tool calls in, ``ToolUse`` values out, in the order in which the calls began."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._at_index: dict[int, _Call] = {}
        self._last: _Call | None = None

    def __bool__(self) -> bool:
        return bool(self._calls)

    def feed(self, index: Any, use_id: Any, name: Any, arguments: Any) -> None:
        """One fragment. ``index`` may be missing or always 0, ``use_id`` and ``name`` may come once or every time,
        ``arguments`` may be text or (from some endpoints) an object already."""
        call = self._call_for(index, use_id if isinstance(use_id, str) else "")
        if isinstance(use_id, str) and use_id:
            call.id = use_id
        if isinstance(name, str) and name and name != call.name and not call.chars:
            call.name += name
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments)
        if isinstance(arguments, str) and arguments:
            # the piece that crosses the limit is kept, so that reading says "too long"; memory stays bounded
            if call.chars <= ARGUMENTS_CHARS:
                call.pieces.append(arguments)
            call.chars += len(arguments)

    def _call_for(self, index: Any, use_id: str) -> _Call:
        if isinstance(index, int) and not isinstance(index, bool):
            call = self._at_index.get(index)
            # endpoints that send every call as index 0 tell calls apart by their ids only
            if call is None or (use_id and call.id and use_id != call.id):
                call = self._begin()
                self._at_index[index] = call
        elif self._last is None or (use_id and use_id != self._last.id):
            call = self._begin()
        else:
            call = self._last
        self._last = call
        return call

    def _begin(self) -> _Call:
        call = _Call()
        self._calls.append(call)
        return call

    def finish(self, cut: bool = False) -> tuple[ToolUse, ...]:
        """The calls. ``cut``: the answer ended at its token limit, so the last call is incomplete even if its text
        happens to be valid JSON (an empty text would be a call without arguments). Ids are unique and not empty."""
        uses: list[ToolUse] = []
        taken: set[str] = set()
        calls = self._calls[:TOOL_CALLS_PER_ANSWER]
        for position, call in enumerate(calls):
            use_id = call.id
            number = position
            while not use_id or use_id in taken:
                use_id = f"call_{number}"
                number += 1
            taken.add(use_id)
            last = position == len(self._calls) - 1
            uses.append(ToolUse.read(use_id, clean(call.name), "".join(call.pieces), cut and last))
        return tuple(uses)
