"""Whether the lab can run on this box, found out by trying, and one line of why not.

Owns the list of what the lab needs from a box. Changes nothing on it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.lab import box

TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "apt-config": "apt",
    "tar": "tar",
}
"""Command -> the Debian package that has it."""

DEVICES = ("/dev/fuse", "/dev/net/tun")


def lab_problem() -> str | None:
    """Why the lab cannot run here, in one line that says what to do; None when it can."""
    if sys.platform != "linux":
        return f"the lab needs Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "the lab needs root (it mounts, makes network namespaces and boots systemd)"
    if missing := sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None}):
        return f"the lab needs Debian packages that are not installed: apt-get install {' '.join(missing)}"
    if missing := [device for device in DEVICES if not Path(device).exists()]:
        return f"the lab needs {' and '.join(missing)}, which this box does not have"
    return _cgroup_problem() or _kernel_problem()


def _cgroup_problem() -> str | None:
    root = box.cgroup_root()
    if root is None:
        return "the lab needs a unified cgroup hierarchy (cgroup2) mounted; none is"
    probe = root / f"chargehand-lab-probe-{os.getpid()}"
    try:
        probe.mkdir()
    except OSError as refused:
        return f"the lab needs to make cgroups in {root}: {refused.strerror}"
    try:
        return None if (probe / "cgroup.kill").exists() else "the lab needs cgroup.kill (Linux 5.14 or later)"
    finally:
        probe.rmdir()


def _kernel_problem() -> str | None:
    link = box.run(["unshare", "--net", "ip", "link", "add", "probe", "type", "bridge"], check=False)
    if link.returncode != 0:
        return f"the lab needs network namespaces and bridges: {_last_line(link.stderr)}"
    cache = box.cache_directory()
    with tempfile.TemporaryDirectory(dir=cache, prefix=".probe-") as name:
        for part in ("lower", "upper", "work", "root"):
            (Path(name) / part).mkdir()
        layers = f"lowerdir={name}/lower,upperdir={name}/upper,workdir={name}/work"
        mount = ["mount", "-t", "overlay", "probe", "-o", layers, f"{name}/root"]
        tried = box.run(["unshare", "--mount", "--propagation=private", "--", *mount], check=False)
        if tried.returncode != 0:
            kind = box.file_system_of(cache)
            return (
                f"the lab needs overlayfs over {cache} (a {kind} file system; {box.CACHE_VARIABLE} names another"
                f" folder): {_last_line(tried.stderr)}"
            )
    return None


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"
