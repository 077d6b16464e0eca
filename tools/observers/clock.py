"""Observers of time: ``time_sync`` and ``uptime``.

Owns: reading chrony, systemd-timesyncd, ntpd, ``/proc/uptime`` and the list of boots.
Deliberately does not know: the right time. It reports what the machine's own service says about its clock.
"""

from __future__ import annotations

import re
from typing import Dict, List, Optional, Sequence

from tools.observers.fields import document, integer, keyed, number, objects, seconds_of_utc, string, utc, whole
from tools.observers.journal import boot_time
from tools.observers.observer import Observer, Parameters, Probe, Readings, clean, command, file
from tools.values import JsonObject

# --- time_sync ------------------------------------------------------------------------------------------------------


def _time_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        command("chrony", "chronyc", "-n", "-c", "tracking", optional=True),
        command("timedate", "timedatectl", "show", "--no-pager"),
        file("container", "/run/systemd/container", optional=True),
        file("podman", "/run/.containerenv", optional=True),
        file("docker", "/.dockerenv", optional=True),
        file("clocksource", "/sys/devices/system/clocksource/clocksource0/current_clocksource", optional=True),
        file("zone", "/etc/timezone", optional=True),
    ]


def _time_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    if _chrony(readings.first_line("chrony")) is not None:
        return []
    asked = [command("ntpd", "ntpq", "-n", "-c", "rv", optional=True)]
    # Where timesyncd is switched off, asking it makes the bus try to start it for 25 seconds.
    if keyed(readings.lines("timedate")).get("NTP") != "no":
        asked.insert(0, command("timesyncd", "timedatectl", "show-timesync", "--no-pager", optional=True))
    return asked


def _chrony(line: Optional[str]) -> Optional[JsonObject]:
    """The 14 fields of ``chronyc -c tracking``."""
    words = (line or "").split(",")
    if len(words) != 14:
        return None
    stratum, offset, reference = integer(words[2]), number(words[4]), number(words[3])
    if stratum is None or offset is None:
        return None
    return {
        "service": "chrony",
        "synchronized": words[13] != "Not synchronised" and stratum > 0,
        "server": clean(words[1], 100) or None,
        "stratum": stratum or None,
        # chrony counts a slow clock as positive; here positive means the clock is ahead, as for the others.
        "offset_s": -offset if stratum else None,
        "root_delay_s": number(words[10]) if stratum else None,
        "root_dispersion_s": number(words[11]) if stratum else None,
        "last_update_at": utc(reference) if reference else None,
    }


def _timesyncd(lines: Optional[Sequence[str]]) -> Optional[JsonObject]:
    """``timedatectl show-timesync``: the server and the last packet, ``NTPMessage={ Leap=0, … }``."""
    shown = keyed(lines)
    if "NTPMessage" not in shown and "ServerName" not in shown:
        return None
    message = dict(part.strip().partition("=")[::2] for part in shown.get("NTPMessage", "").strip("{} ").split(","))
    return {
        "service": "systemd-timesyncd",
        "synchronized": None,
        "server": clean(shown.get("ServerAddress") or shown.get("ServerName") or "", 100) or None,
        "stratum": integer(message.get("Stratum")),
        "offset_s": None,
        "root_delay_s": _span(message.get("RootDelay")),
        "root_dispersion_s": _span(message.get("RootDispersion")),
        "last_update_at": None,
    }


_SPAN = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def _span(text: Optional[str]) -> Optional[float]:
    """Seconds of a systemd time span such as ``1s 250ms``."""
    total = 0.0
    for part in (text or "").split():
        match = re.fullmatch(r"([0-9.]{1,20})(us|ms|s|min|h)", part)
        amount = number(match.group(1)) if match else None
        if match is None or amount is None:
            return None
        total += amount * _SPAN[match.group(2)]
    return round(total, 9) if text else None


