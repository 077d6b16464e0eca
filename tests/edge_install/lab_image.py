"""The worker's image for lab machines: put together once for a state of the sources, then kept in the lab's cache."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from quadlets import context, image, oci
from tests.lab import oci as lab_oci


def sources_digest() -> str:
    """Changes with anything that goes into the image or decides how it is made."""
    root = context.source_root_of_this_installation()
    digest = hashlib.sha256()
    for folder in (*context.APP, "quadlets", "requirements"):
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def agent_archive() -> Iterator[Path]:
    """The image archive as `make image` makes it on a box without a container engine."""

    def build(target: Path) -> None:
        built = image.build(image.Wanted(output=target, version="0.0.lab"))
        print(f"image {built.image_id}: {built.unpacked_bytes} bytes unpacked, {built.archive_bytes} bytes as a file")

    with lab_oci.kept_archive(f"edge-{sources_digest()}", build) as archive:
        yield archive


def agent_image_id(archive: Path) -> str:
    return oci.image_id(archive)
