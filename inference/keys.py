"""Keys by reference: a setting says where a key is, never what it is.

Owns: reading ``env:NAME`` and ``file:/path`` references, a value that does not show itself, scrubbing texts.
Deliberately does not know: which model needs which key.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Mapping

from inference.errors import BadModelSpec, KeyMissing

KEY_BYTES = 16_384  # longest key file read, bytes: a token is a few hundred, anything longer is the wrong file


class Secret:
    """A value that masks itself in ``repr``, ``str`` and formatting. ``reveal()`` is the one way to it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret('***')"

    __str__ = __repr__

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Secret is not pickled: pass its reference instead")

    def scrub(self, text: str) -> str:
        """``text`` without the value: endpoints repeat the key they refuse in their error messages."""
        return text.replace(self._value, "***") if self._value else text


@dataclasses.dataclass(frozen=True, slots=True)
class KeyRef:
    """Where a key stands. ``kind``: ``env`` or ``file``; ``where``: the variable's name or an absolute path."""

    kind: str
    where: str

    @classmethod
    def parse(cls, text: str) -> KeyRef:
        """From ``env:NAME`` or ``file:/path``. Raises ``BadModelSpec``, which does not repeat the text: a key may
        have been pasted where its reference belongs."""
        kind, separator, where = text.partition(":")
        if separator and kind == "env" and where.isidentifier():
            return cls(kind, where)
        if separator and kind == "file" and where.startswith("/") and "\0" not in where:
            return cls(kind, where)
        raise BadModelSpec(
            f"cannot read the key reference: expected env:NAME or file:/absolute/path, got {len(text)} characters that "
            "are neither; put the key into a file or a variable and name that"
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.where}"

    def resolve(self, environment: Mapping[str, str]) -> Secret:
        """The key. Raises ``KeyMissing`` with the reference and the next step."""
        reference = str(self)
        if self.kind == "env":
            value = environment.get(self.where, "").strip()
            if not value:
                raise KeyMissing(
                    f"the model key was looked for in the environment variable {self.where}, which is not set or "
                    "empty; set it where the gateway is started",
                    reference=reference,
                )
            return _checked(value, reference)
        try:
            # O_NONBLOCK: a named pipe at this path must not hold the gateway
            descriptor = os.open(self.where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise KeyMissing(
                f"the model key was looked for in the file {self.where!r}: {error.strerror}; write the key there, "
                "readable for the user that runs the gateway",
                reference=reference,
            ) from error
        try:
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            raw = os.read(descriptor, KEY_BYTES + 1) if regular else b""
        finally:
            os.close(descriptor)
        if not regular:
            raise KeyMissing(f"the model key file {self.where!r} is not a regular file", reference=reference)
        try:
            value = raw.decode("ascii").strip()
        except UnicodeDecodeError:
            value = ""
        if not value or len(raw) > KEY_BYTES:
            raise KeyMissing(
                f"the model key file {self.where!r} must hold one line of ASCII of at most {KEY_BYTES} bytes",
                reference=reference,
            )
        return _checked(value, reference)


def _checked(value: str, reference: str) -> Secret:
    if not value.isascii() or not value.isprintable() or " " in value:
        raise KeyMissing(
            f"the model key at {reference} holds characters no HTTP header may hold (blank, line break, non-ASCII); "
            "write the key alone",
            reference=reference,
        )
    return Secret(value)
