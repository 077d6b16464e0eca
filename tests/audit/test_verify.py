"""Checkpoints, and verifying what is in the database after somebody has been at it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, insert, select, text, update

from supervisor.audit import chain as chains
from supervisor.audit import kinds
from supervisor.audit.checkpoint import (
    KEY_FILE,
    PUBLIC_KEY_FILE,
    Checkpoint,
    Signer,
    checkpoints,
    load_signer,
    make_checkpoint,
    read_public_key,
    signature_holds,
)
from supervisor.audit.ledger import Entry, Ledger, open_ledger
from supervisor.audit.verify import CHECKPOINTS, VerifyReport, verify
from supervisor.errors import AuditFailed, BadInput
from supervisor.store.engine import reading, writing
from supervisor.store.schema import audit_chains, audit_checkpoints, audit_records
from supervisor.store.store import Store
from tests.audit.test_journal import RUN, journal
from tools.values import canonical

WEB = "machine:web-01"


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer(Ed25519PrivateKey.generate())


@pytest.fixture
def filled(ledger: Ledger, signer: Signer) -> Ledger:
    """Ten records of web-01, three of db-01, and two checkpoints: at 4 and at 8 of web-01."""
    append(ledger, "web-01", 4)
    make_checkpoint(ledger, signer)
    append(ledger, "web-01", 4)
    append(ledger, "db-01", 3)
    make_checkpoint(ledger, signer)
    append(ledger, "web-01", 2)
    return ledger


def append(ledger: Ledger, machine: str, count: int) -> None:
    ledger.append([Entry(kinds.DECISION, {"n": number}, machine=machine, run_id="r") for number in range(count)])


def execute(ledger: Ledger, *statements: object) -> None:
    with writing(ledger.engine) as connection:
        for statement in statements:
            connection.execute(text(statement) if isinstance(statement, str) else statement)  # type: ignore[call-overload]


def found(report: VerifyReport) -> list[tuple[str, str, int, int]]:
    return [(item.kind, item.chain, item.seq, item.last_seq) for item in report.breaks]


def check(ledger: Ledger, signer: Signer) -> list[tuple[str, str, int, int]]:
    return found(verify(ledger, keys=[signer.public_key]))


def at(seq: int, chain: str = WEB) -> object:
    return (audit_records.c.chain == chain) & (audit_records.c.seq == seq)


def test_what_nobody_touched_verifies(filled: Ledger, signer: Signer) -> None:
    report = verify(filled, keys=[signer.public_key])
    assert report.breaks == ()
    assert report.verified
    assert report.chains == {"gateway": 2, "machine:db-01": 3, WEB: 10}
    assert (report.records, report.checkpoints, report.signatures_checked, report.unsigned) == (15, 2, True, 3)
    assert report.to_json()["verified"] is True


def test_one_machine_can_be_verified_alone(filled: Ledger, signer: Signer) -> None:
    assert verify(filled, "db-01", keys=[signer.public_key]).chains == {"machine:db-01": 3}
    assert not verify(filled, "db-01").signatures_checked


@pytest.mark.parametrize("column", ["at_us", "kind", "actor", "run_id", "key", "body", "prev", "hash"])
def test_a_changed_column_is_found_at_its_record(filled: Ledger, signer: Signer, column: str) -> None:
    value: object = 5 if column == "at_us" else "x"
    execute(filled, update(audit_records).where(at(3)).values({column: value}))  # type: ignore[arg-type]
    assert check(filled, signer) == [(chains.CHANGED, WEB, 3, 3)]


def test_a_removed_record_is_found(filled: Ledger, signer: Signer) -> None:
    execute(filled, delete(audit_records).where(at(3)))  # type: ignore[arg-type]
    assert check(filled, signer) == [(chains.REMOVED, WEB, 3, 3)]


def test_a_record_that_was_given_another_number_is_found(filled: Ledger, signer: Signer) -> None:
    execute(filled, update(audit_records).where(at(3)).values(seq=99))  # type: ignore[arg-type]
    assert check(filled, signer) == [(chains.CHANGED, WEB, 3, 3)]


def test_two_records_that_changed_places_are_found(filled: Ledger, signer: Signer) -> None:
    execute(
        filled,
        update(audit_records).where(at(2)).values(seq=99),  # type: ignore[arg-type]
        update(audit_records).where(at(6)).values(seq=2),  # type: ignore[arg-type]
        update(audit_records).where(at(99)).values(seq=6),  # type: ignore[arg-type]
    )
    assert check(filled, signer) == [(chains.REORDERED, WEB, 2, 2), (chains.REORDERED, WEB, 6, 6)]


def test_a_record_moved_to_another_chain_is_missed_there_and_strange_here(filled: Ledger, signer: Signer) -> None:
    execute(filled, update(audit_records).where(at(10)).values(chain="machine:db-01"))  # type: ignore[arg-type]
    kinds_found = {(kind, chain) for kind, chain, _, _ in check(filled, signer)}
    assert (chains.TRUNCATED, WEB) in kinds_found
    assert (chains.CHANGED, "machine:db-01") in kinds_found


def test_a_cut_tail_is_found_by_the_head(filled: Ledger, signer: Signer) -> None:
    execute(filled, "DELETE FROM audit_records WHERE chain = 'machine:web-01' AND seq > 8")
    assert check(filled, signer) == [(chains.TRUNCATED, WEB, 9, 10)]


def rewind(ledger: Ledger, seq: int) -> None:
    """What a careful forger does: cut the tail and set the head back."""
    with writing(ledger.engine) as connection:
        last = connection.execute(select(audit_records.c.hash).where(at(seq))).scalar()  # type: ignore[arg-type]
        connection.execute(text(f"DELETE FROM audit_records WHERE chain = '{WEB}' AND seq > {seq}"))
        connection.execute(update(audit_chains).where(audit_chains.c.chain == WEB).values(seq=seq, hash=last))


def test_a_cut_tail_with_its_head_set_back_is_found_by_a_checkpoint(filled: Ledger, signer: Signer) -> None:
    rewind(filled, 6)
    assert check(filled, signer) == [(chains.TRUNCATED, WEB, 7, 8)]


def test_a_tail_written_anew_is_found_by_a_checkpoint(filled: Ledger, signer: Signer) -> None:
    rewind(filled, 6)
    append(filled, "web-01", 4)
    assert check(filled, signer) == [(chains.REPLACED, WEB, 5, 8)]


def test_a_chain_that_was_removed_whole_is_found_by_a_checkpoint(filled: Ledger, signer: Signer) -> None:
    execute(
        filled, f"DELETE FROM audit_records WHERE chain = '{WEB}'", f"DELETE FROM audit_chains WHERE chain = '{WEB}'"
    )
    assert check(filled, signer) == [(chains.TRUNCATED, WEB, 1, 8)]


def test_a_forged_checkpoint_is_found(filled: Ledger, signer: Signer) -> None:
    execute(filled, "UPDATE audit_checkpoints SET at_us = 1 WHERE number = 2")
    assert check(filled, signer) == [(chains.FORGED, CHECKPOINTS, 2, 2), (chains.FORGED, CHECKPOINTS, 2, 2)]


def test_a_checkpoint_of_another_key_is_found(filled: Ledger, signer: Signer) -> None:
    stranger = Signer(Ed25519PrivateKey.generate())
    append(filled, "web-01", 1)
    make_checkpoint(filled, stranger)
    assert check(filled, signer) == [(chains.FORGED, CHECKPOINTS, 3, 3)]
    assert verify(filled, keys=[signer.public_key, stranger.public_key]).verified


def test_a_removed_checkpoint_is_missed_by_the_gateways_chain(filled: Ledger, signer: Signer) -> None:
    execute(filled, "DELETE FROM audit_checkpoints WHERE number = 2")
    assert check(filled, signer) == [(chains.REMOVED, CHECKPOINTS, 2, 2)]
    execute(filled, "DELETE FROM audit_checkpoints WHERE number = 1")
    assert {item[0] for item in check(filled, signer)} == {chains.REMOVED}


def test_checkpoints_kept_elsewhere_find_what_was_rebuilt_from_nothing(
    filled: Ledger, signer: Signer, tmp_path: Path
) -> None:
    kept = checkpoints(filled)
    with open_ledger(f"sqlite:///{tmp_path / 'other.db'}") as forged:
        append(forged, "web-01", 10)
        make_checkpoint(forged, signer)
        assert verify(forged, keys=[signer.public_key]).verified
        report = verify(forged, keys=[signer.public_key], trusted=kept)
    assert (chains.FORGED, CHECKPOINTS, 1, 1) in found(report)
    assert (chains.REMOVED, CHECKPOINTS, 2, 2) in found(report)
    assert (chains.REPLACED, WEB, 1, 4) in found(report)


def test_nothing_new_makes_no_checkpoint(filled: Ledger, signer: Signer) -> None:
    assert make_checkpoint(filled, signer) is not None
    assert make_checkpoint(filled, signer) is None


def test_checkpoints_of_many_threads_are_numbered_and_linked(ledger: Ledger, signer: Signer) -> None:
    def work(number: int) -> None:
        append(ledger, f"m-{number % 3}", 1)
        make_checkpoint(ledger, signer)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(24)))
    assert verify(ledger, keys=[signer.public_key]).breaks == ()


def test_a_checkpoint_survives_its_json_form(filled: Ledger, signer: Signer) -> None:
    for checkpoint in checkpoints(filled):
        again = Checkpoint.from_json(checkpoint.to_json())
        assert again == checkpoint
        assert signature_holds(again, signer.public_key)
        assert not signature_holds(dataclasses.replace(again, signature="!"), signer.public_key)


FIELDS = ["v", "number", "at_us", "heads", "prev", "key_id", "signature"]
VALUES = st.none() | st.just(1) | st.text(max_size=3) | st.dictionaries(st.text(max_size=2), st.none())


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_a_document_is_refused_or_is_the_checkpoint_it_says_it_is(document: dict[str, object]) -> None:
    try:
        checkpoint = Checkpoint.from_json(document)
    except BadInput:
        return
    assert checkpoint.to_json() == document


def test_the_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        signers = list(pool.map(lambda _: load_signer(tmp_path / "data"), range(8)))
    assert len({one.key_id for one in signers}) == 1
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [KEY_FILE, PUBLIC_KEY_FILE]
    assert stat.S_IMODE((tmp_path / "data" / KEY_FILE).stat().st_mode) == 0o600
    public = read_public_key((tmp_path / "data" / PUBLIC_KEY_FILE).read_text())
    text_to_sign = b"x"
    assert signers[0].sign(text_to_sign) == signers[1].sign(text_to_sign)
    assert public == signers[0].public_key
    assert "PRIVATE" not in repr(signers[0])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: os.chmod(path, 0o640), "open to other users"),
        (lambda path: path.write_text("no key"), "damaged"),
        (lambda path: (path.unlink(), path.mkdir()), "could not be used"),
    ],
)
def test_a_key_that_cannot_be_trusted_is_refused(tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    load_signer(tmp_path)
    harm(tmp_path / KEY_FILE)
    with pytest.raises(AuditFailed, match=message):
        load_signer(tmp_path)


def test_a_sealed_journal_is_verified_with_its_chain(store: Store, ledger: Ledger, machine: object) -> None:
    lines, head = journal()
    store.runs.create(machine="web-01", requested_by="a", text="x", not_after=1.0, run_id=RUN)
    sealed = {"lines": len(lines), "head": head, "lease_digest": "sha256:lease"}
    ledger.record(kinds.JOURNAL_SEALED, sealed, machine="web-01", run_id=RUN)
    assert found(verify(ledger)) == [(chains.REMOVED, f"journal:{RUN}", 1, 1)]
    store.journals.save(RUN, lines, head, complete=True)
    report = verify(ledger)
    assert (report.verified, report.journals) == (True, 1)
    execute(ledger, "UPDATE run_journals SET lines = replace(lines, 'systemctl', 'systemcti')")
    broken = verify(ledger).breaks
    assert {item.chain for item in broken} == {f"journal:{RUN}"}
    assert broken[0].kind == chains.CHANGED


_numbers = itertools.count()
SUPPRESSED = [HealthCheck.function_scoped_fixture]


@settings(max_examples=40, suppress_health_check=SUPPRESSED)
@given(st.data())
def test_any_single_manipulation_of_the_table_is_found_at_its_place(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / f"{next(_numbers)}.db"
    with open_ledger(f"sqlite:///{path}") as ledger:
        append(ledger, "web-01", 7)
        seq = data.draw(st.integers(1, 7))
        column = data.draw(st.sampled_from([None, "at_us", "kind", "actor", "run_id", "body", "prev", "hash"]))
        with reading(ledger.engine) as connection:
            row = dict(connection.execute(select(audit_records).where(at(seq))).mappings().one())  # type: ignore[arg-type]
        execute(ledger, delete(audit_records).where(at(seq)))  # type: ignore[arg-type]
        if column is not None:
            old = row[column]
            place = 0 if isinstance(old, int) else data.draw(st.integers(0, len(old) - 1))
            row[column] = old + 1 if isinstance(old, int) else old[:place] + chr(ord(old[place]) ^ 1) + old[place + 1 :]
            execute(ledger, insert(audit_records).values(row))
        wanted = chains.CHANGED if column is not None else chains.TRUNCATED if seq == 7 else chains.REMOVED
        assert found(verify(ledger)) == [(wanted, WEB, seq, seq)]


def test_the_heads_in_a_checkpoint_are_stored_in_canonical_form(filled: Ledger) -> None:
    with reading(filled.engine) as connection:
        stored = connection.execute(select(audit_checkpoints.c.heads)).scalars().all()
    for item, checkpoint in zip(stored, checkpoints(filled), strict=True):
        assert canonical(checkpoint.statement()["heads"]).decode("ascii") == item
