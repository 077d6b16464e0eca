"""``chargehand edge install|upgrade|uninstall``: the machine side on a machine, from the command line.

Owns: the options, the questions, what is printed. Deliberately does not know: how it is done
(``supervisor.edge_install``). Progress, findings and questions go to stderr, the answer to stdout.
"""

# The options are read through the context, which knows whether a person gave them.

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supervisor.cli.context import JsonOption, opened, operator, settings_of
from supervisor.cli.output import err, errors, out, print_json, styled
from supervisor.cli.version import VERSION
from supervisor.edge_install import target as targets
from supervisor.edge_install.preflight import BLOCKER, OK, Finding
from supervisor.edge_install.target import SYSTEM, USER, Choices, Target
from supervisor.errors import BadInput
from supervisor.machines import HostKey, Machine, labels

if TYPE_CHECKING:  # asyncssh takes a third of a second to import, and `--help` must not
    from supervisor.edge_install import flow
    from supervisor.edge_install.registry import Registry

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Install, upgrade and uninstall the edge on a machine."
)

TargetArgument = Annotated[
    str | None, typer.Argument(metavar="[ADMIN@]HOST[:PORT]", help="Who to log in as, and where.")
]
MachineOption = Annotated[str | None, typer.Option("--machine", help="Id of the machine, such as web-01.")]
IdentityOption = Annotated[Path | None, typer.Option("--identity", "-i", help="The administrator's private key.")]
UserOption = Annotated[bool, typer.Option("--user", help="Into the account that logs in; needs no root.")]
AccountOption = Annotated[str, typer.Option("--account", help="The dedicated user of the agent.")]
AcceptOption = Annotated[str, typer.Option("--accept-host-key", help="Accept exactly this fingerprint (SHA256:…).")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before changing anything.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file with these options; the command line wins.")
]
ImageOption = Annotated[str, typer.Option("--image", help="The worker's image, NAME@sha256:… of a registry.")]
ArchiveOption = Annotated[
    Path | None, typer.Option("--image-archive", help="The worker's image as a file (make image).")
]
KeyOption = Annotated[Path | None, typer.Option("--gateway-key", help="Public key of the gateway; default: its own.")]
LogsOption = Annotated[bool, typer.Option("--grant-logs/--no-grant-logs", help="Let the agent read the system's logs.")]
NetworkOption = Annotated[
    str, typer.Option("--network", help="none; or host, for a model on the machine's own 127.0.0.1.")
]
MaxRunOption = Annotated[int, typer.Option("--max-run-s", help="Seconds after which systemd ends any run.")]
MaxLeaseOption = Annotated[int, typer.Option("--max-lease-s", help="Longest lease the machine grants, seconds.")]
BrokerMemoryOption = Annotated[int, typer.Option("--broker-memory-mib", help="Memory for broker and commands, MiB.")]
AgentMemoryOption = Annotated[int, typer.Option("--agent-memory-mib", help="Memory for the worker, MiB.")]
LabelOption = Annotated[
    list[str] | None, typer.Option("--label", help="key=value for the machine's record (repeatable).")
]
RoleOption = Annotated[str, typer.Option("--role", help="What the machine is for.")]
IgnoreOption = Annotated[
    list[str] | None, typer.Option("--ignore", help="Go on in spite of this finding (repeatable).")
]


