"""What models are told about the tools.

Owns: turning the catalogue (``tools.catalogue``) into the tool specifications of ``inference``.
"""

from __future__ import annotations

from inference.protocol import ToolSpec
from tools.catalogue import catalogue
from tools.observers.registry import OBSERVERS


def tool_specs() -> tuple[ToolSpec, ...]:
    """``exec``, ``read``, ``write`` and every observer, in the order of the catalogue."""
    return tuple(ToolSpec(tool.name, tool.description, dict(tool.parameters)) for tool in catalogue(OBSERVERS))
