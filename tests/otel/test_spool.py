"""The durable spool: held once, bounded, safe against kills, threads and other processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from otel.redaction import Redactor
from otel.spans import span_id, trace_id
from otel.spool import Spool, SpoolLimits, SpoolUnusable
from tests.otel.conftest import make_span

ROOT = Path(__file__).parents[2]


def test_a_span_is_held_once_while_pending_and_after_delivery(spool: Spool, run_id: str) -> None:
    span = make_span(run_id, "c1")
    assert spool.put([span, span]).accepted == 1
    assert spool.put([span]).duplicates == 1
    held = spool.pending(10)
    assert [item.span for item in held] == [span]
    spool.delivered([held[0].row])
    assert spool.put([make_span(run_id, "c1", name="again")]).duplicates == 1
    assert spool.depth() == 0
    assert spool.span_ids(trace_id(run_id)) == {span.span_id: "delivered"}


def test_the_first_content_of_a_span_stands(spool: Spool, run_id: str) -> None:
    spool.put([make_span(run_id, "c1", name="first")])
    spool.put([make_span(run_id, "c1", name="second")])
    assert [item.span.name for item in spool.pending(10)] == ["first"]


def test_spans_come_out_in_the_order_they_ended_up_in(spool: Spool, run_id: str) -> None:
    spans = [make_span(run_id, key) for key in ("c3", "c1", "c2", "root")]
    for span in spans:
        spool.put([span])
    assert [item.span for item in spool.pending(3)] == spans[:3]
    assert spool.pending_spans(trace_id(run_id)) == spans
    assert spool.pending_of(trace_id(run_id)) == 4


def test_nothing_unredacted_is_written(tmp_path: Path, run_id: str) -> None:
    with Spool(tmp_path / "spans.db", Redactor(["canary-5ecret"])) as spool:
        spool.put([make_span(run_id, "c1", attributes={"out": "x canary-5ecret y"}, status_message="canary-5ecret")])
        for path in tmp_path.iterdir():
            assert b"canary-5ecret" not in path.read_bytes()
        assert "[redacted]" in str(spool.pending(1)[0].span.attributes["out"])


def test_the_spool_is_readable_by_its_owner_only(spool: Spool, run_id: str) -> None:
    spool.put([make_span(run_id, "c1")])
    for path in spool.path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_full_spool_refuses_the_newest_and_counts_the_gap(tmp_path: Path, run_id: str) -> None:
    with Spool(tmp_path / "spans.db", Redactor(), SpoolLimits(pending_spans=3)) as spool:
        result = spool.put([make_span(run_id, f"c{number}") for number in range(5)])
        assert (result.accepted, result.duplicates, result.refused) == (3, 0, 2)
        assert spool.put([make_span(run_id, "c0")]).duplicates == 1
        assert spool.put([make_span(run_id, "c9")]).refused == 1
        [gap] = spool.gaps()
        assert (gap.trace_id, gap.reason, gap.spans) == (trace_id(run_id), "spool full", 3)
        spool.delivered([spool.pending(1)[0].row])
        assert spool.put([make_span(run_id, "c9")]).accepted == 1
    with Spool(tmp_path / "spans.db", Redactor()) as again:
        assert [gap.spans for gap in again.gaps()] == [3]
        assert again.depth() == 3


def test_the_bound_in_bytes_holds_too(tmp_path: Path, run_id: str) -> None:
    with Spool(tmp_path / "spans.db", Redactor(), SpoolLimits(pending_bytes=5000)) as spool:
        result = spool.put([make_span(run_id, f"c{n}", attributes={"x": "y" * 1000}) for n in range(8)])
        assert (result.accepted, result.refused) == (3, 5)
        assert spool.counts()["pending_bytes"] <= 5000


def test_a_disk_that_refuses_does_not_fail_the_run_and_the_gap_is_written_later(spool: Spool, run_id: str) -> None:
    pages = spool._db.execute("PRAGMA page_count").fetchone()[0]
    spool._db.execute(f"PRAGMA max_page_count = {pages}")  # what a full disk looks like to SQLite
    result = spool.put([make_span(run_id, f"c{number}", attributes={"x": "y" * 9000}) for number in range(9)])
    assert result.refused == 9
    assert [gap.spans for gap in spool.gaps()] == [9]
    spool._db.execute("PRAGMA max_page_count = 100000")
    assert spool.put([make_span(run_id, "c1")]).accepted == 1
    assert [gap.spans for gap in spool.gaps()] == [9]
    with Spool(spool.path, Redactor()) as other:
        [gap] = other.gaps()
        assert gap.spans == 9
        assert "full" in gap.reason


def test_a_span_set_aside_is_reported_and_can_be_tried_again(spool: Spool, run_id: str) -> None:
    spool.put([make_span(run_id, "c1"), make_span(run_id, "c2")])
    row = spool.pending(1)[0].row
    spool.refused(row, "422 no")
    assert [item.attempts for item in spool.pending(5, suspects=True)] == [1]
    assert len(spool.pending(5)) == 1
    spool.set_aside(row, "422 no")
    assert [(span.span_id, span.reason) for span in spool.rejected()] == [(span_id(run_id, "c1"), "422 no")]
    assert spool.counts()["rejected"] == 1
    assert spool.depth() == 1
    assert spool.retry_rejected() == 1
    assert spool.depth() == 2
    assert spool.counts()["rejected"] == 0


def test_delivered_marks_are_bounded(tmp_path: Path, run_id: str) -> None:
    with Spool(tmp_path / "spans.db", Redactor(), SpoolLimits(markers=10)) as spool:
        for number in range(200):
            spool.put([make_span(run_id, f"c{number}")])
            spool.delivered([item.row for item in spool.pending(1)])
        assert len(spool.span_ids(trace_id(run_id))) <= 10 + 64
        assert spool.counts()["delivered"] == 200


def test_listeners_hear_of_new_spans_only(spool: Spool, run_id: str) -> None:
    heard: list[int] = []
    end = spool.subscribe(lambda: heard.append(1))
    spool.put([make_span(run_id, "c1")])
    spool.put([make_span(run_id, "c1")])
    spool.put([])
    end()
    spool.put([make_span(run_id, "c2")])
    assert heard == [1]


def test_threads_put_the_same_spans_and_each_is_held_once(spool: Spool, run_id: str) -> None:
    spans = [make_span(run_id, f"c{number}") for number in range(200)]
    threads = [threading.Thread(target=lambda: [spool.put([span]) for span in spans]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert spool.depth() == 200


PUTTER = """
import sys
from otel.redaction import Redactor
from otel.spool import Spool
from tests.otel.conftest import make_span
path, run, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
spool = Spool(path, Redactor())
for number in range(first, first + 100000):
    assert spool.put([make_span(run, f"c{number}")]).accepted == 1
    print(number, flush=True)
