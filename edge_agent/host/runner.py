"""The only ``execve`` of the machine side: runs decided steps and hands back what came of them.

Owns: fork and execve of pipelines, reading files, time limits, output caps, killing whole process trees.
Deliberately does not know: policies, leases, journals, sockets. It is given ``Step`` values that the gate made.

A ``Pipeline`` is driven by the owner's selector loop: it registers its pipes and pidfds there, so that one single
thread (fork is safe then) also serves renewals and cancels while a command runs. There is no shell anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import selectors
import signal
import stat
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

from edge_agent.host import confine
from edge_agent.host.errors import Refused
from edge_agent.host.pins import Pins
from tools.values import FileAccess, Stage, StepResult, digest

# What every command sees; a rule may add to it (Stage.env). No terminal, no pager, one locale, fixed PATH.
BASE_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "TERM": "dumb",
    "HOME": "/",
    "PAGER": "cat",
    "SYSTEMD_PAGER": "",
    "SYSTEMD_COLORS": "0",
    "SYSTEMD_URLIFY": "0",
}
# A command that writes more than this is a flood: it is killed, the digest is of what came until then.
FLOOD_BYTES = 64 * 1024 * 1024
READ_BLOCK = 65536
# How long to go on killing a tree that forks while it is killed, and to wait for a process that the kernel does not let
# go of (a dead network file system), seconds. A run must be gone within its lease and 5 s, so this is done at most twice.
KILL_DEADLINE_S = 1.5


class Capture:
    """What came through one pipe: the first ``cap`` bytes, size and digest of all of it."""

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.size = 0
        self._kept = bytearray()
        self._hasher = hashlib.sha256()

    def feed(self, data: bytes) -> None:
        room = self.cap - len(self._kept)
        if room > 0:
            self._kept += data[:room]
        self.size += len(data)
        self._hasher.update(data)

    @property
    def cut(self) -> bool:
        return self.size > len(self._kept)

    @property
    def text(self) -> str:
        return self._kept.decode("utf-8", "backslashreplace")

    @property
    def digest(self) -> str:
        return "sha256:" + self._hasher.hexdigest()


class Pipeline:
    """One step's processes, connected by pipes, from start to the last one gone.

    Args:
        stages: what to execute, first to last; stdout of each is stdin of the next, the last one's is captured.
        pins: the lease's binaries.
        selector: the owner's; callbacks are registered as ``data``, to be called with no argument when ready.
        done: called once with the ``StepResult`` when everything has ended.
    Raises ``Refused`` if a binary is not the pinned one; nothing was executed then.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        pins: Pins,
        selector: selectors.BaseSelector,
        done: Callable[[StepResult], None],
    ) -> None:
        self._stages = tuple(stages)
        self._selector = selector
        self._done = done
        self._started = time.monotonic()
        self._limit_s = max(stage.timeout_s for stage in self._stages)
        # When `check_time` is due: the time limit, and once killed, the end of the patience with what does not die.
        self.deadline = self._started + self._limit_s
        self._out = Capture(self._stages[-1].output_bytes)
        self._err = Capture(self._stages[-1].output_bytes)
        self._pids: Dict[int, int] = {}
        self._pidfds: Dict[int, int] = {}
        self._status: List[Optional[int]] = [None] * len(self._stages)
        self._signals: List[Optional[int]] = [None] * len(self._stages)
        self._pipes: Dict[int, Capture] = {}
        self._error = ""
        self._timed_out = self._cancelled = self._killed = False
        self._cpu_s = 0.0
        self._max_rss_kb = 0
        self.finished = False
        self._start(pins)

    # -- starting

    def _start(self, pins: Pins) -> None:
        binaries = []
        rulesets: List[confine.Ruleset] = []
        try:
            for stage in self._stages:
                binaries.append(pins.open(stage.binary))
            for stage in self._stages:
                rulesets.append(confine.Ruleset(stage.writes, stage.network))
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            err_read, err_write = os.pipe()
            ours, theirs = [err_read], [null, err_write]
            stdin = null
            try:
                for position, stage in enumerate(self._stages):
                    out_read, out_write = os.pipe()
                    theirs.append(out_write)
                    last = position == len(self._stages) - 1
                    (ours if last else theirs).append(out_read)
                    stderr = {"discard": null, "stdout": out_write}.get(stage.stderr, err_write)
                    pid = self._spawn(stage, binaries[position], rulesets[position], stdin, out_write, stderr)
                    self._pids[pid] = position
                    self._pidfds[pid] = os.pidfd_open(pid)
                    stdin = out_read
                out = ours[-1]
            except BaseException:
                for fd in ours + theirs:
                    os.close(fd)
                self._abandon()
                raise
            for fd in theirs:
                os.close(fd)
        finally:
            for binary in binaries:
                binary.close()
            for ruleset in rulesets:
                ruleset.close()
        for fd, capture in ((out, self._out), (err_read, self._err)):
            os.set_blocking(fd, False)
            self._pipes[fd] = capture
            self._selector.register(fd, selectors.EVENT_READ, lambda fd=fd: self._readable(fd))
        for pidfd in self._pidfds.values():
            self._selector.register(pidfd, selectors.EVENT_READ, self.reap)

    def _spawn(self, stage: Stage, binary: Any, ruleset: confine.Ruleset, stdin: int, stdout: int, stderr: int) -> int:
        environment = dict(BASE_ENVIRONMENT)
        environment.update(stage.env)
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        # The child: system calls only, and every way out is execve or _exit.
        try:
            os.setsid()
            confine.die_with_parent()
            if os.getppid() != parent:
                os._exit(126)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            for source, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
                os.dup2(source, target, inheritable=True)
            confine.close_others_at_exec()
            os.chdir("/")
            os.umask(0o077)
            confine.limit_resources(int(stage.timeout_s) + 1)
            confine.no_new_privileges()
            ruleset.restrict_self()
            target_of_exec = binary.pin.real if binary.script else binary.fd
            os.execve(target_of_exec, list(stage.argv), environment)
        except (OSError, ValueError) as error:
            os.write(
                2, ("chargehand: %s could not be executed: %s\n" % (stage.binary, error)).encode("ascii", "replace")
            )
        finally:
            os._exit(126)

    def _abandon(self) -> None:
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        kill_descendants()

    # -- while it runs

    def _readable(self, fd: int) -> None:
        capture = self._pipes.get(fd)
        if capture is None:
            return  # closed while this event waited in the same round of the loop
        try:
            data = os.read(fd, READ_BLOCK)
        except BlockingIOError:
            return
        if not data:
            self._close_pipe(fd)
            return
        capture.feed(data)
        if capture.size > FLOOD_BYTES and not self._killed:
            self._kill("killed: it wrote more than %d bytes" % FLOOD_BYTES)

    def _close_pipe(self, fd: int) -> None:
        self._selector.unregister(fd)
        os.close(fd)
        del self._pipes[fd]

    def reap(self) -> None:
        """Collect the stages that have ended; when the last has, whatever they left behind is killed."""
        if self.finished:
            return  # the second of two events of one round; the next step's processes may run already
        for pid in list(self._pids):
            try:
                found, status, usage = os.wait4(pid, os.WNOHANG)
            except ChildProcessError:
                self._forget(pid)
                self._error = self._error or "the exit status of process %d was lost" % pid
                continue
            if found == 0:
                continue
            position = self._forget(pid)
            self._cpu_s += usage.ru_utime + usage.ru_stime
            self._max_rss_kb = max(self._max_rss_kb, usage.ru_maxrss)
            if os.WIFSIGNALED(status):
                self._signals[position] = os.WTERMSIG(status)
            else:
                self._status[position] = os.WEXITSTATUS(status)
        if not self._pids:
            # Children that double-forked or changed their session became ours (subreaper): none outlives its command.
            self._say_left(kill_descendants())
            self._finish()

    def _forget(self, pid: int) -> int:
        pidfd = self._pidfds.pop(pid)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        return self._pids.pop(pid)

    def check_time(self, now: float) -> None:
        """Kill everything if the time limit has passed; ``now`` is ``time.monotonic()``.

        What has been killed and is still there ``KILL_DEADLINE_S`` later is given up, and the result says so: one
        process that the kernel holds must not hold up the run.
        """
        if self.finished or now < self.deadline:
            return
        if self._killed:
            self._give_up()
            return
        self._timed_out = True
        self._kill("killed after its time limit of %g s" % self._limit_s)

    def cancel(self, reason: str) -> None:
        """Kill everything; the result says ``cancelled`` and why."""
        if not self.finished and not self._cancelled:
            self._cancelled = True
            self._kill("killed: %s" % reason)

    def _kill(self, why: str) -> None:
        self._error = self._error or why
        self._killed = True
        self.deadline = time.monotonic() + KILL_DEADLINE_S
        # The stages first: a dead one cannot fork while its descendants are being killed.
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._say_left(kill_descendants(spare=tuple(self._pids)))

    def _give_up(self) -> None:
        self._say_left(list(self._pids))
        _given_up.update(self._pids)
        for pid in list(self._pids):
            self._forget(pid)
        self._finish()

    def _say_left(self, pids: Sequence[int]) -> None:
        if pids:
            left = "not even SIGKILL ended process %s" % ", ".join(str(pid) for pid in pids)
            self._error = "%s; %s" % (self._error, left) if self._error else left

    def drain(self, seconds: float) -> None:
        """Serve this pipeline alone until it has finished, at most ``seconds``: for an owner that is about to end."""
        deadline = time.monotonic() + seconds
        while not self.finished and time.monotonic() < deadline:
            watched = [*self._pipes, *self._pidfds.values()]
            ready, _, _ = select.select(watched, [], [], max(0.0, deadline - time.monotonic()))
            for fd in ready:
                if fd in self._pipes:
                    self._readable(fd)
            self.reap()
        if not self.finished:
            self._give_up()

    # -- the end

    def _finish(self) -> None:
        # Everything that wrote is dead, so all of it is in the pipes. To wait for their end would be to wait for whoever
        # else holds them: a command may have handed its output to a service that lives on.
        for fd in list(self._pipes):
            while fd in self._pipes and self._pipes[fd].size <= FLOOD_BYTES + READ_BLOCK:
                try:
                    data = os.read(fd, READ_BLOCK)
                except BlockingIOError:
                    break
                if not data:
                    break
                self._pipes[fd].feed(data)
            self._close_pipe(fd)
        self.finished = True
        self._done(
            StepResult(
                argv=tuple(stage.argv for stage in self._stages),
                exit_status=self._status[-1],
                exit_statuses=tuple(self._status),
                signal=next((number for number in reversed(self._signals) if number is not None), None),
                stdout=self._out.text,
                stderr=self._err.text,
                stdout_bytes=self._out.size,
                stderr_bytes=self._err.size,
                stdout_digest=self._out.digest,
                stderr_digest=self._err.digest,
                cut=self._out.cut or self._err.cut,
                timed_out=self._timed_out,
                cancelled=self._cancelled,
                error=self._error,
                duration_ms=round((time.monotonic() - self._started) * 1000, 3),
                cpu_ms=round(self._cpu_s * 1000, 3),
                max_rss_kb=self._max_rss_kb,
            )
        )


