"""``chargehand policy``: lines in, decisions out; errors with exact positions; how the gate read each word."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.cli.policy import _batches, answer_line
from supervisor.cli.reading import read_call
from supervisor.policy.loader import default_policy
from tests.cli.conftest import Command
from tools.gate import LexicalHost
from tools.policy import Policy
from tools.values import digest

POLICY = Policy.from_json(default_policy())
SMALL = """policy: small
rules:
  df:
    reason: free space
    flags: [-h]
  systemctl:
    reason: units
    commands:
      status:
        args: ["unit*"]
      restart:
        args: [unit]
        effect: change
        reason: restarts a unit
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, "utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "decision", "status"),
    [
        (("--", "df", "-h"), "allow", 0),
        (("journalctl -u nginx | grep error",), "allow", 0),
        (("df", "-h"), "allow", 0),
        (("--", "rm", "-rf", "/"), "deny", 3),
        (("df; id",), "deny", 3),
        (("nosuchprogram",), "deny", 3),
    ],
)
def test_one_call_is_decided_and_the_exit_status_says_how(
    command: Command, words: tuple[str, ...], decision: str, status: int
) -> None:
    said = command("policy", "test", "--json", *words)
    assert (said.json["decision"], said.status) == (decision, status)
    assert set(said.json) >= {"decision", "effect", "rule", "reason", "hint", "stages"}
    text = command("policy", "test", *words)
    assert text.status == status and decision in text.out


def test_a_change_would_ask_and_says_so(command: Command, small: Path) -> None:
    said = command("policy", "test", "--policy", str(small), "--json", "--", "systemctl", "restart", "nginx")
    assert (said.json["decision"], said.json["effect"], said.status) == ("ask", "change", 3)


def test_lines_are_answered_one_by_one_and_a_malformed_one_does_not_stop_the_rest(command: Command) -> None:
    lines = [
        b'{"argv": ["df", "-h"], "id": 1}',
        b"{not json",
        b"[1, 2]",
        b'{"agrv": ["df"]}',
        b"",
        b"\xff\xfe",
        b'{"command": "rm -rf /"}',
        b'{"argv": ["df", 7]}',
        b'{"argv": ["df"], "command": "df"}',
        b'{"tool": "read", "arguments": {"path": "/etc/shadow"}}',
        b'{"argv": ["df"]}',
    ]
    said = command("policy", "test", "--stdin", "--json", stdin=b"\n".join(lines))
    assert said.status == 0
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [answer.get("decision") or answer["error"]["line"] for answer in answers] == [
        "allow", 2, 3, 4, 6, "deny", "deny", "deny", "deny", "allow",
    ]  # fmt: skip
    assert answers[0]["id"] == 1
    assert "4 lines were no calls" in said.err


def test_a_line_that_is_too_long_is_one_error_line(command: Command) -> None:
    said = command(
        "policy", "test", "--stdin", "--json", stdin=b'{"argv": ["' + b"x" * 1_100_000 + b'"]}\n{"argv": ["df"]}\n'
    )
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [next(iter(answer)) for answer in answers] == ["error", "decision"]
    assert answers[0]["error"]["line"] == 1


def test_lines_for_people_are_one_line_each_and_neutralised(command: Command) -> None:
    said = command("policy", "test", "--stdin", stdin='{"argv": ["df"]}\n{"argv": ["a\\u001b[2J\\nb"]}\n"\\u001b"\n')
    assert len(said.out.splitlines()) == 3
    assert "\x1b" not in said.out


@pytest.mark.parametrize("words", [(), ("--stdin", "df")])
def test_what_to_test_must_be_clear(command: Command, words: tuple[str, ...]) -> None:
    said = command("policy", "test", "--json", *words)
    assert said.status == 2 and said.json["error"]["next"]


