"""Image archives: the same files make the same bytes, and an archive says which image it holds."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadlets import oci


def members(mtime: int) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    for name, data in (("./etc", None), ("etc/a", b"hello"), ("etc/b", b"world" * 1000)):
        header = tarfile.TarInfo(name)
        header.mtime, header.uid, header.uname = mtime, 1234, "somebody"
        if data is None:
            header.type = tarfile.DIRTYPE
            yield header, None
        else:
            header.size = len(data)
            yield header, io.BytesIO(data)


def build(folder: Path, mtime: int = 1) -> oci.Built:
    folder.mkdir(parents=True, exist_ok=True)
    layer = oci.write_layer(members(mtime), folder / "layer.tar.gz")
    return oci.assemble(
        folder / "image.tar",
        [layer],
        machine="x86_64",
        name="localhost/x:1",
        config={"User": "1000"},
        labels={"a": "b"},
    )


def test_two_builds_of_the_same_files_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = build(tmp_path / "a", 1), build(tmp_path / "b", 2_000_000_000)
    assert first.archive.read_bytes() == second.archive.read_bytes()
    assert first.image_id == second.image_id


def test_every_digest_of_the_archive_is_the_digest_of_what_it_names(tmp_path: Path) -> None:
    built = build(tmp_path)
    with tarfile.open(built.archive) as tar:
        blobs = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    index = json.loads(blobs["index.json"])
    manifest_digest = index["manifests"][0]["digest"]
    assert manifest_digest == built.manifest_digest
    manifest = json.loads(blobs[f"blobs/sha256/{manifest_digest[7:]}"])
    assert manifest["config"]["digest"] == built.image_id
    for descriptor in (index["manifests"][0], manifest["config"], *manifest["layers"]):
        data = blobs[f"blobs/sha256/{descriptor['digest'][7:]}"]
        assert hashlib.sha256(data).hexdigest() == descriptor["digest"][7:]
        assert len(data) == descriptor["size"]


def test_files_in_a_layer_belong_to_root_and_have_no_time_of_their_own(tmp_path: Path) -> None:
    layer = oci.write_layer(members(99), tmp_path / "layer.tar.gz")
    with tarfile.open(layer.path) as tar:
        found = tar.getmembers()
    assert [member.name for member in found] == ["etc", "etc/a", "etc/b"]
    assert {(member.uid, member.gid, member.uname, member.mtime) for member in found} == {(0, 0, "", oci.EPOCH)}


def test_the_id_is_found_in_an_oci_archive(tmp_path: Path) -> None:
    built = build(tmp_path)
    assert oci.image_id(built.archive) == built.image_id


def test_the_id_is_found_in_what_docker_save_writes(tmp_path: Path) -> None:
    config = b'{"os":"linux"}'
    digest = hashlib.sha256(config).hexdigest()
    path = tmp_path / "docker.tar"
    manifest = json.dumps([{"Config": f"{digest}.json", "Layers": []}]).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in (("manifest.json", manifest), (f"{digest}.json", config)):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    assert oci.image_id(path) == f"sha256:{digest}"


def test_a_damaged_configuration_is_refused(tmp_path: Path) -> None:
    built = build(tmp_path)
    data = built.archive.read_bytes()
    built.archive.write_bytes(data.replace(b'"os":"linux"', b'"os":"minix"'))
    with pytest.raises(oci.BadArchive, match="damaged"):
        oci.image_id(built.archive)


def test_a_file_that_is_not_there_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        oci.image_id(tmp_path / "none")


def test_an_archive_of_two_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.tar"
    manifest = json.dumps([{"Config": "a"}, {"Config": "b"}]).encode()
    with tarfile.open(path, "w") as tar:
        header = tarfile.TarInfo("manifest.json")
        header.size = len(manifest)
        tar.addfile(header, io.BytesIO(manifest))
    with pytest.raises(oci.BadArchive, match="holds 2 images"):
        oci.image_id(path)


@given(st.binary(max_size=3000))
def test_any_bytes_are_an_image_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "image.tar"
    path.write_bytes(data)
    with pytest.raises(oci.BadArchive, match="archive"):
        oci.image_id(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.sampled_from(["manifests", "config", "digest", "Config"]), children, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(name=st.sampled_from(["index.json", "manifest.json"]), document=JSON)
def test_any_index_is_an_image_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, document: object
) -> None:
    path = tmp_path_factory.mktemp("any") / "image.tar"
    data = json.dumps(document).encode()
    with tarfile.open(path, "w") as tar:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        tar.addfile(header, io.BytesIO(data))
    with pytest.raises(oci.BadArchive):
        oci.image_id(path)
