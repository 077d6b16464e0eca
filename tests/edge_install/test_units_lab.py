"""The installed units on a real machine: worker and broker live and die together, and on time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.edge_install.lab_machines import BOX_LIMITS, Admin, of_the_agent, start_with_a_stand_in, unit, user_control
from tests.lab.box import wait_until
from tests.lab.machine import Lab, Machine

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

STOP_SECONDS = 5.0
"""safety.md, "Inert until activated", 3: everything is gone within the lease and five seconds."""


def nothing_runs(machine: Machine) -> bool:
    # One process of podman holds the user's namespace between containers; it runs nothing.
    return not [line for line in of_the_agent(machine) if line not in ("podman", "/usr/bin/podman", "catatonit -P")]


def states(machine: Machine) -> set[str]:
    return {unit(machine, name, "ActiveState")["ActiveState"] for name in ("chargehand-agent", "chargehand-broker")}


@pytest.fixture(scope="module")
def shared(lab: Lab, archive: Path, gateway: Path) -> Iterator[Machine]:
    """One installed machine for all tests of this module."""
    made = lab.machine()
    made.write(BOX_LIMITS, "[containers]\ndefault_sysctls = []\n")
    Admin(made, archive, gateway).install()
    yield made
    lab.remove(made)


@pytest.fixture
def installed(shared: Machine) -> Iterator[Machine]:
    """The machine with nothing running, before and after."""
    yield shared
    shared.run([*user_control(shared), "stop", "chargehand-agent", "chargehand-broker"], user="chargehand")
    shared.run([*user_control(shared), "reset-failed"], user="chargehand")


def test_the_units_live_and_die_together(installed: Machine) -> None:
    start_with_a_stand_in(installed)
    assert states(installed) == {"active"}
    for victim in ("chargehand-broker", "chargehand-agent"):
        if states(installed) != {"active"}:
            installed.run([*user_control(installed), "start", "chargehand-agent"], user="chargehand")
        began = time.monotonic()
        installed.run([*user_control(installed), "kill", "--signal=SIGKILL", victim], user="chargehand")
        wait_until(lambda: nothing_runs(installed), STOP_SECONDS, f"everything to end after {victim} was killed")
        print(f"{victim} killed: all gone after {time.monotonic() - began:.2f} s")
        assert states(installed) <= {"inactive", "failed"}


def test_a_worker_that_ignores_the_request_to_stop_is_killed(installed: Machine) -> None:
    start_with_a_stand_in(installed)
    worker = [process.pid for process in installed.processes() if "/opt/chargehand" in process.argv]
    assert len(worker) == 1
    # A stopped process cannot handle any signal but SIGKILL.
    installed.run(["kill", "-STOP", str(worker[0])])
    began = time.monotonic()
    installed.run([*user_control(installed), "stop", "chargehand-broker"], user="chargehand")
    wait_until(lambda: nothing_runs(installed), STOP_SECONDS, "the worker to be killed")
    print(f"a worker that does not listen: gone after {time.monotonic() - began:.2f} s")


def test_systemd_ends_a_run_that_goes_on_for_too_long(installed: Machine) -> None:
    began = time.monotonic()
    start_with_a_stand_in(installed, runtime_max_s=3)
    wait_until(lambda: nothing_runs(installed), 3 + STOP_SECONDS, "the hard stop")
    assert time.monotonic() - began > 3
    assert unit(installed, "chargehand-broker", "Result")["Result"] == "timeout"


def test_runs_may_follow_each_other_closely(installed: Machine) -> None:
    start_with_a_stand_in(installed)
    control = user_control(installed)
    took = []
    for _ in range(8):
        installed.run([*control, "stop", "chargehand-agent", "chargehand-broker"], user="chargehand")
        began = time.monotonic()
        installed.run([*control, "start", "chargehand-agent"], user="chargehand")
        took.append(time.monotonic() - began)
    assert states(installed) == {"active"}
    print("start over SSH, seconds:", " ".join(f"{seconds:.2f}" for seconds in took))


def test_the_worker_is_confined_as_the_unit_says(installed: Machine) -> None:
    start_with_a_stand_in(installed)
    (worker,) = [process for process in installed.processes() if "/opt/chargehand" in process.argv]
    assert worker.user == "chargehand"
    status = dict(
        line.split(":\t", 1)
        for line in installed.read(f"/proc/{worker.pid}/status").decode().splitlines()
        if ":\t" in line
    )
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    inside = ["nsenter", "-t", str(worker.pid), "-m", "-U", "--preserve-credentials", "-S", "1000", "-G", "1000", "--"]
    # No shell and no tool in the image: the machine's own nsenter runs its Python.
    look = (
        "import os,socket\n"
        "print(sorted(os.listdir('/run/chargehand')), os.path.exists('/bin/sh'), os.path.exists('/proc/1/root/etc/shadow'))\n"
        "for path in ('/x', '/opt/chargehand/x', '/run/chargehand/x'):\n"
        "    try: open(path, 'w').close(); print('wrote', path); os.unlink(path)\n"
        "    except OSError as error: print('refused', path, error.errno)\n"
    )
    said = installed.run([*inside, "/usr/bin/python3", "-c", look]).stdout.splitlines()
    assert said[0].endswith("False False")
    assert [line.split()[0] for line in said[1:]] == ["refused", "refused", "wrote"]
    links = installed.run(["nsenter", "-t", str(worker.pid), "-n", "ip", "-brief", "link"]).stdout.splitlines()
    assert [line.split()[0] for line in links] == ["lo"]


def test_the_broker_unit_filters_system_calls_but_sees_the_host(installed: Machine) -> None:
    start_with_a_stand_in(installed)
    pid = unit(installed, "chargehand-broker", "MainPID")["MainPID"]
    status = dict(
        line.split(":\t", 1) for line in installed.read(f"/proc/{pid}/status").decode().splitlines() if ":\t" in line
    )
    assert (status["NoNewPrivs"], status["Seccomp"], status["Umask"]) == ("1", "2", "0077")
    for kind in ("mnt", "pid", "net", "user"):
        spaces = {installed.run(["readlink", f"/proc/{process}/ns/{kind}"]).stdout for process in ("1", pid)}
        assert len(spaces) == 1, f"the broker has a {kind} namespace of its own"


def test_enabling_the_units_by_hand_enables_nothing(installed: Machine) -> None:
    for name in ("chargehand-agent", "chargehand-broker"):
        installed.run([*user_control(installed), "enable", f"{name}.service"], user="chargehand", check=False)
        said = installed.run(
            [*user_control(installed), "is-enabled", name], user="chargehand", check=False
        ).stdout.strip()
        assert said in ("static", "generated")


def test_the_first_start_after_a_boot_works(installed: Machine) -> None:
    for _ in range(2):
        start_with_a_stand_in(installed)
        assert states(installed) == {"active"}
        installed.reboot()
        assert of_the_agent(installed) == []
