"""Against a real MLflow server: every span there exactly once, whatever dies in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from otel import names
from otel.delivery import Deliverer, DeliveryLimits, MlflowTarget
from otel.mlflow_reader import MlflowError, MlflowReader
from otel.mlflow_server import MlflowServer, MlflowServerFailed, MlflowServerSettings
from otel.redaction import Redactor
from otel.spans import Span, SpanEvent, span_id, trace_id
from otel.spool import Spool
from tests.otel.conftest import make_span

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
EXPERIMENT = "chargehand-tests"


@pytest.fixture
def reader(mlflow_server: MlflowServer) -> Iterator[MlflowReader]:
    with MlflowReader(mlflow_server.url) as made:
        yield made


@pytest.fixture
async def sender(mlflow_server: MlflowServer, spool: Spool) -> AsyncIterator[Deliverer]:
    made = Deliverer(spool, MlflowTarget(mlflow_server.url, EXPERIMENT))
    yield made
    await made.aclose()


def whole_run(run: str) -> list[Span]:
    """The spans of one run in the order they end."""
    now = time.time_ns()

    def span(key: str, parent: str, name: str, start_s: float, end_s: float, **attributes: object) -> Span:
        return make_span(
            run, key, parent, name=name, start_ns=now + int(start_s * 1e9), end_ns=now + int(end_s * 1e9),
            attributes={names.MLFLOW_SPAN_TYPE: names.SPAN_TYPES[name], **{k.replace("__", "."): v for k, v in attributes.items()}},
        )  # fmt: skip

    usage = {
        names.GEN_AI_REQUEST_MODEL: "m",
        names.GEN_AI_USAGE_INPUT_TOKENS: 100,
        names.GEN_AI_USAGE_OUTPUT_TOKENS: 20,
    }
    root = {
        names.SESSION_ID: "web-01", names.USER_ID: "alice", names.trace_tag("machine"): "web-01",
        names.MLFLOW_TRACE_NAME: "health on web-01", names.MLFLOW_SPAN_INPUTS: {"text": "is it well?"},
        names.MLFLOW_SPAN_OUTPUTS: {"summary": "it is"},
    }  # fmt: skip
    return [
        span("queue", "root", names.MESSAGE_QUEUED, 0, 1),
        span("activate", "run", names.AGENT_ACTIVATE, 1, 2),
        span("i1", "task", names.MODEL_INFERENCE, 2, 3, **usage),
        span("c1", "task", names.TOOL_EXECUTION, 3, 4, **{names.MLFLOW_SPAN_INPUTS: {"argv": ["df", "-h"]}}),
        span("task", "run", names.TASK, 2, 5),
        span("run", "root", names.RUN_COMPLETED, 1, 8),
        span("root", "root", names.MESSAGE_PROCESSED, 0, 9, **root),
    ]


def all_span_ids(reader: MlflowReader, runs: list[str]) -> list[tuple[str, str]]:
    return [
        (trace, span.span_id)
        for trace, spans in reader.spans_of(trace_id(run) for run in runs).items()
        for span in spans
    ]


async def test_two_thousand_spans_arrive_exactly_once(sender: Deliverer, reader: MlflowReader) -> None:
    runs = [str(uuid.uuid4()) for _ in range(20)]
    spans = [make_span(run, key) for run in runs for key in [*(f"c{n}" for n in range(99)), "root"]]
    sender.spool.put(spans)
    assert await sender.flush(120) == 0
    held = all_span_ids(reader, runs)
    assert len(held) == 2000
    assert set(held) == {(span.trace_id, span.span_id) for span in spans}


@pytest.mark.parametrize("order", ["as they end", "root first", "one by one backwards"])
async def test_a_trace_ends_complete_in_any_order_of_arrival(
    sender: Deliverer, reader: MlflowReader, order: str, run_id: str
) -> None:
    spans = whole_run(run_id)
    batches = {
        "as they end": [spans],
        "root first": [spans[-1:], spans[:-1]],
        "one by one backwards": [[span] for span in reversed(spans)],
    }[order]
    for batch in batches:
        sender.spool.put(batch)
        assert await sender.flush(30) == 0
    info = reader.trace_info(trace_id(run_id))
    assert info is not None
    assert (info.state, info.duration_ms) == ("OK", 9000.0)
    assert info.tags["machine"] == "web-01"
    assert info.tags["mlflow.traceName"] == "health on web-01"
    assert info.metadata["mlflow.trace.session"] == "web-01"
    assert info.metadata["mlflow.trace.user"] == "alice"
    assert json.loads(info.metadata["mlflow.trace.tokenUsage"])["total_tokens"] == 120
    assert json.loads(info.request_preview) == {"text": "is it well?"}
    assert json.loads(info.response_preview) == {"summary": "it is"}
    assert reader.span_count(trace_id(run_id)) == len(spans)


async def test_a_trace_without_its_root_is_in_progress_and_a_failed_root_is_an_error(
    sender: Deliverer, reader: MlflowReader, run_id: str
) -> None:
    sender.spool.put([make_span(run_id, "c1")])
    assert await sender.flush(30) == 0
    info = reader.trace_info(trace_id(run_id))
    assert info is not None
    assert info.state == "IN_PROGRESS"
    sender.spool.put([make_span(run_id, "root", status="error", status_message="interrupted")])
    assert await sender.flush(30) == 0
    info = reader.trace_info(trace_id(run_id))
    assert info is not None
    assert info.state == "ERROR"


async def test_a_span_reads_back_as_it_was(sender: Deliverer, reader: MlflowReader, run_id: str) -> None:
    span = make_span(
        run_id, "c1", status="error", status_message="exit 1 – ß", events=(SpanEvent("retry", 10**18, {"n": 1}),),
        attributes={
            "text": "zeile\n\"quoted\" 'x' \\ ü 🙂", "int": 2**62, "float": 1.5, "bool": False, "list": ["a", "b"],
            names.MLFLOW_SPAN_INPUTS: {"argv": ["/usr/bin/df", "-h"], "deep": {"n": [1, 2]}}, names.MLFLOW_SPAN_TYPE: "TOOL",
        },
    )  # fmt: skip
    sender.spool.put([span])
    assert await sender.flush(30) == 0
    [back] = reader.trace(trace_id(run_id)) or []
    attributes = dict(back.attributes)
    assert attributes.pop("mlflow.traceRequestId") == f"tr-{trace_id(run_id)}"
    assert attributes == span.attributes
    assert (back.span_id, back.parent_id, back.name) == (span.span_id, span.parent_id, span.name)
    assert (back.start_ns, back.end_ns, back.status) == (span.start_ns, span.end_ns, span.status)
    assert (back.status_message, back.events) == (span.status_message, span.events)


async def test_a_batch_sent_twice_is_held_once(
    mlflow_server: MlflowServer, reader: MlflowReader, run_id: str, tmp_path: Path
) -> None:
    spans = whole_run(run_id)
    for name in ("first", "second"):  # two spools: the second knows nothing of the first delivery
        with Spool(tmp_path / name, Redactor()) as spool:
            spool.put(spans)
            sender = Deliverer(spool, MlflowTarget(mlflow_server.url, EXPERIMENT))
            assert await sender.flush(30) == 0
            await sender.aclose()
    assert reader.span_count(trace_id(run_id)) == len(spans)
    info = reader.trace_info(trace_id(run_id))
    assert info is not None
    assert json.loads(info.metadata["mlflow.trace.tokenUsage"])["total_tokens"] == 120


async def test_no_byte_of_a_secret_reaches_mlflow(mlflow_server: MlflowServer, run_id: str, tmp_path: Path) -> None:
    canary = 'c4nary"\\ZweiQ9\nXv7end-of-it'
    with Spool(tmp_path / "spans.db", Redactor([canary])) as spool:
        text = f"before {canary} after"
        spool.put([
            make_span(
                run_id, "root", name=text, status="error", status_message=text, events=(SpanEvent(text, 1, {text: text}),),
                attributes={
                    text: text, names.MLFLOW_SPAN_INPUTS: {text: [text, {"a": json.dumps({"b": text})}]},
                    names.MLFLOW_SPAN_OUTPUTS: json.dumps(text), names.USER_ID: text, names.trace_tag("x"): text,
                },
            )
        ])  # fmt: skip
        sender = Deliverer(spool, MlflowTarget(mlflow_server.url, EXPERIMENT))
        assert await sender.flush(30) == 0
        await sender.aclose()
    assert mlflow_server.log_path.parent == mlflow_server.database_path.parent
    stored = b"".join(
        path.read_bytes() for path in mlflow_server.database_path.parent.iterdir() if path.is_file()
    ) + b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert run_id.replace("-", "").encode() in stored
    for piece in ("c4nary", "ZweiQ9", "Xv7end"):
        assert piece.encode() not in stored


async def test_mlflow_may_come_up_long_after_the_spans(spool: Spool, tmp_path: Path, run_id: str) -> None:
    server = MlflowServer(MlflowServerSettings(tmp_path / "mlflow", port=_free_port()))
    url = f"http://127.0.0.1:{server.settings.port}"
    sender = Deliverer(spool, MlflowTarget(url, "late"), DeliveryLimits(backoff_max_s=0.5))
    stop = asyncio.Event()
    running = asyncio.create_task(sender.run(stop))
    spool.put(whole_run(run_id))
    async with asyncio.timeout(10):
        while not sender.state.failures:
            await asyncio.sleep(0.01)
    server.start()
    try:
        await server.wait_ready(120)
        assert await sender.flush(60) == 0
        stop.set()
        await running
        with MlflowReader(url) as reader:
            assert reader.span_count(trace_id(run_id)) == 7
    finally:
        server.stop()


DELIVER = """
import asyncio, sys
from otel.delivery import Deliverer, DeliveryLimits, MlflowTarget
from otel.redaction import Redactor
from otel.spool import Spool
async def main():
    spool = Spool(sys.argv[1], Redactor())
    sender = Deliverer(spool, MlflowTarget(sys.argv[2], "chargehand-tests"), DeliveryLimits(batch=20))
    print("ready", flush=True)
    print(await sender.flush(60), flush=True)
