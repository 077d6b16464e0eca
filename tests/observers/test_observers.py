"""Parameters, phases, the account of what could not be read, and the parsers on anything a machine may say."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.observers.probing import observe, read_sample, replay
from tools.observers import der
from tools.observers.journal import shape, topic_of
from tools.observers.observer import (
    MAX_PHASES,
    MAX_PROBES,
    BadParameters,
    Observer,
    Probe,
    Readings,
    UnknownObserver,
    clean,
    command,
    file,
    seconds_of,
)
from tools.observers.registry import OBSERVERS, observer
from tools.observers.software import kernel_order
from tools.values import StepResult, canonical

SAMPLES = sorted((Path(__file__).parent / "samples").glob("*/*.txt"))
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
REQUIRED = {"unit_status": {"unit": "nginx"}}


def test_an_unknown_observer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownObserver, match="did you mean 'disk_space'"):
        observer("disk_spac")


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("unit_status", {}, "needs parameter 'unit'"),
        ("unit_status", {"unit": "-h"}, "name of a systemd unit"),
        ("unit_status", {"unit": "a b"}, "name of a systemd unit"),
        ("unit_status", {"unit": "nginx", "lines": 101}, "whole number from 0 to 100, got 101"),
        ("unit_status", {"unit": "nginx", "lines": True}, "whole number"),
        ("top_processes", {"by": "disk"}, "one of cpu, memory, got 'disk'"),
        ("top_processes", {"bye": "cpu"}, "did you mean 'by'"),
        ("journal_errors", {"since": "yesterday"}, "duration such as"),
        ("journal_errors", {"since": "999d"}, "at most"),
        ("journal_errors", {"since": "1h\n"}, "duration such as"),
        ("name_resolution", {"name": "-x"}, "a host name"),
        ("name_resolution", {"name": "a" * 254}, "a host name"),
        ("certificates", {"roots": ["etc/ssl"]}, "absolute paths"),
        ("certificates", {"roots": ["/etc/../root"]}, "absolute paths"),
        ("certificates", {"roots": ["/a b"]}, "absolute paths"),
        ("certificates", {"roots": []}, "absolute paths"),
        ("certificates", {"roots": ["/x"] * 21}, "absolute paths"),
        ("disk_space", {"remote": 1}, "true or false"),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused_and_named(
    name: str, parameters: dict[str, Any], expected: str
) -> None:
    with pytest.raises(BadParameters, match=expected):
        observer(name).probes(parameters)


def test_a_unit_without_a_type_is_a_service_and_one_with_a_type_stays() -> None:
    one = observer("unit_status")
    assert one.validate({"unit": "nginx"})["unit"] == "nginx.service"
    assert one.validate({"unit": "a.timer"})["unit"] == "a.timer"
    assert one.validate({"unit": "user@1000.service"})["unit"] == "user@1000.service"
    assert one.validate({"unit": "my.app"})["unit"] == "my.app.service"


@pytest.mark.parametrize("name", OBSERVERS)
def test_the_schema_of_an_observer_is_closed_and_its_defaults_fit(name: str) -> None:
    one = OBSERVERS[name]
    schema = one.schema()
    assert schema["additionalProperties"] is False
    json.dumps(schema)
    for parameter in one.parameters:
        if parameter.default is not None:
            assert parameter.check(parameter.default) == parameter.default
            assert "default" in schema["properties"][parameter.name]
        assert schema["properties"][parameter.name]["description"]


@pytest.mark.parametrize("name", OBSERVERS)
def test_probes_are_one_command_by_plain_name_or_one_absolute_path(name: str) -> None:
    probes = OBSERVERS[name].probes(REQUIRED.get(name, {}))
    assert probes and len({probe.name for probe in probes}) == len(probes)
    for probe in probes:
        assert bool(probe.argv) != bool(probe.path)
        if probe.argv:
            assert "/" not in probe.argv[0]
            assert all(word and "\n" not in word for word in probe.argv)
        else:
            assert probe.path.startswith("/")


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_machine_that_answers_nothing_gives_nulls_and_reasons_and_no_invented_value(name: str) -> None:
    parameters = REQUIRED.get(name, {})
    one = OBSERVERS[name]
    results: list[StepResult] = []
    probes = one.probes(parameters)
    while probes:
        results += [StepResult(error="permission denied") for _ in probes]
        probes = one.next_probes(results, parameters)
    data = one.parse(results, parameters)
    assert data["unavailable"]
    told = {"since", "priority", "unit", "unavailable", "cut", "reasons", "packages"}
    assert {key: value for key, value in data.items() if value not in (None, []) and key not in told} == {}
    assert one.parse([], parameters)["cut"] is False


@pytest.mark.parametrize("name", OBSERVERS)
def test_every_observer_answers_on_this_very_machine(name: str) -> None:
    if name == "top_processes":
        parameters: dict[str, Any] = {"by": "memory"}
    else:
        parameters = REQUIRED.get(name, {})
    asked, _, data = observe(OBSERVERS[name], parameters)
    assert len(asked) <= MAX_PROBES
    canonical(data)


def _loud(probe: Probe) -> StepResult:
    return StepResult(
        argv=(probe.argv,) if probe.argv else (), path=probe.path or None, exit_status=0, exit_statuses=(0,)
    )


@st.composite
def outputs(draw: st.DrawFn) -> str:
    """Arbitrary text, or a sample's text with pieces replaced: what is nearly right finds more than noise."""
    if draw(st.booleans()):
        return draw(st.text(max_size=400))
    _, known = read_sample(draw(st.sampled_from(SAMPLES)).read_text())
    text = draw(st.sampled_from([result.stdout for result in known.values()] or [""]))[:3000]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(text))))
        text = text[:at] + draw(st.text(max_size=8)) + text[at + draw(st.integers(0, 20)) :]
    return text


