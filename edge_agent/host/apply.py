"""The verb ``apply``: files of the edge installation, replaced atomically, with a backup.

Owns: which files those are, and the order: check everything, back everything up, then replace one by one.
Deliberately does not know: what is in the files.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import shutil
import time
from typing import Any, Dict, List, Mapping, NamedTuple

from edge_agent.host.documents import read_object
from edge_agent.host.errors import BadRequest, MachineFailed
from edge_agent.host.home import Home, HostConfig, write_atomic
from tools.values import JsonObject, Malformed, want

# Name in the document → where it lies. Nothing else can be written through this verb.
UNITS = "~/.config/systemd/user/chargehand-broker.service"
QUADLET = "~/.config/containers/systemd/chargehand-agent.container"
KEEP_BACKUPS = 5


class _File(NamedTuple):
    name: str
    path: str
    mode: int
    content: bytes


def targets(home: Home) -> Dict[str, str]:
    """The files that belong to the installation, by the name they have in the document."""
    return {
        "host.pyz": home.zipapp,
        "host.json": home.config_path,
        "chargehand-broker.service": os.path.expanduser(UNITS),
        "chargehand-agent.container": os.path.expanduser(QUADLET),
    }


def apply_files(home: Home, document: Mapping[str, Any]) -> JsonObject:
    """Write the files of ``document`` that differ; returns ``{changed, unchanged, backup}``. Raises before anything is
    written if one entry is not right."""
    files = [_read(home, entry) for entry in want(document, "files", list)]
    if len({file.name for file in files}) != len(files):
        raise BadRequest("a file is named twice")
    dry_run = want(document, "dry_run", bool, False)
    changed = [file for file in files if not _same(file)]
    unchanged = [file.name for file in files if file not in changed]
    backup = ""
    if changed and not dry_run:
        backup = _back_up(home, changed)
        try:
            _replace(changed)
        except OSError as error:
            raise MachineFailed(
                "the installation could not be written: %s" % error.strerror,
                got=str(error.filename),
                next_step="free disk space, then apply again; the files before are in %s" % backup,
            ) from error
    return {"changed": [file.name for file in changed], "unchanged": unchanged, "backup": backup, "dry_run": dry_run}


def _replace(files: List[_File]) -> None:
    """Write every file beside its place first: what can fail (space, permission) fails before anything is replaced."""
    staged: List[str] = []
    try:
        for file in files:
            os.makedirs(os.path.dirname(file.path), mode=0o700, exist_ok=True)
            staged.append(file.path + ".new")
            write_atomic(staged[-1], file.content, file.mode)
        for file in files:
            os.rename(file.path + ".new", file.path)
    except OSError:
        for path in staged:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        raise


def _read(home: Home, entry: Any) -> _File:
    if not isinstance(entry, dict):
        raise BadRequest("an entry of 'files' is not an object", got=repr(entry)[:80])
    name = want(entry, "path", str)
    known = targets(home)
    if name not in known:
        raise BadRequest("this file is not part of the installation", expected=", ".join(sorted(known)), got=name[:120])
    try:
        content = base64.b64decode(want(entry, "content_b64", str), validate=True)
    except binascii.Error as error:
        raise BadRequest("the content of %s is not base64: %s" % (name, error)) from error
    if hashlib.sha256(content).hexdigest() != want(entry, "sha256", str):
        raise BadRequest("the content of %s does not have the digest it states" % name)
    if name == "host.json":
        try:
            HostConfig.from_json(read_object(content))
        except Malformed as error:
            raise BadRequest("the new host.json is not right: %s" % error) from error
    return _File(name, known[name], 0o644 if name != "host.json" else 0o600, content)


def _same(file: _File) -> bool:
    try:
        with open(file.path, "rb") as old:
            return old.read() == file.content
    except OSError:
        return False


def _back_up(home: Home, files: List[_File]) -> str:
    try:
        os.makedirs(home.backup, mode=0o700, exist_ok=True)
        directory = os.path.join(home.backup, time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + "-%d" % os.getpid())
        os.mkdir(directory, 0o700)
        for file in files:
            if os.path.exists(file.path):
                shutil.copy2(file.path, os.path.join(directory, file.name))
        for old in sorted(os.listdir(home.backup))[:-KEEP_BACKUPS]:
            shutil.rmtree(os.path.join(home.backup, old))
    except OSError as error:
        raise MachineFailed("the backup could not be made: %s" % error.strerror, next_step="free disk space") from error
    return directory
