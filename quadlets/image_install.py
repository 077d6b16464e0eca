"""Runs inside an image while it is built: lays out the worker's code and its pinned dependencies, compiled.

Owns: checking wheels against the pinned hashes, unpacking them, byte-compiling. Deliberately does not know: how the
image is built around it, and nothing of Chargehand but folder names. Standard library only, run by path as
``python3 -I -B image_install.py CONTEXT TARGET``; it needs neither pip nor a shell nor a network when the context holds
wheels, and uses the base image's pip and its configured index when it holds none.
"""

from __future__ import annotations

import compileall
import hashlib
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

LEAST_PYTHON = (3, 11)

MAIN = """\
import runpy

runpy.run_module("edge_agent.worker", run_name="__main__", alter_sys=True)
"""

UNUSED = "tests"
"""Folders of installed packages that nothing imports at run time."""


class InstallError(Exception):
    """The image cannot be built as pinned; the message says what was expected and what came."""


def pinned(requirements: str) -> dict[str, tuple[str, bool, frozenset[str]]]:
    """What a requirements file with hashes pins: normal name → (version, whether it has a marker, SHA-256 digests).

    Raises ``InstallError`` for a line that is not ``name==version`` with at least one hash.
    """
    joined = re.sub(r"\\\r?\n\s*", " ", re.sub(r"(?m)^\s*#.*\n?", "", requirements))
    pins: dict[str, tuple[str, bool, frozenset[str]]] = {}
    for line in filter(None, (line.partition(" #")[0].strip() for line in joined.splitlines())):
        requirement, *_ = re.split(r"\s+--hash=", line, maxsplit=1)
        wanted, _, marker = requirement.partition(";")
        found = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([A-Za-z0-9.!+_-]+)", wanted.strip())
        hashes = frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})(?=\s|$)", line))
        if not found or not hashes:
            raise InstallError(f"expected name==version with --hash=sha256:…, got {line[:80]!r}")
        pins[normal(found[1])] = (found[2], bool(marker.strip()), hashes)
    return pins


def normal(name: str) -> str:
    """A distribution's name as every tool spells it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def choose(wheels: list[Path], pins: dict[str, tuple[str, bool, frozenset[str]]]) -> list[Path]:
    """The wheels to unpack, one for each pin, by name.

    A pin with a marker may be missing: whoever filled the folder evaluated it. Raises ``InstallError`` for a wheel that
    is not pinned, one whose bytes are not the pinned ones, two of one distribution, and a pin without its wheel.
    """
    chosen: dict[str, Path] = {}
    for wheel in sorted(wheels):
        parts = wheel.name.split("-")
        name = normal(parts[0])
        if name not in pins or len(parts) < 5 or parts[1] != pins[name][0]:
            raise InstallError(f"{wheel.name} is not among the pinned requirements")
        if name in chosen:
            raise InstallError(
                f"two wheels for {name}: {chosen[name].name} and {wheel.name}; keep the one for this image"
            )
        came = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if came not in pins[name][2]:
            raise InstallError(f"{wheel.name} is not the pinned file: its SHA-256 is {came}")
        chosen[name] = wheel
    missing = sorted(name for name, (_, marked, _) in pins.items() if not marked and name not in chosen)
    if missing:
        raise InstallError(f"no wheel for {', '.join(missing)} among {len(wheels)} wheels")
    return [chosen[name] for name in sorted(chosen)]


def unpack(wheel: Path, target: Path) -> None:
    """Lay one wheel out in ``target`` as an importable folder: its modules and its metadata, not its scripts."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = entry.filename
            if ".data/" in name:
                kind, _, rest = name.partition(".data/")[2].partition("/")
                if kind not in ("purelib", "platlib") or not rest:
                    continue
                name = rest
            path = (target / name).resolve()
            if target.resolve() not in path.parents:
                raise InstallError(f"{wheel.name} holds {entry.filename!r}, which would land outside of {target}")
            if entry.is_dir():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(entry))
            path.chmod(0o644)


def from_index(requirements: Path, target: Path) -> None:
    """Install with the base image's pip, from the index it is configured for; hashes are still required."""
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-deps", "--require-hashes"]
    words += ["--only-binary=:all:", "--no-compile", "--target", str(target), "--requirement", str(requirements)]
    done = subprocess.run(words, check=False)
    if done.returncode != 0:
        raise InstallError(
            f"pip ended with status {done.returncode}; put wheels into the context (python -m quadlets.image --wheels DIR) "
            "or use a base image that has pip and reaches an index"
        )


def prune(target: Path) -> None:
    """Remove what no import needs, and make everything readable by the image's user."""
    for package in [path for path in target.iterdir() if path.is_dir()]:
        for folder in list(package.rglob(UNUSED)):
            if folder.is_dir():
                shutil.rmtree(folder)
    shutil.rmtree(target / "bin", ignore_errors=True)
    for folder in list(target.rglob("__pycache__")):
        shutil.rmtree(folder)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def compile_all(folder: Path) -> None:
    """Byte-compile a tree. The bytecode is trusted as it is (unchecked): nobody can write to a read-only image, and a
    start then asks the file system once per module instead of twice."""
    compileall.compile_dir(
        str(folder), maxlevels=32, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )


def install(context: Path, target: Path) -> None:
    """All of it. Raises ``InstallError``."""
    if sys.version_info < LEAST_PYTHON:
        raise InstallError(f"the base image's Python is {sys.version.split()[0]}, expected 3.11 or later")
    requirements = context / "requirements" / "edge.txt"
    wheels = sorted((context / "wheels").glob("*.whl"))
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    if wheels:
        for wheel in choose(wheels, pinned(requirements.read_text(encoding="utf-8"))):
            unpack(wheel, target)
    else:
        from_index(requirements, target)
    # Ours last: where a dependency brings a top-level folder of the same name, it must not win.
    shutil.copytree(context / "app", target, dirs_exist_ok=True)
    (target / "__main__.py").write_text(MAIN)
    prune(target)
    compile_all(target)
    # -B, above: else this very run would leave bytecode there that is neither complete nor unchecked.
    standard_library = Path(sysconfig.get_path("stdlib"))
    if not (standard_library / "__pycache__").is_dir():
        compile_all(standard_library)


if __name__ == "__main__":
    try:
        install(Path(sys.argv[1]), Path(sys.argv[2]))
    except InstallError as error:
        raise SystemExit(f"image_install: {error}") from None
