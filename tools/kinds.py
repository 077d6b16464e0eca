"""The kinds of value a word of a command may have, and the one check behind each.

Owns: the small language kinds are written in (``int(1,20)``, ``enum(a,b)``, ``unit|pid``), what each accepts, and the
words a refusal uses for it.
Deliberately does not know: options, sub-commands, binaries, where on the command line a value stood.

A kind accepts a closed set of texts: whatever it does not recognise is refused. Where a kind is a path, the checked
value that comes back is the resolved one, and that is what will be executed.
Sources: systemd.time(7), systemd.unit(5), hostname(7), proc(5); safety.md, "The gate".
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from typing import Callable, Dict, Mapping, Optional, Pattern, Protocol, Tuple


class Refusal(Exception):
    """A call is not allowed. ``reason``: one sentence, what was asked and why not; ``hint``: what would be allowed."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class BadKind(ValueError):
    """A policy names a kind that does not exist or gives it arguments that make no sense."""


class Sight(Protocol):
    """What a check may look at: named sets and shapes of the policy, and the path rules joined with the host's."""

    def member(self, set_name: str, value: str) -> bool:
        """Whether the policy's named set holds ``value`` (a trailing ``*`` in the set matches any rest)."""

    def readable(self, path: str, tree: bool, roots: Tuple[str, ...]) -> str:
        """The resolved form of a path whose content may be read; raises ``Refusal``."""

    def listable(self, path: str) -> str:
        """The form of a path whose name and metadata may be read; raises ``Refusal``."""

    tree: bool


