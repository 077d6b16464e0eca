"""Events and journals in the database."""

from __future__ import annotations

import concurrent.futures

import pytest

from supervisor.errors import BadInput, Conflict, NotFound
from supervisor.machines import Machine
from supervisor.store import ids
from supervisor.store.events import GATEWAY, WORKER
from supervisor.store.runs import Run
from supervisor.store.store import Store
from tests.store.test_runs import create
from tools.values import Event


@pytest.fixture
def run(store: Store, machine: Machine) -> Run:
    return create(store)


def event(seq: int, text: str = "x") -> Event:
    return Event(seq, "note", {"text": text, "n": 1, "f": 1.5}, 3.0)


def test_events_are_counted_over_worker_and_gateway(store: Store, run: Run) -> None:
    store.events.add(run.id, "stage", {"stage": "activate"})
    store.events.append(run.id, [event(1), event(2)])
    store.events.add(run.id, "stage", {"stage": "stop"})
    stored = store.events.events(run.id)
    assert [(item.seq, item.source, item.key) for item in stored] == [
        (1, GATEWAY, None), (2, WORKER, "1"), (3, WORKER, "2"), (4, GATEWAY, None),
    ]  # fmt: skip
    assert [item.seq for item in store.events.events(run.id, 2)] == [3, 4]
    assert [item.seq for item in store.events.events(run.id, 1, limit=1)] == [2]


def test_what_was_streamed_comes_back_as_it_was(store: Store, run: Run) -> None:
    store.events.append(run.id, [event(1), event(2, "\0\ud800 ü")])
    assert [(item.seq, item.kind, item.body) for item in store.events.streamed(run.id)] == [
        (1, "note", event(1).body), (2, "note", event(2, "\0\ud800 ü").body),
    ]  # fmt: skip


def test_a_repeated_delivery_is_stored_once(store: Store, run: Run) -> None:
    assert len(store.events.append(run.id, [event(1), event(2)])) == 2
    assert [item.key for item in store.events.append(run.id, [event(1), event(2), event(3), event(3)])] == ["3"]
    assert store.events.add(run.id, "stage", {"a": 1}, key="stop") is not None
    assert store.events.add(run.id, "stage", {"a": 1}, key="stop") is None
    assert len(store.events.events(run.id)) == 4


def test_a_worker_that_changes_its_story_is_refused_and_nothing_of_it_is_stored(store: Store, run: Run) -> None:
    store.events.append(run.id, [event(1)])
    with pytest.raises(Conflict, match="second time"):
        store.events.append(run.id, [event(2), event(1, "another story")])
    assert len(store.events.events(run.id)) == 1


def test_events_of_no_run_and_events_that_are_no_json_are_refused(store: Store, run: Run) -> None:
    with pytest.raises(NotFound):
        store.events.append(ids.new_run_id(), [event(1)])
    with pytest.raises(BadInput, match="plain JSON"):
        store.events.append(run.id, [event(1), Event(2, "note", {"x": float("nan")})])
    assert store.events.events(run.id) == []


def test_events_of_many_threads_get_numbers_without_holes(store: Store, run: Run) -> None:
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: store.events.add(run.id, "note", {"n": number}), range(30)))
    assert [item.seq for item in store.events.events(run.id)] == list(range(1, 31))


def test_a_journal_is_kept_byte_by_byte_and_only_grows(store: Store, run: Run) -> None:
    assert store.journals.get(run.id) is None
    store.journals.save(run.id, ['{"a":1}'], "h1", complete=False)
    stored = store.journals.save(run.id, ['{"a":1}', '{"b": "\\u0000"}'], "h2", complete=True)
    assert (stored.lines, stored.head, stored.complete) == (('{"a":1}', '{"b": "\\u0000"}'), "h2", True)
    with pytest.raises(Conflict, match="no longer the one"):
        store.journals.save(run.id, ['{"a":2}', '{"b": "\\u0000"}'], "h3", complete=True)
    assert store.journals.get(run.id) == stored
    assert store.journals.run_ids() == [run.id]


def test_changes_of_settings_are_kept_newest_first(store: Store) -> None:
    store.settings_changed("anna", "limits.lease_s", 30, 20)
    store.settings_changed("ben", "audit.content", False, True)
    assert [(row["actor"], row["key"], row["new"]) for row in store.settings_changes()] == [
        ("ben", "audit.content", True), ("anna", "limits.lease_s", 20),
    ]  # fmt: skip
