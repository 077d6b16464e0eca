"""Becomes ``__main__.py`` of ``host.pyz``: starts the machine side, from compiled modules where they have been made.

Owns: where the compiled modules lie and making them (``host.pyz compile``, done once after an installation). Python
compiles what it imports from an archive anew at every start, which costs a verb more than all it does. Deliberately
does not know: what the machine side does. Standard library only, Python 3.9.
"""

import importlib
import os
import sys

# The digest of everything in the archive: compiled modules of another archive, or for another Python, are never taken.
SOURCES = "@SOURCES@"


def compile_archive(archive: str, target: str) -> None:
    """Unpack and compile ``archive`` into ``target``, which appears as a whole; older neighbours are removed."""
    import compileall
    import py_compile
    import shutil
    import tempfile
    import zipfile

    if os.path.isdir(target):
        return
    parent = os.path.dirname(target)
    os.makedirs(parent, mode=0o700, exist_ok=True)
    new = tempfile.mkdtemp(prefix=".new-", dir=parent)
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(new)
        if not compileall.compile_dir(new, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH):
            raise SystemExit(f"{archive} could not be compiled")
        os.rename(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    for name in os.listdir(parent):
        if name != os.path.basename(target):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def start() -> int:
    archive = os.path.dirname(os.path.abspath(__file__))
    compiled = f"{archive}.compiled/{SOURCES}-{sys.implementation.cache_tag}"
    if sys.argv[1:] == ["compile"]:
        compile_archive(archive, compiled)
        return 0
    if os.path.isdir(compiled):
        sys.path.insert(0, compiled)
    # By name: this file is text for an archive, and its folder imports nothing of ours.
    return int(importlib.import_module("edge_agent.host.main").main())


if __name__ == "__main__":
    raise SystemExit(start())
