"""``chargehand run MACHINE TEXT``: ask for one run and follow it.

With a gateway on the data directory the request is left to it; without one this process is the gateway for as long as
the run takes.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from supervisor.cli.context import JsonOption, operator, settings_of
from supervisor.cli.output import err, errors, print_json, styled
from supervisor.errors import OK, RUN_DID_NOT_SUCCEED, BadInput, Interrupted, RunFailed
from supervisor.settings.model import Settings

app = typer.Typer(add_completion=False)

# After a run has ended, how long its spans may take to MLflow before the answer says that they are on their way, seconds.
TRACE_S = 5.0


@app.command()
def run(
    context: typer.Context,
    machine: Annotated[str, typer.Argument(help="The machine's id.")],
    text: Annotated[str, typer.Argument(help="What is asked, in words.")] = "",
    runbook: Annotated[str | None, typer.Option("--runbook", help="Follow this runbook.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="runbook | anthropic[:MODEL] | openai[:MODEL][@URL] | a [models.NAME] table."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait; needs a running gateway.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run one supervised job on one machine: start the edge agent, give it the task, judge the evidence, stop it.

    Exit status: 0 the run succeeded, 1 it ended otherwise, 2 bad input, 3 refused, 4 machine unreachable or failed.
    """
    with errors(as_json):
        if not text.strip() and runbook is None:
            raise BadInput("a run needs a question or a runbook", next_step='chargehand run MACHINE "check the disks"')
        settings = settings_of(context)
        document = asyncio.run(_run(settings, machine, text, runbook, model, detach, as_json))
        if as_json:
            print_json(document)
        if document["state"] in ("requested", "queued"):
            return
        raise typer.Exit(exit_status(document))


def exit_status(document: dict[str, Any]) -> int:
    """0 for a run that succeeded; otherwise what its error says (machine, refusal), else 1."""
    if document["state"] == "succeeded":
        return OK
    error = document.get("error") or {}
    return int(error.get("exit_code") or RUN_DID_NOT_SUCCEED)


async def _run(
    settings: Settings, machine: str, text: str, runbook: str | None, model: str | None, detach: bool, quiet: bool
) -> dict[str, Any]:
    from supervisor.gateway import gateway, running_gateway
    from supervisor.runs.request import request_run
    from supervisor.runs.services import open_services

    asked: dict[str, Any] = {
        "machine": machine,
        "text": text,
        "runbook": runbook,
        "model": model,
        "requested_by": operator(),
    }
    elsewhere = running_gateway(settings.data_dir)
    if elsewhere is not None:
        services = await asyncio.to_thread(open_services, settings)
        try:
            made = await request_run(services, **asked)
            if detach:
                if not quiet:
                    err.print(styled(f"{made.id} is queued; chargehand runs logs {made.id} --follow"))
                return {"run_id": made.id, "machine": machine, "state": str(made.state)}
            return await _follow(services, made.id, elsewhere.mlflow_url, quiet, None)
        finally:
            await services.aclose()
    if detach:
        raise RunFailed(
            "nobody would carry out a detached run: no gateway runs on this data directory",
            tried=str(settings.data_dir),
            next_step="start one with chargehand up, or run without --detach",
            exit_code=3,
        )
    # Starting an MLflow server for one run would take longer than the run: its spans wait in the spool for `up`.
    async with gateway(settings, traces=settings.mlflow.mode == "external") as here:
        made = await request_run(here.services, **asked)
        here.runs.wake()
        return await _follow(here.services, made.id, here.mlflow_url, quiet, here)


async def _follow(services: Any, run_id: str, mlflow_url: str | None, quiet: bool, here: Any) -> dict[str, Any]:
    """Follow to the end. A person's Ctrl-C asks for the cancel and then waits for the proof that nothing runs."""
    from supervisor.cli.follow import Progress, print_report, result_of
    from supervisor.store.ids import trace_id

    progress = Progress(quiet)
    following = asyncio.ensure_future(progress.follow(services, run_id))
    interrupted = False
    while True:
        try:
            done = await asyncio.shield(following)
            break
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            if interrupted:
                following.cancel()
                raise Interrupted(
                    "interrupted twice; the run is being stopped by its lease",
                    next_step=f"chargehand runs show {run_id}",
                ) from None
            interrupted = True
            err.print(styled("cancelling: the agent is stopped first (Ctrl-C again to leave at once)", "yellow"))
            await asyncio.to_thread(services.store.runs.request_cancel, run_id, operator())
    spans, url = await trace_of(services, trace_id(run_id), mlflow_url, here)
    document: dict[str, Any] = await result_of(services, done, spans, url)
    if not quiet:
        print_report(document)
    return document


async def trace_of(services: Any, trace: str, mlflow_url: str | None, here: Any) -> tuple[int | None, str | None]:
    """How many spans MLflow holds of a trace and its link there; ``(None, None)`` when they have not arrived."""
    from otel.mlflow_reader import MlflowError, MlflowReader

    if mlflow_url is None:
        return None, None
    if here is not None and here.deliverer is not None:
        await here.deliverer.flush(TRACE_S, trace)
    experiment = services.settings.mlflow.experiment

    def look() -> tuple[int | None, str | None]:
        with MlflowReader(mlflow_url) as reader:
            found = reader.experiment_id(experiment)
            count = reader.span_count(trace) if found is not None else 0
            return (count, reader.trace_url(trace, found)) if count and found is not None else (None, None)

    try:
        return await asyncio.to_thread(look)
    except MlflowError:
        return None, None
