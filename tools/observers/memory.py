"""Observers of memory and processor time: ``memory``, ``load``, ``top_processes``, ``kernel_limits``.

Owns: reading ``/proc/meminfo``, pressure (PSI), control-group limits, ``ps`` and ``top``.
Deliberately does not know: thresholds, and the arguments of processes (they may hold secrets, so only names are shown).
"""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

from tools.observers.fields import integer, keyed, number, percent, ratio, size_of_list
from tools.observers.observer import Observer, Parameter, Parameters, Probe, Readings, clean, command, file
from tools.values import JsonObject

# Control groups of version 1 say "no limit" with a number near 2^63.
_UNLIMITED = 1 << 60


# --- memory ---------------------------------------------------------------------------------------------------------


def _memory_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        file("meminfo", "/proc/meminfo"),
        file("limit", "/sys/fs/cgroup/memory.max", optional=True),
        file("current", "/sys/fs/cgroup/memory.current", optional=True),
        file("limit-v1", "/sys/fs/cgroup/memory/memory.limit_in_bytes", optional=True),
        file("current-v1", "/sys/fs/cgroup/memory/memory.usage_in_bytes", optional=True),
    ]


def _memory_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    values: Dict[str, int] = {}
    for name, text in keyed(readings.lines("meminfo"), ":").items():
        words = text.split()
        amount = integer(words[0]) if words else None
        if amount is not None and amount >= 0:
            values[name] = amount * 1024 if words[1:] == ["kB"] else amount
    total, available = values.get("MemTotal"), values.get("MemAvailable")
    swap_total, swap_free = values.get("SwapTotal"), values.get("SwapFree")
    used = total - available if total is not None and available is not None else None
    swap_used = swap_total - swap_free if swap_total is not None and swap_free is not None else None
    limit = integer(readings.first_line("limit")) or integer(readings.first_line("limit-v1"))
    current = integer(readings.first_line("current"))
    if current is None:
        current = integer(readings.first_line("current-v1"))
    if limit is not None and (limit >= _UNLIMITED or (total is not None and limit >= total)):
        limit = None
    return dict(
        readings.account(),
        total_bytes=total,
        available_bytes=available,
        used_bytes=used,
        used_percent=percent(used, total),
        buffers_and_cache_bytes=values["Buffers"] + values["Cached"] if {"Buffers", "Cached"} <= set(values) else None,
        shared_bytes=values.get("Shmem"),
        kernel_unreclaimable_bytes=values.get("SUnreclaim"),
        kernel_unreclaimable_percent=percent(values.get("SUnreclaim"), total),
        dirty_bytes=values.get("Dirty"),
        committed_percent=percent(values.get("Committed_AS"), values.get("CommitLimit")),
        swap_total_bytes=swap_total,
        swap_used_bytes=swap_used,
        swap_used_percent=percent(swap_used, swap_total),
        group_limit_bytes=limit,
        group_used_bytes=current if limit is not None else None,
        group_used_percent=percent(current, limit),
    )


MEMORY = Observer(
    name="memory",
    summary="Memory, swap and, in a container, the limit of its control group.",
    returns={
        "total_bytes": "memory of the machine",
        "available_bytes": "available without swapping",
        "used_bytes": "not available",
        "used_percent": "not available",
        "buffers_and_cache_bytes": "page cache",
        "shared_bytes": "tmpfs and shared memory",
        "kernel_unreclaimable_bytes": "kernel memory that cannot be freed",
        "kernel_unreclaimable_percent": "of all memory",
        "dirty_bytes": "waiting to be written",
        "committed_percent": "promised to processes, of what the kernel would promise",
        "swap_total_bytes": "swap, 0 where there is none",
        "swap_used_bytes": "swap in use",
        "swap_used_percent": "swap in use, null without swap",
        "group_limit_bytes": "memory limit of this container",
        "group_used_bytes": "used of it",
        "group_used_percent": "used of it",
    },
    first=_memory_first,
    read=_memory_read,
)


# --- load -----------------------------------------------------------------------------------------------------------

_RESOURCES = ("cpu", "memory", "io")


