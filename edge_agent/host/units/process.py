"""The process unit manager: broker and worker as plain processes, where there is no systemd or podman.

Owns: the keeper, the one parent of broker and worker. It does what systemd does for the units: the worker is started
after the broker is ready and ends with it, there is a hard stop, and everything they started is killed with them.
Deliberately does not know: leases and verbs. It isolates nothing: worker and broker run as the same user.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Callable, Dict, List, Optional, Set

from edge_agent.host import confine
from edge_agent.host.errors import MachineFailed
from edge_agent.host.home import Home, HostConfig
from edge_agent.host.runner import descendants, kill_descendants
from edge_agent.host.units import ACTIVE, INACTIVE, Process, UnitManager, read_process

# How long broker and worker have between SIGTERM and SIGKILL, seconds.
TERM_S = 2.0
# How long the broker may take to check its lease and say READY=1, seconds.
BROKER_READY_S = 10.0
LOG_TAIL_BYTES = 2000
# The longest file the worker may write, bytes: it has none to write but its log, and that must not fill the disk.
WORKER_FILE_BYTES = 16 * 1024 * 1024


class ProcessUnits(UnitManager):
    name = "process"

    def __init__(self, home: Home, config: HostConfig) -> None:
        self._home = home
        self._config = config
        self._pid_path = os.path.join(home.run_dir(config), "keeper.pid")
        self._log_path = os.path.join(home.root, "agent.log")

    def start(self, deadline_s: float) -> None:
        """Start the keeper in a session of its own, so that it outlives the SSH connection that asked for it."""
        deadline = time.monotonic() + deadline_s
        ready_read, ready_write = os.pipe()
        with open(self._log_path, "wb") as log:
            keeper = subprocess.Popen(
                [*_own_command(), "keeper", "--home", self._home.root, "--ready-fd", str(ready_write)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(ready_write,),
                cwd="/",
                env=dict(_environment()),
            )
        os.close(ready_write)
        try:
            _write_pid(self._pid_path, keeper.pid)
            while True:
                readable, _, _ = select.select([ready_read], [], [], max(0.0, deadline - time.monotonic()))
                if not readable:
                    raise MachineFailed("broker and worker did not start within %g s" % deadline_s, got=self.why())
                if os.read(ready_read, 1) == b"+":
                    return
                raise MachineFailed("the broker or the worker ended while it was started", got=self.why())
        finally:
            os.close(ready_read)

    def stop(self, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        keeper = self._keeper()
        if keeper is not None:
            _signal(keeper, signal.SIGTERM)
            if not _wait_gone(keeper, max(0.1, min(deadline_s, TERM_S * 2 + 1))):
                _signal(keeper, signal.SIGKILL)
                _wait_gone(keeper, max(0.1, deadline - time.monotonic()))
        # Only if the keeper itself was killed can anything be left: its children get SIGKILL from the kernel, theirs not.
        for process in self.processes():
            _signal(process.pid, signal.SIGKILL)
            _wait_gone(process.pid, max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._pid_path)

    def state(self) -> str:
        return ACTIVE if self.processes() else INACTIVE

    def processes(self) -> List[Process]:
        pids: Set[int] = set()
        keeper = self._keeper()
        if keeper is not None:
            pids.update([keeper], descendants(keeper))
        marks = _marks(self._home)
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid() and _is_ours(int(name), marks, self._worker_mark()):
                pids.update([int(name)], descendants(int(name)))
        return [process for process in map(read_process, sorted(pids)) if process is not None]

    def why(self) -> str:
        try:
            with open(self._log_path, "rb") as file:
                file.seek(max(0, os.path.getsize(self._log_path) - LOG_TAIL_BYTES))
                return file.read().decode("utf-8", "backslashreplace").strip()
        except OSError:
            return ""

    def _worker_mark(self) -> bytes:
        return b"CHARGEHAND_WORKER_DIR=" + os.fsencode(os.path.join(os.path.dirname(self._pid_path), "worker"))

    def _keeper(self) -> Optional[int]:
        try:
            with open(self._pid_path, encoding="ascii") as file:
                pid = int(file.read().split()[0])
        except (OSError, ValueError, IndexError):
            return None
        # A pid may have been given to another process since: only one that names this home is the keeper.
        return pid if _is_ours(pid, _marks(self._home), b"") and read_process(pid) is not None else None


def _own_command() -> List[str]:
    """How this very program was started, without its arguments: ``python3 -I host.pyz`` (or ``-m`` in a checkout)."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name not in ("__main__", None):
        return [sys.executable, "-m", spec.name]
    # Nothing of site-packages is needed here, so nothing of it gets a say (-S).
    return [sys.executable, "-I", "-S", os.path.abspath(sys.argv[0])]


