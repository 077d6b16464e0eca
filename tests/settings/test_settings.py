"""Settings: where they come from, what wins, and what an error says."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor.errors import BAD_INPUT, BadInput, BadSettings
from supervisor.settings.load import choose_model, example_toml, find_file, load, masked
from supervisor.settings.model import Limits, Settings


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No settings of the host, and a directory of our own to stand in."""
    import os

    for name in [name for name in os.environ if name.startswith("CHARGEHAND")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(text: str) -> BadSettings:
    path = write(Path("chargehand.toml"), text)
    with pytest.raises(BadSettings) as caught:
        load(path)
    return caught.value


def test_without_a_file_everything_has_a_default(own_place: Path) -> None:
    found = load()
    assert found.source is None
    assert found.data_dir == own_place / "data" / "chargehand-gateway"
    assert found.store_url == f"sqlite:///{found.data_dir / 'chargehand.db'}"
    assert (found.limits.lease_s, found.limits.renew_s, found.limits.hard_stop_s) == (30, 10, 900)
    assert (found.audit.content, found.mlflow.mode, found.model.via) == (False, "embedded", "gateway")
    assert found.loopback()


def test_the_file_is_looked_for_in_four_places_in_order(own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_file() is None
    users = write(own_place / "config" / "chargehand" / "chargehand.toml", "")
    assert find_file() == users
    here = write(own_place / "here" / "chargehand.toml", "")
    assert find_file() == here
    named = write(own_place / "named.toml", "")
    monkeypatch.setenv("CHARGEHAND_CONFIG", str(named))
    assert find_file() == named
    explicit = write(own_place / "explicit.toml", "")
    assert find_file(explicit) == explicit
    assert load(explicit).source == explicit


def test_a_named_file_that_is_not_there_is_an_error(own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadSettings, match="tried: --config"):
        load(own_place / "no.toml")
    monkeypatch.setenv("CHARGEHAND_CONFIG", str(own_place / "no.toml"))
    with pytest.raises(BadSettings, match="tried: CHARGEHAND_CONFIG"):
        load()


def test_arguments_win_over_variables_over_the_file(own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Path("chargehand.toml"), '[limits]\nlease_s = 40\nsteps = 9\n[mlflow]\nexperiment = "file"\n')
    assert (load().limits.lease_s, load().limits.steps) == (40, 9)
    monkeypatch.setenv("CHARGEHAND_LIMITS__LEASE_S", "50")
    monkeypatch.setenv("CHARGEHAND_DATA_DIR", "~/elsewhere")
    found = load()
    assert (found.limits.lease_s, found.limits.steps, found.mlflow.experiment) == (50, 9, "file")
    assert found.data_dir == own_place / "home" / "elsewhere"
    assert load(data_dir=own_place / "x").data_dir == own_place / "x"


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    error = refused("[limits]\nleas_s = 3\n")
    assert "chargehand.toml" in str(error)
    assert "limits.leas_s is not a setting" in str(error)
    assert "did you mean limits.lease_s?" in str(error)
    assert error.exit_code == BAD_INPUT
    assert "did you mean limits?" in str(refused("[limit]\n"))
    assert "did you mean limits.lease_s?" in str(refused("lease_s = 3\n"))
    assert "models.local.base_url?" in str(refused('[models.local]\nbase_ur = "http://x"\n'))
    assert "is not a setting" in str(refused('source = "x"\n'))


def test_a_wrong_value_says_file_key_expectation_reason_and_what_came() -> None:
    error = refused('[limits]\nlease_s = "soon"\n')
    told = str(error)
    for part in ("chargehand.toml", "limits.lease_s", "valid integer", "inert after this long", "'soon'"):
        assert part in told
    assert "less than or equal to 120" in str(refused("[limits]\nlease_s = 500\nrenew_s = 10\n"))
    assert "'gateway' or 'edge'" in str(refused('[model]\nvia = "moon"\n'))


def test_everything_that_is_wrong_is_told_at_once() -> None:
    told = str(refused('[limits]\nsteps = 0\nfoo = 1\n[mlflow]\nport = "x"\n'))
    assert "3 settings are wrong" in told
    for part in ("limits.steps", "limits.foo", "mlflow.port"):
        assert part in told


def test_limits_that_contradict_each_other_are_refused() -> None:
    assert "renew_s (20) must be at most half of lease_s (30)" in str(refused("[limits]\nrenew_s = 20\n"))
    assert "task_s (900) must be below hard_stop_s (900)" in str(refused("[limits]\ntask_s = 900\n"))
    assert "belong together" in str(refused('[mlflow]\nmode = "external"\n'))
    assert "a key never leaves the centre" in str(refused('[model]\nvia = "edge"\nkey = "env:X"\n'))
    assert "uses no language model" in str(refused('[model]\nprovider = "runbook"\nname = "x"\n'))


def test_a_variable_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHARGEHAND_LIMITS__STEPS", "many")
    with pytest.raises(BadSettings, match=r"CHARGEHAND_LIMITS__STEPS: limits\.steps is wrong"):
        load()
    monkeypatch.delenv("CHARGEHAND_LIMITS__STEPS")
    for name in ("CHARGEHAND_LIMIT__STEPS", "CHARGEHAND_DATADIR", "CHARGEHAND_LIMITS__STEP"):
        monkeypatch.setenv(name, "1")
        with pytest.raises(BadSettings, match=name):
            load()
        monkeypatch.delenv(name)
    monkeypatch.setenv("CHARGEHAND_LAB", "1")
    assert load().limits.steps == 30
    monkeypatch.setenv("CHARGEHAND_LIMITS", "{")
    with pytest.raises(BadSettings, match="could not be read"):
        load()


@pytest.mark.parametrize("raw", [b"[limits\n", b"\xff\xfe", b"a = 1\na = 2\n", b"x" * 2_000_000])
def test_a_file_that_is_no_settings_file_is_refused(own_place: Path, raw: bytes) -> None:
    path = own_place / "x.toml"
    path.write_bytes(raw)
    with pytest.raises(BadSettings, match=r"x\.toml"):
        load(path)
    with pytest.raises(BadSettings):
        load(own_place)


CANARY = "sk-canary-3f9a"


@pytest.mark.parametrize(
    "text",
    [
        f'[model]\nkey = "{CANARY}"\n',
        f'[models.x]\nkey = "{CANARY}"\n',
        f'[model]\nbase_url = "https://u:{CANARY}@h/v1"\n',
        f'database_url = "postgresql+psycopg://u:{CANARY}@h/d"\n',
        f'database_password = "{CANARY}"\n',
        f'[mlflow]\nmode = "external"\nurl = "http://u:{CANARY}@h"\n',
    ],
)
def test_a_secret_in_the_file_is_refused_and_not_repeated(text: str) -> None:
    error = refused(text)
    assert CANARY not in str(error)
    assert CANARY not in json.dumps(error.to_json())
    assert CANARY not in repr(error)


def test_settings_show_references_and_never_what_they_lead_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", CANARY)
    write(Path("chargehand.toml"), '[model]\nprovider = "openai"\nkey = "env:MY_KEY"\n')
    found = load()
    assert CANARY not in repr(found) + json.dumps(masked(found))
    assert masked(found)["model"]["key"] == "env:MY_KEY"
    assert found.model.key is not None
    assert found.model.key.read().reveal() == CANARY


def test_a_model_is_chosen_by_name() -> None:
    write(Path("chargehand.toml"), '[models.local]\nprovider = "openai"\nbase_url = "http://127.0.0.1:8000/v1/"\n')
    found = load()
    assert choose_model(found, None) is found.model
    assert choose_model(found, "local").base_url == "http://127.0.0.1:8000/v1"
    assert choose_model(found, "runbook").provider == "runbook"
    with pytest.raises(BadInput, match="did you mean local"):
        choose_model(found, "locl")


def test_the_example_is_a_valid_file_that_changes_nothing(own_place: Path) -> None:
    path = write(own_place / "example.toml", example_toml())
    assert load(path).model_dump(exclude={"source"}) == load().model_dump(exclude={"source"})


def test_every_line_of_the_example_is_valid_once_it_is_taken_in(own_place: Path) -> None:
    entry = re.compile(r"^# ([a-z_]+ = .*|\[models\.local\])$", re.MULTILINE)
    text = entry.sub(r"\1", example_toml()).replace("# [models", "[models")
    document = tomllib.loads(text)
    document["mlflow"].pop("url")
    names = {name for name in Settings.model_fields if name not in ("source", "models")}
    assert names <= set(document)
    assert set(document["limits"]) == set(Limits.model_fields)
    assert Settings(**document).limits == Limits()


def test_every_limit_has_a_unit_and_a_reason() -> None:
    units = {"s": "_s", "bytes": "_bytes", "USD": "_usd"}
    for name, field in Limits.model_fields.items():
        assert field.description, name
        assert isinstance(field.json_schema_extra, dict), name
        unit = str(field.json_schema_extra["unit"])
        assert name.endswith(units.get(unit, "")), (name, unit)


toml_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
known_names = st.sampled_from([*Settings.model_fields, "lease_s", "key", "local", "x"])
documents = st.dictionaries(
    known_names, toml_values | st.dictionaries(known_names, toml_values, max_size=3), max_size=4
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents)
def test_any_document_is_accepted_or_refused_with_a_sentence(document: dict[str, object]) -> None:
    lines = [f"{name} = {toml(value)}" for name, value in document.items() if not isinstance(value, dict)]
    for name, value in document.items():
        if isinstance(value, dict):
            lines += [f"[{name}]", *(f"{key} = {toml(inner)}" for key, inner in value.items())]
    path = write(Path("any.toml"), "\n".join(lines))
    try:
        load(path)
    except BadSettings as error:
        assert error.message


def toml(value: object) -> str:
    return json.dumps(value if value is not None else "").replace("Infinity", "inf")


def test_a_gateway_that_listens_elsewhere_says_so() -> None:
    write(Path("chargehand.toml"), '[gateway]\nhost = "0.0.0.0"\n')
    assert not load().loopback()
    write(Path("chargehand.toml"), '[gateway]\nhost = "::1"\n')
    assert load().loopback()
    write(Path("chargehand.toml"), '[gateway]\nhost = "gateway.example.org"\n')
    assert not load().loopback()
