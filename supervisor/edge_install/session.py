"""The administrator's own SSH session: log in, run the installation program, once.

Owns: the login (their SSH configuration, agent and keys), the explicitly accepted host key, handing the program and its
document to the machine's Python. Deliberately does not know: what the program does. It is not the gateway's way to a
machine (``supervisor.activation.ssh``): that has another key, and no shell at the other end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import shlex
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncssh

from supervisor.edge_install.program import program_text
from supervisor.edge_install.target import Target
from supervisor.errors import HostKeyChanged, MachineFailed, MachineUnreachable, ProtocolMismatch, Refused
from supervisor.machines import HostKey, host_key

CONNECT_S = 20.0
"""A login with an agent on a slow line; a person may have to touch a security key."""
STEP_S = 2400.0
"""The longest step: pulling or loading the image on a slow line."""
MAX_LINE = 1 << 22
BLOCK = 1 << 18
ALGORITHMS = {"ssh-rsa": ["rsa-sha2-512", "rsa-sha2-256"]}
OFFERED = ["ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512"]

# What the machine's shell gets to see: one word of Python that reads the rest from its input. It has to be readable by
# any Python 3, to be able to say that it is too old.
BOOT = (
    "import sys,json\n"
    "if sys.version_info<(3,9):\n"
    " print(json.dumps({'error':{'message':'the Python of this machine is too old','expected':'3.9 or later',"
    "'got':sys.version.split()[0],'next':'install a newer python3'}}));sys.exit(1)\n"
    "s=sys.stdin.buffer\n"
    "exec(compile(s.read(int(s.readline())),'chargehand-edge','exec'))\n"
)


@dataclasses.dataclass(frozen=True)
class Payload:
    """A file to stream after the document."""

    path: Path
    size: int
    sha256: str


def payload_of(path: Path) -> Payload:
    """The size in bytes and the SHA-256 (hex) of a file. Raises ``OSError``."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
        return Payload(path, stream.tell(), digest.hexdigest())


async def shown_host_key(target: Target) -> HostKey:
    """The host key the machine shows now. Proves nothing about who answers; raises ``MachineUnreachable``."""
    try:
        key = await asyncio.wait_for(
            asyncssh.get_server_host_key(target.host, target.port, server_host_key_algs=OFFERED), CONNECT_S
        )
    except (OSError, asyncssh.Error, TimeoutError) as error:
        raise _unreachable(target, error) from error
    if key is None:
        raise MachineUnreachable("the server showed no host key", tried=str(target))
    return host_key(key.export_public_key().decode("ascii"))


def known_to_admin(target: Target, shown: HostKey, known_hosts: Path | None = None) -> bool | None:
    """What the administrator's own ``known_hosts`` says of this key: yes, no (another one is there), ``None``: nothing."""
    path = known_hosts or Path("~/.ssh/known_hosts").expanduser()
    try:
        entries = asyncssh.match_known_hosts(asyncssh.read_known_hosts(str(path)), target.host, "", target.port)
    except (OSError, ValueError):
        return None
    keys = {bytes(key.public_data) for key in entries[0] if key.get_algorithm() == shown.kind}
    return shown.blob in keys if keys else None


