"""Runs in the database, and the one way their state changes."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest

from supervisor.errors import BadInput, Conflict, IllegalMove, NotFound
from supervisor.machines import Machine
from supervisor.runs.states import State
from supervisor.store import ids
from supervisor.store.runs import Run
from supervisor.store.store import Store, open_store
from tests.store.fixtures import clock_of

PROOF = {"unit_after": "inactive", "processes_after": 0}


def create(store: Store, **more: Any) -> Run:
    asked = {"machine": "web-01", "requested_by": "anna", "text": "how are you?", "not_after": 2_000_000.0}
    return store.runs.create(**{**asked, **more})


def walk(store: Store, run: Run, *path: State) -> Run:
    for state in path:
        run = store.runs.move(run.id, run.state, state, deadline=5.0).run
    return run


def test_a_request_is_stored_whole(store: Store, machine: Machine) -> None:
    run = create(store, trigger="alert", trigger_detail={"fingerprint": "f"}, runbook="disk", model={"name": "m"})
    assert store.runs.get(run.id) == run
    assert (run.state, run.state_since, run.created_at) == (State.REQUESTED, clock_of(store).now, clock_of(store).now)
    assert run.trace_id == run.id.replace("-", "")
    assert (run.trigger_detail, run.runbook, run.model) == ({"fingerprint": "f"}, "disk", {"name": "m"})
    assert not run.final


def test_the_same_request_again_is_the_same_run(store: Store, machine: Machine) -> None:
    run_id = ids.new_run_id()
    first = create(store, run_id=run_id, model={"names": ("a", "b")})
    assert create(store, run_id=run_id, model={"names": ("a", "b")}) == first
    with pytest.raises(Conflict, match="text"):
        create(store, run_id=run_id, model={"names": ("a", "b")}, text="something else")


@pytest.mark.parametrize(
    ("bad", "error"),
    [({"machine": "nobody"}, NotFound), ({"trigger": "moon"}, BadInput), ({"run_id": "x"}, BadInput),
     ({"text": " "}, BadInput), ({"text": "a\0b"}, BadInput)],
)  # fmt: skip
def test_a_bad_request_is_refused(store: Store, machine: Machine, bad: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        create(store, **bad)
    assert store.runs.list() == []


def test_a_machine_out_of_service_gets_no_runs(store: Store, machine: Machine) -> None:
    store.machines.change("web-01", 1, enabled=False)
    with pytest.raises(Conflict, match="out of service"):
        create(store)


def test_a_run_goes_through_its_states_and_ends_with_proof(store: Store, machine: Machine) -> None:
    run = walk(store, create(store), State.QUEUED, State.ACTIVATING)
    assert run.started_at == clock_of(store).now
    run = walk(store, run, State.RUNNING, State.WAITING_APPROVAL, State.RUNNING, State.EVALUATING, State.STOPPING)
    clock_of(store).now += 3
    with pytest.raises(IllegalMove, match="proven inactive"):
        store.runs.move(run.id, State.STOPPING, State.SUCCEEDED)
    assert store.runs.get(run.id).state is State.STOPPING
    done = store.runs.move(
        run.id, State.STOPPING, State.SUCCEEDED, **PROOF, verdict={"outcome": "succeeded"}, report={"summary": "fine"},
        seconds={"total": 3.0}, tokens_in=5, tokens_out=7, cost_usd=0.25, journal_head="ab" * 32,
    )  # fmt: skip
    assert done.moved
    assert done.run.final
    assert (done.run.ended_at, done.run.deadline) == (clock_of(store).now, None)
    assert (done.run.seconds, done.run.cost_usd, done.run.tokens_out) == ({"total": 3.0}, 0.25, 7)


def test_proof_that_was_noted_before_counts(store: Store, machine: Machine) -> None:
    run = walk(store, create(store), State.QUEUED, State.ACTIVATING, State.STOPPING)
    store.runs.note(run.id, **PROOF)
    assert store.runs.move(run.id, State.STOPPING, State.FAILED).moved


def test_a_move_that_was_made_is_no_move_and_other_values_are_a_conflict(store: Store, machine: Machine) -> None:
    run = walk(store, create(store), State.QUEUED)
    first = store.runs.move(run.id, State.QUEUED, State.ACTIVATING, generation=4, model={"a": (1, 2)})
    again = store.runs.move(run.id, State.QUEUED, State.ACTIVATING, generation=4, model={"a": (1, 2)})
    assert (first.moved, again.moved) == (True, False)
    assert again.run == first.run
    with pytest.raises(Conflict, match="generation"):
        store.runs.move(run.id, State.QUEUED, State.ACTIVATING, generation=5)
    assert store.runs.get(run.id) == first.run


def test_a_move_from_where_the_run_is_not_is_a_conflict(store: Store, machine: Machine) -> None:
    run = walk(store, create(store), State.QUEUED, State.CANCELLED)
    with pytest.raises(Conflict, match="expected: queued; got: 'cancelled'"):
        store.runs.move(run.id, State.QUEUED, State.ACTIVATING)
    with pytest.raises(IllegalMove):
        store.runs.move(run.id, State.CANCELLED, State.QUEUED)
    with pytest.raises(NotFound):
        store.runs.move(ids.new_run_id(), State.REQUESTED, State.QUEUED)
    with pytest.raises(BadInput, match="text"):
        store.runs.move(run.id, State.REQUESTED, State.QUEUED, text="another question")


def test_of_many_that_move_a_run_at_once_one_wins(url: str, store: Store, machine: Machine) -> None:
    run = walk(store, create(store), State.QUEUED)
    with open_store(url) as other, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def attempt(number: int) -> bool:
            try:
                return (store, other)[number % 2].runs.move(
                    run.id, State.QUEUED, State.ACTIVATING, generation=number
                ).moved  # fmt: skip
            except Conflict:
                return False

        won = list(pool.map(attempt, range(16)))
    assert won.count(True) == 1
    assert store.runs.get(run.id).generation == won.index(True)


def test_a_cancel_is_noted_once_and_moves_nothing(store: Store, machine: Machine) -> None:
    run = create(store)
    noted = store.runs.request_cancel(run.id, "anna")
    assert store.runs.request_cancel(run.id, "ben") == noted
    assert (noted.state, noted.cancel_requested_by) == (State.REQUESTED, "anna")
    ended = walk(store, create(store), State.CANCELLED)
    assert store.runs.request_cancel(ended.id, "anna").cancel_requested_by is None
    with pytest.raises(NotFound):
        store.runs.request_cancel(ids.new_run_id(), "anna")


def test_runs_past_their_deadline_are_found(store: Store, machine: Machine) -> None:
    late = store.runs.move(create(store).id, State.REQUESTED, State.QUEUED, deadline=clock_of(store).now + 10).run
    store.runs.move(create(store).id, State.REQUESTED, State.QUEUED, deadline=clock_of(store).now + 99)
    walk(store, create(store), State.CANCELLED)
    clock_of(store).now += 11
    assert [run.id for run in store.runs.overdue()] == [late.id]
    assert store.runs.extend(late.id, State.QUEUED, clock_of(store).now + 5)
    assert not store.runs.extend(late.id, State.RUNNING, 1.0)
    assert store.runs.overdue() == []


def test_runs_are_listed_newest_first_by_machine_and_state_and_in_pages(store: Store, machine: Machine) -> None:
    store.machines.add(Machine("web-02", "192.0.2.2"))
    runs = [create(store, machine=name) for name in ("web-01", "web-02", "web-01")]
    walk(store, runs[0], State.QUEUED)
    assert [run.id for run in store.runs.list()] == [runs[2].id, runs[1].id, runs[0].id]
    assert [run.id for run in store.runs.list(machine="web-01")] == [runs[2].id, runs[0].id]
    assert [run.id for run in store.runs.list(in_states=frozenset({State.QUEUED}))] == [runs[0].id]
    assert [run.id for run in store.runs.list(before=runs[2].id, limit=1)] == [runs[1].id]
    assert store.runs.counts() == {State.REQUESTED: 2, State.QUEUED: 1}


def test_a_run_is_found_by_the_beginning_of_its_id(store: Store, machine: Machine) -> None:
    run = create(store)
    assert store.runs.find(run.id[:20]) == run
    create(store)
    with pytest.raises(BadInput, match="several"):
        store.runs.find(run.id[:4])
    for wrong in ("", "%", "zz"):
        with pytest.raises(BadInput):
            store.runs.find(wrong)
    with pytest.raises(NotFound):
        store.runs.find("ffff")
