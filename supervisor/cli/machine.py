"""``chargehand machine add|list|show|remove|check``.

Owns: the options, the question whether a host key is the machine's, what is printed, and the audit records of what an
operator does to machines. Deliberately does not know: SSH (``supervisor.activation.ssh``), tables
(``supervisor.store``).

A host key is accepted by a person who saw its fingerprint, or by its fingerprint on the command line; never otherwise.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supervisor import machines as rules
from supervisor.cli.ask import confirmed
from supervisor.cli.context import JsonOption, opened, operator, settings_of
from supervisor.cli.output import (
    SEVERITY_STYLE,
    err,
    errors,
    fields,
    moment,
    out,
    print_json,
    seconds,
    styled,
    table,
)
from supervisor.cli.version import VERSION
from supervisor.errors import MACHINE, BadInput, Busy, Conflict, HostKeyChanged, HostKeyUnknown, Interrupted, Refused
from supervisor.machines import EMBEDDED, SSH, HostKey, Machine

if TYPE_CHECKING:  # importing the services costs a second, and `--help` must not
    from supervisor.cli.contact import Contact, Problem
    from supervisor.runs.services import Services
    from supervisor.settings.model import Settings

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Add, list, show, check and remove machines.")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The machine's id, such as web-01.")]
LabelOption = Annotated[list[str] | None, typer.Option("--label", help="key=value; may be given again.")]
AcceptOption = Annotated[
    str, typer.Option("--accept-host-key", metavar="SHA256:…", help="Accept exactly this fingerprint.")
]

_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


# --- add -------------------------------------------------------------------------------------------------------------


@app.command()
def add(
    context: typer.Context,
    name: NameArgument,
    address: Annotated[str, typer.Argument(help="Host name or IP address; not needed with --embedded.")] = "",
    port: Annotated[int, typer.Option("--port", help="SSH port.")] = 22,
    user: Annotated[str, typer.Option("--user", help="The agent's login user there.")] = "chargehand",
    label: LabelOption = None,
    role: Annotated[str, typer.Option("--role", help="What the machine is for, in one line.")] = "",
    expected_state: Annotated[
        str, typer.Option("--expected-state", help="What is normal there, for the supervisor: text or a JSON object.")
    ] = "",
    notes: Annotated[str, typer.Option("--notes", help="Anything else.")] = "",
    accept_host_key: AcceptOption = "",
    embedded: Annotated[
        bool, typer.Option("--embedded", help="This very computer, served by the gateway itself; no sshd needed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add a machine. Its host key is shown and has to be accepted; without that nothing is stored.

    Without a terminal --accept-host-key must name exactly the fingerprint that the machine shows. Nothing is installed:
    that is `chargehand edge install`, which adds the machine as well.
    """
    with errors(as_json):
        settings = settings_of(context)
        if embedded and address:
            raise BadInput(
                "an embedded machine has no address: the gateway serves it",
                got=address,
                next_step="leave the address out",
            )
        if not embedded and not address:
            raise BadInput(
                "the address of the machine is missing",
                expected="a host name or an IP address",
                next_step=f"chargehand machine add {name} ADDRESS, or --embedded for this computer",
            )
        machine = Machine(
            id=rules.machine_id(name),
            address="127.0.0.1" if embedded else rules.address(address),
            port=0 if embedded else rules.port(port),
            user=rules.user(user),
            labels=rules.labels(label or ()),
            role=rules.role(role),
            expected_state=_state_of(expected_state),
            transport=EMBEDDED if embedded else SSH,
            notes=notes,
        )
        _check_fingerprint(accept_host_key)
        with opened(settings) as services:
            _must_be_new(services, machine.id)
            key = _own_key(services, machine.id) if embedded else _accepted_key(settings, machine, accept_host_key)
            stored = _add(services, machine, key)
        document = {"machine": stored.to_json()}
        if as_json:
            print_json(document)
            return
        out.print(styled(f"{stored.id} is added, host key {stored.host_key_fingerprint}"))
        if embedded:
            _tell_embedded(settings, stored.id)
        else:
            err.print(styled(f"next: chargehand machine check {stored.id}", "dim"))


