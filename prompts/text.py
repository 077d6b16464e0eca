"""Reads the texts that models are told.

Owns: where they lie.
Deliberately does not know: what they say, or to which model.
"""

from __future__ import annotations

import importlib.resources


def read(name: str) -> str:
    """The text ``<name>.md`` of this folder; raises ``LookupError`` that names the texts there are."""
    folder = importlib.resources.files("prompts")
    known = sorted(entry.name[:-3] for entry in folder.iterdir() if entry.name.endswith(".md"))
    if name not in known:
        raise LookupError(f"there is no text {name!r} for models; there are: {', '.join(known)}")
    return folder.joinpath(f"{name}.md").read_text(encoding="utf-8")
