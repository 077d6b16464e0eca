"""Runbook files: the shipped ones are good, bad ones are refused with the exact place, requests in words find theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompts.text import read
from supervisor.runbooks import BadRunbook, UnknownRunbook, get, load_all, load_file, load_text, match
from tools.runbooks import Runbook, plan

GOOD = """\
name: tiny
title: Tiny
description: Only for tests.
parameters: {limit: 90}
steps:
  - {id: space, observer: disk_space, title: Space, ok: "{fullest.mount} at {fullest.used_percent}"}
checks:
  - id: full
    step: space
    for_each: filesystems
    key: mount
    when: {field: used_percent, op: ge, value: {parameter: limit}}
    severity: critical
    title: "{mount} is {used_percent} full"
"""


def test_the_shipped_runbooks_are_good_and_are_the_promised_ones() -> None:
    runbooks = load_all()
    assert set(runbooks) >= {"health", "disk", "memory", "services", "logs", "network", "time", "certificates"}
    for runbook in runbooks.values():
        assert plan(runbook)
        assert Runbook.from_json(runbook.to_json()) == runbook
        serious = [check for check in runbook.checks if check.severity in ("critical", "warning")]
        assert [check.id for check in serious if not check.suggestion] == []


def test_every_step_of_a_shipped_runbook_says_something_when_all_is_well() -> None:
    assert [(r.name, s.id) for r in load_all().values() for s in r.steps if not s.ok] == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "disk_space",
            "disk_spce",
            r"tiny.yaml:6:27: steps\[0\].observer: unknown observer 'disk_spce'; did you mean 'disk_space'",
        ),
        (
            "field: used_percent",
            "field: used_prcent",
            r"tiny.yaml:12:19: checks\[0\].when.field: unknown field 'used_prcent'; did you mean 'used_percent'",
        ),
        ("op: ge", "op: gte", r"tiny.yaml:12:37: checks\[0\].when.op: unknown comparison 'gte'; did you mean 'g[te]'"),
        ("parameter: limit", "parameter: limt", r"tiny.yaml:12:41: checks\[0\].when.value: .*did you mean 'limit'"),
        (
            "severity: critical",
            "severity: fatal",
            r"tiny.yaml:13:15: checks\[0\].severity: expected one of ok, info, warning, critical, got 'fatal'",
        ),
        (
            "step: space",
            "step: spce",
            r"tiny.yaml:9:11: checks\[0\].step: there is no step 'spce'; did you mean 'space'",
        ),
        ("for_each: filesystems", "for_each: fullest", r"tiny.yaml:10:15: .*expected a field that holds a list"),
        ("key: mount", "key: mont", r"tiny.yaml:11:10: .*did you mean 'mount'"),
        ("    key: mount\n", "", r"tiny.yaml:8:5: checks\[0\]: field 'key' is missing"),
        ("{mount} is", "{mont} is", r"unknown field \{mont\}; did you mean 'mount'"),
        ("{mount} is", "{mount is", r"a brace without its partner"),
        ("{mount} is", "{mount.__class__} is", r"unknown field"),
        ("{mount} is", "{fullest} is", r"is a group; name one of its fields"),
        ("title: Tiny", "titel: Tiny", r"tiny.yaml:2:8: titel: unknown field 'titel'; did you mean 'title'"),
        ("title: Tiny\n", "", r"tiny.yaml:1:1: runbook: field 'title' is missing"),
        ("title: Tiny", "title: [Tiny]", r"tiny.yaml:2:1: title: expected text, got list"),
        ("name: tiny", "name: Tiny One", r"tiny.yaml:1:7: name: expected a name of small letters"),
        ("name: tiny", "name: tiny\nname: other", r"tiny.yaml:2:1: the key 'name' is there twice"),
        ("limit: 90", "limit: {a: 1}", r"parameters.limit: expected a number"),
        ("value: {parameter: limit}", "value: much", r"ge needs a number, got 'much'"),
        (
            "title: Space,",
            "title: Space, parameters: {remote: 3},",
            r"tiny.yaml:6:.*parameter 'remote' must be true or false, got 3",
        ),
        ("steps:", "steps: []\nothers:", r"expected at least one step"),
        ("when: {field", "when: {fild", r"expected exactly field, op and value"),
        ("description: Only", "description: *only", r"tiny.yaml:3:14: this is no YAML: aliases are not allowed"),
        ("description: Only for tests.", "description: 'Only", r"tiny.yaml:\d+:\d+: this is no YAML"),
        (
            "description: Only for tests.",
            "description: !!python/object:os.system x",
            r"tiny.yaml:3:14: this is no YAML",
        ),
    ],
)
def test_a_mistake_is_refused_at_its_place_with_the_nearest_name(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    path = tmp_path / "tiny.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(BadRunbook, match=expected):
        load_file(path)


def test_every_mistake_of_a_file_is_told_at_once() -> None:
    with pytest.raises(BadRunbook) as told:
        load_text(GOOD.replace("op: ge", "op: gte").replace("key: mount", "key: mont").encode(), "x.yaml")
    assert len(told.value.problems) == 2


def test_words_like_yes_and_dates_stay_text() -> None:
    runbook = load_text(GOOD.replace("limit: 90", "limit: 90, word: yes, day: 2024-05-01").encode(), "x")
    assert runbook.parameters == {"limit": 90, "word": "yes", "day": "2024-05-01"}


@pytest.mark.parametrize(
    "raw", [b"", b"- a\n- b\n", b"\xff\xfe", b"\x00", b"a: b: c", b"[" * 5000, b"x" * 300_000, b"? {a: b} : c"]
)
def test_a_file_that_is_no_runbook_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRunbook, match=r"x\.yaml"):
        load_text(raw, "x.yaml")


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(GOOD)), text=st.text(max_size=12), drop=st.integers(0, 30))
def test_a_damaged_file_is_read_or_refused_and_nothing_else(at: int, text: str, drop: int) -> None:
    raw = (GOOD[:at] + text + GOOD[at + drop :]).encode("utf-8", "surrogatepass")
    try:
        assert load_text(raw, "x.yaml").steps
    except BadRunbook as problem:
        assert problem.problems


def test_added_directories_add_runbooks_and_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(GOOD)
    assert "tiny" in load_all([tmp_path])
    (tmp_path / "again.yaml").write_text(GOOD.replace("name: tiny", "name: disk"))
    with pytest.raises(BadRunbook, match=r"'disk' is already defined in prompts/runbooks/disk\.yaml"):
        load_all([tmp_path])
    with pytest.raises(BadRunbook, match="expected a directory with runbooks"):
        load_all([tmp_path / "nowhere"])


def test_an_unreadable_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(BadRunbook, match=r"gone\.yaml: cannot read the runbook"):
        load_file(tmp_path / "gone.yaml")


def test_an_unknown_runbook_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownRunbook, match="did you mean 'memory'"):
        get("memmory", load_all())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Is the disk full?", "disk"),
        ("check the health of web-01", "health"),
        ("Is everything ok?", "health"),
        ("why was mysqld killed? out of memory?", "memory"),
        ("when do our TLS certs expire", "certificates"),
        ("is the clock synchronised", "time"),
        ("show errors in the logs", "logs"),
        ("nginx.service has failed", "services"),
        ("DNS is slow", "network"),
        ("check disk and memory", "health"),
        ("check the disk", "disk"),
        ("Ist die Platte voll?", "disk"),
        ("sing a song", None),
        ("", None),
        ("diskette", None),
    ],
)
def test_a_request_in_words_means_its_runbook(text: str, name: str | None) -> None:
    assert match(text, load_all()) == name


RUNBOOKS = load_all()


@given(st.text(max_size=200))
def test_matching_never_raises(text: str) -> None:
    assert match(text, RUNBOOKS) in {None, *RUNBOOKS}


def test_the_text_for_the_worker_is_there_and_an_unknown_one_is_refused() -> None:
    assert "call id" in read("worker")
    with pytest.raises(LookupError, match="worker"):
        read("nothing")
    with pytest.raises(LookupError):
        read("../runbooks/health")