def _state_of(text: str) -> Any:
    """Free text, or a JSON object when it begins like one."""
    if not text.lstrip().startswith("{"):
        return text or None
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInput(
            f"--expected-state begins like JSON and is none: {error}", expected="text, or one JSON object", got=text
        ) from None


def _check_fingerprint(text: str) -> None:
    if text and not _FINGERPRINT.fullmatch(text):
        raise BadInput(
            "this is not the fingerprint of a host key",
            tried="--accept-host-key",
            expected="SHA256: and 43 characters, as `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints it",
            got=text,
        )


def _must_be_new(services: Services, name: str) -> None:
    if any(machine.id == name for machine in services.store.machines.list()):
        raise Conflict(
            f"there is a machine {name} already",
            got=name,
            next_step=f"choose another id, or look at it: chargehand machine show {name}",
        )


def _own_key(services: Services, name: str) -> HostKey:
    """The host key of an embedded machine: made by this gateway, so nobody else can have shown it."""
    from supervisor.activation.embedded import EmbeddedMachine

    return rules.host_key(EmbeddedMachine(name, services.embedded_directory(name), services.public_key).host_key_line)


def _accepted_key(settings: Settings, machine: Machine, fingerprint: str) -> HostKey:
    """The host key that the machine shows now, once it is accepted. Raises ``HostKeyUnknown``,
    ``MachineUnreachable``."""
    from supervisor.activation.ssh import scan_host_key

    shown = asyncio.run(scan_host_key(machine.address, machine.port, settings.limits.connect_s))
    return _accepted(machine, shown, fingerprint, f"chargehand machine add {machine.id} {machine.address} …")


def _accepted(machine: Machine, shown: HostKey, fingerprint: str, again: str) -> HostKey:
    where = f"{machine.address}:{machine.port}"
    if fingerprint:
        if fingerprint == shown.fingerprint:
            return shown
        raise HostKeyUnknown(
            f"{where} does not show the host key that was to be accepted; nothing was stored",
            tried="--accept-host-key",
            expected=fingerprint,
            got=f"{shown.kind} {shown.fingerprint}",
            next_step="compare with `ssh-keygen -lf` of that kind of key on the machine's own console",
        )
    err.print(styled(f"{where} shows the host key {shown.kind} {shown.fingerprint}"))
    err.print(styled("compare it on the machine's own console: ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub", "dim"))
    answer = confirmed(f"Is this the host key of {machine.id}?")
    if answer:
        return shown
    raise HostKeyUnknown(
        f"the host key of {machine.id} was not accepted; nothing was stored",
        tried=where,
        expected="a person who says yes" if answer is False else "--accept-host-key, as there is no terminal to ask at",
        got=f"{shown.kind} {shown.fingerprint}",
        next_step=f"compare the fingerprint on the machine, then: {again} --accept-host-key {shown.fingerprint}",
    )


def _add(services: Services, machine: Machine, key: HostKey) -> Machine:
    """Record and store, the key with the machine in one transaction: there is no moment with half of it."""
    from supervisor.audit import bodies, kinds
    from supervisor.audit.ledger import Entry

    by = operator()
    pinned = dataclasses.replace(machine, host_key=key.text, host_key_accepted_by=by)
    told = {name: getattr(machine, name) for name in ("address", "port", "user", "labels", "role", "transport")}
    told["labels"] = dict(machine.labels)
    # Before the act: an addition that cannot be recorded does not happen.
    services.ledger.append(
        [
            Entry(kinds.MACHINE_ADDED, bodies.machine_changed(None, told), machine.id, actor=by),
            Entry(kinds.HOST_KEY_ACCEPTED, bodies.host_key(key.fingerprint, None), machine.id, actor=by),
        ]
    )
    return services.store.machines.add(pinned)


