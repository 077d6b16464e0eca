"""How words are read, against getopt itself where there is one."""

from __future__ import annotations

import getopt
import os
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gate.policies import argv_of, ask, observe_core
from tools import grammar
from tools.kinds import Refusal, parse_kind
from tools.policy import GNU, NEXT, NONE, PFLAG, POSIX, VALUE, Command, Option, Positional, Rule

WORD = parse_kind("pattern")
TABLE = Command(
    style=GNU,
    options=(
        Option(("-a", "--all")),
        Option(("-v", "--verbose")),
        Option(("-n", "--lines"), VALUE, WORD),
        Option(("-o", "--output"), VALUE, WORD),
        Option(("-c", "--color"), "joined", WORD),
    ),
    positionals=(Positional(WORD, 0, 64),),
)


def reading(command: Command, words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """(option, value) pairs and positionals, in the form getopt gives them."""
    parsed = grammar.parse(command, words, "x")
    options: list[tuple[str, str]] = []
    positionals: list[str] = []
    for item in parsed.items:
        if item.label.startswith("-"):
            options.append((item.label, item.value))
        elif item.kind is not None:
            positionals.append(item.value)
    return options, positionals


atoms = st.sampled_from(
    ["-a", "-v", "-av", "-va", "--all", "--verbose", "-n", "-n5", "-an5", "-n=5", "--lines", "--lines=5", "--lines=",
     "-o", "-ofile", "--output=x", "-avo", "--", "x", "y", "-", "5"
     ]
)  # fmt: skip


@given(st.lists(atoms, max_size=8))
def test_options_and_positionals_are_those_that_gnu_getopt_finds(words: list[str]) -> None:
    expected: tuple[list[tuple[str, str]], list[str]] | None
    try:
        options, rest = getopt.gnu_getopt(words, "avn:o:", ["all", "verbose", "lines=", "output="])
        expected = ([(o, v) for o, v in options if o in ("-n", "-o", "--lines", "--output")], rest)
    except getopt.GetoptError:
        expected = None
    try:
        found = reading(TABLE, words)
    except Refusal:
        assert expected is None
        return
    assert expected is not None
    assert found == expected


@given(st.lists(st.text(max_size=12), max_size=8))
def test_the_words_that_come_out_are_the_words_that_went_in(words: list[str]) -> None:
    try:
        parsed = grammar.parse(TABLE, words, "x")
    except Refusal:
        return
    assert [item.prefix + item.value for item in parsed.items] == words


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=10))
def test_no_unknown_or_abbreviated_long_option_passes(name: str) -> None:
    known = {"all", "verbose", "lines", "output", "color"}
    if name in known or not name.strip("-"):
        return
    with pytest.raises(Refusal):
        grammar.parse(TABLE, [f"--{name}"], "x")


def test_a_value_that_looks_like_an_option_is_still_the_value() -> None:
    assert reading(TABLE, ["-n", "--all", "x"]) == ([("-n", "--all")], ["x"])
    assert reading(TABLE, ["-n", "--", "--", "-v"]) == ([("-n", "--")], ["-v"])


def test_posix_options_end_at_the_first_positional() -> None:
    command = Command(style=POSIX, options=TABLE.options, positionals=TABLE.positionals)
    assert reading(command, ["x", "-a"]) == ([], ["x", "-a"])


def test_an_optional_value_takes_the_next_word_only_if_it_fits() -> None:
    command = Command(options=(Option(("-b",), NEXT, parse_kind("int(-9,9)")),), positionals=(Positional(WORD, 0, 9),))
    assert reading(command, ["-b", "-1"]) == ([("-b", "-1")], [])
    assert reading(command, ["-b", "x"]) == ([], ["x"])


def test_a_sub_commands_option_has_that_sub_commands_kind() -> None:
    command = Command(
        style=PFLAG,
        commands=(
            Command(("one",), options=(Option(("--f",), VALUE, parse_kind("enum(a)")),)),
            Command(("two",), options=(Option(("--f",), VALUE, parse_kind("enum(b)")),)),
        ),
    )
    for words, kind in ((["one", "--f", "a"], "enum(a)"), (["--f=b", "two"], "enum(b)")):
        kinds = [item.kind.text for item in grammar.parse(command, words, "x").items if item.kind]
        assert kinds == [kind]


def test_an_option_of_one_sub_command_is_refused_for_another() -> None:
    assert "does not belong" in ask("podman", "version", "--tail", "5").reason


def test_an_outer_option_does_not_count_for_the_inner_command() -> None:
    command = Command(
        style=POSIX,
        options=(Option(("-x",)),),
        commands=(Command(("go",), options=(Option(("-x",)),), require=(("-x",),)),),
    )
    grammar.parse(command, ["go", "-x"], "p")
    with pytest.raises(Refusal):
        grammar.parse(command, ["-x", "go"], "p")


def test_an_interval_without_a_count_is_refused() -> None:
    assert ask("vmstat").outcome == ask("vmstat", "1", "5").outcome == "allow"
    assert ask("vmstat", "1").outcome == "deny"


def test_joined_ps_letters_that_would_show_environments_are_refused() -> None:
    assert ask("ps", "-aux").outcome == ask("ps", "-u", "www-data").outcome == "allow"
    assert ask("ps", "-auxe").outcome == ask("ps", "-uwww-data").outcome == "deny"


