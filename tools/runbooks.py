"""Runbooks: deterministic diagnoses made of observers, checks and findings.

Owns: the values, their validation against what observers return, the plan of calls and the evaluation of their data.
Deliberately does not know: YAML and files (``supervisor.runbooks``), how calls are carried out, models. Pure, standard
library only, Python 3.9.

A check is a comparison tree over the data of one step, with three outcomes: it holds, it does not, or it cannot be told
(a field that is ``null`` was not observed). What cannot be told is never reported as well: it becomes a finding of its
own that says why, and cites the call that gave no data.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

from tools.observers.observer import BadParameters, Observer, clean, nearest
from tools.observers.registry import OBSERVERS
from tools.values import SEVERITIES, Finding, JsonObject, Malformed, Report

# Rows of one check that become findings; the rest is counted. A machine with 200 failed units has one problem.
MAX_ROWS = 10
# Levels of a comparison tree, and words of a pattern: more is a mistake.
MAX_DEPTH = 12
# Items of a list shown in a text.
MAX_ITEMS = 10

Place = Tuple[Union[str, int], ...]
_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
_PARAMETER = re.compile(r"[a-z][a-z0-9_]{0,62}")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_FIELD = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
# What every observer's data holds beside its own fields (``tools.observers.observer``).
_ACCOUNT: JsonObject = {"unavailable": [{"probe": "what", "reason": "why"}], "cut": "whether output was shortened"}
# Reasons that mean "this machine has no such thing", as opposed to "it was refused" or "it failed".
_ABSENT = re.compile(
    r"not been booted with systemd|no such (?:file|command)|is not on this machine|there is no |the journal is empty"
    r"|not found|no known package manager",
    re.IGNORECASE,
)


def _lean(value: Any) -> JsonObject:
    """The fields of a dataclass without those that say nothing (empty text, empty mapping, false)."""
    return {name: item for name, item in dataclasses.asdict(value).items() if item not in ("", {}, False)}


_DENIED = re.compile(r"denied|not permitted|insufficient permissions|own messages", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class RunbookStep:
    """One observation.

    ``title`` names the area it covers, ``ok`` is the text when nothing was wrong there (a template; empty: nothing is
    said). ``optional``: that it gives nothing is ordinary. ``needs``: a parameter of the runbook without which (empty
    text or list) the step is left out.
    """

    id: str
    observer: str
    title: str
    parameters: JsonObject = dataclasses.field(default_factory=dict)
    optional: bool = False
    ok: str = ""
    needs: str = ""

    def to_json(self) -> JsonObject:
        return _lean(self)


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing to look at in the data of ``step``.

    ``for_each``: field that holds a list; the check is made for each of its rows, ``key`` is the row's field that tells
    one from another. ``when``: the comparison tree. ``unless``: id of an earlier check of the same step; where that one
    holds, this one is not raised. ``optional``: that it cannot be told is ordinary.
    """

    id: str
    step: str
    when: JsonObject
    severity: str
    title: str
    detail: str = ""
    suggestion: str = ""
    for_each: str = ""
    key: str = ""
    unless: str = ""
    optional: bool = False

    def to_json(self) -> JsonObject:
        return _lean(self)


@dataclasses.dataclass(frozen=True)
class PlannedCall:
    """A tool call that a runbook asks for; the one that carries it out gives it its call id."""

    step_id: str
    observer: str
    parameters: JsonObject


