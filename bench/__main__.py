"""``python -m bench [B1 B4 B5 B6 B9 …] [--json FILE] [--rounds N]``: run benchmarks, print a table, write JSON.

Without names: B1 and B9, which need the lab (root, see docs/lab.md).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

# Measured together, in the lab; the others are modules that print their own table.
OWN = ("B1", "B9")
OTHERS = {"B4": "bench.gate", "B5": "bench.audit", "B6": "bench.spans"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of Chargehand.")
    parser.add_argument("names", nargs="*", default=["B1", "B9"], help=f"of {', '.join(sorted([*OWN, *OTHERS]))}")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds after one warm-up (at least 5)")
    parser.add_argument("--json", type=Path, default=Path("bench/results/latest.json"), help="where to write the JSON")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(OWN) - set(OTHERS))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(sorted([*OWN, *OTHERS]))}")
    document: dict[str, Any] = {"box": f"{os.cpu_count()} cores, {platform.platform()}"}
    if set(given.names) & set(OWN):
        from bench.governed_run import measure, table

        document.update(measure(max(5, given.rounds)))
        print(table(document))
    for name in given.names:
        if name in OTHERS:
            print(f"\n{name}")
            module = importlib.import_module(OTHERS[name])
            sys.argv = [OTHERS[name]]
            module.main()
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\nJSON: {given.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