Check = Callable[[str, "Sight"], str]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A compiled kind. ``text`` is its source form, ``words`` how a refusal describes it, ``is_path`` whether it reads
    file content."""

    text: str
    words: str
    check: Check = dataclasses.field(repr=False, compare=False)
    is_path: bool = False


PATTERN_CHARS = 1024
_DASHES = frozenset("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d\u00ad\u2043\u30fc\u1806")
# Categories whose characters are invisible, reorder the text around them, or mean nothing: a person who approves a
# call must see what it is.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def check_characters(word: str, position: int) -> None:
    """Refuses NUL, newline, control, invisible and surrogate characters anywhere; raises ``Refusal``.

    ``position`` counts words from 0 and is used for the message only.
    """
    if word.isascii():
        if word.isprintable():
            return
    else:
        if word[0] in _DASHES:
            raise Refusal(
                "word %d begins with U+%04X, which only looks like a dash" % (position, ord(word[0])),
                "write options with the ASCII '-'",
            )
        if not any(unicodedata.category(c) in _HIDDEN or (c.isspace() and c != " ") for c in word):
            return
    for character in word:
        if unicodedata.category(character) in _HIDDEN or (character.isspace() and character != " "):
            name = {"\0": "NUL", "\n": "a newline", "\r": "a carriage return", "\t": "a tab", "\x1b": "an escape"}.get(
                character, "U+%04X" % ord(character)
            )
            raise Refusal(
                "word %d holds %s, which no argument may hold" % (position, name), "send plain printable text"
            )


def _matching(regex: str) -> Callable[[str], bool]:
    compiled = re.compile(regex, re.ASCII)
    return lambda value: compiled.fullmatch(value) is not None


def _by_regex(words: str, regex: str) -> Tuple[str, Check]:
    compiled = re.compile(regex, re.ASCII)

    def check(value: str, _sight: Sight) -> str:
        if compiled.fullmatch(value) is None:
            raise Refusal("%.80r is not %s" % (value, words), "expected %s" % words)
        return value

    return words, check


_UNIT = r"[A-Za-z0-9_:\\@.][A-Za-z0-9_:\\@.-]{0,254}"
_UNIT_GLOB = r"[A-Za-z0-9_:\\@.*?\[][A-Za-z0-9_:\\@.*?\[\]!-]{0,254}"
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62}[A-Za-z0-9_])?"
_HOST_NAME = r"%s(?:\.%s){0,16}\.?" % (_LABEL, _LABEL)
_IPV6 = r"(?=[0-9A-Fa-f:.]{2,45}(?:%|/|$))[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:(?:\.[0-9]{1,3}){3})?"
_SPAN = (
    r"(?:(?:[0-9]{1,9}(?:\.[0-9]{1,3})?) ?"
    r"(?:years?|y|months?|M|weeks?|w|days?|d|hours?|hour|hr|h|minutes?|min|m|seconds?|sec|s|msec|ms|usec|us))"
)
_SPANS = r"%s(?: ?%s){0,4}" % (_SPAN, _SPAN)
_DAY = r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]{0,6}"
_DATE = r"(?:[0-9]{4}|[0-9]{2})-[0-9]{2}-[0-9]{2}"
_CLOCK = r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,6})?)?"
_ZONE = r"(?: ?(?:UTC|Z|[+-][0-9]{2}:?[0-9]{2})| [A-Z][A-Za-z]{1,13}(?:/[A-Z][A-Za-z_]{1,20}){0,2})?"
_TIMESTAMP = r"(?:now|today|yesterday|tomorrow|@[0-9]{1,12}(?:\.[0-9]{1,6})?|[+-]%s|%s(?: ago| left)|(?:%s )?%s(?:[ T]%s)?%s|%s%s|(?:today|yesterday) %s)" % (
    _SPANS, _SPANS, _DAY, _DATE, _CLOCK, _ZONE, _CLOCK, _ZONE, _CLOCK,
)  # fmt: skip

# name -> (what a refusal calls it, the whole text that is accepted). None of these can begin with a dash but where
# the words say so, and none can hold a slash, so none can be read as an option or a file.
_SIMPLE: Dict[str, Tuple[str, str]] = {
    "word": (
        "a plain word (letters, digits, '_', '.', ':', '+', '-', not beginning with a dash)",
        r"[A-Za-z0-9_][A-Za-z0-9_.:+-]{0,127}",
    ),
    "words": ("plain words joined by commas", r"[A-Za-z0-9_][A-Za-z0-9_.:+,-]{0,511}"),
    "interface": ("a network interface name", r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,14}(?:@[A-Za-z0-9_.:-]{1,15})?"),
    "timestamp": ("a time such as '1 hour ago', 'yesterday' or '2025-01-31 12:00'", _TIMESTAMP),
    "duration": ("a duration such as 30s, 5min or 2h", _SPANS + r"|[0-9]{1,9}"),
    "size": ("a size such as 512, 64K or 10M", r"[1-9][0-9]{0,15}(?:[KMGTPkmgtp](?:i?B)?)?|[KMGTP](?:i?B)?|0"),
    "user": ("a user or group name or id", r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(?:@[A-Za-z0-9_.-]{1,128})?\$?"),
    "mac": ("a MAC address", r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}"),
    "field": ("FIELD=value as in journal fields", r"_{0,2}[A-Z][A-Z0-9_]{0,63}=[A-Za-z0-9_.:@/\\+-]{1,256}"),
}


def _host(words: str) -> Tuple[str, Check]:
    matches = _matching(r"%s|%s(?:%%[A-Za-z0-9_.-]{1,15})?" % (_HOST_NAME, _IPV6))

    def check(value: str, _sight: Sight) -> str:
        if len(value) > 253 or not matches(value):
            raise Refusal("%.80r is not %s" % (value, words), "expected %s, without user, port or path" % words)
        return value

    return words, check


def _in_set(words: str, inner: Check, set_name: str) -> Tuple[str, Check]:
    words = "%s of the set %r" % (words, set_name)

    def check(value: str, sight: Sight) -> str:
        value = inner(value, sight)
        if not sight.member(set_name, value):
            raise Refusal("%.80r is not in the policy's set %r" % (value, set_name), "expected %s" % words)
        return value

    return words, check


def _int(low: int, high: int) -> Tuple[str, Check]:
    words = "a whole number from %d to %d" % (low, high)
    # No leading zero (some programs read octal) and no '+', which head and tail give a meaning of its own.
    matches = _matching(r"-?(?:0|[1-9][0-9]{0,17})")

    def check(value: str, _sight: Sight) -> str:
        if not matches(value) or not low <= int(value) <= high:
            raise Refusal("%.80r is not %s" % (value, words), "expected %s" % words)
        return value

    return words, check


def _number(low: float, high: float) -> Tuple[str, Check]:
    words = "a number from %g to %g" % (low, high)
    matches = _matching(r"(?:0|[1-9][0-9]{0,8})(?:\.[0-9]{1,6})?")

    def check(value: str, _sight: Sight) -> str:
        if not matches(value) or not low <= float(value) <= high:
            raise Refusal("%.80r is not %s" % (value, words), "expected %s" % words)
        return value

    return words, check


def _enum(values: Tuple[str, ...]) -> Tuple[str, Check]:
    allowed = frozenset(values)
    words = "one of %s" % ", ".join(values)

    def check(value: str, _sight: Sight) -> str:
        if value not in allowed:
            raise Refusal("%.80r is not allowed here" % value, "expected %s" % words)
        return value

    return words, check


def _csv(values: Tuple[str, ...]) -> Tuple[str, Check]:
    allowed = frozenset(values)
    words = "some of %s, joined by commas" % ", ".join(values)

    def check(value: str, _sight: Sight) -> str:
        for part in value.split(","):
            if part not in allowed:
                raise Refusal("%.80r in %.80r is not allowed here" % (part, value), "expected %s" % words)
        return value

    return words, check


def _columns(values: Tuple[str, ...]) -> Tuple[str, Check]:
    """As ``csv``, each part with an optional sign before it and ``:width`` or ``=`` after it (``ps -o pid=,comm:20``)."""
    allowed = frozenset(values)
    words = "columns out of %s, joined by commas" % ", ".join(values)
    split = re.compile(r"([+-]?)([A-Za-z0-9_%-]+)(?::[0-9]{1,3})?=?", re.ASCII)

    def check(value: str, _sight: Sight) -> str:
        for part in value.split(","):
            match = split.fullmatch(part)
            if match is None or match.group(2).lower() not in allowed:
                raise Refusal("column %.80r in %.80r is not allowed" % (part, value), "expected %s" % words)
        return value

    return words, check


def _pattern(words: str, forbidden: str) -> Tuple[str, Check]:
    bad = frozenset(forbidden)

    def check(value: str, _sight: Sight) -> str:
        if len(value) > PATTERN_CHARS:
            raise Refusal("%s is %d characters long, at most %d are allowed" % (words, len(value), PATTERN_CHARS))
        for character in value:
            if character in bad:
                raise Refusal("%s %.80r holds %r" % (words, value, character), "leave out %s" % " ".join(sorted(bad)))
        return value

    return words, check


def _path(roots: Tuple[str, ...]) -> Tuple[str, Check]:
    words = "an absolute path under the read roots" + (" (%s)" % ", ".join(roots) if roots else "")

    def check(value: str, sight: Sight) -> str:
        return sight.readable(value, sight.tree, roots)

    return words, check


def _entry(value: str, sight: Sight) -> str:
    return sight.listable(value)


_DEVICE = _matching(
    r"/dev/(?:(?:sd|hd|vd|xvd)[a-z]{1,3}[0-9]{0,3}|nvme[0-9]{1,3}(?:n[0-9]{1,3}(?:p[0-9]{1,3})?)?|mmcblk[0-9]{1,2}(?:p[0-9]{1,2})?"
    r"|md[0-9]{1,3}(?:p[0-9]{1,2})?|md/[A-Za-z0-9_.:-]{1,64}|dm-[0-9]{1,4}|loop[0-9]{1,3}(?:p[0-9]{1,2})?|sr[0-9]{1,2}|sg[0-9]{1,3}|zram[0-9]{1,2}"
    r"|mapper/[A-Za-z0-9_+.:-]{1,128}|disk/by-[a-z]{1,12}/[A-Za-z0-9_+.:@\\-]{1,200}|rtc[0-9]?|ptp[0-9]{1,2}"
    r"|[A-Za-z0-9_][A-Za-z0-9_+.-]{0,100}/[A-Za-z0-9_][A-Za-z0-9_+.-]{0,100})"
)
# The last alternative is LVM's /dev/VG/LV; these directories of /dev are something else.
_NOT_VOLUME_GROUPS = ("/dev/fd/", "/dev/pts/", "/dev/shm/", "/dev/mqueue/", "/dev/net/", "/dev/input/", "/dev/char/")


def _device(value: str, _sight: Sight) -> str:
    if not _DEVICE(value) or value.startswith(_NOT_VOLUME_GROUPS) or "/.." in value:
        raise Refusal("%.80r is not a block device" % value, "expected a block device such as /dev/sda1")
    return value


def _unsigned(text: str, kind: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadKind("%s: %r is not a whole number" % (kind, text)) from None


def _simple_kind(text: str, shapes: Mapping[str, Tuple[str, str]]) -> Kind:
    match = re.fullmatch(r"([a-z][a-z0-9_-]*)(?:\((.*)\))?", text, re.ASCII | re.DOTALL)
    if match is None:
        raise BadKind("kind %r is not NAME or NAME(arguments)" % text)
    name, given = match.group(1), match.group(2)
    arguments = tuple(part.strip() for part in given.split(",")) if given is not None else ()
    if given is not None and (not given.strip() or "" in arguments):
        raise BadKind("kind %r has an empty argument" % text)

    def arity(low: int, high: int) -> None:
        if not low <= len(arguments) <= high:
            raise BadKind("kind %r takes %d to %d arguments, got %d" % (name, low, high, len(arguments)))

    if name in shapes:
        arity(0, 0)
        return Kind(text, *_by_regex(*shapes[name]))
    if name in _SIMPLE:
        arity(0, 1 if name in ("interface", "user", "word") else 0)
        pair = _by_regex(*_SIMPLE[name])
        return Kind(text, *(_in_set(pair[0], pair[1], arguments[0]) if arguments else pair))
    if name == "unit":
        arity(0, 1)
        if arguments:
            # A change names its unit in full: what a glob matches is decided later, by systemd.
            return Kind(text, *_in_set(*_by_regex("a unit name", _UNIT), arguments[0]))
        return Kind(text, *_by_regex("a unit name", _UNIT_GLOB))
    if name == "host":
        arity(0, 1)
        pair = _host("a host name or address")
        return Kind(text, *(_in_set(pair[0], pair[1], arguments[0]) if arguments else pair))
    if name == "int":
        arity(2, 2)
        low, high = _unsigned(arguments[0], text), _unsigned(arguments[1], text)
        if low > high:
            raise BadKind("kind %r: %d is greater than %d" % (text, low, high))
        return Kind(text, *_int(low, high))
    if name == "number":
        arity(2, 2)
        try:
            return Kind(text, *_number(float(arguments[0]), float(arguments[1])))
        except ValueError:
            raise BadKind("kind %r: its arguments are not numbers" % text) from None
    if name == "pid":
        arity(0, 0)
        return Kind(text, *_int(1, 4194304))
    if name in ("enum", "csv", "columns"):
        arity(1, 1024)
        make = {"enum": _enum, "csv": _csv, "columns": _columns}[name]
        return Kind(text, *make(arguments))
    if name == "pattern":
        arity(0, 0)
        return Kind(text, *_pattern("a pattern", ""))
    if name == "format":
        arity(0, 0)
        return Kind(text, *_pattern("a format", "`()<>|;&!#~"))
    if name == "path":
        arity(0, 16)
        for root in arguments:
            if not root.startswith("/"):
                raise BadKind("kind %r: root %r is not an absolute path" % (text, root))
        return Kind(text, *_path(arguments), is_path=True)
    if name == "entry":
        arity(0, 0)
        return Kind(text, "an absolute path to look at", _entry)
    if name == "device":
        arity(0, 0)
        return Kind(text, "a block device such as /dev/sda1", _device)
    raise BadKind("there is no kind %r; known are %s" % (name, ", ".join(sorted(set(BUILT_IN) | set(shapes)))))


BUILT_IN: Tuple[str, ...] = tuple(_SIMPLE) + (
    "unit", "host", "int", "number", "pid", "enum", "csv", "columns", "pattern", "format", "path", "entry", "device",
)  # fmt: skip


def _alternatives(text: str) -> Tuple[str, ...]:
    """Split at ``|`` outside parentheses."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
        elif character == "|" and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return tuple(parts)


