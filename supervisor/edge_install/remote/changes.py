"""The account of what was changed, and the changes that installing and uninstalling share.

Standard library only, Python 3.9: it is sent to the machine as text (``supervisor.edge_install.program``).
"""

# Runs on Python 3.9: no `X | Y` at run time, no `zip(strict=)`.
# ruff: noqa: UP006, UP035, UP045

from __future__ import annotations

import os
import stat
from typing import Any, Callable, List, Optional

from supervisor.edge_install.remote.account import Account, text_of, write_atomic
from supervisor.edge_install.remote.texts import Json, edited_keys

KEYS = ".ssh/authorized_keys"
POLKIT = "/etc/polkit-1/rules.d/49-chargehand.rules"


class Changes:
    """The account of what was changed, or, in a dry run, of what would be."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.made: List[Json] = []
        self.unchanged: List[str] = []
        self.notes: List[str] = []

    def make(self, what: str, path: str, action: Callable[[], Any]) -> None:
        """Do ``action`` and write it down; in a dry run only the latter."""
        if not self.dry:
            action()
        self.made.append({"what": what, "path": path})

    def same(self, path: str) -> None:
        self.unchanged.append(path)

    def result(self) -> Json:
        return {"dry_run": self.dry, "changes": self.made, "unchanged": self.unchanged, "notes": self.notes}


def keys_by_root(account: Account, scope: str) -> bool:
    """Whether root edits ``authorized_keys``: only in a home that nobody else can write to."""
    if scope != "system":
        return False
    try:
        home, folder = os.lstat(account.home), os.lstat(os.path.join(account.home, ".ssh"))
    except FileNotFoundError:
        return True
    return home.st_uid == 0 and folder.st_uid == 0 and stat.S_ISDIR(folder.st_mode)


def make_keys(account: Account, line: Optional[str], by_root: bool, changes: Changes) -> None:
    path = os.path.join(account.home, KEYS)

    def differs() -> bool:
        text = text_of(path)
        return edited_keys(text, line) != text

    def edit() -> None:
        text = text_of(path)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        # Readable by all where root owns it: sshd reads it as the user.
        write_atomic(path, edited_keys(text, line).encode(), 0o644 if by_root else 0o600)

    if not account.exists:
        if line is not None:
            changes.make("add the gateway's key", path, lambda: None)
        return
    if differs() if by_root else account.do(differs):
        what = "add the gateway's key" if line is not None else "remove the gateway's key"
        changes.make(what, path, edit if by_root else lambda: account.do(edit))
    else:
        changes.same(path)


def make_polkit(text: Optional[str], changes: Changes) -> None:
    before = text_of(POLKIT)
    if (text or "") == before:
        if text:
            changes.same(POLKIT)
        return
    if text is None:
        changes.make("remove", POLKIT, lambda: os.unlink(POLKIT))
        return

    def write() -> None:
        os.makedirs(os.path.dirname(POLKIT), exist_ok=True)
        write_atomic(POLKIT, text.encode(), 0o644)

    changes.make("replace" if before else "write", POLKIT, write)
