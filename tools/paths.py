"""Which paths may be read, listed or written, and how a file is opened without a race.

Owns: the lexical rules (absolute, no ``..``), read roots, the files of ``/proc`` and ``/sys`` that may be read, secret
roots, and opening beneath the root without following a link.
Deliberately does not know: policies, commands, who asks.

The rules are pure. Only ``resolve``, ``open_beneath``, ``open_regular`` and ``open_parent`` touch the file system.
Sources: openat2(2), proc(5), path_resolution(7); safety.md, "The gate".
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import posixpath
import re
import stat
from typing import Dict, List, Optional, Pattern, Sequence, Tuple

PATH_BYTES = 4095  # PATH_MAX less its NUL
_BELOW_KEPT = 256  # trees whose secrets are remembered; a run asks about few


class PathRefused(Exception):
    """A path may not be used. ``reason`` says which and why, ``hint`` what would be allowed."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def lexical(path: str) -> str:
    """The normal form of an absolute path: no ``//``, no ``.``, no trailing slash. Never looks at the file system.

    Raises ``PathRefused`` for a relative path, one with ``..`` (what that means depends on links), or too long a one.
    """
    if not path.startswith("/"):
        raise PathRefused("path %.120r is not absolute" % path, "send the absolute path, beginning with '/'")
    if len(path) > PATH_BYTES or (not path.isascii() and len(path.encode("utf-8", "surrogateescape")) > PATH_BYTES):
        raise PathRefused("path %.60r... is longer than %d bytes" % (path, PATH_BYTES), "send a shorter path")
    if "\0" in path:
        raise PathRefused("path %.120r holds a NUL" % path, "send the path without it")
    if "/.." in path and ".." in path.split("/"):
        raise PathRefused("path %.120r holds '..'" % path, "send the path it leads to, without '..'")
    if "//" in path or "/." in path or (path[-1] == "/" and path != "/"):
        normal = posixpath.normpath(path)
        # POSIX lets exactly two leading slashes stand for something else; Linux does not.
        return normal[1:] if normal.startswith("//") else normal
    return path


def glob_regex(pattern: str) -> str:
    """The regular expression for a path glob: ``*`` and ``?`` stay within a component, ``**`` crosses them,
    ``<pid>`` is a process directory, ``[...]`` as in glob(7)."""
    out: List[str] = []
    position = 0
    while position < len(pattern):
        if pattern.startswith("/**/", position):
            out.append("/(?:.*/)?")
            position += 4
        elif pattern.startswith("**", position):
            out.append(".*")
            position += 2
        elif pattern.startswith("<pid>", position):
            out.append("(?:[0-9]{1,7}|self|thread-self)")
            position += 5
        elif pattern[position] == "*":
            out.append("[^/]*")
            position += 1
        elif pattern[position] == "?":
            out.append("[^/]")
            position += 1
        elif pattern[position] == "[" and "]" in pattern[position + 2 :]:
            end = pattern.index("]", position + 2)
            inner = pattern[position + 1 : end].replace("\\", r"\\")
            out.append("[%s%s]" % ("^" if inner[0] in "!^" else "", inner.lstrip("!^")))
            position = end + 1
        else:
            out.append(re.escape(pattern[position]))
            position += 1
    return "".join(out)


def _has_glob(pattern: str) -> bool:
    return any(mark in pattern for mark in ("*", "?", "[", "<pid>"))


def _under(path: str, root: str) -> bool:
    return root in (path, "/") or path.startswith(root + "/")


