"""The strict reader reads what it accepts as a POSIX shell does."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.command_text import parse
from tools.kinds import Refusal


def words(text: str) -> list[list[str]]:
    return [list(stage.words) for stage in parse(text).stages]


@given(
    st.lists(
        st.text(alphabet=st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12),
        min_size=1,
        max_size=6,
    )
)
def test_a_quoted_command_comes_back_as_it_was(argv: list[str]) -> None:
    assert words(shlex.join(argv)) == [argv]


@given(st.text(alphabet="ab -'\"\\|;&<>$`(){}*?[]~#=!\n\t12/", max_size=24))
def test_whatever_is_accepted_a_shell_splits_the_same_way(text: str) -> None:
    try:
        found = parse(text)
    except Refusal:
        return
    assert not any(c in text for c in "\n") or "'" in text or '"' in text
    if any(stage.stderr != "keep" for stage in found.stages):
        return
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|")
    lexer.whitespace_split = True
    lexer.commenters = ""
    expected: list[list[str]] = [[]]
    # shlex does not tell a quoted bar from a bare one; the reader is compared where the question does not arise.
    if any("|" in word for stage in found.stages for word in stage.words):
        return
    # It drops the backslash before any character in double quotes only where a shell does; so do we.
    for token in lexer:
        if token == "|":
            expected.append([])
        else:
            expected[-1].append(token)
    if "\\" not in text:
        assert [list(stage.words) for stage in found.stages] == expected


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    try:
        found = parse(text)
    except Refusal as refused:
        assert refused.reason
    else:
        assert found.stages and all(stage.words and stage.words[0] for stage in found.stages)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("df -h", [["df", "-h"]]),
        ("  df\t-h  ", [["df", "-h"]]),
        ("grep 'a b' x", [["grep", "a b", "x"]]),
        ('grep "a \\"b\\" c" x', [["grep", 'a "b" c', "x"]]),
        (r'grep "\d+" x', [["grep", r"\d+", "x"]]),
        (r"find / \( -name x \)", [["find", "/", "(", "-name", "x", ")"]]),
        ("a|b | c", [["a"], ["b"], ["c"]]),
        ("grep 'a|b;c>d$e`f' x", [["grep", "a|b;c>d$e`f", "x"]]),
        ("date +%s", [["date", "+%s"]]),
        ("grep ''", [["grep", ""]]),
        ("a'b'\"c\"d", [["abcd"]]),
        ("grep a#b x", [["grep", "a#b", "x"]]),
    ],
)
def test_words_quotes_and_pipes_are_read(text: str, expected: list[list[str]]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("df; id", "call of its own"),
        ("df && id", "call of its own"),
        ("df > x", "output is kept"),
        ("cat < x", "as an argument"),
        ("ls $HOME", "single quotes"),
        ("ls `id`", "call of its own"),
        ("ls ~", "absolute path"),
        ("ls {a,b}", "each word"),
        ("A=1 df", "environment is fixed"),
        ("df |& cat", "2>&1"),
        ("df # x", "comment"),
        ("df\nid", "call of its own"),
    ],
)
def test_a_refusal_says_what_to_send_instead(text: str, hint: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse(text)
    assert hint in refused.value.hint


def test_standard_error_is_understood_at_the_end_of_a_stage() -> None:
    assert [s.stderr for s in parse("a 2>&1 | b 2>/dev/null | c 2> /dev/null").stages] == [
        "stdout",
        "discard",
        "discard",
    ]
    assert parse("a '2>&1'").stages[0].words == ("a", "2>&1")
    for text in ("a 2>&1 b", "a 2>&1 2>/dev/null", "a 2>/dev/nullx", "a 12>&1", "a 2>x"):
        with pytest.raises(Refusal):
            parse(text)


def test_globs_are_marked_by_word_and_quoted_ones_are_not() -> None:
    stage = parse("ls /a/* '/b/*' /c\\* /d?").stages[0]
    assert stage.globs == (1, 4) and stage.words[2:4] == ("/b/*", "/c*")
    with pytest.raises(Refusal):
        parse("ls '/a*'/b*")
