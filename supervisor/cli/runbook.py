"""``chargehand runbook list|show|check``.

Owns: what is printed. Deliberately does not know: what a runbook does (``tools.runbooks``), YAML
(``supervisor.runbooks``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from supervisor.cli.context import JsonOption, settings_of
from supervisor.cli.output import SEVERITY_STYLE, err, errors, fields, out, plain, print_json, styled, table
from supervisor.errors import BAD_INPUT, BadInput, NotFound
from supervisor.runbooks import DEFAULT, BadRunbook, UnknownRunbook, get, load_all, load_file
from tools.runbooks import Check, Runbook
from tools.values import JsonObject

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List, show and check runbooks.")


def _known(context: typer.Context) -> dict[str, Runbook]:
    """The shipped runbooks and the operator's own (``runbooks/`` in the data directory). Raises ``BadInput``."""
    own = settings_of(context).data_dir / "runbooks"
    try:
        return load_all([own] if own.is_dir() else [])
    except BadRunbook as error:
        raise BadInput(
            "a runbook is not right", tried=str(own), got=str(error), next_step="chargehand runbook check FILE"
        ) from None


@app.command("list")
def list_runbooks(context: typer.Context, as_json: JsonOption = False) -> None:
    """The runbooks there are, and the words by which a request means them."""
    with errors(as_json):
        known = _known(context)
        if as_json:
            print_json(
                {
                    "runbooks": [
                        {
                            "name": book.name, "title": book.title, "labels": list(book.labels),
                            "steps": len(book.steps), "checks": len(book.checks), "default": book.name == DEFAULT,
                        }
                        for book in known.values()
                    ]
                }
            )  # fmt: skip
            return
        rows = [
            (
                styled(book.name, "bold") + styled(" (default)" if book.name == DEFAULT else "", "dim"),
                book.title,
                len(book.steps),
                len(book.checks),
            )
            for book in known.values()
        ]
        table(("RUNBOOK", "WHAT IT LOOKS AT", "STEPS", "CHECKS"), rows, "no runbooks")
        err.print(
            styled(
                "one of them: chargehand runbook show NAME; on a machine: chargehand run MACHINE --runbook NAME", "dim"
            )
        )


@app.command()
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    as_yaml: Annotated[bool, typer.Option("--yaml", help="As a file to begin an own runbook with.")] = False,
    as_json: JsonOption = False,
) -> None:
    """One runbook: its observers, its checks with thresholds, and what they suggest."""
    with errors(as_json):
        known = _known(context)
        try:
            book = get(name, known)
        except UnknownRunbook as error:
            raise NotFound(
                str(error.args[0]), expected=" | ".join(known), got=name, next_step="chargehand runbook list"
            ) from None
        if as_json:
            print_json({"runbook": book.to_json()})
        elif as_yaml:
            typer.echo(plain(yaml_of(book)), nl=False)
        else:
            _print(book)


def yaml_of(book: Runbook) -> str:
    """The runbook as YAML that ``runbook check`` accepts and that reads back as the same runbook."""
    import yaml

    return str(yaml.safe_dump(book.to_json(), sort_keys=False, allow_unicode=True, width=110))


def _print(book: Runbook) -> None:
    fields(
        [
            ("runbook", styled(book.name, "bold")),
            ("title", book.title),
            ("about", " ".join(book.description.split())),
            ("meant by", ", ".join(book.labels)),
            ("parameters", ", ".join(f"{name}={json.dumps(value)}" for name, value in book.parameters.items())),
        ]
    )
    for step in book.steps:
        parameters = " ".join(f"{key}={json.dumps(value)}" for key, value in step.parameters.items())
        out.print()
        out.print(styled(step.title, "bold") + styled(f"  {step.observer} {parameters}".rstrip(), "dim"))
        for check in (check for check in book.checks if check.step == step.id):
            line = styled(f"  {check.severity:<9}", SEVERITY_STYLE[check.severity]) + styled(
                condition(check, book.parameters)
            )
            out.print(line)
            if check.suggestion:
                out.print(styled(f"           → {check.suggestion}", "cyan"))


def condition(check: Check, parameters: Mapping[str, Any]) -> str:
    """When a check is raised, in one line, with the thresholds that its parameters give."""
    each = f"each of {check.for_each}: " if check.for_each else ""
    return each + _tree(check.when, parameters) + (f", unless {check.unless}" if check.unless else "")


def _tree(tree: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    for word, joint in (("all", " and "), ("any", " or ")):
        if word in tree:
            return "(" + joint.join(_tree(part, parameters) for part in tree[word]) + ")"
    if "not" in tree:
        return f"not {_tree(tree['not'], parameters)}"
    value = tree.get("value")
    if isinstance(value, Mapping) and "parameter" in value:
        shown = f" {json.dumps(parameters.get(value['parameter']))} ({value['parameter']})"
    else:
        shown = "" if value is None else f" {json.dumps(value)}"
    return f"{tree.get('field')} {tree.get('op')}{shown}"


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Runbook files (YAML).")],
    as_json: JsonOption = False,
) -> None:
    """Check runbook files: every problem with file, line and column. Exit status 2 when there is one."""
    with errors(as_json):
        found: list[JsonObject] = []
        names: dict[str, Path] = {}
        for path in files:
            try:
                book = load_file(path)
            except BadRunbook as error:
                found.append({"file": str(path), "ok": False, "runbook": None, "problems": list(error.problems)})
                continue
            twice = names.setdefault(book.name, path)
            problems = (
                []
                if twice is path
                else [f"{path}:1:1: the runbook {book.name!r} is already defined in {twice}; rename one"]
            )
            found.append({"file": str(path), "ok": not problems, "runbook": book.name, "problems": problems})
        good = all(file["ok"] for file in found)
        if as_json:
            print_json({"ok": good, "files": found})
        else:
            for file in found:
                if file["ok"]:
                    out.print(styled("ok  ", "green") + styled(f"{file['file']}: {file['runbook']}"))
                for problem in file["problems"]:
                    err.print(styled("error: ", "bold red") + styled(problem))
        if not good:
            raise typer.Exit(BAD_INPUT)
