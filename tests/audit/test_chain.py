"""The chain as a pure thing: every single manipulation is found, and at its own place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from supervisor.audit import chain as chains
from supervisor.audit.chain import EMPTY, Head, Mark, Record, compute_hash, link, verify_sequence
from tools.values import canonical

CHAIN = "machine:web-01"

texts = st.text(max_size=12)
entries = st.fixed_dictionaries(
    {
        "at_us": st.integers(0, 2**52),
        "kind": st.sampled_from(["run.state", "decision", "violation"]),
        "actor": texts,
        "run_id": st.none() | texts,
        "key": st.none() | texts,
        "body": st.dictionaries(texts, st.none() | st.integers() | texts, max_size=3).map(
            lambda body: canonical(body).decode("ascii")
        ),
    }
)


def build(items: list[dict[str, Any]], chain: str = CHAIN) -> list[Record]:
    records, head = [], EMPTY
    for item in items:
        records.append(link(chain, head, **item))
        head = Head(records[-1].seq, records[-1].hash)
    return records


def head_of(records: list[Record]) -> Head:
    return Head(records[-1].seq, records[-1].hash)


sound = st.lists(entries, min_size=1, max_size=9).map(build)
long_enough = st.lists(entries, min_size=3, max_size=9).map(build)


def other_value(value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, int):
        return st.integers(0, 2**52).filter(lambda new: new != value)
    if value is None:
        return texts
    flipped = st.integers(0, max(len(value) - 1, 0)).map(
        lambda at: value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :] if value else "x"
    )
    return flipped | st.just(value + " ") | texts.filter(lambda new: new != value)


@given(sound)
def test_a_sound_chain_has_no_breaks(records: list[Record]) -> None:
    marks = [Mark(1, 1, records[0].hash), Mark(2, len(records), records[-1].hash)]
    assert verify_sequence(CHAIN, records, head_of(records), marks) == []


@given(sound, st.data())
def test_every_changed_field_is_found_at_its_record(records: list[Record], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(records) - 1))
    name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(Record)]))
    value = data.draw(other_value(getattr(records[place], name)))
    head = head_of(records)
    records[place] = dataclasses.replace(records[place], **{name: value})
    breaks = verify_sequence(CHAIN, records, head)
    assert [(found.kind, found.seq) for found in breaks] == [(chains.CHANGED, place + 1)]


@given(long_enough, st.data())
def test_every_removed_run_of_records_is_found_with_its_bounds(records: list[Record], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(records) - 2))
    last = data.draw(st.integers(first, len(records) - 2))
    breaks = verify_sequence(CHAIN, records[:first] + records[last + 1 :], head_of(records))
    assert [(found.kind, found.seq, found.last_seq) for found in breaks] == [(chains.REMOVED, first + 1, last + 1)]


@given(sound, st.data())
def test_every_cut_tail_is_found_by_the_head_and_by_a_checkpoint(records: list[Record], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(records) - 1))
    wanted = [(chains.TRUNCATED, keep + 1, len(records))]
    by_head = verify_sequence(CHAIN, records[:keep], head_of(records))
    kept_head = head_of(records[:keep]) if keep else EMPTY
    by_mark = verify_sequence(CHAIN, records[:keep], kept_head, [Mark(4, len(records), records[-1].hash)])
    assert [(found.kind, found.seq, found.last_seq) for found in by_head] == wanted
    assert [(found.kind, found.seq, found.last_seq) for found in by_mark] == wanted
    assert "checkpoint 4" in by_mark[0].message


@given(long_enough, st.data())
def test_two_exchanged_lines_are_found_as_reordered(records: list[Record], data: st.DataObject) -> None:
    left, right = sorted(data.draw(st.permutations(range(len(records))))[:2])
    head = head_of(records)
    records[left], records[right] = records[right], records[left]
    breaks = verify_sequence(CHAIN, records, head)
    assert {found.kind for found in breaks} == {chains.REORDERED}
    assert {found.seq for found in breaks} <= {left + 1, right + 1}


@given(long_enough, st.data())
def test_two_exchanged_rows_that_took_each_others_number_are_found_as_reordered(
    records: list[Record], data: st.DataObject
) -> None:
    left, right = sorted(data.draw(st.permutations(range(len(records))))[:2])
    head = head_of(records)
    records[left], records[right] = (
        dataclasses.replace(records[right], seq=left + 1),
        dataclasses.replace(records[left], seq=right + 1),
    )
    breaks = verify_sequence(CHAIN, records, head)
    assert [(found.kind, found.seq) for found in breaks] == [
        (chains.REORDERED, left + 1),
        (chains.REORDERED, right + 1),
    ]


@given(long_enough, entries, st.data())
def test_a_record_written_anew_with_a_right_hash_is_found(
    records: list[Record], item: dict[str, Any], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(records) - 1))
    before = head_of(records[:place]) if place else EMPTY
    forged = link(CHAIN, before, **item)
    assume(forged != records[place])
    breaks = verify_sequence(CHAIN, [*records[:place], forged, *records[place + 1 :]], head_of(records))
    assert [(found.kind, found.seq) for found in breaks] == [(chains.REPLACED, place + 1)]


@given(long_enough, entries, st.data())
def test_a_tail_computed_anew_with_its_head_is_found_by_a_checkpoint(
    records: list[Record], item: dict[str, Any], data: st.DataObject
) -> None:
    place = data.draw(st.integers(1, len(records) - 1))
    forged = records[:place]
    for record in [link(CHAIN, head_of(forged), **item), *records[place + 1 :]]:
        fields = {name: getattr(record, name) for name in ("at_us", "kind", "actor", "run_id", "key", "body")}
        forged.append(link(CHAIN, head_of(forged), **fields))
    assume(forged != records)
    marks = [Mark(1, place, records[place - 1].hash), Mark(2, len(records), records[-1].hash)]
    breaks = verify_sequence(CHAIN, forged, head_of(forged), marks)
    assert [(found.kind, found.seq, found.last_seq) for found in breaks] == [(chains.REPLACED, place + 1, len(records))]


@given(long_enough, entries, st.data())
def test_a_record_of_another_chain_is_foreign(records: list[Record], item: dict[str, Any], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(records)))
    stranger = build([item], "machine:db-01")[0]
    breaks = verify_sequence(CHAIN, [*records[:place], stranger, *records[place:]], head_of(records))
    assert (chains.FOREIGN, 1) in [(found.kind, found.seq) for found in breaks]
    assert {found.kind for found in breaks} <= {chains.FOREIGN, chains.REORDERED}


def test_a_damaged_record_behind_a_gap_is_not_taken_for_the_missing_one() -> None:
    item = {"at_us": 1, "kind": "decision", "actor": "a", "run_id": None, "key": None, "body": "{}"}
    records = build([item] * 6)
    damaged = dataclasses.replace(records[3], actor="b")
    breaks = verify_sequence(CHAIN, [*records[:2], damaged, *records[4:]], head_of(records))
    assert [(found.kind, found.seq) for found in breaks] == [(chains.REMOVED, 3), (chains.CHANGED, 4)]


@given(long_enough, st.data())
def test_every_changed_number_is_found_at_its_record(records: list[Record], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(records) - 1))
    seq = data.draw(st.integers(-1, len(records) + 2).filter(lambda number: number != place + 1))
    head = head_of(records)
    records[place] = dataclasses.replace(records[place], seq=seq)
    breaks = verify_sequence(CHAIN, records, head)
    assert [(found.kind, found.seq) for found in breaks] == [(chains.CHANGED, place + 1)]


def test_an_empty_chain_that_nobody_knows_is_sound() -> None:
    assert verify_sequence(CHAIN, []) == []


def test_the_hash_does_not_depend_on_how_the_record_was_made() -> None:
    record = link(CHAIN, EMPTY, at_us=1, kind="k", actor="ä", run_id=None, key=None, body='{"a":1}')
    # Computed by hand with sha256sum of the canonical header: format 1 may never change silently.
    assert compute_hash(record) == record.hash
    assert record.hash == "ca69e7224344769356a960e270f5ddea896fd1285f0b6dc8799d33e16401b9e8"


@pytest.mark.parametrize("numbers", [[], [1], [1, 2, 3]])
def test_numbers_in_order_have_none_to_move(numbers: list[int]) -> None:
    assert chains._out_of_order(numbers) == []


def test_the_fewest_records_are_named_when_two_far_apart_changed_places() -> None:
    assert chains._out_of_order([1, 8, 3, 4, 5, 6, 7, 2, 9]) == [2, 8]
