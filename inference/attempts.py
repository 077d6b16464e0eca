"""Trying an inference: time limits on every wait, and a bounded number of attempts before anything was said.

Owns: the four time limits, when an attempt may be repeated and after how long.
Deliberately does not know: providers and their exceptions (an attempt raises ``InferenceError`` only).

The SDKs' own retries are switched off: they stop at the response header (a stream that breaks before its first event
would not be repeated), sleep without regard to the deadline of the request, and nobody sees them. Here a repeat is a
``Notice``, the waiting counts against the total, and after the first event nothing is repeated: the loop decides that.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from inference.errors import BadAnswer, InferenceError, ModelTimeout, RateLimited
from inference.protocol import Event, Finished, Notice, TextDelta

ANSWER_CHARS = 2_000_000  # most text of one answer, characters: the longest answer limits are below 200,000 tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. ``connect``: TCP and TLS, an endpoint that is there answers in milliseconds; ``first_event``: queueing
    and prompt reading of a long prompt on a small machine; ``between_events``: a model that thinks silently;
    ``total``: one answer, all attempts and waits together."""

    connect: float = 10.0
    first_event: float = 180.0
    between_events: float = 120.0
    total: float = 600.0


@dataclasses.dataclass(frozen=True, slots=True)
class Retries:
    """``attempts``: tries in all; ``first_delay`` seconds, doubled each time up to ``longest_delay``;
    ``longest_retry_after`` seconds: an endpoint that asks for more has effectively said no."""

    attempts: int = 4
    first_delay: float = 0.5
    longest_delay: float = 8.0
    longest_retry_after: float = 60.0


def delay_before(attempt: int, error: InferenceError, retries: Retries, fraction: float) -> float | None:
    """Seconds to wait before attempt number ``attempt`` (2, 3, …), ``None`` when there must be none.

    ``fraction``: a random number in [0, 1): waits are spread so that many runs do not come back at once.
    """
    if not error.retryable or attempt > retries.attempts:
        return None
    wanted = min(retries.longest_delay, retries.first_delay * 2.0 ** min(attempt - 2, 30))
    if isinstance(error, RateLimited) and error.retry_after is not None:
        if error.retry_after > retries.longest_retry_after:
            return None
        # never earlier than asked, a little later so that all who were told the same do not return together
        return max(0.0, error.retry_after) + wanted * 0.25 * fraction
    return wanted * (0.5 + 0.5 * fraction)


async def attempts(
    attempt: Callable[[], AsyncGenerator[Event, None]],
    timeouts: Timeouts,
    retries: Retries,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    fraction: Callable[[], float] = random.random,
    now: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[Event, None]:
    """The events of the first attempt that says anything.

    ``attempt`` opens one try; its generator is closed whatever happens. Raises the last attempt's ``InferenceError``
    with ``retryable`` switched off when the attempts are used up, and ``BadAnswer`` for a stream without an end.
    """
    deadline = now() + timeouts.total
    number = 1
    while True:
        said, chars = False, 0
        try:
            async with (
                contextlib.aclosing(attempt()) as events,
                contextlib.aclosing(_timed(events, timeouts, deadline, now)) as timed,
            ):
                async for event in timed:
                    said = said or not isinstance(event, Notice)
                    chars += len(event.text) if isinstance(event, TextDelta) else 0
                    if chars > ANSWER_CHARS:
                        raise BadAnswer(f"the model's answer is longer than {ANSWER_CHARS} characters and was given up")
                    yield event
                    if isinstance(event, Finished):
                        return
            raise BadAnswer("the model's stream ended without saying how the answer ended")
        except InferenceError as error:
            if said:
                raise
            number += 1
            delay = delay_before(number, error, retries, fraction())
            if delay is None or now() + delay >= deadline:
                error.retryable = False
                raise
            reason, code = error.message, error.code
        yield Notice(
            f"attempt {number - 1} of {retries.attempts} at the model failed ({code}: {reason}); trying again in "
            f"{delay:.1f} s"
        )
        await sleep(delay)


async def _timed(
    events: AsyncGenerator[Event, None], timeouts: Timeouts, deadline: float, now: Callable[[], float]
) -> AsyncGenerator[Event, None]:
    first = True
    while True:
        phase, seconds = ("first event", timeouts.first_event) if first else ("between events", timeouts.between_events)
        left = deadline - now()
        if left < seconds:
            phase, seconds = "total", left
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                event = await anext(events)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            limit = timeouts.total if phase == "total" else seconds
            raise ModelTimeout(
                f"the model was given {limit:g} s ({phase}) and sent nothing in that time; raise the limit if the "
                "model is this slow, or choose another one",
                phase=phase,
                seconds=limit,
            ) from error
        first = first and isinstance(event, Notice)
        yield event
