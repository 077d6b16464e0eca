"""Unit managers: what starts broker and worker on a machine, stops them, and proves that nothing runs.

Owns: the interface both managers fulfil and the choice between them.
Deliberately does not know: leases and verbs.
"""

from __future__ import annotations

import abc
import dataclasses
import os
from typing import Dict, List, Optional

from edge_agent.host.home import Home, HostConfig
from tools.values import JsonObject

INACTIVE, ACTIVE, CHANGING = "inactive", "active", "changing"


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of the edge agent, as the kernel lists it. ``rss_kb`` KiB."""

    pid: int
    argv: str
    rss_kb: int = 0

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)


class UnitManager(abc.ABC):
    """Starts and stops the edge agent. Every method raises ``MachineFailed`` when the machine cannot do it."""

    name: str

    @abc.abstractmethod
    def start(self, deadline_s: float) -> None:
        """Start the broker, then the worker bound to it. Returns when both are started, or raises."""

    @abc.abstractmethod
    def stop(self, deadline_s: float) -> None:
        """Stop both and everything they started; returns when nothing is left or ``deadline_s`` seconds have passed."""

    @abc.abstractmethod
    def state(self) -> str:
        """``inactive`` when neither broker nor worker runs, ``active`` when one does, ``changing`` in between."""

    @abc.abstractmethod
    def processes(self) -> List[Process]:
        """Every process of the edge agent that lives, zombies left out."""

    @abc.abstractmethod
    def why(self) -> str:
        """The last words of broker and worker, for an error message; may be empty."""


def choose(home: Home, config: HostConfig) -> UnitManager:
    """The unit manager that ``host.json`` names."""
    if config.units == "systemd":
        from edge_agent.host.units.systemd import SystemdUnits

        return SystemdUnits(home.run_dir(config))
    from edge_agent.host.units.process import ProcessUnits

    return ProcessUnits(home, config)


def read_process(pid: int) -> Optional[Process]:
    """The process ``pid``, ``None`` if it has gone or is a zombie."""
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            argv = file.read(4096).rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "backslashreplace")
        status = read_status(pid)
    except OSError:
        return None
    if status.get("State", "Z").startswith(("Z", "X")):
        return None
    return Process(pid, argv, int(status.get("VmRSS", "0 kB").split()[0]))


def read_status(pid: int) -> Dict[str, str]:
    """``/proc/PID/status`` by field; raises ``OSError`` when the process has gone."""
    with open("/proc/%d/status" % pid, encoding="utf-8", errors="backslashreplace") as file:
        fields = (line.partition(":") for line in file)
        return {name: value.strip() for name, colon, value in fields if colon}


def notify(message: str) -> None:
    """Tell whoever manages this process (``NOTIFY_SOCKET``, see sd_notify(3)); does nothing without one."""
    import socket

    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(message.encode("utf-8"), address)
