"""Image archives without a container engine: layers and a configuration become one file that `podman load` takes.

Owns: the form of an OCI image archive (image-spec 1.1: layout, index, manifest, configuration, layers), made
reproducibly, and finding out which image an archive holds (OCI or ``docker save``). Deliberately does not know: what is
in a layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

EPOCH = 315532800
"""1980-01-01, the time of every file in a layer: two builds of the same files are the same image."""
CREATED = "1980-01-01T00:00:00Z"

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x"}

BLOCK = 1 << 20
MAX_DOCUMENT_BYTES = 4 << 20
"""A manifest or configuration larger than this is no image's."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class BadArchive(ValueError):
    """A file is not an image archive; the message says what was expected and what came."""


@dataclasses.dataclass(frozen=True)
class Built:
    """An archive that was written. ``image_id``: ``sha256:<hex>`` of the configuration, what podman and docker call the
    image's id; ``manifest_digest`` likewise of the manifest; sizes in bytes, ``unpacked_bytes`` of all layers."""

    archive: Path
    image_id: str
    manifest_digest: str
    archive_bytes: int
    unpacked_bytes: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer as it goes into an archive: a compressed file, its digest and the digest of what is in it."""

    path: Path
    digest: str
    diff_id: str
    unpacked_bytes: int


def write_layer(members: Iterable[tuple[tarfile.TarInfo, IO[bytes] | None]], target: Path) -> Layer:
    """Write files as a gzipped layer: owned by root, timed ``EPOCH``, in the order given.

    Args:
        members: headers, and for regular files what is in them. Headers are rewritten; names lose a leading ``./``.
        target: where to; overwritten.
    """
    inner = hashlib.sha256()
    size = 0

    class Tee(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            nonlocal size
            inner.update(data)
            size += len(data)
            return packed.write(data)

    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(target.open("wb"))
        packed = stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0))
        with tarfile.open(fileobj=Tee(), mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for header, content in members:
                header.name = header.name.removeprefix("./")
                header.mtime, header.uid, header.gid, header.uname, header.gname = EPOCH, 0, 0, "", ""
                header.pax_headers = {}
                tar.addfile(header, content)
    return Layer(target, _file_digest(target), f"sha256:{inner.hexdigest()}", size)


def assemble(
    target: Path,
    layers: Sequence[Layer],
    *,
    machine: str,
    name: str,
    config: Mapping[str, Any],
    labels: Mapping[str, str],
) -> Built:
    """Write an OCI image archive.

    Args:
        target: the file; it appears as a whole.
        layers: lowest first.
        machine: the processor, as ``uname -m`` says it.
        name: what ``podman load`` will call the image, such as ``localhost/chargehand-agent:0.1.0``.
        config: ``User``, ``Env``, ``Entrypoint`` and so on, as the image configuration spells them.
        labels: image labels.
    """
    configuration = _document(
        {
            "architecture": ARCHITECTURES.get(machine, machine),
            "os": "linux",
            "created": CREATED,
            "config": {**config, "Labels": dict(sorted(labels.items()))},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": CREATED, "created_by": "chargehand image"} for _ in layers],
        }
    )
    manifest = _document(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": _descriptor(CONFIG, configuration),
            "layers": [
                {"mediaType": LAYER, "digest": layer.digest, "size": layer.path.stat().st_size} for layer in layers
            ],
        }
    )
    index = _document(
        {
            "schemaVersion": 2,
            "manifests": [
                {**_descriptor(MANIFEST, manifest), "annotations": {"org.opencontainers.image.ref.name": name}}
            ],
        }
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as unfinished:
        try:
            with tarfile.open(fileobj=unfinished, mode="w", format=tarfile.PAX_FORMAT) as tar:
                _add(tar, "oci-layout", _document({"imageLayoutVersion": "1.0.0"}))
                _add(tar, "index.json", index)
                for blob in (configuration, manifest):
                    _add(tar, f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob)
                for layer in {layer.digest: layer for layer in layers}.values():
                    with layer.path.open("rb") as content:
                        header = _header(
                            f"blobs/sha256/{layer.digest.removeprefix('sha256:')}", layer.path.stat().st_size
                        )
                        tar.addfile(header, content)
            Path(unfinished.name).chmod(0o644)
            Path(unfinished.name).replace(target)
        except BaseException:
            Path(unfinished.name).unlink(missing_ok=True)
            raise
    return Built(
        target,
        f"sha256:{hashlib.sha256(configuration).hexdigest()}",
        f"sha256:{hashlib.sha256(manifest).hexdigest()}",
        target.stat().st_size,
        sum(layer.unpacked_bytes for layer in layers),
    )


def image_id(archive: Path) -> str:
    """``sha256:<hex>``, the id under which the one image in ``archive`` will be known once it is loaded.

    Reads OCI archives and what ``docker save`` and ``podman save`` write. Raises ``BadArchive`` for anything else, for an
    archive of several images, and for a configuration whose bytes are not those its name promises.
    """
    try:
        with tarfile.open(archive) as tar:
            names = {member.name.removeprefix("./"): member for member in tar.getmembers()}
            if "manifest.json" in names:
                images = json.loads(_read(tar, names, "manifest.json"))
                path = str(_only(images, archive)["Config"])
                return f"sha256:{hashlib.sha256(_read(tar, names, path)).hexdigest()}"
            index = json.loads(_read(tar, names, "index.json"))
            manifest = json.loads(_blob(tar, names, _only(index["manifests"], archive)["digest"]))
            return f"sha256:{hashlib.sha256(_blob(tar, names, manifest['config']['digest'])).hexdigest()}"
    except BadArchive:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise BadArchive(
            f"{archive} is not an image archive: expected an OCI or docker archive, got {error!r}"
        ) from error


def _only(images: Any, archive: Path) -> Any:
    if not isinstance(images, list) or len(images) != 1:
        count = len(images) if isinstance(images, list) else "no list of"
        raise BadArchive(f"{archive} holds {count} images, expected exactly one; save just the one")
    return images[0]


def _blob(tar: tarfile.TarFile, names: Mapping[str, tarfile.TarInfo], digest: Any) -> bytes:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise BadArchive(f"the archive names a blob by {digest!r}, expected sha256:<64 hex digits>")
    data = _read(tar, names, f"blobs/sha256/{digest.removeprefix('sha256:')}")
    came = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if came != digest:
        raise BadArchive(f"a blob of the archive is damaged: expected {digest}, got {came}")
    return data


def _read(tar: tarfile.TarFile, names: Mapping[str, tarfile.TarInfo], name: str) -> bytes:
    member = names.get(name)
    if member is None or not member.isfile():
        raise BadArchive(f"the archive holds no {name}; expected an OCI or docker image archive")
    if member.size > MAX_DOCUMENT_BYTES:
        raise BadArchive(f"{name} in the archive has {member.size} bytes, expected at most {MAX_DOCUMENT_BYTES}")
    content = tar.extractfile(member)
    assert content is not None
    return content.read()


def _document(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}


def _header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.mode = size, EPOCH, 0o644
    return header


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    tar.addfile(_header(name, len(data)), io.BytesIO(data))


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"