@dataclasses.dataclass(frozen=True)
class Runbook:
    """A deterministic diagnosis. ``labels``: words by which a request in free text means it. ``parameters``: thresholds
    and names with their defaults, which a run may override (``bind``)."""

    name: str
    title: str
    description: str
    steps: Tuple[RunbookStep, ...]
    checks: Tuple[Check, ...] = ()
    labels: Tuple[str, ...] = ()
    parameters: JsonObject = dataclasses.field(default_factory=dict)

    def to_json(self) -> JsonObject:
        return {
            "name": self.name,
            "title": self.title,
            "description": self.description,
            "labels": list(self.labels),
            "parameters": dict(self.parameters),
            "steps": [step.to_json() for step in self.steps],
            "checks": [check.to_json() for check in self.checks],
        }

    @classmethod
    def from_json(cls, document: Any, observers: Mapping[str, Observer] = OBSERVERS) -> "Runbook":
        """The runbook in ``document``; raises ``Malformed`` naming the place of the first problem (``problems``)."""
        found = problems(document, observers)
        if found:
            raise Malformed("; ".join("%s: %s" % (place_text(place), message) for place, message in found[:3]))
        return cls(
            name=document["name"],
            title=document["title"],
            description=document.get("description", ""),
            labels=tuple(document.get("labels", ())),
            parameters=dict(document.get("parameters", {})),
            steps=tuple(RunbookStep(**step) for step in document["steps"]),
            checks=tuple(Check(**check) for check in document.get("checks", ())),
        )

    def bind(self, overrides: Mapping[str, Any]) -> "Runbook":
        """This runbook with other values of its parameters; raises ``Malformed`` for unknown ones and other kinds."""
        for name, value in overrides.items():
            if name not in self.parameters:
                raise Malformed(
                    "runbook %r has no parameter %.80r; %s"
                    % (self.name, name, nearest(str(name), self.parameters, "parameters"))
                )
            if _kind(value) != _kind(self.parameters[name]):
                raise Malformed(
                    "parameter %r of runbook %r must be %s such as %r, got %.80r"
                    % (name, self.name, _kind(self.parameters[name]), self.parameters[name], value)
                )
        return Runbook.from_json(dict(self.to_json(), parameters=dict(self.parameters, **overrides)))


def place_text(place: Place) -> str:
    """``checks[2].when.field`` of a place in a document; ``runbook`` for the document itself."""
    text = "".join("[%d]" % part if isinstance(part, int) else ".%s" % part for part in place)
    return text.lstrip(".") or "runbook"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return "a list of texts"
    return "nothing a parameter may be"


# --- validation -----------------------------------------------------------------------------------------------------

Problem = Tuple[Place, str]


def problems(document: Any, observers: Mapping[str, Observer] = OBSERVERS) -> List[Problem]:
    """Everything that is wrong with a runbook document: ``(place, message)`` in document order; empty if it is good."""
    return _Validation(observers).run(document)


