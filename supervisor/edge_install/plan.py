"""What an installation shall look like: every file with its bytes, as one document for ``remote``.

Owns: which files there are, where they lie in the home, the line in ``authorized_keys``. Pure: bytes in, document out.
Deliberately does not know: what is on the machine already, and how the document gets there.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from typing import Any

from quadlets import render
from supervisor.edge_install.target import HOME, INSTALLATION, LOG_GROUPS, PYTHON, SHELL, SYSTEM, Choices
from supervisor.errors import BadInput
from supervisor.machines import host_key

PROTOCOL = 1
KEY_MARK = "chargehand-gateway"
QUADLET_FOLDER = ".config/containers/systemd"
UNIT_FOLDER = ".config/systemd/user"
KEPT = ("grant_logs", "network", "max_run_s", "max_lease_s", "broker_memory_mib", "agent_memory_mib")


@dataclasses.dataclass(frozen=True)
class Image:
    """Where the worker's image comes from. ``source``: ``load`` (from an archive of ``size`` bytes with this ``sha256``)
    or ``pull`` (by digest); ``reference``: what podman knows it by afterwards."""

    source: str
    reference: str
    size: int = 0
    sha256: str = ""


def install_document(
    choices: Choices, *, account: str, home: str, image: Image, zipapp: bytes, version: str, polkit: str | None
) -> dict[str, Any]:
    """The document that ``remote.install`` carries out.

    Args:
        account, home: the login and home of the agent on this machine.
        zipapp: the bytes of ``host.pyz``.
        version: of the distribution, for the record.
        polkit: text of the rules file, ``None`` for none.

    Raises ``BadInput`` for a home or key that cannot stand in a unit file or in ``authorized_keys``.
    """
    home_dir = f"{home}/{INSTALLATION}"
    try:
        values = render.UnitValues(
            machine=choices.machine, image=image.reference, home_dir=home_dir, python=PYTHON, max_run_s=choices.max_run_s,
            network=choices.network, broker_memory_mib=choices.broker_memory_mib, agent_memory_mib=choices.agent_memory_mib,
        )  # fmt: skip
    except render.BadValue as error:
        raise BadInput(f"{error.field} cannot be used", expected=error.expected, got=error.got) from error
    files = [
        _file(f"{INSTALLATION}/host.pyz", zipapp, 0o644),
        _file(f"{INSTALLATION}/host.json", host_json(choices, image), 0o600),
        _file(f"{UNIT_FOLDER}/{render.BROKER_UNIT}", render.broker_unit(values).encode(), 0o644),
        _file(f"{QUADLET_FOLDER}/{render.AGENT_QUADLET}", render.agent_quadlet(values).encode(), 0o644),
    ]
    return {
        "verb": "install",
        "dry_run": choices.dry_run,
        "scope": choices.scope,
        "machine": choices.machine,
        "version": version,
        "choices": kept_choices(choices),
        "user": account,
        "home": home,
        "shell": SHELL,
        "python": PYTHON,
        "groups": list(LOG_GROUPS) if choices.grant_logs and choices.scope == SYSTEM else [],
        "image": {"source": image.source, "reference": image.reference, "bytes": image.size, "sha256": image.sha256},
        "key_line": key_line(choices.gateway_key, home_dir),
        "files": files,
        "polkit": polkit if choices.scope == SYSTEM else None,
    }


def uninstall_document(
    scope: str, *, account: str, home: str, purge: bool, force: bool, dry_run: bool
) -> dict[str, Any]:
    """The document that ``remote.uninstall`` carries out."""
    return {
        "verb": "uninstall", "scope": scope, "user": account, "home": home, "purge": purge, "force": force,
        "dry_run": dry_run,
    }  # fmt: skip


def facts_document(choices_scope: str, account: str, image: str) -> dict[str, Any]:
    """The document that ``remote.facts`` answers. An empty user means: who logs in."""
    return {"verb": "facts", "user": account if choices_scope == SYSTEM else "", "home": HOME, "image": image}


def kept_choices(choices: Choices) -> dict[str, Any]:
    """What an upgrade takes over from the installation before it."""
    return {name: getattr(choices, name) for name in KEPT}


def host_json(choices: Choices, image: Image) -> bytes:
    """``host.json`` (contracts.md, "A machine's home")."""
    document: Mapping[str, Any] = {
        "protocol": PROTOCOL, "machine": choices.machine, "units": "systemd", "max_lease_s": choices.max_lease_s,
        "max_run_s": choices.max_run_s, "image": image.reference,
    }  # fmt: skip
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def key_line(public_key: str, home_dir: str) -> str:
    """Our line in ``authorized_keys``: no terminal, no forwarding, no start-up file, one command.

    Raises ``BadInput`` for a key that is not one public key, and for a home that would have to be quoted.
    """
    try:
        key = host_key(public_key)
    except BadInput as error:
        raise BadInput(
            "the gateway's public key cannot be used",
            expected="one line of a .pub file: kind and base64",
            got=public_key[:80],
            next_step="give the public half, as `ssh-keygen -y -f KEY` prints it",
        ) from error
    if shlex.quote(home_dir) != home_dir or '"' in home_dir or "\\" in home_dir:
        raise BadInput(
            "this home cannot stand in authorized_keys", expected="a path without blanks and quotes", got=home_dir
        )
    return f'restrict,command="{PYTHON} -I {home_dir}/host.pyz gatekeeper" {key.text} {KEY_MARK}'


def digest(data: bytes) -> str:
    """``sha256:<hex>`` of the bytes of a file."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _file(path: str, data: bytes, mode: int) -> dict[str, Any]:
    return {"path": path, "mode": mode, "content": base64.b64encode(data).decode("ascii")}
