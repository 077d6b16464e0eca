"""Asking a person at the terminal, and knowing when there is none.

Owns: the y/N question. Deliberately does not know: what is asked.
"""

from __future__ import annotations

import sys

import typer

from supervisor.errors import Interrupted


def terminal() -> bool:
    """Whether a person can answer: stdin is a terminal."""
    try:
        return sys.stdin.isatty()
    except (AttributeError, ValueError):  # closed, or replaced by something that is no file
        return False


def confirmed(question: str, yes: bool = False) -> bool | None:
    """The answer to ``question`` (on stderr, default no); ``None`` if nobody can answer. ``yes``: answered beforehand.

    Raises ``Interrupted`` for Ctrl-C and end of input. ``question`` must be neutralised already (``output.plain``)
    where it holds text of a machine.
    """
    if yes:
        return True
    if not terminal():
        return None
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        raise Interrupted("interrupted; nothing was changed") from None
