"""Layers: what a label's or a machine's policy may do to the one above it.

Owns: narrowing (always allowed), widening (only what the upper layer opens), locked fields (not even narrowed).
Deliberately does not know: how a document is read or what its rules mean.

A lower layer may: ``drop`` things by name, lower ``limits``, add ``secret_roots`` and ``never``, cut a set down to some of
its members, and for a rule lower ``timeout_s`` and ``output_bytes`` or raise ``effect`` (observe, change, never). Anything
else must be named by ``open`` above (``open: [sets.units, rules.nginx, read_roots]``), and nothing named by ``locked``
above may be touched. Names are dotted: ``rules.systemctl.status`` is the sub-command ``status`` of the rule ``systemctl``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from supervisor.policy.loader import BadPolicy, Node, compile_tree, merge
from tools.policy import EFFECTS, Policy, PolicyError

_HEAD = ("policy", "version", "description", "layer", "applies_to")
_ADDS_BY_NARROWING = ("secret_roots", "never")
_LISTS = ("read_roots", "kernel_files", "write_roots", "secret_roots")

_Edit = Callable[[dict[str, Any]], None]


def narrow(base: Node, layers: Sequence[Node]) -> dict[str, Any]:
    """The compiled policy (JSON form) of ``base`` with each of ``layers`` laid over it in order.

    Raises ``BadPolicy`` at the line of the first thing a layer may not do.
    """
    opened = _names(base, "open")
    locked = _names(base, "locked")
    tree = base
    edits: list[_Edit] = []
    for layer in layers:
        widening: dict[str, Node] = {}
        for key, node in layer.value.items():
            if key in _HEAD or key in ("open", "locked"):
                continue
            if key == "extends":
                raise BadPolicy(layer.keys[key], "expected no 'extends' in a lower layer: it only narrows")
            if key == "drop":
                edits.extend(_drop(item, locked) for item in node.sequence("a list of dotted names"))
            elif key == "limits":
                edits.extend(_lower_limits(node, opened, locked, widening))
            elif key == "sets":
                edits.extend(_cut_sets(node, opened, locked, widening))
            elif key == "rules":
                edits.extend(_narrow_rules(node, opened, locked, widening))
            elif key in _ADDS_BY_NARROWING:
                _not_locked(key, node.where, locked)
                widening[key] = node
            else:
                _not_locked(key, node.where, locked)
                if not _covers(opened, key):
                    raise BadPolicy(
                        layer.keys[key],
                        f"a lower layer may not add to {key!r} unless the layer above has 'open: [{key}]'",
                    )
                widening[key] = node
        if widening:
            tree = _without_never(
                merge(tree, Node({**widening, "policy": tree.value["policy"]}, layer.where)), widening
            )
        # A lower layer can take back what was opened, never open more.
        if "open" in layer.value:
            opened = {name for name in _names(layer, "open") if _covers(opened, name)}
        locked |= _names(layer, "locked")
    document = compile_tree(tree)
    for edit in edits:
        edit(document)
    document["name"] = "+".join(
        [str(base.value["policy"].value), *(str(layer.value["policy"].value) for layer in layers)]
    )[:64]
    try:
        return Policy.from_json(document).to_json()
    except PolicyError as error:
        raise BadPolicy(layers[-1].where, str(error)) from None


def _names(node: Node, key: str) -> set[str]:
    if key not in node.value:
        return set()
    return {item.text("a dotted name") for item in node.value[key].sequence("a list of dotted names")}


def _covers(names: set[str], name: str) -> bool:
    return any(name == known or name.startswith(known + ".") for known in names)


def _not_locked(name: str, where: str, locked: set[str]) -> None:
    for known in locked:
        if name == known or name.startswith(known + ".") or known.startswith(name + "."):
            raise BadPolicy(where, f"{name!r} is locked by the layer above ({known!r})")


def _without_never(tree: Node, widening: dict[str, Node]) -> Node:
    """A program a lower layer never allows has no rule any more, whatever the packs say."""
    if "never" not in widening or "rules" not in tree.value:
        return tree
    gone: set[str] = set()
    for entry in widening["never"].sequence("a list"):
        names = entry.mapping("a mapping").get("names")
        plain = names.plain() if names else []
        gone.update(plain.split() if isinstance(plain, str) else plain)
    rules = tree.value["rules"]
    kept = Node({name: rule for name, rule in rules.value.items() if name not in gone}, rules.where, rules.keys)
    return Node({**tree.value, "rules": kept}, tree.where, tree.keys)


def _drop(item: Node, locked: set[str]) -> _Edit:
    name = item.text("a dotted name such as rules.top or rules.systemctl.status")
    _not_locked(name, item.where, locked)
    section, _, rest = name.partition(".")

    def missing(what: str) -> BadPolicy:
        return BadPolicy(item.where, f"cannot drop {name!r}: there is no {what}")

    def edit(document: dict[str, Any]) -> None:
        if section in _LISTS:
            if rest not in document[section] or section == "secret_roots":
                raise missing(f"{rest!r} in {section} that may be dropped")
            document[section].remove(rest)
        elif section == "grants":
            kept = [grant for grant in document[section] if grant["name"] != rest]
            if len(kept) == len(document[section]):
                raise missing(f"grant {rest!r}")
            document[section] = kept
        elif section == "sets":
            set_name, _, member = rest.partition(".")
            if member not in document[section].get(set_name, ()):
                raise missing(f"{member!r} in the set {set_name!r}")
            document[section][set_name].remove(member)
        elif section == "rules":
            _drop_from_rules(document, rest.split(".", 1), missing)
        else:
            raise BadPolicy(item.where, f"expected rules, grants, sets or one of {', '.join(_LISTS)}, got {name!r}")

    return edit


def _drop_from_rules(document: dict[str, Any], steps: list[str], missing: Callable[[str], BadPolicy]) -> None:
    rule = next((rule for rule in document["rules"] if rule["name"] == steps[0]), None)
    if rule is None:
        raise missing(f"rule {steps[0]!r}")
    if len(steps) == 1:
        document["rules"].remove(rule)
        return
    command = rule["command"]
    *above, last = [steps[1]] if steps[1].startswith(("-", "+")) else steps[1].split(".")
    for step in above:
        found = next((inner for inner in command.get("commands", ()) if step in inner["names"]), None)
        if found is None:
            raise missing(f"sub-command {step!r}")
        command = found
    for field in ("commands", "options"):
        for entry in command.get(field, ()):
            if last in entry["names"]:
                command[field].remove(entry)
                return
    raise missing(f"sub-command or option {last!r}")


def _lower_limits(node: Node, opened: set[str], locked: set[str], widening: dict[str, Node]) -> list[_Edit]:
    edits: list[_Edit] = []
    opens: dict[str, Node] = {}
    for name, value in node.mapping("a mapping of limits").items():
        _not_locked(f"limits.{name}", value.where, locked)
        if _covers(opened, f"limits.{name}"):
            opens[name] = value
        else:
            edits.append(_lower(name, value))
    if opens:
        widening["limits"] = Node(opens, node.where, node.keys)
    return edits


def _lower(name: str, value: Node) -> _Edit:
    def edit(document: dict[str, Any]) -> None:
        upper = document["limits"].get(name)
        if upper is None or isinstance(value.value, bool) or not isinstance(value.value, (int, float)):
            raise value.fail(f"a known limit and a number for {name!r}")
        if value.value > upper:
            raise BadPolicy(
                value.where, f"limit {name!r} may only be lowered: expected at most {upper}, got {value.value}"
            )
        document["limits"][name] = value.value

    return edit


def _cut_sets(node: Node, opened: set[str], locked: set[str], widening: dict[str, Node]) -> list[_Edit]:
    edits: list[_Edit] = []
    opens: dict[str, Node] = {}
    for name, members in node.mapping("a mapping of sets").items():
        _not_locked(f"sets.{name}", members.where, locked)
        if _covers(opened, f"sets.{name}"):
            opens[name] = members
        else:
            edits.append(_cut(name, members))
    if opens:
        widening["sets"] = Node(opens, node.where, node.keys)
    return edits


def _cut(name: str, members: Node) -> _Edit:
    def edit(document: dict[str, Any]) -> None:
        upper = document["sets"].get(name)
        if upper is None:
            raise BadPolicy(members.where, f"there is no set {name!r} above; a lower layer may not add one")
        beginnings = tuple(member[:-1] for member in upper if member.endswith("*"))
        for member in members.sequence("a list of names"):
            text = member.text("a name")
            if text not in upper and not (beginnings and text.startswith(beginnings)):
                raise BadPolicy(member.where, f"set {name!r} may only be cut down: {text!r} is not in it above")
        document["sets"][name] = members.plain() or []

    return edit


def _narrow_rules(node: Node, opened: set[str], locked: set[str], widening: dict[str, Node]) -> list[_Edit]:
    edits: list[_Edit] = []
    opens: dict[str, Node] = {}
    for name, rule in node.mapping("a mapping of programs to rules").items():
        _not_locked(f"rules.{name}", rule.where, locked)
        if _covers(opened, f"rules.{name}"):
            opens[name] = rule
            continue
        for key, value in rule.mapping("a mapping").items():
            if key not in ("timeout_s", "output_bytes", "effect"):
                raise BadPolicy(
                    rule.keys.get(key, value.where),
                    f"a lower layer may change timeout_s, output_bytes and effect of {name!r} only;"
                    f" {key!r} needs 'open: [rules.{name}]' in the layer above",
                )
            edits.append(_narrow_rule(name, key, value))
    if opens:
        widening["rules"] = Node(opens, node.where, node.keys)
    return edits


def _narrow_rule(name: str, key: str, value: Node) -> _Edit:
    def edit(document: dict[str, Any]) -> None:
        rule = next((rule for rule in document["rules"] if rule["name"] == name), None)
        if rule is None:
            raise BadPolicy(value.where, f"there is no rule {name!r} above; a lower layer may not add one")
        if key == "effect":
            upper = rule.get("effect", EFFECTS[0])
            if value.value not in EFFECTS or EFFECTS.index(value.value) < EFFECTS.index(upper):
                raise BadPolicy(
                    value.where, f"effect of {name!r} may only be raised from {upper!r}, got {value.value!r}"
                )
            rule["effect"] = value.value
            _raise_effects(rule["command"], value.value)
            return
        limit = "timeout_s" if key == "timeout_s" else "output_bytes"
        upper = rule.get(key, document["limits"][limit])
        if isinstance(value.value, bool) or not isinstance(value.value, (int, float)) or value.value > upper:
            raise BadPolicy(
                value.where, f"{key} of {name!r} may only be lowered: expected at most {upper}, got {value.value!r}"
            )
        rule[key] = value.value

    return edit


def _raise_effects(command: dict[str, Any], effect: str) -> None:
    """A sub-command with an effect of its own keeps it only if it is the stronger one."""
    own = command.get("effect")
    if own is not None and EFFECTS.index(own) < EFFECTS.index(effect):
        command["effect"] = effect
    for inner in command.get("commands", ()):
        _raise_effects(inner, effect)
