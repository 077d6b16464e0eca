"""The durable spool: ended spans wait here, on disk, until MLflow has them; each is held once.

Owns: the SQLite file, redaction on the way in (nothing unredacted is ever written), the states of a span
(``pending`` → ``delivered`` or ``rejected``), the bound on what may wait and the count of what did not fit.
Deliberately does not know: OTLP, HTTP, when to deliver, what a span means.

A run never fails because of its trace: when the spool is full or the disk refuses, ``put`` counts a gap and returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from otel.redaction import Redactor
from otel.spans import Span

_log = logging.getLogger(__name__)

_PENDING, _DELIVERED, _REJECTED = 0, 1, 2
_SCHEMA_VERSION: Final = 1
_BUSY_TIMEOUT_S: Final = 5.0  # how long a writer waits for another process; a put takes well under a millisecond
_GAP_TRACES: Final = 10_000  # traces whose gaps are counted one by one; beyond that they are counted together
_PRUNE_EVERY: Final = 64  # batches between two prunings of delivered markers

# The counter row is kept by triggers: exact for every process, and a put does not have to count the table.
_SCHEMA: Final = """
CREATE TABLE span (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    trace_id TEXT NOT NULL,
    span_id TEXT NOT NULL,
    state INTEGER NOT NULL,
    size INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    put_at REAL NOT NULL,
    done_at REAL,
    reason TEXT,
    body TEXT,
    UNIQUE (trace_id, span_id)
);
CREATE INDEX span_pending ON span (attempts, id) WHERE state = 0;
CREATE INDEX span_rejected ON span (id) WHERE state = 2;
CREATE INDEX span_delivered ON span (done_at) WHERE state = 1;
CREATE TABLE counter (one INTEGER PRIMARY KEY CHECK (one = 1), spans INTEGER NOT NULL, bytes INTEGER NOT NULL,
                      rejected INTEGER NOT NULL, delivered INTEGER NOT NULL);
INSERT INTO counter VALUES (1, 0, 0, 0, 0);
CREATE TABLE gap (trace_id TEXT NOT NULL, reason TEXT NOT NULL, spans INTEGER NOT NULL, first_at REAL NOT NULL,
                  last_at REAL NOT NULL, PRIMARY KEY (trace_id, reason));
CREATE TRIGGER span_in AFTER INSERT ON span BEGIN
    UPDATE counter SET spans = spans + 1, bytes = bytes + new.size;
END;
CREATE TRIGGER span_moves AFTER UPDATE OF state ON span WHEN old.state <> new.state BEGIN
    UPDATE counter SET
        spans = spans + (new.state = 0) - (old.state = 0),
        bytes = bytes + new.size * ((new.state = 0) - (old.state = 0)),
        rejected = rejected + (new.state = 2) - (old.state = 2),
        delivered = delivered + (new.state = 1);
END;
"""


class SpoolUnusable(RuntimeError):
    """The spool file cannot be opened or is no spool; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class SpoolLimits:
    """``pending_spans`` and ``pending_bytes``: what may wait (about a day of a busy gateway with MLflow away; bounded
    so that tracing never fills the disk). ``marker_days`` and ``markers``: how long and how many delivered ids are
    remembered; a step that is executed again after a crash makes its span within minutes, not weeks."""

    pending_spans: int = 500_000
    pending_bytes: int = 512 * 1024 * 1024
    marker_days: float = 14.0
    markers: int = 1_000_000


@dataclasses.dataclass(frozen=True)
class PutResult:
    """What became of the spans of one ``put``: newly held, held already, refused (counted as a gap)."""

    accepted: int
    duplicates: int
    refused: int


