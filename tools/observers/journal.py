"""Observers of logs: ``journal_errors``, ``kernel_messages``, ``oom_kills``.

Owns: reading ``journalctl -o json`` and ``dmesg -r``, grouping like messages, sorting kernel messages by topic.
Deliberately does not know: what a message asks its reader to do. Messages are untrusted text and only ever quoted.

Newest entries come first from ``journalctl -r``, so output that was cut lost the oldest ones. Reading the system's
journal takes the group ``systemd-journal`` (or ``adm``); without it ``journalctl`` shows a user's own messages only,
which would look like a clean machine, so that answer counts as none.
"""

from __future__ import annotations

import json
import re
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

from tools.observers.fields import integer, number, utc
from tools.observers.observer import Observer, Parameter, Parameters, Probe, Readings, clean, command, file, seconds_of
from tools.values import JsonObject

# Entries read for one observation, and groups handed on: enough to see what happens, small enough for a model.
MAX_ENTRIES = 500
MAX_GROUPS = 30
_FIELDS = "MESSAGE,PRIORITY,_SYSTEMD_UNIT,UNIT,SYSLOG_IDENTIFIER,_PID,_BOOT_ID"
_HIDDEN = re.compile(
    r"not seeing messages from other users|insufficient permissions|No journal files were (opened|found)"
)
_VARIABLE = re.compile(r"0x[0-9a-fA-F]+|[0-9a-fA-F]{8,}|[0-9]+")
PRIORITIES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")


def journal_probe(name: str, *selection: str, limit: int, optional: bool = False) -> Probe:
    """A probe for the newest ``limit`` entries of a ``selection`` (options of journalctl), newest first."""
    return command(
        name,
        "journalctl",
        "--no-pager",
        "--output=json",
        "--output-fields=" + _FIELDS,
        "--reverse",
        "--lines=%d" % limit,
        *selection,
        output_bytes=524288,
        optional=optional,
    )


# A journal without a single entry is no journal: journald does not run, and some versions then exit with 0 and say
# nothing. The newest entry of all is asked for beside every selection, so that "no errors" is never said of nothing.
NEWEST = command(
    "newest", "journalctl", "--no-pager", "--output=json", "--output-fields=" + _FIELDS, "--reverse", "--lines=1"
)


def journal_problem(readings: Readings, name: str) -> str:
    """Why the entries of a journal probe do not count, empty if they do."""
    result = readings.result(name)
    if result is None:
        return "not asked for"
    hidden = _HIDDEN.search(result.stderr[:4000] + "\n" + result.stdout[:300])
    if hidden and "found" in hidden.group():
        return "there is no journal on this machine"
    if hidden:
        return "only the user's own messages are visible; add the user to the group systemd-journal"
    if readings.problem(name):
        return readings.problem(name)
    return "" if entry_rows(readings.lines(name)) or entry_rows(readings.lines("newest")) else "the journal is empty"


