"""A real SSH server in the test process that runs commands on this computer, or answers what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import asyncssh

Answer = Callable[[str], tuple[int, str, str]]


@dataclass(frozen=True)
class Server:
    """Where it listens, the key it shows, the key that opens it."""

    port: int
    host_key: asyncssh.SSHKey
    identity: Path
    commands: list[str]


class _Admin(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return True


@contextlib.asynccontextmanager
async def serving(folder: Path, answer: Answer | None = None) -> AsyncIterator[Server]:
    """Serve on 127.0.0.1. ``answer``: what a command line gets (status, stdout, stderr); default: it is run with sh."""
    host_key = asyncssh.generate_private_key("ssh-ed25519")
    client_key = asyncssh.generate_private_key("ssh-ed25519")
    identity = folder / "id"
    client_key.write_private_key(str(identity))
    allowed = folder / "allowed"
    client_key.write_public_key(str(allowed))
    commands: list[str] = []

    async def handle(process: asyncssh.SSHServerProcess[bytes]) -> None:
        commands.append(process.command or "")
        if answer is not None:
            status, out, errors = answer(process.command or "")
            process.stdout.write(out.encode())
            process.stderr.write(errors.encode())
            process.exit(status)
            return
        child = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", process.command or "", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, env={**os.environ, "HOME": str(folder)},
        )  # fmt: skip
        out, errors = await child.communicate(await process.stdin.read())
        process.stdout.write(out)
        process.stderr.write(errors)
        process.exit(child.returncode or 0)

    factory: Callable[[asyncssh.SSHServerProcess[bytes]], Awaitable[None]] = handle
    server = await asyncssh.listen(
        "127.0.0.1", 0, server_factory=_Admin, server_host_keys=[host_key], authorized_client_keys=str(allowed),
        process_factory=factory, encoding=None,
    )  # fmt: skip
    try:
        yield Server(server.get_port(), host_key, identity, commands)
    finally:
        server.close()
        await server.wait_closed()
