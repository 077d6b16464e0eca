"""How a binary reads its words: argv → options, values and positionals, each with the kind it must be of.

Owns: the reading itself, exactly as getopt_long, Go's pflag, ``ip``, ``openssl`` or ``find`` would do it, and the refusal of
every word a rule does not name.
Deliberately does not know: what a kind accepts, paths, hosts, effects; it never looks at the machine.

The order of the words is kept: what was asked is what runs, plus what the rule always adds.
Sources: getopt(3), getopt_long(3), the POSIX utility syntax guidelines, spf13/pflag's documentation, ip(8), find(1).
"""

from __future__ import annotations

import dataclasses
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

from tools.kinds import Kind, Refusal
from tools.policy import (
    APART,
    COMMAND,
    EXACT,
    FIND,
    FRONT,
    GNU,
    JOINED,
    KEYVALUE,
    NEXT,
    NONE,
    OPTIONS,
    PFLAG,
    POSIX,
    Command,
    Option,
)

_ONE_WORD_STYLES = (EXACT, KEYVALUE, FIND)


class Item:
    """One word: ``prefix`` as it stands, then ``value``, to be checked by ``kind`` (``None``: nothing to check).

    ``label`` is what a refusal calls it."""

    __slots__ = ("kind", "label", "prefix", "value")

    def __init__(self, prefix: str, value: str = "", kind: Optional[Kind] = None, label: str = "") -> None:
        self.prefix = prefix
        self.value = value
        self.kind = kind
        self.label = label


@dataclasses.dataclass
class Parsed:
    """The words of one process, read. ``items`` in the order asked; ``commands``: the chain from the binary's own
    command to the sub-command; ``command_at``: number of items up to and including the last sub-command word; ``uses``:
    for each command of the chain the options that stand, under the names they were written with (one and the same dict
    where one parser reads them all)."""

    items: List[Item]
    commands: List[Command]
    command_at: int
    uses: List[Dict[str, Option]]

    @property
    def tree(self) -> bool:
        """Whether an option makes the binary read whole directories."""
        return any(option.tree for used in self.uses for option in used.values())

    @property
    def command_names(self) -> Tuple[str, ...]:
        """The first (canonical) names of the sub-commands."""
        return tuple(command.names[0] for command in self.commands[1:])


def parse(command: Command, words: Sequence[str], program: str) -> Parsed:
    """Reads ``words`` (without ``argv[0]``) as ``command`` describes; ``program`` is used in refusals only.

    Raises ``Refusal`` for an unknown or abbreviated option, a missing or superfluous value, a word too many or too few.
    """
    parsed = Parsed([], [command], 0, [{}])
    _Reading(parsed, program).read(command, list(words))
    return parsed


