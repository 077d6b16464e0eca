"""Which file a policy's binary is, fixed when the lease starts.

Owns: the identity of a binary (real path, device, inode, size, times, digest) and the check at the moment of execution.
Deliberately does not know: rules and arguments.

Rule (safety.md, "The gate"): a same-named file elsewhere, a swapped link or a changed digest is refused. The digest is
taken at lease time; later a change of device, inode, size, mtime or ctime counts as a change of content, since the
kernel moves ctime with every write and nobody but root can set it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Dict, Iterable, NamedTuple, Optional, Tuple

from edge_agent.host.errors import Refused

# Device, inode, size, mtime and ctime (nanoseconds).
_Identity = Tuple[int, int, int, int, int]


class Pin(NamedTuple):
    """The identity of one binary. ``path`` as the policy names it, ``real`` with every link followed."""

    path: str
    real: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str


def _identity(info: os.stat_result) -> _Identity:
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def pin(path: str) -> Optional[Pin]:
    """The pin of ``path``, ``None`` where it is no executable regular file or anybody may write it."""
    try:
        real = os.path.realpath(path)
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or not info.st_mode & 0o111:
            return None
        # A binary that anybody but its owner may write is nobody's word.
        if info.st_mode & 0o002:
            return None
        hasher = hashlib.sha256()
        while True:
            block = os.read(fd, 1 << 20)
            if not block:
                break
            hasher.update(block)
        device, inode, size, mtime_ns, ctime_ns = _identity(info)
        return Pin(path, real, device, inode, size, mtime_ns, ctime_ns, hasher.hexdigest())
    except OSError:
        return None
    finally:
        os.close(fd)


class Pins:
    """The pins of one lease, by policy path.

    Hashing every binary of a policy takes longer than starting: a binary's identity (all but the digest) is fixed at
    once, its digest is taken at first use and is then of that very identity.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._identities: Dict[str, Tuple[str, _Identity]] = {}
        self._pins: Dict[str, Pin] = {}
        for path in paths:
            try:
                real = os.path.realpath(path)
                info = os.stat(real, follow_symlinks=False)
            except OSError:
                continue
            if stat.S_ISREG(info.st_mode) and info.st_mode & 0o111 and not info.st_mode & 0o002:
                self._identities[path] = (real, _identity(info))

    def real(self, path: str) -> Optional[str]:
        """The real path of a pinned binary, ``None`` where the policy's path was no executable at lease time."""
        known = self._identities.get(path)
        return known[0] if known else None

    def sha256(self, path: str) -> str:
        """The digest (hex) of the pinned binary, checked like for execution. Raises ``Refused``."""
        binary = self.open(path)
        binary.close()
        return binary.pin.sha256

    def open(self, path: str) -> "OpenBinary":
        """Open the binary for execution after checking that it is still the pinned one.

        Raises ``Refused`` if it is not pinned, has gone or has changed since the lease started.
        """
        known = self._identities.get(path)
        if known is None:
            raise Refused("%s is not an executable of this lease" % path, next_step="ask for a binary of the policy")
        real, identity = known
        try:
            if os.path.realpath(path) != real:
                raise Refused(
                    "%s leads to another file than when the lease started" % path,
                    expected=real,
                    got=os.path.realpath(path),
                    next_step="start a new run if the change was wanted",
                )
            fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise Refused("%s cannot be opened any more: %s" % (path, error.strerror)) from error
        try:
            if _identity(os.fstat(fd)) != identity:
                raise Refused(
                    "%s has changed since the lease started" % path,
                    expected="the file pinned at lease time",
                    got="another inode, size or time",
                    next_step="start a new run if the change was wanted",
                )
            found = self._pins.get(path)
            if found is None:
                found = pin(path)
                if found is None or (found.device, found.inode, found.size, found.mtime_ns, found.ctime_ns) != identity:
                    raise Refused("%s has changed since the lease started" % path)
                self._pins[path] = found
            script = os.pread(fd, 2, 0) == b"#!"
            return OpenBinary(fd, found, script)
        except BaseException:
            os.close(fd)
            raise


class OpenBinary:
    """A pinned binary, open. ``script``: it starts with ``#!`` and must be executed by path."""

    def __init__(self, fd: int, pinned: Pin, script: bool) -> None:
        self.fd, self.pin, self.script = fd, pinned, script

    def close(self) -> None:
        os.close(self.fd)
