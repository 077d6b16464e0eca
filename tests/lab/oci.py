"""Container images and Python wheels for lab machines, which can reach no registry.

Owns the small base image (a tar of a root file system, for `podman import`), building and moving images on a machine,
and the wheelhouse a Containerfile installs from. Knows nothing of what the product's image holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from packaging.markers import Marker

from tests.lab import box, image
from tests.lab.machine import Machine

PYTHON = "3.13"
"""The Python of the base image's suite."""
PLATFORMS = ("manylinux_2_41_x86_64", "manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64")
TAGS = ("cp313", "abi3", "none")
BUILD_SECONDS = 900.0

BASE = image.Recipe(
    kind="base",
    # `python3-venv` brings the pip wheels, so `python3 -m venv` works as in any other Python image.
    packages=("python3", "python3-venv", "ca-certificates"),
    # `essential` has no apt: nothing is installed into an image that has no archive to install from.
    variant="essential",
    dpkg_options=(
        *image.NO_DOCUMENTATION,
        "path-exclude=/usr/share/bash-completion/*",
        "path-exclude=/usr/share/pixmaps/*",
        "path-exclude=/usr/lib/*/gconv/*",
    ),
    removed=(
        *("etc/hostname", "etc/machine-id", "etc/resolv.conf", "etc/apt", "var/lib/apt", "var/cache/*", "var/log/*"),
        # What only package installation needs.
        *("usr/lib/*/perl-base", "usr/bin/perl*", "usr/share/perl*", "usr/share/debconf", "var/lib/dpkg/info"),
        *("usr/lib/python3*/idlelib", "usr/lib/python3*/test", "usr/lib/python3*/pydoc_data"),
        *("usr/share/zoneinfo/right", "usr/share/zoneinfo/posix", "usr/lib/udev"),
    ),
)
BASE_REFERENCE = "localhost/chargehand-lab-base:latest"


@contextlib.contextmanager
def base_archive(say: Callable[[str], None] = lambda line: None) -> Iterator[Path]:
    """A tar of a Debian with Python and nothing else, for `podman import`; kept for as long as the `with` lasts."""

    def build(target: Path) -> None:
        say(f"building the base container image {BASE.digest} (once) ...")
        tree = target.with_name(f"{target.name}-tree")
        image.discard(tree)
        try:
            image.mmdebstrap(BASE, tree)
            image.finish_tree(BASE, tree)
            for special in (tree / "dev").iterdir():
                image.discard(special)
            box.run(["tar", "-C", str(tree), "--numeric-owner", "--sort=name", "-cf", str(target), "."])
        finally:
            image.discard(tree)

    with image.kept("oci", BASE.kind, BASE.digest, build) as archive:
        yield archive


def import_base(machine: Machine, user: str = "chargehand", reference: str = BASE_REFERENCE) -> str:
    """Give `user` of the machine the base image, unless it is there; its reference."""
    if machine.run(["podman", "image", "exists", reference], user=user, check=False).status != 0:
        change = ["--change", "ENV PATH=/usr/local/bin:/usr/bin:/bin", "--change", "CMD /usr/bin/python3"]
        with base_archive() as archive:
            words = ["podman", "import", "--quiet", *change, "-", reference]
            machine.run(words, user=user, input=archive, timeout=BUILD_SECONDS)
    return reference


def build_image(
    machine: Machine,
    containerfile: Path,
    context_dir: Path,
    base: str = BASE_REFERENCE,
    *,
    reference: str = "localhost/chargehand-lab-built:latest",
    user: str = "chargehand",
    build_args: Mapping[str, str] | None = None,
    extra: Mapping[str, Path] | None = None,
) -> str:
    """Build an image on the machine, as `user`, and leave it in that user's storage; the image's id (64 digits).

    The Containerfile gets `--build-arg BASE=<base>`; the lab's own base is imported first. `extra` lays more files or
    folders of the box into the context, by their name there (`{"wheels": wheelhouse(...)}`). Nothing in the build can
    reach a network.
    """
    if base == BASE_REFERENCE:
        import_base(machine, user)
    folder = machine.run(["mktemp", "-d", "/var/tmp/build.XXXXXX"], user=user).stdout.strip()
    try:
        machine.push(context_dir, f"{folder}/context", owner=user)
        for name, path in (extra or {}).items():
            machine.push(path, f"{folder}/context/{name}", owner=user)
        machine.push(containerfile, f"{folder}/Containerfile", owner=user)
        words = ["podman", "build", "--quiet", "--network=none", "--pull=never", "--build-arg", f"BASE={base}"]
        for name, value in (build_args or {}).items():
            words += ["--build-arg", f"{name}={value}"]
        words += ["--tag", reference, "--file", f"{folder}/Containerfile", f"{folder}/context"]
        built = machine.run(words, user=user, timeout=BUILD_SECONDS)
    finally:
        machine.run(["rm", "-rf", "--", folder])
    return built.stdout.split()[-1]


