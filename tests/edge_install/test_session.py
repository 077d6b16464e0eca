"""The administrator's session and the order of an installation, against a real SSH server in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from supervisor.edge_install import flow, plan, session
from supervisor.edge_install.preflight import BLOCKER, Finding
from supervisor.edge_install.target import USER, Choices, Target
from supervisor.errors import (
    BadInput,
    Conflict,
    HostKeyChanged,
    HostKeyUnknown,
    Interrupted,
    MachineFailed,
    MachineUnreachable,
    ProtocolMismatch,
    Refused,
)
from supervisor.machines import HostKey, Machine
from tests.edge_install.servers import Server, serving
from tests.edge_install.test_plan import KEY
from tests.edge_install.test_preflight import GOOD

FACTS = plan.facts_document(USER, "", "")


def at(server: Server, admin: str = "admin") -> Target:
    return Target(admin, "127.0.0.1", server.port)


class Listener:
    """A voice that writes down, and says yes or no."""

    def __init__(self, accepts: bool = True, consents: bool = True) -> None:
        self.said: list[str] = []
        self.shown: Sequence[Finding] = ()
        self.offered: list[HostKey] = []
        self.asked: list[Mapping[str, str]] = []
        self._accepts, self._consents = accepts, consents

    def voice(self) -> flow.Voice:
        def findings(found: Sequence[Finding]) -> None:
            self.shown = found

        def accept(key: HostKey, known: bool | None) -> bool:
            self.offered.append(key)
            return self._accepts

        def consent(changes: Sequence[Mapping[str, str]]) -> bool:
            self.asked += changes
            return self._consents

        return flow.Voice(self.said.append, findings, accept, consent)


# --- the session ------------------------------------------------------------------------------------------------------


async def test_the_program_runs_on_the_other_side_and_tells_what_it_found(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        shown = await session.shown_host_key(at(server))
        async with session.login(at(server), shown, identity=server.identity, sudo=False) as admin:
            facts = await admin.run(FACTS)
    assert set(GOOD) == set(facts)
    assert set(facts["account"]) == set(GOOD["account"])
    assert facts["python"]["version"].startswith("3.")
    assert shown.fingerprint == server.host_key.get_fingerprint()


async def test_the_programs_own_error_arrives_with_all_its_fields(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        shown = await session.shown_host_key(at(server))
        async with session.login(at(server), shown, identity=server.identity, sudo=False) as admin:
            with pytest.raises(MachineFailed, match="unknown verb") as caught:
                await admin.run({"verb": "format-disk"})
    assert caught.value.expected == "facts, install or uninstall"


async def test_another_host_key_than_the_accepted_one_ends_it_before_a_login(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, serving(tmp_path) as other:
        wrong = await session.shown_host_key(at(other))
        with pytest.raises(HostKeyChanged) as caught:
            async with session.login(at(server), wrong, identity=server.identity):
                pytest.fail("logged in")
    assert caught.value.expected == wrong.fingerprint
    assert server.commands == []


async def test_a_wrong_key_and_a_closed_port_say_what_to_do(tmp_path: Path) -> None:
    async with serving(tmp_path / ".") as server:
        shown = await session.shown_host_key(at(server))
        stranger = tmp_path / "stranger"
        stranger.write_bytes(server.host_key.export_private_key())
        with pytest.raises(MachineUnreachable, match="--identity"):
            async with session.login(at(server), shown, identity=stranger):
                pytest.fail("logged in")
    with pytest.raises(MachineUnreachable, match="firewall"):
        await session.shown_host_key(at(server))


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((1, "", "sudo: a password is required\n"), Refused, "NOPASSWD"),
        ((127, "", "sh: python3: not found\n"), MachineFailed, "no python3"),
        ((0, "Welcome to web-01!\n", ""), ProtocolMismatch, "start-up files must print nothing"),
        (
            (1, json.dumps({"error": {"message": "the Python of this machine is too old"}}) + "\n", ""),
            MachineFailed,
            "old",
        ),
        ((1, '{"error": "x"}\n', ""), ProtocolMismatch, "no answer"),
        ((0, "[1]\n", ""), ProtocolMismatch, "no answer"),
    ],
)
async def test_what_goes_wrong_on_the_machine_is_told_as_what_it_is(
    tmp_path: Path, answer: tuple[int, str, str], error: type[Exception], words: str
) -> None:
    async with serving(tmp_path, lambda command: answer) as server:
        shown = await session.shown_host_key(at(server))
        async with session.login(at(server), shown, identity=server.identity) as admin:
            with pytest.raises(error, match=words):
                await admin.run(FACTS)
    assert server.commands[0].startswith("sudo -n -- python3 -I -c ")


async def test_root_needs_no_sudo(tmp_path: Path) -> None:
    async with serving(tmp_path, lambda command: (0, '{"result": {}}\n', "")) as server:
        shown = await session.shown_host_key(at(server))
        async with session.login(at(server, "root"), shown, identity=server.identity) as admin:
            assert await admin.run(FACTS) == {}
    assert server.commands[0].startswith("python3 -I -c ")


def test_what_the_administrator_knows_of_a_host_key_counts(tmp_path: Path) -> None:
    mine = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + b"a" * 32)
    other = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + b"b" * 32)
    file = tmp_path / "known_hosts"
    file.write_text(f"[192.0.2.7]:2222 {mine.text}\n")
    target = Target("root", "192.0.2.7", 2222)
    assert session.known_to_admin(target, mine, file) is True
    assert session.known_to_admin(target, other, file) is False
    assert session.known_to_admin(Target("root", "192.0.2.7", 22), mine, file) is None
    assert session.known_to_admin(target, mine, tmp_path / "none") is None


# --- the flow, against a machine that answers what a test wants ----------------------------------------------------------


class Pretended:
    """A machine's end of the conversation: the facts it tells and the result of the rest, in order."""

    def __init__(self, **facts: Any) -> None:
        self.facts = json.loads(json.dumps({**GOOD, **facts}))
        self.changes = [{"what": "write", "path": "/x"}]
        self.left = [self.facts, self._result(True), self._result(False)]

    def _result(self, dry: bool) -> dict[str, Any]:
        return {"dry_run": dry, "changes": self.changes, "unchanged": [], "notes": []}

    def answer(self, command: str) -> tuple[int, str, str]:
        return 0, json.dumps({"progress": "working"}) + "\n" + json.dumps({"result": self.left.pop(0)}) + "\n", ""


