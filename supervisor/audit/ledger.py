"""Appending to the audit chain and reading from it.

Owns: the one way to append (durable, in groups, once per key), and reading records, heads and checkpoints.
Deliberately does not know: what a body means, how a chain is verified (``supervisor.audit.verify``).

**Durability.** An ``append`` that returned is on disk: the ledger has connections of its own with ``synchronous=FULL``
(SQLite then syncs its write-ahead log at every commit), so neither SIGKILL nor a power cut takes an acknowledged
record. What announces an act is appended before the act.

**Group commit.** A sync costs the same for one record as for a thousand. So a thread that finds another one committing
leaves its entries with it; the first of those that waited then commits for all of them. There is no thread of the
ledger's own and no waiting for company: a lone append commits at once. Coroutines share one thread of their loop's executor.

**Across processes.** The write lock (SQLite) or the row of the chain (PostgreSQL) is taken before its head is read, so
two gateways can never write the same number.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine, RowMapping, insert, select, update

from supervisor.audit import kinds
from supervisor.audit.chain import EMPTY, Head, Record, link
from supervisor.errors import AuditFailed, BadInput
from supervisor.store.engine import is_sqlite, make_engine, reading, writing
from supervisor.store.migrate import upgrade
from supervisor.store.schema import audit_chains, audit_records
from tools.values import canonical

# One commit holds the write lock for this many records at most: about 50 ms on a slow box.
MAX_GROUP = 2000
# A body is metadata and digests; with content on, texts are capped long before this.
MAX_BODY_BYTES = 4_194_304
# How many rows are read from the database at a time when a whole chain is walked.
READ_AHEAD = 1000
# SQLite takes 32766 variables in one statement.
_KEYS_AT_ONCE = 5000


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is to be recorded.

    ``machine``: whose chain (``None``: the gateway's own). ``kind``: of ``supervisor.audit.kinds``. ``body``: plain JSON.
    ``actor``: who did it. ``key``: a name that makes the entry count once in its chain, however often it is appended (a
    durable workflow repeats its last step after a crash). ``at_us``: microseconds since the epoch (``None``: now).
    """

    kind: str
    body: Mapping[str, Any]
    machine: str | None = None
    run_id: str | None = None
    actor: str = "gateway"
    key: str | None = None
    at_us: int | None = None


@dataclasses.dataclass(frozen=True)
class _Prepared:
    chain: str
    at_us: int
    kind: str
    actor: str
    run_id: str | None
    key: str | None
    body: str


