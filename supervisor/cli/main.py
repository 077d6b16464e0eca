"""The command ``chargehand``.

Owns: putting the commands together. Each group lives in a module of its own and is imported only when it is used, so
that ``--help`` and completion stay fast.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from supervisor.cli.context import Shared
from supervisor.cli.version import VERSION

# Command → (module, what it is for). A module has a Typer app called `app`; one with a single command is that command.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("supervisor.cli.demo", "Run the health runbook on this computer, end to end, and show every step."),
    "init": ("supervisor.cli.init", "Write a settings file and make the data directory."),
    "up": ("supervisor.cli.up", "Start the gateway, with an embedded MLflow server unless one is configured."),
    "run": ("supervisor.cli.run", "Run one supervised job on one machine and follow it."),
    "runs": ("supervisor.cli.runs", "List runs, show one, cancel one, print its events."),
    "machine": ("supervisor.cli.machine", "Add, list, show, check and remove machines."),
    "edge": ("supervisor.cli.edge", "Install, upgrade and uninstall the edge on a machine."),
    "runbook": ("supervisor.cli.runbook", "List, show and check runbooks."),
    "policy": ("supervisor.cli.policy", "Show, check, test and explain what machines may do."),
    "audit": ("supervisor.cli.audit", "Show, verify and export the audit chain."),
    "trace": ("supervisor.cli.trace", "Print the trace of a run as a tree."),
    "doctor": ("supervisor.cli.doctor", "Check this gateway and say how to mend what is wrong."),
}


class LazyGroup(TyperGroup):
    """Loads a command's module when the command is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, text = COMMANDS[cmd_name]
        loaded = typer.main.get_command(importlib.import_module(module).app)
        loaded.name = cmd_name
        loaded.help = loaded.help or text
        return loaded

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chargehand {VERSION}")
        raise typer.Exit


@app.callback()
def chargehand(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", help="Settings file (chargehand.toml).")] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Data directory of the gateway.")] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Governed AI agents on a fleet of Linux machines.

    A supervisor starts the edge agent on a machine for one run, lets it act only through a default-deny gate, judges the
    evidence and stops it. Exit codes: 0 done, 1 the run did not succeed, 2 bad input, 3 refused, 4 machine unreachable
    or failed, 5 the gateway itself failed, 130 interrupted.
    """
    context.obj = Shared(config, data_dir)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
