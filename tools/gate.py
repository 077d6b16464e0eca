"""The gate: one pure function from a call to a decision.

Owns: which rule a call falls under, how its words are checked, what exactly will run, effect, grants, and the sentence
a refusal is given in.
Deliberately does not know: processes, files (a ``HostView`` answers what must be looked up), approvals, who asked.

Default deny: what no rule names is refused. Everything that runs is in ``Decision.steps``, complete, so that what is
approved, what is recorded and what is executed can be compared byte by byte.
Sources: safety.md, "The gate", "Approvals", "Untrusted text".
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, Dict, List, Mapping, Optional, Protocol, Sequence, Tuple

from tools import command_text, grammar
from tools.kinds import Refusal, check_characters
from tools.paths import PathRefused, PathRules, lexical
from tools.policy import Grant, Policy, Rule
from tools.values import ALLOW, ASK, CHANGE, DENY, NEVER, OBSERVE, Decision, FileAccess, Stage, Step, ToolCall

DEFAULT_DENY = "default-deny"
# The rule of a refusal whose only reason is that the machine has no such program.
NOT_INSTALLED = "not-installed"
EXEC, READ, WRITE = "exec", "read", "write"


class HostView(Protocol):
    """What the gate may ask about the machine. Every method is a look-up, none has an effect.

    ``secret_roots``: absolute paths or globs of this installation, beside the policy's: its home with keys and journals.
    """

    secret_roots: Tuple[str, ...]

    def pinned(self, path: str) -> bool:
        """Whether the binary ``path`` exists and is the one pinned when the lease began."""

    def resolve(self, path: str) -> str:
        """The real path (links followed; what does not exist stays as named); raises ``PathRefused`` or ``OSError``."""

    def expand(self, pattern: str, limit: int) -> Sequence[str]:
        """At most ``limit + 1`` absolute paths that match a glob, sorted; none if nothing does."""


class LexicalHost:
    """A machine nobody is connected to: every binary exists and no path is a link. For ``policy test`` and tests."""

    def __init__(self, secret_roots: Tuple[str, ...] = ()) -> None:
        self.secret_roots = secret_roots

    def pinned(self, path: str) -> bool:
        return True

    def resolve(self, path: str) -> str:
        return path

    def expand(self, pattern: str, limit: int) -> Sequence[str]:
        return ()


class Prober(Protocol):
    """An observer as the gate sees it: parameters in, first probes out (``tools.observers`` has the real ones)."""

    def probes(self, parameters: Optional[Mapping[str, Any]] = None) -> Sequence["ProbeLike"]:
        """The probes of the first phase; raises ``ValueError`` for parameters that do not fit."""


class ProbeLike(Protocol):
    """One command (``argv``) or one file (``path``), never both; ``output_bytes`` of it are useful."""

    @property
    def argv(self) -> Tuple[str, ...]: ...

    @property
    def path(self) -> str: ...

    @property
    def output_bytes(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What about the run matters for a grant. ``trigger``: what started it; ``untrusted``: whether its context holds tool
    output by now (then nothing is granted, safety.md "Untrusted text"); ``weekday`` 0 = Monday and ``minute`` of the
    day, both UTC, as the broker's clock says."""

    trigger: str = ""
    untrusted: bool = True
    weekday: int = 0
    minute: int = 0


NO_GRANTS = RunContext()


# What these files say depends on the network namespace of the one who reads them.
_NETWORK_FILE = re.compile(r"/proc/(?:[0-9]+/)?net(?:/|$)|/proc/sys/net/|/sys/class/net/|/sys/devices/.*/net/")


class _NotInstalled(Refusal):
    """The rule would allow it, but none of its binaries is on the machine."""


