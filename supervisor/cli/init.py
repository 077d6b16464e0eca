"""``chargehand init``: a settings file, the data directory and the gateway's keys.

Owns: where they go, that nothing is overwritten unasked, what to do next. Deliberately does not know: what a setting
means (``supervisor.settings`` writes the example), how keys are made.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from supervisor.cli.ask import confirmed
from supervisor.cli.context import JsonOption, Shared
from supervisor.cli.output import err, errors, fields, print_json, styled
from supervisor.errors import BadInput, BadSettings, Interrupted, StoreFailed
from supervisor.settings.load import FILE_NAME, example_toml, load, user_file
from supervisor.settings.model import Settings
from tools.values import JsonObject

app = typer.Typer(add_completion=False)

WRITTEN, KEPT, MADE, MENDED = "written", "kept", "made", "mended"


@app.command()
def init(
    context: typer.Context,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Put everything there: DIR/chargehand.toml, data in DIR/data.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Where the settings file goes.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the settings file anew; the old one is kept beside it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    only_print: Annotated[
        bool, typer.Option("--print", help="Only print the settings file, with every setting.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a commented chargehand.toml and make the data directory, the gateway's SSH key and its audit key.

    What is there already is kept: doing it twice changes nothing. Without --dir and --config the file goes to
    $XDG_CONFIG_HOME/chargehand, where every command finds it.
    """
    with errors(as_json):
        shared = context.find_object(Shared) or Shared()
        config = config or shared.config
        if directory is not None and config is not None:
            raise BadInput("--dir and --config both say where the settings file goes", next_step="use one of them")
        data_dir = shared.data_dir or (directory / "data" if directory is not None else None)
        text = settings_text(data_dir.expanduser().absolute() if data_dir is not None else None)
        if only_print:
            typer.echo(text, nl=False)
            return
        path = (directory / FILE_NAME if directory is not None else config or user_file()).expanduser().absolute()
        document = _init(path, text, shared.data_dir, force, yes)
        if as_json:
            print_json(document)
            return
        fields(
            [
                ("settings", f"{document['config']} ({document['config_was']})"),
                ("kept beside it", document["backup"]),
                ("data", f"{document['data_dir']} ({document['data_dir_was']})"),
                ("SSH key", document["ssh_public_key"]),
                ("audit key", document["audit_key_id"]),
            ]
        )
        if document["note"]:
            err.print(styled(document["note"], "yellow"))
        _next_steps(path, directory is not None or config is not None)


def settings_text(data_dir: Path | None) -> str:
    """The commented settings file; ``data_dir`` stands in it in force where it is given."""
    text = example_toml()
    if data_dir is None:
        return text
    # JSON's text form is TOML's too.
    line = f"data_dir = {json.dumps(str(data_dir))}"
    lines = text.splitlines()
    at = next((number for number, old in enumerate(lines) if old.startswith("# data_dir = ")), None)
    if at is None:
        return f"{line}\n\n{text}"
    lines[at] = line
    return "\n".join(lines) + "\n"


def _init(path: Path, text: str, data_dir: Path | None, force: bool, yes: bool) -> JsonObject:
    backup = None
    if path.exists() and not path.is_file():
        raise BadInput(
            "there is something else where the settings file goes", expected="a file, or nothing", got=str(path)
        )
    if path.exists() and force and path.read_text("utf-8", "replace") != text:
        _may_replace(path, yes)
        backup = path.with_name(f"{path.name}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        _write(path, text, backup)
        was = WRITTEN
    elif path.exists():
        was = KEPT
    else:
        _write(path, text, None)
        was = WRITTEN
    settings = load(path)
    note = None
    if data_dir is not None and data_dir.expanduser().absolute() != settings.data_dir:
        note = f"{path} was kept and has another data directory, {settings.data_dir}: --data-dir is needed every time"
        settings = load(path, data_dir=data_dir)
    data_was = _make_private(settings.data_dir)
    public_key, key_id = _keys(settings)
    return {
        "config": str(path),
        "config_was": was,
        "backup": None if backup is None else str(backup),
        "data_dir": str(settings.data_dir),
        "data_dir_was": data_was,
        "ssh_public_key": public_key,
        "audit_key_id": key_id,
        "note": note,
    }


def _may_replace(path: Path, yes: bool) -> None:
    answer = confirmed(f"Write {path} anew? The old one is kept beside it.", yes)
    if answer is None:
        raise BadInput(
            f"replacing {path} has to be confirmed, and there is no terminal to ask at",
            next_step="add --yes to --force",
        )
    if not answer:
        raise Interrupted("nothing was changed")


def _write(path: Path, text: str, backup: Path | None) -> None:
    """Whole or not at all; the old file goes to ``backup`` first. Raises ``BadSettings``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, "utf-8")
        if backup is not None:
            os.link(path, backup)
            temporary.replace(path)
        else:
            # A link is made once: a file that came in between is not overwritten.
            os.link(temporary, path)
            temporary.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise BadSettings(
            f"{path} could not be written: {error.strerror}",
            next_step=f"check who may write {path.parent}, or use --dir",
        ) from None


def _make_private(directory: Path) -> str:
    """Make the data directory, mode 0700, or mend the mode of one that is there. Raises ``StoreFailed``."""
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True, mode=0o700)
            return MADE
        if directory.stat().st_mode & 0o077:
            directory.chmod(0o700)
            return MENDED
    except OSError as error:
        raise StoreFailed(
            f"the data directory {directory} could not be made private: {error.strerror}",
            expected="a directory of this user, mode 0700",
            next_step="set data_dir in the settings file, or check who may write there",
        ) from None
    return KEPT


def _keys(settings: Settings) -> tuple[str, str]:
    from supervisor.activation.ssh import gateway_key, public_key_line
    from supervisor.audit.checkpoint import load_signer

    key = gateway_key(settings.data_dir, settings.ssh.key_file)
    return public_key_line(key), load_signer(settings.data_dir).key_id


def _next_steps(path: Path, named: bool) -> None:
    again = "" if not named or path.parent == Path.cwd() else f" --config {path}"
    err.print(styled("what to do next", "bold"))
    for command, text in (
        (f"chargehand{again} machine add here --embedded", "this computer as a machine, without sshd"),
        (f"chargehand{again} edge install root@HOST --machine NAME", "a real machine, with systemd and podman"),
        (f"chargehand{again} up", "the gateway, with an MLflow server of its own"),
        (f"chargehand{again} doctor", "whether all is well here"),
    ):
        err.print(styled(f"  {command}", "cyan") + styled(f"   {text}", "dim"))
    if named and again:
        err.print(styled(f"  CHARGEHAND_CONFIG={path} saves the --config", "dim"))