def save_image(machine: Machine, reference: str, archive: Path, user: str = "chargehand") -> None:
    """Bring an image to the box as an OCI archive; `archive` is there as a whole or not at all."""
    remote = machine.run(["mktemp", "-u", "/var/tmp/image.XXXXXX"], user=user).stdout.strip()
    try:
        save = ["podman", "save", "--quiet", "--format=oci-archive", "--output", remote, reference]
        machine.run(save, user=user, timeout=BUILD_SECONDS)
        unfinished = archive.with_name(f".{archive.name}.new")
        machine.pull(remote, unfinished, user=user)
        unfinished.rename(archive)
    finally:
        machine.run(["rm", "-f", "--", remote])


def load_image(machine: Machine, archive: Path, user: str = "chargehand") -> None:
    """Give `user` of the machine the images in an archive that `podman save` made."""
    machine.run(["podman", "load", "--quiet"], user=user, input=archive, timeout=BUILD_SECONDS)


@contextlib.contextmanager
def kept_archive(digest: str, build: Callable[[Path], None]) -> Iterator[Path]:
    """An image archive in the lab's cache, made by `build(path)` when there is none for `digest`.

    For images that many tests need and that cost minutes: build once on any machine, `save_image`, then `load_image`.
    """
    with image.kept("oci", "image", digest, build) as archive:
        yield archive


def wheelhouse(requirements_file: Path, python: str = PYTHON) -> Path:
    """A folder with the pinned wheels of a hashed requirements file, for the base image's Python on x86-64 Linux.

    A Containerfile then runs `pip install --no-index --find-links /wheels --require-hashes -r FILE`. Kept in the cache
    by the file's content; only the newest few are.
    """
    text = requirements_for(requirements_file.read_text(), python)
    digest = hashlib.sha256(f"{python} {PLATFORMS} {TAGS} {text}".encode()).hexdigest()[:16]

    def build(target: Path) -> None:
        target.mkdir(parents=True)
        wanted = target.with_name(f"{target.name}.txt")
        wanted.write_text(text)
        words = [*_pip(), "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        words += ["--implementation", "cp", "--python-version", python]
        words += [word for name in PLATFORMS for word in ("--platform", name)]
        words += [word for name in TAGS for word in ("--abi", name)]
        try:
            box.run([*words, "--dest", str(target), "--requirement", str(wanted)], timeout=BUILD_SECONDS)
        finally:
            wanted.unlink(missing_ok=True)

    with image.kept("wheels", "wheels", digest, build) as folder:
        return folder


def requirements_for(text: str, python: str) -> str:
    """Those requirements of a pinned file that hold for `python` on Linux, without their markers.

    pip reads markers for the Python it runs on, which here is the box's and not the image's.
    """
    place = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "sys_platform": "linux",
        "os_name": "posix",
        "extra": "",
    }
    kept = []
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^\s*#.*\n?", "", text))
    for line in filter(None, (line.strip() for line in joined.splitlines())):
        pin, *hashes = re.split(r"\s+(?=--hash=)", line.split(" #")[0].strip())
        name, _, marker = pin.partition(";")
        if not marker.strip() or Marker(marker).evaluate(place):
            kept.append(" ".join([name.strip(), *hashes]))
    return "\n".join(kept) + "\n"


def _pip() -> list[str]:
    """A pip: this interpreter's, or the box's when the environment was made without one."""
    for python in (sys.executable, shutil.which("python3", path=_outer_path()) or "python3"):
        if box.run([python, "-m", "pip", "--version"], check=False).returncode == 0:
            return [python, "-m", "pip"]
    raise box.LabError("no pip on this box to download wheels with; install the package python3-pip")


def _outer_path() -> str:
    """The search path without the running environment."""
    here = os.path.realpath(sys.prefix)
    return os.pathsep.join(p for p in os.get_exec_path() if not os.path.realpath(p).startswith(here)) or os.defpath


__all__ = [
    "BASE_REFERENCE",
    "base_archive",
    "build_image",
    "import_base",
    "kept_archive",
    "load_image",
    "requirements_for",
    "save_image",
    "wheelhouse",
]
