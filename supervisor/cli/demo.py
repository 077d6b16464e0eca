"""``chargehand demo``: the main job for real, on this very computer, from nothing.

Owns: a data directory of its own, the order in which things are shown, and that all of it is gone at the end.
Deliberately does not know: a shortcut. SSH, A2A, gate, journal, audit chain and MLflow are the ones every run uses; the
machine is this computer behind the in-process SSH server, with plain processes instead of units.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from supervisor.cli.context import JsonOption, operator
from supervisor.cli.output import err, errors, out, print_json, styled
from supervisor.errors import RunFailed
from supervisor.settings.load import load
from supervisor.settings.model import Settings

app = typer.Typer(add_completion=False)

MACHINE = "this-computer"
# A fresh MLflow server on a small box takes up to 40 s to answer; a busy one longer.
MLFLOW_S = 150.0
RUN_S = 240.0


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the gateway and the MLflow UI up until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check this computer's health through everything Chargehand has, and show each step.

    Needs no root, no systemd, no model key. With ANTHROPIC_API_KEY or OPENAI_API_KEY in the environment that model is
    used. Everything it starts is gone at the end; --keep leaves it up. Exit status 0: the run succeeded, its audit chain
    verifies, its trace is in MLflow, and nothing runs any more.
    """
    with errors(as_json):
        # Short: UNIX socket paths end at 107 bytes.
        directory = Path(tempfile.mkdtemp(prefix="chargehand-demo-"))
        try:
            document = asyncio.run(_demo(directory, keep, as_json))
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        if as_json:
            print_json(document)
        problems = check(document)
        if problems:
            raise RunFailed("the demo did not show what it promises: " + "; ".join(problems))


def check(document: dict[str, Any]) -> list[str]:
    """What the demo promises and did not keep; empty when all is well."""
    trace = document["trace"]
    facts = [
        (document["state"] == "succeeded", f"the run is {document['state']}"),
        (document["unit_after"] == "inactive", f"the unit is {document['unit_after']}"),
        (document["processes_after"] == 0, f"{document['processes_after']} processes are left"),
        (document["audit"]["verified"] and not document["audit"]["gaps"], "the audit chain does not verify"),
        (bool(trace["spans"]), "the trace is not in MLflow"),
    ]
    return [said for good, said in facts if not good]


async def _demo(directory: Path, keep: bool, quiet: bool) -> dict[str, Any]:
    from supervisor.audit import kinds
    from supervisor.cli.follow import Progress, print_report, result_of
    from supervisor.gateway import gateway
    from supervisor.machines import EMBEDDED, Machine, host_key
    from supervisor.runs.request import request_run

    def say(text: str, style: str = "bold") -> None:
        if not quiet:
            err.print(styled(text, style))

    settings = _settings(directory)
    say("1  starting the gateway and an MLflow server of its own")
    async with gateway(settings) as running:
        services = running.services
        say("2  this computer becomes a machine: in-process SSH server, pinned host key, gatekeeper")
        embedded = await services.start_embedded(MACHINE)
        key = host_key(embedded.host_key_line)
        machine = Machine(
            id=MACHINE, address="127.0.0.1", port=embedded.endpoint[1], user="chargehand", transport=EMBEDDED,
            role="the computer this demo runs on",
        )  # fmt: skip
        await asyncio.to_thread(services.store.machines.add, machine)
        await asyncio.to_thread(services.store.machines.accept_host_key, MACHINE, key.text, "demo")
        await services.record(MACHINE, kinds.MACHINE_ADDED, {"transport": EMBEDDED}, actor=operator())
        await services.record(MACHINE, kinds.HOST_KEY_ACCEPTED, {"fingerprint": key.fingerprint}, actor=operator())
        say(f"   {MACHINE}  {key.fingerprint}", "dim")

        say("3  a governed run: the runbook `health`, through SSH, A2A, gate and journal")
        run = await request_run(
            services,
            machine=MACHINE,
            text="Check the health of this machine.",
            runbook="health",
            requested_by=operator(),
        )
        running.runs.wake()
        async with asyncio.timeout(RUN_S):
            run = await Progress(quiet).follow(services, run.id)

        say("4  the trace, read back from MLflow (a fresh server may take a while to answer)")
        spans, url = await _trace(running, run.trace_id)
        say("5  the audit chain, and what is left on the machine")
        await asyncio.to_thread(services.checkpoint)
        document = await result_of(services, run, spans, url)
        status = await services.gatekeeper(await asyncio.to_thread(services.store.machines.get, MACHINE)).status()
        document["unit_after"], document["processes_after"] = status["unit"], len(status["processes"])
        if not quiet:
            print_report(document)
            _next_steps(keep, running.mlflow_url)
        if keep:
            if quiet:
                print_json(document)
            await _until_interrupted(say, settings)
    say("everything the demo started is gone", "dim")
    return document


def _settings(directory: Path) -> Settings:
    """Defaults and environment, no settings file: the demo must not depend on what is configured here."""
    settings = load(_no_file(directory), data_dir=directory / "data")
    mlflow = settings.mlflow.model_copy(update={"mode": "embedded", "url": None, "port": 0})
    return settings.model_copy(update={"mlflow": mlflow})


def _no_file(directory: Path) -> Path:
    path = directory / "chargehand.toml"
    path.write_text("", encoding="utf-8")
    return path


async def _trace(running: Any, trace: str) -> tuple[int | None, str | None]:
    """Spans in MLflow and the link, once MLflow answers; ``(None, None)`` if it does not in time."""
    from otel.mlflow_server import MlflowServerFailed
    from supervisor.cli.run import trace_of

    if running.mlflow is None:
        return None, None
    deadline = time.monotonic() + MLFLOW_S
    with contextlib.suppress(MlflowServerFailed):
        await running.mlflow.wait_ready(MLFLOW_S)
    wanted = len(running.services.spool.span_ids(trace))
    while time.monotonic() < deadline:
        spans, url = await trace_of(running.services, trace, running.mlflow_url, running)
        if spans is not None and spans >= wanted:
            return spans, url
        await asyncio.sleep(0.2)
    return await trace_of(running.services, trace, running.mlflow_url, running)


def _next_steps(keep: bool, mlflow_url: str | None) -> None:
    out.print()
    out.print(styled("What to try next", "bold"))
    steps = [
        ("chargehand demo --keep", "the same, and look at the trace in the MLflow UI"),
        ("chargehand init && chargehand up", "a gateway of your own"),
        ("chargehand machine add here --embedded", "this computer as a machine of that gateway"),
        ("chargehand edge install root@HOST --machine NAME", "a real machine, with systemd and podman"),
        ('chargehand run NAME "why is /var filling up?"', "ask something; with a model key it is investigated"),
        ("chargehand policy test -- journalctl -u nginx", "what the gate says about a command"),
    ]
    for command, text in steps:
        out.print(styled(f"  {command:<52}", "cyan") + styled(text, "dim"))
    if keep and mlflow_url is not None:
        out.print(styled(f"  MLflow: {mlflow_url}", "green"))


async def _until_interrupted(say: Any, settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    say(f"the gateway stays up on {settings.data_dir} (pid {os.getpid()}); Ctrl-C ends it", "green")
    say(f"in another terminal: chargehand --data-dir {settings.data_dir} runs list", "dim")
    await stop.wait()
