"""The commands of the documentation, executed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHARGEHAND = [sys.executable, "-m", "supervisor.cli.main"]


def commands(page: Path) -> list[list[str]]:
    """The words of every ``$ chargehand …`` line in the console blocks of a page."""
    blocks = re.findall(r"^```console\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [words[1:] for words in (shlex.split(line, comments=True) for line in lines) if words[0] == "chargehand"]


def chargehand(words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "c"),
        "XDG_DATA_HOME": str(home / "d"),
    }
    return subprocess.run(
        [*CHARGEHAND, *words], cwd=ROOT, env=environment, text=True, capture_output=True, check=False, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_the_commands_of_the_readme_do_what_it_says(tmp_path: Path) -> None:
    told = commands(PAGES[0])
    assert len(told) >= 5
    for words in told:
        done = chargehand(words, tmp_path)
        assert done.returncode == 0, f"chargehand {' '.join(words)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_named_exists(page: Path, tmp_path: Path) -> None:
    from supervisor.cli.main import COMMANDS

    named = set(re.findall(r"(?:`|^|\s)chargehand ([a-z]+)\b", page.read_text(encoding="utf-8"), re.MULTILINE))
    prose = {"is", "runs", "process", "chain", "needs"}
    assert named - prose <= set(COMMANDS), sorted(named - prose - set(COMMANDS))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
