"""Signed checkpoints: what the heads of all chains were, under the gateway's Ed25519 key.

Owns: the signing key's file, the form of a checkpoint, signing and checking signatures.
Deliberately does not know: when checkpoints are made (the gateway does, every ``limits.checkpoint_s``).

A chain shows a change in its middle; only a checkpoint shows that its end was cut off or that all of it was computed
anew. Whoever can read the key can do both: keep a copy of checkpoints and of the public key on another host.

The signed text is canonical JSON of ``{"v", "number", "at_us", "heads": {chain: {"seq", "hash"}}, "prev", "key_id"}``;
``prev`` is the SHA-256 of the signed text of the checkpoint before it. Each checkpoint is also told to the gateway's
chain (``audit.checkpoint``), so that a missing one is missed.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import Connection, RowMapping, insert, select

from supervisor.audit import kinds
from supervisor.audit.chain import GENESIS, Head
from supervisor.audit.ledger import Ledger, append_within, locked_heads, prepared, read_heads
from supervisor.errors import AuditFailed, BadInput
from supervisor.store.engine import reading, writing
from supervisor.store.schema import audit_checkpoints
from tools.values import JsonObject, canonical

FORMAT = 1
KEY_FILE = "audit-key.pem"
PUBLIC_KEY_FILE = "audit-key.pub.pem"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """``signature``: base64 of the Ed25519 signature over ``signed_text``."""

    number: int
    at_us: int
    heads: Mapping[str, Head]
    prev: str
    key_id: str
    signature: str

    def statement(self) -> JsonObject:
        return {
            "v": FORMAT,
            "number": self.number,
            "at_us": self.at_us,
            "heads": {chain: {"seq": head.seq, "hash": head.hash} for chain, head in self.heads.items()},
            "prev": self.prev,
            "key_id": self.key_id,
        }

    @property
    def signed_text(self) -> bytes:
        return canonical(self.statement())

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.signed_text).hexdigest()

    def to_json(self) -> JsonObject:
        return {**self.statement(), "signature": self.signature}

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> Checkpoint:
        """Raises ``BadInput`` if the document is no checkpoint of this format."""
        try:
            if document["v"] != FORMAT:
                raise ValueError(f"format {document['v']!r}")
            heads = document["heads"]
            if not isinstance(heads, Mapping):
                raise TypeError("heads is no object")
            return cls(
                _integer(document["number"]),
                _integer(document["at_us"]),
                {str(chain): Head(_integer(head["seq"]), _text(head["hash"])) for chain, head in heads.items()},
                _text(document["prev"]),
                _text(document["key_id"]),
                _text(document["signature"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"this is no checkpoint: {error!r}", expected=f"format {FORMAT}", got=dict(document)
            ) from None


class Signer:
    """The gateway's signing key. Its ``repr`` shows the public part only."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key()
        self.key_id = key_id(self.public_key)

    def sign(self, text: bytes) -> str:
        return base64.b64encode(self._key.sign(text)).decode("ascii")

    @property
    def public_pem(self) -> str:
        return public_pem(self.public_key)

    def __repr__(self) -> str:
        return f"Signer(key_id={self.key_id!r})"


def load_signer(directory: Path) -> Signer:
    """The key in ``directory/audit-key.pem``, made there on first use (mode 0600, on disk before it is used).

    Two gateways that start at once end with the same key. Raises ``AuditFailed`` for a key that others may read, that is
    damaged, or that cannot be made.
    """
    path = directory / KEY_FILE
    try:
        if not path.exists():
            _make_key(directory, path)
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            pem = file.read()
    except OSError as error:
        raise AuditFailed(
            f"the audit key {path} could not be used: {error.strerror}", next_step=f"check who may write {directory}"
        ) from None
    if mode & 0o077:
        raise AuditFailed(
            f"the audit key {path} is open to other users of this host",
            expected="mode 0600",
            got=f"{mode:04o}",
            next_step=f"chmod 600 {path}, and consider whether somebody signed with it",
        )
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise AuditFailed(
            f"the audit key {path} is damaged",
            expected="an Ed25519 private key in PEM",
            next_step="restore it from a backup; moving it away starts a new key, and old checkpoints keep their own",
        )
    signer = Signer(key)
    _publish(directory / PUBLIC_KEY_FILE, signer.public_pem)
    return signer


