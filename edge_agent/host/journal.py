"""The journal of one run: one JSON line per event, each chained to the one before, on disk before the act.

Owns: the file's format, writing with fsync, reading and checking the chain.
Deliberately does not know: what the events mean.

Rule (audit-and-traces.md, "Journal"): if a line cannot be written the act it announces does not happen, so ``append``
either returns with the line on disk or raises ``JournalFailed``; after a failure the file ends with a whole line.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

from edge_agent.host import clock
from edge_agent.host.errors import JournalFailed
from tools.values import canonical

FIRST = "0" * 64
# A line longer than this is a defect of the caller: bodies hold metadata and digests, never outputs.
MAX_LINE_BYTES = 262144
# Journals of past runs that stay on the machine; the centre has its own copy.
KEEP_JOURNALS = 200


class Journal:
    """The open journal of a run; one writer, append only.

    Args:
        path: the file; its directory exists. With ``create`` it must not exist yet.
        run_id: the run it belongs to, stands in every line.
    """

    def __init__(self, path: str, run_id: str, create: bool = True) -> None:
        self.path = path
        self.run_id = run_id
        self.seq = 0
        self.head = FIRST
        self._size = 0
        self._broken = ""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            if create:
                self._fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
                directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
            else:
                lines = read_lines(path)
                self.seq, self.head = check(lines, run_id)
                self._size = sum(len(line) + 1 for line in lines)
                self._fd = os.open(path, flags)
                # A line torn by a power loss or a kill was announced to nobody: what comes next must not stick to it.
                os.ftruncate(self._fd, self._size)
        except FileExistsError:
            raise JournalFailed(
                "a journal of run %s exists already" % run_id, next_step="this run was started before: use a new run id"
            ) from None
        except OSError as error:
            raise JournalFailed(
                "the journal %s could not be opened: %s" % (path, error.strerror),
                next_step="free disk space or make the journal directory writable",
            ) from error

    def append(self, kind: str, body: Dict[str, Any], call_id: Optional[str] = None) -> str:
        """Write one event and wait until it is on disk.

        Returns the line's SHA-256 (hex), which the next line carries as ``prev``. Raises ``JournalFailed``.
        """
        if self._broken:
            raise JournalFailed("the journal failed before: %s" % self._broken)
        record = {
            "seq": self.seq + 1,
            "prev": self.head,
            "run_id": self.run_id,
            "call_id": call_id,
            "kind": kind,
            "wall": round(clock.wall(), 3),
            "boot": round(clock.boottime(), 3),
            "body": body,
        }
        try:
            line = canonical(record)
        except (ValueError, TypeError, RecursionError) as error:
            raise JournalFailed("a %s has no canonical form: %s" % (kind, error)) from error
        if len(line) > MAX_LINE_BYTES:
            raise JournalFailed("a journal line of %d bytes is over the limit of %d" % (len(line), MAX_LINE_BYTES))
        try:
            self._write(line + b"\n")
            os.fsync(self._fd)
        except OSError as error:
            self._take_back(str(error))
            raise JournalFailed(
                "the journal could not be written: %s" % error.strerror,
                next_step="free disk space or make the journal directory writable; the call was not executed",
            ) from error
        self._size += len(line) + 1
        self.seq += 1
        self.head = hashlib.sha256(line).hexdigest()
        return self.head

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def _take_back(self, reason: str) -> None:
        # A torn line would break the chain for whoever reads it: cut the file back to its last whole line.
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as error:
            self._broken = "%s; and it could not be cut back: %s" % (reason, error)

    def close(self) -> None:
        os.close(self._fd)


def read_lines(path: str) -> List[str]:
    """The whole lines of a journal file; a torn last line (power loss) is left out. Raises ``OSError``.

    Bytes that are not ASCII, which no journal holds, are shown as escapes: that line then breaks the chain.
    """
    with open(path, "rb") as file:
        data = file.read()
    return [line.decode("ascii", "backslashreplace") for line in data.split(b"\n")[:-1]]


def check(lines: Iterable[str], run_id: str) -> Tuple[int, str]:
    """Check the chain of ``lines``; returns (last seq, head). Raises ``JournalFailed`` that names the line."""
    seq, head = 0, FIRST
    for line in lines:
        seq += 1
        try:
            record = json.loads(line)
            good = record["seq"] == seq and record["prev"] == head and record["run_id"] == run_id
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise JournalFailed("line %d of the journal of run %s does not continue the chain" % (seq, run_id))
        head = hashlib.sha256(line.encode("ascii")).hexdigest()
    return seq, head


def is_over(lines: Sequence[str]) -> bool:
    """Whether the last line is the event ``stopped``. Looks at the event itself: its body may hold any word."""
    try:
        return bool(lines) and bool(json.loads(lines[-1])["kind"] == "stopped")
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def prune(directory: str, keep: int = KEEP_JOURNALS) -> None:
    """Delete the oldest journals so that ``keep`` stay; names are UUIDv7, so they sort by time."""
    names = sorted(name for name in os.listdir(directory) if name.endswith(".jsonl"))
    for name in names[: max(0, len(names) - keep)]:
        os.unlink(os.path.join(directory, name))