asyncio.run(main())
"""


async def test_a_deliverer_killed_in_the_middle_leaves_every_span_exactly_once(
    mlflow_server: MlflowServer, sender: Deliverer, reader: MlflowReader
) -> None:
    runs = [str(uuid.uuid4()) for _ in range(4)]
    spans = [make_span(run, key) for run in runs for key in [*(f"c{n}" for n in range(149)), "root"]]
    sender.spool.put(spans)
    kills = 0
    for remaining in (550, 400, 250):  # killed whenever some more have been marked, wherever it stands then
        child = subprocess.Popen(
            [sys.executable, "-c", DELIVER, str(sender.spool.path), mlflow_server.url], cwd=ROOT, stdout=subprocess.PIPE
        )
        try:
            async with asyncio.timeout(60):
                while sender.spool.depth() > remaining:
                    await asyncio.sleep(0.001)
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    assert kills == 3
    assert 0 < sender.spool.depth() < 600
    assert await sender.flush(60) == 0
    held = all_span_ids(reader, runs)
    assert len(held) == 600
    assert set(held) == {(span.trace_id, span.span_id) for span in spans}


async def test_spans_of_a_time_range_are_found_for_the_completeness_check(
    sender: Deliverer, reader: MlflowReader, run_id: str
) -> None:
    long_ago = 10**18
    spans = [
        make_span(run_id, key, start_ns=long_ago + offset, end_ns=long_ago + 10**9)
        for offset, key in enumerate(("c1", "c2", "root"))
    ]
    other = make_span(str(uuid.uuid4()), "root", start_ns=long_ago + 10**10, end_ns=long_ago + 10**10)
    sender.spool.put([*spans, other])
    assert await sender.flush(30) == 0
    experiment = reader.experiment_id(EXPERIMENT)
    assert experiment is not None
    found = reader.span_ids(experiment, 10**12, 10**12 + 5000)
    assert found == {trace_id(run_id): {span.span_id for span in spans}}


async def test_an_experiment_deleted_in_between_is_restored(
    mlflow_server: MlflowServer, reader: MlflowReader, spool: Spool
) -> None:
    name = f"deleted-{uuid.uuid4()}"
    sender = Deliverer(spool, MlflowTarget(mlflow_server.url, name, recheck_s=0.0))
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    spool.put([make_span(first, "root")])
    assert await sender.flush(30) == 0
    identity = reader.experiment_id(name)
    assert identity is not None
    reader._ask("POST", "/api/2.0/mlflow/experiments/delete", json={"experiment_id": identity})
    assert reader.experiment_id(name) is None
    spool.put([make_span(second, "root")])
    assert await sender.flush(30) == 0
    await sender.aclose()
    assert reader.experiment_id(name) == identity
    assert reader.span_count(trace_id(second)) == 1


def test_a_trace_that_is_not_there_is_none(reader: MlflowReader) -> None:
    assert reader.trace(trace_id(str(uuid.uuid4()))) is None
    assert reader.trace_info(trace_id(str(uuid.uuid4()))) is None
    assert reader.span_count(trace_id(str(uuid.uuid4()))) == 0
    assert reader.experiment_id("no-such-experiment") is None


def test_a_server_that_is_not_there_is_a_clear_error() -> None:
    with MlflowReader("http://127.0.0.1:1") as reader, pytest.raises(MlflowError, match="is the server up"):
        reader.trace("0" * 31 + "1")


def test_the_server_answers_to_its_own_name_and_port_only(mlflow_server: MlflowServer) -> None:
    def status(host: str) -> int:
        request = urllib.request.Request(f"{mlflow_server.url}/api/2.0/mlflow/experiments/get?experiment_id=0")
        request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    port = mlflow_server.url.rsplit(":", 1)[-1]
    assert status(f"localhost:{port}") == 200
    assert status("evil.example") == 403
    assert status(f"evil.example:{port}") == 403


def test_the_ui_is_there_for_the_link(mlflow_server: MlflowServer, reader: MlflowReader) -> None:
    url = reader.trace_url("ab" * 16, "7")
    assert url == f"{mlflow_server.url}/#/experiments/7/traces?selectedEvaluationId=tr-{'ab' * 16}"
    with urllib.request.urlopen(mlflow_server.url) as answer:
        assert b"<html" in answer.read().lower()


PARENT = """
import asyncio, sys, time
from pathlib import Path
from otel.mlflow_server import MlflowServer, MlflowServerSettings
server = MlflowServer(MlflowServerSettings(Path(sys.argv[1])))
if sys.argv[2] == "thread":
    import threading
    thread = threading.Thread(target=server.start); thread.start(); thread.join()
