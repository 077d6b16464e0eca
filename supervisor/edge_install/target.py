"""What an installation is asked to do: the target, the choices, the file they can come from.

Owns: the grammar of ``ADMIN@HOST[:PORT]``, the choices with their defaults, reading them from a TOML file. Pure, but for
reading that file. Deliberately does not know: how a machine is reached or changed.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadlets import render
from supervisor import machines
from supervisor.errors import BadInput

SYSTEM, USER = "system", "user"
ACCOUNT = "chargehand"
HOME = "/var/lib/chargehand"
# sshd runs a forced command through the login shell. A POSIX sh that is not interactive reads no start-up file.
SHELL = "/bin/sh"
LOG_GROUPS = ("systemd-journal", "adm")
PYTHON = "/usr/bin/python3"
INSTALLATION = ".local/share/chargehand"

_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


@dataclasses.dataclass(frozen=True)
class Target:
    """Where an administrator logs in. ``admin`` empty: as the SSH configuration says, or as who runs this."""

    admin: str
    host: str
    port: int = 22

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.admin}@{host}:{self.port}" if self.admin else f"{host}:{self.port}"


@dataclasses.dataclass(frozen=True)
class Choices:
    """Everything an installation can be told. ``accept_host_key``: a fingerprint ``SHA256:…``; ``image``: an image by
    digest; ``image_archive``: a file that `podman load` takes; ``labels``, ``role``: for the machine's record;
    ``grant_logs``: membership in the groups that may read the system's logs; ``max_run_s``, ``max_lease_s`` seconds."""

    machine: str
    scope: str = SYSTEM
    account: str = ACCOUNT
    identity: Path | None = None
    image: str = ""
    image_archive: Path | None = None
    accept_host_key: str = ""
    gateway_key: str = ""
    grant_logs: bool = True
    network: str = "none"
    max_run_s: int = 3600
    max_lease_s: int = 120
    broker_memory_mib: int = 512
    agent_memory_mib: int = 512
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    role: str = ""
    dry_run: bool = False
    yes: bool = False
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        machines.machine_id(self.machine)
        machines.user(self.account)
        machines.role(self.role)
        machines.labels(self.labels)
        if self.image and self.image_archive is not None:
            raise BadInput("give the image once", expected="--image or --image-archive", got="both")
        if self.accept_host_key and not _FINGERPRINT.fullmatch(self.accept_host_key):
            raise BadInput(
                "this is not the fingerprint of a host key",
                expected="SHA256: and 43 letters, digits, + and /, as `ssh-keygen -l` prints it",
                got=self.accept_host_key,
                next_step="run `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the machine's console",
            )
        if not 10 <= self.max_lease_s <= 600:
            raise BadInput("this cannot be the longest lease", expected="10 to 600 seconds", got=self.max_lease_s)
        try:
            if self.image:
                render.check_image(self.image)
            # Checked now, with stand-ins for what is only known later: a bad value must not come up half-way.
            render.UnitValues(
                self.machine, "sha256:" + "0" * 64, HOME, network=self.network, max_run_s=self.max_run_s,
                broker_memory_mib=self.broker_memory_mib, agent_memory_mib=self.agent_memory_mib,
            )  # fmt: skip
        except render.BadValue as error:
            raise BadInput(f"{error.field} cannot be used", expected=error.expected, got=error.got) from error


def parse(text: str, port: int | None = None) -> Target:
    """``[ADMIN@]HOST[:PORT]``; an IPv6 address with a port stands in brackets. ``port`` wins when the text has none.

    Raises ``BadInput``.
    """
    admin, at, rest = text.rpartition("@")
    if at:
        machines.user(admin)
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::([^:]*))?", rest)
    if bracketed:
        host, digits = bracketed[1], bracketed[2]
    elif rest.count(":") == 1:
        host, digits = rest.split(":")
    else:
        host, digits = rest, None
    if port is not None and digits is not None and machines.port(digits) != port:
        raise BadInput("the port is given twice", expected="one port", got=[digits, port])
    return Target(admin, machines.address(host), machines.port(digits if digits is not None else port or 22))


def read_file(path: Path) -> dict[str, Any]:
    """Choices from a TOML file, by their names in ``Choices`` with ``-`` or ``_``; also ``target``.

    Raises ``BadInput`` for a file that cannot be read, an unknown name, and a value of the wrong kind.
    """
    try:
        with path.open("rb") as stream:
            document = tomllib.load(stream)
    except (OSError, ValueError) as error:
        raise BadInput(
            "the configuration cannot be read", tried=str(path), expected="a TOML file", got=str(error)
        ) from error
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Choices)}
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name == "target":
            found[name] = _of_kind(path, key, value, "str")
        elif name in kinds:
            found[name] = _of_kind(path, key, value, kinds[name])
        else:
            raise BadInput(
                f"{key} is not a choice of an installation", tried=str(path), got=key,
                expected="one of target, " + ", ".join(sorted(kinds)).replace("_", "-"),
            )  # fmt: skip
    return found


def _of_kind(path: Path, key: str, value: Any, kind: str) -> Any:
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    if kind.startswith("Path") and isinstance(value, str):
        # Relative to the file that says it, so that the file works from everywhere.
        return path.parent / Path(value).expanduser()
    if kind.startswith("Mapping") and isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    if kind.startswith("tuple") and isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise BadInput(f"{key} has the wrong kind of value", tried=str(path), expected=kind, got=value)
