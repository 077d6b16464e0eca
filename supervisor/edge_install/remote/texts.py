"""Texts in, texts out: the key file, subordinate ids, versions. Pure; and the one error of the program.

Standard library only, Python 3.9: it is sent to the machine as text (``supervisor.edge_install.program``).
"""

# Runs on Python 3.9: no `X | Y` at run time, no `zip(strict=)`.
# ruff: noqa: UP006, UP031, UP035, UP045

from __future__ import annotations

import re
from typing import Any, Dict, Iterator, Optional, Tuple

Json = Dict[str, Any]

KEY_MARK = "chargehand-gateway"
SUBORDINATE_IDS = 65536
SUBORDINATE_FIRST = 100000
SUBORDINATE_LAST = 2**32 - 2


class Failed(Exception):
    """The machine could not be changed as asked; nothing after the failed step was done."""

    def __init__(self, message: str, expected: str = "", got: str = "", next_step: str = "") -> None:
        super().__init__(message)
        self.document = {"message": message, "expected": expected, "got": got, "next": next_step}


def edited_keys(text: str, line: Optional[str]) -> str:
    """``authorized_keys`` with our line being ``line``, or gone for ``None``. All other lines stay byte for byte.

    Ours is a line whose comment is ``KEY_MARK``; a comment or an option that merely holds that word is not.
    """
    kept = [old for old in text.splitlines(True) if not _is_ours(old)]
    if line is None:
        return "".join(kept)
    if kept and not kept[-1].endswith("\n"):
        kept[-1] += "\n"
    return "".join(kept) + line + "\n"


def _is_ours(line: str) -> bool:
    words = line.split()
    return not line.lstrip().startswith("#") and len(words) >= 3 and words[-1] == KEY_MARK


def has_ids(text: str, user: str, uid: int) -> bool:
    """Whether ``/etc/subuid`` or ``/etc/subgid`` gives this user enough subordinate ids."""
    total = 0
    for name, _, count in _ranges(text):
        if name in (user, str(uid)):
            total += count
    return total >= SUBORDINATE_IDS


def free_ids(*texts: str) -> int:
    """The first of ``SUBORDINATE_IDS`` ids that nobody has in any of ``texts``; raises ``Failed`` if there are none."""
    start = SUBORDINATE_FIRST
    for first, count in sorted((first, count) for text in texts for _, first, count in _ranges(text)):
        if start + SUBORDINATE_IDS <= first:
            break
        start = max(start, first + count)
    if start + SUBORDINATE_IDS > SUBORDINATE_LAST:
        raise Failed(
            "no free subordinate ids", "%d in a row" % SUBORDINATE_IDS, "", "tidy up /etc/subuid and /etc/subgid"
        )
    return start


def _ranges(text: str) -> Iterator[Tuple[str, int, int]]:
    for line in text.splitlines():
        words = line.strip().split(":")
        if len(words) == 3 and words[1].isdigit() and words[2].isdigit():
            yield words[0], int(words[1]), int(words[2])


def version_in(text: str) -> str:
    """The first dotted number in what a program prints as its version, empty if there is none."""
    found = re.search(r"\d+(?:\.\d+)*", text)
    return found[0] if found else ""