def _tell_embedded(settings: Settings, name: str) -> None:
    from supervisor.gateway import running_gateway

    running = running_gateway(settings.data_dir)
    if running is not None:
        err.print(styled(f"the gateway (pid {running.pid}) serves it after its next start", "yellow"))
    err.print(styled(f"next: chargehand run {name} --runbook health", "dim"))


# --- list and show ---------------------------------------------------------------------------------------------------


@app.command("list")
def list_machines(context: typer.Context, label: LabelOption = None, as_json: JsonOption = False) -> None:
    """Machines by id; with --label those that have every label given."""
    with errors(as_json):
        wanted = rules.labels(label or ())
        with opened(settings_of(context)) as services:
            found = services.store.machines.list(labels=wanted)
        if as_json:
            print_json({"machines": [machine.to_json() for machine in found]})
            return
        rows = [
            (
                styled(machine.id, "bold" if machine.enabled else "dim"),
                "embedded" if machine.transport == EMBEDDED else f"{machine.user}@{machine.address}:{machine.port}",
                machine.role,
                " ".join(f"{key}={value}" for key, value in machine.labels.items()),
                styled("accepted", "green") if machine.host_key else styled("not accepted", "yellow"),
                moment(machine.last_seen_at),
            )
            for machine in found
        ]
        empty = "no machine has these labels" if wanted else "no machines yet; chargehand edge install, or machine add"
        table(("MACHINE", "WHERE", "ROLE", "LABELS", "HOST KEY", "LAST SEEN"), rows, empty)


@app.command()
def show(context: typer.Context, name: NameArgument, as_json: JsonOption = False) -> None:
    """Everything that is stored about one machine, and its last runs."""
    with errors(as_json):
        with opened(settings_of(context)) as services:
            machine = services.store.machines.get(name)
            runs = services.store.runs.list(machine=machine.id, limit=5)
            _, policy_digest = services.policy_for(machine)
        if as_json:
            print_json(
                {
                    "machine": machine.to_json(),
                    "policy_digest": policy_digest,
                    "runs": [{"run_id": run.id, "state": str(run.state), "created_at": run.created_at} for run in runs],
                }
            )
            return
        state = machine.expected_state
        accepted = f"accepted {moment(machine.host_key_accepted_at)} by {machine.host_key_accepted_by}"
        fields(
            [
                ("machine", styled(machine.id, "bold")),
                ("where", "embedded in the gateway" if machine.transport == EMBEDDED else ""),
                (
                    "address",
                    "" if machine.transport == EMBEDDED else f"{machine.user}@{machine.address}:{machine.port}",
                ),
                ("role", machine.role),
                ("labels", " ".join(f"{key}={value}" for key, value in machine.labels.items())),
                ("expected", state if isinstance(state, str) or state is None else json.dumps(state)),
                ("notes", machine.notes),
                ("host key", machine.host_key_fingerprint or styled("not accepted", "yellow")),
                ("", accepted if machine.host_key else ""),
                ("policy", policy_digest),
                ("in service", "yes" if machine.enabled else styled("no", "yellow")),
                ("last seen", moment(machine.last_seen_at)),
                ("generation", machine.generation),
                ("added", moment(machine.created_at)),
            ]
        )
        if runs:
            out.print()
            table(
                ("LAST RUNS", "STATE", "ASKED"), [(run.id, str(run.state), moment(run.created_at)) for run in runs], ""
            )


# --- remove ----------------------------------------------------------------------------------------------------------


