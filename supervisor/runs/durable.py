"""Durable runs: the one module that knows DBOS.

Owns: the workflow around the stages of ``flow``, the queue that lets one run at a time onto a machine, taking requests
in and starting the workflow engine. Deliberately does not know: what a stage does.

A request is stored first (state ``requested``) and enqueued after; whatever dies in between, the next look at the store
finds it. The workflow's id is the run's id, so enqueueing twice is enqueueing once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from dbos import DBOS, DBOSConfig, SetEnqueueOptions, SetWorkflowID
from dbos import error as dbos_error

from supervisor.runs.flow import Flow, failed_verdict
from supervisor.runs.states import State
from supervisor.settings.model import Settings
from supervisor.store.store import Store
from tools.values import JsonObject

logger = logging.getLogger(__name__)

QUEUE = "runs"
# The flow's version: runs begun by another one are not taken over by code that would read their steps differently.
FLOW_VERSION = "chargehand-flow-1"
# How often the queue and the store are looked at, seconds; in the same process an event wakes the intake at once.
POLL_S = 0.1
INTAKE_S = 0.25
# Tries of a stage whose error is the gateway's own (database away), and the first pause between them, seconds.
STAGE_TRIES, STAGE_PAUSE_S = 5, 0.5

# For a stage that is cancelled because the gateway ends: to close its connections, seconds.
STAGE_END_S = 10.0

T = TypeVar("T")

_flow: Flow | None = None


# Stages under way, so that an engine that ends can end them: DBOS leaves what it started to the loop.
_stages: set[asyncio.Task[Any]] = set()


def _the_flow() -> Flow:
    if _flow is None:
        raise RuntimeError("the workflow engine runs without a flow")
    return _flow


async def _stage(work: Coroutine[Any, Any, T]) -> T:
    """Carry out one stage. When the gateway ends in the middle of it nothing is recorded: the next one does it again."""
    task = asyncio.ensure_future(work)
    _stages.add(task)
    task.add_done_callback(_stages.discard)
    try:
        return await task
    except asyncio.CancelledError:
        # Not an outcome of the stage. The workflow stays where it is until this process is gone.
        await asyncio.get_running_loop().create_future()
        raise


# Stages that only look and record may be tried again when the gateway's own database was away for a moment.
_AGAIN: dict[str, Any] = {"retries_allowed": True, "max_attempts": STAGE_TRIES, "interval_seconds": STAGE_PAUSE_S}


@DBOS.step(name="admit", **_AGAIN)
async def _admit(run_id: str) -> bool:
    return await _stage(_the_flow().admit(run_id))


@DBOS.step(name="activate")
async def _activate(run_id: str) -> JsonObject:
    return await _stage(_the_flow().activate(run_id))


@DBOS.step(name="task")
async def _task(run_id: str) -> JsonObject:
    return await _stage(_the_flow().task(run_id))


@DBOS.step(name="evaluate", **_AGAIN)
async def _evaluate(run_id: str, result: JsonObject) -> JsonObject:
    return await _stage(_the_flow().evaluate(run_id, result))


@DBOS.step(name="stop", **_AGAIN)
async def _stop(run_id: str, reason: str) -> JsonObject:
    return await _stage(_the_flow().stop(run_id, reason))


@DBOS.step(name="seal", **_AGAIN)
async def _seal(run_id: str, verdict: JsonObject, result: JsonObject | None, stopped: JsonObject) -> str:
    return await _stage(_the_flow().seal(run_id, verdict, result, stopped))


@DBOS.workflow(name="run", max_recovery_attempts=20)
async def _run(run_id: str) -> str:
    """The whole run; what a stage returned is kept, so after a crash only what was not finished is done again.

    Whatever goes wrong before it, ``stop`` follows: a defect of the gateway must not leave an agent running.
    """
    if not await _admit(run_id):
        return "ended before it started"
    result: JsonObject | None = None
    try:
        activated = await _activate(run_id)
        if activated["started"]:
            result = await _task(run_id)
            verdict = await _evaluate(run_id, result)
        else:
            verdict = failed_verdict(activated["error"] or {"message": "the edge agent was not started"})
    except Exception as error:
        logger.exception("run %s: a stage failed", run_id)
        verdict = failed_verdict(
            {"code": "internal", "message": f"the gateway failed: {type(error).__name__}: {error}", "exit_code": 5}
        )
    stopped = await _stop(run_id, str(verdict["reason"])[:300])
    return await _seal(run_id, verdict, result, stopped)


class DurableRuns:
    """The workflow engine of one gateway; one per process (a rule of DBOS).

    Args:
        settings: where its database lies.
        store: where requests are found.
        flow: the stages.
    """

    def __init__(self, settings: Settings, store: Store, flow: Flow) -> None:
        self._settings = settings
        self._store = store
        self._flow = flow
        self._engine: sqlalchemy.Engine | None = None
        self._wake = asyncio.Event()
        self._intake: asyncio.Task[None] | None = None

    async def launch(self) -> None:
        """Start the engine in the running loop: recover what a dead gateway left, then take requests in."""
        global _flow
        if _flow is not None:
            raise RuntimeError("a workflow engine runs in this process already")
        _flow = self._flow
        config: DBOSConfig = {
            "name": "chargehand",
            "application_version": FLOW_VERSION,
            "executor_id": "gateway",
            "log_level": "ERROR",
            "console_log_level": "ERROR",
            "notification_listener_polling_interval_sec": POLL_S,
            "run_migrations": True,
            "enable_otlp": False,
        }
        if self._settings.store_url.startswith("sqlite"):
            self._engine = _sqlite(self._settings.data_dir / "flow.db")
            config["system_database_engine"] = self._engine
            config["system_database_url"] = f"sqlite:///{self._settings.data_dir / 'flow.db'}"
        else:
            config["system_database_url"] = self._settings.store_url
        logging.getLogger("dbos").setLevel(logging.ERROR)
        DBOS(config=config)
        DBOS.launch()
        await DBOS.register_queue_async(
            QUEUE,
            worker_concurrency=self._settings.limits.runs_at_once,
            partition_concurrency=1,
            polling_interval_sec=POLL_S,
            on_conflict="always_update",
        )
        self._intake = asyncio.create_task(self._take_in())

    def wake(self) -> None:
        """Look for requests now rather than at the next turn."""
        self._wake.set()

    async def _take_in(self) -> None:
        """Enqueue every stored request that is not enqueued yet, for as long as the gateway runs."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), INTAKE_S)
            self._wake.clear()
            try:
                waiting = await asyncio.to_thread(
                    self._store.runs.list, in_states=frozenset({State.REQUESTED}), limit=1000
                )
                for run in reversed(waiting):
                    await self._enqueue(run.id, run.machine)
            except Exception:
                logger.exception("requests could not be taken in; trying again")

    async def _enqueue(self, run_id: str, machine: str) -> None:
        limits = self._settings.limits
        run = await asyncio.to_thread(self._store.runs.get, run_id)
        with SetWorkflowID(run_id), SetEnqueueOptions(queue_partition_key=machine):
            await DBOS.enqueue_workflow_async(QUEUE, _run, run_id)
        await asyncio.to_thread(
            self._store.runs.move, run_id, State.REQUESTED, State.QUEUED, deadline=run.created_at + limits.queue_s
        )

    async def aclose(self) -> None:
        """Stop taking in and end the engine; runs that are on are found again at the next start, or by their lease."""
        global _flow
        if self._intake is not None:
            self._intake.cancel()
            await asyncio.gather(self._intake, return_exceptions=True)
        loop = asyncio.get_running_loop()
        # What is cancelled at the very end of the loop finds no database to write to any more; that is as it should be.
        loop.set_exception_handler(_quiet)
        for stage in list(_stages):
            stage.cancel()
        if _stages:
            await asyncio.wait(_stages, timeout=STAGE_END_S)
        await asyncio.to_thread(DBOS.destroy, workflow_completion_timeout_sec=0)
        _flow = None
        # The engine had put its own pool of threads into the loop and has shut it down with itself.
        loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix="chargehand"))
        if self._engine is not None:
            self._engine.dispose()


def _quiet(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), dbos_error.DBOSException):
        loop.default_exception_handler(context)


def _sqlite(path: Path) -> sqlalchemy.Engine:
    """DBOS's database as SQLite with a write-ahead log: 6 steps cost about 16 ms this way, 150 ms the default way."""
    engine = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30, "check_same_thread": False})

    @sqlalchemy.event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=30000", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    path.touch(mode=0o600, exist_ok=True)
    return engine
