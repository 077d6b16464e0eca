"""Verifying everything that is in the database: chains, checkpoints, and the journals that were sealed.

Owns: the report, and which checks belong together.
Deliberately does not know: exports (``supervisor.audit.export`` uses the same pure checks on files).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from supervisor.audit import journal as journals
from supervisor.audit import kinds
from supervisor.audit.chain import FORGED, GENESIS, REMOVED, Break, ChainChecker, Mark, Record
from supervisor.audit.checkpoint import Checkpoint, key_id, read_checkpoints, signature_holds
from supervisor.audit.ledger import Ledger, read_chain, read_chain_names, read_heads
from supervisor.store.engine import reading
from supervisor.store.journals import Journals
from tools.values import JsonObject

CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What was checked and what does not hold.

    ``records``: how many were checked. ``chains``: how many by chain. ``unsigned``: how many records are younger than
    the last checkpoint (only the database itself vouches for their number); the record that tells of it is one. ``signatures_checked``: whether a key
    was at hand. ``journals``: how many sealed journals were checked.
    """

    records: int
    chains: dict[str, int]
    checkpoints: int
    signatures_checked: bool
    unsigned: int
    journals: int
    breaks: tuple[Break, ...]

    @property
    def verified(self) -> bool:
        return not self.breaks

    def to_json(self) -> JsonObject:
        return {
            "verified": self.verified,
            "records": self.records,
            "chains": self.chains,
            "checkpoints": self.checkpoints,
            "signatures_checked": self.signatures_checked,
            "unsigned": self.unsigned,
            "journals": self.journals,
            "breaks": [found.to_json() for found in self.breaks],
        }


def verify(
    ledger: Ledger,
    machine: str | None = None,
    *,
    keys: Iterable[Ed25519PublicKey] = (),
    trusted: Sequence[Checkpoint] = (),
) -> VerifyReport:
    """Check every record of every chain (or of one machine's), all checkpoints and the sealed journals.

    Args:
        machine: only this machine's chain.
        keys: the public keys that may have signed; without any, signatures are not checked and the report says so.
        trusted: checkpoints kept elsewhere; what they say is held against this database.
    """
    keys = list(keys)
    with reading(ledger.engine) as connection:
        known = read_checkpoints(connection)
        heads = read_heads(connection)
        everything = read_chain_names(connection)
        wanted = everything if machine is None else [kinds.machine_chain(machine)]
        named = {chain for checkpoint in (*known, *trusted) for chain in checkpoint.heads}
        chains: dict[str, int] = {}
        told: dict[int, str] = {}
        sealed: dict[str, JsonObject] = {}
        breaks = list(check_checkpoints(known, keys, trusted))
        for chain in sorted({*wanted, *(named if machine is None else ())}):
            checker = ChainChecker(chain, heads.get(chain), marks_of(chain, (*known, *trusted)))
            for record in read_chain(connection, chain):
                checker.feed(record)
                note_record(record, told, sealed)
            chains[chain] = checker.records
            breaks += checker.finish()
    if machine is None:
        breaks += check_told(known, told)
    breaks += check_journals(Journals(ledger.engine), sealed)
    signed = known[-1].heads if known else {}
    unsigned = sum(max(0, count - (signed[chain].seq if chain in signed else 0)) for chain, count in chains.items())
    return VerifyReport(sum(chains.values()), chains, len(known), bool(keys), unsigned, len(sealed), tuple(breaks))


def marks_of(chain: str, known: Iterable[Checkpoint]) -> list[Mark]:
    """What the checkpoints say about one chain."""
    return [
        Mark(checkpoint.number, checkpoint.heads[chain].seq, checkpoint.heads[chain].hash)
        for checkpoint in known
        if chain in checkpoint.heads
    ]


