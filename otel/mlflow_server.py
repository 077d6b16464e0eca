"""The embedded MLflow server: a child process on the loopback interface that lives no longer than its parent.

Owns: the child's command line and environment, its start, readiness, log and end.
Deliberately does not know: spans and delivery; nothing may wait for this server but a person who wants to look at it.

Measured on a two-core machine: 8 s to the answer at the very first start (compiling bytecode, making the tables), 2.3
to 4 s at later ones (nearly all of it MLflow's imports), 270 to 310 MB of memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import httpx

_CHILD: Final = Path(__file__).with_name("mlflow_child.py")
_STOP_GRACE_S: Final = 5.0  # an idle server ends in well under a second; one in a request is cut off
_POLL_S: Final = 0.1  # readiness has no event to wait for: the child speaks only HTTP

# What the child may see of our environment. Everything else (model keys, database passwords) is none of its business.
_PASSED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "VIRTUAL_ENV")


class MlflowServerFailed(RuntimeError):
    """The embedded server did not start or did not answer in time; the message ends with the tail of its log."""


@dataclasses.dataclass(frozen=True)
class MlflowServerSettings:
    """``directory``: holds database, artifacts, log and bytecode (made with mode 0700); ``host``: the loopback address
    to listen on; ``port``: 0 takes a free one; ``allowed_hosts``: further ``host:port`` values of the Host header to
    answer to (a reverse proxy's name)."""

    directory: Path
    host: str = "127.0.0.1"
    port: int = 0
    allowed_hosts: tuple[str, ...] = ()


class MlflowServer:
    """One embedded server. Who calls ``start`` calls ``stop``; as a context manager both are done.

    If the parent is killed the child dies as well: the kernel ends it (``PR_SET_PDEATHSIG``, set when started from the
    main thread: the signal is bound to the thread) and a pipe that breaks ends its whole process group.
    """

    def __init__(self, settings: MlflowServerSettings) -> None:
        self.settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._port = settings.port

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """``http://host:port``. Raises ``MlflowServerFailed`` before ``start``."""
        if not self._port:
            raise MlflowServerFailed("the embedded MLflow server has no address yet: call start() first")
        return f"http://{self.settings.host}:{self._port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def log_path(self) -> Path:
        return self.settings.directory / "mlflow.log"

    @property
    def database_path(self) -> Path:
        return self.settings.directory / "mlflow.db"

    def start(self) -> None:
        """Start the child and return at once; ``wait_ready`` says when it answers. Raises ``MlflowServerFailed`` when
        it runs already, the port is taken or the process cannot be made."""
        if self._process is not None:
            raise MlflowServerFailed(f"the embedded MLflow server already runs as process {self._process.pid}")
        directory = self.settings.directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._port = self.settings.port or _free_port(self.settings.host)
            _check_free(self.settings.host, self._port)
            names = {f"{self.settings.host}:{self._port}", f"localhost:{self._port}", *self.settings.allowed_hosts}
            with self._log() as log:
                self._process = subprocess.Popen(
                    [
                        # -P keeps the directory of the script and the working directory off the import path: our
                        # folders have general names (tools, inference) that must not hide anybody's modules.
                        sys.executable, "-P", "-W", "ignore::DeprecationWarning", str(_CHILD),
                        self.settings.host, str(self._port), f"sqlite:///{self.database_path.absolute()}",
                        str((directory / "artifacts").absolute()), ",".join(sorted(names)),
                        "thread" if threading.current_thread() is threading.main_thread() else "pipe",
                    ],
                    stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=directory, env=_environment(directory),
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self._port = self.settings.port
            raise MlflowServerFailed(
                f"started the embedded MLflow server in {str(directory)!r} on port {self.settings.port or 'any'}, got: "
                f"{error}; choose another port or directory, or point the settings at an MLflow of your own"
            ) from error

    async def wait_ready(self, deadline_s: float = 60.0) -> float:
        """Wait until the server answers; returns the seconds waited. Raises ``MlflowServerFailed`` when it ends first
        or ``deadline_s`` pass."""
        process = self._process
        if process is None:
            raise MlflowServerFailed(
                "waited for the embedded MLflow server, but it was not started: call start() first"
            )
        began = time.monotonic()
        async with httpx.AsyncClient(base_url=self.url, timeout=2.0, trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/health")).status_code == 200:
                        return time.monotonic() - began
                if process.poll() is not None:
                    raise MlflowServerFailed(
                        f"the embedded MLflow server ended with status {process.returncode} before it answered; "
                        f"its log {str(self.log_path)!r} ends with:\n{self._log_tail()}"
                    )
                if time.monotonic() - began > deadline_s:
                    raise MlflowServerFailed(
                        f"waited {deadline_s:g} s for the embedded MLflow server at {self.url}, it runs but does not "
                        f"answer; its log {str(self.log_path)!r} ends with:\n{self._log_tail()}"
                    )
                await asyncio.sleep(_POLL_S)

    def alive(self) -> bool:
        """Whether the child runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Ask the child to end, then kill its process group; returns when it is gone. Idempotent."""
        process = self._process
        if process is None:
            return
        try:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_GRACE_S)
        finally:
            # Also when the child ended by itself: what it may have started is in its group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
            self._process = None
            self._port = self.settings.port

    def _log(self) -> IO[bytes]:
        """The log, opened for appending; one that grew beyond 5 MiB is put aside first."""
        path = self.log_path
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > 5 * 1024 * 1024:
                path.replace(path.with_suffix(".log.1"))
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")

    def _log_tail(self) -> str:
        try:
            return self.log_path.read_bytes()[-2000:].decode("utf-8", "replace").strip()
        except OSError as error:
            return f"(not readable: {error})"


def _environment(directory: Path) -> dict[str, str]:
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
    spec = importlib.util.find_spec("mlflow")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package mlflow is not installed: install chargehand[gateway]")
    # Some installers do not compile. Then the bytecode is kept here, or every start would take twice as long; where it
    # exists already a prefix would only hide it.
    if not Path(spec.origin).with_name("__pycache__").is_dir():
        environment["PYTHONPYCACHEPREFIX"] = str((directory / "bytecode").absolute())
    return environment


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_free(host: str, port: int) -> None:
    """Raises ``OSError`` when the port is taken: the answer of another server must not be taken for the child's."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
