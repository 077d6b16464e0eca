"""A machine for tests: an installation in a directory, driven through real gatekeeper processes of the real zipapp."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from edge_agent.host import clock
from tests.host.processes import PYTHON, alive, until
from tools.values import digest

WORKER = Path(__file__).with_name("scripted_worker.py")
MACHINE = "m1"

# The one program of the test policy. Its first word says what it does.
ACT = f"""#!{PYTHON} -ISB
import os, signal, sys, time
what = sys.argv[1]
if what == "say":
    print("said")
elif what == "much":
    print("m" * 60000)
elif what == "stay":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    os.wait()
    print("staying", flush=True)
    time.sleep(600)
elif what == "fail":
    sys.exit(9)
"""


def run_id() -> str:
    stamp = int(time.time() * 1000)
    return str(uuid.UUID(int=(stamp << 80) | (7 << 76) | (2 << 62) | int.from_bytes(os.urandom(7), "big")))


def policy_document(program: Path, **changes: Any) -> dict[str, Any]:
    """A policy that allows ``act WORD`` and reading below the program's directory."""
    return {
        "format": 1, "name": "test", "version": "1", "limits": {}, "sets": {}, "shapes": {},
        "read_roots": [str(program.parent)], "kernel_files": ["/proc/loadavg"], "secret_roots": ["/**/*.key"],
        "write_roots": [], "env": {}, "grants": [], "never": [],
        "rules": [
            {
                "name": "act", "paths": [str(program)], "reason": "for tests", "timeout_s": 60.0,
                "command": {"positionals": [{"kind": "enum(say,much,stay,fail)"}]},
            }
        ],
        **changes,
    }  # fmt: skip