def _make_key(directory: Path, path: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=".audit-key-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            # A link is made once: of two gateways the second finds the first one's key and uses it.
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        os.unlink(temporary)
    entry = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


def _publish(path: Path, pem: str) -> None:
    if not path.exists() or path.read_text("ascii") != pem:
        path.write_text(pem, "ascii")


def public_pem(key: Ed25519PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode("ascii")


def read_public_key(pem: str) -> Ed25519PublicKey:
    """The Ed25519 public key in ``pem``; raises ``BadInput``."""
    try:
        key = serialization.load_pem_public_key(pem.encode("ascii"))
    except (ValueError, UnicodeEncodeError):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise BadInput("this is no public key of an audit chain", expected="an Ed25519 public key in PEM", got=pem[:60])
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """The SHA-256 (hex) of the raw public key."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()


def signature_holds(checkpoint: Checkpoint, key: Ed25519PublicKey) -> bool:
    """Whether ``key`` signed this checkpoint."""
    try:
        key.verify(base64.b64decode(checkpoint.signature, validate=True), checkpoint.signed_text)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return checkpoint.key_id == key_id(key)


def make_checkpoint(ledger: Ledger, signer: Signer) -> Checkpoint | None:
    """Sign the heads of all chains as they are now, durably; ``None`` if nothing was appended since the last one.

    Raises ``StoreFailed``.
    """
    at_us = ledger.now_us()
    with writing(ledger.engine) as connection:
        # Two gateways must not give the same number; the chain of the gateway is the lock.
        locked_heads(connection, [kinds.GATEWAY_CHAIN])
        heads = read_heads(connection)
        last = last_checkpoint(connection)
        if not heads or (last is not None and not _news(heads, last)):
            return None
        unsigned = Checkpoint(
            1 if last is None else last.number + 1,
            at_us,
            heads,
            GENESIS if last is None else last.hash,
            signer.key_id,
            "",
        )
        checkpoint = dataclasses.replace(unsigned, signature=signer.sign(unsigned.signed_text))
        connection.execute(
            insert(audit_checkpoints).values(
                number=checkpoint.number,
                at_us=checkpoint.at_us,
                heads=canonical(checkpoint.statement()["heads"]).decode("ascii"),
                prev=checkpoint.prev,
                key_id=checkpoint.key_id,
                signature=checkpoint.signature,
            )
        )
        told = {"number": checkpoint.number, "hash": checkpoint.hash, "key_id": checkpoint.key_id}
        append_within(connection, [prepared(kinds.AUDIT_CHECKPOINT, told, at_us)])
    return checkpoint


def _news(heads: Mapping[str, Head], last: Checkpoint) -> bool:
    # The record that tells of the last checkpoint is no news by itself, or an idle gateway would sign for ever.
    for chain, head in heads.items():
        known = last.heads.get(chain, Head(0, GENESIS)).seq
        if head.seq > known + (1 if chain == kinds.GATEWAY_CHAIN else 0):
            return True
    return False


def last_checkpoint(connection: Connection) -> Checkpoint | None:
    query = select(audit_checkpoints).order_by(audit_checkpoints.c.number.desc()).limit(1)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else as_checkpoint(row)


def checkpoints(ledger: Ledger) -> list[Checkpoint]:
    """All checkpoints, in order."""
    with reading(ledger.engine) as connection:
        return read_checkpoints(connection)


def read_checkpoints(connection: Connection) -> list[Checkpoint]:
    rows = connection.execute(select(audit_checkpoints).order_by(audit_checkpoints.c.number)).mappings()
    return [as_checkpoint(row) for row in rows]


def as_checkpoint(row: RowMapping) -> Checkpoint:
    return Checkpoint.from_json({**row, "v": FORMAT, "heads": json.loads(row["heads"])})


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no integer")
    return value