class _Validation:
    """One pass over a document, collecting problems."""

    def __init__(self, observers: Mapping[str, Observer]) -> None:
        self._observers = observers
        self._found: List[Problem] = []
        self._parameters: JsonObject = {}

    def run(self, document: Any) -> List[Problem]:
        top = self._object((), document, _RUNBOOK_FIELDS)
        if top is None:
            return self._found
        self._name(("name",), top.get("name"))
        self._labels(top.get("labels", []))
        self._declared(top.get("parameters", {}))
        returns = self._steps(top.get("steps"))
        self._checks(top.get("checks", []), returns)
        return self._found

    def _say(self, place: Place, message: str) -> None:
        self._found.append((place, message))

    def _object(self, place: Place, value: Any, fields: Mapping[str, Tuple[type, bool]]) -> Optional[JsonObject]:
        """``value`` if it is an object whose fields are known, of their kind, and complete."""
        if not isinstance(value, dict):
            self._say(place, "expected a mapping, got %s %.60r" % (type(value).__name__, value))
            return None
        for name in value:
            if name not in fields:
                self._say((*place, str(name)), "unknown field %.60r; %s" % (name, nearest(str(name), fields, "fields")))
        good = {}
        for name, (kind, required) in fields.items():
            if name not in value:
                if required:
                    self._say(place, "field %r is missing" % name)
                continue
            if not isinstance(value[name], kind):
                self._say(
                    (*place, name),
                    "expected %s, got %s %.60r" % (_WORDS[kind], type(value[name]).__name__, value[name]),
                )
                continue
            good[name] = value[name]
        return good

    def _name(self, place: Place, value: Any) -> None:
        if isinstance(value, str) and not _NAME.fullmatch(value):
            self._say(place, "expected a name of small letters, digits and '-', got %.60r" % value)

    def _labels(self, labels: Any) -> None:
        for at, label in enumerate(labels if isinstance(labels, list) else ()):
            if not isinstance(label, str) or not label.strip():
                self._say(("labels", at), "expected a word, got %.60r" % (label,))

    def _declared(self, parameters: Any) -> None:
        for name, value in parameters.items() if isinstance(parameters, dict) else ():
            place = ("parameters", str(name))
            if not isinstance(name, str) or not _PARAMETER.fullmatch(name):
                self._say(place, "expected a name of small letters, digits and '_', got %.60r" % (name,))
            elif _kind(value) == "nothing a parameter may be":
                self._say(place, "expected a number, text, true or false, or a list of texts, got %.60r" % (value,))
            else:
                self._parameters[name] = value

    def _steps(self, steps: Any) -> Dict[str, Mapping[str, Any]]:
        """The shape of the data of each step."""
        returns: Dict[str, Mapping[str, Any]] = {}
        if isinstance(steps, list) and not steps:
            self._say(("steps",), "expected at least one step")
        for at, item in enumerate(steps if isinstance(steps, list) else ()):
            place: Place = ("steps", at)
            step = self._object(place, item, _STEP_FIELDS)
            if step is None or "id" not in step or "observer" not in step:
                continue
            self._name((*place, "id"), step["id"])
            if step["id"] in returns:
                self._say((*place, "id"), "step %r is there twice" % step["id"])
                continue
            observer = self._observers.get(step["observer"])
            if observer is None:
                near = nearest(step["observer"], self._observers, "observers")
                self._say((*place, "observer"), "unknown observer %.60r; %s" % (step["observer"], near))
                returns[step["id"]] = {}
                continue
            returns[step["id"]] = dict(observer.returns, **_ACCOUNT)
            if "needs" in step and step["needs"] not in self._parameters:
                near = nearest(step["needs"], self._parameters, "parameters")
                self._say((*place, "needs"), "unknown parameter %.60r; %s" % (step["needs"], near))
            elif "needs" not in step or self._parameters[step["needs"]]:
                try:
                    observer.validate(_resolved(step.get("parameters", {}), self._parameters))
                except (BadParameters, Malformed) as problem:
                    self._say((*place, "parameters"), str(problem))
            self._template((*place, "ok"), step.get("ok", ""), [returns[step["id"]]])
        return returns

    def _checks(self, checks: Any, returns: Mapping[str, Mapping[str, Any]]) -> None:
        earlier: Dict[str, JsonObject] = {}
        for at, item in enumerate(checks if isinstance(checks, list) else ()):
            place: Place = ("checks", at)
            check = self._object(place, item, _CHECK_FIELDS)
            if check is None or "id" not in check:
                continue
            self._name((*place, "id"), check["id"])
            if check["id"] in earlier:
                self._say((*place, "id"), "check %r is there twice" % check["id"])
            if check.get("severity", "ok") not in SEVERITIES:
                expected = ", ".join(SEVERITIES)
                self._say((*place, "severity"), "expected one of %s, got %.60r" % (expected, check["severity"]))
            if "step" in check and check["step"] not in returns:
                near = nearest(check["step"], returns, "steps")
                self._say((*place, "step"), "there is no step %.60r; %s" % (check["step"], near))
            shape = returns.get(check.get("step", ""), {})
            if shape:
                self._about_rows(place, check, shape)
            other = earlier.get(check.get("unless", ""))
            if "unless" in check and (other is None or other.get("step") != check.get("step")):
                self._say(
                    (*place, "unless"),
                    "expected the id of an earlier check of the same step, got %.60r" % check["unless"],
                )
            elif other is not None and other.get("for_each", "") not in ("", check.get("for_each", "")):
                self._say((*place, "unless"), "check %r is made for each of other rows" % check["unless"])
            earlier[check["id"]] = check

    def _about_rows(self, place: Place, check: JsonObject, shape: Mapping[str, Any]) -> None:
        """Fields that a check uses, in its rows and in the data."""
        scopes: List[Mapping[str, Any]] = [shape]
        if "for_each" in check:
            rows = _shape_at(shape, check["for_each"])
            if not isinstance(rows, list):
                self._say(
                    (*place, "for_each"),
                    "expected a field that holds a list, got %.60r; %s"
                    % (
                        check["for_each"],
                        nearest(check["for_each"], [n for n in shape if isinstance(shape[n], list)], "lists"),
                    ),
                )
                return
            row = rows[0] if isinstance(rows[0], Mapping) else {"item": rows[0]}
            scopes = [row, shape]
            if "key" not in check:
                self._say(
                    place,
                    "field 'key' is missing: it names the field that tells one row of %r from another"
                    % check["for_each"],
                )
            elif check["key"] not in row:
                near = nearest(check["key"], row, "fields")
                self._say((*place, "key"), "unknown field %.60r; %s" % (check["key"], near))
        elif "key" in check:
            self._say((*place, "key"), "only a check with 'for_each' has a key")
        for name in ("title", "detail", "suggestion"):
            self._template((*place, name), check.get(name, ""), scopes)
        if "when" in check:
            self._tree((*place, "when"), check["when"], scopes, 0)

    def _template(self, place: Place, text: str, scopes: Sequence[Mapping[str, Any]]) -> None:
        for field in _PLACEHOLDER.findall(text):
            if field.startswith("parameters."):
                if field[11:] not in self._parameters:
                    near = nearest(field[11:], self._parameters, "parameters")
                    self._say(place, "unknown parameter {%s}; %s" % (field, near))
            elif not self._known(field, scopes):
                self._say(place, "unknown field {%.60s}; %s" % (field, nearest(field, _all_fields(scopes), "fields")))
            elif isinstance(_first_shape(scopes, field), Mapping):
                self._say(
                    place,
                    "field {%s} is a group; name one of its fields: %s"
                    % (
                        field,
                        ", ".join(sorted(_first_shape(scopes, field))),
                    ),
                )
        if "{" in _PLACEHOLDER.sub("", text) or "}" in _PLACEHOLDER.sub("", text):
            self._say(place, "a brace without its partner; a placeholder is written {field}")

    def _known(self, field: str, scopes: Sequence[Mapping[str, Any]]) -> bool:
        return bool(_FIELD.fullmatch(field)) and _first_shape(scopes, field) is not None

    def _tree(self, place: Place, tree: Any, scopes: Sequence[Mapping[str, Any]], depth: int) -> None:
        if not isinstance(tree, dict):
            self._say(place, "expected {field, op, value}, {all: […]}, {any: […]} or {not: …}, got %.60r" % (tree,))
            return
        if depth > MAX_DEPTH:
            self._say(place, "nested deeper than %d levels" % MAX_DEPTH)
            return
        if len(tree) == 1 and next(iter(tree)) in ("all", "any"):
            word = next(iter(tree))
            if not isinstance(tree[word], list) or not tree[word]:
                self._say((*place, word), "expected a list of at least one condition, got %.60r" % (tree[word],))
                return
            for at, branch in enumerate(tree[word]):
                self._tree((*place, word, at), branch, scopes, depth + 1)
            return
        if list(tree) == ["not"]:
            self._tree((*place, "not"), tree["not"], scopes, depth + 1)
            return
        if set(tree) != {"field", "op", "value"}:
            self._say(
                place,
                "expected exactly field, op and value (or one of all, any, not), got %s" % ", ".join(map(str, tree)),
            )
            return
        self._comparison(place, tree, scopes)

    def _comparison(self, place: Place, tree: JsonObject, scopes: Sequence[Mapping[str, Any]]) -> None:
        field, op, value = tree["field"], tree["op"], tree["value"]
        if not isinstance(field, str) or not self._known(field, scopes):
            near = nearest(str(field), _all_fields(scopes), "fields")
            self._say((*place, "field"), "unknown field %.60r; %s" % (field, near))
        if not isinstance(op, str) or op not in _OPERATORS:
            self._say(
                (*place, "op"), "unknown comparison %.60r; %s" % (op, nearest(str(op), _OPERATORS, "comparisons"))
            )
            return
        if isinstance(value, dict):
            if list(value) != ["parameter"] or value["parameter"] not in self._parameters:
                near = nearest(str(value.get("parameter", "")), self._parameters, "parameters")
                self._say(
                    (*place, "value"),
                    "expected {parameter: name} of a declared parameter, got %.60r; %s" % (value, near),
                )
                return
            value = self._parameters[value["parameter"]]
        expected = _OPERATORS[op].expected(value)
        if expected:
            self._say((*place, "value"), "%s needs %s, got %.60r" % (op, expected, value))


