"""The error tree of the centre, on one page, with the exit codes of the command line.

Owns: which kinds of failure there are, what an error tells (what was tried, what was expected, what came, what to do
next), their JSON form and their exit codes.
Deliberately does not know: libraries. Each seam (ssh, database, models, A2A) maps its own errors onto these where they
enter.

Exit codes (documented in ``EXIT_CODES``): 0 ok, 1 the run did not succeed, 2 bad input, 3 refused or denied,
4 the machine could not be reached or failed, 5 internal, 130 interrupted.
"""

from __future__ import annotations

from typing import Any, ClassVar

OK = 0
RUN_DID_NOT_SUCCEED = 1
BAD_INPUT = 2
REFUSED = 3
MACHINE = 4
INTERNAL = 5
INTERRUPTED = 130

EXIT_CODES: dict[int, str] = {
    OK: "done, and what was asked for is true",
    RUN_DID_NOT_SUCCEED: "the run ended, and it did not succeed",
    BAD_INPUT: "the input, the settings or a name was wrong; nothing was done",
    REFUSED: "refused or denied: by policy, lease, host key, version or another run",
    MACHINE: "the machine could not be reached, or it failed",
    INTERNAL: "the gateway itself failed: database, audit chain or a defect",
    INTERRUPTED: "interrupted by the operator",
}


class ChargehandError(Exception):
    """Any failure that is told to a person.

    Args:
        message: one sentence that stands by itself.
        tried: what was being done.
        expected: what would have been right.
        got: what came instead; shown as ``repr``. Never hand in a secret: pass its masked form.
        next_step: what the reader can do now.
        code: a stable word for programs (default: the class's own).
        exit_code: of the command line (default: the class's own).
    """

    default_code: ClassVar[str] = "error"
    default_exit_code: ClassVar[int] = INTERNAL

    def __init__(
        self,
        message: str,
        *,
        tried: str = "",
        expected: str = "",
        got: Any = None,
        next_step: str = "",
        code: str | None = None,
        exit_code: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.tried = tried
        self.expected = expected
        self.got = got
        self.next_step = next_step
        self.code = code or self.default_code
        self.exit_code = self.default_exit_code if exit_code is None else exit_code

    def __str__(self) -> str:
        parts = [self.message]
        if self.tried:
            parts.append(f"tried: {self.tried}")
        if self.expected:
            parts.append(f"expected: {self.expected}")
        if self.got is not None:
            parts.append(f"got: {self._got_text()}")
        if self.next_step:
            parts.append(f"next: {self.next_step}")
        return "; ".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        # A durable workflow stores the errors of its steps by pickling; keyword-only arguments need a hand.
        return _rebuild, (type(self), self.message, dict(self.__dict__))

    def _got_text(self) -> str:
        text = repr(self.got)
        return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"

    def to_json(self) -> dict[str, Any]:
        """The document of contracts.md, "Verbs": ``{"error": {code, message, tried, expected, got, next, exit_code}}``."""
        return {
            "error": {
                "code": self.code,
                "message": self.message,
                "tried": self.tried,
                "expected": self.expected,
                "got": None if self.got is None else self._got_text(),
                "next": self.next_step,
                "exit_code": self.exit_code,
            }
        }


def _rebuild(kind: type[ChargehandError], message: str, fields: dict[str, Any]) -> ChargehandError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(fields)
    return error


# --- bad input: nothing was done -------------------------------------------------------------------------------------


class BadInput(ChargehandError):
    """What a person or a program sent does not have the shape it must have."""

    default_code = "bad-input"
    default_exit_code = BAD_INPUT


class BadSettings(BadInput):
    """``chargehand.toml`` or a ``CHARGEHAND_`` variable is wrong; says the file, the key, the expectation, what came."""

    default_code = "bad-settings"


class NotFound(BadInput):
    """The named machine, run, runbook or record does not exist."""

    default_code = "not-found"


# --- refused: understood, and not done -------------------------------------------------------------------------------


class Refused(ChargehandError):
    """Understood and refused, by a rule that the message names."""

    default_code = "refused"
    default_exit_code = REFUSED


class Conflict(Refused):
    """Somebody else was first: the name is taken, or the version or state is no longer the one that was read."""

    default_code = "conflict"


class IllegalMove(Refused):
    """A run cannot go from this state to that one (``supervisor.runs.states``)."""

    default_code = "illegal-move"


class Denied(Refused):
    """The policy or a person said no."""

    default_code = "denied"


class HostKeyChanged(Refused):
    """The machine showed another host key than the pinned one: everything stops until a person accepts it."""

    default_code = "host-key-changed"


class HostKeyUnknown(Refused):
    """The machine has no pinned host key yet; there is no trust on first use without a person saying so."""

    default_code = "host-key-unknown"


class Busy(Refused):
    """The machine has a run already; two at once cannot happen."""

    default_code = "busy"


class LeaseLost(Refused):
    """The lease of a run ended or was taken by a newer generation; nothing more may be done in its name."""

    default_code = "lease-lost"


class LimitReached(Refused):
    """A limit of the settings was reached (its name stands in ``expected``)."""

    default_code = "limit-reached"


# --- the machine -----------------------------------------------------------------------------------------------------


class MachineError(ChargehandError):
    """Something on the way to or on a machine."""

    default_code = "machine"
    default_exit_code = MACHINE


class MachineUnreachable(MachineError):
    """No connection: name, route, port, time-out, or the login was refused."""

    default_code = "machine-unreachable"


class MachineFailed(MachineError):
    """The machine answered, and could not do it: systemd, podman, disk, permissions."""

    default_code = "machine-failed"


class ProtocolMismatch(MachineError):
    """The two ends do not speak the same version, or one sent what the contract does not know."""

    default_code = "protocol-mismatch"


# --- the run ---------------------------------------------------------------------------------------------------------


class RunFailed(ChargehandError):
    """The run ended and did not succeed."""

    default_code = "run-failed"
    default_exit_code = RUN_DID_NOT_SUCCEED


class ModelFailed(RunFailed):
    """The language model could not be asked, or answered with nothing usable."""

    default_code = "model-failed"


# --- the gateway itself ----------------------------------------------------------------------------------------------


class Internal(ChargehandError):
    """A defect, or a part of the gateway that is not usable."""

    default_code = "internal"


class StoreFailed(Internal):
    """The database could not be opened, read or written."""

    default_code = "store-failed"


class AuditFailed(Internal):
    """An audit record could not be made durable: what it announces must not happen."""

    default_code = "audit-failed"


class AuditBroken(Internal):
    """The audit chain does not verify."""

    default_code = "audit-broken"


class Interrupted(ChargehandError):
    """The operator interrupted the command."""

    default_code = "interrupted"
    default_exit_code = INTERRUPTED
