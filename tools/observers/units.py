"""Observers of systemd units: ``failed_units`` and ``unit_status``.

Owns: reading ``systemctl list-units`` and ``systemctl show``.
Deliberately does not know: other init systems. Where systemd does not run, that is what the data says.
"""

from __future__ import annotations

import re
from typing import Dict, List, Optional, Sequence

from tools.observers.fields import integer, keyed, number
from tools.observers.journal import NEWEST, entry_rows, journal_probe, journal_problem
from tools.observers.observer import Observer, Parameter, Parameters, Probe, Readings, clean, command, file
from tools.values import JsonObject

# Failed units that are looked at more closely; the rest is listed by name.
DETAILED_UNITS = 20
_UNIT_NAME = re.compile(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,254}\.[a-z]{4,9}")
_NO_LIMIT = 1 << 63


def _failed_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        # One word; every status is an answer (1 says degraded).
        command("state", "systemctl", "is-system-running", ok_statuses=(0, 1, 3, 4), optional=True),
        command(
            "failed",
            "systemctl",
            "list-units",
            "--failed",
            "--all",
            "--plain",
            "--no-legend",
            "--no-pager",
            "--full",
            output_bytes=131072,
        ),
    ]


def _failed_rows(lines: Optional[Sequence[str]]) -> List[Dict[str, str]]:
    rows: List[Dict[str, str]] = []
    for line in lines or ():
        words = line.split()
        # Without --plain, and on some versions with it, a failed unit is marked with a dot.
        if words and not _UNIT_NAME.fullmatch(words[0]):
            words = words[1:]
        if len(words) >= 4 and _UNIT_NAME.fullmatch(words[0]):
            rows.append(
                {"unit": words[0], "load": words[1], "active": words[2], "sub": words[3], "text": " ".join(words[4:])}
            )
    return rows


_DETAILS = "Id,Result,ExecMainStatus,NRestarts,StateChangeTimestampMonotonic,FragmentPath"


def _failed_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    names = [row["unit"] for row in _failed_rows(readings.lines("failed"))][:DETAILED_UNITS]
    if not names:
        return []
    return [
        command("details", "systemctl", "show", "--no-pager", "--property=" + _DETAILS, *names, output_bytes=131072),
        file("uptime", "/proc/uptime"),
    ]


def _blocks(text: Optional[str]) -> Dict[str, Dict[str, str]]:
    """The properties of each unit of ``systemctl show UNIT UNIT…`` by its ``Id``; an empty line stands between units.

    Which properties there are, and in which order, depends on the kind of unit.
    """
    blocks = [keyed(part.split("\n")) for part in (text or "").split("\n\n")]
    return {block["Id"]: block for block in blocks if "Id" in block}


def _age(properties: Dict[str, str], name: str, uptime: Optional[float]) -> Optional[int]:
    """Seconds since a monotonic time stamp (microseconds) of systemd; ``None`` where it is 0 or unknown."""
    stamp = integer(properties.get(name))
    if not stamp or uptime is None:
        return None
    return max(0, int(uptime - stamp / 1e6))


def _uptime(readings: Readings) -> Optional[float]:
    words = (readings.first_line("uptime") or "").split()
    return number(words[0]) if len(words) == 2 else None


def _state(readings: Readings) -> Optional[str]:
    word = readings.first_line("state")
    known = ["initializing", "starting", "running", "degraded", "maintenance", "stopping", "offline", "unknown"]
    return word if word in known else None


def _failed_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    lines = readings.lines("failed")
    details = _blocks(readings.text("details"))
    uptime = _uptime(readings)
    rows: List[JsonObject] = []
    for row in _failed_rows(lines):
        more = details.get(row["unit"], {})
        rows.append(
            {
                "unit": clean(row["unit"]),
                "load": clean(row["load"], 40),
                "sub": clean(row["sub"], 40),
                "description": clean(row["text"], 200),
                "result": clean(more.get("Result", ""), 40) or None,
                "exit_status": integer(more.get("ExecMainStatus")),
                "restarts": integer(more.get("NRestarts")),
                "failed_for_s": _age(more, "StateChangeTimestampMonotonic", uptime),
                "file": clean(more.get("FragmentPath", "")) or None,
            }
        )
    return dict(
        readings.account(),
        system_state=_state(readings),
        units=rows if lines is not None else None,
        failed=len(rows) if lines is not None else None,
        names=[row["unit"] for row in rows] if lines is not None else None,
    )


FAILED_UNITS = Observer(
    name="failed_units",
    summary="systemd units in the failed state, why they failed and for how long.",
    returns={
        "system_state": "running, degraded, starting, maintenance, offline (no systemd), …",
        "units": [
            {
                "unit": "name",
                "load": "load state",
                "sub": "sub state",
                "description": "description",
                "result": "exit-code, signal, timeout, oom-kill, start-limit-hit, …",
                "exit_status": "of the main process",
                "restarts": "automatic restarts",
                "failed_for_s": "since it failed",
                "file": "unit file",
            }
        ],
        "failed": "how many",
        "names": ["unit"],
    },
    first=_failed_first,
    further=_failed_further,
    read=_failed_read,
)


# --- unit_status ----------------------------------------------------------------------------------------------------

