from __future__ import annotations
from inference.protocol import ToolSpec
from tools.observers.registry import OBSERVERS
def tool_specs() -> tuple[ToolSpec, ...]:
    return tuple(ToolSpec(o.name, o.summary, o.schema()) for o in OBSERVERS.values())
