"""Carries out probes on this very machine, for trials by hand, for captures and for tests.

Owns: running a probe's argv or reading its file as the real runner would (fixed environment, no terminal, capped).
Deliberately does not know: policies; nothing here asks a gate, so it is for tests only.
"""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

from tools.observers.observer import Observer, Probe
from tools.values import StepResult

ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "TERM": "dumb",
    "HOME": "/",
    "PAGER": "cat",
    "SYSTEMD_PAGER": "",
    "SYSTEMD_COLORS": "0",
}


def carry_out(
    probe: Probe, *, root: str = "/", user: int | None = None, pid: int | None = None, cap: int = 0
) -> StepResult:
    """The result of one probe: below ``root`` (chroot), in the namespaces of process ``pid``, as ``user``, where given.

    ``cap``: bytes of output kept (0: what the probe asks for).
    """
    cap = cap or probe.output_bytes
    started = time.monotonic()
    if probe.path and root == "/" and user is None and pid is None:
        try:
            with open(probe.path, "rb") as handle:
                raw = handle.read(cap + 1)
        except OSError as problem:
            return StepResult(path=probe.path, error=f"{probe.path}: {problem.strerror}")
        return StepResult(
            path=probe.path,
            exit_status=0,
            stdout=raw[:cap].decode("utf-8", "replace"),
            stdout_bytes=len(raw),
            cut=len(raw) > cap,
        )
    argv = list(probe.argv) if probe.argv else ["cat", probe.path]
    prefix: list[str] = []
    if root != "/" or user is not None:
        prefix = ["setpriv", f"--reuid={user or 0}", f"--regid={user or 0}", "--clear-groups", "--"]
        if root != "/":
            prefix = ["chroot", root, *prefix]
    if pid is not None:
        prefix = [
            "nsenter",
            "-t",
            str(pid),
            "-a",
            "--",
            "env",
            "-i",
            *(f"{k}={v}" for k, v in ENVIRONMENT.items()),
            *prefix,
        ]
    try:
        done = subprocess.run(
            prefix + argv,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=False,
            cwd="/",
        )
    except FileNotFoundError:
        return StepResult(argv=(probe.argv,), error=f"{argv[0]}: no such command", exit_status=None)
    except subprocess.TimeoutExpired:
        return StepResult(argv=(probe.argv,), timed_out=True, duration_ms=30000.0)
    out, err = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    if prefix and (
        "setpriv: failed to execute" in err
        or f"env: '{argv[0]}': No such file" in err
        or (f"env: ‘{argv[0]}’: No such file" in err)
    ):
        return StepResult(argv=(probe.argv,), error=f"{argv[0]}: no such command")
    if probe.path:
        if done.returncode:
            return StepResult(path=probe.path, error=err.strip().partition(": ")[2])
        return StepResult(path=probe.path, exit_status=0, stdout=out[:cap], cut=len(out) > cap)
    return StepResult(
        argv=(probe.argv,),
        exit_status=done.returncode if done.returncode >= 0 else None,
        exit_statuses=(done.returncode if done.returncode >= 0 else None,),
        signal=-done.returncode if done.returncode < 0 else None,
        stdout=out[:cap],
        stderr=err[:65536],
        stdout_bytes=len(done.stdout),
        stderr_bytes=len(done.stderr),
        cut=len(out) > cap,
        duration_ms=(time.monotonic() - started) * 1000,
    )


def observe(
    observer: Observer, parameters: dict[str, Any], **how: Any
) -> tuple[list[Probe], list[StepResult], dict[str, Any]]:
    """A whole observation: its probes, their results and the data."""
    asked: list[Probe] = []
    results: list[StepResult] = []
    probes = observer.probes(parameters)
    while probes:
        asked += probes
        results += [carry_out(probe, **how) for probe in probes]
        probes = observer.next_probes(results, parameters)
    return asked, results, observer.parse(results, parameters)


def replay(
    observer: Observer, parameters: dict[str, Any], known: dict[str, StepResult]
) -> tuple[list[StepResult], dict[str, Any]]:
    """An observation answered from ``known`` (by probe label); whatever is not in it is not on the machine."""
    results: list[StepResult] = []
    probes = observer.probes(parameters)
    while probes:
        for probe in probes:
            missing = f"{probe.path}: No such file or directory" if probe.path else f"{probe.argv[0]}: no such command"
            results.append(known.get(probe.label, StepResult(error=missing)))
        probes = observer.next_probes(results, parameters)
    return results, observer.parse(results, parameters)


# A sample file: "=== $ df -l" or "=== < /proc/meminfo" begins a result, "=== status 1", "=== cut", "=== error text"
# and "=== stderr" belong to it; what stands between is the output, byte for byte.


def write_sample(parameters: dict[str, Any], probes: list[Probe], results: list[StepResult]) -> str:
    """The text of a sample file."""
    import json

    text = f"=== parameters {json.dumps(parameters, sort_keys=True)}\n"
    for probe, result in zip(probes, results, strict=True):
        if result.error and not result.stdout:
            if "No such file" in result.error or "no such command" in result.error:
                continue
            text += f"=== {'<' if probe.path else '$'} {probe.label}\n=== error {result.error}\n"
            continue
        text += f"=== {'<' if probe.path else '$'} {probe.label}\n"
        if not probe.path and result.exit_status != 0:
            text += f"=== status {result.exit_status}\n"
        if result.cut:
            text += "=== cut\n"
        text += (
            result.stdout if result.stdout.endswith("\n") or not result.stdout else result.stdout + "\n=== no newline\n"
        )
        if result.stderr.strip():
            text += "=== stderr\n" + result.stderr.rstrip("\n") + "\n"
    return text


def read_sample(text: str) -> tuple[dict[str, Any], dict[str, StepResult]]:
    """Parameters and results by probe label of a sample file."""
    import json

    parameters: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    current: dict[str, Any] = {}
    into = "stdout"
    for line in text.splitlines(keepends=True):
        if not line.startswith("=== "):
            current[into] = current.get(into, "") + line
            continue
        word, _, rest = line[4:].rstrip("\n").partition(" ")
        if word == "parameters":
            parameters = json.loads(rest)
        elif word in ("$", "<"):
            into = "stdout"
            current = found[rest] = {"exit_status": 0}
            current.update({"path": rest} if word == "<" else {"argv": (tuple(rest.split()),)})
        elif word == "status":
            current["exit_status"] = int(rest)
        elif word == "took":
            current["duration_ms"] = float(rest)
        elif word == "cut":
            current["cut"] = True
        elif word == "error":
            current.update(error=rest, exit_status=None)
        elif word == "stderr":
            into = "stderr"
        elif word == "no":
            current["stdout"] = current["stdout"].rstrip("\n")
        else:
            raise ValueError(f"unknown line in a sample: {line!r}")
    return parameters, {label: StepResult(**_with_statuses(values)) for label, values in found.items()}


def _with_statuses(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "exit_statuses": (values["exit_status"],) if "argv" in values else ()}


def readable(path: str) -> bool:
    """Whether a file of this machine can be opened for reading."""
    return os.access(path, os.R_OK)
