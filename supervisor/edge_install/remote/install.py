"""Bringing a machine to what a document says, all or nothing where files replace files.

Standard library only, Python 3.9: it is sent to the machine as text (``supervisor.edge_install.program``).
"""

# Runs on Python 3.9: no `X | Y` at run time, no `zip(strict=)`.
# ruff: noqa: UP006, UP031, UP035, UP045

from __future__ import annotations

import base64
import contextlib
import fcntl
import grp
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import time
from functools import partial
from typing import BinaryIO, Iterator, List, Optional, Tuple

from supervisor.edge_install.remote.account import (
    AGENT,
    BROKER,
    INSTALLATION,
    RECORD,
    Account,
    answer,
    groups_of,
    has_image,
    is_running,
    progress,
    record_of,
    run,
    text_of,
    write_atomic,
)
from supervisor.edge_install.remote.changes import Changes, keys_by_root, make_keys, make_polkit
from supervisor.edge_install.remote.facts import LINGER, QUADLET, selinux
from supervisor.edge_install.remote.texts import SUBORDINATE_IDS, Failed, Json, free_ids, has_ids

IMAGE_S = 1800.0
BLOCK = 1 << 20
BACKUPS = 5
"""How many earlier states of the installed files are kept."""


def install(document: Json, payload: BinaryIO) -> Json:
    """Bring the machine to the state the document describes. Doing it twice changes nothing the second time."""
    changes = Changes(document["dry_run"])
    account = Account(document["user"], document["home"])
    earlier = record_of(account) or {}
    record: Json = dict(earlier, scope=document["scope"])
    for name in ("version", "machine", "choices"):
        record[name] = document[name]
    _must_be_idle(account)
    try:
        if document["scope"] == "system":
            _make_account(document, account, record, changes)
            account = Account(document["user"], document["home"])
            _label(account, document["home"], changes)
        _make_linger(account, record, changes)
        _make_image(document["image"], account, record, changes, payload)
        if account.exists:
            with _held(account, changes.dry):
                _make_files(document, account, changes, record)
        else:
            paths = [os.path.join(account.home, file["path"]) for file in document["files"]]
            changes.made += [{"what": "write", "path": path} for path in paths]
        make_keys(account, document["key_line"], keys_by_root(account, document["scope"]), changes)
        if document["scope"] == "system":
            make_polkit(document["polkit"], changes)
            if changes.made and not changes.dry and selinux()["mode"] != "disabled":
                run(["restorecon", "-RF", account.home], timeout=IMAGE_S)
    finally:
        # Written down also when a step failed: what was done so far must be known to the next run and to `uninstall`.
        if not changes.dry and Account(document["user"], document["home"]).exists:
            _save_record(Account(document["user"], document["home"]), record)
    if not changes.dry:
        _drop_images(account, earlier, record)
    return changes.result()


def _must_be_idle(account: Account) -> None:
    if is_running(account):
        raise Failed("a run is on at this machine", "broker and worker inactive", "active", "wait for it, or cancel it")


def _save_record(account: Account, record: Json) -> None:
    def save() -> None:
        folder = os.path.join(account.home, INSTALLATION)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        text = json.dumps(record, sort_keys=True, indent=1) + "\n"
        if text_of(os.path.join(folder, RECORD)) != text:
            write_atomic(os.path.join(folder, RECORD), text.encode(), 0o600)

    account.do(save)