_WORDS = {str: "text", dict: "a mapping", list: "a list", bool: "true or false"}
_RUNBOOK_FIELDS: Mapping[str, Tuple[type, bool]] = {
    "name": (str, True),
    "title": (str, True),
    "description": (str, True),
    "labels": (list, False),
    "parameters": (dict, False),
    "steps": (list, True),
    "checks": (list, False),
}
_STEP_FIELDS: Mapping[str, Tuple[type, bool]] = {
    "id": (str, True),
    "observer": (str, True),
    "title": (str, True),
    "parameters": (dict, False),
    "optional": (bool, False),
    "ok": (str, False),
    "needs": (str, False),
}
_CHECK_FIELDS: Mapping[str, Tuple[type, bool]] = {
    "id": (str, True),
    "step": (str, True),
    "when": (dict, True),
    "severity": (str, True),
    "title": (str, True),
    "detail": (str, False),
    "suggestion": (str, False),
    "for_each": (str, False),
    "key": (str, False),
    "unless": (str, False),
    "optional": (bool, False),
}


def _shape_at(shape: Any, field: str) -> Any:
    """What a dotted field is in a shape: text, mapping or list; ``None`` if there is none."""
    for part in field.split("."):
        shape = shape.get(part) if isinstance(shape, Mapping) else None
    return shape


