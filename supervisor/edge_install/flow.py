"""Installing, upgrading and uninstalling the machine side, from the first look to the machine's record.

Owns: the order of the steps and what stops them: host key, preflight, consent. Deliberately does not know: how questions
are asked, where machines are stored, what is done on the machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quadlets import oci, render, zipapp_build
from supervisor.edge_install import plan, preflight, session
from supervisor.edge_install.preflight import Finding
from supervisor.edge_install.target import HOME, SYSTEM, Choices, Target
from supervisor.errors import BadInput, Conflict, HostKeyChanged, HostKeyUnknown, Interrupted, Refused
from supervisor.machines import HostKey, Machine


@dataclasses.dataclass(frozen=True)
class Voice:
    """How the flow talks. ``say``: one line of progress. ``findings``: the preflight. ``accept``: whether a person accepts
    this host key (second argument: what their own known_hosts says of it). ``consent``: whether to make these changes."""

    say: Callable[[str], None]
    findings: Callable[[Sequence[Finding]], None]
    accept: Callable[[HostKey, bool | None], bool]
    consent: Callable[[Sequence[Mapping[str, str]]], bool]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was done on a machine. ``changes``: ``{"what", "path"}`` each; ``unchanged``: paths; ``dry_run``: nothing was."""

    action: str
    machine: str
    target: str
    account: str
    host_key_fingerprint: str
    dry_run: bool
    changes: tuple[Mapping[str, str], ...] = ()
    unchanged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    image: str = ""
    host_zipapp: str = ""
    registered: bool = False

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


async def install(
    target: Target,
    choices: Choices,
    voice: Voice,
    *,
    version: str,
    pinned: str | None = None,
    polkit_rule: Callable[[str], str | None] | None = None,
    register: Callable[[Machine], None] | None = None,
    upgrade: bool = False,
    given: frozenset[str] = frozenset(),
) -> Outcome:
    """Install or upgrade.

    Args:
        version: of the distribution.
        pinned: the host key the machine's record holds, ``None`` when there is no record.
        polkit_rule: the rules file for the named user under the machine's policy.
        register: called at the end with the machine's record; ``None``: nobody keeps one.
        upgrade: only over an installation; what was not ``given`` is taken over from it.

    Raises ``BadInput``, ``HostKeyUnknown``, ``HostKeyChanged``, ``Refused`` (preflight), ``Interrupted`` (no consent),
    ``MachineUnreachable``, ``MachineFailed``.
    """
    image = _image_of(choices)
    zipapp = zipapp_build.host_zipapp()
    accepted = await _accepted(target, choices.accept_host_key, pinned, voice)
    async with session.login(target, accepted, identity=choices.identity, sudo=_sudo(choices.scope)) as admin:
        asked = time.time()
        facts = await admin.run(plan.facts_document(choices.scope, choices.account, image.reference if image else ""))
        answered = time.time()
        findings = preflight.examine(
            facts, choices, gateway_wall=(asked + answered) / 2, latency_s=(answered - asked) / 2
        )
        voice.findings(findings)
        if found := preflight.blockers(findings, choices.ignore):
            raise Refused(
                f"{target} cannot take the edge agent yet: {', '.join(finding.id for finding in found)}",
                code="preflight", expected="; ".join(finding.expected for finding in found),
                got="; ".join(finding.got for finding in found),
                next_step="; ".join(finding.remedy for finding in found),
            )  # fmt: skip
        installed = facts["installation"]
        choices = _taken_over(choices, installed, upgrade=upgrade, given=given, target=target)
        image = image or _image_before(installed)
        account, home = str(facts["account"]["name"]), _home(choices.scope, facts)
        document = plan.install_document(
            choices, account=account, home=home, image=image, zipapp=zipapp, version=version,
            polkit=polkit_rule(account) if polkit_rule else None,
        )  # fmt: skip
        # First what would be done, for the person who has to say yes, and to find what cannot be done before anything is.
        result = await admin.run({**document, "dry_run": True})
        if not choices.dry_run:
            if result["changes"] and not choices.yes and not voice.consent(result["changes"]):
                raise Interrupted("nothing was changed", tried=str(target), expected="consent, or --yes")
            loads = image.source == "load" and not facts["image"]["present"]
            payload = session.payload_of(choices.image_archive) if loads and choices.image_archive else None
            result = await admin.run(document, payload=payload, say=voice.say)
    registered = False
    if register is not None and not choices.dry_run:
        register(_machine(target, choices, account, accepted))
        registered = True
    return _outcome(
        "upgrade" if upgrade else "install", choices.machine, target, account, accepted, result,
        findings=findings, image=image.reference, host_zipapp=plan.digest(zipapp), registered=registered,
    )  # fmt: skip


async def uninstall(
    target: Target,
    voice: Voice,
    *,
    scope: str = SYSTEM,
    account: str,
    accept_host_key: str = "",
    pinned: str | None = None,
    identity: Any = None,
    purge: bool = False,
    force: bool = False,
    dry_run: bool = False,
    yes: bool = False,
    unregister: Callable[[str], None] | None = None,
) -> Outcome:
    """Take the machine side off. ``purge``: journals too; ``force``: stop a run that is on, and do not need a record.

    ``unregister`` is called with the machine's id afterwards. Raises as ``install`` does.
    """
    accepted = await _accepted(target, accept_host_key, pinned, voice)
    async with session.login(target, accepted, identity=identity, sudo=_sudo(scope)) as admin:
        facts = await admin.run(plan.facts_document(scope, account, ""))
        name = str(facts["account"]["name"])
        machine = str((facts["installation"] or {}).get("machine", ""))
        document = plan.uninstall_document(
            scope, account=name, home=_home(scope, facts), purge=purge, force=force, dry_run=True
        )
        result = await admin.run(document)
        if not dry_run and result["changes"]:
            if not yes and not voice.consent(result["changes"]):
                raise Interrupted("nothing was changed", tried=str(target), expected="consent, or --yes")
            result = await admin.run({**document, "dry_run": False}, say=voice.say)
    if unregister is not None and machine and not dry_run:
        unregister(machine)
    return _outcome("uninstall", machine, target, name, accepted, {**result, "dry_run": dry_run})


