"""What speaks against installing on a machine, and how to mend it.

Owns: the requirements, their limits with unit and reason, and a remedy for each. Pure: facts in, findings out.
Deliberately does not know: how facts are gathered (``remote``).
"""

# Every check has the same form; not each of them needs the choices.

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from supervisor.edge_install.target import SYSTEM, Choices

OK, INFO, WARNING, BLOCKER = "ok", "info", "warning", "blocker"
SEVERITIES = (OK, INFO, WARNING, BLOCKER)

LEAST_PYTHON = (3, 9)
LEAST_PODMAN = (4, 4)
LEAST_SYSTEMD = (245,)
LEAST_KERNEL = (4, 18)
"""Python: RHEL 9's own. podman: the first with Quadlet. systemd: RHEL 9 has 252, Ubuntu 20.04 has 245 and enough of user
units. kernel: RHEL 8's, the first that rootless overlay storage came to."""
IMAGE_BYTES = 600 * 1000 * 1000
"""Free space for two images, one of them unpacked twice by an upgrade."""
JOURNAL_BYTES = 200 * 1000 * 1000
"""Free space for two hundred journals of about a megabyte."""
CLOCK_WARNING_S = 5.0
"""Leases do not depend on the clock, but people compare times in logs."""
SHELL_WARNING_S = 0.1
"""A login shell that takes this long adds it to every verb."""
LEAST_SESSIONS = 6
"""Sessions on one connection at the same time: a2a, inference, renew, and verbs beside them."""
LEAST_STARTUPS = 5

Facts = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One requirement and how the machine meets it. ``severity``: ``ok``, ``info``, ``warning`` (works, worse) or
    ``blocker`` (cannot work); ``remedy``: what to do, empty where nothing needs doing."""

    id: str
    severity: str
    expected: str
    got: str
    remedy: str = ""


def examine(facts: Facts, choices: Choices, *, gateway_wall: float, latency_s: float) -> tuple[Finding, ...]:
    """Every requirement with its verdict, in a fixed order.

    Args:
        facts: what ``remote.facts`` says.
        gateway_wall: this computer's clock when the facts were taken, seconds since the epoch.
        latency_s: how inexact that moment is, seconds.
    """
    checks: tuple[Callable[[Facts, Choices], Finding], ...] = (
        _privilege, _python, _system_python, _systemd, _kernel, _podman, _runtime, _mapping, _namespaces, _cgroup, _bus,
        _linger, _account, _disk, _selinux, _landlock, _polkit, _login, _key_file, _startups, _sessions, _shell, _running,
    )  # fmt: skip
    found = [check(facts, choices) for check in checks]
    return (*found, _clock(facts, gateway_wall, latency_s))


def blockers(findings: tuple[Finding, ...], ignored: tuple[str, ...] = ()) -> tuple[Finding, ...]:
    """Those that stop an installation, without the ones an operator has taken responsibility for by id."""
    return tuple(finding for finding in findings if finding.severity == BLOCKER and finding.id not in ignored)


def version(text: str) -> tuple[int, ...]:
    """``(5, 4, 2)`` of ``5.4.2-rc1``; empty for what has no number in front."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _verdict(identity: str, good: bool, expected: str, got: str, remedy: str, severity: str = BLOCKER) -> Finding:
    return Finding(identity, OK, expected, got) if good else Finding(identity, severity, expected, got, remedy)


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _privilege(facts: Facts, choices: Choices) -> Finding:
    admin = facts["admin"]
    return _verdict(
        "privilege", choices.scope != SYSTEM or admin["uid"] == 0, "root, or sudo without a password",
        f"{admin['name']} (uid {admin['uid']})",
        "log in as root, let this administrator use sudo without a password, or install with --user into this account",
    )  # fmt: skip


def _python(facts: Facts, choices: Choices) -> Finding:
    got = facts["python"]["version"]
    remedy = "install a newer python3 (dnf install python3, apt install python3)"
    return _verdict("python", version(got) >= LEAST_PYTHON, f"Python {_dotted(LEAST_PYTHON)} or later", got, remedy)


def _system_python(facts: Facts, choices: Choices) -> Finding:
    got = facts["system_python"]["version"]
    return _verdict(
        "system-python", version(got) >= LEAST_PYTHON, f"/usr/bin/python3 of {_dotted(LEAST_PYTHON)} or later",
        got or "none", "install the distribution's own python3: the agent uses /usr/bin/python3, not one of a user",
    )  # fmt: skip


