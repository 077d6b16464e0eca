"""Observers of installed software: ``os``, ``pending_reboot``, ``updates``.

Owns: reading os-release, kernel files, reboot marks, and the package managers' own lists.
Deliberately does not know: the network. Lists are read as the machine last fetched them, and their age is said.
"""

from __future__ import annotations

import re
from typing import Dict, List, Optional, Sequence, Tuple

from tools.observers.fields import integer, keyed, unquoted, utc
from tools.observers.observer import Observer, Parameters, Probe, Readings, clean, command, file
from tools.values import JsonObject

_RELEASE = (file("release", "/etc/os-release"), file("vendor-release", "/usr/lib/os-release", optional=True))
# Packages listed by name; the count is of all.
MAX_PACKAGES = 60


def _release(readings: Readings) -> Dict[str, str]:
    """The assignments of os-release(5)."""
    lines = readings.lines("release")
    if lines is None:
        lines = readings.lines("vendor-release")
    return {key: unquoted(value) for key, value in keyed(lines).items()}


def family(release: Dict[str, str]) -> str:
    """``debian``, ``redhat``, ``suse``, ``alpine`` or empty: how the distribution manages packages."""
    words = (release.get("ID", "") + " " + release.get("ID_LIKE", "")).split()
    for name, members in (
        ("debian", ("debian", "ubuntu")),
        ("redhat", ("rhel", "fedora", "centos", "rocky", "almalinux", "ol", "amzn")),
        ("suse", ("suse", "opensuse", "sles", "sled", "sle_hpc", "sle-micro", "opensuse-leap", "opensuse-tumbleweed")),
        ("alpine", ("alpine",)),
    ):
        if any(member in words for member in members):
            return name
    return ""


# --- os -------------------------------------------------------------------------------------------------------------


def _os_first(_parameters: Parameters) -> Sequence[Probe]:
    kernel = "/proc/sys/kernel/"
    return [
        *_RELEASE,
        file("kernel", kernel + "osrelease"),
        file("version", kernel + "version"),
        file("hostname", kernel + "hostname"),
        file("tainted", kernel + "tainted", optional=True),
        command("arch", "uname", "-m"),
        command("virt", "systemd-detect-virt", ok_statuses=(0, 1), optional=True),
        file("container", "/run/systemd/container", optional=True),
        file("podman", "/run/.containerenv", optional=True),
        file("docker", "/.dockerenv", optional=True),
        file("vendor", "/sys/class/dmi/id/sys_vendor", optional=True),
        file("product", "/sys/class/dmi/id/product_name", optional=True),
        file("selinux", "/sys/fs/selinux/enforce", optional=True),
        file("apparmor", "/sys/module/apparmor/parameters/enabled", optional=True),
        file("init", "/proc/1/comm"),
    ]


# Documentation/admin-guide/tainted-kernels of the kernel: the bits that mean trouble, not merely a foreign module.
_TAINTS = {4: "machine check", 5: "bad page", 7: "oops", 9: "warning", 14: "soft lockup"}


def _os_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    release = _release(readings)

    def line(name: str) -> Optional[str]:
        return clean(readings.first_line(name) or "", 120) or None

    container = line("container")
    if container is None and readings.text("podman") is not None:
        container = "podman"
    elif container is None and readings.text("docker") is not None:
        container = "docker"
    taint = integer(readings.first_line("tainted"))
    enforce = readings.first_line("selinux")
    return dict(
        readings.account(["release"] if readings.lines("vendor-release") else []),
        name=clean(release.get("PRETTY_NAME") or release.get("NAME") or "", 120) or None,
        id=clean(release.get("ID", ""), 40) or None,
        version=clean(release.get("VERSION_ID", ""), 40) or None,
        family=family(release) or None,
        support_end=clean(release.get("SUPPORT_END", ""), 20) or None,
        kernel=line("kernel"),
        kernel_build=line("version"),
        architecture=line("arch"),
        hostname=line("hostname"),
        init=line("init"),
        virtualization=line("virt") if readings.first_line("virt") != "none" else None,
        container=container,
        hardware=" ".join(part for part in (line("vendor"), line("product")) if part) or None,
        selinux={"1": "enforcing", "0": "permissive"}.get(enforce or ""),
        apparmor={"Y": True, "N": False}.get(readings.first_line("apparmor") or ""),
        kernel_taints=[name for bit, name in sorted(_TAINTS.items()) if taint >> bit & 1]
        if taint is not None and taint >= 0
        else None,
    )


