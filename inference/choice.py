"""Which model a run uses, and opening it.

Owns: the text and JSON form of a model choice, the order in which one is looked for when none is named
(architecture.md, "Model choice for a run"), the defaults.
Deliberately does not know: settings files, runs, machines. The environment and the way to probe are handed in.
"""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import re
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from inference.attempts import Retries, Timeouts
from inference.cost import Prices, pricer
from inference.errors import BadModelSpec
from inference.keys import KeyRef
from inference.protocol import Model
from tools.values import JsonObject, Malformed, want

PROVIDERS = ("openai", "anthropic", "runbook")
OFFICIAL_URLS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}
KEY_VARIABLES = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
URL_VARIABLES = {"openai": "OPENAI_BASE_URL", "anthropic": "ANTHROPIC_BASE_URL"}
LOCAL_URL = "http://127.0.0.1:8888/v1"  # where RHEL Lightspeed and llama.cpp's server listen on the machine itself
PROBE_S = 0.5  # seconds: a local endpoint answers in milliseconds, and every run without a model waits for this
PROBE_BYTES = 1_048_576  # of the probe's answer, bytes
RUNBOOK = "runbook"


@dataclasses.dataclass(frozen=True, slots=True)
class Defaults:
    """Used where a choice leaves something open. ``*_model``: names; ``*_context``: tokens of the window that is used
    (smaller than the newest models have: a longer conversation costs more and finds less)."""

    anthropic_model: str = "claude-sonnet-5-5"
    openai_model: str = "gpt-6.1-terra"
    local_model: str = "default"
    hosted_context: int = 200_000
    local_context: int = 16_384
    local_url: str = LOCAL_URL


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model choice. ``provider``: one of ``PROVIDERS``; ``model``: as the endpoint knows it; ``base_url``: empty for
    the provider's own; ``key``: reference ``env:NAME`` or ``file:/path``, ``None`` for none; ``via``: ``gateway`` (the
    centre asks the model) or ``edge`` (the worker asks an endpoint of its machine); ``context_tokens``: the window."""

    provider: str
    model: str
    base_url: str = ""
    key: KeyRef | None = None
    via: str = "gateway"
    context_tokens: int = 200_000
    prices: Prices | None = None

    def __str__(self) -> str:
        if self.provider == RUNBOOK:
            return RUNBOOK
        return f"{self.provider}:{self.model}" + (f"@{self.base_url}" if self.base_url else "")

    @property
    def url(self) -> str:
        return self.base_url or OFFICIAL_URLS.get(self.provider, "")

    def to_json(self) -> JsonObject:
        """Holds the reference of the key, never the key."""
        return {
            "provider": self.provider, "model": self.model, "base_url": self.base_url,
            "key": str(self.key) if self.key else None, "via": self.via, "context_tokens": self.context_tokens,
            "prices": self.prices.to_json() if self.prices else None,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ModelSpec:
        """Raises ``BadModelSpec`` naming the field, what was expected and what came."""
        try:
            key = want(document, "key", (str, type(None)), None)
            prices = want(document, "prices", (dict, type(None)), None)
            spec = cls(
                want(document, "provider", str),
                want(document, "model", str),
                want(document, "base_url", str, ""),
                None if key is None else KeyRef.parse(key),
                want(document, "via", str, "gateway"),
                want(document, "context_tokens", int, 200_000),
                None if prices is None else Prices.from_json(prices),
            )
        except Malformed as error:
            raise BadModelSpec(f"cannot read the model choice: {error}") from error
        return checked(spec)


def checked(spec: ModelSpec) -> ModelSpec:
    """``spec`` if it can be used. Raises ``BadModelSpec``."""
    if spec.provider not in PROVIDERS:
        raise BadModelSpec(f"the provider of a model must be one of {', '.join(PROVIDERS)}, got {spec.provider!r}")
    if spec.via not in ("gateway", "edge"):
        raise BadModelSpec(f"field 'via' of a model must be 'gateway' or 'edge', got {spec.via!r}")
    if not 1024 <= spec.context_tokens <= 10_000_000:
        raise BadModelSpec(f"'context_tokens' must be between 1024 and 10000000 tokens, got {spec.context_tokens!r}")
    if spec.provider != RUNBOOK and not re.fullmatch(r"[^\s@]{1,200}", spec.model):
        raise BadModelSpec(
            f"the name of a model must be 1 to 200 characters without blanks and '@', got {spec.model!r}"
        )
    if spec.base_url:
        parts = urllib.parse.urlsplit(spec.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise BadModelSpec(f"the base URL of a model must be like https://host/v1, got {_masked(spec.base_url)!r}")
        if parts.username or parts.password:
            raise BadModelSpec(
                "the base URL of a model must not hold a user or password; use the key reference instead"
            )
    return spec


def _masked(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)


def parse_spec(text: str, defaults: Defaults | None = None) -> ModelSpec:
    """From ``runbook``, ``anthropic[:MODEL]``, ``openai[:MODEL][@BASE_URL]``.

    The key is the provider's usual variable; none for ``openai`` at an ``http`` address: such endpoints mostly want
    none, and a key must not go over an open wire unasked. Raises ``BadModelSpec``.
    """
    defaults = defaults or Defaults()
    text = text.strip()
    if text == RUNBOOK:
        return ModelSpec(RUNBOOK, RUNBOOK, context_tokens=defaults.hosted_context)
    found = re.fullmatch(r"(openai|anthropic)(?::([^@\s]*))?(?:@(\S+))?", text)
    if found is None:
        raise BadModelSpec(
            f"cannot read the model {_masked(text)!r}: expected runbook, anthropic:MODEL or openai:MODEL[@BASE_URL]"
        )
    provider, model, base_url = found[1], found[2] or "", found[3] or ""
    hosted = not base_url
    if not model:
        model = (
            defaults.anthropic_model if provider == "anthropic"
            else defaults.openai_model if hosted
            else defaults.local_model
        )  # fmt: skip
    key = None if provider == "openai" and base_url.startswith("http:") else KeyRef("env", KEY_VARIABLES[provider])
    context = defaults.hosted_context if hosted or base_url.startswith("https:") else defaults.local_context
    return checked(ModelSpec(provider, model, base_url.rstrip("/"), key, "gateway", context))


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A model and one sentence that says why it is this one."""

    spec: ModelSpec
    reason: str