def test_what_is_always_added_stands_where_the_rule_says() -> None:
    assert argv_of(ask("top", "-bn1"))[1:] == ["-bn1"]
    assert argv_of(ask("podman", "inspect", "web"))[1:3] == ["inspect", "--type=container"]


def test_a_simulation_of_apt_cannot_be_talked_out_of_simulating() -> None:
    argv = argv_of(ask("apt-get", "install", "-s", "no", "nginx"))
    assert argv[-1] == "--simulate"
    argv = argv_of(ask("apt-get", "-s", "install", "--", "nginx", "no"))
    assert argv[argv.index("--") - 1] == "--simulate"


# --- the policy's claims about real binaries ---

_NO_SUCH = "--zzz-no-such-option"
_REFUSAL = f"unrecognized option '{_NO_SUCH}'"
# These end (or fail) as soon as they are read, so the word after them is never looked at.
_ENDS_EARLY = {
    ("id", "-Z"), ("id", "--context"), ("ss", "-Z"), ("ss", "-z"), ("ss", "--context"), ("ss", "--contexts"),
    ("swapon", "-s"), ("swapon", "--summary"), ("systemd-detect-virt", "--list"), ("uptime", "-s"), ("uptime", "--since"),
    ("vmstat", "-f"), ("vmstat", "--forks"),
}  # fmt: skip
_UNKNOWN = ("unrecognized option", "unknown option", "Unknown option", "invalid option")


def _said(*argv: str) -> str:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/nonexistent"}
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, env=environment, cwd="/", check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    return (done.stderr + done.stdout).decode("utf-8", "replace")


def _real(rule: Rule) -> str | None:
    """The rule's binary on this machine if it reads its words with getopt_long and says so."""
    binary = next((path for path in rule.paths if os.access(path, os.X_OK)), None)
    if binary is None or rule.command.style not in (GNU, POSIX):
        return None
    said = _said(binary, _NO_SUCH)
    return binary if _REFUSAL in said else None


def _mismatches(rule: Rule, binary: str) -> list[str]:
    found = []
    for name, option in rule.command.table.items():
        single_long = len(name) > 2 and not name.startswith("--")
        if name in ("-h", "--help", "-V", "--version", "-#") or not name.startswith("-") or single_long:
            continue
        if (rule.name, name) in _ENDS_EARLY or option.takes == NEXT:
            continue
        said = _said(binary, name, _NO_SUCH)
        if any(f"{words} '{name}'" in said or f"{words} -- '{name[1:]}'" in said for words in _UNKNOWN):
            continue  # an option of another version of the program
        swallows = _REFUSAL not in said
        claims = option.takes not in (NONE, "joined")
        if swallows != claims:
            found.append(f"{rule.name} {name}: policy says {option.takes}, binary swallows the next word: {swallows}")
        if (
            option.takes == NONE
            and name.startswith("--")
            and "doesn't allow an argument" not in _said(binary, f"{name}=zzz")
        ):
            found.append(f"{rule.name} {name}: policy says it takes no value, the binary takes one")
    return found


def test_options_take_values_as_the_programs_on_this_machine_do() -> None:
    # A few small, quick programs here; every program of the machine in the slow twin below.
    for name in ("df", "ls", "tail", "sort", "date"):
        rule = observe_core().by_name[name]
        binary = _real(rule)
        if binary is not None:
            assert _mismatches(rule, binary) == []


@pytest.mark.slow
def test_options_take_values_as_every_program_on_this_machine_does() -> None:
    checked: list[str] = []
    wrong: list[str] = []
    for rule in observe_core().rules:
        binary = _real(rule)
        if binary is not None:
            checked.append(rule.name)
            wrong += _mismatches(rule, binary)
    assert wrong == []
    if os.path.exists("/usr/bin/sort"):
        assert len(checked) >= 20


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=20),
        lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
        max_leaves=12,
    )
)
def test_whatever_is_sent_as_arguments_gives_a_decision(arguments: Any) -> None:
    from tools.gate import LexicalHost, decide
    from tools.values import ToolCall

    for tool in ("exec", "read", "write", "no such tool"):
        assert decide(observe_core(), ToolCall("c1", tool, arguments), LexicalHost()).outcome == "deny"
    for name in ("argv", "command"):
        decide(observe_core(), ToolCall("c1", "exec", {name: arguments}), LexicalHost())


programs = st.sampled_from(sorted(observe_core().by_name))
pieces = st.one_of(
    st.text(max_size=16),
    st.sampled_from(
        ["--", "-", "/etc/shadow", "/var/log/syslog", "-n", "-f", "show", "status", "list", "5", "--all", "-o"]
    ),
)


@given(programs, st.lists(pieces, max_size=6))
def test_nothing_allowed_holds_a_secret_path_or_a_word_that_was_not_asked_for_or_always_added(
    program: str, words: list[str]
) -> None:
    decision = ask(program, *words)
    if decision.outcome != "allow":
        return
    rule = observe_core().by_name[program]
    for stage in decision.steps[0].stages:
        assert stage.binary in rule.paths and stage.argv[0] == stage.binary
        assert not any(word in ("/etc/shadow", "-f=/etc/shadow") for word in stage.argv[1:]) or program in _NAMES_ONLY
        assert all(word.isprintable() for word in stage.argv)


# Programs that take free text and read no file by it.
_NAMES_ONLY = {"grep", "egrep", "fgrep", "tr", "pgrep", "apt", "apt-cache", "nstat"}
