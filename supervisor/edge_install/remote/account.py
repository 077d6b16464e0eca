"""Running commands, and doing things as the agent's user.

Root never writes below a folder that this user could have filled with links: that part runs as the user.

Standard library only, Python 3.9: it is sent to the machine as text (``supervisor.edge_install.program``).
"""

# Runs on Python 3.9: no `X | Y` at run time, no `zip(strict=)`.
# ruff: noqa: UP006, UP031, UP035, UP037, UP045

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import subprocess
import sys
import tempfile
from typing import Any, Callable, Dict, List, Optional, Sequence

from supervisor.edge_install.remote.texts import Failed, Json

BROKER, AGENT = "chargehand-broker.service", "chargehand-agent.service"
INSTALLATION = ".local/share/chargehand"
RECORD = "install.json"
COMMAND_S = 60.0
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(
    argv: Sequence[str],
    *,
    check: bool = True,
    timeout: float = COMMAND_S,
    env: Optional[Dict[str, str]] = None,
    become: Optional[Json] = None,
) -> "subprocess.CompletedProcess[str]":
    """Run one command without a shell. Raises ``Failed`` for a status other than 0 when ``check``, or no such program.

    ``become``: ``user``, ``group`` and ``extra_groups`` as ``subprocess`` takes them.
    """
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=timeout,
            check=False,
            env=env or {"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", "HOME": os.path.expanduser("~")},
            cwd="/",
            **(become or {}),
        )
    except FileNotFoundError:
        raise Failed("%s is not installed" % argv[0], next_step="install it and run the command again") from None
    except subprocess.TimeoutExpired:
        raise Failed("%s did not end within %g s" % (" ".join(argv), timeout)) from None
    if check and done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-1500:]
        raise Failed("%s failed" % " ".join(argv), "exit status 0", "%d: %s" % (done.returncode, said))
    return done


def answer(argv: Sequence[str]) -> str:
    """What a command prints, empty when it fails or does not exist: for looking, never for acting."""
    try:
        done = run(argv, check=False, timeout=15)
    except Failed:
        return ""
    return done.stdout if done.returncode == 0 else ""


def text_of(path: str) -> str:
    """What a text file holds, empty when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            return file.read()
    except OSError:
        return ""


def progress(text: str) -> None:
    print(json.dumps({"progress": text}), flush=True)


class Account:
    """The user that the edge agent runs as, and doing things as this user. ``exists`` is false before it is made."""

    def __init__(self, name: str, home: str) -> None:
        self.name = name
        self.exists = False
        self.uid = self.gid = -1
        self.home = home
        self.shell = ""
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            self.exists, self.uid, self.gid, self.home, self.shell = True, entry[2], entry[3], entry[5], entry[6]

    @property
    def runtime(self) -> str:
        return "/run/user/%d" % self.uid

    def environment(self) -> Dict[str, str]:
        bus = "unix:path=%s/bus" % self.runtime
        return {
            "PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", "HOME": self.home, "USER": self.name, "LOGNAME": self.name,
            "XDG_RUNTIME_DIR": self.runtime, "DBUS_SESSION_BUS_ADDRESS": bus,
        }  # fmt: skip

    def identity(self) -> Json:
        """What makes a child process of root this user, groups included; nothing where we are this user already."""
        if os.geteuid() == self.uid:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": os.getgrouplist(self.name, self.gid)}

    def do(self, action: Callable[[], Any]) -> Any:
        """``action()`` as this user; its result must be JSON. Raises ``Failed`` as ``action`` does."""
        if os.geteuid() == self.uid:
            return action()
        if os.geteuid() != 0:
            raise Failed("acting as %s needs root" % self.name, "user id 0", str(os.geteuid()))
        receive, send = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(receive)
                os.initgroups(self.name, self.gid)
                os.setgid(self.gid)
                os.setuid(self.uid)
                os.environ.clear()
                os.environ.update(self.environment())
                try:
                    document = {"result": action()}
                except Failed as error:
                    document = {"error": error.document}
                except OSError as error:
                    failed = Failed("%s could not write its files" % self.name, got=str(error))
                    document = {"error": failed.document}
                with os.fdopen(send, "w") as pipe:
                    json.dump(document, pipe)
                sys.stdout.flush()
                code = 0
            finally:
                os._exit(code)
        os.close(send)
        with os.fdopen(receive) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        if not said:
            raise Failed("the part that runs as %s ended without an answer" % self.name)
        document = json.loads(said)
        if "error" in document:
            told = document["error"]
            raise Failed(told["message"], told["expected"], told["got"], told["next"])
        return document["result"]

    def run(self, argv: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run one command as this user, with what ``systemctl --user`` and podman need in its environment."""
        return run(argv, env=self.environment(), become=self.identity(), **options)

    def systemctl(self, *words: str, check: bool = True) -> str:
        return self.run(["systemctl", "--user", "--no-pager", *words], check=check).stdout


def groups_of(account: Account) -> List[str]:
    if not account.exists:
        return []
    names = []
    for gid in os.getgrouplist(account.name, account.gid):
        with contextlib.suppress(KeyError):
            names.append(grp.getgrgid(gid)[0])
    return sorted(names)


def is_running(account: Account) -> bool:
    """Whether a run is on: broker or worker is not inactive."""
    if not account.exists or not os.path.exists(account.runtime + "/bus"):
        return False
    try:
        words = ["systemctl", "--user", "show", "--property=ActiveState", "--value", BROKER, AGENT]
        states = account.run(words, check=False, timeout=15).stdout.split()
    except Failed:
        return False
    return any(state not in ("inactive", "failed") for state in states)


def has_image(account: Account, reference: str) -> bool:
    """Whether this user's podman has the image already."""
    if not reference or not account.exists or not os.path.isdir(account.runtime):
        return False
    try:
        done = account.run(["podman", "image", "exists", reference], check=False)
    except Failed:
        return False
    return done.returncode == 0


def record_of(account: Account) -> Optional[Json]:
    """What the last installation wrote down about itself, ``None`` where there was none."""
    if not account.exists:
        return None

    def read() -> Any:
        return text_of(os.path.join(account.home, INSTALLATION, RECORD))

    try:
        found = json.loads(account.do(read) or "null")
    except (Failed, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_atomic(path: str, data: bytes, mode: int) -> None:
    """Replace ``path`` so that a reader or a power loss sees the old file or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(handle, mode)
            os.fsync(handle)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
