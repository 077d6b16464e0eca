"""Hands the lab's fixtures to the lab's own tests, unless the whole test tree has them already."""

from __future__ import annotations

import pytest

PLUGIN = "tests.lab.fixtures"


def pytest_configure(config: pytest.Config) -> None:
    """A plugin is registered once: two copies of a session fixture would be two labs."""
    if not config.pluginmanager.has_plugin(PLUGIN):
        config.pluginmanager.import_plugin(PLUGIN)
