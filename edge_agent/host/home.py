"""The installation's directory on a machine: where things lie, its configuration, its state.

Owns: paths, ``host.json``, ``state.json``, the lock, the log of refused verbs (docs/contracts.md, "A machine's home").
Deliberately does not know: leases, units, verbs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import socket
import stat
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

from edge_agent.host import clock
from edge_agent.host.documents import read_object, seconds
from edge_agent.host.errors import Busy, MachineFailed
from tools.values import JsonObject, Malformed, want, want_strings

PROTOCOL = 1
LOG_BYTES = 1024 * 1024
# UNIX socket paths end at 107 bytes; the longest name below a run directory is "worker/inference.sock".
RUN_DIR_BYTES = 80
MACHINE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclasses.dataclass(frozen=True)
class HostConfig:
    """``host.json``. ``max_lease_s`` and ``max_run_s`` bound what a gateway may ask for, seconds.

    ``units``: ``systemd`` or ``process``; ``worker_argv``: how to start the worker (``process`` only).
    """

    machine: str
    units: str
    run_dir: Optional[str] = None
    max_lease_s: float = 120.0
    max_run_s: float = 3600.0
    worker_argv: Tuple[str, ...] = ()
    image: Optional[str] = None

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "HostConfig":
        protocol = want(document, "protocol", int)
        if protocol != PROTOCOL:
            raise Malformed("field 'protocol' must be %d, got %r" % (PROTOCOL, protocol))
        units = want(document, "units", str)
        if units not in ("systemd", "process"):
            raise Malformed("field 'units' must be 'systemd' or 'process', got %.80r" % units)
        machine = want(document, "machine", str)
        if not MACHINE.fullmatch(machine):
            raise Malformed("field 'machine' must be a slug ([a-z0-9][a-z0-9-]{0,62}), got %.80r" % machine)
        run_dir = want(document, "run_dir", (str, type(None)), None)
        if run_dir is not None and (not run_dir.startswith("/") or "\0" in run_dir):
            raise Malformed("field 'run_dir' must be an absolute path or null, got %.80r" % run_dir)
        argv = () if document.get("worker_argv") is None else want_strings(document, "worker_argv")
        if units == "process" and (not argv or not argv[0].startswith("/") or "\0" in "".join(argv)):
            raise Malformed("field 'worker_argv' must begin with the worker's absolute path, got %.80r" % (argv,))
        config = cls(
            machine=machine,
            units=units,
            run_dir=run_dir,
            max_lease_s=seconds(document, "max_lease_s", 120.0),
            max_run_s=seconds(document, "max_run_s", 3600.0),
            worker_argv=argv,
            image=want(document, "image", (str, type(None)), None),
        )
        for name, value in (("max_lease_s", config.max_lease_s), ("max_run_s", config.max_run_s)):
            if not 1.0 <= value <= 86400.0:
                raise Malformed("field %r must be 1 to 86400 seconds, got %r" % (name, value))
        return config


def write_atomic(path: str, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data`` so that a reader or a power loss sees the old file or the new one, never a part."""
    directory = os.path.dirname(path)
    temporary = os.path.join(directory, ".new-%s" % os.urandom(8).hex())
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def empty(directory: str) -> None:
    """Remove everything in ``directory``, whatever its last user made of it: a confined worker may leave links,
    directories where files should be, directories nobody may enter, or a nest deeper than any path or recursion goes.

    Links are removed, never followed. Directories are moved up and then taken apart, so depth does not matter.
    """
    os.chmod(directory, 0o700)
    while True:
        entries = list(os.scandir(directory))
        if not entries:
            return
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)
                    os.rename(inner.path, os.path.join(directory, os.urandom(16).hex()))
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)


def connect_below(directory: str, name: str) -> socket.socket:
    """A connection to the UNIX socket ``name`` in ``directory``, non-blocking. Raises ``OSError``.

    The directory is the worker's to write: a link in the socket's place would lead the host's own user to any service of
    the machine, and a listener that accepts nobody would hold a blocking connect for ever. So it must be a socket itself,
    and it must have room now.
    """
    at = os.open(os.path.join(directory, name), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(at).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK), name)
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            stream.connect("/proc/self/fd/%d" % at)
        except BaseException:
            stream.close()
            raise
        return stream
    finally:
        os.close(at)


