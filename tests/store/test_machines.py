"""Machines in the database."""

from __future__ import annotations

import concurrent.futures

import asyncssh
import pytest

from supervisor.errors import BadInput, Conflict, NotFound
from supervisor.machines import EMBEDDED, Machine
from supervisor.store.store import Store, open_store
from tests.store.fixtures import clock_of


def host_key() -> str:
    return asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode("ascii")


def test_a_machine_is_stored_as_it_was_given(store: Store) -> None:
    given = Machine(
        "db-01", "DB-01.example.org", 2222, "ops", {"role": "db", "env": "prod"}, "database",
        {"units": ["postgresql.service"]}, notes="rack 4", host_key=host_key(), host_key_accepted_by="anna",
    )  # fmt: skip
    added = store.machines.add(given)
    assert store.machines.get("db-01") == added
    assert (added.address, added.port, added.user, added.role) == ("db-01.example.org", 2222, "ops", "database")
    assert added.expected_state == {"units": ["postgresql.service"]}
    assert added.host_key_fingerprint is not None
    assert added.host_key_fingerprint.startswith("SHA256:")
    assert added.host_key_accepted_at == added.created_at == clock_of(store).now
    assert (added.version, added.generation, added.enabled) == (1, 0, True)


def test_an_id_that_is_taken_is_refused(store: Store, machine: Machine) -> None:
    with pytest.raises(Conflict, match="web-01 already"):
        store.machines.add(Machine("web-01", "192.0.2.9"))
    assert store.machines.get("web-01") == machine


def test_a_machine_that_is_not_there_is_named_with_those_that_are(store: Store, machine: Machine) -> None:
    with pytest.raises(NotFound, match="one of web-01"):
        store.machines.get("web-02")


@pytest.mark.parametrize(
    "bad", [{"id": "Web"}, {"address": "a b"}, {"port": 0}, {"user": "-x"}, {"labels": {"A": "b"}}, {"transport": "tcp"},
            {"role": "a\nb"}, {"host_key": "ssh-ed25519 AAAA", "host_key_accepted_by": "anna"}],
)  # fmt: skip
def test_a_bad_field_is_refused_and_nothing_is_stored(store: Store, bad: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        store.machines.add(Machine(**{"id": "web-01", "address": "192.0.2.1", **bad}))
    assert store.machines.list(removed=True) == []


def test_an_embedded_machine_has_no_port_yet(store: Store) -> None:
    assert store.machines.add(Machine("here", "127.0.0.1", 0, transport=EMBEDDED)).port == 0


def test_machines_are_listed_by_label_and_in_pages(store: Store) -> None:
    for name, role in [("b", "db"), ("a", "db"), ("c", "web")]:
        store.machines.add(Machine(name, "192.0.2.1", labels={"role": role}))
    assert [machine.id for machine in store.machines.list()] == ["a", "b", "c"]
    assert [machine.id for machine in store.machines.list(labels={"role": "db"})] == ["a", "b"]
    assert [machine.id for machine in store.machines.list(after="a", limit=1)] == ["b"]


def test_a_change_needs_the_version_it_was_made_from(store: Store, machine: Machine) -> None:
    changed = store.machines.change("web-01", 1, notes="moved", port="2222", labels={"role": "app"})
    assert (changed.version, changed.notes, changed.port, changed.labels) == (2, "moved", 2222, {"role": "app"})
    with pytest.raises(Conflict, match="expected: version 1; got: 'version 2'"):
        store.machines.change("web-01", 1, notes="lost update")
    with pytest.raises(BadInput, match="cannot be changed"):
        store.machines.change("web-01", 2, generation=7)
    assert store.machines.get("web-01") == changed


def test_a_host_key_is_pinned_only_in_somebodys_name(store: Store, machine: Machine) -> None:
    with pytest.raises(BadInput, match="accepted by somebody"):
        store.machines.accept_host_key("web-01", host_key(), "")
    first = host_key()
    pinned = store.machines.accept_host_key("web-01", first, "anna")
    assert pinned.host_key == " ".join(first.split()[:2])
    assert pinned.host_key_accepted_by == "anna"
    assert store.machines.accept_host_key("web-01", first, "ben") == pinned
    assert store.machines.accept_host_key("web-01", host_key(), "ben").host_key_accepted_by == "ben"


def test_a_removed_machine_comes_back_with_its_generation_and_without_its_key(store: Store, machine: Machine) -> None:
    store.machines.accept_host_key("web-01", host_key(), "anna")
    assert [store.machines.next_generation("web-01") for _ in range(3)] == [1, 2, 3]
    store.machines.remove("web-01")
    for act in (store.machines.get, store.machines.next_generation, store.machines.remove):
        with pytest.raises(NotFound):
            act("web-01")
    assert store.machines.get("web-01", removed=True).removed_at is not None
    again = store.machines.add(Machine("web-01", "192.0.2.7"))
    assert (again.address, again.generation, again.host_key, again.enabled) == ("192.0.2.7", 3, None, True)
    assert store.machines.next_generation("web-01") == 4


def test_the_generation_follows_what_the_machine_has_seen_and_never_goes_back(store: Store, machine: Machine) -> None:
    assert store.machines.raise_generation("web-01", 41) == 41
    assert store.machines.raise_generation("web-01", 7) == 41
    assert store.machines.next_generation("web-01") == 42


def test_no_generation_is_given_out_twice_by_two_gateways_at_once(url: str, store: Store, machine: Machine) -> None:
    with open_store(url) as other, concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit((store, other)[n % 2].machines.next_generation, "web-01") for n in range(60)]
        given = [future.result() for future in futures]
    assert sorted(given) == list(range(1, 61))


def test_seeing_a_machine_is_a_note_and_no_change(store: Store, machine: Machine) -> None:
    store.machines.seen("web-01", "boot-7")
    store.machines.seen("nobody")
    seen = store.machines.get("web-01")
    assert (seen.last_seen_at, seen.last_boot_id, seen.version) == (clock_of(store).now, "boot-7", 1)
