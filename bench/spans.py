"""B6: spans accepted into the durable spool and delivered to a real MLflow, beside MLflow fed span by span.

``python -m bench.spans [--spans N] [--rounds N] [--json FILE]`` prints a table and writes JSON. Medians of the rounds,
after a warm-up round; spans look like those of tool calls with a kilobyte of output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from otel import names
from otel.delivery import Deliverer, DeliveryLimits, MlflowTarget
from otel.mlflow_reader import MlflowReader
from otel.mlflow_server import MlflowServer, MlflowServerSettings
from otel.redaction import Redactor
from otel.spans import Span, span_id, trace_id
from otel.spool import Spool

OUTPUT = "/dev/sda1      ext4   103081248 41234567  56607481  43% /\n" * 18
SPANS_A_RUN = 50
SECRETS = ("not-a-real-secret-0123456789", "sk-bench-not-a-real-key-0123456789")


def make_spans(count: int) -> list[Span]:
    """``count`` spans of runs of 50: 49 tool calls and their root, in the order they end."""
    made: list[Span] = []
    while len(made) < count:
        run = str(uuid.uuid4())
        start = time.time_ns()
        for number in range(1, SPANS_A_RUN + 1):
            root = number == SPANS_A_RUN
            made.append(
                Span(
                    trace_id=trace_id(run),
                    span_id=span_id(run, "root" if root else f"c{number}"),
                    parent_id=None if root else span_id(run, "root"),
                    name=names.MESSAGE_PROCESSED if root else names.TOOL_EXECUTION,
                    start_ns=start,
                    end_ns=start + 20_000_000,
                    attributes={
                        names.MLFLOW_SPAN_TYPE: names.CHAIN if root else names.TOOL,
                        names.RUN_ID: run,
                        names.MACHINE: "web-01",
                        names.CALL_ID: f"c{number}",
                        names.GEN_AI_TOOL_NAME: "exec",
                        names.DECISION: "allow",
                        names.RULE: "df",
                        names.EXIT_STATUS: 0,
                        names.MLFLOW_SPAN_INPUTS: {"argv": ["/usr/bin/df", "-hT"]},
                        names.MLFLOW_SPAN_OUTPUTS: {"stdout": OUTPUT, "exit_status": 0},
                    },
                    status="ok",
                )
            )
    return made[:count]


def put_rate(count: int, batch: int) -> float:
    """Spans per second taken durably (redacted, written, committed), ``batch`` spans in a put."""
    spans = make_spans(count)
    with tempfile.TemporaryDirectory() as directory, Spool(Path(directory) / "spans.db", Redactor(SECRETS)) as spool:
        began = time.perf_counter()
        for at in range(0, count, batch):
            spool.put(spans[at : at + batch])
        seconds = time.perf_counter() - began
        if spool.depth() != count:
            raise RuntimeError(f"put {count} spans, the spool holds {spool.depth()}")
    return count / seconds


async def delivery_rate(url: str, count: int, batch: int) -> float:
    """Spans per second from the spool into MLflow, checked to be there exactly once."""
    spans = make_spans(count)
    with tempfile.TemporaryDirectory() as directory, Spool(Path(directory) / "spans.db", Redactor(SECRETS)) as spool:
        spool.put(spans)
        sender = Deliverer(spool, MlflowTarget(url, "bench"), DeliveryLimits(batch=batch))
        try:
            await sender.target.endpoint()
            began = time.perf_counter()
            remaining = await sender.flush(600)
            seconds = time.perf_counter() - began
        finally:
            await sender.aclose()
        if remaining:
            raise RuntimeError(f"{remaining} of {count} spans were not delivered: {sender.state.trouble}")
    wanted = {(span.trace_id, span.span_id) for span in spans}
    with MlflowReader(url) as reader:
        found = [
            (trace, span.span_id)
            for trace, held in reader.spans_of({span.trace_id for span in spans}).items()
            for span in held
        ]
    if len(found) != len(wanted) or set(found) != wanted:
        raise RuntimeError(f"delivered {len(wanted)} spans, MLflow holds {len(found)}")
    return count / seconds


async def measure(count: int, rounds: int) -> dict[str, Any]:
    """Every number of B6, medians of ``rounds`` rounds."""

    def median(values: Sequence[float]) -> float:
        return statistics.median(values[1:])  # the first is the warm-up

    result: dict[str, Any] = {"spans": count, "rounds": rounds}
    result["put_batched_per_s"] = median([put_rate(count, 100) for _ in range(rounds + 1)])
    result["put_single_per_s"] = median([put_rate(count, 1) for _ in range(rounds + 1)])
    with tempfile.TemporaryDirectory() as directory:
        for start in ("start_first_s", "start_again_s"):  # without and with compiled bytecode, empty and made database
            with MlflowServer(MlflowServerSettings(Path(directory))) as server:
                result[start] = await server.wait_ready(120)
                if start == "start_first_s":
                    continue
                few = max(count // 10, 100)
                result["delivered_one_by_one_per_s"] = median(
                    [await delivery_rate(server.url, few, 1) for _ in range(rounds + 1)]
                )
                result["delivered_per_s"] = median(
                    [await delivery_rate(server.url, count, DeliveryLimits().batch) for _ in range(rounds + 1)]
                )
                result["mlflow_rss_mb"] = _rss_mb(server.pid)
    return result


def _rss_mb(pid: int | None) -> float | None:
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024, 1)
    return None


def table(result: dict[str, Any]) -> str:
    """The result as people read it, each number beside its target."""
    lines = [
        ("accepted, 100 spans a put", f"{result['put_batched_per_s']:,.0f} /s", "≥ 10,000 /s"),
        ("accepted, 1 span a put", f"{result['put_single_per_s']:,.0f} /s", ""),
        ("delivered to MLflow, batches", f"{result['delivered_per_s']:,.0f} /s", "≥ 1,500 /s"),
        (
            "delivered to MLflow, one by one",
            f"{result['delivered_one_by_one_per_s']:,.0f} /s",
            "(what batching is for)",
        ),
        ("MLflow answers, first start", f"{result['start_first_s']:.1f} s", ""),
        ("MLflow answers, later starts", f"{result['start_again_s']:.1f} s", ""),
        ("MLflow memory afterwards", f"{result['mlflow_rss_mb']:.0f} MB", ""),
    ]
    head = f"B6  {result['spans']} spans, median of {result['rounds']} rounds"
    return "\n".join([head, *(f"  {name:<34}{value:>14}  {target}" for name, value, target in lines)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.spans", description="Measure B6: the span spool and delivery."
    )
    parser.add_argument("--spans", type=int, default=5000, help="spans of one round (default 5000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    chosen = parser.parse_args(arguments)
    if chosen.spans < 1 or chosen.rounds < 1:
        parser.error(f"--spans and --rounds must be at least 1, got {chosen.spans} and {chosen.rounds}")
    result = asyncio.run(measure(chosen.spans, chosen.rounds))
    print(table(result))
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
