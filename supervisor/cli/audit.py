"""``chargehand audit show|verify|export|checkpoint``.

Owns: what is printed, which records are meant, exit codes. Deliberately does not know: how a chain is verified
(``supervisor.audit``) or compared with traces (``completeness``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supervisor.audit import kinds
from supervisor.audit.chain import Record
from supervisor.cli.context import JsonOption, opened, settings_of
from supervisor.cli.output import err, errors, fields, moment, out, print_json, styled, table
from supervisor.errors import INTERNAL, RUN_DID_NOT_SUCCEED, BadInput, ChargehandError
from tools.values import JsonObject

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from supervisor.audit.verify import VerifyReport
    from supervisor.cli.completeness import Mismatch
    from supervisor.runs.services import Services
    from supervisor.settings.model import Settings
    from supervisor.store.runs import Run

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Show, verify and export the audit chain.")

MachineOption = Annotated[str | None, typer.Option("--machine", help="Only this machine's chain.")]
# Runs that are read from the store, and asked of MLflow, at a time.
RUNS_AT_ONCE = 200
MLFLOW_S = 30.0
GATEWAY = kinds.GATEWAY_CHAIN


# --- show ------------------------------------------------------------------------------------------------------------


@app.command()
def show(
    context: typer.Context,
    machine: MachineOption = None,
    gateway: Annotated[bool, typer.Option("--gateway", help="Only the gateway's own chain.")] = False,
    run: Annotated[str | None, typer.Option("--run", help="Only of this run; its id or the beginning.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Only of this kind, such as decision.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="At most so many, the last ones.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """The last audit records, oldest first. With --json each is complete, with its body and its place in the chain."""
    with errors(as_json):
        if kind is not None and kind not in kinds.KINDS:
            raise BadInput("this is no kind of audit record", expected=" | ".join(sorted(kinds.KINDS)), got=kind)
        if machine is not None and gateway:
            raise BadInput("--machine and --gateway name two chains", next_step="use one of them")
        with opened(settings_of(context)) as services:
            chain = GATEWAY if gateway else _chain(services, machine)
            run_id = services.store.runs.find(run).id if run is not None else None
            found = services.ledger.records(chain=chain, run_id=run_id, kind=kind, limit=limit, newest_first=True)
        found.reverse()
        if as_json:
            print_json({"records": [record_document(record) for record in found]})
            return
        rows = [
            (
                moment(record.at_us / 1e6),
                f"{record.chain.removeprefix('machine:')} {record.seq}",
                styled(record.kind, _STYLES.get(record.kind, "")),
                (record.run_id or "")[:8],
                record.actor,
                _brief(record),
            )
            for record in found
        ]
        table(("WHEN", "CHAIN", "KIND", "RUN", "WHO", "WHAT"), rows, "no audit records")


_STYLES = {
    kinds.AUDIT_GAP: "bold red",
    kinds.VIOLATION: "bold red",
    kinds.HOST_KEY_CHANGED: "bold red",
    kinds.LOGIN_FAILED: "yellow",
}


def _chain(services: Services, machine: str | None) -> str | None:
    """The chain of a machine that was ever known. Raises ``NotFound``."""
    if machine is None:
        return None
    return kinds.machine_chain(services.store.machines.get(machine, removed=True).id)


def record_document(record: Record) -> JsonObject:
    """The stable document of one record; ``body`` is the parsed JSON, or the text if somebody damaged it."""
    try:
        body: Any = json.loads(record.body)
    except ValueError:
        body = record.body
    return {
        "chain": record.chain, "seq": record.seq, "at": record.at_us / 1e6, "at_us": record.at_us, "kind": record.kind,
        "actor": record.actor, "run_id": record.run_id, "key": record.key, "body": body, "prev": record.prev,
        "hash": record.hash,
    }  # fmt: skip


def _brief(record: Record) -> str:
    """What a record says, in one short line."""
    body = record_document(record)["body"]
    if not isinstance(body, Mapping):
        return "(the body is damaged)"
    if record.kind == kinds.RUN_STATE:
        return f"{body.get('from')} → {body.get('to')}"
    if record.kind == kinds.DECISION:
        return f"{body.get('call_id')} {body.get('outcome')} {body.get('rule')}"
    if record.kind == kinds.EVIDENCE:
        steps = body.get("steps") if isinstance(body.get("steps"), list) else []
        statuses = [step.get("exit_status") for step in steps or [] if isinstance(step, Mapping)]
        return f"{body.get('call_id')} exit {', '.join(map(str, statuses)) or '-'}"
    wanted = (
        "inference_id",
        "call_id",
        "model",
        "message",
        "fingerprint",
        "previous",
        "number",
        "trigger",
        "lines",
        "generation",
    )
    parts = [f"{name}={body[name]}" for name in wanted if body.get(name) not in (None, "")]
    return " ".join(parts)[:100]


# --- verify ----------------------------------------------------------------------------------------------------------


@app.command()
def verify(
    context: typer.Context,
    export: Annotated[
        Path | None, typer.Argument(metavar="EXPORT", help="An export to verify, instead of the database.")
    ] = None,
    machine: MachineOption = None,
    key: Annotated[
        list[Path] | None, typer.Option("--key", help="Public key (PEM) that may have signed checkpoints; repeatable.")
    ] = None,
    against_mlflow: Annotated[
        bool, typer.Option("--against-mlflow", help="Also hold every sealed run against its trace in MLflow.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Re-check every record, checkpoint and sealed journal, and say exactly where a chain breaks.

    Exit status: 0 everything holds, 5 a chain is broken, 1 chain and MLflow differ.
    """
    with errors(as_json):
        if export is not None and (machine is not None or against_mlflow):
            raise BadInput("an export is verified as it is", next_step="leave --machine and --against-mlflow out")
        settings = settings_of(context)
        keys = _keys(key or [])
        document: JsonObject
        if export is not None:
            from supervisor.audit.export import verify_export

            report = verify_export(export, keys)
            document, mismatches = report.to_json(), None
        else:
            with opened(settings) as services:
                report, document, mismatches = _verify_store(services, settings, machine, keys, against_mlflow)
        if as_json:
            print_json(document)
        else:
            _print_report(report, document, str(export) if export else "the database")
        if not report.verified:
            raise typer.Exit(INTERNAL)
        if mismatches:
            raise typer.Exit(RUN_DID_NOT_SUCCEED)


