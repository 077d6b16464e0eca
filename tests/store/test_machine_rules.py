"""What a machine's identity may look like; a property test per reader."""

from __future__ import annotations

import base64
import contextlib
import struct
import subprocess
from pathlib import Path

import asyncssh
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import machines as rules
from supervisor.errors import BadInput


@pytest.mark.parametrize("text", ["web-01", "0", "a" * 63, "a-"])
def test_a_slug_is_an_id(text: str) -> None:
    assert rules.machine_id(text) == text


@pytest.mark.parametrize("text", ["", "-a", "Web", "a b", "a" * 64, "a\n", "ä", "../x", "a.b"])
def test_what_is_no_slug_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        rules.machine_id(text)


def test_a_refused_id_comes_with_one_that_would_do() -> None:
    with pytest.raises(BadInput, match="'web-01-example-org'"):
        rules.machine_id("Web_01.example.org")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("Web-01.Example.org", "web-01.example.org"),
        ("localhost", "localhost"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:DB8::1]", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("host.example.", "host.example."),
        ("my_host", "my_host"),
    ],
)
def test_names_and_addresses_are_accepted(text: str, kept: str) -> None:
    assert rules.address(text) == kept


@pytest.mark.parametrize(
    "text",
    ["", "-oProxyCommand=x", "a b", "host:22", "user@host", "http://host", "a..b", "1.2.3", "1.2.3.4.5", "999.1.1.1",
     "a;b", "a\n", "a\0b", "fe80::1%eth 0", "192.0.2.1%eth0", "[host", "x" * 64, "-a.b", "."],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        rules.address(text)


@given(st.text(max_size=40))
def test_no_accepted_address_user_or_id_can_be_an_option_or_hold_a_word_break(text: str) -> None:
    for read in (rules.address, rules.user, rules.machine_id):
        try:
            kept = read(text)
        except BadInput:
            continue
        assert kept
        assert not kept.startswith("-")
        assert kept.isprintable()
        assert not set(kept) & set(" '\"\\$`;&|<>(){}*?!#~@,/\n\t")


@given(st.integers() | st.text(max_size=8) | st.booleans())
def test_a_port_is_a_port_or_refused(value: int | str) -> None:
    with contextlib.suppress(BadInput):
        assert 1 <= rules.port(value) <= 65535


def test_labels_are_read_from_pairs_and_sorted() -> None:
    assert rules.labels(["role=db", "env=", "a/b=C.d"]) == {"a/b": "C.d", "env": "", "role": "db"}
    assert rules.labels({"x": "1"}) == {"x": "1"}


@pytest.mark.parametrize(
    "pairs", [["role"], ["=x"], ["Role=x"], ["a=b c"], ["a=b\n"], ["a=1", "a=2"], ["a=" + "x" * 64]]
)
def test_what_is_no_label_is_refused_by_name(pairs: list[str]) -> None:
    with pytest.raises(BadInput):
        rules.labels(pairs)


def test_a_selector_matches_the_machines_that_have_every_pair() -> None:
    assert rules.matches({"role": "db", "env": "prod"}, {"role": "db"})
    assert rules.matches({"role": "db"}, {})
    assert not rules.matches({"role": "db"}, {"role": "db", "env": "prod"})


KINDS = {"ssh-ed25519": {}, "ssh-rsa": {"key_size": 2048}, "ecdsa-sha2-nistp256": {}, "ecdsa-sha2-nistp521": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_is_the_one_that_ssh_shows(kind: str) -> None:
    key = asyncssh.generate_private_key(kind, **KINDS[kind])
    line = key.export_public_key().decode("ascii")
    read = rules.host_key(line.strip() + " root@web-01")
    assert read.fingerprint == key.get_fingerprint("sha256")
    assert read.text == " ".join(line.split()[:2])
    assert rules.host_key("[web-01]:2222 " + read.text) == read


def test_the_fingerprint_is_the_one_that_ssh_keygen_shows(tmp_path: Path) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    path = tmp_path / "key.pub"
    key.write_public_key(path)
    try:
        shown = subprocess.run(["ssh-keygen", "-l", "-f", path], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("ssh-keygen is not installed")
    assert rules.host_key(path.read_text()).fingerprint in shown.split()


def _line(kind: str, *fields: bytes) -> str:
    blob = b"".join(struct.pack(">I", len(field)) + field for field in fields)
    return f"{kind} {base64.b64encode(blob).decode()}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 !!!!",
        "ssh-dss AAAAB3NzaC1kc3M=",
        _line("ssh-ed25519", b"ssh-rsa", b"x" * 32),
        _line("ssh-ed25519", b"ssh-ed25519", b"x" * 31),
        _line("ssh-ed25519", b"ssh-ed25519", b"x" * 32, b"more"),
        _line("ssh-rsa", b"ssh-rsa", b"\1\0\1", b"\0\x80" + b"x" * 127),
        _line("ecdsa-sha2-nistp256", b"ecdsa-sha2-nistp256", b"nistp384", b"x" * 65),
        _line("ssh-ed25519", b"ssh-ed25519", b"x" * 32)[:-8],
        _line("ssh-ed25519", b"ssh-ed25519", b"x" * 32) + "\nssh-ed25519 AAAA",
    ],
)
def test_a_damaged_foreign_or_weak_host_key_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        rules.host_key(text)


@given(st.sampled_from(rules.KEY_KINDS), st.binary(max_size=120))
def test_no_bytes_make_the_reader_of_host_keys_fail_otherwise(kind: str, blob: bytes) -> None:
    try:
        key = rules.host_key(f"{kind} {base64.b64encode(blob).decode()}")
    except BadInput:
        return
    assert key.blob == blob