def _first_shape(scopes: Sequence[Mapping[str, Any]], field: str) -> Any:
    return next((found for found in (_shape_at(scope, field) for scope in scopes) if found is not None), None)


def _all_fields(scopes: Iterable[Any], prefix: str = "") -> List[str]:
    names: List[str] = []
    for scope in scopes:
        for name, inner in scope.items() if isinstance(scope, Mapping) else ():
            names.append(prefix + name)
            names += _all_fields([inner], prefix + name + ".")
    return names


def _resolved(value: Any, parameters: Mapping[str, Any]) -> Any:
    """``value`` with ``{parameter: name}`` replaced by the parameter's value; raises ``Malformed`` for unknown ones."""
    if isinstance(value, dict) and list(value) == ["parameter"]:
        if value["parameter"] not in parameters:
            near = nearest(str(value["parameter"]), parameters, "parameters")
            raise Malformed("there is no parameter %.60r; %s" % (value["parameter"], near))
        return parameters[value["parameter"]]
    if isinstance(value, dict):
        return {name: _resolved(inner, parameters) for name, inner in value.items()}
    return value


# --- comparisons ----------------------------------------------------------------------------------------------------


def glob_matches(pattern: str, text: str) -> bool:
    """Whether ``text`` matches ``pattern``, in which ``*`` is any text and ``?`` any character; case does not matter.

    Two pointers and one remembered star: time grows with the product of the lengths, never worse.
    """
    pattern, text = pattern.lower(), text.lower()
    at = here = 0
    star, mark = -1, 0
    while here < len(text):
        if at < len(pattern) and (pattern[at] == "?" or (pattern[at] == text[here] and pattern[at] != "*")):
            at, here = at + 1, here + 1
        elif at < len(pattern) and pattern[at] == "*":
            star, mark = at, here
            at += 1
        elif star >= 0:
            mark += 1
            at, here = star + 1, mark
        else:
            return False
    return not pattern[at:].strip("*")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))


@dataclasses.dataclass(frozen=True)
class _Operator:
    """``wants``: what the value must be, in words, and whether it is; ``apply``: ``None`` if the kinds do not fit."""

    words: str
    fits: Callable[[Any], bool]
    apply: Callable[[Any, Any], Optional[bool]]

    def expected(self, value: Any) -> str:
        return "" if self.fits(value) else self.words


def _ordered(compare: Callable[[float, float], bool]) -> _Operator:
    return _Operator("a number", _is_number, lambda left, right: compare(left, right) if _is_number(left) else None)


def _same(left: Any, right: Any) -> Optional[bool]:
    comparable = _is_number(left) == _is_number(right) and isinstance(left, bool) == isinstance(right, bool)
    return left == right if comparable and _is_scalar(left) else None


def _opposite(outcome: Optional[bool]) -> Optional[bool]:
    return None if outcome is None else not outcome


def _contains(left: Any, right: Any) -> Optional[bool]:
    if isinstance(left, str):
        return str(right).lower() in left.lower()
    return right in left if isinstance(left, list) else None


def _any_matches(left: Any, right: str) -> Optional[bool]:
    if isinstance(left, list):
        return any(isinstance(item, str) and glob_matches(right, item) for item in left)
    return glob_matches(right, left) if isinstance(left, str) else None


