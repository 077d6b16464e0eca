"""Observers of hardware: ``cpu_info`` and ``hardware_errors``, and of people: ``users_logged_in``.

Owns: reading ``lscpu``, EDAC counters, ``/proc/mdstat``, ZFS and Btrfs state files, sessions.
Deliberately does not know: SMART values of disks, which only root can read.
"""

from __future__ import annotations

import re
from typing import Any, Dict, List, Optional, Sequence

from tools.observers.fields import document, integer, number, objects, size_of_list, string
from tools.observers.journal import kernel_first, kernel_further, kernel_rows, topic_of
from tools.observers.observer import Observer, Parameters, Probe, Readings, clean, command, file
from tools.values import JsonObject

# --- cpu_info -------------------------------------------------------------------------------------------------------


def _cpu_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        command("lscpu", "lscpu", "-J"),
        file("online", "/sys/devices/system/cpu/online", optional=True),
        file("throttled", "/sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", optional=True),
        file("governor", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", optional=True),
    ]


def _cpu_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    return (
        []
        if _lscpu(readings)
        else [file("cpuinfo", "/proc/cpuinfo", output_bytes=131072), command("arch", "uname", "-m")]
    )


def _lscpu(readings: Readings) -> Dict[str, str]:
    """Field to value of ``lscpu -J``; newer versions nest fields below ``children``."""
    found: Dict[str, str] = {}
    top = document(readings.text("lscpu"))
    waiting: List[Any] = objects(top.get("lscpu")) if isinstance(top, dict) else []
    while waiting:
        item = waiting.pop(0)
        field, value = string(item.get("field")), string(item.get("data"))
        if field is not None and value is not None:
            found.setdefault(field.rstrip(":"), value)
        children = objects(item.get("children"))
        if field == "Vulnerabilities:":
            # Flat listings say "Vulnerability Mds", nested ones only "Mds" below this group.
            children = [dict(child, field="Vulnerability %s" % string(child.get("field"))) for child in children]
        waiting = children + waiting
    return found


def _cpu_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    found = _lscpu(readings)
    info: Dict[str, str] = {}
    for line in readings.lines("cpuinfo") or ():
        key, colon, value = line.partition(":")
        if colon:
            info.setdefault(key.strip(), value.strip())
    vulnerable = [
        clean(field[len("Vulnerability ") :], 60)
        for field, value in found.items()
        if field.startswith("Vulnerability ") and value.startswith("Vulnerable")
    ]
    model = found.get("Model name") or info.get("model name") or info.get("Hardware") or ""
    architecture = found.get("Architecture") or readings.first_line("arch") or ""
    return dict(
        readings.account(["lscpu"] if info else []),
        model=clean(model, 120) or None,
        architecture=clean(architecture, 40) or None,
        cpus=size_of_list(readings.first_line("online")) or integer(found.get("CPU(s)")),
        sockets=integer(found.get("Socket(s)")),
        cores_per_socket=integer(found.get("Core(s) per socket")),
        threads_per_core=integer(found.get("Thread(s) per core")),
        max_mhz=number(found.get("CPU max MHz")),
        hypervisor=clean(found.get("Hypervisor vendor", ""), 60) or None,
        vulnerable=sorted(vulnerable) if found else None,
        throttled=integer(readings.first_line("throttled")),
        governor=clean(readings.first_line("governor") or "", 40) or None,
    )


CPU_INFO = Observer(
    name="cpu_info",
    summary="Processors: model, count, hypervisor, open vulnerabilities, throttling.",
    returns={
        "model": "model",
        "architecture": "architecture",
        "cpus": "online",
        "sockets": "sockets",
        "cores_per_socket": "cores",
        "threads_per_core": "threads",
        "max_mhz": "highest clock",
        "hypervisor": "vendor",
        "vulnerable": ["vulnerability the kernel does not mitigate"],
        "throttled": "times throttled by heat since boot",
        "governor": "frequency governor",
    },
    first=_cpu_first,
    further=_cpu_further,
    read=_cpu_read,
)


# --- hardware_errors ------------------------------------------------------------------------------------------------

# State files read at most: 64 probes less those of the first phase and of the kernel's messages.
MAX_STATE_FILES = 40


