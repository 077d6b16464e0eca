"""Nothing secret leaves: known secrets in every form, things that look like secrets, and the caps."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import time
import urllib.parse

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from otel.redaction import MASK, Limits, Redactor, SecretTooShort, names_a_secret
from otel.spans import Span, SpanEvent
from tests.otel.conftest import make_span
from tests.otel.test_spans import spans

RUN = "01920000-0000-7000-8000-000000000001"
CANARY = 'Zq9!canary"\\ßx7-Kj\nend_of+it/Qw82'

secrets = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=6, max_size=30).filter(
    # A word that the mask or a note of cutting is made of would be found in it.
    lambda secret: len(secret.strip()) >= 6 and secret.strip() not in MASK + " [cut: first of bytes deeper than levels]"
)
clutter = st.text(max_size=30)


def _fields(span: Span) -> dict[str, object]:
    return {field.name: getattr(span, field.name) for field in dataclasses.fields(span)}


def _forms(secret: str) -> list[str]:
    raw = secret.encode()
    return [
        secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False), json.dumps(json.dumps(secret)),
        json.dumps({"text": json.dumps({"deep": secret})}), urllib.parse.quote(secret), urllib.parse.quote_plus(secret),
        html.escape(secret), repr(secret), raw.hex(), raw.hex().upper(),
    ]  # fmt: skip


@given(secrets, clutter, clutter)
@example("aaaaaa", "aa", "aaa")
def test_a_registered_secret_does_not_survive_in_any_covered_form(secret: str, before: str, after: str) -> None:
    redactor = Redactor([secret])
    for form in _forms(secret):
        inner = form.strip('"')
        if len(inner) >= 4:
            assert inner not in redactor.text(before + form + after, cap_bytes=10**6)


@given(secrets.filter(lambda secret: len(secret.encode()) >= 12), st.binary(max_size=10), st.binary(max_size=10))
def test_a_registered_secret_does_not_survive_inside_base64(secret: str, before: bytes, after: bytes) -> None:
    redactor = Redactor([secret])
    for encode, decode in (
        (base64.b64encode, base64.b64decode),
        (base64.urlsafe_b64encode, base64.urlsafe_b64decode),
    ):
        masked = redactor.text("key " + encode(before + secret.encode() + after).decode() + " end", cap_bytes=10**6)
        assert MASK in masked
        for part in masked.replace("key ", "").replace(" end", "").split(MASK):
            usable = part.rstrip("=")
            usable = usable[: len(usable) - len(usable) % 4]
            # What stands left and right of the mask holds the neighbours, at most a few bits of the secret.
            assert secret.encode()[:6] not in decode(usable)


@given(secrets, secrets)
def test_two_overlapping_secrets_leave_neither_end(first: str, second: str) -> None:
    first, second = first.strip(), second.strip()
    joined = first + second[3:] if first.endswith(second[:3]) else first + second
    masked = Redactor([first, second]).text(joined, cap_bytes=10**6)
    assert first not in masked
    assert second not in masked


@given(spans, st.integers(0, 3))
def test_a_secret_planted_anywhere_in_a_span_is_gone(span: Span, place: int) -> None:
    redactor = Redactor([CANARY])
    changes: list[dict[str, object]] = [
        {"name": f"x {CANARY} y"},
        {"status_message": f"x {CANARY} y"},
        {"attributes": {**span.attributes, f"k{CANARY}": {"a": [1, {CANARY: f"v{CANARY}"}]}}},
        {"events": (SpanEvent(f"e{CANARY}", 1, {"x": json.dumps({"y": CANARY})}),)},
    ]
    planted = Span(**{**_fields(span), **changes[place]})  # type: ignore[arg-type]
    left = json.dumps(redactor.span(planted).to_json(), ensure_ascii=False)
    for form in _forms(CANARY):
        assert form.strip('"') not in left


@given(spans)
def test_redaction_gives_a_valid_span_that_stays_as_it_is(span: Span) -> None:
    redactor = Redactor([CANARY], Limits(text_bytes=64, span_bytes=512, items=4, depth=3))
    once = redactor.span(span)
    assert (once.trace_id, once.span_id, once.parent_id) == (span.trace_id, span.span_id, span.parent_id)
    json.dumps(once.to_json(), ensure_ascii=False).encode("utf-8")
    assert Span.from_json(once.to_json()) == once


@given(spans)
def test_the_quick_look_never_passes_what_the_careful_walk_would_change(span: Span) -> None:
    redactor = Redactor(["password", "0000"])
    if redactor.span(span) is span:
        for key, value in span.attributes.items():
            assert redactor.value({key: value}) == {key: value}
        assert redactor.text(span.name) == span.name
        assert redactor.text(span.status_message) == span.status_message


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhYmMifQ.c2lnbmF0dXJlLWhlcmU"
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\nc2Vjb25k\n-----END OPENSSH PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("password=hunter2 next", "hunter2"), ("PASSWORD: hunter2", "hunter2"), ("db_password = 'hun ter2';", "hun ter2"),
        ('{"password": "hun\\"ter2"}', "ter2"), (json.dumps({"body": json.dumps({"api_key": "hun ter2"})}), "hun ter2"),
        (json.dumps(json.dumps({"body": json.dumps({"token": "hun ter2"})})), "hun ter2"),
        ("client_secret:=hunter2", "hunter2"), ("export AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENGbPx", "wJalrXUtnFEMIK7MDENG"),
        ("postgresql://app:hunter2@db/x", "hunter2"), ("https://u:p@ss/w@rd@host", "p@ss"),
        ("https://ghx0123456789abcdef@host/x.git", "ghx0123456789abcdef"), ("curl -u admin:hunter2 http://x", "hunter2"),
        ("mysql --password hunter2 -h db", "hunter2"), ("--api-key=hunter2", "hunter2"), ("--db-token 'hunter2'", "hunter2"),
        ("Authorization: Basic YWxhZGRpbjpvcGVuc2VzYW1l", "YWxhZGRpbjpvcGVuc2VzYW1l"),
        ('{"Authorization": "Bearer abcdef0123456789"}', "abcdef0123456789"), ("bearer abcdef0123456789", "abcdef0123456789"),
        ("Cookie: sid=abcdef; other=1", "abcdef"), ("X-Api-Key: hunter2hunter2", "hunter2hunter2"),
        ("AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"), (f"got {JWT} there", "eyJzdWIiOiJhYmMifQ"),
        ("ghp_" + "a1B2" * 9, "a1B2a1B2"), ("github_pat_" + "a1B2" * 9, "a1B2a1B2"), ("glpat-" + "a1B2" * 5, "a1B2a1B2"),
        ("sk-ant-api03-" + "a1B2" * 9, "a1B2a1B2"), ("sk-proj-" + "a1B2" * 9, "a1B2a1B2"), ("AIza" + "a1B2" * 9, "a1B2a1B2"),
        ("xoxb-123456789012-abcdefabcdef", "abcdefabcdef"), ("sk_live_" + "a1B2" * 6, "a1B2a1B2"),
        ("hf_" + "a1B2" * 9, "a1B2a1B2"), ("hvs." + "a1B2" * 9, "a1B2a1B2"), ("gsk_" + "a1B2" * 9, "a1B2a1B2"),
        ("root:$6$saltsalt$" + "h4sh" * 20 + ":19000", "h4shh4sh"), ("$y$j9T$abcdefabcdef$" + "h4sh" * 9, "h4shh4sh"),
        (KEY, "c2Vjb25k"), (KEY.rsplit("\n", 1)[0], "c2Vjb25k"), (json.dumps(KEY), "c2Vjb25k"),
        ("machine x login me password hunter2", "hunter2"), ("https://s/x?X-Amz-Signature=" + "ab12" * 16, "ab12ab12"),
        ("https://hooks.slack.com/services/T000/B000/abcdefgh", "abcdefgh"),
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_masked(text: str, secret: str) -> None:
    assert secret in text
    masked = Redactor().text(text)
    assert secret not in masked
    assert MASK in masked
    span = make_span(RUN, "c1", attributes={"out": text})
    assert secret not in json.dumps(Redactor().span(span).to_json())


@pytest.mark.parametrize(
    "text",
    [
        "total_tokens: 512, input_tokens=100", "token=512,", "tokens used: 5", "Filesystem 1K-blocks Used /dev/sda1 /",
        "Failed password for root from 10.0.0.1 port 22 ssh2", "http://127.0.0.1:5000/#/experiments/1", "token: null",
        "0191d3f0-5b5e-7c3e-8a53-6a5b6c7d8e9f", "sha256:" + "ab12" * 16, "passwordless sudo", "monkey: 5", "key=value",
        "ssh-ed25519 public", "Started ssh-agent.service - OpenSSH key agent.", "user@host:/path", "-u nginx --since today",
        "journalctl -u nginx.service -n 50", "basic settings", "pid=1 uid=0",
    ],
)  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    assert Redactor().text(text) == text
    span = make_span(RUN, "c1", attributes={"out": text, "argv": text.split()})
    assert Redactor().span(span) == span


def test_a_value_under_a_telling_name_is_masked_whatever_it_is() -> None:
    value = {"db.password": "x y", "api_key": 12345, "credentials": {"user": "me"}, "input_tokens": 5, "password": None}
    assert Redactor().value(value) == {
        "db.password": MASK, "api_key": MASK, "credentials": MASK, "input_tokens": 5, "password": None,
    }  # fmt: skip
    assert not names_a_secret("gen_ai.usage.input_tokens")


def test_the_word_after_a_secret_option_in_an_argv_is_masked() -> None:
    argv = ["mysql", "--password", "hunter2", "-u", "me:hunter3", "--db-token", "hunter4", "-h", "db"]
    expected = ["mysql", "--password", MASK, "-u", f"me:{MASK}", "--db-token", MASK, "-h", "db"]
    assert Redactor().value(argv) == expected
    span = Redactor().span(make_span(RUN, "c1", attributes={"argv": argv}))
    assert span.attributes["argv"] == expected


def test_two_keys_that_become_one_by_masking_keep_both_values() -> None:
    redactor = Redactor(["canary-one", "canary-two"])
    assert sorted(redactor.value({"canary-one": 1, "canary-two": 2}).values()) == [1, 2]


def test_a_secret_is_masked_before_a_text_is_cut() -> None:
    redactor = Redactor(["canary-canary"], Limits(text_bytes=20))
    assert "canary" not in redactor.text("x" * 12 + "canary-canary" + "y" * 50)


def test_what_is_cut_says_so() -> None:
    redactor = Redactor(limits=Limits(text_bytes=10, span_bytes=25, items=3, depth=2))
    assert redactor.text("ä" * 20) == "äääää [cut: first 10 of 40 bytes]"
    assert redactor.value([1, 2, 3, 4]) == [1, 2, 3, "[cut: first 3 of 4 items]"]
    assert redactor.value({"a": {"b": {"c": 1}}}) == {"a": {"b": "[cut: deeper than 2 levels]"}}
    assert redactor.value({"a": 1, "b": 2, "c": 3, "d": 4})["cut"] == "[cut: first 3 of 4 entries]"
    span = redactor.span(make_span(RUN, "c1", attributes=dict.fromkeys("abc", "z" * 12)))
    assert [len(value.split(" [cut")[0]) for value in span.attributes.values()] == [10, 10, 5]


def test_bytes_that_were_no_text_and_nul_become_replacement_characters() -> None:
    text = b"caf\xe9 \x00 end".decode("utf-8", "surrogateescape")
    assert Redactor().text(text) == "caf\ufffd \ufffd end"
    span = Redactor().span(make_span(RUN, "c1", attributes={"x": text}))
    assert span.attributes["x"] == "caf\ufffd \ufffd end"


def test_a_secret_too_short_to_search_for_is_refused() -> None:
    with pytest.raises(SecretTooShort, match="at least 4"):
        Redactor(["abc"])


def test_a_redactor_does_not_show_its_secrets() -> None:
    assert "hunter2" not in repr(Redactor(["hunter2"]))


def test_hostile_text_does_not_make_the_patterns_slow() -> None:
    redactor = Redactor(["canary-canary"])
    hostile = [
        "password" * 20_000, "://" * 50_000, "://a:" * 30_000, "-----BEGIN PRIVATE KEY-----" * 6_000, "eyJ." * 40_000,
        'password="' * 16_000, 'token=\\\\\\"' * 16_000, "bearer " * 25_000, "a" * 160_000, "authorization:" * 12_000,
        "--" + "a-" * 80_000, "cookie=" * 20_000, "$6$" * 50_000, "password" + " " * 160_000, "login a " * 20_000,
        "-u " * 50_000, "x-" * 80_000, "\\" * 160_000,
    ]  # fmt: skip
    for text in hostile:
        began = time.process_time()
        redactor.text(text)
        assert time.process_time() - began < 2.0, text[:20]