def _keys(paths: list[Path]) -> list[Ed25519PublicKey]:
    from supervisor.audit.checkpoint import read_public_key

    found = []
    for path in paths:
        try:
            found.append(read_public_key(path.read_text("ascii", "replace")))
        except OSError as error:
            raise BadInput(f"the public key {path} cannot be read: {error.strerror}", next_step="check --key") from None
    return found


def _verify_store(
    services: Services, settings: Settings, machine: str | None, keys: list[Ed25519PublicKey], against_mlflow: bool
) -> tuple[VerifyReport, JsonObject, list[Mismatch] | None]:
    from supervisor.audit.checkpoint import KEY_FILE, load_signer
    from supervisor.audit.verify import verify as verify_all

    _chain(services, machine)
    # Only a key that is there: one made now would have signed nothing.
    if (settings.data_dir / KEY_FILE).exists():
        keys = [*keys, load_signer(settings.data_dir).public_key]
    report = verify_all(services.ledger, machine, keys=keys)
    gaps = services.ledger.records(chain=_chain(services, machine), kind=kinds.AUDIT_GAP)
    document = {**report.to_json(), "gaps": [record_document(gap) for gap in gaps]}
    if not against_mlflow:
        return report, document, None
    mismatches, runs = against(services, machine)
    document["mlflow"] = {
        "complete": not mismatches, "runs": runs, "mismatches": [mismatch.to_json() for mismatch in mismatches],
    }  # fmt: skip
    return report, document, mismatches


def against(services: Services, machine: str | None) -> tuple[list[Mismatch], int]:
    """Every sealed run held against its trace: what stands on one side only, and how many runs were looked at.

    Raises ``ChargehandError`` (code ``mlflow``) if MLflow cannot be asked.
    """
    from otel.mlflow_reader import MlflowError, MlflowReader
    from supervisor.cli.completeness import compare, recorded, traced
    from supervisor.cli.trace import mlflow_url

    url = mlflow_url(services.settings)
    if url is None:
        raise ChargehandError(
            "there is no MLflow to compare with",
            tried="--against-mlflow",
            expected="a running gateway with an embedded MLflow server, or mlflow.mode = 'external'",
            next_step="chargehand up, in another terminal",
            code="mlflow",
        )
    dropped = {gap.trace_id: gap.reason for gap in services.spool.gaps()}
    found: list[Mismatch] = []
    looked = 0
    try:
        with MlflowReader(url, timeout_s=MLFLOW_S) as reader:
            for runs in _sealed(services, machine):
                spans = reader.spans_of([run.trace_id for run in runs])
                for run in runs:
                    looked += 1
                    journal = services.store.journals.get(run.id)
                    on_record = recorded(services.ledger.records(run_id=run.id), journal.lines if journal else ())
                    in_trace = traced(spans.get(run.trace_id, []))
                    known = services.spool.span_ids(run.trace_id)
                    found += compare(run.id, on_record, in_trace, known, dropped.get(run.trace_id, ""))
    except MlflowError as error:
        raise ChargehandError(
            f"MLflow could not be asked: {error}", tried=url, next_step="chargehand doctor", code="mlflow"
        ) from None
    return found, looked


