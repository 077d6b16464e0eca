"""``chargehand runbook``: what is shipped, what a file's problems are and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.cli.runbook import condition, yaml_of
from supervisor.runbooks import load_all, load_text
from tests.cli.conftest import Command

SHIPPED = load_all()


def test_the_shipped_runbooks_are_listed_with_the_default(command: Command) -> None:
    listed = command("runbook", "list", "--json").json["runbooks"]
    assert {book["name"] for book in listed} >= {
        "health", "disk", "memory", "services", "logs", "network", "time", "certificates",
    }  # fmt: skip
    assert [book["name"] for book in listed if book["default"]] == ["health"]
    assert "health (default)" in command("runbook", "list").out


def test_one_runbook_is_shown_with_its_thresholds(command: Command) -> None:
    text = command("runbook", "show", "disk").out
    assert "80 (disk_percent)" in text and "critical" in text
    assert command("runbook", "show", "disk", "--json").json["runbook"] == SHIPPED["disk"].to_json()
    unknown = command("runbook", "show", "dsik", "--json")
    assert (unknown.status, unknown.json["error"]["code"]) == (2, "not-found")
    assert "disk" in unknown.json["error"]["message"]


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_the_yaml_that_is_printed_reads_back_as_the_same_runbook(name: str) -> None:
    assert load_text(yaml_of(SHIPPED[name]).encode(), name) == SHIPPED[name]


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_condition_can_be_put_into_words(name: str) -> None:
    for check in SHIPPED[name].checks:
        assert "None" not in condition(check, SHIPPED[name].parameters)


def test_every_problem_is_told_with_its_place(command: Command, tmp_path: Path) -> None:
    good, wrong = tmp_path / "good.yaml", tmp_path / "wrong.yaml"
    good.write_text(command("runbook", "show", "disk", "--yaml").out.replace("name: disk", "name: my-disk"), "utf-8")
    wrong.write_text("name: x\ntitle: 7\nsteps: []\n", "utf-8")
    said = command("runbook", "check", str(good), str(wrong), str(tmp_path / "none.yaml"), "--json")
    assert said.status == 2 and not said.json["ok"]
    assert [file["ok"] for file in said.json["files"]] == [True, False, False]
    assert any(problem.startswith(f"{wrong}:2:8: ") for problem in said.json["files"][1]["problems"])
    text = command("runbook", "check", str(good), str(wrong))
    assert f"{good}: my-disk" in text.out and f"{wrong}:2:8" in text.err
    assert command("runbook", "check", str(good)).status == 0


def test_two_files_of_one_name_are_a_problem(command: Command, tmp_path: Path) -> None:
    text = command("runbook", "show", "disk", "--yaml").out
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(text, "utf-8")
    said = command("runbook", "check", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--json")
    assert said.status == 2 and "already defined" in said.json["files"][1]["problems"][0]


def test_an_own_runbook_that_is_not_right_is_one_clear_error(command: Command, data_dir: Path) -> None:
    (data_dir / "runbooks").mkdir(parents=True)
    (data_dir / "runbooks" / "mine.yaml").write_text("name: [\n", "utf-8")
    said = command("runbook", "list", "--json")
    assert said.status == 2
    assert "mine.yaml:2:1" in said.json["error"]["got"]
