"""The compiled policy: what one machine allows, as plain JSON and as frozen values.

Owns: the shape of a compiled policy, its validation (each error names the exact position), its digest and version, and
the tables the gate looks things up in, built once.
Deliberately does not know: YAML, packs, layers, machines (the centre compiles those away), and how a decision is made.

JSON and values are the same thing: ``Policy.from_json(document).to_json()`` is the normal form of ``document``, and the
digest is taken of the normal form. A field nobody knows is an error: a misspelt limit must not become no limit.
Sources: safety.md, "The gate"; getopt_long(3).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple, TypeVar

from tools import values
from tools.kinds import BadKind, Kind, compile_shape, parse_kind
from tools.paths import PathRules

FORMAT = 1

# How a binary reads its words. ``gnu``: getopt_long with permutation. ``posix``: options end at the first word that is
# none; with sub-commands the rest belongs to the sub-command. ``pflag``: Go's (podman). ``exact``: every option is a
# word of its own and its value the next word (openssl, dig). ``keyvalue``: the same, for programs whose options are bare
# words (ip, ss filters). ``find``: start points first, then an expression.
GNU, POSIX, PFLAG, EXACT, KEYVALUE, FIND = "gnu", "posix", "pflag", "exact", "keyvalue", "find"
STYLES = (GNU, POSIX, PFLAG, EXACT, KEYVALUE, FIND)

# What follows an option. ``none``: nothing. ``value``: always a value, joined or in the next word. ``joined``: a value
# only if joined (``-b1``, ``--since=x``). ``next``: optional, also taken from the next word if it is of the kind.
# ``apart``: always a value, never joined to a short option (``ps -auxe`` falls back to reading letters).
NONE, VALUE, JOINED, NEXT, APART = "none", "value", "joined", "next", "apart"
TAKES = (NONE, VALUE, JOINED, NEXT, APART)

FRONT, COMMAND, OPTIONS, END = "front", "command", "options", "end"
EFFECTS = (values.OBSERVE, values.CHANGE, values.NEVER)
MANY = 64  # how many times a positional without a maximum may stand


class PolicyError(values.Malformed):
    """A policy document is wrong. ``path``: where, from the root; ``problem``: what was expected and what came."""

    def __init__(self, path: Sequence[Any], problem: str) -> None:
        self.path = tuple(path)
        self.problem = problem
        super().__init__("%s: %s" % (show_path(self.path), problem))


def show_path(path: Sequence[Any]) -> str:
    """``rules[3].options[0].kind`` for a path of keys and positions."""
    shown = ""
    for step in path:
        shown += "[%d]" % step if isinstance(step, int) else (".%s" % step if shown else str(step))
    return shown or "the document"


T = TypeVar("T")


class _Reader:
    """One JSON object being read: each field at most once, unknown fields refused at the end."""

    def __init__(self, document: Any, path: Tuple[Any, ...]) -> None:
        if not isinstance(document, Mapping):
            raise PolicyError(path, "expected an object, got %s %.80r" % (type(document).__name__, document))
        for key in document:
            if not isinstance(key, str):
                raise PolicyError(path, "expected names as keys, got %.80r" % (key,))
        self.document = document
        self.path = path
        self.seen: List[str] = []

    def fail(self, name: str, problem: str) -> PolicyError:
        return PolicyError((*self.path, name), problem)

    def take(self, name: str, kinds: Tuple[type, ...], wanted: str, default: Any) -> Any:
        self.seen.append(name)
        if name not in self.document:
            if default is dataclasses.MISSING:
                raise PolicyError(self.path, "field %r is missing (expected %s)" % (name, wanted))
            return default
        value = self.document[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.fail(name, "expected %s, got %s %.80r" % (wanted, type(value).__name__, value))
        return value

    def text(self, name: str, default: Any = dataclasses.MISSING, limit: int = 2000) -> str:
        value: str = self.take(name, (str,), "text", default)
        if isinstance(value, str) and (len(value) > limit or "\0" in value):
            raise self.fail(name, "expected at most %d characters without NUL, got %d" % (limit, len(value)))
        return value

    def flag(self, name: str, default: bool) -> bool:
        value: bool = self.take(name, (bool,), "true or false", default)
        return value

    def whole(self, name: str, low: int, high: int, default: Any = dataclasses.MISSING) -> int:
        value: int = self.take(name, (int,), "a whole number from %d to %d" % (low, high), default)
        if not low <= value <= high:
            raise self.fail(name, "expected a whole number from %d to %d, got %r" % (low, high, value))
        return value

    def seconds(self, name: str, default: Optional[float]) -> Optional[float]:
        value = self.take(name, (int, float), "seconds above 0, at most 3600", default)
        if value is None:
            return None
        if not math.isfinite(value) or not 0 < value <= 3600:
            raise self.fail(name, "expected seconds above 0, at most 3600, got %r" % value)
        return float(value)

    def one_of(self, name: str, allowed: Sequence[str], default: Any) -> Any:
        value = self.take(name, (str,), "one of %s" % ", ".join(allowed), default)
        if value is not default and value not in allowed:
            raise self.fail(name, "expected one of %s, got %r" % (", ".join(allowed), value))
        return value

    def strings(self, name: str, default: Any = dataclasses.MISSING) -> Tuple[str, ...]:
        value = self.take(name, (list, tuple), "a list of texts", default)
        for position, item in enumerate(value):
            if not isinstance(item, str) or "\0" in item:
                raise PolicyError(
                    (*self.path, name, position), "expected text, got %s %.80r" % (type(item).__name__, item)
                )
        return tuple(value)

    def each(self, name: str, read: Callable[["_Reader"], T], default: Any = ()) -> Tuple[T, ...]:
        value = self.take(name, (list, tuple), "a list of objects", default)
        return tuple(_read(item, (*self.path, name, position), read) for position, item in enumerate(value))

    def string_map(self, name: str) -> Dict[str, str]:
        value = self.take(name, (dict,), "an object of texts", {})
        for key, item in value.items():
            if not isinstance(key, str) or not isinstance(item, str) or "\0" in item + key or "=" in key:
                raise PolicyError((*self.path, name, key), "expected a name and a text, got %.80r: %.80r" % (key, item))
        return dict(value)

    def done(self) -> None:
        for name in self.document:
            if name not in self.seen:
                raise self.fail(name, "no such field; known are %s" % ", ".join(sorted(self.seen)))


def _read(document: Any, path: Tuple[Any, ...], read: Callable[[_Reader], T]) -> T:
    reader = _Reader(document, path)
    value = read(reader)
    reader.done()
    return value


def _omit_defaults(document: Dict[str, Any], defaults: Mapping[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in document.items() if name not in defaults or defaults[name] != value}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option under all its names. ``kind``: of its value; ``tree``: it makes the binary read whole directories."""

    names: Tuple[str, ...]
    takes: str = NONE
    kind: Optional[Kind] = None
    repeat: bool = True
    tree: bool = False

    def to_json(self) -> Dict[str, Any]:
        return _omit_defaults(
            {
                "names": list(self.names), "takes": self.takes, "kind": self.kind.text if self.kind else None,
                "repeat": self.repeat, "tree": self.tree,
            },
            {"takes": NONE, "kind": None, "repeat": True, "tree": False},
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Positional:
    """``minimum`` to ``maximum`` words of one kind. ``unless``: it does not stand there when one of these options does
    (``grep -e PATTERN`` has no pattern word). ``optional``: ``minimum`` words or none (``vmstat 1 5``, never ``vmstat 1``).
    """

    kind: Kind
    minimum: int = 1
    maximum: int = 1
    unless: Tuple[str, ...] = ()
    optional: bool = False

    def to_json(self) -> Dict[str, Any]:
        return _omit_defaults(
            {
                "kind": self.kind.text, "min": self.minimum, "max": self.maximum, "unless": list(self.unless),
                "optional": self.optional,
            },
            {"min": 1, "max": 1, "unless": [], "optional": False},
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Always:
    """Words the gate adds by itself. ``at``: ``front`` (after the binary), ``command`` (after the sub-command), ``options`` (after the last word that was asked for but before ``--`` and what follows it) or ``end``; ``unless``/``when``: only without / only with one of these options."""

    words: Tuple[str, ...]
    at: str = FRONT
    unless: Tuple[str, ...] = ()
    when: Tuple[str, ...] = ()

    def to_json(self) -> Dict[str, Any]:
        return _omit_defaults(
            {"words": list(self.words), "at": self.at, "unless": list(self.unless), "when": list(self.when)},
            {"at": FRONT, "unless": [], "when": []},
        )


@dataclasses.dataclass(frozen=True)
class Command:
    """What a binary, or one of its sub-commands, takes.

    ``names``: of the sub-command, all of them exact (empty for the binary itself). ``bare``: whether a command with
    sub-commands may stand alone. ``require``: groups of options, of each at least one must stand. ``conflicts``: groups
    of options, of each at most one may. ``refused``: option or sub-command -> why it is not allowed, for the refusal's
    text only (nothing is allowed by leaving a name out here). ``effect``: ``None`` means that of what it belongs to. ``excludes``: the
    beginnings of the options by which a tree reader leaves out names (``--exclude=``); the gate adds them with the names
    of the secrets below the tree. ``first``: it may not stand behind a pipe (it would send on what it is given).
    """

    names: Tuple[str, ...] = ()
    style: str = GNU
    options: Tuple[Option, ...] = ()
    positionals: Tuple[Positional, ...] = ()
    commands: Tuple["Command", ...] = ()
    bare: bool = False
    effect: Optional[str] = None
    reason: str = ""
    always: Tuple[Always, ...] = ()
    require: Tuple[Tuple[str, ...], ...] = ()
    conflicts: Tuple[Tuple[str, ...], ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    excludes: Tuple[str, ...] = ()
    first: bool = False

    @functools.cached_property
    def table(self) -> Dict[str, Option]:
        """Option name -> option. In style ``gnu`` and ``pflag`` with sub-commands, theirs too: one parser reads all."""
        found: Dict[str, Option] = {}
        pending = [self]
        while pending:
            command = pending.pop()
            for option in command.options:
                for name in option.names:
                    found.setdefault(name, option)
            if self.style in (GNU, PFLAG):
                pending.extend(command.commands)
        return found

    @functools.cached_property
    def own(self) -> Dict[str, Option]:
        """Option name -> option, its own options only."""
        return {name: option for option in self.options for name in option.names}

    @functools.cached_property
    def by_name(self) -> Dict[str, "Command"]:
        """Sub-command name -> sub-command."""
        return {name: command for command in self.commands for name in command.names}

    def to_json(self) -> Dict[str, Any]:
        return _omit_defaults(
            {
                "names": list(self.names), "style": self.style,
                "options": [option.to_json() for option in self.options],
                "positionals": [positional.to_json() for positional in self.positionals],
                "commands": [command.to_json() for command in self.commands],
                "bare": self.bare, "effect": self.effect, "reason": self.reason,
                "always": [always.to_json() for always in self.always],
                "require": [list(group) for group in self.require],
                "conflicts": [list(group) for group in self.conflicts], "refused": dict(self.refused),
                "excludes": list(self.excludes), "first": self.first,
            },
            {
                "names": [], "style": GNU, "options": [], "positionals": [], "commands": [], "bare": False,
                "effect": None, "reason": "", "always": [], "require": [], "conflicts": [], "refused": {},
                "excludes": [], "first": False,
            },
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rule:
    """One binary. ``name``: what it may be called by; ``paths``: the absolute paths it may stand at, best first.
    ``timeout_s`` and ``output_bytes``: ``None`` means the policy's limit."""

    name: str
    paths: Tuple[str, ...]
    reason: str
    command: Command
    effect: str = values.OBSERVE
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    timeout_s: Optional[float] = None
    output_bytes: Optional[int] = None
    network: bool = False
    writes: Tuple[str, ...] = ()

    def to_json(self) -> Dict[str, Any]:
        return _omit_defaults(
            {
                "name": self.name, "paths": list(self.paths), "reason": self.reason, "effect": self.effect,
                "env": dict(self.env), "timeout_s": self.timeout_s, "output_bytes": self.output_bytes,
                "network": self.network, "writes": list(self.writes), "command": self.command.to_json(),
            },
            {
                "effect": values.OBSERVE, "env": {}, "timeout_s": None, "output_bytes": None, "network": False,
                "writes": [],
            },
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Never:
    """Programs that are refused by name, and what to do instead; for the refusal's text, and with an approval too."""

    names: Tuple[str, ...]
    reason: str
    instead: str = ""

    def to_json(self) -> Dict[str, Any]:
        return {"names": list(self.names), "reason": self.reason, "instead": self.instead}


@dataclasses.dataclass(frozen=True)
class Grant:
    """Changes that need no person: calls of ``rule`` (and of its sub-commands ``commands``; empty: all) in a run started
    by one of the named ``triggers``, between the minutes of the day ``start_minute`` and ``end_minute`` (UTC, may wrap)
    on ``days`` (0 = Monday)."""

    name: str
    rule: str
    commands: Tuple[str, ...]
    triggers: Tuple[str, ...]
    days: Tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    start_minute: int = 0
    end_minute: int = 1440

    def to_json(self) -> Dict[str, Any]:
        return {
            "name": self.name, "rule": self.rule, "commands": list(self.commands), "triggers": list(self.triggers),
            "days": list(self.days), "start_minute": self.start_minute, "end_minute": self.end_minute,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on what is looked at and on what runs; each with the reason it exists."""

    words: int = 256  # a longer command line is no diagnosis, and approvers must be able to read it
    word_bytes: int = 4096  # PATH_MAX; nothing legitimate is longer
    command_chars: int = 8192  # the strict reader's input
    stages: int = 6  # processes in one pipeline
    timeout_s: float = 30.0  # per process; rules may ask for less or more
    output_bytes: int = 65536  # per stream; what a model can still read
    read_bytes: int = 524288  # per file read; the longest kernel files an observer reads
    write_bytes: int = 262144  # per file written
    glob_paths: int = 64  # names one glob may expand to

    def to_json(self) -> Dict[str, Any]:
        return dataclasses.asdict(self)


Shapes = Mapping[str, Tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What one machine allows. ``name`` and ``version`` are for people, ``digest`` is what is agreed on.

    ``sets``: named sets of unit, host and other names (an entry may end in ``*``). ``shapes``: the policy's own kinds,
    name -> (what it is called, regular expression). ``read_roots``, ``kernel_files``, ``secret_roots``,
    ``write_roots``: see ``tools.paths.PathRules``. ``env``: the whole environment of every process, before its rule's own.
    """

    name: str
    version: str
    rules: Tuple[Rule, ...]
    never: Tuple[Never, ...] = ()
    grants: Tuple[Grant, ...] = ()
    limits: Limits = Limits()
    sets: Mapping[str, Tuple[str, ...]] = dataclasses.field(default_factory=dict)
    shapes: Shapes = dataclasses.field(default_factory=dict)
    read_roots: Tuple[str, ...] = ()
    kernel_files: Tuple[str, ...] = ()
    secret_roots: Tuple[str, ...] = ()
    write_roots: Tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> Dict[str, Any]:
        """The normal form: what ``start`` carries and what ``digest`` is taken of."""
        return {
            "format": FORMAT, "name": self.name, "version": self.version, "limits": self.limits.to_json(),
            "sets": {name: list(members) for name, members in self.sets.items()},
            "shapes": {name: {"words": shape[0], "regex": shape[1]} for name, shape in self.shapes.items()},
            "read_roots": list(self.read_roots), "kernel_files": list(self.kernel_files),
            "secret_roots": list(self.secret_roots), "write_roots": list(self.write_roots), "env": dict(self.env),
            "rules": [rule.to_json() for rule in self.rules], "never": [entry.to_json() for entry in self.never],
            "grants": [grant.to_json() for grant in self.grants],
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Any) -> "Policy":
        """The policy of a compiled document; raises ``PolicyError`` with the position of the first thing wrong."""
        return _read(document, (), _policy)

    @functools.cached_property
    def digest(self) -> str:
        """``sha256:<hex>`` of the normal form."""
        return values.digest(self.to_json())

    @functools.cached_property
    def by_name(self) -> Dict[str, Rule]:
        """Program name -> rule."""
        return {rule.name: rule for rule in self.rules}

    @functools.cached_property
    def never_by_name(self) -> Dict[str, Never]:
        """Program name -> why never."""
        return {name: entry for entry in self.never for name in entry.names}

    @functools.cached_property
    def members(self) -> Dict[str, Tuple[FrozenSet[str], Tuple[str, ...]]]:
        """Set name -> (its exact members, the beginnings its ``*`` members stand for)."""
        return {
            name: (
                frozenset(member for member in members if not member.endswith("*")),
                tuple(member[:-1] for member in members if member.endswith("*")),
            )
            for name, members in self.sets.items()
        }

    def path_rules(self, extra_secrets: Tuple[str, ...] = ()) -> PathRules:
        """The path rules, with a machine's own secret roots (its installation's home) added; built once per set."""
        rules = self._path_rules.get(extra_secrets)
        if rules is None:
            rules = PathRules(self.read_roots, self.secret_roots + extra_secrets, self.kernel_files, self.write_roots)
            self._path_rules[extra_secrets] = rules
        return rules

    @functools.cached_property
    def _path_rules(self) -> Dict[Tuple[str, ...], PathRules]:
        return {}

    def binaries(self) -> Tuple[str, ...]:
        """Every path a rule may run, for pinning; rules that never run have none."""
        return tuple(dict.fromkeys(path for rule in self.rules for path in rule.paths))


_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-")


def _check_name(reader: _Reader, field: str, name: str) -> str:
    if not name or len(name) > 64 or not set(name) <= _NAME_CHARACTERS or name[0] in ".-":
        raise reader.fail(field, "expected a name of letters, digits and _.+-, got %.80r" % name)
    return name


def _absolute(reader: _Reader, field: str, paths: Tuple[str, ...]) -> Tuple[str, ...]:
    for position, path in enumerate(paths):
        if not path.startswith("/") or "/../" in path + "/" or "//" in path:
            raise PolicyError(
                (*reader.path, field, position), "expected an absolute path without '..', got %.120r" % path
            )
    return paths


class _Kinds:
    """Kinds by their text, each compiled once for a policy."""

    def __init__(self, shapes: Shapes, sets: Mapping[str, Any]) -> None:
        self.shapes = shapes
        self.sets = sets
        self.known: Dict[str, Kind] = {}

    def __call__(self, reader: _Reader, field: str, text: str) -> Kind:
        kind = self.known.get(text)
        if kind is None:
            try:
                kind = parse_kind(text, self.shapes)
            except BadKind as error:
                raise reader.fail(field, str(error)) from None
            for name in _set_names(text):
                if name not in self.sets:
                    raise reader.fail(
                        field, "there is no set %r; known are %s" % (name, ", ".join(self.sets) or "none")
                    )
            self.known[text] = kind
        return kind


def _set_names(text: str) -> List[str]:
    found = []
    for name in ("unit", "host", "interface", "user", "word"):
        at = text.find(name + "(")
        while at >= 0:
            if at == 0 or text[at - 1] in "| ":
                found.append(text[at + len(name) + 1 : text.index(")", at)].strip())
            at = text.find(name + "(", at + 1)
    return found


def _option(reader: _Reader, kinds: _Kinds) -> Option:
    names = reader.strings("names")
    if not names:
        raise reader.fail("names", "expected at least one name, got none")
    for position, name in enumerate(names):
        if not name or not name.isascii() or not name.isprintable() or " " in name or name in ("-", "--"):
            raise PolicyError((*reader.path, "names", position), "expected an option's name, got %.80r" % name)
        if "=" in name and name.startswith("--"):
            raise PolicyError((*reader.path, "names", position), "expected a name without '=', got %.80r" % name)
    takes = reader.one_of("takes", TAKES, NONE)
    text = reader.take("kind", (str, type(None)), "a kind or null", None)
    if (takes == NONE) != (text is None):
        raise reader.fail("kind", "an option has a kind exactly if it takes a value; takes %r, kind %r" % (takes, text))
    kind = kinds(reader, "kind", text) if text is not None else None
    return Option(names, takes, kind, reader.flag("repeat", True), reader.flag("tree", False))


def _positional(reader: _Reader, kinds: _Kinds) -> Positional:
    kind = kinds(reader, "kind", reader.text("kind"))
    minimum, maximum = reader.whole("min", 0, MANY, 1), reader.whole("max", 1, MANY, 1)
    if minimum > maximum:
        raise reader.fail("min", "expected at most max %d, got %d" % (maximum, minimum))
    return Positional(kind, minimum, maximum, reader.strings("unless", ()), reader.flag("optional", False))


def _always(reader: _Reader) -> Always:
    words = reader.strings("words")
    for position, word in enumerate(words):
        if not word or not word.isascii() or not word.isprintable():
            raise PolicyError((*reader.path, "words", position), "expected printable ASCII, got %.80r" % word)
    return Always(
        words, reader.one_of("at", (FRONT, COMMAND, OPTIONS, END), FRONT), reader.strings("unless", ()),
        reader.strings("when", ()),
    )  # fmt: skip


def _groups(reader: _Reader, field: str) -> Tuple[Tuple[str, ...], ...]:
    value = reader.take(field, (list, tuple), "a list of lists of option names", ())
    for position, group in enumerate(value):
        if not isinstance(group, (list, tuple)) or not all(isinstance(name, str) for name in group):
            raise PolicyError((*reader.path, field, position), "expected a list of option names, got %.80r" % (group,))
    return tuple(tuple(group) for group in value)


def _command(reader: _Reader, kinds: _Kinds, depth: int = 0) -> Command:
    if depth > 6:
        raise PolicyError(reader.path, "expected at most 6 levels of sub-commands, got more")
    names = reader.strings("names", ())
    if depth and not names:
        raise PolicyError(reader.path, "field 'names' is missing (expected the sub-command's names)")
    command = Command(
        names,
        reader.one_of("style", STYLES, GNU),
        reader.each("options", lambda inner: _option(inner, kinds)),
        reader.each("positionals", lambda inner: _positional(inner, kinds)),
        reader.each("commands", lambda inner: _command(inner, kinds, depth + 1)),
        reader.flag("bare", False),
        reader.one_of("effect", EFFECTS, None),
        reader.text("reason", ""),
        reader.each("always", _always),
        _groups(reader, "require"),
        _groups(reader, "conflicts"),
        reader.string_map("refused"),
        reader.strings("excludes", ()),
        reader.flag("first", False),
    )
    _check_command(reader, command)
    return command


def _check_command(reader: _Reader, command: Command) -> None:
    seen: Dict[str, Option] = {}
    for position, option in enumerate(command.options):
        for name in option.names:
            if name in seen:
                raise PolicyError((*reader.path, "options", position), "option %r stands twice" % name)
            seen[name] = option
    if command.style in (GNU, PFLAG):
        # One parser reads the options of all sub-commands: what takes a value in one takes a value in all.
        for inner_position, inner in enumerate(command.commands):
            for name, option in inner.table.items():
                known_option = command.table[name]
                if known_option.takes != option.takes or (option.takes == NEXT and option.kind != known_option.kind):
                    raise PolicyError(
                        (*reader.path, "commands", inner_position, "options"),
                        "option %r takes %r here and %r elsewhere, but in style %r one parser reads all options"
                        % (name, option.takes, known_option.takes, command.style),
                    )
    known = set(command.table)
    for field, groups in (("require", command.require), ("conflicts", command.conflicts)):
        for position, group in enumerate(groups):
            for name in group:
                if name not in known:
                    raise PolicyError((*reader.path, field, position), "there is no option %r here" % name)
    for field, named in (
        ("positionals", tuple(p.unless for p in command.positionals)),
        ("always", tuple(a.unless + a.when for a in command.always)),
    ):
        for position, group in enumerate(named):
            for name in group:
                if name not in known:
                    raise PolicyError((*reader.path, field, position), "there is no option %r here" % name)
    names = [name for inner in command.commands for name in inner.names]
    for name in names:
        if names.count(name) > 1:
            raise PolicyError((*reader.path, "commands"), "sub-command %r stands twice" % name)
    for name in command.refused:
        if name in known or name in names:
            raise PolicyError((*reader.path, "refused", name), "%r is both allowed and refused" % name)
    if command.commands and command.positionals:
        raise PolicyError((*reader.path, "positionals"), "a command has either sub-commands or positionals")


def _rule(reader: _Reader, kinds: _Kinds) -> Rule:
    name = _check_name(reader, "name", reader.text("name"))
    paths = _absolute(reader, "paths", reader.strings("paths"))
    if not paths:
        raise reader.fail("paths", "expected at least one absolute path, got none")
    reason = reader.text("reason")
    if not reason or "\n" in reason:
        raise reader.fail("reason", "expected one line that says why the rule exists, got %.80r" % reason)
    command = _read(
        reader.take("command", (dict,), "an object", {}),
        (*reader.path, "command"),
        lambda inner: _command(inner, kinds),
    )
    rule = Rule(
        name, paths, reason, command, reader.one_of("effect", EFFECTS, values.OBSERVE), reader.string_map("env"),
        reader.seconds("timeout_s", None),
        reader.whole("output_bytes", 1, 16777216) if "output_bytes" in reader.document else None,
        reader.flag("network", False), _absolute(reader, "writes", reader.strings("writes", ())),
    )  # fmt: skip
    reader.seen.append("output_bytes")
    return rule


def _never(reader: _Reader) -> Never:
    return Never(reader.strings("names"), reader.text("reason"), reader.text("instead", ""))


def _grant(reader: _Reader) -> Grant:
    days = reader.take("days", (list, tuple), "a list of days, 0 = Monday", list(range(7)))
    for position, day in enumerate(days):
        if not isinstance(day, int) or isinstance(day, bool) or not 0 <= day <= 6:
            raise PolicyError((*reader.path, "days", position), "expected a day from 0 to 6, got %.80r" % (day,))
    return Grant(
        reader.text("name"), reader.text("rule"), reader.strings("commands", ()), reader.strings("triggers"),
        tuple(days), reader.whole("start_minute", 0, 1439, 0), reader.whole("end_minute", 0, 1440, 1440),
    )  # fmt: skip


def _limits(reader: _Reader) -> Limits:
    most = {
        "words": 1024, "word_bytes": 131072, "command_chars": 65536, "stages": 16, "output_bytes": 16777216,
        "read_bytes": 16777216, "write_bytes": 16777216, "glob_paths": 1024,
    }  # fmt: skip
    found: Dict[str, Any] = {
        name: reader.whole(name, 1, highest, getattr(Limits, name)) for name, highest in most.items()
    }
    return Limits(timeout_s=reader.seconds("timeout_s", Limits.timeout_s) or Limits.timeout_s, **found)


def _shapes(reader: _Reader) -> Dict[str, Tuple[str, str]]:
    found: Dict[str, Tuple[str, str]] = {}
    for name in reader.document:
        _check_name(reader, name, name)
        entry = _Reader(reader.take(name, (dict,), "an object", {}), (*reader.path, name))
        words, regex = entry.text("words"), entry.text("regex")
        try:
            compile_shape(regex)
        except BadKind as error:
            raise entry.fail("regex", str(error)) from None
        entry.done()
        found[name] = (words, regex)
    return found


def _policy(reader: _Reader) -> Policy:
    reader.whole("format", FORMAT, FORMAT)
    name = _check_name(reader, "name", reader.text("name"))
    version = reader.text("version")
    limits = _read(reader.take("limits", (dict,), "an object", {}), ("limits",), _limits)
    raw_sets = reader.take("sets", (dict,), "an object of lists", {})
    inner = _Reader(raw_sets, ("sets",))
    sets = {set_name: inner.strings(set_name) for set_name in raw_sets}
    shapes = _read(reader.take("shapes", (dict,), "an object", {}), ("shapes",), _shapes)
    kinds = _Kinds(shapes, sets)
    roots = {
        field: _absolute(reader, field, reader.strings(field, ()))
        for field in ("read_roots", "kernel_files", "secret_roots", "write_roots")
    }
    rules = reader.each("rules", lambda entry: _rule(entry, kinds), dataclasses.MISSING)
    for position, rule in enumerate(rules):
        if any(other.name == rule.name for other in rules[:position]):
            raise PolicyError(("rules", position, "name"), "rule %r stands twice" % rule.name)
    never = reader.each("never", _never)
    known = {rule.name for rule in rules}
    for position, entry in enumerate(never):
        for program in entry.names:
            if program in known:
                raise PolicyError(("never", position, "names"), "%r is both allowed and never allowed" % program)
    grants = reader.each("grants", _grant)
    for position, grant in enumerate(grants):
        if grant.rule not in known:
            raise PolicyError(("grants", position, "rule"), "there is no rule %r" % grant.rule)
    return Policy(
        name, version, rules, never, grants, limits, sets, shapes, roots["read_roots"], roots["kernel_files"],
        roots["secret_roots"], roots["write_roots"], reader.string_map("env"),
    )  # fmt: skip