class _Ticket:
    """The entries of one caller on their way to the disk; the caller is a thread, or a coroutine of ``loop``."""

    __slots__ = ("done", "entries", "error", "future", "loop", "records", "turn")

    def __init__(self, entries: list[_Prepared], loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.entries = entries
        self.records: list[Record] = []
        self.error: BaseException | None = None
        self.done = False
        self.loop = loop
        self.future = None if loop is None else loop.create_future()
        # Set when the ticket is done, or when its thread is to commit for all that wait.
        self.turn = threading.Event() if loop is None else None

    def wake(self) -> None:
        if self.turn is not None:
            self.turn.set()
        elif self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self.loop.call_soon_threadsafe(self._resolve)

    def _resolve(self) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_result(None)

    def result(self) -> list[Record]:
        if self.error is not None:
            raise AuditFailed(
                f"{len(self.entries)} audit records could not be made durable: {self.error}",
                tried=", ".join(sorted({entry.kind for entry in self.entries})),
                next_step="what they announce was not done; mend the database and try again",
            ) from self.error
        return self.records


class Ledger:
    """The audit chains of one database. Thread-safe; coroutines use ``append_async``, or any other method in a thread.

    ``engine``: made with ``durable=True``. ``clock_us``: microseconds since the epoch; tests hand in their own.
    """

    def __init__(self, engine: Engine, clock_us: Callable[[], int] = lambda: time.time_ns() // 1000) -> None:
        self.engine = engine
        self.now_us = clock_us
        self._guard = threading.Lock()
        self._waiting: collections.deque[_Ticket] = collections.deque()
        self._committing = False

    def append(self, entries: Iterable[Entry]) -> list[Record]:
        """Record ``entries``, all or none, in their order; returns when they are on disk.

        Returns one record per entry; for a ``key`` that is in the chain already, the record that stands there. Raises
        ``BadInput`` for a kind that does not exist or a body that is not JSON (nothing is recorded then), ``AuditFailed``
        if it could not be made durable: what it announces must not happen.
        """
        ticket = _Ticket([self._prepare(entry) for entry in entries])
        if not ticket.entries:
            return []
        if not self._join(ticket) and ticket.turn is not None:
            ticket.turn.wait()
        if not ticket.done:
            self._lead()
        return ticket.result()

    async def append_async(self, entries: Iterable[Entry]) -> list[Record]:
        """``append`` for coroutines: any number may wait at once, one thread of the loop's executor commits for them.

        A cancelled caller leaves its entries with those that commit: they are recorded, as an ``append`` that was begun.
        """
        loop = asyncio.get_running_loop()
        ticket = _Ticket([self._prepare(entry) for entry in entries], loop)
        if not ticket.entries or ticket.future is None:
            return []
        if self._join(ticket):
            loop.run_in_executor(None, self._lead)
        await ticket.future
        return ticket.result()

    def record(
        self,
        kind: str,
        body: Mapping[str, Any],
        *,
        machine: str | None = None,
        run_id: str | None = None,
        actor: str = "gateway",
        key: str | None = None,
    ) -> Record:
        """Record one thing; see ``append``."""
        return self.append([Entry(kind, body, machine, run_id, actor, key)])[0]

    def heads(self) -> dict[str, Head]:
        """The last record of every chain, by the chain's name."""
        with reading(self.engine) as connection:
            return read_heads(connection)

    def records(
        self,
        *,
        chain: str | None = None,
        run_id: str | None = None,
        kind: str | None = None,
        after: int = 0,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> list[Record]:
        """Records by chain, run or kind; with a chain, those with a ``seq`` above ``after``; in order of time otherwise."""
        by_time = (audit_records.c.at_us, audit_records.c.chain, audit_records.c.seq)
        order = (audit_records.c.seq,) if chain is not None else by_time
        query = select(audit_records).limit(limit)
        query = query.order_by(*(column.desc() for column in order)) if newest_first else query.order_by(*order)
        if chain is not None:
            query = query.where(audit_records.c.chain == chain, audit_records.c.seq > after)
        if run_id is not None:
            query = query.where(audit_records.c.run_id == run_id)
        if kind is not None:
            query = query.where(audit_records.c.kind == kind)
        with reading(self.engine) as connection:
            return [as_record(row) for row in connection.execute(query).mappings()]

    def close(self) -> None:
        """Give the connections back; the ledger is not to be used afterwards."""
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, entry: Entry) -> _Prepared:
        if entry.kind not in kinds.KINDS:
            raise BadInput("this is no kind of audit record", expected=" | ".join(sorted(kinds.KINDS)), got=entry.kind)
        try:
            body = canonical(dict(entry.body))
        except (TypeError, ValueError) as error:
            raise BadInput(f"the body of {entry.kind} cannot be recorded: {error}", expected="plain JSON") from None
        if len(body) > MAX_BODY_BYTES:
            raise BadInput(
                f"the body of {entry.kind} is too long", expected=f"at most {MAX_BODY_BYTES} bytes", got=len(body)
            )
        chain = kinds.GATEWAY_CHAIN if entry.machine is None else kinds.machine_chain(entry.machine)
        at_us = self.now_us() if entry.at_us is None else entry.at_us
        return _Prepared(
            chain, at_us, entry.kind, _storable(entry.actor), entry.run_id, entry.key, body.decode("ascii")
        )

    def _join(self, ticket: _Ticket) -> bool:
        """Queue the ticket; returns whether its caller has to lead, because nobody does."""
        with self._guard:
            self._waiting.append(ticket)
            leads = not self._committing
            self._committing = True
        return leads

    def _lead(self) -> None:
        """Commit what waits. Hands on to the first thread that waits behind it; for coroutines it goes on itself."""
        interrupted: BaseException | None = None
        while True:
            group = self._next_group()
            try:
                self._commit(group)
            except BaseException as error:  # noqa: BLE001  # the callers that wait must be told of an interrupt, too
                for ticket in group:
                    ticket.error = error
                # Every caller is told by its ticket; an interrupt is this thread's own as well.
                interrupted = interrupted if isinstance(error, Exception) else error
            with self._guard:
                following = self._waiting[0] if self._waiting else None
                self._committing = following is not None
            for ticket in group:
                ticket.done = True
                ticket.wake()
            if following is None or following.turn is not None:
                break
        if following is not None:
            following.wake()
        if interrupted is not None:
            raise interrupted

    def _next_group(self) -> list[_Ticket]:
        with self._guard:
            group: list[_Ticket] = []
            size = 0
            while self._waiting and (not group or size + len(self._waiting[0].entries) <= MAX_GROUP):
                group.append(self._waiting.popleft())
                size += len(group[-1].entries)
            return group

    def _commit(self, group: list[_Ticket]) -> None:
        with writing(self.engine) as connection:
            records = append_within(connection, [entry for ticket in group for entry in ticket.entries])
        taken = 0
        for ticket in group:
            ticket.records = records[taken : taken + len(ticket.entries)]
            taken += len(ticket.entries)


def open_ledger(url: str, *, password: str | None = None) -> Ledger:
    """The ledger in the database at ``url``, brought to the newest schema. Raises ``BadSettings``, ``StoreFailed``."""
    engine = make_engine(url, durable=True, password=password)
    try:
        upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return Ledger(engine)


def append_within(connection: Connection, entries: Sequence[_Prepared]) -> list[Record]:
    """Chain ``entries`` inside the writing transaction ``connection``, which the caller commits."""
    names = sorted({entry.chain for entry in entries})
    heads = locked_heads(connection, names)
    standing = _standing(connection, entries)
    records: list[Record] = []
    fresh: list[Record] = []
    for entry in entries:
        known = standing.get((entry.chain, entry.key)) if entry.key is not None else None
        if known is None:
            known = link(
                entry.chain, heads[entry.chain], at_us=entry.at_us, kind=entry.kind, actor=entry.actor,
                run_id=entry.run_id, key=entry.key, body=entry.body,
            )  # fmt: skip
            heads[entry.chain] = Head(known.seq, known.hash)
            fresh.append(known)
            if entry.key is not None:
                standing[(entry.chain, entry.key)] = known
        records.append(known)
    if fresh:
        connection.execute(insert(audit_records), [record.__dict__ for record in fresh])
        for name in sorted({record.chain for record in fresh}):
            connection.execute(
                update(audit_chains)
                .where(audit_chains.c.chain == name)
                .values(seq=heads[name].seq, hash=heads[name].hash)
            )
    return records


def prepared(kind: str, body: Mapping[str, Any], at_us: int, actor: str = "gateway") -> _Prepared:
    """An entry of the gateway's own chain for ``append_within``."""
    return _Prepared(kinds.GATEWAY_CHAIN, at_us, kind, actor, None, None, canonical(dict(body)).decode("ascii"))


def read_heads(connection: Connection) -> dict[str, Head]:
    """The head of every chain that has records."""
    rows = connection.execute(select(audit_chains).where(audit_chains.c.seq > 0))
    return {row.chain: Head(row.seq, row.hash) for row in rows}


def read_chain(connection: Connection, chain: str) -> Iterator[Record]:
    """Every record of a chain in order, ``READ_AHEAD`` rows in memory at a time."""
    query = select(audit_records).where(audit_records.c.chain == chain).order_by(audit_records.c.seq)
    for row in connection.execution_options(yield_per=READ_AHEAD).execute(query).mappings():
        yield as_record(row)


def read_chain_names(connection: Connection) -> list[str]:
    """Every chain that has a head or a record."""
    with_head = connection.execute(select(audit_chains.c.chain)).scalars()
    with_records = connection.execute(select(audit_records.c.chain).distinct()).scalars()
    return sorted({*with_head, *with_records})


def as_record(row: RowMapping) -> Record:
    return Record(**row)


def locked_heads(connection: Connection, names: Sequence[str]) -> dict[str, Head]:
    """The heads of the chains ``names`` (sorted), each begun if it is new, and locked until the transaction ends.

    No writer waits for another in a circle: new rows are made before any row is locked, and both in order of name.
    """
    query = select(audit_chains).where(audit_chains.c.chain.in_(names)).order_by(audit_chains.c.chain)
    there = {row.chain: Head(row.seq, row.hash) for row in connection.execute(query)}
    missing = [name for name in names if name not in there]
    for name in missing:
        _begin_chain(connection, name)
    if is_sqlite(connection.engine):
        return there | dict.fromkeys(missing, EMPTY)
    return {row.chain: Head(row.seq, row.hash) for row in connection.execute(query.with_for_update())}


def _begin_chain(connection: Connection, name: str) -> None:
    if is_sqlite(connection.engine):
        from sqlalchemy.dialects.sqlite import insert as insert_or_not
    else:
        from sqlalchemy.dialects.postgresql import insert as insert_or_not  # type: ignore[assignment]
    row = {"chain": name, "seq": EMPTY.seq, "hash": EMPTY.hash}
    connection.execute(insert_or_not(audit_chains).values(row).on_conflict_do_nothing())


def _standing(connection: Connection, entries: Sequence[_Prepared]) -> dict[tuple[str, str], Record]:
    wanted: dict[str, list[str]] = {}
    for entry in entries:
        if entry.key is not None:
            wanted.setdefault(entry.chain, []).append(entry.key)
    found: dict[tuple[str, str], Record] = {}
    for chain, keys in wanted.items():
        for at in range(0, len(keys), _KEYS_AT_ONCE):
            query = select(audit_records).where(
                audit_records.c.chain == chain, audit_records.c.key.in_(keys[at : at + _KEYS_AT_ONCE])
            )
            for row in connection.execute(query).mappings():
                record = as_record(row)
                found[(chain, str(record.key))] = record
    return found


def _storable(text: str) -> str:
    # PostgreSQL has no NUL in text, and a lone surrogate is no UTF-8: names from outside may hold either.
    return text.replace("\0", "�").encode("utf-8", "replace").decode("utf-8")
