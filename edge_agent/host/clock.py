"""The machine's own clocks.

Owns: the one place that reads them. A lease is counted on CLOCK_BOOTTIME, which runs on while the machine sleeps and
which nobody can set (safety.md, "Inert until activated", 3); the wall clock is informative only.
"""

from __future__ import annotations

import time


def boottime() -> float:
    """Seconds since the machine started, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall() -> float:
    """Seconds since 1970 as this machine believes."""
    return time.time()


def boot_id() -> str:
    """The kernel's id of this boot; it changes with every start of the machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
