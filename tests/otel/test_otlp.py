"""Our spans in OTLP and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from otel.otlp import decode, encode, refused_by
from otel.redaction import Redactor
from otel.spans import Span, SpanMalformed
from tests.otel.conftest import make_span, partly_refused
from tests.otel.test_spans import json_values, spans

RUN = "01920000-0000-7000-8000-000000000001"


@given(spans)
def test_a_redacted_span_can_always_be_encoded_and_comes_back(span: Span) -> None:
    clean = Redactor().span(span)
    request = ExportTraceServiceRequest.FromString(encode([clean], {"service.name": "x"}))
    [resource] = MessageToDict(request, preserving_proto_field_name=True)["resource_spans"]
    [document] = resource["scope_spans"][0]["spans"]
    back = decode(document)
    assert (back.trace_id, back.span_id, back.parent_id) == (clean.trace_id, clean.span_id, clean.parent_id)
    assert (back.name, back.start_ns, back.end_ns, back.status, back.kind) == (
        clean.name, clean.start_ns, clean.end_ns, clean.status, clean.kind,
    )  # fmt: skip
    assert set(back.attributes) == {name for name, value in clean.attributes.items() if value is not None}
    for name, value in back.attributes.items():
        if isinstance(value, (str, bool, int, float)):
            assert value == clean.attributes[name]


@given(json_values)
def test_any_json_is_a_span_or_a_clear_refusal(document: object) -> None:
    with pytest.raises(SpanMalformed):
        decode(document)  # type: ignore[arg-type]


def test_a_partial_success_is_read_and_anything_else_is_none() -> None:
    assert refused_by(partly_refused(2, "why")) == (2, "why")
    assert refused_by(b"") == (0, "")
    assert refused_by(json.dumps({"partialSuccess": {}}).encode())[0] == 0


def test_the_spool_and_redaction_start_without_the_opentelemetry_libraries() -> None:
    script = (
        "import sys, otel.spool, otel.delivery, otel.mlflow_server, otel.tree\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('opentelemetry', 'mlflow', 'google')])"
    )
    root = Path(__file__).parents[2]
    answer = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


def test_many_spans_share_one_resource() -> None:
    request = ExportTraceServiceRequest.FromString(encode([make_span(RUN, f"c{n}") for n in range(9)], {"a": "b"}))
    assert len(request.resource_spans) == 1
    assert len(request.resource_spans[0].scope_spans[0].spans) == 9
