"""The installation's directory on a machine: where things lie, its configuration, its state.

Owns: paths, ``host.json``, ``state.json``, the lock, the log of refused verbs (docs/contracts.md, "A machine's home").
Deliberately does not know: leases, units, verbs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import tempfile
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

from edge_agent.host import clock
from edge_agent.host.errors import Busy, MachineFailed
from tools.values import JsonObject, Malformed, want, want_strings

PROTOCOL = 1
LOG_BYTES = 1024 * 1024
# UNIX socket paths end at 107 bytes; the longest name below a run directory is "worker/inference.sock".
RUN_DIR_BYTES = 80


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
            raise Malformed("field 'units' must be 'systemd' or 'process', got %r" % units)
        config = cls(
            machine=want(document, "machine", str),
            units=units,
            run_dir=want(document, "run_dir", (str, type(None)), None),
            max_lease_s=float(want(document, "max_lease_s", (int, float), 120.0)),
            max_run_s=float(want(document, "max_run_s", (int, float), 3600.0)),
            worker_argv=want_strings(document, "worker_argv", ()),
            image=want(document, "image", (str, type(None)), None),
        )
        if units == "process" and not config.worker_argv:
            raise Malformed("field 'worker_argv' must name the worker's command where 'units' is 'process'")
        return config


def write_atomic(path: str, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data`` so that a reader or a power loss sees the old file or the new one, never a part."""
    directory = os.path.dirname(path)
    fd, temporary = tempfile.mkstemp(dir=directory, prefix=".new-")
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


class Home:
    """The paths of one installation. ``root`` is absolute; directories are made with mode 0700 on first use."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.config_path = os.path.join(self.root, "host.json")
        self.state_path = os.path.join(self.root, "state.json")
        self.journals = os.path.join(self.root, "journal")
        self.backup = os.path.join(self.root, "backup")
        self.log_path = os.path.join(self.root, "gatekeeper.log")
        self.zipapp = os.path.join(self.root, "host.pyz")

    def config(self) -> HostConfig:
        """Read ``host.json``; raises ``MachineFailed`` that says what is wrong with it."""
        try:
            with open(self.config_path, encoding="utf-8") as file:
                return HostConfig.from_json(json.load(file))
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

    def state(self) -> JsonObject:
        """``state.json`` (empty on a new machine); raises ``MachineFailed`` if it is damaged: it holds the fence."""
        try:
            with open(self.state_path, encoding="utf-8") as file:
                state = json.load(file)
            want(state, "generation", int)
            return dict(state)
        except FileNotFoundError:
            return {"generation": 0, "run": None}
        except (OSError, ValueError, TypeError) as error:
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
