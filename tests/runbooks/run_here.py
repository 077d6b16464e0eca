"""Runs a runbook on this very machine and prints its report: ``python -m tests.runbooks.run_here NAME [--user ID]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from supervisor.runbooks import get, load_all
from tests.observers.probing import observe
from tools.observers.registry import observer
from tools.runbooks import Observed, evaluate, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="health")
    parser.add_argument("--user", type=int)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--root", default="/")
    options = parser.parse_args()
    runbook = get(options.name, load_all([Path(p) for p in ()]))
    results: dict[str, Observed] = {}
    for at, call in enumerate(plan(runbook), 1):
        _, _, data = observe(
            observer(call.observer), call.parameters, user=options.user, root=options.root, pid=options.pid
        )
        results[call.step_id] = (f"c{at}", data, "")
    report = evaluate(runbook, results)
    print(report.summary)
    for finding in report.findings:
        print(f"[{finding.severity}] {finding.title} ({', '.join(finding.evidence)}; {finding.id})")
        for text in (finding.detail, finding.suggestion):
            if text:
                print(f"    {text}")
    for note in report.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    main()
