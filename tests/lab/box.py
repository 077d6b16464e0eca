"""What the lab does to the box it runs on: commands, locks, mounts, process groups and the cache directory.

Owns every child process of the lab except the machines themselves. Knows nothing of machines, images or networks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

CACHE_VARIABLE = "CHARGEHAND_LAB_CACHE"
CACHE_DEFAULT = Path("/var/cache/chargehand-lab")

POLL_SECONDS = 0.02
"""How often a condition that has no event to wait for is looked at again."""

OUTPUT_TAIL = 2000
"""Characters of a failed command's output that its error quotes: enough for the reason, short enough to read."""


class LabError(Exception):
    """The lab could not do what it was asked to; the message says what was tried and what came."""


class CommandError(LabError):
    """A command ended with a status other than 0."""

    def __init__(self, argv: Sequence[str], status: int, stdout: str, stderr: str) -> None:
        self.argv = list(argv)
        self.status = status
        self.stdout = stdout
        self.stderr = stderr
        said = (stderr.strip() or stdout.strip())[-OUTPUT_TAIL:] or "nothing"
        super().__init__(f"{shlex.join(self.argv)} ended with status {status}; it said: {said}")


def cache_directory() -> Path:
    """Where built images and the trees of running machines lie; made when missing."""
    path = Path(os.environ.get(CACHE_VARIABLE) or CACHE_DEFAULT)
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def run(
    argv: Sequence[str],
    *,
    input: bytes | None = None,
    stdin: IO[bytes] | None = None,
    check: bool = True,
    timeout: float = 60.0,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run one command on the box to its end, without a shell.

    Raises `CommandError` for a status other than 0 (when `check`), `LabError` when it takes longer than `timeout`
    seconds (it is killed then).
    """
    source: dict[str, Any] = {"input": input} if input is not None else {"stdin": stdin or subprocess.DEVNULL}
    done: subprocess.CompletedProcess[bytes]
    try:
        done = subprocess.run(list(argv), capture_output=True, timeout=timeout, env=env, check=False, **source)
    except subprocess.TimeoutExpired as slow:
        said = (slow.stderr or b"")[-OUTPUT_TAIL:].decode(errors="replace")
        raise LabError(f"{shlex.join(argv)} did not end within {timeout:g} s; it said: {said!r}") from slow
    if check and done.returncode != 0:
        raise CommandError(
            argv, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )
    return done


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Look at `condition` until it holds. Raises `LabError` naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"waited {seconds:g} s for {what}; it did not come")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[IO[str]]:
    """Hold an advisory lock on `path`. The kernel gives it back when the holder dies.

    Raises `BlockingIOError` when `wait` is False and somebody else holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield handle


# --- mounts ----------------------------------------------------------------------------------------------------------


def mounts_below(root: Path) -> list[Path]:
    """Mount points at or below `root`, the deepest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = Path(line.split(" ")[4].encode().decode("unicode_escape"))
        if point == root or root in point.parents:
            found.append(point)
    return sorted(found, key=lambda point: len(point.parts), reverse=True)


def unmount_below(root: Path) -> None:
    """Take away every mount at or below `root`; one that is busy is detached and goes with its last user."""
    for point in mounts_below(root):
        if run(["umount", str(point)], check=False).returncode != 0:
            run(["umount", "--lazy", str(point)], check=False)


def remove_tree(root: Path) -> None:
    """Delete a tree. Refuses while something is mounted in it: a bind of /dev must not be emptied from here."""
    if left := mounts_below(root):
        raise LabError(f"{root} is not deleted: {', '.join(map(str, left))} is still mounted in it")
    if root.exists():
        shutil.rmtree(root)


def file_system_of(path: Path) -> str:
    """The type of the file system `path` lies on, as /proc/self/mountinfo names it."""
    best, kind = Path("/"), "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split(" ")
        point = Path(words[4].encode().decode("unicode_escape"))
        if (point == path or point in path.parents) and len(point.parts) >= len(best.parts):
            best, kind = point, words[words.index("-") + 1]
    return kind


def available_memory() -> int:
    """Bytes the box could still give without swapping."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


# --- cgroups: one per machine, so that exactly its processes can be ended --------------------------------------------


def cgroup_root() -> Path | None:
    """The mount point of the unified hierarchy, or None on a box without one."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            return Path(point)
    return None


def make_cgroup(path: Path) -> None:
    """Make a cgroup and hand it every controller its parents have to give."""
    root = cgroup_root()
    path.mkdir(parents=True, exist_ok=True)
    for parent in reversed(path.parents):
        if root is None or root not in (parent, *parent.parents):
            continue
        for controller in (parent / "cgroup.controllers").read_text().split():
            # A controller that a parent cannot hand on (a real-time task, a thread there) is one the machine lacks.
            with contextlib.suppress(OSError):
                (parent / "cgroup.subtree_control").write_text(f"+{controller}")


def kill_cgroup(path: Path, seconds: float = 10.0) -> None:
    """End every process below `path` and remove the cgroup. Nothing outside of it is touched."""
    if not path.is_dir():
        return
    (path / "cgroup.kill").write_text("1")
    events = path / "cgroup.events"
    wait_until(lambda: "populated 0" in events.read_text(), seconds, f"the processes in {path} to end")
    for folder, _, _ in os.walk(path, topdown=False):
        Path(folder).rmdir()


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with its pid this names one process for ever."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])
