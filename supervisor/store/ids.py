"""Run ids: UUIDs of version 7, which sort by time; without dashes they are trace ids.

Owns: making and checking them (RFC 9562, 5.7).
Deliberately does not know: what carries an id.
"""

from __future__ import annotations

import os
import re
import threading
import time

from supervisor.errors import BadInput

_RUN_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_guard = threading.Lock()
_last = 0


def new_run_id() -> str:
    """A new id. Ids made by one process sort in the order they were made, also within a millisecond."""
    global _last
    with _guard:
        # 48 bits of milliseconds and 12 bits of its fraction (RFC 9562, 6.2, method 3); a clock that stands still or
        # goes back counts on from the last one.
        nanoseconds = time.time_ns()
        milliseconds, rest = divmod(nanoseconds, 1_000_000)
        _last = max((milliseconds << 12) | (rest * 4096 // 1_000_000), _last + 1)
        moment = _last
    random = int.from_bytes(os.urandom(8), "big") & ((1 << 62) - 1)
    value = ((moment >> 12) << 80) | (7 << 76) | ((moment & 0xFFF) << 64) | (0b10 << 62) | random
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def run_id(text: str) -> str:
    """``text`` if it is a run id; raises ``BadInput``."""
    if not _RUN_ID.fullmatch(text):
        raise BadInput(
            "this is not the id of a run",
            expected="a UUID of version 7 in lower case",
            got=text,
            next_step="`chargehand runs list` shows them",
        )
    return text


def trace_id(run: str) -> str:
    """The trace id of a run: its id without dashes (architecture.md, "Trace and run identity")."""
    return run.replace("-", "")


def made_at(run: str) -> float:
    """When the id was made, seconds since the epoch."""
    return int(trace_id(run)[:12], 16) / 1000