class Home:
    """The paths of one installation. ``root`` is absolute; directories are made with mode 0700 on first use."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.config_path = os.path.join(self.root, "host.json")
        self.state_path = os.path.join(self.root, "state.json")
        self.journals = os.path.join(self.root, "journal")
        # Apart from the runs': however often somebody observes, no run's journal is pruned for it.
        self.observations = os.path.join(self.journals, "observed")
        self.backup = os.path.join(self.root, "backup")
        self.log_path = os.path.join(self.root, "gatekeeper.log")
        self.zipapp = os.path.join(self.root, "host.pyz")

    def config(self) -> HostConfig:
        """Read ``host.json``; raises ``MachineFailed`` that says what is wrong with it."""
        try:
            with open(self.config_path, "rb") as file:
                return HostConfig.from_json(read_object(file.read()))
        except FileNotFoundError:
            raise MachineFailed(
                "%s does not exist" % self.config_path, next_step="install the edge: chargehand edge install"
            ) from None
        except (OSError, ValueError) as error:
            raise MachineFailed(
                "%s cannot be used: %s" % (self.config_path, error), next_step="chargehand edge upgrade writes it anew"
            ) from error

    def run_dir(self, config: HostConfig) -> str:
        """The directory of sockets, made if missing, with ``worker/`` in it."""
        runtime = os.environ.get("XDG_RUNTIME_DIR") or "/run/user/%d" % os.getuid()
        path = config.run_dir or os.path.join(runtime, "chargehand")
        if len(os.fsencode(path)) > RUN_DIR_BYTES:
            raise MachineFailed(
                "the run directory %s is too long for UNIX sockets" % path,
                expected="at most %d bytes" % RUN_DIR_BYTES,
                next_step="set run_dir in host.json to a shorter path",
            )
        try:
            for directory in (path, os.path.join(path, "worker")):
                os.makedirs(directory, mode=0o700, exist_ok=True)
            info = os.lstat(path)
        except OSError as error:
            raise MachineFailed(
                "the run directory %s could not be made: %s" % (path, error.strerror),
                next_step="enable lingering for this user (loginctl enable-linger), or set run_dir in host.json",
            ) from error
        if info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise MachineFailed("the run directory %s is open to others" % path, expected="own user, mode 0700")
        return path

    def journal_path(self, run_id: str) -> str:
        os.makedirs(self.journals, mode=0o700, exist_ok=True)
        return os.path.join(self.journals, run_id + ".jsonl")

    def observation_path(self, run_id: str) -> str:
        os.makedirs(self.observations, mode=0o700, exist_ok=True)
        return os.path.join(self.observations, run_id + ".jsonl")

    def state(self) -> JsonObject:
        """``state.json`` (empty on a new machine); raises ``MachineFailed`` if it is damaged: it holds the fence."""
        try:
            with open(self.state_path, "rb") as file:
                state = read_object(file.read())
            want(state, "generation", int)
            run = want(state, "run", (dict, type(None)), None)
            if run is not None:
                for name, kind in (("run_id", str), ("generation", int), ("granted_at", (int, float))):
                    want(run, name, kind)
            return state
        except FileNotFoundError:
            return {"generation": 0, "run": None}
        except (OSError, ValueError) as error:
            raise MachineFailed(
                "%s cannot be read: %s" % (self.state_path, error),
                next_step="it guards against late starts; repair it by hand: chargehand edge upgrade --reset-state",
            ) from error

    def save_state(self, state: JsonObject) -> None:
        try:
            write_atomic(self.state_path, json.dumps(state, sort_keys=True).encode("utf-8"))
        except OSError as error:
            raise MachineFailed(
                "%s could not be written: %s" % (self.state_path, error.strerror), next_step="free disk space"
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the installation's lock: one start, stop or apply at a time. Does not wait: raises ``Busy``."""
        with open(os.path.join(self.root, "lock"), "a", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(
                    "another start, stop or apply is going on at this machine", next_step="try again in a few seconds"
                ) from None
            yield

    def log(self, entry: Dict[str, Any]) -> None:
        """One JSON line about a verb that was refused or failed. A full disk must not hide the verb's own error."""
        line = json.dumps(dict(entry, wall=round(clock.wall(), 3)), sort_keys=True) + "\n"
        with contextlib.suppress(OSError):
            if os.path.exists(self.log_path) and os.path.getsize(self.log_path) > LOG_BYTES:
                os.replace(self.log_path, self.log_path + ".1")
            fd = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, line.encode("utf-8", "backslashreplace"))
            finally:
                os.close(fd)