def _sealed(services: Services, machine: str | None) -> Iterator[list[Run]]:
    """Runs whose last event (``sealed``) is stored, newest first, some at a time."""
    from supervisor.runs.states import FINAL

    before = None
    while runs := services.store.runs.list(machine=machine, in_states=FINAL, before=before, limit=RUNS_AT_ONCE):
        before = runs[-1].id
        told = [
            run
            for run in runs
            if any(e.kind == "sealed" for e in services.store.events.events(run.id, source="gateway"))
        ]
        if told:
            yield told


_CHECKED = {True: "checked", False: "NOT checked: no key at hand"}


def _print_report(report: VerifyReport, document: JsonObject, what: str) -> None:
    head = styled("verified", "bold green") if report.verified else styled("BROKEN", "bold red")
    out.print(head + styled(f"  {what}"))
    fields(
        [
            ("records", f"{report.records}, chains {len(report.chains)}"),
            (
                "checkpoints",
                f"{report.checkpoints}, signatures {_CHECKED[report.signatures_checked]}",
            ),
            ("unsigned", f"{report.unsigned} (younger than the last checkpoint)"),
            ("journals", f"{report.journals} sealed, checked"),
        ]
    )
    for found in report.breaks:
        place = f"{found.chain} {found.seq}" + (f" to {found.last_seq}" if found.last_seq != found.seq else "")
        out.print(styled(f"{found.kind}: ", "bold red") + styled(f"{place}: {found.message}"))
        if found.expected or found.got:
            out.print(styled(f"  expected {found.expected or '-'}, found {found.got or '-'}", "dim"))
    for gap in document.get("gaps", []):
        body = gap["body"] if isinstance(gap["body"], Mapping) else {}
        out.print(styled("gap on record: ", "yellow") + styled(f"run {gap['run_id']}: {body.get('message')}"))
    compared = document.get("mlflow")
    if compared is not None:
        complete = f"MLflow has the same inferences and tool calls as the record (sealed runs: {compared['runs']})"
        if compared["complete"]:
            out.print(styled(complete, "green"))
        for mismatch in compared["mismatches"]:
            out.print(
                styled(f"{mismatch['kind']}: ", "bold red") + styled(f"run {mismatch['run_id']}: {mismatch['message']}")
            )


# --- export and checkpoint -------------------------------------------------------------------------------------------


@app.command("export")
def export_chain(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that does not exist yet.")],
    machine: MachineOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write chains, checkpoints and journals into a new directory that can be verified anywhere, without Chargehand."""
    with errors(as_json):
        from supervisor.audit.checkpoint import load_signer
        from supervisor.audit.export import SCRIPT, export

        settings = settings_of(context)
        with opened(settings) as services:
            _chain(services, machine)
            done = export(services.ledger, directory, machine=machine, signer=load_signer(settings.data_dir))
        if as_json:
            print_json(
                {
                    "path": str(done.path),
                    "records": done.records,
                    "checkpoints": done.checkpoints,
                    "journals": done.journals,
                }
            )
            return
        out.print(
            styled(f"{done.path}: records {done.records}, checkpoints {done.checkpoints}, journals {done.journals}")
        )
        err.print(styled(f"verify it anywhere: python3 {done.path / SCRIPT}", "dim"))
        err.print(
            styled(f"and keep its public key elsewhere: chargehand audit verify {done.path} --key KEPT_KEY", "dim")
        )


@app.command()
def checkpoint(context: typer.Context, as_json: JsonOption = False) -> None:
    """Sign the heads of all chains now. Keep a copy elsewhere: it shows when records are cut off the end."""
    with errors(as_json):
        from supervisor.audit.checkpoint import load_signer, make_checkpoint

        settings = settings_of(context)
        with opened(settings) as services:
            made = make_checkpoint(services.ledger, load_signer(settings.data_dir))
        if as_json:
            print_json({"checkpoint": made.to_json() if made is not None else None})
        elif made is None:
            out.print(styled("nothing was recorded since the last checkpoint", "dim"))
        else:
            out.print(styled(f"checkpoint {made.number}: {len(made.heads)} chains signed with key {made.key_id[:16]}"))
