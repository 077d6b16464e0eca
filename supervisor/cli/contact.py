"""Looking at one machine through its door: what it says of itself, and what speaks against running anything there.

Owns: the look (``hello`` and ``status`` over one connection), the clock's offset, the problems with their remedies.
Deliberately does not know: how the result is printed, who accepts a host key, the store.

``problems`` is pure: facts in, problems out. The words of a machine are data; whoever prints them neutralises them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from supervisor.machines import Machine
from tools.values import JsonObject

if TYPE_CHECKING:  # asyncssh takes a third of a second to import
    from supervisor.activation.gatekeeper import Gatekeeper

PROTOCOL = 1
WARNING, CRITICAL, INFO = "warning", "critical", "info"
# Leases do not depend on the clock, but people compare times in logs; seconds.
CLOCK_S = 5.0
LEAST_PYTHON = (3, 9)
# The year 9999: what lies beyond is no clock, seconds since the epoch.
LAST_MOMENT_S = 253_402_300_800


@dataclasses.dataclass(frozen=True)
class Problem:
    """``severity``: ``info``, ``warning`` (works, worse) or ``critical`` (no run can succeed there)."""

    id: str
    severity: str
    message: str
    remedy: str = ""

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Contact:
    """What one look at a machine gave.

    ``offset_s``: the machine's clock minus this one's, seconds, known to ``± uncertainty_s``; ``None``: it told no
    time. ``connect_s``: seconds until the first answer, login included.
    """

    hello: JsonObject
    status: JsonObject
    offset_s: float | None
    uncertainty_s: float
    connect_s: float


async def look(gatekeeper: Gatekeeper) -> Contact:
    """Ask ``hello`` twice (the first pays for the login, the second measures the clock) and ``status`` once.

    Raises ``HostKeyChanged``, ``HostKeyUnknown``, ``MachineUnreachable``, ``MachineFailed``, ``ProtocolMismatch``.
    """
    began = time.monotonic()
    await gatekeeper.hello()
    connected = time.monotonic()
    wall = time.time()
    hello = await gatekeeper.hello()
    took = time.monotonic() - connected
    status = await gatekeeper.status()
    offset = _offset(hello.get("wall"), wall + took / 2)
    return Contact(hello, status, offset, round(took / 2, 3), round(connected - began, 3))


def _offset(theirs: Any, ours: float) -> float | None:
    if isinstance(theirs, bool) or not isinstance(theirs, int | float) or not abs(theirs) < LAST_MOMENT_S:
        return None
    return round(theirs - ours, 3)


def problems(machine: Machine, seen: Contact, *, version: str, open_runs: frozenset[str]) -> list[Problem]:
    """What speaks against running something on ``machine``, most severe first.

    Args:
        machine: as the store knows it.
        seen: the look at it.
        version: of this gateway.
        open_runs: ids of the runs that the store believes to be on.
    """
    found = [
        *_identity(machine, seen.hello, version),
        *_clock(seen),
        *_confinement(seen.hello),
        *_units(seen.hello),
        *_what_runs(machine, seen, open_runs),
    ]
    order = (CRITICAL, WARNING, INFO)
    return sorted(found, key=lambda problem: order.index(problem.severity))


def _identity(machine: Machine, hello: Mapping[str, Any], version: str) -> list[Problem]:
    found = []
    if hello.get("machine") != machine.id:
        found.append(
            Problem(
                "identity", CRITICAL,
                f"the machine at this address says it is {hello.get('machine')!r}, not {machine.id!r}",
                "check the address; chargehand edge install writes the machine's id",
            )
        )  # fmt: skip
    if hello.get("protocol") != PROTOCOL:
        found.append(
            Problem(
                "protocol", CRITICAL, f"it speaks protocol {hello.get('protocol')!r}, this gateway {PROTOCOL}",
                "chargehand edge upgrade, or upgrade the gateway",
            )
        )  # fmt: skip
    elif hello.get("version") != version:
        found.append(
            Problem(
                "version", WARNING, f"its edge is version {hello.get('version')!r}, the gateway's is {version!r}",
                "chargehand edge upgrade",
            )
        )  # fmt: skip
    python = tuple(int(part) for part in str(hello.get("python", "")).split(".")[:2] if part.isdecimal())
    if python < LEAST_PYTHON:
        found.append(
            Problem(
                "python",
                CRITICAL,
                f"its Python is {hello.get('python')!r}, at least 3.9 is needed",
                "install a newer python3",
            )
        )
    return found


def _clock(seen: Contact) -> list[Problem]:
    if seen.offset_s is None:
        return [Problem("clock", WARNING, "it does not say what time it is", "chargehand edge upgrade")]
    if abs(seen.offset_s) - seen.uncertainty_s <= CLOCK_S:
        return []
    where = "ahead of" if seen.offset_s > 0 else "behind"
    return [
        Problem(
            "clock", WARNING,
            f"its clock is {abs(seen.offset_s):.1f} s {where} this one; times in its logs will not match ours",
            "start chronyd or systemd-timesyncd there (leases do not depend on it)",
        )
    ]  # fmt: skip


def _confinement(hello: Mapping[str, Any]) -> list[Problem]:
    capabilities = mapping(hello.get("capabilities"))
    landlock = mapping(capabilities.get("landlock"))
    found = []
    if not landlock.get("abi"):
        why = f": {landlock['problem']}" if landlock.get("problem") else ""
        found.append(
            Problem(
                "landlock", WARNING, f"the kernel does not confine commands with Landlock{why}",
                "use a kernel of 5.13 or newer with lsm=…,landlock; until then gate and permissions stand alone",
            )
        )  # fmt: skip
    if capabilities.get("journal_readable") is False and hello.get("units") == "systemd":
        found.append(
            Problem(
                "journal", WARNING, "the agent's user may not read the system's journal",
                "add the user to the group systemd-journal: chargehand edge install --grant-logs",
            )
        )  # fmt: skip
    return found


def _units(hello: Mapping[str, Any]) -> list[Problem]:
    capabilities = mapping(hello.get("capabilities"))
    if hello.get("units") != "systemd":
        return []
    found = []
    for name, needed in (("systemctl", "systemd"), ("podman", "podman 4.4 or newer")):
        if capabilities.get(name) is False:
            found.append(
                Problem(
                    name,
                    CRITICAL,
                    f"the edge is installed for systemd units, and {name} is not there",
                    f"install {needed}",
                )
            )
    if capabilities.get("user_bus") is False:
        found.append(
            Problem(
                "user-bus", CRITICAL, "the agent's user has no systemd of its own (no user bus)",
                "loginctl enable-linger USER on the machine",
            )
        )  # fmt: skip
    if not hello.get("image"):
        found.append(
            Problem(
                "image", CRITICAL, "no worker image is set in its configuration",
                "chargehand edge upgrade --image NAME@sha256:… or --image-archive FILE",
            )
        )  # fmt: skip
    return found


def _what_runs(machine: Machine, seen: Contact, open_runs: frozenset[str]) -> list[Problem]:
    found = []
    run = mapping(seen.status.get("run"))
    run_id = run.get("run_id")
    if run_id is not None and run_id not in open_runs:
        found.append(
            Problem(
                "foreign-run", WARNING, f"run {run_id} is on there, and this gateway knows no such open run",
                "another gateway may use this machine; its lease ends it otherwise",
            )
        )  # fmt: skip
    left = processes(seen.status)
    if left and run_id is None:
        found.append(
            Problem(
                "leftover", CRITICAL, f"{left} processes of the agent are there without a run",
                "they should not be: look at them on the machine, and report it",
            )
        )  # fmt: skip
    generation = seen.hello.get("generation")
    if isinstance(generation, int) and generation > machine.generation:
        found.append(
            Problem(
                "generation", INFO,
                f"it has seen generation {generation}, this gateway counts {machine.generation} (a restored backup?)",
                "nothing to do: the next run counts on from there",
            )
        )  # fmt: skip
    return found


def processes(status: Mapping[str, Any]) -> int:
    """How many processes of the agent the machine says are there."""
    left = status.get("processes")
    return len(left) if isinstance(left, list) else 0


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` if it is an object, else an empty one: a machine may answer anything."""
    return value if isinstance(value, Mapping) else {}
