"""The embedded machine: this very computer, behind an in-process SSH server that runs the same gatekeeper.

Owns: the SSH server on loopback, the installation in the gateway's data directory (``units: process``).
Deliberately does not know: runs. Nothing of the run differs for such a machine: same key, same pinned host key, same
verbs, same zipapp, another unit manager.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import asyncssh

from quadlets.zipapp_build import build_host_zipapp

# Longest that a forced command may go on after its SSH channel has closed, seconds.
LEFTOVER_S = 30.0


class EmbeddedMachine:
    """One embedded machine: installs itself, serves, and is closed by whoever made it.

    Args:
        machine_id: the id it has in the store.
        directory: where its installation and host key live.
        client_key: public key line of the gateway, the only one that may log in.
    """

    def __init__(self, machine_id: str, directory: Path, client_key: str) -> None:
        self._machine_id = machine_id
        self._directory = directory
        self._client_key = client_key
        self._server: asyncssh.SSHAcceptor | None = None
        self._children: set[asyncio.Task[None]] = set()
        self._run_dir: Path | None = None

    @property
    def home(self) -> Path:
        return self._directory / "home"

    @property
    def endpoint(self) -> tuple[str, int]:
        """Address and port it listens on; raises ``RuntimeError`` before ``start``."""
        if self._server is None:
            raise RuntimeError("the embedded machine does not listen")
        return "127.0.0.1", int(self._server.get_port())

    @property
    def host_key_line(self) -> str:
        return self._host_key().export_public_key().decode("ascii").strip()

    def install(self) -> None:
        """Write zipapp and configuration. The run directory must have a short path: UNIX sockets end at 107 bytes."""
        self.home.mkdir(parents=True, mode=0o700, exist_ok=True)
        build_host_zipapp(self.home / "host.pyz")
        self._run_dir = self._choose_run_dir()
        configuration = {
            "protocol": 1,
            "machine": self._machine_id,
            "units": "process",
            "run_dir": str(self._run_dir),
            "worker_argv": [sys.executable, "-I", "-m", "edge_agent.worker"],
        }
        (self.home / "host.json").write_text(json.dumps(configuration, indent=1), encoding="utf-8")

    def _choose_run_dir(self) -> Path:
        # Stays the same over restarts of the gateway, so that a keeper that outlived one is still found.
        known = self.home / "host.json"
        if known.exists():
            found = json.loads(known.read_text(encoding="utf-8")).get("run_dir")
            if found and Path(found).is_dir():
                return Path(found)
        wanted = self.home / "run"
        if len(os.fsencode(wanted)) <= 80:
            wanted.mkdir(mode=0o700, exist_ok=True)
            return wanted
        return Path(tempfile.mkdtemp(prefix="chargehand-"))

    def _host_key(self) -> asyncssh.SSHKey:
        path = self._directory / "host_key"
        if not path.exists():
            self._directory.mkdir(parents=True, mode=0o700, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(asyncssh.generate_private_key("ssh-ed25519").export_private_key())
        return asyncssh.read_private_key(path)

    async def start(self) -> None:
        self.install()
        self._server = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[self._host_key()],
            authorized_client_keys=asyncssh.import_authorized_keys(self._client_key),
            process_factory=self._serve,
            encoding=None,
            password_auth=False,
            kbdint_auth=False,
            allow_pty=False,
            agent_forwarding=False,
            compression_algs=None,
            # The same names sshd would refuse: nothing of the client's environment or wishes gets in.
            allow_scp=False,
            sftp_factory=None,
        )

    def _serve(self, process: asyncssh.SSHServerProcess[Any]) -> None:
        task = asyncio.create_task(self._forced_command(process))
        self._children.add(task)
        task.add_done_callback(self._children.discard)

    async def _forced_command(self, process: asyncssh.SSHServerProcess[Any]) -> None:
        """What sshd does with ``restrict,command=...``: the client's command is only a variable."""
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": os.environ.get("HOME", "/"),
            "SSH_ORIGINAL_COMMAND": process.command or "",
            "SSH_CONNECTION": "embedded",
        }
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(self.home / "host.pyz"),
            "gatekeeper",
            "--home",
            str(self.home),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd="/",
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        upward = asyncio.create_task(_feed(process.stdin, child.stdin))
        downward = [
            asyncio.create_task(_carry(child.stdout, process.stdout)),
            asyncio.create_task(_carry(child.stderr, process.stderr)),
        ]
        closed = asyncio.create_task(process.wait_closed())
        ended = asyncio.create_task(child.wait())
        try:
            await asyncio.wait({closed, ended}, return_when=asyncio.FIRST_COMPLETED)
            # The client may have gone: a verb then ends by itself, a dial when its streams end.
            await asyncio.wait({ended}, timeout=LEFTOVER_S)
            if ended.done():
                await asyncio.gather(*downward, return_exceptions=True)
                process.exit(ended.result() if ended.result() >= 0 else 255)
        finally:
            for task in (upward, *downward, closed, ended):
                task.cancel()
            if child.returncode is None:
                child.kill()
                await child.wait()
            await asyncio.gather(upward, *downward, closed, ended, return_exceptions=True)
            process.close()

    async def aclose(self) -> None:
        """Stop listening and end what is still served. A run that is on goes on until its lease ends."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None
        for task in list(self._children):
            task.cancel()
        await asyncio.gather(*self._children, return_exceptions=True)
        run_dir = self._run_dir
        # A run directory elsewhere (this home's path is too long for sockets) goes as well, unless a run is on in it.
        if run_dir is not None and self.home not in run_dir.parents and not (run_dir / "broker.sock").exists():
            shutil.rmtree(run_dir, ignore_errors=True)


async def _feed(source: asyncssh.SSHReader[bytes], sink: asyncio.StreamWriter) -> None:
    """The client's input to the forced command; its end is passed on."""
    with contextlib.suppress(ConnectionError, asyncssh.Error):
        while block := await source.read(65536):
            sink.write(block)
            await sink.drain()
    sink.close()


async def _carry(source: asyncio.StreamReader, sink: asyncssh.SSHWriter[bytes]) -> None:
    """The forced command's output to the client, as long as there is one."""
    with contextlib.suppress(ConnectionError, asyncssh.Error):
        while block := await source.read(65536):
            sink.write(block)
            await sink.drain()