def _text(value: Any) -> str:
    """The message of an entry: journald writes bytes that are no UTF-8 as a list of numbers, too long ones as null."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, int) and 0 <= item < 256 for item in value):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, list):
        return next((item for item in value if isinstance(item, str)), "")
    return ""


def entry_rows(lines: Optional[Sequence[str]]) -> List[JsonObject]:
    """``{at, seconds, priority, unit, source, pid, message}`` of each complete line of ``journalctl -o json``."""
    rows: List[JsonObject] = []
    for line in lines or ():
        if not line.startswith("{"):
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        stamp = integer(_text(entry.get("__REALTIME_TIMESTAMP")))
        if stamp is None:
            continue
        priority = integer(_text(entry.get("PRIORITY")))
        rows.append(
            {
                "at": utc(stamp / 1e6),
                "seconds": stamp / 1e6,
                "priority": priority if priority in range(8) else None,
                # Messages of systemd itself about a unit carry it in UNIT.
                "unit": clean(_text(entry.get("UNIT")) or _text(entry.get("_SYSTEMD_UNIT")), 120) or None,
                "source": clean(_text(entry.get("SYSLOG_IDENTIFIER")), 60) or None,
                "pid": integer(_text(entry.get("_PID"))),
                "message": clean(_text(entry.get("MESSAGE")), 400) or "(too long to be shown, or empty)",
            }
        )
    return rows


def shape(message: str) -> str:
    """A message with its numbers taken out: two messages of one shape say the same thing about different things."""
    return _VARIABLE.sub("#", message)[:200]


def _groups(rows: Iterable[JsonObject], keys: Sequence[str]) -> List[JsonObject]:
    """Like messages together, the most severe and then the most frequent first; ``rows`` are newest first."""
    found: Dict[Tuple[Any, ...], JsonObject] = {}
    for row in rows:
        key = tuple(row[name] for name in keys) + (shape(row["message"]),)
        group = found.get(key)
        if group is None:
            group = found[key] = {name: row[name] for name in keys}
            group.update(
                priority=row["priority"], message=row["message"], count=0, first_at=row["at"], last_at=row["at"]
            )
        group["count"] += 1
        group["first_at"] = row["at"]
    order = sorted(found.values(), key=lambda group: (-group["count"], group["message"]))
    return sorted(order, key=lambda group: 8 if group["priority"] is None else min(group["priority"], 3))


# --- journal_errors -------------------------------------------------------------------------------------------------


def _errors_first(parameters: Parameters) -> Sequence[Probe]:
    selection = ["--since=-%ds" % seconds_of(parameters["since"]), "--priority=" + parameters["priority"]]
    if parameters["unit"]:
        selection += ["--unit=" + parameters["unit"]]
    return [journal_probe("journal", *selection, limit=MAX_ENTRIES), NEWEST]


def _errors_read(readings: Readings, parameters: Parameters) -> JsonObject:
    trouble = journal_problem(readings, "journal")
    account = readings.account()
    if trouble:
        account["unavailable"] = [{"probe": clean(readings.probe("journal").label, 200), "reason": trouble}]
    rows = entry_rows(readings.lines("journal"))
    groups = _groups(rows, ("unit", "source"))
    return dict(
        account,
        since=parameters["since"],
        priority=parameters["priority"],
        entries=None if trouble else len(rows),
        complete=None if trouble else len(rows) < MAX_ENTRIES and not account["cut"],
        groups=None if trouble else groups[:MAX_GROUPS],
        groups_left_out=None if trouble else max(0, len(groups) - MAX_GROUPS),
        most_frequent=dict(max(groups, key=lambda group: group["count"])) if groups and not trouble else None,
    )


_GROUP = {
    "unit": "systemd unit",
    "source": "program",
    "priority": "0 (emergency) to 7 (debug)",
    "message": "newest message of this shape (untrusted text)",
    "count": "how often",
    "first_at": "UTC",
    "last_at": "UTC",
}

JOURNAL_ERRORS = Observer(
    name="journal_errors",
    summary="Errors in the system journal of a recent time, like messages grouped and counted.",
    parameters=(
        Parameter("since", "duration", "How far back.", default="24h", maximum=90 * 86400),
        Parameter("unit", "unit", "Only messages of this unit."),
        Parameter("priority", "choice", "This priority and more severe ones.", default="err", choices=PRIORITIES[:5]),
    ),
    returns={
        "since": "how far back",
        "priority": "least severe that counts",
        "entries": "messages (at most %d are read, newest first)" % MAX_ENTRIES,
        "complete": "whether these are all",
        "groups": [_GROUP],
        "groups_left_out": "groups not listed",
        "most_frequent": _GROUP,
    },
    first=_errors_first,
    read=_errors_read,
)


# --- kernel messages ------------------------------------------------------------------------------------------------

# What kernel messages are about, first match counts. Wording of the kernel from 4.18 (RHEL 8) on.
_WORDING: Tuple[Tuple[str, Tuple[str, ...]], ...] = (
    (
        "out-of-memory",
        ("out of memory", "oom-kill", "oom_reaper", "invoked oom-killer", "page allocation failure"),
    ),
    (
        "processor",
        (
            "machine check", r"\bmce:", "hardware error", r"edac .*(?:ce|ue)\b", "edac .*error", "thermal",
            "temperature above", "cpu clock throttled",
        ),
    ),
    (
        "storage",
        (
            "i/o error", "critical (?:medium|target|space allocation) error", "medium error", "buffer i/o",
            "lost (?:async )?page write", "failed command", "exception emask", "unrecovered read error",
            "nvme.*(?:timeout|abort|controller is down|reset)", "ext[234]-fs (?:error|warning)", "ext4-fs .*remount",
            "xfs .*(?:corruption|shutdown|shutting down|metadata i/o)", "btrfs (?:error|critical)", "btrfs: error",
            "remounting filesystem read-only", "dm-[0-9]+.*error", "raid.*(?:fail|disk failure)", "sense key",
            "blk_update_request", "device offlined", "rejecting i/o", "jbd2.*(?:error|abort)", "superblock.*error",
        ),
    ),
    (
        "hang",
        (
            "blocked for more than", "soft lockup", "hard lockup", "rcu.*(?:stall|detected)", "hung_task", "watchdog:",
        ),
    ),
    (
        "crash",
        (
            "kernel bug", r"\boops\b", "general protection", "unable to handle", "call trace", "kernel panic",
            r"\bbug:", "segfault", "trap .* ip:",
        ),
    ),
    (
        "network",
        (
            "nf_conntrack.*full", "neighbour.*overflow", "link is down", "netdev watchdog", "too many orphaned",
            "transmit queue .* timed out", "syn flooding", "tcp: out of memory", "carrier lost",
            "bond.*(?:link status definitely down|now running without)",
        ),
    ),
)  # fmt: skip
TOPICS: Tuple[Tuple[str, "re.Pattern[str]"], ...] = tuple(
    (topic, re.compile("|".join(patterns), re.IGNORECASE)) for topic, patterns in _WORDING
)


def topic_of(message: str) -> str:
    """What a kernel message is about: one of ``TOPICS`` or ``other``."""
    return next((topic for topic, pattern in TOPICS if pattern.search(message)), "other")


_RAW = re.compile(r"<([0-9]{1,3})>\[ *([0-9]{1,12}\.[0-9]{1,9})\](?:\[ *[TC][0-9]+\])? ?(.*)")


def dmesg_rows(lines: Optional[Sequence[str]], boot: Optional[float], most: int) -> List[JsonObject]:
    """Rows as ``entry_rows`` gives them from ``dmesg -r``, newest first, of priority ``most`` and more severe.

    ``boot``: when the machine was booted, seconds since 1970.
    """
    rows: List[JsonObject] = []
    for line in lines or ():
        match = _RAW.fullmatch(line)
        if match is None or int(match.group(1)) % 8 > most or int(match.group(1)) // 8 not in (0, 1):
            continue
        at = boot + float(match.group(2)) if boot is not None else None
        rows.append(
            {
                "at": utc(at),
                "seconds": at,
                "priority": int(match.group(1)) % 8,
                "unit": None,
                "source": "kernel",
                "pid": None,
                "message": clean(match.group(3), 400),
            }
        )
    rows.reverse()
    return rows


def boot_time(readings: Readings) -> Optional[float]:
    """When the machine was booted, seconds since 1970, from ``/proc/stat`` (probe ``stat``)."""
    for line in readings.lines("stat") or ():
        if line.startswith("btime "):
            return number(line[6:])
    return None


def kernel_first(priority: str, *selection: str) -> List[Probe]:
    """The first probes for kernel messages; ``kernel_further`` asks ``dmesg`` where the journal gives nothing."""
    return [journal_probe("journal", "--dmesg", "--priority=" + priority, *selection, limit=MAX_ENTRIES), NEWEST]


def kernel_further(readings: Readings) -> List[Probe]:
    if not journal_problem(readings, "journal"):
        return []
    probes = [file("stat", "/proc/stat", output_bytes=262144)]
    # The ring is printed oldest first; asking for the levels keeps what is wanted within the output limit.
    levels = "--level=emerg,alert,crit,err,warn"
    if re.search("denied|not permitted", readings.problem("dmesg")):
        return probes
    if "dmesg" in readings and readings.lines("dmesg") is None:
        return [*probes, command("dmesg-plain", "dmesg", "-r", output_bytes=524288)]
    return [*probes, command("dmesg", "dmesg", "-r", levels, output_bytes=524288)]


def kernel_rows(readings: Readings, most: int) -> Tuple[Optional[List[JsonObject]], str, JsonObject]:
    """The rows (``None``: none could be read), where they come from, and the account of the probes."""
    if not journal_problem(readings, "journal"):
        rows = [
            row for row in entry_rows(readings.lines("journal")) if row["priority"] is None or row["priority"] <= most
        ]
        return rows, "journal", readings.account()
    for name in ("dmesg", "dmesg-plain"):
        lines = readings.lines(name)
        if lines is not None:
            return (
                dmesg_rows(lines, boot_time(readings), most),
                "dmesg",
                readings.account(["journal", "newest", "dmesg", "oomd"]),
            )
    account = readings.account(["newest", "dmesg"] if "dmesg-plain" in readings else ["newest"])
    if not readings.problem("journal"):
        reason = {"probe": clean(readings.probe("journal").label, 200), "reason": journal_problem(readings, "journal")}
        account["unavailable"].insert(0, reason)
    return None, "", account


def _messages_first(parameters: Parameters) -> Sequence[Probe]:
    return kernel_first(parameters["priority"], "--since=-%ds" % seconds_of(parameters["since"]))


def _messages_read(readings: Readings, parameters: Parameters) -> JsonObject:
    rows, origin, account = kernel_rows(readings, PRIORITIES.index(parameters["priority"]))
    window = parameters["since"] if origin == "journal" else "boot" if origin == "dmesg" else None
    for row in rows or ():
        row["topic"] = topic_of(row["message"])
    groups = _groups(rows or (), ("topic",))
    topics = [topic for topic, _ in TOPICS]
    counts = {
        topic.replace("-", "_"): sum(g["count"] for g in groups if g["topic"] == topic) for topic in [*topics, "other"]
    }
    order = sorted(groups, key=lambda group: topics.index(group["topic"]) if group["topic"] in topics else len(topics))
    return dict(
        account,
        origin=origin or None,
        window=window,
        priority=parameters["priority"],
        entries=None if rows is None else len(rows),
        complete=None if rows is None else len(rows) < MAX_ENTRIES and not account["cut"],
        topics=None if rows is None else counts,
        groups=None if rows is None else order[:MAX_GROUPS],
        groups_left_out=None if rows is None else max(0, len(groups) - MAX_GROUPS),
    )


KERNEL_MESSAGES = Observer(
    name="kernel_messages",
    summary="Warnings and errors of the kernel, grouped and sorted by what they are about.",
    parameters=(
        Parameter(
            "since", "duration", "How far back (without a journal: since boot).", default="7d", maximum=90 * 86400
        ),
        Parameter("priority", "choice", "This priority and more severe ones.", default="err", choices=PRIORITIES[:5]),
    ),
    returns={
        "origin": "journal or dmesg",
        "window": "how far back, or boot",
        "priority": "least severe that counts",
        "entries": "messages",
        "complete": "whether these are all of the window",
        "topics": {
            "out_of_memory": "count",
            "processor": "count",
            "storage": "count",
            "hang": "count",
            "crash": "count",
            "network": "count",
            "other": "count",
        },
        "groups": [
            {
                "topic": "out-of-memory, processor, storage, hang, crash, network or other",
                "priority": "0 to 7",
                "message": "newest message of this shape (untrusted text)",
                "count": "how often",
                "first_at": "UTC",
                "last_at": "UTC",
            }
        ],
        "groups_left_out": "groups not listed",
    },
    first=_messages_first,
    further=lambda readings, _parameters: kernel_further(readings),
    read=_messages_read,
)


# --- oom_kills ------------------------------------------------------------------------------------------------------

# "Out of memory: Killed process 4711 (java) total-vm:…, anon-rss:8143212kB, …"; before 5.0 "Kill process … or
# sacrifice child" came first.
_KILLED = re.compile(r"Kill(?:ed)? process ([0-9]{1,10}) \(([^)]{0,64})\)(?:.*?anon-rss:([0-9]{1,15})kB)?")


def _oom_first(parameters: Parameters) -> Sequence[Probe]:
    since = "--since=-%ds" % seconds_of(parameters["since"])
    return [
        file("vmstat", "/proc/vmstat"),
        *kernel_first("err", since),
        journal_probe("oomd", "--unit=systemd-oomd.service", "--priority=info", since, limit=100, optional=True),
    ]


def _oom_read(readings: Readings, parameters: Parameters) -> JsonObject:
    rows, origin, account = kernel_rows(readings, 3)
    kills: List[JsonObject] = []
    for row in rows or ():
        match = _KILLED.search(row["message"])
        if match is None or "sacrifice child" in row["message"]:
            continue
        resident = integer(match.group(3))
        kills.append(
            {
                "at": row["at"],
                "process": clean(match.group(2), 64),
                "pid": int(match.group(1)),
                "by": "kernel",
                "scope": "control group" if "cgroup" in row["message"] else "machine",
                "resident_bytes": None if resident is None else resident * 1024,
            }
        )
    for entry in entry_rows(readings.lines("oomd")):
        killed = re.match(r"Killed (\S+) due to", entry["message"])
        if killed:
            kills.append(
                {
                    "at": entry["at"],
                    "process": clean(killed.group(1), 120),
                    "pid": None,
                    "by": "systemd-oomd",
                    "scope": "control group",
                    "resident_bytes": None,
                }
            )
    counter = None
    for line in readings.lines("vmstat") or ():
        if line.startswith("oom_kill "):
            counter = integer(line[9:])
    kills.sort(key=lambda kill: kill["at"] or "", reverse=True)
    return dict(
        account,
        kills_since_boot=counter,
        window=parameters["since"] if origin == "journal" else "boot" if origin == "dmesg" else None,
        kills=None if rows is None else kills[:MAX_GROUPS],
        in_window=None if rows is None else len(kills),
        processes=None if rows is None else sorted({kill["process"] for kill in kills}),
    )


OOM_KILLS = Observer(
    name="oom_kills",
    summary="Processes that were killed because memory ran out.",
    parameters=(Parameter("since", "duration", "How far back.", default="7d", maximum=90 * 86400),),
    returns={
        "kills_since_boot": "counter of the kernel (in a container that of the host)",
        "window": "how far back, or boot",
        "kills": [
            {
                "at": "UTC",
                "process": "name or control group",
                "pid": "process id",
                "by": "kernel or systemd-oomd",
                "scope": "machine, or control group (its own limit)",
                "resident_bytes": "memory it held",
            }
        ],
        "in_window": "how many",
        "processes": ["name"],
    },
    first=_oom_first,
    further=lambda readings, _parameters: kernel_further(readings),
    read=_oom_read,
)
