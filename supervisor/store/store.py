"""The store: one database, opened, at its newest schema, with its repositories.

Owns: opening and closing.
Deliberately does not know: settings (the caller hands in a URL), and the audit chain (``supervisor.audit.ledger``).

Everything here is synchronous and thread-safe; a coroutine calls it through ``asyncio.to_thread``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Engine, insert, select

from supervisor.store.engine import make_engine, reading, writing
from supervisor.store.events import Events
from supervisor.store.journals import Journals
from supervisor.store.machines import Machines
from supervisor.store.migrate import upgrade
from supervisor.store.runs import Runs
from supervisor.store.schema import settings_changes


class Store:
    """The repositories of one database: ``machines``, ``runs``, ``events``, ``journals``.

    ``clock`` gives seconds since the epoch; tests hand in their own.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self.engine = engine
        self.machines = Machines(engine, clock)
        self.runs = Runs(engine, clock)
        self.events = Events(engine, clock)
        self.journals = Journals(engine, clock)
        self._clock = clock

    def settings_changed(self, actor: str, key: str, old: Any, new: Any) -> None:
        """Note that ``actor`` changed the setting ``key``; the audit record is the caller's to make beside it."""
        with writing(self.engine) as connection:
            connection.execute(
                insert(settings_changes).values(at=self._clock(), actor=actor, key=key, old=old, new=new)
            )

    def settings_changes(self, limit: int = 100) -> list[dict[str, Any]]:
        """The last changes of settings, newest first."""
        query = select(settings_changes).order_by(settings_changes.c.id.desc()).limit(limit)
        with reading(self.engine) as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def close(self) -> None:
        """Give the connections back; the store is not to be used afterwards."""
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_store(url: str, *, password: str | None = None, clock: Callable[[], float] = time.time) -> Store:
    """The store at ``url`` (``sqlite:////path`` or ``postgresql+psycopg://…``), brought to the newest schema.

    Raises ``BadSettings``, ``StoreFailed``.
    """
    engine = make_engine(url, password=password)
    try:
        upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return Store(engine, clock)
