"""B1 and B9: what one governed run costs on a real machine, beside the bare SSH sequence on the same units.

Owns: the three measurements and their table. The machine is a lab machine (systemd-nspawn, sshd, rootless podman).

*Bare*: ``ssh`` start of a Quadlet with the same image and confinement, the one command, stop, each over a new connection,
as a script would do it. *Import*: what the worker's process spends before
it can listen, as it says itself. *Governed*: request to sealed, as the run's own record says.
"""

from __future__ import annotations

import asyncio
import gzip
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from supervisor.gateway import Gateway
from tests.lab.machine import Lab, Machine
from tests.machines.installed import ACCOUNT, gateway_on, install, ours, worker_image
from tests.runs.harness import ask, event, finished

NAME = "bench-01"
# One tool call: the smallest runbook there is, a question to one file.
RUNBOOK = """\
name: bench-one-call
title: One tool call
description: What bench B1 runs.
labels: []
steps:
  - {id: uptime, title: Uptime, observer: uptime}
checks: []
"""
# The image has no shell and no sleep; the first process of a container must end at SIGTERM by itself.
SLEEPER = '-c "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); signal.pause()"'
IMAGE_BUDGET_MB, WORKER_BUDGET_MB, BROKER_BUDGET_MB, ACTIVATION_BUDGET_S = 200, 120, 25, 1.2


def measure(rounds: int) -> dict[str, Any]:
    """Run both benchmarks; returns figures in seconds and MB."""
    with tempfile.TemporaryDirectory(prefix="chargehand-bench-") as scratch, Lab() as lab, worker_image() as image:
        machine = lab.machine(NAME)
        data_dir = Path(scratch) / "data"
        install(data_dir, machine, NAME, image)
        prepare_bare(machine)
        return asyncio.run(_measure(machine, data_dir, image, rounds))


async def _measure(machine: Machine, data_dir: Path, image: Path, rounds: int) -> dict[str, Any]:
    (data_dir / "runbooks").mkdir()
    (data_dir / "runbooks" / "bench.yaml").write_text(RUNBOOK, encoding="utf-8")
    governed: list[dict[str, float]] = []
    bare: list[float] = []
    imports: list[float] = []
    ready: list[float] = []
    memory: dict[str, float] = {}
    async with gateway_on(data_dir) as running:
        for round_number in range(rounds + 1):
            run = await ask(running, machine=NAME, runbook="bench-one-call", text="bench")
            run = await finished(running, run)
            if str(run.state) != "succeeded":
                raise RuntimeError(f"the run of round {round_number} ended as {run.state}: {run.error or run.verdict}")
            told = await event(running, run, "activated")
            seconds = await asyncio.to_thread(bare_sequence, machine)
            # What the governed run ends by itself (docs/decisions/0005), the bare one leaves behind for the next.
            await asyncio.to_thread(machine.run, ["systemctl", "--user", "stop", "podman-pause-*.scope"], ACCOUNT)
            if round_number == 0:
                continue  # the warm-up: image layers, page cache, connection
            governed.append(run.seconds or {})
            bare.append(seconds)
            imports.append(float(told["worker"]["start_s"]))
            ready.append(float(told["seconds"]["ready"]))
        memory = await _memory(running, machine, image)
    p50 = {stage: statistics.median(one[stage] for one in governed) for stage in governed[0]}
    limit = 2 * statistics.median(bare) + statistics.median(imports)
    return {
        "B1": {
            "rounds": rounds,
            "governed_p50_s": round(p50["total"], 3),
            "governed_max_s": round(max(one["total"] for one in governed), 3),
            "stages_p50_s": {stage: round(value, 3) for stage, value in p50.items()},
            "bare_ssh_p50_s": round(statistics.median(bare), 3),
            "worker_import_p50_s": round(statistics.median(imports), 3),
            "activation_to_ready_p50_s": round(statistics.median(ready), 3),
            "activation_budget_s": ACTIVATION_BUDGET_S,
            "target_s": round(limit, 3),
            "ratio_without_import": round((p50["total"] - statistics.median(imports)) / statistics.median(bare), 2),
            "held": p50["total"] <= limit,
        },
        "B9": {**memory, "image_archive_mb": round(image.stat().st_size / 1e6, 1)},
    }


