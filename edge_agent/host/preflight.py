"""What this machine can do: the part of ``hello`` that the gateway decides by.

Owns: looking, with the level the kernel really gives. Deliberately does not know: remedies (the installer has them).
"""

from __future__ import annotations

import os

from edge_agent.host import confine
from edge_agent.host.home import HostConfig
from tools.values import JsonObject


def capabilities(config: HostConfig) -> JsonObject:
    """Facts about confinement and tools, honest about what is not there."""
    abi, problem = confine.landlock_abi()
    return {
        "landlock": {"abi": abi, "level": confine.landlock_level(abi), "problem": problem},
        "pidfd": hasattr(os, "pidfd_open"),
        "user_namespaces": _user_namespaces(),
        "selinux": _selinux(),
        "units": config.units,
        "systemctl": _installed("systemctl"),
        "podman": _installed("podman"),
        "user_bus": os.path.exists("/run/user/%d/bus" % os.getuid()),
        "journal_readable": os.access("/var/log/journal", os.R_OK | os.X_OK),
    }


def _installed(name: str) -> bool:
    return any(os.access(os.path.join(directory, name), os.X_OK) for directory in ("/usr/bin", "/bin"))


def _user_namespaces() -> bool:
    try:
        with open("/proc/sys/user/max_user_namespaces", encoding="ascii") as file:
            return int(file.read()) > 0
    except (OSError, ValueError):
        return False


def _selinux() -> str:
    try:
        with open("/sys/fs/selinux/enforce", encoding="ascii") as file:
            return "enforcing" if file.read().strip() == "1" else "permissive"
    except OSError:
        return "off"
