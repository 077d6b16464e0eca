"""Bodies: metadata and digests, content only where it is asked for."""

from __future__ import annotations

import json

from supervisor.audit import bodies, kinds
from supervisor.audit.bodies import Content
from supervisor.audit.journal import compare, verify_journal
from tests.audit.test_journal import ALLOWED, CALL, EVIDENCE, OUTPUT, RUN, journal
from tools.values import digest

SECRETIVE = Content()
OPEN = Content(True, 8)


def test_without_content_no_text_argument_or_output_is_in_a_body() -> None:
    made = [
        bodies.run_requested(SECRETIVE, trigger="operator", text="canary-text", runbook=None, model={"name": "m"}),
        bodies.decision(SECRETIVE, CALL, ALLOWED),
        bodies.evidence(SECRETIVE, EVIDENCE),
    ]
    written = json.dumps(made)
    assert "canary" not in written
    assert "nginx" not in written
    assert OUTPUT.strip() not in written
    assert made[0]["text"] == {"digest": digest("canary-text"), "bytes": 11}
    assert made[1]["binaries"] == ["/usr/bin/systemctl"]
    assert made[1]["digest"] == ALLOWED.digest
    assert made[2]["steps"][0]["stdout_digest"] == digest(OUTPUT)


def test_with_content_texts_are_kept_up_to_the_cap_and_say_when_they_were_cut() -> None:
    body = bodies.evidence(OPEN, EVIDENCE)["steps"][0]["stdout"]
    assert body == {"digest": digest(OUTPUT), "bytes": len(OUTPUT), "text": OUTPUT[:8], "cut": True}
    assert Content(True, 3).of("aüü") == {"digest": digest("aüü"), "bytes": 5, "text": "aü", "cut": True}
    assert Content(True, 99).of({"b": 1, "a": 2})["text"] == '{"a":2,"b":1}'


def test_gaps_are_told_by_digest_and_a_seal_names_its_journal() -> None:
    lines, head = journal()
    report = verify_journal(lines, RUN, head=head)
    gaps = compare(report.entries, [])
    told = [bodies.gap(gap) for gap in gaps]
    assert bodies.call_ids(gaps) == ["c1", "c2"]
    assert "nginx" not in json.dumps(told)
    seal = bodies.journal_sealed(report, complete=True, gaps=gaps)
    assert (seal["lines"], seal["head"], seal["verified"], seal["gaps"]) == (9, head, True, 2)


def test_an_unknown_price_stays_unknown() -> None:
    body = bodies.inference(
        inference_id="i1", provider="openai", model="m", usage={"input": 1}, cost_usd=None, stop_reason="stop",
        duration_ms=1.0, prompt_digest="a", completion_digest="b", error="x" * 900,
    )  # fmt: skip
    assert body["cost_usd"] is None
    assert len(body["error"]) == 500


def test_a_change_names_only_what_differs() -> None:
    assert bodies.machine_changed({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4})["changed"] == {
        "b": {"from": 2, "to": 3}, "c": {"from": None, "to": 4},
    }  # fmt: skip
    assert bodies.machine_changed(None, {"a": 1})["changed"] == {"a": {"from": None, "to": 1}}


def test_every_kind_has_a_name_of_its_own() -> None:
    assert len(kinds.KINDS) == len({kind.lower() for kind in kinds.KINDS})
    assert {kinds.RUN_REQUESTED, kinds.AUDIT_GAP, kinds.LOGIN} <= kinds.KINDS
    assert kinds.machine_of(kinds.machine_chain("gateway")) == "gateway"
    assert kinds.machine_of(kinds.GATEWAY_CHAIN) is None
