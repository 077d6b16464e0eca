"""The lab's own way into a machine: OpenSSH with a pinned host key, never a shell of the box.

Owns the ssh command line. It is the test's administrator, not the product: the product brings its own SSH client.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.lab import box

CONNECT_SECONDS = 5
SILENCE_SECONDS = 15
"""A machine that says nothing for this long in the middle of a command counts as cut off."""


@dataclass(frozen=True)
class Door:
    """Where a machine's sshd is, which key it must show and which key opens it."""

    address: str
    port: int
    key: Path
    known_hosts: Path

    def command(self, user: str) -> list[str]:
        """The ssh command line up to the remote command; also what a person may type."""
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "ConnectTimeout": str(CONNECT_SECONDS),
            "ServerAliveInterval": str(SILENCE_SECONDS // 3),
            "ServerAliveCountMax": "2",
            "LogLevel": "ERROR",
        }
        words = ["ssh", "-F", "none", "-i", str(self.key), "-p", str(self.port)]
        for name, value in options.items():
            words += ["-o", f"{name}={value}"]
        return [*words, f"{user}@{self.address}"]

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str,
        input: bytes | None = None,
        stdin: IO[bytes] | None = None,
        check: bool = True,
        timeout: float = 60.0,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run one command on the machine. sshd hands it to a shell there, so each word is quoted for one."""
        words = [*self.command(user), "--", shlex.join(argv)]
        return box.run(words, input=input, stdin=stdin, check=check, timeout=timeout)


def make_key(path: Path, comment: str = "chargehand-lab") -> str:
    """Make an Ed25519 key pair at `path`; its public line, without the comment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    box.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)])
    return " ".join(path.with_name(f"{path.name}.pub").read_text().split()[:2])