OS = Observer(
    name="os",
    summary="Operating system, kernel, kind of machine and security modules.",
    returns={
        "name": "distribution and version",
        "id": "short name",
        "version": "version",
        "family": "debian, redhat, suse, alpine",
        "support_end": "day support ends, where the distribution says so",
        "kernel": "running kernel",
        "kernel_build": "its build",
        "architecture": "machine architecture",
        "hostname": "host name",
        "init": "process 1",
        "virtualization": "hypervisor or container system, null if none or not known",
        "container": "kind of container, null if none",
        "hardware": "vendor and product",
        "selinux": "enforcing or permissive",
        "apparmor": "whether it is on",
        "kernel_taints": ["trouble the kernel remembers: oops, machine check, soft lockup, …"],
    },
    first=_os_first,
    read=_os_read,
)


# --- pending_reboot -------------------------------------------------------------------------------------------------


def _reboot_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        *_RELEASE,
        file("kernel", "/proc/sys/kernel/osrelease"),
        file("mark", "/run/reboot-required", optional=True),
        file("packages", "/run/reboot-required.pkgs", optional=True),
        file("suse-mark", "/run/reboot-needed", optional=True),
        command("modules", "find", "/lib/modules/", "-maxdepth", "1", "-mindepth", "1", "-type", "d", optional=True),
    ]


def _reboot_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    if family(_release(readings)) == "redhat":
        return [command("needs", "needs-restarting", "-r", ok_statuses=(0, 1), optional=True)]
    if family(_release(readings)) == "suse":
        # 102: ZYPPER_EXIT_INF_REBOOT_NEEDED
        return [
            command("zypper", "zypper", "--non-interactive", "needs-rebooting", ok_statuses=(0, 102), optional=True)
        ]
    return []


def kernel_order(release: str) -> Optional[Tuple[Tuple[int, ...], str]]:
    """The numbers of a kernel release and its flavour: ``6.1.0-18-amd64`` is ``((6, 1, 0, 18), "amd64")``.

    Only releases of one flavour can be compared. ``None`` if the text is no kernel release.
    """
    # RHEL names its own release in the middle: 5.14.0-427.13.1.el9_4.x86_64
    plain = re.sub(r"\.(?:el|fc|amzn)[0-9]+(?:uek)?(?:_[0-9]+)?", "", release)
    match = re.fullmatch(r"([0-9]+(?:[.-][0-9]+)*)(.*)", plain)
    if match is None or "." not in match.group(1) or len(release) > 100:
        return None
    return tuple(int(part) for part in re.split("[.-]", match.group(1))[:12]), match.group(2).strip("-.+")


def _newest_kernel(running: Optional[str], lines: Optional[Sequence[str]]) -> Optional[str]:
    """The newest installed kernel of the running one's flavour; ``None`` where that cannot be told."""
    mine = kernel_order(running or "")
    if mine is None or lines is None:
        return None
    names = [line.strip().rstrip("/").rpartition("/")[2] for line in lines]
    # A kernel that was not installed as a package (a cloud's own, a container's host) says nothing about the packages.
    best, best_order = running if running in names else None, mine[0]
    for name in names:
        order = kernel_order(name)
        if order is not None and order[1] == mine[1] and order[0] > best_order:
            best, best_order = name, order[0]
    return best


def _reboot_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    running = readings.first_line("kernel")
    modules = readings.lines("modules")
    newest = _newest_kernel(running, modules)
    reasons: List[str] = []
    known = False
    marks = [name for name in ("mark", "suse-mark") if readings.text(name) is not None]
    names = sorted({clean(line, 80) for line in readings.lines("packages") or ()})
    if marks:
        reasons.append("the distribution's reboot mark is set" + (" by " + ", ".join(names[:10]) if names else ""))
    if newest and running and newest != running:
        reasons.append("kernel %s is installed, %s is running" % (clean(newest, 80), clean(running, 80)))
    needs, zypper = readings.result("needs"), readings.result("zypper")
    if needs is not None and not readings.problem("needs"):
        known = True
        if needs.exit_status == 1:
            listed = [
                clean(line.strip().lstrip("* "), 80)
                for line in readings.lines("needs") or ()
                if line.lstrip().startswith("*")
            ]
            reasons.append("needs-restarting: " + (", ".join(listed[:10]) or "yes"))
            names = sorted(set(names) | set(listed))
    if zypper is not None and not readings.problem("zypper"):
        known = True
        if zypper.exit_status == 102:
            reasons.append("zypper: core libraries or services were updated")
    kernels = bool(modules) and newest is not None
    distribution = family(_release(readings))
    # Debian and Ubuntu write the mark by themselves where the package that does so is installed; its absence alone is
    # no proof, a kernel comparison is.
    known = known or kernels
    account = readings.account()
    if not reasons and not known:
        reason = "there is no package of the running kernel under /lib/modules to compare with (a container has none)"
        account["unavailable"].append({"probe": "installed kernels", "reason": reason})
    return dict(
        account,
        required=True if reasons else False if known else None,
        reasons=reasons,
        packages=names[:MAX_PACKAGES],
        running_kernel=clean(running, 100) if running else None,
        newest_kernel=clean(newest, 100) if newest and kernels else None,
        distribution_family=distribution or None,
    )


