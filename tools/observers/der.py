"""A small strict reader of X.509 certificates in PEM: subject, issuer, names, times. RFC 5280, X.690 (DER).

Owns: bounds-checked DER and the few fields an operator asks for.
Deliberately does not know: signatures, trust, keys; a private key in a text is skipped, never decoded.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import datetime as dt
import ipaddress
import re
from typing import List, Optional, Tuple

# X.509 nests a handful of levels; more is an attack or no certificate.
_MAX_DEPTH = 12
_SEQUENCE, _SET, _INTEGER, _OID, _BOOLEAN, _OCTETS = 0x30, 0x31, 0x02, 0x06, 0x01, 0x04
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_STRINGS = {
    0x0C: "utf-8",
    0x13: "ascii",
    0x14: "latin-1",
    0x16: "ascii",
    0x1E: "utf-16-be",
    0x1C: "utf-32-be",
    0x12: "ascii",
}
_ATTRIBUTES = {
    b"\x55\x04\x03": "CN",
    b"\x55\x04\x0a": "O",
    b"\x55\x04\x0b": "OU",
    b"\x55\x04\x06": "C",
    b"\x55\x04\x08": "ST",
    b"\x55\x04\x07": "L",
    b"\x09\x92\x26\x89\x93\xf2\x2c\x64\x01\x19": "DC",
    b"\x2a\x86\x48\x86\xf7\x0d\x01\x09\x01": "emailAddress",
    b"\x55\x04\x05": "serialNumber",
}
_SUBJECT_ALT_NAME, _BASIC_CONSTRAINTS = b"\x55\x1d\x11", b"\x55\x1d\x13"
_BLOCK = re.compile(
    r"-----BEGIN ((?:TRUSTED |X509 )?CERTIFICATE)-----[ \t\r]*\n([A-Za-z0-9+/=\s]{1,100000}?)-----END \1-----"
)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)


class BadCertificate(ValueError):
    """The bytes are no certificate in DER; the message says what was expected where."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What an operator asks about one certificate. Times are seconds since 1970."""

    subject: str
    issuer: str
    not_before: int
    not_after: int
    names: Tuple[str, ...]
    authority: Optional[bool]
    self_issued: bool


class _Reader:
    """Reads DER elements from ``data[at:end]``; raises ``BadCertificate`` instead of reading past the end."""

    def __init__(self, data: bytes, depth: int = 0) -> None:
        if depth > _MAX_DEPTH:
            raise BadCertificate("nested deeper than %d levels" % _MAX_DEPTH)
        self._data = data
        self._at = 0
        self._depth = depth

    @property
    def done(self) -> bool:
        return self._at >= len(self._data)

    def peek(self) -> int:
        return -1 if self.done else self._data[self._at]

    def element(self) -> Tuple[int, bytes]:
        """The next element's tag byte and contents."""
        data, at = self._data, self._at
        if len(data) - at < 2:
            raise BadCertificate("expected an element at byte %d, got the end" % at)
        tag, length = data[at], data[at + 1]
        if tag & 0x1F == 0x1F:
            raise BadCertificate("tag of several bytes at byte %d" % at)
        at += 2
        if length >= 0x80:
            size = length & 0x7F
            if not 1 <= size <= 4 or len(data) - at < size or data[at] == 0:
                raise BadCertificate("length of a form that DER does not allow at byte %d" % at)
            length = int.from_bytes(data[at : at + size], "big")
            at += size
            if length < 0x80:
                raise BadCertificate("length not in its shortest form at byte %d" % at)
        if len(data) - at < length:
            raise BadCertificate("element at byte %d is longer than what is left" % at)
        self._at = at + length
        return tag, data[at : at + length]

    def contents(self, tag: int, what: str) -> bytes:
        """The contents of the next element, which must have ``tag``."""
        found, contents = self.element()
        if found != tag:
            raise BadCertificate("expected %s (tag 0x%02x), got tag 0x%02x" % (what, tag, found))
        return contents

    def inner(self, tag: int, what: str) -> "_Reader":
        return _Reader(self.contents(tag, what), self._depth + 1)


