"""What an installation is to look like, as one document."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadlets.polkit import BadGrant
from supervisor.edge_install import grants, plan
from supervisor.edge_install.target import USER, Choices
from supervisor.errors import BadInput
from supervisor.policy.loader import default_policy
from tools.policy import Policy

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFpfteWxJG/qDyO4BXj+FuaiCRIUY9h8Nq1bycX1vM5d"
IMAGE = plan.Image("load", "sha256:" + "0" * 64, 12, "1" * 64)


def document(choices: Choices, polkit: str | None = None) -> dict[str, object]:
    return plan.install_document(
        choices,
        account="chargehand",
        home="/var/lib/chargehand",
        image=IMAGE,
        zipapp=b"zip",
        version="1",
        polkit=polkit,
    )


def test_the_files_are_where_systemd_podman_and_the_gatekeeper_look() -> None:
    made = document(Choices(machine="web-01", gateway_key=KEY))
    files = {file["path"]: file for file in made["files"]}  # type: ignore[union-attr, index, call-overload]
    assert set(files) == {
        ".local/share/chargehand/host.pyz",
        ".local/share/chargehand/host.json",
        ".config/systemd/user/chargehand-broker.service",
        ".config/containers/systemd/chargehand-agent.container",
    }
    assert base64.b64decode(files[".local/share/chargehand/host.pyz"]["content"]) == b"zip"
    config = json.loads(base64.b64decode(files[".local/share/chargehand/host.json"]["content"]))
    assert config["machine"] == "web-01"
    assert config["units"] == "systemd"
    assert config["image"] == IMAGE.reference
    assert json.loads(json.dumps(made)) == made


def test_the_host_reads_its_configuration() -> None:
    from edge_agent.host.home import HostConfig

    choices = Choices(machine="web-01", max_run_s=99, max_lease_s=33)
    config = HostConfig.from_json(json.loads(plan.host_json(choices, IMAGE)))
    assert (config.machine, config.units, config.max_run_s, config.max_lease_s) == ("web-01", "systemd", 99.0, 33.0)


def test_our_line_allows_one_command_and_nothing_else() -> None:
    line = plan.key_line(f"{KEY} somebody@laptop", "/var/lib/chargehand/.local/share/chargehand")
    assert line == (
        'restrict,command="/usr/bin/python3 -I /var/lib/chargehand/.local/share/chargehand/host.pyz gatekeeper" '
        f"{KEY} chargehand-gateway"
    )


@given(key=st.text(max_size=60), home=st.text(max_size=40))
def test_no_text_becomes_a_second_line_or_a_second_option(key: str, home: str) -> None:
    for public_key, folder in ((key, "/home/x"), (KEY, f"/home/{home}")):
        try:
            line = plan.key_line(public_key, folder)
        except BadInput:
            continue
        assert len(line.splitlines()) == 1
        assert line.count('"') == 2
        assert line.startswith('restrict,command="')


@pytest.mark.parametrize("key", ["", "-----BEGIN OPENSSH PRIVATE KEY-----", f"{KEY}\n{KEY}", "ssh-ed25519 AAAA"])
def test_what_is_no_public_key_is_refused_and_a_private_one_is_not_shown_whole(key: str) -> None:
    with pytest.raises(BadInput, match="public key cannot be used"):
        plan.key_line(key, "/home/x")


def test_an_installation_into_an_account_asks_for_nothing_of_root() -> None:
    made = document(Choices(machine="web-01", gateway_key=KEY, scope=USER), polkit="rule")
    assert made["groups"] == []
    assert made["polkit"] is None


def test_logs_are_granted_unless_told_otherwise() -> None:
    assert document(Choices(machine="web-01", gateway_key=KEY))["groups"] == ["systemd-journal", "adm"]
    assert document(Choices(machine="web-01", gateway_key=KEY, grant_logs=False))["groups"] == []


def test_a_home_that_cannot_stand_in_a_unit_is_refused() -> None:
    with pytest.raises(BadInput, match="home_dir"):
        plan.install_document(
            Choices(machine="web-01", gateway_key=KEY), account="a", home="/home/a b", image=IMAGE, zipapp=b"",
            version="1", polkit=None,
        )  # fmt: skip


# --- what a policy lets polkit grant ------------------------------------------------------------------------------------


def policy(kind: str, effect: str = "change", members: tuple[str, ...] = ("nginx", "app-*", "db.socket")) -> Policy:
    return Policy.from_json(
        {
            "format": 1, "name": "t", "version": "1", "sets": {"managed": list(members)},
            "rules": [
                {
                    "name": "systemctl", "paths": ["/usr/bin/systemctl"], "reason": "units",
                    "command": {
                        "commands": [
                            {"names": ["restart"], "effect": effect, "positionals": [{"kind": kind}]},
                            {"names": ["status"], "positionals": [{"kind": "unit"}]},
                        ]
                    },
                }
            ],
        }
    )  # fmt: skip


def test_the_units_of_a_change_are_granted_under_the_names_systemd_knows() -> None:
    assert grants.grants_of(policy("unit(managed)")) == {
        "app-*": ("restart",), "db.socket": ("restart",), "nginx.service": ("restart",),
    }  # fmt: skip
    rule = grants.polkit_rule(policy("unit(managed)"), "edge")
    assert rule is not None
    assert '"nginx.service"' in rule


def test_observing_grants_nothing_and_neither_does_a_unit_without_a_set() -> None:
    assert grants.grants_of(policy("unit(managed)", effect="observe")) == {}
    assert grants.grants_of(policy("unit(managed)", effect="never")) == {}
    assert grants.grants_of(policy("unit")) == {}
    assert grants.polkit_rule(policy("unit"), "edge") is None


def test_the_default_policy_needs_no_polkit_rule() -> None:
    assert grants.polkit_rule(Policy.from_json(default_policy()), "chargehand") is None


def test_a_set_that_names_every_unit_cannot_be_granted() -> None:
    with pytest.raises(BadGrant):
        grants.polkit_rule(policy("unit(managed)", members=("*",)), "edge")