def _errors_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        file("mdstat", "/proc/mdstat", optional=True),
        command(
            "files",
            "find",
            "/sys/devices/system/edac/mc",
            "/sys/fs/btrfs",
            "/proc/spl/kstat/zfs",
            "-maxdepth",
            "4",
            "-name",
            "ce_count",
            "-o",
            "-name",
            "ue_count",
            "-o",
            "-name",
            "error_stats",
            "-o",
            "-name",
            "state",
            partial=True,
            optional=True,
        ),
        *kernel_first("err", "--boot"),
    ]


_STATE_FILE = re.compile(
    r"/sys/devices/system/edac/mc/mc[0-9]+/(?:ce|ue)_count|/sys/fs/btrfs/[0-9a-f-]{36}/devinfo/[0-9]+/error_stats"
    r"|/proc/spl/kstat/zfs/[A-Za-z0-9_.:-]+/state"
)


def _errors_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    paths = [line for line in readings.lines("files") or () if _STATE_FILE.fullmatch(line)]
    return [file("state:" + path, path, optional=True) for path in paths[:MAX_STATE_FILES]] + kernel_further(readings)


_MD = re.compile(r"(md\S{1,60}) : (\S+)(?: \((?:auto-)?read-only\))?(.*)")


def md_arrays(lines: Optional[Sequence[str]]) -> List[JsonObject]:
    """The software RAID arrays of ``/proc/mdstat``, md(4)."""
    rows: List[JsonObject] = []
    for line in lines or ():
        head = _MD.fullmatch(line)
        if head:
            words = head.group(3).split()
            level = words[0] if words and "[" not in words[0] else None
            failed = [clean(word.partition("[")[0], 40) for word in words if word.endswith("(F)")]
            rows.append(
                {
                    "name": clean(head.group(1), 60),
                    "state": clean(head.group(2), 40),
                    "level": clean(level, 20) if level else None,
                    "members_wanted": None,
                    "members_working": None,
                    "failed": failed,
                    "degraded": None if not failed else True,
                    "action": None,
                    "progress_percent": None,
                }
            )
        elif rows and line[:1].isspace():
            counts = re.search(r"\[([0-9]{1,4})/([0-9]{1,4})\]", line)
            if counts:
                wanted, working = int(counts.group(1)), int(counts.group(2))
                rows[-1].update(members_wanted=wanted, members_working=working, degraded=working < wanted)
            action = re.search(r"(recovery|resync|reshape|check|repair) *= *([0-9.]{1,6})%", line)
            if action:
                rows[-1].update(action=action.group(1), progress_percent=number(action.group(2)))
    return rows


def _errors_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    controllers: Dict[str, Dict[str, Optional[int]]] = {}
    pools: List[JsonObject] = []
    devices: List[JsonObject] = []
    answered: List[str] = []
    for name in readings.names("state:"):
        path, first = name[6:], readings.first_line(name)
        if path.endswith("e_count"):
            controller = controllers.setdefault(path.split("/")[6], {})
            controller[path.rpartition("/")[2][:2]] = integer(first)
        elif path.endswith("/state") and first is not None:
            pools.append({"pool": clean(path.split("/")[5], 60), "state": clean(first, 40)})
        elif path.endswith("/error_stats") and readings.lines(name) is not None:
            counts = [integer(line.split()[1]) for line in readings.lines(name) or () if len(line.split()) == 2]
            total = sum(count for count in counts if count)
            devices.append({"filesystem": path.split("/")[4], "device": path.split("/")[6], "errors": total})
    # find says 1 where one of the folders is not there, which is the ordinary case.
    files = readings.result("files")
    if files is not None and readings.missing("files"):
        answered.append("files")
    rows, origin, account = kernel_rows(readings, 3)
    wanted = ("processor", "storage")
    messages = [row for row in rows or () if topic_of(row["message"]) in wanted]
    if "files" in answered:
        account["unavailable"] = [entry for entry in account["unavailable"] if not entry["probe"].startswith("find ")]
    listed = sorted(controllers)
    arrays = md_arrays(readings.lines("mdstat"))
    no_arrays = readings.problem("mdstat") and not readings.missing("mdstat")
    no_files = readings.problem("files") and not readings.missing("files")
    return dict(
        account,
        memory_controllers=[
            {"controller": name, "corrected": controllers[name].get("ce"), "uncorrected": controllers[name].get("ue")}
            for name in listed
        ],
        memory_corrected=sum(controllers[name].get("ce") or 0 for name in listed) if listed else None,
        memory_uncorrected=sum(controllers[name].get("ue") or 0 for name in listed) if listed else None,
        arrays=None if no_arrays else arrays,
        degraded_arrays=None if no_arrays else [row["name"] for row in arrays if row["degraded"]],
        zfs_pools=None if no_files else pools,
        btrfs_devices=None if no_files else devices,
        messages_origin=origin or None,
        kernel_errors=None if rows is None else len(messages),
        messages=None
        if rows is None
        else [{"at": row["at"], "topic": topic_of(row["message"]), "message": row["message"]} for row in messages[:20]],
    )