@dataclasses.dataclass(frozen=True)
class Held:
    """A pending span as the deliverer gets it: ``row`` identifies it in this spool, ``attempts`` counts how often the
    endpoint refused it by itself, ``size`` the characters of its JSON form."""

    row: int
    span: Span
    attempts: int
    size: int


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A span set aside because the endpoint refuses it, with the reason it gave."""

    trace_id: str
    span_id: str
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Gap:
    """Spans that were not accepted: of which trace (empty: of several), why, how many, and between which wall times
    (seconds since the epoch)."""

    trace_id: str
    reason: str
    spans: int
    first_at: float
    last_at: float


class Spool:
    """One spool file; any number of threads and processes may use it at once.

    ``path``: the SQLite file, made with mode 0600 (its directory must exist); ``redactor``: what every span passes on
    its way in. Raises ``SpoolUnusable`` when the file is no spool or cannot be opened.

    When full the newest spans are refused, because those already accepted were promised.
    """

    def __init__(self, path: Path | str, redactor: Redactor, limits: SpoolLimits | None = None) -> None:
        self.path = Path(path)
        self.limits = limits or SpoolLimits()
        self._redactor = redactor
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self._unwritten_gaps: dict[tuple[str, str], Gap] = {}
        self._prune_in = 1
        try:
            # Made before SQLite opens it, so that it is never readable by others.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(
                self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise SpoolUnusable(
                f"opened the span spool {str(self.path)!r}, expected a writable SQLite file of this program, got: "
                f"{error}; move the file away (its spans are then missing in MLflow) or mend the directory"
            ) from error

    def _prepare(self) -> None:
        db = self._db
        db.execute("PRAGMA journal_mode = WAL")
        # NORMAL: a commit is in the operating system's hands when it returns, so a killed process loses nothing; only
        # a power cut may take the last commits, and the audit chain (which is synced) then shows which spans are
        # missing. FULL would add a disk flush to every tool call for a view that is not the record.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA journal_size_limit = 67108864")
        with self._write():
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise sqlite3.DatabaseError("a SQLite file of another program")
                for statement in _statements(_SCHEMA):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise sqlite3.DatabaseError(
                    f"a spool of schema version {version}, this program writes {_SCHEMA_VERSION}"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent; what is pending stays on disk."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[None]:
        # IMMEDIATE takes the write lock at once: a read that turns into a write could fail against another process.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # A full disk may have ended the transaction already, or have made the commit fail with it still open.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # In

    def put(self, spans: Iterable[Span]) -> PutResult:
        """Redact the spans and hold those not held before, in one transaction; durable against a kill on return.

        A span id of a trace is held once for good: a second one with the same ids is a duplicate whether the first is
        pending, delivered or set aside, and the first one's content stands. Never raises for a full spool or a disk
        that fails: those spans are ``refused`` and counted in ``gaps``.
        """
        now = time.time()
        rows = []
        for span in spans:
            clean = self._redactor.span(span)
            body = json.dumps(clean.to_json(), ensure_ascii=False, separators=(",", ":"))
            rows.append((clean.trace_id, clean.span_id, len(body), now, body))
        if not rows:
            return PutResult(0, 0, 0)
        try:
            result = self._insert(rows, now)
        except sqlite3.Error as error:
            _log.error("span spool %s refused %d spans, the run goes on: %s", self.path, len(rows), error)
            with self._lock:
                _count(self._unwritten_gaps, [row[0] for row in rows], f"spool not writable: {error}", now)
            return PutResult(0, 0, len(rows))
        if result.accepted:
            for listener in tuple(self._listeners):
                listener()
        return result

    def _insert(self, rows: Sequence[tuple[Any, ...]], now: float) -> PutResult:
        accepted, missing = 0, []
        with self._lock:
            with self._write():
                spans, size = self._db.execute("SELECT spans, bytes FROM counter").fetchone()
                for row in rows:
                    if spans >= self.limits.pending_spans or size + row[2] > self.limits.pending_bytes:
                        held = self._db.execute("SELECT 1 FROM span WHERE trace_id = ? AND span_id = ?", row[:2])
                        if not held.fetchone():  # a duplicate is no gap even when the spool is full
                            missing.append(row[0])
                    elif self._db.execute(
                        "INSERT OR IGNORE INTO span (trace_id, span_id, state, size, put_at, body)"
                        " VALUES (?, ?, 0, ?, ?, ?)",
                        row,
                    ).rowcount:
                        accepted, spans, size = accepted + 1, spans + 1, size + row[2]
                gaps = dict(self._unwritten_gaps)
                _count(gaps, missing, "spool full", now)
                self._write_gaps(gaps)
            self._unwritten_gaps.clear()  # only now that they are committed
        if missing:
            _log.error("span spool %s is full: %d spans refused, the run goes on", self.path, len(missing))
        return PutResult(accepted, len(rows) - accepted - len(missing), len(missing))

    def _write_gaps(self, gaps: Mapping[tuple[str, str], Gap]) -> None:
        if not gaps:
            return
        known = self._db.execute("SELECT count(*) FROM gap").fetchone()[0]
        for (trace, reason), gap in gaps.items():
            self._db.execute(
                "INSERT INTO gap VALUES (?, ?, ?, ?, ?) ON CONFLICT (trace_id, reason) DO UPDATE SET"
                " spans = spans + excluded.spans, last_at = excluded.last_at",
                (trace if known < _GAP_TRACES else "", reason, gap.spans, gap.first_at, gap.last_at),
            )
            known += 1

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` (must not block, must not raise) after each ``put`` of this process that took something.

        Returns what ends the subscription.
        """
        self._listeners.append(listener)

        def end() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return end

    # Out (for the deliverer)

    def pending(self, limit: int, suspects: bool = False, skip: Iterable[int] = ()) -> list[Held]:
        """Up to ``limit`` pending spans, oldest first: those never refused, or with ``suspects`` only those that were.

        ``skip``: rows to leave out (they wait for their next attempt).
        """
        skipped = set(skip)
        with self._lock:
            rows = self._db.execute(
                "SELECT id, body, attempts FROM span WHERE state = 0 AND attempts BETWEEN ? AND ?"
                " ORDER BY attempts, id LIMIT ?",
                (1 if suspects else 0, 2**31 if suspects else 0, limit + len(skipped)),
            ).fetchall()
        return [
            Held(row, Span.from_json(json.loads(body)), attempts, len(body))
            for row, body, attempts in rows
            if row not in skipped
        ][:limit]

    def delivered(self, rows: Sequence[int]) -> None:
        """Mark rows as delivered: their content goes, their ids stay as the mark that keeps them from coming again."""
        now = time.time()
        with self._lock:
            with self._write():
                self._db.executemany(
                    "UPDATE span SET state = 1, body = NULL, reason = NULL, done_at = ? WHERE id = ? AND state <> 1",
                    [(now, row) for row in rows],
                )
            self._prune_in -= 1
            if self._prune_in <= 0:
                self._prune_in = _PRUNE_EVERY
                self._prune(now)

    def refused(self, row: int, reason: str) -> None:
        """Count one refusal of this very span by the endpoint; it stays pending, as a suspect."""
        with self._lock, self._write():
            self._db.execute("UPDATE span SET attempts = attempts + 1, reason = ? WHERE id = ?", (reason[:500], row))

    def set_aside(self, row: int, reason: str) -> None:
        """Stop trying this span. It is kept with its reason and reported; ``retry_rejected`` brings it back."""
        with self._lock, self._write():
            self._db.execute(
                "UPDATE span SET state = 2, reason = ?, done_at = ? WHERE id = ? AND state = 0",
                (reason[:500], time.time(), row),
            )

    def retry_rejected(self) -> int:
        """Make every span that was set aside pending again (after MLflow was mended); returns how many."""
        with self._lock, self._write():
            return self._db.execute("UPDATE span SET state = 0, attempts = 0, done_at = NULL WHERE state = 2").rowcount

    def _prune(self, now: float) -> None:
        with self._write():
            self._db.execute(
                "DELETE FROM span WHERE state = 1 AND done_at < ?", (now - self.limits.marker_days * 86_400,)
            )
            surplus = self._db.execute("SELECT count(*) FROM span WHERE state = 1").fetchone()[0] - self.limits.markers
            if surplus > 0:
                self._db.execute(
                    "DELETE FROM span WHERE id IN (SELECT id FROM span WHERE state = 1 ORDER BY done_at LIMIT ?)",
                    (surplus,),
                )

    @contextlib.contextmanager
    def only_deliverer(self) -> Iterator[bool]:
        """Hold the right to deliver from this spool; yields ``False`` when another process or task has it.

        The kernel gives the lock back when its holder dies, however it died.
        """
        descriptor = os.open(f"{self.path}.deliver", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    # To look at

    def depth(self) -> int:
        """How many spans wait to be delivered."""
        with self._lock:
            return int(self._db.execute("SELECT spans FROM counter").fetchone()[0])

    def pending_of(self, trace_id: str) -> int:
        """How many spans of one trace wait to be delivered."""
        with self._lock:
            return int(
                self._db.execute("SELECT count(*) FROM span WHERE trace_id = ? AND state = 0", (trace_id,)).fetchone()[
                    0
                ]
            )

    def counts(self) -> dict[str, int]:
        """``pending``, ``pending_bytes``, ``rejected`` now; ``delivered`` since the file was made."""
        with self._lock:
            spans, size, rejected, delivered = self._db.execute(
                "SELECT spans, bytes, rejected, delivered FROM counter"
            ).fetchone()
        return {"pending": spans, "pending_bytes": size, "rejected": rejected, "delivered": delivered}

    def span_ids(self, trace_id: str) -> dict[str, str]:
        """Every span id of a trace this spool knows, with its state: ``pending``, ``delivered`` or ``rejected``."""
        with self._lock:
            rows = self._db.execute("SELECT span_id, state FROM span WHERE trace_id = ?", (trace_id,)).fetchall()
        return {span: ("pending", "delivered", "rejected")[state] for span, state in rows}

    def pending_spans(self, trace_id: str) -> list[Span]:
        """The spans of one trace that are not in MLflow yet (pending or set aside), in the order they were put."""
        with self._lock:
            rows = self._db.execute(
                "SELECT body FROM span WHERE trace_id = ? AND body IS NOT NULL ORDER BY id", (trace_id,)
            ).fetchall()
        return [Span.from_json(json.loads(body)) for (body,) in rows]

    def rejected(self, limit: int = 100) -> list[Rejected]:
        """Spans set aside, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT trace_id, span_id, body, reason FROM span WHERE state = 2 ORDER BY id LIMIT ?", (limit,)
            ).fetchall()
        return [Rejected(trace, span, json.loads(body)["name"], reason or "") for trace, span, body, reason in rows]

    def gaps(self) -> list[Gap]:
        """What was not accepted since the file was made, per trace and reason, oldest first; also what is not written
        down yet because the disk refuses."""
        with self._lock:
            found = [Gap(*row) for row in self._db.execute("SELECT * FROM gap ORDER BY first_at")]
            return found + list(self._unwritten_gaps.values())


def _count(gaps: dict[tuple[str, str], Gap], traces: Iterable[str], reason: str, now: float) -> None:
    """Add one lost span of each of ``traces`` (they may repeat) to ``gaps``."""
    for trace in traces:
        key = (trace, reason)
        if key not in gaps and len(gaps) >= _GAP_TRACES:
            key = ("", reason)
        old = gaps.get(key)
        gaps[key] = dataclasses.replace(old, spans=old.spans + 1, last_at=now) if old else Gap(*key, 1, now, now)


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: ``executescript`` would commit the transaction it runs in."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
