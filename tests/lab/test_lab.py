"""The lab keeps its promises: each line of docs/lab.md that a test can show."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab import box, fixtures, image, oci, state
from tests.lab.machine import Lab, Machine

HERE = Path(__file__).resolve().parents[2]

QUADLET = f"""[Unit]
Description=Waits until it is told to stop

[Container]
Image={oci.BASE_REFERENCE}
Network=none
ReadOnly=true
Exec=python3 -c "import signal as s; s.pthread_sigmask(s.SIG_BLOCK, [s.SIGTERM]); s.sigwait([s.SIGTERM])"
"""

LANDLOCK_VERSION = "import ctypes; print(ctypes.CDLL(None).syscall(444, None, 0, 1))"

LANDLOCKED_WRITE = """
import ctypes, struct
call = ctypes.CDLL(None, use_errno=True).syscall
assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0                       # no new privileges
handled = struct.pack("Q", 1 << 1)                                       # writing to files
rules = call(444, handled, len(handled), 0)
assert rules >= 0 and call(446, rules, 0) == 0
try: open("/tmp/not-here", "w")
except PermissionError: print("refused")
"""

OWNER = """
import sys, time
from tests.lab.machine import Lab
with Lab() as lab:
    machine = lab.machine()
    print(lab.id, machine.address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def user(machine: Machine) -> str:
    """A dedicated user on the shared machine."""
    machine.prepare_user("chargehand")
    return "chargehand"


def test_a_machine_boots_and_answers_ssh_within_30_s(lab: Lab) -> None:
    began = time.monotonic()
    machine = lab.machine()
    took = time.monotonic() - began
    try:
        assert machine.run(["hostname"]).stdout.strip() == machine.name
        assert took < 30
    finally:
        lab.remove(machine)


def test_three_machines_boot_at_once_and_reach_each_other_and_the_box(lab: Lab) -> None:
    machines = [lab.machine(wait=False) for _ in range(3)]
    try:
        for machine in machines:
            machine.wait_ssh()
        first, *others = machines
        assert len({machine.host_key for machine in machines}) == 3
        for address in [lab.box_address, *(other.address for other in others)]:
            first.run(["ping", "-c", "1", "-W", "5", address])
    finally:
        for machine in machines:
            lab.remove(machine)


def test_the_machine_finishes_booting_with_no_failed_unit(machine: Machine) -> None:
    assert machine.run(["systemctl", "is-system-running", "--wait"], check=False).stdout.strip() == "running"


def test_a_machine_with_another_host_key_is_not_talked_to(lab: Lab, machine: Machine, fresh_machine: Machine) -> None:
    own = fresh_machine.known_hosts.read_text()
    fresh_machine.known_hosts.write_text(f"{fresh_machine.address} {machine.host_key}\n")
    refused = fresh_machine.run(["true"], check=False)
    fresh_machine.known_hosts.write_text(own)
    assert refused.status == 255
    assert "Host key verification failed" in refused.stderr


def test_every_word_of_a_command_arrives_as_it_was_given(machine: Machine) -> None:
    words = ["", "a b", "it's", '"', "$HOME", "`id`", "a\nb", "*", "~", "\\", "-n", "é", ";", "#"]
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"
    assert json.loads(machine.run(["python3", "-c", program, *words]).stdout) == words


def test_the_user_manager_of_a_lingering_user_works_over_ssh(machine: Machine, user: str) -> None:
    assert machine.run(["systemctl", "--user", "is-system-running", "--wait"], user=user).stdout.strip() == "running"
    confined = ["-p", "PrivateNetwork=yes", "-p", "ProtectSystem=strict"]
    seen = machine.run(
        ["systemd-run", "--user", "--wait", "--pipe", "--quiet", *confined, "ip", "-brief", "link"], user=user
    )
    assert [line.split()[0] for line in seen.stdout.splitlines()] == ["lo"]


def test_a_quadlet_container_of_a_user_starts_and_stops_fast(machine: Machine, user: str) -> None:
    oci.import_base(machine, user)
    machine.write("/var/lib/chargehand/.config/containers/systemd/waits.container", QUADLET, owner=user)
    machine.run(["systemctl", "--user", "daemon-reload"], user=user)
    machine.run(["systemctl", "--user", "start", "waits.service"], user=user)
    assert any("sigwait" in process.argv[-1] and process.user == user for process in machine.processes())
    began = time.monotonic()
    machine.run(["systemctl", "--user", "stop", "waits.service"], user=user)
    took = time.monotonic() - began
    assert not any("sigwait" in process.argv[-1] for process in machine.processes())
    assert took < 5


def test_an_image_is_built_on_a_machine_and_loaded_on_another(
    machine: Machine, user: str, fresh_machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context/said").write_text("hello from the context")
    (tmp_path / "Containerfile").write_text(
        "ARG BASE\nFROM ${BASE}\nCOPY said /said\nRUN cat /said > /built\nCMD cat /built\n"
    )
    reference = "localhost/lab-test:latest"
    built = oci.build_image(machine, tmp_path / "Containerfile", tmp_path / "context", reference=reference, user=user)
    oci.save_image(machine, reference, tmp_path / "image.tar", user)
    fresh_machine.prepare_user("other", home="/srv/other")
    oci.load_image(fresh_machine, tmp_path / "image.tar", "other")
    listed = fresh_machine.run(["podman", "images", "--quiet", "--no-trunc"], user="other").stdout
    assert built in listed
    run = fresh_machine.run(["podman", "run", "--rm", "--network=none", reference], user="other")
    assert run.stdout == "hello from the context"


def test_a_reboot_keeps_the_files_and_changes_the_boot_id(fresh_machine: Machine) -> None:
    before = fresh_machine.boot_id
    fresh_machine.write("/var/lib/kept/file", "kept")
    fresh_machine.run(["systemd-run", "--unit=nap", "-p", "Type=exec", "sleep", "3600"])
    fresh_machine.reboot()
    assert fresh_machine.boot_id != before
    assert fresh_machine.read("/var/lib/kept/file") == b"kept"
    assert not any("3600" in process.argv for process in fresh_machine.processes())
    assert len(json.loads(fresh_machine.run(["journalctl", "--list-boots", "-o", "json"]).stdout)) == 2


def test_a_machine_that_is_cut_off_can_be_powered_off_and_comes_back(fresh_machine: Machine) -> None:
    fresh_machine.cut()
    fresh_machine.poweroff()
    assert not fresh_machine.is_on
    fresh_machine.mend()
    fresh_machine.boot()


def test_a_machine_that_powers_itself_off_is_off_and_boots_again(fresh_machine: Machine) -> None:
    fresh_machine.run(["systemctl", "poweroff", "--no-block"], check=False)
    fresh_machine.wait_off()
    assert not fresh_machine.is_on
    fresh_machine.boot()


def test_root_on_a_machine_cannot_turn_the_clock_of_the_box(machine: Machine) -> None:
    assert machine.run(["date", "--set=@1"], check=False).status != 0
    assert time.time() > 1_000_000_000


def test_a_crash_ends_everything_at_once(fresh_machine: Machine) -> None:
    before = fresh_machine.boot_id
    fresh_machine.crash()
    assert not fresh_machine.is_on
    fresh_machine.boot()
    assert fresh_machine.boot_id != before


@pytest.mark.parametrize("how", ["cut", "drop_packets"])
def test_a_cut_makes_ssh_fail_and_a_mend_restores_it(machine: Machine, how: str) -> None:
    getattr(machine, how)()
    try:
        assert machine.run(["true"], check=False).status == 255
    finally:
        machine.mend()
    assert machine.run(["echo", "back"]).stdout == "back\n"


def test_landlock_answers_and_confines_inside_a_machine(machine: Machine) -> None:
    assert int(machine.run(["python3", "-c", LANDLOCK_VERSION]).stdout) >= 1
    assert machine.run(["python3", "-c", LANDLOCKED_WRITE]).stdout == "refused\n"


def test_processes_shows_a_started_sleep_and_not_the_look_itself(machine: Machine) -> None:
    machine.run(["systemd-run", "--unit=sleeps", "-p", "Type=exec", "--uid=daemon", "sleep", "4321"])
    try:
        seen = machine.processes()
        assert [process.user for process in seen if process.argv == ("/usr/bin/sleep", "4321")] == ["daemon"]
        assert not any("json.dumps" in word for process in seen for word in process.argv)
    finally:
        machine.run(["systemctl", "stop", "sleeps"])


def test_files_go_in_and_out_whole(machine: Machine, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    machine.write("/srv/a b/data", data, mode=0o640, owner="daemon")
    assert machine.read("/srv/a b/data") == data
    assert machine.run(["stat", "-c", "%a %U", "/srv/a b/data"]).stdout == "640 daemon\n"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/script").write_text("x")
    (tmp_path / "sub/script").chmod(0o755)
    machine.push(tmp_path, "/srv/tree", owner="daemon")
    assert machine.run(["stat", "-c", "%a %U", "/srv/tree/sub/script"]).stdout == "755 daemon\n"


def test_a_disk_can_be_made_full(machine: Machine) -> None:
    machine.run(["mkdir", "-p", "/mnt/small"])
    machine.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", "/mnt/small"])
    full = machine.run(["dd", "if=/dev/zero", "of=/mnt/small/file", "bs=128k", "count=1"], check=False)
    machine.run(["umount", "/mnt/small"])
    assert "No space left" in full.stderr


@pytest.mark.lab
def test_a_build_whose_owner_is_killed_stops_and_the_next_one_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixtures.require_lab()
    monkeypatch.setenv(box.CACHE_VARIABLE, str(tmp_path))
    with subprocess.Popen([sys.executable, "-m", "tests.lab", "image"], cwd=HERE, stdout=subprocess.PIPE) as builder:
        box.wait_until(lambda: bool(list(tmp_path.glob("images/.building-*/usr/bin"))), 60, "a build to be under way")
        builder.kill()
    unfinished = next(tmp_path.glob("images/.building-*[0-9a-f]"))
    box.wait_until(lambda: not writers_below(unfinished), 5, "the killed build to stop")
    assert not box.mounts_below(unfinished)
    with image.kept("images", image.MACHINE.kind, image.MACHINE.digest, lambda target: target.mkdir()) as tree:
        assert not list(tree.iterdir())
    assert not list(tmp_path.glob("images/.building-*"))


def writers_below(folder: Path) -> list[str]:
    """Command lines on the box that name `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_text(errors="replace")
            found += [line] if str(folder) in line else []
    return found


@pytest.mark.lab
def test_what_a_killed_owner_left_is_swept_and_the_living_are_not(machine: Machine) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        lab_id = owner.stdout.readline().split()[0]
        record = next(record for record in state.records() if record.lab_id == lab_id)
        # Under the lock, so that no other lab that starts now sweeps it first.
        with box.locked(state.lock_path()):
            owner.kill()
            owner.wait(10)
            assert "populated 1" in (state.cgroup(lab_id) / "cgroup.events").read_text()
            assert lab_id in state.sweep()
    assert_nothing_is_left(record)
    assert machine.run(["true"]).status == 0


@pytest.mark.lab
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_lab_by_hand_says_how_to_reach_it_and_is_taken_away_when_told_to_end(number: signal.Signals) -> None:
    fixtures.require_lab()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.lab", "up", "--machines", "2"], cwd=HERE, stdout=subprocess.PIPE, text=True
    ) as up:
        assert up.stdout is not None
        said = []
        for line in up.stdout:
            said.append(line.strip())
            if line.startswith("Ctrl-C"):
                break
        lab_id = next(line.split()[1].rstrip(":") for line in said if line.startswith("lab "))
        record = next(record for record in state.records() if record.lab_id == lab_id)
        commands = [line for line in said if line.startswith("ssh ")]
        answers = [
            subprocess.run(["sh", "-c", f"{line} hostname"], capture_output=True, text=True, check=False)
            for line in commands
        ]
        up.send_signal(number)
        up.wait(30)
    assert [answer.stdout for answer in answers] == ["m1\n", "m2\n"]
    assert up.returncode == 0
    assert_nothing_is_left(record)


def assert_nothing_is_left(record: state.Record) -> None:
    assert not state.cgroup(record.lab_id).exists()
    assert not box.mounts_below(Path(record.folder))
    assert not Path(record.folder).exists()
    assert not (state.STATE / record.lab_id).exists()
    for folder in (Path("/sys/class/net"), Path("/run/netns")):
        assert not [path for path in folder.iterdir() if record.lab_id in path.name]
