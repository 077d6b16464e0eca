"""The runner with real processes: what a command sees, how it ends, and that nothing of it stays."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import select
import selectors
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from edge_agent.host import confine, runner
from edge_agent.host.errors import Refused
from edge_agent.host.home import HostConfig
from edge_agent.host.pins import Pins
from edge_agent.host.preflight import capabilities
from edge_agent.host.runner import BASE_ENVIRONMENT, Pipeline, access_file, descendants
from tests.host.processes import PYTHON, alive, carry_out, in_child, run, script, serve, stage, until
from tools.values import FileAccess, Stage

LANDLOCK = confine.landlock_abi()[0]
needs_landlock = pytest.mark.skipif(LANDLOCK == 0, reason="this kernel has no Landlock")


# -- how a command ends


def test_the_exit_status_and_both_outputs_come_back() -> None:
    result = run(script("import sys; print('out'); sys.stderr.write('err'); sys.exit(7)"))
    assert (result["exit_status"], result["exit_statuses"], result["signal"]) == (7, [7], None)
    assert (result["stdout"], result["stderr"]) == ("out\n", "err")
    assert result["stdout_digest"] == "sha256:" + hashlib.sha256(b"out\n").hexdigest()
    assert (result["stdout_bytes"], result["stderr_bytes"], result["cut"]) == (4, 3, False)
    assert result["max_rss_kb"] > 1000 and result["duration_ms"] > 0 and result["error"] == ""


def test_a_command_that_dies_of_a_signal_has_no_exit_status() -> None:
    result = run(script("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))
    assert (result["exit_status"], result["signal"], result["error"]) == (None, signal.SIGSEGV, "")


def test_the_stages_of_a_pipeline_are_connected_processes() -> None:
    result = run(
        script("print('b\\na\\nb')"),
        stage("/usr/bin/sort"),
        stage("/usr/bin/uniq", "-c"),
    )
    assert result["stdout"].split() == ["1", "a", "2", "b"]
    assert result["exit_statuses"] == [0, 0, 0]
    assert len(result["argv"]) == 3


def test_every_stage_of_a_pipeline_tells_its_exit_status() -> None:
    result = run(script("raise SystemExit(3)"), script("import sys; sys.stdin.read(); raise SystemExit(0)"))
    assert (result["exit_status"], result["exit_statuses"]) == (0, [3, 0])


def test_a_stage_that_nobody_reads_any_more_dies_of_sigpipe() -> None:
    result = run(stage("/usr/bin/yes"), stage("/usr/bin/head", "-n", "1"))
    assert result["exit_statuses"] == [None, 0]
    assert result["exit_status"] == 0


@pytest.mark.parametrize(("mode", "stdout", "stderr"), [("keep", "o", "e"), ("discard", "o", ""), ("stdout", "oe", "")])
def test_stderr_is_kept_discarded_or_merged(mode: str, stdout: str, stderr: str) -> None:
    result = run(script("import os; os.write(1, b'o'); os.write(2, b'e')", stderr=mode))
    assert (result["stdout"], result["stderr"]) == (stdout, stderr)


def test_a_file_that_is_no_program_says_so_and_does_not_run(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("echo this would need a shell\n", encoding="utf-8")
    program.chmod(0o755)
    result = run(stage(str(program)))
    assert result["exit_status"] == 126
    assert "could not be executed" in result["stderr"] and "Exec format error" in result["stderr"]


def test_a_word_that_cannot_be_a_word_says_so() -> None:
    result = run(Stage(PYTHON, (PYTHON, "\ud800")))
    assert result["exit_status"] == 126 and "could not be executed" in result["stderr"]


# -- what a command sees

SIGHT = """
import json, os, resource, sys
status = {name: value.strip() for name, _, value in (line.partition(":") for line in open("/proc/self/status"))}
print(json.dumps({
    "environment": dict(os.environ), "stdin": sys.stdin.read(), "cwd": os.getcwd(), "session": os.getsid(0) == os.getpid(),
    "umask": os.umask(0), "fds": sorted(int(n) for n in os.listdir("/proc/self/fd")), "tty": os.isatty(0),
    "no_new_privs": status["NoNewPrivs"], "blocked": int(status["SigBlk"], 16),
    "limits": {n: resource.getrlimit(getattr(resource, n))[0] for n in ("RLIMIT_CORE", "RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_CPU")},
}))
"""


def test_a_command_sees_nothing_of_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_BROKER", "canary")
    with socket.socket() as inherited:
        inherited.set_inheritable(False)
        seen = json.loads(run(script(SIGHT, env={"EXTRA": "1"}, timeout_s=9.0))["stdout"])
    assert seen["environment"] == {**BASE_ENVIRONMENT, "EXTRA": "1"}
    assert (seen["stdin"], seen["cwd"], seen["session"], seen["umask"], seen["tty"]) == ("", "/", True, 0o077, False)
    assert seen["fds"] in ([0, 1, 2], [0, 1, 2, 3])  # 3: the listing itself
    assert seen["no_new_privs"] == "1"
    assert seen["blocked"] == 0
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert seen["limits"] == {
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": min(1024, hard),
        "RLIMIT_FSIZE": 64 * 1024 * 1024,
        "RLIMIT_CPU": 10,
    }


def test_no_signal_is_ignored_although_python_ignores_some() -> None:
    # Read with grep: an interpreter would set its own dispositions first.
    seen = run(stage("/usr/bin/grep", "SigIgn", "/proc/self/status"))["stdout"]
    assert int(seen.split()[1], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0


def test_a_descriptor_that_was_left_open_for_the_broker_is_closed_for_commands() -> None:
    def work() -> Any:
        left = os.open("/dev/null", os.O_RDONLY)
        os.set_inheritable(left, True)
        return carry_out(stage("/usr/bin/ls", "/proc/self/fd"))["stdout"].split()

    assert in_child(work) == ["0", "1", "2", "3"]


# -- limits


def test_what_is_over_the_cap_is_counted_and_digested_but_not_kept() -> None:
    result = run(script("print('x' * 99_999)", output_bytes=1000))
    assert result["stdout"] == "x" * 1000
    assert (result["stdout_bytes"], result["cut"]) == (100_000, True)
    assert result["stdout_digest"] == "sha256:" + hashlib.sha256(b"x" * 99_999 + b"\n").hexdigest()


def test_bytes_that_are_no_text_are_shown_as_escapes() -> None:
    assert run(script("import os; os.write(1, b'a\\xff\\x1b[0m')"))["stdout"] == "a\\xff\x1b[0m"


def test_a_flood_is_killed_and_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FLOOD_BYTES", 1_000_000)
    result = run(script("import os\nwhile True: os.write(2, b'x' * 65536)", output_bytes=10))
    assert result["signal"] == signal.SIGKILL and "wrote more than 1000000 bytes" in result["error"]
    assert (result["cut"], result["stderr"], result["timed_out"]) == (True, "x" * 10, False)


def test_a_command_that_takes_too_long_is_killed_and_what_it_said_is_kept() -> None:
    began = time.monotonic()
    result = run(script("import time; print('begun', flush=True); time.sleep(60)", timeout_s=0.3))
    assert time.monotonic() - began < 3
    assert (result["timed_out"], result["signal"], result["stdout"]) == (True, signal.SIGKILL, "begun\n")
    assert result["error"] == "killed after its time limit of 0.3 s" and result["left"] == []


def test_a_cancelled_command_says_so(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    gate = os.open(begun, os.O_RDWR | os.O_NONBLOCK)
    try:
        code = "import os, sys, time; os.write(os.open(sys.argv[1], os.O_WRONLY), b'1'); time.sleep(60)"
        result = run(
            script(code, str(begun), writes=(str(tmp_path),)),
            cancel_when=lambda: bool(select.select([gate], [], [], 0)[0]),
        )
    finally:
        os.close(gate)
    assert (result["cancelled"], result["timed_out"], result["exit_status"]) == (True, False, None)
    assert result["error"] == "killed: the test said so"


# -- the whole tree

LEAVES_CHILDREN = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
told = []
for kind in ("plain", "session", "double"):
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        if kind != "plain":
            os.setsid()
        if kind == "double" and os.fork():
            os._exit(0)
        os.write(write_end, b"%d" % os.getpid())
        time.sleep(60)
        os._exit(0)
    told.append(os.read(read_end, 20).decode())
print(" ".join(told), flush=True)
if sys.argv[1] == "stay":
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["ends", "stay"])
def test_nothing_that_a_command_started_outlives_it(how: str) -> None:
    result = run(script(LEAVES_CHILDREN, how, timeout_s=0.5 if how == "stay" else 30.0))
    pids = [int(word) for word in result["stdout"].split()]
    assert len(pids) == 3 and result["left"] == []
    assert [pid for pid in pids if alive(pid)] == []
    assert result["timed_out"] is (how == "stay")


# A chain in which each process only lives to fork the next one: whoever is listed is gone when the signal comes.
RUNNER_AWAY = """
import os, sys
print("on", flush=True)
for _ in range(20000):
    if os.fork():
        os._exit(0)