else:
    server.start()
asyncio.run(server.wait_ready(120))
print(server.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("started_from", ["main", "thread"])
def test_the_server_dies_with_its_parent(tmp_path: Path, started_from: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "mlflow"), started_from], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdin is not None
    child = int(parent.stdout.readline())
    assert _running(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    parent.stdin.close()
    for _ in range(500):
        if not _running(child):
            break
        time.sleep(0.01)
    assert not _running(child)


async def test_stop_leaves_no_process_and_the_data_stay(tmp_path: Path, run_id: str, spool: Spool) -> None:
    server = MlflowServer(MlflowServerSettings(tmp_path / "mlflow"))
    for expected in (0, 1):
        server.start()
        child = server.pid
        await server.wait_ready(120)
        with MlflowReader(server.url) as reader:
            assert reader.span_count(trace_id(run_id)) == expected
        spool.put([make_span(run_id, "root")])
        sender = Deliverer(spool, MlflowTarget(server.url, "again"))
        assert await sender.flush(30) == 0
        await sender.aclose()
        with pytest.raises(MlflowServerFailed, match="already runs"):
            server.start()
        server.stop()
        server.stop()
        assert child is not None
        assert not _running(child)
        assert not server.alive()
    assert oct(server.settings.directory.stat().st_mode & 0o777) == "0o700"
    assert span_id(run_id, "root").encode() in server.database_path.read_bytes()


async def test_a_port_that_is_taken_and_a_child_that_ends_are_clear_errors(tmp_path: Path) -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = MlflowServer(MlflowServerSettings(tmp_path / "a", port=taken.getsockname()[1]))
        with pytest.raises(MlflowServerFailed, match="Address already in use"):
            server.start()
    broken = MlflowServer(MlflowServerSettings(tmp_path / "b"))
    broken.start()
    try:
        with pytest.raises(MlflowServerFailed, match="does not answer"):
            await broken.wait_ready(0.3)
        assert broken.pid is not None
        os.kill(broken.pid, signal.SIGKILL)
        with pytest.raises(MlflowServerFailed, match=r"ended with status -9.*its log"):
            await broken.wait_ready(60)
    finally:
        broken.stop()
    with pytest.raises(MlflowServerFailed, match=r"call start\(\)"):
        await broken.wait_ready(1)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[-1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
