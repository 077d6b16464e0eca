"""Fixtures of the tracing tests: a scripted OTLP endpoint in the test process, and one real MLflow for the slow ones."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from otel import names
from otel.mlflow_server import MlflowServer, MlflowServerSettings
from otel.redaction import Redactor
from otel.spans import Span, span_id, trace_id
from otel.spool import Spool

# A machine shared with others stalls now and then: the time of one example says nothing.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def make_span(run: str, key: str, parent: str | None = "root", **changes: object) -> Span:
    """A tool call's span of the run, starting now; ``key`` ``root`` makes the root."""
    start = time.time_ns()
    values: dict[str, object] = {
        "trace_id": trace_id(run),
        "span_id": span_id(run, key),
        "parent_id": None if key == "root" or parent is None else span_id(run, parent),
        "name": names.MESSAGE_PROCESSED if key == "root" else names.TOOL_EXECUTION,
        "start_ns": start,
        "end_ns": start + 1_000_000,
        "attributes": {names.MLFLOW_SPAN_TYPE: names.TOOL, names.CALL_ID: key},
        "status": "ok",
    }
    values.update(changes)
    return Span(**values)  # type: ignore[arg-type]


@pytest.fixture
def run_id() -> str:
    return str(uuid.uuid4())


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with Spool(tmp_path / "spans.db", Redactor()) as made:
        yield made


@dataclasses.dataclass
class ScriptedEndpoint:
    """An OTLP/HTTP endpoint whose answers are scripted: ``answer`` gets the spans' ids of a request and gives status,
    headers and body; ``requests`` holds the span ids of every request, ``held`` those of accepted ones."""

    port: int
    answer: Callable[[list[str]], tuple[int, dict[str, str], bytes]]
    requests: list[list[str]] = dataclasses.field(default_factory=list)
    held: list[str] = dataclasses.field(default_factory=list)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/traces"


def accepted(_: list[str]) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, b""


def partly_refused(count: int, reason: str) -> bytes:
    response = ExportTraceServiceResponse()
    response.partial_success.rejected_spans = count
    response.partial_success.error_message = reason
    return response.SerializeToString()


@pytest.fixture
async def endpoint() -> AsyncIterator[ScriptedEndpoint]:
    scripted = ScriptedEndpoint(0, accepted)
    connections: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                request = ExportTraceServiceRequest.FromString(body)
                ids = [
                    span.span_id.hex()
                    for resource in request.resource_spans
                    for scope in resource.scope_spans
                    for span in scope.spans
                ]
                scripted.requests.append(ids)
                scripted.headers.append(headers)
                status, extra, answer = scripted.answer(ids)
                if status == 200 and not answer:
                    scripted.held.extend(ids)
                lines = [
                    f"HTTP/1.1 {status} X",
                    f"content-length: {len(answer)}",
                    *(f"{k}: {v}" for k, v in extra.items()),
                ]
                writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            connections.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    scripted.port = server.sockets[0].getsockname()[1]
    yield scripted
    server.close()
    for task in tuple(connections):
        task.cancel()
    await asyncio.gather(*connections, return_exceptions=True)
    await server.wait_closed()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One real MLflow for all slow tests."""
    with MlflowServer(MlflowServerSettings(tmp_path_factory.mktemp("mlflow"))) as server:
        asyncio.run(server.wait_ready(120))
        yield server
