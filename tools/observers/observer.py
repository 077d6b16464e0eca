"""What an observer is: its parameters, the probes it asks for, and how their results become data.

Owns: ``Parameter``, ``Probe``, ``Observer``, ``Readings`` and the rules every observer keeps: validated parameters,
bounded phases and probes, complete lines only, and an honest list of what could not be read.
Deliberately does not know: the gate, who carries a probe out, any particular command, the clock.

An observer is two pure functions. ``probes``/``next_probes`` say what to run or read next, ``parse`` turns the results
into plain JSON. Neither raises on anything a machine may answer. The one that carries probes out does::

    probes = observer.probes(parameters)
    while probes:
        results += [carry_out(probe) for probe in probes]
        probes = observer.next_probes(results, parameters)
    data = observer.parse(results, parameters)

``results`` is flat, in the order of asking; a probe that was refused is a ``StepResult`` with ``error``.
Every ``data`` holds ``unavailable`` (list of ``{probe, reason}``) and ``cut`` (whether some output was shortened); a
field that could not be observed is ``null``, never an empty list or a zero.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from tools.values import JsonObject, StepResult

# An observer asks at most this often, for at most this many probes altogether: one observation stays a small, quick
# thing whatever a machine answers.
MAX_PHASES = 3
MAX_PROBES = 64
# Entries of ``unavailable``: enough to see the pattern, not a second copy of a permission-denied storm.
MAX_UNAVAILABLE = 20
# A line longer than this is nothing an observer knows how to read; characters.
MAX_LINE = 16384

Parameters = Mapping[str, Any]


class BadParameters(ValueError):
    """Parameters that do not fit an observer; the message names the parameter, what was expected and what came."""


class UnknownObserver(LookupError):
    """There is no observer of that name; the message names the nearest ones."""


_UNIT_TYPES = (
    "service",
    "socket",
    "target",
    "device",
    "mount",
    "automount",
    "swap",
    "timer",
    "path",
    "slice",
    "scope",
)
_UNIT = re.compile(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,254}")
_HOST = re.compile(
    r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\.?"
)
_DURATION = re.compile(r"([1-9][0-9]{0,5})(s|min|h|d|w)")
_DURATION_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_ABSOLUTE = re.compile(r"(/[A-Za-z0-9_@%+=:,.~-]+)+/?|/")


def seconds_of(duration: str) -> int:
    """The seconds of a duration parameter such as ``90min`` or ``7d``; raises ``BadParameters`` if it is none."""
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise BadParameters("a duration is a number and one of s, min, h, d, w (such as 24h), got %.80r" % duration)
    return int(match.group(1)) * _DURATION_SECONDS[match.group(2)]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of an observer.

    ``kind``: ``integer`` (within ``minimum``..``maximum``), ``boolean``, ``choice`` (one of ``choices``), ``unit`` (a
    systemd unit; ``.service`` is added where no type is named), ``host`` (a host name), ``duration`` (``24h``, at most
    ``maximum`` seconds) or ``paths`` (a list of at most ``maximum`` absolute paths).
    ``default`` ``None`` means: not given, unless ``required``.
    """

    name: str
    kind: str
    summary: str
    default: Any = None
    required: bool = False
    choices: Tuple[str, ...] = ()
    minimum: int = 0
    maximum: int = 0

    def check(self, value: Any) -> Any:
        """``value`` in its normal form; raises ``BadParameters``."""
        return _CHECKS[self.kind](self, value)

    def schema(self) -> JsonObject:
        """The JSON schema of this parameter, for models and for the console."""
        document = _SCHEMAS[self.kind](self)
        document["description"] = self.summary
        if self.default is not None:
            document["default"] = list(self.default) if isinstance(self.default, tuple) else self.default
        return document

    def refuse(self, expected: str, value: Any) -> BadParameters:
        return BadParameters("parameter %r must be %s, got %.120r" % (self.name, expected, value))


def _check_integer(parameter: Parameter, value: Any) -> int:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or not parameter.minimum <= value <= parameter.maximum:
        expected = "a whole number from %d to %d" % (parameter.minimum, parameter.maximum)
        raise parameter.refuse(expected, value)
    return int(value)


