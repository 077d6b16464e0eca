"""An administrator of lab machines, and looking at what an installation did to one."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from supervisor.edge_install import flow
from supervisor.edge_install.preflight import Finding
from supervisor.edge_install.target import Choices, Target
from supervisor.machines import Machine as Record
from tests.lab.machine import Machine

HOME = "/var/lib/chargehand"
INSTALLED = f"{HOME}/.local/share/chargehand"
BOX_LIMITS = "/etc/containers/containers.conf.d/lab.conf"


class Admin:
    """An administrator who says yes, and remembers."""

    def __init__(self, machine: Machine, archive: Path, gateway: Path, user: str = "root") -> None:
        self.machine = machine
        self.target = Target(user, machine.address, machine.port)
        self.findings: dict[str, Finding] = {}
        self.records: list[Record] = []
        self.choices = Choices(
            machine="web-01", identity=machine.admin_key, image_archive=archive, yes=True,
            gateway_key=gateway.with_name("key.pub").read_text(),
        )  # fmt: skip

    def _voice(self) -> flow.Voice:
        def findings(found: Sequence[Finding]) -> None:
            self.findings = {finding.id: finding for finding in found}

        return flow.Voice(print, findings, lambda key, known: key.text == self.machine.host_key, lambda changes: True)

    def install(self, *, upgrade: bool = False, polkit: str | None = None, **more: Any) -> flow.Outcome:
        choices = dataclasses.replace(self.choices, **more)
        return asyncio.run(
            flow.install(
                self.target, choices, self._voice(), version="0.1.0", register=self.records.append, upgrade=upgrade,
                given=frozenset(more), polkit_rule=lambda user: polkit,
            )
        )  # fmt: skip

    def uninstall(self, **more: Any) -> flow.Outcome:
        more.setdefault("account", "chargehand")
        return asyncio.run(
            flow.uninstall(self.target, self._voice(), identity=self.machine.admin_key, yes=True, **more)
        )


def everything(machine: Machine) -> dict[str, str]:
    """Every file an installation could touch, with owner, mode and digest."""
    listing = machine.run(
        [
            "find", "/etc", "/var/lib", "/home", "/root", "/usr/lib/systemd", "-xdev", "(", "-path", "/var/lib/systemd/timesync",
            "-o", "-path", "/var/lib/systemd/random-seed", "-o", "-path", "/var/lib/private", "-o", "-path", "/var/lib/lab-storage",
            "-o", "-path", "/var/lib/systemd/catalog", "-o", "-path", "/var/lib/containers", ")", "-prune",
            "-o", "-type", "f", "-printf", "%p\\t%u %g %m %s %T@\\n", "-o", "-type", "l", "-printf", "%p\\t%l\\n",
            "-o", "-type", "d", "-printf", "%p/\\t%u %g %m\\n",
        ]
    ).stdout  # fmt: skip
    found = dict(line.split("\t", 1) for line in listing.splitlines())
    # Copies that the tools for accounts keep of the file before.
    return {name: about for name, about in found.items() if not name.endswith("-") and ".pwd.lock" not in name}


def accounts(machine: Machine) -> dict[str, bytes]:
    names = ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")
    return {name: b"".join(sorted(machine.read(f"/etc/{name}").splitlines(True))) for name in names}


def without(found: dict[str, str], *ends: str) -> dict[str, str]:
    return {name: about for name, about in found.items() if not name.endswith(ends)}


ACCOUNT_FILES = ("/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow", "/etc/subuid", "/etc/subgid")


def of_the_agent(machine: Machine) -> list[str]:
    """What runs as the agent's user, its user manager and message bus left out."""
    return [
        " ".join(process.argv)
        for process in machine.processes()
        if process.user == "chargehand"
        and not process.argv[0].endswith(("systemd", "dbus-daemon", "dbus-broker", "(sd-pam)"))
        and "(sd-pam)" not in process.argv[0]
    ]


def gatekeeper(machine: Machine, gateway: Path, *words: str, user: str = "chargehand") -> tuple[int, Any]:
    """What the gateway's key gets."""
    command = [word.replace(str(machine.admin_key), str(gateway)) for word in machine.ssh_command(user)]
    done = subprocess.run([*command, "--", *words], input=b"", capture_output=True, check=False, timeout=30)
    return done.returncode, json.loads(done.stdout)


def user_control(machine: Machine) -> list[str]:
    """The words of `systemctl --user` for the agent's user."""
    uid = machine.run(["id", "-u", "chargehand"]).stdout.strip()
    return ["env", f"XDG_RUNTIME_DIR=/run/user/{uid}", "systemctl", "--user"]


def start_with_a_stand_in(machine: Machine, *, runtime_max_s: int = 600) -> None:
    """Start the installed units, the broker being a process that says it is ready and sleeps: the real one refuses
    without a lease. The worker is the real one; it waits for a broker that never speaks."""
    control = user_control(machine)
    runtime = control[1].partition("=")[2]
    program = (
        "import os, socket, signal\n"
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])\n"
        "signal.pause()\n"
    )
    machine.write(f"{runtime}/stand-in.py", program, owner="chargehand")
    words = f"[Service]\nExecStart=\nExecStart=/usr/bin/python3 -I {runtime}/stand-in.py\n"
    words += f"RuntimeMaxSec={runtime_max_s}\n"
    folder = f"{runtime}/systemd/user.control/chargehand-broker.service.d"
    machine.run(["mkdir", "-p", folder, f"{runtime}/chargehand/worker"], user="chargehand")
    machine.write(f"{folder}/stand-in.conf", words, owner="chargehand")
    machine.run([*control, "daemon-reload"], user="chargehand")
    machine.run([*control, "start", "chargehand-agent"], user="chargehand")


def unit(machine: Machine, name: str, *properties: str) -> dict[str, str]:
    """Properties of a unit of the agent's user."""
    words = [*user_control(machine), "show", f"--property={','.join(properties)}", name]
    return dict(line.split("=", 1) for line in machine.run(words, user="chargehand").stdout.splitlines())
