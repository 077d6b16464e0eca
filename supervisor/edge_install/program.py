"""One self-contained program out of the parts in ``remote``, to be sent to a machine.

Owns: the order of the parts and taking their imports of each other out. Deliberately does not run or know what they do.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

PARTS = ("texts", "account", "facts", "changes", "install", "uninstall", "main")
"""Each uses only names of the parts before it."""
PACKAGE = "supervisor.edge_install.remote"


@functools.cache
def program_text() -> str:
    """The program: standard library only, readable from top to bottom, the same for every machine."""
    folder = Path(__file__).with_name("remote")
    parts = [_without_own_imports((folder / f"{name}.py").read_text(encoding="utf-8")) for name in PARTS]
    return "from __future__ import annotations\n\n" + "\n\n".join(parts)


def _without_own_imports(source: str) -> str:
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith((PACKAGE, "__future__")):
            assert node.end_lineno is not None
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] = ""
    return "\n".join(lines)
