"""The lease: the expiring right to act for one run, as a value and its rules.

Owns: the shape of what ``start`` and ``renew`` carry and who may have a lease when. Pure: the clock and the state are
handed in. Deliberately does not know: files, sockets, units.

Rules: safety.md, "Inert until activated", 3 (own clock), 5 (late and replayed requests), 6 (one run at a time).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Mapping, Optional

from edge_agent.host.documents import seconds
from edge_agent.host.errors import BadRequest, NoLease, Stale
from edge_agent.host.home import PROTOCOL, HostConfig
from tools.values import JsonObject, digest, want

RUN_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
# A start may not lie further in the future than this, seconds: a gateway that asks for more is in error.
MAX_START_WINDOW_S = 900.0
MIN_LEASE_S = 1.0


def check_run_id(text: str) -> str:
    """``text`` if it is a UUIDv7 in its usual form; it becomes a file name, so nothing else is taken."""
    if not RUN_ID.fullmatch(text):
        raise BadRequest(
            "field 'run_id' is not a UUIDv7", expected="xxxxxxxx-xxxx-7xxx-xxxx-xxxxxxxxxxxx", got=repr(text)[:80]
        )
    return text


def check_policy_digest(policy: JsonObject, stated: str) -> None:
    """Raise ``BadRequest`` unless ``policy`` has the digest the gateway states for it."""
    try:
        found = digest(policy)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the policy has no canonical form: %s" % error) from error
    if found != stated:
        raise BadRequest("the policy does not have the digest the gateway states", expected=stated[:100], got=found)


@dataclasses.dataclass(frozen=True)
class Grant:
    """What ``start`` asks for, checked for shape. Times in seconds; ``not_after`` on this machine's CLOCK_BOOTTIME."""

    run_id: str
    machine: str
    generation: int
    boot_id: str
    not_after: float
    lease_s: float
    hard_stop_s: float
    policy: JsonObject
    policy_digest: str
    limits: JsonObject
    model: JsonObject
    traceparent: str

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Grant":
        protocol = want(document, "protocol", int)
        if protocol != PROTOCOL:
            raise BadRequest(
                "the gateway speaks another version of the protocol",
                expected=str(PROTOCOL),
                got=repr(protocol),
                next_step="chargehand edge upgrade brings the machine to the gateway's version",
            )
        grant = cls(
            run_id=check_run_id(want(document, "run_id", str)),
            machine=want(document, "machine", str),
            generation=want(document, "generation", int),
            boot_id=want(document, "boot_id", str),
            not_after=seconds(document, "not_after"),
            lease_s=seconds(document, "lease_s"),
            hard_stop_s=seconds(document, "hard_stop_s"),
            policy=want(document, "policy", dict),
            policy_digest=want(document, "policy_digest", str),
            limits=want(document, "limits", dict, {}),
            model=want(document, "model", dict, {}),
            traceparent=want(document, "traceparent", str, ""),
        )
        check_policy_digest(grant.policy, grant.policy_digest)
        return grant

    def to_json(self) -> JsonObject:
        # Not `asdict`: it would copy the policy, the largest thing this process ever holds.
        document = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dict(document, protocol=PROTOCOL)

    @property
    def digest(self) -> str:
        """What the first line of the journal carries."""
        return digest(self.to_json())


def admit(grant: Grant, config: HostConfig, state: Mapping[str, Any], now: float, boot_id: str) -> None:
    """Raise unless ``grant`` may start on this machine at boot time ``now``."""
    if grant.machine != config.machine:
        raise BadRequest(
            "this start is for another machine",
            expected=config.machine,
            got=grant.machine,
            next_step="check the address",
        )
    if grant.boot_id != boot_id:
        raise Stale(
            "the machine has been restarted since the gateway last looked", expected=boot_id, got=grant.boot_id[:64]
        )
    check_in_time("start", grant.not_after, now)
    if grant.generation <= int(state.get("generation", 0)):
        raise Stale(
            "a newer or the same generation was seen",
            expected="more than %d" % int(state.get("generation", 0)),
            got=str(grant.generation),
            next_step="this start was replayed, or another gateway owns the machine",
        )
    check_seconds("lease_s", grant.lease_s, MIN_LEASE_S, config.max_lease_s)
    check_seconds("hard_stop_s", grant.hard_stop_s, grant.lease_s, config.max_run_s)


