"""The table of states."""

from __future__ import annotations

import pytest

from supervisor.errors import IllegalMove
from supervisor.runs import states
from supervisor.runs.states import State
from supervisor.settings.model import Limits


def reachable(source: State) -> set[State]:
    found, todo = {source}, [source]
    while todo:
        for target in states.TABLE[todo.pop()].moves - found:
            found.add(target)
            todo.append(target)
    return found


def test_every_state_has_a_row_and_every_open_one_an_owner_and_a_deadline_that_can_be_set() -> None:
    assert set(states.TABLE) == set(State)
    for state in states.OPEN:
        row = states.TABLE[state]
        assert row.owner != "nobody"
        assert row.limit in Limits.model_fields, state


def test_every_state_can_be_reached_and_every_open_one_can_end() -> None:
    assert reachable(states.FIRST) == set(State)
    for state in states.OPEN:
        assert reachable(state) & states.FINAL


def test_once_a_start_may_have_been_sent_only_stopping_leads_to_an_end() -> None:
    for state in states.AGENT_MAY_BE_ALIVE - {State.STOPPING}:
        assert not states.TABLE[state].moves & states.FINAL
        assert State.STOPPING in states.TABLE[state].moves


def test_before_that_nothing_leads_to_stopping_or_unreachable() -> None:
    for state in states.OPEN - states.AGENT_MAY_BE_ALIVE:
        assert not states.TABLE[state].moves & {State.STOPPING, State.UNREACHABLE}


def test_an_end_leads_nowhere_but_unreachable_may_be_corrected() -> None:
    for state in states.FINAL:
        assert bool(states.TABLE[state].moves) == (state is State.UNREACHABLE)


@pytest.mark.parametrize("target", sorted(states.FINAL - {State.UNREACHABLE}))
def test_no_run_ends_from_stopping_without_proof(target: State) -> None:
    for unit, processes in [("active", 0), ("inactive", 1), ("inactive", None), (None, 0), ("failed", 0)]:
        with pytest.raises(IllegalMove, match="proven inactive"):
            states.check_proof(State.STOPPING, target, unit, processes)
    states.check_proof(State.STOPPING, target, "inactive", 0)
    states.check_proof(State.STOPPING, target, "not-started", 0)


def test_unreachable_needs_no_proof_and_its_correction_does() -> None:
    states.check_proof(State.STOPPING, State.UNREACHABLE, None, None)
    with pytest.raises(IllegalMove):
        states.check_proof(State.UNREACHABLE, State.FAILED, None, None)


def test_an_illegal_move_says_what_would_be_legal() -> None:
    with pytest.raises(IllegalMove) as caught:
        states.check(State.SUCCEEDED, State.RUNNING)
    assert "succeeded is final" in str(caught.value)
    with pytest.raises(IllegalMove, match="activating"):
        states.check(State.QUEUED, State.RUNNING)
    with pytest.raises(IllegalMove, match="no state"):
        states.parse("finished")
