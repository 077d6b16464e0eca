"""Fixtures for every test: the lab's, and an environment that nothing of the developer's own leaks into."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["tests.lab.fixtures"]

# Keys and settings of whoever runs the tests must not change what is tested, nor be spent.
_FOREIGN = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "CHARGEHAND_CONFIG")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in _FOREIGN or name.startswith("CHARGEHAND_") and name != "CHARGEHAND_LAB_CACHE":
            monkeypatch.delenv(name)
