"""From YAML packs to the compiled policy of one machine.

Owns: the language packs are written in, ``extends``, layers and what a lower layer may do, and errors with file, line,
column and what was expected.
Deliberately does not know: calls, decisions, machines beyond their labels. What a compiled policy is, ``tools.policy`` says;
everything made here goes through its validation.

The language is the compiled form written shortly. A rule is keyed by the program's name; ``flags`` lists options without
a value (the names of one option in one text), ``options`` maps names to the kind of their value (``kind?``: only joined,
``kind??``: also in the next word), ``args`` lists the kinds of positionals (``kind?``, ``kind*``, ``kind+`` as in a regular
expression), ``commands`` maps sub-commands (``,`` separates sub-commands, a blank separates names of one) to the same again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from supervisor.errors import BadInput
from tools.policy import FORMAT, GNU, MANY, Policy, PolicyError, show_path

DEFAULT_PACK = "observe-core"
# Where a bare name is looked for when a rule names no paths: Debian, RHEL and SUSE, before and after the merge of /usr.
_BINARY_DIRECTORIES = ("/usr/bin", "/usr/sbin", "/bin", "/sbin")
_SOURCE_BYTES = 1 << 20
_LAYERS = ("fleet", "label", "machine")


class BadPolicy(BadInput):
    """A policy source is wrong. ``where``: ``file:line:column``; ``problem``: what was expected and what came."""

    default_code = "bad-policy"

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}", tried="reading a policy", next_step=f"correct {where}")
        self.where = where
        self.problem = problem


@dataclasses.dataclass(frozen=True)
class Node:
    """A YAML value and where it stands. ``value``: a scalar, a list of nodes, or a dict of text to node."""

    value: Any
    where: str
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # A scalar as it is written: "-4" is an option's name before it is a number.
    raw: str = ""

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def fail(self, expected: str) -> BadPolicy:
        return BadPolicy(self.where, f"expected {expected}, got {_show(self.plain())}")

    def mapping(self, expected: str) -> dict[str, Node]:
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            raise self.fail(expected)
        return self.value

    def sequence(self, expected: str) -> list[Node]:
        if self.value is None:
            return []
        if not isinstance(self.value, list):
            raise self.fail(expected)
        return self.value

    def text(self, expected: str) -> str:
        if not isinstance(self.value, str):
            raise self.fail(expected)
        return self.value


def _show(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.80}"


@dataclasses.dataclass(frozen=True)
class PolicySource:
    """One YAML document, read but not yet compiled. ``layer``: ``fleet``, ``label`` or ``machine``; ``applies_to``:
    labels a machine must have for the document to count."""

    name: str
    layer: str
    applies_to: Mapping[str, str]
    root: Node

    def applies(self, labels: Mapping[str, str]) -> bool:
        return all(labels.get(name) == value for name, value in self.applies_to.items())


# --- reading ---


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML (libyaml's where it is: five times as fast) without what makes a document mean something other than it shows."""


def _node(node: yaml.Node, file: str) -> Node:
    where = f"{file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Node] = {}
        keys: dict[str, str] = {}
        for key_node, value_node in node.value:
            key = _node(key_node, file)
            # Options such as "-4" or "yes" as names are text whatever YAML makes of them.
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else key.plain()
            if not isinstance(name, str) or key_node.tag == "tag:yaml.org,2002:merge":
                raise BadPolicy(key.where, f"expected a name as key, got {_show(key.plain())}")
            if name in found:
                raise BadPolicy(key.where, f"key {name!r} stands twice (first at {keys[name]})")
            found[name] = _node(value_node, file)
            keys[name] = key.where
        return Node(found, where, keys)
    if isinstance(node, yaml.SequenceNode):
        return Node([_node(item, file) for item in node.value], where)
    if not isinstance(node, yaml.ScalarNode):
        raise BadPolicy(where, f"expected a value, got {node!r:.80}")
    if node.tag in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:binary"):
        return Node(node.value, where)
    try:
        value = _Loader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise BadPolicy(where, f"expected a plain value, got {node.value!r:.80}: {error}") from None
    return Node(value, where, raw=node.value)


