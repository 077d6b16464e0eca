"""The collector configuration we ship: what its pipelines name exists, and it listens on this machine only."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

CONFIGURATION = Path(__file__).parents[2] / "otel" / "collector.yaml"


def test_everything_the_pipelines_name_is_configured_and_everything_configured_is_used() -> None:
    document = yaml.safe_load(CONFIGURATION.read_text("utf-8"))
    assert set(document["service"]["extensions"]) == set(document["extensions"])
    for part in ("receivers", "processors", "exporters"):
        named = {name for pipeline in document["service"]["pipelines"].values() for name in pipeline[part]}
        assert named == set(document[part])
    for exporter in document["exporters"].values():
        assert exporter["sending_queue"]["storage"] in document["extensions"]


def test_memory_is_limited_first_and_host_and_environment_are_filled_in() -> None:
    document = yaml.safe_load(CONFIGURATION.read_text("utf-8"))
    assert document["service"]["pipelines"]["traces"]["processors"][0] == "memory_limiter"
    filled = {item["key"]: item["action"] for item in document["processors"]["resource"]["attributes"]}
    assert filled == {"host.name": "insert", "deployment.environment": "insert"}


def test_it_listens_on_loopback_only_and_has_no_plain_secret() -> None:
    text = CONFIGURATION.read_text("utf-8")
    endpoints = re.findall(r"^\s*endpoint: (\S+)", text, re.MULTILINE)
    assert endpoints == ["127.0.0.1:4318"]
    assert all(name.startswith("CHARGEHAND_") for name in re.findall(r"\$\{env:(\w+)", text))
