"""Which units a compiled policy lets the agent manage, for the polkit rule of its machine.

Owns: reading the change commands of ``systemctl`` out of a policy. Pure. Deliberately does not know: the form of a polkit
rule (``quadlets.polkit``) nor how a call is decided (``tools.gate``). Both come from the same policy, so the operating
system refuses what the gate should have refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from quadlets import polkit
from tools.policy import Command, Policy
from tools.values import CHANGE

_UNIT_OF_SET = re.compile(r"unit\(([^()|,]+)\)")
_HAS_SUFFIX = re.compile(r".*\.[a-z]+")


def grants_of(policy: Policy) -> dict[str, tuple[str, ...]]:
    """Unit name (or beginning followed by ``*``) → verbs. Empty when the policy lets nothing be changed with systemctl.

    A unit position that is not bound to a named set grants nothing: polkit must never know more units than the policy
    names.
    """
    found: dict[str, set[str]] = {}
    for rule in policy.rules:
        if any(path.endswith("/systemctl") for path in rule.paths):
            for verb, units in _changes(policy, rule.command, rule.effect):
                for unit in units:
                    found.setdefault(unit, set()).add(verb)
    return {unit: tuple(sorted(verbs)) for unit, verbs in sorted(found.items())}


def polkit_rule(policy: Policy, user: str) -> str | None:
    """The rules file for ``user`` under ``policy``, ``None`` when it grants nothing. Raises ``quadlets.polkit.BadGrant``."""
    return polkit.polkit_rule(grants_of(policy), user)


def _changes(policy: Policy, command: Command, effect: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for child in command.commands:
        yield from _changes(policy, child, child.effect or effect)
    if (command.effect or effect) != CHANGE:
        return
    for verb in set(command.names) & set(polkit.VERBS):
        for positional in command.positionals:
            for name in _UNIT_OF_SET.findall(positional.kind.text):
                yield verb, tuple(_full(member) for member in policy.sets.get(name, ()))


def _full(unit: str) -> str:
    """The name systemd knows the unit by: ``systemctl restart nginx`` means ``nginx.service``."""
    return unit if unit.endswith("*") or _HAS_SUFFIX.fullmatch(unit) else f"{unit}.service"
