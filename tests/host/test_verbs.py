"""The gatekeeper as a process: every verb, and one JSON error for everything that is none."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.host import clock, gatekeeper
from edge_agent.host.home import Home
from edge_agent.host.journal import Journal, check
from supervisor.policy.loader import default_policy
from tests.host.machine import Machine, policy_document, run_id
from tests.host.processes import until
from tools.values import digest

Machines = Callable[..., Any]


# -- bad input


@pytest.mark.parametrize(
    "command",
    [
        "", " ", "hello ", " hello", "hello extra", "HELLO", "hello\n", "shell", "observe", "observe a b", "observe ../x",
        "observe", "dial", "dial a2a inference", "dial tools", "start;id", "hello\thello", "sh -c id",
        "scp -t /tmp", "internal-sftp", "x" * 5000, "observe \u202euptime",
    ],
)  # fmt: skip
def test_what_is_no_verb_is_one_error(host: Machine, command: str) -> None:
    status, answer = host.raw(command)
    assert status == 2 and answer["error"]["code"] == "bad_request", answer
    assert answer["error"]["expected"] and len(json.dumps(answer)) < 2000
    logged = (host.home / "gatekeeper.log").read_text(encoding="utf-8").splitlines()
    assert json.loads(logged[-1])["error"]["code"] == "bad_request"


@pytest.mark.parametrize("verb", ["hello", "start", "renew", "stop", "status", "journal", "apply", "observe uptime"])
@pytest.mark.parametrize("data", [b"{", b"[]", b"5", b"\xff\xfe", b'{"a":NaN}', b"[" * 200_000, b"{}{}"])
def test_what_is_no_document_is_one_error(template: Path, tmp_path: Path, verb: str, data: bytes) -> None:
    status, answer = in_process(installed(tmp_path), verb, data)
    assert status == 2 and answer["error"]["code"] == "bad_request", answer


@pytest.mark.parametrize("verb", ["start", "renew", "stop", "journal", "apply", "observe uptime"])
def test_a_document_without_its_fields_names_the_first_that_is_missing(tmp_path: Path, verb: str) -> None:
    status, answer = in_process(installed(tmp_path), verb, b"{}")
    assert status == 2 and "is missing" in answer["error"]["message"], answer


def installed(tmp_path: Path) -> Home:
    (tmp_path / "host.json").write_text(
        json.dumps({"protocol": 1, "machine": "m1", "units": "process", "run_dir": str(tmp_path / "r"), "worker_argv": ["/bin/true"]}),
        encoding="utf-8",
    )  # fmt: skip
    return Home(str(tmp_path))


def in_process(home: Home, command: str, data: bytes) -> tuple[int, dict[str, Any]]:
    """The gatekeeper in this process with real pipes, for inputs of which there are many."""
    read_end, write_end = os.pipe()
    writer = os.fork()
    if writer == 0:
        os.close(read_end)
        try:
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(data)
        finally:
            os._exit(0)
    os.close(write_end)
    out = io.BytesIO()
    with os.fdopen(read_end, "rb", buffering=0) as stdin:
        status = gatekeeper.Gatekeeper(home, stdin, out).serve(command)
    os.waitpid(writer, 0)
    return status, json.loads(out.getvalue())


def test_a_document_that_is_too_large_is_refused_before_it_is_read_to_its_end(tmp_path: Path) -> None:
    status, answer = in_process(installed(tmp_path), "status", b'{"x":"' + b"y" * (5 * 1024 * 1024) + b'"}')
    assert status == 2 and "too large" in answer["error"]["message"]


def test_a_document_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatekeeper, "READ_S", 0.2)
    read_end, write_end = os.pipe()
    out = io.BytesIO()
    began = time.monotonic()
    os.write(write_end, b'{"a":')
    with os.fdopen(read_end, "rb", buffering=0) as stdin:
        status = gatekeeper.Gatekeeper(installed(tmp_path), stdin, out).serve("hello")
    os.close(write_end)
    assert status == 2 and "did not end within 0.2 s" in json.loads(out.getvalue())["error"]["message"]
    assert time.monotonic() - began < 2


def test_a_defect_is_one_error_too_and_stands_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = installed(tmp_path)
    monkeypatch.setattr(clock, "boot_id", lambda: 1 / 0)
    status, answer = in_process(home, "hello", b"")
    assert (status, answer["error"]["code"]) == (4, "machine_failed")
    assert "ZeroDivisionError" in Path(home.log_path).read_text(encoding="utf-8")


def test_an_installation_that_is_not_there_says_how_to_get_one(tmp_path: Path) -> None:
    status, answer = in_process(Home(str(tmp_path / "none")), "hello", b"")
    assert status == 4 and "edge install" in answer["error"]["next"]


def test_a_peer_that_hung_up_makes_no_noise(host: Machine) -> None:
    with host.open("hello") as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr is not None
        said = process.stderr.read()
        process.wait(20)
    assert b"Traceback" not in said


# -- verbs that only look


def test_hello_tells_of_the_machine_without_starting_anything(host: Machine) -> None:
    said = host.verb("hello")
    assert (said["protocol"], said["machine"], said["units"], said["run"]) == (1, "m1", "process", None)
    assert said["boot_id"] == clock.boot_id() and abs(said["boottime"] - clock.boottime()) < 20
    assert said["kernel"] == os.uname().release and said["python"].count(".") == 2
    assert said["capabilities"]["landlock"]["abi"] >= 0
    assert host.pids() == {}


def test_status_of_a_machine_at_rest_proves_that_nothing_runs(host: Machine) -> None:
    said = host.verb("status")
    assert (said["unit"], said["processes"], said["run"], said["lease_left_s"]) == ("inactive", [], None, None)


def test_a_journal_is_read_page_by_page(host: Machine, tmp_path: Path) -> None:
    run = run_id()
    (host.home / "journal").mkdir()
    journal = Journal(str(host.home / "journal" / f"{run}.jsonl"), run)
    for number in range(40):
        journal.append("call.asked", {"tool": "x" * 100_000, "number": number}, "c1")
    journal.close()
    lines: list[str] = []
    pages = 0
    while True:
        page = host.verb("journal", {"run_id": run, "offset": len(lines)})
        lines += page["lines"]
        pages += 1
        assert page["next"] == len(lines) and page["head"] == journal.head and page["over"] is False
        if page["complete"]:
            break
    assert pages > 1 and check(lines, run) == (40, journal.head)
    beyond = host.verb("journal", {"run_id": run, "offset": 99})
    assert (beyond["lines"], beyond["complete"]) == ([], True)


@pytest.mark.parametrize(
    "document",
    [{"run_id": "../../x"}, {"run_id": 5}, {"run_id": run_id(), "offset": -1}, {"run_id": run_id(), "offset": True}],
)
def test_a_journal_that_nobody_may_name_is_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    home = installed(tmp_path)
    assert in_process(home, "journal", json.dumps(document).encode())[0] == 2


def test_a_broken_journal_is_shown_and_said_to_be_broken(tmp_path: Path) -> None:
    home, run = installed(tmp_path), run_id()
    Path(home.journal_path(run)).write_text('{"seq":7}\nnonsense\n', encoding="ascii")
    status, page = in_process(home, "journal", json.dumps({"run_id": run}).encode())
    assert status == 0 and page["lines"] == ['{"seq":7}', "nonsense"] and page["head"].startswith("broken: line 1")


# -- observe


def observe_document(**changes: Any) -> dict[str, Any]:
    policy = changes.pop("policy", None) or default_policy()
    return {
        "run_id": run_id(), "parameters": {}, "policy": policy, "policy_digest": digest(policy),
        "boot_id": clock.boot_id(), "not_after": clock.boottime() + 30, **changes,
    }  # fmt: skip


def test_observe_carries_out_one_observer_and_leaves_a_journal(host: Machine) -> None:
    document = observe_document()
    said = host.verb("observe uptime", document)
    assert said["decision"]["outcome"] == "allow" and said["decision"]["rule"] == "observer:uptime"
    assert said["evidence"]["data"]["uptime_s"] > 0 and said["evidence"]["error"] == ""
    kinds = [json.loads(line)["kind"] for line in said["journal"]]
    assert kinds[0] == "lease.started" and kinds[-1] == "stopped" and "call.intent" in kinds and "call.result" in kinds
    check(said["journal"], document["run_id"])
    # It can be fetched again, and asking twice is refused.
    assert host.verb("journal", {"run_id": document["run_id"]})["lines"] == said["journal"]
    assert host.refusal("observe uptime", document)[:2] == (4, "journal_failed")
    assert host.pids() == {}


def test_an_observer_that_the_policy_does_not_allow_is_denied(host: Machine) -> None:
    said = host.verb("observe failed_units", observe_document(policy=policy_document(host.program)))
    assert said["decision"]["outcome"] == "deny" and said["evidence"] is None
    assert "call.intent" not in "".join(said["journal"])


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"boot_id": "other"}, "stale"), ({"not_after": 1.0}, "stale"), ({"not_after": 1e12}, "bad_request"),
        ({"policy_digest": "sha256:0"}, "bad_request"), ({"run_id": "x"}, "bad_request"),
        ({"policy": {"rules": 5}}, "bad_request"), ({"parameters": []}, "bad_request"),
    ],
)  # fmt: skip
def test_an_observation_that_may_not_be_is_refused(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    home = installed(tmp_path)
    status, answer = in_process(home, "observe uptime", json.dumps(observe_document(**changes)).encode())
    assert answer["error"]["code"] == code and status in (2, 3)
    assert not os.path.exists(home.journals) or os.listdir(home.journals) in ([], ["observed"])


def test_there_is_no_observer_of_that_name(tmp_path: Path) -> None:
    status, answer = in_process(installed(tmp_path), "observe nothing", json.dumps(observe_document()).encode())
    assert status == 2 and "uptime" in answer["error"]["expected"]


def test_observations_do_not_push_out_the_journals_of_runs(host: Machine) -> None:
    (host.home / "journal" / "observed").mkdir(parents=True)
    kept = host.home / "journal" / "00000000-0000-7000-8000-000000000000.jsonl"
    kept.write_text("", encoding="ascii")
    for number in range(200):
        (host.home / "journal" / "observed" / f"0000{number:04x}-0000-7000-8000-000000000000.jsonl").touch()
    host.verb("observe uptime", observe_document())
    assert kept.exists() and len(os.listdir(host.home / "journal" / "observed")) == 200


# -- apply


def entry(path: str, content: bytes, **changes: Any) -> dict[str, Any]:
    return {
        "path": path, "mode": 0o644, "content_b64": base64.b64encode(content).decode(),
        "sha256": hashlib.sha256(content).hexdigest(), **changes,
    }  # fmt: skip


UNIT = Path(".config/systemd/user/chargehand-broker.service")


def test_apply_replaces_what_differs_and_keeps_what_was(host: Machine) -> None:
    old = (host.home / "host.json").read_bytes()
    new = json.dumps(dict(host.configuration, max_run_s=500)).encode()
    files = [entry("host.json", new), entry("chargehand-broker.service", b"[Unit]\n")]
    dry = host.verb("apply", {"files": files, "dry_run": True})
    assert (dry["changed"], dry["backup"]) == (["host.json", "chargehand-broker.service"], "")
    assert (host.home / "host.json").read_bytes() == old

    done = host.verb("apply", {"files": files})
    assert done["changed"] == ["host.json", "chargehand-broker.service"] and done["unchanged"] == []
    assert (host.home / "host.json").read_bytes() == new and (host.home.parent / UNIT).read_bytes() == b"[Unit]\n"
    assert (Path(done["backup"]) / "host.json").read_bytes() == old
    assert (host.home / "host.json").stat().st_mode & 0o777 == 0o600

    again = host.verb("apply", {"files": files})
    assert (again["changed"], again["backup"]) == ([], "")


@pytest.mark.parametrize(
    "bad",
    [
        entry("../../.ssh/authorized_keys", b"x"), entry("/etc/passwd", b"x"), entry("state.json", b"{}"),
        entry("host.pyz", b"x", sha256="0" * 64), entry("host.pyz", b"x", content_b64="***"),
        entry("host.json", b"{}"), entry("host.json", b'{"protocol":1,"machine":"m1","units":"process"}'),
        {"path": "host.pyz"}, "host.pyz", {**entry("host.pyz", b"x"), "path": 5},
    ],
)  # fmt: skip
def test_apply_writes_nothing_if_one_entry_is_not_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: Any
) -> None:
    home = installed(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    document = {"files": [entry("chargehand-broker.service", b"[Unit]\n"), bad]}
    status, answer = in_process(home, "apply", json.dumps(document).encode())
    assert status == 2 and answer["error"]["code"] == "bad_request", answer
    assert not (tmp_path / UNIT).exists() and not os.path.exists(home.backup)


def test_apply_replaces_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = installed(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = Path(home.config_path).read_bytes()
    # The second file's directory cannot be made: something else has its name.
    (tmp_path / ".config").write_text("", encoding="utf-8")
    new = json.dumps(dict(json.loads(before), max_run_s=500)).encode()
    document = {"files": [entry("host.json", new), entry("chargehand-broker.service", b"[Unit]\n")]}
    status, answer = in_process(home, "apply", json.dumps(document).encode())
    assert status == 4 and "backup" in answer["error"]["next"]
    assert Path(home.config_path).read_bytes() == before
    assert [name for name in os.listdir(tmp_path) if name.endswith(".new") or name.startswith(".new")] == []


# -- dial


@pytest.mark.parametrize("name", ["a2a", "inference"])
def test_dial_without_a_run_is_refused(host: Machine, name: str) -> None:
    assert host.refusal(f"dial {name}")[:2] == (3, "no_lease")


def dial(host: Machine, name: str = "a2a") -> subprocess.Popen[bytes]:
    process = host.open(f"dial {name}", bufsize=0)
    assert process.stdout is not None
    assert process.stdout.readline() == b'{"ok":true}\n'
    return process


@pytest.fixture
def echo(host: Machine) -> Any:
    """Something listens where a worker would."""
    (host.run_dir / "worker").mkdir(parents=True, mode=0o700)
    host.run_dir.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(host.run_dir / "worker" / "a2a.sock"))
        listener.listen(2)
        yield listener


def test_dial_carries_bytes_both_ways_at_once(host: Machine, echo: socket.socket) -> None:
    with dial(host) as process:
        assert process.stdin is not None and process.stdout is not None
        stream, _ = echo.accept()
        # More than every buffer between the two ends, in both directions before anybody reads.
        big = os.urandom(1024) * 4096
        writer = os.fork()
        if writer == 0:
            try:
                stream.sendall(big)
                stream.shutdown(socket.SHUT_WR)
            finally:
                os._exit(0)
        process.stdin.write(big[: 1024 * 64])
        received = b""
        while len(received) < 1024 * 64:
            received += stream.recv(65536)
        assert received == big[: 1024 * 64]
        stream.close()
        back = b""
        while len(back) < len(big):
            back += process.stdout.read(65536) or b""
        assert back == big
        os.waitpid(writer, 0)
        process.stdin.close()
        assert process.wait(10) == 0


def test_dial_passes_the_end_on_and_adds_no_word_when_the_worker_breaks_off(host: Machine, echo: socket.socket) -> None:
    with dial(host) as process:
        assert process.stdin is not None and process.stdout is not None
        stream, _ = echo.accept()
        process.stdin.close()
        assert stream.recv(10) == b""
        stream.sendall(b"last")
        stream.close()
        assert process.stdout.read() == b"last"
        assert process.wait(10) == 0
    with dial(host) as process:
        assert process.stdin is not None and process.stdout is not None
        stream, _ = echo.accept()
        process.stdin.write(b"unread")
        until(lambda: stream.recv(10, socket.MSG_PEEK))
        stream.close()  # with bytes unread: the other side gets a reset
        assert process.stdout.read() == b""
        assert process.wait(10) == 0


def test_dial_does_not_follow_a_link_that_a_worker_put_in_the_sockets_place(host: Machine, echo: socket.socket) -> None:
    os.symlink(host.run_dir / "worker" / "a2a.sock", host.run_dir / "worker" / "inference.sock")
    assert host.refusal("dial inference")[:2] == (3, "no_lease")