class _Reading:
    def __init__(self, parsed: Parsed, program: str) -> None:
        self.parsed = parsed
        self.program = program
        self.counts: Dict[int, int] = {}
        self.positional_items: List[Item] = []
        # Where in the chain the command stands whose parser is at work.
        self.level = 0
        # The values of options read by this parser, with the name each was given under.
        self.values: List[Tuple[Item, str]] = []

    @property
    def used(self) -> Dict[str, Option]:
        return self.parsed.uses[-1]

    def _given(self, prefix: str, value: str, option: Option, name: str) -> None:
        item = Item(prefix, value, option.kind, name)
        self.parsed.items.append(item)
        self.values.append((item, name))

    def read(self, command: Command, words: List[str]) -> None:
        read = self._one_word if command.style in _ONE_WORD_STYLES else self._getopt
        rest = read(command, words)
        if rest is not None:
            following, remaining = rest
            self._finish(command)
            self.parsed.commands.append(following)
            self.parsed.uses.append({})
            self.program = "%s %s" % (self.program, following.names[0])
            self.level = len(self.parsed.commands) - 1
            self.counts = {}
            self.values = []
            self.read(following, remaining)
            return
        if command.commands:
            self._pick(command)
        else:
            self._positionals(command)
        self._finish(command)

    # --- getopt, permuting (gnu, pflag) or not (posix) ---

    def _getopt(self, command: Command, words: List[str]) -> Optional[Tuple[Command, List[str]]]:
        table = command.table
        position, count = 0, len(words)
        literal = False
        while position < count:
            word = words[position]
            position += 1
            if literal or word == "-" or not word.startswith("-"):
                option = None if literal else table.get(word)
                if option is not None:
                    position = self._exact(command, option, word, words, position)
                    continue
                if command.style == POSIX:
                    if command.commands:
                        return self._following(command, word), words[position:]
                    literal = True
                self._positional(word)
            elif word == "--":
                self.parsed.items.append(Item("--"))
                literal = True
            elif word.startswith("--"):
                position = self._long(command, table, word, words, position)
            else:
                position = self._short(command, table, word, words, position)
        return None

    def _long(self, command: Command, table: Dict[str, Option], word: str, words: List[str], position: int) -> int:
        name, equals, value = word.partition("=")
        option = table.get(name)
        if option is None:
            raise self._unknown(command, name)
        self._use(name, option)
        takes = option.takes
        if equals:
            if takes == NONE:
                if command.style == PFLAG and value == "true":
                    self.parsed.items.append(Item(word))
                    return position
                raise Refusal(
                    "%s: option %s takes no value, got %.80r" % (self.program, name, value), "send %s alone" % name
                )
            self._given(name + "=", value, option, name)
            return position
        self.parsed.items.append(Item(word))
        return self._value(option, name, words, position)

    def _short(self, command: Command, table: Dict[str, Option], word: str, words: List[str], position: int) -> int:
        exact = table.get(word)
        if exact is not None and (len(word) == 2 or exact.takes == NONE):
            self._use(word, exact)
            self.parsed.items.append(Item(word))
            return self._value(exact, word, words, position)
        digits = table.get("-#")
        if digits is not None and word[1:].isdigit() and word.isascii():
            self._use("-#", digits)
            self._given("-", word[1:], digits, "-#")
            return position
        for at in range(1, len(word)):
            name = "-" + word[at]
            option = table.get(name)
            if option is None:
                raise self._unknown(command, name, word)
            self._use(name, option)
            if option.takes == NONE:
                continue
            rest = word[at + 1 :]
            if not rest:
                self.parsed.items.append(Item(word))
                return self._value(option, name, words, position)
            if option.takes == APART:
                raise Refusal(
                    "%s: the value of option %s must be a word of its own, got %.80r" % (self.program, name, word),
                    "send %s VALUE" % name,
                )
            if command.style == PFLAG and rest.startswith("="):
                at, rest = at + 1, rest[1:]
            self._given(word[: at + 1], rest, option, name)
            return position
        self.parsed.items.append(Item(word))
        return position

    def _value(self, option: Option, name: str, words: List[str], position: int) -> int:
        """What follows an option whose word held no value."""
        takes = option.takes
        if takes in (NONE, JOINED):
            return position
        if takes == NEXT:
            # The binary tries the next word and leaves it alone if it does not fit; so do we.
            if position < len(words) and option.kind is not None and _fits(option.kind, words[position]):
                self._given("", words[position], option, name)
                return position + 1
            return position
        if position >= len(words):
            expected = option.kind.words if option.kind else "a value"
            raise Refusal("%s: option %s needs a value and none came" % (self.program, name), "expected %s" % expected)
        self._given("", words[position], option, name)
        return position + 1

    def _exact(self, command: Command, option: Option, word: str, words: List[str], position: int) -> int:
        self._use(word, option)
        self.parsed.items.append(Item(word))
        return self._value(option, word, words, position)

    # --- one word per option (exact, keyvalue, find) ---

    def _one_word(self, command: Command, words: List[str]) -> Optional[Tuple[Command, List[str]]]:
        table = command.table
        position, count = 0, len(words)
        expression = False
        while position < count:
            word = words[position]
            position += 1
            option = table.get(word)
            if option is not None:
                expression = True
                position = self._exact(command, option, word, words, position)
                continue
            if word.startswith("-"):
                raise self._unknown(command, word)
            if command.commands:
                return self._following(command, word), words[position:]
            if expression and command.style == FIND:
                raise Refusal(
                    "%s: %.80r stands after the expression began" % (self.program, word),
                    "put the start points first, then the tests",
                )
            self._positional(word)
        return None

    # --- sub-commands and positionals ---

    def _following(self, command: Command, word: str) -> Command:
        following = command.by_name.get(word)
        if following is None:
            raise self._no_command(command, word)
        self.parsed.items.append(Item(word))
        self.parsed.command_at = len(self.parsed.items)
        return following

    def _positional(self, word: str) -> None:
        item = Item("", word)
        self.parsed.items.append(item)
        self.positional_items.append(item)

    def _pick(self, command: Command) -> None:
        """Sub-commands read by the same parser as their options (gnu, pflag): positionals name them."""
        while command.commands:
            if not self.positional_items:
                if not command.bare:
                    raise Refusal(
                        "%s: a sub-command is missing" % self.program, "allowed are %s" % _some(command.by_name)
                    )
                break
            item = self.positional_items.pop(0)
            following = command.by_name.get(item.value)
            if following is None:
                raise self._no_command(command, item.value)
            item.prefix = item.value  # a word of the command's own: taken as it stands, nothing to check
            self.parsed.command_at = self.parsed.items.index(item) + 1
            self.parsed.commands.append(following)
            self.parsed.uses.append(self.used)
            self.program = "%s %s" % (self.program, following.names[0])
            command = following
        used = self.used
        chain = self.parsed.commands[self.level :]
        allowed: Dict[str, Option] = {}
        for step in chain:
            allowed.update(step.own)
        for name in used:
            if name not in allowed:
                raise Refusal(
                    "%s: option %s does not belong to this sub-command" % (self.program, name),
                    "allowed are %s" % _some(allowed),
                )
            # Another sub-command may have an option of the same name for another kind of value.
            used[name] = allowed[name]
        for item, name in self.values:
            item.kind = allowed[name].kind
        self._positionals(command)
        for step in chain[1:]:
            self._finish(step)

    def _positionals(self, command: Command) -> None:
        items = self.positional_items
        used = self.used
        wanted = [p for p in command.positionals if not any(name in used for name in p.unless)]
        position = 0
        later = sum(p.minimum for p in wanted if not p.optional)
        for number, positional in enumerate(wanted, 1):
            later -= 0 if positional.optional else positional.minimum
            here = min(positional.maximum, len(items) - position - later)
            if positional.optional and here <= 0:
                continue
            if here < positional.minimum:
                raise Refusal(
                    "%s: %d word(s) too few" % (self.program, positional.minimum - max(here, 0)),
                    "expected %s" % positional.kind.words,
                )
            for item in items[position : position + here]:
                item.kind = positional.kind
                item.label = "word %d" % number
            position += here
        if position < len(items):
            raise Refusal(
                "%s: word %.80r is too many" % (self.program, items[position].value),
                "expected %s" % (", then ".join(p.kind.words for p in wanted) or "options only"),
            )

    # --- options as a whole ---

    def _use(self, name: str, option: Option) -> None:
        key = id(option)
        seen = self.counts.get(key, 0) + 1
        self.counts[key] = seen
        if seen > 1 and not option.repeat:
            raise Refusal("%s: option %s stands more than once" % (self.program, name), "send it once")
        self.used[name] = option

    def _finish(self, command: Command) -> None:
        used = self.used
        for group in command.require:
            if not any(name in used for name in group):
                raise Refusal(
                    "%s: one of the options %s must stand" % (self.program, ", ".join(group)), "add %s" % group[0]
                )
        for group in command.conflicts:
            standing = {id(used[name]): name for name in group if name in used}
            if len(standing) > 1:
                raise Refusal(
                    "%s: options %s exclude each other" % (self.program, " and ".join(standing.values())),
                    "send one of them",
                )

    def _unknown(self, command: Command, name: str, word: str = "") -> Refusal:
        known = command.refused.get(name)
        where = " (in %.80r)" % word if word and word != name else ""
        if known is not None:
            return Refusal(
                "%s: option %s%s is not allowed: %s" % (self.program, name, where, known), _near(command, name)
            )
        return Refusal(
            "%s: option %.80r%s is not known to the policy" % (self.program, name, where), _near(command, name)
        )

    def _no_command(self, command: Command, word: str) -> Refusal:
        known = command.refused.get(word)
        if known is not None:
            reason = "%s: sub-command %s is not allowed: %s" % (self.program, word, known)
        else:
            reason = "%s: sub-command %.80r is not known to the policy" % (self.program, word)
        near = [name for name in command.by_name if word[:2] and name.startswith(word[:2])]
        return Refusal(reason, "allowed are %s" % _some(near or command.by_name))