@pytest.mark.parametrize("name", OBSERVERS)
@QUICK
@given(texts=st.lists(outputs(), min_size=1, max_size=6), status=st.sampled_from([0, 0, 0, 1, 2, 100, 127, None]))
def test_no_parser_raises_on_whatever_a_machine_prints(name: str, texts: list[str], status: int | None) -> None:
    one = OBSERVERS[name]
    parameters = REQUIRED.get(name, {})
    results: list[StepResult] = []
    phases = 0
    probes = one.probes(parameters)
    while probes:
        phases += 1
        for at, probe in enumerate(probes):
            text = texts[(len(results) + at) % len(texts)]
            results.append(
                dataclasses.replace(
                    _loud(probe), stdout=text, stderr=text[:200], exit_status=0 if probe.path else status
                )
            )
        probes = one.next_probes(results, parameters)
    assert phases <= MAX_PHASES and len(results) <= MAX_PROBES
    data = one.parse(results, parameters)
    canonical(data)
    assert "\x1b" not in json.dumps(data, ensure_ascii=False)


def _strangers(part: Any, whole: Any) -> list[Any]:
    """Rows of ``part`` that no row of ``whole`` agrees with; a field that became unknown (null) agrees with any."""
    found = []
    for key, value in part.items():
        if not isinstance(value, list) or key in ("unavailable", "reasons", "names", "processes"):
            continue
        for row in value:
            fields = (
                {name: inner for name, inner in row.items() if inner is not None} if isinstance(row, dict) else None
            )
            if row in (whole[key] or ()) or (
                fields is not None and any(fields.items() <= other.items() for other in whole[key] or ())
            ):
                continue
            found.append((key, row))
    return found


# Observers whose rows stand for one line each; in others a row sums up several, and of fewer lines says less.
LINEWISE = [
    path
    for path in SAMPLES
    if path.parent.name in ("listening_sockets", "users_logged_in", "updates", "uptime", "routes", "oom_kills")
    # More updates than are listed: with fewer of them others are listed.
    and path.stem != "debian-12-no-systemd"
]


@pytest.mark.parametrize("path", LINEWISE, ids=lambda path: f"{path.parent.name}/{path.stem}")
@QUICK
@given(data=st.data())
def test_output_cut_at_any_byte_gives_no_row_that_the_whole_output_does_not(path: Path, data: st.DataObject) -> None:
    one = observer(path.parent.name)
    parameters, known = read_sample(path.read_text())
    _, whole = replay(one, parameters, known)
    label = data.draw(st.sampled_from(sorted(known)))
    raw = known[label].stdout.encode()
    at = data.draw(st.integers(0, len(raw)))
    short = dataclasses.replace(known[label], stdout=raw[:at].decode("utf-8", "replace"), cut=True)
    _, part = replay(one, parameters, {**known, label: short})
    # Another source may be asked when the first one says nothing at all; then its rows are its own.
    if short.stdout.strip() and "\n" in short.stdout and not short.stdout.startswith(("[", "{")):
        assert _strangers(part, whole) == []


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_output_cut_at_any_byte_never_raises_and_says_that_it_was_cut(path: Path, data: st.DataObject) -> None:
    one = observer(path.parent.name)
    parameters, known = read_sample(path.read_text())
    label = data.draw(st.sampled_from(sorted(known)))
    at = data.draw(st.integers(0, len(known[label].stdout)))
    short = dataclasses.replace(known[label], stdout=known[label].stdout[:at], cut=True)
    results, part = replay(one, parameters, {**known, label: short})
    canonical(part)
    assert len(results) <= MAX_PROBES


