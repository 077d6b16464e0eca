"""The events of runs in the database: what live views read, and what the journal is compared with.

Owns: their order (``seq``, counted by the gateway over all sources) and that a repeated delivery is stored once.
Deliberately does not know: what an event means.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, func, insert, select

from supervisor.errors import BadInput, Conflict, NotFound
from supervisor.store.engine import is_sqlite, reading, writing
from supervisor.store.schema import run_events, runs
from tools.values import Event, canonical

# Who says so: the edge agent's worker, or the gateway itself.
WORKER = "worker"
GATEWAY = "gateway"


@dataclasses.dataclass(frozen=True)
class RunEvent:
    """One stored event. ``seq`` counts from 1 in a run over all sources; ``at`` is the gateway's clock.

    ``key`` is what the source calls it (the worker's own ``seq`` as text), ``None`` if it has no name for it.
    """

    run_id: str
    seq: int
    source: str
    key: str | None
    kind: str
    body: dict[str, Any]
    at: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Events:
    """The events of one database. Every method is one transaction and may be called from any thread."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def append(self, run_id: str, events: Iterable[Event]) -> list[RunEvent]:
        """Store what the worker streamed; those stored before (same worker ``seq``, same content) are left out.

        Returns the newly stored ones. Raises ``NotFound`` (run), or ``Conflict`` if the worker says something else under
        a ``seq`` it has used: then nothing of this call is stored.
        """
        return self._store(run_id, WORKER, [(str(event.seq), event.kind, event.body) for event in events])

    def add(self, run_id: str, kind: str, body: Mapping[str, Any], *, key: str | None = None) -> RunEvent | None:
        """Store one event of the gateway itself; with a ``key``, once. Returns ``None`` if it was there already.

        Raises ``NotFound`` (run).
        """
        stored = self._store(run_id, GATEWAY, [(key, kind, dict(body))])
        return stored[0] if stored else None

    def events(
        self, run_id: str, after_seq: int = 0, *, source: str | None = None, limit: int | None = None
    ) -> list[RunEvent]:
        """The events of a run with a ``seq`` above ``after_seq``, in order."""
        query = (
            select(run_events)
            .where(run_events.c.run_id == run_id, run_events.c.seq > after_seq)
            .order_by(run_events.c.seq)
            .limit(limit)
        )
        if source is not None:
            query = query.where(run_events.c.source == source)
        with reading(self._engine) as connection:
            return [RunEvent(**row) for row in connection.execute(query).mappings()]

    def streamed(self, run_id: str) -> list[Event]:
        """What the worker streamed, in its own order, as it was."""
        stored = self.events(run_id, source=WORKER)
        return [Event(int(event.key or 0), event.kind, event.body, event.at) for event in stored]

    def _store(
        self, run_id: str, source: str, items: Sequence[tuple[str | None, str, dict[str, Any]]]
    ) -> list[RunEvent]:
        if not items:
            return []
        for key, kind, body in items:
            _check(key, kind, body)
        now = self._clock()
        with writing(self._engine) as connection:
            # The row of the run is the lock under which `seq` is counted.
            lock = select(runs.c.id).where(runs.c.id == run_id)
            if connection.execute(lock if is_sqlite(self._engine) else lock.with_for_update()).first() is None:
                raise NotFound(f"there is no run {run_id}", got=run_id)
            keys = [key for key, _, _ in items if key is not None]
            known = {
                row.key: (row.kind, row.body)
                for row in connection.execute(
                    select(run_events.c.key, run_events.c.kind, run_events.c.body).where(
                        run_events.c.run_id == run_id, run_events.c.source == source, run_events.c.key.in_(keys)
                    )
                )
            }
            last = connection.execute(select(func.max(run_events.c.seq)).where(run_events.c.run_id == run_id)).scalar()
            fresh: list[RunEvent] = []
            for key, kind, body in items:
                if key is not None and key in known:
                    if known[key] != (kind, body):
                        raise Conflict(
                            f"the {source} of run {run_id} tells event {key} a second time, and differently",
                            expected=known[key][0],
                            got=kind,
                        )
                    continue
                fresh.append(RunEvent(run_id, (last or 0) + len(fresh) + 1, source, key, kind, body, now))
                if key is not None:
                    known[key] = (kind, body)
            if fresh:
                connection.execute(insert(run_events), [event.to_json() for event in fresh])
        return fresh


def _check(key: str | None, kind: str, body: dict[str, Any]) -> None:
    try:
        canonical(body)
    except (TypeError, ValueError) as error:
        raise BadInput(f"event {key} cannot be kept: {error}", tried=kind, expected="a body of plain JSON") from None