def _load_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        file("loadavg", "/proc/loadavg"),
        file("online", "/sys/devices/system/cpu/online", optional=True),
        file("stat", "/proc/stat", output_bytes=262144),
        *(file("psi-" + resource, "/proc/pressure/" + resource, optional=True) for resource in _RESOURCES),
    ]


def _pressure(lines: Optional[List[str]]) -> Optional[JsonObject]:
    """``some``/``full`` averages of a PSI file, percent of time; ``None`` where the kernel has none."""
    found: Dict[str, Optional[float]] = {}
    for line in lines or ():
        kind, _, rest = line.partition(" ")
        for word in rest.split():
            name, _, value = word.partition("=")
            if kind in ("some", "full") and name in ("avg10", "avg60", "avg300"):
                found["%s_%s_percent" % (kind, name)] = number(value)
    if found.get("some_avg10_percent") is None:
        return None
    names = ["%s_%s_percent" % (kind, span) for kind in ("some", "full") for span in ("avg10", "avg60", "avg300")]
    return {name: found.get(name) for name in names}


def _load_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    words = (readings.first_line("loadavg") or "").split()
    averages = [number(word) for word in words[:3]] if len(words) >= 5 else [None, None, None]
    running, _, total = words[3].partition("/") if len(words) >= 5 else ("", "", "")
    stat = readings.lines("stat")
    processors = size_of_list(readings.first_line("online"))
    if processors is None and stat is not None:
        processors = sum(line.startswith("cpu") and line[3:4].isdigit() for line in stat) or None
    blocked = next((integer(line[14:]) for line in stat or () if line.startswith("procs_blocked ")), None)
    pressure = {resource: _pressure(readings.lines("psi-" + resource)) for resource in _RESOURCES}
    # The files are there and refuse to be read where PSI is switched off (psi=0, the default of RHEL 8).
    switched_off = [name for name in readings.names("psi-") if "not supported" in readings.problem(name)]
    return dict(
        readings.account(switched_off),
        load1=averages[0],
        load5=averages[1],
        load15=averages[2],
        load5_per_cpu=ratio(averages[1], processors),
        load15_per_cpu=ratio(averages[2], processors),
        cpus=processors,
        tasks_running=integer(running),
        tasks_blocked=blocked,
        tasks_total=integer(total),
        pressure=pressure if any(pressure.values()) else None,
    )


_PRESSURE = {
    "some_avg10_percent": "of the last 10 s something waited",
    "some_avg60_percent": "of the last 60 s",
    "some_avg300_percent": "of the last 300 s",
    "full_avg10_percent": "of the last 10 s everything waited",
    "full_avg60_percent": "of the last 60 s",
    "full_avg300_percent": "of the last 300 s",
}

LOAD = Observer(
    name="load",
    summary="Load averages, waiting tasks and pressure (PSI) on processor, memory and disks.",
    returns={
        "load1": "average of the last minute",
        "load5": "5 minutes",
        "load15": "15 minutes",
        "load5_per_cpu": "for each processor",
        "load15_per_cpu": "for each processor",
        "cpus": "processors online",
        "tasks_running": "runnable now",
        "tasks_blocked": "waiting for a disk or file server now",
        "tasks_total": "threads",
        "pressure": dict.fromkeys(_RESOURCES, _PRESSURE),
    },
    first=_load_first,
    read=_load_read,
)


# --- top_processes --------------------------------------------------------------------------------------------------

_PS = "pid=,ppid=,user:32=,stat=,pcpu=,rss=,etimes=,nlwp="


def _top_first(parameters: Parameters) -> Sequence[Probe]:
    probes = [command("ps-unit", "ps", "-eo", _PS + ",unit:80=,comm=", output_bytes=524288)]
    if parameters["by"] == "cpu":
        # ps knows only the average over a process' whole life; the second round of top is about now.
        probes.append(command("top", "top", "-b", "-i", "-n", "2", "-d", "1", "-w", "512", output_bytes=262144))
    return probes


def _top_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    more: List[Probe] = []
    if readings.lines("ps-unit") is None:
        more.append(command("ps-plain", "ps", "-o", "pid,ppid,user,stat,rss,comm", output_bytes=524288))
    if "top" in readings and readings.lines("top") is None:
        more.append(command("top-plain", "top", "-b", "-n", "2", "-d", "1", output_bytes=524288))
    return more