def _name(reader: _Reader) -> str:
    """A distinguished name as ``CN=…, O=…``, most specific part first where it stands last."""
    parts: List[str] = []
    while not reader.done:
        group = reader.inner(_SET, "relative name")
        while not group.done:
            pair = group.inner(_SEQUENCE, "attribute")
            kind = pair.contents(_OID, "attribute type")
            tag, value = pair.element()
            text = value.decode(_STRINGS.get(tag, "latin-1"), "replace")
            parts.append("%s=%s" % (_ATTRIBUTES.get(kind, "OID"), text))
    return ", ".join(reversed(parts))


def _time(reader: _Reader) -> int:
    tag, value = reader.element()
    text = value.decode("ascii", "replace")
    if tag == _UTC_TIME and re.fullmatch(r"[0-9]{12}Z", text):
        # RFC 5280 4.1.2.5.1: years 50 to 99 are of the last century.
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    elif tag != _GENERALIZED_TIME or not re.fullmatch(r"[0-9]{14}Z", text):
        raise BadCertificate("expected a time in UTC, got tag 0x%02x %.40r" % (tag, text))
    try:
        moment = dt.datetime(*_parts(text), tzinfo=dt.timezone.utc)
    except ValueError:
        raise BadCertificate("no such time: %.40r" % text) from None
    return int((moment - _EPOCH).total_seconds())


def _parts(text: str) -> Tuple[int, int, int, int, int, int]:
    return (int(text[:4]), int(text[4:6]), int(text[6:8]), int(text[8:10]), int(text[10:12]), int(text[12:14]))


def _alternative_names(contents: bytes) -> List[str]:
    names: List[str] = []
    reader = _Reader(contents).inner(_SEQUENCE, "subject alternative names")
    while not reader.done:
        tag, value = reader.element()
        # GeneralName: [1] e-mail, [2] DNS, [6] URI, [7] IP address
        if tag in (0x81, 0x82, 0x86):
            names.append(value.decode("ascii", "replace"))
        elif tag == 0x87 and len(value) in (4, 16):
            names.append(str(ipaddress.ip_address(value)))
    return names


def _is_authority(contents: bytes) -> bool:
    reader = _Reader(contents).inner(_SEQUENCE, "basic constraints")
    return reader.peek() == _BOOLEAN and reader.contents(_BOOLEAN, "cA") != b"\x00"


def read_certificate(data: bytes) -> Certificate:
    """The certificate in ``data`` (DER; what follows it is ignored, as in "TRUSTED" ones). Raises ``BadCertificate``."""
    outer = _Reader(data).inner(_SEQUENCE, "certificate")
    body = outer.inner(_SEQUENCE, "to-be-signed part")
    if body.peek() == 0xA0:
        body.element()
    body.contents(_INTEGER, "serial number")
    body.contents(_SEQUENCE, "signature algorithm")
    issuer_bytes = body.contents(_SEQUENCE, "issuer")
    validity = body.inner(_SEQUENCE, "validity")
    not_before, not_after = _time(validity), _time(validity)
    subject_bytes = body.contents(_SEQUENCE, "subject")
    body.contents(_SEQUENCE, "public key")
    names: List[str] = []
    authority = False
    while not body.done:
        tag, contents = body.element()
        if tag != 0xA3:
            continue
        extensions = _Reader(contents).inner(_SEQUENCE, "extensions")
        while not extensions.done:
            extension = extensions.inner(_SEQUENCE, "extension")
            kind = extension.contents(_OID, "extension id")
            if extension.peek() == _BOOLEAN:
                extension.element()
            value = extension.contents(_OCTETS, "extension value")
            if kind == _SUBJECT_ALT_NAME:
                names = _alternative_names(value)
            elif kind == _BASIC_CONSTRAINTS:
                authority = _is_authority(value)
    return Certificate(
        subject=_name(_Reader(subject_bytes)),
        issuer=_name(_Reader(issuer_bytes)),
        not_before=not_before,
        not_after=not_after,
        names=tuple(names),
        authority=authority,
        self_issued=subject_bytes == issuer_bytes,
    )


def pem_certificates(text: str) -> List[Optional[Certificate]]:
    """Every certificate block of a PEM text in order; ``None`` for a block that is no certificate."""
    found: List[Optional[Certificate]] = []
    for block in _BLOCK.finditer(text):
        try:
            found.append(read_certificate(base64.b64decode("".join(block.group(2).split()), validate=True)))
        except (BadCertificate, binascii.Error):
            found.append(None)
    return found
