"""``chargehand doctor``: each thing that can be wrong is found, with a remedy; it only looks."""

from __future__ import annotations

import sqlite3
import time
import types
from pathlib import Path
from typing import Any

import pytest

from supervisor.cli import doctor
from supervisor.runs.services import Services
from supervisor.runs.states import State
from tests.cli.conftest import Command
from tests.cli.scripted_machine import ScriptedMachine
from tests.cli.scripted_mlflow import ScriptedMlflow
from tests.cli.stored_runs import MACHINE, added_machine, open_run, sealed_run
from tests.cli.test_audit import damage, external

SECRET = "sk-canary-0123456789abcdef"


def wrong(document: dict[str, Any]) -> dict[str, str]:
    """Id → message of what wants attention; each must say how to mend it."""
    found = [finding for finding in document["findings"] if finding["severity"] in ("warning", "critical")]
    assert all(finding["remedy"] for finding in found), found
    return {finding["id"]: finding["message"] for finding in found}


@pytest.fixture
def healthy(command: Command, services: Services) -> Services:
    """A gateway's directory in order, with one sealed run and no machine that wants attention."""
    assert command("init").status == 0
    machine = added_machine(services)
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAmKtR9fSmZkzh8l7gvo7mqzPHIZCFHAkFAFVgB9FnSV"
    services.store.machines.accept_host_key(machine.id, key, "operator:anna")
    sealed_run(services)
    return services


def test_nothing_is_wrong_with_a_gateway_in_order(command: Command, healthy: Services) -> None:
    said = command("doctor", "--json")
    assert said.status == 0, wrong(said.json)
    assert said.json["ok"] and wrong(said.json) == {}
    assert {finding["id"] for finding in said.json["findings"]} >= {
        "settings", "data", "disk", "ssh-key", "audit-key", "gateway", "database", "audit", "runs", "machines", "mlflow", "spool",
        "model", "runbooks", "policy", "python", "packages", "clock",
    }  # fmt: skip
    assert "nothing is wrong" in command("doctor").out
    assert command("doctor", "--full", "--json").status == 0


def test_it_makes_nothing_where_nothing_is(command: Command, data_dir: Path, tmp_path: Path) -> None:
    said = command("doctor", "--json")
    assert said.status == 1 and set(wrong(said.json)) == {"data"}
    assert not data_dir.exists() and not (tmp_path / "config").exists()


