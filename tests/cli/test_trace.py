"""``chargehand trace``: the same tree from MLflow, from the spool or from the store, and which of them it was."""

from __future__ import annotations

import pytest

from supervisor.runs.services import Services
from tests.cli.conftest import Command
from tests.cli.scripted_mlflow import ScriptedMlflow
from tests.cli.stored_runs import open_run, sealed_run
from tests.cli.test_audit import external


def names(document: dict[str, object]) -> list[tuple[int, str]]:
    return [(row["depth"], row["name"]) for row in document["spans"]]  # type: ignore[index,union-attr,call-overload]


def test_the_tree_is_the_same_wherever_it_comes_from(
    command: Command, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sealed_run(services)
    spooled = command("trace", run.id, "--json").json
    assert spooled["source"] == "spool" and spooled["mlflow_url"] is None
    with ScriptedMlflow() as mlflow:
        mlflow.put(services.spool.pending_spans(run.trace_id))
        external(monkeypatch, mlflow.url)
        seen = command("trace", run.id[:30], "--json").json
        text = command("trace", run.id)
    assert seen["source"] == "mlflow" and seen["spans_in_mlflow"] == len(seen["spans"])
    assert f"selectedEvaluationId=tr-{run.trace_id}" in seen["mlflow_url"]
    assert "tool.execution" in text.out and seen["mlflow_url"] in text.out and "as MLflow has it" in text.err
    services.spool.delivered([held.row for held in services.spool.pending(100)])
    monkeypatch.delenv("CHARGEHAND_MLFLOW__URL")
    monkeypatch.setenv("CHARGEHAND_MLFLOW__MODE", "off")
    derived = command("trace", run.id, "--json").json
    assert derived["source"] == "store"
    assert names(spooled) == names(seen) == names(derived)
    assert (0, "message.processed") in names(derived) and (3, "tool.execution") in names(derived)


def test_a_part_in_mlflow_is_not_shown_as_the_whole(
    command: Command, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sealed_run(services)
    with ScriptedMlflow() as mlflow:
        mlflow.put(services.spool.pending_spans(run.trace_id)[:3])
        external(monkeypatch, mlflow.url)
        said = command("trace", run.id, "--json").json
    assert said["source"] == "spool" and said["spans_in_mlflow"] == 3 and "3 of" in said["note"]
    assert len(said["spans"]) > 3


def test_mlflow_that_does_not_answer_is_told_and_the_tree_is_shown(
    command: Command, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sealed_run(services)
    external(monkeypatch, "http://127.0.0.1:1")
    said = command("trace", run.id)
    assert said.status == 0 and "message.processed" in said.out and "could not be asked" in said.err


def test_an_open_run_shows_what_is_known_so_far(command: Command, services: Services) -> None:
    run = open_run(services)
    said = command("trace", run.id)
    assert said.status == 0 and "the run goes on" in said.err
    assert command("trace", run.id, "--json").json["state"] == "running"


def test_an_unknown_run_is_bad_input(command: Command) -> None:
    assert command("trace", "0189", "--json").json["error"]["code"] == "not-found"
    assert command("trace", "../x", "--json").status == 2
