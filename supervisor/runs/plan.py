"""What a run will do, decided before it starts: runbook, model, task document.

Owns: which runbook a request means, which model carries it out, what the worker is told.
Deliberately does not know: the machine's door, the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from a2a_bridge.messages import TaskDocument
from inference.choice import Choice, Defaults, ModelSpec, choose, probe_local
from inference.errors import BadModelSpec
from inference.keys import KeyRef
from prompts.text import read
from supervisor.errors import BadInput, NotFound
from supervisor.machines import Machine
from supervisor.runbooks import match
from supervisor.settings.model import Model as ModelSettings
from supervisor.settings.model import Settings
from supervisor.store.runs import Run
from tools.runbooks import Runbook
from tools.values import JsonObject

DEFAULT_RUNBOOK = "health"


@dataclasses.dataclass(frozen=True)
class Plan:
    """``spec``: the model; ``why``: the sentence of its choice; ``runbook``: the one to follow, if any."""

    spec: ModelSpec
    why: str
    runbook: Runbook | None


def named_runbook(name: str, runbooks: Mapping[str, Runbook]) -> Runbook:
    """The runbook called ``name``; raises ``NotFound`` that lists the known ones."""
    if name not in runbooks:
        raise NotFound(
            f"there is no runbook {name!r}",
            expected=", ".join(sorted(runbooks)),
            got=name,
            next_step="chargehand runbook list",
        )
    return runbooks[name]


def spec_of_settings(model: ModelSettings, defaults: Defaults) -> ModelSpec | None:
    """The model that the settings name; ``None`` where they leave the choice open (``provider = "auto"``)."""
    if model.provider == "auto":
        return None
    fallback = {"openai": defaults.openai_model, "anthropic": defaults.anthropic_model}.get(model.provider, "")
    key = KeyRef.parse(str(model.key)) if model.key is not None else None
    return ModelSpec(
        model.provider,
        model.name or fallback,
        model.base_url or "",
        key,
        model.via,
        model.context_tokens or defaults.hosted_context,
    )


async def choose_model(name: str | None, settings: Settings, environment: Mapping[str, str]) -> Choice:
    """The model for a run: ``name`` as given (``openai:…``, or the name of a ``[models.NAME]`` table), else the
    settings', else as architecture.md says. Raises ``BadInput``."""
    defaults = Defaults()
    try:
        if name and name in settings.models:
            found = spec_of_settings(settings.models[name], defaults)
            if found is not None:
                return Choice(found, f"model {name!r} of the settings was named")
        if not name:
            found = spec_of_settings(settings.model, defaults)
            if found is not None:
                return Choice(found, "the settings name it")
        return await choose(name, environment, probe_local, defaults)
    except BadModelSpec as error:
        raise BadInput(
            str(error),
            tried="choosing the model",
            got=name,
            next_step="--model runbook | anthropic[:MODEL] | openai[:MODEL][@URL] | NAME of a [models.NAME] table",
        ) from error


def plan_of(run: Run, choice: Choice, runbooks: Mapping[str, Runbook]) -> Plan:
    """The plan of a run whose model is chosen. Without a language model it follows the runbook that its words mean."""
    if run.runbook is not None:
        return Plan(choice.spec, choice.reason, named_runbook(run.runbook, runbooks))
    if choice.spec.provider != "runbook":
        return Plan(choice.spec, choice.reason, None)
    name = match(run.text, runbooks) or DEFAULT_RUNBOOK
    return Plan(choice.spec, choice.reason, named_runbook(name, runbooks))


def task_document(run: Run, machine: Machine, plan: Plan, settings: Settings, traceparent: str) -> TaskDocument:
    """What the worker is told. It never holds a key: references are resolved at the centre, or on the machine."""
    limits = settings.limits
    model = dict(plan.spec.to_json(), why=plan.why)
    if plan.spec.via == "gateway":
        model["key"] = None
        model["base_url"] = ""
    profile: JsonObject = {
        "machine": machine.id,
        "role": machine.role,
        "labels": dict(machine.labels),
        "expected_state": machine.expected_state,
    }
    return TaskDocument(
        run_id=run.id,
        prompt=run.text,
        instructions=_instructions(profile, plan),
        runbook=plan.runbook.to_json() if plan.runbook is not None else None,
        model=model,
        limits={
            "steps": limits.steps,
            "tokens": limits.tokens,
            "wall_s": float(limits.task_s),
            "cost_usd": limits.cost_usd or None,
            "same_refusal": limits.refusals,
        },
        profile=profile,
        traceparent=traceparent,
    )


def _instructions(profile: Mapping[str, Any], plan: Plan) -> str:
    lines = [read("worker").rstrip(), "", "## This machine", ""]
    lines.append(f"- machine: {profile['machine']}")
    if profile["role"]:
        lines.append(f"- role: {profile['role']}")
    if profile["labels"]:
        lines.append("- labels: " + ", ".join(f"{key}={value}" for key, value in sorted(profile["labels"].items())))
    if profile["expected_state"]:
        lines.append(f"- expected state: {profile['expected_state']}")
    if plan.runbook is not None:
        lines += [
            "",
            f"Follow the runbook `{plan.runbook.name}` ({plan.runbook.title}) first, then look further if needed.",
        ]
    return "\n".join(lines)
