"""Run ids."""

from __future__ import annotations

import concurrent.futures
import time
import uuid

import pytest

from supervisor.errors import BadInput
from supervisor.store import ids


def test_an_id_is_a_uuid_of_version_7_and_tells_when_it_was_made() -> None:
    run_id = ids.new_run_id()
    assert uuid.UUID(run_id).version == 7
    assert uuid.UUID(run_id).variant == uuid.RFC_4122
    assert abs(ids.made_at(run_id) - time.time()) < 5
    assert len(ids.trace_id(run_id)) == 32


def test_ids_sort_in_the_order_they_were_made_and_never_repeat() -> None:
    made = [ids.new_run_id() for _ in range(2000)]
    assert made == sorted(set(made))


def test_ids_of_many_threads_never_repeat() -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = [
            run_id for part in pool.map(lambda _: [ids.new_run_id() for _ in range(200)], range(8)) for run_id in part
        ]
    assert len(set(made)) == 1600


@pytest.mark.parametrize("text", ["", "x", str(uuid.uuid4()), ids.new_run_id().upper(), ids.new_run_id() + "\n"])
def test_what_is_no_run_id_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        ids.run_id(text)
