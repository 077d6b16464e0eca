"""The one place that makes a database engine and begins transactions.

Owns: pragmas, pool, the two kinds of transaction (reading, writing) and how a database failure is told.
Deliberately does not know: tables.

SQLite runs in WAL mode. Ordinary data uses ``synchronous=NORMAL``: a killed process loses nothing, a power cut may take
the last transactions, never the consistency. The audit chain and what must be as durable use an engine made with
``durable=True`` (``synchronous=FULL``): a commit that returned is on disk.

A writing transaction takes the write lock at its beginning (``BEGIN IMMEDIATE``), so that what was read inside it is
still true when it writes; in PostgreSQL the rows that decide are read ``FOR UPDATE``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from supervisor.errors import BadSettings, StoreFailed

# Another process may hold SQLite's write lock for one group commit at a time; ten seconds is a hundred of them.
BUSY_TIMEOUT_MS = 10_000
# asyncio.to_thread runs at most min(32, cores + 4) calls at once; every one of them may hold a connection.
POOL_SIZE = 32

# Writers of one process queue here instead of in SQLite's busy handler, which sleeps and is not fair.
_write_locks: dict[str, threading.RLock] = {}
_write_locks_guard = threading.Lock()


def make_engine(url: str | URL, *, durable: bool = False, password: str | None = None) -> Engine:
    """An engine for ``sqlite:////path`` or ``postgresql+psycopg://…``, ready for use from many threads.

    A new SQLite file is made with mode 0600 in a directory of mode 0700. Raises ``BadSettings`` for a URL that cannot
    be used, ``StoreFailed`` if the file cannot be made.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise BadSettings("this is not a database URL", expected="sqlite:////path or postgresql+psycopg://…") from None
    if password is not None:
        parsed = parsed.set(password=password)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(parsed, durable)
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed, pool_size=POOL_SIZE, max_overflow=0, pool_pre_ping=True)
    raise BadSettings(
        "this database is not supported",
        expected="sqlite or postgresql+psycopg",
        got=parsed.drivername,
        next_step="correct database_url",
    )


def _sqlite(url: URL, durable: bool) -> Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise BadSettings(
            "SQLite needs a file here: every thread and the audit chain use connections of their own",
            expected="sqlite:////absolute/path",
            got=str(url),
        )
    path = Path(url.database).absolute()
    _make_ready(path)
    engine = create_engine(
        url.set(database=str(path)),
        pool_size=POOL_SIZE,
        max_overflow=0,
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_MS / 1000},
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _record: Any) -> None:
        # The driver must not begin transactions by itself: we say which kind.
        connection.isolation_level = None
        connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("chargehand_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _make_ready(path: Path) -> None:
    """A private file in WAL mode, made once however many gateways and threads begin at the same moment.

    Switching to WAL is the one thing for which SQLite does not wait its turn, so the turn is a lock on the directory.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            if not path.exists():
                # SQLite gives its -wal and -shm files the mode of the database file. A file that exists is never opened
                # here: closing it would drop the POSIX locks that SQLite holds on it elsewhere in this process.
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
            _switch_to_wal(path)
        finally:
            os.close(directory)
    except OSError as error:
        raise StoreFailed(
            f"the database {path} could not be opened: {error.strerror}",
            expected="a directory this user may write",
            next_step=f"check who may write {path.parent}, or set data_dir",
        ) from None
    except sqlite3.Error as error:
        raise StoreFailed(f"the database {path} could not be opened: {error}", next_step=_remedy(str(error))) from error


def _switch_to_wal(path: Path) -> None:
    # The mode stays in the file, so connections need not set it again.
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None)
    try:
        if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def is_sqlite(engine: Engine) -> bool:
    return engine.dialect.name == "sqlite"


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads: one consistent view, no lock that a writer would wait for."""
    with _told("reading"), engine.connect() as connection, connection.begin():
        yield connection


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes; committed when the block ends, rolled back when it raises. Keep it short.

    Not to be nested in one thread. Raises ``StoreFailed`` for any failure of the database.
    """
    with _told("writing"), _turn(engine), engine.connect() as plain:
        connection = plain.execution_options(chargehand_write=True)
        with connection.begin():
            yield connection


@contextlib.contextmanager
def _turn(engine: Engine) -> Iterator[None]:
    if not is_sqlite(engine):
        yield
        return
    with _write_locks_guard:
        lock = _write_locks.setdefault(str(engine.url.database), threading.RLock())
    with lock:
        yield


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        reason = str(error.orig)
        raise StoreFailed(
            f"{what} the database failed: {reason}",
            next_step=_remedy(reason),
            code="store-busy" if "locked" in reason else None,
        ) from error
    except SQLAlchemyError as error:
        raise StoreFailed(f"{what} the database failed: {error}") from error


def _remedy(reason: str) -> str:
    if "locked" in reason:
        return "another process holds the database for too long: look for one with `fuser` on the file"
    if "full" in reason:
        return "free disk space"
    if "readonly" in reason or "unable to open" in reason:
        return "check who may write the data directory"
    if "malformed" in reason or "not a database" in reason:
        return "the file is damaged: restore a backup"
    return "see the log of the gateway"
