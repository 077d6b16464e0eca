"""How the gate reads the words of a call: the view behind ``policy explain``.

Owns: naming what each word was read as. Deliberately does not know: whether a call is allowed; ``tools.gate.decide``
says that, with the same grammar and the same kinds, so this view cannot allow anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tools import command_text, grammar
from tools.gate import HostView, decide
from tools.kinds import Refusal
from tools.policy import Policy, Rule
from tools.values import JsonObject, ToolCall


@dataclasses.dataclass(frozen=True)
class ReadWord:
    """``text`` as it was sent; ``role``: what it was read as; ``kind``: what its value must be; ``problem``: why
    not."""

    text: str
    role: str
    kind: str = ""
    problem: str = ""

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class ReadStage:
    """One process of a call. ``rule``: name and reason; ``added``: words the gate adds; ``bounds``: time, output,
    network."""

    words: tuple[ReadWord, ...]
    rule: str = ""
    effect: str = ""
    added: tuple[str, ...] = ()
    bounds: str = ""

    def to_json(self) -> JsonObject:
        document = dataclasses.asdict(self)
        document["words"] = [word.to_json() for word in self.words]
        document["added"] = list(self.added)
        return document


def read_call(policy: Policy, arguments: Mapping[str, Any], host: HostView) -> list[ReadStage]:
    """Each stage of an ``exec`` call as the gate reads it; a text that cannot be read is one stage that says why."""
    if "argv" in arguments:
        stages: list[Sequence[str]] = [list(arguments["argv"])]
    else:
        text = str(arguments["command"])
        try:
            stages = [list(stage.words) for stage in command_text.parse(text).stages]
        except Refusal as refused:
            return [ReadStage((ReadWord(text, "not read", "", refused.reason),))]
    return [_stage(policy, words, host) for words in stages]


def _stage(policy: Policy, words: Sequence[str], host: HostView) -> ReadStage:
    name = words[0].rpartition("/")[2]
    rule = policy.by_name.get(name)
    if rule is None:
        never = policy.never_by_name.get(name)
        problem = f"never allowed: {never.reason}" if never else "not in the policy: refused by default"
        rest = tuple(ReadWord(word, "not read") for word in words[1:])
        return ReadStage((ReadWord(words[0], "program", "", problem), *rest))
    decision = decide(policy, ToolCall("c1", "exec", {"argv": list(words)}), host)
    ran = [stage for step in decision.steps for stage in step.stages]
    seconds = rule.timeout_s if rule.timeout_s is not None else policy.limits.timeout_s
    size = rule.output_bytes if rule.output_bytes is not None else policy.limits.output_bytes
    return ReadStage(
        words=(_program(rule, words[0]), *_rest(policy, rule, words[1:], host)),
        rule=f"{rule.name}: {rule.reason}",
        effect=decision.effect if ran else rule.effect,
        added=_added(words, ran[0].argv if ran else ()),
        bounds=f"{seconds:g} s, {size} bytes of output, {'network' if rule.network else 'no network'}",
    )


def _program(rule: Rule, word: str) -> ReadWord:
    if word.startswith("/") and word not in rule.paths:
        return ReadWord(word, "program", " or ".join(rule.paths), "not where the policy expects it")
    return ReadWord(word, "program", word if word.startswith("/") else rule.paths[0])


def _rest(policy: Policy, rule: Rule, words: Sequence[str], host: HostView) -> tuple[ReadWord, ...]:
    items, command_at, problem = _longest(rule, words)
    found = [
        _word(policy, word, item, number < command_at, host)
        for number, (word, item) in enumerate(zip(words, items, strict=False))
    ]
    for position, word in enumerate(words[len(found) :]):
        found.append(ReadWord(word, "not read", "", problem if position == 0 else ""))
    return tuple(found)


def _longest(rule: Rule, words: Sequence[str]) -> tuple[Sequence[grammar.Item], int, str]:
    """The reading of as many words as can be read, how many of them name the sub-command, and why not all."""
    problem = ""
    for count in range(len(words), -1, -1):
        try:
            parsed = grammar.parse(rule.command, words[:count], rule.name)
        except Refusal as refused:
            problem = problem or refused.reason
        else:
            return parsed.items[:count], parsed.command_at, problem
    return (), 0, problem


def _word(policy: Policy, word: str, item: grammar.Item, command: bool, host: HostView) -> ReadWord:
    if item.kind is None:
        if word == "--":
            return ReadWord(word, "end of options")
        if word.startswith("-") and word != "-":
            return ReadWord(word, "option")
        return ReadWord(word, "sub-command" if command else "word")
    role = f"value of {item.label}" if item.label.startswith("-") else item.label or "value"
    if item.prefix and item.value:
        role = f"option {item.prefix.rstrip('=')} and its value"
    try:
        item.kind.check(item.value, sight(policy, host))
    except Refusal as refused:
        return ReadWord(word, role, item.kind.text, refused.reason)
    return ReadWord(word, role, item.kind.text)


def sight(policy: Policy, host: HostView) -> Any:
    """What a kind's check looks with: the gate's own, so that this view and the gate cannot differ."""
    from tools.gate import _Sight

    return _Sight(policy, host)


def _added(words: Sequence[str], argv: Sequence[str]) -> tuple[str, ...]:
    """The words of ``argv`` that were not asked for."""
    left = list(words[1:])
    added = []
    for word in argv[1:]:
        if word in left:
            left.remove(word)
        else:
            added.append(word)
    return tuple(added)