_OPERATORS: Mapping[str, _Operator] = {
    "eq": _Operator("text, a number, true or false", _is_scalar, _same),
    "ne": _Operator("text, a number, true or false", _is_scalar, lambda left, right: _opposite(_same(left, right))),
    "lt": _ordered(lambda left, right: left < right),
    "le": _ordered(lambda left, right: left <= right),
    "gt": _ordered(lambda left, right: left > right),
    "ge": _ordered(lambda left, right: left >= right),
    "in": _Operator(
        "a list of texts or numbers",
        lambda value: isinstance(value, list) and all(_is_scalar(item) for item in value),
        lambda left, right: left in right if _is_scalar(left) else None,
    ),
    "contains": _Operator("text or a number", lambda value: isinstance(value, str) or _is_number(value), _contains),
    "exists": _Operator("true or false", lambda value: isinstance(value, bool), lambda _left, _right: None),
    "matches": _Operator("a pattern with * and ?", lambda value: isinstance(value, str), _any_matches),
}

Scope = Sequence[Mapping[str, Any]]


def _value_at(scope: Scope, field: str) -> Any:
    """The value of a dotted field, from the first of the scopes that has it; ``None`` if none has."""
    for values in scope:
        found: Any = values
        for part in field.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None:
            return found
        if field.split(".", maxsplit=1)[0] in values:
            return None
    return None


def holds(tree: Mapping[str, Any], scope: Scope, parameters: Mapping[str, Any]) -> Optional[bool]:
    """Whether a comparison tree holds; ``None`` if that cannot be told from what was observed (Kleene's logic)."""
    if "all" in tree or "any" in tree:
        word = "all" if "all" in tree else "any"
        outcomes = [holds(branch, scope, parameters) for branch in tree[word]]
        decisive = word == "any"
        if decisive in outcomes:
            return decisive
        return None if None in outcomes else not decisive
    if "not" in tree:
        return _opposite(holds(tree["not"], scope, parameters))
    value = _value_at(scope, tree["field"])
    wanted = _resolved(tree["value"], parameters)
    if tree["op"] == "exists":
        return bool((value is not None) == wanted)
    operator = _OPERATORS[str(tree["op"])]
    return None if value is None else operator.apply(value, wanted)


# --- texts ----------------------------------------------------------------------------------------------------------


def _span(seconds: float) -> str:
    left = abs(int(seconds))
    if left < 60:
        return "%g s" % round(seconds, 6)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        amount, left = divmod(left, size)
        if amount:
            parts.append("%d %s" % (amount, unit))
    return ("-" if seconds < 0 else "") + " ".join(parts[:2])


