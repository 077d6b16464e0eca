"""``chargehand policy show|check|test|explain``.

Owns: which policy is meant, what is printed, the lines of ``test --stdin``. Deliberately does not know: how a policy is
compiled (``supervisor.policy``) or decided (``tools.gate``); nothing here is asked of a machine: every binary counts as
installed and no path as a link.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from supervisor import machines as rules
from supervisor.cli.context import JsonOption, opened, settings_of
from supervisor.cli.output import err, errors, fields, out, print_json, styled, table
from supervisor.errors import BAD_INPUT, REFUSED, BadInput
from tools.gate import LexicalHost, decide, summary
from tools.policy import Command, Policy, Rule
from tools.values import ALLOW, ASK, DENY, JsonObject, ToolCall, digest

if TYPE_CHECKING:
    from supervisor.policy.loader import BadPolicy, PolicySource

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Show, check, test and explain what machines may do."
)

PolicyOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--policy", metavar="FILE", help="This policy file (fleet first) instead of the settings'; repeatable."
    ),
]
MachineOption = Annotated[str | None, typer.Option("--machine", help="The policy as it is for this machine.")]
LabelOption = Annotated[list[str] | None, typer.Option("--label", help="key=value of a machine it is for; repeatable.")]
# Everything after the first word, or after --, is the call: its options are not ours.
_WORDS = {"allow_interspersed_args": False}

DECISION_STYLE = {ALLOW: "green", ASK: "yellow", DENY: "red"}
# A call of a model is a few hundred bytes; one line of more than this is no call.
MAX_LINE_BYTES = 1_048_576
READ_BYTES = 1 << 18


# --- which policy ----------------------------------------------------------------------------------------------------


def _compiled(
    context: typer.Context,
    files: Sequence[Path] | None,
    machine: str | None = None,
    labels: Sequence[str] | None = None,
) -> JsonObject:
    """The compiled policy that is meant. Raises ``BadInput`` with file, line and column."""
    from supervisor.policy.loader import BadPolicy, compile_policy, default_policy

    settings = settings_of(context)
    known = rules.labels(labels or ())
    if machine is not None:
        with opened(settings) as services:
            known = {**services.store.machines.get(machine).labels, **known}
    paths = list(files or [path.expanduser() for path in settings.policies])
    if not paths:
        return default_policy()
    try:
        return compile_policy([_source(path) for path in paths], known)
    except BadPolicy as error:
        raise _bad(error, paths) from None


def _source(path: Path) -> PolicySource:
    from supervisor.policy.loader import BadPolicy, load

    try:
        return load(path)
    except BadPolicy as error:
        raise _bad(error, [path]) from None
    except OSError as error:
        raise BadInput(
            f"the policy file {path} cannot be read: {error.strerror}", next_step="check its name and who may read it"
        ) from None


def _bad(error: BadPolicy, paths: Sequence[Path]) -> BadInput:
    return BadInput(
        "a policy file is not right",
        tried=_place(error.where, paths),
        got=error.problem,
        next_step="correct it, then chargehand policy check FILE",
    )


def _place(where: str, paths: Sequence[Path]) -> str:
    """``where`` with the path as it was given: the loader knows file names only."""
    name, colon, rest = where.partition(":")
    return next((f"{path}{colon}{rest}" for path in paths if path.name == name), where)


# --- show ------------------------------------------------------------------------------------------------------------


@app.command()
def show(
    context: typer.Context,
    program: Annotated[str | None, typer.Argument(help="Only this program, with its options.")] = None,
    machine: MachineOption = None,
    label: LabelOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """The policy in force, compiled: what runs, what asks, what never does, each with its reason. --json is the
    document that machines are given."""
    with errors(as_json):
        document = _compiled(context, policy, machine, label)
        compiled = Policy.from_json(document)
        if program is not None:
            _show_program(compiled, program, as_json)
            return
        if as_json:
            print_json({"digest": digest(document), "policy": document})
            return
        _show_summary(compiled, digest(document))


def _show_summary(policy: Policy, policy_digest: str) -> None:
    counts = {effect: sum(1 for rule in policy.rules if effect in _effects(rule)) for effect in ("observe", "change")}
    fields(
        [
            ("policy", styled(f"{policy.name} {policy.version}", "bold")),
            ("digest", policy_digest),
            ("programs", f"{len(policy.rules)} ({counts['observe']} observe, {counts['change']} can change something)"),
            ("never", f"{len(policy.never_by_name)} refused by name; whatever is not listed is refused as well"),
            ("may read", " ".join(policy.read_roots)),
            ("secret", f"{len(policy.secret_roots)} roots and patterns"),
            ("may write", " ".join(policy.write_roots) or "nothing"),
            ("limits", _limits(policy)),
        ]
    )
    for effect, title in (("observe", "runs by itself"), ("change", "a person approves it")):
        rows = [
            (
                f"  {rule.name}",
                styled(f"({', '.join(_changing(rule))})", "yellow") if effect == "change" else "",
                rule.reason,
            )
            for rule in policy.rules
            if effect in _effects(rule)
        ]
        if rows:
            out.print()
            table((f"{effect.upper()}: {title}", "", ""), rows, "")
    if policy.grants:
        out.print()
        rows = [(f"  {grant.name}", grant.rule, f"for {', '.join(grant.triggers)}") for grant in policy.grants]
        table(("GRANTED without a person", "", ""), rows, "")
    if policy.never:
        out.print()
        table(
            ("NEVER: refused with an approval, too", ""), [(f"  {_some(e.names)}", e.reason) for e in policy.never], ""
        )
    err.print(styled("one program with its options: chargehand policy show PROGRAM", "dim"))


def _some(names: Sequence[str], most: int = 6) -> str:
    return " ".join(names[:most]) + (f" … ({len(names)})" if len(names) > most else "")


def _limits(policy: Policy) -> str:
    limits = policy.limits
    return f"{limits.timeout_s:g} s and {limits.output_bytes} bytes a process, {limits.stages} stages a pipeline"


def _commands(command: Command, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Command]]:
    yield names, command
    for inner in command.commands:
        yield from _commands(inner, (*names, inner.names[0]))


def _effects(rule: Rule) -> set[str]:
    """The effects that calls of this program can have: its own where a form of it has none of its own."""
    return {
        command.effect or rule.effect for _, command in _commands(rule.command) if not command.commands or command.bare
    }


def _changing(rule: Rule) -> list[str]:
    return [
        " ".join(names) or "all"
        for names, command in _commands(rule.command)
        if (command.effect or rule.effect) == "change"
    ]


def _show_program(policy: Policy, program: str, as_json: bool) -> None:
    rule = policy.by_name.get(program)
    never = policy.never_by_name.get(program)
    if rule is None and never is None:
        near = sorted(name for name in policy.by_name if name[:2] == program[:2])[:8]
        raise BadInput(
            f"the policy {policy.name} says nothing about {program!r}: it is refused",
            expected=f"a program it names, such as {', '.join(near)}" if near else "a program it names",
            got=program,
        )
    if rule is None:
        assert never is not None
        if as_json:
            print_json({"never": never.to_json()})
            return
        fields([("program", program), ("never", never.reason), ("instead", never.instead)])
        return
    if as_json:
        print_json({"rule": rule.to_json()})
        return
    fields(
        [
            ("program", styled(rule.name, "bold")),
            ("reason", rule.reason),
            ("effect", ", ".join(sorted(_effects(rule)))),
            ("paths", " ".join(rule.paths)),
            ("network", "yes" if rule.network else "no"),
            ("time", f"{rule.timeout_s if rule.timeout_s is not None else policy.limits.timeout_s:g} s"),
            ("output", f"{rule.output_bytes or policy.limits.output_bytes} bytes"),
            ("environment", " ".join(f"{name}={value}" for name, value in {**policy.env, **rule.env}.items())),
        ]
    )
    for names, command in _commands(rule.command):
        words = [
            f"[{'|'.join(option.names)}{f' <{option.kind.text}>' if option.kind else ''}]" for option in command.options
        ]
        words += [
            _count(positional.kind.text, positional.minimum, positional.maximum) for positional in command.positionals
        ]
        if command.commands and not words and not command.bare:
            continue
        effect = command.effect or rule.effect
        line = styled(f"  {' '.join((rule.name, *names))} ", "bold") + styled(" ".join(words))
        out.print(line + (styled(f"  {effect}", "yellow") if effect != "observe" else styled("")))
        for name, why in command.refused.items():
            out.print(styled(f"      not {name}: {why}", "dim"))


def _count(kind: str, low: int, high: int) -> str:
    mark = {(1, 1): "", (0, 1): "?"}.get((low, high), "+" if low else "*")
    return f"<{kind}>{mark}"


# --- check -----------------------------------------------------------------------------------------------------------


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Policy files that are used together.")],
    as_json: JsonOption = False,
) -> None:
    """Check policy files: each by itself, then laid over each other as they would be in force.

    Files without a fleet layer among them are laid over the shipped pack. Exit status 2 when one is not right.
    """
    with errors(as_json):
        found, wrong = _check(files)
        if as_json:
            print_json({"ok": not wrong, "files": found, "problems": wrong})
        else:
            for file in found:
                if file["ok"]:
                    out.print(
                        styled("ok  ", "green") + styled(f"{file['file']}: {file['policy']} ({file['layer']} layer)")
                    )
                    out.print(styled(f"    {file['rules']} programs, digest {file['digest']}", "dim"))
            for problem in wrong:
                err.print(styled("error: ", "bold red") + styled(f"{problem['where']}: {problem['problem']}"))
        if wrong:
            raise typer.Exit(BAD_INPUT)


def _check(files: Sequence[Path]) -> tuple[list[JsonObject], list[JsonObject]]:
    """What was found for each file, and every problem once."""
    from supervisor.policy.loader import DEFAULT_PACK, BadPolicy, compile_policy, load, pack

    sources: dict[Path, PolicySource] = {}
    wrong: dict[tuple[str, str], JsonObject] = {}

    def note(where: str, problem: str) -> None:
        wrong.setdefault((where, problem), {"where": where, "problem": problem})

    for path in files:
        try:
            sources[path] = load(path)
        except BadPolicy as error:
            note(_place(error.where, [path]), error.problem)
        except OSError as error:
            note(str(path), f"cannot be read: {error.strerror}")
    stack = list(sources.values())
    if not any(source.layer == "fleet" for source in stack):
        stack.insert(0, pack(DEFAULT_PACK))
    found: list[JsonObject] = []
    for path in files:
        line: JsonObject = {
            "file": str(path),
            "ok": False,
            "policy": None,
            "layer": None,
            "rules": None,
            "digest": None,
        }
        source = sources.get(path)
        if source is not None:
            line.update(policy=source.name, layer=source.layer)
            try:
                # As for a machine with exactly the labels that this file is for.
                document = compile_policy(stack, source.applies_to)
                line.update(ok=True, rules=len(document["rules"]), digest=digest(document))
            except BadPolicy as error:
                note(_place(error.where, files), error.problem)
        found.append(line)
    return found, list(wrong.values())


# --- test ------------------------------------------------------------------------------------------------------------


@app.command("test", context_settings=_WORDS)
def try_call(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND TEXT | -- ARGV…", help="One text with blanks, or the words.")
    ] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="One JSON document a line in, one answer a line out.")] = False,
    machine: MachineOption = None,
    label: LabelOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """What the gate says about a call.

    One call: exit status 0 if it is allowed, 3 if it would ask a person or is denied. With --stdin each line is
    {"argv": […]} or {"command": "…"}; a line that is neither gets an error line, and the rest goes on.
    """
    with errors(as_json):
        if stdin == bool(words):
            raise BadInput(
                "what to test is missing" if not words else "--stdin and a call exclude each other",
                expected="a command text, -- and words, or --stdin",
                next_step='chargehand policy test "journalctl -u nginx | grep error"  or  -- df -h  or  --stdin',
            )
        compiled = Policy.from_json(_compiled(context, policy, machine, label))
        if stdin:
            _answer_lines(_stdin(), compiled, as_json)
            return
        arguments = _arguments(words or [])
        said = summary(decide(compiled, ToolCall("c1", "exec", arguments), LexicalHost()))
        if as_json:
            print_json(said)
        else:
            _print_decision(said)
        if said["decision"] != ALLOW:
            raise typer.Exit(REFUSED)


def _arguments(words: Sequence[str]) -> JsonObject:
    """One word with a blank in it is a command text; anything else is an argv."""
    return {"command": words[0]} if len(words) == 1 and " " in words[0].strip() else {"argv": list(words)}


def _print_decision(said: Mapping[str, Any]) -> None:
    decision = said["decision"]
    out.print(styled(f"{decision:<6}", DECISION_STYLE[decision]) + styled(f"{said['rule']}: {said['reason']}"))
    if said["hint"]:
        out.print(styled(f"      instead: {said['hint']}", "cyan"))
    for stage in said["stages"]:
        out.print(styled(f"      would run: {_shown(stage)}", "dim"))
    for path in said.get("files") or []:
        out.print(styled(f"      file: {path}", "dim"))


def _shown(argv: Sequence[str]) -> str:
    """An argv for people: words with blanks in quotes."""
    return " ".join(repr(word) if not word or any(c in word for c in " \"'") else word for word in argv)


def _stdin() -> BinaryIO:
    return getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode("utf-8", "surrogateescape"))


def _answer_lines(source: BinaryIO, policy: Policy, as_json: bool) -> None:
    """Answer each line; whatever came in one read is answered with one write, so a pipe is fast and nobody waits."""
    host = LexicalHost()
    malformed = 0
    for batch in _batches(source):
        answers = []
        for number, line in batch:
            said = answer_line(line, number, policy, host)
            malformed += "error" in said
            answers.append(json.dumps(said, ensure_ascii=True) if as_json else _one_line(said))
        if answers:
            sys.stdout.write("\n".join(answers) + "\n")
            sys.stdout.flush()
    if malformed:
        err.print(styled(f"{malformed} lines were no calls; see their error lines", "yellow"))


def _batches(source: BinaryIO) -> Iterator[list[tuple[int, bytes | None]]]:
    """Numbered lines as they come, the blank ones left out; ``None`` for one that is too long."""
    read = getattr(source, "read1", source.read)
    number, held, too_long = 0, b"", False
    while True:
        block = read(READ_BYTES)
        *lines, held = (held + block).split(b"\n") if block else (held, b"")
        batch: list[tuple[int, bytes | None]] = []
        for line in lines:
            number += 1
            if too_long or len(line) > MAX_LINE_BYTES:
                batch.append((number, None))
                too_long = False
            elif line.strip():
                batch.append((number, line))
        if len(held) > MAX_LINE_BYTES:
            held, too_long = b"", True
        if batch:
            yield batch
        if not block:
            return


def answer_line(line: bytes | None, number: int, policy: Policy, host: LexicalHost) -> JsonObject:
    """The answer to one line: the decision, or ``{"error": {"line", "message", "expected", "got"}}``.

    ``{"argv": […]}`` and ``{"command": "…"}`` are calls of ``exec``; ``{"tool", "arguments"}`` is any call but an
    observer's. An ``id`` is handed back. Never raises on anything a line may hold.
    """
    if line is None:
        return _malformed(number, f"the line is longer than {MAX_LINE_BYTES} bytes", "")
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _malformed(number, f"the line is not JSON: {error}", line[:120].decode("utf-8", "backslashreplace"))
    if not isinstance(document, dict):
        return _malformed(number, "the line is not a JSON object", repr(document)[:120])
    if "argv" in document or "command" in document:
        tool = "exec"
        arguments = {name: document[name] for name in ("argv", "command") if name in document}
    elif isinstance(document.get("tool"), str) and isinstance(document.get("arguments"), dict):
        tool, arguments = document["tool"], document["arguments"]
    else:
        return _malformed(number, "the line holds no call", ", ".join(map(repr, list(document)[:8])))
    said = summary(decide(policy, ToolCall("c1", tool, arguments), host))
    if "id" in document:
        said["id"] = document["id"]
    return said


def _malformed(number: int, message: str, got: str) -> JsonObject:
    expected = '{"argv": ["df", "-h"]} or {"command": "df -h"}'
    return {"error": {"line": number, "code": "malformed-line", "message": message, "expected": expected, "got": got}}


def _one_line(said: JsonObject) -> str:
    from supervisor.cli.output import plain

    if "error" in said:
        return plain(f"error  line {said['error']['line']}: {said['error']['message']}").replace("\n", "\\n")
    ran = " | ".join(_shown(stage) for stage in said["stages"])
    text = f"{said['decision']:<6} {said['rule']}: {said['reason']}" + (f"  [{ran}]" if ran else "")
    return plain(text).replace("\n", "\\n")


# --- explain ---------------------------------------------------------------------------------------------------------


@app.command(context_settings=_WORDS)
def explain(
    context: typer.Context,
    words: Annotated[
        list[str], typer.Argument(metavar="COMMAND TEXT | -- ARGV…", help="One text with blanks, or the words.")
    ],
    machine: MachineOption = None,
    label: LabelOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """How the gate reads a call, word by word: which rule, what kind each word is, what is added, what it bounds."""
    with errors(as_json):
        from supervisor.cli.reading import read_call

        compiled = Policy.from_json(_compiled(context, policy, machine, label))
        arguments = _arguments(words)
        said = summary(decide(compiled, ToolCall("c1", "exec", arguments), LexicalHost()))
        stages = read_call(compiled, arguments, LexicalHost())
        if as_json:
            print_json({**said, "reading": [stage.to_json() for stage in stages]})
            return
        for number, stage in enumerate(stages, 1):
            if len(stages) > 1:
                out.print(styled(f"stage {number}", "bold"))
            rows = [
                (
                    f"  {word.text}" if word.text else "  (empty)",
                    word.role,
                    word.kind,
                    styled(word.problem, "red")
                    if word.problem
                    else styled("" if word.role == "not read" else "fits", "green"),
                )
                for word in stage.words
            ]
            table(("  WORD", "READ AS", "KIND", ""), rows, "")
            facts = [
                ("  rule", stage.rule),
                ("  effect", stage.effect),
                ("  added", _shown(stage.added)),
                ("  bounds", stage.bounds),
            ]
            fields(facts)
        _print_decision(said)
