"""Runs in the database.

Owns: creating runs, the one way to change a run's state (``Runs.move``), cancel requests, and lists of runs.
Deliberately does not know: what happens in a state; the legal moves are ``supervisor.runs.states``'s.

A move is a compare-and-set in one statement, so of two gateways that both believe a run to be theirs one is told
``Conflict``. A move that was made already with the same values is answered with ``moved=False``: a durable workflow that
repeats a step after a crash finds its own work done.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, func, insert, select, update

from supervisor.errors import BadInput, Conflict, NotFound
from supervisor.runs import states
from supervisor.runs.states import State
from supervisor.store import ids
from supervisor.store.engine import is_sqlite, reading, writing
from supervisor.store.schema import machines, runs
from tools.values import canonical

TRIGGERS = ("operator", "schedule", "alert", "peer", "rollout")


@dataclasses.dataclass(frozen=True)
class Run:
    """One supervised job. Times are seconds since the epoch; ``seconds`` holds durations by stage.

    ``deadline``: until when the present state may last. ``not_after``: until when it may still be activated.
    ``cost_usd`` is ``None`` when the price is not known, never 0 for that.
    """

    id: str
    machine: str
    trigger: str
    trigger_detail: Any
    requested_by: str
    text: str
    runbook: str | None
    model: Any
    state: State
    state_since: float
    deadline: float | None
    generation: int | None
    created_at: float
    started_at: float | None
    ended_at: float | None
    not_after: float
    verdict: Any
    report: Any
    unit_after: str | None
    processes_after: int | None
    seconds: dict[str, float] | None
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    error: Any
    journal_head: str | None
    trace_id: str
    cancel_requested_by: str | None
    cancel_requested_at: float | None

    @property
    def final(self) -> bool:
        return self.state in states.FINAL

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "state": str(self.state)}


# What a move may write beside the state.
OUTCOME = frozenset(
    {
        "generation", "started_at", "verdict", "report", "unit_after", "processes_after", "seconds", "tokens_in",
        "tokens_out", "cost_usd", "error", "journal_head", "model",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Moved:
    """What came of a move: the run as it is now, and whether this call moved it (else it was there already)."""

    run: Run
    moved: bool


class Runs:
    """The runs of one database. Every method is one transaction and may be called from any thread."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def create(
        self,
        *,
        machine: str,
        requested_by: str,
        text: str,
        not_after: float,
        run_id: str | None = None,
        trigger: str = "operator",
        trigger_detail: Any = None,
        runbook: str | None = None,
        model: Mapping[str, Any] | None = None,
        deadline: float | None = None,
    ) -> Run:
        """Store a request as a run in state ``requested``.

        Creating the same run (same ``run_id`` and content) again returns the stored one. Raises ``BadInput``,
        ``NotFound`` (machine), ``Conflict`` (the id is taken by another request, or the machine is out of service).
        """
        if trigger not in TRIGGERS:
            raise BadInput("nothing of this kind triggers runs", expected=" | ".join(TRIGGERS), got=trigger)
        if not text.strip() or "\0" in text:
            raise BadInput("a run needs a question", expected="text without NUL characters", got=text)
        run_id = ids.new_run_id() if run_id is None else ids.run_id(run_id)
        now = self._clock()
        asked = {
            "machine": machine, "trigger": trigger, "trigger_detail": trigger_detail, "requested_by": requested_by,
            "text": text, "runbook": runbook, "model": None if model is None else dict(model), "not_after": not_after,
        }  # fmt: skip
        with writing(self._engine) as connection:
            existing = self._find(connection, run_id)
            if existing is not None:
                different = [name for name, value in asked.items() if not _equal(getattr(existing, name), value)]
                if different:
                    raise Conflict(
                        f"there is another run {run_id} already", expected="the same request", got=", ".join(different)
                    )
                return existing
            row = connection.execute(
                select(machines.c.enabled).where(machines.c.id == machine, machines.c.removed_at.is_(None))
            ).one_or_none()
            if row is None:
                raise NotFound(
                    f"there is no machine {machine!r}", got=machine, next_step="`chargehand machine list` shows all"
                )
            if not row.enabled:
                raise Conflict(f"machine {machine} is out of service", got=machine, next_step="enable it first")
            connection.execute(
                insert(runs).values(
                    **asked,
                    id=run_id,
                    trace_id=ids.trace_id(run_id),
                    state=str(states.FIRST),
                    state_since=now,
                    created_at=now,
                    deadline=deadline,
                )
            )
            return self._get(connection, run_id)

    def get(self, run_id: str) -> Run:
        """The run; raises ``NotFound``."""
        with reading(self._engine) as connection:
            return self._get(connection, run_id)

    def find(self, prefix: str) -> Run:
        """The one run whose id begins with ``prefix``; raises ``NotFound``, or ``BadInput`` if several do."""
        if not prefix or set(prefix) - set("0123456789abcdef-"):
            raise BadInput("this is not the beginning of a run id", expected="hexadecimal digits and -", got=prefix)
        with reading(self._engine) as connection:
            rows = connection.execute(select(runs).where(runs.c.id.startswith(prefix)).limit(2)).mappings().all()
        if not rows:
            raise NotFound(f"there is no run {prefix}", got=prefix, next_step="`chargehand runs list` shows them")
        if len(rows) > 1:
            raise BadInput(f"several runs begin with {prefix}", expected="more of the id", got=prefix)
        return _run(rows[0])

    def overdue(self, now: float | None = None) -> list[Run]:
        """Open runs whose state has lasted past its deadline, oldest first."""
        now = self._clock() if now is None else now
        query = (
            select(runs)
            .where(runs.c.state.in_(sorted(states.OPEN)), runs.c.deadline.is_not(None), runs.c.deadline < now)
            .order_by(runs.c.deadline)
        )
        with reading(self._engine) as connection:
            return [_run(row) for row in connection.execute(query).mappings()]

    def list(
        self,
        *,
        machine: str | None = None,
        in_states: frozenset[State] | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[Run]:
        """Runs, newest first, with an id below ``before`` (ids sort by time)."""
        query = select(runs).order_by(runs.c.id.desc()).limit(limit)
        if machine is not None:
            query = query.where(runs.c.machine == machine)
        if in_states is not None:
            query = query.where(runs.c.state.in_(sorted(in_states)))
        if before is not None:
            query = query.where(runs.c.id < before)
        with reading(self._engine) as connection:
            return [_run(row) for row in connection.execute(query).mappings()]

    def counts(self) -> dict[State, int]:
        """How many runs are in each state that has any."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(runs.c.state, func.count()).group_by(runs.c.state)).all()
        return {State(name): count for name, count in rows}

    def move(
        self, run_id: str, from_state: State, to_state: State, *, deadline: float | None = None, **outcome: Any
    ) -> Moved:
        """The only way a run changes its state.

        Args:
            run_id: the run.
            from_state: where the caller believes it to be.
            to_state: where it is to go.
            deadline: until when it may stay there, seconds since the epoch; ``None`` for a final state.
            outcome: fields of ``OUTCOME`` to write with it.

        Returns ``Moved``; ``moved`` is false if the run is in ``to_state`` already with these very values. Raises
        ``IllegalMove`` (the table forbids it, or an end lacks its proof), ``Conflict`` (it is elsewhere, or there with
        other values), ``NotFound``, ``BadInput`` (a field that no move may write).
        """
        unknown = sorted(set(outcome) - OUTCOME)
        if unknown:
            raise BadInput("a move cannot write this", expected=" | ".join(sorted(OUTCOME)), got=", ".join(unknown))
        if from_state != to_state:
            states.check(from_state, to_state)
        now = self._clock()
        with writing(self._engine) as connection:
            query = select(runs).where(runs.c.id == run_id)
            row = connection.execute(query if is_sqlite(self._engine) else query.with_for_update()).mappings().first()
            if row is None:
                raise _no_run(run_id)
            before = _run(row)
            if before.state == to_state:
                return Moved(_same(before, outcome), moved=False)
            if before.state != from_state:
                raise Conflict(
                    f"run {run_id} is not where it was believed to be",
                    tried=f"moving from {from_state} to {to_state}",
                    expected=str(from_state),
                    got=str(before.state),
                    next_step="read the run again: somebody else moved it",
                )
            after = {name: getattr(before, name) for name in ("unit_after", "processes_after")} | outcome
            states.check_proof(from_state, to_state, after["unit_after"], after["processes_after"])
            values = dict(outcome, state=str(to_state), state_since=now, deadline=deadline)
            if to_state in states.FINAL and before.ended_at is None:
                values["ended_at"] = now
            if to_state is State.ACTIVATING:
                values.setdefault("started_at", now)
            changed = connection.execute(
                update(runs)
                .where(runs.c.id == run_id, runs.c.state == str(from_state))
                .values(**values)
                .returning(runs)
            )
            return Moved(_run(changed.mappings().one()), moved=True)

    def note(self, run_id: str, **outcome: Any) -> Run:
        """Write fields of ``OUTCOME`` without moving (tokens so far, seconds so far). Raises ``NotFound``, ``BadInput``."""
        unknown = sorted(set(outcome) - OUTCOME)
        if unknown or not outcome:
            raise BadInput("a note cannot write this", expected=" | ".join(sorted(OUTCOME)), got=", ".join(unknown))
        with writing(self._engine) as connection:
            row = connection.execute(update(runs).where(runs.c.id == run_id).values(**outcome).returning(runs))
            found = row.mappings().one_or_none()
            if found is None:
                raise _no_run(run_id)
            return _run(found)

    def extend(self, run_id: str, state: State, deadline: float) -> bool:
        """Move the deadline of a run that is still in ``state``; returns whether it was."""
        statement = update(runs).where(runs.c.id == run_id, runs.c.state == str(state)).values(deadline=deadline)
        with writing(self._engine) as connection:
            return connection.execute(statement).rowcount == 1

    def request_cancel(self, run_id: str, by: str) -> Run:
        """Note that ``by`` wants the run cancelled; the first one stays noted. A final run is returned as it is.

        The state does not change here: the flow sees the note, stops the agent and moves the run. Raises ``NotFound``.
        """
        statement = (
            update(runs)
            .where(runs.c.id == run_id, runs.c.cancel_requested_at.is_(None), runs.c.state.in_(sorted(states.OPEN)))
            .values(cancel_requested_by=by, cancel_requested_at=self._clock())
        )
        with writing(self._engine) as connection:
            connection.execute(statement)
            return self._get(connection, run_id)

    def _find(self, connection: Connection, run_id: str) -> Run | None:
        row = connection.execute(select(runs).where(runs.c.id == run_id)).mappings().one_or_none()
        return None if row is None else _run(row)

    def _get(self, connection: Connection, run_id: str) -> Run:
        run = self._find(connection, run_id)
        if run is None:
            raise _no_run(run_id)
        return run


def _no_run(run_id: str) -> NotFound:
    return NotFound(f"there is no run {run_id}", got=run_id, next_step="`chargehand runs list` shows them")


def _run(row: RowMapping) -> Run:
    return Run(**{**row, "state": State(row["state"])})


def _equal(stored: Any, given: Any) -> bool:
    # What was stored as JSON comes back with lists for tuples; only the canonical form can be compared.
    if isinstance(given, Mapping | list | tuple):
        return stored is not None and canonical(stored) == canonical(given)
    return bool(stored == given)


def _same(run: Run, outcome: Mapping[str, Any]) -> Run:
    different = {name: getattr(run, name) for name, value in outcome.items() if not _equal(getattr(run, name), value)}
    if different:
        raise Conflict(
            f"run {run.id} is {run.state} already, with other values",
            expected=", ".join(f"{name}={outcome[name]!r}" for name in sorted(different)),
            got=different,
            next_step="read the run again: somebody else moved it",
        )
    return run
