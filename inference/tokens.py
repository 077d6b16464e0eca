"""How many tokens a text will take, without asking anybody.

Owns: the estimate and its direction: rather too many than too few.
Deliberately does not know: any tokenizer; a provider's own count, where there is one, corrects it (``context``).
"""

from __future__ import annotations

import json
import math

from inference.protocol import AssistantMessage, Completion, Message, Request, ToolSpec, Usage

CHARS_PER_TOKEN = 3.5  # logs and JSON take fewer characters per token than prose (about 4); low is the safe side
MESSAGE_TOKENS = 8  # role, separators and ids of one message in the usual chat templates
TOOL_TOKENS = 16  # wrapping of one tool definition


def of_text(text: str) -> int:
    """Tokens of ``text``; characters outside ASCII count as one token each, as byte-level tokenizers come close to."""
    if text.isascii():
        return math.ceil(len(text) / CHARS_PER_TOKEN)
    plain = sum(1 for character in text if character < "\x80")
    return math.ceil(plain / CHARS_PER_TOKEN) + len(text) - plain


def of_message(message: Message) -> int:
    tokens = MESSAGE_TOKENS + of_text(message.text)
    if isinstance(message, AssistantMessage):
        for use in message.tool_uses:
            tokens += MESSAGE_TOKENS + of_text(use.name) + of_text(json.dumps(use.arguments_to_send()))
        if message.echo is not None:
            tokens += of_text(json.dumps(message.echo))
    return tokens


def of_tool(tool: ToolSpec) -> int:
    return TOOL_TOKENS + of_text(tool.name) + of_text(tool.description) + of_text(json.dumps(tool.parameters))


def of_request(request: Request) -> int:
    """Tokens of everything a model reads of ``request``."""
    return (
        MESSAGE_TOKENS
        + of_text(request.system)
        + sum(of_message(message) for message in request.messages)
        + sum(of_tool(tool) for tool in request.tools)
    )


def estimated(request: Request, completion: Completion) -> Usage:
    """The usage of an answer whose provider did not send one; its cost is unknown."""
    said = of_text(completion.text) + sum(of_text(json.dumps(use.arguments_to_send())) for use in completion.tool_uses)
    return Usage(of_request(request), said, estimated=True)
