"""SSH to machines: the one module that knows asyncssh.

Owns: the gateway's key, host-key pinning, pooled connections, running one verb, dialling a socket.
Deliberately does not know: what the verbs mean (``gatekeeper``), runs, the store.

Host keys are pinned: a connection is made only when the machine shows exactly the key that a person accepted. There is
no trust on first use, and a changed key stops everything (safety.md; ``HostKeyChanged``).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path

import asyncssh

from supervisor.errors import HostKeyChanged, HostKeyUnknown, MachineFailed, MachineUnreachable
from supervisor.machines import HostKey, Machine, host_key

# One answer of a verb; `journal` pages well below this.
MAX_ANSWER = 16 * 1024 * 1024
# How long spliced connections may take to close at both ends, seconds.
CLOSE_S = 5.0
KEY_NAME = "gateway_ed25519"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a verb printed and how it ended."""

    status: int
    stdout: bytes
    stderr: bytes


def gateway_key(data_dir: Path, key_file: Path | None = None) -> asyncssh.SSHKey:
    """The gateway's private key: ``key_file``, or one in ``data_dir/keys``, made with mode 0600 on first use."""
    path = key_file or data_dir / "keys" / KEY_NAME
    if key_file is None and not path.exists():
        path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        key = asyncssh.generate_private_key("ssh-ed25519", comment="chargehand-gateway")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(key.export_private_key())
            file.flush()
            os.fsync(file.fileno())
        # Two processes may come here at once: the first link wins, the other uses it.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        os.unlink(temporary)
        path.with_suffix(".pub").write_bytes(asyncssh.read_private_key(path).export_public_key())
    try:
        return asyncssh.read_private_key(path)
    except (OSError, asyncssh.KeyImportError) as error:
        raise MachineFailed(
            "the gateway's SSH key cannot be read",
            tried=str(path),
            got=str(error),
            next_step="set ssh.key_file in chargehand.toml to an unencrypted private key",
        ) from error


def public_key_line(key: asyncssh.SSHKey) -> str:
    """The public half as it stands in ``authorized_keys``."""
    return key.export_public_key().decode("ascii").strip()


async def scan_host_key(address: str, port: int, timeout_s: float) -> HostKey:
    """The host key that ``address`` shows now, for a person to look at. Proves nothing about who answers."""
    try:
        key = await asyncio.wait_for(
            asyncssh.get_server_host_key(
                address, port, server_host_key_algs=["ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512"]
            ),
            timeout_s,
        )
    except (OSError, asyncssh.Error, TimeoutError) as error:
        raise _unreachable(f"{address}:{port}", error) from error
    if key is None:
        raise MachineUnreachable("the server showed no host key", tried=f"{address}:{port}")
    return host_key(key.export_public_key().decode("ascii"))


def _unreachable(what: str, error: BaseException) -> MachineUnreachable:
    said = str(error) or type(error).__name__
    step = "check address, port, route and firewall"
    if isinstance(error, asyncssh.PermissionDenied):
        step = "the gateway's key is not installed for this user: chargehand edge install"
    return MachineUnreachable(f"no SSH connection to {what}: {said}", tried=what, next_step=step)


class _PinnedClient(asyncssh.SSHClient):
    """Accepts exactly one host key."""

    def __init__(self, pinned: HostKey) -> None:
        self._pinned = pinned
        self.shown: HostKey | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        self.shown = host_key(key.export_public_key().decode("ascii"))
        return self.shown == self._pinned


# The names under which a key kind is offered in the key exchange.
_ALGORITHMS = {"ssh-rsa": ["rsa-sha2-512", "rsa-sha2-256"]}


