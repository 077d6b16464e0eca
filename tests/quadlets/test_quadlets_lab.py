"""On a real machine: systemd and podman's generator take the units, and both ways to an image end in one that starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quadlets import context, image
from quadlets.render import UnitValues, agent_quadlet, broker_unit
from tests.edge_install.lab_image import agent_archive, agent_image_id
from tests.edge_install.lab_machines import BOX_LIMITS
from tests.lab import oci
from tests.lab.machine import Lab, Machine

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

VALUES = UnitValues(
    machine="web-01", image="sha256:" + "ab" * 32, home_dir="/var/lib/chargehand/.local/share/chargehand"
)
LOOK = (
    "import json,os,sys,time\n"
    "began=time.monotonic()\n"
    "import a2a.types, uvicorn, openai, anthropic\n"
    "import edge_agent.worker, a2a_bridge, inference, tools\n"
    "files=[m.__cached__ for m in list(sys.modules.values()) if getattr(m,'__cached__',None)]\n"
    "print(json.dumps({'uid':os.getuid(),'python':sys.version.split()[0],'seconds':time.monotonic()-began,"
    "'uncompiled':[f for f in files if not os.path.exists(f)],'supervisor':os.path.isdir('/opt/chargehand/supervisor')}))\n"
)


@pytest.fixture(scope="module")
def box(lab: Lab) -> Iterator[Machine]:
    """A machine with a lingering user, and nothing of ours."""
    made = lab.machine()
    made.write(BOX_LIMITS, "[containers]\ndefault_sysctls = []\n")
    made.prepare_user("chargehand")
    yield made
    lab.remove(made)


def podman(machine: Machine, *words: str) -> str:
    uid = machine.run(["id", "-u", "chargehand"]).stdout.strip()
    return machine.run(["env", f"XDG_RUNTIME_DIR=/run/user/{uid}", "podman", *words], user="chargehand").stdout


def look(machine: Machine, reference: str) -> dict[str, Any]:
    """Start the image the way the unit does, and ask it about itself."""
    words = ["run", "--rm", "--pull=never", "--network=none", "--userns=keep-id:uid=1000,gid=1000", "--read-only"]
    words += ["--cap-drop=all", "--security-opt=no-new-privileges", "--entrypoint=python3", reference, "-B", "-c", LOOK]
    return dict(json.loads(podman(machine, *words)))


def test_systemd_and_podmans_generator_take_the_units(box: Machine) -> None:
    folder = "/run/units"
    box.write(f"{folder}/chargehand-agent.container", agent_quadlet(VALUES))
    box.write(f"{folder}/chargehand-broker.service", broker_unit(VALUES))
    generator = "/usr/lib/systemd/user-generators/podman-user-generator"
    made = box.run(["env", f"QUADLET_UNIT_DIRS={folder}", generator, "--user", "--dryrun"])
    assert "unsupported key" not in made.stderr
    assert "---chargehand-agent.service---" in made.stdout
    service = made.stdout.split("---chargehand-agent.service---")[1]
    box.write(f"{folder}/chargehand-agent.service", service)
    assert "[Install]" not in service.splitlines()
    assert "podman-user-wait-network-online" not in service
    for word in (
        "--read-only ",
        "--cap-drop all",
        "--network none",
        "no-new-privileges",
        "--pull=never",
        "--user 1000:1000",
    ):
        assert word in service
    verify = [
        "env",
        f"SYSTEMD_UNIT_PATH={folder}:",
        "XDG_RUNTIME_DIR=/run/user/0",
        "systemd-analyze",
        "--user",
        "verify",
    ]
    box.run(["mkdir", "-p", "/run/user/0"])
    for name in ("chargehand-broker.service", "chargehand-agent.service"):
        done = box.run([*verify, f"{folder}/{name}"], check=False)
        # Of what the generator keeps for itself ([X-Quadlet]) systemd says nothing; nor may it say anything of ours.
        complaints = [line for line in done.stderr.splitlines() if "chargehand" in line and "man page" not in line]
        assert (done.status, complaints) == (0, []), done.stderr


def test_the_image_made_without_an_engine_starts(box: Machine) -> None:
    with agent_archive() as archive:
        oci.load_image(box, archive)
        # Before the first start: podman then keeps a copy of the topmost layer, mapped for the worker's user, and counts it.
        config = json.loads(podman(box, "image", "inspect", agent_image_id(archive)))[0]
        found = look(box, agent_image_id(archive))
    print(
        f"without an engine: {config['Size'] / 1e6:.0f} MB, imports in {found['seconds']:.2f} s, Python {found['python']}"
    )
    assert (found["uid"], found["uncompiled"], found["supervisor"]) == (1000, [], False)
    assert config["Size"] <= image.MAX_UNPACKED_BYTES
    # There is nothing in it to run but Python.
    with pytest.raises(Exception, match="executable file|no such file"):
        podman(box, "run", "--rm", "--network=none", "--entrypoint=/bin/sh", config["Id"])


def test_the_containerfile_builds_without_a_network_and_starts(box: Machine, tmp_path: Path) -> None:
    root = context.source_root_of_this_installation()
    wheels = oci.wheelhouse(root / context.REQUIREMENTS)
    context.lay_out(tmp_path / "context", wheels=wheels)
    # The same is built by another machine's podman: `make image --engine podman` uses these very files.
    reference = oci.build_image(box, tmp_path / "context/Containerfile", tmp_path / "context")
    built = json.loads(podman(box, "image", "inspect", reference))[0]
    found = look(box, reference)
    print(f"Containerfile: {built['Size'] / 1e6:.0f} MB, imports in {found['seconds']:.2f} s, Python {found['python']}")
    assert (found["uid"], found["uncompiled"], found["supervisor"]) == (1000, [], False)
    assert built["Size"] <= image.MAX_UNPACKED_BYTES
    config = built["Config"]
    assert config["User"] == image.CONFIG["User"]
    assert config["Entrypoint"][1:] == image.CONFIG["Entrypoint"][1:]
    assert {name for name in image.CONFIG["Env"] if not name.startswith("PATH=")} <= set(config["Env"])
