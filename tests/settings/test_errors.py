"""The error tree."""

from __future__ import annotations

import json
import pickle

import pytest

from supervisor import errors
from supervisor.errors import EXIT_CODES, ChargehandError, HostKeyChanged


def tree(kind: type[ChargehandError] = ChargehandError) -> list[type[ChargehandError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in tree(child))]


OURS = [kind for kind in tree() if kind.__module__ == errors.__name__]


def test_every_error_has_a_code_of_its_own_and_a_documented_exit_code() -> None:
    codes = [kind.default_code for kind in OURS]
    assert len(codes) == len(set(codes))
    for kind in OURS:
        assert kind.default_exit_code in EXIT_CODES
        assert kind.__doc__


def test_an_error_tells_what_was_tried_expected_and_got_and_what_to_do() -> None:
    error = HostKeyChanged(
        "the host key changed", tried="connecting", expected="SHA256:a", got="SHA256:b", next_step="look"
    )
    assert str(error) == ("the host key changed; tried: connecting; expected: SHA256:a; got: 'SHA256:b'; next: look")
    told = json.loads(json.dumps(error.to_json()))["error"]
    assert told["code"] == "host-key-changed"
    assert told["exit_code"] == errors.REFUSED
    assert (told["expected"], told["got"], told["next"]) == ("SHA256:a", "'SHA256:b'", "look")


def test_a_long_value_is_shortened_and_says_so() -> None:
    assert "(5002 characters)" in str(ChargehandError("x", got="y" * 5000))


@pytest.mark.parametrize("kind", OURS)
def test_an_error_survives_pickling_whole(kind: type[ChargehandError]) -> None:
    error = kind("m", tried="t", expected="e", got={"a": 1}, next_step="n", code="c", exit_code=9)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.to_json() == error.to_json()
    assert str(again) == str(error)
