"""What is built and kept, and from where: no machine needed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.lab import box, image, oci

HASH = "--hash=sha256:" + "0" * 64


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(box.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def apt(tmp_path: Path) -> Path:
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    (tmp_path / "os-release").write_text('ID=debian\nVERSION_CODENAME=bookworm\nPRETTY_NAME="Debian = 12"\n')
    return tmp_path / "apt"


def sources_of(apt: Path) -> str:
    return image.box_sources("trixie", apt, apt.parent / "os-release")


def test_a_deb822_source_of_the_box_is_rewritten_for_the_suite(apt: Path) -> None:
    (apt / "sources.list.d/debian.sources").write_text(
        "Types: deb deb-src\n# a remark: not a field\nURIs: http://mirror.example/debian\n"
        "Suites: bookworm bookworm-updates\nComponents: main\nSigned-By: /usr/share/keyrings/a.gpg\n\n"
        "Types: deb\nURIs: http://mirror.example/other\nSuites: nodistro\nComponents: main\n"
    )
    assert sources_of(apt) == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie trixie-updates\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/a.gpg\n"
    )


def test_a_one_line_source_of_the_box_is_rewritten_for_the_suite(apt: Path) -> None:
    (apt / "sources.list").write_text(
        "deb-src http://mirror.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm-security main contrib # why\n"
    )
    assert sources_of(apt) == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie-security\nComponents: main contrib\n"
        "Signed-By: /k.gpg\n"
    )


def test_a_box_of_another_kind_names_no_sources(apt: Path) -> None:
    (apt / "sources.list").write_text("deb http://mirror.example/ubuntu noble main\n")
    (apt.parent / "os-release").write_text("ID=ubuntu\nVERSION_CODENAME=noble\n")
    assert sources_of(apt) == ""


def test_a_recipe_has_another_digest_when_anything_in_it_changes() -> None:
    one = image.Recipe(kind="a", packages=("p",))
    assert one.digest == image.Recipe(kind="a", packages=("p",)).digest
    assert len({one.digest, image.Recipe("a", ("q",)).digest, image.Recipe("a", ("p",), files={"f": "x"}).digest}) == 3


def test_two_that_ask_at_once_get_one_build(cache: Path) -> None:
    builds: list[Path] = []
    at_once = threading.Barrier(2)

    def build(target: Path) -> None:
        builds.append(target)
        target.mkdir()

    def ask() -> None:
        at_once.wait(10)
        # Both hold it to the end: a holder must not keep the other one waiting.
        with image.kept("images", "kind", "d1", build) as tree:
            at_once.wait(10)
            assert tree.is_dir()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(builds) == 1


def test_a_build_that_fails_leaves_nothing_and_the_next_one_begins_anew(cache: Path) -> None:
    def fail(target: Path) -> None:
        target.mkdir()
        (target / "half").touch()
        raise box.LabError("no space")

    with pytest.raises(box.LabError, match="no space"), image.kept("images", "kind", "d1", fail):
        pass
    assert not [path for path in (cache / "images").iterdir() if not path.name.endswith("lock")]
    with image.kept("images", "kind", "d1", lambda target: target.mkdir()) as tree:
        assert not list(tree.iterdir())


def test_old_images_are_pruned_and_held_ones_are_not(cache: Path) -> None:
    with image.kept("images", "kind", "held", lambda target: target.mkdir()) as held:
        for number in range(6):
            with image.kept("images", "kind", f"d{number}", lambda target: target.mkdir()):
                pass
        left = {path.name for path in (cache / "images").iterdir() if path.is_dir()}
        assert held.is_dir()
    assert {"kind-held", "kind-d5"} <= left
    assert len(left) <= image.KEPT + 1


def test_a_requirement_for_another_python_is_left_out_and_markers_are_dropped() -> None:
    text = (
        f"# made by a tool\na==1 \\\n    {HASH} \\\n    {HASH}\n    # via b\n"
        f"b==2 ; python_full_version < '3.13' \\\n    {HASH}\n"
        f"c==3 ; python_version >= '3.12' and sys_platform == 'linux' \\\n    {HASH}\n"
    )
    assert oci.requirements_for(text, "3.13") == f"a==1 {HASH} {HASH}\nc==3 {HASH}\n"
