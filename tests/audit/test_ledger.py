"""Appending: durable, in groups, once per key, from many threads and processes at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from supervisor.audit import kinds
from supervisor.audit.chain import GENESIS
from supervisor.audit.ledger import Entry, Ledger, open_ledger
from supervisor.audit.verify import verify
from supervisor.errors import AuditFailed, BadInput
from supervisor.store.engine import writing


def entry(number: int, machine: str | None = "web-01", **more: Any) -> Entry:
    return Entry(kinds.DECISION, {"n": number}, machine=machine, **more)


def test_each_chain_counts_from_one_and_is_linked(ledger: Ledger) -> None:
    records = ledger.append([entry(1), entry(2, None), entry(3), entry(4, "gateway")])
    assert [(record.chain, record.seq) for record in records] == [
        ("machine:web-01", 1), ("gateway", 1), ("machine:web-01", 2), ("machine:gateway", 1),
    ]  # fmt: skip
    assert (records[0].prev, records[2].prev) == (GENESIS, records[0].hash)
    assert ledger.heads()["machine:web-01"].hash == records[2].hash
    assert ledger.records(chain="machine:web-01") == [records[0], records[2]]


def test_records_are_found_by_run_and_kind(ledger: Ledger) -> None:
    ledger.record(kinds.RUN_REQUESTED, {}, machine="web-01", run_id="r1")
    ledger.record(kinds.RUN_STATE, {"to": "queued"}, machine="web-01", run_id="r1", actor="operator:anna")
    ledger.record(kinds.RUN_STATE, {"to": "queued"}, machine="web-02", run_id="r2")
    assert [record.kind for record in ledger.records(run_id="r1")] == [kinds.RUN_REQUESTED, kinds.RUN_STATE]
    assert len(ledger.records(kind=kinds.RUN_STATE)) == 2
    assert [record.run_id for record in ledger.records(newest_first=True, limit=1)] == ["r2"]
    assert ledger.records(run_id="r1", kind=kinds.RUN_STATE)[0].actor == "operator:anna"


def test_an_entry_with_a_key_counts_once(ledger: Ledger) -> None:
    first = ledger.append([entry(1, key="r1:queued")])[0]
    again = ledger.append([entry(2, key="r1:queued"), entry(3), entry(4, key="x"), entry(5, key="x")])
    assert again[0] == first
    assert again[2] == again[3]
    assert [record.seq for record in ledger.records(chain="machine:web-01")] == [1, 2, 3]
    assert ledger.append([entry(9, "web-02", key="r1:queued")])[0].seq == 1


def test_nothing_appended_is_nothing_done(ledger: Ledger) -> None:
    assert ledger.append([]) == []
    assert ledger.heads() == {}


@pytest.mark.parametrize(
    "bad", [Entry("made.up", {}), Entry(kinds.LOGIN, {"x": float("nan")}), Entry(kinds.LOGIN, {"x": {1, 2}}),
            Entry(kinds.LOGIN, {"x": "y" * 5_000_000})],
)  # fmt: skip
def test_a_bad_entry_is_refused_and_nothing_of_its_call_is_recorded(ledger: Ledger, bad: Entry) -> None:
    with pytest.raises(BadInput):
        ledger.append([entry(1), bad])
    assert ledger.heads() == {}


def test_names_from_outside_cannot_break_the_chain(ledger: Ledger) -> None:
    ledger.record(kinds.LOGIN_FAILED, {"name": "\0\ud800"}, actor="operator:\0\ud800 ü")
    assert ledger.records()[0].actor == "operator:�? ü"
    assert verify(ledger).verified


def test_many_threads_share_commits_and_the_chain_holds(ledger: Ledger) -> None:
    def work(number: int) -> list[int]:
        return [ledger.append([entry(number, f"m-{number % 3}"), entry(number)])[1].seq for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        numbers = [seq for part in pool.map(work, range(16)) for seq in part]
    assert sorted(numbers) == list(range(1, 161))
    report = verify(ledger)
    assert (report.verified, report.records) == (True, 320)


async def test_many_coroutines_share_commits_and_the_chain_holds(ledger: Ledger) -> None:
    async def work(number: int) -> int:
        return (await ledger.append_async([entry(number)]))[0].seq

    numbers = await asyncio.gather(*(work(number) for number in range(300)))
    assert sorted(numbers) == list(range(1, 301))
    assert await ledger.append_async([]) == []
    assert (await asyncio.to_thread(verify, ledger)).verified


async def test_threads_and_coroutines_together_leave_nobody_waiting(ledger: Ledger) -> None:
    async def soon(number: int) -> None:
        await ledger.append_async([entry(number)])

    threads = [asyncio.to_thread(ledger.append, [entry(number)]) for number in range(20)]
    await asyncio.gather(*(soon(number) for number in range(60)), *threads)
    assert ledger.heads()["machine:web-01"].seq == 80


async def test_a_cancelled_coroutine_leaves_its_entry_and_stops_nobody(ledger: Ledger) -> None:
    tasks = [asyncio.create_task(ledger.append_async([entry(number)])) for number in range(40)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await ledger.append_async([entry(99)])
    assert ledger.heads()["machine:web-01"].seq == 41


def test_a_coroutine_whose_loop_is_gone_stops_nobody(ledger: Ledger) -> None:
    async def leave() -> None:
        task = asyncio.create_task(ledger.append_async([entry(1)]))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())
    ledger.append([entry(2)])
    assert verify(ledger).verified


def break_the_table(ledger: Ledger) -> None:
    with writing(ledger.engine) as connection:
        connection.execute(text("ALTER TABLE audit_records RENAME TO elsewhere"))


def test_every_waiting_caller_is_told_when_the_database_fails_and_all_goes_on_afterwards(ledger: Ledger) -> None:
    ledger.append([entry(0)])
    break_the_table(ledger)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ledger.append, [entry(number)]) for number in range(16)]
        for future in futures:
            with pytest.raises(AuditFailed, match="was not done"):
                future.result(timeout=30)
    with writing(ledger.engine) as connection:
        connection.execute(text("ALTER TABLE elsewhere RENAME TO audit_records"))
    assert ledger.append([entry(1)])[0].seq == 2
    assert verify(ledger).verified


def test_those_behind_a_large_group_are_committed_after_it(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.audit.ledger.MAX_GROUP", 5)
    barrier = threading.Barrier(12)

    def work(number: int) -> int:
        barrier.wait(timeout=30)
        return len(ledger.append([entry(number), entry(number), entry(number)]))

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert sum(pool.map(work, range(12))) == 36
    assert ledger.heads()["machine:web-01"].seq == 36


def test_two_gateways_write_one_chain(url: str, ledger: Ledger) -> None:
    with open_ledger(url) as other, concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit((ledger, other)[n % 2].append, [entry(n), entry(n, None)]) for n in range(80)]
        for future in futures:
            future.result()
    report = verify(ledger)
    assert (report.verified, report.chains) == (True, {"gateway": 80, "machine:web-01": 80})


CHILD = """
import sys
from supervisor.audit import kinds
from supervisor.audit.ledger import Entry, open_ledger
ledger = open_ledger(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    records = ledger.append([Entry(kinds.DECISION, {"n": number + i}, machine="web-01") for i in range(3)])
    number += 3
    # One line in one write: what is read here was acknowledged.
    sys.stdout.write("".join(f"{record.seq} {record.hash}\\n" for record in records))
    sys.stdout.flush()
"""


def acknowledged_until_killed(url: str, at_least: int) -> dict[int, str]:
    """What a child process said was recorded before it was killed in the middle of appending."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, url], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    told: dict[int, str] = {}
    try:
        assert child.stdout.readline() == "ready\n"
        for line in child.stdout:
            seq, record_hash = line.split()
            told[int(seq)] = record_hash
            if len(told) >= at_least:
                break
    finally:
        child.kill()
    # What was written before the kill and not read yet was acknowledged, too.
    for line in child.stdout.read().splitlines(keepends=True):
        if line.endswith("\n"):
            seq, record_hash = line.split()
            told[int(seq)] = record_hash
    child.stdout.close()
    child.wait()
    return told


def test_no_acknowledged_record_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    told: dict[int, str] = {}
    for round_number in range(3):
        told |= acknowledged_until_killed(url, 40 + 97 * round_number)
        with open_ledger(url) as ledger:
            report = verify(ledger)
            stored = {record.seq: record.hash for record in ledger.records(chain="machine:web-01")}
        assert report.breaks == ()
        assert told.items() <= stored.items()
        # All or none of a call: three at a time.
        assert len(stored) % 3 == 0
    assert len(told) > 300


@pytest.mark.slow
def test_sigkill_in_the_middle_of_ten_thousand_appends_loses_nothing(url: str) -> None:
    told: dict[int, str] = {}
    while len(told) < 10_000:
        told |= acknowledged_until_killed(url, 2_500)
    with open_ledger(url) as ledger:
        report = verify(ledger)
        stored = {record.seq: record.hash for record in ledger.records(chain="machine:web-01")}
    assert report.breaks == ()
    assert told.items() <= stored.items()