class _Nowhere:
    """What an optional value is tried against: kinds of optional values may not look at sets or paths."""

    tree = False

    def member(self, set_name: str, value: str) -> bool:
        return False

    def readable(self, path: str, tree: bool, roots: Tuple[str, ...]) -> str:
        raise Refusal("no path may stand here")

    def listable(self, path: str) -> str:
        raise Refusal("no path may stand here")


_NOWHERE = _Nowhere()


def _fits(kind: Kind, word: str) -> bool:
    try:
        kind.check(word, _NOWHERE)
    except Refusal:
        return False
    return True


def _some(names: Iterable[str], most: int = 16) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:most])
    return shown + (", ... (%d more)" % (len(ordered) - most) if len(ordered) > most else "") or "none"


def _near(command: Command, name: str) -> str:
    """A hint with the allowed options that begin like ``name``, all of them if none does."""
    bare = name.lstrip("-")[:3]
    long_form = name.startswith("--")
    near = [
        known for known in command.table if bare and known.startswith("--") == long_form
        and known.lstrip("-").startswith(bare)
    ]  # fmt: skip
    names = near or [known for known in command.table if long_form == known.startswith("--")] or command.table
    return "allowed are %s" % _some(names) if names else "no option is allowed"


def assemble(binary: str, parsed: Parsed, words: Sequence[str], added: Sequence[str] = ()) -> List[str]:
    """The argv that runs: ``binary``, the checked ``words`` (one per item), what the commands always add, and the options
    ``added`` after every option that was asked for (where two contradict each other, the last one holds)."""
    front: List[str] = []
    middle: List[str] = []
    last: List[str] = list(added)
    end: List[str] = []
    for command, used in zip(parsed.commands, parsed.uses):
        for always in command.always:
            if any(name in used for name in always.unless):
                continue
            if always.when and not any(name in used for name in always.when):
                continue
            target = {FRONT: front, COMMAND: middle, OPTIONS: last}.get(always.at, end)
            target.extend(always.words)
    if not (front or middle or last or end):
        return [binary, *words]
    at, rest = parsed.command_at, list(words[parsed.command_at :])
    if last:
        literal = next(
            (n for n, item in enumerate(parsed.items[at:]) if item.prefix == "--" and not item.kind), len(rest)
        )
        rest[literal:literal] = last
    return [binary, *front, *words[:at], *middle, *rest, *end]


__all__ = ["GNU", "Item", "Parsed", "assemble", "parse"]