"""
# A tree of 120 processes, four levels deep. Bounded, so that a failing test leaves the machine usable.
BUSH = """
import os, signal
print("on", flush=True)
for level in range(4):
    for _ in range(3):
        if os.fork() == 0:
            break
    else:
        signal.pause()
signal.pause()
"""


@pytest.mark.parametrize("code", [RUNNER_AWAY, BUSH])
def test_children_that_fork_while_they_are_killed_are_gone_too(code: str) -> None:
    result = run(script(code, timeout_s=0.3))
    assert result["stdout"] == "on\n" and result["left"] == [] and "not even" not in result["error"]


def test_a_kernel_that_does_not_list_children_is_asked_for_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> Any:
        pid = os.fork()
        if pid == 0:
            if os.fork() == 0:
                signal.pause()
            signal.pause()
        below = until(lambda: len(descendants(os.getpid())) == 2 and descendants(os.getpid()))
        real = os.path.exists
        monkeypatch.setattr(os.path, "exists", lambda path: path != "/proc/thread-self/children" and real(path))
        found = descendants(os.getpid())
        left = runner.kill_descendants()
        return [sorted(below) == sorted(found), left, descendants(os.getpid())]

    assert in_child(look) == [True, [], []]


def test_an_output_that_somebody_else_holds_open_does_not_hold_up_the_end(tmp_path: Path) -> None:
    # As systemd-run or a container engine do: the command hands its output to a service that lives on.
    path = str(tmp_path / "service.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.bind(path)
        code = (
            "import array, os, socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect(sys.argv[1])\n"
            "s.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1, 2]))]); print('said')"
        )
        began = time.monotonic()
        result = run(script(code, path))
        _, fds, _, _ = socket.recv_fds(service, 10, 4)
    for fd in fds:
        os.close(fd)
    assert len(fds) == 2 and result["stdout"] == "said\n" and result["exit_status"] == 0
    assert time.monotonic() - began < 5


def test_two_ends_in_one_round_do_not_kill_the_next_step() -> None:
    # Both stages have ended before the loop looks. The first event finishes the step, which starts the next one; the
    # second event is old and must not be taken for the end of the new one.
    def work() -> Any:
        selector = selectors.DefaultSelector()
        results: list[Any] = []
        later: list[Pipeline] = []
        both = (script("pass"), script("pass"))
        slow = script("import time; time.sleep(0.2); print('whole')")
        pins = Pins([PYTHON])

        def first_done(result: Any) -> None:
            results.append(result)
            later.append(Pipeline([slow], pins, selector, results.append))

        first = Pipeline(both, pins, selector, first_done)
        for pid in list(first._pids):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        serve(selector, first, lambda: bool(later))
        serve(selector, later[0], lambda: len(results) == 2)
        return [result.to_json() for result in results]

    first, second = in_child(work)
    assert first["exit_statuses"] == [0, 0]
    assert (second["exit_status"], second["stdout"]) == (0, "whole\n")


def freezer() -> Path | None:
    root = Path("/sys/fs/cgroup/freezer")
    return root if os.access(root / "tasks", os.W_OK) else None


@pytest.mark.skipif(freezer() is None, reason="needs a freezer control group (v1) that this user may make")
def test_a_process_that_not_even_sigkill_ends_is_given_up_and_named() -> None:
    group = freezer() / f"chargehand-test-{os.getpid()}"  # type: ignore[operator]
    group.mkdir()
    try:

        def work() -> Any:
            selector = selectors.DefaultSelector()
            results: list[Any] = []
            pins = Pins([PYTHON])
            held = Pipeline([script("import time; time.sleep(60)", timeout_s=0.4)], pins, selector, results.append)
            (pid,) = held._pids
            until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(PYTHON.encode()))
            (group / "tasks").write_text(str(pid))
            (group / "freezer.state").write_text("FROZEN")
            began = time.monotonic()
            serve(selector, held, lambda: bool(results))
            took = time.monotonic() - began
            # The next command is not held up by the one that stays.
            after = carry_out(script("print('next')"))
            (group / "freezer.state").write_text("THAWED")
            os.waitpid(pid, 0)
            return {"pid": pid, "took": took, "error": results[0].error, "after": after}

        told = in_child(work)
    finally:
        until(lambda: not (group / "tasks").read_text())
        group.rmdir()
    assert f"not even SIGKILL ended process {told['pid']}" in told["error"]
    assert told["took"] < 5
    assert told["after"]["stdout"] == "next\n" and told["after"]["error"] == ""


# -- confinement by the kernel


@needs_landlock
def test_a_command_cannot_write_where_its_rule_does_not_say_so(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "old").write_text("kept", encoding="utf-8")
    code = """