def check_in_time(what: str, not_after: float, now: float) -> None:
    """Raise ``Stale`` when ``not_after`` has passed at boot time ``now``, ``BadRequest`` when it lies too far ahead."""
    if now > not_after:
        raise Stale("the %s came too late" % what, expected="before boot time %.1f s" % not_after, got="%.1f s" % now)
    if not_after - now > MAX_START_WINDOW_S:
        raise BadRequest("the %s is valid for too long" % what, expected="at most %g s" % MAX_START_WINDOW_S)


def check_seconds(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise BadRequest(
            "field %r is out of bounds" % name, expected="%g to %g seconds" % (least, most), got=repr(value)
        )


class Lease:
    """A running lease, counted on boot time. ``renew`` moves its end, never past the hard stop.

    Args:
        grant: what was granted.
        granted_at: boot time of the granting, seconds; the start-up of the broker counts.
        max_lease_s: the longest renewal this machine takes, seconds.
    """

    def __init__(self, grant: Grant, granted_at: float, max_lease_s: float) -> None:
        self.grant = grant
        self.granted_at = granted_at
        self.hard_stop_at = granted_at + grant.hard_stop_s
        self.ends_at = min(granted_at + grant.lease_s, self.hard_stop_at)
        self._max_lease_s = max_lease_s
        self._renewals = 0

    def left(self, now: float) -> float:
        """Seconds left at boot time ``now``; 0 or less: it has ended."""
        return self.ends_at - now

    def owns(self, run_id: str, generation: int) -> None:
        """Raise ``NoLease`` unless a request for this run and generation is meant."""
        if run_id != self.grant.run_id or generation != self.grant.generation:
            raise NoLease(
                "the lease belongs to another run",
                expected="run %s, generation %d" % (self.grant.run_id, self.grant.generation),
                got="run %.40s, generation %r" % (run_id, generation),
            )

    def check_renewal(self, run_id: str, generation: int, seq: int, lease_s: float, now: float) -> float:
        """The boot time that this renewal would move the end to; nothing is changed.

        Raises ``NoLease``, ``Stale``, ``BadRequest``.
        """
        self.owns(run_id, generation)
        if self.left(now) <= 0:
            raise NoLease("the lease has ended and cannot be renewed")
        if seq <= self._renewals:
            raise Stale("this renewal came before", expected="a sequence number over %d" % self._renewals, got=str(seq))
        check_seconds("lease_s", lease_s, MIN_LEASE_S, self._max_lease_s)
        return min(now + lease_s, self.hard_stop_at)

    def renew(self, run_id: str, generation: int, seq: int, lease_s: float, now: float) -> float:
        """Move the end to ``now + lease_s``; returns the seconds left. Raises like ``check_renewal``."""
        self.ends_at = self.check_renewal(run_id, generation, seq, lease_s, now)
        self._renewals = seq
        return self.left(now)


def run_record(grant: Grant, granted_at: float) -> JsonObject:
    """What ``state.json`` keeps of the run on the machine."""
    return {
        "run_id": grant.run_id,
        "generation": grant.generation,
        "granted_at": granted_at,
        "hard_stop_at": granted_at + grant.hard_stop_s,
        "lease_digest": grant.digest,
        "boot_id": grant.boot_id,
    }


def current_run(state: Mapping[str, Any]) -> Optional[JsonObject]:
    """The run record of ``state``, if a run is (or was, before a crash) on the machine."""
    run = state.get("run")
    return dict(run) if isinstance(run, dict) else None
