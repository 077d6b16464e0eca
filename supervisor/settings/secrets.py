"""References to secrets: ``env:NAME`` or ``file:/path``, and the value they lead to.

Owns: what a reference may look like, reading it, and that neither a value nor a mistyped literal shows in a ``repr``.
Deliberately does not know: what a secret is for.

From safety.md, "Secrets": never in a trace, a log, an error, an audit record or a repr.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from supervisor.errors import BadSettings

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A key is one line of text; more is the wrong file.
MAX_SECRET_BYTES = 65536


class Secret:
    """A secret value; only ``reveal()`` shows it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(******)"

    __str__ = __repr__

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled secret would end in the store of the durable workflows in clear.
        raise TypeError("a secret cannot be pickled: hand on its reference")


class SecretRef:
    """Where a secret stands: ``env:NAME`` or ``file:/absolute/path`` (``~`` is understood). Never shows the value."""

    __slots__ = ("_kind", "_place")

    def __init__(self, text: str) -> None:
        """Raises ``ValueError`` that does not repeat ``text``: it may be the secret itself, put in by mistake."""
        kind, colon, place = text.partition(":")
        good = (kind == "env" and _ENV_NAME.fullmatch(place)) or (
            kind == "file" and place.startswith(("/", "~/")) and place.isprintable()
        )
        if not colon or not good:
            raise ValueError("must be env:NAME or file:/absolute/path, a reference and never the secret itself")
        self._kind, self._place = kind, place

    def read(self, environ: Mapping[str, str] | None = None) -> Secret:
        """The secret it leads to, without surrounding white space.

        Raises ``BadSettings`` if the variable is not set, or the file is missing, unreadable, empty, too long or
        readable by others.
        """
        value = (
            self._from_file()
            if self._kind == "file"
            else (os.environ if environ is None else environ).get(self._place, "")
        )
        if not value.strip():
            raise BadSettings(
                f"the secret at {self} is empty or not there",
                expected="an environment variable that is set" if self._kind == "env" else "a file with one line",
                next_step=f"set {self._place}"
                if self._kind == "env"
                else f"write the key into {self._place}, mode 0600",
            )
        return Secret(value.strip())

    def present(self, environ: Mapping[str, str] | None = None) -> bool:
        """Whether there is something to read, without reading a file."""
        if self._kind == "env":
            return bool((os.environ if environ is None else environ).get(self._place, "").strip())
        return os.path.isfile(os.path.expanduser(self._place))

    def _from_file(self) -> str:
        path = os.path.expanduser(self._place)
        try:
            with open(path, encoding="utf-8") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
                text = file.read(MAX_SECRET_BYTES + 1)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise BadSettings(
                f"the secret at {self} could not be read: {reason}", next_step=f"write the key into {path}, mode 0600"
            ) from None
        if mode & 0o007:
            raise BadSettings(
                f"the secret at {self} is open to every user of this host",
                expected="mode 0600",
                got=f"{mode:04o}",
                next_step=f"chmod 600 {path}",
            )
        if len(text) > MAX_SECRET_BYTES:
            raise BadSettings(f"the secret at {self} is too long", expected=f"at most {MAX_SECRET_BYTES} bytes")
        return text

    def __str__(self) -> str:
        return f"{self._kind}:{self._place}"

    def __repr__(self) -> str:
        return f"SecretRef({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretRef) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def read(value: Any) -> SecretRef:
            if isinstance(value, cls):
                return value
            try:
                return cls(value if isinstance(value, str) else "")
            except ValueError as error:
                raise PydanticCustomError("secret_ref", "{reason}", {"reason": str(error)}) from None

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.to_string_ser_schema(when_used="always")
        )
