"""What an HTTP status and an error document mean, for every provider.

Owns: the table from status, code and message to the error tree.
Deliberately does not know: SDK exceptions (a provider takes the values out of them), retries.
"""

from __future__ import annotations

import email.utils
import math
import re
from collections.abc import Mapping
from typing import Any

from inference.errors import (
    ContextTooLong,
    InferenceError,
    KeyRefused,
    ModelRefused,
    ModelUnavailable,
    QuotaExhausted,
    RateLimited,
    RequestRefused,
    UnknownModel,
)

_TOO_LONG = re.compile(
    r"context[ _](length|window|size)|prompt is too long|too many (input )?tokens|exceed\w* the (model'?s )?"
    r"(maximum )?context|maximum context",
    re.IGNORECASE,
)
_POLICY = re.compile(r"content[ _](filter|policy|management)|responsible_?ai|safety (system|policy)", re.IGNORECASE)
_QUOTA = re.compile(r"insufficient_quota|billing_hard_limit|credit balance|exceeded your current quota", re.IGNORECASE)
_BUSY_CODES = {"overloaded_error", "api_error", "server_error", "timeout_error", "internal_error", "engine_overloaded"}


def retry_after(headers: Mapping[str, str], wall: float) -> float | None:
    """Seconds an endpoint asks to wait (``Retry-After-Ms``, or ``Retry-After`` in seconds or as a date).

    ``wall``: seconds since the epoch, to read a date with. ``None`` where it does not say or nobody can read it.
    """
    for name, divisor in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / divisor
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (TypeError, ValueError, IndexError):
        return None
    return max(0.0, date.timestamp() - wall)


def error_fields(body: Any) -> tuple[str, str]:
    """``(code, message)`` of an error document, whichever of the usual shapes it has; empty where it says nothing."""
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        if isinstance(inner, str):
            return "", inner
        if isinstance(inner, Mapping):
            code = next((inner[name] for name in ("code", "type") if isinstance(inner.get(name), str)), "")
            message = next((inner[name] for name in ("message", "detail") if isinstance(inner.get(name), str)), "")
            return code, message
    return "", body if isinstance(body, str) else ""


def error_for(
    status: int | None, code: str, message: str, headers: Mapping[str, str], wall: float, **who: Any
) -> InferenceError:
    """The error for what an endpoint said.

    ``status``: of HTTP, ``None`` for an error inside a stream; ``code``: ``error.code`` or ``error.type``; ``message``:
    already scrubbed of the key; ``who``: ``provider``, ``model``, ``request_id``.
    """
    asked = f"{who.get('provider', '')} model {who.get('model', '')!r}"
    said = f"status {status}" if status is not None else "an error in the stream"
    what = f"asked {asked} for an answer, got {said} {code!r}: {message!r}"
    who["status"] = status
    everything = f"{code} {message}"
    if _QUOTA.search(everything) or status == 402:
        return QuotaExhausted(f"{what}; the account has no quota left: add credit or choose another model", **who)
    if status == 429 or (status is None and code in ("rate_limit_exceeded", "rate_limit_error")):
        return RateLimited(f"{what}; wait, or raise the rate limit of the account",
                           retry_after=retry_after(headers, wall), **who)  # fmt: skip
    if status in (401, 403) or (status is None and code in ("authentication_error", "permission_error")):
        return KeyRefused(f"{what}; check the key the model's key reference points to", **who)
    if status == 404:
        return UnknownModel(f"{what}; check the model's name and the base URL", **who)
    if status == 413 or (status in (None, 400, 422, 500) and _TOO_LONG.search(everything)):
        return ContextTooLong(f"{what}; the conversation does not fit the model's window", **who)
    if status in (None, 400, 422) and _POLICY.search(everything):
        return ModelRefused(f"{what}; the provider's policy refused the request", **who)
    if status in (408, 409) or (status is not None and status >= 500) or (status is None and code in _BUSY_CODES):
        return ModelUnavailable(f"{what}; try again later or choose another model", **who)
    if status is None:
        return ModelUnavailable(f"{what}; the endpoint gave up inside its answer", **who)
    return RequestRefused(f"{what}; the endpoint does not accept this request", **who)
