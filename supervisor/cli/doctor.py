"""``chargehand doctor``: what is wrong with this gateway, and how to mend it.

Owns: the checks and their remedies. Deliberately does not know: how anything is mended; it only looks, and makes
nothing (no directory, no key, no database, no migration).

Each check stands by itself: what one cannot do is its own finding, and the others go on.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supervisor.cli.context import JsonOption, settings_of
from supervisor.cli.output import SEVERITY_STYLE, errors, moment, out, print_json, styled
from supervisor.cli.version import VERSION
from supervisor.errors import RUN_DID_NOT_SUCCEED, BadSettings, ChargehandError
from tools.values import JsonObject

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from supervisor.audit.ledger import Ledger
    from supervisor.machines import Machine
    from supervisor.settings.model import Settings

app = typer.Typer(add_completion=False)

OK, INFO, WARNING, CRITICAL = "ok", "info", "warning", "critical"
MARKS = {OK: "✓", INFO: "i", WARNING: "!", CRITICAL: "✗"}

LOW_DISK_BYTES = 1_000_000_000
"""Below this a busy day of traces and MLflow artefacts may not fit."""
NO_DISK_BYTES = 100_000_000
"""Below this the audit chain may soon not be writable, and then nothing runs."""
QUICK_RECORDS = 500
"""Records at the end of each chain that are checked without --full; about 10 ms a chain."""
SPOOL_FULL = 0.8
"""From this share of its size on, spans may be dropped before somebody looks."""
MLFLOW_S = 5.0
MACHINES_AT_ONCE = 8
CLOCK_BACK_S = 5.0
LEAST_PYTHON = (3, 11)
_TIME_ERROR = 5  # what adjtimex(2) returns while the kernel's clock is not synchronised


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found. ``severity``: ``ok``, ``info`` (good to know), ``warning`` or ``critical`` (no run will
    work)."""

    id: str
    severity: str
    message: str
    remedy: str = ""

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)


Check = Callable[["Settings"], Iterator[Finding]]


