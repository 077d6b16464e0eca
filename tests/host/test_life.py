"""A run on a machine from start to proven end, with real keeper, broker and worker: the rules of "inert until activated"."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from edge_agent.host import clock
from edge_agent.host.journal import check
from tests.host.machine import Machine, run_id
from tests.host.processes import PYTHON, alive, until
from tools.values import digest

Machines = Callable[..., AbstractContextManager[Machine]]


# -- start, stop, and nothing left


def test_a_run_starts_acts_stops_and_leaves_nothing(host: Machine) -> None:
    document = host.start_document()
    answer = host.verb("start", document)
    assert answer["ready"] is True and answer["seconds"]["ready"] > 0
    assert set(answer["worker"]) == {"pid", "start_s"}, "what a worker adds of its own does not reach the gateway"
    status = host.verb("status")
    assert status["unit"] == "active" and status["run"]["run_id"] == document["run_id"]
    assert {"keeper", "broker", "worker"} == set(host.pids()) and len(status["processes"]) == 3
    assert 15 < status["lease_left_s"] <= 20
    assert host.verb("hello")["run"]["run_id"] == document["run_id"]
    assert not (host.run_dir / "lease.json").exists(), "the lease is used up by reading"

    with host.worker() as worker:
        decision, said = worker.call("c1", "exec", argv=["act", "say"])
        assert decision["outcome"] == "allow" and said["evidence"]["steps"][0]["stdout"] == "said\n"
        decision, said = worker.call("c2", "exec", argv=["sh", "-c", "id"])
        assert decision["outcome"] == "deny" and said["refused"] is True
        _, said = worker.call("c3", "exec", argv=["act", "fail"])
        assert said["evidence"]["steps"][0]["exit_status"] == 9

    began = time.monotonic()
    stopped = host.stop(document)
    assert time.monotonic() - began < 3
    assert (stopped["unit"], stopped["processes"]) == ("inactive", 0)
    assert host.pids() == {} and host.verb("status")["run"] is None
    assert sorted(os.listdir(host.run_dir / "worker")) == [] and not (host.run_dir / "broker.sock").exists()

    records = host.journal(document)
    kinds = [record["kind"] for record in records]
    assert kinds == [
        "lease.started",
        "call.asked", "call.decided", "call.intent", "call.result",
        "call.asked", "call.decided",
        "call.asked", "call.decided", "call.intent", "call.result",
        "stopped",
    ]  # fmt: skip
    assert records[0]["body"]["lease_digest"] == answer["lease_digest"]
    assert records[3]["body"]["argv"] == [[str(host.program), "say"]] and len(records[3]["body"]["binaries"][0]) == 64
    assert records[-1]["body"]["reason"] == "test"
    page = host.verb("journal", {"run_id": document["run_id"]})
    assert (len(page["lines"]), page["head"], page["over"]) == (12, stopped["journal_head"], True)
    check(page["lines"], document["run_id"])

    again = host.stop(document)
    assert again == stopped, "stop says the same however often it is asked"


def test_what_the_worker_may_know_is_all_it_is_told(host: Machine) -> None:
    host.start()
    task = json.loads((host.run_dir / "worker" / "task.json").read_text(encoding="utf-8"))
    assert set(task) == {"run_id", "machine", "limits", "model"}
    hello = json.loads((host.run_dir / "worker" / "hello.json").read_text(encoding="utf-8"))["hello"]
    assert set(hello) == {"protocol", "run_id", "limits", "model", "tools"}
    assert {tool["name"] for tool in hello["tools"]} >= {"exec", "read"}


def test_a_second_start_is_busy_and_harms_nothing(host: Machine) -> None:
    document = host.start()
    status, code, error = host.refusal("start", host.start_document())
    assert (status, code) == (3, "busy") and document["run_id"] in error["got"]
    assert host.verb("status")["run"]["run_id"] == document["run_id"]


@pytest.mark.slow
def test_a_replayed_start_is_stale_and_an_old_one_too_late(host: Machine) -> None:
    document = host.start()
    host.stop(document)
    assert host.refusal("start", document)[:2] == (3, "stale")
    assert host.refusal("start", dict(host.start_document(), generation=document["generation"]))[:2] == (3, "stale")
    late = host.start_document(not_after=clock.boottime() - 0.1)
    assert host.refusal("start", late)[:2] == (3, "stale")
    used = host.start_document(run_id=document["run_id"])
    assert host.refusal("start", used)[:2] == (4, "journal_failed")
    assert host.pids() == {}


@pytest.mark.slow
def test_two_starts_at_once_are_one_run(host: Machine) -> None:
    documents = [host.start_document() for _ in range(3)]
    processes = [host.open("start") for _ in documents]
    answers: list[dict[str, Any]] = []
    threads = []
    for process, document in zip(processes, documents, strict=True):

        def ask(process: subprocess.Popen[bytes] = process, document: dict[str, Any] = document) -> None:
            with process:
                answers.append(json.loads(process.communicate(json.dumps(document).encode())[0]))

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
    for thread in threads:
        thread.join()
    started = [answer for answer in answers if answer.get("ready")]
    refused = [answer["error"]["code"] for answer in answers if "error" in answer]
    assert len(started) == 1 and set(refused) <= {"busy", "stale"}, answers
    assert host.verb("status")["run"]["run_id"] == started[0]["run_id"]


def test_a_stop_of_a_run_nobody_knows_finds_nothing(host: Machine) -> None:
    said = host.verb("stop", {"run_id": run_id(), "generation": 1, "reason": "?"})
    assert said == {"unit": "inactive", "processes": 0, "journal_lines": 0, "journal_head": ""}


def test_a_stop_of_another_run_or_generation_stops_nothing(host: Machine) -> None:
    document = host.start()
    for wrong in ({"run_id": run_id()}, {"generation": document["generation"] + 1}):
        asked = {"run_id": document["run_id"], "generation": document["generation"], "reason": "x", **wrong}
        assert host.refusal("stop", asked)[:2] == (3, "no_lease")
    assert host.verb("status")["unit"] == "active"


@pytest.mark.slow
def test_a_renewal_prolongs_and_a_replayed_one_is_refused(host: Machine) -> None:
    document = host.start(lease_s=5.0)
    renewal = {"run_id": document["run_id"], "generation": document["generation"], "seq": 1, "lease_s": 30.0}
    assert 29 < host.verb("renew", renewal)["lease_left_s"] <= 30
    assert host.refusal("renew", renewal)[:2] == (3, "stale")
    assert host.refusal("renew", dict(renewal, seq=2, generation=99))[:2] == (3, "no_lease")
    assert host.refusal("renew", dict(renewal, seq=2, lease_s=61))[:2] == (2, "bad_request")
    # The hard stop is 60 s after the start: no renewal leads past it.
    assert host.verb("renew", dict(renewal, seq=2, lease_s=60.0))["lease_left_s"] < 60
    host.stop(document)
    assert host.refusal("renew", dict(renewal, seq=3))[:2] == (3, "no_lease")
    renewed = [record["body"]["seq"] for record in host.journal(document) if record["kind"] == "lease.renewed"]
    assert renewed == [1, 2]


def test_apply_does_not_change_an_installation_under_a_run(host: Machine) -> None:
    host.start()
    assert host.refusal("apply", {"files": []})[:2] == (3, "busy")


# -- by hand


def broker_by_hand(host: Machine) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, "-I", "-S", str(host.home / "host.pyz"), "broker", "--home", str(host.home)],
        env={}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip


def test_nobody_starts_the_broker_by_hand(host: Machine) -> None:
    done = broker_by_hand(host)
    assert done.returncode == 1 and "there is no lease" in done.stderr and "gateway" in done.stderr


@pytest.mark.slow
def test_a_lease_that_was_not_granted_last_is_refused(host: Machine) -> None:
    run = host.start()
    granted_at = json.loads((host.home / "state.json").read_text(encoding="utf-8"))["run"]["granted_at"]
    host.stop(run)
    lease = host.run_dir / "lease.json"
    state = json.loads((host.home / "state.json").read_text(encoding="utf-8"))

    def refused(document: Any, says: str, run_record: dict[str, Any] | None = None) -> None:
        (host.home / "state.json").write_text(json.dumps(dict(state, run=run_record)), encoding="utf-8")
        lease.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
        done = broker_by_hand(host)
        assert done.returncode == 1 and says in done.stderr, done.stderr
        assert not lease.exists(), "it is used up all the same"

    grant = {name: value for name, value in run.items() if name != "protocol"}
    record = {
        "run_id": run["run_id"], "generation": run["generation"], "granted_at": granted_at,
        "hard_stop_at": granted_at + 60, "lease_digest": digest(dict(grant, protocol=1)), "boot_id": run["boot_id"],
    }  # fmt: skip
    whole = {"grant": dict(grant, protocol=1), "granted_at": granted_at}
    refused(whole, "not the one that was granted last")  # the run is over
    refused(dict(whole, granted_at=granted_at + 1e6), "not the one that was granted last", record)
    refused(json.dumps(dict(whole, granted_at=float("nan"))), "cannot be read", record)
    refused(dict(whole, grant=dict(whole["grant"], lease_s=59.0)), "not the one that was granted last", record)
    refused(dict(whole, granted_at=1.0), "not fresh", dict(record, granted_at=1.0))
    refused(dict(whole, granted_at=granted_at + 1e6), "not fresh", dict(record, granted_at=granted_at + 1e6))
    refused("[]", "cannot be read", record)
    refused("", "cannot be read", record)
    # Even one that is right in all this is used once: its journal exists.
    refused(whole, "exists already", record)


# -- the lease


def test_when_the_lease_ends_broker_worker_and_commands_are_gone(machines: Machines) -> None:
    with machines("stubborn") as host:
        host.start(lease_s=1.2)
        until((host.run_dir / "worker" / "escaped").exists)
        with host.worker() as worker:
            worker.ask("c1", "exec", argv=["act", "stay"])
            assert worker.line()["decision"]["outcome"] == "allow"
            everyone = until(lambda: len(host.below()) >= 7 and host.below())
            granted = json.loads((host.home / "state.json").read_text(encoding="utf-8"))["run"]["granted_at"]
            until(lambda: not [pid for pid in everyone if alive(pid)], 8)
            gone = clock.boottime() - granted - 1.2
        # Invariant 3 of "inert until activated": within the lease and 5 s.
        assert gone < 5, f"gone {gone:.2f} s after the lease"
        assert host.pids() == {}
        run = json.loads((host.home / "state.json").read_text(encoding="utf-8"))["run"]
        kinds = host.kinds(run)
        assert kinds[-3:] == ["lease.expired", "call.result", "stopped"]
        result = next(record for record in host.journal(run) if record["kind"] == "call.result")
        assert result["body"]["steps"][0]["cancelled"] is True and "lease" in result["body"]["error"]
        # The machine is free again, and the stop that comes late says what is true.
        assert host.verb("stop", {"run_id": run["run_id"], "generation": 1, "reason": "late"})["unit"] == "inactive"


@pytest.mark.slow
def test_the_hard_stop_ends_a_run_that_is_renewed_for_ever(host: Machine) -> None:
    document = host.start(lease_s=1.5, hard_stop_s=1.5)
    renewal = {"run_id": document["run_id"], "generation": document["generation"], "seq": 1, "lease_s": 30.0}
    assert host.verb("renew", renewal)["lease_left_s"] <= 1.5
    until(lambda: not host.pids(), 6)
    expired = [record for record in host.journal(document) if record["kind"] == "lease.expired"]
    assert expired[0]["body"]["hard_stop"] is True


@pytest.mark.slow
def test_a_worker_whose_queue_is_full_does_not_keep_the_lease_from_ending(machines: Machines) -> None:
    # A connect that waits would wait for ever, and with it the only process that ends the lease.
    with machines("full") as host:
        began = time.monotonic()
        status, code, error = host.refusal("start", host.start_document(lease_s=1.0, hard_stop_s=5.0))
        assert (status, code) == (4, "machine_failed") and "lease" in error["got"]
        assert time.monotonic() - began < 7 and host.pids() == {}


def test_the_broker_is_ended_by_the_kernel_if_it_cannot_end_itself() -> None:
    program = (
        "from edge_agent.host import broker\nbroker.WATCHDOG_S = 0.2\nbroker.arm_watchdog(30)\nbroker.arm_watchdog(0.1)\n"
        "while True: pass\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], timeout=20, check=False)
    assert done.returncode == -signal.SIGALRM and time.monotonic() - began < 5


# -- something dies


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def staying(host: Machine, stack: contextlib.ExitStack) -> set[int]:
    """A run with a command that stays; returns every process of it."""
    worker = stack.enter_context(host.worker())
    worker.ask("c1", "exec", argv=["act", "stay"])
    assert worker.line()["decision"]["outcome"] == "allow"
    return until(lambda: len(host.below()) >= 5 and host.below())  # type: ignore[no-any-return]


def all_gone(pids: set[int], seconds: float = 6.0) -> None:
    until(lambda: not [pid for pid in pids if alive(pid)], seconds)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["broker", "worker", "keeper"])
def test_whichever_of_the_three_is_killed_the_others_and_the_command_are_gone(host: Machine, victim: str) -> None:
    document = host.start()
    with contextlib.ExitStack() as stack:
        everyone = staying(host, stack)
        kill(host.pids()[victim])
        all_gone(everyone)
    assert host.pids() == {}
    stopped = host.stop(document)
    assert (stopped["unit"], stopped["processes"]) == ("inactive", 0)
    # Whoever was killed, the journal is whole and ends with `stopped`.
    assert host.kinds(document)[-1] == "stopped"
    assert len(stopped["journal_head"]) == 64
    host.stop(host.start())  # the machine takes the next run


@pytest.mark.slow
def test_a_worker_that_ignores_sigterm_is_killed_by_stop(machines: Machines) -> None:
    with machines("stubborn") as host:
        document = host.start()
        escaped = int(
            until(
                lambda: (
                    (host.run_dir / "worker" / "escaped").exists() and (host.run_dir / "worker" / "escaped").read_text()
                )
            )
        )
        everyone = host.below()
        assert escaped in everyone
        began = time.monotonic()
        stopped = host.stop(document)
        assert (stopped["unit"], stopped["processes"]) == ("inactive", 0)
        assert not [pid for pid in everyone if alive(pid)] and time.monotonic() - began < 6


@pytest.mark.slow
def test_a_broker_that_hangs_is_killed_by_stop(host: Machine) -> None:
    document = host.start()
    os.kill(host.pids()["broker"], signal.SIGSTOP)
    with host.open("stop") as process:
        # It waits for the broker's answer first; nobody need wait for that here.
        assert process.stdin is not None
        process.stdin.write(json.dumps({"run_id": document["run_id"], "generation": document["generation"]}).encode())
        process.stdin.close()
        assert process.stdout is not None
        said = json.loads(process.stdout.read())
    assert (said["unit"], said["processes"]) == ("inactive", 0)
    assert host.kinds(document)[-1] == "stopped"
    assert "found dead" in host.journal(document)[-1]["body"]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "says"),
    [("crash", "no module named 'nothing'"), ("mute", "lease"), ("never", "lease")],
)
def test_a_worker_that_does_not_start_fails_the_start_with_its_own_words(
    machines: Machines, kind: str, says: str
) -> None:
    with machines(kind) as host:
        began = time.monotonic()
        document = host.start_document(lease_s=1.0)
        status, code, error = host.refusal("start", document)
        assert (status, code) == (4, "machine_failed") and says in error["got"], error
        assert time.monotonic() - began < 5
        assert host.pids() == {} and host.verb("status")["run"] is None
        assert host.verb("stop", {"run_id": document["run_id"], "generation": 1})["unit"] == "inactive"


def test_a_worker_program_that_is_not_there_is_named(machines: Machines) -> None:
    with machines(worker_argv=["/nowhere/worker"]) as host:
        _, code, error = host.refusal("start", host.start_document())
        assert code == "machine_failed" and "/nowhere/worker could not be started" in error["got"]
        assert host.pids() == {}


@pytest.mark.slow
def test_what_a_worker_made_of_its_directory_does_not_keep_the_machine_from_the_next_run(machines: Machines) -> None:
    with machines("mess") as host:
        host.stop(host.start())
        assert os.listdir(host.run_dir / "worker") == []
        host.stop(host.start())


@pytest.mark.slow
def test_the_broker_does_not_follow_a_link_in_the_place_of_the_workers_socket(
    machines: Machines, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as service:
        path = f"/tmp/ch-service-{os.getpid()}.sock"
        service.bind(path)
        service.listen(1)
        service.settimeout(0.1)
        try:
            with machines(f"link {path}") as host:
                host.refusal("start", host.start_document(lease_s=1.0))
                with pytest.raises(TimeoutError):
                    service.accept()
        finally:
            os.unlink(path)


# -- a worker that was taken over


@pytest.mark.slow
@pytest.mark.parametrize(
    "garbage",
    [
        b"nonsense\n", b"[]\n", b"{}\n", b"\n", b'{"call":{}}\n', b'{"call":5}\n', b'{"cancel":5}\n', b"[" * 5000 + b"\n",
        b'{"call":{"call_id":"../x","tool":"exec","arguments":{}}}\n', b"\xff\xfe\n", b"x" * 1_200_000,
        b'{"call":{"call_id":"c1","tool":"exec","arguments":{}}}\n' * 2,
    ],
    ids=lambda garbage: repr(garbage[:24]),
)  # fmt: skip
def test_garbage_is_answered_once_and_ends_the_run_in_order(host: Machine, garbage: bytes) -> None:
    document = host.start()
    with host.worker() as worker:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.stream.sendall(garbage)
        until(lambda: not host.pids(), 8)
    last = host.journal(document)[-1]
    assert last["kind"] == "stopped" and "broke the protocol" in last["body"]["reason"]
    assert host.stop(document)["unit"] == "inactive"


@pytest.mark.slow
def test_a_worker_that_asks_and_never_reads_is_ended(host: Machine) -> None:
    # Every byte of this file is six in an answer.
    path = host.program.with_name("log")
    path.write_bytes(b"\x01" * 65536)
    document = host.start()
    with host.worker() as worker:
        worker.stream.sendall(b"DEAF " + os.fsencode(path) + b"\n")
        until(lambda: not host.pids(), 25)
    assert "does not read" in host.journal(document)[-1]["body"]["reason"]


def test_calls_beyond_the_bound_end_the_run(host: Machine) -> None:
    document = host.start()
    with host.worker() as worker:
        for number in range(1, 40):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.ask(f"c{number}", "exec", argv=["act", "stay"])
        until(lambda: not host.pids(), 8)
    assert "ask one at a time" in host.journal(document)[-1]["body"]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [{"argv": ["act", "\ud800"]}, {"argv": ["act", "a\0b"]}, {"path": "\ud800", "content": "\ud800"}, {"argv": float("nan")}, {"argv": ["x" * 200_000]}],
)  # fmt: skip
def test_words_that_no_program_can_get_are_refused_and_the_run_goes_on(
    host: Machine, arguments: dict[str, Any]
) -> None:
    document = host.start()
    with host.worker() as worker:
        decision, said = worker.call("c1", "exec", **arguments)
        assert decision["outcome"] == "deny" and said["refused"] is True
        assert worker.call("c2", "exec", argv=["act", "say"])[1]["evidence"]["error"] == ""
    host.stop(document)
    assert host.kinds(document)[1:3] == ["call.asked", "call.decided"]


def test_a_running_call_is_cancelled_and_a_waiting_one_is_answered(host: Machine) -> None:
    document = host.start()
    with host.worker() as worker:
        worker.ask("c1", "exec", argv=["act", "stay"])
        assert worker.line()["decision"]["outcome"] == "allow"
        worker.ask("c2", "exec", argv=["act", "say"])
        worker.send({"cancel": "c2"})
        first, second = worker.line(), worker.line()
        assert first["decision"]["rule"] == "cancelled" and second == {"call_id": "c2", "refused": True}
        worker.send({"cancel": "c9"})  # nobody knows it: nothing happens
        worker.send({"cancel": "c1"})
        evidence = worker.line()["evidence"]
        assert evidence["steps"][0]["cancelled"] is True and "cancelled by the worker" in evidence["error"]
        assert worker.call("c3", "exec", argv=["act", "say"])[1]["evidence"]["error"] == ""
    host.stop(document)
    asked = [record["call_id"] for record in host.journal(document) if record["kind"] == "call.asked"]
    assert asked == ["c1", "c2", "c3"]


def test_waiting_calls_are_carried_out_in_their_order(host: Machine) -> None:
    host.start()
    with host.worker() as worker:
        for number in range(1, 6):
            worker.ask(f"c{number}", "exec", argv=["act", "say"])
        order = [worker.line()["call_id"] for _ in range(10)]
    assert order == [name for number in range(1, 6) for name in [f"c{number}"] * 2]


# -- the journal comes first


def test_what_cannot_be_written_to_the_journal_is_not_done(host: Machine) -> None:
    document = host.start()
    journal = host.home / "journal" / f"{document['run_id']}.jsonl"
    broker = host.pids()["broker"]
    import resource

    whole = resource.prlimit(broker, resource.RLIMIT_FSIZE)
    resource.prlimit(broker, resource.RLIMIT_FSIZE, (journal.stat().st_size, whole[1]))
    renewal = {"run_id": document["run_id"], "generation": document["generation"], "seq": 1, "lease_s": 60.0}
    with host.worker() as worker:
        decision, said = worker.call("c1", "exec", argv=["act", "say"])
        assert (decision["outcome"], decision["rule"]) == ("deny", "journal") and said["refused"] is True
        assert "not done" in decision["reason"] and decision["steps"] == []
        # Nor is the lease prolonged.
        assert host.refusal("renew", renewal)[:2] == (4, "journal_failed")
        assert host.verb("status")["lease_left_s"] <= 20
        resource.prlimit(broker, resource.RLIMIT_FSIZE, whole)
        assert worker.call("c2", "exec", argv=["act", "say"])[1]["evidence"]["error"] == ""
    assert host.verb("renew", renewal)["lease_left_s"] > 20
    stopped = host.stop(document)
    assert len(stopped["journal_head"]) == 64
    asked = [record["call_id"] for record in host.journal(document) if record["kind"] == "call.asked"]
    assert asked == ["c2"]


@pytest.mark.slow
def test_two_stops_at_once_write_one_last_line(host: Machine) -> None:
    document = host.start()
    kill(host.pids()["broker"])
    until(lambda: not host.pids())
    asked = json.dumps({"run_id": document["run_id"], "generation": document["generation"]}).encode()
    processes = [host.open("stop") for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(asked)
        process.stdin.close()
    answers = []
    for process in processes:
        assert process.stdout is not None
        answers.append(json.loads(process.stdout.read()))
        process.stdout.close()
        assert process.stderr is not None
        process.stderr.close()
        process.wait(20)
    assert {answer.get("error", {}).get("code", "stopped") for answer in answers} <= {"stopped", "busy"}
    assert host.kinds(document).count("stopped") == 1
    assert len(host.stop(document)["journal_head"]) == 64


# -- files


def test_files_are_read_in_ranges_and_secrets_devices_and_pipes_are_refused(host: Machine) -> None:
    root = host.program.parent
    (root / "log").write_text("0123456789", encoding="utf-8")
    (root / "private.key").write_text("canary", encoding="utf-8")
    (root / "innocent").symlink_to(root / "private.key")
    (root / "outside").symlink_to("/etc/hostname")
    os.mkfifo(root / "pipe")
    with contextlib.suppress(PermissionError):
        os.mknod(root / "device", 0o600 | 0o020000, os.makedev(1, 5))
    host.start()
    with host.worker() as worker:
        _, said = worker.call("c1", "read", path=str(root / "log"), offset=2, length=3)
        step = said["evidence"]["steps"][0]
        assert (step["stdout"], step["cut"], step["exit_status"]) == ("234", True, 0)
        _, said = worker.call("c2", "read", path="/proc/loadavg")
        assert said["evidence"]["steps"][0]["stdout"].count(" ") == 4
        told = ""
        refused = [
            root / "private.key", root / "innocent", root / "outside", host.home / "host.json", Path("/etc/hostname"),
            Path("/proc/self/environ"), Path("/dev/zero"),
        ]  # fmt: skip
        for number, path in enumerate(refused, 10):
            decision, said = worker.call(f"c{number}", "read", path=str(path))
            assert decision["outcome"] == "deny", path
            told += json.dumps([decision, said])
        for number, name in enumerate(("pipe", "device", ""), 30):
            decision, said = worker.call(f"c{number}", "read", path=str(root / name))
            error = said["evidence"]["steps"][0]["error"] if decision["outcome"] == "allow" else decision["reason"]
            assert "regular file" in error or "cannot be opened" in error, (name, error)
        assert "canary" not in told


def test_a_link_that_is_swapped_while_files_are_read_never_leads_outside(host: Machine) -> None:
    # A hostile process of the machine swaps a directory for a link to another one as fast as it can.
    root = host.program.parent
    (root / "data").mkdir()
    (root / "data" / "file").write_text("fine", encoding="utf-8")
    with contextlib.ExitStack() as stack:
        secret = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ch-secret-")))
        (secret / "file").write_text("canary", encoding="utf-8")
        (root / "trap").symlink_to(secret)
        over = threading.Event()

        def swap() -> None:
            while not over.is_set():
                os.rename(root / "data", root / "kept")
                os.rename(root / "trap", root / "data")
                os.rename(root / "data", root / "trap")
                os.rename(root / "kept", root / "data")

        host.start()
        swapping = threading.Thread(target=swap)
        swapping.start()
        try:
            outcomes = set()
            with host.worker() as worker:
                for number in range(1, 200):
                    decision, said = worker.call(f"c{number}", "read", path=str(root / "data" / "file"))
                    assert "canary" not in json.dumps(said)
                    outcomes.add(said["evidence"]["steps"][0]["stdout"] if decision["outcome"] == "allow" else "denied")
        finally:
            over.set()
            swapping.join()
    assert "fine" in outcomes


def test_a_binary_replaced_during_the_run_is_refused(host: Machine) -> None:
    document = host.start()
    with host.worker() as worker:
        assert worker.call("c1", "exec", argv=["act", "say"])[1]["evidence"]["error"] == ""
        other = host.program.with_name("other")
        other.write_text(host.program.read_text(encoding="utf-8").replace('"said"', '"other"'), encoding="utf-8")
        other.chmod(0o755)
        other.replace(host.program)
        _, said = worker.call("c2", "exec", argv=["act", "say"])
        step = said["evidence"]["steps"][0]
        assert "has changed since the lease started" in step["error"] and step["exit_status"] is None
    host.stop(document)
    intents = [record for record in host.journal(document) if record["kind"] == "call.intent"]
    assert [record["call_id"] for record in intents] == ["c1"], "what is refused is not announced as done"


# -- the broker's size


@pytest.mark.slow
def test_the_broker_with_the_whole_default_policy_is_small(host: Machine) -> None:
    from supervisor.policy.loader import default_policy

    host.start(policy=default_policy())
    with host.worker() as worker:
        _, said = worker.call("c1", "uptime")
        assert said["evidence"]["data"]["uptime_s"] > 0
    status = Path(f"/proc/{host.pids()['broker']}/status").read_text(encoding="utf-8")
    rss_kb = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
    assert rss_kb <= 25 * 1024, f"{rss_kb} KiB"