HARDWARE_ERRORS = Observer(
    name="hardware_errors",
    summary="Memory errors (EDAC), RAID, ZFS and Btrfs state, and kernel errors about processors and disks of this boot. "
    "SMART values are not among them: only root can read them.",
    returns={
        "memory_controllers": [
            {"controller": "name", "corrected": "errors corrected", "uncorrected": "errors not corrected"}
        ],
        "memory_corrected": "null without ECC counters",
        "memory_uncorrected": "null without ECC counters",
        "arrays": [
            {
                "name": "array",
                "state": "active, inactive, …",
                "level": "raid1, …",
                "members_wanted": "disks it should have",
                "members_working": "disks that work",
                "failed": ["device"],
                "degraded": "some are missing or failed",
                "action": "recovery, resync, reshape, check",
                "progress_percent": "of that",
            }
        ],
        "degraded_arrays": ["array"],
        "zfs_pools": [{"pool": "name", "state": "ONLINE, DEGRADED, FAULTED, …"}],
        "btrfs_devices": [
            {"filesystem": "id", "device": "number", "errors": "read, write, flush, corruption, generation"}
        ],
        "messages_origin": "journal or dmesg",
        "kernel_errors": "how many in this boot",
        "messages": [{"at": "UTC", "topic": "processor or storage", "message": "text (untrusted)"}],
    },
    first=_errors_first,
    further=_errors_further,
    read=_errors_read,
)


# --- users_logged_in ------------------------------------------------------------------------------------------------


def _users_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        command("who", "who"),
        command("sessions", "loginctl", "list-sessions", "--no-legend", "--no-pager", optional=True),
    ]


_WHO = re.compile(
    r"(\S{1,64}) +(?:[+-] +)?(\S{1,40}) +"
    r"([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}|[A-Z][a-z]{2} +[0-9]{1,2} [0-9]{2}:[0-9]{2})"
    r"(?: +.*?)?(?: *\(([^)]{1,200})\))?"
)


def _users_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    rows: List[JsonObject] = []
    for line in readings.lines("who") or ():
        match = _WHO.fullmatch(line.strip()[:400])
        if match:
            rows.append(
                {
                    "user": clean(match.group(1), 64),
                    "terminal": clean(match.group(2), 40),
                    "since": match.group(3),
                    "from": clean(match.group(4), 200) if match.group(4) else None,
                }
            )
    sessions = readings.lines("sessions")
    for line in sessions or ():
        words = line.split()
        # "  12 1000 alice seat0 tty2": who does not know sessions without a terminal, and is gone on some systems.
        if len(words) >= 3 and integer(words[1]) is not None and not any(row["user"] == words[2] for row in rows):
            terminal = next((word for word in words[3:] if word.startswith(("tty", "pts"))), None)
            rows.append(
                {
                    "user": clean(words[2], 64),
                    "terminal": clean(terminal, 40) if terminal else None,
                    "since": None,
                    "from": None,
                }
            )
    observed = readings.lines("who") is not None or sessions is not None
    return dict(
        readings.account([name for name in ("who", "sessions") if observed and readings.problem(name)]),
        sessions=rows if observed else None,
        count=len(rows) if observed else None,
        users=sorted({row["user"] for row in rows}) if observed else None,
    )


USERS_LOGGED_IN = Observer(
    name="users_logged_in",
    summary="Who is logged in, since when and from where.",
    returns={
        "sessions": [
            {"user": "account", "terminal": "terminal", "since": "local time of the machine", "from": "address or name"}
        ],
        "count": "sessions",
        "users": ["account"],
    },
    first=_users_first,
    read=_users_read,
)
