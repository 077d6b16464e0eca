"""Finding, reading and checking the settings, and telling what is wrong with them.

Owns: where the file is looked for, what wins over what, the sentences of an error, the rendered example.
Deliberately does not know: what a setting is for (``supervisor.settings.model`` says it).

What wins: arguments, then ``CHARGEHAND_…`` variables (``__`` between a section and its key, as in
``CHARGEHAND_LIMITS__LEASE_S=20``), then the file, then the defaults.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

from supervisor.errors import BadInput, BadSettings
from supervisor.settings.model import Model, Settings
from supervisor.settings.secrets import SecretRef

FILE_NAME = "chargehand.toml"
PREFIX = str(Settings.model_config["env_prefix"])
DELIMITER = str(Settings.model_config["env_nested_delimiter"])
CONFIG_VARIABLE = "CHARGEHAND_CONFIG"
# A settings file is a page; more is the wrong file.
MAX_FILE_BYTES = 1_048_576
# A password in a URL is refused, and must not be repeated in the refusal.
_USER_INFO = re.compile(r"//[^/@]*@")


def find_file(explicit: Path | None = None, environ: Mapping[str, str] | None = None) -> Path | None:
    """The settings file: ``explicit``, ``$CHARGEHAND_CONFIG``, ``./chargehand.toml``, then the user's own; or ``None``.

    A file that was named and is not there is an error (``BadSettings``), one that was only looked for is not.
    """
    environ = os.environ if environ is None else environ
    named = explicit or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    if named is not None:
        named = named.expanduser()
        if not named.is_file():
            raise BadSettings(
                "the settings file is not there",
                tried="--config" if explicit else CONFIG_VARIABLE,
                expected="an existing file",
                got=str(named),
                next_step="write one with `chargehand init`",
            )
        return named
    for candidate in (Path(FILE_NAME), user_file(environ)):
        if candidate.is_file():
            return candidate.absolute()
    return None


def user_file(environ: Mapping[str, str] | None = None) -> Path:
    """``$XDG_CONFIG_HOME/chargehand/chargehand.toml``."""
    environ = os.environ if environ is None else environ
    base = environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "chargehand" / FILE_NAME


def load(config: Path | None = None, **overrides: Any) -> Settings:
    """The settings in force.

    Args:
        config: the file named on the command line, if any.
        overrides: top-level settings that win over everything, such as ``data_dir``.

    Raises ``BadSettings``: all that is wrong at once, each with file or variable, key, expectation and what came.
    """
    path = find_file(config)
    document = read_file(path) if path is not None else {}
    return _build(document, path, overrides)


def read_file(path: Path) -> dict[str, Any]:
    """The TOML document in ``path``; raises ``BadSettings`` with line and column."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise BadSettings(f"{path} is too long for a settings file", expected=f"at most {MAX_FILE_BYTES} bytes")
        return tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise BadSettings(
            f"{path} could not be read: {error.strerror}", next_step=f"check who may read {path}"
        ) from None
    except UnicodeDecodeError as error:
        raise BadSettings(f"{path} is not UTF-8 text", expected="TOML in UTF-8", got=f"byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise BadSettings(f"{path} is not TOML: {error}", expected="TOML, as `chargehand init` writes it") from None


def choose_model(settings: Settings, name: str | None) -> Model:
    """The model called ``name`` in ``[models.NAME]``, or ``[model]`` without a name; raises ``BadInput``."""
    if name is None:
        return settings.model
    if name in settings.models:
        return settings.models[name]
    if name == "runbook":
        return Model(provider="runbook")
    known = sorted([*settings.models, "runbook"])
    raise BadInput(
        f"no model is called {name!r}",
        expected=" | ".join(known),
        got=name,
        next_step=_nearest(name, known) or f"add [models.{name}] to {settings.source or FILE_NAME}",
    )


def masked(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON for people; secrets stand in it as references only."""
    return settings.model_dump(mode="json")


def _environment() -> dict[str, Any]:
    """What the ``CHARGEHAND_`` variables say, as a nested document; raises ``BadSettings`` for a mistyped name."""
    known = [name.upper() for name in Settings.model_fields if name != "source"]
    for variable in os.environ:
        head = variable.removeprefix(PREFIX).split(DELIMITER)[0]
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE or head in known:
            continue
        # Variables of ours that are no settings exist (tests, the edge): only what looks like a typo is refused.
        near = difflib.get_close_matches(head, known, n=1, cutoff=0.8)
        if near or DELIMITER in variable:
            raise BadSettings(
                f"the variable {variable} names no setting",
                expected=f"{PREFIX}{(near or known)[0]}…" if near else f"{PREFIX}SECTION__KEY",
                got=variable,
                next_step=f"unset {variable}, or correct its name",
            )
    source = EnvSettingsSource(Settings, case_sensitive=False)
    try:
        values = source()
    except SettingsError as error:
        raise BadSettings(
            f"a {PREFIX} variable could not be read: {error}",
            expected="a value, or JSON where the setting is a section",
            next_step=f"set its keys one by one, as in {PREFIX}LIMITS__LEASE_S=20",
        ) from None
    values.pop("source", None)
    return values


def _build(document: dict[str, Any], path: Path | None, overrides: dict[str, Any]) -> Settings:
    environment = _environment()
    if "source" in document:
        raise _unknown_key(("source",), path, "source")
    merged = _merge(_merge(document, environment), overrides)
    try:
        settings = Settings(**merged, source=path)
    except ValidationError as error:
        raise _tell(error, document, environment, path) from None
    return settings


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


# --- telling what is wrong -------------------------------------------------------------------------------------------


def _tell(
    error: ValidationError, document: Mapping[str, Any], environment: Mapping[str, Any], path: Path | None
) -> BadSettings:
    told = [_one(dict(item), document, environment, path) for item in error.errors(include_url=False)]
    first = told[0]
    if len(told) == 1:
        return first
    rest = "".join(f"\n  {number}. {item}" for number, item in enumerate(told, 1))
    return BadSettings(
        f"{len(told)} settings are wrong:{rest}", code=first.code, next_step="correct them and try again"
    )


def _one(
    item: Mapping[str, Any], document: Mapping[str, Any], environment: Mapping[str, Any], path: Path | None
) -> BadSettings:
    keys = tuple(str(part) for part in item["loc"])
    where = _where(keys, environment, document, path)
    if item["type"] == "extra_forbidden":
        return _unknown_key(keys, path, where)
    field = _field(keys)
    key = ".".join(keys) or "settings"
    secret = field is not None and SecretRef in _types(field)
    reason = f" ({field.description})" if field is not None and field.description else ""
    return BadSettings(
        f"{where}: {key} is wrong",
        expected=item["msg"].removeprefix("Value error, ") + reason,
        got="******" if secret else _plain(item.get("input")),
        next_step=f"correct {key}",
    )


def _plain(value: Any) -> Any:
    # The input of a check over a whole section is that section: the sentence names the two keys already.
    if isinstance(value, BaseModel | dict):
        return None
    return _USER_INFO.sub("//******@", value) if isinstance(value, str) else value


def _unknown_key(keys: tuple[str, ...], path: Path | None, where: str) -> BadSettings:
    section = _section(keys[:-1])
    known = sorted(name for name in section.model_fields if name != "source") if section else []
    key = ".".join(keys)
    prefix = ".".join(keys[:-1])
    near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
    # A key that stands in the wrong section is the other common slip.
    elsewhere = [".".join(place) for place, _ in _leaves(Settings) if place[-1] == keys[-1]]
    guess = ".".join(filter(None, (prefix, near[0]))) if near else (elsewhere[0] if elsewhere else "")
    return BadSettings(
        f"{where if where != keys[-1] else path}: {key} is not a setting",
        expected="one of " + ", ".join(known),
        got=key,
        next_step=f"did you mean {guess}?" if guess else "see `chargehand init --print` for all settings",
    )


def _where(
    keys: tuple[str, ...], environment: Mapping[str, Any], document: Mapping[str, Any], path: Path | None
) -> str:
    if keys and _holds(environment, keys):
        return f"the variable {PREFIX}{DELIMITER.join(keys).upper()}"
    if path is not None and (not keys or _holds(document, keys[:1])):
        return str(path)
    return "the command line" if keys else "the settings"


def _holds(document: Any, keys: tuple[str, ...]) -> bool:
    for key in keys:
        if not isinstance(document, Mapping) or key not in document:
            return False
        document = document[key]
    return True


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else ""


# --- the fields, walked ----------------------------------------------------------------------------------------------


def _types(field: FieldInfo) -> tuple[Any, ...]:
    kind = field.annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    for kind in _types(field):
        for candidate in (kind, *typing.get_args(kind)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                return candidate
    return None


def _section(keys: tuple[str, ...]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Settings
    rest = list(keys)
    while rest and section is not None:
        field = section.model_fields.get(rest.pop(0))
        section = _inner(field) if field is not None else None
        if field is not None and typing.get_origin(field.annotation) is dict and rest:
            rest.pop(0)
    return section


def _field(keys: tuple[str, ...]) -> FieldInfo | None:
    section = _section(keys[:-1]) if keys else None
    return section.model_fields.get(keys[-1]) if section is not None else None


def _leaves(section: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = _inner(field)
        if inner is not None and typing.get_origin(field.annotation) is not dict:
            yield from _leaves(inner, (*prefix, name))
        else:
            yield (*prefix, name), field


# --- the example -----------------------------------------------------------------------------------------------------


def example_toml() -> str:
    """A whole ``chargehand.toml`` with every setting commented out at its default, its unit and its reason."""
    lines = [
        "# Settings of Chargehand. Every line that is commented out shows its default.",
        f"# A variable wins over this file: {PREFIX}LIMITS__LEASE_S=20 is limits.lease_s.",
        "",
    ]
    sections: list[tuple[str, type[BaseModel]]] = []
    for name, field in Settings.model_fields.items():
        inner = _inner(field)
        if name == "source":
            continue
        if inner is None:
            lines += [*_example_entry(name, field), ""]
        elif name != "models":
            sections.append((name, inner))
    for name, inner in sections:
        lines += ["", *_comment((inner.__doc__ or "").strip()), f"[{name}]"]
        for key, field in inner.model_fields.items():
            lines += ["", *_example_entry(key, field)]
    lines += [
        "",
        "# Further models, chosen with --model NAME; the keys are those of [model].",
        "# [models.local]",
        '# provider = "openai"',
        '# base_url = "http://127.0.0.1:8000/v1"',
        "",
    ]
    return "\n".join(lines)


_EXAMPLES: dict[str, Any] = {
    "data_dir": "~/.local/share/chargehand-gateway",
    "database_url": "postgresql+psycopg://chargehand@db.example.org/chargehand",
    "database_password": "env:CHARGEHAND_DATABASE_PASSWORD_VALUE",
    "key": "env:OPENAI_API_KEY",
    "key_file": "~/.ssh/chargehand_ed25519",
    "base_url": "http://127.0.0.1:8000/v1",
    "url": "https://mlflow.example.org",
    "input_usd_per_million": 3.0,
    "output_usd_per_million": 15.0,
    "context_tokens": 131072,
}


def _example_entry(name: str, field: FieldInfo) -> list[str]:
    extra = field.json_schema_extra
    unit = f" ({extra['unit']})" if isinstance(extra, dict) else ""
    default = field.get_default(call_default_factory=False)
    unset = default is None or name == "data_dir"
    shown = _EXAMPLES[name] if unset else default
    # JSON's text, number and boolean forms are TOML's too.
    return [*_comment(f"{field.description or ''}{unit}"), f"# {name} = {json.dumps(shown)}"]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), 110)]