def parse_kind(text: str, shapes: Optional[Mapping[str, Tuple[str, str]]] = None) -> Kind:
    """The kind that ``text`` describes.

    ``shapes``: name -> (what a refusal calls it, regular expression for the whole value), the policy's own kinds.
    Raises ``BadKind`` with what is wrong.
    """
    known = shapes or {}
    parts = tuple(_simple_kind(part, known) for part in _alternatives(text))
    if len(parts) == 1:
        return parts[0]
    words = " or ".join(part.words for part in parts)

    def check(value: str, sight: Sight) -> str:
        refusal: Optional[Refusal] = None
        for part in parts:
            try:
                return part.check(value, sight)
            except Refusal as refused:
                # The reason of a path is worth more to the asker than "is not any of these".
                if refusal is None or (part.is_path and value.startswith("/")):
                    refusal = refused
        if refusal is not None and value.startswith("/") and any(part.is_path for part in parts):
            raise refusal
        raise Refusal("%.80r is not %s" % (value, words), "expected %s" % words)

    return Kind(text, words, check, any(part.is_path for part in parts))


def compile_shape(regex: str) -> Pattern[str]:
    """The compiled form of a policy's own kind; raises ``BadKind`` if it is not a regular expression."""
    try:
        return re.compile(regex, re.ASCII)
    except re.error as error:
        raise BadKind("%r is not a regular expression: %s" % (regex, error)) from None