def prepare_bare(machine: Machine) -> None:
    """A second Quadlet on the machine: the product's own, with a sleeper in place of the worker and without the broker."""
    folder = f"/var/lib/{ACCOUNT}/.config/containers/systemd"
    product = machine.read(f"{folder}/chargehand-agent.container").decode()
    kept = [
        line
        for line in product.splitlines()
        if not line.startswith(("BindsTo=", "After=", "Volume=", "ContainerName="))
    ]
    text = "\n".join(kept).replace(
        "[Container]", "[Container]\nContainerName=bare\nPodmanArgs=--entrypoint=python3\nExec=" + SLEEPER
    )
    machine.write(f"{folder}/bare.container", text.encode(), owner=ACCOUNT)
    machine.run(["systemctl", "--user", "daemon-reload"], user=ACCOUNT)


def bare_sequence(machine: Machine) -> float:
    """Start, one command, stop over three new connections; seconds."""
    began = time.monotonic()
    for words in (
        ["systemctl", "--user", "start", "bare"],
        ["cat", "/proc/uptime"],
        ["systemctl", "--user", "stop", "bare"],
    ):
        machine.run(words, user=ACCOUNT)
    return time.monotonic() - began


async def _memory(running: Gateway, machine: Machine, image: Path) -> dict[str, float]:
    """Resident memory of worker and broker in the middle of a run, MB, as the machine's own gatekeeper reports it."""
    run = await ask(running, machine=NAME, runbook="health", text="bench")
    await event(running, run, "call.finished", 60)
    _, gatekeeper = await running.services.door(NAME)
    processes = (await gatekeeper.status())["processes"]
    await finished(running, run, 120)
    left = await asyncio.to_thread(ours, machine)
    size = image_size(image)
    found = {
        "worker_rss_mb": max(
            (
                p["rss_kb"]
                for p in processes
                if "/opt/chargehand" in p["argv"] and "podman" not in p["argv"] and "conmon" not in p["argv"]
            ),
            default=0,
        )
        / 1000,
        "broker_rss_mb": max((p["rss_kb"] for p in processes if "host.pyz broker" in p["argv"]), default=0) / 1000,
        "image_mb": size,
        "worker_budget_mb": WORKER_BUDGET_MB,
        "broker_budget_mb": BROKER_BUDGET_MB,
        "image_budget_mb": IMAGE_BUDGET_MB,
    }
    if left:
        raise RuntimeError(f"processes are left after a run: {left}")
    return {name: round(value, 1) for name, value in found.items()}


def image_size(archive: Path) -> float:
    """What the image's layers take unpacked, MB. ``podman images`` counts a layer below another one twice."""
    with tarfile.open(archive) as opened:
        blobs = [opened.extractfile(member) for member in opened if member.isfile()]
        contents = [blob.read() for blob in blobs if blob is not None]
    return sum(len(gzip.decompress(content)) for content in contents if content[:2] == b"\x1f\x8b") / 1e6


def table(document: dict[str, Any]) -> str:
    """Both benchmarks for people."""
    one, nine = document["B1"], document["B9"]
    stages = "  ".join(f"{stage} {value:.2f}" for stage, value in one["stages_p50_s"].items() if stage != "total")
    rows = [
        f"box: {document['box']}; lab machine, {one['rounds']} rounds after a warm-up, medians",
        "",
        "B1  one governed run, one tool call, runbook model",
        f"  governed run, request to sealed   {one['governed_p50_s']:.2f} s   ({stages})",
        f"  bare ssh: start, command, stop    {one['bare_ssh_p50_s']:.2f} s",
        f"  the worker's own import           {one['worker_import_p50_s']:.2f} s",
        f"  target: 2 x bare + import         {one['target_s']:.2f} s   {'held' if one['held'] else 'NOT HELD'}",
        f"  activation to A2A ready           {one['activation_to_ready_p50_s']:.2f} s   (target {one['activation_budget_s']} s)",
        "",
        "B9  the edge agent while it runs",
        f"  worker  {nine['worker_rss_mb']:.0f} MB of {nine['worker_budget_mb']:.0f}   "
        f"broker  {nine['broker_rss_mb']:.0f} MB of {nine['broker_budget_mb']:.0f}   "
        f"image  {nine['image_mb']:.0f} MB of {nine['image_budget_mb']:.0f} (archive {nine['image_archive_mb']:.0f} MB)",
    ]
    return "\n".join(rows)