class PathRules:
    """Read roots, kernel files, secret roots and write roots, compiled once.

    ``read_roots``: absolute directories or files whose content may be read. ``kernel_files``: globs (see
    ``glob_regex``), the only files under ``/proc`` and ``/sys`` that may be read. ``secret_roots``: absolute paths or
    globs; what matches, and everything below it, may be neither read nor listed. ``write_roots``: where files may be
    written (never under a secret root). Relative entries raise ``ValueError``.
    """

    def __init__(
        self,
        read_roots: Sequence[str],
        secret_roots: Sequence[str],
        kernel_files: Sequence[str] = (),
        write_roots: Sequence[str] = (),
    ) -> None:
        for entry in (*read_roots, *secret_roots, *kernel_files, *write_roots):
            if not entry.startswith("/"):
                raise ValueError("path rule %r must begin with '/'" % entry)
        self.read_roots = tuple(root.rstrip("/") or "/" for root in read_roots)
        self.write_roots = tuple(root.rstrip("/") or "/" for root in write_roots)
        self._plain_secrets = tuple(root.rstrip("/") for root in secret_roots if not _has_glob(root))
        self._glob_secrets = tuple(root for root in secret_roots if _has_glob(root))
        self._below: Dict[str, Tuple[str, ...]] = {}
        self._secret_regex: Optional[Pattern[str]] = None
        parts = [re.escape(root) for root in self._plain_secrets] + [glob_regex(g) for g in self._glob_secrets]
        if parts:
            self._secret_regex = re.compile("(?:%s)(?:/.*)?" % "|".join(parts), re.DOTALL)
        self._kernel: Optional[Pattern[str]] = None
        if kernel_files:
            self._kernel = re.compile("|".join("(?:%s)" % glob_regex(g) for g in kernel_files), re.DOTALL)

    def secret(self, path: str) -> bool:
        """Whether a normal path is, or lies below, a secret root."""
        return self._secret_regex is not None and self._secret_regex.fullmatch(path) is not None

    def secret_names_below(self, path: str) -> Tuple[str, ...]:
        """The last components (names or globs) of every secret root that lies, or may lie, below the directory ``path``.

        Empty: nothing below it is secret. A program that reads the whole tree must leave these names out.
        """
        known = self._below.get(path)
        if known is not None:
            return known
        names = {posixpath.basename(root) for root in self._plain_secrets if _under(root, path) and root != path}
        steps = [step for step in path.split("/") if step]
        for pattern in self._glob_secrets:
            wanted = [step for step in pattern.split("/") if step]
            if "**" in wanted:
                # It may match at any depth, so only what stands before it can rule it out.
                wanted_here = wanted[: wanted.index("**")]
                longer = True
            else:
                wanted_here = wanted
                longer = len(wanted) > len(steps)
            if longer and all(re.fullmatch(glob_regex(want), step) for want, step in zip(wanted_here, steps)):
                names.add(wanted[-1])
        found = tuple(sorted(names))
        if len(self._below) < _BELOW_KEPT:
            self._below[path] = found
        return found

    def aims_at_secret(self, pattern: str) -> bool:
        """Whether a glob that matched nothing visible spells out a secret (``/etc/shado?``, ``/etc/shad*``).

        Broad globs that would merely meet one (``/etc/*``, ``/etc/*.d``) do not count: what they match is filtered.
        """
        last = posixpath.basename(pattern)
        if not any(mark in last for mark in "*?["):
            return False
        regex = re.compile(glob_regex(pattern), re.DOTALL)
        beginning = re.split(r"[*?\[]", last, maxsplit=1)[0]
        ending = re.split(r"[*?\]]", last)[-1]
        spelt = "*" not in last or len(beginning) >= 2 or (len(ending) >= 3 and ending[0] != ".")
        return spelt and any(
            regex.fullmatch(root.replace("*", "")) for root in (*self._plain_secrets, *self._glob_secrets)
            if not root.startswith("/**")
        )  # fmt: skip

    def root_of(self, path: str) -> Optional[str]:
        """The read root a normal path lies under, ``None`` if none; under /proc and /sys the kernel files decide."""
        if path.startswith(("/proc/", "/sys/")) or path in ("/proc", "/sys"):
            if self._kernel is not None and self._kernel.fullmatch(path) is not None:
                return path
            return None
        for root in self.read_roots:
            if _under(path, root):
                return root
        return None

    def write_root_of(self, path: str) -> Optional[str]:
        """The write root a normal path lies strictly under, ``None`` if none."""
        for root in self.write_roots:
            if path != root and _under(path, root):
                return root
        return None

    def check_read(self, path: str) -> str:
        """The read root of a normal, resolved path; raises ``PathRefused``."""
        if self.secret(path):
            raise PathRefused("path %.200r is secret" % path, "there is no way to read it; ask the operator")
        root = self.root_of(path)
        if root is None:
            if path.startswith(("/proc", "/sys")):
                raise PathRefused(
                    "%.200r is not one of the kernel files that may be read" % path,
                    "allowed are e.g. /proc/loadavg, /proc/meminfo, /proc/pressure/*, /proc/PID/status, /sys/class/**",
                )
            shown = ", ".join(self.read_roots[:12])
            raise PathRefused("path %.200r is under no read root" % path, "read roots are %s" % (shown or "none"))
        return root

    def check_list(self, path: str) -> None:
        """Whether name and metadata of a normal path may be seen; raises ``PathRefused``."""
        if self.secret(path):
            raise PathRefused("path %.200r is secret" % path, "there is no way to list it; ask the operator")
        if path.startswith("/proc/") and _MAGIC.search(path):
            raise PathRefused(
                "path %.200r goes through a link into another process's view" % path, "send the real path"
            )


