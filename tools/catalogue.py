"""The tools as models are told about them: names, descriptions, parameters as JSON schemas.

Owns: the words. Deliberately does not know: what the policy of a machine allows; the gate says that, call by call.
"""

from __future__ import annotations

import dataclasses
from typing import List, Mapping

from tools.observers.observer import Observer
from tools.values import JsonObject


@dataclasses.dataclass(frozen=True)
class Tool:
    """One tool. ``parameters``: a JSON schema of an object."""

    name: str
    description: str
    parameters: JsonObject


def _object(properties: JsonObject, required: List[str]) -> JsonObject:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


EXEC = Tool(
    "exec",
    "Run one program on the machine, without a shell. Give either `argv` (the program's name and its arguments, one "
    "string each) or `command` (words, quotes and pipes only: no ;, &, >, <, $, backquote or newline). Only what the "
    "machine's policy names is allowed; a refusal says which rule it was and what would be allowed instead. "
    "Prefer the typed tools where one fits.",
    _object(
        {
            "argv": {
                "type": "array",
                "items": {"type": "string"},
                "minItems": 1,
                "description": 'For example ["journalctl", "-u", "nginx", "-n", "100"].',
            },
            "command": {"type": "string", "description": "For example: journalctl -u nginx -n 500 | grep -i error"},
        },
        [],
    ),
)
READ = Tool(
    "read",
    "Read a range of one regular file under the policy's read roots, links resolved. Secrets are refused.",
    _object(
        {
            "path": {"type": "string", "description": "Absolute path."},
            "offset": {"type": "integer", "minimum": 0, "description": "First byte; default 0."},
            "length": {"type": "integer", "minimum": 1, "description": "Bytes; default 65536."},
        },
        ["path"],
    ),
)
WRITE = Tool(
    "write",
    "Write one file under the policy's write roots. A person must approve it before it happens.",
    _object(
        {
            "path": {"type": "string", "description": "Absolute path."},
            "content": {"type": "string", "description": "The whole new content."},
            "mode": {"type": "integer", "description": "Permissions of a new file; default 0644 as a decimal number."},
        },
        ["path", "content"],
    ),
)


def catalogue(observers: Mapping[str, Observer]) -> List[Tool]:
    """``exec``, ``read``, ``write``, then every observer by name."""
    typed = [Tool(one.name, one.summary, one.schema()) for _, one in sorted(observers.items())]
    return [EXEC, READ, WRITE, *typed]
