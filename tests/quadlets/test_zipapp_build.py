"""The machine side's archive: reproducible, complete, and built without importing what it packs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from quadlets.zipapp_build import BuildError, build_host_zipapp, host_zipapp

MAIN = (
    "import sys\n\n\ndef main():\n    from tools import answer\n    print(answer.ANSWER, sys.argv[1:])\n    return 7\n"
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    for name, text in {
        "edge_agent/__init__.py": "",
        "edge_agent/host/__init__.py": "",
        "edge_agent/host/main.py": MAIN,
        "edge_agent/worker/__init__.py": "",
        "edge_agent/worker/__main__.py": "import nothing_of_the_kind",
        "tools/__init__.py": "",
        "tools/answer.py": "ANSWER = 42\n",
        "tools/observers/__init__.py": "",
        "tools/notes.txt": "not code",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_archive_runs_and_its_exit_status_is_the_one_of_main(sources: Path, tmp_path: Path) -> None:
    build_host_zipapp(tmp_path / "host.pyz", sources)
    done = subprocess.run(
        [sys.executable, "-I", tmp_path / "host.pyz", "gatekeeper"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (7, "42 ['gatekeeper']")


def test_two_builds_of_the_same_sources_are_the_same_bytes(sources: Path, tmp_path: Path) -> None:
    first = build_host_zipapp(tmp_path / "a" / "host.pyz", sources)
    for path in sources.rglob("*.py"):
        path.touch()
    assert build_host_zipapp(tmp_path / "b.pyz", sources) == first
    assert (tmp_path / "a" / "host.pyz").read_bytes() == (tmp_path / "b.pyz").read_bytes()


def test_the_worker_and_files_that_are_not_python_stay_out(sources: Path, tmp_path: Path) -> None:
    build_host_zipapp(tmp_path / "host.pyz", sources)
    with zipfile.ZipFile(tmp_path / "host.pyz") as archive:
        names = archive.namelist()
    assert names == sorted(names)
    assert not [name for name in names if "worker" in name or name.endswith(".txt") or "__pycache__" in name]
    assert "tools/observers/__init__.py" in names


def test_a_missing_entry_point_is_named(sources: Path) -> None:
    (sources / "edge_agent/host/main.py").unlink()
    with pytest.raises(BuildError, match=r"expected edge_agent/host/main\.py"):
        host_zipapp(sources)


def test_a_failed_write_leaves_no_unfinished_file(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "host.pyz").mkdir()
    with pytest.raises(OSError, match="directory"):
        build_host_zipapp(tmp_path / "host.pyz", sources)
    assert not list(tmp_path.glob(".host.pyz*"))


def run(archive: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-I", archive, *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip() + done.stderr.strip()


def test_compiled_modules_are_taken_only_for_the_archive_they_were_made_from(sources: Path, tmp_path: Path) -> None:
    archive = tmp_path / "host.pyz"
    build_host_zipapp(archive, sources)
    assert run(archive, "compile") == (0, "")
    (compiled,) = (tmp_path / "host.pyz.compiled").iterdir()
    assert list(compiled.rglob("answer*.pyc"))
    # What is in the compiled folder is what runs, as long as the archive is the one it was made from.
    (compiled / "tools/answer.py").write_text("ANSWER = 99\n")
    assert run(archive) == (7, "42 []")
    (pyc,) = compiled.rglob("answer*.pyc")
    pyc.unlink()
    assert run(archive) == (7, "99 []")
    (sources / "tools/answer.py").write_text("ANSWER = 43\n")
    build_host_zipapp(archive, sources)
    assert run(archive) == (7, "43 []")
    assert run(archive, "compile") == run(archive, "compile") == (0, "")
    (newer,) = (tmp_path / "host.pyz.compiled").iterdir()
    assert newer.name != compiled.name
    assert run(archive) == (7, "43 []")


def test_an_archive_that_cannot_be_compiled_says_so_and_leaves_nothing(sources: Path, tmp_path: Path) -> None:
    (sources / "tools/answer.py").write_text("ANSWER = (\n")
    build_host_zipapp(tmp_path / "host.pyz", sources)
    status, said = run(tmp_path / "host.pyz", "compile")
    assert status == 1
    assert "could not be compiled" in said
    assert not list((tmp_path / "host.pyz.compiled").iterdir())


def test_building_does_not_import_the_runner() -> None:
    program = (
        "import sys; from quadlets.zipapp_build import BuildError, host_zipapp\n"
        "try: host_zipapp()\nexcept BuildError: pass\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('edge_agent', 'tools', 'supervisor')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
