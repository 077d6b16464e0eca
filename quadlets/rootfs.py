"""A root file system with Python and nothing else, unpacked from the box's own Debian packages.

Owns: the recipe of the small base (no shell, no package manager, no documentation) and the call of ``mmdebstrap``.
Deliberately does not know: container images. The package archive is the box's own, with the options its owner set for
apt, so none is named here.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("python3",)
BUILD_SECONDS = 900.0

CARRIED_BY_APT = ("Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries")
"""How the box reaches its package archive: proxies, certificates, leniencies. mmdebstrap does not read them by itself."""

REMOVED = (
    *("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian", "usr/share/bug"),
    *("usr/share/doc-base", "usr/share/pixmaps", "usr/share/applications", "usr/share/polkit-1", "usr/share/perl5"),
    *(
        "usr/share/dpkg",
        "usr/lib/dpkg",
        "usr/libexec",
        "usr/lib/valgrind",
        "usr/share/gcc",
        "usr/share/gdb",
        "usr/lib/mime",
    ),
    *("var/lib/dpkg", "var/lib/apt", "var/cache", "var/log", "etc/apt", "etc/dpkg", "lib/systemd", "usr/lib/systemd"),
    # What of the standard library a server never imports.
    *("usr/lib/python3*/test", "usr/lib/python3*/idlelib", "usr/lib/python3*/lib2to3", "usr/lib/python3*/pydoc_data"),
    *(
        "usr/lib/python3*/ensurepip",
        "usr/lib/python3*/turtledemo",
        "usr/lib/python3*/tkinter",
        "usr/lib/python3*/distutils",
    ),
    *("usr/lib/python3*/config-*", "usr/share/python3", "usr/lib/python3/dist-packages"),
    # Character set tables of the C library; Python has its own.
    "usr/lib/*/gconv",
)

KEPT_PROGRAMS = re.compile(r"python3(\.[0-9]+)?")


class RootfsError(Exception):
    """The root file system could not be built; the message says what was tried, what came and what to do."""


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """The Python in a root file system: ``version`` like ``3.11``, ``machine`` as ``uname -m`` says it."""

    version: str
    machine: str


def unavailable() -> str:
    """Why no root file system can be built on this box, empty when it can."""
    if shutil.which("mmdebstrap") is None:
        return "mmdebstrap is not installed"
    if not _sources():
        return "this box has no Debian package sources in /etc/apt"
    return ""


def build(tree: Path, *, suite: str = "", sources: Sequence[Path] = ()) -> Interpreter:
    """Unpack ``PACKAGES`` and what they depend on into ``tree`` (which must not exist), and remove what is not needed.

    Args:
        tree: where to; owned by root, needs root.
        suite: Debian suite; empty: the one the sources name.
        sources: apt source files; empty: the box's own.

    Raises ``RootfsError``.
    """
    if os.geteuid() != 0:
        raise RootfsError(
            f"a root file system is unpacked as root; expected user id 0, got {os.geteuid()}: run it with sudo"
        )
    if not sources and (why := unavailable()):
        raise RootfsError(
            f"cannot build a root file system: {why}; install podman, or give --base, on a box that has it"
        )
    # `extract` unpacks without configuring: no package script runs, so no shell and no package manager is needed inside.
    words = ["mmdebstrap", "--quiet", "--mode=root", "--format=directory", "--variant=extract"]
    words += [f"--include={','.join(PACKAGES)}", *(f"--aptopt={option}" for option in _apt_options())]
    words += [suite, str(tree), *(str(path) for path in (sources or _sources()))]
    try:
        # In a mount namespace of its own: killed halfway, it leaves nothing mounted in the tree.
        done = subprocess.run(
            ["unshare", "--mount", "--propagation=private", "--", *words],
            capture_output=True, text=True, check=False, timeout=BUILD_SECONDS, env={**os.environ, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as slow:
        raise RootfsError(
            f"mmdebstrap did not end within {BUILD_SECONDS:g} s; is the package archive reachable?"
        ) from slow
    if done.returncode != 0:
        raise RootfsError(f"mmdebstrap ended with status {done.returncode}; it said: {done.stderr.strip()[-800:]}")
    _prune(tree)
    return Interpreter(_python_version(tree), platform.machine())


def run_python(tree: Path, arguments: Sequence[str], *, bind: Path, at: str) -> None:
    """Run the tree's own Python in the tree, with the folder ``bind`` seen read-only at ``at`` for as long as it runs.

    No network, and no process outlives it. Raises ``RootfsError``.
    """
    inside = tree / at.strip("/")
    inside.mkdir(parents=True, exist_ok=True)
    try:
        # One mount namespace for the bind: it is gone with the process, also after a kill.
        script = 'mount --bind -o ro "$1" "$2" && shift 2 && exec chroot "$@"'
        words = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--propagation=private", "--"]
        words += ["sh", "-c", script, "sh", str(bind), str(inside), str(tree), "/usr/bin/python3", *arguments]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS)
    finally:
        inside.rmdir()
    if done.returncode != 0:
        raise RootfsError(
            f"python3 in the image ended with status {done.returncode}; it said: {done.stderr.strip()[-800:]}"
        )


def _python_version(tree: Path) -> str:
    target = os.readlink(tree / "usr/bin/python3")
    found = re.fullmatch(r"(?:/usr/bin/)?python(3\.[0-9]+)", target)
    if not found:
        raise RootfsError(f"expected /usr/bin/python3 to point at python3.N, got {target!r}")
    return found[1]


def _prune(tree: Path) -> None:
    for pattern in REMOVED:
        for path in tree.glob(pattern):
            _discard(path)
    for folder in ("bin", "sbin", "usr/bin", "usr/sbin"):
        where = tree / folder
        if where.is_symlink() or not where.is_dir():
            continue
        for program in where.iterdir():
            if not KEPT_PROGRAMS.fullmatch(program.name):
                _discard(program)
    for folder in ("dev", "proc", "sys", "run", "tmp"):
        _discard(tree / folder)
        (tree / folder).mkdir()
    (tree / "tmp").chmod(0o1777)
    (tree / "run/chargehand").mkdir()
    (tree / "etc/passwd").write_text("root:x:0:0:root:/:/nonexistent\nworker:x:1000:1000:worker:/tmp:/nonexistent\n")
    (tree / "etc/group").write_text("root:x:0:\nworker:x:1000:\n")


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sources(apt: Path = Path("/etc/apt")) -> list[Path]:
    folder = apt / "sources.list.d"
    found = [apt / "sources.list", *sorted(folder.glob("*.list")), *sorted(folder.glob("*.sources"))]
    return [path for path in found if path.is_file() and re.search(r"(?m)^\s*(deb\s|Types:)", path.read_text())]


def _apt_options() -> list[str]:
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True, timeout=30).stdout
    lines = (line.removesuffix(";") for line in dump.splitlines())
    return [line for line in lines if line.startswith(CARRIED_BY_APT) and not line.endswith('""')]


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A scratch folder on a real disk: a root file system is too large for a /tmp that lies in memory."""
    return tempfile.TemporaryDirectory(prefix="chargehand-image-", dir="/var/tmp")
