"""Writes what the observers make of each sample as its expected data: ``python -m tests.observers.accept [PATTERN]``.

To be followed by reading the difference: what is written here is what the tests hold the observers to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.observers.probing import read_sample, replay
from tools.observers.registry import observer

SAMPLES = Path(__file__).parent / "samples"


def main() -> None:
    for path in sorted(SAMPLES.glob(sys.argv[1] if len(sys.argv) > 1 else "*/*.txt")):
        parameters, known = read_sample(path.read_text())
        _, data = replay(observer(path.parent.name), parameters, known)
        path.with_suffix(".json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