@app.command()
def install(
    context: typer.Context,
    target: TargetArgument = None,
    machine: MachineOption = None,
    identity: IdentityOption = None,
    image: ImageOption = "",
    image_archive: ArchiveOption = None,
    user: UserOption = False,
    account: AccountOption = targets.ACCOUNT,
    gateway_key: KeyOption = None,
    accept_host_key: AcceptOption = "",
    grant_logs: LogsOption = True,
    network: NetworkOption = "none",
    max_run_s: MaxRunOption = 3600,
    max_lease_s: MaxLeaseOption = 120,
    broker_memory_mib: BrokerMemoryOption = 512,
    agent_memory_mib: AgentMemoryOption = 512,
    label: LabelOption = None,
    role: RoleOption = "",
    ignore: IgnoreOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Install the edge agent: look at the machine first, say what will be done, do it, prove that it works."""
    _install(context, as_json, upgrade=False)


@app.command()
def upgrade(
    context: typer.Context,
    target: TargetArgument = None,
    machine: MachineOption = None,
    identity: IdentityOption = None,
    image: ImageOption = "",
    image_archive: ArchiveOption = None,
    user: UserOption = False,
    account: AccountOption = targets.ACCOUNT,
    gateway_key: KeyOption = None,
    accept_host_key: AcceptOption = "",
    grant_logs: LogsOption = True,
    network: NetworkOption = "none",
    max_run_s: MaxRunOption = 3600,
    max_lease_s: MaxLeaseOption = 120,
    broker_memory_mib: BrokerMemoryOption = 512,
    agent_memory_mib: AgentMemoryOption = 512,
    label: LabelOption = None,
    role: RoleOption = "",
    ignore: IgnoreOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replace program, units and image of an installation while no run is on; what fails is put back.

    What is not given stays as it was installed.
    """
    _install(context, as_json, upgrade=True)


@app.command()
def uninstall(
    context: typer.Context,
    target: TargetArgument = None,
    machine: MachineOption = None,
    identity: IdentityOption = None,
    user: UserOption = False,
    account: AccountOption = targets.ACCOUNT,
    accept_host_key: AcceptOption = "",
    purge: Annotated[bool, typer.Option("--purge", help="Remove the journals, too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Stop a run that is on; go on without a record.")] = False,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove everything an installation brought; journals stay unless --purge."""

    with errors(as_json):
        from supervisor.edge_install import flow

        given = _given(context)
        where = _target(given)
        with opened(settings_of(context)) as services:
            registry = _registry(services)
            known = registry.known(given["machine"]) if given.get("machine") else None
            outcome = asyncio.run(
                flow.uninstall(
                    where,
                    _voice(),
                    scope=USER if given.get("user") else SYSTEM,
                    account=given.get("account", targets.ACCOUNT),
                    accept_host_key=given.get("accept_host_key", ""),
                    pinned=known.host_key if known else None,
                    identity=given.get("identity"),
                    purge=bool(given.get("purge")),
                    force=bool(given.get("force")),
                    dry_run=bool(given.get("dry_run")),
                    yes=bool(given.get("yes")),
                    unregister=registry.unregister,
                )
            )
        _print(outcome, as_json)


def _install(context: typer.Context, as_json: bool, *, upgrade: bool) -> None:
    with errors(as_json):
        from supervisor.edge_install import flow

        given = _given(context)
        where = _target(given)
        with opened(settings_of(context)) as services:
            registry = _registry(services)
            choices = choices_of(given, lambda: registry.gateway_key)
            known = registry.known(choices.machine)
            record = known or Machine(choices.machine, where.host, where.port, labels=choices.labels)
            outcome = asyncio.run(
                flow.install(
                    where,
                    choices,
                    _voice(),
                    version=VERSION,
                    pinned=known.host_key if known else None,
                    polkit_rule=lambda user: registry.polkit_rule(record, user),
                    register=registry.register,
                    upgrade=upgrade,
                    given=frozenset(given),
                )
            )
        _print(outcome, as_json)


def _registry(services: Any) -> Registry:
    from supervisor.edge_install.registry import Registry

    return Registry(services, operator())


def choices_of(given: Mapping[str, Any], gateway_key: Callable[[], str]) -> Choices:
    """The choices of what was given on the command line and in the file; ``gateway_key`` gives the key when none was.

    Raises ``BadInput``.
    """
    if not given.get("machine"):
        raise BadInput("the machine needs an id", expected="--machine NAME, such as web-01")
    known = {field.name for field in dataclasses.fields(Choices)}
    values = {name: value for name, value in given.items() if name in known}
    values["gateway_key"] = _key_text(given["gateway_key"]) if given.get("gateway_key") else gateway_key()
    values["labels"] = labels(given.get("labels") or {})
    values["ignore"] = tuple(given.get("ignore") or ())
    if "user" in given:
        values["scope"] = USER if given["user"] else SYSTEM
    return Choices(**values)


def _given(context: typer.Context) -> dict[str, Any]:
    """What a person said, on the command line or in the file, by the names of ``Choices``."""
    source = context.params["config"]
    given = targets.read_file(source) if source is not None else {}
    for name, value in context.params.items():
        found = context.get_parameter_source(name)
        if found is None or found.name == "DEFAULT" or name in ("config", "as_json"):
            continue
        if name == "label":
            given["labels"] = {**given.get("labels", {}), **labels(value or [])}
        else:
            given[name] = value
    return given


def _target(given: Mapping[str, Any]) -> Target:
    if not given.get("target"):
        raise BadInput(
            "where to install is missing", expected="[ADMIN@]HOST[:PORT]", next_step="such as root@192.0.2.7"
        )
    return targets.parse(given["target"])


def _key_text(given: Path | str) -> str:
    """A public key: the text itself (in a configuration file), or what a file holds."""
    if isinstance(given, str):
        return given
    try:
        return given.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise BadInput("the gateway's public key cannot be read", tried=str(given), got=str(error)) from error


def _voice() -> flow.Voice:
    from supervisor.edge_install.flow import Voice

    return Voice(say=_say, findings=_show_findings, accept=_accept, consent=_consent)


def _ask(question: str) -> bool:
    if not sys.stdin.isatty():
        _say(f"{question} There is no terminal to answer at: taken for no.")
        return False
    return typer.confirm(question, err=True)


def _accept(key: HostKey, known: bool | None) -> bool:
    _say(f"host key: {key.kind} {key.fingerprint}" + (", the one in your own known_hosts" if known else ""))
    return _ask("Is this the machine's host key?")


def _consent(changes: Sequence[Mapping[str, str]]) -> bool:
    for change in changes:
        _say(f"  {change['what']}: {change['path']}")
    return _ask("Make these changes?")


def _show_findings(findings: Sequence[Finding]) -> None:
    worth = [finding for finding in findings if finding.severity != OK]
    _say(f"preflight: {len(findings) - len(worth)} of {len(findings)} checks in order")
    for finding in worth:
        _say(f"  {finding.severity}: {finding.id}: expected {finding.expected}; found {finding.got}")
        if finding.remedy:
            _say(f"    remedy: {finding.remedy}")
        if finding.severity == BLOCKER:
            _say(f"    to go on in spite of it: --ignore {finding.id}")


def _print(outcome: flow.Outcome, as_json: bool) -> None:
    if as_json:
        print_json(outcome.to_json())
        return
    for change in outcome.changes:
        out.print(styled(f"{'would ' if outcome.dry_run else ''}{change['what']}: {change['path']}"))
    for note in outcome.notes:
        out.print(styled(f"note: {note}"))
    if not outcome.changes:
        out.print(styled("nothing would change" if outcome.dry_run else "nothing changed"))
    if outcome.registered:
        out.print(styled(f"machine {outcome.machine} is registered, host key {outcome.host_key_fingerprint}"))


def _say(text: str) -> None:
    err.print(styled(text))