def _ntpd(lines: Optional[Sequence[str]]) -> Optional[JsonObject]:
    """System variables of ntpd or ntpsec: ``stratum=2, … offset=-0.123, …`` (milliseconds).

    ``offset`` is the server's time minus the clock's, the other way round than ``offset_s``.
    """
    values: Dict[str, str] = {}
    for part in " ".join(lines or ()).split(","):
        key, found, value = part.strip().partition("=")
        if found:
            values[key.strip()] = value.strip()
    stratum, offset = integer(values.get("stratum")), number(values.get("offset"))
    if stratum is None:
        return None
    delay, dispersion = number(values.get("rootdelay")), number(values.get("rootdisp"))
    return {
        "service": "ntpd",
        "synchronized": stratum < 16,
        "server": clean(values.get("refid", ""), 100) or None,
        "stratum": stratum,
        "offset_s": round(-offset / 1000.0, 9) if offset is not None and stratum < 16 else None,
        "root_delay_s": None if delay is None else round(delay / 1000.0, 9),
        "root_dispersion_s": None if dispersion is None else round(dispersion / 1000.0, 9),
        "last_update_at": None,
    }


_NO_SERVICE: JsonObject = {
    "service": None,
    "synchronized": None,
    "server": None,
    "stratum": None,
    "offset_s": None,
    "root_delay_s": None,
    "root_dispersion_s": None,
    "last_update_at": None,
}


def _time_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    shown = keyed(readings.lines("timedate"))
    found = (
        _chrony(readings.first_line("chrony"))
        or _ntpd(readings.lines("ntpd"))
        or _timesyncd(readings.lines("timesyncd"))
        or dict(_NO_SERVICE)
    )
    # The kernel's own flag, which any service sets when it has disciplined the clock.
    flag = {"yes": True, "no": False}.get(shown.get("NTPSynchronized", ""))
    synchronized = found["synchronized"] if found["synchronized"] is not None else flag
    container = readings.first_line("container")
    if container is None and (readings.text("podman") is not None or readings.text("docker") is not None):
        container = "podman" if readings.text("podman") is not None else "docker"
    answered: List[str] = []
    if found["service"] in ("chrony", "ntpd"):
        answered += ["timedate", "timesyncd", "ntpd", "chrony"]
    elif shown:
        answered += ["ntpd", "chrony"]
    account = readings.account(answered)
    # The follow-up of a bus that did not answer says the same thing once more.
    reasons = [entry["reason"] for entry in account["unavailable"]]
    account["unavailable"] = [
        entry for at, entry in enumerate(account["unavailable"]) if entry["reason"] not in reasons[:at]
    ]
    return dict(
        account,
        **dict(found, synchronized=synchronized),
        service_enabled={"yes": True, "no": False}.get(shown.get("NTP", "")),
        time_zone=clean(shown.get("Timezone") or readings.first_line("zone") or "", 60) or None,
        rtc_in_local_time={"yes": True, "no": False}.get(shown.get("LocalRTC", "")),
        clock_source=clean(readings.first_line("clocksource") or "", 40) or None,
        container=clean(container, 40) if container else None,
    )


TIME_SYNC = Observer(
    name="time_sync",
    summary="Whether the clock is synchronized, with what, and how far off it is.",
    returns={
        "service": "chrony, systemd-timesyncd, ntpd, or null where none answers",
        "synchronized": "clock is disciplined",
        "server": "source",
        "stratum": "distance from a reference clock",
        "offset_s": "clock minus true time",
        "root_delay_s": "to the reference",
        "root_dispersion_s": "error bound",
        "last_update_at": "UTC",
        "service_enabled": "network time is switched on",
        "time_zone": "time zone",
        "rtc_in_local_time": "hardware clock holds local time",
        "clock_source": "clock source of the kernel",
        "container": "kind of container, null if none (its clock is the host's)",
    },
    first=_time_first,
    further=_time_further,
    read=_time_read,
)


