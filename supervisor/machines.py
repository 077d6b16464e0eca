"""What a machine's identity may look like: id, address, port, user, labels, host key.

Owns: the ``Machine`` value, the rules for its fields, reading of host keys and their fingerprints.
Deliberately does not know: where machines are stored, how they are reached. Pure.

Addresses, users and ids end up in argument lists, file names and log lines; so each has a narrow grammar, and none can
begin with a dash or hold a space, a control character or a quote.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Any

from supervisor.errors import BadInput

SSH = "ssh"
EMBEDDED = "embedded"
TRANSPORTS = (SSH, EMBEDDED)

# contracts.md, "Ids".
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
# useradd(8) on the distributions we install on; no trailing `$` (Samba accounts are no login users).
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_HOST_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_LABEL_KEY = re.compile(r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/:@+-]{0,61}[A-Za-z0-9])?")
_ZONE = re.compile(r"[A-Za-z0-9._-]{1,15}")

MAX_LABELS = 64
MAX_ROLE_CHARACTERS = 64


@dataclasses.dataclass(frozen=True)
class Machine:
    """A managed host as the centre knows it. Times are seconds since the epoch, UTC.

    ``version`` grows with every change an operator makes (optimistic lock). ``generation`` is the fencing token: it only
    ever grows, also across removal and re-adding, and a machine refuses a ``start`` with one it has seen.
    ``expected_state`` is free text or a JSON object that tells the supervisor what this machine is for.
    """

    id: str
    address: str
    port: int = 22
    user: str = "chargehand"
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    role: str = ""
    expected_state: Any = None
    transport: str = SSH
    host_key: str | None = None
    host_key_fingerprint: str | None = None
    host_key_accepted_at: float | None = None
    host_key_accepted_by: str | None = None
    notes: str = ""
    enabled: bool = True
    version: int = 1
    generation: int = 0
    created_at: float = 0.0
    updated_at: float = 0.0
    last_seen_at: float | None = None
    last_boot_id: str | None = None
    removed_at: float | None = None

    def to_json(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        document["labels"] = dict(self.labels)
        return document


@dataclasses.dataclass(frozen=True)
class HostKey:
    """A public SSH host key: ``kind`` (``ssh-ed25519`` …), ``blob`` (the wire form), ``fingerprint`` (``SHA256:…``)."""

    kind: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -l`` prints it: unpadded base64 of the SHA-256 of the wire form."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode("ascii").rstrip("=")

    @property
    def text(self) -> str:
        """``<kind> <base64>``, without a comment: the form that is pinned."""
        return f"{self.kind} {base64.b64encode(self.blob).decode('ascii')}"


def machine_id(text: str) -> str:
    """``text`` if it is a machine id (``[a-z0-9][a-z0-9-]{0,62}``); raises ``BadInput``."""
    if not _ID.fullmatch(text):
        raise BadInput(
            "this cannot be the id of a machine",
            expected="1 to 63 of a-z, 0-9 and -, beginning with a letter or digit, such as web-01",
            got=text,
            next_step=f"use {_suggest_id(text)!r}" if _suggest_id(text) else "choose a short name",
        )
    return text


def address(text: str) -> str:
    """A host name, IPv4 or IPv6 address (a zone is kept); brackets are taken off. Raises ``BadInput``."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if _is_ip(bare) or _is_host_name(bare):
        return bare.lower() if "%" not in bare else bare
    raise BadInput(
        "this cannot be the address of a machine",
        expected="a host name, an IPv4 or an IPv6 address, without port, user or scheme",
        got=text,
        next_step="give the port with --port and the user with --user",
    )


def port(value: int | str) -> int:
    """A TCP port, 1 to 65535, from a number or its digits; raises ``BadInput``."""
    digits = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,5}", digits) or not 1 <= int(digits) <= 65535:
        raise BadInput("this cannot be a port", expected="a number from 1 to 65535", got=value)
    return int(digits)


def user(text: str) -> str:
    """A login name; raises ``BadInput``."""
    if not _USER.fullmatch(text):
        raise BadInput(
            "this cannot be a login user",
            expected="1 to 32 of a-z, 0-9, _ and -, beginning with a letter or _",
            got=text,
        )
    return text


def labels(pairs: Mapping[str, str] | Iterable[str]) -> dict[str, str]:
    """Labels from a mapping or from ``key=value`` texts, sorted by key; raises ``BadInput`` that names the label."""
    if isinstance(pairs, Mapping):
        items = [(key, value) for key, value in pairs.items()]
    else:
        items = [_split_label(text) for text in pairs]
    result: dict[str, str] = {}
    for key, value in items:
        _check_label(key, value)
        if result.get(key, value) != value:
            raise BadInput("one label is given twice with two values", tried=f"label {key}", got=[result[key], value])
        result[key] = value
    if len(result) > MAX_LABELS:
        raise BadInput("too many labels on one machine", expected=f"at most {MAX_LABELS}", got=len(result))
    return dict(sorted(result.items()))


