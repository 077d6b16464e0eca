"""What models are told about the tools.

Owns: reading the catalogue that the broker sends with its hello; it fits the policy of the lease.
"""

from __future__ import annotations

from inference.protocol import ToolSpec
from tools.values import JsonObject, Malformed, want


def tool_specs(hello: JsonObject) -> tuple[ToolSpec, ...]:
    """The tools the broker offers, in its order. Raises ``Malformed``."""
    found = []
    for document in want(hello, "tools", list):
        if not isinstance(document, dict):
            raise Malformed(f"a tool must be an object, got {document!r:.80}")
        found.append(ToolSpec.from_json(document))
    return tuple(found)
