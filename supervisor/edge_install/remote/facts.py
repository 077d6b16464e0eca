"""What there is to know of a machine before an installation. Reads only; judges nothing.

Standard library only, Python 3.9: it is sent to the machine as text (``supervisor.edge_install.program``).
"""

# Runs on Python 3.9: no `X | Y` at run time, no `zip(strict=)`.
# ruff: noqa: UP006, UP031, UP035

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import platform
import pwd
import shutil
import stat
import sys
import time
from typing import List

from supervisor.edge_install.remote.account import (
    SYSTEM_PATH,
    Account,
    answer,
    groups_of,
    has_image,
    is_running,
    record_of,
    run,
    text_of,
)
from supervisor.edge_install.remote.texts import Failed, Json, has_ids, version_in

LINGER = "/var/lib/systemd/linger"
QUADLET = "/usr/libexec/podman/quadlet"
USER_GENERATOR = "/usr/lib/systemd/user-generators/podman-user-generator"


def facts(document: Json) -> Json:
    """What there is to know of this machine before an installation; reads only."""
    account = Account(document["user"] or pwd.getpwuid(os.getuid())[0], document["home"])
    parent = account.home
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent) or "/"
    disk = os.statvfs(parent)
    podman = shutil.which("podman", path=SYSTEM_PATH) or ""
    return {
        "wall": time.time(),
        "admin": {"name": pwd.getpwuid(os.getuid())[0], "uid": os.getuid()},
        "account": {
            "name": account.name, "exists": account.exists, "uid": account.uid, "home": account.home,
            "shell": account.shell,
            "linger": os.path.exists(os.path.join(LINGER, account.name)),
            "bus": os.path.exists(account.runtime + "/bus"),
            "subuid": has_ids(text_of("/etc/subuid"), account.name, account.uid),
            "subgid": has_ids(text_of("/etc/subgid"), account.name, account.uid),
            "groups": groups_of(account),
            "running": is_running(account),
            "shell_start": _shell_start(account) if account.uid == os.getuid() else None,
        },
        "groups": sorted(entry[0] for entry in grp.getgrall()),
        "python": {"path": sys.executable, "version": platform.python_version()},
        "system_python": {"version": version_in(answer(["/usr/bin/python3", "--version"]))},
        "kernel": platform.release(),
        "machine": platform.machine(),
        "os": _os_release(),
        "systemd": version_in(answer(["systemctl", "--version"])) if os.path.isdir("/run/systemd/system") else "",
        "user_dbus": any(
            os.path.exists("/usr/lib/systemd/user/" + name) for name in ("dbus.socket", "dbus-broker.service")
        ),
        "logind": os.path.exists("/run/systemd/seats") or bool(shutil.which("loginctl", path=SYSTEM_PATH)),
        "podman": {
            "path": podman, "version": version_in(answer([podman, "--version"])) if podman else "",
            "generator": os.path.exists(USER_GENERATOR) or os.path.exists(QUADLET),
            "runtime": next((name for name in ("crun", "runc") if shutil.which(name, path=SYSTEM_PATH)), ""),
        },
        "newuidmap": _may_map("newuidmap") and _may_map("newgidmap"),
        "user_namespaces": _user_namespaces(),
        "cgroup": {
            "unified": os.path.exists("/sys/fs/cgroup/cgroup.controllers"),
            "controllers": text_of("/sys/fs/cgroup/cgroup.controllers").split(),
            "delegated": _delegated(account),
        },
        "disk": {"path": parent, "free_bytes": disk.f_bavail * disk.f_frsize, "read_only": bool(disk.f_flag & os.ST_RDONLY)},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "selinux": selinux(),
        "landlock": _landlock(),
        "polkit": os.path.isdir("/etc/polkit-1/rules.d") or os.path.isdir("/usr/share/polkit-1/rules.d"),
        "sshd": _sshd(account.name),
        "image": {"present": has_image(account, document.get("image", ""))},
        "installation": record_of(account),
    }  # fmt: skip


def _os_release() -> Json:
    pairs = (line.split("=", 1) for line in text_of("/etc/os-release").splitlines() if "=" in line)
    fields = {name: value.strip().strip('"') for name, value in pairs}
    return {"id": fields.get("ID", ""), "version": fields.get("VERSION_ID", ""), "name": fields.get("PRETTY_NAME", "")}


def _may_map(program: str) -> bool:
    path = shutil.which(program, path=SYSTEM_PATH)
    if not path:
        return False
    if os.stat(path).st_mode & stat.S_ISUID:
        return True
    with contextlib.suppress(OSError):
        return bool(os.getxattr(path, "security.capability"))
    return False


def _user_namespaces() -> bool:
    most = text_of("/proc/sys/user/max_user_namespaces").strip()
    allowed = text_of("/proc/sys/kernel/unprivileged_userns_clone").strip()
    return most != "0" and allowed != "0"


def _delegated(account: Account) -> List[str]:
    if not account.exists:
        return []
    path = "/sys/fs/cgroup/user.slice/user-%d.slice/user@%d.service/cgroup.controllers" % (account.uid, account.uid)
    return text_of(path).split()


def _landlock() -> Json:
    libc = ctypes.CDLL(None, use_errno=True)
    # landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION); the number is the same on every architecture.
    abi = libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return {"abi": max(0, abi), "why": os.strerror(ctypes.get_errno()) if abi < 0 else ""}


def _sshd(user: str) -> Json:
    """The settings of sshd as they hold for ``user``; empty when they cannot be read (not root)."""
    wanted = {
        "maxstartups", "maxsessions", "pubkeyauthentication", "authorizedkeysfile", "forcecommand", "usepam",
        "allowusers", "denyusers", "allowgroups", "denygroups", "strictmodes", "pubkeyacceptedalgorithms",
    }  # fmt: skip
    settings: Json = {}
    for line in answer(["sshd", "-T", "-C", "user=%s,host=gateway,addr=192.0.2.1" % user]).splitlines():
        name, _, value = line.partition(" ")
        if name in wanted:
            settings[name] = (settings[name] + " " + value) if name in settings else value
    return settings


def _shell_start(account: Account) -> Json:
    """How long this user's login shell takes to run nothing the way sshd runs it, and what it prints."""
    environment = dict(account.environment(), SSH_CLIENT="192.0.2.1 1 22", SSH_CONNECTION="192.0.2.1 1 192.0.2.2 22")
    began = time.monotonic()
    try:
        done = run([account.shell or "/bin/sh", "-c", ":"], check=False, timeout=15, env=environment)
    except Failed as error:
        return {"seconds": time.monotonic() - began, "output": str(error)}
    return {"seconds": time.monotonic() - began, "output": done.stdout[:200]}


def selinux() -> Json:
    enforce = text_of("/sys/fs/selinux/enforce").strip()
    return {
        "mode": {"1": "enforcing", "0": "permissive"}.get(enforce, "disabled"),
        "semanage": bool(shutil.which("semanage", path=SYSTEM_PATH)),
        "container_policy": os.path.exists("/usr/share/containers/selinux/contexts"),
    }