def test_rows_of_a_cut_listing_are_those_of_its_complete_lines() -> None:
    path = Path(__file__).parent / "samples/disk_space/ubuntu-24.04-snaps.txt"
    parameters, known = read_sample(path.read_text())
    label = "df -l -P -T -k"
    lines = known[label].stdout.splitlines(keepends=True)
    cut = "".join(lines[:3]) + lines[3][:-4]
    _, data = replay(
        observer("disk_space"), parameters, {**known, label: dataclasses.replace(known[label], stdout=cut, cut=True)}
    )
    assert [row["mount"] for row in data["filesystems"]] == ["/run", "/"]
    assert data["cut"] is True


def test_an_optional_probe_that_is_missing_is_ordinary_and_one_that_is_denied_is_not() -> None:
    probe = file("x", "/proc/mdstat", optional=True)
    missing = StepResult(path="/proc/mdstat", error="/proc/mdstat: No such file or directory")
    assert Readings([(probe, missing)]).account()["unavailable"] == []
    denied = Readings([(probe, StepResult(path="/proc/mdstat", error="Permission denied"))]).account()
    assert denied["unavailable"] == [{"probe": "/proc/mdstat", "reason": "Permission denied"}]
    absent = StepResult(error="chronyc is not on this machine (or was replaced since the run began)")
    assert Readings([(command("c", "chronyc", "tracking", optional=True), absent)]).account()["unavailable"] == []


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (StepResult(exit_status=2, exit_statuses=(2,), stderr="df: boom\nmore"), "exit status 2: df: boom"),
        (StepResult(exit_status=None, signal=9), "ended by signal 9"),
        (StepResult(timed_out=True, duration_ms=30000.0), "timed out after 30.0 s"),
        (StepResult(cancelled=True), "cancelled"),
        (
            StepResult(exit_status=1, exit_statuses=(1,), stderr="\x1b[31mred\x1b[0m"),
            r"exit status 1: \x1b[31mred\x1b[0m",
        ),
    ],
)
def test_the_reason_says_what_came(result: StepResult, reason: str) -> None:
    assert Readings([(command("d", "df"), result)]).account()["unavailable"] == [{"probe": "df", "reason": reason}]


def test_partial_output_counts_beside_its_reason_and_only_where_the_probe_says_so() -> None:
    result = StepResult(exit_status=1, exit_statuses=(1,), stdout="row\n", stderr="denied")
    assert Readings([(command("d", "df", partial=True), result)]).lines("d") == ["row"]
    assert Readings([(command("d", "df"), result)]).lines("d") is None


def test_a_storm_of_denials_is_summed_up() -> None:
    denied = StepResult(error="denied")
    account = Readings([(file(str(n), f"/x/{n}"), denied) for n in range(60)]).account()
    assert len(account["unavailable"]) == 21
    assert account["unavailable"][-1]["reason"] == "40 more probes gave nothing"


def test_an_observer_that_never_has_enough_is_stopped_at_its_limits() -> None:
    def more(readings: Readings, parameters: Any) -> list[Probe]:
        return [command(f"p{len(readings.names())}-{n}", "true") for n in range(30)]

    greedy = Observer("greedy", "", {}, first=lambda p: [command("a", "true")], read=lambda r, p: {}, further=more)
    results: list[StepResult] = []
    probes, phases = greedy.probes(), 0
    while probes:
        phases += 1
        results += [StepResult(exit_status=0)] * len(probes)
        probes = greedy.next_probes(results)
    assert phases == MAX_PHASES
    assert len(results) <= MAX_PROBES


def test_text_of_a_machine_becomes_one_harmless_line() -> None:
    assert clean("a\x1b[2J\nb\t\u202ec\ud800") == r"a\x1b[2J b \x202ec\xd800"
    assert clean("x" * 500, 10) == "x" * 9 + "…"


