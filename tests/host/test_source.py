"""What is shipped to a machine: standard library only, readable by Python 3.9, one version."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import edge_agent.host.version
import supervisor.cli.version
from quadlets.zipapp_build import build_host_zipapp
from tests.host.processes import PYTHON

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*(ROOT / "edge_agent" / "host").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
# In the standard library of 3.11 and not yet in that of 3.9.
NEWER = {"tomllib"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_file_is_python_3_9_and_imports_the_standard_library_and_tools_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 9))
    allowed_ours = ("tools",) if ROOT / "tools" in path.parents else ("tools", "edge_agent.host")
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [node.module or ""]
        for name in names:
            ours = any(name == prefix or name.startswith(prefix + ".") for prefix in allowed_ours)
            standard = name.partition(".")[0] in sys.stdlib_module_names - NEWER
            assert ours or standard, f"line {node.lineno}: {name}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_file_uses_nothing_newer_than_3_9_at_run_time(path: Path) -> None:
    # What the grammar of 3.9 takes and its interpreter does not.
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg for keyword in node.keywords}
            name = ast.unparse(node.func)
            assert not (name == "zip" and "strict" in keywords), f"line {node.lineno}: zip(strict=)"
            assert not (name.endswith("dataclass") and keywords & {"slots", "kw_only", "match_args"}), (
                f"line {node.lineno}"
            )
            assert not name.endswith((".bit_count", "itertools.pairwise")), f"line {node.lineno}: {name}"
        assert not isinstance(node, ast.Match | ast.TryStar), f"line {node.lineno}"
    source = path.read_text(encoding="utf-8")
    assert "from __future__ import annotations" in source or "def " not in source


def test_the_versions_of_both_sides_are_the_distributions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert edge_agent.host.version.VERSION == project["version"] == supervisor.cli.version.VERSION


@pytest.fixture(scope="module")
def zipapp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    build_host_zipapp(home / "host.pyz")
    configuration = {"protocol": 1, "machine": "m1", "units": "process", "worker_argv": ["/bin/true"]}
    (home / "host.json").write_text(json.dumps(configuration), encoding="utf-8")
    return home / "host.pyz"


def ask(zipapp: Path, *words: str, command: str = "") -> subprocess.CompletedProcess[bytes]:
    environment = {"SSH_ORIGINAL_COMMAND": command, "XDG_RUNTIME_DIR": str(zipapp.parent)}
    argv = [PYTHON, "-I", "-S", str(zipapp), *words]
    return subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def test_the_zipapp_runs_without_site_packages_and_keeps_its_own_bytecode(zipapp: Path) -> None:
    home = ("--home", str(zipapp.parent))
    first = ask(zipapp, "gatekeeper", *home, command="hello")
    assert json.loads(first.stdout)["version"] == edge_agent.host.version.VERSION, first.stderr
    (bytecode,) = zipapp.parent.glob("host-*.zip")
    names = zipfile.ZipFile(bytecode).namelist()
    assert "edge_agent/host/broker.pyc" in names and not [name for name in names if not name.endswith(".pyc")]
    # It is what runs from now on: a module that is taken out of it is no longer found.
    traced = subprocess.run(
        [PYTHON, "-I", "-S", "-v", str(zipapp), "gatekeeper", *home],
        env={"SSH_ORIGINAL_COMMAND": "hello"}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"{bytecode}/edge_agent/host/lease.pyc" in traced.stderr or str(bytecode) in traced.stderr
    # A new zipapp does not meet the old one's bytecode, which is removed.
    os.utime(zipapp, (1, 1))
    assert ask(zipapp, "gatekeeper", *home, command="hello").returncode == 0
    (after,) = zipapp.parent.glob("host-*.zip")
    assert after != bytecode


def test_damaged_bytecode_is_done_without(zipapp: Path) -> None:
    home = ("--home", str(zipapp.parent))
    ask(zipapp, "gatekeeper", *home, command="hello")
    (bytecode,) = zipapp.parent.glob("host-*.zip")
    for damage in (b"", b"no zip at all", bytecode.read_bytes()[:1000]):
        bytecode.write_bytes(damage)
        done = ask(zipapp, "gatekeeper", *home, command="hello")
        assert done.returncode == 0 and json.loads(done.stdout)["machine"] == "m1", done.stderr


@pytest.mark.parametrize(
    "words", [(), ("shell",), ("gatekeeper", "--home"), ("gatekeeper", "--shell", "x"), ("keeper",), ("keeper", "--ready-fd", "x"),
              ("broker", "--ready-fd", "3")]
)  # fmt: skip
def test_words_that_no_installer_writes_end_with_the_usage(zipapp: Path, words: tuple[str, ...]) -> None:
    done = ask(zipapp, *words)
    assert done.returncode == 2 and done.stderr.startswith(b"usage: host.pyz") and done.stdout == b""


def test_the_zipapp_tells_its_version(zipapp: Path) -> None:
    assert ask(zipapp, "--version").stdout.decode().strip() == edge_agent.host.version.VERSION