Probe = Callable[[str], Awaitable["str | None"]]


async def choose(
    wanted: str | None, environment: Mapping[str, str], probe: Probe, defaults: Defaults | None = None
) -> Choice:
    """The model for a run.

    ``wanted``: what the operator named, ``None`` or empty for nothing; ``environment``: where keys may stand;
    ``probe``: given a base URL, the name of a model that answers there, empty if it answers without naming one,
    ``None`` if nothing answers (``probe_local`` is the real one). Raises ``BadModelSpec`` for a name that cannot be read.
    """
    defaults = defaults or Defaults()
    if wanted:
        spec = parse_spec(wanted, defaults)
        return Choice(spec, f"{spec} was named")
    for provider in ("anthropic", "openai"):
        variable = KEY_VARIABLES[provider]
        if environment.get(variable, "").strip():
            model = defaults.anthropic_model if provider == "anthropic" else defaults.openai_model
            base_url = environment.get(URL_VARIABLES[provider], "").strip().rstrip("/")
            spec = checked(
                ModelSpec(provider, model, base_url, KeyRef("env", variable), "gateway", defaults.hosted_context)
            )
            return Choice(spec, f"no model was named and {variable} is set")
    answering = await probe(defaults.local_url)
    if answering is not None:
        model = answering or defaults.local_model
        spec = checked(ModelSpec("openai", model, defaults.local_url, None, "gateway", defaults.local_context))
        return Choice(spec, f"no model was named, no key is set, and {defaults.local_url} answers")
    return Choice(
        parse_spec(RUNBOOK, defaults),
        f"no language model is configured: none was named, neither {KEY_VARIABLES['anthropic']} nor "
        f"{KEY_VARIABLES['openai']} is set, and nothing answers at {defaults.local_url}",
    )


async def probe_local(base_url: str, seconds: float = PROBE_S) -> str | None:
    """The first model an OpenAI-compatible endpoint lists, empty if it lists none, ``None`` if nothing answers there
    within ``seconds``. Never raises: an endpoint that is not there is the normal case."""

    def ask() -> str | None:
        # no proxy: the address is this machine's own
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        try:
            with opener.open(base_url.rstrip("/") + "/models", timeout=seconds) as answer:
                document = json.loads(answer.read(PROBE_BYTES))
        except (OSError, http.client.HTTPException, ValueError, RecursionError):
            return None
        return _first_model(document)

    try:
        async with asyncio.timeout(seconds * 2):
            return await asyncio.to_thread(ask)
    except TimeoutError:
        return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _first_model(document: Any) -> str | None:
    """``None`` when ``document`` is not a model list: then something else listens there."""
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        return None
    for entry in document["data"]:
        if isinstance(entry, dict) and isinstance(entry.get("id"), str) and re.fullmatch(r"[^\s@]{1,200}", entry["id"]):
            return str(entry["id"])
    return ""


def open_model(
    spec: ModelSpec,
    environment: Mapping[str, str],
    *,
    runbook: JsonObject | None = None,
    why: str = "",
    timeouts: Timeouts | None = None,
    retries: Retries | None = None,
) -> Model:
    """The model of ``spec``; the caller closes it (``aclose``).

    ``environment``: for ``env:`` references; ``runbook``: what the ``runbook`` provider works through; ``why``: the
    sentence of the choice, for its report. Loads a provider's SDK only on first use. Raises ``KeyMissing``,
    ``BadModelSpec``.
    """
    spec = checked(spec)
    if spec.provider == RUNBOOK:
        from inference.runbook_model import RunbookModel

        if runbook is None:
            raise BadModelSpec("the model 'runbook' needs a runbook: name one (for example health) or choose a model")
        return RunbookModel(runbook, why=why)
    price = pricer(spec.model, spec.url, spec.prices)
    key = spec.key.resolve(environment) if spec.key else None
    if spec.provider == "anthropic":
        from inference.anthropic_model import AnthropicModel

        if key is None:
            raise BadModelSpec("the provider anthropic needs a key reference, for example env:ANTHROPIC_API_KEY")
        return AnthropicModel(
            spec.model, key=key, base_url=spec.url, context_tokens=spec.context_tokens, timeouts=timeouts,
            retries=retries, price=price,
        )  # fmt: skip
    from inference.openai_model import OpenAIModel

    return OpenAIModel(
        spec.model, key=key, base_url=spec.url, context_tokens=spec.context_tokens, timeouts=timeouts, retries=retries,
        price=price,
    )  # fmt: skip
