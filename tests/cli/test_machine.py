"""``chargehand machine``: a host key is accepted by a person or not at all, and nothing is half-done."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.audit import kinds
from supervisor.audit.verify import verify
from supervisor.cli.contact import Contact, problems
from supervisor.cli.version import VERSION
from supervisor.machines import Machine
from supervisor.runs.services import Services
from tests.cli.conftest import Command, Said
from tests.cli.scripted_machine import ScriptedMachine
from tests.cli.stored_runs import open_run


def add(command: Command, machine: ScriptedMachine, *more: str, stdin: str | None = None) -> Said:
    return command("machine", "add", "web-01", "127.0.0.1", "--port", str(machine.port), *more, stdin=stdin)


def recorded(services: Services, machine: str = "web-01") -> list[tuple[str, str]]:
    return [(record.kind, record.actor) for record in services.ledger.records(chain=kinds.machine_chain(machine))]


def test_a_machine_is_added_with_the_fingerprint_that_was_named(
    command: Command, ssh_machine: ScriptedMachine, services: Services
) -> None:
    said = add(
        command, ssh_machine, "--accept-host-key", ssh_machine.shown.fingerprint, "--label", "role=web", "--json"
    )
    assert said.status == 0
    assert said.json["machine"]["host_key_fingerprint"] == ssh_machine.shown.fingerprint
    assert said.json["machine"]["labels"] == {"role": "web"}
    stored = services.store.machines.get("web-01")
    assert (stored.host_key, stored.port) == (ssh_machine.shown.text, ssh_machine.port)
    assert [kind for kind, _ in recorded(services)] == ["machine.added", "host_key.accepted"]
    assert all(actor.startswith("operator:") for _, actor in recorded(services))
    assert stored.host_key_accepted_by == recorded(services)[0][1]
    assert ssh_machine.verbs == []


def test_without_a_terminal_and_without_a_fingerprint_nothing_is_stored(
    command: Command, ssh_machine: ScriptedMachine, services: Services
) -> None:
    said = add(command, ssh_machine, "--json")
    assert said.status == 3
    error = said.json["error"]
    assert error["code"] == "host-key-unknown"
    assert ssh_machine.shown.fingerprint in error["got"]
    assert f"--accept-host-key {ssh_machine.shown.fingerprint}" in error["next"]
    assert services.store.machines.list(removed=True) == []
    assert services.ledger.records() == []


def test_another_fingerprint_than_the_shown_one_is_refused_and_nothing_is_stored(
    command: Command, ssh_machine: ScriptedMachine, services: Services
) -> None:
    other = "SHA256:" + "A" * 43
    said = add(command, ssh_machine, "--accept-host-key", other)
    assert said.status == 3
    assert other in said.err and ssh_machine.shown.fingerprint in said.err
    assert services.store.machines.list() == []


@pytest.mark.usefixtures("terminal")
def test_a_person_sees_the_fingerprint_and_answers(
    command: Command, ssh_machine: ScriptedMachine, services: Services
) -> None:
    said = add(command, ssh_machine, stdin="n\n")
    assert said.status == 3
    assert ssh_machine.shown.fingerprint in said.err
    assert services.store.machines.list() == []
    assert add(command, ssh_machine, stdin="\n").status == 3
    assert add(command, ssh_machine, stdin="y\n").status == 0
    assert services.store.machines.get("web-01").host_key == ssh_machine.shown.text


@pytest.mark.usefixtures("terminal")
def test_end_of_input_at_the_question_is_an_interrupt_and_stores_nothing(
    command: Command, ssh_machine: ScriptedMachine, services: Services
) -> None:
    assert add(command, ssh_machine, stdin="").status == 130
    assert services.store.machines.list() == []


@pytest.mark.parametrize(
    "words",
    [
        ("Web_01", "127.0.0.1"),
        ("web-01", "root@127.0.0.1"),
        ("--", "web-01", "-oProxyCommand=x"),
        ("web-01",),
        ("web-01", "127.0.0.1", "--port", "0"),
        ("web-01", "127.0.0.1", "--user", "a b"),
        ("web-01", "127.0.0.1", "--label", "nothing"),
        ("web-01", "127.0.0.1", "--expected-state", "{broken"),
        ("web-01", "127.0.0.1", "--accept-host-key", "MD5:00"),
        ("web-01", "127.0.0.1", "--embedded"),
    ],
)
def test_bad_input_is_said_before_anybody_connects(command: Command, data_dir: Path, words: tuple[str, ...]) -> None:
    said = command("machine", "add", "--json", *words)
    assert said.status == 2
    assert said.json["error"]["message"]
    assert not (data_dir / "chargehand.db").exists()


def test_a_machine_nobody_answers_for_is_unreachable(command: Command, services: Services) -> None:
    said = command("machine", "add", "web-01", "127.0.0.1", "--port", "1", "--json")
    assert said.status == 4
    assert said.json["error"]["code"] == "machine-unreachable"
    assert services.store.machines.list() == []


def test_a_name_that_is_taken_is_a_conflict(command: Command, ssh_machine: ScriptedMachine, services: Services) -> None:
    fingerprint = ssh_machine.shown.fingerprint
    assert add(command, ssh_machine, "--accept-host-key", fingerprint).status == 0
    before = recorded(services)
    again = add(command, ssh_machine, "--accept-host-key", fingerprint, "--json")
    assert (again.status, again.json["error"]["code"]) == (3, "conflict")
    assert recorded(services) == before


def test_list_and_show_tell_what_is_stored(command: Command, ssh_machine: ScriptedMachine) -> None:
    assert "no machines yet" in command("machine", "list").out
    add(command, ssh_machine, "--accept-host-key", ssh_machine.shown.fingerprint, "--label", "role=web", "--role", "front",
        "--expected-state", '{"nginx": "active"}')  # fmt: skip
    assert "web-01" in command("machine", "list", "--label", "role=web").out
    assert command("machine", "list", "--label", "role=db", "--json").json == {"machines": []}
    shown = command("machine", "show", "web-01", "--json").json
    assert shown["machine"]["expected_state"] == {"nginx": "active"}
    assert shown["policy_digest"].startswith("sha256:")
    text = command("machine", "show", "web-01").out
    assert ssh_machine.shown.fingerprint in text and "front" in text
    missing = command("machine", "show", "web-02", "--json")
    assert (missing.status, missing.json["error"]["code"]) == (2, "not-found")
    assert "web-01" in missing.json["error"]["expected"]


def test_a_machine_is_removed_only_when_confirmed_and_idle(
    command: Command, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(services)
    busy = command("machine", "remove", "web-01", "--yes", "--json")
    assert (busy.status, busy.json["error"]["code"]) == (3, "busy")
    assert run.id in busy.json["error"]["got"]
    services.store.runs.move(run.id, run.state, "stopping")
    services.store.runs.move(run.id, "stopping", "failed", unit_after="inactive", processes_after=0)
    assert command("machine", "remove", "web-01").status == 2
    monkeypatch.setattr("supervisor.cli.ask.terminal", lambda: True)
    assert command("machine", "remove", "web-01", stdin="n\n").status == 130
    assert services.store.machines.get("web-01")
    assert command("machine", "remove", "web-01", stdin="y\n").status == 0
    assert services.store.machines.list() == []
    assert recorded(services)[-1][0] == "machine.removed"


def test_check_tells_what_the_machine_is_and_that_nothing_runs(
    command: Command, ssh_machine: ScriptedMachine, services: Services
) -> None:
    add(command, ssh_machine, "--accept-host-key", ssh_machine.shown.fingerprint)
    said = command("machine", "check", "web-01", "--json")
    assert said.status == 0, said
    assert said.json["ok"] and said.json["problems"] == []
    assert said.json["unit"] == "inactive" and said.json["processes"] == 0 and said.json["run"] is None
    assert abs(said.json["clock"]["offset_s"]) < 5
    assert services.store.machines.get("web-01").last_boot_id == "b-1"
    text = command("machine", "check", "web-01").out
    assert "Debian GNU/Linux 12" in text and "nothing speaks against a run" in text


def test_a_changed_host_key_stops_everything_and_is_on_record(
    command: Command, ssh_machine: ScriptedMachine, services: Services
) -> None:
    first = ssh_machine.shown
    add(command, ssh_machine, "--accept-host-key", first.fingerprint)
    ssh_machine.change_host_key()
    said = command("machine", "check", "web-01")
    assert said.status == 3
    assert first.fingerprint in said.err and ssh_machine.shown.fingerprint in said.err
    assert ssh_machine.verbs == []
    assert recorded(services)[-1][0] == "host_key.changed"
    assert services.store.machines.get("web-01").host_key == first.text

    wrong = command("machine", "check", "web-01", "--accept-host-key", first.fingerprint)
    assert wrong.status == 3
    assert services.store.machines.get("web-01").host_key == first.text

    good = command("machine", "check", "web-01", "--accept-host-key", ssh_machine.shown.fingerprint, "--json")
    assert good.status == 0, good
    assert good.json["host_key"] == ssh_machine.shown.fingerprint
    record = services.ledger.records(kind=kinds.HOST_KEY_ACCEPTED)[-1]
    assert json.loads(record.body) == {"fingerprint": ssh_machine.shown.fingerprint, "previous": first.fingerprint}
    assert verify(services.ledger).verified


def test_accepting_the_key_that_is_accepted_already_records_nothing(
    command: Command, ssh_machine: ScriptedMachine, services: Services
) -> None:
    add(command, ssh_machine, "--accept-host-key", ssh_machine.shown.fingerprint)
    before = recorded(services)
    assert command("machine", "check", "web-01", "--accept-host-key", ssh_machine.shown.fingerprint).status == 0
    assert recorded(services) == before


def test_the_words_of_a_machine_reach_the_terminal_neutralised(command: Command, ssh_machine: ScriptedMachine) -> None:
    ssh_machine.hello["os"] = {"pretty_name": "\x1b]0;owned\x07 [bold]Linux[/]\u202e"}
    ssh_machine.hello["machine"] = "web-01\x1b[2J"
    ssh_machine.hello["capabilities"]["landlock"] = {"abi": 0, "problem": "\x1b[31mred"}
    add(command, ssh_machine, "--accept-host-key", ssh_machine.shown.fingerprint)
    said = command("machine", "check", "web-01")
    assert said.status == 4
    assert not set("\x1b\x07\u202e") & set(said.out + said.err)
    assert "[bold]Linux[/]" in said.out


@pytest.mark.parametrize("wrong", [[], "x", 7, None, {"abi": "many"}, {"abi": []}])
def test_a_machine_that_answers_nonsense_is_told_of_and_breaks_nothing(
    command: Command, ssh_machine: ScriptedMachine, wrong: object
) -> None:
    ssh_machine.hello.update(capabilities=wrong, os=wrong, python=None, wall=wrong, generation=wrong, boot_id="")
    ssh_machine.status.update(processes=wrong, run=wrong, unit=wrong)
    add(command, ssh_machine, "--accept-host-key", ssh_machine.shown.fingerprint)
    said = command("machine", "check", "web-01", "--json")
    assert said.status == 4
    assert not said.json["ok"]
    assert command("machine", "check", "web-01").status == 4


def test_an_embedded_machine_is_checked_by_serving_it_here(command: Command, services: Services) -> None:
    assert command("machine", "add", "here", "--embedded").status == 0
    said = command("machine", "check", "here", "--json")
    assert said.status == 0, said
    assert said.json["machine"] == "here" and said.json["edge"]["version"] == VERSION
    assert services.store.machines.get("here").last_seen_at is not None


def test_an_embedded_machine_of_a_running_gateway_is_left_to_it(command: Command, data_dir: Path) -> None:
    command("machine", "add", "here", "--embedded")
    with (data_dir / "gateway.lock").open("w") as lock:
        lock.write('{"pid": 4711, "started_at": 1.0, "mlflow_url": null}')
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = command("machine", "check", "here", "--json")
    assert said.status == 3
    assert "4711" in said.json["error"]["message"]


# --- the pure part ---


def contact(**changes: object) -> Contact:
    made = ScriptedMachine()
    made._loop.close()
    hello = {**made.hello, **{k: v for k, v in changes.items() if k in made.hello}}
    status = {**made.status, **{k: v for k, v in changes.items() if k in made.status}}
    return Contact(hello, status, float(changes.get("offset", 0.0)), 0.1, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"machine": "web-02"}, {"identity"}),
        ({"protocol": 2}, {"protocol"}),
        ({"version": "0.0.1"}, {"version"}),
        ({"python": "3.6.8"}, {"python"}),
        ({"offset": 90.0}, {"clock"}),
        ({"offset": -90.0}, {"clock"}),
        ({"processes": [{"pid": 1}]}, {"leftover"}),
        ({"generation": 9}, {"generation"}),
        ({"units": "systemd", "image": "sha256:x", "capabilities": {"landlock": {"abi": 1}, "podman": False, "user_bus": False}},
         {"podman", "user-bus"}),
        ({"units": "systemd"}, {"image"}),
    ],
)  # fmt: skip
def test_each_problem_is_found_by_itself(changes: dict[str, object], expected: set[str]) -> None:
    found = problems(Machine("web-01", "192.0.2.1"), contact(**changes), version=VERSION, open_runs=frozenset())
    assert {problem.id for problem in found} == expected
    assert all(problem.remedy for problem in found)


def test_a_run_of_ours_is_no_problem_and_a_foreign_one_is() -> None:
    seen = contact()
    seen.status["run"] = {"run_id": "r1"}
    seen.status["processes"] = [{"pid": 1}]
    machine = Machine("web-01", "192.0.2.1")
    assert problems(machine, seen, version=VERSION, open_runs=frozenset({"r1"})) == []
    assert [p.id for p in problems(machine, seen, version=VERSION, open_runs=frozenset())] == ["foreign-run"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["machine", "protocol", "python", "capabilities", "units", "generation", "image"]), json_values),
       st.dictionaries(st.sampled_from(["run", "processes", "unit"]), json_values))  # fmt: skip
def test_problems_never_fail_on_what_a_machine_says(hello: dict[str, object], status: dict[str, object]) -> None:
    seen = Contact(hello, status, 0.0, 0.0, 0.0)
    problems(Machine("web-01", "192.0.2.1"), seen, version=VERSION, open_runs=frozenset())
