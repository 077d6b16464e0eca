"""A machine of the lab, and the lab that owns machines.

`Lab` owns everything that exists because of it and takes it away again, also what a killed lab left. `Machine` is one
Debian system with its own systemd, sshd, address and files, that can be cut off, crashed and booted again. Neither
knows anything of the product: no agent, no gateway, no dedicated user unless a test asks for one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from tests.lab import box, image, network, ssh, state

BOOT_SECONDS = 30.0
"""A machine answers after about 3 s on two cores; ten may boot at once."""
POWEROFF_SECONDS = 30.0
"""A clean shutdown takes under 2 s; after this a machine is taken for hung and is killed."""
TRANSFER_SECONDS = 300.0

STORAGE_NEEDS_BYTES = 4 * 1024**3
"""With less memory free than this, images of a machine lie on the box's disk: slower, but nothing runs out."""

SYSTEM_CALLS = "@keyring bpf landlock_create_ruleset landlock_add_rule landlock_restrict_self"
"""Beyond what systemd-nspawn allows by itself: crun needs the first two, confinement by Landlock the others."""

NSPAWN_SETTINGS = {
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
    # A machine's own network settings are its own, as on a server: podman sets one for every container.
    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
}

NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")


@dataclass(frozen=True)
class Result:
    """What a command on a machine did."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Process:
    """One process of a machine, as the machine itself sees it."""

    pid: int
    parent: int
    user: str
    argv: tuple[str, ...]


class Machine:
    """One machine. Made by `Lab.machine`; booted unless that was told otherwise."""

    port = 22
    user = "root"

    def __init__(self, lab_id: str, name: str, cable: network.Cable, folder: Path, image_tree: Path, key: Path) -> None:
        self.name = name
        self.address = cable.address
        self.admin_key = key
        self.console = folder / "console.log"
        self._lab_id = lab_id
        self._cable = cable
        self._folder = folder
        self._root = folder / "root"
        self._image = image_tree
        self._cgroup = state.cgroup(lab_id) / name
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._id = secrets.token_hex(16)
        self.host_key = self._lay_out()
        self.known_hosts = folder / "known_hosts"
        self.known_hosts.write_text(f"{self.address} {self.host_key}\n")
        self._door = ssh.Door(self.address, self.port, key, self.known_hosts)

    def __repr__(self) -> str:
        return f"<Machine {self.name} at {self.address}, {'on' if self.is_on else 'off'}>"

    # --- power -------------------------------------------------------------------------------------------------------

    @property
    def is_on(self) -> bool:
        """Whether it has power: its first process has not ended yet."""
        return self._nspawn is not None and self._nspawn.poll() is None

    def boot(self, *, wait: bool = True, seconds: float = BOOT_SECONDS) -> None:
        """Switch it on, with the files it had. Returns when it answers SSH, or at once without `wait`."""
        if self.is_on:
            raise box.LabError(f"{self.name} is on already; power it off first")
        if not os.path.ismount(self._root):
            layers = f"lowerdir={self._image},upperdir={self._folder / 'upper'},workdir={self._folder / 'work'}"
            box.run(["mount", "-t", "overlay", f"chl-{self._lab_id}", "-o", layers, str(self._root)])
        box.make_cgroup(self._cgroup)
        # The shell joins the cgroup and becomes systemd-nspawn: no process of this machine is ever outside of it.
        join = 'echo 0 > "$1/cgroup.procs" && shift && exec "$@"'
        with self.console.open("ab") as console:
            self._nspawn = subprocess.Popen(
                ["sh", "-c", join, "sh", str(self._cgroup), *self._nspawn_words()],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", os.defpath), **NSPAWN_SETTINGS},
            )
        if wait:
            self.wait_ssh(seconds)

    def wait_ssh(self, seconds: float = BOOT_SECONDS) -> None:
        """Return when every account can log in. Raises `LabError` with the console's last words after `seconds`."""
        deadline = time.monotonic() + seconds
        while not self._sshd_speaks():
            self._still_booting(deadline)
        # Until this unit is up, only root may log in; to start what is starting means to wait for it.
        command = ["systemctl", "start", "systemd-user-sessions.service"]
        while self.run(command, check=False, timeout=max(1.0, deadline - time.monotonic())).status != 0:
            self._still_booting(deadline)

    def poweroff(self, seconds: float = POWEROFF_SECONDS) -> None:
        """Shut it down in order, as its power button would; returns when its last process has ended.

        Works on a machine that is cut off, too. One that does not end within `seconds` is killed.
        """
        if self._nspawn is None:
            return
        # systemd-nspawn passes this on to the machine's systemd as the request to power off.
        self._nspawn.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._nspawn.wait(seconds)
        self.crash()

    def wait_off(self, seconds: float = POWEROFF_SECONDS) -> None:
        """Return when it has gone off by itself, as after a `systemctl poweroff` or `reboot` on it."""
        if self._nspawn is None:
            return
        try:
            self._nspawn.wait(seconds)
        except subprocess.TimeoutExpired as late:
            raise box.LabError(f"{self.name} is still on after {seconds:g} s; {self._last_words()}") from late
        self.crash()

    def crash(self) -> None:
        """Take its power away: every process ends at once, nothing is written any more."""
        box.kill_cgroup(self._cgroup)
        if self._nspawn is not None:
            self._nspawn.wait(10)
            self._nspawn = None

    def reboot(self) -> None:
        """Power off and boot the same files."""
        self.poweroff()
        self.boot()

    # --- network -----------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Unplug its network cable."""
        self._cable.down()

    def drop_packets(self) -> None:
        """Lose every packet to and from it, while its link still looks up: nobody is told."""
        self._cable.detach()

    def mend(self) -> None:
        """Undo `cut` and `drop_packets`."""
        self._cable.mend()

    # --- commands and files ------------------------------------------------------------------------------------------

    def ssh_command(self, user: str = "root") -> list[str]:
        """The words of an ssh command line that logs in as `user`; remote words may follow."""
        return self._door.command(user)

    def run(
        self,
        argv: Sequence[str],
        user: str = "root",
        input: str | bytes | Path | None = None,
        check: bool = True,
        timeout: float = 60.0,
    ) -> Result:
        """Run one command over SSH; every word arrives as it is given here. A path as `input` means that file.

        Raises `CommandError` for a status other than 0 (255 is ssh's own: no connection) when `check`.
        """
        data = input.encode() if isinstance(input, str) else input
        with contextlib.ExitStack() as stack:
            source = {"stdin": stack.enter_context(data.open("rb"))} if isinstance(data, Path) else {"input": data}
            done = self._door.run(argv, user=user, check=False, timeout=timeout, **source)
        stdout, stderr = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        result = Result(tuple(argv), done.returncode, stdout, stderr)
        if check and result.status != 0:
            raise box.CommandError([f"{user}@{self.name}:", *argv], result.status, result.stdout, result.stderr)
        return result

    def read(self, path: str, user: str = "root") -> bytes:
        """The bytes of a file on the machine."""
        return self._door.run(["cat", "--", path], user=user).stdout

    def write(self, path: str, data: str | bytes, *, mode: int = 0o644, owner: str = "root") -> None:
        """Put a whole file in place at once; missing folders are made, owned by `owner` as well."""
        self._install(path, data, mode, owner)

    def push(self, local: Path, remote: str, *, owner: str = "root") -> None:
        """Copy a file, or what is in a folder, from the box to `remote`."""
        if not local.is_dir():
            self._install(remote, local, local.stat().st_mode & 0o777, owner)
            return
        self._make_folder(remote, owner)
        packing = subprocess.Popen(["tar", "-C", str(local), "-cf", "-", "."], stdout=subprocess.PIPE)
        unpack = ["tar", "-C", remote, "-xf", "-", "--no-same-owner"]
        with packing:
            self._door.run(unpack, user="root", stdin=packing.stdout, timeout=TRANSFER_SECONDS)
        if packing.returncode != 0:
            raise box.LabError(f"{local} was not packed as a whole: tar ended with status {packing.returncode}")
        self.run(["chown", "-R", f"{owner}:", remote])

    def pull(self, remote: str, local: Path, user: str = "root") -> None:
        """Copy one file from the machine to the box."""
        local.write_bytes(self._door.run(["cat", "--", remote], user=user, timeout=TRANSFER_SECONDS).stdout)

    def processes(self) -> list[Process]:
        """Everything that runs on it, kernel threads and this look itself left out."""
        found = json.loads(self.run(["python3", "-I", "-c", _LIST_PROCESSES]).stdout)
        return [Process(pid, parent, user, tuple(argv)) for pid, parent, user, argv in found]

    @property
    def boot_id(self) -> str:
        """What the machine says names this boot."""
        return self.read("/proc/sys/kernel/random/boot_id").decode().strip()

    def prepare_user(self, name: str = "chargehand", home: str | None = None) -> None:
        """Make a dedicated, lingering user, as an installation would, and wait until its user manager runs."""
        home = home or f"/var/lib/{name}"
        self.run(["useradd", "--create-home", "--home-dir", home, "--shell", "/bin/bash", "--user-group", name])
        self.run(["loginctl", "enable-linger", name])
        uid = self.run(["id", "--user", name]).stdout.strip()
        self.run(["systemctl", "start", f"user@{uid}.service"])

    def close(self) -> None:
        """Take its power, its files and its network away."""
        self.crash()
        box.unmount_below(self._folder)
        box.remove_tree(self._folder)
        self._cable.remove()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _lay_out(self) -> str:
        """Make the folders and what is this machine's alone; its public host key."""
        upper = self._folder / "upper"
        for name in ("upper", "work", "root", "storage"):
            (self._folder / name).mkdir(parents=True)
        upper.chmod(0o755)
        # In memory, where there is some: a loaded image is thousands of small files that nobody needs twice, and ext4
        # slows down twentyfold when files are made just after others were deleted, as a lab does all day.
        storage = self._folder / "storage"
        if box.available_memory() > STORAGE_NEEDS_BYTES:
            box.run(["mount", "-t", "tmpfs", "-o", "mode=1777", f"chl-{self._lab_id}", str(storage)])
        else:
            storage.chmod(0o1777)
        host_key = ssh.make_key(upper / "etc/ssh/ssh_host_ed25519_key", comment=self.name)
        files = {
            image.ADMIN_KEYS: self.admin_key.with_name(f"{self.admin_key.name}.pub").read_text(),
            "/etc/hostname": f"{self.name}\n",
            "/etc/hosts": f"127.0.0.1 localhost\n::1 localhost\n{self.address} {self.name}\n",
            "/etc/machine-id": f"{self._id}\n",
        }
        for name, text in files.items():
            path = upper / PurePosixPath(name).relative_to("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        # A journal that outlives a reboot, as on a server.
        (upper / "var/log/journal").mkdir(parents=True)
        return host_key

    def _nspawn_words(self) -> list[str]:
        return [
            *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot"),
            *("-D", str(self._root), f"--network-namespace-path=/run/netns/{self._cable.namespace}"),
            *("-M", f"chl-{self._lab_id}-{self.name}", f"--hostname={self.name}", f"--uuid={self._id}"),
            # The clock and the kernel are the box's: even a machine's root must not turn them.
            *(
                "--capability=all",
                "--drop-capability=CAP_SYS_TIME,CAP_SYS_MODULE",
                f"--system-call-filter={SYSTEM_CALLS}",
            ),
            *("--bind=/dev/fuse", "--bind=/dev/net/tun", f"--bind={self._folder / 'storage'}:{image.STORAGE}"),
            *("--link-journal=no", "--resolv-conf=off", "--timezone=off"),
        ]

    def _sshd_speaks(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), timeout=1.0) as link:
            return link.recv(4) == b"SSH-"
        return False

    def _still_booting(self, deadline: float) -> None:
        """Raise when there is nothing to wait for any more; otherwise let a moment pass, or less if it dies."""
        if self._nspawn is None:
            raise box.LabError(f"{self.name} is off; boot it first")
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._nspawn.wait(box.POLL_SECONDS)
            raise box.LabError(f"{self.name} ended with status {status} while booting; {self._last_words()}")
        if time.monotonic() > deadline:
            raise box.LabError(f"{self.name} did not answer SSH at {self.address} in time; {self._last_words()}")

    def _last_words(self) -> str:
        said = self.console.read_bytes()[-box.OUTPUT_TAIL :].decode(errors="replace").strip()
        return f"its console said last: {said or 'nothing'}"

    def _make_folder(self, path: str, owner: str) -> None:
        self.run(["install", "-d", "-o", owner, "-g", owner, "--", path])

    def _install(self, path: str, source: str | bytes | Path, mode: int, owner: str) -> None:
        script = (
            'parent=$(dirname -- "$1") && { [ -d "$parent" ] || install -d -o "$3" -g "$3" -- "$parent"; } && '
            'new=$(mktemp -- "$1.XXXXXX") && cat > "$new" && chmod "$2" "$new" && chown "$3:" "$new" && '
            'mv -T -- "$new" "$1"'
        )
        words = ["sh", "-c", script, "sh", path, f"{mode:o}", owner]
        self.run(words, input=source, timeout=TRANSFER_SECONDS)