@app.command()
def doctor(
    context: typer.Context,
    machines: Annotated[bool, typer.Option("--machines", help="Connect to every machine as well.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Verify the whole audit chain, not only its ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check this gateway: settings, data, keys, database, audit chain, MLflow, spool, model, machines, runs, versions.

    Only looks. Exit status 0 when nothing is wrong, 1 when something is.
    """
    with errors(as_json):
        try:
            settings = settings_of(context)
        except BadSettings as error:
            found = [
                Finding("settings", CRITICAL, str(error), error.next_step or "correct them"),
                *_collected(_versions, None),
            ]
        else:
            found = examine(settings, machines=machines, full=full)
        good = not any(finding.severity in (WARNING, CRITICAL) for finding in found)
        if as_json:
            print_json({"ok": good, "version": VERSION, "findings": [finding.to_json() for finding in found]})
        else:
            _print(found)
        if not good:
            raise typer.Exit(RUN_DID_NOT_SUCCEED)


def examine(settings: Settings, *, machines: bool = False, full: bool = False) -> list[Finding]:
    """Every finding, in the order of the checks. Never raises for what is wrong with the gateway."""

    def database(given: Settings) -> Iterator[Finding]:
        yield from _database(given, machines=machines, full=full)

    checks: tuple[Check, ...] = (
        _settings, _data_dir, _keys, _gateway, database, _mlflow, _spool, _model, _runbooks, _policy, _versions, _clock,
    )  # fmt: skip
    return [finding for check in checks for finding in _collected(check, settings)]


def _collected(check: Callable[[Any], Iterator[Finding]], settings: Any, name: str = "") -> Iterator[Finding]:
    name = name or check.__name__.strip("_").replace("_", "-")
    try:
        yield from check(settings)
    except ChargehandError as error:
        yield Finding(name, CRITICAL, error.message, error.next_step)
    except Exception as error:  # noqa: BLE001
        # A check that cannot be made is a finding, whatever the reason: the others must still be told.
        yield Finding(name, CRITICAL, f"this could not be checked: {type(error).__name__}: {error}", "see the message")


def _print(found: list[Finding]) -> None:
    for finding in found:
        style = SEVERITY_STYLE[finding.severity]
        out.print(
            styled(f"{MARKS[finding.severity]} {finding.severity:<9}", style)
            + styled(f"{finding.id:<12} {finding.message}")
        )
        if finding.remedy:
            out.print(styled(f"            {'':<12} → {finding.remedy}", "cyan"))
    wrong = sum(finding.severity in (WARNING, CRITICAL) for finding in found)
    out.print(
        styled(f"{wrong} of {len(found)} findings want attention", "yellow")
        if wrong
        else styled("nothing is wrong", "green")
    )


# --- settings, data, keys --------------------------------------------------------------------------------------------


def _settings(settings: Settings) -> Iterator[Finding]:
    if settings.source is None:
        yield Finding(
            "settings", INFO, "no settings file: defaults and CHARGEHAND_ variables", "chargehand init writes one"
        )
    else:
        mode = settings.source.stat().st_mode
        if mode & 0o022:
            yield Finding(
                "settings", WARNING, f"{settings.source} can be changed by others (mode {mode & 0o777:04o})",
                f"chmod go-w {settings.source}",
            )  # fmt: skip
        else:
            yield Finding("settings", OK, str(settings.source))
    if not settings.loopback():
        yield Finding(
            "listen", INFO, f"the gateway listens on {settings.gateway.host}, not on loopback only",
            "put TLS in front of it",
        )  # fmt: skip


def _data_dir(settings: Settings) -> Iterator[Finding]:
    path = settings.data_dir
    if not path.is_dir():
        yield Finding("data", WARNING, f"there is no data directory {path} yet", "chargehand init")
        return
    found = path.stat()
    if found.st_uid != os.geteuid():
        yield Finding(
            "data",
            CRITICAL,
            f"{path} belongs to another user (uid {found.st_uid})",
            "run as that user, or set data_dir",
        )
    elif found.st_mode & 0o077:
        yield Finding(
            "data", WARNING, f"{path} is open to other users (mode {found.st_mode & 0o777:04o})", f"chmod 700 {path}"
        )
    elif not os.access(path, os.W_OK | os.X_OK):
        yield Finding("data", CRITICAL, f"{path} cannot be written", f"check the mode of {path} and its file system")
    else:
        yield Finding("data", OK, str(path))
    free = shutil.disk_usage(path).free
    said = f"{free / 1e9:.1f} GB are free below {path}"
    if free < NO_DISK_BYTES:
        yield Finding("disk", CRITICAL, said, "free space now: without an audit record nothing runs")
    elif free < LOW_DISK_BYTES:
        yield Finding("disk", WARNING, said, "free space, or move data_dir")
    else:
        yield Finding("disk", OK, said)


def _keys(settings: Settings) -> Iterator[Finding]:
    from supervisor.activation.ssh import KEY_NAME
    from supervisor.audit.checkpoint import KEY_FILE

    ssh_key = (settings.ssh.key_file or settings.data_dir / "keys" / KEY_NAME).expanduser()
    for name, path in (("ssh-key", ssh_key), ("audit-key", settings.data_dir / KEY_FILE)):
        if not path.exists():
            named = name == "ssh-key" and settings.ssh.key_file is not None
            yield Finding(
                name, CRITICAL if named else INFO, f"there is no key at {path}" + ("" if named else " yet"),
                "correct ssh.key_file" if named else "it is made when it is first needed, or by chargehand init",
            )  # fmt: skip
            continue
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            yield Finding(
                name, CRITICAL, f"{path} is open to other users (mode {mode:04o})",
                f"chmod 600 {path}, and consider whether somebody used it",
            )  # fmt: skip
            continue
        yield Finding(name, OK, _key_said(name, settings))


def _key_said(name: str, settings: Settings) -> str:
    """What is public about a key that is there. Raises for one that cannot be read."""
    if name == "audit-key":
        from supervisor.audit.checkpoint import load_signer

        return f"key id {load_signer(settings.data_dir).key_id[:16]}…"
    from supervisor.activation.ssh import gateway_key

    return str(gateway_key(settings.data_dir, settings.ssh.key_file).get_fingerprint())


def _gateway(settings: Settings) -> Iterator[Finding]:
    from supervisor.gateway import running_gateway

    running = running_gateway(settings.data_dir)
    if running is None:
        yield Finding(
            "gateway", INFO, "no gateway runs on this data directory", "chargehand up, or runs carry themselves out"
        )
    else:
        yield Finding("gateway", OK, f"runs since {moment(running.started_at)} (pid {running.pid})")


# --- database, audit chain, machines, runs ---------------------------------------------------------------------------


def _database(settings: Settings, *, machines: bool, full: bool) -> Iterator[Finding]:
    from supervisor.audit.ledger import Ledger
    from supervisor.store.engine import make_engine
    from supervisor.store.migrate import HEAD, revision

    path = Path(settings.store_url.removeprefix("sqlite:///")) if settings.store_url.startswith("sqlite") else None
    if path is not None and not path.exists():
        yield Finding(
            "database", INFO, f"there is no database {path} yet", "it is made by the first command that needs it"
        )
        return
    password = settings.database_password.read().reveal() if settings.database_password is not None else None
    engine = make_engine(settings.store_url, password=password)
    try:
        found = revision(engine)
        if found is None:
            yield Finding(
                "database", INFO, "the database holds no schema yet", "it is made by the first command that needs it"
            )
            return
        if found != HEAD:
            newer = found > HEAD
            yield Finding(
                "database", CRITICAL if newer else WARNING, f"its schema is {found}, this version knows {HEAD}",
                "install the version that wrote it, or a newer one"
                if newer else "back it up; the next chargehand up migrates it",
            )  # fmt: skip
            return
        yield Finding("database", OK, f"schema {found}" + (f", {path}" if path is not None else ""))
        if path is not None and path.stat().st_mode & 0o077:
            yield Finding("database", WARNING, f"{path} is open to other users", f"chmod 600 {path}*")
        ledger = Ledger(engine)
        yield from _collected(lambda given: _audit(given, ledger, full), settings, "audit")
        yield from _collected(lambda given: _runs(given, engine), settings, "runs")
        yield from _collected(lambda given: _machines(given, engine, machines), settings, "machines")
    finally:
        engine.dispose()


def _audit(settings: Settings, ledger: Ledger, full: bool) -> Iterator[Finding]:
    from supervisor.audit.checkpoint import KEY_FILE, checkpoints, load_signer
    from supervisor.audit.verify import verify

    if full:
        keys = [load_signer(settings.data_dir).public_key] if (settings.data_dir / KEY_FILE).exists() else []
        report = verify(ledger, keys=keys)
        broken = [f"{found.chain} {found.seq}: {found.message}" for found in report.breaks]
        said = f"{report.records} records and {report.journals} journals verify"
    else:
        heads = ledger.heads()
        broken = [problem for chain in heads for problem in quick_breaks(ledger, chain)]
        said = f"the ends of {len(heads)} chains verify ({sum(head.seq for head in heads.values())} records)"
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        yield Finding(
            "audit", CRITICAL, f"the audit chain is broken: {broken[0]}{more}", "chargehand audit verify says where"
        )
    else:
        yield Finding("audit", OK, said)
    signed = checkpoints(ledger)
    newest = max((record.at_us for record in ledger.records(limit=1, newest_first=True)), default=None)
    if newest is not None and newest / 1e6 > time.time() + CLOCK_BACK_S:
        yield Finding(
            "clock", WARNING, f"the last audit record is of {moment(newest / 1e6)}: the clock has gone back since",
            "set the clock; the order of records does not depend on it",
        )  # fmt: skip
    if signed:
        yield Finding("checkpoint", OK, f"the last is number {signed[-1].number}, of {moment(signed[-1].at_us / 1e6)}")


def quick_breaks(ledger: Ledger, chain: str) -> list[str]:
    """Whether the last records of a chain are whole, linked, and end at the head the database believes in."""
    from supervisor.audit.chain import compute_hash

    head = ledger.heads()[chain]
    records = ledger.records(chain=chain, after=max(0, head.seq - QUICK_RECORDS))
    for before, record in zip([None, *records], records, strict=False):
        if compute_hash(record) != record.hash:
            return [f"{chain} {record.seq}: the record was changed after it was written"]
        if before is not None and (record.seq != before.seq + 1 or record.prev != before.hash):
            return [f"{chain} {record.seq}: it does not follow record {before.seq}"]
    last = records[-1] if records else None
    if last is None or (last.seq, last.hash) != (head.seq, head.hash):
        return [f"{chain} {head.seq}: the last record is not the one that was written last"]
    return []


def _runs(_: Settings, engine: Engine) -> Iterator[Finding]:
    from supervisor.runs.states import OPEN, State
    from supervisor.store.runs import Runs

    runs = Runs(engine)
    counts = runs.counts()
    overdue = runs.overdue()
    for run in overdue[:10]:
        late = time.time() - (run.deadline or 0)
        yield Finding(
            "runs", WARNING, f"run {run.id} on {run.machine} is {run.state} {late:.0f} s longer than it may be",
            "start the gateway: it takes open runs up again (chargehand up)",
        )  # fmt: skip
    if len(overdue) > 10:
        yield Finding("runs", WARNING, f"{len(overdue) - 10} more runs are overdue", "chargehand runs list")
    unreachable = counts.get(State.UNREACHABLE, 0)
    if unreachable:
        yield Finding(
            "runs", WARNING, f"{unreachable} runs ended unreachable: nobody has seen since what is on those machines",
            "chargehand runs list --state unreachable, then chargehand machine check",
        )  # fmt: skip
    if not overdue and not unreachable:
        is_open = sum(count for state, count in counts.items() if state in OPEN)
        yield Finding("runs", OK, f"{sum(counts.values())} known, {is_open} open, none overdue")


def _machines(settings: Settings, engine: Engine, connect: bool) -> Iterator[Finding]:
    from supervisor.machines import SSH
    from supervisor.store.machines import Machines

    known = Machines(engine).list()
    if not known:
        yield Finding(
            "machines", INFO, "no machines yet", "chargehand edge install ADMIN@HOST, or machine add NAME --embedded"
        )
        return
    without = [machine.id for machine in known if machine.host_key is None]
    for name in without:
        yield Finding(
            "machines",
            WARNING,
            f"the host key of {name} is not accepted: nothing can run there",
            f"chargehand machine check {name}",
        )
    off = [machine.id for machine in known if not machine.enabled]
    if off:
        yield Finding("machines", INFO, f"out of service: {', '.join(off)}")
    if not without:
        yield Finding("machines", OK, f"{len(known)} known, every host key accepted")
    if connect:
        reachable = [machine for machine in known if machine.transport == SSH and machine.host_key is not None]
        yield from asyncio.run(_contacts(settings, reachable))


async def _contacts(settings: Settings, known: list[Machine]) -> list[Finding]:
    """A look at every machine, some at a time. Nothing is stored or recorded: that is `machine check`."""
    from supervisor.activation.gatekeeper import Gatekeeper
    from supervisor.activation.ssh import Connections, gateway_key
    from supervisor.cli.contact import look, problems

    limits = settings.limits
    connections = Connections(
        gateway_key(settings.data_dir, settings.ssh.key_file), limits.connect_s, limits.keepalive_s, limits.connections
    )
    turns = asyncio.Semaphore(MACHINES_AT_ONCE)

    async def one(machine: Machine) -> list[Finding]:
        name = f"machine {machine.id}"
        gatekeeper = Gatekeeper(machine, lambda: (machine.address, machine.port), connections, limits.verb_s)
        async with turns:
            try:
                seen = await look(gatekeeper)
            except ChargehandError as error:
                return [
                    Finding(name, CRITICAL, str(error), error.next_step or f"chargehand machine check {machine.id}")
                ]
        run = seen.status.get("run")
        known_run = {str(run.get("run_id"))} if isinstance(run, dict) else set()
        found = problems(machine, seen, version=VERSION, open_runs=frozenset(known_run))
        if not found:
            return [Finding(name, OK, f"answers after {seen.connect_s:.2f} s, unit {seen.status.get('unit')}")]
        return [Finding(name, problem.severity, problem.message, problem.remedy) for problem in found]

    try:
        groups = await asyncio.gather(*(one(machine) for machine in known))
    finally:
        await connections.aclose()
    return [finding for group in groups for finding in group]


# --- traces and model ------------------------------------------------------------------------------------------------


def _mlflow(settings: Settings) -> Iterator[Finding]:
    from otel.mlflow_reader import MlflowReader
    from supervisor.cli.trace import mlflow_url

    if settings.mlflow.mode == "off":
        yield Finding("mlflow", INFO, "traces are not sent anywhere: mlflow.mode is off")
        return
    url = mlflow_url(settings)
    if url is None:
        yield Finding("mlflow", INFO, "the embedded server runs with the gateway, and none runs", "chargehand up")
        return
    with MlflowReader(url, timeout_s=MLFLOW_S) as reader:
        if reader.ready():
            yield Finding("mlflow", OK, f"answers at {url}")
        else:
            yield Finding(
                "mlflow", WARNING, f"nothing answers at {url}",
                "a fresh server takes up to 40 s; spans wait in the spool until it does"
                if settings.mlflow.mode == "embedded" else "check mlflow.url and the server; spans wait in the spool",
            )  # fmt: skip


def _spool(settings: Settings) -> Iterator[Finding]:
    from otel.redaction import Redactor
    from otel.spool import Spool, SpoolLimits, SpoolUnusable
    from supervisor.gateway import running_gateway

    path = settings.data_dir / "spool.db"
    if not path.exists():
        yield Finding("spool", INFO, "there is no spool yet", "it is made with the first run")
        return
    size = settings.traces.spool_bytes
    try:
        with Spool(path, Redactor(), SpoolLimits(pending_bytes=size)) as spool:
            counts, gaps, rejected = spool.counts(), spool.gaps(), spool.rejected(1)
    except (SpoolUnusable, sqlite3.Error) as error:
        yield Finding(
            "spool",
            CRITICAL,
            f"the spool cannot be used: {error}",
            f"move {path} away: waiting spans are lost, runs are not",
        )
        return
    lost = sum(gap.spans for gap in gaps)
    if lost:
        yield Finding(
            "spool", WARNING, f"{lost} spans were not taken ({gaps[-1].reason}); last {moment(gaps[-1].last_at)}",
            "the audit chain has everything; traces.spool_bytes bounds the spool",
        )  # fmt: skip
    if counts["rejected"]:
        why = rejected[0].reason if rejected else ""
        yield Finding(
            "spool", WARNING, f"MLflow refused {counts['rejected']} spans: {why[:200]}", "see the log of MLflow"
        )
    waiting = f"{counts['pending']} spans wait ({counts['pending_bytes']} of {size} bytes)"
    waiting += f", {counts['delivered']} were delivered"
    if counts["pending_bytes"] >= SPOOL_FULL * size:
        yield Finding("spool", WARNING, waiting, "start the gateway, or mend MLflow, before spans are dropped")
    elif counts["pending"] and running_gateway(settings.data_dir) is None:
        yield Finding("spool", INFO, waiting, "chargehand up delivers them")
    else:
        yield Finding("spool", OK, waiting)


def _model(settings: Settings) -> Iterator[Finding]:
    from inference.errors import InferenceError
    from supervisor.runs.plan import choose_model

    for name in (None, *settings.models):
        shown = "model" if name is None else f"model {name}"
        choice = asyncio.run(choose_model(name, settings, os.environ))
        said = f"{choice.spec} ({choice.reason})"
        if choice.spec.key is not None:
            try:
                # Looked up and thrown away: only whether it is there is told.
                choice.spec.key.resolve(os.environ)
            except InferenceError as error:
                yield Finding(
                    shown,
                    CRITICAL if name is None else WARNING,
                    f"{said}: {error}",
                    f"provide the key at {choice.spec.key}",
                )
                continue
            said += f", its key is at {choice.spec.key}"
        yield Finding(shown, INFO if choice.spec.provider == "runbook" else OK, said)


def _runbooks(settings: Settings) -> Iterator[Finding]:
    from supervisor.runbooks import BadRunbook, load_all

    own = settings.data_dir / "runbooks"
    try:
        known = load_all([own] if own.is_dir() else [])
    except BadRunbook as error:
        yield Finding(
            "runbooks",
            CRITICAL,
            error.problems[0],
            "chargehand runbook check FILE; until then no command that needs them works",
        )
        return
    yield Finding("runbooks", OK, f"{len(known)} runbooks")


def _policy(settings: Settings) -> Iterator[Finding]:
    from supervisor.policy.loader import BadPolicy, compile_policy, default_policy, load
    from tools.values import digest

    if not settings.policies:
        yield Finding("policy", OK, f"the shipped pack, {digest(default_policy())[:23]}…")
        return
    try:
        sources = [load(path.expanduser()) for path in settings.policies]
        labels = {name: value for source in sources for name, value in source.applies_to.items()}
        compile_policy(sources, labels)
    except BadPolicy as error:
        yield Finding("policy", CRITICAL, str(error), "chargehand policy check FILE")
    except OSError as error:
        yield Finding(
            "policy", CRITICAL, f"{error.filename} cannot be read: {error.strerror}", "correct policies in the settings"
        )
    else:
        yield Finding("policy", OK, f"{len(sources)} files compile")


# --- versions and clock ----------------------------------------------------------------------------------------------


def _versions(_: Settings | None) -> Iterator[Finding]:
    if sys.version_info[:2] < LEAST_PYTHON:
        yield Finding("python", CRITICAL, f"Python {platform.python_version()}", "at least 3.11 is needed")
    else:
        yield Finding("python", OK, f"Python {platform.python_version()}, chargehand {VERSION}")
    wrong = list(unmet_requirements())
    for said in wrong:
        yield Finding("packages", WARNING, said, "install chargehand[gateway] anew, in an environment of its own")
    if not wrong:
        yield Finding(
            "packages",
            OK,
            ", ".join(f"{name} {_installed(name)}" for name in ("a2a-sdk", "dbos", "mlflow", "asyncssh")),
        )


def unmet_requirements() -> Iterator[str]:
    """Packages that are missing or not of the version that this distribution asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = importlib.metadata.requires("chargehand") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("gateway", "edge")
        ):
            continue
        if requirement.name == "chargehand":
            continue
        found = _installed(requirement.name)
        if found is None:
            yield f"{requirement.name} is not installed"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name} is {found}, and {requirement.specifier} is wanted"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _clock(_: Settings) -> Iterator[Finding]:
    state = kernel_clock()
    if state == _TIME_ERROR:
        yield Finding(
            "clock", INFO, f"{moment(time.time())}; the kernel says that nothing keeps it right",
            "start chronyd or systemd-timesyncd (leases do not depend on it, schedules and logs do)",
        )  # fmt: skip
    else:
        yield Finding("clock", OK, moment(time.time()) + (", synchronised" if state is not None else ""))


def kernel_clock() -> int | None:
    """What adjtimex(2) says of the clock without touching it; ``None`` where it cannot be asked."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        # modes = 0: only read. The structure has 208 bytes on 64-bit Linux.
        state = int(libc.adjtimex(ctypes.create_string_buffer(512)))
    except (OSError, AttributeError):
        return None
    return state if state >= 0 else None