_PROPERTIES = (
    "Id,Description,LoadState,ActiveState,SubState,UnitFileState,Result,MainPID,ExecMainCode,ExecMainStatus,NRestarts,"
    "ActiveEnterTimestampMonotonic,StateChangeTimestampMonotonic,MemoryCurrent,MemoryMax,TasksCurrent,TasksMax,"
    "FragmentPath,DropInPaths,NeedDaemonReload,TriggeredBy,User,Restart,WatchdogUSec,StatusText"
)


def _unit_first(parameters: Parameters) -> Sequence[Probe]:
    unit = parameters["unit"]
    probes = [
        command("show", "systemctl", "show", "--no-pager", "--property=" + _PROPERTIES, unit),
        file("uptime", "/proc/uptime"),
    ]
    if parameters["lines"]:
        probes += [journal_probe("log", "--unit=" + unit, limit=parameters["lines"]), NEWEST]
    return probes


def _amount(text: Optional[str]) -> Optional[int]:
    """A byte or task count; ``None`` for "[not set]", "infinity" and the largest number, which mean the same."""
    value = integer(text) if text is not None and len(text) < 19 else None
    return value if value is not None and 0 <= value < _NO_LIMIT else None


def _unit_read(readings: Readings, parameters: Parameters) -> JsonObject:
    lines = readings.lines("show")
    shown = keyed(lines)
    observed = "ActiveState" in shown and "LoadState" in shown
    uptime = _uptime(readings)
    account = readings.account(["newest"])
    trouble = journal_problem(readings, "log") if "log" in readings else ""
    if trouble and not readings.problem("log"):
        account["unavailable"].append({"probe": clean(readings.probe("log").label, 200), "reason": trouble})
    active = shown.get("ActiveState") in ("active", "reloading")
    recent = [
        {"at": entry["at"], "priority": entry["priority"], "message": entry["message"]}
        for entry in reversed(entry_rows(readings.lines("log")))
    ]
    return dict(
        account,
        unit=clean(shown.get("Id", "") or parameters["unit"]),
        exists=shown.get("LoadState") not in ("not-found", "masked") if observed else None,
        description=clean(shown.get("Description", ""), 200) if observed else None,
        load_state=clean(shown["LoadState"], 40) if observed else None,
        active_state=clean(shown["ActiveState"], 40) if observed else None,
        sub_state=clean(shown.get("SubState", ""), 40) if observed else None,
        enabled=clean(shown.get("UnitFileState", ""), 40) or None,
        result=clean(shown.get("Result", ""), 40) or None,
        main_pid=_amount(shown.get("MainPID")) or None,
        exit_status=integer(shown.get("ExecMainStatus")),
        restarts=integer(shown.get("NRestarts")),
        active_for_s=_age(shown, "ActiveEnterTimestampMonotonic", uptime) if active else None,
        state_for_s=_age(shown, "StateChangeTimestampMonotonic", uptime),
        memory_bytes=_amount(shown.get("MemoryCurrent")),
        memory_limit_bytes=_amount(shown.get("MemoryMax")),
        tasks=_amount(shown.get("TasksCurrent")),
        tasks_limit=_amount(shown.get("TasksMax")),
        user=clean(shown.get("User", ""), 60) or None,
        restart_policy=clean(shown.get("Restart", ""), 40) or None,
        file=clean(shown.get("FragmentPath", "")) or None,
        drop_ins=[clean(path) for path in shown.get("DropInPaths", "").split()][:20] if observed else None,
        needs_daemon_reload=shown.get("NeedDaemonReload") == "yes" if observed else None,
        triggered_by=[clean(name) for name in shown.get("TriggeredBy", "").split()][:20] if observed else None,
        status_text=clean(shown.get("StatusText", "")) or None,
        recent=None if trouble or "log" not in readings else recent,
    )


UNIT_STATUS = Observer(
    name="unit_status",
    summary="One systemd unit: its state, since when, why it ended, its resources and its last log lines.",
    parameters=(
        Parameter("unit", "unit", "The unit, such as nginx or backup.timer.", required=True),
        Parameter("lines", "integer", "How many log lines (0: none).", default=20, minimum=0, maximum=100),
    ),
    returns={
        "unit": "name",
        "exists": "whether systemd knows it",
        "description": "description",
        "load_state": "loaded, not-found, masked, …",
        "active_state": "active, inactive, failed, activating, …",
        "sub_state": "running, exited, dead, …",
        "enabled": "enabled, disabled, static, masked, …",
        "result": "success, exit-code, signal, timeout, oom-kill, …",
        "main_pid": "process id",
        "exit_status": "of the main process",
        "restarts": "automatic restarts",
        "active_for_s": "since it became active",
        "state_for_s": "since its state changed",
        "memory_bytes": "memory in use",
        "memory_limit_bytes": "its limit",
        "tasks": "processes and threads",
        "tasks_limit": "its limit",
        "user": "account",
        "restart_policy": "no, on-failure, always, …",
        "file": "unit file",
        "drop_ins": ["file"],
        "needs_daemon_reload": "the unit file on disk is newer than what runs",
        "triggered_by": ["unit"],
        "status_text": "what the service says about itself",
        "recent": [{"at": "time, UTC", "priority": "0 (emergency) to 7 (debug)", "message": "text"}],
    },
    first=_unit_first,
    read=_unit_read,
)