class Machine:
    """One installation. ``kind``: of the scripted worker."""

    def __init__(self, home: Path, run_dir: Path, kind: str = "sound", **configuration: Any) -> None:
        self.home = home
        self.run_dir = run_dir
        self.generation = 0
        self.program = home.parent / "act"
        self.program.write_text(ACT, encoding="utf-8")
        self.program.chmod(0o755)
        self.configuration = {
            "protocol": 1, "machine": MACHINE, "units": "process", "run_dir": str(run_dir), "max_lease_s": 60,
            "max_run_s": 600, "worker_argv": [PYTHON, "-I", "-S", str(WORKER), *kind.split()], **configuration,
        }  # fmt: skip
        (home / "host.json").write_text(json.dumps(self.configuration), encoding="utf-8")

    # -- verbs

    def open(self, command: str, **streams: Any) -> subprocess.Popen[bytes]:
        """A gatekeeper process for ``command``, as sshd starts it."""
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.home.parent), "SSH_ORIGINAL_COMMAND": command}
        argv = [PYTHON, "-I", "-S", str(self.home / "host.pyz"), "gatekeeper", "--home", str(self.home)]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        return subprocess.Popen(argv, env=environment, cwd="/", **streams)

    def raw(self, command: str, data: bytes = b"") -> tuple[int, dict[str, Any]]:
        """Exit status and the one JSON document of ``command`` with ``data`` on stdin."""
        with self.open(command) as process:
            out, err = process.communicate(data, timeout=90)
        assert err == b"", err.decode()
        assert out.count(b"\n") == 1 and out.endswith(b"\n"), out
        return process.returncode, json.loads(out)

    def verb(self, command: str, document: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer of a verb that must succeed."""
        status, answer = self.raw(command, json.dumps(document or {}).encode())
        assert status == 0, answer
        return answer

    def refusal(self, command: str, document: Any = None) -> tuple[int, str, dict[str, Any]]:
        """Exit status, code and error of a verb that must fail."""
        status, answer = self.raw(command, json.dumps({} if document is None else document).encode())
        assert status in (2, 3, 4) and set(answer) == {"error"}, answer
        assert set(answer["error"]) == {"code", "message", "expected", "got", "next"}
        return status, answer["error"]["code"], answer["error"]

    # -- runs

    def start_document(self, **changes: Any) -> dict[str, Any]:
        self.generation += 1
        policy = changes.pop("policy", None) or policy_document(self.program)
        return {
            "protocol": 1, "run_id": run_id(), "machine": MACHINE, "generation": self.generation,
            "boot_id": clock.boot_id(), "not_after": clock.boottime() + 30, "lease_s": 20.0, "hard_stop_s": 60.0,
            "policy": policy, "policy_digest": digest(policy), "limits": {"task_s": 30}, "model": {"provider": "runbook"},
            "traceparent": "", **changes,
        }  # fmt: skip

    def start(self, **changes: Any) -> dict[str, Any]:
        """Start a run; returns the document it was started with."""
        document = self.start_document(**changes)
        answer = self.verb("start", document)
        assert answer["run_id"] == document["run_id"] and answer["ready"] is True
        return document

    def stop(self, run: Mapping[str, Any]) -> dict[str, Any]:
        return self.verb("stop", {"run_id": run["run_id"], "generation": run["generation"], "reason": "test"})

    def journal(self, run: Mapping[str, Any]) -> list[dict[str, Any]]:
        lines = (self.home / "journal" / f"{run['run_id']}.jsonl").read_text(encoding="ascii").splitlines()
        return [json.loads(line) for line in lines]

    def kinds(self, run: Mapping[str, Any]) -> list[str]:
        return [record["kind"] for record in self.journal(run)]

    # -- processes

    def pids(self) -> dict[str, int]:
        """Pids of keeper, broker and worker of this installation, those that live."""
        found: dict[str, int] = {}
        for name in os.listdir("/proc"):
            if not name.isdigit() or not alive(int(name)):
                continue
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                for role in ("keeper", "broker"):
                    if role.encode() in words and str(self.home).encode() in words:
                        found[role] = int(name)
                environment = Path(f"/proc/{name}/environ").read_bytes()
                if str(WORKER).encode() in words and f"CHARGEHAND_WORKER_DIR={self.run_dir}".encode() in environment:
                    found["worker"] = int(name)
        return found

    def below(self) -> set[int]:
        """Every process below the keeper, itself included."""
        from edge_agent.host.runner import descendants

        keeper = self.pids().get("keeper")
        return {keeper, *descendants(keeper)} if keeper else set()

    @contextlib.contextmanager
    def worker(self) -> Iterator[WorkerSide]:
        """Speak as the worker of a ``sound`` run."""
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(20)
        stream.connect(str(self.run_dir / "worker" / "a2a.sock"))
        with stream, stream.makefile("rb") as lines:
            yield WorkerSide(stream, lines)

    def clean_up(self) -> None:
        for pid in self.below() | set(self.pids().values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self.pids())


class WorkerSide:
    """The worker's end of ``tools.sock``."""

    def __init__(self, stream: socket.socket, lines: BinaryIO) -> None:
        self.stream = stream
        self._lines = lines

    def send(self, document: Any) -> None:
        self.stream.sendall(json.dumps(document).encode() + b"\n")

    def line(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line, "the broker's line has ended"
        found: dict[str, Any] = json.loads(line)
        return found

    def over(self) -> bool:
        """Whether the other side hung up."""
        try:
            return self._lines.read() == b""
        except ConnectionError:
            return True

    def ask(self, call_id: str, tool: str, **arguments: Any) -> None:
        self.send({"call": {"call_id": call_id, "tool": tool, "arguments": arguments}})

    def call(self, call_id: str, tool: str, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Decision and what came after it."""
        self.ask(call_id, tool, **arguments)
        first, second = self.line(), self.line()
        assert first["call_id"] == second["call_id"] == call_id
        return first["decision"], second


@contextlib.contextmanager
def machine(template: Path, kind: str = "sound", **configuration: Any) -> Iterator[Machine]:
    """A fresh installation made of ``template`` (zipapp and its bytecode); nothing of it is left afterwards."""
    # Not pytest's own directory: the paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ch-") as root:
        home = Path(root) / "home"
        home.mkdir(mode=0o700)
        for path in template.iterdir():
            shutil.copy2(path, home / path.name)
        made = Machine(home, Path(root) / "run", kind, **configuration)
        try:
            yield made
        finally:
            made.clean_up()