class Session:
    """One login. ``run`` may be called several times."""

    def __init__(self, target: Target, connection: asyncssh.SSHClientConnection, sudo: bool) -> None:
        self._target = target
        self._connection = connection
        self._sudo = sudo

    async def run(
        self,
        document: Mapping[str, Any],
        *,
        payload: Payload | None = None,
        say: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Run the program with ``document``; its result. ``say`` gets each line of progress.

        Raises ``MachineFailed`` with the machine's own account of what went wrong, ``Refused`` when sudo asks for a
        password, ``ProtocolMismatch`` for an answer that is none.
        """
        words = [*(("sudo", "-n", "--") if self._sudo else ()), "python3", "-I", "-c", BOOT]
        try:
            async with asyncio.timeout(STEP_S):
                process = await self._connection.create_process(shlex.join(words), encoding=None)
                sending = asyncio.create_task(_send(process.stdin, document, payload))
                try:
                    answer = await _answer(process.stdout, say)
                    errors = await process.stderr.read(MAX_LINE)
                    await process.wait_closed()
                finally:
                    sending.cancel()
                    process.close()
                    await asyncio.gather(sending, return_exceptions=True)
        except TimeoutError:
            raise MachineFailed(
                "the step did not end in time", tried=str(self._target), expected=f"{STEP_S:g} s"
            ) from None
        except (OSError, asyncssh.Error) as error:
            raise _unreachable(self._target, error) from error
        return _result(self._target, answer, bytes(errors).decode(errors="replace").strip(), process.exit_status)


@asynccontextmanager
async def login(
    target: Target, accepted: HostKey, *, identity: Path | None = None, sudo: bool | None = None
) -> AsyncIterator[Session]:
    """Log in as the administrator, on a machine that shows exactly the accepted host key.

    Args:
        identity: private key to use; default: those of their SSH configuration and agent.
        sudo: whether to become root with sudo; ``None``: when the login is not root's.

    Raises ``MachineUnreachable``, ``HostKeyChanged``.
    """
    shown: list[HostKey] = []

    class Client(asyncssh.SSHClient):
        def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
            shown.append(host_key(key.export_public_key().decode("ascii")))
            return shown[-1] == accepted

    options: dict[str, Any] = {"client_keys": [str(identity)], "agent_path": None} if identity else {}
    if target.admin:
        options["username"] = target.admin
    try:
        connecting = asyncssh.connect(
            target.host, target.port, client_factory=Client, known_hosts=b"", x509_trusted_certs=None,
            server_host_key_algs=ALGORITHMS.get(accepted.kind, [accepted.kind]), keepalive_interval=15, **options,
        )  # fmt: skip
        connection = await asyncio.wait_for(connecting, CONNECT_S)
    except asyncssh.HostKeyNotVerifiable as error:
        raise HostKeyChanged(
            "the machine showed another host key than the accepted one", tried=str(target), expected=accepted.fingerprint,
            got=shown[-1].fingerprint if shown else "none", next_step="find out why before you go on; nothing was sent",
        ) from error  # fmt: skip
    except (OSError, asyncssh.Error, TimeoutError, ValueError) as error:
        raise _unreachable(target, error) from error
    try:
        root = connection.get_extra_info("username") == "root"
        yield Session(target, connection, (not root) if sudo is None else sudo)
    finally:
        connection.close()
        await connection.wait_closed()


async def _send(stream: asyncssh.SSHWriter[bytes], document: Mapping[str, Any], payload: Payload | None) -> None:
    program = program_text().encode()
    data = json.dumps(document).encode()
    stream.write(b"%d\n%s%d\n%s" % (len(program), program, len(data), data))
    await stream.drain()
    if payload is not None:
        with payload.path.open("rb") as file:
            while block := await asyncio.to_thread(file.read, BLOCK):
                stream.write(block)
                await stream.drain()
    stream.write_eof()


async def _answer(stream: asyncssh.SSHReader[bytes], say: Callable[[str], None] | None) -> dict[str, Any] | str:
    """The last document; or, when there is none, what was printed instead."""
    other = ""
    while line := await stream.readline():
        try:
            document = json.loads(line)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            other += line.decode(errors="replace")
        elif "progress" in document:
            if say is not None:
                say(str(document["progress"]))
        else:
            return document
    return other


def _result(target: Target, answer: dict[str, Any] | str, errors: str, status: int | None) -> dict[str, Any]:
    if isinstance(answer, dict) and isinstance(answer.get("result"), dict):
        return dict(answer["result"])
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        error = answer["error"]
        raise MachineFailed(
            str(error.get("message")), tried=str(target), expected=str(error.get("expected", "")),
            got=str(error["got"]) if error.get("got") else None, next_step=str(error.get("next", "")),
        )  # fmt: skip
    said = (errors or str(answer)).strip()[-800:]
    if "sudo:" in errors:
        raise Refused(
            "sudo did not let the administrator become root", tried=str(target), expected="sudo without a password", got=said,
            next_step="log in as root, allow NOPASSWD for the installation, or use --user",
        )  # fmt: skip
    if status == 127:
        raise MachineFailed(
            "the machine has no python3", tried=str(target), expected="Python 3.9 or later", got=said,
            next_step="install it: dnf install python3, or apt install python3",
        )  # fmt: skip
    raise ProtocolMismatch(
        "the installation program gave no answer", tried=str(target), expected="one JSON document", got=said or f"status {status}",
        next_step="log in by hand and run `python3 -I -c pass`; start-up files must print nothing",
    )  # fmt: skip


def _unreachable(target: Target, error: BaseException) -> MachineUnreachable:
    step = "check address, port, route and firewall"
    if isinstance(error, asyncssh.PermissionDenied):
        step = "give the administrator's private key with --identity, or load it into your SSH agent"
    return MachineUnreachable(
        f"no SSH connection to {target}: {str(error) or type(error).__name__}", tried=str(target), next_step=step
    )