def choices(server: Server, **more: Any) -> Choices:
    image = {"image": f"quay.example/a/agent@sha256:{'0' * 64}"}
    return Choices(machine="web-01", identity=server.identity, gateway_key=KEY, **{**image, **more})


async def test_an_installation_ends_with_the_machines_record(tmp_path: Path) -> None:
    listener, kept = Listener(), list[Machine]()
    async with serving(tmp_path, Pretended().answer) as server:
        done = await flow.install(
            at(server, "root"), choices(server), listener.voice(), version="1", register=kept.append
        )
    assert [machine.id for machine in kept] == ["web-01"]
    assert kept[0].host_key == listener.offered[0].text
    assert kept[0].user == "chargehand"
    assert (done.dry_run, done.registered, len(server.commands)) == (False, True, 3)
    assert listener.asked == [{"what": "write", "path": "/x"}]


async def test_a_dry_run_stops_before_the_change_and_keeps_no_record(tmp_path: Path) -> None:
    kept = list[Machine]()
    async with serving(tmp_path, Pretended().answer) as server:
        done = await flow.install(
            at(server, "root"), choices(server, dry_run=True), Listener().voice(), version="1", register=kept.append
        )
    assert (done.dry_run, kept, len(server.commands)) == (True, [], 2)


async def test_a_blocker_stops_it_after_the_first_look(tmp_path: Path) -> None:
    machine = Pretended(systemd="")
    async with serving(tmp_path, machine.answer) as server:
        listener = Listener()
        with pytest.raises(Refused, match="systemd") as caught:
            await flow.install(at(server, "root"), choices(server), listener.voice(), version="1")
    assert caught.value.code == "preflight"
    assert [finding.id for finding in listener.shown if finding.severity == BLOCKER] == ["systemd"]
    assert len(server.commands) == 1


async def test_without_consent_nothing_is_changed(tmp_path: Path) -> None:
    async with serving(tmp_path, Pretended().answer) as server:
        with pytest.raises(Interrupted, match="nothing was changed"):
            await flow.install(at(server, "root"), choices(server), Listener(consents=False).voice(), version="1")
        assert len(server.commands) == 2