# What a process's root, cwd or open file looks like from here may not be what it is: these links jump.
_MAGIC = re.compile(
    r"^/proc/(?:[0-9]+|self|thread-self)(?:/task/[0-9]+)?/(?:root|cwd|map_files|ns/.|environ|mem|(?:fd|exe)/.)"
)


@functools.lru_cache(maxsize=8)
def _rules(
    roots: Tuple[str, ...], secret_roots: Tuple[str, ...], kernel_files: Tuple[str, ...], write_roots: Tuple[str, ...]
) -> PathRules:
    return PathRules(roots, secret_roots, kernel_files, write_roots)


def resolve(path: str) -> str:
    """The real path of ``path`` on this machine, links followed; what does not exist stays as it is named.

    Raises ``PathRefused`` for a loop of links or a path that cannot be looked at.
    """
    try:
        resolved = os.path.realpath(path)
        # realpath() stops at a loop and returns the loop; nothing good is named that way.
        if os.path.islink(resolved):
            raise PathRefused("path %.200r does not end: links lead in a circle" % path, "name another file")
    except (OSError, ValueError) as error:
        raise PathRefused("path %.200r cannot be resolved: %s" % (path, error), "name another file") from None
    return resolved


def expand(pattern: str, limit: int) -> List[str]:
    """At most ``limit + 1`` names that match a glob of an absolute path, sorted; hidden ones only if asked for.

    Links are entered as a shell would (``/sys/class`` is made of them); what comes out is checked like any other path.
    """
    found = ["/"]
    for step in [step for step in pattern.split("/") if step]:
        following: List[str] = []
        if not any(mark in step for mark in "*?["):
            following = [posixpath.join(base, step) for base in found]
            found = [path for path in following if os.path.lexists(path)]
            continue
        regex = re.compile(glob_regex(step), re.DOTALL)
        for base in found:
            try:
                names = sorted(os.listdir(base))
            except OSError:
                continue
            for name in names:
                if regex.fullmatch(name) and (step[0] == "." or name[0] != "."):
                    following.append(posixpath.join(base, name))
            if len(following) > limit:
                break
        found = following[: limit + 1]
    return found if found != ["/"] else []


_SYS_OPENAT2 = 437  # the same number on every architecture, as all system calls since 424
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


@functools.lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _openat2(directory: int, relative: str, flags: int, mode: int) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, mode, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)
    while True:
        descriptor = _libc().syscall(
            ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(directory), ctypes.c_char_p(os.fsencode(relative)),
            ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)),
        )  # fmt: skip
        if descriptor >= 0:
            return int(descriptor)
        number = ctypes.get_errno()
        # EAGAIN: a rename elsewhere made the kernel unsure; it asks to try again (openat2(2)).
        if number not in (errno.EAGAIN, errno.EINTR):
            raise OSError(number, os.strerror(number), relative)


@functools.lru_cache(maxsize=1)
def has_openat2() -> bool:
    """Whether the kernel has openat2 (5.6) and lets us call it."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        os.close(_openat2(root, ".", os.O_PATH, 0))
    except OSError:
        return False
    finally:
        os.close(root)
    return True


def _walk(directory: int, relative: str, flags: int, mode: int) -> int:
    """openat2's promise without openat2: one component at a time, none of them a link."""
    current = os.dup(directory)
    try:
        steps = [step for step in relative.split("/") if step not in ("", ".")]
        if ".." in steps:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), relative)
        for step in steps[:-1]:
            following = os.open(step, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
            os.close(current)
            current = following
        last = steps[-1] if steps else "."
        descriptor = os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=current)
    finally:
        os.close(current)
    # O_PATH with O_NOFOLLOW opens the link itself instead of failing.
    if stat.S_ISLNK(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), relative)
    return descriptor


