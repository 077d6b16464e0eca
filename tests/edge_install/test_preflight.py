"""The preflight: each thing that speaks against a machine is found, and says how to mend it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from supervisor.edge_install import preflight
from supervisor.edge_install.preflight import BLOCKER, INFO, OK, WARNING, Finding
from supervisor.edge_install.target import USER, Choices

NOW = 1_800_000_000.0
GOOD: dict[str, Any] = {
    "wall": NOW,
    "admin": {"name": "root", "uid": 0},
    "account": {
        "name": "chargehand", "exists": False, "uid": -1, "home": "/var/lib/chargehand", "shell": "", "linger": False,
        "bus": False, "subuid": False, "subgid": False, "groups": [], "running": False, "shell_start": None,
    },
    "groups": ["adm", "root"],
    "python": {"path": "/usr/bin/python3", "version": "3.9.18"},
    "system_python": {"version": "3.9.18"},
    "kernel": "5.14.0-427.el9.x86_64",
    "machine": "x86_64",
    "os": {"id": "rhel", "version": "9.4", "name": "RHEL"},
    "systemd": "252",
    "user_dbus": True,
    "logind": True,
    "podman": {"path": "/usr/bin/podman", "version": "4.9.4", "generator": True, "runtime": "crun"},
    "newuidmap": True,
    "user_namespaces": True,
    "cgroup": {"unified": True, "controllers": ["cpu", "memory", "pids"], "delegated": []},
    "disk": {"path": "/var/lib", "free_bytes": 20_000_000_000, "read_only": False},
    "memory_bytes": 2 << 30,
    "selinux": {"mode": "enforcing", "semanage": True, "container_policy": True},
    "landlock": {"abi": 1, "why": ""},
    "polkit": True,
    "sshd": {"maxstartups": "10:30:100", "maxsessions": "10", "authorizedkeysfile": ".ssh/authorized_keys"},
    "image": {"present": False},
    "installation": None,
}  # fmt: skip
SYSTEM_WIDE = Choices(machine="web-01")
INTO_ACCOUNT = Choices(machine="web-01", scope=USER)


def examine(change: Callable[[dict[str, Any]], Any], choices: Choices = SYSTEM_WIDE) -> dict[str, Finding]:
    facts = copy.deepcopy(GOOD)
    change(facts)
    found = preflight.examine(facts, choices, gateway_wall=NOW, latency_s=0.1)
    return {finding.id: finding for finding in found}


def test_a_good_machine_has_nothing_to_mend() -> None:
    assert {finding.severity for finding in examine(lambda facts: None).values()} == {OK}


CASES: list[tuple[str, str, Callable[[dict[str, Any]], Any], str]] = [
    ("privilege", BLOCKER, lambda f: f["admin"].update(name="alice", uid=1000), "sudo"),
    ("python", BLOCKER, lambda f: f["python"].update(version="3.8.10"), "install"),
    ("system-python", BLOCKER, lambda f: f["system_python"].update(version=""), "/usr/bin/python3"),
    ("systemd", BLOCKER, lambda f: f.update(systemd=""), "systemd"),
    ("kernel", BLOCKER, lambda f: f.update(kernel="3.10.0"), "kernel"),
    ("podman", BLOCKER, lambda f: f["podman"].update(version="4.3.1"), "Debian 13"),
    ("podman", BLOCKER, lambda f: f["podman"].update(version=""), "install podman"),
    ("podman", BLOCKER, lambda f: f["podman"].update(generator=False), "generator"),
    ("container-runtime", BLOCKER, lambda f: f["podman"].update(runtime=""), "crun"),
    ("subordinate-ids", BLOCKER, lambda f: f.update(newuidmap=False), "uidmap"),
    ("user-namespaces", BLOCKER, lambda f: f.update(user_namespaces=False), "sysctl"),
    ("cgroup", BLOCKER, lambda f: f["cgroup"].update(unified=False), "kernel command line"),
    ("cgroup", WARNING, lambda f: f["cgroup"].update(controllers=["cpu"]), "Delegate="),
    ("user-bus", BLOCKER, lambda f: f.update(user_dbus=False), "dbus-user-session"),
    ("account", WARNING, lambda f: f["account"].update(exists=True, uid=990, shell="/bin/bash"), "kept"),
    ("account", BLOCKER, lambda f: f["account"].update(exists=True, uid=990, shell="/usr/sbin/nologin"), "usermod -s"),
    ("account", BLOCKER, lambda f: f["account"].update(exists=True, uid=0, shell="/bin/sh"), "never runs as root"),
    ("disk", BLOCKER, lambda f: f["disk"].update(free_bytes=100), "free space"),
    ("disk", BLOCKER, lambda f: f["disk"].update(read_only=True), "mount"),
    ("selinux", BLOCKER, lambda f: f["selinux"].update(semanage=False), "policycoreutils-python-utils"),
    ("selinux", BLOCKER, lambda f: f["selinux"].update(container_policy=False), "container-selinux"),
    ("selinux", WARNING, lambda f: f["selinux"].update(mode="permissive", semanage=False), "dnf install"),
    ("landlock", WARNING, lambda f: f.update(landlock={"abi": 0, "why": "Operation not permitted"}), "lsm="),
    ("polkit", INFO, lambda f: f.update(polkit=False), "polkit"),
    ("ssh-login", BLOCKER, lambda f: f["sshd"].update(allowusers="alice bob@10.0.0.0/8"), "AllowUsers"),
    ("ssh-login", BLOCKER, lambda f: f["sshd"].update(allowgroups="ssh-users"), "AllowGroups"),
    ("ssh-login", BLOCKER, lambda f: f["sshd"].update(denyusers="charge*"), "take chargehand out"),
    ("ssh-login", BLOCKER, lambda f: f["sshd"].update(pubkeyauthentication="no"), "PubkeyAuthentication"),
    ("ssh-login", BLOCKER, lambda f: f["sshd"].update(forcecommand="internal-sftp"), "Match"),
    ("ssh-login", INFO, lambda f: f.update(sshd={}), ""),
    ("authorized-keys", BLOCKER, lambda f: f["sshd"].update(authorizedkeysfile="/etc/ssh/keys/%u"), "Match User"),
    ("max-startups", WARNING, lambda f: f["sshd"].update(maxstartups="2:30:10"), "MaxStartups"),
    ("max-sessions", BLOCKER, lambda f: f["sshd"].update(maxsessions="1"), "MaxSessions"),
    ("idle", BLOCKER, lambda f: f["account"].update(running=True), "cancel"),
    ("clock", WARNING, lambda f: f.update(wall=NOW - 3600), "timedatectl"),
]


@pytest.mark.parametrize(("identity", "severity", "change", "remedy"), CASES)
def test_each_fault_is_found_alone_and_has_a_remedy(
    identity: str, severity: str, change: Callable[[dict[str, Any]], Any], remedy: str
) -> None:
    found = examine(change)
    assert found[identity].severity == severity
    assert remedy in found[identity].remedy
    others = {name for name, finding in found.items() if finding.severity in (WARNING, BLOCKER)} - {identity}
    assert not others


def test_allowed_users_may_be_patterns_and_groups_may_be_the_users_own() -> None:
    for change in (
        lambda f: f["sshd"].update(allowusers="charge* root"),
        lambda f: f["sshd"].update(allowusers="chargehand@10.0.0.0/8"),
        lambda f: f["sshd"].update(allowgroups="chargehand"),
        lambda f: f["sshd"].update(authorizedkeysfile="%h/.ssh/authorized_keys /etc/keys"),
    ):
        assert {finding.severity for finding in examine(change).values()} == {OK}


def test_without_root_what_only_root_can_mend_becomes_a_blocker() -> None:
    def mine(facts: dict[str, Any]) -> None:
        facts["admin"].update(name="alice", uid=1000)
        facts["account"].update(name="alice", exists=True, uid=1000, home="/home/alice", shell="/bin/bash")
        facts["account"]["shell_start"] = {"seconds": 0.02, "output": ""}
        facts["sshd"] = {}

    found = examine(mine, INTO_ACCOUNT)
    assert found["privilege"].severity == OK
    assert found["subordinate-ids"].severity == BLOCKER
    assert "usermod --add-subuids" in found["subordinate-ids"].remedy
    assert found["linger"].severity == INFO


@pytest.mark.parametrize(
    ("started", "severity"),
    [
        ({"seconds": 0.4, "output": ""}, WARNING),
        ({"seconds": 0.01, "output": "Welcome!"}, BLOCKER),
        ({"seconds": 0.01, "output": ""}, OK),
    ],
)
def test_the_start_up_files_of_a_login_shell_are_judged(started: dict[str, Any], severity: str) -> None:
    found = examine(lambda facts: facts["account"].update(shell_start=started), INTO_ACCOUNT)
    assert found["login-shell"].severity == severity


def test_a_blocker_can_be_overruled_by_its_name_only() -> None:
    facts = copy.deepcopy(GOOD)
    facts["disk"]["free_bytes"] = 1
    facts["systemd"] = ""
    findings = preflight.examine(facts, SYSTEM_WIDE, gateway_wall=NOW, latency_s=0.0)
    assert [finding.id for finding in preflight.blockers(findings)] == ["systemd", "disk"]
    assert [finding.id for finding in preflight.blockers(findings, ("disk",))] == ["systemd"]


def test_versions_are_compared_as_numbers() -> None:
    assert preflight.version("4.10") > preflight.version("4.9.9")
    assert preflight.version("257 (257.1)") == (257,)
    assert preflight.version("devel") == ()
