"""What the worker does with a task: choose the model, run the loop, stream its events.

Owns: one task at a time, joined from model, loop and tools channel.
Deliberately does not know: how it is asked (A2A), where tools are executed, what the policy allows.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from a2a_bridge.messages import TaskDocument, TaskResult
from edge_agent.worker.channels import BrokerGone, ToolsChannel
from edge_agent.worker.toolspecs import tool_specs
from inference.loop import Limits, LoopTask, run_loop
from inference.protocol import Model
from inference.remote import RemoteModel
from tools.values import Decision, Event, Evidence, JsonObject, Malformed, ToolCall

Emit = Callable[[Event], None]


class Agent:
    """Carries out tasks, one at a time.

    Args:
        tools: the channel to the broker.
        remote: the gateway's model, used when the task says ``via: gateway``.
    """

    def __init__(self, tools: ToolsChannel, remote: RemoteModel) -> None:
        self._tools = tools
        self._remote = remote
        self._cancelled: asyncio.Event | None = None

    def cancel(self) -> None:
        """Ask the running task to end; it says itself what it killed. Does nothing when no task runs."""
        if self._cancelled is not None:
            self._cancelled.set()

    async def run(self, document: TaskDocument, tell: Emit) -> TaskResult:
        """Carry out ``document``; never raises for what a model or a machine does."""
        if self._cancelled is not None:
            return TaskResult("error", "this worker is busy with its one task", None)
        self._cancelled = asyncio.Event()
        seq = 0

        def emit(kind: str, body: JsonObject) -> None:
            nonlocal seq
            seq += 1
            tell(Event(seq, kind, body, time.time()))

        def decided(call_id: str, decision: Decision) -> None:
            emit("call.decided", {"call_id": call_id, "decision": decision.to_json()})

        self._tools.on_decision = decided
        gone = asyncio.create_task(self._watch_broker())
        try:
            return await self._run(document, emit)
        except (Malformed, BrokerGone, ValueError) as error:
            return TaskResult("error", str(error)[:1000], None)
        finally:
            gone.cancel()
            self._cancelled = None

    async def _watch_broker(self) -> None:
        await self._tools.gone.wait()
        self.cancel()

    async def _run(self, document: TaskDocument, emit: Callable[[str, JsonObject], None]) -> TaskResult:
        model = self._model(document)
        task = LoopTask(
            system=document.instructions,
            prompt=document.prompt,
            tools=tool_specs(await self._tools.hello()),
            limits=Limits.from_json(document.limits),
            metadata={"run_id": document.run_id},
        )
        assert self._cancelled is not None
        try:
            done = await run_loop(model, task, self._call, emit, self._cancelled, caller_emits_decisions=True)
        finally:
            if model is not self._remote:
                await model.aclose()
        usage = done.usage
        return TaskResult(
            outcome=done.outcome,
            reason=done.reason,
            report=done.report,
            steps=done.steps,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cost_usd=None if usage.cost_unknown else usage.cost_usd,
        )

    async def _call(self, call: ToolCall) -> tuple[Decision, Evidence | None]:
        return await self._tools.call(call)

    def _model(self, document: TaskDocument) -> Model:
        """The model the task names; each provider is imported only when it is used, the import is start-up time."""
        chosen = dict(document.model)
        why = str(chosen.pop("why", ""))
        if chosen.get("provider") != "runbook" and chosen.get("via", "gateway") == "gateway":
            self._remote.name = str(chosen.get("model", "unknown"))
            self._remote.provider = str(chosen.get("provider", "unknown"))
            self._remote.context_tokens = int(chosen.get("context_tokens") or self._remote.context_tokens)
            return self._remote
        if chosen.get("provider") == "runbook":
            # Not through `open_model`: it imports what language models need.
            from inference.runbook_model import RunbookModel

            if document.runbook is None:
                raise Malformed("the task names the model 'runbook' and holds no runbook")
            return RunbookModel(document.runbook, why=why)
        from inference.choice import ModelSpec, open_model

        return open_model(ModelSpec.from_json(chosen), os.environ, runbook=document.runbook, why=why)
