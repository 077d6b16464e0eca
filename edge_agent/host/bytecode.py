"""The zipapp as bytecode for this machine's own Python, in a file beside it.

Owns: making that file. ``main.use_bytecode`` imports from it. Deliberately does not know: what the modules do.

Python never keeps the bytecode of what it imports from a zip, so every verb would compile every module anew: about half
of its time. The centre cannot ship bytecode, it does not know the machine's Python. The file is made of the zipapp that
runs and of nothing else, lies in the same directory with the same owner, and carries the zipapp's size and time and the
Python version in its name, so a replaced zipapp or a new Python never meets old bytecode. Without it all is the same but
slower.
"""

from __future__ import annotations

import importlib.util
import io
import marshal
import os
import sys
import zipfile

from edge_agent.host.home import write_atomic
from edge_agent.host.main import bytecode_path

# A pyc's second word: made of a source hash, and not to be checked against a source at import (PEP 552).
_UNCHECKED_HASH = 1


def write_bytecode(zipapp: str) -> str:
    """Make the bytecode file of ``zipapp`` if there is none, and remove those of older ones; returns its path.

    Raises ``OSError`` when it cannot be written, ``SyntaxError`` when this Python cannot read the zipapp.
    """
    path = bytecode_path(zipapp)
    if os.path.exists(path):
        return path
    stream = io.BytesIO()
    with zipfile.ZipFile(zipapp) as source, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            # The entry itself and what it needs to find this file come from the zipapp.
            if name.endswith(".py") and name != "__main__.py":
                text = source.read(name)
                code = compile(text, os.path.join(zipapp, name), "exec", dont_inherit=True)
                header = importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH.to_bytes(4, "little")
                target.writestr(name + "c", header + importlib.util.source_hash(text) + marshal.dumps(code))
    write_atomic(path, stream.getvalue())
    directory, kept = os.path.split(path)
    beginning = os.path.basename(zipapp)[:-4] + "-" + str(sys.implementation.cache_tag)
    for name in os.listdir(directory):
        if name.startswith(beginning) and name.endswith(".zip") and name != kept:
            os.unlink(os.path.join(directory, name))
    return path
