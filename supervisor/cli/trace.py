"""``chargehand trace RUN``: the trace of a run as a tree.

Owns: where the spans are taken from, and saying so: MLflow when it has the whole trace, else the spool, else derived
anew from the stored events. Deliberately does not know: what a span means (``otel.tree`` makes the rows).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supervisor.cli.context import JsonOption, opened, settings_of
from supervisor.cli.output import err, errors, out, print_json, styled

if TYPE_CHECKING:
    from otel.spans import Span
    from otel.tree import TreeRow
    from supervisor.runs.services import Services
    from supervisor.settings.model import Settings
    from supervisor.store.runs import Run

app = typer.Typer(add_completion=False)

# One answer of MLflow, seconds: a person waits, and the trace can be had without it.
MLFLOW_S = 10.0
MLFLOW, SPOOL, STORE = "mlflow", "spool", "store"
_SAID = {
    MLFLOW: "as MLflow has it",
    SPOOL: "from the spool: its spans wait for MLflow",
    STORE: "derived from the stored events: MLflow does not have it",
}


@dataclasses.dataclass(frozen=True)
class Found:
    """The spans of a run. ``source``: ``mlflow``, ``spool`` or ``store``; ``url``: of the trace in MLflow, if it is
    there; ``in_mlflow``: how many spans MLflow holds, ``None`` if it could not be asked; ``note``: why it was not
    MLflow."""

    spans: list[Span]
    source: str
    url: str | None
    in_mlflow: int | None
    note: str = ""


def mlflow_url(settings: Settings) -> str | None:
    """The MLflow server that traces go to: the configured one, or that of the gateway that runs now."""
    from supervisor.gateway import running_gateway

    if settings.mlflow.mode == "external":
        return settings.mlflow.url
    running = running_gateway(settings.data_dir)
    return running.mlflow_url if running is not None else None


@app.command()
def trace(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="The run's id, or its beginning.")],
    as_json: JsonOption = False,
) -> None:
    """Print the trace of a run as a tree, say where it was taken from, and the link to MLflow."""
    with errors(as_json):
        from otel.tree import render, rows

        settings = settings_of(context)
        with opened(settings) as services:
            found = services.store.runs.find(run)
            taken = find_trace(services, found, mlflow_url(settings))
        tree = rows(taken.spans)
        if as_json:
            print_json(_document(found, taken, tree))
            return
        for line, row in zip(render(tree), tree, strict=True):
            out.print(styled(line, "red" if row.status == "error" else ""))
        err.print(styled(f"{len(taken.spans)} spans, {_SAID[taken.source]}", "dim"))
        if not found.final:
            err.print(styled(f"the run goes on ({found.state}): this is what is known so far", "yellow"))
        if taken.note:
            err.print(styled(taken.note, "yellow"))
        if taken.url:
            out.print(styled(taken.url, "cyan"))


def find_trace(services: Services, run: Run, url: str | None) -> Found:
    """The spans of ``run``, from the best source that has all of them."""
    from otel.redaction import Redactor
    from supervisor.runs.trace import spans_of

    seen, link, note = _from_mlflow(services.settings, run, url)
    states = services.spool.span_ids(run.trace_id)
    if seen and len(seen) >= len(states):
        return Found(seen, MLFLOW, link, len(seen))
    count = None if seen is None else len(seen)
    waiting = services.spool.pending_spans(run.trace_id)
    if seen and not note:
        note = f"MLflow has {len(seen)} of {len(states)} spans"
    if waiting and len(waiting) == len(states):
        return Found(waiting, SPOOL, link, count, note)
    # The same run gives the same spans, however often they are made; content is not needed for a tree.
    redactor = Redactor()
    made = spans_of(run, services.store.events.events(run.id), services.settings.traces.environment, content=False)
    return Found([redactor.span(span) for span in made], STORE, link, count, note)


def _from_mlflow(settings: Settings, run: Run, url: str | None) -> tuple[list[Span] | None, str | None, str]:
    """Spans, link and why not: ``None`` for the spans if MLflow could not be asked."""
    from otel.mlflow_reader import MlflowError, MlflowReader

    if settings.mlflow.mode == "off":
        return None, None, "traces are kept here only: mlflow.mode is off"
    if url is None:
        return None, None, "MLflow was not asked: no gateway runs (chargehand up starts one, and delivers what waits)"
    try:
        with MlflowReader(url, timeout_s=MLFLOW_S) as reader:
            spans = reader.trace(run.trace_id)
            experiment = reader.experiment_id(settings.mlflow.experiment) if spans else None
            link = reader.trace_url(run.trace_id, experiment) if spans and experiment is not None else None
            return spans or [], link, "" if spans else f"MLflow at {url} does not have this trace yet"
    except MlflowError as error:
        return None, None, f"MLflow could not be asked: {error}"


def _document(run: Run, taken: Found, tree: list[TreeRow]) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "trace_id": run.trace_id,
        "state": str(run.state),
        "source": taken.source,
        "spans_in_mlflow": taken.in_mlflow,
        "mlflow_url": taken.url,
        "note": taken.note or None,
        "spans": [
            {
                "span_id": row.span_id, "depth": row.depth, "name": row.name, "start_ms": round(row.start_ms, 3),
                "ms": round(row.ms, 3), "status": row.status, "status_message": row.status_message,
                "orphan": row.orphan, "attributes": dict(row.attributes),
            }
            for row in tree
        ],
    }  # fmt: skip
