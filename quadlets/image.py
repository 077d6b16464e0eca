"""``python -m quadlets.image``: the worker's image as one archive that `podman load` takes.

Owns: choosing between a container engine with the Containerfile and putting the image together here, and the command
line of it. Deliberately does not know: registries. Nothing is pulled or pushed; a base image is one the engine has, or
fetches by the name it is given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from quadlets import context, oci, rootfs

NAME = "localhost/chargehand-agent"
TARGET = "/opt/chargehand"
BUILD_SECONDS = 1800.0
MAX_UNPACKED_BYTES = 200 * 1000 * 1000
"""budgets.md, B9: a machine on a slow line has to take it."""

CONFIG = {
    "User": "1000:1000",
    "Env": [
        "PATH=/usr/local/bin:/usr/bin:/bin",
        "HOME=/tmp",
        "LC_ALL=C.UTF-8",
        f"PYTHONPATH={TARGET}",
    ],
    "Entrypoint": ["/usr/bin/python3", "-I", "-B", TARGET],
    "WorkingDir": "/",
    "StopSignal": "SIGTERM",
}
"""The same as the Containerfile says; the lab's tests hold the two against each other."""


class ImageError(Exception):
    """The image could not be built; the message says what was tried, what came and what to do."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to build. ``engine``: ``podman``, ``docker`` or empty for none; ``base``: image reference for the engine;
    ``wheels``: folder, ``None`` to fetch them; ``suite``, ``sources``: for building without an engine (``rootfs.build``)."""

    output: Path
    version: str
    engine: str = ""
    base: str = ""
    wheels: Path | None = None
    suite: str = ""
    sources: tuple[Path, ...] = ()


def choose_engine(asked: str, base: str) -> str:
    """The engine to build with, empty for none. ``asked``: ``auto``, ``none``, ``podman`` or ``docker``.

    ``auto`` takes an engine only together with a base image: without one there is nothing to build on.
    Raises ``ImageError`` when an engine that was named does not answer.
    """
    if asked == "none":
        return ""
    if asked == "auto":
        return next((name for name in ("podman", "docker") if _answers(name)), "") if base else ""
    if not base:
        raise ImageError(
            f"{asked} needs a base image: give --base NAME@sha256:…, or --engine none to build without one"
        )
    if not _answers(asked):
        raise ImageError(f"{asked} does not answer (`{asked} info` failed); start it, or use --engine none")
    return asked


def build(wanted: Wanted) -> oci.Built:
    """Build the archive ``wanted.output``. Raises ``ImageError``, ``ContextError``, ``RootfsError``."""
    with rootfs.temporary_folder() as scratch:
        if wanted.engine:
            return _with_engine(wanted, Path(scratch))
        return _without_engine(wanted, Path(scratch))


def _without_engine(wanted: Wanted, scratch: Path) -> oci.Built:
    tree = scratch / "tree"
    python = rootfs.build(tree, suite=wanted.suite, sources=wanted.sources)
    wheels = wanted.wheels
    if wheels is None:
        wheels = scratch / "wheels"
        requirements = context.source_root_of_this_installation() / context.REQUIREMENTS
        context.download_wheels(requirements, wheels, python=python.version, machine=python.machine)
    context.lay_out(scratch / "context", wheels=wheels)
    rootfs.run_python(
        tree, ["-I", "-B", "/build/image_install.py", "/build", TARGET], bind=scratch / "context", at="/build"
    )
    # Two layers, so that a new version of ours does not carry the operating system again.
    app = TARGET.strip("/")
    base_layer = oci.write_layer(_members(tree, lambda name: not _below(name, app)), scratch / "base.tar.gz")
    app_layer = oci.write_layer(_members(tree, lambda name: _below(name, app)), scratch / "app.tar.gz")
    return oci.assemble(
        wanted.output,
        [base_layer, app_layer],
        machine=python.machine,
        name=f"{NAME}:{wanted.version}",
        config=CONFIG,
        labels=_labels(wanted.version),
    )


