"""The default policy allows what the observers ask for."""

from __future__ import annotations

from pathlib import Path

from supervisor.policy.loader import default_policy
from tests.observers.probing import read_sample
from tools.gate import LexicalHost, decide_probe
from tools.observers.observer import Probe
from tools.observers.registry import observer
from tools.policy import Policy
from tools.values import ALLOW, StepResult

# What the default policy does not name (yet): each of them gives an honest `unavailable`, no observer depends on it.
NOT_NAMED = (
    "apk list",
    "zypper --non-interactive needs-rebooting",
    "/proc/self/net/bonding/",
    "/sys/fs/btrfs/",
    "/proc/spl/",
)


def probes_of_the_samples() -> dict[str, Probe]:
    """Every probe that any sample leads to, by label."""
    found: dict[str, Probe] = {}
    for path in sorted((Path(__file__).parent / "samples").glob("*/*.txt")):
        one = observer(path.parent.name)
        parameters, known = read_sample(path.read_text())
        results: list[StepResult] = []
        probes = one.probes(parameters)
        while probes:
            found.update((probe.label, probe) for probe in probes)
            results += [known.get(probe.label, StepResult(error="no such command")) for probe in probes]
            probes = one.next_probes(results, parameters)
    return found


def test_the_default_policy_allows_every_probe_but_those_named_here() -> None:
    policy = Policy.from_json(default_policy())
    probes = probes_of_the_samples()
    assert len(probes) > 150
    refused = {
        label: decision.reason
        for label, probe in probes.items()
        if (decision := decide_probe(policy, probe, LexicalHost())).outcome != ALLOW
    }
    assert {label: reason for label, reason in refused.items() if not label.startswith(NOT_NAMED)} == {}
