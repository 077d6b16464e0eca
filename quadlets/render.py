"""Unit files from templates, with values that cannot be anything but values.

Owns: what may be rendered into a unit file and what it must look like, and where the templates lie.
Deliberately does not know: where a unit file goes, who writes it, how a unit is started. Pure, but for reading the two
templates.

A unit file is a program for systemd and podman: a line break begins a new directive, ``%`` a specifier, ``$`` a
variable, a quote or backslash changes how a line is split, a colon the meaning of a mount. So nothing is escaped here:
each field has a narrow grammar without those characters, and everything else is refused.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

BROKER_UNIT = "chargehand-broker.service"
AGENT_UNIT = "chargehand-agent.service"
AGENT_QUADLET = "chargehand-agent.container"

NETWORKS = ("none", "host")
MAX_PATH_BYTES = 200
# UNIX socket paths end at 107 bytes; the longest name below a run directory is "worker/inference.sock".
MAX_RUN_DIR_BYTES = 80

_MACHINE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_PATH = re.compile(r"(/[A-Za-z0-9_+@.-]+)+")
_IMAGE_ID = re.compile(r"sha256:[0-9a-f]{64}")
_NAME_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_IMAGE_BY_DIGEST = re.compile(
    rf"[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?(?::[0-9]{{1,5}})?(?:/{_NAME_PART})+@sha256:[0-9a-f]{{64}}"
)
_PLACEHOLDER = re.compile(r"\{\{([a-z_]+)\}\}")


class BadValue(ValueError):
    """A value must not stand in a unit file. ``field``, ``expected`` and ``got`` say which, what would do, what came."""

    def __init__(self, field: str, expected: str, got: object) -> None:
        super().__init__(f"cannot render {field} into a unit file: expected {expected}, got {got!r}")
        self.field = field
        self.expected = expected
        self.got = got


@dataclasses.dataclass(frozen=True)
class UnitValues:
    """Everything that differs between two installations' unit files; checked when made, raises ``BadValue``.

    Args:
        machine: id of the machine (contracts.md, "Ids").
        image: ``sha256:<64 hex digits>``, the id of an image that is on the machine, or ``name@sha256:<64 hex digits>``.
            Never a tag: what a tag means can change between two runs.
        home_dir: absolute path of the installation (contracts.md, "A machine's home").
        python: absolute path of the interpreter that runs ``host.pyz``.
        run_dir: absolute path of the directory of sockets; ``None``: ``chargehand`` in the user's runtime directory.
        max_run_s: seconds after which systemd ends worker and broker, whatever they say.
        network: the container's network. ``none``: it talks through its sockets only; ``host``: for a model that
            listens on the machine's own 127.0.0.1 (docs/decisions/0001).
        broker_memory_mib: MiB for the broker and the commands it runs; a package manager's query takes about 300.
        broker_tasks: processes and threads of broker and commands together.
        agent_memory_mib: MiB for the worker and podman's own processes.
        agent_tasks: processes and threads of the worker and of podman's own processes (podman alone starts about 20).
    """

    machine: str
    image: str
    home_dir: str
    python: str = "/usr/bin/python3"
    run_dir: str | None = None
    max_run_s: int = 3600
    network: str = "none"
    broker_memory_mib: int = 512
    broker_tasks: int = 128
    agent_memory_mib: int = 512
    agent_tasks: int = 128

    def __post_init__(self) -> None:
        _match("machine", _MACHINE, "1 to 63 of a-z, 0-9 and -, beginning with a letter or digit", self.machine)
        check_image(self.image)
        _check_path("home_dir", self.home_dir, MAX_PATH_BYTES)
        _check_path("python", self.python, MAX_PATH_BYTES)
        if self.run_dir is not None:
            _check_path("run_dir", self.run_dir, MAX_RUN_DIR_BYTES)
        if self.network not in NETWORKS:
            raise BadValue("network", f"one of {', '.join(NETWORKS)}", self.network)
        _check_number("max_run_s", self.max_run_s, 10, 24 * 3600)
        _check_number("broker_memory_mib", self.broker_memory_mib, 64, 1 << 20)
        _check_number("agent_memory_mib", self.agent_memory_mib, 128, 1 << 20)
        _check_number("broker_tasks", self.broker_tasks, 8, 1 << 16)
        _check_number("agent_tasks", self.agent_tasks, 32, 1 << 16)


def check_image(text: str) -> str:
    """``text`` if it names one image by digest, as ``UnitValues.image`` wants it; raises ``BadValue``."""
    if not isinstance(text, str) or not (_IMAGE_ID.fullmatch(text) or _IMAGE_BY_DIGEST.fullmatch(text)):
        raise BadValue("image", "sha256:<64 hex digits> or host/name@sha256:<64 hex digits>, never a tag", text)
    return text


def broker_unit(values: UnitValues) -> str:
    """The text of ``chargehand-broker.service``."""
    return _render(BROKER_UNIT, values)


def agent_quadlet(values: UnitValues) -> str:
    """The text of ``chargehand-agent.container``, from which podman's generator makes ``chargehand-agent.service``."""
    return _render(AGENT_QUADLET, values)


def _render(template: str, values: UnitValues) -> str:
    fields = {name: str(value) for name, value in dataclasses.asdict(values).items()}
    if values.run_dir is None:
        fields["run_dir"] = "%t/chargehand"
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return _PLACEHOLDER.sub(lambda found: fields[found[1]], text)


def _match(field: str, pattern: re.Pattern[str], expected: str, value: object) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise BadValue(field, expected, value)


def _check_path(field: str, value: object, limit: int) -> None:
    expected = (
        f"an absolute path of letters, digits and any of _ + @ . - /, at most {limit} bytes, without . or .. in it"
    )
    _match(field, _PATH, expected, value)
    if len(str(value)) > limit or {".", ".."} & set(str(value).split("/")):
        raise BadValue(field, expected, value)


def _check_number(field: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadValue(field, f"a whole number from {least} to {most}", value)