# Descendants that did not die of SIGKILL within the deadline: nobody waits for them again.
_given_up: Set[int] = set()


def _children(pid: int) -> List[int]:
    found: List[int] = []
    try:
        for task in os.listdir("/proc/%d/task" % pid):
            with open("/proc/%d/task/%s/children" % (pid, task), encoding="ascii") as file:
                found.extend(int(word) for word in file.read().split())
    except OSError:
        pass  # it has just gone; its children come to this process
    return found


def _children_by_parent() -> Dict[int, List[int]]:
    """Every process by its parent, for kernels that do not list children (CONFIG_PROC_CHILDREN)."""
    table: Dict[int, List[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/%s/stat" % name, "rb") as file:
                    # The name stands in brackets and may hold any byte; state and parent follow the last one.
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
            table.setdefault(parent, []).append(int(name))
    return table


def descendants(pid: int) -> List[int]:
    """Every process below ``pid``, parents first, as the kernel lists them now; zombies are listed too."""
    table = None
    if not os.path.exists("/proc/thread-self/children"):
        table = _children_by_parent()
    found: List[int] = []
    queue = [pid]
    while queue:
        parent = queue.pop()
        below = _children(parent) if table is None else table.get(parent, [])
        found.extend(below)
        queue.extend(below)
    return found


def kill_descendants(spare: Tuple[int, ...] = (), seconds: float = KILL_DEADLINE_S) -> List[int]:
    """Kill and collect every descendant of this process until none is left, or ``seconds`` have passed.

    With the subreaper bit set, children that double-fork or leave their session stay descendants. ``spare``: pids that
    are killed by the caller, who wants their status; their descendants are killed here. Returns what did not die.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = [pid for pid in descendants(os.getpid()) if pid not in spare and pid not in _given_up]
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            # Of those that are not ours yet this says so; they come to us when their parent is gone.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        # The kernel's list may leave out a child while others end (proc(5)): that there is none at all is the proof.
        if not left and (spare or _given_up or _childless()):
            return []
        if time.monotonic() >= deadline:
            _given_up.update(left)
            return left
        _await_an_end(left)


def _childless() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def _await_an_end(pids: Sequence[int]) -> None:
    """Wait until one of ``pids`` has ended, at most some milliseconds: others may have been forked meanwhile."""
    pidfds: List[int] = []
    try:
        for pid in pids[:16]:
            with contextlib.suppress(ProcessLookupError):
                pidfds.append(os.pidfd_open(pid))
        select.select(pidfds, [], [], 0.005)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def access_file(access: FileAccess, open_file: Callable[[FileAccess], int]) -> StepResult:
    """Read the range of one regular file.

    ``open_file`` opens it below its root without following links (``tools.paths``) and returns a descriptor. What
    cannot be read comes back as a result with ``error``, not as an exception: it is evidence too.
    """
    started = time.monotonic()
    if access.kind != "read":
        return StepResult(path=access.path, error="%s: this machine's runner only reads files" % access.path)
    try:
        fd = open_file(access)
    except (OSError, Refused, ValueError) as error:
        reason = str((isinstance(error, OSError) and error.strerror) or error)
        return StepResult(path=access.path, error="%s: %s" % (access.path, reason), duration_ms=_since(started))
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return StepResult(path=access.path, error="%s is not a regular file" % access.path)
        content, more = _read_range(fd, access.offset, access.length)
    except (OSError, OverflowError) as error:
        reason = str((isinstance(error, OSError) and error.strerror) or error)
        return StepResult(path=access.path, error="%s: %s" % (access.path, reason), duration_ms=_since(started))
    finally:
        os.close(fd)
    return StepResult(
        path=access.path,
        exit_status=0,
        stdout=content.decode("utf-8", "backslashreplace"),
        stdout_bytes=max(info.st_size, access.offset + len(content)),
        stdout_digest=digest(content),
        stderr_digest=digest(b""),
        cut=more,
        duration_ms=_since(started),
    )


def _since(started: float) -> float:
    return round((time.monotonic() - started) * 1000, 3)


def _skip(fd: int, count: int) -> None:
    while count > 0:
        block = os.read(fd, min(READ_BLOCK, count))
        if not block:
            return
        count -= len(block)


def _read_range(fd: int, offset: int, length: int) -> Tuple[bytes, bool]:
    """At most ``length`` bytes from ``offset`` and whether there are more. Files of /proc only read forwards."""
    if offset:
        try:
            os.lseek(fd, offset, os.SEEK_SET)
        except OSError as error:
            if error.errno != errno.ESPIPE:
                raise
            _skip(fd, offset)
    content = bytearray()
    while len(content) <= length:
        block = os.read(fd, min(READ_BLOCK, length + 1 - len(content)))
        if not block:
            return bytes(content), False
        content += block
    return bytes(content[:length]), True
