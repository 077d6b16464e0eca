"""The chain itself: a record, its bytes, its hash, and finding the exact place where a chain breaks.

Owns: the form of a record (format 1) and every rule of verification.
Deliberately does not know: the database, files, keys, the clock. Pure.

A record's hash is the SHA-256 of its header: canonical JSON of ``{"v", "chain", "seq", "at_us", "kind", "actor",
"run_id", "key", "body_digest", "prev"}``, where ``prev`` is the hash of the record before it in the chain. The body enters
by its digest, so a body can be proven without being shown.

What a chain alone cannot show is that its last records are missing or that all of it was computed anew; for that there
are marks: what a signed checkpoint says about the chain at one ``seq``.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence

from tools.values import JsonObject, canonical, digest

FORMAT = 1
# What the first record of a chain carries as `prev`.
GENESIS = "0" * 64

CHANGED = "changed"  # a field of the record is not what was hashed
REMOVED = "removed"  # records are missing between others
REORDERED = "reordered"  # a record stands where another one was written
TRUNCATED = "truncated"  # records are missing at the end
FOREIGN = "foreign"  # a whole record of another chain, or a second one with the same number
REPLACED = "replaced"  # a whole record, well-formed, that is not the one its neighbours, head or checkpoint know
FORGED = "forged"  # a checkpoint that the key did not sign, or that contradicts another

# Trying where a damaged record may have come from is quadratic; beyond this many the answer would not be read anyway.
MAX_GUESSES = 512


@dataclasses.dataclass(frozen=True)
class Record:
    """One audit record. ``at_us``: microseconds since the epoch, UTC. ``body``: canonical JSON text.

    ``actor``: who did it (``operator:anna``, ``gateway``, ``agent:web-01``). ``key``: a name under which the record is
    written at most once in its chain, or ``None``.
    """

    chain: str
    seq: int
    at_us: int
    kind: str
    actor: str
    run_id: str | None
    key: str | None
    body: str
    prev: str
    hash: str


@dataclasses.dataclass(frozen=True)
class Head:
    """The last record of a chain by number and hash."""

    seq: int
    hash: str


@dataclasses.dataclass(frozen=True)
class Mark:
    """What checkpoint ``number`` says: record ``seq`` of the chain has ``hash``."""

    number: int
    seq: int
    hash: str


@dataclasses.dataclass(frozen=True)
class Break:
    """One place where something does not hold.

    ``seq`` to ``last_seq``: the records concerned, by the number under which they were written. ``message``: one
    sentence. ``expected`` and ``got``: what was compared.
    """

    kind: str
    chain: str
    seq: int
    last_seq: int
    message: str
    expected: str = ""
    got: str = ""

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)


def header(record: Record) -> JsonObject:
    """What is hashed."""
    return _header(
        record.chain, record.seq, record.at_us, record.kind, record.actor, record.run_id, record.key, record.body,
        record.prev,
    )  # fmt: skip


def _header(
    chain: str, seq: int, at_us: int, kind: str, actor: str, run_id: str | None, key: str | None, body: str, prev: str
) -> JsonObject:
    return {
        "v": FORMAT,
        "chain": chain,
        "seq": seq,
        "at_us": at_us,
        "kind": kind,
        "actor": actor,
        "run_id": run_id,
        "key": key,
        "body_digest": digest(body),
        "prev": prev,
    }


def compute_hash(record: Record) -> str:
    """The hash the record must carry (64 hex digits); its own ``hash`` is not looked at."""
    return hashlib.sha256(canonical(header(record))).hexdigest()


def link(
    chain: str, before: Head, *, at_us: int, kind: str, actor: str, run_id: str | None, key: str | None, body: str
) -> Record:
    """The record that follows ``before`` in ``chain``."""
    seq, prev = before.seq + 1, before.hash
    text = _header(chain, seq, at_us, kind, actor, run_id, key, body, prev)
    return Record(chain, seq, at_us, kind, actor, run_id, key, body, prev, hashlib.sha256(canonical(text)).hexdigest())


EMPTY = Head(0, GENESIS)


class ChainChecker:
    """Checks one chain, record by record in the order of ``seq``, in constant memory as long as the chain holds.

    ``head``: what the database believes to be the end. ``marks``: what checkpoints say about this chain.
    """

    def __init__(self, chain: str, head: Head | None = None, marks: Sequence[Mark] = ()) -> None:
        self.chain = chain
        self.records = 0
        self._head = head
        self._marks = sorted(marks, key=lambda mark: (mark.seq, mark.number))
        self._wanted = {mark.seq for mark in marks}
        self._at_marks: dict[int, str] = {}
        self._breaks: list[Break] = []
        # Each with the place it was taken to fill.
        self._damaged: list[tuple[Record, int]] = []
        self._gaps: list[tuple[int, int]] = []
        self._last = EMPTY
        # The hash the next record must carry as `prev`; unknown behind something that is reported already.
        self._known: str | None = GENESIS

    def feed(self, record: Record) -> None:
        """Look at the next record."""
        self.records += 1
        if compute_hash(record) != record.hash:
            self._feed_damaged(record)
        elif record.chain != self.chain:
            self._report(FOREIGN, record.seq, f"a record of chain {record.chain} stands in this one", got=record.chain)
        elif record.seq <= self._last.seq:
            self._report(FOREIGN, record.seq, f"there is a second record {record.seq}", got=record.hash)
        else:
            self._feed_intact(record)

    def _feed_intact(self, record: Record) -> None:
        if record.seq > self._last.seq + 1:
            self._gaps.append((self._last.seq + 1, record.seq - 1))
            self._known = None
        if self._known is not None and record.prev != self._known:
            before = self._last.seq
            what = (
                f"record {before} is not the one that record {record.seq} was written after"
                if before
                else "the first record claims to have one before it"
            )
            self._report(REPLACED, max(before, 1), what, expected=record.prev, got=self._known)
        self._advance(record.seq, record.hash, record.hash)

    def _feed_damaged(self, record: Record) -> None:
        written_as = self._missing_number_of(record)
        if written_as is not None and self._fill(written_as):
            self._report_number(record, written_as)
            return
        expected = self._last.seq + 1
        # Its number may be what was changed: it fills the next place if it fits there, or follows what is there.
        fits = compute_hash(dataclasses.replace(record, seq=expected)) == record.hash
        follows = record.seq > expected and record.prev == self._known
        place = expected if fits or follows else record.seq
        self._damaged.append((record, place))
        if place > expected:
            self._gaps.append((expected, place - 1))
        if place >= expected:
            self._advance(place, record.hash, None)

    def _missing_number_of(self, record: Record) -> int | None:
        places = (seq for first, last in self._gaps for seq in range(first, min(last, first + MAX_GUESSES) + 1))
        return _written_as(record, itertools.islice(places, MAX_GUESSES))

    def _advance(self, seq: int, found_hash: str, known: str | None) -> None:
        self._last = Head(seq, found_hash)
        self._known = known
        if seq in self._wanted and known is not None:
            self._at_marks[seq] = found_hash

    def finish(self) -> list[Break]:
        """All breaks, in the order of their place."""
        self._explain_damage()
        for first, last in self._gaps:
            span = f"record {first} is" if first == last else f"records {first} to {last} are"
            self._report(REMOVED, first, f"{span} missing", last=last)
        self._check_end()
        return sorted(self._breaks, key=lambda found: (found.seq, found.kind))

    def _explain_damage(self) -> None:
        stored_at = {record.seq for record, _ in self._damaged}
        places = sorted(stored_at | {place for _, place in self._damaged})[:MAX_GUESSES]
        for record, _ in self._damaged:
            following = self._last.seq + 1
            if _written_as(record, [following]) is not None:
                # The last record was given a number further up.
                self._advance(following, record.hash, None)
                self._report_number(record, following)
                continue
            missing = self._missing_number_of(record)
            written_as = missing if missing is not None else _written_as(record, places)
            if written_as is None:
                self._report(
                    CHANGED,
                    record.seq,
                    f"record {record.seq} was changed after it was written",
                    expected=record.hash,
                    got=compute_hash(record),
                )
            elif missing is None and written_as in stored_at:
                self._report(
                    REORDERED,
                    written_as,
                    f"the record that was written as {written_as} stands at {record.seq}",
                    expected=str(written_as),
                    got=str(record.seq),
                )
            else:
                self._fill(written_as)
                self._report_number(record, written_as)

    def _report_number(self, record: Record, written_as: int) -> None:
        self._report(
            CHANGED,
            written_as,
            f"the number of record {written_as} was changed to {record.seq}",
            expected=str(written_as),
            got=str(record.seq),
        )

    def _fill(self, seq: int) -> bool:
        for place, (first, last) in enumerate(self._gaps):
            if first <= seq <= last:
                parts = [(first, seq - 1), (seq + 1, last)]
                self._gaps[place : place + 1] = [part for part in parts if part[0] <= part[1]]
                return True
        return False

    def _check_end(self) -> None:
        last = self._last
        furthest = max([mark.seq for mark in self._marks] + ([self._head.seq] if self._head else []), default=0)
        if furthest > last.seq:
            where = self._source_of(furthest)
            self._report(
                TRUNCATED,
                last.seq + 1,
                f"the chain ends with record {last.seq}, but {where} knows record {furthest}",
                last=furthest,
                expected=str(furthest),
                got=str(last.seq),
            )
        if self._head is not None and self._known is not None and self._head != last:
            if self._head.seq == last.seq:
                self._report(
                    REPLACED, last.seq, f"the last record, {last.seq}, is not the one that was written last",
                    expected=self._head.hash, got=last.hash,
                )  # fmt: skip
            elif self._head.seq < last.seq:
                self._report(
                    FOREIGN, self._head.seq + 1, "there are records behind the one that was written last", last=last.seq,
                    expected=str(self._head.seq), got=str(last.seq),
                )  # fmt: skip
        proven = 0
        for mark in self._marks:
            found = self._at_marks.get(mark.seq)
            if found == mark.hash:
                proven = mark.seq
            elif found is not None:
                self._report(
                    REPLACED,
                    proven + 1,
                    f"records {proven + 1} to {mark.seq} are not the ones that checkpoint {mark.number} was made of",
                    last=mark.seq,
                    expected=mark.hash,
                    got=found,
                )
                return

    def _source_of(self, seq: int) -> str:
        numbers = [mark.number for mark in self._marks if mark.seq == seq]
        return f"checkpoint {numbers[0]}" if numbers else "the head of the chain"

    def _report(
        self, kind: str, seq: int, message: str, *, last: int | None = None, expected: str = "", got: str = ""
    ) -> None:
        self._breaks.append(Break(kind, self.chain, seq, seq if last is None else last, message, expected, got))


def _written_as(record: Record, numbers: Iterable[int]) -> int | None:
    """Which of ``numbers`` makes the damaged record whole again, if any does."""
    fitting = (seq for seq in numbers if compute_hash(dataclasses.replace(record, seq=seq)) == record.hash)
    return next(fitting, None)


def verify_sequence(
    chain: str, records: Iterable[Record], head: Head | None = None, marks: Sequence[Mark] = ()
) -> list[Break]:
    """Every break in ``records``, given in the order in which they were found (a file has an order of its own).

    Returns an empty list if the chain holds. A single changed field, removed run of records, moved record, foreign record
    or cut tail (with ``head`` or ``marks``) is reported as exactly that, at its own place.
    """
    found = list(records)
    moved = _out_of_order([record.seq for record in found if compute_hash(record) == record.hash])
    checker = ChainChecker(chain, head, marks)
    for record in sorted(found, key=lambda record: record.seq):
        checker.feed(record)
    breaks = checker.finish()
    told = {(found.kind, found.seq) for found in breaks}
    for seq in moved:
        if (FOREIGN, seq) not in told:
            breaks.append(Break(REORDERED, chain, seq, seq, f"record {seq} does not stand in its place"))
    return sorted(breaks, key=lambda found: (found.seq, found.kind))


def _out_of_order(numbers: Sequence[int]) -> list[int]:
    """The numbers that moved: those that do not stand where sorting puts them (two that changed places), or all but a
    longest increasing subsequence (one that was moved past many), whichever are fewer."""
    exchanged = [number for number, right in zip(numbers, sorted(numbers), strict=True) if number != right]
    if not exchanged:
        return []
    tails: list[int] = []
    tail_places: list[int] = []
    before: list[int] = []
    for place, number in enumerate(numbers):
        at = bisect.bisect_left(tails, number)
        before.append(tail_places[at - 1] if at else -1)
        tails[at : at + 1] = [number]
        tail_places[at : at + 1] = [place]
    kept = set()
    place = tail_places[-1]
    while place >= 0:
        kept.add(place)
        place = before[place]
    moved = [number for place, number in enumerate(numbers) if place not in kept]
    return sorted(exchanged if len(exchanged) <= len(moved) else moved)