def _refuse_aliases(text: str, file: str) -> None:
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            mark = event.start_mark
            where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else f"{file}:1:1"
            raise BadPolicy(where, "expected no anchors or aliases: write the value out")


def load(source: Path | str) -> PolicySource:
    """The policy source in a file (``Path``) or in a text (``str``).

    Raises ``BadPolicy`` with file, line and column, and ``OSError`` if the file cannot be read.
    """
    if isinstance(source, Path):
        raw = source.read_bytes()
        file = source.name
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadPolicy(f"{file}:1:1", f"expected UTF-8, got byte {raw[error.start]:#x} at {error.start}") from None
    else:
        text, file = source, "<text>"
    return _load_text(text, file)


def _load_text(text: str, file: str) -> PolicySource:
    if len(text.encode("utf-8", "surrogatepass")) > _SOURCE_BYTES:
        raise BadPolicy(f"{file}:1:1", f"expected at most {_SOURCE_BYTES} bytes")
    try:
        _refuse_aliases(text, file)
        composed = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else f"{file}:1:1"
        raise BadPolicy(where, f"expected YAML: {error.problem or error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise BadPolicy(f"{file}:1:1", f"expected YAML: {str(error)[:200]}") from None
    if composed is None:
        raise BadPolicy(f"{file}:1:1", "expected a policy, got an empty document")
    root = _node(composed, file)
    document = root.mapping("a mapping that begins with 'policy: NAME'")
    for key in document:
        if key not in _TOP:
            raise BadPolicy(root.keys[key], f"there is no {key!r}; known are {', '.join(sorted(_TOP))}")
    if "policy" not in document:
        raise BadPolicy(root.where, "expected 'policy: NAME'")
    name = document["policy"].text("the policy's name")
    layer_node = document.get("layer")
    layer = layer_node.text("a layer") if layer_node else "fleet"
    if layer_node and layer not in _LAYERS:
        raise layer_node.fail(f"one of {', '.join(_LAYERS)}")
    applies: dict[str, str] = {}
    if "applies_to" in document:
        for label, value in document["applies_to"].mapping("a mapping of labels").items():
            applies[label] = value.text("a label's value")
    return PolicySource(name, layer, applies, root)


_TOP = frozenset(
    (
        "policy", "version", "description", "layer", "applies_to", "extends", "limits", "env", "shapes", "sets",
        "read_roots", "kernel_files", "secret_roots", "write_roots", "never", "grants", "rules", "drop", "open",
        "locked",
    )
)  # fmt: skip
_APPENDED = ("read_roots", "kernel_files", "secret_roots", "write_roots", "never", "grants")
_MERGED = ("limits", "env", "shapes", "sets")


def pack_names() -> list[str]:
    """The names of the packs that come with the product."""
    directory = resources.files("tools") / "policies"
    return sorted(entry.name.removesuffix(".yaml") for entry in directory.iterdir() if entry.name.endswith(".yaml"))


@functools.cache
def pack(name: str) -> PolicySource:
    """A pack that comes with the product; raises ``BadPolicy`` if there is none of that name."""
    if name not in pack_names():
        raise BadPolicy(f"{name}:1:1", f"there is no pack {name!r}; known are {', '.join(pack_names())}")
    entry = resources.files("tools") / "policies" / f"{name}.yaml"
    return _load_text(entry.read_text("utf-8"), entry.name)


# --- extends: one source and the packs below it, as one tree ---


def _flatten(source: PolicySource, find: Callable[[str], PolicySource], above: tuple[str, ...] = ()) -> Node:
    if source.name in above:
        raise BadPolicy(source.root.where, f"{source.name!r} extends itself: {' -> '.join((*above, source.name))}")
    document = source.root.value
    merged: Node | None = None
    if "extends" in document:
        node = document["extends"]
        entries = [node] if isinstance(node.value, str) else node.sequence("the names of other policies")
        for entry in entries:
            name = entry.text("the name of another policy")
            try:
                base = find(name)
            except BadPolicy as error:
                raise BadPolicy(entry.where, error.problem) from None
            below = _flatten(base, find, (*above, source.name))
            merged = below if merged is None else merge(merged, below)
    return source.root if merged is None else merge(merged, source.root)


def merge(lower: Node, upper: Node) -> Node:
    """``upper`` written over ``lower``: lists of roots are joined, rules are merged by name."""
    found: dict[str, Node] = dict(lower.value)
    for key, node in upper.value.items():
        if key == "rules" and key in found:
            found[key] = _merge_mapping(found[key], node, _merge_command)
        elif key in _MERGED and key in found:
            found[key] = _merge_mapping(found[key], node, lambda _, over: over)
        elif key in _APPENDED and key in found:
            found[key] = Node(found[key].sequence("a list") + node.sequence("a list"), node.where)
        else:
            found[key] = node
    return Node(found, upper.where, {**lower.keys, **upper.keys})


def _merge_mapping(lower: Node, upper: Node, join: Callable[[Node, Node], Node]) -> Node:
    found = dict(lower.mapping("a mapping"))
    for key, node in upper.mapping("a mapping").items():
        found[key] = join(found[key], node) if key in found else node
    return Node(found, upper.where, {**lower.keys, **upper.keys})


def _merge_command(lower: Node, upper: Node) -> Node:
    """A rule or sub-command of two packs: options, sub-commands and refusals are joined, the rest is replaced."""
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return upper
    found = dict(lower.value)
    for key, node in upper.value.items():
        if key == "commands" and key in found:
            found[key] = _merge_mapping(found[key], node, _merge_command)
        elif key in ("options", "refused", "env") and key in found:
            found[key] = _merge_mapping(found[key], node, lambda _, over: over)
        elif key in ("flags", "always", "conflicts") and key in found:
            found[key] = Node(found[key].sequence("a list") + node.sequence("a list"), node.where)
        else:
            found[key] = node
    # What a pack allows is no longer refused by the one it extends.
    if "refused" in found and "commands" in found:
        allowed = {name for names in found["commands"].value for name in names.replace(",", " ").split()}
        refused = found["refused"]
        found["refused"] = Node(
            {name: node for name, node in refused.value.items() if name not in allowed}, refused.where, refused.keys
        )
    return Node(found, upper.where, {**lower.keys, **upper.keys})


# --- translation to the compiled form, remembering where each value came from ---


class _Translation:
    def __init__(self) -> None:
        self.origins: dict[tuple[Any, ...], str] = {}

    def mark(self, path: tuple[Any, ...], node: Node) -> None:
        self.origins[path] = node.where

    def where(self, path: Sequence[Any], fallback: str) -> str:
        steps = tuple(path)
        while steps:
            if steps in self.origins:
                return self.origins[steps]
            steps = steps[:-1]
        return fallback

    def copy(self, node: Node, path: tuple[Any, ...]) -> Any:
        """A value that means the same in both forms."""
        self.mark(path, node)
        if isinstance(node.value, dict):
            return {key: self.copy(inner, (*path, key)) for key, inner in node.value.items()}
        if isinstance(node.value, list):
            return [self.copy(inner, (*path, position)) for position, inner in enumerate(node.value)]
        return node.value

    def document(self, root: Node) -> dict[str, Any]:
        found: dict[str, Any] = {"format": FORMAT}
        document = root.value
        for key, node in document.items():
            if key == "policy":
                found["name"] = self.copy(node, ("name",))
            elif key == "version":
                self.mark((key,), node)
                found[key] = str(node.value)
            elif key in _MERGED or (key in _APPENDED and key != "never"):
                found[key] = self.copy(node, (key,)) if node.value is not None else ({} if key in _MERGED else [])
            elif key == "never":
                found[key] = [self.never(item, position) for position, item in enumerate(node.sequence("a list"))]
            elif key == "rules":
                rules = node.mapping("a mapping of programs to rules")
                found[key] = [self.rule(name, rules[name], position) for position, name in enumerate(rules)]
        found.setdefault("version", "1")
        found.setdefault("rules", [])
        # A program a pack allows is not among those another pack never allows: what is allowed is listed, each with
        # its grammar, and that is the closer word.
        allowed = {rule["name"] for rule in found["rules"]}
        for entry in found.get("never", []):
            if isinstance(entry.get("names"), list):
                entry["names"] = [name for name in entry["names"] if name not in allowed]
        return found

    def never(self, node: Node, position: int) -> dict[str, Any]:
        path = ("never", position)
        self.mark(path, node)
        entry = node.mapping("a mapping of names, reason and instead")
        found = {key: self.copy(value, (*path, key)) for key, value in entry.items()}
        if "names" in entry and isinstance(entry["names"].value, str):
            found["names"] = entry["names"].value.split()
        return found

    def rule(self, name: str, node: Node, position: int) -> dict[str, Any]:
        path = ("rules", position)
        self.mark(path, node)
        entry = dict(node.mapping("a mapping"))
        found: dict[str, Any] = {"name": name}
        if "paths" in entry:
            found["paths"] = self.copy(entry.pop("paths"), (*path, "paths"))
        else:
            found["paths"] = [f"{directory}/{name}" for directory in _BINARY_DIRECTORIES]
        for key in ("reason", "effect", "env", "timeout_s", "output_bytes", "network", "writes"):
            if key in entry:
                found[key] = self.copy(entry.pop(key), (*path, key))
        inner = Node(entry, node.where, node.keys)
        found["command"] = self.command(inner, (*path, "command"), GNU)
        return found

    def command(self, node: Node, path: tuple[Any, ...], style: str) -> dict[str, Any]:
        self.mark(path, node)
        found: dict[str, Any] = {}
        if isinstance(node.value, list):
            found["positionals"] = self.positionals(node, path)
            if style != GNU:
                found["style"] = style
            return found
        entry = node.mapping("a mapping, or a list of positionals")
        if "style" in entry:
            found["style"] = self.copy(entry["style"], (*path, "style"))
        elif style != GNU:
            found["style"] = style
        inner_style = found.get("style", style)
        options: list[dict[str, Any]] = []
        for key, value in entry.items():
            if key == "flags":
                for item in value.sequence("a list of options without value"):
                    self.mark((*path, "options", len(options)), item)
                    names_text = item.raw if isinstance(item.value, int) else item.text("the names of an option")
                    options.append({"names": names_text.split()})
            elif key == "options":
                for names, kind in value.mapping("a mapping of options to kinds").items():
                    self.mark((*path, "options", len(options)), kind)
                    options.append(self.option(names, kind))
            elif key == "args":
                found["positionals"] = self.positionals(value, path)
            elif key == "commands":
                found["commands"] = list(self.commands(value, (*path, "commands"), inner_style))
            elif key == "always":
                found["always"] = self.always(value, path)
            elif key in ("bare", "effect", "reason", "require", "conflicts", "refused", "excludes", "first"):
                found[key] = self.copy(value, (*path, key))
            elif key != "style":
                raise BadPolicy(
                    node.keys.get(key, value.where),
                    f"there is no {key!r} here; known are flags, options, args, commands, always, style, bare, effect,"
                    " reason, require, conflicts, refused, excludes,"
                    " first, and for a rule paths, env, timeout_s, output_bytes, network,"
                    " writes",
                )
        if options:
            found["options"] = options
        return found

    def option(self, names: str, node: Node) -> dict[str, Any]:
        found: dict[str, Any] = {"names": names.split()}
        if isinstance(node.value, dict):
            found.update({key: inner.plain() for key, inner in node.value.items()})
            text = found.get("kind")
        else:
            text = node.text("the kind of the option's value")
        if text is None:
            return found
        if not isinstance(text, str):
            raise node.fail("a kind as text")
        text, takes = _suffix(text, (("??", "next"), ("?", "joined")), "value")
        found["kind"] = text
        found.setdefault("takes", takes)
        return found

    def positionals(self, node: Node, path: tuple[Any, ...]) -> list[dict[str, Any]]:
        found = []
        for position, item in enumerate(node.sequence("a list of kinds")):
            self.mark((*path, "positionals", position), item)
            if isinstance(item.value, dict):
                entry: dict[str, Any] = item.plain()
                text = entry.get("kind")
                if not isinstance(text, str):
                    raise item.fail("a mapping with 'kind'")
            else:
                entry, text = {}, item.text("a kind")
            text, count = _suffix(text, (("?", "?"), ("*", "*"), ("+", "+")), "")
            low, high = {"": (1, 1), "?": (0, 1), "*": (0, MANY), "+": (1, MANY)}[count]
            found.append({"min": low, "max": high, **entry, "kind": text})
        return found

    def commands(self, node: Node, path: tuple[Any, ...], style: str) -> Iterator[dict[str, Any]]:
        position = 0
        for names, inner in node.mapping("a mapping of sub-commands").items():
            for one in names.split(","):
                found = self.command(inner, (*path, position), style)
                found["names"] = one.split()
                yield found
                position += 1

    def always(self, node: Node, path: tuple[Any, ...]) -> list[Any]:
        found: list[Any] = []
        for position, item in enumerate(node.sequence("a list of words or mappings")):
            self.mark((*path, "always", position), item)
            if isinstance(item.value, dict):
                entry = item.plain()
                if isinstance(entry.get("words"), str):
                    entry["words"] = entry["words"].split()
                found.append(entry)
            else:
                found.append({"words": item.text("words that are always added").split()})
        return found


def _suffix(text: str, marks: Sequence[tuple[str, str]], default: str) -> tuple[str, str]:
    for mark, meaning in marks:
        if text.endswith(mark):
            return text[: -len(mark)], meaning
    return text, default


# --- layers ---


def compile_tree(root: Node) -> dict[str, Any]:
    """The compiled form of one merged tree; raises ``BadPolicy`` at the line the wrong value came from."""
    translation = _Translation()
    document = translation.document(root)
    try:
        return Policy.from_json(document).to_json()
    except PolicyError as error:
        where = translation.where(error.path, root.where)
        raise BadPolicy(where, f"{show_path(error.path)}: {error.problem}") from None


def compile_policy(
    sources: Sequence[PolicySource],
    labels: Mapping[str, str] | None = None,
    find: Callable[[str], PolicySource] = pack,
) -> dict[str, Any]:
    """The compiled policy (JSON form, normal) of a machine with ``labels``.

    ``sources``: those that do not apply to the labels are left out; the rest is ordered fleet, label, machine (within a
    layer as given). The first gives the policy, each further one narrows it (see ``supervisor.policy.layers``).
    ``find``: where names after ``extends`` are looked up. Raises ``BadPolicy``.
    """
    applying = [source for source in sources if source.applies(labels or {})]
    applying.sort(key=lambda source: _LAYERS.index(source.layer))
    if not applying:
        raise BadPolicy("policy:1:1", f"no policy applies to a machine with labels {dict(labels or {})!r}")
    base = _flatten(applying[0], find)
    if len(applying) == 1:
        return compile_tree(base)
    # Layers are written in terms of this module's trees; imported here, where they are needed.
    from supervisor.policy.layers import narrow

    return narrow(base, [source.root for source in applying[1:]])


def default_policy() -> dict[str, Any]:
    """The compiled default: the pack ``observe-core``. Each call gives a document of its own."""
    return compile_policy([pack(DEFAULT_PACK)])