class _Sight:
    """The look a kind's check has: sets and path rules of the policy, joined with the machine's own."""

    __slots__ = ("host", "policy", "rules", "tree", "trees")

    def __init__(self, policy: Policy, host: HostView) -> None:
        self.policy = policy
        self.host = host
        self.rules: PathRules = policy.path_rules(host.secret_roots)
        self.tree = False
        # The directories a tree reader was given, resolved.
        self.trees: List[str] = []

    def member(self, set_name: str, value: str) -> bool:
        exact, beginnings = self.policy.members[set_name]
        if value in exact or value.startswith(beginnings):
            return True
        # systemd lets ".service" be left out; the set may name a unit either way.
        return set_name.endswith("units") and (value + ".service" in exact or value.removesuffix(".service") in exact)

    def resolved(self, path: str) -> str:
        try:
            return self.host.resolve(path)
        except FileNotFoundError:
            # The program says best itself what is missing; its directory still decides where that would be.
            parent, name = os.path.split(path)
            return path if parent == path else os.path.join(self.resolved(parent), name)
        except PathRefused as refused:
            raise Refusal(refused.reason, refused.hint) from None
        except OSError as error:
            raise Refusal("path %.200r cannot be resolved: %s" % (path, error.strerror), "check the path") from None

    def readable(self, path: str, tree: bool, roots: Tuple[str, ...]) -> str:
        try:
            normal = lexical(path)
            if self.rules.secret(normal):
                self.rules.check_read(normal)
            _check_kernel_link(normal)
            real = self.resolved(normal)
            self.rules.check_read(real)
        except PathRefused as refused:
            raise Refusal(refused.reason, refused.hint) from None
        if roots and not any(real == root or real.startswith(root + "/") for root in roots):
            raise Refusal("path %.200r is not under %s" % (path, ", ".join(roots)), "name a file there")
        if tree:
            if real.startswith(("/proc", "/sys")):
                raise Refusal(
                    "reading everything below %.200r would read the kernel's own files" % path, "name the files"
                )
            self.trees.append(real)
        # A trailing slash says "the directory, not the link"; the resolved path needs none.
        return real

    def listable(self, path: str) -> str:
        try:
            normal = lexical(path)
            self.rules.check_list(normal)
            real = self.resolved(normal)
            self.rules.check_list(real)
        except PathRefused as refused:
            raise Refusal(refused.reason, refused.hint) from None
        # The name is the point of listing a link; what the name leads to was checked beside it.
        return normal


def _check_kernel_link(normal: str) -> None:
    # /proc/self and /proc/thread-self are the gate itself here and the command there.
    if normal.startswith(("/proc/", "/dev/fd", "/dev/std")) and any(
        step in ("root", "cwd", "fd", "exe", "map_files", "fdinfo") for step in normal.split("/")
    ):
        raise PathRefused("path %.200r goes through a process's own links" % normal, "send the path it leads to")
    if normal.startswith("/dev/"):
        raise PathRefused(
            "path %.200r is a device" % normal, "devices are not read; use lsblk, smartctl or an observer"
        )


def decide(
    policy: Policy,
    call: ToolCall,
    host: HostView,
    observers: Optional[Mapping[str, Prober]] = None,
    context: RunContext = NO_GRANTS,
) -> Decision:
    """What the policy says about one call on one machine.

    ``observers``: name -> observer, for calls of observers. ``context``: for grants of changes; the default grants none.
    Returns ``allow`` with the steps to run, ``ask`` with the steps an approval would be bound to, or ``deny`` with reason
    and hint. Never raises on anything a call may hold.
    """
    try:
        return _decide(policy, call, host, observers or {}, context)
    except Refusal as refused:
        return Decision(DENY, OBSERVE, DEFAULT_DENY, refused.reason, refused.hint)


def decide_probe(policy: Policy, probe: ProbeLike, host: HostView) -> Decision:
    """What the policy says about one probe of an observer: as an ``exec`` of its argv or a ``read`` of its path.

    An observer never changes anything: what would ask is denied.
    """
    if probe.path:
        length = min(probe.output_bytes, policy.limits.read_bytes)
        call = ToolCall("", READ, {"path": probe.path, "length": length})
    else:
        call = ToolCall("", EXEC, {"argv": list(probe.argv)})
    decision = decide(policy, call, host)
    if decision.outcome == ASK:
        return Decision(DENY, decision.effect, decision.rule, "an observer may only observe: %s" % decision.reason)
    return decision


