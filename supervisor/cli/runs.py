"""``chargehand runs list|show|cancel|logs``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from supervisor.cli.context import JsonOption, opened, operator, settings_of
from supervisor.cli.output import STATE_STYLE, err, errors, moment, out, print_json, seconds, styled, table
from supervisor.errors import BadInput

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List runs, show one, cancel one, print its events.")

RunArgument = Annotated[str, typer.Argument(help="The run's id, or its beginning.")]


@app.command("list")
def list_runs(
    context: typer.Context,
    machine: Annotated[str | None, typer.Option("--machine", help="Only of this machine.")] = None,
    state: Annotated[list[str] | None, typer.Option("--state", help="Only in this state; may be given again.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most so many.")] = 20,
    before: Annotated[str | None, typer.Option("--before", help="Only runs older than this run id.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Runs, newest first."""
    from supervisor.cli.follow import one_line
    from supervisor.runs import states

    with errors(as_json):
        wanted = frozenset(states.parse(name) for name in state) if state else None
        with opened(settings_of(context)) as services:
            found = services.store.runs.list(machine=machine, in_states=wanted, before=before, limit=limit)
        if as_json:
            print_json({"runs": [run.to_json() for run in found]})
            return
        rows = [
            (
                run.id,
                run.machine,
                styled(run.state, STATE_STYLE.get(str(run.state), "bold")),
                moment(run.created_at),
                seconds((run.seconds or {}).get("total")),
                one_line(run.text, 50),
            )
            for run in found
        ]
        table(("RUN", "MACHINE", "STATE", "ASKED", "TOOK", "TEXT"), rows, "no runs; chargehand run MACHINE TEXT")


@app.command()
def show(context: typer.Context, run: RunArgument, as_json: JsonOption = False) -> None:
    """One run: verdict, findings with evidence, tool calls, what it took, and the proof that nothing runs."""
    from supervisor.cli.follow import call_line, print_report, result_of
    from supervisor.cli.run import trace_of
    from supervisor.gateway import running_gateway
    from supervisor.runs.verdict import calls_of

    with errors(as_json):
        settings = settings_of(context)
        elsewhere = running_gateway(settings.data_dir)
        url = settings.mlflow.url or (elsewhere.mlflow_url if elsewhere else None)
        with opened(settings) as services:
            found = services.store.runs.find(run)

            async def look() -> dict[str, Any]:
                spans, link = await trace_of(services, found.trace_id, url, None)
                return await result_of(services, found, spans, link)

            document = asyncio.run(look())
            if as_json:
                print_json(document)
                return
            out.print(styled(found.text))
            out.print(styled(f"asked by {found.requested_by} at {moment(found.created_at)}", "dim"))
            for call in calls_of(services.store.events.streamed(found.id)).values():
                out.print(call_line(call))
            print_report(document)


@app.command()
def cancel(context: typer.Context, run: RunArgument, as_json: JsonOption = False) -> None:
    """Ask for a run to be cancelled. What runs is killed; the run ends when its unit is proven inactive."""
    with errors(as_json), opened(settings_of(context)) as services:
        found = services.store.runs.find(run)
        if found.final:
            raise BadInput(f"run {found.id} has ended already", expected="an open run", got=str(found.state))
        found = services.store.runs.request_cancel(found.id, operator())
        if as_json:
            print_json(
                {"run_id": found.id, "state": str(found.state), "cancel_requested_by": found.cancel_requested_by}
            )
        else:
            out.print(styled(f"{found.id} is being cancelled; chargehand runs logs {found.id} --follow"))


@app.command()
def logs(
    context: typer.Context,
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The events of a run; with --json one event a line, complete with evidence."""
    from supervisor.cli.follow import Progress

    with errors(as_json), opened(settings_of(context)) as services:
        found = services.store.runs.find(run)
        if follow and not found.final:
            asyncio.run(Progress(quiet=as_json).follow(services, found.id))
            if not as_json:
                return
        told = services.store.events.events(found.id)
        if as_json:
            for event in told:
                print_json(event.to_json())
            return
        progress = Progress(quiet=False)
        for event in told:
            progress.tell(event)
        if not told:
            err.print(styled("no events yet", "dim"))