def open_beneath(directory: int, relative: str, flags: int, mode: int = 0) -> int:
    """A descriptor of ``relative`` below the open ``directory``; no component may be a link or ``..``.

    ``flags`` as for ``os.open`` (close-on-exec is always added). Raises ``OSError``: ``ELOOP`` for a link, ``EXDEV`` for
    a way out, and what else open(2) says.
    """
    if has_openat2():
        return _openat2(directory, relative, flags, mode)
    return _walk(directory, relative, flags, mode)


def _root() -> int:
    return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _failed(path: str, error: OSError) -> PathRefused:
    if error.errno in (errno.ELOOP, errno.EXDEV):
        return PathRefused("path %.200r is or goes through a link" % path, "send the path it leads to")
    return PathRefused("path %.200r cannot be opened: %s" % (path, error.strerror), "check the path")


_KIND_NAMES = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"), (stat.S_ISBLK, "a block device"), (stat.S_ISLNK, "a link"),
)  # fmt: skip


def _check_regular(path: str, descriptor: int) -> os.stat_result:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        name = next((name for test, name in _KIND_NAMES if test(found.st_mode)), "something else")
        raise PathRefused("path %.200r is %s, not a regular file" % (path, name), "name a regular file")
    return found


def open_regular(
    path: str,
    flags: int,
    roots: Sequence[str],
    secret_roots: Sequence[str],
    kernel_files: Sequence[str] = (),
) -> int:
    """``open_by_rules`` with the rules given as lists, see ``PathRules``."""
    return open_by_rules(path, _rules(tuple(roots), tuple(secret_roots), tuple(kernel_files), ()), flags)


def open_by_rules(path: str, rules: PathRules, flags: int = os.O_RDONLY) -> int:
    """A descriptor of the regular file ``path``, checked and opened so that no swap of a link can lead elsewhere.

    ``path``: as the gate resolved it (absolute, free of links). ``rules``: of the policy. ``flags``: access mode for
    ``os.open`` without ``O_CREAT``. The descriptor is close-on-exec. The file is looked at through ``O_PATH`` first, so
    a FIFO does not block and a device is never opened.
    Raises ``PathRefused`` for everything that is not to be opened or cannot be.
    """
    normal = lexical(path)
    rules.check_read(normal)
    if flags & (os.O_CREAT | os.O_TRUNC):
        raise PathRefused("path %.200r: an existing file is not created or emptied" % path, "use open_parent")
    root = _root()
    try:
        looked = open_beneath(root, normal[1:], os.O_PATH)
        try:
            seen = _check_regular(path, looked)
            descriptor = _reopen(root, normal, looked, flags | os.O_NONBLOCK | os.O_NOCTTY)
        finally:
            os.close(looked)
    except OSError as error:
        raise _failed(path, error) from None
    finally:
        os.close(root)
    try:
        opened = _check_regular(path, descriptor)
        if (opened.st_dev, opened.st_ino) != (seen.st_dev, seen.st_ino):
            raise PathRefused("path %.200r was replaced while it was opened" % path, "ask again")
    except PathRefused:
        os.close(descriptor)
        raise
    return descriptor


def _reopen(root: int, normal: str, looked: int, flags: int) -> int:
    try:
        # The magic link leads to the very inode that was looked at, whatever the path says by now.
        return os.open("/proc/self/fd/%d" % looked, flags | os.O_CLOEXEC)
    except FileNotFoundError:
        return open_beneath(root, normal[1:], flags)


def open_parent(path: str, write_roots: Sequence[str], secret_roots: Sequence[str]) -> Tuple[int, str]:
    """``(directory descriptor, last component)`` of a file to be written under ``write_roots``.

    The writer creates a new file in that directory and renames it over the last component, both relative to the
    descriptor; the target itself is never followed. Raises ``PathRefused``.
    """
    normal = lexical(path)
    rules = _rules((), tuple(secret_roots), (), tuple(write_roots))
    if rules.secret(normal) or rules.write_root_of(normal) is None:
        raise PathRefused(
            "path %.200r is under no write root" % path, "write roots are %s" % (", ".join(write_roots) or "none")
        )
    parent, name = posixpath.split(normal)
    root = _root()
    try:
        return open_beneath(root, parent[1:] or ".", os.O_PATH | os.O_DIRECTORY), name
    except OSError as error:
        raise _failed(path, error) from None
    finally:
        os.close(root)
