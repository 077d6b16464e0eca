"""The journal: chained, on disk before the act, and whole again after every way of breaking off."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.host.errors import JournalFailed
from edge_agent.host.journal import FIRST, MAX_LINE_BYTES, Journal, check, is_over, prune, read_lines
from tests.host.processes import in_child

RUN = "0190b5a4-0000-7000-8000-000000000001"


def new(directory: Path) -> Journal:
    return Journal(str(directory / f"{RUN}.jsonl"), RUN)


def three_lines(directory: Path) -> list[str]:
    journal = new(directory)
    journal.append("lease.started", {"lease_digest": "sha256:00"})
    journal.append("call.asked", {"tool": "exec", "arguments": {"argv": ["df", "ü\n\x85"]}}, "c1")
    journal.append("stopped", {"reason": "done"})
    journal.close()
    return read_lines(journal.path)


def test_each_line_carries_the_digest_of_the_one_before(tmp_path: Path) -> None:
    lines = three_lines(tmp_path)
    records = [json.loads(line) for line in lines]
    assert [record["seq"] for record in records] == [1, 2, 3]
    assert [record["prev"] for record in records] == [
        FIRST, *(hashlib.sha256(line.encode()).hexdigest() for line in lines[:2])
    ]  # fmt: skip
    assert all(list(record) == sorted(record) and record["run_id"] == RUN for record in records)
    assert check(lines, RUN) == (3, hashlib.sha256(lines[2].encode()).hexdigest())
    assert (records[1]["call_id"], records[2]["call_id"]) == ("c1", None)
    assert is_over(lines) and not is_over(lines[:2]) and not is_over([])


def test_the_file_is_the_users_alone(tmp_path: Path) -> None:
    three_lines(tmp_path)
    assert (tmp_path / f"{RUN}.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_line_is_on_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = new(tmp_path)
    seen: list[str] = []
    sync = os.fsync

    def watched(fd: int) -> None:
        seen.append(Path(journal.path).read_text(encoding="ascii"))
        sync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    journal.append("call.intent", {"step": 1}, "c1")
    assert len(seen) == 1 and seen[0].endswith("\n") and '"call.intent"' in seen[0]
    journal.close()


def test_a_failing_fsync_is_a_failed_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = new(tmp_path)
    journal.append("a", {})

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(JournalFailed, match="Input/output error"):
            journal.append("b", {})
    assert len(read_lines(journal.path)) == 1
    journal.append("c", {})
    assert check(read_lines(journal.path), RUN)[0] == 2
    journal.close()


def test_what_only_looks_like_the_last_event_is_not_taken_for_it() -> None:
    asked = json.dumps({"kind": "call.asked", "body": {"arguments": {"kind": "stopped"}}}, separators=(",", ":"))
    assert '"kind":"stopped"' in asked and not is_over([asked])
    assert not is_over(["[]"]) and not is_over(["nonsense"]) and not is_over(["[" * 100_000])


def test_a_journal_is_begun_once(tmp_path: Path) -> None:
    new(tmp_path).close()
    with pytest.raises(JournalFailed, match="exists already"):
        new(tmp_path)


def test_a_link_in_the_place_of_a_journal_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / f"{RUN}.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalFailed):
        new(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_read_only_directory_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(JournalFailed, match="could not be opened") as caught:
        new(Path("/proc"))
    assert "disk space" in caught.value.next_step


@pytest.mark.parametrize("body", [{"x": float("nan")}, {"x": object()}, {"x": "y" * MAX_LINE_BYTES}])
def test_what_has_no_line_is_refused_and_the_journal_goes_on(tmp_path: Path, body: dict[str, Any]) -> None:
    journal = new(tmp_path)
    with pytest.raises(JournalFailed):
        journal.append("a", body)
    journal.append("b", {})
    assert check(read_lines(journal.path), RUN)[0] == 1
    journal.close()


# -- full disks


def test_at_a_size_limit_the_torn_line_is_cut_back_and_space_heals(tmp_path: Path) -> None:
    def work() -> Any:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        journal = new(tmp_path)
        journal.append("a", {})
        size = os.path.getsize(journal.path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        errors = []
        for _ in range(2):
            try:
                journal.append("b", {})
            except JournalFailed as error:
                errors.append(str(error))
        cut = os.path.getsize(journal.path) == size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal.append("c", {})
        return [errors, cut, check(read_lines(journal.path), RUN)[0]]

    errors, cut, lines = in_child(work)
    assert len(errors) == 2 and "File too large" in errors[0] and cut and lines == 2


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "chargehand-test", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a file system")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_refuses_lines_and_keeps_the_chain(tiny_disk: Path) -> None:
    journal = new(tiny_disk)
    journal.append("a", {})
    (tiny_disk / "filler").write_bytes(b"x" * 4096)
    with pytest.raises(JournalFailed, match="No space left") as caught:
        for _ in range(100):
            journal.append("b", {"x": "y" * 500})
    assert "not executed" in caught.value.next_step
    written = check(read_lines(journal.path), RUN)[0]
    assert Path(journal.path).read_bytes().endswith(b"\n") and written == journal.seq
    (tiny_disk / "filler").unlink()
    journal.append("c", {})
    assert check(read_lines(journal.path), RUN)[0] == written + 1
    journal.close()


# -- breaking off and going on


def test_a_torn_line_is_cut_back_when_the_journal_is_opened_again(tmp_path: Path) -> None:
    lines = three_lines(tmp_path)
    path = tmp_path / f"{RUN}.jsonl"
    with path.open("ab") as file:
        file.write(b'{"body":{"torn')
    assert read_lines(str(path)) == lines
    journal = Journal(str(path), RUN, create=False)
    journal.append("stopped", {"reason": "again"})
    journal.close()
    assert check(read_lines(str(path)), RUN)[0] == 4


def test_a_damaged_journal_is_not_gone_on_with(tmp_path: Path) -> None:
    lines = three_lines(tmp_path)
    path = tmp_path / f"{RUN}.jsonl"
    path.write_text("\n".join([lines[0], lines[2]]) + "\n", encoding="ascii")
    with pytest.raises(JournalFailed, match="line 2 of the journal"):
        Journal(str(path), RUN, create=False)


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 2000), junk=st.binary(max_size=40).filter(lambda data: b"\n" not in data))
def test_however_a_journal_breaks_off_it_can_be_gone_on_with(cut: int, junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        lines = three_lines(Path(name))
        path = Path(name) / f"{RUN}.jsonl"
        data = path.read_bytes()[:cut]
        path.write_bytes(data + (junk if not data.endswith(b"\n") and cut < len(data) + 1 else b""))
        whole = read_lines(str(path))
        if whole != lines[: len(whole)]:
            return  # the junk made a line of its own: that is damage, not a torn end
        journal = Journal(str(path), RUN, create=False)
        journal.append("stopped", {})
        journal.close()
        assert check(read_lines(str(path)), RUN)[0] == len(whole) + 1


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 600), mask=st.integers(1, 255))
def test_a_changed_byte_changes_the_chain(at: int, mask: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        lines = three_lines(Path(name))
        head = check(lines, RUN)[1]
        path = Path(name) / f"{RUN}.jsonl"
        content = bytearray(path.read_bytes())
        content[at] ^= mask
        path.write_bytes(content)
        try:
            found = check(read_lines(str(path)), RUN)
        except JournalFailed:
            return
        assert found != (3, head)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_the_reader_takes_any_bytes(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        lines = read_lines(file.name)
        assert len(lines) == content.count(b"\n")
        is_over(lines)
        if lines:
            with pytest.raises(JournalFailed):
                check(lines, RUN)


def test_the_oldest_journals_are_pruned_and_nothing_else(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"0190b5a4-000{number}-7000-8000-000000000000.jsonl").write_text("", encoding="ascii")
    (tmp_path / "observed").mkdir()
    prune(str(tmp_path), keep=2)
    assert sorted(path.name[:13] for path in tmp_path.iterdir()) == ["0190b5a4-0003", "0190b5a4-0004", "observed"]