PENDING_REBOOT = Observer(
    name="pending_reboot",
    summary="Whether the machine waits for a reboot, and why.",
    returns={
        "required": "true, false, or null where nothing on the machine tells",
        "reasons": ["text"],
        "packages": ["package"],
        "running_kernel": "release",
        "newest_kernel": "newest installed of the same flavour",
        "distribution_family": "family",
    },
    first=_reboot_first,
    further=_reboot_further,
    read=_reboot_read,
)


# --- updates --------------------------------------------------------------------------------------------------------


def _updates_first(_parameters: Parameters) -> Sequence[Probe]:
    return [*_RELEASE, command("now", "date", "+%s")]


def _updates_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    group = family(_release(readings))
    if group == "debian":
        return [
            command("list", "apt", "list", "--upgradable", output_bytes=524288),
            command("age", "stat", "-c", "%Y", "/var/lib/apt/lists", optional=True),
            command(
                "lists",
                "find",
                "/var/lib/apt/lists",
                "-maxdepth",
                "1",
                "-name",
                "*Release",
                optional=True,
                partial=True,
            ),
        ]
    if group == "redhat":
        # -C: from the cache only. 100: there are updates.
        probes = [command("list", "dnf", "-q", "-C", "check-update", ok_statuses=(0, 100), output_bytes=524288)]
        if "list" in readings and not readings.problem("list"):
            probes.append(
                command(
                    "security",
                    "dnf",
                    "-q",
                    "-C",
                    "updateinfo",
                    "list",
                    "--security",
                    optional=True,
                    output_bytes=524288,
                )
            )
        elif "list" in readings and readings.missing("list"):
            probes.append(command("yum", "yum", "-q", "-C", "check-update", ok_statuses=(0, 100), output_bytes=524288))
        return probes
    if group == "suse":
        return [
            command(
                "list", "zypper", "--non-interactive", "--no-refresh", "--quiet", "list-updates", output_bytes=524288
            ),
            command(
                "security",
                "zypper",
                "--non-interactive",
                "--no-refresh",
                "--quiet",
                "list-patches",
                "--category",
                "security",
                optional=True,
                output_bytes=524288,
            ),
        ]
    if group == "alpine":
        return [command("list", "apk", "list", "--upgradable", output_bytes=524288)]
    return []


def _package(name: str, version: str, installed: Optional[str], source: str, security: Optional[bool]) -> JsonObject:
    return {
        "name": clean(name, 100),
        "version": clean(version, 80),
        "installed": clean(installed, 80) if installed else None,
        "source": clean(source, 120) or None,
        "security": security,
    }


_APT = re.compile(r"([a-z0-9][a-z0-9.+-]{1,120})/(\S+) (\S+) (\S+) \[upgradable from: (\S+)\]")


def _apt(lines: Sequence[str]) -> List[JsonObject]:
    rows = []
    for line in lines:
        match = _APT.fullmatch(line.strip())
        if match:
            suites = match.group(2)
            rows.append(_package(match.group(1), match.group(3), match.group(5), suites, "-security" in suites))
    return rows


_DNF = re.compile(r"(\S+)\.(noarch|x86_64|i686|aarch64|ppc64le|s390x|riscv64)\s+([0-9]\S*)\s+(\S+)")


