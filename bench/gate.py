"""B4: what a decision of the gate costs.

Owns: the measurement with the default policy, one process, over the ordinary commands of the test corpus (allowed) and
the adversarial ones (refused). Deliberately does not know: targets; it prints figures.

Run: ``python -m bench.gate [--json] [--seconds N]``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

from supervisor.policy.loader import default_policy
from tools.gate import LexicalHost, decide
from tools.policy import Policy
from tools.values import ToolCall

_CORPUS = Path(__file__).parent.parent / "tests" / "gate" / "corpus"


def calls(name: str) -> list[ToolCall]:
    """The exec calls of one corpus file, text and argv as they stand there."""
    found = []
    for number, line in enumerate((_CORPUS / f"{name}.jsonl").read_text("utf-8").splitlines()):
        entry = json.loads(line)
        arguments = {key: entry[key] for key in ("argv", "command") if key in entry}
        if arguments:
            found.append(ToolCall(f"c{number}", "exec", arguments))
    return found


def measure(policy: Policy, asked: list[ToolCall], seconds: float) -> dict[str, Any]:
    """Decisions/s and the distribution of single decisions in microseconds over ``seconds`` of wall time."""
    host = LexicalHost()
    for call in asked:
        decide(policy, call, host)
    # What is built before the run lives as long as the broker; collecting it again and again is not part of a decision.
    gc.freeze()
    samples: list[float] = []
    clock = time.perf_counter
    until = clock() + seconds
    while clock() < until:
        for call in asked:
            begun = clock()
            decide(policy, call, host)
            samples.append(clock() - begun)
    samples.sort()
    return {
        "decisions": len(samples),
        "per_s": round(len(samples) / sum(samples)),
        "p50_us": round(statistics.median(samples) * 1e6, 1),
        "p99_us": round(samples[int(len(samples) * 0.99)] * 1e6, 1),
        "max_us": round(samples[-1] * 1e6, 1),
    }


def main() -> None:
    """Prints a table, or one JSON document with ``--json``."""
    parser = argparse.ArgumentParser(description="gate decisions per second and their cost")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    document = default_policy()
    begun = time.perf_counter()
    policy = Policy.from_json(document)
    loaded = time.perf_counter() - begun
    result: dict[str, Any] = {"binaries": len(policy.rules), "policy_load_ms": round(loaded * 1000, 1)}
    for name in ("ordinary", "adversarial"):
        result[name] = measure(policy, calls(name), options.seconds)
    if options.json:
        print(json.dumps(result))
        return
    print(f"policy: {result['binaries']} binaries, loaded in {result['policy_load_ms']} ms")
    for name in ("ordinary", "adversarial"):
        row = result[name]
        print(f"{name:12} {row['per_s']:>8} decisions/s   p50 {row['p50_us']:>6} us   p99 {row['p99_us']:>6} us")


if __name__ == "__main__":
    main()