def _decide(
    policy: Policy, call: ToolCall, host: HostView, observers: Mapping[str, Prober], context: RunContext
) -> Decision:
    arguments = call.arguments
    if not isinstance(arguments, Mapping):
        raise Refusal("arguments must be an object, got %s" % type(arguments).__name__, "send a JSON object")
    if call.tool == EXEC:
        return _exec(policy, arguments, host, context)
    if call.tool == READ:
        return _read(policy, arguments, host)
    if call.tool == WRITE:
        return _write(policy, arguments, host)
    observer = observers.get(call.tool)
    if observer is None:
        near = [name for name in observers if name[:3] == call.tool[:3]] or sorted(observers)[:20]
        raise Refusal(
            "there is no tool %.80r" % call.tool, "tools are exec, read, write%s" % "".join(", " + n for n in near)
        )
    return _observe(policy, call.tool, observer, arguments, host)


# --- exec ---


def _known(arguments: Mapping[str, Any], allowed: Tuple[str, ...]) -> None:
    for name in arguments:
        if name not in allowed:
            raise Refusal("there is no argument %.80r" % (name,), "arguments are %s" % ", ".join(allowed))


def _exec(policy: Policy, arguments: Mapping[str, Any], host: HostView, context: RunContext) -> Decision:
    _known(arguments, ("argv", "command"))
    limits = policy.limits
    argv, text = arguments.get("argv"), arguments.get("command")
    if (argv is None) == (text is None):
        raise Refusal("exec takes either argv or command", 'send {"argv": ["df", "-h"]} or {"command": "df -h"}')
    sight = _Sight(policy, host)
    if text is None:
        if not isinstance(argv, (list, tuple)) or not argv:
            raise Refusal("argv must be a list of at least one word, got %.80r" % (argv,), 'such as ["df", "-h"]')
        read = [command_text.StageText(tuple(argv))]
    else:
        if not isinstance(text, str):
            raise Refusal("command must be text, got %s" % type(text).__name__, 'such as "df -h"')
        if len(text) > limits.command_chars:
            raise Refusal("command is %d characters long, at most %d are allowed" % (len(text), limits.command_chars))
        read = list(command_text.parse(text).stages)
    if len(read) > limits.stages:
        raise Refusal("%d stages, at most %d are allowed" % (len(read), limits.stages), "use fewer pipes")
    stages: List[Stage] = []
    names: List[str] = []
    effects: List[str] = []
    reasons: List[str] = []
    granted = True
    for number, stage_text in enumerate(read, 1):
        try:
            stage, rule, effect, reason, grant = _stage(policy, stage_text, sight, context, number > 1)
        except Refusal as refused:
            rule_name = _rule_name(policy, stage_text.words)
            prefix = "stage %d: " % number if len(read) > 1 else ""
            effect = NEVER if rule_name in policy.never_by_name else OBSERVE
            if isinstance(refused, _NotInstalled):
                rule_name = NOT_INSTALLED
            return Decision(DENY, effect, rule_name, prefix + refused.reason, refused.hint)
        stages.append(stage)
        names.append(rule.name)
        effects.append(effect)
        reasons.append(reason)
        granted = granted and grant
    steps = (Step(stages=tuple(stages)),)
    if NEVER in effects:
        at = effects.index(NEVER)
        return Decision(DENY, NEVER, names[at], "%s: never allowed here: %s" % (names[at], reasons[at]))
    rule_names = " | ".join(names)
    if CHANGE in effects:
        if len(stages) > 1:
            raise Refusal("a command that changes something stands alone, without pipes", "send it as one call")
        reason = "%s: %s" % (names[0], reasons[0])
        if granted:
            return Decision(ALLOW, CHANGE, rule_names, reason + " (granted by policy)", steps=steps)
        return Decision(ASK, CHANGE, rule_names, reason + "; a person must approve it", steps=steps)
    return Decision(ALLOW, OBSERVE, rule_names, "; ".join(dict.fromkeys(reasons)), steps=steps)