_LIST_PROCESSES = """
import json, os, pwd
found, me, mine = [], os.getpid(), set()
def status(pid):
    with open(f"/proc/{pid}/status") as lines:
        return dict(line.rstrip().split(":", 1) for line in lines if ":" in line)
pid = me
while pid > 1:                     # this look, its shell and its sshd
    mine.add(pid)
    pid = int(status(pid)["PPid"])
    if "sshd" in status(pid)["Name"] and pid > 1 and int(status(pid)["PPid"]) == 1: break
for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line: argv = line.read()
        about = status(pid)
    except (FileNotFoundError, ProcessLookupError):
        continue
    if not argv or pid in mine: continue
    uid = int(about["Uid"].split()[0])
    try: user = pwd.getpwuid(uid).pw_name
    except KeyError: user = str(uid)
    words = argv.decode(errors="backslashreplace").rstrip("\\0").split("\\0")
    found.append([pid, int(about["PPid"]), user, words])
print(json.dumps(found))
"""


class Lab:
    """Owns a bridge, namespaces, trees and machines, from `with` to its end."""

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self._say = say
        self._machines: dict[str, Machine] = {}
        self._count = 0
        self._held = contextlib.ExitStack()
        self._record: state.Record | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._image = undo.enter_context(image.machine_image(self._say))
            with box.locked(state.lock_path()):
                for lab_id in state.sweep():
                    self._say(f"took away lab {lab_id}, whose owner was killed")
                self._record = state.begin()
                undo.callback(state.take_away, self._record)
                self.subnet = network.make_bridge(self._record.lab_id)
            self.admin_key = Path(self._record.folder) / "admin_key"
            ssh.make_key(self.admin_key)
            self._held = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def id(self) -> str:
        """Six hexadecimal digits in the name of everything this lab makes on the box."""
        if self._record is None:
            raise box.LabError("the lab is not open; use it in a `with`")
        return self._record.lab_id

    @property
    def box_address(self) -> str:
        """Where a machine reaches the box: a gateway under test listens there."""
        return str(self.subnet[1])

    @property
    def controllers(self) -> frozenset[str]:
        """The cgroup controllers this box can give a machine. A limit whose controller is missing cannot be tested."""
        root = box.cgroup_root()
        return frozenset((root / "cgroup.controllers").read_text().split()) if root else frozenset()

    @property
    def machines(self) -> list[Machine]:
        """Those that were made and not closed."""
        return list(self._machines.values())

    def machine(self, name: str | None = None, *, boot: bool = True, wait: bool = True) -> Machine:
        """Make one more machine and, unless told otherwise, boot it and wait until it answers SSH.

        To start several at once: `boot(wait=False)` on each, then `wait_ssh()` on each.
        """
        number = self._count
        name = name or f"m{number + 1}"
        if not NAME.fullmatch(name) or name in self._machines:
            raise box.LabError(f"{name!r} is no name for a machine here: lower-case letters, digits and '-', each once")
        self._count += 1
        folder = Path(self._record.folder) / name if self._record else Path()
        cable = network.make_cable(self.id, number, self.subnet)
        machine = Machine(self.id, name, cable, folder, self._image, self.admin_key)
        self._machines[name] = machine
        if boot:
            machine.boot(wait=wait)
        return machine

    def remove(self, machine: Machine) -> None:
        """Close one machine before the lab ends."""
        self._machines.pop(machine.name, None)
        machine.close()

    def close(self) -> None:
        """Take everything away: all processes of all machines at once, then the rest. Harmless twice."""
        if self._record is not None:
            box.kill_cgroup(state.cgroup(self._record.lab_id))
        for machine in self._machines.values():
            machine.crash()
        self._machines.clear()
        self._held.close()

    @staticmethod
    def sweep() -> list[str]:
        """Take away what killed owners left; the ids of those labs."""
        with box.locked(state.lock_path()):
            return state.sweep()


def shown(words: Sequence[str]) -> str:
    """A command line a person can paste."""
    return shlex.join(words)
