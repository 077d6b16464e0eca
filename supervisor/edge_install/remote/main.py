"""The program's entry: one document in, JSON lines out.

Input, after the program itself: one line with the length of a JSON document, the document, then the bytes of an image
archive if it announces one. Output: JSON lines ``{"progress": text}`` and, last, ``{"result": ...}`` or ``{"error":
{"message", "expected", "got", "next"}}``. Exit status 0, or 1 with an error.

Standard library only, Python 3.9: it is sent to the machine as text (``supervisor.edge_install.program``).
"""

# Runs on Python 3.9: no `X | Y` at run time, no `zip(strict=)`.
# ruff: noqa: UP031

from __future__ import annotations

import json
import os
import sys
from typing import BinaryIO

from supervisor.edge_install.remote.facts import facts
from supervisor.edge_install.remote.install import install
from supervisor.edge_install.remote.texts import Failed
from supervisor.edge_install.remote.uninstall import uninstall


def main(stream: BinaryIO) -> int:
    """Read one document, do what it asks, print the answer."""
    document = json.loads(stream.read(int(stream.readline())))
    os.umask(0o077)
    try:
        if document["verb"] == "facts":
            result = facts(document)
        elif document["verb"] == "install":
            result = install(document, stream)
        elif document["verb"] == "uninstall":
            result = uninstall(document)
        else:
            raise Failed("unknown verb %r" % document["verb"], "facts, install or uninstall")
    except Failed as error:
        print(json.dumps({"error": error.document}), flush=True)
        return 1
    except OSError as error:
        print(json.dumps({"error": Failed("the machine refused: %s" % error).document}), flush=True)
        return 1
    print(json.dumps({"result": result}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.stdin.buffer))
