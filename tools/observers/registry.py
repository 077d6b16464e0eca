"""The table of all observers.

Owns: which observers there are, by name.
Deliberately does not know: what any of them does, or which of them a policy allows.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Mapping

from tools.observers import certificates, clock, hardware, journal, memory, network, software, storage, units
from tools.observers.observer import Observer, UnknownObserver, nearest

_ALL = (
    storage.DISK_SPACE,
    storage.MOUNTS,
    storage.BLOCK_DEVICES,
    memory.MEMORY,
    memory.LOAD,
    memory.TOP_PROCESSES,
    memory.KERNEL_LIMITS,
    units.FAILED_UNITS,
    units.UNIT_STATUS,
    journal.JOURNAL_ERRORS,
    journal.KERNEL_MESSAGES,
    journal.OOM_KILLS,
    network.LISTENING_SOCKETS,
    network.INTERFACES,
    network.ROUTES,
    network.NAME_RESOLUTION,
    network.TCP_HEALTH,
    clock.TIME_SYNC,
    clock.UPTIME,
    software.OS,
    software.PENDING_REBOOT,
    software.UPDATES,
    hardware.CPU_INFO,
    hardware.HARDWARE_ERRORS,
    hardware.USERS_LOGGED_IN,
    certificates.CERTIFICATES,
)

OBSERVERS: Mapping[str, Observer] = MappingProxyType({one.name: one for one in _ALL})


def observer(name: Any) -> Observer:
    """The observer called ``name``; raises ``UnknownObserver`` that names the nearest one."""
    found = OBSERVERS.get(name) if isinstance(name, str) else None
    if found is None:
        raise UnknownObserver("there is no observer %.80r; %s" % (name, nearest(str(name), OBSERVERS, "observers")))
    return found
