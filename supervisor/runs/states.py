"""The states of a run: one table, pure.

Owns: which states there are, which moves are legal, which states are final, who owns a state and which limit bounds it.
Deliberately does not know: the database, the clock, how a state is entered. ``supervisor.store.runs`` applies it.

From architecture.md, "States". Two rules shape the table:

* From the moment a ``start`` may have been sent (``activating``) the only way to an end is through ``stopping``, so no
  run ends without a look at the machine.
* ``stopping`` is left with proof (the unit is inactive, no process is left), or for ``unreachable`` when lease and hard
  stop have passed and nobody could look. ``unreachable`` is an end for whoever waits, and the one end that may still be
  corrected, with proof, at the next contact.
"""

from __future__ import annotations

import dataclasses
import enum

from supervisor.errors import IllegalMove


class State(enum.StrEnum):
    REQUESTED = "requested"
    QUEUED = "queued"
    ACTIVATING = "activating"
    RUNNING = "running"
    WAITING_APPROVAL = "waiting_approval"
    EVALUATING = "evaluating"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    DENIED = "denied"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    UNREACHABLE = "unreachable"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    ``owner``: who must move the run on. ``limit``: the name in ``settings.limits`` (seconds) that bounds the stay,
    ``None`` for a state nobody has to leave. ``moves``: the states it may go to. ``agent``: whether an edge agent may
    be alive on the machine. ``final``: whether whoever waits for the run is done waiting.
    """

    owner: str
    limit: str | None
    moves: frozenset[State]
    agent: bool = False
    final: bool = False


def _to(*states: State) -> frozenset[State]:
    return frozenset(states)


_S = State
TABLE: dict[State, Row] = {
    _S.REQUESTED: Row("gateway", "request_s", _to(_S.QUEUED, _S.FAILED, _S.DENIED, _S.CANCELLED, _S.EXPIRED)),
    _S.QUEUED: Row("queue", "queue_s", _to(_S.ACTIVATING, _S.FAILED, _S.DENIED, _S.CANCELLED, _S.EXPIRED)),
    _S.ACTIVATING: Row("flow", "activate_s", _to(_S.RUNNING, _S.STOPPING), agent=True),
    _S.RUNNING: Row("flow", "task_s", _to(_S.WAITING_APPROVAL, _S.EVALUATING, _S.STOPPING), agent=True),
    _S.WAITING_APPROVAL: Row("approver", "approval_s", _to(_S.RUNNING, _S.STOPPING), agent=True),
    # Back to running: the verdict `retry` asks again inside the same lease.
    _S.EVALUATING: Row("flow", "evaluate_s", _to(_S.RUNNING, _S.STOPPING), agent=True),
    _S.STOPPING: Row(
        "flow",
        "stop_s",
        _to(_S.SUCCEEDED, _S.FAILED, _S.DENIED, _S.CANCELLED, _S.EXPIRED, _S.UNREACHABLE),
        agent=True,
    ),
    _S.SUCCEEDED: Row("nobody", None, _to(), final=True),
    _S.FAILED: Row("nobody", None, _to(), final=True),
    _S.DENIED: Row("nobody", None, _to(), final=True),
    _S.CANCELLED: Row("nobody", None, _to(), final=True),
    _S.EXPIRED: Row("nobody", None, _to(), final=True),
    # The work may have been done before the machine was lost; what it was is decided from the collected journal.
    _S.UNREACHABLE: Row("reconciliation", None, _to(_S.SUCCEEDED, _S.FAILED, _S.CANCELLED), final=True),
}

FIRST = State.REQUESTED
FINAL: frozenset[State] = frozenset(state for state, row in TABLE.items() if row.final)
OPEN: frozenset[State] = frozenset(TABLE) - FINAL
AGENT_MAY_BE_ALIVE: frozenset[State] = frozenset(state for state, row in TABLE.items() if row.agent)

# What `unit_after` may say when a run ends with proof. "not-started": no `start` was ever sent for this run.
PROVEN_UNITS: frozenset[str] = frozenset({"inactive", "not-started"})


def parse(name: str) -> State:
    """The state called ``name``; raises ``IllegalMove`` that lists the known ones."""
    try:
        return State(name)
    except ValueError:
        raise IllegalMove("this is no state of a run", expected=" | ".join(State), got=name) from None


def check(source: State, target: State) -> None:
    """Raises ``IllegalMove`` unless a run may go from ``source`` to ``target``."""
    allowed = TABLE[source].moves
    if target not in allowed:
        raise IllegalMove(
            f"a run cannot go from {source} to {target}",
            expected=" | ".join(sorted(allowed)) or f"nothing: {source} is final",
            got=str(target),
        )


def needs_proof(source: State, target: State) -> bool:
    """Whether this move claims that nothing of the run is left on the machine, and must show it."""
    return target in FINAL and target is not State.UNREACHABLE and (source in AGENT_MAY_BE_ALIVE or source in FINAL)


def check_proof(source: State, target: State, unit_after: str | None, processes_after: int | None) -> None:
    """Raises ``IllegalMove`` if the move needs proof that nothing is left and ``unit_after``/``processes_after`` give none."""
    if needs_proof(source, target) and (unit_after not in PROVEN_UNITS or processes_after != 0):
        raise IllegalMove(
            f"a run cannot end as {target} before its unit is proven inactive",
            tried=f"moving from {source} to {target}",
            expected="unit_after inactive (or not-started) and processes_after 0",
            got={"unit_after": unit_after, "processes_after": processes_after},
            next_step="stop the unit and read its status, or move to unreachable when lease and hard stop have passed",
        )
