"""Reading traces back from MLflow over its REST API, and finding or making the experiment they stand in.

Owns: the paths, filters and paging of MLflow 3's REST interface, and MLflow's form of a trace id (``tr-`` + 32 hex).
Deliberately does not know: delivery, the spool, MLflow's Python library (its import costs seconds and 250 MB).

Every call is synchronous and bounded by ``timeout_s``; from asyncio use ``asyncio.to_thread``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

import httpx

from otel.otlp import decode
from otel.spans import Span, SpanMalformed

_PREFIX: Final = "tr-"
_PAGE: Final = 200  # traces of one search answer; MLflow refuses more than 500
_BATCH: Final = 50  # traces of one batchGet: their ids travel in the address, which proxies cap at 8 KiB


class MlflowError(RuntimeError):
    """MLflow could not be asked or answered with an error. ``status``: the HTTP status, ``None`` if nothing answered."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class TraceInfo:
    """What MLflow knows of a trace without its spans. ``state``: ``OK``, ``ERROR`` or ``IN_PROGRESS`` (no root yet);
    ``request_ms`` milliseconds since the epoch; ``duration_ms`` ``None`` while unknown."""

    trace_id: str
    experiment_id: str
    state: str
    request_ms: int
    duration_ms: float | None
    tags: Mapping[str, str]
    metadata: Mapping[str, str]
    request_preview: str = ""
    response_preview: str = ""


class MlflowReader:
    """A small client of one MLflow server.

    ``base_url``: ``http://host:port`` with an optional path prefix; ``headers``: e.g. an authorization; ``timeout_s``:
    seconds for one answer.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None, timeout_s: float = 30.0) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            shown = parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1]).geturl()
            raise ValueError(f"the address of MLflow must look like http://host:port, got {shown!r}")
        self.base_url = base_url.rstrip("/")
        # A proxy from the environment would hide an MLflow on this machine.
        self._client = httpx.Client(
            base_url=self.base_url, headers=dict(headers or {}), timeout=timeout_s, trust_env=not on_loopback(base_url)
        )

    def __repr__(self) -> str:
        parts = urlsplit(self.base_url)
        return f"MlflowReader({parts.scheme}://{parts.hostname}:{parts.port})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def experiment_id(self, name: str, create: bool = False) -> str | None:
        """The id of the experiment ``name``; ``None`` if there is none and ``create`` is not set.

        With ``create`` a missing one is made and a deleted one restored (MLflow keeps the name of a deleted one taken).
        Raises ``MlflowError``.
        """
        found = self._ask(
            "GET", "/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": name}, absent=True
        )
        if found is not None:
            experiment = found["experiment"]
            identity = str(experiment["experiment_id"])
            if experiment.get("lifecycle_stage", "active") == "active":
                return identity
            if not create:
                return None
            self._ask("POST", "/api/2.0/mlflow/experiments/restore", json={"experiment_id": identity})
            return identity
        if not create:
            return None
        try:
            made = self._ask("POST", "/api/2.0/mlflow/experiments/create", json={"name": name})
        except MlflowError as error:
            if error.status == 400:  # made by another gateway between the two questions
                return self.experiment_id(name, create=False)
            raise
        return str(_must(made)["experiment_id"])

    def trace(self, trace_id: str) -> list[Span] | None:
        """The spans MLflow holds of a trace (32 hex digits), ordered by start; ``None`` if it has no such trace."""
        found = self._ask(
            "GET",
            "/api/3.0/mlflow/traces/get",
            # Without allow_partial MLflow sleeps and asks itself again for seconds when a trace is not complete.
            params={"trace_id": _PREFIX + trace_id, "allow_partial": "true"},
            absent=True,
        )
        return None if found is None else _spans(found["trace"])

    def trace_info(self, trace_id: str) -> TraceInfo | None:
        """State, times, tags and metadata of a trace; ``None`` if MLflow has no such trace."""
        found = self._ask("GET", f"/api/3.0/mlflow/traces/{_PREFIX}{trace_id}", absent=True)
        return None if found is None else _info(found["trace"]["trace_info"])

    def span_count(self, trace_id: str) -> int:
        """How many spans MLflow holds of a trace; 0 if it has no such trace."""
        return len(self.trace(trace_id) or ())

    def traces(self, experiment_id: str, start_ms: int, end_ms: int) -> Iterator[TraceInfo]:
        """Every trace of an experiment that began in ``[start_ms, end_ms)`` (milliseconds since the epoch)."""
        token = ""
        while True:
            body: dict[str, Any] = {
                "locations": [{"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment_id}}],
                "filter": f"timestamp_ms >= {int(start_ms)} AND timestamp_ms < {int(end_ms)}",
                "max_results": _PAGE,
                "order_by": ["timestamp_ms ASC"],
            }
            if token:
                body["page_token"] = token
            answer = _must(self._ask("POST", "/api/3.0/mlflow/traces/search", json=body))
            for document in answer.get("traces", ()):
                yield _info(document)
            token = answer.get("next_page_token", "")
            if not token:
                return

    def spans_of(self, trace_ids: Iterable[str]) -> dict[str, list[Span]]:
        """The spans of many traces, by trace id; traces MLflow does not have are left out."""
        wanted = [_PREFIX + trace_id for trace_id in trace_ids]
        found: dict[str, list[Span]] = {}
        for at in range(0, len(wanted), _BATCH):
            answer = _must(
                self._ask("GET", "/api/3.0/mlflow/traces/batchGet", params={"trace_ids": wanted[at : at + _BATCH]})
            )
            for trace in answer.get("traces", ()):
                found[_bare(trace["trace_info"]["trace_id"])] = _spans(trace)
        return found

    def span_ids(self, experiment_id: str, start_ms: int, end_ms: int) -> dict[str, set[str]]:
        """The span ids MLflow holds, by trace id, for traces that began in the range: the completeness check's view."""
        ids = [info.trace_id for info in self.traces(experiment_id, start_ms, end_ms)]
        return {trace: {span.span_id for span in spans} for trace, spans in self.spans_of(ids).items()}

    def trace_url(self, trace_id: str, experiment_id: str) -> str:
        """Where a person sees the trace in MLflow's UI."""
        return trace_url(self.base_url, trace_id, experiment_id)

    def ready(self) -> bool:
        """Whether the server answers. Never raises."""
        try:
            return self._client.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def _ask(
        self, method: str, path: str, *, params: Mapping[str, str | Sequence[str]] | None = None,
        json: Mapping[str, Any] | None = None, absent: bool = False,
    ) -> dict[str, Any] | None:  # fmt: skip
        """The JSON answer; ``None`` for "does not exist" if ``absent`` allows it."""
        try:
            response = self._client.request(method, path, params=params, json=json)
        except httpx.HTTPError as error:
            raise MlflowError(
                f"asked MLflow {method} {path}, expected an answer, got {type(error).__name__}: {error}; "
                "is the server up and the address right?"
            ) from error
        if response.status_code == 404 and absent and b"RESOURCE_DOES_NOT_EXIST" in response.content:
            return None
        if response.status_code != 200:
            hint = "check allowed hosts and the authorization" if response.status_code in (401, 403) else "see its log"
            raise MlflowError(
                f"asked MLflow {method} {path}, expected 200, got {response.status_code} {response.text[:300]!r}; {hint}",
                response.status_code,
            )
        try:
            document = response.json()
        except ValueError as error:
            raise MlflowError(
                f"asked MLflow {method} {path}, expected JSON, got {response.text[:100]!r}; is it an MLflow server?",
                200,
            ) from error
        if not isinstance(document, dict):
            raise MlflowError(f"asked MLflow {method} {path}, expected an object, got {str(document)[:100]!r}", 200)
        return document


