"""The journals of machines as the centre collected them.

Owns: keeping their lines byte by byte, and that a journal only ever grows.
Deliberately does not know: what the lines say, and whether their chain holds (``supervisor.audit.journal``).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from sqlalchemy import Engine, insert, select, update

from supervisor.errors import Conflict
from supervisor.store.engine import reading, writing
from supervisor.store.schema import run_journals


@dataclasses.dataclass(frozen=True)
class StoredJournal:
    """``lines`` without their newlines; ``head``: SHA-256 (hex) of the last one, as the machine told it."""

    run_id: str
    lines: tuple[str, ...]
    head: str
    complete: bool
    collected_at: float


class Journals:
    """The collected journals of one database. Every method is one transaction and may be called from any thread."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def save(self, run_id: str, lines: Sequence[str], head: str, *, complete: bool) -> StoredJournal:
        """Keep the journal of a run. Saving again may only add lines; raises ``Conflict`` if it would change one."""
        text = "".join(f"{line}\n" for line in lines)
        values = {
            "lines": text, "count": len(lines), "head": head, "complete": complete, "collected_at": self._clock(),
        }  # fmt: skip
        with writing(self._engine) as connection:
            before = connection.execute(select(run_journals).where(run_journals.c.run_id == run_id)).one_or_none()
            if before is None:
                connection.execute(insert(run_journals).values(run_id=run_id, **values))
            elif not text.startswith(before.lines):
                raise Conflict(
                    f"the journal of run {run_id} is no longer the one that was collected before",
                    expected=f"{before.count} known lines, then perhaps more",
                    got=f"{len(lines)} lines that differ",
                    next_step="keep both: this is a finding of its own",
                )
            elif text != before.lines or complete != before.complete:
                connection.execute(update(run_journals).where(run_journals.c.run_id == run_id).values(**values))
        stored = self.get(run_id)
        if stored is None:
            raise Conflict(f"the journal of run {run_id} disappeared while it was saved")
        return stored

    def get(self, run_id: str) -> StoredJournal | None:
        """The collected journal, or ``None`` if there is none yet."""
        with reading(self._engine) as connection:
            row = connection.execute(select(run_journals).where(run_journals.c.run_id == run_id)).one_or_none()
        if row is None:
            return None
        return StoredJournal(row.run_id, tuple(row.lines.split("\n")[:-1]), row.head, row.complete, row.collected_at)

    def run_ids(self) -> list[str]:
        """The runs whose journal was collected, oldest first."""
        with reading(self._engine) as connection:
            return list(connection.execute(select(run_journals.c.run_id).order_by(run_journals.c.run_id)).scalars())
