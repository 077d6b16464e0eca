"""The lab by hand: `python -m tests.lab up | sweep | image | check`.

Owns the command line. Whatever ends it short of SIGKILL, it cleans up; after SIGKILL the next lab does.
"""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType

from tests.lab import image, oci
from tests.lab.available import lab_problem
from tests.lab.box import LabError
from tests.lab.machine import Lab, shown

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status: 0 done, 1 the lab cannot run here or failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description="Real machines on this box.")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start machines and keep them until Ctrl-C or SIGTERM")
    up.add_argument("--machines", type=int, default=1, metavar="N", help="how many (default: 1)")
    up.add_argument("--user", metavar="NAME", help="also make this lingering user on each, as an installation would")
    commands.add_parser("sweep", help="take away what killed labs left")
    commands.add_parser("image", help="build the images now, so that the first start is quick")
    commands.add_parser("check", help="say whether the lab can run here")
    given = parser.parse_args(arguments)

    if why := lab_problem():
        print(f"no lab: {why}", file=sys.stderr)
        return 1
    for number in ENDING:
        signal.signal(number, _end)
    try:
        if given.command == "up":
            _up(given.machines, given.user)
        elif given.command == "sweep":
            swept = Lab.sweep()
            print(f"took away {', '.join(swept)}" if swept else "nothing to take away")
        elif given.command == "image":
            with image.machine_image(_say) as tree, oci.base_archive(_say) as archive:
                print(f"machine image: {tree}\nbase container image: {archive}")
        else:
            print("the lab can run here")
    except LabError as failed:
        print(f"the lab failed: {failed}", file=sys.stderr)
        return 1
    return 0


def _up(count: int, user: str | None) -> None:
    if count < 1:
        raise LabError(f"--machines is the number of machines, at least 1; {count} was given")
    try:
        with Lab(_say) as lab:
            try:
                machines = [lab.machine(wait=False) for _ in range(count)]
                for machine in machines:
                    machine.wait_ssh()
                    if user:
                        machine.prepare_user(user)
                print(f"lab {lab.id}: {count} up; machines reach this box at {lab.box_address}")
                for machine in machines:
                    print(f"\n{machine.name}  {machine.address} port {machine.port}  {machine.host_key}")
                    for name in ("root", user) if user else ("root",):
                        print(f"  {shown(machine.ssh_command(name))}")
                print("\nCtrl-C takes everything away.", flush=True)
                signal.pause()
            finally:
                # The clean-up takes a second; an impatient second Ctrl-C must not leave half of it.
                for number in ENDING:
                    signal.signal(number, signal.SIG_IGN)
    except _Ended:
        print("taken away")


class _Ended(BaseException):
    """Somebody asked for the end."""


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except _Ended:
        sys.exit(130)