def on_loopback(url: str) -> bool:
    """Whether the address names this machine's loopback interface."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def trace_url(base_url: str, trace_id: str, experiment_id: str) -> str:
    """Where a person sees the trace in MLflow's UI."""
    return (
        f"{base_url.rstrip('/')}/#/experiments/{quote(experiment_id)}/traces?selectedEvaluationId={_PREFIX}{trace_id}"
    )


def _must(document: dict[str, Any] | None) -> dict[str, Any]:
    assert document is not None  # only asked for with absent=False
    return document


def _bare(trace_id: str) -> str:
    return trace_id.removeprefix(_PREFIX)


def _spans(trace: Mapping[str, Any]) -> list[Span]:
    try:
        return sorted((decode(span) for span in trace.get("spans", ())), key=lambda span: (span.start_ns, span.span_id))
    except SpanMalformed as error:
        raise MlflowError(f"MLflow gave back a trace that cannot be read: {error}", 200) from error


def _info(document: Mapping[str, Any]) -> TraceInfo:
    try:
        duration = document.get("execution_duration")
        request = datetime.fromisoformat(document["request_time"])
        return TraceInfo(
            trace_id=_bare(document["trace_id"]),
            experiment_id=str(document.get("trace_location", {}).get("mlflow_experiment", {}).get("experiment_id", "")),
            state=document.get("state", "STATE_UNSPECIFIED"),
            request_ms=round(request.timestamp() * 1000),
            duration_ms=None if duration is None else float(str(duration).rstrip("s")) * 1000,
            tags=dict(document.get("tags", {})),
            metadata=dict(document.get("trace_metadata", {})),
            request_preview=document.get("request_preview", ""),
            response_preview=document.get("response_preview", ""),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MlflowError(
            f"MLflow gave back a trace that cannot be read: {str(document)[:200]!r}: {error}", 200
        ) from error
