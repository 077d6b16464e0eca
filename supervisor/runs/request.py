"""Asking for a run: the one place where a request becomes a stored run, whoever asks.

Owns: checking the request, its not-after, its first audit record. Deliberately does not know: who executes it.
"""

from __future__ import annotations

import asyncio
import time

from supervisor.audit import kinds
from supervisor.errors import BadInput
from supervisor.runs.plan import choose_model, named_runbook
from supervisor.runs.services import Services
from supervisor.store.runs import Run
from tools.values import digest

MAX_TEXT = 32_768


async def request_run(
    services: Services,
    *,
    machine: str,
    text: str,
    requested_by: str,
    runbook: str | None = None,
    model: str | None = None,
    trigger: str = "operator",
    run_id: str | None = None,
) -> Run:
    """Store a request. Raises ``NotFound``, ``BadInput``, ``Conflict`` before anything is stored.

    ``text``: what is asked, in words; empty with a runbook means the runbook itself. ``model``: a name as in
    ``--model``, ``None`` for the usual choice.
    """
    if runbook is not None:
        chosen = named_runbook(runbook, services.runbooks)
        text = text.strip() or f"Carry out the runbook {chosen.name}: {chosen.title}."
    if len(text) > MAX_TEXT:
        raise BadInput("the question is too long", expected=f"at most {MAX_TEXT} characters", got=len(text))
    if model is not None:
        await choose_model(model, services.settings, services.environment)
    limits = services.settings.limits
    now = time.time()
    run = await asyncio.to_thread(
        lambda: services.store.runs.create(
            machine=machine,
            requested_by=requested_by,
            text=text,
            not_after=now + limits.queue_s,
            run_id=run_id,
            trigger=trigger,
            runbook=runbook,
            model={"name": model} if model is not None else None,
            deadline=now + limits.request_s,
        )
    )
    body = {"trigger": trigger, "runbook": runbook, "model": model, "text_digest": digest(text)}
    if services.settings.audit.content:
        body["text"] = text[: services.settings.audit.content_bytes]
    await services.record(
        machine, kinds.RUN_REQUESTED, body, run_id=run.id, key=f"{run.id}:requested", actor=requested_by
    )
    return run
