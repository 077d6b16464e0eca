"""Installing on real machines: what is found, what is changed, and that nothing is left of it in the end."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from quadlets import zipapp_build
from quadlets.polkit import polkit_rule
from supervisor.edge_install.preflight import BLOCKER
from supervisor.edge_install.target import USER
from supervisor.errors import MachineFailed, Refused
from tests.edge_install.lab_image import agent_image_id
from tests.edge_install.lab_machines import (
    ACCOUNT_FILES,
    HOME,
    INSTALLED,
    Admin,
    accounts,
    everything,
    gatekeeper,
    of_the_agent,
    start_with_a_stand_in,
    without,
)
from tests.lab.box import CommandError
from tests.lab.machine import Machine

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


def test_from_bare_to_installed_to_upgraded_to_nothing(bare: Machine, archive: Path, gateway: Path) -> None:
    admin = Admin(bare, archive, gateway)
    before, accounts_before = everything(bare), accounts(bare)

    # A dry run says what would be done, and does nothing.
    planned = admin.install(dry_run=True)
    assert planned.dry_run
    assert everything(bare) == before
    assert admin.records == []
    assert not [finding for finding in admin.findings.values() if finding.severity == BLOCKER]

    # The first run does exactly that.
    done = admin.install()
    said = {(change["what"], change["path"]) for change in done.changes}
    assert {(change["what"], change["path"]) for change in planned.changes} <= said
    assert [record.id for record in admin.records] == ["web-01"]
    assert of_the_agent(bare) == []
    assert gatekeeper(bare, gateway, "hello")[1]["machine"] == "web-01"

    # The second one finds nothing to do.
    again = admin.install()
    assert again.changes == ()
    assert len(again.unchanged) >= 12

    # An upgrade changes what differs and keeps a copy of what was.
    old = bare.read(f"{INSTALLED}/host.json")
    raised = admin.install(upgrade=True, max_run_s=120)
    changed = {change["path"] for change in raised.changes if change["what"] == "replace"}
    assert changed == {
        f"{INSTALLED}/host.json",
        f"{HOME}/.config/systemd/user/chargehand-broker.service",
        f"{HOME}/.config/containers/systemd/chargehand-agent.container",
    }
    copies = bare.run(["find", f"{INSTALLED}/backup", "-name", "host.json"]).stdout.split()
    assert [bare.read(copy) for copy in copies] == [old]
    # What was given once stays, also when it is not given again.
    assert admin.install(upgrade=True).changes == ()

    # Nothing of it is left in the end.
    bare.run(["install", "-D", "-o", "chargehand", "/dev/null", f"{INSTALLED}/journal/run.jsonl"])
    gone = admin.uninstall(purge=True)
    assert ("remove", HOME) in {(change["what"], change["path"]) for change in gone.changes}
    assert accounts(bare) == accounts_before
    assert without(everything(bare), *ACCOUNT_FILES) == without(before, *ACCOUNT_FILES)
    assert [process for process in bare.processes() if process.user in ("chargehand", "999", "998")] == []
    assert admin.uninstall(purge=True).notes == ("no installation was found for user chargehand",)


def test_journals_outlive_the_installation_unless_they_are_purged(bare: Machine, archive: Path, gateway: Path) -> None:
    admin = Admin(bare, archive, gateway)
    admin.install()
    bare.run(["install", "-D", "-o", "chargehand", "/etc/hostname", f"{INSTALLED}/journal/run.jsonl"])
    gone = admin.uninstall()
    assert gone.notes == (f"journals are kept in {INSTALLED}/journal",)
    left = bare.run(["find", HOME, "-printf", "%P %u %y\n"]).stdout.split("\n")
    assert ".local/share/chargehand/journal/run.jsonl root f" in left
    assert len([line for line in left if line.endswith(" f")]) == 1
    # And an installation over them works.
    assert not [finding for finding in admin.findings.values() if finding.severity == BLOCKER]
    admin.install()
    assert gatekeeper(bare, gateway, "hello")[0] == 0


def test_nothing_runs_after_the_installation_and_after_a_reboot_and_nobody_starts_it_by_hand(
    bare: Machine, archive: Path, gateway: Path
) -> None:
    Admin(bare, archive, gateway).install()
    for _ in range(2):
        assert of_the_agent(bare) == []
        uid = bare.run(["id", "-u", "chargehand"]).stdout.strip()
        control = ["env", f"XDG_RUNTIME_DIR=/run/user/{uid}", "systemctl", "--user"]
        for unit in ("chargehand-agent", "chargehand-broker"):
            with pytest.raises(CommandError):
                bare.run([*control, "start", unit], user="chargehand")
        states = bare.run(
            [*control, "is-active", "chargehand-agent", "chargehand-broker"], user="chargehand", check=False
        )
        assert set(states.stdout.split()) <= {"inactive", "failed"}
        bare.reboot()
    assert gatekeeper(bare, gateway, "hello")[1]["boot_id"] == bare.boot_id


def test_the_gateways_key_opens_one_command_and_no_shell(bare: Machine, archive: Path, gateway: Path) -> None:
    Admin(bare, archive, gateway).install()
    for words in (["ls", "/"], ["hello;", "id"], []):
        status, said = gatekeeper(bare, gateway, *words)
        assert (status, said["error"]["code"]) == (2, "bad_request")
    # The agent's user can neither give itself another key nor a start-up file.
    for path in (f"{HOME}/.ssh/authorized_keys", f"{HOME}/.ssh/rc", f"{HOME}/.bashrc", f"{HOME}/.profile"):
        with pytest.raises(CommandError):
            bare.run(["sh", "-c", 'echo evil >> "$1"', "sh", path], user="chargehand")


def test_keys_of_others_in_an_account_that_was_there_are_kept(bare: Machine, archive: Path, gateway: Path) -> None:
    bare.prepare_user("chargehand", home="/home/edge")
    theirs = "# by hand\nssh-ed25519 AAAA somebody@else\n"
    bare.write("/home/edge/.ssh/authorized_keys", theirs, mode=0o600, owner="chargehand")
    before = accounts(bare)
    admin = Admin(bare, archive, gateway)
    admin.install()
    assert admin.findings["account"].severity == "warning"
    text = bare.read("/home/edge/.ssh/authorized_keys").decode()
    assert text.startswith(theirs)
    assert text.count("\n") == 3
    assert gatekeeper(bare, gateway, "hello")[0] == 0
    admin.uninstall(purge=True)
    assert bare.read("/home/edge/.ssh/authorized_keys").decode() == theirs
    assert accounts(bare) == before
    left = bare.run(["find", "/home/edge/.config", "/home/edge/.local/share/chargehand", "-type", "f"], check=False)
    assert left.stdout == ""


def test_an_upgrade_that_does_not_work_leaves_everything_as_it_was(
    bare: Machine, archive: Path, gateway: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = Admin(bare, archive, gateway)
    admin.install()
    before = without(everything(bare), "/backup/")
    broken = zipapp_build.pack({"__main__.py": b"raise SystemExit('broken')\n"})
    with monkeypatch.context() as instead:
        instead.setattr(zipapp_build, "host_zipapp", lambda: broken)
        with pytest.raises(MachineFailed, match="compile failed"):
            admin.install(upgrade=True)
    after = everything(bare)
    ignore_time = {name: about.rsplit(" ", 1)[0] for name, about in before.items()}
    assert {name: about.rsplit(" ", 1)[0] for name, about in after.items() if name in before} == ignore_time
    assert {name for name in after if name not in before and "/backup/" not in name} == set()
    assert admin.install().changes == ()


def test_nothing_is_touched_while_a_run_is_on(bare: Machine, archive: Path, gateway: Path) -> None:
    admin = Admin(bare, archive, gateway)
    admin.install()
    start_with_a_stand_in(bare)
    with pytest.raises(Refused, match="idle"):
        admin.install(upgrade=True, max_run_s=60)
    with pytest.raises(MachineFailed, match="a run is on"):
        admin.install(upgrade=True, max_run_s=60, ignore=("idle",))
    with pytest.raises(MachineFailed, match="a run is on"):
        admin.uninstall()
    assert json.loads(bare.read(f"{INSTALLED}/host.json"))["max_run_s"] == 3600
    admin.uninstall(force=True, purge=True)
    assert bare.run(["id", "chargehand"], check=False).status != 0


def test_a_grant_of_units_comes_and_goes_with_the_policy(bare: Machine, archive: Path, gateway: Path) -> None:
    admin = Admin(bare, archive, gateway)
    admin.install(polkit=polkit_rule({"cron.service": ("restart",)}))
    restart = ["systemctl", "--no-ask-password", "restart"]
    bare.run(["systemctl", "restart", "polkit"])
    bare.run([*restart, "cron.service"], user="chargehand")
    for words in (["restart", "ssh.service"], ["stop", "cron.service"], ["daemon-reload"], ["disable", "cron.service"]):
        with pytest.raises(CommandError):
            bare.run(["systemctl", "--no-ask-password", *words], user="chargehand")
    gone = admin.install()
    assert [(change["what"], change["path"]) for change in gone.changes] == [
        ("remove", "/etc/polkit-1/rules.d/49-chargehand.rules")
    ]
    with pytest.raises(CommandError):
        bare.run([*restart, "cron.service"], user="chargehand")


def test_an_account_that_is_no_administrator_installs_into_itself(bare: Machine, archive: Path, gateway: Path) -> None:
    bare.run(["useradd", "--create-home", "--shell", "/bin/bash", "alice"])
    admin = Admin(bare, archive, gateway, user="alice")
    with pytest.raises(Refused, match="sudo"):
        admin.install()
    # Lingering for oneself is what polkit allows to nobody without a seat: an administrator does it once.
    bare.run(["loginctl", "enable-linger", "alice"])
    done = admin.install(scope=USER)
    assert {change["path"].split("/")[2] for change in done.changes if change["path"].startswith("/home/")} == {"alice"}
    assert gatekeeper(bare, gateway, "hello", user="alice")[1]["machine"] == "web-01"
    assert admin.records[0].user == "alice"
    assert admin.install(scope=USER).changes == ()
    admin.uninstall(scope=USER, purge=True)
    left = bare.run(["find", "/home/alice/.config", "/home/alice/.local/share/chargehand", "-type", "f"], check=False)
    assert left.stdout == ""
    assert bare.run(["id", "alice"]).status == 0


def test_what_is_wrong_with_a_machine_is_found_and_nothing_is_touched(
    bare: Machine, archive: Path, gateway: Path
) -> None:
    bare.write("/etc/ssh/sshd_config.d/20-strict.conf", "MaxStartups 1:30:10\nMaxSessions 1\nAllowUsers root\n")
    bare.run(["mv", "/usr/bin/newuidmap", "/usr/bin/newuidmap.away"])
    bare.run(["mv", "/usr/lib/systemd/user/dbus.socket", "/usr/lib/systemd/user/dbus.socket.away"])
    bare.run(["mv", "/usr/lib/systemd/user-generators/podman-user-generator", "/root/"])
    bare.run(["mv", "/usr/libexec/podman/quadlet", "/root/"])
    before = everything(bare)
    admin = Admin(bare, archive, gateway)
    with pytest.raises(Refused) as caught:
        admin.install()
    found = {name for name, finding in admin.findings.items() if finding.severity == BLOCKER}
    assert found == {"podman", "subordinate-ids", "user-bus", "ssh-login", "max-sessions"}
    assert admin.findings["max-startups"].severity == "warning"
    assert all(admin.findings[name].remedy for name in found)
    assert caught.value.code == "preflight"
    assert everything(bare) == before
    assert admin.findings["landlock"].severity == "ok"
    # A machine that is found wanting keeps its record as it was: there is none.
    assert admin.records == []
    with contextlib.suppress(CommandError):
        bare.run(["id", "chargehand"])
        pytest.fail("an account was made")


def test_an_image_with_another_id_than_promised_is_not_taken(bare: Machine, archive: Path, gateway: Path) -> None:
    admin = Admin(bare, archive, gateway)
    wanted = agent_image_id(archive)
    done = admin.install()
    assert done.image == wanted
    uid = bare.run(["id", "-u", "chargehand"]).stdout.strip()
    podman = ["env", f"XDG_RUNTIME_DIR=/run/user/{uid}", "podman"]
    listed = bare.run([*podman, "images", "--no-trunc", "--quiet"], user="chargehand").stdout.split()
    assert listed == [wanted]
    with pytest.raises(MachineFailed, match=r"pull"):
        admin.install(image_archive=None, image=f"127.0.0.1:9/none/agent@sha256:{'0' * 64}")
    assert json.loads(bare.read(f"{INSTALLED}/host.json"))["image"] == wanted
