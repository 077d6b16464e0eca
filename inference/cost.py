"""What an inference costs.

Owns: US dollars of a usage, from prices given by the operator or from the ``genai-prices`` package.
Deliberately does not know: budgets. Unknown is ``None`` and never 0 (audit-and-traces.md, last paragraph).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from inference.errors import BadModelSpec
from inference.protocol import Usage
from tools.values import JsonObject, Malformed, want

Pricer = Callable[[Usage], "float | None"]


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """The operator's own prices, US dollars per million tokens. Cached input costs ``input`` where not given."""

    input: float
    output: float
    cached: float | None = None
    cache_write: float | None = None

    def to_json(self) -> JsonObject:
        return {"input": self.input, "output": self.output, "cached": self.cached, "cache_write": self.cache_write}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Prices:
        """Raises ``BadModelSpec`` naming the field."""
        found: dict[str, float | None] = {}
        unknown = sorted(set(document) - {"input", "output", "cached", "cache_write"})
        if unknown:
            raise BadModelSpec(f"prices have the fields input, output, cached, cache_write; got {unknown!r}")
        for name in ("input", "output", "cached", "cache_write"):
            required = name in ("input", "output")
            try:
                value = want(document, name, (int, float) if required else (int, float, type(None)),
                             *(() if required else (None,)))  # fmt: skip
            except Malformed as error:
                raise BadModelSpec(f"prices (US dollars per million tokens): {error}") from error
            if value is not None and not 0 <= value < 1e6:
                raise BadModelSpec(f"price {name!r} must be US dollars per million tokens, 0 or more, got {value!r}")
            found[name] = None if value is None else float(value)
        return cls(found["input"] or 0.0, found["output"] or 0.0, found["cached"], found["cache_write"])

    def cost(self, usage: Usage) -> float:
        cached = self.input if self.cached is None else self.cached
        cache_write = self.input if self.cache_write is None else self.cache_write
        plain = max(0, usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens)
        return (
            plain * self.input
            + usage.cached_tokens * cached
            + usage.cache_write_tokens * cache_write
            + usage.output_tokens * self.output
        ) / 1e6


def cost_usd(usage: Usage, model: str, base_url: str, prices: Prices | None = None) -> float | None:
    """US dollars of ``usage``.

    ``model``: the name the endpoint answers to; ``base_url``: tells who sells it (a model of the same name served
    elsewhere has another price or none); ``prices``: the operator's, which win. Returns ``None`` where the price is not
    known or the usage is only an estimate.
    """
    if usage.estimated:
        return None
    if prices is not None:
        return prices.cost(usage)
    try:
        genai_prices = importlib.import_module("genai_prices")  # 0.4 s: only where a cost is asked for
    except ImportError:
        return None  # the edge image does not carry the price list
    try:
        found = genai_prices.calc_price(
            genai_prices.Usage(
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                cache_read_tokens=usage.cached_tokens or None,
                cache_write_tokens=usage.cache_write_tokens or None,
            ),
            model,
            provider_api_url=base_url,
        )
    except (LookupError, ValueError):
        return None  # not in the list, or counts that contradict each other: both are "unknown"
    return float(found.total_price)


def pricer(model: str, base_url: str, prices: Prices | None = None) -> Pricer:
    """``cost_usd`` with everything but the usage filled in."""
    return lambda usage: cost_usd(usage, model, base_url, prices)