def _environment() -> Dict[str, str]:
    kept = {
        name: os.environ[name]
        for name in ("PATH", "HOME", "XDG_RUNTIME_DIR", "LANG", "PYTHONPATH")
        if name in os.environ
    }
    return dict(kept, PYTHONUNBUFFERED="1")


def _write_pid(path: str, pid: int) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write("%d\n" % pid)


def _marks(home: Home) -> List[bytes]:
    root = os.fsencode(home.root)
    return [b"\0broker\0--home\0" + root + b"\0", b"\0keeper\0--home\0" + root + b"\0"]


def _is_ours(pid: int, marks: List[bytes], environment_mark: bytes) -> bool:
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            command = file.read(8192)
        if any(mark in command for mark in marks):
            return True
        if not environment_mark:
            return False
        with open("/proc/%d/environ" % pid, "rb") as file:
            return environment_mark in file.read(65536).split(b"\0")
    except OSError:
        return False


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait_gone(pid: int, seconds: float) -> bool:
    """Wait until ``pid`` has ended; ``True`` if it has. A zombie counts as ended (a pidfd is readable then)."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], seconds)[0])
    finally:
        os.close(pidfd)


def keep(home: Home, ready_fd: int) -> int:
    """The keeper's whole life. ``ready_fd`` gets ``+`` when broker and worker run, ``-`` when one ended before.

    Ends when the broker ends, at SIGTERM, or at the hard stop; kills everything below it first. Returns an exit status.
    """
    config = home.config()
    run_dir = home.run_dir(config)
    os.set_inheritable(ready_fd, False)
    confine.become_subreaper()
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    # The hard stop that RuntimeMaxSec= is for the units: the longest run this machine allows, and the start-up.
    hard_stop = time.monotonic() + config.max_run_s + 60
    notify_path = os.path.join(run_dir, "notify.sock")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(notify_path)
    children: List["subprocess.Popen[bytes]"] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notices:
        notices.bind(notify_path)
        try:
            # If the keeper is killed the broker is asked to end, not killed: it is the one that can end what it started.
            broker = _child(
                [*_own_command(), "broker", "--home", home.root],
                dict(_environment(), NOTIFY_SOCKET=notify_path),
                lambda: confine.die_with_parent(signal.SIGTERM),
            )
            children.append(broker)
            broker_end = os.pidfd_open(broker.pid)
            ready, _, _ = select.select([notices.fileno(), broker_end, wake_read], [], [], BROKER_READY_S)
            if notices.fileno() not in ready:
                return _start_failed(ready_fd, "the broker did not become ready")
            try:
                worker = _child(
                    list(config.worker_argv),
                    dict(_environment(), CHARGEHAND_WORKER_DIR=os.path.join(run_dir, "worker")),
                    _limit_worker,
                )
            except OSError as error:
                return _start_failed(ready_fd, "%s could not be started: %s" % (config.worker_argv[0], error.strerror))
            children.append(worker)
            os.write(ready_fd, b"+")
            worker_end = os.pidfd_open(worker.pid)
            select.select([broker_end, worker_end, wake_read], [], [], max(0.0, hard_stop - time.monotonic()))
            if worker.poll() is not None and broker.poll() is None:
                _say("the worker ended with status %d" % worker.returncode)
            return 0
        finally:
            _end_children(children)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(notify_path)


def _start_failed(ready_fd: int, why: str) -> int:
    _say(why)
    os.write(ready_fd, b"-")
    return 1


def _say(text: str) -> None:
    sys.stderr.write("chargehand-keeper: %s\n" % text)
    sys.stderr.flush()


def _end_children(children: List["subprocess.Popen[bytes]"]) -> None:
    """Asked first, then enforced: what ignores SIGTERM is killed with everything it started."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    end = time.monotonic() + TERM_S
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))
    kill_descendants()


def _limit_worker() -> None:
    confine.die_with_parent()
    for what, value in ((resource.RLIMIT_FSIZE, WORKER_FILE_BYTES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (value, value))


def _child(argv: List[str], environment: Dict[str, str], bind: Callable[[], None]) -> "subprocess.Popen[bytes]":
    """Start ``argv`` with this process's output; ``bind`` ties its life to this one's, in the child."""
    keeper = os.getpid()

    def before_exec() -> None:
        bind()
        if os.getppid() != keeper:
            os._exit(126)  # the keeper ended before the tie was there

    # The keeper is one thread: what runs between fork and exec is safe.
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=environment, cwd="/", preexec_fn=before_exec)