def _make_account(document: Json, account: Account, whole: Json, changes: Changes) -> None:
    record = whole["account"] = dict(whole.get("account") or {"created": False, "groups": [], "subids": ""})
    name, home = account.name, document["home"]
    if not account.exists:
        # A password of '*' can never match, and is not the '!' that sshd without PAM takes for a locked account.
        words = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", home]
        words += ["--shell", document["shell"], "--password", "*", "--comment", "Chargehand edge agent", name]
        changes.make("create user %s with home" % name, home, partial(run, words))
        record["created"] = True
    else:
        changes.same("user %s" % name)
    if record["created"]:
        _make_home(account if changes.dry else Account(name, home), home, changes)
    uid = Account(name, home).uid
    if not (has_ids(text_of("/etc/subuid"), name, uid) and has_ids(text_of("/etc/subgid"), name, uid)):
        first = free_ids(text_of("/etc/subuid"), text_of("/etc/subgid"))
        ids = "%d-%d" % (first, first + SUBORDINATE_IDS - 1)
        words = ["usermod", "--add-subuids", ids, "--add-subgids", ids, name]
        changes.make("give %s the subordinate ids %s" % (name, ids), "/etc/subuid, /etc/subgid", partial(run, words))
        record["subids"] = ids
    known = {entry[0] for entry in grp.getgrall()}
    have = groups_of(account)
    missing = [group for group in document["groups"] if group in known and group not in have]
    unwanted = [group for group in record["groups"] if group not in document["groups"] and group in have]
    for group in missing:
        words = ["usermod", "-aG", group, name]
        changes.make("add %s to group %s" % (name, group), "/etc/group", partial(run, words))
    for group in unwanted:
        words = ["gpasswd", "-d", name, group]
        changes.make("take %s out of group %s" % (name, group), "/etc/group", partial(run, words))
    record["groups"] = sorted((set(record["groups"]) | set(missing)) - set(unwanted))
    if (missing or unwanted) and account.exists and os.path.isdir(account.runtime):
        # A user manager keeps the groups it was started with.
        words = ["systemctl", "restart", "user@%d.service" % account.uid]
        changes.make("restart the user manager, for its new groups", words[2], partial(run, words))


def _make_home(account: Account, home: str, changes: Changes) -> None:
    """A home that belongs to root: the agent's user cannot add a key, a shell start-up file or a link beside its own
    three folders, whatever it runs."""
    for name, owner, mode in (
        ("", 0, 0o755), (".ssh", 0, 0o755), (".local", account.uid, 0o700), (".config", account.uid, 0o700),
        (".cache", account.uid, 0o700),
    ):  # fmt: skip
        path = os.path.join(home, name) if name else home
        with contextlib.suppress(FileNotFoundError):
            info = os.lstat(path)
            if stat.S_ISDIR(info.st_mode) and info.st_uid == owner and stat.S_IMODE(info.st_mode) == mode:
                changes.same(path)
                continue
            if not stat.S_ISDIR(info.st_mode):
                raise Failed("%s is in the way" % path, "a folder, or nothing", "something else")

        def make(path: str = path, owner: int = owner, mode: int = mode) -> None:
            os.makedirs(path, exist_ok=True)
            os.chown(path, owner, owner if owner == 0 else account.gid)
            os.chmod(path, mode)

        changes.make("make folder", path, make)
    journals = os.path.join(home, INSTALLATION, "journal")
    if account.exists and os.path.isdir(journals) and os.lstat(journals).st_uid == 0:
        changes.make("give back kept journals", journals, partial(_give_back, account, home))


def _give_back(account: Account, home: str) -> None:
    """Journals that outlived an earlier installation belong to root; nobody else could reach them since."""
    for folder, _, names in os.walk(os.path.join(home, ".local")):
        for path in [folder, *(os.path.join(folder, name) for name in names)]:
            os.lchown(path, account.uid, account.gid)


def _make_linger(account: Account, record: Json, changes: Changes) -> None:
    """Lingering, and a user manager that runs. The record says whether it was an installation that enabled it."""
    record.setdefault("linger", False)
    if not os.path.exists(os.path.join(LINGER, account.name)):

        def enable() -> None:
            done = run(["loginctl", "enable-linger", account.name], check=False)
            if done.returncode != 0:
                raise Failed(
                    "lingering could not be enabled for %s" % account.name,
                    "loginctl enable-linger to work",
                    done.stderr.strip(),
                    "have an administrator run: loginctl enable-linger %s" % account.name,
                )

        changes.make("enable lingering for %s" % account.name, os.path.join(LINGER, account.name), enable)
        record["linger"] = True
    if changes.dry:
        return
    if os.geteuid() == 0:
        run(["systemctl", "start", "user@%d.service" % account.uid])
    deadline = time.monotonic() + 15
    while not os.path.exists(account.runtime + "/bus"):
        if time.monotonic() > deadline:
            raise Failed(
                "the user manager of %s has no bus" % account.name,
                account.runtime + "/bus",
                "nothing there",
                "install dbus-user-session (Debian, Ubuntu) or dbus-daemon, then run this again",
            )
        time.sleep(0.05)  # logind tells nobody when a lingering user's manager has come up


