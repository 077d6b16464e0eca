"""The two numbers, always together: bypasses and ordinary commands accepted."""

from __future__ import annotations

import pytest

from tests.gate.policies import call_of, corpus, observe_core, web_services
from tools.gate import LexicalHost, decide

ADVERSARIAL = corpus("adversarial")
ORDINARY = corpus("ordinary")


def test_no_adversarial_call_passes_and_ordinary_commands_do(capsys: pytest.CaptureFixture[str]) -> None:
    bypasses = [e for e in ADVERSARIAL if decide(observe_core(), call_of(e), LexicalHost()).outcome != "deny"]
    accepted = [e for e in ORDINARY if decide(observe_core(), call_of(e), LexicalHost()).outcome == "allow"]
    with capsys.disabled():
        print(
            f"\nbypasses: {len(bypasses)} of {len(ADVERSARIAL)}   "
            f"ordinary commands accepted: {len(accepted)} of {len(ORDINARY)}"
        )
    assert len(ADVERSARIAL) >= 1000 and len(ORDINARY) >= 500
    assert bypasses == []
    assert [e["command"] for e in ORDINARY if e not in accepted] == []


def test_a_wider_policy_lets_no_adversarial_call_run_without_a_person() -> None:
    ran = [e for e in ADVERSARIAL if decide(web_services(), call_of(e), LexicalHost()).outcome == "allow"]
    assert ran == []


def test_each_technique_and_each_category_has_several_cases() -> None:
    techniques = [e["technique"] for e in ADVERSARIAL]
    categories = [e["category"] for e in ORDINARY]
    assert len(set(techniques)) >= 25 and min(techniques.count(t) for t in set(techniques)) >= 3
    assert len(set(categories)) >= 9 and min(categories.count(c) for c in set(categories)) >= 5


@pytest.mark.parametrize("entry", ADVERSARIAL[::7], ids=lambda e: e["technique"])
def test_each_refusal_says_why_and_never_echoes_control_characters(entry: dict[str, object]) -> None:
    decision = decide(observe_core(), call_of(entry), LexicalHost())
    assert decision.reason and decision.steps == ()
    assert (decision.reason + decision.hint).isprintable()
    assert len(decision.reason) < 700
