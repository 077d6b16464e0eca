"""Taking an installation off a machine.

Standard library only, Python 3.9: it is sent to the machine as text (``supervisor.edge_install.program``).
"""

# Runs on Python 3.9: no `X | Y` at run time, no `zip(strict=)`.
# ruff: noqa: UP006, UP031, UP035

from __future__ import annotations

import contextlib
import grp
import os
import shutil
from functools import partial
from typing import List

from supervisor.edge_install.remote.account import (
    AGENT,
    BROKER,
    INSTALLATION,
    SYSTEM_PATH,
    Account,
    has_image,
    is_running,
    record_of,
    run,
)
from supervisor.edge_install.remote.changes import Changes, keys_by_root, make_keys, make_polkit
from supervisor.edge_install.remote.facts import LINGER, selinux
from supervisor.edge_install.remote.texts import Failed, Json


def uninstall(document: Json) -> Json:
    """Take everything away that an installation brought; journals stay unless ``purge``."""
    changes = Changes(document["dry_run"])
    account = Account(document["user"], document["home"])
    record = record_of(account)
    if not account.exists or (record is None and not document["force"]):
        if document["scope"] == "system":
            make_polkit(None, changes)
        changes.notes.append("no installation was found for user %s" % document["user"])
        return changes.result()
    record = record or {}
    if is_running(account):
        if not document["force"]:
            raise Failed(
                "a run is on at this machine", "inactive", "active", "cancel the run, or use --force to stop it"
            )
        changes.make("stop", "%s, %s" % (BROKER, AGENT), lambda: account.systemctl("stop", AGENT, BROKER))
    make_keys(account, None, keys_by_root(account, document["scope"]), changes)
    created = bool((record.get("account") or {}).get("created")) and _home_is_ours(account, document["home"])
    if document["scope"] == "system":
        make_polkit(None, changes)
    _remove_images(account, record, created, changes)
    if created and document["scope"] == "system":
        _remove_account(account, document, changes)
        return changes.result()
    folder = os.path.join(account.home, INSTALLATION)
    done = account.do(lambda: remove_files(folder, list(record.get("files", [])), document["purge"], changes.dry))
    changes.made += [{"what": "remove", "path": path} for path in done["removed"]]
    if done["kept"]:
        changes.notes.append("journals are kept in %s" % done["kept"])
    if not changes.dry and os.path.exists(account.runtime + "/bus"):
        account.systemctl("daemon-reload", check=False)
    for group in (record.get("account") or {}).get("groups", []):
        words = ["gpasswd", "-d", account.name, group]
        changes.make("take %s out of group %s" % (account.name, group), "/etc/group", partial(run, words))
    ids = (record.get("account") or {}).get("subids")
    if ids:
        words = ["usermod", "--del-subuids", ids, "--del-subgids", ids, account.name]
        changes.make("take back the subordinate ids", "/etc/subuid, /etc/subgid", lambda: run(words))
    if record.get("linger"):
        path = os.path.join(LINGER, account.name)
        changes.make("disable lingering", path, lambda: run(["loginctl", "disable-linger", account.name]))
    return changes.result()


def _home_is_ours(account: Account, home: str) -> bool:
    """Whether this is the home an installation makes: the record lies where the agent's user can write to it, and must
    not be able to have root delete another folder."""
    return account.home == home and os.path.isdir(home) and not os.path.islink(home) and os.lstat(home).st_uid == 0


def remove_files(folder: str, files: List[str], purge: bool, dry: bool) -> Json:
    """Remove the files of an installation and its folder, but not its journals (unless ``purge``)."""
    removed = [path for path in files if os.path.lexists(path) and not path.startswith(folder + os.sep)]
    if not dry:
        for path in removed:
            os.unlink(path)
    kept = ""
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if name == "journal" and not purge and os.listdir(path):
            kept = path
            continue
        removed.append(path)
        if not dry:
            _remove(path)
    if not kept and os.path.isdir(folder):
        removed.append(folder)
        if not dry:
            os.rmdir(folder)
    return {"removed": removed, "kept": kept}


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _remove_images(account: Account, record: Json, created: bool, changes: Changes) -> None:
    if not os.path.isdir(account.runtime) or not shutil.which("podman", path=SYSTEM_PATH):
        return
    if created:
        # The whole storage of an account that exists for this alone, wherever podman was told to keep it.
        words = ["podman", "system", "reset", "--force"]
        changes.make(
            "remove all images of %s" % account.name, "podman storage", lambda: account.run(words, check=False)
        )
        return
    image = record.get("image") or {}
    for reference in (image.get("reference"), image.get("previous")):
        if reference and has_image(account, str(reference)):
            words = ["podman", "rmi", "--force", str(reference)]
            changes.make("remove image", str(reference), partial(account.run, words, check=False))
    if not changes.dry:
        account.run(["podman", "system", "migrate"], check=False)


def _remove_account(account: Account, document: Json, changes: Changes) -> None:
    journals = os.path.join(account.home, INSTALLATION, "journal")
    path = os.path.join(LINGER, account.name)
    if os.path.exists(path):
        changes.make("disable lingering", path, lambda: run(["loginctl", "disable-linger", account.name]))
    units = ["user@%d.service" % account.uid, "user-%d.slice" % account.uid]
    changes.make(
        "stop every process of %s" % account.name,
        ", ".join(units),
        lambda: run(["systemctl", "stop", *units], check=False),
    )
    keep = not document["purge"] and os.path.isdir(journals) and bool(os.listdir(journals))

    def clear() -> None:
        if not keep:
            shutil.rmtree(account.home)
            return
        # Nothing of this user runs any more: root may walk its folders now.
        kept = [journals[: len(account.home)]]
        for name in os.path.relpath(journals, account.home).split(os.sep):
            kept.append(os.path.join(kept[-1], name))
        for folder, child in [(kept[place - 1], kept[place]) for place in range(1, len(kept))]:
            for name in os.listdir(folder):
                other = os.path.join(folder, name)
                if other != child:
                    _remove(other)
            os.chown(child, 0, 0)
            os.chmod(child, 0o700)
        for folder, _, names in os.walk(journals):
            for name in names:
                os.lchown(os.path.join(folder, name), 0, 0)

    changes.make("remove all but the journals of" if keep else "remove", account.home, clear)
    if keep:
        changes.notes.append("journals are kept in %s" % journals)
    changes.make("remove user %s" % account.name, "/etc/passwd", lambda: _remove_user(account))
    if selinux()["mode"] != "disabled" and not account.home.startswith("/home/"):
        words = ["semanage", "fcontext", "--delete", "--equal", "/home/%s" % account.name, account.home]
        changes.make("remove the SELinux labels", account.home, lambda: run(words, check=False))


def _remove_user(account: Account) -> None:
    run(["userdel", account.name])
    with contextlib.suppress(KeyError):
        if not grp.getgrnam(account.name)[3]:
            run(["groupdel", account.name], check=False)
