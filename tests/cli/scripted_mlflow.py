"""MLflow for tests: a real HTTP server that answers the few questions of ``otel.mlflow_reader`` from given spans."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from otel.otlp import encode
from otel.spans import Span


class ScriptedMlflow:
    """Listens while the context lasts and holds what ``put`` gave it."""

    def __init__(self) -> None:
        self.traces: dict[str, list[Span]] = {}
        holder = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                status, document = holder.answer(parts.path, parse_qs(parts.query))
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def put(self, spans: Iterable[Span]) -> None:
        for span in spans:
            self.traces.setdefault(span.trace_id, []).append(span)

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, dict[str, Any]]:
        if path == "/health":
            return 200, {}
        if path.endswith("/experiments/get-by-name"):
            return 200, {"experiment": {"experiment_id": "7", "lifecycle_stage": "active"}}
        wanted = [trace.removeprefix("tr-") for name in ("trace_id", "trace_ids") for trace in query.get(name, [])]
        found = [trace for trace in wanted if trace in self.traces]
        if path.endswith("/traces/batchGet"):
            return 200, {"traces": [self._trace(trace) for trace in found]}
        if path.endswith("/traces/get") and found:
            return 200, {"trace": self._trace(found[0])}
        return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}

    def _trace(self, trace: str) -> dict[str, Any]:
        request = MessageToDict(
            ExportTraceServiceRequest.FromString(encode(self.traces[trace])), preserving_proto_field_name=True
        )
        spans = [
            span
            for resource in request["resource_spans"]
            for scope in resource["scope_spans"]
            for span in scope["spans"]
        ]
        return {"trace_info": {"trace_id": f"tr-{trace}"}, "spans": spans}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