"""


def test_two_processes_killed_in_the_middle_lose_no_span_they_were_promised(spool: Spool, run_id: str) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PUTTER, str(spool.path), run_id, str(first)], cwd=ROOT, stdout=subprocess.PIPE
        )
        for first in (0, 100_000)
    ]
    promised: set[int] = set()
    for child in children:
        assert child.stdout is not None
        for _ in range(200):
            promised.add(int(child.stdout.readline()))
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
        assert child.stdout is not None
        promised |= {int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")}
        child.stdout.close()
        child.wait()
    held = spool.span_ids(trace_id(run_id))
    assert {span_id(run_id, f"c{number}") for number in promised} <= set(held)
    assert spool.depth() == len(held)
    assert spool.put([make_span(run_id, "root")]).accepted == 1


def test_only_one_may_deliver_and_a_dead_holder_lets_go(spool: Spool) -> None:
    script = (
        "import sys; from otel.redaction import Redactor; from otel.spool import Spool\n"
        "with Spool(sys.argv[1], Redactor()).only_deliverer() as mine: print(mine, flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(spool.path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == b"True\n"
    with spool.only_deliverer() as mine:
        assert not mine
    child.kill()
    child.wait()
    child.stdout.close()
    child.stdin.close()
    with spool.only_deliverer() as mine:
        assert mine
        with spool.only_deliverer() as second:
            assert not second


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b""])
def test_a_file_that_is_no_spool_is_refused_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spans.db"
    if content:
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE theirs (x)")
        other.close()
    with pytest.raises(SpoolUnusable, match="move the file away"):
        Spool(path, Redactor())


def test_a_directory_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SpoolUnusable, match="No such file"):
        Spool(tmp_path / str(uuid.uuid4()) / "spans.db", Redactor())