def _size(amount: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024 or unit == "TiB":
            return "%d %s" % (amount, unit) if unit == "bytes" else "%.1f %s" % (amount, unit)
        amount /= 1024.0
    return ""


def shown(field: str, value: Any) -> str:
    """A value as people read it; the end of its field's name tells the unit (``_bytes``, ``_percent``, ``_s``…)."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        items = [shown(field, item) for item in value[:MAX_ITEMS]]
        more = len(value) - len(items)
        return (", ".join(items) or "none") + (" and %d more" % more if more > 0 else "")
    if isinstance(value, Mapping):
        return "%d fields" % len(value)
    if _is_number(value):
        for ending, form in (
            ("_bytes", _size),
            ("_percent", "{:g} %".format),
            ("_s", _span),
            ("_ms", "{:g} ms".format),
        ):
            if field.endswith(ending):
                return form(value)
        return "%g" % value if isinstance(value, float) else str(value)
    return str(value)


def filled(template: str, scope: Scope, parameters: Mapping[str, Any], commands: bool = False) -> str:
    """A template with its ``{field}`` placeholders filled from the scopes and ``{parameters.name}``.

    ``commands``: the text holds commands that somebody may paste into a shell, so texts of the machine are quoted where
    a shell would read them as more than one word.
    """

    def fill(found: "re.Match[str]") -> str:
        field = found.group(1)
        if field.startswith("parameters."):
            return shown(field, parameters.get(field[11:]))
        value = _value_at(scope, field)
        return shlex.quote(value) if commands and isinstance(value, str) and value else shown(field, value)

    return _PLACEHOLDER.sub(fill, template)


def told(template: str, scope: Scope, parameters: Mapping[str, Any]) -> str:
    """A template as ``filled``, without those of its clauses (parts between semicolons) of which nothing is known."""
    clauses = []
    for clause in template.split(";"):
        fields = [field for field in _PLACEHOLDER.findall(clause) if not field.startswith("parameters.")]
        if not fields or any(_value_at(scope, field) is not None for field in fields):
            clauses.append(clause.strip())
    text = filled("; ".join(clauses), scope, parameters)
    return text if not text or text[-1] in ".!?" or len(clauses) == template.count(";") + 1 else text + "."


# --- plan and evaluation --------------------------------------------------------------------------------------------

# What came of a step: the id of its call (empty: it was never asked for), its data, and why there is none.
Observed = Tuple[str, Optional[JsonObject], str]


def plan(runbook: Runbook) -> List[PlannedCall]:
    """The calls a runbook asks for, in order."""
    return [
        PlannedCall(step.id, step.observer, _resolved(step.parameters, runbook.parameters))
        for step in runbook.steps
        if _wanted(step, runbook)
    ]


def _wanted(step: RunbookStep, runbook: Runbook) -> bool:
    return not step.needs or bool(runbook.parameters[step.needs])


def evaluate(runbook: Runbook, results: Mapping[str, Observed]) -> Report:
    """The report of a runbook whose steps gave ``results``: ``step id -> (call id, data or None, error)``.

    Every finding cites the call it rests on. A step that was not carried out at all has no call to cite and stands in
    the notes. Never raises on any data.
    """
    findings: List[Finding] = []
    notes: List[str] = []
    for step in (step for step in runbook.steps if _wanted(step, runbook)):
        call_id, data, error = results.get(step.id, ("", None, ""))
        if not call_id:
            notes.append("%s was not observed: %s" % (step.title, error or "the step was not carried out"))
            continue
        if data is None:
            findings.append(_unobserved(step, call_id, error or "the call gave no data"))
            continue
        findings += _area(runbook, step, call_id, data)
    order = sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity))
    return Report(summary=_summary(runbook, order, notes), findings=tuple(order), model="", notes=tuple(notes))


def _summary(runbook: Runbook, findings: Sequence[Finding], notes: Sequence[str]) -> str:
    counts = {severity: sum(f.severity == severity for f in findings) for severity in SEVERITIES}
    unseen = sum(f.id.endswith(("-unobserved", "-partly")) for f in findings) + len(notes)
    worst = [f.title for f in findings if f.severity in ("critical", "warning") and not f.id.endswith("-unobserved")]
    if worst:
        text = "%d critical, %d %s. First: %s." % (
            counts["critical"],
            counts["warning"],
            "warning" if counts["warning"] == 1 else "warnings",
            "; ".join(worst[:3]),
        )
    else:
        text = "nothing wrong was found in what could be observed (areas well: %d)." % counts["ok"]
    if unseen:
        text += " Not or not fully observed: %d." % unseen
    return "%s: %s" % (runbook.title, text)


def _reasons(data: Mapping[str, Any]) -> str:
    """Why parts of the data are missing, one line."""
    said: List[str] = []
    entries = data.get("unavailable")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, Mapping):
            reason = "%s: %s" % (clean(str(entry.get("probe") or "more"), 60), entry.get("reason"))
            if reason not in said:
                said.append(reason)
    more = len(said) - 3
    return "; ".join(said[:3]) + ("; and %d more" % more if more > 0 else "")


def _unobserved(step: RunbookStep, call_id: str, reason: str, part: bool = False) -> Finding:
    ordinary = step.optional or part or bool(_ABSENT.search(reason))
    suggestion = (
        "Find out why the observer %s gives nothing; until then this area is unknown, not well." % step.observer
    )
    if _DENIED.search(reason):
        suggestion = "If it is to be seen, let the agent's user read it (for logs: the group systemd-journal or adm)."
    title = "%s could %s be observed" % (step.title, "only partly" if part else "not")
    return Finding(
        id="%s-%s" % (step.id, "partly" if part else "unobserved"),
        severity="info" if ordinary else "warning",
        title=title,
        detail=reason.rstrip(".") + ".",
        evidence=(call_id,),
        suggestion="" if ordinary else suggestion,
    )


def _area(runbook: Runbook, step: RunbookStep, call_id: str, data: Mapping[str, Any]) -> List[Finding]:
    """The findings of one step that gave data."""
    findings: List[Finding] = []
    unknown: List[str] = []
    raised: Dict[str, List[Any]] = {}
    checks = [check for check in runbook.checks if check.step == step.id]
    # What an area is judged by: its checks, the optional ones only where there are no others.
    judged = [check.id for check in checks if not check.optional] or [check.id for check in checks]
    for check in checks:
        hits = _hits(check, data, runbook.parameters, raised)
        if hits is None:
            if check.id in judged:
                unknown.append(check.id)
            continue
        raised[check.id] = [key for key, _ in hits]
        findings += _raised(runbook, check, call_id, hits)
    reasons = _reasons(data)
    # An area of optional checks only is unknown when none of them can be told, never partly.
    if judged and len(unknown) < len(judged) and all(check.optional for check in checks):
        unknown = []
    if len(unknown) == len(judged) if judged else not _anything(data):
        return [*findings, _unobserved(step, call_id, reasons or "the fields it needs are not known on this machine")]
    if unknown:
        findings.append(_unobserved(step, call_id, reasons or "not known here: " + ", ".join(unknown), part=True))
    serious = any(finding.severity in ("critical", "warning") for finding in findings)
    # "All is well" is said of what was judged completely, of nothing else.
    if step.ok and not serious and not unknown:
        detail = told(step.ok, [data], runbook.parameters)
        if reasons:
            detail += " Not seen: %s." % reasons.rstrip(".")
        if data.get("cut"):
            detail += " The output was cut; only its complete lines count."
        findings.append(Finding(step.id + "-ok", "ok", step.title, detail, (call_id,)))
    return findings


def _anything(data: Mapping[str, Any]) -> bool:
    return any(value is not None for name, value in data.items() if name not in _ACCOUNT)


Hit = Tuple[Any, Scope]


def _hits(
    check: Check, data: Mapping[str, Any], parameters: Mapping[str, Any], raised: Mapping[str, List[Any]]
) -> Optional[List[Hit]]:
    """Where a check holds: ``(key, scope)`` of each row, or one without a key. ``None``: that cannot be told."""
    spared = raised.get(check.unless, [])
    if not check.for_each:
        outcome = holds(check.when, [data], parameters)
        if outcome is None:
            return None
        return [(None, [data])] if outcome and None not in spared else []
    rows = _value_at([data], check.for_each)
    if not isinstance(rows, list):
        return None
    hits: List[Hit] = []
    outcomes: List[Optional[bool]] = []
    for row in rows:
        scope: Scope = [row if isinstance(row, Mapping) else {"item": row}, data]
        outcome = holds(check.when, scope, parameters)
        outcomes.append(outcome)
        key = scope[0].get(check.key)
        # "None in spared": the earlier check is about the whole step.
        if outcome and key not in spared and None not in spared:
            hits.append((key, scope))
    if outcomes and all(outcome is None for outcome in outcomes):
        return None
    return hits


def _raised(runbook: Runbook, check: Check, call_id: str, hits: Sequence[Hit]) -> List[Finding]:
    findings: List[Finding] = []
    seen: Dict[str, int] = {}
    for key, scope in hits[:MAX_ROWS]:
        name = check.id if not check.for_each else "%s:%.80s" % (check.id, key)
        seen[name] = seen.get(name, 0) + 1
        findings.append(
            Finding(
                id=name if seen[name] == 1 else "%s#%d" % (name, seen[name]),
                severity=check.severity,
                title=filled(check.title, scope, runbook.parameters),
                detail=told(check.detail, scope, runbook.parameters),
                evidence=(call_id,),
                suggestion=filled(check.suggestion, scope, runbook.parameters, commands=True),
            )
        )
    if len(hits) > MAX_ROWS:
        others = [str(key) for key, _ in hits[MAX_ROWS:]]
        findings.append(
            Finding(
                id=check.id + ":more",
                severity=check.severity,
                title="%d more like this" % len(others),
                detail=shown("", others),
                evidence=(call_id,),
            )
        )
    return findings
