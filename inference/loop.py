"""The bounded tool-calling loop: ask the model, make the calls it asks for, answer it, until it reports.

Owns: the limits of a task and what happens at each, the conversation, call and inference ids, the events of
``tools.values.EVENT_KINDS`` in their order, the judgement of the report.
Deliberately does not know: how a call is made (it is handed ``call_tool``), which model it talks to, where events go,
what the policy allows.

Nothing is executed of an answer that did not end. The calls of one answer are made one after another, in the order in
which the model wrote them: the second may have been asked for in the hope of the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from inference import context, rendering, report, tokens
from inference.errors import BadAnswer, ContextTooLong, InferenceDenied, InferenceError, ModelRefused, RateLimited
from inference.protocol import (
    CONTENT_FILTER,
    LENGTH,
    REFUSAL,
    CallRecord,
    Completion,
    Message,
    Model,
    Notice,
    Request,
    TextDelta,
    ToolResult,
    ToolSpec,
    ToolUse,
    Usage,
    UserMessage,
)
from tools.values import Decision, Evidence, JsonObject, Malformed, Report, ToolCall, want

REPORTED, LIMIT, REFUSED, CANCELLED, ERROR = ("reported", "limit", "refused", "cancelled", "error")
OUTCOMES = (REPORTED, LIMIT, REFUSED, CANCELLED, ERROR)

STOP_GRACE_S = 10.0  # seconds a tool call has to say what became of it after it was cancelled; the lease is longer
REPEAT_DELAY_S = 1.0  # seconds before an inference is repeated that broke in the middle, times the attempt
ANSWER_SHARE = 0.25  # most of the window that is kept free for one answer
FIRST_ANSWER_TOKENS = 8192  # most tokens of one answer: a report of fifty findings takes about 6,000

_T = TypeVar("_T")

CallTool = Callable[[ToolCall], Awaitable["tuple[Decision, Evidence | None]"]]
Emit = Callable[[str, JsonObject], None]


@dataclasses.dataclass(frozen=True, slots=True)
class LimitInfo:
    name: str
    unit: str
    reason: str


LIMITS = (
    LimitInfo("steps", "inferences", "a model that goes in circles; long investigations get less accurate, not more"),
    LimitInfo("tokens", "tokens, input and output together", "each step sends the whole conversation again"),
    LimitInfo("wall_s", "seconds", "somebody waits for the result; the lease must outlive the task"),
    LimitInfo("cost_usd", "US dollars", "a budget somebody set; an unknown cost cannot be held to it"),
    LimitInfo("tool_calls", "calls", "load on the machine"),
    LimitInfo("malformed", "answers in a row", "a model that cannot write a call will not learn it in this task"),
    LimitInfo("same_refusal", "refusals of one call", "no retry storm (safety.md, The gate)"),
    LimitInfo("report_rejections", "reports", "a report that stays wrong is cut down to what stands"),
    LimitInfo("repeats", "repeats of one inference", "a broken connection may come back, a broken endpoint will not"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a task; ``LIMITS`` says the unit and the reason of each. ``cost_usd`` ``None``: no limit."""

    steps: int = 30
    tokens: int = 600_000
    wall_s: float = 900.0
    cost_usd: float | None = None
    tool_calls: int = 100
    malformed: int = 3
    same_refusal: int = 3
    report_rejections: int = 2
    repeats: int = 2

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Limits:
        """Missing fields keep their default, ``null`` too. Raises ``Malformed`` for unknown names and values below 1
        (seconds and dollars: not above 0)."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(document) - names)
        if unknown:
            raise Malformed(f"unknown limits {unknown!r}; known are {', '.join(sorted(names))}")
        values: dict[str, Any] = {}
        for name in names & set(document):
            if document[name] is None:
                continue
            real = name in ("wall_s", "cost_usd")
            value = want(document, name, (int, float) if real else int)
            if not (0 < value < float("inf") if real else value >= (0 if name == "repeats" else 1)):
                raise Malformed(f"limit {name!r} must be {'above 0' if real else 'at least 1'}, got {value!r}")
            values[name] = value
        return cls(**values)


@dataclasses.dataclass(frozen=True, slots=True)
class LoopTask:
    """What is to be done. ``system``: the system prompt; ``prompt``: what is asked; ``tools``: what may be called
    (``report`` is added); ``temperature`` ``None``: the provider's default; ``metadata``: goes along with each request
    for accounting (``run_id``, ``machine``)."""

    system: str
    prompt: str
    tools: tuple[ToolSpec, ...] = ()
    limits: Limits = dataclasses.field(default_factory=Limits)
    temperature: float | None = None
    metadata: JsonObject = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Totals:
    """What a task took. ``cost_usd``: the known part; ``cost_unknown``: inferences whose cost nobody knows."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost_usd: float = 0.0
    cost_unknown: int = 0
    inferences: int = 0
    tool_calls: int = 0

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def add(self, usage: Usage) -> None:
        self.input_tokens += usage.input_tokens
        self.output_tokens += usage.output_tokens
        self.cached_tokens += usage.cached_tokens
        if usage.cost_usd is None:
            self.cost_unknown += 1
        else:
            self.cost_usd += usage.cost_usd

    def to_json(self) -> JsonObject:
        """``cost_usd`` is ``null`` as soon as one inference has no known cost: a part is not the whole."""
        return {
            "input_tokens": self.input_tokens, "output_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens, "cost_usd": None if self.cost_unknown else self.cost_usd,
            "cost_known_usd": self.cost_usd, "cost_unknown": self.cost_unknown, "inferences": self.inferences,
            "tool_calls": self.tool_calls,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class LoopResult:
    """How a task ended. ``outcome`` is one of ``OUTCOMES``; ``reason``: one sentence; ``limit``: the name of the limit
    that ended it; ``error``: the JSON of the ``InferenceError`` that did; ``steps``: inferences that were asked for."""

    outcome: str
    reason: str
    report: Report | None
    usage: Totals
    steps: int
    limit: str = ""
    error: JsonObject | None = None

    def to_json(self) -> JsonObject:
        return {
            "outcome": self.outcome, "reason": self.reason, "report": self.report.to_json() if self.report else None,
            "usage": self.usage.to_json(), "steps": self.steps, "limit": self.limit, "error": self.error,
        }  # fmt: skip


class _Ended(Exception):
    """The task is over; carries how."""

    def __init__(
        self,
        outcome: str,
        reason: str,
        *,
        limit: str = "",
        report: Report | None = None,
        error: JsonObject | None = None,
    ) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.limit = limit
        self.report = report
        self.error = error


async def run_loop(
    model: Model,
    task: LoopTask,
    call_tool: CallTool,
    emit: Emit,
    cancelled: asyncio.Event,
    *,
    caller_emits_decisions: bool = False,
    now: Callable[[], float] = time.monotonic,
    nonce: str | None = None,
) -> LoopResult:
    """Work on ``task`` until it is reported, refused, cancelled, out of limits or broken.

    ``call_tool``: carries one call through the gate; returns the decision and, if it was executed, its evidence. It is
    cancelled when the task is; it may then still return what it knows within ``STOP_GRACE_S``. ``emit``: takes each
    event (kind and body of ``EVENT_KINDS``) at once and in order. ``cancelled``: set it to end the task.
    ``caller_emits_decisions``: ``call_tool`` emits ``call.decided`` itself, the moment the decision is there.
    ``nonce``: of the markers around untrusted text, random unless given. Never raises an ``InferenceError``: whatever
    happens with the model is in the result.
    """
    loop = _Loop(model, task, call_tool, emit, cancelled, caller_emits_decisions, now, nonce or secrets.token_hex(8))
    try:
        await loop.work()
    except _Ended as end:
        found = end.report
        if found is not None:
            notes = (*found.notes, *loop.report_notes())
            found = dataclasses.replace(found, model=f"{model.provider}:{model.name}", notes=notes)
        return LoopResult(end.outcome, end.reason, found, loop.totals, loop.steps, end.limit, end.error)
    raise AssertionError("the loop ended without saying how")


class _Loop:
    def __init__(
        self,
        model: Model,
        task: LoopTask,
        call_tool: CallTool,
        emit: Emit,
        cancelled: asyncio.Event,
        caller_emits_decisions: bool,
        now: Callable[[], float],
        nonce: str,
    ) -> None:
        self.model = model
        self.limits = task.limits
        self.call_tool = call_tool
        self.emit = emit
        self.cancelled = cancelled
        self.caller_emits_decisions = caller_emits_decisions
        self.now = now
        self.nonce = nonce
        self.deadline = now() + task.limits.wall_s
        self.task = task
        self.system = f"{task.system.rstrip()}\n\n{rendering.data_rule(nonce)}"
        self.tools = (*(tool for tool in task.tools if tool.name != report.REPORT), report.REPORT_TOOL)
        self.messages: list[Message] = [UserMessage(task.prompt)]
        self.totals = Totals()
        self.steps = 0
        self.calls = 0
        self.malformed = 0
        self.rejections = 0
        self.window = model.context_tokens
        self.factor = 1.0
        self.free = False  # the model takes no tokens at all: there is nothing to estimate
        self.executed: set[str] = set()
        self.not_executed: dict[str, str] = {}
        self.refusals: dict[str, int] = {}
        self.shortened: set[str] = set()
        self.told: set[str] = set()

    # --- one turn after the other ---------------------------------------------------------------------------------

    async def work(self) -> None:
        """Ends by raising ``_Ended``."""
        while True:
            last = self._last_step()
            completion = await self._infer(last)
            self.messages.append(completion.message())
            if completion.tool_uses:
                await self._answer_uses(completion, last)
            else:
                self._answer_text(completion)

    def _last_step(self) -> bool:
        """Whether the model must report now: another round would go over a limit. Raises at a limit."""
        if self.cancelled.is_set():
            raise _Ended(CANCELLED, "the task was cancelled")
        if self.now() >= self.deadline:
            raise self._over("wall_s", f"{self.limits.wall_s:g} s are over")
        if self.steps >= self.limits.steps:
            raise self._over("steps", f"{self.limits.steps} inferences were made without a report")
        if self.totals.tokens >= self.limits.tokens:
            raise self._over("tokens", f"{self.totals.tokens} of {self.limits.tokens} tokens are used")
        self._check_cost()
        reason = ""
        if self.steps and self.steps == self.limits.steps - 1:
            reason = "this is the last step of the task"
        elif self.calls >= self.limits.tool_calls:
            reason = f"the limit of {self.limits.tool_calls} tool calls is reached"
        if not reason:
            return False
        if "last step" not in self.told:
            self.told.add("last step")
            self._note(f"limit near: {reason}; the model was told to report now")
            self._tell(f"Chargehand: {reason}. Call `report` now, with what your evidence shows so far.")
        return True

    def _check_cost(self) -> None:
        if self.limits.cost_usd is None:
            return
        if self.totals.cost_usd >= self.limits.cost_usd:
            raise self._over("cost_usd", f"{self.totals.cost_usd:.4f} of {self.limits.cost_usd:g} US dollars are spent")
        if self.totals.cost_unknown and "cost" not in self.told:
            self.told.add("cost")
            self._note(
                f"the cost of {self.model.provider}:{self.model.name} is not known, so the limit of "
                f"{self.limits.cost_usd:g} US dollars cannot be watched; the limit of {self.limits.tokens} tokens holds"
            )

    def _over(self, name: str, reason: str) -> _Ended:
        return _Ended(LIMIT, f"limit {name}: {reason}", limit=name)

    def _note(self, text: str) -> None:
        self.emit("note", {"text": text})

    def _tell(self, text: str) -> None:
        self.messages.append(UserMessage(text))

    def report_notes(self) -> list[str]:
        """What the reader of the report must know of how it came about."""
        if not self.shortened:
            return []
        names = ", ".join(sorted(self.shortened))
        return [f"to fit the model's window, results were shortened before the report was written: {names}"]

    # --- inference ------------------------------------------------------------------------------------------------

    async def _infer(self, last: bool) -> Completion:
        """One complete answer. Repeats what broke in the middle, shortens what does not fit, ends the task else."""
        repeats = 0
        tighter = 0
        while True:
            request = self._request(last)
            try:
                return await self._infer_once(request)
            except ContextTooLong as error:
                tighter += 1
                if tighter > 2:
                    raise self._broken(error) from error
                # the endpoint's window is smaller than configured: aim below what it just refused
                known = error.window or self.window
                self.window = min(known, int(tokens.of_request(request) * self.factor * 0.8) + request.max_tokens)
                self._note(f"the model's window is smaller than {self.model.context_tokens} tokens: {error.message}")
            except InferenceError as error:
                repeats += 1
                if not error.retryable or isinstance(error, RateLimited) or repeats > self.limits.repeats:
                    raise self._broken(error) from error
                self._note(
                    f"inference failed ({error.code}: {error.message}); repeating it, nothing of it was executed"
                )
                await self._until(asyncio.sleep(REPEAT_DELAY_S * repeats))
            if self.steps >= self.limits.steps:
                raise self._over("steps", f"{self.limits.steps} inferences were made without a report")

    def _broken(self, error: InferenceError) -> _Ended:
        if isinstance(error, ModelRefused):
            return _Ended(REFUSED, error.message, error=error.to_json())
        if isinstance(error, InferenceDenied) and error.limit:
            return _Ended(LIMIT, error.message, limit=error.limit, error=error.to_json())
        return _Ended(ERROR, error.message, error=error.to_json())

    def _request(self, last: bool) -> Request:
        """The next request, shortened until it fits. Raises ``_Ended`` when it cannot."""
        answer = max(64, min(FIRST_ANSWER_TOKENS, int(self.window * ANSWER_SHARE)))
        shown = (report.REPORT_TOOL,) if last else self.tools
        fitted = context.fit(self.system, shown, self.messages, self.window, answer, self.factor)
        for cut in fitted.shortened:
            self.shortened.add(self._call_named(fitted.messages[cut.position]))
            self._note(
                f"to fit the model's window of {self.window} tokens a tool result was shortened from {cut.before} to "
                f"{cut.after} characters ({self._call_named(fitted.messages[cut.position])})"
            )
        self.messages = list(fitted.messages)
        if not fitted.fits:
            raise _Ended(
                ERROR,
                f"the conversation takes about {fitted.estimate} tokens and the window of {self.model.provider}:"
                f"{self.model.name} has {self.window}, with every tool result shortened; use a model with a larger window "
                "or ask for less at once",
                error=ContextTooLong(
                    "the conversation does not fit", tokens=fitted.estimate, window=self.window
                ).to_json(),
            )
        left = self.limits.tokens - self.totals.tokens
        estimate = 0 if self.free else fitted.estimate
        if estimate >= left:
            raise self._over(
                "tokens",
                f"{self.totals.tokens} of {self.limits.tokens} are used and the next step takes about {estimate}",
            )
        return Request(
            self.system,
            tuple(self.messages),
            shown,
            max(1, min(answer, left - estimate)),
            self.task.temperature,
            (),
            {**self.task.metadata, "inference_id": f"i{self.steps + 1}", "step": self.steps + 1},
        )

    def _call_named(self, message: Message) -> str:
        if isinstance(message, ToolResult) and message.record is not None:
            return f"call {message.record.call.call_id}"
        return "a result"

    async def _infer_once(self, request: Request) -> Completion:
        self.steps += 1
        self.totals.inferences += 1
        inference_id = f"i{self.steps}"
        who: dict[str, Any] = {"provider": self.model.provider, "model": self.model.name}
        self.emit("inference.started", {"inference_id": inference_id, **who, "step": self.steps})
        started = self.now()
        completion = Completion()
        failed: InferenceError | None = None
        stopped: _Ended | None = None
        try:
            await self._until(self._collect(request, completion))
            if completion.finished is None:
                failed = BadAnswer("the model's answer ended without saying how", **who)
        except InferenceError as error:
            failed = error
        except _Ended as end:
            stopped = end
        except Exception as error:  # noqa: BLE001 - it becomes the result's error
            # the inference was announced, so its end must be told whatever it was
            failed = InferenceError(f"the model failed in an unforeseen way: {type(error).__name__}: {error}", **who)
            failed.__cause__ = error
        usage = completion.usage
        if usage is None and (failed is None or completion.text or stopped is not None):
            # asked for and perhaps paid for: an estimate counts against the limits, silence would not
            usage = tokens.estimated(request, completion)
        if usage is not None:
            self.totals.add(usage)
        body: JsonObject = {
            "inference_id": inference_id,
            "usage": (usage or Usage()).to_json(),
            "stop_reason": "error" if failed else "cancelled" if stopped else _stop_reason(completion),
            "duration_ms": round((self.now() - started) * 1000, 3),
            "prompt_digest": request.prompt_digest,
            "completion_digest": completion.digest,
        }
        if failed is not None:
            body["error"] = failed.to_json()
        elif stopped is not None:
            body["error"] = {"code": stopped.outcome, "message": stopped.reason}
        self.emit("inference.finished", body)
        if stopped is not None:
            raise stopped
        if failed is not None:
            raise failed
        if usage is not None and not usage.estimated:
            self.free = usage.tokens == 0
            self.factor = max(1.0, min(4.0, usage.input_tokens / max(1, tokens.of_request(request))))
        return completion

    async def _collect(self, request: Request, completion: Completion) -> None:
        async with contextlib.aclosing(self.model.infer(request)) as events:
            async for event in events:
                completion.add(event)
                if isinstance(event, TextDelta):
                    self.emit("text", {"text": event.text})
                elif isinstance(event, Notice):
                    self._note(event.text)

    async def _until(self, work: Coroutine[Any, Any, _T], grace: float = 1.0, keep_late: bool = False) -> _T:
        """The result of ``work``, unless the task is cancelled or its time is over first: then ``work`` is cancelled,
        has ``grace`` seconds to end, and ``_Ended`` is raised. ``keep_late``: what it still returns is taken instead,
        because it says what happened on the machine."""
        running = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self.cancelled.wait())
        in_time = False
        try:
            left = max(0.0, self.deadline - self.now())
            await asyncio.wait({running, stop}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            in_time = running.done()
        finally:
            stop.cancel()
            if not running.done():
                running.cancel()
                await asyncio.wait({running}, timeout=grace)
            if not in_time:
                running.add_done_callback(_seen)
        if in_time or (keep_late and running.done() and not running.cancelled() and running.exception() is None):
            return running.result()
        if self.cancelled.is_set():
            raise _Ended(CANCELLED, "the task was cancelled")
        raise self._over("wall_s", f"{self.limits.wall_s:g} s are over")

    # --- what the model said --------------------------------------------------------------------------------------

    def _answer_text(self, completion: Completion) -> None:
        """An answer without a tool use: the end of the task, or something to be put right."""
        finished = completion.finished
        assert finished is not None
        if finished.stop_reason in (REFUSAL, CONTENT_FILTER):
            said = finished.detail or completion.text.strip() or "without a reason"
            raise _Ended(REFUSED, f"the model refused ({finished.stop_reason}): {said[:500]}")
        if finished.stop_reason == LENGTH:
            self._note("the model's answer was cut at its token limit")
            self._strike("your answer reached its token limit before it was complete. Call `report`, shorter.")
        elif not completion.text.strip():
            self._strike("your answer was empty. Call a tool, or `report` to end the task.")
        else:
            self._note("the model answered in text without calling `report`")
            raise _Ended(REPORTED, "the model answered in text", report=report.from_text(completion.text))

    def _strike(self, text: str) -> None:
        """One more answer in a row that nothing can be done with."""
        self.malformed += 1
        if self.malformed >= self.limits.malformed:
            raise self._over("malformed", f"{self.malformed} answers in a row could not be used; the last: {text}")
        self._tell(f"Chargehand: {text}")

    async def _answer_uses(self, completion: Completion, last: bool) -> None:
        """Make the calls of one answer, in order. A report is judged at its place; what comes after it is not made."""
        assert completion.finished is not None
        if completion.finished.stop_reason in (REFUSAL, CONTENT_FILTER):
            # an answer that its provider took back is not acted on, whatever it holds
            self._answer_text(completion)
        if completion.finished.stop_reason == LENGTH:
            self._note("the model's answer was cut at its token limit; the call it was writing is not executed")
        # ids of this turn's calls can only be guessed at by a report of the same turn: it has not read their results
        citable = frozenset(self.executed)
        usable = False
        for use in completion.tool_uses:
            if use.name == report.REPORT and use.arguments is not None:
                self._judge(use, use.arguments, citable)
                usable = True
            else:
                usable = await self._answer_use(use, last) or usable
        if usable:
            self.malformed = 0
            return
        self.malformed += 1
        if self.malformed >= self.limits.malformed:
            raise self._over("malformed", f"{self.malformed} answers in a row held no call that could be made")

    def _judge(self, use: ToolUse, arguments: JsonObject, citable: frozenset[str]) -> None:
        found, problems = report.judged(arguments, citable, self.not_executed)
        if found is not None:
            raise _Ended(REPORTED, "the model reported", report=found)
        self.rejections += 1
        if self.rejections > self.limits.report_rejections or self.steps >= self.limits.steps:
            kept = report.salvaged(arguments, citable, self.not_executed)
            self._note(f"the report stayed wrong; what stands of it was kept: {'; '.join(problems)[:500]}")
            raise _Ended(REPORTED, "the model reported; parts of the report were refused", report=kept)
        self._note(f"the report was handed back to the model: {'; '.join(problems)[:500]}")
        text = "the report was not accepted:\n" + "\n".join(f"- {problem}" for problem in problems[:20])
        self._reply(use, f"{text}\nPut this right and call `report` again.", is_error=True)

    async def _answer_use(self, use: ToolUse, last: bool) -> bool:
        """Whether the use was a call that could be made (allowed or not)."""
        if use.arguments is None:
            self._reply(
                use,
                f"the call of {use.name!r} was not made: {use.problem}. What came: {use.raw[:400]!r}. Send the call again "
                "with one JSON object as its arguments.",
                is_error=True,
            )
            return False
        names = [tool.name for tool in self.tools]
        if use.name not in names:
            self._reply(
                use,
                f"there is no tool {use.name!r}; the tools are: {', '.join(names)}. Call one of them.",
                is_error=True,
            )
            return False
        if last or self.calls >= self.limits.tool_calls:
            self._reply(use, "the call was not made: the task has to end. Call `report` now.", is_error=True)
            return False
        await self._call(use, use.arguments)
        return True

    async def _call(self, use: ToolUse, arguments: JsonObject) -> None:
        if self.cancelled.is_set():
            raise _Ended(CANCELLED, "the task was cancelled")
        self.calls += 1
        self.totals.tool_calls += 1
        call = ToolCall(f"c{self.calls}", use.name, arguments)
        self.emit("call.asked", call.to_json())
        try:
            decision, evidence = await self._until(_awaited(self.call_tool(call)), STOP_GRACE_S, keep_late=True)
        except _Ended:
            self._note(f"call {call.call_id} was stopped before it said what became of it")
            raise
        except Exception as error:
            # the way to the broker is gone: what the call did is unknown here, the machine's journal has it
            raise _Ended(
                ERROR, f"call {call.call_id} could not be carried out: {type(error).__name__}: {error}"
            ) from error
        if not self.caller_emits_decisions:
            self.emit("call.decided", {"call_id": call.call_id, "decision": decision.to_json()})
        if evidence is not None:
            self.emit("call.finished", {"call_id": call.call_id, "evidence": evidence.to_json()})
            self.executed.add(call.call_id)
            text = rendering.evidence_text(call, decision, evidence, self.nonce)
            self._reply(use, text, record=CallRecord(call, evidence, False))
            return
        self.emit("call.finished", {"call_id": call.call_id, "refused": True})
        self.not_executed[call.call_id] = f"it was not allowed ({decision.reason})"
        times = self.refusals[call.digest] = self.refusals.get(call.digest, 0) + 1
        if times >= self.limits.same_refusal:
            raise self._over("same_refusal", f"the call {_shown(call)} was refused {times} times: {decision.reason}")
        text = rendering.refusal_text(call, decision, times, self.limits.same_refusal)
        self._reply(use, text, is_error=True, record=CallRecord(call, None, True, decision.reason))

    def _reply(self, use: ToolUse, text: str, *, is_error: bool = False, record: CallRecord | None = None) -> None:
        self.messages.append(ToolResult(use.id, text, is_error, record))


async def _awaited(value: Awaitable[_T]) -> _T:
    return await value


def _seen(running: asyncio.Future[Any]) -> None:
    """Take note of an exception nobody waits for any more, so that it is not reported as forgotten."""
    if not running.cancelled():
        running.exception()


def _stop_reason(completion: Completion) -> str:
    return completion.finished.stop_reason if completion.finished is not None else "error"


def _shown(call: ToolCall) -> str:
    text = f"{call.tool} {json.dumps(call.arguments)}"
    return text if len(text) <= 200 else text[:200] + "…"
