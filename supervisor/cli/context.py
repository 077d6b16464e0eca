"""What every command shares: the settings file, ``--json``, and opening the store.

Owns: the options before the command's name. Deliberately does not know: the commands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from supervisor.settings.load import load
from supervisor.settings.model import Settings

if TYPE_CHECKING:  # importing the services costs a second, and `--help` must not
    from supervisor.runs.services import Services

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@dataclasses.dataclass
class Shared:
    """Options given before the command's name."""

    config: Path | None = None
    data_dir: Path | None = None


def settings_of(context: typer.Context) -> Settings:
    """The settings in force. Raises ``BadSettings``."""
    shared = context.find_object(Shared) or Shared()
    overrides = {"data_dir": shared.data_dir} if shared.data_dir is not None else {}
    return load(shared.config, **overrides)


def operator() -> str:
    """Who acts, for the audit: the login name of this user, and from where when over SSH."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    peer = os.environ.get("SSH_CONNECTION", "").split(" ")[0]
    return f"operator:{name}" + (f"@{peer}" if peer else "")


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Services]:
    """Store, ledger and spool for a command that makes no SSH connection; closed at the end."""
    from supervisor.runs.services import open_services

    services = open_services(settings)
    try:
        yield services
    finally:
        services.spool.close()
        services.ledger.close()
        services.store.close()