def _rule_name(policy: Policy, words: Sequence[Any]) -> str:
    if words and isinstance(words[0], str):
        name = words[0].rpartition("/")[2]
        if name in policy.by_name or name in policy.never_by_name:
            return name
    return DEFAULT_DENY


def _stage(
    policy: Policy, text: command_text.StageText, sight: _Sight, context: RunContext, piped: bool
) -> Tuple[Stage, Rule, str, str, bool]:
    limits = policy.limits
    words: Sequence[str] = text.words
    if len(words) > limits.words:
        raise Refusal("%d words, at most %d are allowed" % (len(words), limits.words), "send a shorter command")
    for position, word in enumerate(words):
        if not isinstance(word, str):
            raise Refusal("word %d is %s, not text" % (position, type(word).__name__), "send every word as text")
        if len(word) > limits.word_bytes:
            raise Refusal("word %d is %d characters long, at most %d" % (position, len(word), limits.word_bytes))
        if word:
            check_characters(word, position)
    program = words[0]
    rule = _find_rule(policy, program)
    binary = _binary(rule, program, sight.host)
    if text.globs:
        words = _expand(words, text.globs, sight, limits.glob_paths)
    parsed = grammar.parse(rule.command, words[1:], rule.name)
    sight.tree = parsed.tree
    sight.trees = []
    out: List[str] = []
    reads_path, network = False, rule.network
    for item in parsed.items:
        kind = item.kind
        if kind is None:
            out.append(item.prefix)
            continue
        try:
            value = kind.check(item.value, sight)
        except Refusal as refused:
            raise Refusal("%s: %s: %s" % (rule.name, item.label, refused.reason), refused.hint) from None
        if kind.is_path:
            reads_path = True
            network = network or _NETWORK_FILE.match(value) is not None
        out.append(item.prefix + value)
    if parsed.tree and not reads_path:
        raise Refusal(
            "%s: reading whole directories needs a start directory" % rule.name, "add an absolute path such as /var/log"
        )
    argv = grammar.assemble(binary, parsed, out, _left_out(parsed, sight, rule.name))
    effect, reason = rule.effect, rule.reason
    for command in parsed.commands:
        if piped and command.first:
            raise Refusal(
                "%s may not stand behind a pipe: it would send on what it is given" % rule.name, "send it alone"
            )
        effect = command.effect or effect
        reason = command.reason or reason
    granted = effect == OBSERVE or (
        effect == CHANGE and any(_grants(grant, rule, parsed.command_names, context) for grant in policy.grants)
    )
    stage = Stage(
        binary, tuple(argv), {**policy.env, **rule.env} if rule.env else policy.env,
        rule.timeout_s if rule.timeout_s is not None else limits.timeout_s,
        rule.output_bytes if rule.output_bytes is not None else limits.output_bytes,
        text.stderr, rule.writes, network,
    )  # fmt: skip
    return stage, rule, effect, reason, granted


def _left_out(parsed: grammar.Parsed, sight: _Sight, program: str) -> List[str]:
    """The options by which a tree reader leaves out what is secret below the directories it was given."""
    names = sorted({name for tree in sight.trees for name in sight.rules.secret_names_below(tree)})
    if not names:
        return []
    beginnings = [beginning for command in parsed.commands for beginning in command.excludes]
    if not beginnings:
        raise Refusal(
            "%s: reading everything below %s would read %s" % (program, ", ".join(sight.trees), names[0]),
            "name single files",
        )
    return [beginning + name for beginning in beginnings for name in names]


