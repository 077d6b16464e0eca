"""Runs an observer on this very machine and prints its data: ``python -m tests.observers.run_here NAME [parameter=value]``.

``--user ID``: as this user, ``--root DIR``: below this directory (both need root), ``--save FILE``: also write the
results as a sample, ``--probes``: print what was asked and answered. ``all`` runs every observer with its defaults.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from tests.observers.probing import observe, write_sample
from tools.observers.registry import OBSERVERS, observer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("parameters", nargs="*")
    parser.add_argument("--user", type=int)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--root", default="/")
    parser.add_argument("--save")
    parser.add_argument("--probes", action="store_true")
    options = parser.parse_args()
    parameters = {}
    for text in options.parameters:
        key, _, value = text.partition("=")
        try:
            parameters[key] = json.loads(value)
        except ValueError:
            parameters[key] = value
    for name in OBSERVERS if options.name == "all" else [options.name]:
        if options.name == "all" and any(parameter.required for parameter in OBSERVERS[name].parameters):
            continue
        started = time.monotonic()
        probes, results, data = observe(
            observer(name), parameters, root=options.root, user=options.user, pid=options.pid
        )
        print(f"--- {name}: {len(probes)} probes, {time.monotonic() - started:.2f} s")
        for probe, result in zip(probes, results, strict=True) if options.probes else ():
            print(f"    {probe.label}: {result.error or result.exit_status} {len(result.stdout)} bytes")
        print(json.dumps(data, indent=1, ensure_ascii=False))
        if options.save:
            Path(options.save).write_text(write_sample(parameters, probes, results))


if __name__ == "__main__":
    main()