import os, sys
inside, outside = sys.argv[1:]
def attempt(name, act):
    try:
        act()
        print(name, "done")
    except OSError as error:
        print(name, error.strerror)
attempt("inside", lambda: open(inside + "/new", "w"))
attempt("create", lambda: open(outside + "/new", "w"))
attempt("open", lambda: open(outside + "/old", "r+"))
attempt("truncate", lambda: os.truncate(outside + "/old", 0))
attempt("remove", lambda: os.unlink(outside + "/old"))
attempt("mkdir", lambda: os.mkdir(outside + "/dir"))
attempt("symlink", lambda: os.symlink("x", outside + "/link"))
attempt("null", lambda: open("/dev/null", "w"))
attempt("read", lambda: open(outside + "/old"))
"""
    result = run(script(code, str(inside), str(outside), writes=(str(inside),)))
    told = dict(line.split(" ", 1) for line in result["stdout"].splitlines())
    allowed = {name for name, said in told.items() if said == "done"}
    expected = {"inside", "null", "read"} | ({"truncate"} if LANDLOCK < 3 else set())
    assert allowed == expected, told
    if LANDLOCK >= 3:
        assert (outside / "old").read_text(encoding="utf-8") == "kept"


@pytest.mark.skipif(LANDLOCK < 4, reason="Landlock restricts TCP from ABI 4 on")
@pytest.mark.parametrize("network", [False, True])
def test_a_command_without_network_makes_no_tcp_connection(network: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            "import socket, sys\ntry: socket.create_connection(('127.0.0.1', int(sys.argv[1]))); print('connected')\n"
            "except OSError as error: print(error.strerror)"
        )
        result = run(script(code, str(server.getsockname()[1]), network=network))
    assert result["stdout"].strip() == ("connected" if network else "Permission denied")


@pytest.mark.skipif(LANDLOCK < 6, reason="Landlock scopes signals from ABI 6 on")
def test_a_command_cannot_signal_the_broker() -> None:
    result = run(script("import os\ntry: os.kill(os.getppid(), 15)\nexcept OSError as error: print(error.strerror)"))
    assert result["stdout"] == "Operation not permitted\n"


def _without_landlock() -> None:
    """Have the kernel answer ENOSYS to landlock_create_ruleset in this process, as one without Landlock does."""
    import ctypes

    program = b"".join(
        struct.pack("=HBBI", *step)
        for step in ((0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7FFF0000))
    )
    buffer = ctypes.create_string_buffer(program)
    filters = struct.pack("@HP", 4, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    confine.no_new_privileges()
    assert libc.prctl(22, 2, filters, 0, 0) == 0, os.strerror(ctypes.get_errno())


def test_a_kernel_without_landlock_is_told_of_honestly_and_commands_still_run() -> None:
    def work() -> Any:
        _without_landlock()
        return [capabilities(HostConfig("m1", "process"))["landlock"], carry_out(script("print('ran')"))["stdout"]]

    level, stdout = in_child(work)
    assert level == {"abi": 0, "level": "none", "problem": "Function not implemented"}
    assert stdout == "ran\n"


def test_what_landlock_does_is_said_for_each_version() -> None:
    levels = [confine.landlock_level(abi) for abi in range(8)]
    assert levels[0] == "none" and "TCP" not in levels[3] and "TCP" in levels[4] and "signals" in levels[6]


def test_a_child_dies_when_the_broker_is_killed() -> None:
    def work() -> Any:
        broker = os.fork()
        if broker == 0:
            selector = selectors.DefaultSelector()
            pipeline = Pipeline([script("import time; time.sleep(60)")], Pins([PYTHON]), selector, lambda _: None)
            serve(selector, pipeline, lambda: False)
        (child,) = until(lambda: descendants(broker))
        until(lambda: Path(f"/proc/{child}/cmdline").read_bytes().startswith(PYTHON.encode()))
        os.kill(broker, signal.SIGKILL)
        os.waitpid(broker, 0)
        return until(lambda: not alive(child))

    assert in_child(work) is True


# -- pins


def refused(stage_: Stage, pins: Pins) -> str:
    with pytest.raises(Refused) as caught:
        Pipeline([stage_], pins, selectors.DefaultSelector(), lambda _: None)
    return str(caught.value)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.write_text("#!/bin/sh\necho original\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_a_pinned_script_runs(program: Path) -> None:
    assert run(stage(str(program), "x"))["stdout"] == "original\n"


def test_a_binary_the_lease_does_not_name_is_refused(program: Path) -> None:
    assert "not an executable of this lease" in refused(stage(str(program)), Pins(["/usr/bin/true"]))


def test_a_binary_replaced_since_the_lease_is_refused(program: Path, tmp_path: Path) -> None:
    pins = Pins([str(program)])
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho replaced\n", encoding="utf-8")
    other.chmod(0o755)
    other.replace(program)
    assert "has changed since the lease" in refused(stage(str(program)), pins)


def test_a_binary_written_in_place_is_refused_even_with_its_old_time_and_size(program: Path) -> None:
    pins = Pins([str(program)])
    before = program.stat()
    program.write_text("#!/bin/sh\necho 0riginal\n", encoding="utf-8")
    os.utime(program, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert program.stat().st_size == before.st_size
    assert "has changed since the lease" in refused(stage(str(program)), pins)


def test_a_swapped_link_is_refused(program: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(program)
    pins = Pins([str(link)])
    link.unlink()
    link.symlink_to("/usr/bin/true")
    assert "leads to another file" in refused(stage(str(link)), pins)


def test_a_binary_that_has_gone_is_refused(program: Path) -> None:
    pins = Pins([str(program)])
    program.unlink()
    assert "cannot be opened any more" in refused(stage(str(program)), pins)


def test_a_file_that_anybody_may_write_or_nobody_may_execute_is_no_program(tmp_path: Path) -> None:
    for name, mode in (("open", 0o757), ("plain", 0o644)):
        path = tmp_path / name
        path.write_text("#!/bin/sh\n", encoding="utf-8")
        path.chmod(mode)
        assert Pins([str(path)]).real(str(path)) is None
    assert Pins([str(tmp_path)]).real(str(tmp_path)) is None


def test_the_digest_of_a_pinned_binary_is_that_of_its_content(program: Path) -> None:
    pins = Pins([str(program)])
    assert pins.sha256(str(program)) == hashlib.sha256(program.read_bytes()).hexdigest()


def test_nothing_of_a_pipeline_runs_if_its_last_binary_is_refused(program: Path, tmp_path: Path) -> None:
    pins = Pins([str(program), PYTHON])
    program.unlink()
    mark = tmp_path / "mark"
    first = script("import sys; open(sys.argv[1], 'w')", str(mark), writes=(str(tmp_path),))
    with pytest.raises(Refused):
        Pipeline([first, stage(str(program))], pins, selectors.DefaultSelector(), lambda _: None)
    assert not mark.exists()


# -- reading files


def read(path: str, offset: int = 0, length: int = 65536) -> Any:
    return access_file(
        FileAccess("read", path, "/", offset, length), lambda a: os.open(a.path, os.O_RDONLY | os.O_NONBLOCK)
    )


def test_a_range_of_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(bytes(range(65, 91)))
    result = read(str(path), 2, 3)
    assert (result.stdout, result.cut, result.exit_status, result.stdout_bytes) == ("CDE", True, 0, 26)
    assert result.stdout_digest == "sha256:" + hashlib.sha256(b"CDE").hexdigest()
    assert (read(str(path), 20, 6).stdout, read(str(path), 20, 6).cut) == ("UVWXYZ", False)
    assert (read(str(path), 99, 6).stdout, read(str(path), 99, 6).cut) == ("", False)


def test_files_of_proc_are_read_although_they_say_they_are_empty() -> None:
    result = read("/proc/self/status", 6, 10)
    assert len(result.stdout) == 10 and result.cut and result.exit_status == 0
    assert read("/proc/loadavg").stdout.count(" ") == 4


@pytest.mark.parametrize("offset", [2**63, 2**70])
def test_an_offset_no_file_has_is_an_error_and_no_crash(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "log"
    path.write_text("x", encoding="utf-8")
    result = read(str(path), offset)
    assert result.error and result.exit_status is None


def test_a_write_is_refused_by_a_runner_that_only_reads(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")
    access = FileAccess("write", str(path), str(tmp_path), content="new", mode=0o644)
    result = access_file(access, lambda a: os.open(a.path, os.O_RDWR))
    assert "only reads" in result.error and path.read_text(encoding="utf-8") == "old"


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    assert "not a regular file" in read(str(tmp_path)).error