def _check_boolean(parameter: Parameter, value: Any) -> bool:
    if not isinstance(value, bool):
        raise parameter.refuse("true or false", value)
    return value


def _check_choice(parameter: Parameter, value: Any) -> str:
    if not isinstance(value, str) or value not in parameter.choices:
        raise parameter.refuse("one of " + ", ".join(parameter.choices), value)
    return value


def _check_unit(parameter: Parameter, value: Any) -> str:
    if not isinstance(value, str) or not _UNIT.fullmatch(value):
        raise parameter.refuse("the name of a systemd unit (letters, digits, ':', '_', '.', '@', '\\', '-')", value)
    if value.rpartition(".")[2] not in _UNIT_TYPES or "." not in value:
        value += ".service"
    return str(value)


def _check_host(parameter: Parameter, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 253 or not _HOST.fullmatch(value):
        raise parameter.refuse("a host name", value)
    return value


def _check_duration(parameter: Parameter, value: Any) -> str:
    if not isinstance(value, str) or not _DURATION.fullmatch(value) or seconds_of(value) > parameter.maximum:
        expected = "a duration such as 90min, 24h or 7d, at most %d seconds" % parameter.maximum
        raise parameter.refuse(expected, value)
    return value


def _check_paths(parameter: Parameter, value: Any) -> Tuple[str, ...]:
    expected = "a list of 1 to %d absolute paths without '..', blanks and shell characters" % parameter.maximum
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= parameter.maximum:
        raise parameter.refuse(expected, value)
    for item in value:
        if not isinstance(item, str) or not _ABSOLUTE.fullmatch(item) or len(item) > 1024 or ".." in item.split("/"):
            raise parameter.refuse(expected, item)
    return tuple(value)


_CHECKS: Dict[str, Callable[[Parameter, Any], Any]] = {
    "integer": _check_integer,
    "boolean": _check_boolean,
    "choice": _check_choice,
    "unit": _check_unit,
    "host": _check_host,
    "duration": _check_duration,
    "paths": _check_paths,
}

_SCHEMAS: Dict[str, Callable[[Parameter], JsonObject]] = {
    "integer": lambda p: {"type": "integer", "minimum": p.minimum, "maximum": p.maximum},
    "boolean": lambda _p: {"type": "boolean"},
    "choice": lambda p: {"type": "string", "enum": list(p.choices)},
    "unit": lambda _p: {"type": "string", "pattern": "^%s$" % _UNIT.pattern},
    "host": lambda _p: {"type": "string", "pattern": "^%s$" % _HOST.pattern, "maxLength": 253},
    "duration": lambda _p: {"type": "string", "pattern": "^%s$" % _DURATION.pattern},
    "paths": lambda p: {
        "type": "array",
        "minItems": 1,
        "maxItems": p.maximum,
        "items": {"type": "string", "pattern": "^/"},
    },
}


@dataclasses.dataclass(frozen=True)
class Probe:
    """One command to run or one file to read.

    ``name`` is what the observer calls it (unique in an observation). Exactly one of ``argv`` (first word a plain
    command name that the policy resolves) and ``path`` (absolute) is given. ``optional``: not being there (no such
    file, no such command) is ordinary and not reported; being refused or denied still is. ``ok_statuses``: exit statuses that
    mean the command did its work. ``partial``: what was printed counts although the status is none of those
    (``df`` with one unreadable mount); the reason is reported beside it. ``output_bytes``: how much output is useful.
    """

    name: str
    argv: Tuple[str, ...] = ()
    path: str = ""
    optional: bool = False
    ok_statuses: Tuple[int, ...] = (0,)
    partial: bool = False
    output_bytes: int = 65536

    @property
    def label(self) -> str:
        """The probe as an operator would write it."""
        return self.path or " ".join(self.argv)


def command(name: str, *argv: str, **options: Any) -> Probe:
    """A probe that runs ``argv``; ``options`` are the fields of ``Probe``."""
    return Probe(name=name, argv=tuple(argv), **options)


def file(name: str, path: str, **options: Any) -> Probe:
    """A probe that reads the file at ``path``; ``options`` are the fields of ``Probe``."""
    return Probe(name=name, path=path, **options)


_NOT_CARRIED_OUT = StepResult(error="the probe was not carried out")
_MISSING = re.compile(
    r"no such file|is not on this machine|not found|not installed|does not exist|no such command|cannot find",
    re.IGNORECASE,
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str, limit: int = 300) -> str:
    """``text`` from a machine as one harmless line: control, direction and broken characters are shown as escapes,
    white space is single blanks, at most ``limit`` characters (then it ends in ``…``)."""
    text = " ".join(text[: limit * 4].split())
    text = _CONTROL.sub(lambda found: "\\x%02x" % ord(found.group()), text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class Readings:
    """The results of an observation by the name of their probe. Asking for what is not there gives ``None``."""

    def __init__(self, pairs: Iterable[Tuple[Probe, StepResult]]) -> None:
        self._pairs: Dict[str, Tuple[Probe, StepResult]] = {probe.name: (probe, result) for probe, result in pairs}

    def __contains__(self, name: str) -> bool:
        return name in self._pairs

    def names(self, prefix: str = "") -> List[str]:
        """The names of the probes that were asked for and begin with ``prefix``, in the order of asking."""
        return [name for name in self._pairs if name.startswith(prefix)]

    def probe(self, name: str) -> Probe:
        return self._pairs[name][0]

    def result(self, name: str) -> Optional[StepResult]:
        """The raw result, whether it worked or not; ``None`` if it was not asked for."""
        pair = self._pairs.get(name)
        return pair[1] if pair else None

    def problem(self, name: str) -> str:
        """Why the probe gave nothing usable, one line; empty if it did or was not asked for."""
        pair = self._pairs.get(name)
        return _problem(*pair) if pair else ""

    def missing(self, name: str) -> bool:
        """Whether what the probe asks for is not on the machine (no such file, no such command)."""
        pair = self._pairs.get(name)
        return pair is not None and _is_missing(*pair)

    def text(self, name: str) -> Optional[str]:
        """What the probe printed, complete lines only if it was cut; ``None`` if it gave nothing usable."""
        pair = self._pairs.get(name)
        if pair is None:
            return None
        probe, result = pair
        if _problem(probe, result):
            printed = probe.partial and not result.error and bool(result.stdout.strip())
            if not printed:
                return None
        if result.cut or result.timed_out or result.cancelled:
            return result.stdout[: result.stdout.rfind("\n") + 1]
        return result.stdout

    def lines(self, name: str) -> Optional[List[str]]:
        """The lines of ``text`` without empty and overlong ones; ``None`` if it gave nothing usable."""
        text = self.text(name)
        if text is None:
            return None
        return [line for line in text.split("\n") if line.strip() and len(line) <= MAX_LINE]

    def first_line(self, name: str) -> Optional[str]:
        """The first line that is not empty, stripped; ``None`` if there is none."""
        lines = self.lines(name)
        return lines[0].strip() if lines else None

    def was_cut(self, name: str) -> bool:
        pair = self._pairs.get(name)
        return pair is not None and pair[1].cut

    def account(self, answered: Iterable[str] = ()) -> JsonObject:
        """The part every ``data`` has: ``unavailable`` and ``cut``. Probes named in ``answered`` are left out: another
        one gave what they were to give."""
        left_out = set(answered)
        unavailable: List[JsonObject] = []
        cut = False
        for name, (probe, result) in self._pairs.items():
            if name in left_out:
                continue
            cut = cut or result.cut
            reason = _problem(probe, result)
            if reason and not (probe.optional and _is_missing(probe, result)):
                unavailable.append({"probe": clean(probe.label, 200), "reason": reason})
        if len(unavailable) > MAX_UNAVAILABLE:
            more = len(unavailable) - MAX_UNAVAILABLE
            unavailable = unavailable[:MAX_UNAVAILABLE]
            unavailable.append({"probe": "", "reason": "%d more probes gave nothing" % more})
        return {"unavailable": unavailable, "cut": cut}


def _is_missing(_probe: Probe, result: StepResult) -> bool:
    if result.ok or result.timed_out:
        return False
    return result.exit_status == 127 or bool(_MISSING.search(result.error or result.stderr[:2000]))


def _problem(probe: Probe, result: StepResult) -> str:
    if result.timed_out:
        return "timed out after %.1f s" % (result.duration_ms / 1000.0)
    if result.cancelled:
        return "cancelled"
    if result.error:
        return clean(result.error)
    if result.signal is not None:
        return "ended by signal %d" % result.signal
    if probe.path or result.exit_status in probe.ok_statuses:
        return ""
    said = clean(result.stderr.strip().split("\n")[0]) or clean(result.stdout.strip().split("\n")[0])
    status = "no exit status" if result.exit_status is None else "exit status %d" % result.exit_status
    return "%s: %s" % (status, said) if said else status


@dataclasses.dataclass(frozen=True)
class Observer:
    """A typed read-only tool (module docstring).

    ``returns`` is the shape of ``data`` by example of words: a mapping of field to a short description, to a nested
    mapping, or to a list with one element for "a list of such". ``first(parameters)`` gives the probes to begin with,
    ``further(readings, parameters)`` everything else that is wanted in the light of what came (probes already asked for
    are left out by name, so it may repeat itself), ``read(readings, parameters)`` the data.
    """

    name: str
    summary: str
    returns: Mapping[str, Any]
    first: Callable[[Parameters], Sequence[Probe]]
    read: Callable[[Readings, Parameters], JsonObject]
    further: Optional[Callable[[Readings, Parameters], Sequence[Probe]]] = None
    parameters: Tuple[Parameter, ...] = ()

    def validate(self, given: Optional[Mapping[str, Any]] = None) -> JsonObject:
        """All parameters with defaults filled in; raises ``BadParameters`` naming the one that is wrong."""
        given = given or {}
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in given:
            if name not in known:
                raise BadParameters(
                    "observer %r has no parameter %.80r; %s"
                    % (self.name, name, nearest(str(name), known, "parameters"))
                )
        values: JsonObject = {}
        for name, parameter in known.items():
            value = given.get(name)
            if value is None and parameter.required:
                raise BadParameters("observer %r needs parameter %r (%s)" % (self.name, name, parameter.summary))
            values[name] = parameter.default if value is None else parameter.check(value)
        return values

    def schema(self) -> JsonObject:
        """The JSON schema of the parameters, for a model's tool list."""
        return {
            "type": "object",
            "properties": {parameter.name: parameter.schema() for parameter in self.parameters},
            "required": [parameter.name for parameter in self.parameters if parameter.required],
            "additionalProperties": False,
        }

    def probes(self, parameters: Optional[Parameters] = None) -> List[Probe]:
        """The probes of the first phase; raises ``BadParameters``."""
        return list(self.first(self.validate(parameters)))[:MAX_PROBES]

    def next_probes(self, results: Sequence[StepResult], parameters: Optional[Parameters] = None) -> List[Probe]:
        """What to carry out after ``results`` (everything so far, in order); empty when the observation is complete."""
        asked = self._asked(results, self.validate(parameters))
        return asked[len(results) :]

    def parse(self, results: Sequence[StepResult], parameters: Optional[Parameters] = None) -> JsonObject:
        """The data of a finished observation. A result that is not there counts as not carried out.

        Raises ``BadParameters`` only; nothing a machine answers makes it raise.
        """
        values = self.validate(parameters)
        asked = self._asked(results, values)
        padded = list(results) + [_NOT_CARRIED_OUT] * (len(asked) - len(results))
        return self.read(Readings(zip(asked, padded)), values)

    def _asked(self, results: Sequence[StepResult], values: Parameters) -> List[Probe]:
        """Every probe asked for so far, the next phase included."""
        asked = list(self.first(values))[:MAX_PROBES]
        for _ in range(1, MAX_PHASES):
            if self.further is None or len(results) < len(asked):
                break
            names = {probe.name for probe in asked}
            more = [p for p in self.further(Readings(zip(asked, results)), values) if p.name not in names]
            if not more:
                break
            asked = (asked + more)[:MAX_PROBES]
        return asked


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """ "did you mean 'x'?" or the list of what there is, for error messages."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return "did you mean %r?" % close[0]
    return "known %s: %s" % (what, ", ".join(names) if names else "none")
