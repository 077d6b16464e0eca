"""Bytes from outside become values or one clear error; and ``host.json`` and ``state.json`` hold what they must."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.host.documents import read_object, seconds
from edge_agent.host.errors import Busy, HostError, MachineFailed
from edge_agent.host.home import Home, HostConfig, connect_below, empty, write_atomic
from tests.host.test_lease import json_values
from tools.values import Malformed

GOOD = {"protocol": 1, "machine": "web-01", "units": "process", "worker_argv": ["/bin/worker"]}


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_malformed(data: bytes) -> None:
    try:
        assert isinstance(read_object(data), dict)
    except Malformed as error:
        assert str(error)


@given(json_values)
def test_any_json_is_an_object_or_malformed(value: Any) -> None:
    text = json.dumps(value)
    try:
        assert read_object(text) == value
    except Malformed:
        assert not isinstance(value, dict) or "NaN" in text or "Infinity" in text


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a":NaN}', '{"a":-Infinity}', "[]", "5", "", "{"])
def test_what_is_no_object_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        read_object(text)


@given(json_values)
def test_seconds_are_finite_or_malformed(value: Any) -> None:
    try:
        assert seconds({"s": value}, "s") == value
    except Malformed as error:
        assert "'s'" in str(error)


@settings(max_examples=300)
@given(st.data())
def test_any_configuration_is_right_or_a_clear_error(data: st.DataObject) -> None:
    document: dict[str, Any] = dict(GOOD, run_dir=None, max_lease_s=120, max_run_s=3600, image=None)
    for name in data.draw(st.lists(st.sampled_from(sorted(document)), max_size=3)):
        document[name] = data.draw(json_values)
    try:
        config = HostConfig.from_json(document)
    except Malformed as error:
        assert str(error)
        return
    assert config.units in ("systemd", "process") and 1 <= config.max_lease_s <= 86400
    assert config.run_dir is None or config.run_dir.startswith("/")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol": 2}, "protocol"), ({"machine": "Web 01"}, "slug"), ({"machine": "a" * 64}, "slug"),
        ({"units": "cron"}, "units"), ({"worker_argv": []}, "worker_argv"), ({"worker_argv": None}, "worker_argv"),
        ({"worker_argv": ["worker"]}, "absolute path"), ({"worker_argv": ["/x\0y"]}, "worker_argv"),
        ({"run_dir": "run"}, "absolute"), ({"max_lease_s": 0}, "max_lease_s"), ({"max_run_s": 10**400}, "max_run_s"),
        ({"max_run_s": float("nan")}, "max_run_s"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_says_which_field(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Malformed, match=says):
        HostConfig.from_json({**GOOD, **changes})


def test_systemd_needs_no_worker_command() -> None:
    assert HostConfig.from_json({**GOOD, "units": "systemd", "worker_argv": None}).worker_argv == ()


# -- the home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"protocol":1}', "[" * 100_000, "\xff"])
def test_a_damaged_configuration_is_the_machines_failure(home: Home, content: str) -> None:
    Path(home.config_path).write_text(content, encoding="latin-1")
    with pytest.raises(MachineFailed) as caught:
        home.config()
    assert home.config_path in caught.value.message and caught.value.next_step


@pytest.mark.parametrize(
    "content", ["", "null", "[1]", '{"generation":"1"}', '{"generation":1,"run":5}', '{"generation":1,"run":{}}']
)
def test_a_damaged_state_stops_everything_because_it_holds_the_fence(home: Home, content: str) -> None:
    Path(home.state_path).write_text(content, encoding="utf-8")
    with pytest.raises(MachineFailed, match="state.json"):
        home.state()


def test_a_new_machine_has_generation_zero(home: Home) -> None:
    assert home.state() == {"generation": 0, "run": None}


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(TypeError):
        write_atomic(str(path), "not bytes")  # type: ignore[arg-type]
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["file"]
    write_atomic(str(path), b"new", 0o640)
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o640


def test_the_lock_does_not_wait(home: Home) -> None:
    with home.lock(), pytest.raises(Busy), Home(home.root).lock():
        pass


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_run_directory_that_others_may_enter_is_refused(tmp_path: Path, home: Home, mode: int) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=mode)
    path.chmod(mode)
    with pytest.raises(MachineFailed, match="open to others"):
        home.run_dir(HostConfig("m1", "process", run_dir=str(path)))


def test_a_run_directory_that_is_a_link_or_too_long_is_refused(tmp_path: Path, home: Home) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(tmp_path / "real")
    for path in (str(tmp_path / "run"), str(tmp_path / ("x" * 90))):
        with pytest.raises(MachineFailed):
            home.run_dir(HostConfig("m1", "process", run_dir=path))


def test_the_log_is_rotated_and_a_full_disk_does_not_hide_an_error(home: Home) -> None:
    home.log({"verb": "x", "error": "\ud800"})
    assert json.loads(Path(home.log_path).read_text(encoding="utf-8"))["verb"] == "x"
    with open(home.log_path, "ab") as file:
        file.truncate(2_000_000)
    home.log({"verb": "y"})
    assert Path(home.log_path).stat().st_size < 200 and Path(home.log_path + ".1").exists()
    Home("/proc/nowhere").log({"verb": "z"})


# -- what a hostile worker may leave in its directory


def test_whatever_a_worker_left_is_removed_and_nothing_outside(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept", encoding="utf-8")
    worker = tmp_path / "worker"
    worker.mkdir()
    (worker / "task.json").mkdir()
    (worker / "task.json" / "full").write_text("x", encoding="utf-8")
    (worker / "a2a.sock").symlink_to(outside)
    (worker / "closed").mkdir()
    (worker / "closed" / "inner").mkdir()
    (worker / "closed" / "inner").chmod(0)
    (worker / "closed").chmod(0)
    os.mkfifo(worker / "pipe")
    here = os.open(worker, os.O_RDONLY)
    for _ in range(1500):  # deeper than paths are long and than Python recurses
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    worker.chmod(0)
    empty(str(worker))
    assert os.listdir(worker) == [] and (outside / "kept").read_text(encoding="utf-8") == "kept"


def test_only_a_socket_itself_is_connected_to(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(short + "/real.sock")
        listener.listen(1)
        os.symlink(short + "/real.sock", short + "/link.sock")
        Path(short, "file.sock").write_text("", encoding="utf-8")
        connect_below(short, "real.sock").close()
        for name in ("link.sock", "file.sock", "none.sock"):
            with pytest.raises(OSError, match=name):
                connect_below(short, name)


def test_a_listener_that_takes_nobody_does_not_hold_up_the_one_who_connects() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(short + "/full.sock")
        listener.listen(0)
        held = [connect_below(short, "full.sock")]
        with pytest.raises(BlockingIOError):
            for _ in range(10):
                held.append(connect_below(short, "full.sock"))
        for stream in held:
            stream.close()


def test_every_error_has_a_code_an_exit_status_and_one_wire_form() -> None:
    codes = set()
    classes = [HostError]
    while classes:
        one = classes.pop()
        classes.extend(one.__subclasses__())
        codes.add(one.code)
        assert one.exit_code in (2, 3, 4)
        assert set(one("m").to_json()) == {"code", "message", "expected", "got", "next"}
    assert codes == {
        "host_error", "bad_request", "refused", "busy", "stale", "no_lease", "machine_failed", "journal_failed"
    }  # fmt: skip
