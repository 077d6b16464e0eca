"""Unit files: no value can be anything but a value, and what systemd and podman read is what was meant."""

from __future__ import annotations

import configparser
import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadlets.render import BadValue, UnitValues, agent_quadlet, broker_unit, check_image

ID = "sha256:" + "ab" * 32
GOOD = UnitValues(machine="web-01", image=ID, home_dir="/var/lib/chargehand/.local/share/chargehand")
HOSTILE = "%$\"'\\\n\r\0;:#=[]{}()<>|&*?! \t,`~^\x1b\x85\u2028é"


def sections(text: str) -> dict[str, list[tuple[str, str]]]:
    """A unit file the way systemd reads it: sections, keys, values; comments and blank lines left out."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in text.splitlines():
        if not line.strip() or line.startswith(("#", ";")):
            continue
        if line.startswith("["):
            name = line
            found[name] = []
        else:
            key, equals, value = line.partition("=")
            assert equals, line
            found[name].append((key, value))
    return found


def test_neither_unit_has_an_install_section() -> None:
    for text in (broker_unit(GOOD), agent_quadlet(GOOD)):
        assert not [name for name in sections(text) if "install" in name.lower()]
        assert "WantedBy" not in text
        assert "{{" not in text


def test_both_units_end_by_themselves_and_are_never_restarted() -> None:
    values = dataclasses.replace(GOOD, max_run_s=77)
    for text in (broker_unit(values), agent_quadlet(values)):
        service = dict(sections(text)["[Service]"])
        assert service["Restart"] == "no"
        assert service["RuntimeMaxSec"] == "77"
        assert int(service["TimeoutStopSec"]) <= 5


def test_worker_and_broker_are_bound_to_each_other_in_one_order() -> None:
    assert ("BindsTo", "chargehand-agent.service") in sections(broker_unit(GOOD))["[Unit]"]
    assert ("BindsTo", "chargehand-broker.service") in sections(agent_quadlet(GOOD))["[Unit]"]
    assert ("After", "chargehand-broker.service") in sections(agent_quadlet(GOOD))["[Unit]"]
    assert "After" not in dict(sections(broker_unit(GOOD))["[Unit]"])


def test_the_container_has_no_network_no_capabilities_and_a_read_only_root() -> None:
    container = dict(sections(agent_quadlet(GOOD))["[Container]"])
    assert container["Network"] == "none"
    assert (container["ReadOnly"], container["DropCapability"], container["NoNewPrivileges"]) == ("true", "all", "true")
    assert (container["User"], container["Image"]) == ("1000", ID)
    assert "--pull=never" in agent_quadlet(GOOD)
    assert "--http-proxy=false" in agent_quadlet(GOOD)


def test_the_container_sees_one_folder_of_the_host() -> None:
    volumes = [value for key, value in sections(agent_quadlet(GOOD))["[Container]"] if key == "Volume"]
    assert volumes == ["%t/chargehand/worker:/run/chargehand:rw,Z,nosuid,nodev,noexec"]
    elsewhere = agent_quadlet(dataclasses.replace(GOOD, run_dir="/run/edge"))
    assert "Volume=/run/edge/worker:/run/chargehand:" in elsewhere


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("machine", "Web"),
        ("machine", "-web"),
        ("machine", "web\nExecStartPre=/bin/sh"),
        ("image", "chargehand:latest"),
        ("image", "sha256:abc"),
        ("image", f"docker/chargehand@{ID}\n[Install]"),
        ("home_dir", "relative/path"),
        ("home_dir", "/var/lib/../etc"),
        ("home_dir", "/var/lib/%h"),
        ("home_dir", "/" + "a" * 300),
        ("python", "/usr/bin/python3 -c evil"),
        ("run_dir", "/run/a:b"),
        ("run_dir", "/run/" + "a" * 80),
        ("network", "bridge"),
        ("max_run_s", 0),
        ("max_run_s", True),
        ("max_run_s", "60"),
        ("broker_memory_mib", -1),
        ("agent_tasks", 1 << 40),
    ],
)
def test_a_value_that_is_none_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(BadValue) as caught:
        dataclasses.replace(GOOD, **{field: value})
    assert caught.value.field == field
    assert repr(value)[:40] in str(caught.value)


@given(
    field=st.sampled_from(["machine", "image", "home_dir", "python", "run_dir", "network"]),
    start=st.text(max_size=5),
    bad=st.sampled_from(list(HOSTILE)),
    end=st.text(max_size=20),
)
def test_no_text_with_a_special_character_gets_into_a_unit_file(field: str, start: str, bad: str, end: str) -> None:
    value = f"/{start}{bad}{end}"
    if bad == ":" and field == "image":
        return
    with pytest.raises(BadValue):
        dataclasses.replace(GOOD, **{field: value})


@given(
    machine=st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
    path=st.from_regex(r"(/[A-Za-z0-9_+@.-]{1,12}){1,6}", fullmatch=True),
    run_s=st.integers(10, 24 * 3600),
    network=st.sampled_from(["none", "host"]),
)
def test_values_that_are_accepted_change_no_key_of_the_unit_files(
    machine: str, path: str, run_s: int, network: str
) -> None:
    try:
        values = UnitValues(machine, ID, path, run_dir=path, max_run_s=run_s, network=network)
    except BadValue:
        assert {".", ".."} & set(path.split("/")) or len(path) > 80
        return
    for render in (broker_unit, agent_quadlet):
        plain, rendered = sections(render(GOOD)), sections(render(values))
        assert {name: [key for key, _ in pairs] for name, pairs in plain.items()} == {
            name: [key for key, _ in pairs] for name, pairs in rendered.items()
        }
        for pairs in rendered.values():
            # Specifiers are the template's own; none comes from a value.
            assert not [value for _, value in pairs if "%" in value]


def test_an_image_is_named_by_id_or_by_digest_in_a_registry() -> None:
    assert check_image(ID) == ID
    for good in (f"registry.example:5000/team/agent@{ID}", f"quay.example/a/b_c/d-e@{ID}", f"localhost/agent@{ID}"):
        assert check_image(good) == good
    for bad in ("", "agent", f"agent@{ID}", f"a/b:1@{ID}", f"-a/b@{ID}", ID.upper(), f"{ID} ", None, 3):
        with pytest.raises(BadValue):
            check_image(bad)  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_broker_unit(tmp_path: Path) -> None:
    units, runtime = tmp_path / "units", tmp_path / "run"
    units.mkdir()
    runtime.mkdir(mode=0o700)
    (units / "chargehand-broker.service").write_text(broker_unit(GOOD))
    # Podman's generator makes the real one; here it only has to exist.
    (units / "chargehand-agent.service").write_text("[Service]\nExecStart=/bin/true\n")
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "SYSTEMD_UNIT_PATH": f"{units}:"}
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", units / "chargehand-broker.service"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "chargehand-broker" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


def test_the_templates_are_plain_ini_files() -> None:
    for text in (broker_unit(GOOD), agent_quadlet(GOOD)):
        reader = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
        reader.read_string(text)
        assert "Unit" in reader.sections()
