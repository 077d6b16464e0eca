"""A machine for tests: a real SSH server in a thread of its own, with scripted answers to the gatekeeper's verbs.

What it can do that a real one cannot: show another host key on the same port, and lie.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from types import TracebackType
from typing import Any, Self

import asyncssh

from supervisor.cli.version import VERSION
from supervisor.machines import HostKey, host_key


class _Open(asyncssh.SSHServer):
    """Lets anybody in: what is tested here is the host key and the answers."""

    def begin_auth(self, username: str) -> bool:
        return False


class ScriptedMachine:
    """Listens while the context lasts. ``hello`` and ``status`` are what it answers; change them at will."""

    def __init__(self) -> None:
        self.key = asyncssh.generate_private_key("ssh-ed25519")
        self.port = 0
        self.verbs: list[str] = []
        self.hello: dict[str, Any] = {
            "protocol": 1, "version": VERSION, "machine": "web-01", "python": "3.11.2", "kernel": "6.1.0", "units": "process",
            "os": {"id": "debian", "pretty_name": "Debian GNU/Linux 12"}, "hostname": "web", "boot_id": "b-1", "image": None,
            "generation": 0, "run": None, "boottime": 1.0,
            "capabilities": {"landlock": {"abi": 5, "level": "no writes to files", "problem": ""}, "journal_readable": True},
        }  # fmt: skip
        self.status: dict[str, Any] = {"unit": "inactive", "processes": [], "run": None, "lease_left_s": None}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncssh.SSHAcceptor | None = None

    @property
    def shown(self) -> HostKey:
        return host_key(self.key.export_public_key().decode("ascii"))

    def change_host_key(self) -> None:
        """From now on another key is shown on the same port."""
        self.key = asyncssh.generate_private_key("ssh-ed25519")
        self._call(self._stop())
        self._call(self._start())

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self) -> None:
        self._server = await asyncssh.listen(
            "127.0.0.1", self.port, server_host_keys=[self.key], server_factory=_Open, process_factory=self._answer,
            reuse_address=True, encoding=None,
        )  # fmt: skip
        self.port = self._server.get_port()

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        await process.stdin.read()
        verb = process.command or ""
        self.verbs.append(verb)
        answers = {"hello": {"wall": time.time(), **self.hello}, "status": self.status}
        unknown = {"error": {"code": "bad_request", "message": "no such verb", "expected": "", "got": verb, "next": ""}}
        process.stdout.write(json.dumps(answers.get(verb, unknown)).encode())
        process.exit(0 if verb in answers else 2)
