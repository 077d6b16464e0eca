"""The entry of ``host.pyz``: which of its programs to be.

Owns: the command line. Its words come from ``authorized_keys`` or a unit file, never from the SSH peer.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import List, Optional

from edge_agent.host.version import VERSION

DEFAULT_HOME = "~/.local/share/chargehand"


def main(argv: Optional[List[str]] = None) -> int:
    """Run one of: ``gatekeeper`` (SSH forced command), ``broker`` (unit), ``keeper`` (process units)."""
    parser = argparse.ArgumentParser(prog="host.pyz", description="The machine side of Chargehand.")
    parser.add_argument("--version", action="version", version=VERSION)
    programs = parser.add_subparsers(dest="program", required=True)
    for name, text in (
        ("gatekeeper", "answer one verb of an SSH connection (SSH_ORIGINAL_COMMAND)"),
        ("broker", "serve one run; needs a fresh lease"),
        ("keeper", "hold broker and worker as plain processes"),
    ):
        program = programs.add_parser(name, help=text)
        program.add_argument("--home", default=DEFAULT_HOME, help="the installation's directory")
        if name == "keeper":
            program.add_argument("--ready-fd", type=int, required=True)
    options = parser.parse_args(argv)

    from edge_agent.host.home import Home

    home = Home(os.path.expanduser(options.home))
    if options.program == "broker":
        from edge_agent.host.broker import main as broker

        return broker(home)
    if options.program == "keeper":
        from edge_agent.host.units.process import keep

        return keep(home, options.ready_fd)
    from edge_agent.host.gatekeeper import main as gatekeeper

    return gatekeeper(home)


if __name__ == "__main__":
    sys.exit(main())