def role(text: str) -> str:
    """A short description of what the machine is for: one line; raises ``BadInput``."""
    if len(text) > MAX_ROLE_CHARACTERS or not text.isprintable():
        raise BadInput(
            "this cannot be a role",
            expected=f"one printable line of at most {MAX_ROLE_CHARACTERS} characters",
            got=text,
        )
    return text


def matches(machine_labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether the labels hold every pair of ``selector`` (an empty selector matches every machine)."""
    return all(machine_labels.get(key) == value for key, value in selector.items())


# What OpenSSH accepts today for a host: DSA is gone, RSA under 2048 bit is refused by default policies.
_ECDSA_POINT_BYTES = {"ecdsa-sha2-nistp256": 65, "ecdsa-sha2-nistp384": 97, "ecdsa-sha2-nistp521": 133}
KEY_KINDS = ("ssh-ed25519", *_ECDSA_POINT_BYTES, "ssh-rsa")
MIN_RSA_BITS = 2048


def host_key(text: str) -> HostKey:
    """Read one public host key: ``<kind> <base64> [comment]``, or a ``known_hosts`` line (its host field is skipped).

    The blob is checked to be a whole key of the kind it claims (RFC 4253 section 6.6, RFC 5656, RFC 8709).
    Raises ``BadInput``.
    """
    words = text.strip().split()
    start = next((place for place, word in enumerate(words[:2]) if word in KEY_KINDS), None)
    if "\n" in text.strip() or start is None or len(words) < start + 2:
        raise BadInput(
            "this is not a host key",
            expected="one line `<kind> <base64>` with kind one of " + ", ".join(KEY_KINDS),
            got=text,
            next_step="take it from /etc/ssh/ssh_host_ed25519_key.pub on the machine",
        )
    kind = words[start]
    try:
        blob = base64.b64decode(words[start + 1], validate=True)
    except (binascii.Error, ValueError):
        raise _bad_key(kind, "base64 that decodes", words[start + 1]) from None
    _check_blob(kind, blob)
    return HostKey(kind, blob)


def _check_blob(kind: str, blob: bytes) -> None:
    fields = _wire_fields(kind, blob)
    if not fields or fields[0] != kind.encode("ascii"):
        raise _bad_key(kind, f"a key whose inner kind is {kind}", fields[0] if fields else blob[:16])
    if kind == "ssh-ed25519":
        good = len(fields) == 2 and len(fields[1]) == 32
    elif kind == "ssh-rsa":
        good = len(fields) == 3 and int.from_bytes(fields[2], "big").bit_length() >= MIN_RSA_BITS
    else:
        curve = kind.removeprefix("ecdsa-sha2-").encode("ascii")
        good = len(fields) == 3 and fields[1] == curve and len(fields[2]) == _ECDSA_POINT_BYTES[kind]
    if not good:
        wanted = f"an RSA key of at least {MIN_RSA_BITS} bit" if kind == "ssh-rsa" else f"a whole {kind} key"
        raise _bad_key(kind, wanted, f"{len(blob)} bytes")


def _wire_fields(kind: str, blob: bytes) -> list[bytes]:
    fields, at = [], 0
    while at < len(blob):
        length = int.from_bytes(blob[at : at + 4], "big")
        field = blob[at + 4 : at + 4 + length]
        if at + 4 > len(blob) or len(field) != length:
            raise _bad_key(kind, "length-prefixed fields that fill the key", f"{len(blob)} bytes, cut at {at}")
        fields.append(field)
        at += 4 + length
    return fields


def _bad_key(kind: str, expected: str, got: Any) -> BadInput:
    return BadInput(
        f"the {kind} host key is damaged", expected=expected, got=got, next_step="copy the whole line again"
    )


def _split_label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise BadInput("this is not a label", expected="key=value, such as role=db", got=text)
    return key, value


def _check_label(key: Any, value: Any) -> None:
    if not isinstance(key, str) or not _LABEL_KEY.fullmatch(key):
        raise BadInput("this cannot be the key of a label", expected="1 to 63 of a-z, 0-9, . _ / and -", got=key)
    if not isinstance(value, str) or (value and not _LABEL_VALUE.fullmatch(value)):
        raise BadInput(
            f"this cannot be the value of label {key}",
            expected="up to 63 of A-Z, a-z, 0-9, . _ / : @ + and -",
            got=value,
        )


def _is_ip(text: str) -> bool:
    bare, percent, zone = text.partition("%")
    try:
        parsed = ipaddress.ip_address(bare)
    except ValueError:
        return False
    return not percent or (parsed.version == 6 and _ZONE.fullmatch(zone) is not None)


def _is_host_name(text: str) -> bool:
    parts = text.removesuffix(".").split(".")
    # A last part of digits only is a mistyped IPv4 address, never a top-level domain (RFC 1123, 2.1).
    return len(text) <= 253 and all(_HOST_PART.fullmatch(part) for part in parts) and not parts[-1].isdigit()


def _suggest_id(text: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-")
    return slug if _ID.fullmatch(slug) else ""
