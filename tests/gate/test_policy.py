"""The policy as a document: normal form, digest, errors with positions, packs and layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.policy.loader import BadPolicy, PolicySource, compile_policy, default_policy, load, pack, pack_names
from tests.gate.policies import ask, observe_core
from tools.catalogue import catalogue
from tools.kinds import BUILT_IN, BadKind, Kind, Refusal, parse_kind
from tools.observers.registry import OBSERVERS
from tools.policy import Policy, PolicyError
from tools.values import digest

SMALL = """
policy: small
limits: {timeout_s: 20}
sets:
  units: [nginx.service, app.service]
read_roots: [/var/log, /etc]
rules:
  df:
    reason: disk space
    flags: [-h --human-readable, -i]
  systemctl:
    reason: units
    commands:
      "status": ["unit*"]
      "restart": {args: [unit(units)], effect: change}
"""


def test_the_normal_form_is_its_own_normal_form_and_has_one_digest() -> None:
    document = default_policy()
    policy = Policy.from_json(document)
    assert policy.to_json() == document
    assert policy.digest == digest(document) == Policy.from_json(json.loads(json.dumps(document))).digest


def test_the_default_has_sixty_programs_each_with_a_reason_and_at_least_one_standard_path() -> None:
    assert len(observe_core().rules) >= 60
    for rule in observe_core().rules:
        assert rule.reason and rule.effect == "observe"
        assert any(path.startswith(("/usr/bin/", "/usr/sbin/")) for path in rule.paths)


def test_no_rule_of_the_default_changes_anything() -> None:
    def effects(command: Any) -> list[str | None]:
        return [command.effect, *(effect for inner in command.commands for effect in effects(inner))]

    assert {effect for rule in observe_core().rules for effect in effects(rule.command)} == {None}
    assert observe_core().write_roots == () and observe_core().grants == ()


def test_every_pack_compiles() -> None:
    assert "change-services" in pack_names()
    for name in pack_names():
        compile_policy([pack(name)])


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    document: Any = copy.deepcopy(compile_policy([load(SMALL)]))
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("format",), 2, "format"),
        (("rules", 0, "paths"), [], "rules[0].paths"),
        (("rules", 0, "paths", 0), "df", "rules[0].paths[0]"),
        (("rules", 0, "paths", 0), "/usr/../df", "rules[0].paths[0]"),
        (("rules", 0, "reason"), "", "rules[0].reason"),
        (("rules", 0, "timeot_s"), 5, "rules[0].timeot_s"),
        (("rules", 0, "timeout_s"), -1, "rules[0].timeout_s"),
        (("rules", 0, "timeout_s"), True, "rules[0].timeout_s"),
        (("rules", 0, "timeout_s"), float("nan"), "rules[0].timeout_s"),
        (("rules", 0, "command", "options", 0, "names"), [], "rules[0].command.options[0].names"),
        (("rules", 0, "command", "options", 0, "names", 0), "-x y", "rules[0].command.options[0].names[0]"),
        (("rules", 0, "command", "options", 0, "takes"), "value", "rules[0].command.options[0].kind"),
        (("rules", 0, "command", "options", 1, "names", 0), "-h", "rules[0].command.options[1]"),
        (("rules", 0, "command", "style"), "dos", "rules[0].command.style"),
        (("rules", 0, "command", "require"), [["-z"]], "rules[0].command.require[0]"),
        (("rules", 1, "command", "commands", 0, "positionals", 0, "kind"), "unix", "rules[1].command.commands[0].positionals[0].kind"),
        (("rules", 1, "command", "commands", 1, "positionals", 0, "kind"), "unit(none)", "rules[1].command.commands[1].positionals[0].kind"),
        (("limits", "words"), 0, "limits.words"),
        (("limits", "wrods"), 5, "limits.wrods"),
        (("sets", "units"), [1], "sets.units[0]"),
        (("read_roots", 0), "etc", "read_roots[0]"),
        (("name",), "../x", "name"),
        (("rules", 1, "name"), "df", "rules[1].name"),
        (("rules", 1, "effect"), "maybe", "rules[1].effect"),
    ],
)  # fmt: skip
def test_an_error_names_its_position(path: tuple[Any, ...], value: Any, where: str) -> None:
    with pytest.raises(PolicyError) as error:
        Policy.from_json(changed(path, value))
    assert str(error.value).startswith(where + ":")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
        lambda x: (
            st.lists(x, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["format", "name", "version", "rules", "limits", "sets", "shapes", "command", "paths", "options"]
                ),
                x,
                max_size=5,
            )
        ),
        max_leaves=16,
    )
)
def test_any_document_is_a_policy_or_a_policy_error(document: Any) -> None:
    try:
        policy = Policy.from_json(document)
    except PolicyError as error:
        assert str(error)
    else:
        assert Policy.from_json(policy.to_json()) == policy


# --- kinds ---


class Blind:
    tree = False

    def member(self, set_name: str, value: str) -> bool:
        return False

    def readable(self, path: str, tree: bool, roots: tuple[str, ...]) -> str:
        return path

    def listable(self, path: str) -> str:
        return path


def fits(kind: str, value: str) -> bool:
    try:
        parse_kind(kind).check(value, Blind())
    except Refusal:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("unit", ["nginx", "nginx.service", "user@1000.service", r"dev-disk-by\x2dlabel.swap", "*.timer"], ["-x", "a/b", "a b", "", "a;b", "a\n"]),
        ("int(0,20)", ["0", "20"], ["21", "-1", "+1", "01", "1.0", "", " 1", "1\n", "１", "1e1"]),
        ("int(-9,9)", ["-9", "9"], ["-10", "--1", "-0x1"]),
        ("number(0.2,5)", ["0.2", "5", "1.25"], ["0.1", "5.1", "1e0", ".5", "nan", "inf", "-1"]),
        ("enum(a,b)", ["a"], ["c", "", "a,b", "A"]),
        ("csv(a,b)", ["a", "a,b"], ["a,c", "a,", ""]),
        ("columns(pid,comm)", ["pid,comm", "pid=,comm:20", "-pid"], ["pid,e", "pid=x", ""]),
        ("host", ["example.com", "10.0.0.1", "::1", "fe80::1%eth0", "a_b.c."], ["-x", "a b", "a/b", "user@h", "h:22", "", "a..b", "x" * 300]),
        ("interface", ["eth0", "br-1.100", "veth0@if3"], ["-e", "e" * 16, "a b", "", "a/b"]),
        ("timestamp", ["now", "yesterday", "1 hour ago", "-2h", "2025-01-31", "2025-01-31 10:00:00", "09:30", "@1700000000", "2025-01-31T10:00:00Z", "10 min ago"], ["", "soon", "-f", "now;id", "2025-1-1", "--x"]),
        ("duration", ["5s", "10min", "1h 30min", "90"], ["", "5 parsecs", "-5s"]),
        ("pid", ["1", "4194304"], ["0", "-1", "4194305", "1 2"]),
        ("word", ["a", "a.b:c+d-e_f"], ["-a", "a b", "a/b", "", "a=b", "@a", "a" * 129]),
        ("size", ["0", "10", "64K", "1GiB", "K"], ["-1", "1X", "", "1 K"]),
        ("user", ["root", "www-data", "1000"], ["-u", "a b", ""]),
        ("device", ["/dev/sda", "/dev/nvme0n1p1", "/dev/mapper/vg-lv", "/dev/vg0/root", "/dev/disk/by-id/x"], ["/dev/mem", "/dev/tty1", "/dev/../etc/shadow", "/dev/fd/3", "/dev/pts/1", "/dev/shm/x", "sda", "/dev/kmsg"]),
        ("unit|pid", ["nginx", "17"], ["-1", "a b"]),
        ("pattern", ["any (thing)", "-x", ""], ["x" * 1025]),
    ],
)  # fmt: skip
def test_a_kind_accepts_its_texts_and_no_others(kind: str, good: list[str], bad: list[str]) -> None:
    assert [value for value in good if not fits(kind, value)] == []
    assert [value for value in bad if fits(kind, value)] == []


@given(
    st.sampled_from(
        [
            k
            for k in BUILT_IN
            if k not in ("int", "number", "enum", "csv", "columns", "pattern", "format", "path", "entry")
        ]
    ),
    st.text(max_size=20),
)
def test_no_plain_kind_accepts_control_characters_or_a_foreign_alphabet(kind: str, value: str) -> None:
    if fits(kind, value):
        assert value.isascii() and value.isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nosuch",
        "int",
        "int(1)",
        "int(5,1)",
        "int(a,b)",
        "enum()",
        "word(a,b)",
        "unit(",
        "enum(a,)",
        "path(etc)",
        "pid(1)",
        "|",
        "unit|",
    ],
)
def test_a_kind_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(BadKind):
        parse_kind(text)
    assert isinstance(parse_kind("unit|int(0,5)"), Kind)


# --- YAML ---


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("", "<text>:1:1", "empty"),
        ("- a", "<text>:1:1", "mapping"),
        ("policy: x\nrulez: {}\n", "<text>:2:1", "rulez"),
        ("policy: x\nrules:\n  df: {reason: a, flags: [-h]}\n  df: {reason: b}\n", "<text>:4:3", "stands twice"),
        ("policy: x\nrules:\n  df:\n    reason: a\n    flagz: []\n", "<text>:5:5", "flagz"),
        ("policy: x\nrules:\n  df:\n    reason: a\n    options: {-x: nosuch}\n", "<text>:5:19", "nosuch"),
        ("policy: x\nrules:\n  df:\n    reason: a\n    args: [path, unix]\n", "<text>:5:18", "unix"),
        ("policy: x\nrules:\n  df:\n    flags: [-h]\n", "<text>:4:5", "reason"),
        ("policy: x\na: &b {}\n", "<text>:2:4", "anchors"),
        ("policy: [x\n", "<text>:2:1", "YAML"),
        ("policy: x\nextends: nosuch\n", "<text>:2:10", "nosuch"),
        ("policy: !!python/object:os.system x\n", "<text>:1:9", "expected"),
        ("policy: x\nlimits: {timeout_s: -5}\n", "<text>:2:21", "seconds"),
        ("policy: x\nlayer: village\n", "<text>:2:8", "fleet"),
        ("policy: x\nrules:\n  df:\n    reason: a\n    require: [[-z]]\n", "<text>:5:15", "-z"),
    ],
)
def test_an_error_in_yaml_names_line_and_column(text: str, where: str, says: str) -> None:
    with pytest.raises(BadPolicy) as error:
        compile_policy([load(text)])
    assert error.value.where == where and says in str(error.value)


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text("policy: x\nnope: 1\n")
    with pytest.raises(BadPolicy, match=r"web\.yaml:2:1"):
        load(tmp_path / "web.yaml")
    (tmp_path / "web.yaml").write_bytes(b"policy: \xff")
    with pytest.raises(BadPolicy, match="UTF-8"):
        load(tmp_path / "web.yaml")


@given(st.text(max_size=80))
def test_any_text_is_a_policy_or_a_clear_error(text: str) -> None:
    try:
        compile_policy([load(text)])
    except BadPolicy as error:
        assert error.where and error.problem


def test_a_policy_that_extends_itself_is_refused() -> None:
    sources = {"a": load("policy: a\nextends: b\n"), "b": load("policy: b\nextends: a\n")}
    with pytest.raises(BadPolicy, match="extends itself"):
        compile_policy([sources["a"]], find=lambda name: sources[name])


def test_a_pack_adds_sub_commands_to_the_one_it_extends() -> None:
    source = load(
        "policy: x\nextends: observe-core\nrules:\n  apt:\n    commands:\n      moo: []\n  tool:\n    reason: ours\n    paths: [/opt/tool]\n"
    )
    policy = Policy.from_json(compile_policy([source]))
    assert ask("apt", "moo", policy=policy).outcome == ask("apt", "list", policy=policy).outcome == "allow"
    assert ask("tool", policy=policy).steps[0].stages[0].binary == "/opt/tool"


# --- layers ---


def layered(*layers: str, labels: dict[str, str] | None = None, base: str = SMALL) -> Policy:
    return Policy.from_json(compile_policy([load(base), *(load(layer) for layer in layers)], labels))


def test_a_layer_for_other_labels_does_not_count() -> None:
    layer = "policy: web\nlayer: label\napplies_to: {role: web}\ndrop: [rules.df]\n"
    assert "df" in layered(layer, labels={"role": "db"}).by_name
    assert "df" not in layered(layer, labels={"role": "web"}).by_name


def test_a_layer_may_narrow_everything() -> None:
    policy = layered(
        "policy: m\nlayer: machine\ndrop: [rules.df.-i, read_roots./etc, rules.systemctl.restart]\n"
        "limits: {timeout_s: 5}\nsecret_roots: [/var/log/private]\nsets: {units: [app.service]}\n"
        "rules: {df: {timeout_s: 3, effect: change}}\n"
    )
    assert ask("df", "-i", policy=policy).outcome == "deny"
    assert ask("df", "-h", policy=policy).outcome == "ask"
    assert policy.read_roots == ("/var/log",) and policy.limits.timeout_s == 5
    assert ask("systemctl", "restart", "app", policy=policy).outcome == "deny"
    assert policy.sets["units"] == ("app.service",) and policy.secret_roots == ("/var/log/private",)


@pytest.mark.parametrize(
    "layer",
    [
        "limits: {timeout_s: 60}",
        "limits: {nosuch: 1}",
        "sets: {units: [sshd.service]}",
        "sets: {others: [a]}",
        "read_roots: [/root]",
        "write_roots: [/etc]",
        "env: {LD_PRELOAD: /x}",
        "rules: {bash: {reason: x}}",
        "rules: {df: {options: {-x: word}}}",
        "rules: {df: {timeout_s: 3000}}",
        "rules: {systemctl: {effect: observe, paths: [/tmp/x]}}",
        "extends: observe-core",
        "drop: [rules.nosuch]",
        "drop: [secret_roots./root]",
        "drop: [limits]",
        "grants: [{name: a, rule: systemctl, triggers: [alert]}]",
        "shapes: {a: {words: a, regex: .*}}",
        "kernel_files: [/proc/kcore]",
    ],
)
def test_a_layer_may_not_widen_anything_that_is_not_opened(layer: str) -> None:
    with pytest.raises(BadPolicy):
        layered(f"policy: m\nlayer: machine\n{layer}\n")


def test_a_layer_may_not_weaken_an_effect() -> None:
    base = SMALL.replace("reason: disk space", "reason: disk space\n    effect: change")
    with pytest.raises(BadPolicy, match="only be raised"):
        layered("policy: m\nlayer: machine\nrules: {df: {effect: observe}}\n", base=base)


def test_what_is_opened_may_be_widened_and_only_that() -> None:
    base = SMALL + "open: [sets.units, rules.free, read_roots]\n"
    policy = layered(
        "policy: m\nlayer: machine\nsets: {units: [sshd.service]}\nrules: {free: {reason: memory, flags: [-m]}}\n"
        "read_roots: [/opt]\n",
        base=base,
    )
    assert policy.sets["units"] == ("sshd.service",)
    assert ask("free", "-m", policy=policy).outcome == "allow"
    assert policy.read_roots == ("/var/log", "/etc", "/opt")
    with pytest.raises(BadPolicy):
        layered("policy: m\nlayer: machine\nrules: {top: {reason: x}}\n", base=base)


def test_what_is_locked_may_not_even_be_narrowed() -> None:
    base = SMALL + "locked: [rules.df, limits]\n"
    for layer in ("drop: [rules.df]", "drop: [rules.df.-i]", "limits: {timeout_s: 1}", "rules: {df: {timeout_s: 1}}"):
        with pytest.raises(BadPolicy, match="locked"):
            layered(f"policy: m\nlayer: machine\n{layer}\n", base=base)


def test_a_middle_layer_cannot_open_what_the_top_did_not() -> None:
    middle = "policy: l\nlayer: label\nopen: [rules]\n"
    with pytest.raises(BadPolicy):
        layered(middle, "policy: m\nlayer: machine\nrules: {free: {reason: x}}\n")


def test_layers_are_ordered_whatever_the_order_of_the_files() -> None:
    sources: list[PolicySource] = [
        load("policy: m\nlayer: machine\nlimits: {timeout_s: 3}\n"),
        load("policy: l\nlayer: label\nlimits: {timeout_s: 10}\n"),
        load(SMALL),
    ]
    assert Policy.from_json(compile_policy(sources)).limits.timeout_s == 3


def test_never_in_a_layer_takes_the_rule_away() -> None:
    policy = layered("policy: m\nlayer: machine\nnever: [{names: df, reason: not here}]\n")
    assert ask("df", policy=policy).effect == "never"


# --- catalogue ---


def test_the_catalogue_offers_observers_and_the_three_tools_with_object_schemas() -> None:
    tools = catalogue(observe_core(), OBSERVERS)
    names = [tool.name for tool in tools]
    assert names[-2:] == ["read", "exec"] and set(OBSERVERS) <= set(names) and len(names) == len(set(names))
    assert all(tool.parameters["type"] == "object" and tool.description for tool in tools)
    json.dumps([tool.to_json() for tool in tools])


def test_write_is_offered_only_where_something_may_be_written() -> None:
    writable = Policy.from_json({**default_policy(), "write_roots": ["/etc/nginx"]})
    assert "write" in [tool.name for tool in catalogue(writable, {})]
