"""What the command line prints: for people with Rich, for programs as JSON, and errors in one form.

Owns: the two consoles, tables, the form of an error, neutralising what came from a machine.
Deliberately does not know: any command.

Results go to stdout, everything else (progress, notes, errors) to stderr; with ``--json`` stdout is one JSON document.
Without a terminal nothing moves and nothing is coloured.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from supervisor.errors import INTERNAL, INTERRUPTED, ChargehandError

# Without a terminal nothing is folded: the reader is a file or a program, and a word cut in two is no word.
WIDE = 4000
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else WIDE)

SEVERITY_STYLE = {"ok": "green", "info": "cyan", "warning": "yellow", "critical": "bold red", "none": "dim"}
STATE_STYLE = {
    "succeeded": "green", "failed": "red", "denied": "red", "expired": "yellow", "cancelled": "yellow",
    "unreachable": "bold red",
}  # fmt: skip
# Control characters but newline and tab, and the marks that reorder text: output of a machine may hold any of them.
_HOSTILE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: Any) -> str:
    """``text`` with everything a terminal would act upon shown as ``\\x1b`` and the like (safety.md, "Untrusted text")."""
    return _HOSTILE.sub(lambda match: f"\\x{ord(match[0]):02x}", str(text))


def styled(text: Any, style: str = "") -> Text:
    """Text from anywhere for a console: neutralised, never read as Rich markup."""
    return Text(plain(text), style=style)


def print_json(document: Any) -> None:
    """One JSON document on stdout, one line."""
    sys.stdout.write(json.dumps(document, ensure_ascii=True, default=str) + "\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], empty: str) -> None:
    """A table on stdout; ``empty`` is said instead when there is nothing. Cells are text or Rich ``Text``."""
    if not rows:
        out.print(styled(empty, "dim"))
        return
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else styled("" if cell is None else cell) for cell in row))
    out.print(made)


def fields(pairs: Sequence[tuple[str, Any]]) -> None:
    """Name and value, one a line; empty values are left out."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        if value is None or value == "":
            continue
        shown = value if isinstance(value, Text) else styled(value)
        out.print(Text(f"{name:<{width}}  ", "dim") + shown)


def moment(at: float | None) -> str:
    """A time as people of operations write it: UTC, to the second; ``-`` for none."""
    return "-" if at is None else time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(at))


def seconds(value: float | None) -> str:
    """A duration in seconds, short; ``-`` for none."""
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def fail(error: ChargehandError, as_json: bool) -> NoReturn:
    """Print one error and end with its exit code."""
    if as_json:
        print_json(error.to_json())
    else:
        err.print(Text("error: ", "bold red") + styled(error.message))
        for name, value in (
            ("tried", error.tried),
            ("expected", error.expected),
            ("got", error.got),
            ("next", error.next_step),
        ):
            if value not in (None, ""):
                err.print(Text(f"  {name:<9}", "dim") + styled(value if isinstance(value, str) else repr(value)))
    raise typer.Exit(error.exit_code)


@contextlib.contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Around the body of every command: each failure becomes one clear error and its exit code, never a traceback."""
    try:
        yield
    except ChargehandError as error:
        fail(error, as_json)
    except (KeyboardInterrupt, EOFError):
        err.print(styled("interrupted", "yellow"))
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of a pipe has what it wanted (`| head`).
        sys.stderr.close()
        raise typer.Exit(0) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except OSError as error:
        text = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        fail(ChargehandError(text, exit_code=INTERNAL), as_json)
    except Exception as error:
        # A defect of ours: one line for the operator, the whole story for whoever mends it.
        if os.environ.get("CHARGEHAND_DEBUG"):
            raise
        fail(
            ChargehandError(
                f"a defect of Chargehand: {type(error).__name__}: {error}",
                next_step="please report it, with what CHARGEHAND_DEBUG=1 in front of the same command prints",
            ),
            as_json,
        )
