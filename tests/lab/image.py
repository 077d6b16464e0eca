"""The root file system every machine of the lab starts from, built once per recipe and kept.

Owns the recipe, its digest, the cache of built trees and its pruning. The package archive is the box's own: which
mirrors, proxies and options that is gets read from the box's apt settings at run time, so no host is named here.
Knows nothing of machines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab import box

SUITE = "trixie"
BUILD_SECONDS = 900.0
"""A build takes half a minute from a near mirror; this is for a slow one."""
KEPT = 3
"""Built images of one kind that stay in the cache: enough to go back and forth between branches."""

PACKAGES = (
    *("systemd", "systemd-sysv", "systemd-resolved", "systemd-timesyncd", "udev", "kmod", "polkitd"),
    *("dbus", "dbus-user-session", "libpam-systemd", "login", "passwd", "util-linux", "uidmap"),
    *("podman", "crun", "passt", "netavark"),
    *("openssh-server", "python3", "ca-certificates", "openssl", "tzdata"),
    # What the observers look at on a real machine.
    *("iproute2", "iputils-ping", "nftables", "bind9-dnsutils", "procps", "lsof", "sysstat", "file", "cron"),
)

NO_DOCUMENTATION = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
)

MASKED = (
    # Each of these waits for, or talks to, something a machine of the lab does not have.
    "etc/systemd/user/podman-user-wait-network-online.service",
    "etc/systemd/system/console-getty.service",
    "etc/systemd/system/apt-daily.timer",
    "etc/systemd/system/apt-daily-upgrade.timer",
)

STORAGE = "/var/lib/lab-storage"
"""Where podman of every user keeps its images: a directory of the box, because overlay does not stack on overlay.

