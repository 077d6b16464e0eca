"""The kinds of audit records, and the names of chains.

Owns: the words. One place, so that a search for a kind finds its writer and its reader.
Deliberately does not know: what a body holds (``supervisor.audit.bodies``).
"""

from __future__ import annotations

from supervisor.errors import BadInput

# The chain of the gateway itself: logins, settings, policies, checkpoints.
GATEWAY_CHAIN = "gateway"
_MACHINE_PREFIX = "machine:"

RUN_REQUESTED = "run.requested"
RUN_STATE = "run.state"
LEASE_GRANTED = "lease.granted"
LEASE_ENDED = "lease.ended"
DECISION = "decision"
EVIDENCE = "evidence"
INFERENCE = "inference"
APPROVAL_ASKED = "approval.asked"
APPROVAL_APPROVED = "approval.approved"
APPROVAL_REFUSED = "approval.refused"
APPROVAL_EXPIRED = "approval.expired"
APPROVAL_DELIVERED = "approval.delivered"
APPROVAL_EXECUTED = "approval.executed"
APPROVAL_RETURNED = "approval.returned"
JOURNAL_SEALED = "journal.sealed"
AUDIT_GAP = "audit.gap"
AUDIT_CHECKPOINT = "audit.checkpoint"
VIOLATION = "violation"
MACHINE_ADDED = "machine.added"
MACHINE_CHANGED = "machine.changed"
MACHINE_REMOVED = "machine.removed"
HOST_KEY_ACCEPTED = "host_key.accepted"
HOST_KEY_CHANGED = "host_key.changed"
SETTINGS_CHANGED = "settings.changed"
POLICY_CHANGED = "policy.changed"
GATEWAY_STARTED = "gateway.started"
GATEWAY_STOPPED = "gateway.stopped"
LOGIN = "login"
LOGIN_FAILED = "login.failed"
LOGOUT = "logout"

KINDS: frozenset[str] = frozenset(
    value for name, value in list(globals().items()) if name.isupper() and isinstance(value, str) and name[0] != "_"
) - {GATEWAY_CHAIN}


def machine_chain(machine: str) -> str:
    """The chain of a machine. The prefix keeps a machine called ``gateway`` apart from the gateway's own chain."""
    return _MACHINE_PREFIX + machine


def machine_of(chain: str) -> str | None:
    """The machine whose chain this is, ``None`` for the gateway's own; raises ``BadInput`` for no chain at all."""
    if chain == GATEWAY_CHAIN:
        return None
    if not chain.startswith(_MACHINE_PREFIX):
        raise BadInput("this is not the name of an audit chain", expected="gateway or machine:ID", got=chain)
    return chain.removeprefix(_MACHINE_PREFIX)
