"""``chargehand up``: the gateway in the foreground."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

import typer

from supervisor.cli.context import JsonOption, settings_of
from supervisor.cli.output import err, errors, print_json, styled
from supervisor.settings.model import Settings

app = typer.Typer(add_completion=False)


@app.command()
def up(context: typer.Context, as_json: JsonOption = False) -> None:
    """Start the gateway and stay: takes requests in, runs them, signs checkpoints, delivers traces. Ctrl-C ends it in order.

    With --json one line is printed when it is ready: data directory, MLflow address, machines, pid.
    """
    with errors(as_json):
        settings = settings_of(context)
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        asyncio.run(_up(settings, as_json))


async def _up(settings: Settings, as_json: bool) -> None:
    from supervisor.gateway import gateway

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with gateway(settings) as running:
        machines = await asyncio.to_thread(running.services.store.machines.list)
        facts = {
            "data_dir": str(settings.data_dir),
            "mlflow_url": running.mlflow_url,
            "machines": len(machines),
            "pid": os.getpid(),
        }
        if as_json:
            print_json(facts)
        else:
            err.print(styled("the gateway is up", "bold green"))
            for name, value in facts.items():
                err.print(styled(f"  {name:<11}{value}", "dim"))
            if not machines:
                err.print(
                    styled("  no machines yet: chargehand edge install ADMIN@HOST, or machine add NAME --embedded")
                )
            err.print(styled("  Ctrl-C ends it; runs that are on end with their lease", "dim"))
        await stop.wait()
        if not as_json:
            err.print(styled("stopping", "dim"))
