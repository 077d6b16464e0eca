"""What an image is built from: our packages, the pinned requirements, their wheels.

Owns: which folders go into the worker's image, and fetching the wheels the pins name for another Python than this one.
Deliberately does not import what it copies, nor know how an image is built from it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.markers import Marker

APP = ("edge_agent/worker", "a2a_bridge", "inference", "tools", "prompts")
"""Our folders that the worker needs (architecture.md, "who may import whom"); not one of the centre's, no runner."""
APP_FILES = ("edge_agent/__init__.py",)
REQUIREMENTS = "requirements/edge.txt"
DATA_SUFFIXES = (".py", ".md", ".yaml", ".json", ".typed")

DOWNLOAD_SECONDS = 900.0
GLIBC_TAGS = ("2_17", "2_28", "2_34", "2_35", "2_36")
"""manylinux tags that every supported base understands (Debian 12 and RHEL 10 have glibc 2.36 and 2.39)."""


class ContextError(Exception):
    """The build context could not be laid out; the message says what was tried, what came and what to do."""


def source_root_of_this_installation() -> Path:
    """The folder in which our packages lie side by side."""
    return Path(__file__).resolve().parent.parent


def lay_out(context: Path, *, source_root: Path | None = None, wheels: Path | None = None) -> None:
    """Fill the empty folder ``context`` for the Containerfile. Raises ``ContextError`` when something is missing.

    Args:
        wheels: a folder of wheels to take along; ``None``: the build will use the base image's pip and its index.
    """
    root = source_root or source_root_of_this_installation()
    for needed in (*APP, *APP_FILES, REQUIREMENTS):
        if not (root / needed).exists():
            raise ContextError(
                f"cannot lay out the build context: expected {needed} under {root}; build the image in a checkout"
            )
    for name in APP:
        for path in sorted((root / name).rglob("*")):
            if path.is_file() and path.suffix in DATA_SUFFIXES and "__pycache__" not in path.parts:
                _copy(path, context / "app" / path.relative_to(root))
    for name in APP_FILES:
        _copy(root / name, context / "app" / name)
    _copy(root / REQUIREMENTS, context / REQUIREMENTS)
    for name in ("Containerfile", "image_install.py"):
        _copy(Path(__file__).with_name(name), context / name)
    (context / "wheels").mkdir()
    for wheel in sorted(wheels.glob("*.whl")) if wheels is not None else ():
        _copy(wheel, context / "wheels" / wheel.name)


def requirements_for(text: str, python: str, machine: str) -> str:
    """The pins that hold for CPython ``python`` (``3.N``) on Linux on ``machine``, one a line, without their markers.

    pip evaluates markers for the Python it runs on, which is not the image's.
    """
    place = {
        "python_version": python, "python_full_version": f"{python}.0", "implementation_version": f"{python}.0",
        "implementation_name": "cpython", "platform_python_implementation": "CPython", "platform_system": "Linux",
        "platform_machine": machine, "platform_release": "", "platform_version": "", "sys_platform": "linux",
        "os_name": "posix", "extra": "",
    }  # fmt: skip
    return "".join(f"{pin}\n" for pin, marker in _pins(text) if not marker or Marker(marker).evaluate(place))


def download_wheels(requirements: Path, target: Path, *, python: str, machine: str) -> None:
    """Fill ``target`` with the pinned wheels for CPython ``python`` on ``machine``, from pip's configured index.

    pip checks every file against its pinned hash. Raises ``ContextError``.
    """
    target.mkdir(parents=True, exist_ok=True)
    wanted = target / "requirements.txt"
    wanted.write_text(requirements_for(requirements.read_text(encoding="utf-8"), python, machine))
    words = [*_pip(), "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    words += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for tag in GLIBC_TAGS:
        words += ["--platform", f"manylinux_{tag}_{machine}"]
    for abi in (f"cp{python.replace('.', '')}", "abi3", "none"):
        words += ["--abi", abi]
    words += ["--dest", str(target), "--requirement", str(wanted)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as slow:
        raise ContextError(
            f"pip did not fetch the wheels within {DOWNLOAD_SECONDS:g} s; is its index reachable?"
        ) from slow
    finally:
        wanted.unlink()
    if done.returncode != 0:
        raise ContextError(
            f"pip could not fetch the pinned wheels for Python {python} on {machine}: {done.stderr.strip()[-800:]}; "
            "fetch them elsewhere and give their folder with --wheels"
        )


def _pins(text: str) -> Iterable[tuple[str, str]]:
    joined = re.sub(r"\\\r?\n\s*", " ", re.sub(r"(?m)^\s*#.*\n?", "", text))
    for line in filter(None, (line.partition(" #")[0].strip() for line in joined.splitlines())):
        requirement, *hashes = re.split(r"\s+(?=--hash=)", line)
        name, _, marker = requirement.partition(";")
        yield " ".join([name.strip(), *hashes]), marker.strip()


def _pip() -> list[str]:
    """A pip that can download: this environment's, or the first one of an interpreter on the search path."""
    seen = dict.fromkeys([sys.executable, *(shutil.which("python3", path=folder) for folder in os.get_exec_path())])
    for python in filter(None, seen):
        if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
            return [python, "-m", "pip"]
    raise ContextError("no pip to fetch wheels with; install python3-pip, or give a folder of wheels with --wheels")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
