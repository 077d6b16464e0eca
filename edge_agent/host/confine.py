"""Confinement of a child process by the kernel: prctl, Landlock, resource limits.

Owns: the system calls and an honest account of the level the kernel gave.
Deliberately does not know: which process, and what the policy says.

Everything here that runs between fork and execve only makes system calls and raises ``OSError``. The broker is a
single thread, so code after fork is safe.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from typing import Iterable, Tuple

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

# The three Landlock calls have the same numbers on every architecture (added after the tables were unified).
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_CREATE_RULESET_VERSION = 1

# Rights over files, by the ABI that brought them (linux/landlock.h). Reading and executing are left free: what may be
# read is the gate's matter, what may be written is the kernel's too.
_WRITE_FILE = 1 << 1
# Write, remove (dir, file), make (char, dir, regular, socket, fifo, block, link).
_WRITES_ABI1 = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))
_REFER_ABI2, _TRUNCATE_ABI3, _IOCTL_DEV_ABI5 = 1 << 13, 1 << 14, 1 << 15
_NET_BIND, _NET_CONNECT = 1, 2  # ABI 4
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2  # ABI 6
# Of a file's rule the kernel takes only what makes sense for a file.
_FILE_RIGHTS = _WRITE_FILE | _TRUNCATE_ABI3 | _IOCTL_DEV_ABI5


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, "prctl(%d): %s" % (option, os.strerror(code)))


def become_subreaper() -> None:
    """Make orphaned descendants children of this process, so that none escapes by a double fork or a new session."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process ``number`` when its parent ends."""
    _prctl(PR_SET_PDEATHSIG, number)


def hide_memory() -> None:
    """No core dump and no ptrace by other processes of the same user: this process knows the lease."""
    _prctl(PR_SET_DUMPABLE, 0)


def give_back_memory() -> None:
    """Hand what was freed back to the system, where the C library can (malloc_trim(3), glibc): reading a policy takes
    more memory for a moment than a broker ever needs again."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def close_others_at_exec() -> None:
    """Have every descriptor above 2 closed by the next execve, whatever whoever started this process left open."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                continue  # the one the directory was listed with


def landlock_abi() -> Tuple[int, str]:
    """(ABI version, "") or (0, why not), as the kernel answers."""
    version = _libc.syscall(
        _LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION)
    )
    if version < 0:
        return 0, os.strerror(ctypes.get_errno())
    return int(version), ""


def landlock_level(abi: int) -> str:
    """What Landlock of this ABI does for a command here, in words."""
    if abi == 0:
        return "none"
    parts = ["no writes to files"]
    if abi >= 3:
        parts.append("no truncation")
    if abi >= 4:
        parts.append("no TCP where none is needed")
    if abi >= 6:
        parts.append("no signals to outside")
    return ", ".join(parts)


class Ruleset:
    """A Landlock rule set, prepared before fork so that the child only has to restrict itself.

    Args:
        writes: absolute paths below which the process may write; others are read-only. ``/dev/null`` always works.
        network: whether TCP connections may be made and ports be bound (enforced from ABI 4 on).
    """

    def __init__(self, writes: Iterable[str], network: bool) -> None:
        self.abi, self.problem = landlock_abi()
        self.fd = -1
        if self.abi == 0:
            return
        rights = _WRITES_ABI1
        rights |= _REFER_ABI2 if self.abi >= 2 else 0
        rights |= _TRUNCATE_ABI3 if self.abi >= 3 else 0
        rights |= _IOCTL_DEV_ABI5 if self.abi >= 5 else 0
        net = (_NET_BIND | _NET_CONNECT) if self.abi >= 4 and not network else 0
        scoped = (_SCOPE_ABSTRACT_SOCKETS if not network else 0) | _SCOPE_SIGNALS if self.abi >= 6 else 0
        attributes = struct.pack("=QQQ", rights, net, scoped)
        attributes = attributes[: 24 if self.abi >= 6 else 16 if self.abi >= 4 else 8]
        self.fd = _libc.syscall(
            _LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)
        )
        if self.fd < 0:
            self.problem, self.abi, self.fd = os.strerror(ctypes.get_errno()), 0, -1
            return
        os.set_inheritable(self.fd, False)
        try:
            self._allow("/dev/null", rights)
            for path in writes:
                self._allow(path, rights)
        except OSError:
            self.close()
            raise

    def _allow(self, path: str, rights: int) -> None:
        target = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not os.path.isdir("/proc/self/fd/%d" % target):
                rights &= _FILE_RIGHTS
            rule = struct.pack("=Qi", rights, target)
            if _libc.syscall(_LANDLOCK_ADD_RULE, self.fd, _RULE_PATH_BENEATH, rule, ctypes.c_uint32(0)) != 0:
                code = ctypes.get_errno()
                raise OSError(code, "landlock rule for %s: %s" % (path, os.strerror(code)))
        finally:
            os.close(target)

    def restrict_self(self) -> None:
        """In the child: give up the rights for good. Needs no_new_privs. No-op where the kernel has no Landlock."""
        if self.fd < 0:
            return
        if _libc.syscall(_LANDLOCK_RESTRICT_SELF, self.fd, ctypes.c_uint32(0)) != 0:
            code = ctypes.get_errno()
            raise OSError(code, "landlock_restrict_self: %s" % os.strerror(code))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def no_new_privileges() -> None:
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def limit_resources(cpu_s: int) -> None:
    """Resource limits of a command: no core files, few descriptors, small files, CPU seconds."""
    for what, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 1024),
        (resource.RLIMIT_FSIZE, 64 * 1024 * 1024),
        (resource.RLIMIT_CPU, max(1, cpu_s)),
    ):
        hard = resource.getrlimit(what)[1]
        ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (ceiling, ceiling))
