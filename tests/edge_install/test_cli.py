"""The commands: what a person may type, and what the gateway keeps afterwards."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from supervisor.cli.main import app
from supervisor.edge_install.registry import Registry
from supervisor.errors import BAD_INPUT, INTERRUPTED, REFUSED
from supervisor.machines import Machine, host_key
from supervisor.runs.services import open_services
from supervisor.settings.load import load
from tests.edge_install.servers import Server, serving
from tests.edge_install.test_plan import KEY
from tests.edge_install.test_session import Pretended

OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDDseSEtH6FSW7yEFzo9LSmn67RM83HSOqiEP6dL5AtC"
IMAGE = f"quay.example/a/agent@sha256:{'0' * 64}"


def chargehand(data: Path, *words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["--data-dir", str(data), "edge", *words])
    return done.exit_code, done.stdout, done.stderr


class Served:
    """The pretended machine, in a thread of its own: the command runs its own event loop."""

    def __init__(self, folder: Path, machine: Pretended) -> None:
        self.server: Server
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(folder, machine)))
        self._thread.start()
        self._ready.wait(10)

    async def _serve(self, folder: Path, machine: Pretended) -> None:
        async with serving(folder, machine.answer) as self.server:
            self._ready.set()
            await self._end.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)
        self._loop.close()

    @property
    def words(self) -> list[str]:
        at = f"root@127.0.0.1:{self.server.port}"
        return [at, "--machine", "web-01", "--identity", str(self.server.identity), "--image", IMAGE]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path, Pretended())
    yield made
    made.close()


def test_an_installation_from_the_command_line_leaves_a_record_and_its_audit(tmp_path: Path, served: Served) -> None:
    data = tmp_path / "data"
    fingerprint = served.server.host_key.get_fingerprint()
    status, out, errors = chargehand(
        data, "install", *served.words, "--yes", "--json", "--accept-host-key", fingerprint, "--label", "role=web"
    )
    assert status == 0, errors
    document = json.loads(out)
    assert (document["action"], document["registered"], document["host_key_fingerprint"]) == (
        "install",
        True,
        fingerprint,
    )
    assert "preflight: 23 of 24 checks in order" in errors  # the pretended machine has a clock of its own
    services = open_services(load(None, data_dir=data))
    with services.store, services.ledger:
        kept = services.store.machines.get("web-01")
        recorded = [record.kind for record in services.ledger.records(chain="machine:web-01")]
        services.spool.close()
    assert (kept.user, kept.labels, kept.host_key_fingerprint) == ("chargehand", {"role": "web"}, fingerprint)
    assert recorded == ["machine.added", "host_key.accepted"]


def test_without_a_terminal_and_without_a_fingerprint_the_answer_is_no(tmp_path: Path, served: Served) -> None:
    status, out, _ = chargehand(tmp_path / "data", "install", *served.words, "--json")
    assert status == REFUSED
    assert json.loads(out)["error"]["code"] == "host-key-unknown"
    assert served.server.commands == []


def test_without_a_terminal_and_without_yes_nothing_is_changed(tmp_path: Path, served: Served) -> None:
    fingerprint = served.server.host_key.get_fingerprint()
    status, _, errors = chargehand(tmp_path / "data", "install", *served.words, "--accept-host-key", fingerprint)
    assert status == INTERRUPTED
    assert "write: /x" in errors
    assert "nothing was changed" in errors


def test_a_file_holds_what_the_command_line_would(tmp_path: Path, served: Served) -> None:
    config = tmp_path / "edge.toml"
    config.write_text(
        f'target = "root@127.0.0.1:{served.server.port}"\nmachine = "web-01"\nidentity = "{served.server.identity}"\n'
        f'image = "{IMAGE}"\naccept-host-key = "{served.server.host_key.get_fingerprint()}"\ndry-run = true\n'
    )
    status, out, errors = chargehand(tmp_path / "data", "install", "--config", str(config))
    assert status == 0, errors
    assert out == "would write: /x\n"


@pytest.mark.parametrize(
    "words",
    [
        ["install"],
        ["install", "root@web-01"],
        ["install", "root@web-01:99999", "--machine", "web-01"],
        ["install", "root@web-01", "--machine", "Web 01"],
        ["install", "root@web-01", "--machine", "web-01", "--image", "agent:latest"],
        ["install", "root@web-01", "--machine", "web-01", "--image-archive", "/nonexistent"],
        ["install", "root@web-01", "--machine", "web-01", "--label", "nonsense"],
        ["install", "root@web-01", "--machine", "web-01", "--gateway-key", "/nonexistent"],
        ["install", "root@web-01", "--machine", "web-01", "--config", "/nonexistent"],
        ["uninstall"],
        ["uninstall", "a@b@c"],
    ],
)
def test_bad_input_is_one_json_error_and_exit_2(tmp_path: Path, words: list[str]) -> None:
    status, out, _ = chargehand(tmp_path / "data", *words, "--json")
    assert status == BAD_INPUT
    assert json.loads(out)["error"]["exit_code"] == BAD_INPUT


# --- the record ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    services = open_services(load(None, data_dir=tmp_path / "data"))
    yield Registry(services, "operator:test")
    services.spool.close()
    services.ledger.close()
    services.store.close()


def machine(**more: Any) -> Machine:
    key = host_key(more.pop("key", KEY))
    return Machine(
        **{"id": "web-01", "address": "h", "host_key": key.text, "host_key_fingerprint": key.fingerprint, **more}
    )


def test_installing_again_keeps_what_an_operator_wrote(registry: Registry) -> None:
    registry.register(machine(labels={"a": "b"}, role="web"))
    registry.register(machine(address="h2", port=2222))
    known = registry.known("web-01")
    assert known is not None
    assert (known.address, known.port, known.labels, known.role) == ("h2", 2222, {"a": "b"}, "web")


def test_a_newly_accepted_key_replaces_the_old_one(registry: Registry) -> None:
    registry.register(machine())
    registry.register(machine(key=OTHER_KEY))
    known = registry.known("web-01")
    assert known is not None
    assert known.host_key == OTHER_KEY


def test_a_machine_that_comes_back_has_its_key_again(registry: Registry) -> None:
    registry.register(machine())
    registry.unregister("web-01")
    assert registry.known("web-01") is None
    registry.unregister("web-01")
    registry.register(machine())
    known = registry.known("web-01")
    assert known is not None
    assert known.host_key == KEY
