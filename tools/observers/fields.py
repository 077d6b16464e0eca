"""Small strict readers of the texts that Linux tools print: numbers, columns, key=value lines, escapes, times.

Owns: turning one piece of text into one value, or ``None`` when it is not what it should be.
Deliberately does not know: which observer asks. Nothing here raises on any text.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import Any, Dict, Iterable, List, Optional, Tuple

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_NUMBER = re.compile(r"-?(?:[0-9]{1,19}(?:\.[0-9]{0,19})?|\.[0-9]{1,19})(?:[eE][-+]?[0-9]{1,3})?")
_OCTAL = re.compile(r"\\([0-7]{3})")
_HEX = re.compile(r"\\x([0-9a-fA-F]{2})")
_PAIR = re.compile(r'([A-Za-z0-9_:%#.-]+)="((?:[^"\\]|\\.)*)"')
# 9999-12-31, the last day a date can show; seconds since 1970.
_LAST_SECOND = 253402300799
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)


def integer(text: Optional[str]) -> Optional[int]:
    """A decimal integer of at most 19 digits, else ``None``."""
    text = text.strip() if text is not None else ""
    return int(text) if _INTEGER.fullmatch(text) else None


def number(text: Optional[str]) -> Optional[float]:
    """A finite decimal number, else ``None``."""
    text = text.strip() if text is not None else ""
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if abs(value) < 1e300 else None


def hexadecimal(text: str) -> Optional[int]:
    """A hexadecimal number of at most 32 digits, else ``None``."""
    return int(text, 16) if re.fullmatch(r"[0-9a-fA-F]{1,32}", text) else None


def percent(part: Optional[float], whole: Optional[float]) -> Optional[float]:
    """``part`` of ``whole`` in percent with one decimal; ``None`` where there is no whole."""
    if part is None or whole is None or whole <= 0:
        return None
    return round(100.0 * part / whole, 1)


def ratio(part: Optional[float], whole: Optional[float], digits: int = 2) -> Optional[float]:
    """``part / whole`` rounded; ``None`` where there is no whole."""
    return None if part is None or not whole else round(part / whole, digits)


def keyed(lines: Optional[Iterable[str]], separator: str = "=") -> Dict[str, str]:
    """``key<separator>value`` lines as a mapping of stripped texts; the first of a key counts."""
    values: Dict[str, str] = {}
    for line in lines or ():
        key, found, value = line.partition(separator)
        if found:
            values.setdefault(key.strip(), value.strip())
    return values


def pairs(line: str) -> Dict[str, str]:
    """The ``KEY="value"`` pairs of a line of ``lsblk -P``, escapes undone."""
    return {key: unhex(value) for key, value in _PAIR.findall(line)}


def unquoted(value: str) -> str:
    """The value of an os-release assignment without its quotes."""
    value = value.strip()
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return re.sub(r"\\([\"'\\$`])", r"\1", value)


def unoctal(text: str) -> str:
    """Undo the ``\\040`` escapes of mount tables."""
    return _OCTAL.sub(lambda found: chr(int(found.group(1), 8)), text)


def unhex(text: str) -> str:
    """Undo the ``\\x20`` escapes of util-linux."""
    if "\\x" not in text:
        return text
    raw = _HEX.sub(lambda found: chr(int(found.group(1), 16)), text)
    try:
        return raw.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return raw


def document(text: Optional[str]) -> Any:
    """A JSON document, ``None`` if the text is none (or nested beyond what the reader takes)."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def objects(value: Any) -> List[Dict[str, Any]]:
    """The objects in a JSON list; empty for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def whole(value: Any) -> Optional[int]:
    """A JSON integer (not a boolean), else ``None``."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def string(value: Any) -> Optional[str]:
    """A JSON string, else ``None``."""
    return value if isinstance(value, str) else None


def utc(seconds: Optional[float]) -> Optional[str]:
    """Seconds since 1970 as ``2024-05-01T10:00:00Z``; ``None`` outside of the years 1970 to 9999."""
    if seconds is None or not 0 <= seconds <= _LAST_SECOND:
        return None
    moment = _EPOCH + dt.timedelta(seconds=int(seconds))
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment.year >= 1000 else None


def seconds_of_utc(text: str, form: str = "%Y-%m-%d %H:%M:%S") -> Optional[int]:
    """The seconds since 1970 of a UTC time written in ``form``, else ``None``."""
    try:
        moment = dt.datetime.strptime(text, form).replace(tzinfo=dt.timezone.utc)
    except ValueError:
        return None
    return int((moment - _EPOCH).total_seconds())


def size_of_list(text: Optional[str]) -> Optional[int]:
    """How many numbers a kernel list such as ``0-3,5`` names, else ``None``."""
    total = 0
    for part in (text or "").strip().split(","):
        low, dash, high = part.partition("-")
        first, last = integer(low), integer(high) if dash else integer(low)
        if first is None or last is None or not 0 <= first <= last < 1 << 20:
            return None
        total += last - first + 1
    return total or None


def tail_columns(line: str, count: int) -> Optional[Tuple[str, ...]]:
    """The first ``count`` words of a line and the rest of it as the last element, else ``None`` if there are fewer."""
    words = line.split(None, count)
    return tuple(words) if len(words) == count + 1 else None