async def test_a_host_key_nobody_accepts_ends_it_with_the_fingerprint(tmp_path: Path) -> None:
    async with serving(tmp_path, Pretended().answer) as server:
        with pytest.raises(HostKeyUnknown, match=r"--accept-host-key SHA256:"):
            await flow.install(at(server), choices(server), Listener(accepts=False).voice(), version="1")
        assert server.commands == []


async def test_an_accepted_fingerprint_asks_nobody_and_another_one_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, Pretended().answer) as server:
        listener = Listener(accepts=False)
        good = choices(server, accept_host_key=server.host_key.get_fingerprint(), dry_run=True)
        await flow.install(at(server, "root"), good, listener.voice(), version="1")
        assert listener.offered == []
        with pytest.raises(HostKeyChanged):
            await flow.install(
                at(server), choices(server, accept_host_key="SHA256:" + "A" * 43), Listener().voice(), version="1"
            )


async def test_the_key_in_the_record_of_the_machine_wins_over_every_yes(tmp_path: Path) -> None:
    async with serving(tmp_path, Pretended().answer) as server:
        accepting = choices(server, accept_host_key=server.host_key.get_fingerprint())
        with pytest.raises(HostKeyChanged, match="its record"):
            await flow.install(at(server), accepting, Listener().voice(), version="1", pinned=KEY)


async def test_an_image_is_needed_unless_one_is_installed(tmp_path: Path) -> None:
    installed = {"machine": "web-01", "image": {"reference": "sha256:" + "7" * 64}}
    async with serving(tmp_path, Pretended().answer) as server:
        with pytest.raises(BadInput, match="image is missing"):
            await flow.install(at(server, "root"), choices(server, image=""), Listener().voice(), version="1")
    async with serving(tmp_path, Pretended(installation=installed).answer) as server:
        done = await flow.install(at(server, "root"), choices(server, image=""), Listener().voice(), version="1")
    assert done.image == installed["image"]["reference"]  # type: ignore[index]


async def test_a_record_on_the_machine_cannot_bring_text_into_a_unit(tmp_path: Path) -> None:
    hostile = {"machine": "web-01", "image": {"reference": "sha256:0\nExecStartPre=/bin/sh"}}
    async with serving(tmp_path, Pretended(installation=hostile).answer) as server:
        with pytest.raises(BadInput, match="names no image"):
            await flow.install(at(server, "root"), choices(server, image=""), Listener().voice(), version="1")


async def test_a_machine_installed_under_another_name_is_not_taken_over(tmp_path: Path) -> None:
    async with serving(tmp_path, Pretended(installation={"machine": "db-01"}).answer) as server:
        with pytest.raises(Conflict, match="db-01"):
            await flow.install(at(server, "root"), choices(server), Listener().voice(), version="1")


async def test_an_upgrade_needs_an_installation_and_keeps_what_was_not_given(tmp_path: Path) -> None:
    async with serving(tmp_path, Pretended().answer) as server:
        with pytest.raises(BadInput, match="no installation to upgrade"):
            await flow.install(at(server, "root"), choices(server), Listener().voice(), version="1", upgrade=True)
    before = {"max_run_s": 77, "grant_logs": False, "network": "host", "max_lease_s": "evil"}
    installed = {"machine": "web-01", "choices": before}
    kept = flow._taken_over(
        Choices(machine="web-01", network="none"), installed, upgrade=True, given=frozenset({"network"}),
        target=Target("root", "h"),
    )  # fmt: skip
    assert (kept.max_run_s, kept.grant_logs, kept.network, kept.max_lease_s) == (77, False, "none", 120)


async def test_a_broken_image_archive_is_refused_before_anything_is_contacted(tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    archive.write_bytes(b"not an image")
    async with serving(tmp_path, Pretended().answer) as server:
        with pytest.raises(BadInput, match="image archive cannot be used"):
            await flow.install(
                at(server, "root"), choices(server, image="", image_archive=archive), Listener().voice(), version="1"
            )
        assert server.commands == []


async def test_uninstalling_tells_what_goes_and_takes_the_record_out_of_service(tmp_path: Path) -> None:
    gone = list[str]()
    async with serving(tmp_path, Pretended(installation={"machine": "web-01"}).answer) as server:
        done = await flow.uninstall(
            at(server, "root"), Listener().voice(), account="chargehand", identity=server.identity,
            unregister=gone.append,
        )  # fmt: skip
    assert gone == ["web-01"]
    assert done.action == "uninstall"
