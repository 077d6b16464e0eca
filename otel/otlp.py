"""Our spans in OTLP, by the official encoder, and back from the OTLP that MLflow answers with.

Owns: the one place that knows the OpenTelemetry libraries.
Deliberately does not know: HTTP, the spool, redaction (what comes here has passed it).

The libraries are imported when first used: the supervisor starts without them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any, Final

from otel.spans import KINDS, Kind, Span, SpanEvent, SpanMalformed, Status

CONTENT_TYPE: Final = "application/x-protobuf"
SCOPE: Final = "chargehand"
_STATUS_FROM_OTLP: Final[dict[str, Status]] = {"STATUS_CODE_OK": "ok", "STATUS_CODE_ERROR": "error"}


def encode(spans: Iterable[Span], resource: Mapping[str, str] | None = None) -> bytes:
    """An ``ExportTraceServiceRequest`` with the spans in the given order; ``resource``: what emitted them.

    Attributes that are ``None`` are left out: OTLP has no null.
    """
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

    codes = {"ok": StatusCode.OK, "error": StatusCode.ERROR, "unset": StatusCode.UNSET}
    kinds = {kind: SpanKind[kind.upper()] for kind in KINDS}
    emitter = Resource(dict(resource or {}))
    scope = InstrumentationScope(SCOPE)
    sampled = TraceFlags(TraceFlags.SAMPLED)
    readable = []
    for span in spans:
        trace = int(span.trace_id, 16)
        parent = None if span.parent_id is None else SpanContext(trace, int(span.parent_id, 16), False, sampled)
        readable.append(
            ReadableSpan(
                name=span.name,
                context=SpanContext(trace, int(span.span_id, 16), False, sampled),
                parent=parent,
                resource=emitter,
                attributes=_present(span.attributes),
                events=[Event(event.name, _present(event.attributes), event.at_ns) for event in span.events],
                kind=kinds[span.kind],
                # A description beside anything but an error is dropped by the library with a warning.
                status=Status(codes[span.status], (span.status_message or None) if span.status == "error" else None),
                start_time=span.start_ns,
                end_time=span.end_ns,
                instrumentation_scope=scope,
            )
        )
    return bytes(encode_spans(readable).SerializeToString())


def refused_by(answer: bytes) -> tuple[int, str]:
    """How many spans an OTLP answer says were refused, and why; ``(0, "")`` for a full success or an answer that is
    no OTLP (some servers answer 200 with an empty or a JSON body)."""
    if not answer:
        return 0, ""
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    try:
        response = ExportTraceServiceResponse.FromString(answer)
    except DecodeError:
        return 0, ""
    return response.partial_success.rejected_spans, response.partial_success.error_message


def decode(document: Mapping[str, Any]) -> Span:
    """One span of MLflow's REST answer (OTLP in protobuf's JSON form: ids in base64, 64-bit integers as text).

    Raises ``SpanMalformed`` when it is none.
    """
    try:
        status = document.get("status") or {}
        return Span(
            trace_id=_hex(document["trace_id"]),
            span_id=_hex(document["span_id"]),
            parent_id=_hex(document["parent_span_id"]) if document.get("parent_span_id") else None,
            name=document["name"],
            start_ns=int(document.get("start_time_unix_nano", 0)),
            end_ns=int(document.get("end_time_unix_nano", 0)),
            attributes={name: plain(value) for name, value in _pairs(document.get("attributes"))},
            events=tuple(
                SpanEvent(
                    event["name"],
                    int(event.get("time_unix_nano", 0)),
                    {name: plain(value) for name, value in _pairs(event.get("attributes"))},
                )
                for event in document.get("events") or ()
            ),
            status=_STATUS_FROM_OTLP.get(str(status.get("code")), "unset"),
            status_message=str(status.get("message") or ""),
            kind=_kind(document.get("kind")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise SpanMalformed(f"expected a span as MLflow gives it back, got {str(document)[:200]!r}: {error}") from error


def plain(value: Any) -> Any:
    """The plain value of an OTLP ``AnyValue`` in JSON, or of the plain JSON that MLflow's older form uses."""
    if not isinstance(value, Mapping):
        return value
    if "string_value" in value:
        return value["string_value"]
    if "bool_value" in value:
        return value["bool_value"]
    if "int_value" in value:
        return int(value["int_value"])
    if "double_value" in value:
        return value["double_value"]
    if "array_value" in value:
        return [plain(item) for item in value["array_value"].get("values", ())]
    if "kvlist_value" in value:
        return {name: plain(item) for name, item in _pairs(value["kvlist_value"].get("values"))}
    return None if not value else dict(value)


def _pairs(attributes: Any) -> list[tuple[str, Any]]:
    if isinstance(attributes, Mapping):
        return list(attributes.items())
    return [(pair.get("key", ""), pair.get("value")) for pair in attributes or ()]


def _hex(value: str) -> str:
    return base64.b64decode(value, validate=True).hex()


def _kind(value: Any) -> Kind:
    name = str(value or "").removeprefix("SPAN_KIND_").lower()
    return next((kind for kind in KINDS if kind == name), "internal")


def _present(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _without_none(value) for name, value in attributes.items() if value is not None}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return ["null" if item is None else _without_none(item) for item in value]
    return value
