"""References to secrets."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.errors import BadSettings
from supervisor.settings.secrets import Secret, SecretRef

CANARY = "sk-canary-77"


def test_a_secret_shows_itself_only_when_asked() -> None:
    secret = Secret(CANARY)
    assert CANARY not in f"{secret} {secret!r} {[secret]}"
    assert secret.reveal() == CANARY
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_a_reference_to_a_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {CANARY}\n")
    reference = SecretRef("env:MY_KEY")
    assert reference.present()
    assert reference.read().reveal() == CANARY
    assert reference.read({"MY_KEY": "other"}).reveal() == "other"
    monkeypatch.delenv("MY_KEY")
    assert not reference.present()
    with pytest.raises(BadSettings, match="set MY_KEY"):
        reference.read()


def test_an_environment_that_is_handed_in_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", CANARY)
    assert not SecretRef("env:MY_KEY").present({})


def test_a_reference_to_a_file_is_read_if_only_its_owner_can(tmp_path: Path) -> None:
    path = tmp_path / "key"
    reference = SecretRef(f"file:{path}")
    assert not reference.present()
    with pytest.raises(BadSettings, match="could not be read"):
        reference.read()
    path.write_text(CANARY + "\n")
    path.chmod(0o604)
    with pytest.raises(BadSettings, match="chmod 600") as caught:
        reference.read()
    assert CANARY not in str(caught.value)
    path.chmod(0o600)
    assert reference.present()
    assert reference.read().reveal() == CANARY
    for content in (b"", b" \n", b"x" * 70_000, b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(BadSettings):
            reference.read()


@pytest.mark.parametrize(
    "text", ["", CANARY, "env:", "env:A B", "env:1A", "file:relative", "file:", "vault:x", "file:/a\nb"]
)
def test_what_is_no_reference_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match="must be env:NAME") as caught:
        SecretRef(text)
    assert CANARY not in str(caught.value)


@given(st.text(max_size=40))
def test_every_reference_that_is_accepted_comes_back_as_its_text(text: str) -> None:
    try:
        reference = SecretRef(text)
    except ValueError:
        return
    assert str(reference) == text
    assert SecretRef(str(reference)) == reference