def _with_engine(wanted: Wanted, scratch: Path) -> oci.Built:
    context.lay_out(scratch / "context", wheels=wanted.wheels)
    reference = f"{NAME}:{wanted.version}"
    words = [wanted.engine, "build", "--quiet", "--build-arg", f"BASE={wanted.base}", "--tag", reference]
    words += ["--network=none"] if wanted.wheels is not None else []
    words += ["--timestamp=315532800"] if wanted.engine == "podman" else []
    for name, value in _labels(wanted.version).items():
        words += ["--label", f"{name}={value}"]
    _run([*words, "--file", str(scratch / "context" / "Containerfile"), str(scratch / "context")])
    saved = scratch / "image.tar"
    form = ["--format=oci-archive"] if wanted.engine == "podman" else []
    _run([wanted.engine, "save", *form, "--output", str(saved), reference])
    identity = oci.image_id(saved)
    size = int(_run([wanted.engine, "image", "inspect", "--format", "{{.Size}}", reference]).strip())
    digest = (
        _run([wanted.engine, "image", "inspect", "--format", "{{.Digest}}", reference]).strip()
        if wanted.engine == "podman"
        else ""
    )
    wanted.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = wanted.output.with_name(f".{wanted.output.name}.new")
    shutil.copyfile(saved, unfinished)
    unfinished.replace(wanted.output)
    return oci.Built(wanted.output, identity, digest, wanted.output.stat().st_size, size)


def _labels(version: str) -> dict[str, str]:
    return {
        "org.opencontainers.image.title": "chargehand-agent",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.version": version,
    }


def _below(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}/")


def _members(tree: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Files, folders and links of a tree by sorted name; devices and sockets have no business in an image."""
    for path in sorted(tree.rglob("*"), key=lambda path: path.relative_to(tree).as_posix()):
        name = path.relative_to(tree).as_posix()
        info = path.lstat()
        if not wanted(name) or not stat.S_IFMT(info.st_mode) & (stat.S_IFREG | stat.S_IFDIR | stat.S_IFLNK):
            continue
        header = tarfile.TarInfo(name)
        header.mode = stat.S_IMODE(info.st_mode) & ~(stat.S_ISUID | stat.S_ISGID)
        if stat.S_ISLNK(info.st_mode):
            header.type, header.linkname = tarfile.SYMTYPE, os.readlink(path)
            yield header, None
        elif stat.S_ISDIR(info.st_mode):
            header.type = tarfile.DIRTYPE
            yield header, None
        elif stat.S_ISREG(info.st_mode):
            header.size = info.st_size
            with path.open("rb") as content:
                yield header, content


def _answers(engine: str) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([engine, "info"], capture_output=True, check=False, timeout=20).returncode == 0
    return False


def _run(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired as slow:
        raise ImageError(f"{words[0]} {words[1]} did not end within {BUILD_SECONDS:g} s") from slow
    if done.returncode != 0:
        raise ImageError(
            f"{words[0]} {words[1]} ended with status {done.returncode}; it said: {done.stderr.strip()[-800:]}"
        )
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints the image's id, digest and sizes. Exit status 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m quadlets.image", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--output", type=Path, default=Path("dist/chargehand-agent.tar"), help="the archive to write")
    parser.add_argument("--version", default="0.1.0", help="the image's tag and version label")
    parser.add_argument("--engine", choices=("auto", "none", "podman", "docker"), default="auto")
    parser.add_argument("--base", default="", help="base image with Python 3.11 or later, by digest (with an engine)")
    parser.add_argument("--wheels", type=Path, help="folder with the pinned wheels; default: fetched with pip")
    parser.add_argument(
        "--suite", default="", help="Debian suite to build on without an engine; default: this box's own"
    )
    parser.add_argument(
        "--sources", type=Path, action="append", default=[], help="apt source file for --suite (repeatable)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(arguments)
    try:
        if given.wheels is not None and not any(given.wheels.glob("*.whl")):
            raise ImageError(
                f"--wheels {given.wheels} holds no wheel; expected the wheels that {context.REQUIREMENTS} pins"
            )
        engine = choose_engine(given.engine, given.base)
        wanted = Wanted(
            given.output, given.version, engine, given.base, given.wheels, given.suite, tuple(given.sources)
        )
        built = build(wanted)
    except (ImageError, context.ContextError, rootfs.RootfsError, oci.BadArchive, OSError) as error:
        print(f"image: {error}", file=sys.stderr)
        return 1
    document = {**dataclasses.asdict(built), "archive": str(built.archive), "engine": engine or "none"}
    if given.json:
        print(json.dumps(document))
    else:
        for name, value in document.items():
            print(f"{name}: {value}")
    if built.unpacked_bytes > MAX_UNPACKED_BYTES:
        print(
            f"image: {built.unpacked_bytes} bytes unpacked is more than the budget of {MAX_UNPACKED_BYTES}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
