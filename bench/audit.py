"""B5: how many audit records a second become durable and chained, beside bare SQLite on the same disk.

Run it with ``python -m bench.audit [--records N] [--rounds N] [--directory DIR] [--json FILE]``. Every row is a median of
rounds after a warm-up; a table for people, JSON for programs. What is measured: records a second whose ``append``
returned, so each is on disk (SQLite, WAL, ``synchronous=FULL``). Afterwards the chains are verified.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import dataclasses
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from supervisor.audit import kinds
from supervisor.audit.ledger import Entry, Ledger, open_ledger
from supervisor.audit.verify import verify

TARGET_PER_S = 10_000
BODY = {
    "call_id": "c1", "tool": "exec", "call_digest": "sha256:" + "0" * 64, "arguments": {"digest": "sha256:" + "1" * 64,
    "bytes": 180}, "outcome": "allow", "effect": "observe", "rule": "systemctl:status", "digest": "sha256:" + "2" * 64,
    "binaries": ["/usr/bin/systemctl"], "paths": [],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """``per_s``: records a second, median of the rounds; ``floor``: whether this is bare SQLite for comparison."""

    name: str
    per_s: float
    records: int
    floor: bool = False


def entry(number: int) -> Entry:
    return Entry(kinds.DECISION, BODY, machine=f"m-{number % 8}", actor="gateway")


def bare(path: Path, synchronous: str, records: int) -> float:
    """Bare SQLite: one row of the same size a commit; returns seconds."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        connection.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, body TEXT)")
        body = json.dumps(BODY)
        start = time.perf_counter()
        for _ in range(records):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO t (body) VALUES (?)", (body,))
            connection.execute("COMMIT")
        return time.perf_counter() - start
    finally:
        connection.close()


def one_by_one(ledger: Ledger, records: int) -> float:
    start = time.perf_counter()
    for number in range(records):
        ledger.append([entry(number)])
    return time.perf_counter() - start


def in_batches(ledger: Ledger, records: int, size: int) -> float:
    start = time.perf_counter()
    for first in range(0, records, size):
        ledger.append([entry(number) for number in range(first, min(first + size, records))])
    return time.perf_counter() - start


def by_threads(ledger: Ledger, records: int, threads: int, size: int) -> float:
    """``threads`` callers, each appending ``size`` records at a time and waiting until they are on disk."""

    def work(share: int) -> None:
        for first in range(0, share, size):
            ledger.append([entry(number) for number in range(first, first + size)])

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for done in [pool.submit(work, records // threads) for _ in range(threads)]:
            done.result()
        return time.perf_counter() - start


def by_coroutines(ledger: Ledger, records: int, coroutines: int) -> float:
    """``coroutines`` callers, each appending one record at a time and waiting until it is on disk."""

    async def work(share: int) -> None:
        for number in range(share):
            await ledger.append_async([entry(number)])

    async def all_of_them() -> float:
        start = time.perf_counter()
        await asyncio.gather(*(work(records // coroutines) for _ in range(coroutines)))
        return time.perf_counter() - start

    return asyncio.run(all_of_them())


def measure(name: str, records: int, rounds: int, work: Callable[[], float], *, floor: bool = False) -> Row:
    work()
    return Row(name, records / statistics.median(work() for _ in range(rounds)), records, floor)


def run(directory: Path, records: int, rounds: int) -> tuple[list[Row], dict[str, float]]:
    """All rows, and what verifying the result said."""
    few = max(records // 10, 100)
    with open_ledger(f"sqlite:///{directory / 'audit.db'}") as ledger:
        rows = [
            measure("bare SQLite NORMAL, one commit each", records, rounds,
                    lambda: bare(directory / "normal.db", "NORMAL", records), floor=True),
            measure("bare SQLite FULL, one commit each", few, rounds,
                    lambda: bare(directory / "full.db", "FULL", few), floor=True),
            measure("ledger, one caller, one record", few, rounds, lambda: one_by_one(ledger, few)),
            measure("ledger, one caller, 100 records", records, rounds, lambda: in_batches(ledger, records, 100)),
            measure("ledger, 32 callers, one record", records, rounds, lambda: by_threads(ledger, records, 32, 1)),
            measure("ledger, 32 callers, 10 records", records, rounds, lambda: by_threads(ledger, records, 32, 10)),
            measure("ledger, 250 coroutines, one record", records, rounds, lambda: by_coroutines(ledger, records, 250)),
        ]  # fmt: skip
        start = time.perf_counter()
        report = verify(ledger)
        seconds = time.perf_counter() - start
    checked = {"verified": report.verified, "records": report.records, "per_s": report.records / seconds}
    return rows, checked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where the databases are made (default: a temporary directory)")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    if options.directory is not None:
        options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        rows, checked = run(Path(directory), options.records, options.rounds)
    print(f"B5  audit records per second, durable when acknowledged (target {TARGET_PER_S:,} with group commit)")
    for row in rows:
        print(f"  {row.name:<40} {row.per_s:>10,.0f}/s   {'floor' if row.floor else ''}")
    print(f"  verified {checked['records']:,} records at {checked['per_s']:,.0f}/s: {checked['verified']}")
    best = max(row.per_s for row in rows if not row.floor)
    document = {
        "id": "B5",
        "target_per_s": TARGET_PER_S,
        "best_per_s": best,
        "met": best >= TARGET_PER_S,
        "rounds": options.rounds,
        "rows": [dataclasses.asdict(row) for row in rows],
        "verify": checked,
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    print(json.dumps(document))
    return 0 if checked["verified"] else 1


if __name__ == "__main__":
    sys.exit(main())
