"""The entry of ``host.pyz``: which of its programs to be.

Owns: the command line. Its words come from ``authorized_keys`` or a unit file, never from the SSH peer.
"""

from __future__ import annotations

import os
import sys
from typing import List, Optional

from edge_agent.host.version import VERSION

DEFAULT_HOME = "~/.local/share/chargehand"
PROGRAMS = ("gatekeeper", "broker", "keeper")
USAGE = """\
usage: host.pyz gatekeeper [--home DIR]           answer one verb of an SSH connection (SSH_ORIGINAL_COMMAND)
       host.pyz broker [--home DIR]               serve one run; needs a fresh lease
       host.pyz keeper [--home DIR] --ready-fd N  hold broker and worker as plain processes
       host.pyz --version
"""


def bytecode_path(zipapp: str) -> str:
    """Where the bytecode of ``zipapp`` for this Python lies; see ``bytecode``. Raises ``OSError``."""
    info = os.stat(zipapp)
    return "%s-%s-%x-%x.zip" % (zipapp[:-4], sys.implementation.cache_tag, info.st_mtime_ns, info.st_size)


def own_zipapp() -> str:
    """The zipapp this program runs from, empty in a checkout."""
    return str(getattr(__spec__.loader if __spec__ else None, "archive", ""))


def use_bytecode() -> None:
    """From here on import the zipapp's modules as bytecode, if it lies beside it."""
    zipapp = own_zipapp()
    path = bytecode_path(zipapp) if zipapp else ""
    if path and os.path.exists(path):
        sys.path.insert(0, path)
        for package in ("edge_agent", "edge_agent.host"):
            sys.modules[package].__path__.insert(0, os.path.join(path, *package.split(".")))


def main(argv: Optional[List[str]] = None) -> int:
    """Run one of: ``gatekeeper`` (SSH forced command), ``broker`` (unit), ``keeper`` (process units)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        sys.stdout.write(VERSION + "\n")
        return 0
    options = {"--home": DEFAULT_HOME, "--ready-fd": ""}
    program = words[0] if words else ""
    names, values = words[1::2], words[2::2]
    # Read by hand: argparse takes longer than all the rest of a short verb, and these words are fixed by the installer.
    good = program in PROGRAMS and len(names) == len(values) and set(names) <= set(options)
    options.update(zip(names, values))
    if not good or (program == "keeper") != options["--ready-fd"].isdigit():
        sys.stderr.write(USAGE)
        return 2
    use_bytecode()

    from edge_agent.host.home import Home

    home = Home(os.path.expanduser(options["--home"]))
    if program == "broker":
        from edge_agent.host.broker import main as broker

        return broker(home)
    if program == "keeper":
        from edge_agent.host.units.process import keep

        return keep(home, int(options["--ready-fd"]))
    from edge_agent.host.gatekeeper import main as gatekeeper

    return gatekeeper(home)


if __name__ == "__main__":
    sys.exit(main())