def _find_rule(policy: Policy, program: str) -> Rule:
    if not program.isascii():
        raise Refusal("program name %.80r holds characters beyond ASCII" % program, "write it in ASCII")
    name = program.rpartition("/")[2]
    if "/" in program and not program.startswith("/"):
        raise Refusal("program %.120r is a relative path" % program, "send the name alone, such as %r" % name)
    rule = policy.by_name.get(name)
    if rule is None:
        never = policy.never_by_name.get(name)
        if never is not None:
            raise Refusal("%s is never allowed: %s" % (name, never.reason), never.instead)
        near = [known for known in policy.by_name if known[:2] == name[:2]] if name else []
        raise Refusal(
            "program %.80r is not in the policy" % program,
            ("similar programs that are: %s" % ", ".join(sorted(near)[:10]))
            if near else "use an observer, or one of the policy's programs",
        )  # fmt: skip
    return rule


def _binary(rule: Rule, program: str, host: HostView) -> str:
    if program.startswith("/"):
        if program not in rule.paths:
            raise Refusal(
                "%.120r is not where the policy expects %s" % (program, rule.name), "send the name %r alone" % rule.name
            )
        if host.pinned(program):
            return program
    else:
        for path in rule.paths:
            if host.pinned(path):
                return path
    raise _NotInstalled(
        "%s is not on this machine (or was replaced since the run began)" % rule.name,
        "looked for %s" % ", ".join((program,) if program.startswith("/") else rule.paths),
    )


def _expand(words: Sequence[str], globs: Sequence[int], sight: _Sight, limit: int) -> List[str]:
    """Path globs, expanded under the gate's eyes: each name is checked like one that was sent.

    Only words that begin with ``/`` are expanded, so nothing that comes out can be read as an option.
    """
    out: List[str] = []
    for position, word in enumerate(words):
        if position not in globs:
            out.append(word)
            continue
        if not word.startswith("/"):
            raise Refusal(
                "%.80r would be expanded by a shell, and there is none" % word,
                "quote it if it is a pattern for the program; globs are expanded in absolute paths only",
            )
        normal = _lexical(word)
        found = sight.host.expand(normal, limit)
        if len(found) > limit:
            raise Refusal("%.80r matches more than %d names" % (word, limit), "narrow the pattern, or use find")
        for path in found:
            if path:
                check_characters(path, position)
        # A glob asks for what may be seen: secrets among its matches are left out, as they would not be readable.
        shown = [path for path in found if path.startswith("/") and not sight.rules.secret(path)]
        if (found and not shown) or (not found and sight.rules.aims_at_secret(normal)):
            raise Refusal("what %.80r matches is secret" % word, "ask the operator")
        out.extend(shown or [normal])
    return out


def _lexical(path: str) -> str:
    try:
        return lexical(path)
    except PathRefused as refused:
        raise Refusal(refused.reason, refused.hint) from None


def _grants(grant: Grant, rule: Rule, commands: Tuple[str, ...], context: RunContext) -> bool:
    if context.untrusted or grant.rule != rule.name or context.trigger not in grant.triggers:
        return False
    if grant.commands and (not commands or commands[0] not in grant.commands):
        return False
    start, end, minute, day = grant.start_minute, grant.end_minute, context.minute, context.weekday
    if start < end:
        return day in grant.days and start <= minute < end
    # A window over midnight belongs to the day it began on.
    return (minute >= start and day in grant.days) or (minute < end and (day - 1) % 7 in grant.days)


# --- read and write ---


def _path_argument(arguments: Mapping[str, Any]) -> str:
    path = arguments.get("path")
    if not isinstance(path, str) or not path:
        raise Refusal("path must be text, got %.80r" % (path,), "send the absolute path of a file")
    check_characters(path, 0)
    return path