def _scaled(text: str) -> Optional[int]:
    """Bytes of a busybox size such as ``1480`` (KiB), ``12m`` or ``1.2g``."""
    factor = {"m": 1 << 20, "g": 1 << 30, "t": 1 << 40}.get(text[-1:].lower())
    amount = number(text[:-1]) if factor else number(text)
    return int(amount * (factor or 1024)) if amount is not None and 0 <= amount < 1e12 else None


def _processes(readings: Readings) -> Optional[Dict[int, JsonObject]]:
    """Every process by its id."""
    lines = readings.lines("ps-unit")
    found: Dict[int, JsonObject] = {}
    for line in lines or ():
        words = line.split(None, 9)
        if len(words) != 10 or integer(words[0]) is None:
            continue
        resident, age, threads = integer(words[5]), integer(words[6]), integer(words[7])
        share = number(words[4])
        if resident is None or age is None or threads is None or share is None:
            continue
        found[int(words[0])] = {
            "pid": int(words[0]),
            "parent_pid": integer(words[1]),
            "name": clean(words[9], 80),
            "user": clean(words[2], 40),
            "state": clean(words[3], 10),
            "cpu_percent": None,
            "cpu_lifetime_percent": share,
            "resident_bytes": resident * 1024,
            "age_s": age,
            "threads": threads,
            "unit": None if words[8] == "-" else clean(words[8], 120),
        }
    if lines is not None:
        return found
    lines = readings.lines("ps-plain")
    for line in lines or ():
        words = line.split(None, 5)
        if len(words) != 6 or integer(words[0]) is None:
            continue
        found[int(words[0])] = {
            "pid": int(words[0]),
            "parent_pid": integer(words[1]),
            "name": clean(words[5], 80),
            "user": clean(words[2], 40),
            "state": clean(words[3], 10),
            "cpu_percent": None,
            "cpu_lifetime_percent": None,
            "resident_bytes": _scaled(words[4]),
            "age_s": None,
            "threads": None,
            "unit": None,
        }
    return None if lines is None else found


def _second_round(lines: Optional[List[str]]) -> Optional[Tuple[Dict[int, float], Dict[str, float]]]:
    """Percent of one processor by process id, and the processor's own split, from the second round of ``top``."""
    rounds: List[List[str]] = []
    for line in lines or ():
        if line.startswith(("top - ", "Mem: ")):
            rounds.append([])
        if rounds:
            rounds[-1].append(line)
    if len(rounds) < 2:
        return None
    shares: Dict[int, float] = {}
    split: Dict[str, float] = {}
    columns: List[str] = []
    for line in rounds[1]:
        words = line.split()
        if line.startswith(("%Cpu", "CPU:")):
            # "%Cpu(s):  1.5 us,  0.5 sy" and, from busybox, "CPU:   0% usr   0% sys"
            spaced = line.partition(":")[2].replace("%", " ").replace(",", " ").split()
            for value, name in zip(spaced[::2], spaced[1::2]):
                amount = number(value)
                if amount is not None:
                    split[name] = amount
        elif "PID" in words and "%CPU" in words:
            columns = words
        elif columns and len(words) >= len(columns):
            pid = integer(words[columns.index("PID")])
            share = number(words[columns.index("%CPU")].rstrip("%"))
            if pid is not None and share is not None:
                shares[pid] = share
    return (shares, split) if columns else None