def _make_image(image: Json, account: Account, record: Json, changes: Changes, payload: BinaryIO) -> None:
    """The worker's image in this user's podman."""
    reference = image["reference"]
    record["image"] = {"reference": reference, "previous": _previous(record, reference)}
    if has_image(account, reference):
        changes.same("image %s" % reference)
        return
    if not changes.dry:
        if image["source"] == "load":
            progress("loading the image (%d MB)" % (image["bytes"] // 1000000))
            _load(image, account, payload)
        else:
            progress("pulling the image")
            account.run(["podman", "pull", "--quiet", reference], timeout=IMAGE_S)
        if not has_image(account, reference):
            raise Failed(
                "the image is not on the machine",
                reference,
                "podman does not know it",
                "give --image-archive FILE, or --image NAME@sha256:… of a registry that this machine reaches",
            )
    changes.made.append({"what": "%s image" % image["source"], "path": reference})


def _previous(earlier: Json, reference: str) -> Optional[str]:
    """The image to keep beside ``reference``, for going back."""
    before = earlier.get("image") or {}
    found = before.get("reference") if before.get("reference") != reference else before.get("previous")
    return found if isinstance(found, str) else None


def _load(image: Json, account: Account, payload: BinaryIO) -> None:
    become = account.identity()
    process = subprocess.Popen(
        ["podman", "load", "--quiet"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=account.environment(),
        cwd="/",
        user=become.get("user"),
        group=become.get("group"),
        extra_groups=become.get("extra_groups"),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    digest = hashlib.sha256()
    left = image["bytes"]
    broken = False
    while left:
        block = payload.read(min(left, BLOCK))
        if not block:
            process.kill()
            process.wait()
            raise Failed("the image archive ended early", "%d bytes" % image["bytes"], "%d" % (image["bytes"] - left))
        left -= len(block)
        digest.update(block)
        if not broken:
            try:
                process.stdin.write(block)
            except BrokenPipeError:
                broken = True
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    said = process.stdout.read().decode("utf-8", "backslashreplace").strip()
    if process.wait() != 0:
        raise Failed("podman load failed", "exit status 0", "%s: %s" % (process.returncode, said[-800:]))
    if digest.hexdigest() != image["sha256"]:
        raise Failed("the image archive was damaged on the way", image["sha256"], digest.hexdigest(), "run this again")


def _drop_images(account: Account, earlier: Json, record: Json) -> None:
    """Remove images of ours that are neither the current nor the one before."""
    kept = {record["image"]["reference"], record["image"]["previous"]}
    old = earlier.get("image") or {}
    for reference in {old.get("reference"), old.get("previous")} - kept - {None}:
        account.run(["podman", "rmi", "--ignore", str(reference)], check=False)


@contextlib.contextmanager
def _held(account: Account, dry: bool) -> Iterator[None]:
    """Hold the installation's lock (the gatekeeper's own): no run starts while files are replaced."""
    folder = os.path.join(account.home, INSTALLATION)
    path = os.path.join(folder, "lock")

    def make() -> None:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))

    if not dry:
        account.do(make)
    elif not os.path.exists(path):
        yield
        return
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "r") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed(
                "the installation is in use", "no start, stop or apply at this moment", "its lock is held", "try again"
            ) from None
        # Between the first look and the lock a run may have begun.
        _must_be_idle(account)
        yield


def _make_files(document: Json, account: Account, changes: Changes, record: Json) -> None:
    """The files of the installation, all or none of them, proven to work before the earlier ones are given up."""
    files = document["files"]
    record["files"] = [os.path.join(account.home, file["path"]) for file in files]
    done = account.do(lambda: write_files(account.home, files, changes.dry))
    for change in done["changed"]:
        changes.made.append({"what": "replace" if change["backup"] else "write", "path": change["path"]})
    changes.unchanged += done["unchanged"]
    if changes.dry:
        return
    try:
        if any(change["path"].endswith((".service", ".container")) for change in done["changed"]):
            account.systemctl("daemon-reload")
            changes.made.append({"what": "reload", "path": "systemd user manager of %s" % account.name})
        prove(document, account)
    except Failed:
        account.do(lambda: put_back(done["changed"]))
        account.systemctl("daemon-reload", check=False)
        account.run(
            [document["python"], "-I", os.path.join(account.home, INSTALLATION, "host.pyz"), "compile"], check=False
        )
        raise


def write_files(home: str, files: List[Json], dry: bool) -> Json:
    """Bring files to what they should hold. What differs is backed up, then replaced, each by a rename.

    Returns ``{"changed": [{"path", "backup"}], "unchanged": [path]}``. On an error everything is put back.
    """
    changed: List[Json] = []
    unchanged: List[str] = []
    backup = os.path.join(home, INSTALLATION, "backup", time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-install")
    try:
        for file in files:
            path = os.path.join(home, file["path"])
            data = base64.b64decode(file["content"])
            mode = int(file["mode"])
            before = _content(path)
            if before == (data, mode):
                unchanged.append(path)
                continue
            change: Json = {"path": path, "backup": None}
            if dry:
                change["backup"] = path if before else None
                changed.append(change)
                continue
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            if before is not None:
                os.makedirs(backup, mode=0o700, exist_ok=True)
                change["backup"] = os.path.join(backup, os.path.basename(path))
                write_atomic(change["backup"], before[0], before[1])
            changed.append(change)
            write_atomic(path, data, mode)
    except OSError as error:
        put_back(changed)
        raise Failed(
            "a file of the installation could not be written", "free space and permission", str(error),
            "the earlier files are back in place; mend it and run this again",
        ) from None  # fmt: skip
    _prune_backups(os.path.dirname(backup))
    return {"changed": changed, "unchanged": unchanged}


def put_back(changed: List[Json]) -> None:
    """Undo ``write_files``: the backups over what was written; what was new is removed."""
    for change in reversed(changed):
        if change["backup"]:
            before = _content(change["backup"])
            if before is not None:
                write_atomic(change["path"], before[0], before[1])
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(change["path"])


def _content(path: str) -> Optional[Tuple[bytes, int]]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read(), stat.S_IMODE(os.fstat(fd).st_mode)


def _prune_backups(folder: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        ours = sorted(name for name in os.listdir(folder) if name.endswith("-install"))
        for name in ours[:-BACKUPS]:
            shutil.rmtree(os.path.join(folder, name))


def prove(document: Json, account: Account) -> None:
    """The new files work: systemd knows both units, the image starts, the gatekeeper answers. Raises ``Failed``."""
    progress("checking units, image and gatekeeper")
    states = account.systemctl("show", "--property=LoadState", "--value", BROKER, AGENT).split()
    if states != ["loaded", "loaded"]:
        folder = "QUADLET_UNIT_DIRS=%s/.config/containers/systemd" % account.home
        why = account.run(["env", folder, QUADLET, "-dryrun", "-user"], check=False).stderr.strip()[-600:]
        raise Failed("systemd does not take the units", "both loaded", "%s; %s" % (", ".join(states), why))
    enabled = account.systemctl("is-enabled", BROKER, AGENT, check=False).split()
    if "enabled" in enabled:
        raise Failed("a unit would start at boot", "static or generated units", ", ".join(enabled))
    check = ["systemd-run", "--user", "--quiet", "--wait", "--pipe", "--collect", "podman", "run", "--rm"]
    check += ["--pull=never", "--network=none", "--userns=keep-id:uid=1000,gid=1000", "--read-only", "--cap-drop=all"]
    check += ["--security-opt=no-new-privileges", "--entrypoint=python3", document["image"]["reference"]]
    check += ["-c", "import a2a.types, uvicorn, edge_agent.worker"]
    account.run(check, timeout=120.0)
    # podman keeps one process per user to hold the namespace; after an installation nothing may be left running.
    account.run(["podman", "system", "migrate"], check=False)
    host = [document["python"], "-I", os.path.join(account.home, INSTALLATION, "host.pyz")]
    # Compiled once, not at every start; an archive that cannot be compiled fails here.
    account.run([*host, "compile"])
    done = account.run(["env", "SSH_ORIGINAL_COMMAND=hello", *host, "gatekeeper"], check=False)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        said = {}
    if done.returncode != 0 or said.get("machine") != document["machine"]:
        raise Failed(
            "the gatekeeper does not answer `hello`",
            "machine %s" % document["machine"],
            "status %d: %s" % (done.returncode, (done.stdout + done.stderr).strip()[-800:]),
        )


def _label(account: Account, home: str, changes: Changes) -> None:
    """Under SELinux, a home outside of /home gets the labels of one: else sshd may not read the key, nor containers
    their layers."""
    if selinux()["mode"] == "disabled" or home.startswith("/home/"):
        return
    known = answer(["semanage", "fcontext", "--list", "--locallist"])
    if re.search(r"(?m)^%s = /home/%s$" % (re.escape(home), re.escape(account.name)), known):
        changes.same("SELinux labels of %s" % home)
        return

    def label() -> None:
        run(["semanage", "fcontext", "--add", "--equal", "/home/%s" % account.name, home])
        run(["restorecon", "-RF", home], timeout=IMAGE_S)

    changes.make("label as a home (SELinux)", home, label)