def _systemd(facts: Facts, choices: Choices) -> Finding:
    got = facts["systemd"]
    return _verdict(
        "systemd", version(got) >= LEAST_SYSTEMD, f"systemd {_dotted(LEAST_SYSTEMD)} or later as the init of the machine",
        got or "another init", "use a distribution of 2020 or later that boots with systemd",
    )  # fmt: skip


def _kernel(facts: Facts, choices: Choices) -> Finding:
    return _verdict(
        "kernel", version(facts["kernel"]) >= LEAST_KERNEL, f"Linux {_dotted(LEAST_KERNEL)} or later", facts["kernel"],
        "boot a newer kernel of the distribution",
    )  # fmt: skip


def _podman(facts: Facts, choices: Choices) -> Finding:
    podman = facts["podman"]
    expected = f"podman {_dotted(LEAST_PODMAN)} or later, with Quadlet"
    if not podman["version"]:
        return _verdict(
            "podman", False, expected, "not installed", "install it (dnf install podman, apt install podman)"
        )
    got = podman["version"] + ("" if podman["generator"] else ", without its Quadlet generator")
    remedy = (
        "upgrade podman: Debian 13, Ubuntu 24.04 and RHEL 9.2 carry one that is new enough, Debian 12 (4.3) does not"
        if podman["generator"]
        else "reinstall podman: its systemd user generator is missing"
    )
    return _verdict("podman", version(podman["version"]) >= LEAST_PODMAN and podman["generator"], expected, got, remedy)


def _runtime(facts: Facts, choices: Choices) -> Finding:
    got = facts["podman"]["runtime"]
    return _verdict("container-runtime", bool(got), "crun or runc", got or "neither", "install crun")


def _mapping(facts: Facts, choices: Choices) -> Finding:
    account = facts["account"]
    ids = account["subuid"] and account["subgid"]
    expected = "newuidmap and newgidmap, and 65536 subordinate ids"
    if not facts["newuidmap"]:
        return _verdict(
            "subordinate-ids", False, expected, "no usable newuidmap", "install uidmap (Debian) or shadow-utils"
        )
    if not ids and choices.scope == SYSTEM:
        return Finding("subordinate-ids", OK, expected, "none yet; the installation adds them")
    name = account["name"]
    return _verdict(
        "subordinate-ids", ids, expected, "enough" if ids else "none in /etc/subuid or /etc/subgid",
        f"have an administrator run: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}",
    )  # fmt: skip


def _namespaces(facts: Facts, choices: Choices) -> Finding:
    good = facts["user_namespaces"]
    return _verdict(
        "user-namespaces", good, "user namespaces without privilege", "allowed" if good else "switched off",
        "sysctl user.max_user_namespaces=15000 (and kernel.unprivileged_userns_clone=1 where it exists), also in /etc/sysctl.d",
    )  # fmt: skip


def _cgroup(facts: Facts, choices: Choices) -> Finding:
    group = facts["cgroup"]
    expected = "cgroup v2 with the controllers memory and pids for user units"
    if not group["unified"]:
        remedy = "boot with systemd.unified_cgroup_hierarchy=1 on the kernel command line"
        return _verdict("cgroup", False, expected, "cgroup v1", remedy)
    have = group["delegated"] or group["controllers"]
    missing = [name for name in ("memory", "pids") if name not in have]
    return _verdict(
        "cgroup", not missing, expected, "without " + " and ".join(missing) if missing else "v2, " + " ".join(have),
        "limits of memory and processes are not enforced; hand the controllers to users: in "
        "/etc/systemd/system/user@.service.d/delegate.conf set [Service] Delegate=cpu memory pids",
        WARNING,
    )  # fmt: skip


def _bus(facts: Facts, choices: Choices) -> Finding:
    good = facts["user_dbus"] and facts["logind"]
    return _verdict(
        "user-bus", good, "a D-Bus for every user, and logind",
        "both" if good else "no user bus" if facts["logind"] else "no logind",
        "install dbus-user-session and libpam-systemd (Debian, Ubuntu) or dbus-daemon (Fedora, RHEL)",
    )  # fmt: skip