def _top_read(readings: Readings, parameters: Parameters) -> JsonObject:
    processes = _processes(readings)
    now = _second_round(readings.lines("top")) or _second_round(readings.lines("top-plain"))
    rows = list((processes or {}).values())
    if now is not None:
        for row in rows:
            # top -i leaves out what did nothing.
            row["cpu_percent"] = now[0].get(row["pid"], 0.0)
    if parameters["by"] == "cpu":
        rows.sort(key=lambda row: (-(row["cpu_percent"] or 0.0), -(row["cpu_lifetime_percent"] or 0.0), row["pid"]))
    else:
        rows.sort(key=lambda row: (-(row["resident_bytes"] or 0), row["pid"]))
    split = now[1] if now else {}
    answered = [name for name, plain in (("ps-unit", "ps-plain"), ("top", "top-plain")) if readings.lines(plain)]
    observed = processes is not None
    return dict(
        readings.account(answered),
        processes=rows[: parameters["count"]] if observed else None,
        first=dict(rows[0]) if rows else None,
        total=len(rows) if observed else None,
        uninterruptible=sum(row["state"].startswith("D") for row in rows) if observed else None,
        zombies=sum(row["state"].startswith("Z") for row in rows) if observed else None,
        idle_percent=split.get("id", split.get("idle")),
        io_wait_percent=split.get("wa", split.get("io")),
        stolen_percent=split.get("st"),
    )


_PROCESS = {
    "pid": "process id",
    "parent_pid": "parent",
    "name": "name (arguments are not shown: they may hold secrets)",
    "user": "owner",
    "state": "state letters of ps",
    "cpu_percent": "of one processor, over the last second",
    "cpu_lifetime_percent": "of one processor, over its whole life",
    "resident_bytes": "memory in use",
    "age_s": "since it was started",
    "threads": "threads",
    "unit": "systemd unit",
}

TOP_PROCESSES = Observer(
    name="top_processes",
    summary="The processes that use most processor time or memory.",
    parameters=(
        Parameter("by", "choice", "What to order by.", default="cpu", choices=("cpu", "memory")),
        Parameter("count", "integer", "How many to list.", default=10, minimum=1, maximum=50),
    ),
    returns={
        "processes": [_PROCESS],
        "first": _PROCESS,
        "total": "processes",
        "uninterruptible": "processes waiting for a disk or file server",
        "zombies": "ended, not collected by their parent",
        "idle_percent": "processor time, last second",
        "io_wait_percent": "idle with a disk request open",
        "stolen_percent": "taken by the hypervisor for others",
    },
    first=_top_first,
    further=_top_further,
    read=_top_read,
)


# --- kernel_limits --------------------------------------------------------------------------------------------------


def _limits_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        file("files", "/proc/sys/fs/file-nr"),
        file("loadavg", "/proc/loadavg"),
        file("threads", "/proc/sys/kernel/threads-max"),
        file("pids", "/proc/sys/kernel/pid_max"),
        file("tracked", "/proc/sys/net/netfilter/nf_conntrack_count", optional=True),
        file("trackable", "/proc/sys/net/netfilter/nf_conntrack_max", optional=True),
    ]


def _limits_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    files = [integer(word) for word in (readings.first_line("files") or "").split()]
    opened, most = (files[0], files[2]) if len(files) == 3 else (None, None)
    words = (readings.first_line("loadavg") or "").split()
    tasks = integer(words[3].partition("/")[2]) if len(words) >= 5 else None
    limits = [
        limit for limit in (integer(readings.first_line("threads")), integer(readings.first_line("pids"))) if limit
    ]
    tracked, trackable = integer(readings.first_line("tracked")), integer(readings.first_line("trackable"))
    return dict(
        readings.account(),
        open_files=opened,
        open_files_limit=most,
        open_files_percent=percent(opened, most),
        tasks=tasks,
        tasks_limit=min(limits) if limits else None,
        tasks_percent=percent(tasks, min(limits)) if limits else None,
        tracked_connections=tracked,
        tracked_connections_limit=trackable,
        tracked_connections_percent=percent(tracked, trackable),
    )


KERNEL_LIMITS = Observer(
    name="kernel_limits",
    summary="Open files, tasks and tracked connections against the limits of the kernel.",
    returns={
        "open_files": "open file handles",
        "open_files_limit": "fs.file-max",
        "open_files_percent": "of the limit",
        "tasks": "threads",
        "tasks_limit": "kernel.threads-max or pid_max",
        "tasks_percent": "of the limit",
        "tracked_connections": "entries of conntrack, null where it is not loaded",
        "tracked_connections_limit": "nf_conntrack_max",
        "tracked_connections_percent": "of the limit",
    },
    first=_limits_first,
    read=_limits_read,
)
