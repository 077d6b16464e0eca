"""The tools a model is offered: name, description, JSON schema of the parameters.

Owns: what ``exec``, ``read`` and ``write`` are told to be, and the order of the list.
Deliberately does not know: which provider's wire format the list ends in, and what a call is allowed to do.

The descriptions say what the gate will accept, so that a model's first try is a good one: every refusal costs a turn.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Mapping, Protocol, Tuple

from tools.policy import Policy


class Offered(Protocol):
    """An observer as it is offered to a model."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    def schema(self) -> Dict[str, Any]:
        """The JSON schema of the parameters."""


@dataclasses.dataclass(frozen=True)
class Tool:
    """One tool. ``parameters``: a JSON schema of type ``object``."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def to_json(self) -> Dict[str, Any]:
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}


_EXEC = (
    "Run one command of the machine's policy and see its output. There is no shell: send the words as argv, or a command "
    "text of plain words, quotes and pipes (2>&1 and 2>/dev/null are understood). Paths are absolute. Not available: ; && "
    "|| > < $ backquotes ~ braces, sudo, interpreters, pagers, and anything that does not end by itself (use -n, -c). "
    "Options must be written in full. Prefer an observer where one fits: its output is already parsed."
)
_READ = (
    "Read a part of one text file by its absolute path. Only regular files under the read roots: %s. Secrets are never "
    "readable. At most %d bytes a call; use offset to go on."
)
_WRITE = "Propose the whole new content of one text file under the write roots: %s. Nothing is written until a person approves."


def catalogue(policy: Policy, observers: Mapping[str, Offered], programs: bool = True) -> Tuple[Tool, ...]:
    """The tools for one policy: observers first (by name), then ``read``, ``exec`` and, if there are write roots, ``write``.

    ``observers``: name -> observer. ``programs``: whether to name the policy's programs in the description of ``exec``.
    """
    found: List[Tool] = [
        Tool(observer.name, observer.summary, observer.schema()) for _, observer in sorted(observers.items())
    ]
    limits = policy.limits
    found.append(
        Tool(
            "read", _READ % (", ".join(policy.read_roots[:24]), limits.read_bytes),
            _object(
                {
                    "path": {"type": "string", "description": "absolute path", "maxLength": limits.word_bytes},
                    "offset": {"type": "integer", "minimum": 0, "description": "first byte, default 0"},
                    "length": {"type": "integer", "minimum": 1, "maximum": limits.read_bytes, "description": "bytes"},
                },
                "path",
            ),
        )
    )  # fmt: skip
    described = _EXEC
    if programs:
        described += " Programs: %s." % ", ".join(sorted(rule.name for rule in policy.rules))
    found.append(
        Tool(
            "exec", described,
            _object(
                {
                    "argv": {
                        "type": "array", "items": {"type": "string", "maxLength": limits.word_bytes}, "minItems": 1,
                        "maxItems": limits.words, "description": 'the words of the command, such as ["df", "-h"]',
                    },
                    "command": {
                        "type": "string", "maxLength": limits.command_chars,
                        "description": "the same as text, with pipes if needed; give either argv or command",
                    },
                }
            ),
        )
    )  # fmt: skip
    if policy.write_roots:
        found.append(
            Tool(
                "write", _WRITE % ", ".join(policy.write_roots),
                _object(
                    {
                        "path": {"type": "string", "description": "absolute path", "maxLength": limits.word_bytes},
                        "content": {"type": "string", "description": "the whole new content"},
                        "mode": {"type": "integer", "description": "permission bits, such as 420 for 0644"},
                    },
                    "path", "content",
                ),
            )
        )  # fmt: skip
    return tuple(found)


def _object(properties: Dict[str, Any], *required: str) -> Dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
