"""The systemd unit manager: two user units, a plain broker and a Quadlet agent bound to it.

Owns: calls of ``systemctl --user`` and reading the units' control groups.
Deliberately does not know: what is in the units (``quadlets/``) and why they are started.
"""

from __future__ import annotations

import os
import subprocess
from typing import Dict, List, Sequence

from edge_agent.host.errors import MachineFailed
from edge_agent.host.units import ACTIVE, CHANGING, INACTIVE, Process, UnitManager, read_process

AGENT = "chargehand-agent.service"
BROKER = "chargehand-broker.service"
PAUSE = "podman-pause-*.scope"
SYSTEMCTL = "/usr/bin/systemctl"
# One question to the user manager; it answers in milliseconds or is broken.
QUESTION_S = 15.0


def user_environment() -> Dict[str, str]:
    """What ``systemctl --user`` needs; an SSH forced command has none of it."""
    runtime = "/run/user/%d" % os.getuid()
    return {
        "PATH": "/usr/bin:/bin",
        "LC_ALL": "C.UTF-8",
        "HOME": os.path.expanduser("~"),
        "XDG_RUNTIME_DIR": runtime,
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=%s/bus" % runtime,
    }


class SystemdUnits(UnitManager):
    """Args: ``run_dir``: the run directory, where ``start`` leaves its note for ``stop``."""

    name = "systemd"

    def __init__(self, run_dir: str) -> None:
        self._pause_note = os.path.join(run_dir, "pause-was-there")

    def _systemctl(self, words: Sequence[str], timeout_s: float, check: bool = True) -> str:
        try:
            done = subprocess.run(
                [SYSTEMCTL, "--user", "--no-pager", *words],
                env=user_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise MachineFailed(
                "%s does not exist" % SYSTEMCTL, next_step="use units 'process' on this machine"
            ) from None
        except subprocess.TimeoutExpired:
            raise MachineFailed(
                "systemctl --user %s did not end within %g s" % (" ".join(words), timeout_s),
                next_step="look at the user manager: systemctl --user status",
            ) from None
        if check and done.returncode != 0:
            said = done.stderr.decode("utf-8", "backslashreplace").strip()
            remedy = "look at journalctl --user -u %s -u %s" % (BROKER, AGENT)
            if "connect to bus" in said or "Failed to connect" in said:
                remedy = (
                    "the user manager does not run: loginctl enable-linger for this user, install dbus-user-session"
                )
            raise MachineFailed(
                "systemctl --user %s failed: %s" % (" ".join(words), said or "exit status %d" % done.returncode),
                got=self.why() if "start" in words else "",
                next_step=remedy,
            )
        return done.stdout.decode("utf-8", "backslashreplace")

    def _show(self) -> Dict[str, Dict[str, str]]:
        text = self._systemctl(
            ["show", "--property=Id,LoadState,ActiveState,ControlGroup,MainPID", BROKER, AGENT], QUESTION_S
        )
        units: Dict[str, Dict[str, str]] = {}
        for block in text.strip().split("\n\n"):
            fields = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            units[fields.get("Id", "")] = fields
        if set(units) != {BROKER, AGENT}:
            # "Inactive" is a proof here, so an answer that does not speak of both units is none.
            raise MachineFailed(
                "systemctl --user show did not tell of both units", expected="%s, %s" % (BROKER, AGENT), got=text[:300]
            )
        return units

    def start(self, deadline_s: float) -> None:
        if self._pauses():
            # Somebody else's containers hold it (an account that is shared, `edge install --user`): it stays.
            with open(self._pause_note, "w", encoding="ascii"):
                pass
        self._systemctl(["start", AGENT], deadline_s)

    def stop(self, deadline_s: float) -> None:
        self._systemctl(["stop", AGENT, BROKER], deadline_s, check=False)
        if not os.path.exists(self._pause_note):
            # Rootless podman leaves a process behind that holds its user namespace open. It came with the run, so it
            # goes with it (safety.md, "Inert until activated", 1): after the units, whose own podman would bring it back.
            self._systemctl(["stop", PAUSE], QUESTION_S, check=False)
        self._systemctl(["reset-failed", AGENT, BROKER], QUESTION_S, check=False)

    def _pauses(self) -> bool:
        listed = self._systemctl(["list-units", "--no-legend", "--plain", PAUSE], QUESTION_S, check=False)
        return bool(listed.strip())

    def state(self) -> str:
        states = {fields.get("ActiveState", "") for fields in self._show().values()}
        if states <= {"inactive", "failed"}:
            return INACTIVE
        return ACTIVE if "active" in states else CHANGING

    def processes(self) -> List[Process]:
        pids: List[int] = []
        for fields in self._show().values():
            group = fields.get("ControlGroup", "")
            if group:
                pids.extend(_pids_below(group))
        return [process for process in map(read_process, sorted(set(pids))) if process is not None]

    def why(self) -> str:
        """The last lines of both units' logs, as far as this user may read them."""
        try:
            done = subprocess.run(
                [
                    "/usr/bin/journalctl",
                    "--user",
                    "--no-pager",
                    "-q",
                    "-o",
                    "cat",
                    "-n",
                    "12",
                    "-u",
                    BROKER,
                    "-u",
                    AGENT,
                ],
                env=user_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=QUESTION_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.decode("utf-8", "backslashreplace").strip()[-2000:]


def _pids_below(group: str) -> List[int]:
    """Every pid in a control group and the groups below it (the container's payload has its own)."""
    for mount in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"):
        root = mount + group
        if os.path.isfile(os.path.join(root, "cgroup.procs")):
            break
    else:
        return []
    pids: List[int] = []
    for directory, _, files in os.walk(root):
        if "cgroup.procs" in files:
            try:
                with open(os.path.join(directory, "cgroup.procs"), encoding="ascii") as file:
                    pids.extend(int(line) for line in file if line.strip())
            except OSError:
                continue
    return pids
