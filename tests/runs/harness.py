"""A real gateway with the embedded machine, for tests: everything is real but sshd, systemd and podman."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from supervisor.gateway import Gateway, gateway, wait_final
from supervisor.machines import EMBEDDED, Machine, host_key
from supervisor.runs.request import request_run
from supervisor.settings.load import load
from supervisor.store.runs import Run

MACHINE = "m1"


@contextlib.asynccontextmanager
async def embedded_gateway(directory: Path, **limits: Any) -> AsyncIterator[Gateway]:
    """A gateway on ``directory`` with one embedded machine ``m1``; no MLflow: spans stay in the spool."""
    directory.mkdir(exist_ok=True)
    config = directory / "chargehand.toml"
    lines = ["[limits]", *(f"{name} = {value}" for name, value in limits.items())]
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = load(config, data_dir=directory / "data")
    async with gateway(settings, traces=False) as running:
        serving = await running.services.start_embedded(MACHINE)
        machines = running.services.store.machines
        if not machines.list():
            machines.add(
                Machine(
                    id=MACHINE, address="127.0.0.1", port=serving.endpoint[1], user="chargehand", transport=EMBEDDED
                )
            )
            machines.accept_host_key(MACHINE, host_key(serving.host_key_line).text, "test")
        yield running


async def ask(running: Gateway, **request: Any) -> Run:
    """Ask for a run and return it as stored."""
    asked = {"machine": MACHINE, "text": "Look at this machine.", "requested_by": "operator:test", **request}
    run = await request_run(running.services, **asked)
    running.runs.wake()
    return run


async def finished(running: Gateway, run: Run, timeout_s: float = 60.0) -> Run:
    return await wait_final(running.services.store, run.id, timeout_s)


async def event(running: Gateway, run: Run, kind: str, timeout_s: float = 30.0) -> dict[str, Any]:
    """Wait until the run has told an event of ``kind``; returns its body."""
    async with asyncio.timeout(timeout_s):
        while True:
            now = await asyncio.to_thread(running.services.store.runs.get, run.id)
            for one in await asyncio.to_thread(running.services.store.events.events, run.id):
                if one.kind == kind:
                    return one.body
            assert not now.final, f"the run ended without {kind}: {told(now)}"
            await asyncio.sleep(0.02)


async def status(running: Gateway) -> dict[str, Any]:
    """What the machine's own gatekeeper says."""
    _, gatekeeper = await running.services.door(MACHINE)
    return await gatekeeper.status()


def kinds_of(running: Gateway, run: Run) -> list[str]:
    return [record.kind for record in running.services.ledger.records(run_id=run.id)]


def bodies_of(running: Gateway, run: Run, kind: str) -> list[dict[str, Any]]:
    return [json.loads(record.body) for record in running.services.ledger.records(run_id=run.id, kind=kind)]


def told(run: Run) -> str:
    """What a failed assertion about a run should show."""
    return json.dumps(
        {name: value for name, value in run.to_json().items() if value is not None}, default=str, indent=1
    )
