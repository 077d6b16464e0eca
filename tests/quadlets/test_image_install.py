"""What runs inside the image while it is built: only pinned wheels, unpacked to where they belong."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadlets import context, image, rootfs
from quadlets.image_install import InstallError, choose, install, pinned, unpack

ROOT = context.source_root_of_this_installation()


def wheel(folder: Path, name: str, files: dict[str, str]) -> tuple[Path, str]:
    folder.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    (folder / name).write_bytes(stream.getvalue())
    return folder / name, hashlib.sha256(stream.getvalue()).hexdigest()


def test_the_shipped_pins_can_be_read_and_all_have_hashes() -> None:
    pins = pinned((ROOT / context.REQUIREMENTS).read_text())
    assert "a2a-sdk" in pins
    assert all(hashes for _, _, hashes in pins.values())
    assert not {"mlflow", "dbos", "asyncssh", "fastapi"} & set(pins)


def test_a_requirement_without_a_hash_is_refused() -> None:
    with pytest.raises(InstallError, match="--hash"):
        pinned("a2a-sdk==1.3.0\n")


@given(st.text(max_size=200))
def test_any_text_is_pins_or_a_clear_error(text: str) -> None:
    try:
        pins = pinned(text)
    except InstallError as error:
        assert "expected name==version" in str(error)
        return
    assert all(hashes for _, _, hashes in pins.values())


def test_only_the_pinned_bytes_are_taken(tmp_path: Path) -> None:
    path, digest = wheel(tmp_path, "Some_Lib-1.0-py3-none-any.whl", {"some_lib.py": "X = 1"})
    pins = {"some-lib": ("1.0", False, frozenset({digest})), "other": ("2", True, frozenset({"0" * 64}))}
    assert choose([path], pins) == [path]
    with pytest.raises(InstallError, match="not the pinned file"):
        choose([path], {"some-lib": ("1.0", False, frozenset({"0" * 64}))})
    with pytest.raises(InstallError, match="not among the pinned"):
        choose([path], {"some-lib": ("1.1", False, frozenset({digest}))})
    with pytest.raises(InstallError, match="not among the pinned"):
        choose([path], {"else": ("1.0", False, frozenset({digest}))})
    with pytest.raises(InstallError, match="no wheel for missing"):
        choose([path], {**pins, "missing": ("3", False, frozenset({digest}))})
    copy, _ = wheel(tmp_path, "some_lib-1.0-cp311-cp311-linux_x86_64.whl", {"some_lib.py": "X = 1"})
    with pytest.raises(InstallError, match="two wheels for some-lib"):
        choose([path, copy], pins)


def test_a_wheel_cannot_write_outside_of_the_target(tmp_path: Path) -> None:
    path, _ = wheel(tmp_path, "evil-1-py3-none-any.whl", {"../evil.py": "X = 1"})
    (tmp_path / "target").mkdir()
    with pytest.raises(InstallError, match="outside"):
        unpack(path, tmp_path / "target")
    assert not (tmp_path / "evil.py").exists()


def test_scripts_and_data_of_a_wheel_stay_out(tmp_path: Path) -> None:
    files = {"lib/a.py": "A = 1", "lib-1.data/scripts/tool": "#!x", "lib-1.data/purelib/lib/b.py": "B = 1"}
    path, _ = wheel(tmp_path, "lib-1-py3-none-any.whl", files)
    unpack(path, tmp_path / "target")
    found = sorted(p.relative_to(tmp_path / "target").as_posix() for p in (tmp_path / "target").rglob("*.*"))
    assert found == ["lib/a.py", "lib/b.py"]


def test_the_context_becomes_a_folder_that_python_runs(tmp_path: Path) -> None:
    build = tmp_path / "context"
    files = {"lib/__init__.py": "", "lib/tests/__init__.py": "", "tools/__init__.py": "raise SystemExit('theirs')"}
    _, digest = wheel(build / "wheels", "lib-1-py3-none-any.whl", files)
    (build / "requirements").mkdir()
    (build / "requirements/edge.txt").write_text(f"lib==1 \\\n    --hash=sha256:{digest}\n    # via\n")
    for name, text in {
        "edge_agent/__init__.py": "",
        "edge_agent/worker/__init__.py": "",
        "edge_agent/worker/__main__.py": "import sys, lib, tools\nprint('up', __name__, sys.flags.isolated)\n",
        "tools/__init__.py": "",
    }.items():
        path = build / "app" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    target = tmp_path / "opt"
    program = "import sys; from pathlib import Path; from quadlets import image_install as i; i.install(Path(sys.argv[1]), Path(sys.argv[2]))"
    # In a process of its own: it would byte-compile the standard library of this one only where that has no bytecode.
    subprocess.run([sys.executable, "-c", program, build, target], check=True, cwd=ROOT)
    done = subprocess.run([sys.executable, "-I", "-B", target], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("up __main__ 1\n", "")
    assert not (target / "lib/tests").exists()
    assert list(target.rglob("*.pyc"))


def test_an_old_base_image_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("quadlets.image_install.LEAST_PYTHON", (99, 0))
    with pytest.raises(InstallError, match="base image's Python"):
        install(tmp_path, tmp_path / "target")


# --- the context ------------------------------------------------------------------------------------------------------


def test_the_context_holds_the_workers_code_and_nothing_of_the_centre(tmp_path: Path) -> None:
    context.lay_out(tmp_path / "context")
    found = {path.relative_to(tmp_path / "context").as_posix() for path in (tmp_path / "context").rglob("*")}
    assert {"Containerfile", "image_install.py", "requirements/edge.txt", "wheels"} <= found
    assert "app/edge_agent/worker/__main__.py" in found
    assert not [name for name in found if name.startswith(("app/supervisor", "app/edge_agent/host", "app/otel"))]
    assert not [name for name in found if "__pycache__" in name]


def test_a_checkout_without_a_needed_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(context.ContextError, match="expected edge_agent/worker"):
        context.lay_out(tmp_path / "context", source_root=tmp_path)


@pytest.mark.parametrize(("python", "expected"), [("3.11", True), ("3.13", False)])
def test_markers_are_evaluated_for_the_image_not_for_this_python(python: str, expected: bool) -> None:
    text = (ROOT / context.REQUIREMENTS).read_text()
    found = context.requirements_for(text, python, "x86_64")
    assert ("culsans==" in found) is expected
    assert "emscripten" not in found
    assert ";" not in found
    assert set(pinned(found)) <= set(pinned(text))


# --- the command line -------------------------------------------------------------------------------------------------


def test_no_engine_and_no_base_means_without_an_engine() -> None:
    assert image.choose_engine("auto", "") == ""
    assert image.choose_engine("none", "localhost/base@sha256:1") == ""


def test_an_engine_without_a_base_is_refused() -> None:
    with pytest.raises(image.ImageError, match="--base"):
        image.choose_engine("podman", "")


def test_an_empty_folder_of_wheels_is_refused_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert image.main(["--wheels", str(tmp_path), "--output", str(tmp_path / "out.tar")]) == 1
    assert "holds no wheel" in capsys.readouterr().err
    assert not (tmp_path / "out.tar").exists()


def test_a_box_without_mmdebstrap_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(rootfs.RootfsError, match="mmdebstrap is not installed; install podman"):
        rootfs.build(tmp_path / "tree")