def _linger(facts: Facts, choices: Choices) -> Finding:
    account = facts["account"]
    expected = "lingering, so that units run without a login"
    if account["linger"]:
        return Finding("linger", OK, expected, f"enabled for {account['name']}")
    if choices.scope == SYSTEM:
        return Finding("linger", OK, expected, "not yet; the installation enables it")
    remedy = (
        f"if the installation cannot enable it, have an administrator run: loginctl enable-linger {account['name']}"
    )
    return Finding("linger", INFO, expected, "not yet", remedy)


def _account(facts: Facts, choices: Choices) -> Finding:
    account = facts["account"]
    expected = f"user {account['name']}: dedicated, or not there yet"
    if choices.scope != SYSTEM or not account["exists"]:
        return Finding("account", OK, expected, "not there yet" if not account["exists"] else "this account (--user)")
    if facts["installation"] is not None:
        return Finding("account", OK, expected, f"uid {account['uid']}, has an installation")
    got = f"uid {account['uid']}, home {account['home']}, shell {account['shell']}"
    if account["uid"] == 0:
        return _verdict("account", False, expected, got, "choose another --account: the agent never runs as root")
    shell_works = account["shell"].rsplit("/", 1)[-1] not in ("nologin", "false", "")
    return Finding(
        "account", WARNING if shell_works else BLOCKER, expected, got,
        "it is kept as it is" if shell_works else f"sshd needs a shell to run the forced command: usermod -s /bin/sh {account['name']}",
    )  # fmt: skip


def _disk(facts: Facts, choices: Choices) -> Finding:
    disk = facts["disk"]
    wanted = IMAGE_BYTES + JOURNAL_BYTES
    got = f"{disk['free_bytes'] // 1000000} MB on {disk['path']}" + (", read-only" if disk["read_only"] else "")
    return _verdict(
        "disk", disk["free_bytes"] >= wanted and not disk["read_only"],
        f"{wanted // 1000000} MB free where {facts['account']['home']} will be", got, "free space there, or mount a larger disk",
    )  # fmt: skip


def _selinux(facts: Facts, choices: Choices) -> Finding:
    selinux = facts["selinux"]
    expected = "SELinux off, or with the container policy and semanage"
    if selinux["mode"] == "disabled":
        return Finding("selinux", OK, expected, "disabled")
    missing = [] if selinux["container_policy"] else ["container-selinux"]
    if choices.scope == SYSTEM and not selinux["semanage"] and not facts["account"]["home"].startswith("/home/"):
        missing.append("policycoreutils-python-utils")
    return _verdict(
        "selinux", not missing, expected, selinux["mode"] + (f", without {' and '.join(missing)}" if missing else ""),
        f"dnf install {' '.join(missing)}", BLOCKER if selinux["mode"] == "enforcing" else WARNING,
    )  # fmt: skip


def _landlock(facts: Facts, choices: Choices) -> Finding:
    landlock = facts["landlock"]
    return _verdict(
        "landlock", landlock["abi"] >= 1, "Landlock, so that the kernel refuses writes too",
        f"ABI {landlock['abi']}" if landlock["abi"] else f"not there ({landlock['why']})",
        "boot a kernel of 5.13 or later with landlock in its lsm= list; without it only file permissions hold",
        WARNING,
    )  # fmt: skip


def _polkit(facts: Facts, choices: Choices) -> Finding:
    return _verdict(
        "polkit", facts["polkit"], "polkit, for policies that manage units", "there" if facts["polkit"] else "not installed",
        "install polkitd (Debian, Ubuntu) or polkit (Fedora, RHEL) if the policy lets the agent restart units", INFO,
    )  # fmt: skip


