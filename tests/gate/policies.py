"""The policies and hosts the gate's tests share."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from supervisor.policy.loader import compile_policy, default_policy, load
from tools.gate import LexicalHost, RunContext, decide
from tools.policy import Policy
from tools.values import Decision, ToolCall

CORPUS = Path(__file__).parent / "corpus"


@cache
def observe_core() -> Policy:
    return Policy.from_json(default_policy())


@cache
def web_services() -> Policy:
    text = """
policy: web
extends: change-services
sets:
  units: [nginx.service, "app-*"]
write_roots: [/etc/nginx]
grants:
  - {name: night, rule: systemctl, commands: [restart], triggers: [alert], days: [0], start_minute: 1320, end_minute: 120}
"""
    return Policy.from_json(compile_policy([load(text)]))


def corpus(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CORPUS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def call_of(entry: dict[str, Any]) -> ToolCall:
    if "read" in entry:
        return ToolCall("c1", "read", {"path": entry["read"]})
    if "write" in entry:
        return ToolCall("c1", "write", {"path": entry["write"], "content": "x"})
    return ToolCall("c1", "exec", {key: entry[key] for key in ("argv", "command") if key in entry})


def ask(
    *argv: str, policy: Policy | None = None, host: Any = None, context: RunContext | None = None, **arguments: Any
) -> Decision:
    """The decision about one exec: ``ask("df", "-h")`` or ``ask(command="df -h")``."""
    given = arguments or {"argv": list(argv)}
    return decide(
        policy or observe_core(), ToolCall("c1", "exec", given), host or LexicalHost(), None, context or RunContext()
    )


def argv_of(decision: Decision) -> list[str]:
    """The words of the only process of an allowed call."""
    assert decision.outcome in ("allow", "ask"), decision.reason
    (step,) = decision.steps
    (stage,) = step.stages
    return list(stage.argv)