# --- uptime ---------------------------------------------------------------------------------------------------------


def _uptime_first(_parameters: Parameters) -> Sequence[Probe]:
    return [
        file("uptime", "/proc/uptime"),
        file("stat", "/proc/stat", output_bytes=262144),
        file("boot", "/proc/sys/kernel/random/boot_id"),
        command("boots", "journalctl", "--no-pager", "--list-boots", "--utc", "--output=json", output_bytes=131072),
    ]


def _uptime_further(readings: Readings, _parameters: Parameters) -> Sequence[Probe]:
    # Before systemd 254 the list is text whatever --output says; it is only asked for again if the option was refused.
    if readings.problem("boots") and "output" in readings.problem("boots"):
        return [command("boots-text", "journalctl", "--no-pager", "--list-boots", "--utc", output_bytes=131072)]
    return []


_MOMENT = re.compile(r"[A-Z][a-z]{2} ([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}) UTC")
_BOOT = re.compile(r" *(-?[0-9]{1,6}) ([0-9a-f]{32}) (.*)")


def _boots(readings: Readings) -> Optional[List[JsonObject]]:
    """The boots the journal knows, newest first."""
    name = "boots" if readings.lines("boots") is not None else "boots-text"
    listed = objects(document(readings.text(name)))
    rows: List[JsonObject] = []
    for item in listed:
        first, last, offset = whole(item.get("first_entry")), whole(item.get("last_entry")), whole(item.get("index"))
        identity = string(item.get("boot_id"))
        if first is not None and last is not None and offset is not None and identity is not None:
            rows.append({"offset": offset, "boot_id": clean(identity, 40), "first": first / 1e6, "last": last / 1e6})
    for line in () if listed else readings.lines(name) or ():
        match = _BOOT.fullmatch(line)
        moments = [seconds_of_utc(text) for text in _MOMENT.findall(match.group(3))] if match else []
        if match and len(moments) == 2 and None not in moments:
            rows.append(
                {"offset": int(match.group(1)), "boot_id": match.group(2), "first": moments[0], "last": moments[1]}
            )
    if not rows:
        return None
    # Systemd ≥ 254 counts the list in JSON as in text: 0 is this boot.
    return sorted(rows, key=lambda row: -float(row["first"]))


def _uptime_read(readings: Readings, _parameters: Parameters) -> JsonObject:
    words = (readings.first_line("uptime") or "").split()
    seconds = number(words[0]) if len(words) == 2 else None
    booted = boot_time(readings)
    boots = _boots(readings)
    now = booted + seconds if booted is not None and seconds is not None else None
    recent = None
    if boots is not None and now is not None:
        recent = sum(now - float(row["first"]) < 7 * 86400 for row in boots)
    identity = (readings.first_line("boot") or "").replace("-", "")
    return dict(
        readings.account(["boots"] if readings.lines("boots-text") is not None else []),
        uptime_s=None if seconds is None else int(seconds),
        booted_at=utc(booted),
        boot_id=identity if re.fullmatch("[0-9a-f]{32}", identity) else None,
        boots_last_7_days=recent,
        boots=[
            {
                "offset": row["offset"],
                "boot_id": row["boot_id"],
                "first_at": utc(row["first"]),
                "last_at": utc(row["last"]),
            }
            for row in boots[:10]
        ]
        if boots is not None
        else None,
    )


UPTIME = Observer(
    name="uptime",
    summary="How long the machine has been up, and its recent boots where the journal keeps them.",
    returns={
        "uptime_s": "since boot",
        "booted_at": "UTC",
        "boot_id": "id of this boot",
        "boots_last_7_days": "how many boots the journal knows in 7 days",
        "boots": [
            {"offset": "0 is this boot", "boot_id": "id", "first_at": "first entry, UTC", "last_at": "last entry, UTC"}
        ],
    },
    first=_uptime_first,
    further=_uptime_further,
    read=_uptime_read,
)
