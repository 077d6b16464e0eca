"""``chargehand init``: everything private, nothing overwritten, twice is once."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from supervisor.settings.load import load
from tests.cli.conftest import Command


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_it_writes_settings_and_makes_a_private_directory_with_both_keys(command: Command, tmp_path: Path) -> None:
    said = command("init", "--dir", str(tmp_path / "gw"), "--json", shared=())
    assert said.status == 0, said
    data = tmp_path / "gw" / "data"
    assert said.json["config_was"] == "written" and said.json["data_dir"] == str(data)
    assert mode(data) == 0o700
    assert mode(data / "keys" / "gateway_ed25519") == 0o600 and mode(data / "audit-key.pem") == 0o600
    assert said.json["ssh_public_key"].startswith("ssh-ed25519 ")
    assert load(tmp_path / "gw" / "chargehand.toml").data_dir == data


def test_doing_it_twice_changes_nothing(command: Command, tmp_path: Path) -> None:
    first = command("init", "--dir", str(tmp_path / "gw"), "--json", shared=()).json
    path = tmp_path / "gw" / "chargehand.toml"
    path.write_text(path.read_text("utf-8") + "\n# mine\n", "utf-8")
    second = command("init", "--dir", str(tmp_path / "gw"), "--json", shared=()).json
    assert second["config_was"] == "kept" and second["data_dir_was"] == "kept"
    assert (second["ssh_public_key"], second["audit_key_id"]) == (first["ssh_public_key"], first["audit_key_id"])
    assert path.read_text("utf-8").endswith("# mine\n")


def test_without_force_and_a_yes_nothing_is_overwritten_and_the_old_file_is_kept_beside(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.toml"
    path.write_text("# mine\n", "utf-8")
    words = ("init", "--config", str(path), "--force")
    assert command(*words, "--json").status == 2
    monkeypatch.setattr("supervisor.cli.ask.terminal", lambda: True)
    assert command(*words, stdin="n\n").status == 130
    assert path.read_text("utf-8") == "# mine\n"
    said = command(*words, "--yes", "--json").json
    assert Path(said["backup"]).read_text("utf-8") == "# mine\n"
    assert path.read_text("utf-8") != "# mine\n"


def test_the_file_goes_where_every_command_finds_it(command: Command, tmp_path: Path, data_dir: Path) -> None:
    said = command("init")
    assert said.status == 0 and "machine add here --embedded" in said.err
    path = tmp_path / "config" / "chargehand" / "chargehand.toml"
    assert tomllib.loads(path.read_text("utf-8"))["data_dir"] == str(data_dir)
    assert command("doctor", "--json", shared=()).json["ok"]


def test_the_example_can_be_printed_and_reads_as_toml(command: Command, data_dir: Path) -> None:
    said = command("init", "--print", shared=())
    assert said.status == 0
    assert "data_dir" not in tomllib.loads(said.out)
    assert not data_dir.exists()


def test_a_directory_that_others_may_read_is_made_private(command: Command, data_dir: Path) -> None:
    data_dir.mkdir(mode=0o755)
    data_dir.chmod(0o755)
    assert command("init", "--json").json["data_dir_was"] == "mended"
    assert mode(data_dir) == 0o700


def test_a_settings_file_that_is_wrong_is_told_and_left_alone(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("[limits]\nlease = 3\n", "utf-8")
    said = command("init", "--config", str(path), "--json")
    assert (said.status, said.json["error"]["code"]) == (2, "bad-settings")
    assert path.read_text("utf-8") == "[limits]\nlease = 3\n"


@pytest.mark.parametrize("words", [("--dir", "a", "--config", "b"), ("--config", ".")])
def test_what_cannot_be_meant_is_refused(command: Command, words: tuple[str, ...]) -> None:
    assert command("init", *words, "--json").status == 2


def test_a_place_that_cannot_be_written_is_told(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    said = command("init", "--dir", str(tmp_path / "file" / "gw"), "--json", shared=())
    assert said.status == 2 and "could not be written" in said.json["error"]["message"]


def test_a_kept_file_with_another_data_directory_is_told(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'data_dir = "{tmp_path / "other"}"\n', "utf-8")
    said = command("init", "--config", str(path))
    assert said.status == 0 and "--data-dir is needed every time" in said.err