async def _accepted(target: Target, fingerprint: str, pinned: str | None, voice: Voice) -> HostKey:
    """The host key that a person accepted: by its fingerprint, in the machine's record, or now."""
    shown = await session.shown_host_key(target)
    if pinned is not None:
        if shown.text != pinned:
            raise HostKeyChanged(
                "the machine shows another host key than the one in its record", tried=str(target), expected=pinned,
                got=shown.text, next_step="find out why; if it is right, accept it: chargehand machine check",
            )  # fmt: skip
        return shown
    if fingerprint:
        if fingerprint != shown.fingerprint:
            raise HostKeyChanged(
                "the machine does not show the host key that was accepted", tried=str(target), expected=fingerprint,
                got=shown.fingerprint, next_step="compare with `ssh-keygen -lf` on the machine's own console",
            )  # fmt: skip
        return shown
    known = session.known_to_admin(target, shown)
    if known is False:
        raise HostKeyChanged(
            "your own known_hosts has another host key for this machine", tried=str(target), got=shown.fingerprint,
            expected="the key you know", next_step="if it changed rightly, remove the old one: ssh-keygen -R",
        )  # fmt: skip
    if not voice.accept(shown, known):
        raise HostKeyUnknown(
            "the machine's host key was not accepted", tried=str(target), got=f"{shown.kind} {shown.fingerprint}",
            next_step=f"compare it with the machine's console, then use --accept-host-key {shown.fingerprint}",
        )  # fmt: skip
    return shown


def _image_of(choices: Choices) -> plan.Image | None:
    if choices.image:
        return plan.Image("pull", choices.image)
    if choices.image_archive is None:
        return None
    try:
        reference = oci.image_id(choices.image_archive)
        payload = session.payload_of(choices.image_archive)
    except (oci.BadArchive, OSError) as error:
        raise BadInput(
            "the image archive cannot be used", tried=str(choices.image_archive), expected="an image archive, as `make image` makes",
            got=str(error),
        ) from error  # fmt: skip
    return plan.Image("load", reference, payload.size, payload.sha256)


def _image_before(installed: Mapping[str, Any] | None) -> plan.Image:
    reference = ((installed or {}).get("image") or {}).get("reference")
    if reference is None:
        raise BadInput(
            "the worker's image is missing", expected="--image NAME@sha256:…, or --image-archive FILE",
            next_step="`make image` builds an archive",
        )  # fmt: skip
    # It comes from the machine: nothing that is no image by digest may get into a unit file.
    try:
        return plan.Image("pull", render.check_image(reference))
    except render.BadValue as error:
        raise BadInput("the machine's record names no image", expected=error.expected, got=error.got) from error


def _taken_over(
    choices: Choices, installed: Mapping[str, Any] | None, *, upgrade: bool, given: frozenset[str], target: Target
) -> Choices:
    """The choices, completed by those of the installation that is there."""
    if installed is None:
        if upgrade:
            raise BadInput(
                "there is no installation to upgrade", tried=str(target), next_step="use `chargehand edge install`"
            )
        return choices
    name = installed.get("machine")
    if name is not None and name != choices.machine:
        raise Conflict(
            "this machine is installed under another name", tried=str(target), expected=choices.machine, got=name,
            next_step=f"use --machine {name}, or uninstall it first",
        )  # fmt: skip
    if not upgrade:
        return choices
    before = installed.get("choices") or {}
    kinds = {name: type(getattr(choices, name)) for name in plan.KEPT}
    kept = {name: before[name] for name in plan.KEPT if name not in given and type(before.get(name)) is kinds[name]}
    return dataclasses.replace(choices, **kept)


def _home(scope: str, facts: Mapping[str, Any]) -> str:
    account = facts["account"]
    return str(account["home"]) if scope != SYSTEM or account["exists"] else HOME


def _sudo(scope: str) -> bool | None:
    return None if scope == SYSTEM else False


def _machine(target: Target, choices: Choices, account: str, accepted: HostKey) -> Machine:
    return Machine(
        id=choices.machine, address=target.host, port=target.port, user=account, labels=dict(choices.labels),
        role=choices.role, host_key=accepted.text, host_key_fingerprint=accepted.fingerprint,
        host_key_accepted_at=time.time(),
    )  # fmt: skip


def _outcome(
    action: str, machine: str, target: Target, account: str, accepted: HostKey, result: Mapping[str, Any], **more: Any
) -> Outcome:
    return Outcome(
        action=action, machine=machine, target=str(target), account=account, host_key_fingerprint=accepted.fingerprint,
        dry_run=bool(result["dry_run"]), changes=tuple(result["changes"]), unchanged=tuple(result["unchanged"]),
        notes=tuple(result["notes"]), **more,
    )  # fmt: skip