def _dnf(lines: Sequence[str], advisories: Optional[Sequence[str]], complete: bool) -> List[JsonObject]:
    """Packages with updates; ``complete``: whether the advisories are all, so that a missing one means something."""
    security = None
    if advisories is not None:
        # "RHSA-2024:1234 Important/Sec. openssl-1:3.0.7-27.el9.x86_64"
        security = {line.split()[-1].rpartition("-")[0].rpartition("-")[0] for line in advisories if line.split()}
    rows = []
    for line in lines:
        if line.startswith("Obsoleting Packages"):
            break
        match = _DNF.fullmatch(line.strip())
        if match:
            known = None if security is None else match.group(1) in security or (False if complete else None)
            rows.append(_package(match.group(1), match.group(3), None, match.group(4), known))
    return rows


def _zypper(lines: Sequence[str]) -> List[JsonObject]:
    rows = []
    for line in lines:
        # "v | SLE-Module-Basesystem15-SP5-Updates | bash | 4.4-150400.25.22 | 4.4-150400.27.1 | x86_64"
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6 and cells[0] in ("v", "i", "") and cells[2] not in ("", "Name") and cells[4][:1].isdigit():
            rows.append(_package(cells[2], cells[4], cells[3], cells[1], None))
    return rows


_APK = re.compile(r"(\S+)-([0-9][^-\s]*-r[0-9]+) (\S+) \{(\S+)\} .*\[upgradable from: \S+?-([0-9][^-\s]*-r[0-9]+)\]")


def _apk(lines: Sequence[str]) -> List[JsonObject]:
    found = [_APK.fullmatch(line.strip()) for line in lines]
    return [_package(m.group(1), m.group(2), m.group(5), "", None) for m in found if m]


def _updates_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    group = family(_release(readings))
    name = "yum" if "yum" in readings else "list"
    lines = readings.lines(name)
    account = readings.account(
        ["release"] if readings.lines("vendor-release") else ["list"] if "yum" in readings else []
    )
    if group == "debian" and lines is not None and not readings.lines("lists"):
        # apt says "nothing to upgrade" when it knows of no repository at all.
        lines = None
        account["unavailable"].append(
            {"probe": "apt list", "reason": "there is no package list here; apt update was never run"}
        )
    rows: List[JsonObject] = []
    security: Optional[int] = None
    if lines is not None and group == "debian":
        rows = _apt(lines)
        security = sum(bool(row["security"]) for row in rows)
    elif lines is not None and group == "redhat":
        advisories = readings.lines("security")
        complete = advisories is not None and not readings.was_cut("security")
        rows = _dnf(lines, advisories, complete)
        security = sum(bool(row["security"]) for row in rows) if complete else None
    elif lines is not None and group == "suse":
        rows = _zypper(lines)
        patches = readings.lines("security")
        if patches is not None and not readings.was_cut("security"):
            security = sum(len(line.split("|")) >= 7 and line.split("|")[2].strip() == "security" for line in patches)
    elif lines is not None and group == "alpine":
        rows = _apk(lines)
    now, fetched = integer(readings.first_line("now")), integer(readings.first_line("age"))
    rows.sort(key=lambda row: (not row["security"], row["name"]))
    managers = {"debian": "apt", "redhat": "yum" if name == "yum" else "dnf", "suse": "zypper", "alpine": "apk"}
    if not group and _release(readings):
        account["unavailable"].append(
            {"probe": "package manager", "reason": "no known package manager for this distribution"}
        )
    return dict(
        account,
        manager=managers.get(group),
        count=len(rows) if lines is not None else None,
        security=security,
        packages=rows[:MAX_PACKAGES] if lines is not None else None,
        names=[row["name"] for row in rows[:10]] if lines is not None else None,
        lists_age_s=max(0, now - fetched) if now is not None and fetched is not None else None,
        lists_fetched_at=utc(fetched),
    )


UPDATES = Observer(
    name="updates",
    summary="Package updates that wait, as of the lists the machine last fetched.",
    returns={
        "manager": "apt, dnf, yum, zypper or apk",
        "count": "packages with an update",
        "security": "of them for security (zypper: security patches), null where it does not tell",
        "packages": [
            {
                "name": "package",
                "version": "available",
                "installed": "installed",
                "source": "repository or suite",
                "security": "a security update, null where it does not tell",
            }
        ],
        "names": ["the first ten names"],
        "lists_age_s": "age of the lists",
        "lists_fetched_at": "UTC",
    },
    first=_updates_first,
    further=_updates_further,
    read=_updates_read,
)
