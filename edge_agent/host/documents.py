"""JSON that came from outside, as values.

Owns: what is taken for a JSON object and for a number of seconds at every door of the machine side.
Deliberately does not know: which door, and what the fields mean.

``NaN`` and ``Infinity`` are no JSON, and a time that is not a number would pass every comparison with a clock: "not
later than NaN" is true for ever. So neither gets in, whether written out or as a number too large to hold.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Mapping, Union

from tools.values import JsonObject, Malformed, want


def read_object(data: Union[str, bytes, bytearray]) -> JsonObject:
    """``data`` as a JSON object. Raises ``Malformed`` for anything else, however deep, long or broken it is."""
    try:
        document = json.loads(data, parse_constant=_no_constant)
    except RecursionError:
        raise Malformed("it is nested too deeply") from None
    except ValueError as error:
        raise Malformed("it is not JSON: %s" % error) from error
    if not isinstance(document, dict):
        raise Malformed("it must be a JSON object, got %s" % type(document).__name__)
    return document


def _no_constant(word: str) -> None:
    raise ValueError("%s is not JSON" % word)


def seconds(document: Mapping[str, Any], name: str, default: Any = dataclasses.MISSING) -> float:
    """The field ``name`` as a finite number of seconds. Raises ``Malformed``."""
    value = want(document, name, (int, float), default)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Malformed("field %r must be a finite number of seconds, got %.40r" % (name, value))
    return number
