"""The machine side as one file: packs `edge_agent.host` and `tools` into `host.pyz`, the same bytes every time.

Owns the list of what goes in and the form of the archive. Deliberately does not import what it packs: the centre
builds this file and must never load the runner (architecture.md, "who may import whom").
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
from pathlib import Path

PACKED = ("edge_agent/host", "tools")
"""Folders whose Python files are packed, next to `edge_agent/__init__.py`."""

TIMESTAMP = (1980, 1, 1, 0, 0, 0)
"""The earliest time a zip file can name: a build must not differ by when it was made."""


class BuildError(Exception):
    """The archive could not be built; the message names what is missing."""


def source_root_of_this_installation() -> Path:
    """The folder that holds `edge_agent/` and `tools/`: the checkout, or site-packages of an installed distribution."""
    return Path(__file__).resolve().parent.parent


def host_sources(source_root: Path) -> dict[str, bytes]:
    """What goes into the archive: name inside it → contents, sorted by name.

    Raises `BuildError` when a folder or the entry point is missing.
    """
    chosen = {"edge_agent/__init__.py": source_root / "edge_agent" / "__init__.py"}
    for folder in PACKED:
        for path in (source_root / folder).rglob("*.py"):
            chosen[path.relative_to(source_root).as_posix()] = path
    for needed in (
        "edge_agent/__init__.py",
        "edge_agent/host/__init__.py",
        "edge_agent/host/main.py",
        "tools/__init__.py",
    ):
        if needed not in chosen or not chosen[needed].is_file():
            raise BuildError(f"cannot pack the machine side: expected {needed} under {source_root}, found none")
    contents = {name: path.read_bytes() for name, path in chosen.items()}
    contents = dict(sorted(contents.items()))
    digest = hashlib.sha256()
    for name, data in contents.items():
        digest.update(b"%s\0%d\0%s" % (name.encode(), len(data), data))
    main = Path(__file__).with_name("zipapp_main.py").read_text(encoding="utf-8")
    contents["__main__.py"] = main.replace("@SOURCES@", digest.hexdigest()[:32]).encode()
    return dict(sorted(contents.items()))


def pack(contents: dict[str, bytes]) -> bytes:
    """One zip archive of `contents`, a function of nothing else: no times, no owners, no compression level of the day.

    Stored, not deflated: the deflate output may differ between zlib builds, and an unpacked read starts faster.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name, TIMESTAMP)
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, contents[name])
    return stream.getvalue()


def host_zipapp(source_root: Path | None = None) -> bytes:
    """The bytes of `host.pyz`, built from `source_root` (default: where this code itself lies)."""
    return pack(host_sources(source_root or source_root_of_this_installation()))


def build_host_zipapp(target: Path, source_root: Path | None = None) -> str:
    """Write `host.pyz` to `target`, atomically, mode 0644.

    Returns `sha256:<hex>` of the file. Raises `BuildError` when a source is missing, `OSError` when the disk refuses.
    """
    archive = host_zipapp(source_root)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(archive)
            os.fchmod(stream.fileno(), 0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return "sha256:" + hashlib.sha256(archive).hexdigest()
