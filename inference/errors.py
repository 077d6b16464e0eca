"""The error tree of inference, on one page.

Owns: what can go wrong between a request and its answer, with the evidence as fields, and the JSON form in which an
error crosses the line between gateway and worker.
Deliberately does not know: SDK exceptions (each provider maps its own at the seam where they enter) and what the loop
or the run makes of an error.

``retryable`` means: nothing was acted on, the very same request may be sent again. Whoever used up its own attempts
sets it to ``False`` on the error it raises, so that retries do not multiply from layer to layer.
"""

from __future__ import annotations

from typing import Any, ClassVar

from tools.values import JsonObject, Malformed, want

__all__ = [
    "BadAnswer",
    "BadModelSpec",
    "ContextTooLong",
    "GatewayGone",
    "InferenceDenied",
    "InferenceError",
    "KeyMissing",
    "KeyRefused",
    "ModelRefused",
    "ModelTimeout",
    "ModelUnavailable",
    "QuotaExhausted",
    "RateLimited",
    "RequestRefused",
    "StreamCut",
    "UnknownModel",
]

MESSAGE_CHARS = 2000  # an endpoint that answers with a whole web page must not fill logs, events and audit records


class InferenceError(Exception):
    """An inference did not give an answer.

    ``message`` says what was tried, what was expected, what came and the next step; ``provider``, ``model``: who was
    asked; ``status``: the HTTP status where there was one; ``request_id``: the provider's own id for support cases.
    """

    code: ClassVar[str] = "inference_error"
    may_retry: ClassVar[bool] = False
    extra_fields: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, message: str, *, provider: str = "", model: str = "", status: int | None = None, request_id: str = ""
    ) -> None:
        self.message = message if len(message) <= MESSAGE_CHARS else message[:MESSAGE_CHARS] + " … [cut]"
        self.provider = provider
        self.model = model
        self.status = status
        self.request_id = request_id
        self.retryable = self.may_retry
        super().__init__(self.message)

    def to_json(self) -> JsonObject:
        """``{"code", "message", "provider", "model", "status", "request_id", "retryable", …fields of the kind}``."""
        document: JsonObject = {
            "code": self.code, "message": self.message, "provider": self.provider, "model": self.model,
            "status": self.status, "request_id": self.request_id, "retryable": self.retryable,
        }  # fmt: skip
        for name in self.extra_fields:
            document[name] = getattr(self, name)
        return document


class ModelUnavailable(InferenceError):
    """No connection, or the endpoint says it cannot serve now (408, 409, 5xx)."""

    code = "model_unavailable"
    may_retry = True


class StreamCut(InferenceError):
    """The answer began and did not end: the connection broke or the stream stopped before its final event."""

    code = "stream_cut"
    may_retry = True


class ModelTimeout(InferenceError):
    """``phase`` (connect, first event, between events, total, gateway) took longer than ``seconds``."""

    code = "model_timeout"
    may_retry = True
    extra_fields = ("phase", "seconds")

    def __init__(self, message: str, *, phase: str = "total", seconds: float = 0.0, **who: Any) -> None:
        super().__init__(message, **who)
        self.phase = phase
        self.seconds = seconds


class RateLimited(InferenceError):
    """429. ``retry_after``: seconds the endpoint asks to wait, ``None`` where it does not say."""

    code = "rate_limited"
    may_retry = True
    extra_fields = ("retry_after",)

    def __init__(self, message: str, *, retry_after: float | None = None, **who: Any) -> None:
        super().__init__(message, **who)
        self.retry_after = retry_after


class QuotaExhausted(InferenceError):
    """The account has no quota or credit left: waiting does not help."""

    code = "quota_exhausted"


class KeyMissing(InferenceError):
    """The key a model needs is not where its reference points. ``reference``: ``env:NAME`` or ``file:/path``."""

    code = "key_missing"
    extra_fields = ("reference",)

    def __init__(self, message: str, *, reference: str = "", **who: Any) -> None:
        super().__init__(message, **who)
        self.reference = reference


class KeyRefused(InferenceError):
    """401 or 403."""

    code = "key_refused"


class UnknownModel(InferenceError):
    """404: the endpoint does not know the model, or the base URL does not lead to an API."""

    code = "unknown_model"


class BadModelSpec(InferenceError):
    """A model choice cannot be read."""

    code = "bad_model_spec"


class RequestRefused(InferenceError):
    """The endpoint calls the request wrong (400, 422 and the like)."""

    code = "request_refused"


class ContextTooLong(InferenceError):
    """The request does not fit the model's window. ``tokens``: what it would take, ``window``: what there is
    (``None``: the endpoint did not say)."""

    code = "context_too_long"
    extra_fields = ("tokens", "window")

    def __init__(self, message: str, *, tokens: int | None = None, window: int | None = None, **who: Any) -> None:
        super().__init__(message, **who)
        self.tokens = tokens
        self.window = window


class ModelRefused(InferenceError):
    """The provider's own policy refused the request before the model answered."""

    code = "model_refused"


class BadAnswer(InferenceError):
    """What came is not an answer of this protocol. ``raw``: its beginning."""

    code = "bad_answer"
    extra_fields = ("raw",)

    def __init__(self, message: str, *, raw: str = "", **who: Any) -> None:
        super().__init__(message, **who)
        self.raw = raw[:200]


class GatewayGone(InferenceError):
    """The gateway's connection to the worker is not there, or went away before the answer was complete."""

    code = "gateway_gone"
    may_retry = True


class InferenceDenied(InferenceError):
    """The gateway does not make this inference: budget spent, run over, or it could not be recorded.

    ``limit``: the name of the limit that refused it, empty where it was none.
    """

    code = "inference_denied"
    extra_fields = ("limit",)

    def __init__(self, message: str, *, limit: str = "", **who: Any) -> None:
        super().__init__(message, **who)
        self.limit = limit


KINDS: dict[str, type[InferenceError]] = {
    kind.code: kind
    for kind in (
        InferenceError, ModelUnavailable, StreamCut, ModelTimeout, RateLimited, QuotaExhausted, KeyMissing, KeyRefused,
        UnknownModel, BadModelSpec, RequestRefused, ContextTooLong, ModelRefused, BadAnswer, GatewayGone,
        InferenceDenied,
    )
}  # fmt: skip

_NUMBER = (int, float, type(None))
_EXTRA_KINDS: dict[str, Any] = {
    "phase": str, "seconds": (int, float), "retry_after": _NUMBER, "reference": str, "tokens": (int, type(None)),
    "window": (int, type(None)), "raw": str, "limit": str,
}  # fmt: skip


def error_from_json(document: JsonObject) -> InferenceError:
    """The error a peer sent. An unknown code becomes a plain ``InferenceError``; raises ``Malformed``."""
    if not isinstance(document, dict):
        raise Malformed(f"an inference error must be an object, got {document!r:.80}")
    kind = KINDS.get(want(document, "code", str), InferenceError)
    extra = {
        name: want(document, name, _EXTRA_KINDS[name]) for name in kind.extra_fields if document.get(name) is not None
    }
    error = kind(
        want(document, "message", str),
        provider=want(document, "provider", str, ""),
        model=want(document, "model", str, ""),
        status=want(document, "status", (int, type(None)), None),
        request_id=want(document, "request_id", str, ""),
        **extra,
    )
    error.retryable = want(document, "retryable", bool, kind.may_retry)
    return error
