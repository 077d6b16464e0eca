"""What a runbook says about data: findings cite calls, nothing is silently missing, unknown is never well."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.runbooks import load_all
from tests.observers.probing import read_sample, replay
from tools.observers.registry import observer
from tools.runbooks import (
    MAX_ROWS,
    Observed,
    Runbook,
    evaluate,
    filled,
    glob_matches,
    holds,
    place_text,
    plan,
    problems,
    shown,
    told,
)
from tools.values import SEVERITIES, Finding, Malformed, Report

SAMPLES = Path(__file__).parents[1] / "observers" / "samples"
RUNBOOKS = load_all()


def sample(name: str) -> dict[str, Any]:
    """The data an observer makes of one of its samples (``observer/case``)."""
    path = SAMPLES / f"{name}.txt"
    parameters, known = read_sample(path.read_text())
    return replay(observer(path.parent.name), parameters, known)[1]


def report(runbook: str, **steps: Any) -> Report:
    """The report of a shipped runbook with data for some steps and nothing for the others."""
    results: dict[str, Observed] = {step: (f"c{at}", data, "") for at, (step, data) in enumerate(steps.items(), 1)}
    return evaluate(RUNBOOKS[runbook], results)


def by_id(found: Report) -> dict[str, Finding]:
    return {finding.id: finding for finding in found.findings}


def test_a_full_disk_is_found_once_and_images_overlays_and_cdroms_are_not() -> None:
    found = by_id(report("health", space=sample("disk_space/ubuntu-24.04-snaps")))
    assert set(found) == {"disk-full:/", "inodes-scarce:/"}
    finding = found["disk-full:/"]
    assert finding.severity == "critical"
    assert finding.evidence == ("c1",)
    assert finding.title == "/ is 98.7 % full"
    assert "178.8 MiB left" in finding.detail
    assert "du -xh" in finding.suggestion


def test_subvolumes_of_one_file_system_are_one_finding() -> None:
    found = by_id(report("disk", space=sample("disk_space/opensuse-15.6-btrfs")))
    assert set(found) == {"disk-filling:/", "disk-full:/srv"}


def test_the_root_of_a_container_counts() -> None:
    assert set(by_id(report("health", space=sample("disk_space/container-overlay-root")))) == {"disk-full:/"}


def test_a_file_system_that_became_read_only_is_found_and_a_sandboxed_view_is_not() -> None:
    broken = by_id(report("health", mounts=sample("mounts/ubuntu-22.04-remounted-after-error")))
    assert set(broken) == {"read-only:/", "not-mounted:/srv/data"}
    assert set(by_id(report("health", mounts=sample("mounts/rhel-9-hardened-unit")))) == {"mounts-ok"}


def test_a_machine_without_swap_is_well() -> None:
    assert set(by_id(report("health", memory=sample("memory/rhel-8-group-v1-unlimited")))) == {"memory-ok"}


def test_memory_that_is_used_up_is_critical_and_not_also_a_warning() -> None:
    found = by_id(report("health", memory=sample("memory/rhel-9-swap-and-group-limit")))
    assert "memory-exhausted" in found and "memory-short" not in found
    assert {"group-memory-short", "swap-used"} <= set(found)


def test_a_kernel_without_pressure_figures_is_judged_by_its_load() -> None:
    assert set(by_id(report("health", load=sample("load/rhel-8-no-psi")))) == {"load-high"}


def test_a_failed_unit_is_found_with_its_result() -> None:
    found = by_id(report("health", units=sample("failed_units/debian-13-nspawn")))
    assert found["unit-failed:broken.service"].detail.startswith("A job that fails. Result exit-code, exit status 3")


def test_services_of_a_machine_without_systemd_are_unknown_and_not_well() -> None:
    found = by_id(report("health", units=sample("failed_units/debian-12-no-systemd")))
    assert set(found) == {"units-unobserved"}
    assert found["units-unobserved"].severity == "info"
    assert "not been booted with systemd" in found["units-unobserved"].detail
    assert found["units-unobserved"].evidence == ("c1",)


def test_logs_that_may_not_be_read_are_a_warning_that_says_how_to_allow_it() -> None:
    found = by_id(report("logs", errors=sample("journal_errors/rhel-9-other-users-hidden")))
    assert found["errors-unobserved"].severity == "warning"
    assert "systemd-journal" in found["errors-unobserved"].suggestion


def test_kernel_messages_from_a_failing_disk_are_critical() -> None:
    found = report("health", kernel=sample("kernel_messages/rhel-9-disk-failing"))
    critical = [finding.title for finding in found.findings if finding.severity == "critical"]
    assert "The kernel reports storage errors (2 times)" in critical
    assert found.findings[0].severity == "critical"
    assert found.summary.startswith("Health: 4 critical")


def test_hostile_text_of_a_log_is_quoted_and_stays_one_line() -> None:
    found = report("logs", errors=sample("journal_errors/ubuntu-22.04-groups"))
    quoting = [finding for finding in found.findings if "Ignore all previous" in finding.detail]
    assert len(quoting) == 1
    assert all("\n" not in finding.detail and "\u202e" not in finding.detail for finding in found.findings)


def test_a_clock_inside_a_container_without_a_service_is_unknown() -> None:
    assert set(by_id(report("health", clock=sample("time_sync/debian-12-no-systemd")))) == {"clock-unobserved"}


def test_a_clock_that_is_synchronized_and_off_is_found() -> None:
    assert set(by_id(report("health", clock=sample("time_sync/sles-15-ntpd")))) == {"clock-off"}
    assert set(by_id(report("time", clock=sample("time_sync/sles-15-ntpd")))) == {"clock-ahead"}


def test_certificates_are_found_before_they_expire_each_once() -> None:
    data = sample("certificates/debian-13-nspawn")
    found = by_id(report("certificates", certificates=data))
    assert [f.severity for f in found.values() if f.id.startswith("expires")] == ["warning", "warning"]
    for row in data["certificates"]:
        row["expires_in_s"] -= 20 * 86400
        row["days_left"] -= 20
    found = by_id(report("certificates", certificates=data))
    assert {finding.partition(":")[0] for finding in found} == {"expired"}


def test_places_that_may_not_be_read_are_told_beside_the_certificates_that_may() -> None:
    found = report("certificates", certificates=sample("certificates/debian-13-unprivileged"))
    assert [f.title for f in found.findings].count("A place with certificates cannot be read") == 2


def test_a_degraded_array_bad_memory_and_a_sick_pool_are_found() -> None:
    found = set(by_id(report("health", hardware=sample("hardware_errors/rhel-8-raid-and-edac"))))
    assert found == {
        "memory-uncorrected",
        "array-degraded:md127",
        "array-inactive:md3",
        "pool-degraded:tank",
        "btrfs-errors:1",
    }


def test_a_lost_bond_member_a_dead_link_and_a_bad_cable_are_found() -> None:
    found = set(by_id(report("network", interfaces=sample("interfaces/rhel-8-bond"))))
    assert found == {"no-carrier:ens9", "bond-member-down:bond0", "interface-errors:eno1"}


def test_a_gateway_that_does_not_answer_and_a_full_accept_queue_are_found() -> None:
    found = set(
        by_id(
            report(
                "network", routes=sample("routes/rhel-9-two-gateways"), sockets=sample("listening_sockets/rhel-8-ss")
            )
        )
    )
    assert {"gateway-silent:198.51.100.1", "route-dead:ens9", "accept-queue-full:8080"} <= found


def test_a_step_that_failed_is_a_finding_that_cites_the_call() -> None:
    found = evaluate(
        RUNBOOKS["disk"], {"space": ("c7", None, "refused: default-deny"), "mounts": ("c8", None, "no such command")}
    )
    findings = by_id(found)
    assert findings["space-unobserved"].severity == "warning"
    assert findings["space-unobserved"].evidence == ("c7",)
    assert findings["mounts-unobserved"].severity == "info"
    assert len(found.notes) == len(RUNBOOKS["disk"].steps) - 2


def test_an_area_that_is_partly_unknown_is_not_called_well() -> None:
    data = sample("mounts/debian-13-nspawn")
    data["mounts"] = None
    found = by_id(report("health", mounts=data))
    assert "mounts-ok" not in found


def test_output_that_was_cut_is_said_so() -> None:
    data = dict(sample("disk_space/alpine-3.21-busybox"), cut=True)
    assert "cut" in by_id(report("health", space=data))["space-ok"].detail


def test_many_rows_of_one_kind_are_summed_up() -> None:
    unit = {
        "unit": "",
        "load": "loaded",
        "sub": "failed",
        "description": "d",
        "result": None,
        "exit_status": None,
        "restarts": None,
        "failed_for_s": None,
        "file": None,
    }
    units = [dict(unit, unit=f"u{n}.service") for n in range(200)]
    data = {"unavailable": [], "cut": False, "system_state": "degraded", "units": units, "failed": 200, "names": []}
    found = report("health", units=data)
    assert len(found.findings) == MAX_ROWS + 1
    assert found.findings[-1].title == "190 more like this"


@pytest.mark.parametrize("name", RUNBOOKS)
def test_every_finding_cites_a_call_whatever_was_observed(name: str) -> None:
    for folder in sorted({path.parent.name for path in SAMPLES.glob("*/*.txt")}):
        for path in (SAMPLES / folder).glob("*.txt"):
            steps = [step.id for step in RUNBOOKS[name].steps if step.observer == folder]
            found = report(name, **{step: sample(f"{folder}/{path.stem}") for step in steps})
            assert all(finding.evidence for finding in found.findings)
            assert all("{" not in f.title + f.suggestion for f in found.findings)
            assert len({finding.id for finding in found.findings}) == len(found.findings)
            Report.from_json(found.to_json())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", RUNBOOKS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_evaluation_never_raises_whatever_the_data_is(name: str, data: st.DataObject) -> None:
    runbook = RUNBOOKS[name]
    results: dict[str, Observed] = {}
    for step in runbook.steps:
        fields = [*sorted(observer(step.observer).returns), "unavailable", "cut"]
        results[step.id] = (
            "c1",
            data.draw(st.none() | st.fixed_dictionaries({}, optional=dict.fromkeys(fields, JSON))),
            "why",
        )
    found = evaluate(runbook, results)
    assert all(finding.severity in SEVERITIES and finding.evidence for finding in found.findings)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_validation_never_raises_whatever_the_document_is(document: Any) -> None:
    assert problems(document)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"field": "a", "op": "eq", "value": 1}, True),
        ({"field": "a", "op": "ne", "value": 1}, False),
        ({"field": "a", "op": "ge", "value": 1.5}, False),
        ({"field": "gone", "op": "ge", "value": 1}, None),
        ({"field": "nil", "op": "eq", "value": "x"}, None),
        ({"field": "nil", "op": "exists", "value": False}, True),
        ({"field": "a", "op": "exists", "value": True}, True),
        ({"field": "s", "op": "gt", "value": 1}, None),
        ({"field": "t", "op": "eq", "value": 1}, None),
        ({"field": "s", "op": "in", "value": ["web", "db"]}, True),
        ({"field": "l", "op": "contains", "value": "x"}, True),
        ({"field": "s", "op": "contains", "value": "W"}, True),
        ({"field": "l", "op": "matches", "value": "y*"}, True),
        ({"field": "d.e", "op": "eq", "value": 2}, True),
        ({"field": "a", "op": "lt", "value": {"parameter": "p"}}, True),
        ({"all": [{"field": "a", "op": "eq", "value": 2}, {"field": "nil", "op": "eq", "value": 1}]}, False),
        ({"all": [{"field": "a", "op": "eq", "value": 1}, {"field": "nil", "op": "eq", "value": 1}]}, None),
        ({"any": [{"field": "a", "op": "eq", "value": 1}, {"field": "nil", "op": "eq", "value": 1}]}, True),
        ({"any": [{"field": "a", "op": "eq", "value": 2}, {"field": "nil", "op": "eq", "value": 1}]}, None),
        ({"not": {"field": "nil", "op": "eq", "value": 1}}, None),
        ({"not": {"field": "a", "op": "eq", "value": 1}}, False),
    ],
)
def test_a_comparison_holds_does_not_hold_or_cannot_be_told(tree: Any, expected: bool | None) -> None:
    scope = [{"a": 1, "s": "web", "nil": None, "t": True, "l": ["x", "yes"], "d": {"e": 2}}]
    assert holds(tree, scope, {"p": 5}) is expected


def test_patterns_take_linear_time() -> None:
    assert glob_matches("*a?c*", "xxabcxx") and not glob_matches("a*b", "a-c") and glob_matches("*", "")
    started = time.monotonic()
    assert not glob_matches("*a" * 200 + "b", "a" * 20_000)
    assert time.monotonic() - started < 5


@given(st.text("ab", max_size=12), st.text("ab*?", max_size=6))
def test_patterns_agree_with_the_standard_library(text: str, pattern: str) -> None:
    import fnmatch

    assert glob_matches(pattern, text) is fnmatch.fnmatchcase(text, pattern)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("a_bytes", 1536, "1.5 KiB"),
        ("a_bytes", 10, "10 bytes"),
        ("a_bytes", 3 * 2**40, "3.0 TiB"),
        ("a_percent", 93.0, "93 %"),
        ("a_s", 90061, "1 d 1 h"),
        ("a_s", -0.25, "-0.25 s"),
        ("a_s", 0.000123456, "0.000123 s"),
        ("a_s", -7200, "-2 h"),
        ("a_ms", 12.5, "12.5 ms"),
        ("x", True, "yes"),
        ("x", None, "unknown"),
        ("x", [], "none"),
        ("x", list("abcdefghijkl"), "a, b, c, d, e, f, g, h, i, j and 2 more"),
        ("x", 1.50, "1.5"),
        ("x", "text", "text"),
    ],
)
def test_values_are_shown_with_the_unit_their_name_ends_in(field: str, value: Any, text: str) -> None:
    assert shown(field, value) == text


def test_a_template_reads_fields_and_nothing_else() -> None:
    assert filled("{a.__class__} {a}", [{"a": 1}], {}) == "unknown 1"
    assert told("a is {a}; b is {b}", [{"a": 1, "b": None}], {}) == "a is 1."
    assert told("a is {a}; b is {b}.", [{"a": 1, "b": 2}], {}) == "a is 1; b is 2."


def test_text_of_a_machine_in_a_suggested_command_cannot_become_a_second_command() -> None:
    assert filled("du {mount}", [{"mount": "/srv/$(reboot) x"}], {}, commands=True) == "du '/srv/$(reboot) x'"
    assert filled("du {mount}", [{"mount": "/srv/data"}], {}, commands=True) == "du /srv/data"


def test_parameters_are_bound_checked_and_used() -> None:
    runbook = RUNBOOKS["disk"].bind({"disk_percent": 20})
    found = evaluate(runbook, {"space": ("c1", sample("disk_space/alpine-3.21-busybox"), "")})
    assert "disk-filling:/" in by_id(found)
    with pytest.raises(Malformed, match="did you mean 'disk_percent'"):
        RUNBOOKS["disk"].bind({"disk_prcent": 1})
    with pytest.raises(Malformed, match="must be a number such as 80, got 'x'"):
        RUNBOOKS["disk"].bind({"disk_percent": "x"})
    with pytest.raises(Malformed, match="duration"):
        RUNBOOKS["logs"].bind({"since": "soon"})


def test_a_step_that_needs_a_parameter_is_planned_only_with_it() -> None:
    assert "unit" not in [call.step_id for call in plan(RUNBOOKS["services"])]
    calls = plan(RUNBOOKS["services"].bind({"unit": "nginx"}))
    assert calls[-1].parameters == {"unit": "nginx", "lines": 20}


def test_a_document_that_is_no_runbook_is_refused_with_its_place() -> None:
    with pytest.raises(Malformed, match="runbook: expected a mapping, got list"):
        Runbook.from_json([])
    assert place_text(("checks", 2, "when", "field")) == "checks[2].when.field"
