"""``chargehand audit``: what is on record, exactly where a chain breaks, and what MLflow does not have."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from otel.spans import span_id
from supervisor.audit import kinds
from supervisor.cli.completeness import INFERENCE, NO_RECORD, NO_SPAN, TOOL_CALL, compare
from supervisor.runs.services import Services
from tests.cli.conftest import Command
from tests.cli.scripted_mlflow import ScriptedMlflow
from tests.cli.stored_runs import MACHINE, open_run, sealed_run


def damage(data_dir: Path, statement: str) -> None:
    with sqlite3.connect(data_dir / "chargehand.db") as connection:
        assert connection.execute(statement).rowcount == 1
    connection.close()


def external(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("CHARGEHAND_MLFLOW__MODE", "external")
    monkeypatch.setenv("CHARGEHAND_MLFLOW__URL", url)


def test_records_are_shown_oldest_first_and_chosen_by_machine_run_and_kind(
    command: Command, services: Services
) -> None:
    run = sealed_run(services)
    services.ledger.record(kinds.GATEWAY_STARTED, {"pid": 1})
    everything = command("audit", "show", "--json").json["records"]
    assert [record["kind"] for record in everything][-1] == "gateway.started"
    assert everything[0]["body"]["inference_id"] == "i1"
    of_run = command("audit", "show", "--run", run.id[:30], "--kind", "decision", "--json").json["records"]
    assert [record["body"]["call_id"] for record in of_run] == ["c1", "c2"]
    assert len(command("audit", "show", "--machine", MACHINE, "--limit", "2", "--json").json["records"]) == 2
    assert [r["chain"] for r in command("audit", "show", "--gateway", "--json").json["records"]] == ["gateway"]
    text = command("audit", "show").out
    assert "c1 allow df" in text and "gateway.started" in text


@pytest.mark.parametrize(
    "words", [("--kind", "nosuch"), ("--machine", "nosuch"), ("--run", "zzz"), ("--machine", "x", "--gateway")]
)
def test_what_does_not_exist_is_bad_input(command: Command, words: tuple[str, ...]) -> None:
    assert command("audit", "show", *words, "--json").status == 2


def test_a_whole_chain_verifies_with_its_signatures(command: Command, services: Services) -> None:
    sealed_run(services)
    unsigned = command("audit", "verify", "--json").json
    assert unsigned["verified"] and not unsigned["signatures_checked"]
    assert command("audit", "checkpoint", "--json").json["checkpoint"]["number"] == 1
    assert command("audit", "checkpoint", "--json").json == {"checkpoint": None}
    said = command("audit", "verify", "--json")
    assert said.status == 0
    assert said.json["verified"] and said.json["signatures_checked"] and said.json["checkpoints"] == 1
    assert "verified" in command("audit", "verify").out


def test_verifying_makes_no_key(command: Command, services: Services, data_dir: Path) -> None:
    sealed_run(services)
    command("audit", "verify")
    assert not (data_dir / "audit-key.pem").exists()


@pytest.mark.parametrize(
    ("statement", "kind", "seq"),
    [
        (
            f"UPDATE audit_records SET actor = 'operator:eve' WHERE chain = 'machine:{MACHINE}' AND seq = 3",
            "changed",
            3,
        ),
        (f"DELETE FROM audit_records WHERE chain = 'machine:{MACHINE}' AND seq = 2", "removed", 2),
        (f"DELETE FROM audit_records WHERE chain = 'machine:{MACHINE}' AND seq = 5", "truncated", 5),
    ],
)
def test_a_broken_chain_is_told_at_its_place_with_exit_status_5(
    command: Command, services: Services, data_dir: Path, statement: str, kind: str, seq: int
) -> None:
    sealed_run(services)
    damage(data_dir, statement)
    said = command("audit", "verify", "--json")
    assert said.status == 5
    assert [(b["kind"], b["seq"], b["chain"]) for b in said.json["breaks"]] == [(kind, seq, f"machine:{MACHINE}")]
    text = command("audit", "verify", "--machine", MACHINE)
    assert text.status == 5 and f"{kind}: machine:{MACHINE} {seq}" in text.out


def test_an_export_verifies_anywhere_and_a_changed_one_does_not(
    command: Command, services: Services, tmp_path: Path
) -> None:
    sealed_run(services)
    target = tmp_path / "export"
    done = command("audit", "export", str(target), "--json")
    assert done.status == 0 and done.json["records"] > 4 and done.json["checkpoints"] == 1
    assert command("audit", "verify", str(target), "--json").json["verified"]
    kept = target / "audit-key.pub.pem"
    assert command("audit", "verify", str(target), "--key", str(kept)).status == 0
    alone = subprocess.run(
        [sys.executable, "-I", str(target / "verify_audit.py"), str(target)], capture_output=True, check=False
    )
    assert alone.returncode == 0, alone.stdout
    assert command("audit", "export", str(target), "--json").json["error"]["code"] == "conflict"
    file = target / "audit.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"allow"', b'"allow "', 1))
    assert command("audit", "verify", str(target)).status == 5
    assert command("audit", "verify", str(tmp_path / "none"), "--json").status == 2
    assert command("audit", "verify", str(target), "--key", str(tmp_path / "none"), "--json").status == 2


def test_gaps_on_record_are_told_when_the_chain_holds(command: Command, services: Services) -> None:
    run = sealed_run(services)
    services.ledger.record(
        kinds.AUDIT_GAP, {"message": "c9 was never \x1b[31mstreamed"}, machine=MACHINE, run_id=run.id
    )
    said = command("audit", "verify")
    assert said.status == 0 and "c9 was never \\x1b[31mstreamed" in said.out
    assert command("audit", "verify", "--json").json["gaps"][0]["run_id"] == run.id


# --- against MLflow ---


def test_a_complete_trace_has_the_same_calls_as_the_record(
    command: Command, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [sealed_run(services) for _ in range(2)]
    open_run(services)
    with ScriptedMlflow() as mlflow:
        for run in runs:
            mlflow.put(services.spool.pending_spans(run.trace_id))
        external(monkeypatch, mlflow.url)
        said = command("audit", "verify", "--against-mlflow", "--json")
        text = command("audit", "verify", "--against-mlflow").out
    assert said.status == 0
    assert said.json["mlflow"] == {"complete": True, "runs": 2, "mismatches": []}
    assert "(sealed runs: 2)" in text


def test_each_side_that_is_missing_is_told_for_exactly_that_call(
    command: Command, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part, absent = (sealed_run(services) for _ in range(3))
    spans = services.spool.pending_spans(part.trace_id)
    with ScriptedMlflow() as mlflow:
        mlflow.put(services.spool.pending_spans(whole.trace_id))
        mlflow.put(span for span in spans if span.attributes.get("chargehand.call_id") != "c2")
        call = next(span for span in spans if span.attributes.get("chargehand.call_id") == "c1")
        mlflow.put([_renamed(call, part.id, "c7")])
        external(monkeypatch, mlflow.url)
        said = command("audit", "verify", "--against-mlflow", "--json")
    assert said.status == 1
    found = [(m["run_id"], m["kind"], m["item"]) for m in said.json["mlflow"]["mismatches"]]
    assert sorted(found) == sorted(
        [
            (part.id, NO_SPAN, "c2"), (part.id, NO_RECORD, "c7"),
            (absent.id, NO_SPAN, "c1"), (absent.id, NO_SPAN, "c2"), (absent.id, NO_SPAN, "i1"),
        ]
    )  # fmt: skip
    assert all("waits in the spool" in m["message"] for m in said.json["mlflow"]["mismatches"] if m["kind"] == NO_SPAN)


def _renamed(span: object, run_id: str, call: str) -> object:
    import dataclasses

    attributes = {**span.attributes, "chargehand.call_id": call}  # type: ignore[attr-defined]
    return dataclasses.replace(span, span_id=span_id(run_id, call), attributes=attributes)  # type: ignore[type-var]


def test_without_a_server_to_compare_with_the_command_says_so(
    command: Command, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed_run(services)
    said = command("audit", "verify", "--against-mlflow", "--json")
    assert (said.status, said.json["error"]["code"]) == (5, "mlflow")
    external(monkeypatch, "http://127.0.0.1:1")
    assert command("audit", "verify", "--against-mlflow", "--json").json["error"]["code"] == "mlflow"


@pytest.mark.parametrize(
    ("state", "dropped", "why"),
    [
        ("pending", "", "waits"),
        ("rejected", "", "refused"),
        ("delivered", "", "not there any more"),
        (None, "spool full", "spool full"),
        (None, "", "never came"),
    ],
)
def test_what_a_missing_span_means_is_told_from_the_spool(state: str | None, dropped: str, why: str) -> None:
    run_id = "01890000-0000-7000-8000-000000000001"
    spool = {} if state is None else {span_id(run_id, "c1"): state}
    (found,) = compare(run_id, {"c1": TOOL_CALL}, {}, spool, dropped)
    assert found.kind == NO_SPAN and why in found.message


def test_mismatches_stand_in_the_order_of_the_calls() -> None:
    run_id = "01890000-0000-7000-8000-000000000001"
    found = compare(run_id, {"c10": TOOL_CALL, "c2": TOOL_CALL, "i1": INFERENCE, "x\x00": TOOL_CALL}, {}, {})
    assert [mismatch.item for mismatch in found] == ["c2", "c10", "i1", "x\x00"]


def test_a_record_body_is_shown_as_json_or_as_the_text_it_is(
    command: Command, services: Services, data_dir: Path
) -> None:
    sealed_run(services)
    damage(data_dir, f"UPDATE audit_records SET body = '{{broken' WHERE chain = 'machine:{MACHINE}' AND seq = 1")
    records = command("audit", "show", "--json").json["records"]
    assert records[0]["body"] == "{broken" and isinstance(records[1]["body"], dict)
    assert "the body is damaged" in command("audit", "show").out
    assert json.loads(json.dumps(records))