def check_checkpoints(
    known: Sequence[Checkpoint], keys: Iterable[Ed25519PublicKey], trusted: Sequence[Checkpoint] = ()
) -> list[Break]:
    """Whether the checkpoints are whole, in order, linked, signed by one of ``keys`` and those that are ``trusted``."""
    breaks: list[Break] = []
    by_id = {key_id(key): key for key in keys}
    expected, prev = 1, GENESIS
    for checkpoint in known:
        number = checkpoint.number
        if number != expected:
            breaks.append(_missing(expected, number - 1))
        elif checkpoint.prev != prev:
            breaks.append(
                _forged(number, f"checkpoint {number} does not follow the one before it", prev, checkpoint.prev)
            )
        if by_id:
            key = by_id.get(checkpoint.key_id)
            if key is None:
                known_ids = ", ".join(sorted(identity[:16] for identity in by_id))
                breaks.append(
                    _forged(
                        number, f"checkpoint {number} names a key that is not trusted", known_ids, checkpoint.key_id
                    )
                )
            elif not signature_holds(checkpoint, key):
                breaks.append(_forged(number, f"the signature of checkpoint {number} does not hold", "", ""))
        expected, prev = number + 1, checkpoint.hash
    stored = {checkpoint.number: checkpoint for checkpoint in known}
    for kept in trusted:
        here = stored.get(kept.number)
        if here is None:
            breaks.append(_missing(kept.number, kept.number))
        elif here.hash != kept.hash:
            message = f"checkpoint {kept.number} is not the one that was kept elsewhere"
            breaks.append(_forged(kept.number, message, kept.hash, here.hash))
    return breaks


def note_record(record: Record, told: dict[int, str], sealed: dict[str, JsonObject]) -> None:
    """Remember what a record says about checkpoints (``told``: hash by number) and journals (``sealed``: by run)."""
    if record.kind == kinds.AUDIT_CHECKPOINT and record.chain == kinds.GATEWAY_CHAIN:
        body = _object(record.body)
        if isinstance(body.get("number"), int):
            told[body["number"]] = str(body.get("hash"))
    elif record.kind == kinds.JOURNAL_SEALED and record.run_id is not None:
        sealed[record.run_id] = _object(record.body)


def check_told(known: Sequence[Checkpoint], told: Mapping[int, str]) -> list[Break]:
    """Whether the checkpoints are those that the gateway's chain tells of."""
    stored = {checkpoint.number: checkpoint.hash for checkpoint in known}
    breaks = []
    for number, text_hash in told.items():
        if number not in stored:
            breaks.append(_missing(number, number))
        elif stored[number] != text_hash:
            message = f"checkpoint {number} is not the one that the gateway's chain tells of"
            breaks.append(_forged(number, message, text_hash, stored[number]))
    return breaks


def check_journals(stored: Journals, sealed: Mapping[str, JsonObject]) -> list[Break]:
    """Whether every sealed journal is still there, whole, and the one that was sealed."""
    breaks: list[Break] = []
    for run_id, body in sealed.items():
        kept = stored.get(run_id)
        breaks += check_sealed(run_id, body, None if kept is None else kept.lines)
    return breaks


def check_sealed(run_id: str, sealed: Mapping[str, object], lines: Sequence[str] | None) -> list[Break]:
    """Whether ``lines`` are the journal that the record ``journal.sealed`` with body ``sealed`` speaks of."""
    chain = f"journal:{run_id}"
    if lines is None:
        if not sealed.get("lines"):
            return []
        return [Break(REMOVED, chain, 1, 1, f"the sealed journal of run {run_id} is missing")]
    lease = sealed.get("lease_digest")
    report = journals.verify_journal(
        lines, run_id, head=str(sealed.get("head")), lease_digest=lease if isinstance(lease, str) else None
    )
    return list(report.breaks)


def _object(body: str) -> JsonObject:
    try:
        parsed = json.loads(body)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _missing(first: int, last: int) -> Break:
    return Break(REMOVED, CHECKPOINTS, first, last, f"checkpoint {first} is missing")


def _forged(number: int, message: str, expected: str, got: str) -> Break:
    return Break(FORGED, CHECKPOINTS, number, number, message, expected, got)