class Connections:
    """Pooled SSH connections, one per machine; verbs of one machine share it.

    Args:
        key: the gateway's private key.
        connect_s, keepalive_s: seconds, see ``settings.limits``.
        most: connections open at the same time.
    """

    def __init__(self, key: asyncssh.SSHKey, connect_s: float, keepalive_s: float, most: int) -> None:
        self._key = key
        self._connect_s = connect_s
        self._keepalive_s = keepalive_s
        self._most = most
        self._open: dict[str, tuple[tuple[str, int, str, str | None], asyncssh.SSHClientConnection]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def connection(self, machine: Machine, address: str, port: int) -> asyncssh.SSHClientConnection:
        """A live connection to ``machine`` at ``address``:``port``, from the pool or new."""
        identity = (address, port, machine.user, machine.host_key)
        lock = self._locks.setdefault(machine.id, asyncio.Lock())
        async with lock:
            held = self._open.get(machine.id)
            if held is not None and held[0] == identity and not held[1].is_closed():
                # Used again: goes to the end, so that the first of the dict is the one idle for longest.
                self._open[machine.id] = self._open.pop(machine.id)
                return held[1]
            if held is not None:
                del self._open[machine.id]
                held[1].close()
            connection = await self._connect(machine, address, port)
            self._open[machine.id] = (identity, connection)
            while len(self._open) > self._most:
                _, oldest = self._open.pop(next(iter(self._open)))
                oldest.close()
            return connection

    async def _connect(self, machine: Machine, address: str, port: int) -> asyncssh.SSHClientConnection:
        if machine.host_key is None:
            raise HostKeyUnknown(
                f"machine {machine.id} has no accepted host key",
                next_step=f"chargehand machine check {machine.id}, compare the fingerprint, then accept it",
            )
        pinned = host_key(machine.host_key)
        client = _PinnedClient(pinned)
        try:
            return await asyncio.wait_for(
                asyncssh.connect(
                    address,
                    port,
                    username=machine.user,
                    client_keys=[self._key],
                    client_factory=lambda: client,
                    known_hosts=b"",
                    server_host_key_algs=_ALGORITHMS.get(pinned.kind, [pinned.kind]),
                    agent_path=None,
                    config=None,
                    keepalive_interval=self._keepalive_s,
                    keepalive_count_max=2,
                    x509_trusted_certs=None,
                    preferred_auth="publickey",
                    compression_algs=None,
                ),
                self._connect_s,
            )
        except asyncssh.HostKeyNotVerifiable as error:
            raise await self._changed(machine, pinned, client.shown, error) from error
        except asyncssh.KeyExchangeFailed as error:
            # No common host key algorithm: the machine has another kind of key now.
            shown = None
            with contextlib.suppress(MachineUnreachable):
                shown = await scan_host_key(address, port, self._connect_s)
            raise await self._changed(machine, pinned, shown, error) from error
        except (OSError, asyncssh.Error, TimeoutError) as error:
            raise _unreachable(f"{machine.user}@{address}:{port}", error) from error

    async def _changed(
        self, machine: Machine, pinned: HostKey, shown: HostKey | None, error: BaseException
    ) -> HostKeyChanged | MachineUnreachable:
        if shown == pinned:
            return _unreachable(machine.id, error)
        return HostKeyChanged(
            f"machine {machine.id} shows another host key than the accepted one: nothing is done there",
            expected=pinned.fingerprint,
            got=shown.fingerprint if shown else str(error),
            next_step="find out why (new installation, or somebody in between); then remove and add the machine, "
            "or accept the new key: chargehand machine check --accept-host-key FINGERPRINT",
        )

    async def forget(self, machine_id: str) -> None:
        """Close the pooled connection of a machine, if there is one."""
        held = self._open.pop(machine_id, None)
        if held is not None:
            held[1].abort()

    async def aclose(self) -> None:
        """Close every connection; bounded."""
        held, self._open = list(self._open.values()), {}
        for _, connection in held:
            connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                for _, connection in held:
                    await connection.wait_closed()


async def run_verb(connection: asyncssh.SSHClientConnection, verb: str, document: bytes, timeout_s: float) -> Answer:
    """One verb over one channel. Raises ``MachineUnreachable`` if the connection breaks or the time is over."""
    try:
        async with asyncio.timeout(timeout_s):
            async with connection.create_process(verb, encoding=None, stderr=asyncssh.PIPE) as process:
                process.stdin.write(document)
                process.stdin.write_eof()
                stdout = await _limited(process.stdout)
                stderr = (await process.stderr.read(65536)) or b""
                done = await process.wait()
    except TimeoutError as error:
        raise MachineUnreachable(
            f"the machine did not answer {verb!r} within {timeout_s:g} s", next_step="chargehand machine check"
        ) from error
    except (OSError, asyncssh.Error) as error:
        raise MachineUnreachable(f"the connection broke while {verb!r} was asked: {error}") from error
    return Answer(done.exit_status if done.exit_status is not None else -1, stdout, bytes(stderr))


async def _limited(reader: asyncssh.SSHReader[bytes]) -> bytes:
    data = bytearray()
    while block := await reader.read(65536):
        data += block
        if len(data) > MAX_ANSWER:
            raise MachineFailed("the machine's answer is too long", expected=f"at most {MAX_ANSWER} bytes")
    return bytes(data)


@contextlib.asynccontextmanager
async def dialled(
    connection: asyncssh.SSHClientConnection, verb: str, socket_path: Path, timeout_s: float
) -> AsyncIterator[None]:
    """While the context lasts, each connection to the UNIX socket ``socket_path`` is one ``verb`` channel to the machine.

    The socket lies in a directory that only this user can enter; both ends of every spliced connection are closed here.
    """
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with connection.create_process(verb, encoding=None) as process:
                async with asyncio.timeout(timeout_s):
                    hello = await process.stdout.readline()
                if hello.startswith(b'{"ok":true'):
                    await _splice(reader, writer, process)
        except (OSError, asyncssh.Error, TimeoutError):
            return  # the client of the socket sees its connection end and says so in its own words
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_unix_server(accept, socket_path, limit=1 << 20)
    try:
        yield
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        if tasks:
            # Bounded: closing a channel waits for the machine, and the machine may be gone.
            await asyncio.wait(tasks, timeout=CLOSE_S)
        socket_path.unlink(missing_ok=True)


async def _splice(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, process: asyncssh.SSHClientProcess[bytes]
) -> None:
    async def up() -> None:
        while block := await reader.read(65536):
            process.stdin.write(block)
            await process.stdin.drain()
        process.stdin.write_eof()

    async def down() -> None:
        while block := await process.stdout.read(65536):
            writer.write(block)
            await writer.drain()

    upward = asyncio.create_task(up())
    try:
        await down()
    finally:
        upward.cancel()
        await asyncio.gather(upward, return_exceptions=True)