@given(st.text())
def test_cleaned_text_holds_no_control_character(text: str) -> None:
    assert all(character.isprintable() or character == " " or ord(character) > 0xA0 for character in clean(text))


def test_durations_are_whole_numbers_with_a_unit() -> None:
    assert (seconds_of("90min"), seconds_of("7d")) == (5400, 604800)
    with pytest.raises(BadParameters):
        seconds_of("1.5h")


def test_messages_that_differ_in_numbers_have_one_shape() -> None:
    assert shape("a 10.0.0.5:80 took 0xdeadbeef") == shape("a 10.0.0.7:443 took 0xcafe")


@pytest.mark.parametrize(
    ("message", "topic"),
    [
        ("EXT4-fs (sda1): Remounting filesystem read-only", "storage"),
        ("XFS (dm-0): Metadata I/O Error (0x1) detected", "storage"),
        ("nvme nvme0: I/O 12 QID 4 timeout, aborting", "storage"),
        ("watchdog: BUG: soft lockup - CPU#1 stuck for 22s!", "hang"),
        ("rcu: INFO: rcu_sched self-detected stall on CPU", "hang"),
        ("nginx[77]: segfault at 0 ip 0 sp 0 error 4", "crash"),
        ("CPU0: Package temperature above threshold, cpu clock throttled", "processor"),
        ("Out of memory: Killed process 1 (x)", "out-of-memory"),
        ("bond0: (slave eno2): link status definitely down, disabling slave", "network"),
        ("usb 1-1: new high-speed USB device", "other"),
    ],
)
def test_kernel_messages_are_sorted_by_what_they_are_about(message: str, topic: str) -> None:
    assert topic_of(message) == topic


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("6.1.0-18-amd64", ((6, 1, 0, 18), "amd64")),
        ("6.8.0-31-generic", ((6, 8, 0, 31), "generic")),
        ("5.14.0-427.13.1.el9_4.x86_64", ((5, 14, 0, 427, 13, 1), "x86_64")),
        ("5.14.21-150500.55.62-default", ((5, 14, 21, 150500, 55, 62), "default")),
        ("rescue-0123", None),
        ("6", None),
    ],
)
def test_kernel_releases_are_compared_within_their_flavour(release: str, expected: Any) -> None:
    assert kernel_order(release) == expected


@given(st.binary(max_size=300))
def test_the_certificate_reader_refuses_whatever_is_no_certificate(data: bytes) -> None:
    with pytest.raises(der.BadCertificate):
        der.read_certificate(data)


def _certificate_bytes() -> bytes:
    import base64

    text = (Path(__file__).parent / "samples/certificates/debian-13-nspawn.txt").read_text()
    body = text.partition("-----BEGIN CERTIFICATE-----")[2].partition("-----END")[0]
    return base64.b64decode("".join(body.split()))


@QUICK
@given(at=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_a_damaged_certificate_is_read_or_refused_and_nothing_else(at: int, value: int, cut: int) -> None:
    raw = bytearray(_certificate_bytes())
    raw[at % len(raw)] = value
    try:
        der.read_certificate(bytes(raw[: 1 + cut % len(raw)]))
    except der.BadCertificate as problem:
        assert str(problem)


def test_a_certificate_is_read_as_another_implementation_reads_it() -> None:
    x509 = pytest.importorskip("cryptography.x509")
    raw = _certificate_bytes()
    mine, other = der.read_certificate(raw), x509.load_der_x509_certificate(raw)
    assert mine.not_after == int(other.not_valid_after_utc.timestamp())
    assert mine.not_before == int(other.not_valid_before_utc.timestamp())
    assert f"CN={other.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value}" in mine.subject


def test_a_private_key_is_never_asked_for() -> None:
    path = Path(__file__).parent / "samples/certificates/debian-13-nspawn.txt"
    parameters, known = read_sample(path.read_text())
    one = observer("certificates")
    results, _ = replay(one, parameters, known)
    labels = [known_label for known_label in known if known_label.endswith("bundle.pem")]
    assert any(label.startswith("openssl x509") for label in labels)
    assert "/etc/nginx/tls/bundle.pem" not in known
    assert all("PRIVATE KEY-----" not in result.stdout for result in results)


TOOLS = Path(__file__).parents[2] / "tools"
SOURCES = [*sorted((TOOLS / "observers").glob("*.py")), TOOLS / "runbooks.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_source_is_python_3_9(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert not {"slots", "kw_only", "strict"} & {keyword.arg for keyword in node.keywords}, node.lineno
