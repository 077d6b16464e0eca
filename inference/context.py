"""Fitting a conversation into a model's window.

Owns: how full the window may get, which tool results are shortened first, and that this is said in the text.
Deliberately does not know: tools, models, who is told (the loop emits a note for each shortening).

Order: the oldest turn first, in it the longest result first, the newest turn last. A shortened result keeps its first
lines (call id, exit status) and its end, then only its first line. Prompts and what the model said stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from inference import tokens
from inference.protocol import AssistantMessage, Message, ToolResult, ToolSpec

KEPT_CHARS = (1200, 240, 0)  # of a result in the first, second and last round, characters
MARGIN = 0.05  # of the window, for what the estimate does not see


@dataclasses.dataclass(frozen=True, slots=True)
class Shortening:
    """One result that was shortened: position in the messages, characters before and after."""

    position: int
    before: int
    after: int


@dataclasses.dataclass(frozen=True, slots=True)
class Fitted:
    """``messages`` as they may be sent; ``estimate``: their tokens; ``fits``: whether that is within the window."""

    messages: tuple[Message, ...]
    shortened: tuple[Shortening, ...]
    estimate: int
    fits: bool


def fit(
    system: str,
    tool_specs: Sequence[ToolSpec],
    messages: Sequence[Message],
    window: int,
    answer_tokens: int,
    factor: float = 1.0,
) -> Fitted:
    """``messages`` shortened until they fit.

    ``window``: tokens of prompt and answer together; ``answer_tokens``: kept free for the answer; ``factor``: what the
    provider counted last time over what was estimated, at least 1: the estimate is multiplied by it.
    """
    room = int(window * (1 - MARGIN)) - answer_tokens
    fixed = tokens.MESSAGE_TOKENS + tokens.of_text(system) + sum(tokens.of_tool(tool) for tool in tool_specs)
    factor = max(1.0, factor)
    current = list(messages)
    sizes = [tokens.of_message(message) for message in current]
    turns = _turns(current)
    done: dict[int, int] = {}

    def estimate() -> int:
        return math.ceil((fixed + sum(sizes)) * factor)

    newest = max(turns.values(), default=0)
    for kept in KEPT_CHARS:
        # the newest results are what the model is about to read: they are touched only when nothing else is left
        for only_newest in (False, True):
            candidates = sorted(
                (position for position, turn in turns.items() if (turn == newest) == only_newest),
                key=lambda position: (turns[position], -len(current[position].text)),
            )
            for position in candidates:
                if estimate() <= room:
                    break
                message = current[position]
                text = _shorter(message.text, kept)
                if isinstance(message, ToolResult) and len(text) < len(message.text):
                    done.setdefault(position, len(message.text))
                    current[position] = dataclasses.replace(message, text=text)
                    sizes[position] = tokens.of_message(current[position])
    shortenings = tuple(
        Shortening(position, before, len(current[position].text)) for position, before in sorted(done.items())
    )
    return Fitted(tuple(current), shortenings, estimate(), estimate() <= room)


def _turns(messages: Sequence[Message]) -> dict[int, int]:
    """The turn of each tool result by its position."""
    turns: dict[int, int] = {}
    turn = 0
    for position, message in enumerate(messages):
        if isinstance(message, AssistantMessage):
            turn += 1
        elif isinstance(message, ToolResult):
            turns[position] = turn
    return turns


def _shorter(text: str, kept: int) -> str:
    first, _, rest = text.partition("\n")
    if kept:
        if len(rest) <= kept:
            return text
        head, tail = kept * 2 // 3, kept - kept * 2 // 3
        gone = len(rest) - kept
        return (
            f"{first}\n{rest[:head]}\n[shortened by Chargehand: {gone} characters left out here to fit the model's window]\n"
            f"{rest[-tail:]}"
        )
    if not rest:
        return text
    return f"{first}\n[shortened by Chargehand: the output was left out to fit the model's window; ask again if needed]"
