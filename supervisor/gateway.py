"""The gateway: one process that takes requests in, runs them, and keeps their traces moving.

Owns: starting and ending services, workflow engine, embedded MLflow and span delivery in the right order; the lock
that says a gateway runs on this data directory. Deliberately does not know: the command line, what a run does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from otel.delivery import Deliverer, MlflowTarget
from otel.mlflow_reader import MlflowError, MlflowReader
from otel.mlflow_server import MlflowServer, MlflowServerFailed, MlflowServerSettings
from otel.spans import Span
from supervisor.audit import kinds
from supervisor.errors import Conflict
from supervisor.machines import EMBEDDED
from supervisor.runs.durable import DurableRuns
from supervisor.runs.flow import Flow
from supervisor.runs.services import Services, open_services
from supervisor.settings.model import Settings
from supervisor.store.runs import Run
from supervisor.store.store import Store
from tools.values import JsonObject

logger = logging.getLogger(__name__)

LOCK = "gateway.lock"
# A fresh MLflow server on a small box takes up to 40 s to answer; nothing of a run waits for it.
MLFLOW_READY_S = 120.0


@dataclasses.dataclass(frozen=True)
class Running:
    """What a running gateway tells others on its data directory."""

    pid: int
    started_at: float
    mlflow_url: str | None

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)


def running_gateway(data_dir: Path) -> Running | None:
    """The gateway that runs on ``data_dir``, ``None`` if none does. The kernel's lock is what counts, not the text."""
    try:
        with (data_dir / LOCK).open("r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                told = json.loads(file.read() or "{}")
                return Running(int(told.get("pid", 0)), float(told.get("started_at", 0)), told.get("mlflow_url"))
    except (OSError, ValueError):
        return None
    return None


class Gateway:
    """A running gateway; made by ``gateway``."""

    def __init__(self, settings: Settings, services: Services, runs: DurableRuns, lock: IO[str]) -> None:
        self.settings = settings
        self.services = services
        self.runs = runs
        self.mlflow: MlflowServer | None = None
        self.deliverer: Deliverer | None = None
        self._lock = lock
        self._stop = asyncio.Event()
        self._side: list[asyncio.Task[None]] = []

    @property
    def mlflow_url(self) -> str | None:
        """Base URL of the MLflow server that traces go to, ``None`` if there is none."""
        if self.settings.mlflow.mode == "external":
            return self.settings.mlflow.url
        return self.mlflow.url if self.mlflow is not None else None

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id once MLflow has been asked."""
        target = self.deliverer.target if self.deliverer is not None else None
        return target.experiment_id if isinstance(target, MlflowTarget) else None

    def start_traces(self) -> None:
        """Start the embedded MLflow server if the settings say so, and deliver what the spool holds."""
        mlflow = self.settings.mlflow
        if mlflow.mode == "embedded":
            self.mlflow = MlflowServer(
                MlflowServerSettings(self.settings.data_dir / "mlflow", mlflow.host, mlflow.port)
            )
            try:
                self.mlflow.start()
            except MlflowServerFailed:
                # The view is not the record: runs go on, spans wait in the spool.
                logger.exception("the embedded MLflow server could not be started")
                self.mlflow = None
        if self.mlflow_url is not None:
            target = MlflowTarget(self.mlflow_url, mlflow.experiment)
            self.deliverer = Deliverer(self.services.spool, target)
            self._side.append(asyncio.create_task(self.deliverer.run(self._stop), name="span delivery"))

    def start_checkpoints(self) -> None:
        """Sign all chain heads from time to time."""
        self._side.append(asyncio.create_task(self._checkpoints(), name="checkpoints"))

    async def _checkpoints(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), self.settings.limits.checkpoint_s)
            await asyncio.to_thread(self.services.checkpoint)

    def tell(self) -> None:
        """Write what others on this data directory may know into the lock file."""
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(json.dumps(Running(os.getpid(), time.time(), self.mlflow_url).to_json()))
        self._lock.flush()

    async def wait_final(self, run_id: str, timeout_s: float) -> Run:
        """The run once it has reached a final state and its trace is in the spool. Raises ``TimeoutError``."""
        return await wait_final(self.services.store, run_id, timeout_s)

    async def flush_traces(self, run: Run, deadline_s: float) -> int:
        """Deliver what is spooled of a run; returns how many spans are left."""
        if self.deliverer is None:
            return self.services.spool.pending_of(run.trace_id)
        return await self.deliverer.flush(deadline_s, run.trace_id)

    async def read_trace(self, run: Run) -> list[Span] | None:
        """The run's trace as MLflow has it; ``None`` if it has none or cannot be asked."""
        if self.mlflow_url is None:
            return None
        url = self.mlflow_url

        def read() -> list[Span] | None:
            with MlflowReader(url) as reader:
                return reader.trace(run.trace_id)

        try:
            return await asyncio.to_thread(read)
        except MlflowError:
            return None

    async def aclose(self) -> None:
        """End in order: no new runs, side tasks, services, MLflow last; bounded at every step."""
        await self.runs.aclose()
        await self.services.record(None, kinds.GATEWAY_STOPPED, {"pid": os.getpid()})
        await asyncio.to_thread(self.services.checkpoint)
        self._stop.set()
        if self._side:
            _, late = await asyncio.wait(self._side, timeout=5)
            for task in late:
                task.cancel()
            await asyncio.gather(*self._side, return_exceptions=True)
        await self.services.aclose()
        if self.mlflow is not None:
            await asyncio.to_thread(self.mlflow.stop)


async def wait_final(store: Store, run_id: str, timeout_s: float) -> Run:
    """The run once its last event (``sealed``) is stored. Raises ``TimeoutError`` after ``timeout_s`` seconds."""
    async with asyncio.timeout(timeout_s):
        while True:
            run = await asyncio.to_thread(store.runs.get, run_id)
            if run.final:
                told = await asyncio.to_thread(store.events.events, run_id, 0, source="gateway")
                if any(event.kind == "sealed" for event in told):
                    return run
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def gateway(settings: Settings, *, traces: bool = True) -> AsyncIterator[Gateway]:
    """A gateway on ``settings.data_dir`` while the context lasts.

    ``traces``: start MLflow (when embedded) and deliver spans; without it they stay in the spool for the next gateway.
    Raises ``Conflict`` if one runs there already.
    """
    settings.data_dir.mkdir(parents=True, mode=0o700, exist_ok=True)
    with (settings.data_dir / LOCK).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"a gateway runs on {settings.data_dir} already",
                next_step="use it (chargehand run enqueues there), or stop it first",
            ) from None
        services = await asyncio.to_thread(open_services, settings)
        runs = DurableRuns(settings, services.store, Flow(services))
        running = Gateway(settings, services, runs, lock)
        try:
            await services.record(None, kinds.GATEWAY_STARTED, {"pid": os.getpid()})
            for machine in await asyncio.to_thread(services.store.machines.list):
                if machine.transport == EMBEDDED:
                    await services.start_embedded(machine.id)
            if traces:
                running.start_traces()
            running.start_checkpoints()
            await runs.launch()
            running.tell()
            yield running
        finally:
            await running.aclose()