def _whole(arguments: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = arguments.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refusal("%s must be a whole number from %d to %d, got %.80r" % (name, low, high, value))
    return value


def _read(policy: Policy, arguments: Mapping[str, Any], host: HostView) -> Decision:
    _known(arguments, ("path", "offset", "length"))
    path = _path_argument(arguments)
    limit = policy.limits.read_bytes
    offset = _whole(arguments, "offset", 0, 0, 1 << 62)
    length = _whole(arguments, "length", min(65536, limit), 1, limit)
    sight = _Sight(policy, host)
    try:
        real = sight.readable(path, False, ())
    except Refusal as refused:
        return Decision(DENY, OBSERVE, READ, refused.reason, refused.hint)
    access = FileAccess(READ, real, sight.rules.root_of(real) or "", offset, length)
    return Decision(ALLOW, OBSERVE, READ, "reads a file under %s" % access.root, steps=(Step(file=access),))


def _write(policy: Policy, arguments: Mapping[str, Any], host: HostView) -> Decision:
    _known(arguments, ("path", "content", "mode"))
    path = _path_argument(arguments)
    content = arguments.get("content")
    if not isinstance(content, str):
        raise Refusal("content must be text, got %.80r" % (content,), "send the whole new content")
    try:
        size = len(content.encode("utf-8"))
    except UnicodeEncodeError:
        raise Refusal("content is not text that UTF-8 can hold", "send plain text") from None
    if size > policy.limits.write_bytes:
        raise Refusal("content is %d bytes, at most %d are allowed" % (size, policy.limits.write_bytes))
    mode = _whole(arguments, "mode", -1, 0, 0o777)
    if mode & 0o022 and mode >= 0:
        raise Refusal("mode %o lets others write" % mode, "use 644 or 600")
    sight = _Sight(policy, host)
    try:
        normal = lexical(path)
        real = sight.resolved(normal)
        root = sight.rules.write_root_of(real)
        secret = sight.rules.secret(real) or sight.rules.secret(normal)
    except PathRefused as refused:
        raise Refusal(refused.reason, refused.hint) from None
    if secret or root is None:
        roots = ", ".join(sight.rules.write_roots) or "none"
        return Decision(DENY, CHANGE, WRITE, "path %.200r is under no write root" % path, "write roots are %s" % roots)
    access = FileAccess(WRITE, real, root, 0, size, content, None if mode < 0 else mode)
    return Decision(
        ASK, CHANGE, WRITE, "writes %d bytes to a file under %s; a person must approve it" % (size, root),
        steps=(Step(file=access),),
    )  # fmt: skip


# --- observers ---


def _observe(policy: Policy, name: str, observer: Prober, arguments: Mapping[str, Any], host: HostView) -> Decision:
    try:
        probes = observer.probes(arguments)
    except ValueError as error:
        return Decision(DENY, OBSERVE, name, str(error), "see the tool's parameters")
    steps: List[Step] = []
    for probe in probes:
        decision = decide_probe(policy, probe, host)
        if decision.outcome == ALLOW:
            steps.extend(decision.steps)
            continue
        if decision.rule == NOT_INSTALLED:
            # Not every machine has every program; the observer says itself what it could not see.
            steps.append(Step())
            continue
        asked = probe.path or " ".join(probe.argv)
        return Decision(
            DENY, decision.effect, decision.rule, "observer %s: %.120s: %s" % (name, asked, decision.reason),
            decision.hint,
        )  # fmt: skip
    return Decision(ALLOW, OBSERVE, name, "observer %s" % name, steps=tuple(steps))


def summary(decision: Decision) -> Dict[str, Any]:
    """A decision as ``policy test`` prints it: decision, effect, rule, reason, hint, stages (argv of each)."""
    stages = [list(stage.argv) for step in decision.steps for stage in step.stages]
    return {
        "decision": decision.outcome, "effect": decision.effect, "rule": decision.rule, "reason": decision.reason,
        "hint": decision.hint, "stages": stages,
        "files": [step.file.path for step in decision.steps if step.file is not None],
    }  # fmt: skip


__all__ = [
    "ALLOW",
    "ASK",
    "DENY",
    "NO_GRANTS",
    "HostView",
    "LexicalHost",
    "ProbeLike",
    "Prober",
    "RunContext",
    "decide",
    "decide_probe",
    "summary",
]  # fmt: skip
