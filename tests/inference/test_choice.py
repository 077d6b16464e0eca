"""Which model a run uses, its keys and its cost."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.choice import LOCAL_URL, Defaults, ModelSpec, choose, open_model, parse_spec, probe_local
from inference.cost import Prices, cost_usd
from inference.errors import BadModelSpec, KeyMissing
from inference.keys import KeyRef, Secret
from inference.protocol import Usage
from tests.inference.scripted_server import ScriptedServer


async def nothing(url: str) -> str | None:
    return None


async def answering(url: str) -> str | None:
    return "granite"


async def never(url: str) -> str | None:
    raise AssertionError("must not be probed")


async def test_a_named_model_wins_over_everything() -> None:
    choice = await choose("openai:gpt-x", {"ANTHROPIC_API_KEY": "k"}, never)
    assert str(choice.spec) == "openai:gpt-x"
    assert "named" in choice.reason


@pytest.mark.parametrize(
    ("environment", "provider"),
    [
        ({"ANTHROPIC_API_KEY": "a", "OPENAI_API_KEY": "o"}, "anthropic"),
        ({"OPENAI_API_KEY": "o"}, "openai"),
        ({"ANTHROPIC_API_KEY": " ", "OPENAI_API_KEY": "o"}, "openai"),
    ],
)
async def test_a_key_in_the_environment_is_used_without_probing(environment: dict[str, str], provider: str) -> None:
    choice = await choose(None, environment, never)
    assert choice.spec.provider == provider
    assert choice.spec.key is not None
    assert choice.spec.key.kind == "env"


async def test_the_base_url_of_the_environment_goes_with_its_key() -> None:
    choice = await choose("", {"OPENAI_API_KEY": "o", "OPENAI_BASE_URL": "http://10.0.0.1/v1/"}, never)
    assert choice.spec.url == "http://10.0.0.1/v1"


async def test_a_local_endpoint_that_answers_is_used_without_a_key() -> None:
    choice = await choose(None, {}, answering)
    assert (choice.spec.model, choice.spec.url, choice.spec.key) == ("granite", LOCAL_URL, None)
    assert choice.spec.context_tokens == Defaults().local_context


async def test_without_any_model_the_runbook_is_chosen_and_it_says_why() -> None:
    choice = await choose(None, {}, nothing)
    assert str(choice.spec) == "runbook"
    assert "no language model is configured" in choice.reason


@pytest.mark.parametrize(
    ("text", "provider", "model", "url", "key"),
    [
        ("runbook", "runbook", "runbook", "", None),
        ("anthropic", "anthropic", "claude-sonnet-5-5", "https://api.anthropic.com", "env:ANTHROPIC_API_KEY"),
        ("openai:gpt-x", "openai", "gpt-x", "https://api.openai.com/v1", "env:OPENAI_API_KEY"),
        ("openai:llama3:8b@http://box:8000/v1/", "openai", "llama3:8b", "http://box:8000/v1", None),
        ("openai@http://127.0.0.1:8888/v1", "openai", "default", "http://127.0.0.1:8888/v1", None),
        ("openai:m@https://host/v1", "openai", "m", "https://host/v1", "env:OPENAI_API_KEY"),
        ("anthropic:c@http://127.0.0.1:9", "anthropic", "c", "http://127.0.0.1:9", "env:ANTHROPIC_API_KEY"),
    ],
)
def test_the_text_form_of_a_choice(text: str, provider: str, model: str, url: str, key: str | None) -> None:
    spec = parse_spec(text)
    assert (spec.provider, spec.model, spec.url, str(spec.key) if spec.key else None) == (provider, model, url, key)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "text",
    ["gpt-4", "", "openai:a b", "openai:m@ftp://x", "openai:m@https://user:secret@host/v1", "runbook:x", "openai:m@"],
)
def test_a_choice_that_cannot_be_read_is_refused_and_shows_no_password(text: str) -> None:
    with pytest.raises(BadModelSpec) as caught:
        parse_spec(text)
    assert "secret" not in caught.value.message


@given(st.text(max_size=40))
def test_any_text_is_a_choice_or_refused(text: str) -> None:
    for candidate in (text, f"openai:{text}", f"openai:m@{text}"):
        try:
            spec = parse_spec(candidate)
        except BadModelSpec:
            continue
        assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"provider": "x"}, {"via": "moon"}, {"context_tokens": 5}, {"model": 3}, {"key": "sk-pasted-secret"},
        {"prices": {"input": -1, "output": 1}}, {"prices": {"input": 1}}, {"prices": {"input": 1, "output": 1, "x": 1}},
    ],
)  # fmt: skip
def test_a_document_that_is_no_choice_is_refused_and_shows_no_key(change: dict[str, Any]) -> None:
    document = {**ModelSpec("openai", "m").to_json(), **change}
    with pytest.raises(BadModelSpec) as caught:
        ModelSpec.from_json(document)
    assert "pasted" not in caught.value.message


async def test_the_probe_finds_a_model_list_and_nothing_else() -> None:
    async with ScriptedServer([]) as server:
        assert await probe_local(server.openai_url) == "scripted"
    assert await probe_local(server.openai_url) is None


async def test_the_probe_does_not_wait_for_a_silent_port() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await probe_local(f"http://127.0.0.1:{port}/v1", seconds=0.1) is None
    server.close()


def test_models_are_opened_with_what_the_reference_points_to(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-file\n")
    spec = ModelSpec.from_json({**parse_spec("anthropic").to_json(), "key": f"file:{file}"})
    model = open_model(spec, {})
    assert (model.provider, model.name) == ("anthropic", "claude-sonnet-5-5")
    assert open_model(parse_spec("openai:m@http://127.0.0.1:1/v1"), {}).context_tokens == 16_384
    with pytest.raises(KeyMissing) as caught:
        open_model(parse_spec("openai"), {})
    assert caught.value.reference == "env:OPENAI_API_KEY"
    with pytest.raises(BadModelSpec, match="needs a runbook"):
        open_model(parse_spec("runbook"), {})


@pytest.mark.parametrize("content", [b"", b"two words", b"\xff\xfe", b"x" * 20_000, b"a\nb"])
def test_a_file_that_holds_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(KeyMissing):
        KeyRef.parse(f"file:{file}").resolve({})


def test_a_key_file_that_is_not_there_or_no_file_says_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(KeyMissing):
            KeyRef.parse(f"file:{path}").resolve({})


def test_a_secret_does_not_show_itself() -> None:
    secret = Secret("sk-canary")
    assert "canary" not in f"{secret} {secret!r} {[secret]}"
    assert secret.scrub("key sk-canary refused") == "key *** refused"
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_the_cost_of_a_known_model_counts_cached_tokens_at_their_price() -> None:
    cost = cost_usd(Usage(1000, 100, 200), "claude-sonnet-4-5", "https://api.anthropic.com")
    assert cost == pytest.approx((800 * 3 + 200 * 0.3 + 100 * 15) / 1e6)


@pytest.mark.parametrize(
    ("model", "url"),
    [
        ("no-such-model", "https://api.openai.com/v1"),
        ("gpt-5-mini", "http://127.0.0.1:8888/v1"),
        ("claude-sonnet-4-5", "https://proxy.example/v1"),
    ],
)
def test_an_unknown_price_is_unknown_and_not_nothing(model: str, url: str) -> None:
    assert cost_usd(Usage(1000, 100), model, url) is None


def test_an_estimated_usage_has_no_known_cost() -> None:
    usage = Usage(1000, 100, estimated=True)
    assert cost_usd(usage, "claude-sonnet-4-5", "https://api.anthropic.com", Prices(1, 1)) is None


def test_the_operators_prices_win() -> None:
    prices = Prices(2.0, 10.0, cached=0.5)
    assert cost_usd(Usage(1_000_000, 100_000, 500_000), "x", "", prices) == pytest.approx(1.0 + 0.25 + 1.0)
    assert Prices.from_json(prices.to_json()) == prices
