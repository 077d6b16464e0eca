"""Lab machines with the edge installed by the product's own command, and gateways that use them.

Owns: the worker's image (built once for the sources as they are), installing, a gateway in this process or in one of
its own. Deliberately does not know: what is tested.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from supervisor.gateway import Gateway, gateway
from supervisor.settings.load import load
from tests.lab import oci
from tests.lab.machine import Machine

ROOT = Path(__file__).resolve().parent.parent.parent
CHARGEHAND = [sys.executable, "-m", "supervisor.cli.main"]
ACCOUNT = "chargehand"


def sources_digest() -> str:
    """Of everything that goes into the image."""
    digest = hashlib.sha256()
    for folder in ("a2a_bridge", "edge_agent", "inference", "tools", "prompts", "quadlets", "requirements/edge.txt"):
        path = ROOT / folder
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def worker_image() -> Iterator[Path]:
    """The worker's image as ``make image`` builds it without a container engine."""

    def build(target: Path) -> None:
        words = [
            sys.executable,
            "-m",
            "quadlets.image",
            "--engine",
            "none",
            "--suite",
            "trixie",
            "--output",
            str(target),
        ]
        subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    with oci.kept_archive(sources_digest(), build) as archive:
        yield archive


def fingerprint(host_key: str) -> str:
    """``SHA256:…`` of a public key line."""
    shown = subprocess.run(["ssh-keygen", "-lf", "-"], input=host_key, text=True, capture_output=True, check=True)
    return shown.stdout.split()[1]


def chargehand(data_dir: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        [*CHARGEHAND, "--data-dir", str(data_dir), *words],
        cwd=ROOT, text=True, capture_output=True, check=False, env={**os.environ, **environment}, timeout=300,
    )  # fmt: skip


def install(data_dir: Path, machine: Machine, name: str, image: Path, *more: str) -> dict[str, Any]:
    """``chargehand edge install`` on ``machine``; returns its JSON."""
    done = chargehand(
        data_dir, "edge", "install", f"root@{machine.address}", "--machine", name, "--identity", str(machine.admin_key),
        "--accept-host-key", fingerprint(machine.host_key), "--image-archive", str(image), "--yes", "--json", *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


@contextlib.asynccontextmanager
async def gateway_on(data_dir: Path, **limits: Any) -> AsyncIterator[Gateway]:
    """A gateway in this process, without MLflow."""
    config = write_config(data_dir.parent / "chargehand.toml", **limits)
    async with gateway(load(config, data_dir=data_dir), traces=False) as running:
        yield running


def write_config(path: Path, **limits: Any) -> Path:
    path.write_text("[limits]\n" + "".join(f"{name} = {value}\n" for name, value in limits.items()), encoding="utf-8")
    return path


# What holds the user namespace of rootless podman open: it executes nothing, and goes with the next `stop`.
PAUSE = "/usr/bin/podman"


def ours(machine: Machine, pause: bool = True) -> list[str]:
    """The command lines of the edge agent's processes on a machine: what the dedicated user runs beside its manager and
    the door itself (sshd and its forced command, which come and go with each verb). ``pause=False`` leaves out podman's
    pause process: after a lease that ended with nobody there it waits for the next contact."""
    left = []
    for process in machine.processes():
        words = " ".join(process.argv)
        manager = words.startswith(("/usr/lib/systemd/systemd --user", "(sd-pam)", "/usr/bin/dbus-daemon --session"))
        door = words.startswith("sshd") or "host.pyz gatekeeper" in words
        if process.user == ACCOUNT and not manager and not door and (pause or words != PAUSE):
            left.append(words)
    return left


def user_unit(machine: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    """``systemctl --user`` as the dedicated user, over real SSH."""
    return machine.run(["systemctl", "--user", *words], user=ACCOUNT, check=False)  # type: ignore[return-value]
