"""Runbook files: reading YAML, errors with exact positions, and which runbook a request in words means.

Owns: YAML, positions in files, the set of runbooks that are shipped or added, keyword matching.
Deliberately does not know: what a runbook does (``tools.runbooks``), runs, machines.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tools.observers.observer import nearest
from tools.runbooks import Place, Runbook, place_text, problems

# A runbook is a page or two. A larger file is something else; bytes.
MAX_FILE_BYTES = 262_144
DEFAULT = "health"


class BadRunbook(ValueError):
    """A runbook file cannot be used. ``problems`` holds every ``file:line:column: what`` that was found."""

    def __init__(self, found: Iterable[str]) -> None:
        self.problems = tuple(found)
        super().__init__("\n".join(self.problems))


class UnknownRunbook(LookupError):
    """There is no runbook of that name; the message names the nearest one."""


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (nobody needs a bomb of them), ``yes``/``no`` booleans and dates."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed in a runbook", event.start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":bool", ":merge", ":value"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), list("tf"))


def load_file(path: Path) -> Runbook:
    """The runbook in the YAML file at ``path``; raises ``BadRunbook`` (unreadable files too)."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadRunbook([f"{path}: cannot read the runbook: {error.strerror}"]) from error
    return load_text(raw, str(path))


def load_text(raw: bytes, name: str) -> Runbook:
    """The runbook in ``raw`` (YAML, UTF-8); ``name`` is how errors call the file. Raises ``BadRunbook``."""
    if len(raw) > MAX_FILE_BYTES:
        raise BadRunbook([f"{name}: a runbook has at most {MAX_FILE_BYTES} bytes, got {len(raw)}"])
    try:
        text = raw.decode("utf-8")
        loader = _Loader(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadRunbook([f"{name}: expected text in UTF-8: {error}"]) from error
    try:
        root = loader.get_single_node()
        if root is None:
            raise BadRunbook(
                [f"{name}:1:1: the file is empty; expected a runbook with name, title, description, steps"]
            )
        twice = list(_doubled_keys(root))
        if twice:
            raise BadRunbook(_at(name, mark, message) for mark, message in twice)
        document = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadRunbook([_at(name, mark, f"this is no YAML: {error.problem or error.context}")]) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, BadRunbook):
            raise
        raise BadRunbook([f"{name}: this is no YAML: {error}"]) from error
    finally:
        loader.dispose()
    found = problems(document)
    if found:
        raise BadRunbook(_at(name, _mark(root, place), f"{place_text(place)}: {message}") for place, message in found)
    return Runbook.from_json(document)


def _at(name: str, mark: yaml.Mark | None, message: str) -> str:
    return f"{name}:{mark.line + 1}:{mark.column + 1}: {message}" if mark is not None else f"{name}: {message}"


def _doubled_keys(node: yaml.Node) -> Iterable[tuple[yaml.Mark | None, str]]:
    """Keys that stand twice in one mapping, which YAML readers silently take the last of."""
    waiting: list[yaml.Node] = [node]
    while waiting:
        current = waiting.pop()
        if isinstance(current, yaml.SequenceNode):
            waiting.extend(current.value)
        elif isinstance(current, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in current.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        yield key.start_mark, f"the key {key.value!r} is there twice"
                    seen.add(key.value)
                waiting.append(value)


def _mark(root: yaml.Node, place: Place) -> yaml.Mark | None:
    """Where a place of the document stands in the file; the nearest place around it if it is not there."""
    node: yaml.Node = root
    mark = root.start_mark
    for part in place:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            mark = node.start_mark
        elif isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if getattr(key, "value", None) == part), None)
            if pair is None:
                break
            node = pair[1]
            mark = node.start_mark if isinstance(node, yaml.ScalarNode) else pair[0].start_mark
        else:
            break
    return mark


def load_all(extra_dirs: Iterable[Path] = ()) -> dict[str, Runbook]:
    """The shipped runbooks and those (``*.yaml``) of ``extra_dirs``, by name, in order of name.

    A runbook of a later directory must not have the name of an earlier one. Raises ``BadRunbook`` with every problem of
    every file.
    """
    sources: list[tuple[str, bytes]] = []
    found: list[str] = []
    shipped = importlib.resources.files("prompts").joinpath("runbooks")
    for entry in sorted(shipped.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".yaml"):
            sources.append((f"prompts/runbooks/{entry.name}", entry.read_bytes()))
    for directory in extra_dirs:
        if not directory.is_dir():
            found.append(f"{directory}: expected a directory with runbooks (*.yaml); create it or correct the setting")
            continue
        for path in sorted(directory.glob("*.yaml")):
            try:
                sources.append((str(path), path.read_bytes()))
            except OSError as error:
                found.append(f"{path}: cannot read the runbook: {error.strerror}")
    runbooks: dict[str, Runbook] = {}
    origins: dict[str, str] = {}
    for name, raw in sources:
        try:
            runbook = load_text(raw, name)
        except BadRunbook as error:
            found += error.problems
            continue
        if runbook.name in runbooks:
            found.append(
                f"{name}:1:1: the runbook {runbook.name!r} is already defined in {origins[runbook.name]}; rename one"
            )
            continue
        runbooks[runbook.name] = runbook
        origins[runbook.name] = name
    if found:
        raise BadRunbook(found)
    return dict(sorted(runbooks.items()))


def get(name: str, runbooks: Mapping[str, Runbook]) -> Runbook:
    """The runbook called ``name``; raises ``UnknownRunbook`` with the nearest name."""
    if name not in runbooks:
        raise UnknownRunbook(f"there is no runbook {name!r}; {nearest(name, runbooks, 'runbooks')}")
    return runbooks[name]


# Words that say nothing about the subject of a request.
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")


def match(text: str, runbooks: Mapping[str, Runbook]) -> str | None:
    """The runbook a request in words means, ``None`` if none is meant.

    A runbook's own name counts most, a label of several words more than one word. Between equals the more special one
    wins over the default; two different special subjects at once mean the default, which looks at both.
    """
    words = _WORD.findall(text.lower())
    plain = " " + " ".join(words) + " "
    scores: dict[str, int] = {}
    for name, runbook in runbooks.items():
        score = 3 if f" {name} " in plain else 0
        for label in runbook.labels:
            phrase = " ".join(_WORD.findall(label.lower()))
            if phrase and phrase != name and f" {phrase} " in plain:
                score += 2 * len(phrase.split())
        if score:
            scores[name] = score
    special = {name: score for name, score in scores.items() if name != DEFAULT}
    if not special:
        return DEFAULT if DEFAULT in scores else None
    best = max(special.values())
    winners = [name for name, score in special.items() if score == best]
    if len(winners) == 1:
        return winners[0]
    return DEFAULT if DEFAULT in runbooks else min(winners)
