"""A real PostgreSQL server for the tests: its own data directory, a UNIX socket, no port, no durability."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Debian keeps the server's programs out of PATH.
PLACES = ("/usr/lib/postgresql/17/bin", "/usr/lib/postgresql/16/bin", "/usr/lib/postgresql/15/bin")


def program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


def available() -> bool:
    return program("initdb") is not None and program("pg_ctl") is not None


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Yields the server's URL without a database name; the server and its files are gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="chargehand-pg-"))
    # The server refuses to run as root.
    who: dict[str, str] = {"user": "nobody"} if os.geteuid() == 0 else {}
    if who:
        shutil.chown(directory, user="nobody")
    data = directory / "data"
    try:
        initdb, pg_ctl = str(program("initdb")), str(program("pg_ctl"))
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": directory}
        subprocess.run(
            [initdb, "-D", data, "-A", "trust", "-U", "chargehand", "-N", "-E", "UTF8"], check=True, **quiet, **who
        )
        options = f"-k {directory} -c listen_addresses='' -c fsync=off"
        start = [pg_ctl, "-D", data, "-w", "-l", directory / "log", "-o", options, "start"]
        subprocess.run(start, check=True, **quiet, **who)
        try:
            yield f"postgresql+psycopg://chargehand@/%s?host={directory}"
        finally:
            subprocess.run([pg_ctl, "-D", data, "-w", "-m", "immediate", "stop"], check=True, **quiet, **who)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