Named once for the whole machine, so it holds for whichever user, with whichever home, is created later.
"""

ADMIN_KEYS = "/etc/ssh/lab_admin_keys"

FILES = {
    "etc/ssh/sshd_config.d/10-lab.conf": (
        # The test's own way in, to every account; what a product writes into authorized_keys stays what it is.
        f"AuthorizedKeysFile .ssh/authorized_keys {ADMIN_KEYS}\n"
        "PermitRootLogin prohibit-password\n"
        "PasswordAuthentication no\n"
        "UseDNS no\n"
    ),
    # The box may have no pids controller to give; podman then refuses to start anything with its default limit.
    "etc/containers/containers.conf": "[containers]\npids_limit = 0\n",
    "etc/containers/storage.conf": (
        '[storage]\ndriver = "overlay"\nrunroot = "/run/containers/storage"\n'
        f'graphroot = "{STORAGE}/root"\nrootless_storage_path = "{STORAGE}/$UID"\n'
    ),
}


@dataclass(frozen=True)
class Recipe:
    """All that decides what a built image holds."""

    kind: str
    packages: tuple[str, ...]
    suite: str = SUITE
    variant: str = "minbase"
    dpkg_options: tuple[str, ...] = NO_DOCUMENTATION
    files: dict[str, str] = field(default_factory=dict)
    masked: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    revision: int = 1

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when anything in the recipe does."""
        text = json.dumps([self.__dict__, platform.machine()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


MACHINE = Recipe(
    kind="machine",
    packages=PACKAGES,
    files=FILES,
    masked=MASKED,
    # Keys, names and addresses belong to one machine, never to the image; the package lists belong to the box.
    removed=(
        "etc/ssh/ssh_host_*",
        "etc/machine-id",
        "etc/hostname",
        "etc/apt/sources.list*",
        "etc/apt/apt.conf.d/99mm*",
    ),
)


@contextlib.contextmanager
def machine_image(say: Callable[[str], None] = lambda line: None) -> Iterator[Path]:
    """The root file system of a machine, built when the cache has none; not pruned by anyone inside the `with`."""
    with kept("images", MACHINE.kind, MACHINE.digest, lambda target: _build_tree(MACHINE, target, say)) as tree:
        yield tree


@contextlib.contextmanager
def kept(shelf: str, kind: str, digest: str, build: Callable[[Path], None]) -> Iterator[Path]:
    """One cached thing: `build(path)` makes it when it is missing, and it stays for as long as the `with` lasts.

    Safe when several processes ask at once: one builds, the others wait. A build that fails or is killed leaves
    nothing that could be taken for a whole one.
    """
    folder = box.cache_directory() / shelf
    target = folder / f"{kind}-{digest}"
    while True:
        with box.locked(folder / f"{target.name}.build-lock"):
            if not target.exists():
                unfinished = folder / f".building-{target.name}"
                # Whoever left these is dead: the lock is here.
                for stale in folder.glob(f"{unfinished.name}*"):
                    discard(stale)
                try:
                    build(unfinished)
                    unfinished.rename(target)
                finally:
                    discard(unfinished)
        lock = folder / f"{target.name}.lock"
        with box.locked(lock, shared=True):
            # Between the two locks somebody may have pruned it.
            if target.exists():
                os.utime(lock)
                _prune(folder, kind, target.name)
                yield target
                return


def discard(path: Path) -> None:
    """Delete a file or a tree that may be there."""
    if path.is_dir() and not path.is_symlink():
        box.unmount_below(path)
        box.remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _prune(folder: Path, kind: str, in_use: str) -> None:
    """Delete what was used longest ago, beyond the newest `KEPT`; what somebody holds stays."""

    def last_used(thing: Path) -> float:
        with contextlib.suppress(FileNotFoundError):
            return (folder / f"{thing.name}.lock").stat().st_mtime
        return 0.0

    things = [path for path in folder.glob(f"{kind}-*") if not path.name.endswith("lock") and path.name != in_use]
    for thing in sorted(things, key=last_used, reverse=True)[KEPT - 1 :]:
        with contextlib.suppress(BlockingIOError), box.locked(folder / f"{thing.name}.lock", wait=False):
            discard(thing)


def _build_tree(recipe: Recipe, target: Path, say: Callable[[str], None]) -> None:
    began = time.monotonic()
    say(f"building the {recipe.kind} image {recipe.digest} (once; it is kept in {target.parent}) ...")
    mmdebstrap(recipe, target)
    finish_tree(recipe, target)
    say(f"built in {time.monotonic() - began:.0f} s")


def finish_tree(recipe: Recipe, tree: Path) -> None:
    """Lay the recipe's own files over an unpacked tree."""
    for pattern in recipe.removed:
        for path in tree.glob(pattern):
            discard(path)
    for name, text in recipe.files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in recipe.masked:
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/null")


_APART = (
    # In namespaces of its own, and gone with whoever started it: a build that is killed halfway leaves neither a /proc
    # mounted in its tree nor a process that goes on writing into it.
    *("setpriv", "--pdeathsig=KILL", "--"),
    *("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc", "--"),
)


def mmdebstrap(recipe: Recipe, target: Path) -> None:
    """Unpack and configure the recipe's packages in the directory `target`, from the box's own package archive."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = target.parent / f"{target.name}.sources"
    words = ["mmdebstrap", "--mode=root", "--format=directory", f"--variant={recipe.variant}"]
    words += [f"--include={','.join(recipe.packages)}"]
    words += [f"--dpkgopt={option}" for option in recipe.dpkg_options]
    words += [f"--aptopt={option}" for option in apt_options()]
    words += [recipe.suite, str(target)]
    try:
        if entries := box_sources(recipe.suite):
            sources.write_text(entries)
            words.append(str(sources))
        box.run([*_APART, *words], timeout=BUILD_SECONDS, env=_build_env())
    finally:
        sources.unlink(missing_ok=True)


def _build_env() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}


# --- the box's own package archive ---------------------------------------------------------------------------------


def box_sources(suite: str, apt: Path = Path("/etc/apt"), release: Path = Path("/etc/os-release")) -> str:
    """The box's own sources of its own release, rewritten for `suite`, in the deb822 form.

    Empty when the box names none that can be rewritten: mmdebstrap then takes its default.
    """
    own = _codename(release)
    if own is None:
        return ""
    stanzas = []
    for path in sorted((apt / "sources.list.d").glob("*.sources")):
        stanzas += _from_deb822(path.read_text(), own, suite)
    for path in [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]:
        if path.is_file():
            stanzas += _from_one_line(path.read_text(), own, suite)
    return "\n".join(stanzas)


def apt_options() -> list[str]:
    """How the box reaches its archive: proxies, certificates and the leniencies its owner set."""
    wanted = ("Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries")
    options = []
    for line in box.run(["apt-config", "dump"]).stdout.decode().splitlines():
        name, _, value = line.partition(" ")
        if name.startswith(wanted) and value != '"";':
            options.append(line.rstrip(";"))
    return options


def _codename(release: Path) -> str | None:
    settings = dict(line.split("=", 1) for line in release.read_text().splitlines() if "=" in line)
    if settings.get("ID", "").strip('"') != "debian":
        return None
    return settings.get("VERSION_CODENAME", "").strip('"') or None


def _renamed(suites: list[str], own: str, suite: str) -> list[str]:
    return [suite + name.removeprefix(own) for name in suites if name == own or name.startswith((f"{own}-", f"{own}/"))]


def _stanza(uris: list[str], suites: list[str], components: list[str], options: dict[str, str]) -> str:
    lines = ["Types: deb", f"URIs: {' '.join(uris)}", f"Suites: {' '.join(suites)}"]
    lines += [f"Components: {' '.join(components)}"] if components else []
    lines += [f"{name}: {value}" for name, value in options.items()]
    return "\n".join(lines) + "\n"


def _from_deb822(text: str, own: str, suite: str) -> list[str]:
    stanzas = []
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for block in plain.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line[:1].isspace() and name:
                fields[name] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        suites = _renamed(fields.get("suites", "").split(), own, suite)
        if "deb" in fields.get("types", "").split() and suites and fields.get("enabled", "yes").lower() != "no":
            options = {"Signed-By": fields["signed-by"]} if "signed-by" in fields else {}
            options |= {"Trusted": fields["trusted"]} if "trusted" in fields else {}
            stanzas.append(_stanza(fields["uris"].split(), suites, fields.get("components", "").split(), options))
    return stanzas


def _from_one_line(text: str, own: str, suite: str) -> list[str]:
    stanzas = []
    for line in text.splitlines():
        words = line.partition("#")[0].replace("[", " [ ").replace("]", " ] ").split()
        if not words or words[0] != "deb":
            continue
        options: dict[str, str] = {}
        rest = words[1:]
        if rest[:1] == ["["] and "]" in rest:
            end = rest.index("]")
            given = dict(word.split("=", 1) for word in rest[1:end] if "=" in word)
            options = {title: given[title.lower()] for title in ("Signed-By", "Trusted") if title.lower() in given}
            rest = rest[end + 1 :]
        suites = _renamed(rest[1:2], own, suite)
        if suites:
            stanzas.append(_stanza([rest[0]], suites, rest[2:], options))
    return stanzas
