"""The lease as a state machine: whatever is asked in whatever order, it never lasts longer than it may."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent.host.errors import BadRequest, HostError, NoLease, Stale
from edge_agent.host.home import HostConfig
from edge_agent.host.lease import MAX_START_WINDOW_S, Grant, Lease, admit, check_run_id, current_run, run_record
from tools.values import Malformed, digest

BOOT = "11111111-2222-3333-4444-555555555555"
CONFIG = HostConfig("m1", "process", max_lease_s=60.0, max_run_s=600.0)
RUNS = [f"0190b5a4-0000-7000-8000-00000000000{number}" for number in range(4)]


def document(**changes: Any) -> dict[str, Any]:
    policy = {"rules": []}
    return {
        "protocol": 1, "run_id": RUNS[0], "machine": "m1", "generation": 1, "boot_id": BOOT, "not_after": 100.0,
        "lease_s": 30.0, "hard_stop_s": 300.0, "policy": policy, "policy_digest": digest(policy), "limits": {},
        "model": {}, "traceparent": "", **changes,
    }  # fmt: skip


def grant(**changes: Any) -> Grant:
    return Grant.from_json(document(**changes))


class LeaseMachine(RuleBasedStateMachine):
    """A machine, gateways that ask it anything, and a clock that only goes forward (until the machine restarts)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 50.0
        self.boot = BOOT
        self.state: dict[str, Any] = {"generation": 0, "run": None}
        self.lease: Lease | None = None
        self.seen_seq: set[int] = set()
        self.accepted: list[Grant] = []
        self.last_authority = 0.0  # when the gateway last said yes
        self.longest = 0.0  # for how long it said so

    @rule(seconds=st.floats(0, 120))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def the_machine_restarts(self) -> None:
        self.boot = self.boot[:-1] + ("6" if self.boot.endswith("5") else "5")
        self.now = 1.0
        self.lease = None

    @rule(
        run=st.sampled_from(RUNS), generation=st.integers(-1, 6), boot=st.sampled_from([BOOT, BOOT[:-1] + "6"]),
        window=st.floats(-50, 2000), lease_s=st.floats(0, 100), hard_stop_s=st.floats(0, 1000),
        machine=st.sampled_from(["m1", "m1", "m2"]),
    )  # fmt: skip
    def a_gateway_starts(
        self, run: str, generation: int, boot: str, window: float, lease_s: float, hard_stop_s: float, machine: str
    ) -> None:
        if self.lease is not None and self.lease.left(self.now) > 0:
            return  # busy: the unit manager says so before `admit` is asked
        asked = grant(
            run_id=run, generation=generation, boot_id=boot, not_after=self.now + window, lease_s=lease_s,
            hard_stop_s=hard_stop_s, machine=machine,
        )  # fmt: skip
        before = int(self.state["generation"])
        try:
            admit(asked, CONFIG, self.state, self.now, self.boot)
        except (BadRequest, Stale):
            return
        assert generation > before and boot == self.boot and machine == "m1"
        assert -1e-6 <= window <= MAX_START_WINDOW_S + 1e-6
        assert 1.0 <= lease_s <= 60.0 and lease_s <= hard_stop_s <= 600.0
        self.state.update(generation=generation, run=run_record(asked, self.now))
        self.accepted.append(asked)
        self.lease = Lease(asked, self.now, CONFIG.max_lease_s)
        self.seen_seq = set()
        self.last_authority, self.longest = self.now, lease_s

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def an_old_start_is_replayed(self, data: st.DataObject) -> None:
        again = data.draw(st.sampled_from(self.accepted))
        with pytest.raises((Stale, BadRequest)):
            admit(again, CONFIG, self.state, self.now, self.boot)

    @precondition(lambda self: self.lease is not None)
    @rule(run=st.sampled_from(RUNS), generation=st.integers(-1, 6), seq=st.integers(-1, 8), lease_s=st.floats(0, 100))
    def a_gateway_renews(self, run: str, generation: int, seq: int, lease_s: float) -> None:
        assert self.lease is not None
        mine = (run, generation) == (self.lease.grant.run_id, self.lease.grant.generation)
        alive = self.lease.left(self.now) > 0
        before = self.lease.ends_at
        try:
            left = self.lease.renew(run, generation, seq, lease_s, self.now)
        except HostError:
            assert self.lease.ends_at == before
            return
        assert mine and alive and 1.0 <= lease_s <= 60.0
        assert seq > max(self.seen_seq, default=0)
        assert left <= lease_s + 1e-6
        self.seen_seq.add(seq)
        self.last_authority, self.longest = self.now, lease_s

    @invariant()
    def it_never_lasts_longer_than_the_gateway_said_nor_past_the_hard_stop(self) -> None:
        if self.lease is not None:
            assert self.lease.ends_at <= self.lease.granted_at + self.lease.grant.hard_stop_s
            assert self.lease.ends_at <= self.last_authority + self.longest + 1e-6
            assert self.lease.ends_at <= self.last_authority + CONFIG.max_lease_s + 1e-6

    @invariant()
    def the_fence_only_moves_forward(self) -> None:
        generations = [accepted.generation for accepted in self.accepted]
        assert generations == sorted(set(generations))


LeaseMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestLeaseMachine = LeaseMachine.TestCase


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"machine": "m2"}, BadRequest, "another machine"),
        ({"boot_id": "other"}, Stale, "restarted"),
        ({"not_after": 40.0}, Stale, "too late"),
        ({"not_after": 40.0 + 2 * MAX_START_WINDOW_S}, BadRequest, "valid for too long"),
        ({"generation": 0}, Stale, "generation"),
        ({"lease_s": 0.5}, BadRequest, "'lease_s'"),
        ({"lease_s": 61}, BadRequest, "'lease_s'"),
        ({"hard_stop_s": 29}, BadRequest, "'hard_stop_s'"),
        ({"hard_stop_s": 601}, BadRequest, "'hard_stop_s'"),
    ],
)
def test_a_start_that_may_not_be_is_refused_with_its_reason(changes: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error) as caught:
        admit(grant(**changes), CONFIG, {"generation": 0}, 50.0, BOOT)
    assert says in caught.value.message
    assert caught.value.to_json()["expected"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "1" + "0" * 400])
@pytest.mark.parametrize("name", ["not_after", "lease_s", "hard_stop_s"])
def test_a_time_that_is_no_number_is_no_time(name: str, value: str) -> None:
    with pytest.raises(Malformed, match="finite number"):
        grant(**{name: int(value) if value.isdigit() else float(value)})


def test_a_policy_with_another_digest_is_refused() -> None:
    for policy in ({"rules": [1]}, {"rules": float("nan")}):
        with pytest.raises(BadRequest, match="policy"):
            grant(policy=policy)


@pytest.mark.parametrize(
    "text",
    ["", "x", RUNS[0].upper(), RUNS[0] + "\n", "../../etc/passwd", RUNS[0].replace("-7", "-4"), RUNS[0] + "/../x"],
)
def test_a_run_id_that_is_none_becomes_no_file_name(text: str) -> None:
    with pytest.raises(BadRequest):
        check_run_id(text)


def test_a_renewal_of_another_run_says_whose_the_lease_is() -> None:
    lease = Lease(grant(), 50.0, 60.0)
    with pytest.raises(NoLease) as caught:
        lease.renew(RUNS[1], 1, 1, 30.0, 51.0)
    assert RUNS[0] in caught.value.expected and RUNS[1] in caught.value.got


def test_a_checked_renewal_changes_nothing() -> None:
    lease = Lease(grant(), 50.0, 60.0)
    assert lease.check_renewal(RUNS[0], 1, 1, 60.0, 60.0) == 120.0
    assert lease.ends_at == 80.0
    assert lease.renew(RUNS[0], 1, 1, 60.0, 60.0) == 60.0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.data())
def test_any_document_is_a_grant_or_a_clear_refusal(data: st.DataObject) -> None:
    asked = document()
    for name in data.draw(st.lists(st.sampled_from(sorted(asked)), max_size=3)):
        asked[name] = data.draw(json_values)
    for name in data.draw(st.lists(st.sampled_from(sorted(asked)), max_size=2, unique=True)):
        del asked[name]
    try:
        found = Grant.from_json(asked)
    except (Malformed, HostError) as error:
        assert str(error)
        return
    assert Grant.from_json(found.to_json()) == found
    try:
        admit(found, CONFIG, {"generation": 0}, 50.0, BOOT)
    except HostError as error:
        assert error.to_json()["message"]


def test_the_record_of_a_run_is_what_the_state_gives_back() -> None:
    record = run_record(grant(), 50.0)
    assert current_run({"run": record}) == record and current_run({"run": None}) is None and current_run({}) is None