@given(st.binary() | st.text().map(str.encode) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["argv", "command", "tool", "arguments", "id", "path"]), inner), max_leaves=10,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_every_line_gets_exactly_one_answer(line: bytes) -> None:
    said = answer_line(line, 1, POLICY, LexicalHost())
    assert ("error" in said) != ("decision" in said)
    json.loads(json.dumps(said))


class _Dripping(io.RawIOBase):
    """Gives its bytes in pieces of given sizes, as a pipe may."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes = data, list(sizes)

    def read1(self, _: int) -> bytes:
        size = self._sizes.pop(0) if self._sizes else len(self._data)
        piece, self._data = self._data[:size], self._data[size:]
        return piece


@given(
    st.lists(st.binary(max_size=8).filter(lambda line: b"\n" not in line), max_size=12),
    st.lists(st.integers(1, 9), max_size=30),
)
def test_lines_are_the_same_however_they_arrive(lines: list[bytes], sizes: list[int]) -> None:
    wanted = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    got = [item for batch in _batches(_Dripping(b"\n".join(lines), sizes)) for item in batch]  # type: ignore[arg-type]
    assert got == wanted


def test_an_answer_comes_before_the_next_line_is_sent() -> None:
    program = [sys.executable, "-m", "supervisor.cli.main", "policy", "test", "--stdin", "--json"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        for words, decision in ((["df"], "allow"), (["rm"], "deny")):
            child.stdin.write(json.dumps({"argv": words}) + "\n")
            child.stdin.flush()
            assert json.loads(child.stdout.readline())["decision"] == decision
        child.stdin.close()
        assert child.wait(10) == 0


@pytest.mark.slow
def test_at_least_5000_decisions_a_second_end_to_end() -> None:
    calls = [{"argv": ["df", "-h"]}, {"command": "journalctl -u nginx | grep error"}, {"argv": ["rm", "-rf", "/"]}]
    lines = "".join(json.dumps(calls[number % 3]) + "\n" for number in range(30_000))
    program = [sys.executable, "-m", "supervisor.cli.main", "policy", "test", "--stdin", "--json"]
    began = time.monotonic()
    done = subprocess.run(program, input=lines, capture_output=True, text=True, check=True)
    took = time.monotonic() - began
    assert len(done.stdout.splitlines()) == 30_000
    assert 30_000 / took >= 5000, f"{30_000 / took:.0f} decisions/s"


# --- show, check ---


def test_show_tells_rules_by_effect_with_reasons_and_the_digest(command: Command, small: Path) -> None:
    shown = command("policy", "show", "--policy", str(small))
    assert shown.status == 0
    assert "OBSERVE" in shown.out and "CHANGE" in shown.out and "restart" in shown.out and "free space" in shown.out
    document = command("policy", "show", "--policy", str(small), "--json").json
    assert document["digest"] == digest(document["policy"])
    assert document["digest"] in shown.out


def test_the_default_is_the_shipped_pack_and_one_program_can_be_looked_up(command: Command) -> None:
    assert command("policy", "show", "--json").json["digest"] == digest(default_policy())
    text = command("policy", "show", "systemctl").out
    assert "--no-pager" in text and "not restart" in text
    assert command("policy", "show", "systemctl", "--json").json["rule"]["name"] == "systemctl"
    assert "never" in command("policy", "show", "rm").out
    unknown = command("policy", "show", "nosuch", "--json")
    assert unknown.status == 2


def test_a_machine_label_decides_which_layers_count(command: Command, small: Path, tmp_path: Path) -> None:
    layer = tmp_path / "db.yaml"
    layer.write_text("policy: db\nlayer: label\napplies_to: {role: db}\ndrop: [rules.df]\n", "utf-8")
    both = ("--policy", str(small), "--policy", str(layer), "--json", "--", "df")
    assert command("policy", "test", *both).json["decision"] == "allow"
    assert command("policy", "test", "--label", "role=db", *both).json["decision"] == "deny"
    checked = command("policy", "check", str(small), str(layer), "--json")
    assert checked.status == 0
    assert [file["rules"] for file in checked.json["files"]] == [2, 1]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("policy: p\nrules:\n  df:\n    reason: x\n    flgas: [-h]\n", ":5:5"),
        ("policy: p\nrulse: {}\n", ":2:1"),
        ("policy: p\nrules:\n  df: {reason: x, options: {--size: nosuchkind}}\n", ":3:"),
        ("policy: [\n", ":2:1"),
        ("", ":1:1"),
        ("policy: p\nextends: nosuch\n", ":2:10"),
    ],
)
def test_a_wrong_policy_file_is_told_with_its_exact_place(
    command: Command, tmp_path: Path, text: str, place: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, "utf-8")
    said = command("policy", "check", str(path), "--json")
    assert said.status == 2 and not said.json["ok"]
    assert said.json["problems"][0]["where"].startswith(f"{path}{place}")
    assert f"{path}{place}" in command("policy", "check", str(path)).err
    used = command("policy", "test", "--policy", str(path), "--json", "--", "df")
    assert used.status == 2 and used.json["error"]["tried"].startswith(f"{path}{place}")


def test_every_wrong_file_is_told_and_one_that_is_not_there_as_well(
    command: Command, small: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("rules: {}\n", "utf-8")
    said = command("policy", "check", str(small), str(wrong), str(tmp_path / "none.yaml"), "--json")
    assert said.status == 2
    assert [file["ok"] for file in said.json["files"]] == [True, False, False]
    assert len(said.json["problems"]) == 2


# --- explain ---


def test_explain_tells_each_word_apart(command: Command) -> None:
    said = command("policy", "explain", "--json", "--", "journalctl", "-u", "nginx", "-n5", "--since", "yesterday")
    assert said.status == 0
    (stage,) = said.json["reading"]
    assert [word["role"] for word in stage["words"]] == [
        "program", "option", "value of -u", "option -n and its value", "option", "value of --since",
    ]  # fmt: skip
    assert stage["words"][2]["kind"] == "unit"
    assert "--no-pager" in stage["added"]
    assert said.json["decision"] == "allow"


@pytest.mark.parametrize(
    ("words", "wrong", "why"),
    [
        (["journalctl", "--vacuum-size=1"], "--vacuum-size=1", "deletes"),
        (["cat", "/etc/shadow"], "/etc/shadow", "secret"),
        (["systemctl", "restart", "nginx"], "restart", "changes the unit"),
        (["/tmp/df"], "/tmp/df", "not where"),
        (["bash", "-c", "id"], "bash", "never"),
        (["nosuch"], "nosuch", "not in the policy"),
    ],
)
def test_explain_points_at_the_word_that_is_refused(command: Command, words: list[str], wrong: str, why: str) -> None:
    said = command("policy", "explain", "--json", "--", *words)
    (problem,) = [word for word in said.json["reading"][0]["words"] if word["problem"]]
    assert problem["text"] == wrong and why in problem["problem"]
    assert said.json["decision"] == "deny"
    assert wrong in command("policy", "explain", "--", *words).out


def test_explain_reads_a_pipeline_stage_by_stage_and_a_text_that_cannot_be_read(command: Command) -> None:
    assert len(command("policy", "explain", "--json", "ps aux | sort -k3 | head -5").json["reading"]) == 3
    unreadable = command("policy", "explain", "--json", "df; id").json
    assert "second command" in unreadable["reading"][0]["words"][0]["problem"]


@given(st.lists(st.sampled_from(["df", "-h", "--help", "journalctl", "-u", "ssh", "--", "-n5", "find", "/etc", "-name", "*", "", "ip", "a"])
                | st.text(max_size=6), min_size=1, max_size=6))  # fmt: skip
def test_explain_shows_every_word_once_and_never_fails(words: list[str]) -> None:
    (stage,) = read_call(POLICY, {"argv": words}, LexicalHost())
    assert [word.text for word in stage.words] == words
