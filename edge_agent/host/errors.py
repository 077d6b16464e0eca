"""The error tree of the machine side, on one page.

Owns: error classes, their wire form and exit codes. Deliberately does not know: who raises them and why.

A verb that fails prints ``{"error": {...}}`` as its one JSON document and exits with the class's ``exit_code``.
"""

from __future__ import annotations

from typing import Any, Dict


class HostError(Exception):
    """Something a verb could not do. ``code`` is stable and for programs, the rest is for people.

    Args:
        message: what was tried and what went wrong, one sentence.
        expected, got: what was expected and what came, as text (may be empty).
        next_step: what the operator can do.
    """

    code = "host_error"
    exit_code = 4

    def __init__(self, message: str, *, expected: str = "", got: str = "", next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.got = got
        self.next_step = next_step

    def to_json(self) -> Dict[str, Any]:
        return {
            "code": self.code,
            "message": self.message,
            "expected": self.expected,
            "got": self.got,
            "next": self.next_step,
        }


class BadRequest(HostError):
    """The verb or its document is not what it must be."""

    code, exit_code = "bad_request", 2


class Refused(HostError):
    """The request is well formed, and the rules say no."""

    code, exit_code = "refused", 3


class Busy(Refused):
    """Another run is on this machine (safety.md, "Inert until activated", 6)."""

    code = "busy"


class Stale(Refused):
    """A start, renewal or approval that is late, replayed or of an older generation (safety.md, 5)."""

    code = "stale"


class NoLease(Refused):
    """There is no lease, it has ended, or it is another run's."""

    code = "no_lease"


class MachineFailed(HostError):
    """The machine could not do it: systemd, podman, disk."""

    code = "machine_failed"


class JournalFailed(MachineFailed):
    """The journal cannot be written; nothing may be executed."""

    code = "journal_failed"