def _login(facts: Facts, choices: Choices) -> Finding:
    sshd, name = facts["sshd"], facts["account"]["name"]
    expected = f"sshd lets {name} in with a key"
    if not sshd:
        return Finding("ssh-login", INFO, expected, "the settings of sshd can only be read as root")
    groups = [*facts["account"]["groups"], name] if facts["account"]["exists"] else [name]
    for setting, names, subjects in (
        ("allowusers", sshd.get("allowusers"), [name]),
        ("allowgroups", sshd.get("allowgroups"), groups),
    ):
        if names and not _named(names, subjects):
            remedy = f"add {name} to {'AllowUsers' if setting == 'allowusers' else 'AllowGroups'} in /etc/ssh/sshd_config, reload sshd"
            return _verdict("ssh-login", False, expected, f"{setting} {names}", remedy)
    for setting, names, subjects in (
        ("denyusers", sshd.get("denyusers"), [name]),
        ("denygroups", sshd.get("denygroups"), groups),
    ):
        if names and _named(names, subjects):
            return _verdict("ssh-login", False, expected, f"{setting} {names}", f"take {name} out of it, reload sshd")
    if sshd.get("pubkeyauthentication", "yes") != "yes":
        return _verdict(
            "ssh-login", False, expected, "PubkeyAuthentication no", "set PubkeyAuthentication yes, reload sshd"
        )
    if sshd.get("forcecommand", "none") != "none":
        remedy = f"except {name} from it with a Match block, reload sshd"
        return _verdict("ssh-login", False, expected, f"ForceCommand {sshd['forcecommand']}", remedy)
    return Finding("ssh-login", OK, expected, "it does")


def _named(patterns: str, subjects: list[str]) -> bool:
    """Whether sshd's list names one of the subjects; ``USER@HOST`` counts by its user."""
    return any(fnmatchcase(name, pattern.partition("@")[0]) for pattern in patterns.split() for name in subjects)


def _key_file(facts: Facts, choices: Choices) -> Finding:
    files = facts["sshd"].get("authorizedkeysfile", ".ssh/authorized_keys").split()
    home = facts["account"]["home"]
    good = any(name.replace("%h", home) in (".ssh/authorized_keys", f"{home}/.ssh/authorized_keys") for name in files)
    return _verdict(
        "authorized-keys", good, "sshd reads ~/.ssh/authorized_keys", " ".join(files),
        f"in a Match User {facts['account']['name']} block set AuthorizedKeysFile .ssh/authorized_keys, reload sshd",
    )  # fmt: skip


def _startups(facts: Facts, choices: Choices) -> Finding:
    got = facts["sshd"].get("maxstartups", "")
    start = got.partition(":")[0]
    expected = f"MaxStartups of {LEAST_STARTUPS} or more logins at the same time"
    if not start.isdigit():
        return Finding("max-startups", INFO, expected, got or "unknown")
    return _verdict(
        "max-startups", int(start) >= LEAST_STARTUPS, expected, got, "set MaxStartups 10:30:100 in /etc/ssh/sshd_config, reload sshd",
        WARNING,
    )  # fmt: skip


def _sessions(facts: Facts, choices: Choices) -> Finding:
    got = facts["sshd"].get("maxsessions", "")
    expected = f"MaxSessions of {LEAST_SESSIONS} or more on one connection"
    if not got.isdigit():
        return Finding("max-sessions", INFO, expected, got or "unknown")
    remedy = "set MaxSessions 10 in /etc/ssh/sshd_config, reload sshd"
    return _verdict("max-sessions", int(got) >= LEAST_SESSIONS, expected, got, remedy)


def _shell(facts: Facts, choices: Choices) -> Finding:
    started = facts["account"]["shell_start"]
    expected = f"a login shell that starts within {SHELL_WARNING_S:g} s and prints nothing"
    if choices.scope == SYSTEM or started is None:
        return Finding("login-shell", OK, expected, "/bin/sh, without start-up files")
    if started["output"]:
        remedy = "what it prints would stand in front of every answer: make its start-up files silent for non-interactive shells"
        return _verdict("login-shell", False, expected, f"it prints {started['output']!r}", remedy)
    return _verdict(
        "login-shell", started["seconds"] <= SHELL_WARNING_S, expected, f"{started['seconds']:.2f} s",
        "every verb waits for it: return early from its start-up files when it is not interactive", WARNING,
    )  # fmt: skip


def _running(facts: Facts, choices: Choices) -> Finding:
    running = facts["account"]["running"]
    return _verdict(
        "idle", not running, "no run on this machine", "a run is on" if running else "none", "wait for it, or cancel it"
    )


def _clock(facts: Facts, gateway_wall: float, latency_s: float) -> Finding:
    offset = facts["wall"] - gateway_wall
    return _verdict(
        "clock", abs(offset) <= CLOCK_WARNING_S + latency_s, f"within {CLOCK_WARNING_S:g} s of this computer's clock",
        f"{offset:+.1f} s", "set the time: timedatectl set-ntp true (leases do not depend on it, logs do)", WARNING,
    )  # fmt: skip
