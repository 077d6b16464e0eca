"""Every sample output gives exactly the data that stands beside it, and that data has the declared shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.observers.probing import read_sample, replay
from tools.observers.observer import MAX_PHASES, MAX_PROBES
from tools.observers.registry import OBSERVERS, observer
from tools.values import canonical

SAMPLES = sorted((Path(__file__).parent / "samples").glob("*/*.txt"))


def strays(shape: Any, data: Any, place: str) -> list[str]:
    """Fields of ``data`` that the shape does not declare, and declared ones that are not there."""
    if data is None or isinstance(shape, str):
        return [] if not isinstance(data, (dict, list)) else [f"{place}: {data!r} is more than a plain value"]
    if isinstance(shape, list):
        if not isinstance(data, list):
            return [f"{place}: not a list"]
        return [found for row in data for found in strays(shape[0], row, f"{place}[]")]
    assert isinstance(shape, Mapping)
    if not isinstance(data, dict):
        return [f"{place}: not an object"]
    found = [f"{place}.{name}: not declared" for name in data if name not in shape]
    found += [f"{place}.{name}: declared and not there" for name in shape if name not in data]
    return found + [
        more for name in shape if name in data for more in strays(shape[name], data[name], f"{place}.{name}")
    ]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_sample_gives_the_data_beside_it_in_the_declared_shape(path: Path) -> None:
    one = observer(path.parent.name)
    parameters, known = read_sample(path.read_text())
    results, data = replay(one, parameters, known)
    assert data == json.loads(path.with_suffix(".json").read_text())
    canonical(data)
    assert len(results) <= MAX_PROBES
    shape = {**one.returns, "unavailable": [{"probe": "", "reason": ""}], "cut": ""}
    assert strays(shape, data, path.parent.name) == []


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_result_of_a_sample_is_asked_for(path: Path) -> None:
    one = observer(path.parent.name)
    parameters, known = read_sample(path.read_text())
    asked: list[str] = []
    results: list[Any] = []
    probes = one.probes(parameters)
    phases = 0
    while probes:
        phases += 1
        asked += [probe.label for probe in probes]
        results, _ = [known.get(label) or replay(one, parameters, {})[0][0] for label in asked], None
        probes = one.next_probes(results, parameters)
    assert phases <= MAX_PHASES
    assert set(known) - set(asked) == set()


def test_every_observer_has_samples_of_several_machines() -> None:
    counts = {name: sum(path.parent.name == name for path in SAMPLES) for name in OBSERVERS}
    assert {name: count for name, count in counts.items() if count < 2} == {}
