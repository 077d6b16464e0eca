"""The import arrows of the architecture, as a fresh interpreter sees them (import-linter reads source only)."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

OURS = {"supervisor", "edge_agent", "a2a_bridge", "inference", "tools", "otel", "prompts", "quadlets"}


def loaded_by(module: str) -> set[str]:
    """The names in ``sys.modules`` after ``module`` was imported by a fresh interpreter."""
    program = f"import sys, {module}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("edge_agent.host.gatekeeper", {"supervisor", "inference", "a2a_bridge", "otel", "prompts", "quadlets"}),
        ("edge_agent.host.broker", {"supervisor", "inference", "a2a_bridge", "otel", "prompts", "quadlets", "asyncio"}),
        (
            "edge_agent.worker.agent",
            {"supervisor", "edge_agent.host", "otel", "quadlets", "mlflow", "dbos", "asyncssh"},
        ),
        ("a2a_bridge.server", {"supervisor", "edge_agent", "inference", "openai", "anthropic"}),
        ("inference.loop", {"supervisor", "edge_agent", "a2a_bridge", "openai", "anthropic", "a2a"}),
        ("tools.gate", {"supervisor", "edge_agent", "a2a_bridge", "inference", "otel", "yaml"}),
        ("otel.delivery", OURS - {"otel"}),
        ("quadlets.render", OURS - {"quadlets"}),
        ("prompts.text", OURS - {"prompts"}),
        ("supervisor.runs.flow", {"edge_agent", "dbos", "mlflow"}),
        ("supervisor.gateway", {"edge_agent", "mlflow"}),
    ],
)
def test_a_part_loads_only_what_its_arrow_allows(module: str, forbidden: set[str]) -> None:
    loaded = loaded_by(module)
    wrong = sorted(name for name in loaded for prefix in forbidden if name == prefix or name.startswith(prefix + "."))
    assert wrong == []


def test_no_other_distribution_provides_one_of_our_names() -> None:
    provided = importlib.metadata.packages_distributions()
    clashes = {name: provided[name] for name in OURS if set(provided.get(name, [])) - {"chargehand"}}
    assert clashes == {}