def test_wrong_settings_are_the_first_finding(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text("[limits]\nlease_s = 1000\n", "utf-8")
    said = command("doctor", "--json", shared=("--config", str(path)))
    assert said.status == 1 and "lease_s" in wrong(said.json)["settings"]


def test_what_others_may_read_or_write_is_found(
    command: Command, healthy: Services, data_dir: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config" / "chargehand" / "chargehand.toml"
    for path, mode in ((data_dir, 0o755), (data_dir / "audit-key.pem", 0o640), (data_dir / "keys/gateway_ed25519", 0o644),
                       (data_dir / "chargehand.db", 0o644), (config, 0o666)):  # fmt: skip
        path.chmod(mode)
    found = wrong(command("doctor", "--json").json)
    assert set(found) >= {"data", "audit-key", "ssh-key", "database", "settings"}


def test_a_broken_audit_chain_is_critical_quick_and_full(command: Command, healthy: Services, data_dir: Path) -> None:
    damage(data_dir, f"UPDATE audit_records SET actor = 'x' WHERE chain = 'machine:{MACHINE}' AND seq = 3")
    for words in (("doctor", "--json"), ("doctor", "--full", "--json")):
        said = command(*words)
        assert said.status == 1 and f"machine:{MACHINE} 3" in wrong(said.json)["audit"]


@pytest.mark.parametrize(
    "statement",
    [
        f"DELETE FROM audit_records WHERE chain = 'machine:{MACHINE}' AND seq = 5",
        f"DELETE FROM audit_records WHERE chain = 'machine:{MACHINE}' AND seq = 2",
        f"UPDATE audit_chains SET hash = prev FROM audit_records r WHERE r.chain = audit_chains.chain AND r.seq = 1 AND audit_chains.chain = 'machine:{MACHINE}'",
    ],
)
def test_the_quick_look_sees_missing_records_at_the_end(
    command: Command, healthy: Services, data_dir: Path, statement: str
) -> None:
    damage(data_dir, statement)
    assert "audit" in wrong(command("doctor", "--json").json)


def test_the_quick_look_reads_only_the_end_of_a_chain(healthy: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "QUICK_RECORDS", 2)
    assert doctor.quick_breaks(healthy.ledger, f"machine:{MACHINE}") == []


def test_a_database_of_another_version_or_no_database_at_all_is_told(
    command: Command, healthy: Services, data_dir: Path
) -> None:
    with sqlite3.connect(data_dir / "chargehand.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    found = wrong(command("doctor", "--json").json)
    assert "9999" in found["database"]


def test_a_file_that_is_no_database_is_one_finding_among_the_others(command: Command, data_dir: Path) -> None:
    command("init")
    (data_dir / "chargehand.db").write_bytes(b"this is no database" * 100)
    (data_dir / "spool.db").write_bytes(b"nor is this" * 100)
    said = command("doctor", "--json")
    assert said.status == 1 and set(wrong(said.json)) == {"database", "spool"}
    assert any(finding["id"] == "policy" for finding in said.json["findings"])


def test_overdue_and_unreachable_runs_are_found(command: Command, healthy: Services) -> None:
    run = open_run(healthy)
    healthy.store.runs.extend(run.id, State.RUNNING, time.time() - 60)
    assert run.id in wrong(command("doctor", "--json").json)["runs"]
    healthy.store.runs.move(run.id, State.RUNNING, State.STOPPING)
    healthy.store.runs.move(run.id, State.STOPPING, State.UNREACHABLE)
    assert "unreachable" in wrong(command("doctor", "--json").json)["runs"]


def test_a_machine_without_an_accepted_host_key_is_found(command: Command, services: Services) -> None:
    command("init")
    added_machine(services)
    found = command("doctor", "--json").json
    assert MACHINE in wrong(found)["machines"]


def test_machines_are_connected_to_when_asked_for(command: Command, ssh_machine: ScriptedMachine) -> None:
    command("init")
    command("machine", "add", MACHINE, "127.0.0.1", "--port", str(ssh_machine.port),
            "--accept-host-key", ssh_machine.shown.fingerprint)  # fmt: skip
    assert command("doctor", "--json").status == 0 and ssh_machine.verbs == []
    assert command("doctor", "--machines", "--json").status == 0 and "hello" in ssh_machine.verbs
    ssh_machine.hello["machine"] = "another"
    assert f"machine {MACHINE}" in wrong(command("doctor", "--machines", "--json").json)
    ssh_machine.change_host_key()
    said = command("doctor", "--machines", "--json")
    assert said.status == 1 and ssh_machine.shown.fingerprint in wrong(said.json)[f"machine {MACHINE}"]


def test_what_the_spool_lost_or_mlflow_refused_is_found(command: Command, healthy: Services) -> None:
    held = healthy.spool.pending(1)[0]
    healthy.spool.set_aside(held.row, "too \x1b[31mlong")
    said = command("doctor")
    assert said.status == 1 and "\x1b" not in said.out and "MLflow refused 1 spans" in said.out


def test_mlflow_is_asked_where_it_should_be(
    command: Command, healthy: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    external(monkeypatch, "http://127.0.0.1:1")
    assert "127.0.0.1:1" in wrong(command("doctor", "--json").json)["mlflow"]
    with ScriptedMlflow() as mlflow:
        external(monkeypatch, mlflow.url)
        assert command("doctor", "--json").status == 0


def test_a_model_key_is_looked_for_and_never_shown(
    command: Command, healthy: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHARGEHAND_MODEL__PROVIDER", "openai")
    monkeypatch.setenv("CHARGEHAND_MODEL__KEY", "env:MY_MODEL_KEY")
    assert "MY_MODEL_KEY" in wrong(command("doctor", "--json").json)["model"]
    monkeypatch.setenv("MY_MODEL_KEY", SECRET)
    for words in (("doctor",), ("doctor", "--json")):
        said = command(*words)
        assert said.status == 0 and SECRET not in said.out + said.err and "env:MY_MODEL_KEY" in said.out


def test_a_wrong_policy_or_runbook_file_is_found(
    command: Command, healthy: Services, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("policy: p\nrulse: 1\n", "utf-8")
    monkeypatch.setenv("CHARGEHAND_POLICIES", f'["{path}"]')
    (data_dir / "runbooks").mkdir()
    (data_dir / "runbooks" / "mine.yaml").write_text("name: 1\n", "utf-8")
    found = wrong(command("doctor", "--json").json)
    assert "p.yaml:2:1" in found["policy"] and "mine.yaml:1:" in found["runbooks"]


@pytest.mark.parametrize(("free", "severity"), [(10, "critical"), (500_000_000, "warning"), (10**12, "ok")])
def test_a_disk_that_fills_up_is_found(
    command: Command, free: int, severity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("init")
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=free))
    found = [finding for finding in command("doctor", "--json").json["findings"] if finding["id"] == "disk"]
    assert [finding["severity"] for finding in found] == [severity]


def test_records_from_the_future_mean_that_the_clock_went_back(command: Command, healthy: Services) -> None:
    healthy.ledger.now_us = lambda: (time.time_ns() // 1000) + 3_600_000_000
    healthy.ledger.record("gateway.started", {})
    assert "gone back" in wrong(command("doctor", "--json").json)["clock"]
