"""The polkit rule grants exactly the units of the policy, to exactly one user."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadlets.polkit import VERBS, BadGrant, polkit_rule


def test_no_grants_make_no_rule() -> None:
    assert polkit_rule({}) is None
    assert polkit_rule({"nginx.service": ()}) is None


def test_the_rule_names_user_units_and_verbs() -> None:
    rule = polkit_rule({"nginx.service": ("restart", "reload"), "app-*": ("restart",)}, user="edge")
    assert rule is not None
    table = json.loads(re.search(r"chargehandGrants = (\{.*?\});", rule, re.DOTALL)[1])  # type: ignore[index]
    assert table == {"nginx.service": ["reload", "restart"], "app-*": ["restart"]}
    assert 'subject.user !== "edge"' in rule


@pytest.mark.parametrize(
    ("unit", "verbs", "user"),
    [
        ("nginx", ("restart",), "chargehand"),
        ("*", ("restart",), "chargehand"),
        ("a*", ("restart",), "chargehand"),
        ("*.service", ("restart",), "chargehand"),
        ("nginx.service", ("enable",), "chargehand"),
        ("nginx.service", ("*",), "chargehand"),
        ('x".service', ("restart",), "chargehand"),
        ("a b.service", ("restart",), "chargehand"),
        ("nginx.service\n", ("restart",), "chargehand"),
        ("nginx.service", ("restart",), 'root" || true || "'),
        ("nginx.service", ("restart",), ""),
    ],
)
def test_what_cannot_be_granted_is_refused(unit: str, verbs: tuple[str, ...], user: str) -> None:
    with pytest.raises(BadGrant, match="cannot grant"):
        polkit_rule({unit: verbs}, user)


@given(st.dictionaries(st.text(max_size=40), st.lists(st.sampled_from(VERBS), min_size=1), max_size=4))
def test_no_unit_name_leaves_its_place_in_the_rule(grants: dict[str, list[str]]) -> None:
    try:
        rule = polkit_rule(grants)
    except BadGrant:
        return
    if rule is None:
        assert not grants
        return
    found = re.search(r"chargehandGrants = (\{.*?\n\});", rule, re.DOTALL)
    assert found
    assert json.loads(found[1]) == {unit: sorted(set(verbs)) for unit, verbs in grants.items()}


NODE = shutil.which("node") or shutil.which("nodejs")
HARNESS = """
var polkit = {Result: {YES: "yes", NO: "no", NOT_HANDLED: "not handled"}, rules: [], addRule: function (r) { this.rules.push(r); }};
%s
var asked = %s;
console.log(JSON.stringify(asked.map(function (a) {
    return polkit.rules[0]({id: a[0], lookup: function (k) { return a[2][k]; }}, {user: a[1]});
})));
"""


@pytest.mark.skipif(NODE is None, reason="no JavaScript interpreter to run the rule in")
def test_the_rule_decides_as_meant() -> None:
    manage = "org.freedesktop.systemd1.manage-units"
    cases: list[tuple[str, str, dict[str, str], str]] = [
        (manage, "chargehand", {"unit": "nginx.service", "verb": "restart"}, "yes"),
        (manage, "chargehand", {"unit": "nginx.service", "verb": "stop"}, "no"),
        (manage, "chargehand", {"unit": "sshd.service", "verb": "restart"}, "no"),
        (manage, "chargehand", {"unit": "app-7.service", "verb": "restart"}, "yes"),
        (manage, "chargehand", {"unit": "ap.service", "verb": "restart"}, "no"),
        (manage, "chargehand", {"unit": "app-*", "verb": "stop"}, "no"),
        (manage, "chargehand", {"unit": "toString", "verb": "restart"}, "no"),
        (manage, "chargehand", {}, "no"),
        (manage, "root", {"unit": "sshd.service", "verb": "stop"}, "not handled"),
        ("org.freedesktop.systemd1.manage-unit-files", "chargehand", {}, "no"),
        ("org.freedesktop.login1.power-off", "chargehand", {}, "not handled"),
    ]
    rule = polkit_rule({"nginx.service": ("restart",), "app-*": ("restart",)})
    assert NODE is not None
    script = HARNESS % (rule, json.dumps([case[:3] for case in cases]))
    done = subprocess.run([NODE, "-e", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [case[3] for case in cases]