@app.command()
def remove(
    context: typer.Context,
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take a machine out of the gateway. Its runs and its audit chain stay; on the machine itself nothing changes."""
    with errors(as_json), opened(settings_of(context)) as services:
        machine = services.store.machines.get(name)
        _must_be_idle(services, machine.id)
        answer = confirmed(f"Remove machine {machine.id} ({machine.address})?", yes)
        if answer is None:
            raise BadInput(
                f"removing {machine.id} has to be confirmed, and there is no terminal to ask at", next_step="add --yes"
            )
        if not answer:
            raise Interrupted(f"{machine.id} was not removed")
        # A person may have thought for a while.
        _must_be_idle(services, machine.id)
        _remove(services, machine)
        if as_json:
            print_json({"removed": machine.id})
            return
        out.print(styled(f"{machine.id} is removed; its runs and its audit chain stay"))
        if machine.transport == SSH:
            err.print(styled("what is installed there stays: chargehand edge uninstall takes it away", "dim"))


def _must_be_idle(services: Services, name: str) -> None:
    from supervisor.runs.states import OPEN

    runs = services.store.runs.list(machine=name, in_states=OPEN, limit=10)
    if runs:
        raise Busy(
            f"{name} cannot be removed while a run is open on it",
            expected="no open run",
            got=", ".join(f"{run.id} ({run.state})" for run in runs),
            next_step=f"wait for it, or chargehand runs cancel {runs[0].id}",
        )


def _remove(services: Services, machine: Machine) -> None:
    from supervisor.audit import bodies, kinds

    told = {
        "address": machine.address,
        "port": machine.port,
        "user": machine.user,
        "host_key": machine.host_key_fingerprint,
    }
    services.ledger.record(
        kinds.MACHINE_REMOVED, bodies.machine_changed(told, None), machine=machine.id, actor=operator()
    )
    services.store.machines.remove(machine.id)


# --- check -----------------------------------------------------------------------------------------------------------


@app.command()
def check(
    context: typer.Context, name: NameArgument, accept_host_key: AcceptOption = "", as_json: JsonOption = False
) -> None:
    """Connect to a machine: is it the one that was accepted, is the edge well, does anything run, is its clock right?

    Exit status: 0 nothing speaks against a run, 3 another host key, 4 unreachable or something must be mended first.
    A changed host key stops everything; --accept-host-key accepts the new one, by its fingerprint.
    """
    with errors(as_json):
        settings = settings_of(context)
        _check_fingerprint(accept_host_key)
        document, found = asyncio.run(_check(settings, name, accept_host_key))
        if as_json:
            print_json(document)
        else:
            _print_check(document)
        if any(problem.severity == "critical" for problem in found):
            raise typer.Exit(MACHINE)


async def _check(settings: Settings, name: str, fingerprint: str) -> tuple[dict[str, Any], list[Problem]]:
    from supervisor.cli.contact import look, problems
    from supervisor.runs.services import open_services
    from supervisor.runs.states import OPEN

    services = await asyncio.to_thread(open_services, settings)
    try:
        machine = await asyncio.to_thread(services.store.machines.get, name)
        if machine.transport == EMBEDDED:
            await serve_here(services, machine)
        elif fingerprint or machine.host_key is None:
            machine = await _accept_now(services, machine, fingerprint)
        try:
            seen = await look(services.gatekeeper(machine))
        except HostKeyChanged as error:
            await record_changed_key(services, machine, error)
            raise
        runs = await asyncio.to_thread(services.store.runs.list, machine=machine.id, in_states=OPEN, limit=100)
        await asyncio.to_thread(services.store.machines.seen, machine.id, str(seen.hello.get("boot_id", "")) or None)
    finally:
        await services.aclose()
    found = problems(machine, seen, version=VERSION, open_runs=frozenset(run.id for run in runs))
    return check_document(machine, seen, found), found


async def serve_here(services: Services, machine: Machine) -> None:
    """Serve an embedded machine from this process. Raises ``Refused`` when a gateway does it already."""
    from supervisor.gateway import running_gateway

    running = running_gateway(services.settings.data_dir)
    if running is not None:
        raise Refused(
            f"the embedded machine {machine.id} is served by the running gateway (pid {running.pid})",
            tried="serving it from this command",
            expected="no gateway on this data directory",
            next_step=f"look at it through the gateway: chargehand run {machine.id} --runbook health",
        )
    await services.start_embedded(machine.id)


async def record_changed_key(services: Services, machine: Machine, error: HostKeyChanged) -> None:
    """The audit record of a host key that is not the accepted one."""
    from supervisor.audit import bodies, kinds

    await services.record(
        machine.id,
        kinds.HOST_KEY_CHANGED,
        bodies.host_key(str(error.got), machine.host_key_fingerprint),
        actor=operator(),
    )


async def _accept_now(services: Services, machine: Machine, fingerprint: str) -> Machine:
    """Pin the host key that the machine shows now, if that is what was accepted."""
    from supervisor.activation.ssh import scan_host_key
    from supervisor.audit import bodies, kinds

    shown = await scan_host_key(machine.address, machine.port, services.settings.limits.connect_s)
    if shown.text == machine.host_key:
        return machine
    before = machine.host_key_fingerprint
    changed = None
    if before is not None:
        changed = HostKeyChanged(f"{machine.id} shows another host key", expected=before, got=shown.fingerprint)
        await record_changed_key(services, machine, changed)
    key = await asyncio.to_thread(_accepted, machine, shown, fingerprint, f"chargehand machine check {machine.id}")
    await services.record(
        machine.id, kinds.HOST_KEY_ACCEPTED, bodies.host_key(key.fingerprint, before), actor=operator()
    )
    accepted = await asyncio.to_thread(services.store.machines.accept_host_key, machine.id, key.text, operator())
    err.print(styled(f"the host key {key.fingerprint} is accepted" + (f" instead of {before}" if before else "")))
    return accepted


def check_document(machine: Machine, seen: Contact, found: list[Problem]) -> dict[str, Any]:
    """The stable document of ``machine check --json``."""
    from supervisor.cli.contact import mapping, processes

    hello, status = seen.hello, seen.status
    known = ("version", "protocol", "hostname", "os", "kernel", "python", "boot_id", "units", "image", "generation")
    return {
        "machine": machine.id,
        "ok": not any(problem.severity == "critical" for problem in found),
        "host_key": machine.host_key_fingerprint,
        "edge": {name: hello.get(name) for name in known},
        "capabilities": dict(mapping(hello.get("capabilities"))),
        "clock": {"offset_s": seen.offset_s, "uncertainty_s": seen.uncertainty_s},
        "unit": status.get("unit"),
        "processes": processes(status),
        "run": mapping(status.get("run")) or None,
        "lease_left_s": status.get("lease_left_s"),
        "connect_s": seen.connect_s,
        "problems": [problem.to_json() for problem in found],
    }


def _print_check(document: dict[str, Any]) -> None:
    from supervisor.cli.contact import mapping

    edge = document["edge"]
    system = mapping(edge["os"]).get("pretty_name") or edge["os"]
    landlock = mapping(document["capabilities"].get("landlock"))
    clock = document["clock"]
    run = document["run"]
    idle = run is None and document["processes"] == 0
    runs = "nothing" if idle else f"run {run.get('run_id')}" if run else f"{document['processes']} processes"
    fields(
        [
            ("machine", styled(document["machine"], "bold")),
            ("host key", f"{document['host_key']}, the accepted one"),
            ("edge", f"{edge['version']} (protocol {edge['protocol']}), {edge['units']} units"),
            ("image", edge["image"]),
            ("system", f"{system}, kernel {edge['kernel']}, Python {edge['python']}"),
            ("host name", edge["hostname"]),
            ("landlock", f"ABI {landlock.get('abi')}: {landlock.get('level')}" if landlock.get("abi") else "none"),
            (
                "clock",
                "unknown"
                if clock["offset_s"] is None
                else f"{clock['offset_s']:+.2f} s (± {clock['uncertainty_s']:.2f} s)",
            ),
            ("unit", document["unit"]),
            ("runs", styled(runs, "green" if idle else "yellow")),
            ("answered", f"after {seconds(document['connect_s'])}"),
        ]
    )
    for problem in document["problems"]:
        style = SEVERITY_STYLE[problem["severity"]]
        out.print(styled(f"{problem['severity']}: ", style) + styled(problem["message"]))
        if problem["remedy"]:
            out.print(styled(f"  remedy: {problem['remedy']}", "dim"))
    if not document["problems"]:
        out.print(styled("nothing speaks against a run", "green"))
