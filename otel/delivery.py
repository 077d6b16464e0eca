"""Delivery: spans from the spool to an OTLP/HTTP endpoint, in batches, until each is there exactly once.

Owns: batching, retry with back-off, telling a span that is refused from an endpoint that refuses everything.
Deliberately does not know: what is in a span, how OTLP encodes it, the spool's file.

Exactly once. A span is marked delivered after the endpoint accepted it; a process that dies between the two sends it
again. MLflow stores spans by (trace id, span id) and replaces an existing one (seen in its SQL store and shown by a
test), so the second time changes nothing: at-least-once delivery of a span that is held once in the spool is exactly
once in MLflow. Within a trace spans go in the order they ended, so the root comes last and turns the trace from "in
progress" to its final state; MLflow 3.17 also ends up complete in any other order.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
import sqlite3
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol
from urllib.parse import urlsplit

import httpx

from otel.mlflow_reader import MlflowError, MlflowReader, on_loopback
from otel.otlp import CONTENT_TYPE, encode, refused_by
from otel.spool import Held, Spool

_log = logging.getLogger(__name__)

EXPERIMENT_HEADER: Final = "x-mlflow-experiment-id"
# Answers that speak about the spans. Everything else but success speaks about the endpoint.
_SPAN_REFUSED: Final = frozenset({400, 413, 422})
_REFUSES_EVERYTHING: Final = 4  # single spans refused in a row, none ever accepted: the endpoint is at fault
_STOP_GRACE_S: Final = 2.0  # what a request under way may still take once the end is asked for


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where OTLP requests go: ``url`` complete with path, ``headers`` (masked in ``repr``)."""

    url: str
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)


class Unreachable(Exception):
    """The endpoint cannot be used now; the message says why. Nothing is lost: the spans stay in the spool.

    ``retry_after_s``: what the endpoint asked to wait, 0 if it did not say.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Target(Protocol):
    """Finds the endpoint. Asked before the first batch and again after ``forget``."""

    async def endpoint(self) -> Endpoint:
        """Raises ``Unreachable``."""
        ...

    def forget(self) -> None:
        """The endpoint answered that it does not know what we believed: find it anew."""
        ...


class OtlpTarget:
    """A plain OTLP/HTTP endpoint, e.g. a local collector: ``url`` with path (``http://127.0.0.1:4318/v1/traces``)."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self._endpoint = Endpoint(_checked(url), dict(headers or {}))

    async def endpoint(self) -> Endpoint:
        return self._endpoint

    def forget(self) -> None:
        pass


class MlflowTarget:
    """MLflow at ``base_url``; the experiment is looked up by name when MLflow answers, and made if missing.

    It is looked up again every ``recheck_s`` seconds of deliveries: MLflow takes spans for an experiment that somebody
    deleted, and nobody would see them.
    """

    def __init__(
        self, base_url: str, experiment: str, headers: Mapping[str, str] | None = None, recheck_s: float = 60.0
    ) -> None:
        self._base_url = _checked(base_url).rstrip("/")
        self._experiment = experiment
        self._headers = dict(headers or {})
        self._experiment_id: str | None = None
        self._recheck_s = recheck_s
        self._checked_at = 0.0

    def __repr__(self) -> str:
        return f"MlflowTarget({_shown(self._base_url)!r}, experiment={self._experiment!r})"

    @property
    def experiment_id(self) -> str | None:
        """The id as last seen; ``None`` before the first delivery."""
        return self._experiment_id

    async def endpoint(self) -> Endpoint:
        if self._experiment_id is None or time.monotonic() - self._checked_at >= self._recheck_s:
            self._experiment_id = await asyncio.to_thread(self._find)
            self._checked_at = time.monotonic()
        return Endpoint(f"{self._base_url}/v1/traces", {**self._headers, EXPERIMENT_HEADER: self._experiment_id})

    def forget(self) -> None:
        self._experiment_id = None

    def _find(self) -> str:
        try:
            with MlflowReader(self._base_url, self._headers, timeout_s=10.0) as reader:
                found = reader.experiment_id(self._experiment, create=True)
        except MlflowError as error:
            raise Unreachable(str(error)) from error
        if found is None:
            raise Unreachable(f"MLflow has no experiment {self._experiment!r} and did not make it")
        return found


@dataclasses.dataclass(frozen=True)
class DeliveryLimits:
    """``batch``: spans of one request (measured: a hundred spans/s one by one, 1,700/s by the 800, each answered well
    below a second); ``batch_bytes``: of one request's JSON form, servers cap bodies; ``linger_s``: how long a lone span waits for
    company; ``request_s``: one request (a busy MLflow may take long, its database has one writer); ``poll_s``: how
    often to look for spans other processes put; ``backoff_s`` and ``backoff_max_s``: first and longest pause while the
    endpoint is away; ``refusals``: how often a span must be refused by itself before it is set aside."""

    batch: int = 800
    batch_bytes: int = 4 * 1024 * 1024
    linger_s: float = 0.2
    request_s: float = 60.0
    poll_s: float = 2.0
    backoff_s: float = 0.25
    backoff_max_s: float = 30.0
    refusals: int = 3


@dataclasses.dataclass(frozen=True)
class DeliveryState:
    """What an operator wants to know: ``sent`` spans since start, ``requests`` that were answered, ``set_aside`` since
    start, ``trouble``: why the last attempt failed, empty when it worked, ``failures``: attempts in a row."""

    sent: int = 0
    requests: int = 0
    set_aside: int = 0
    trouble: str = ""
    failures: int = 0


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """The endpoint refused these spans (and says so about them, not about itself)."""

    reason: str
    status: int


class Deliverer:
    """Sends what is in ``spool`` to ``target``. One per spool is at work at a time, also across processes.

    ``resource``: what emitted the spans (``service.name``, ``host.name``; MLflow makes trace tags of it). Use ``run``
    as a long-living task, ``flush`` when something waits for the spans (the end of a run, a command). Both may be used
    at once, from one event loop.
    """

    def __init__(
        self,
        spool: Spool,
        target: Target,
        limits: DeliveryLimits | None = None,
        resource: Mapping[str, str] | None = None,
    ) -> None:
        self.spool = spool
        self.target = target
        self.limits = limits or DeliveryLimits()
        self.state = DeliveryState()
        self._resource = {"service.name": "chargehand", **(resource or {})}
        self._one_at_a_time = asyncio.Lock()
        self._client: httpx.AsyncClient | None = None
        self._batch = self.limits.batch
        self._accepted_any = False
        self._stopping = False
        self._refused_in_a_row = 0
        self._next_try: dict[int, float] = {}  # row of a refused span → monotonic time of its next attempt

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until ``stop`` is set. Never raises for an endpoint that is away or refuses; says it once per spell.

        Returns within two seconds of ``stop``: a request under way is cut off then, which loses nothing.
        """
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        end_subscription = self.spool.subscribe(lambda: _from_any_thread(loop, arrived))
        delivering = asyncio.create_task(self._deliver(arrived), name="span delivery")
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({delivering, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not delivering.done():
                self._stopping = True
                arrived.set()
                await asyncio.wait({delivering}, timeout=_STOP_GRACE_S)
        finally:
            end_subscription()
            for task in (delivering, stopping):
                task.cancel()
            await asyncio.gather(delivering, stopping, return_exceptions=True)
            self._stopping = False
            await self.aclose()
        if not delivering.cancelled():
            delivering.result()  # a defect of ours is not swallowed

    async def _deliver(self, arrived: asyncio.Event) -> None:
        while not self._stopping:
            arrived.clear()
            pause = await self._step()
            if self._stopping or pause == 0:
                continue
            if pause is not None:
                # Spans that come while the endpoint is away are no reason to try it sooner; the end is.
                end = time.monotonic() + pause
                while not self._stopping and time.monotonic() < end:
                    arrived.clear()
                    await _wait(arrived, end - time.monotonic())
                continue
            # Nothing due: sleep until something comes, or it is time to look for what other processes put.
            await _wait(arrived, self.limits.poll_s)
            if arrived.is_set() and not self._stopping:
                arrived.clear()
                end = time.monotonic() + self.limits.linger_s
                while not self._stopping and time.monotonic() < end:
                    arrived.clear()
                    await _wait(arrived, end - time.monotonic())

    async def flush(self, deadline_s: float, trace_id: str | None = None) -> int:
        """Deliver now, for at most ``deadline_s`` seconds; returns how many spans are still pending.

        With ``trace_id`` it returns as soon as no span of that trace is pending, and counts only those. Never raises
        for an endpoint that is away; ``state.trouble`` says why something remained.
        """
        end = time.monotonic() + deadline_s
        remaining = await self._remaining(trace_id)
        while remaining and time.monotonic() < end:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(end - time.monotonic(), 0)):
                    pause = await self._step()
                    remaining = await self._remaining(trace_id)
                    if remaining and pause != 0:
                        await asyncio.sleep(min(0.1 if pause is None else pause, 1.0))
            except TimeoutError:
                break
        return await self._remaining(trace_id)

    async def aclose(self) -> None:
        """Close the connections. Idempotent; a later ``flush`` opens them anew."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _remaining(self, trace_id: str | None) -> int:
        if trace_id is None:
            return await asyncio.to_thread(self.spool.depth)
        return await asyncio.to_thread(self.spool.pending_of, trace_id)

    async def _step(self) -> float | None:
        """Send one batch. Returns the pause before the next step: 0 for none, ``None`` when nothing is due."""
        async with self._one_at_a_time:
            try:
                with self.spool.only_deliverer() as mine:
                    if not mine:
                        return None
                    return await self._batch_or_suspect()
            except Unreachable as error:
                return max(self._failed(str(error)), min(error.retry_after_s, self.limits.backoff_max_s))
            except (sqlite3.Error, OSError) as error:
                return self._failed(f"the span spool {str(self.spool.path)!r} cannot be read: {error}")

    async def _batch_or_suspect(self) -> float | None:
        held = await asyncio.to_thread(self._next_batch)
        if held:
            await self._send(held)
            return 0.0
        now = time.monotonic()
        waiting = [row for row, at in self._next_try.items() if at > now]
        suspects = await asyncio.to_thread(self.spool.pending, 1, True, waiting)
        if not suspects:
            return None
        await self._send(suspects)
        return 0.0

    def _next_batch(self) -> list[Held]:
        held = self.spool.pending(self._batch)
        size = 0
        for number, item in enumerate(held):
            size += item.size
            if size > self.limits.batch_bytes and number:
                return held[:number]
        return held

    async def _send(self, held: Sequence[Held]) -> None:
        """Deliver these spans, halving a refused batch until the refused span stands alone. Raises ``Unreachable``."""
        answer = await self._post(held)
        if answer is None:
            await asyncio.to_thread(self.spool.delivered, [item.row for item in held])
            for item in held:
                self._next_try.pop(item.row, None)
            self._accepted_any = True
            self._refused_in_a_row = 0
            if self.state.failures:
                _log.info("span delivery works again")
            self._batch = min(self._batch * 2, self.limits.batch)
            self.state = dataclasses.replace(
                self.state, sent=self.state.sent + len(held), requests=self.state.requests + 1, trouble="", failures=0
            )
            return
        self.state = dataclasses.replace(self.state, requests=self.state.requests + 1)
        if len(held) > 1:
            middle = len(held) // 2
            await self._send(held[:middle])
            await self._send(held[middle:])
            return
        await self._refused(held[0], answer)

    async def _refused(self, item: Held, answer: _Refusal) -> None:
        reason = f"{answer.status} {answer.reason}"
        # Before anything was ever accepted the address or the header may be wrong: then every span is refused, and
        # setting them aside one by one would empty the spool into a drawer nobody looks at.
        if item.attempts + 1 >= self.limits.refusals and self._accepted_any:
            await asyncio.to_thread(self.spool.set_aside, item.row, reason)
            self._next_try.pop(item.row, None)
            self.state = dataclasses.replace(self.state, set_aside=self.state.set_aside + 1, trouble=reason)
            _log.error(
                "span %r (%s/%s) set aside: the endpoint refused it %d times, last with %s",
                item.span.name, item.span.trace_id, item.span.span_id, item.attempts + 1, reason,
            )  # fmt: skip
            return
        await asyncio.to_thread(self.spool.refused, item.row, reason)
        self._next_try[item.row] = time.monotonic() + self._pause(item.attempts)
        self.state = dataclasses.replace(self.state, trouble=f"a span was refused: {reason}")
        self._refused_in_a_row += 1
        if not self._accepted_any and self._refused_in_a_row >= _REFUSES_EVERYTHING:
            self._refused_in_a_row = 0
            raise Unreachable(f"the endpoint refuses every span, last with {reason}; is it an OTLP trace endpoint?")

    async def _post(self, held: Sequence[Held]) -> _Refusal | None:
        """One request: ``None`` if accepted, a ``_Refusal`` about the spans; raises ``Unreachable`` otherwise."""
        endpoint = await self.target.endpoint()
        try:
            body = await asyncio.to_thread(encode, [item.span for item in held], self._resource)
        except ValueError as error:
            return _Refusal(f"cannot be encoded: {error}", 400)
        if self._client is None:
            # A proxy from the environment would hide an MLflow on this machine.
            self._client = httpx.AsyncClient(timeout=self.limits.request_s, trust_env=not on_loopback(endpoint.url))
        shown = _shown(endpoint.url)
        try:
            response = await self._client.post(
                endpoint.url, content=body, headers={**endpoint.headers, "content-type": CONTENT_TYPE}
            )
        except httpx.TimeoutException as error:
            # Perhaps the batch is too much for this server; smaller ones get through or fail sooner.
            self._batch = max(self._batch // 2, 1)
            raise Unreachable(f"sent {len(held)} spans to {shown}, no answer in {self.limits.request_s:g} s") from error
        except httpx.HTTPError as error:
            raise Unreachable(f"sent {len(held)} spans to {shown}, got {type(error).__name__}: {error}") from error
        if 200 <= response.status_code < 300:
            refused, reason = refused_by(response.content)
            return _Refusal(reason or "refused without a reason", response.status_code) if refused else None
        if response.status_code in _SPAN_REFUSED:
            return _Refusal(response.text[:300], response.status_code)
        if response.status_code == 404:
            self.target.forget()
        raise Unreachable(
            f"sent {len(held)} spans to {shown}, expected 200, got {response.status_code} {response.text[:200]!r}"
            + _hint(response.status_code),
            _retry_after_s(response),
        )

    def _failed(self, trouble: str) -> float:
        failures = self.state.failures + 1
        if failures == 1:
            _log.warning("spans wait in the spool: %s", trouble)
        self.state = dataclasses.replace(self.state, trouble=trouble, failures=failures)
        return self._pause(failures - 1)

    def _pause(self, failures: int) -> float:
        """Back-off with full jitter upwards of one half, so that many gateways do not come back in step."""
        longest = min(self.limits.backoff_s * 2.0 ** min(failures, 20), self.limits.backoff_max_s)
        return longest * (0.5 + random.random() / 2)


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"the address of a trace endpoint must look like http://host:port/path, got {_shown(url)!r}")
    return url


def _shown(url: str) -> str:
    """The address without a user or password in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1], query="").geturl()


def _hint(status: int) -> str:
    if status in (401, 403):
        return "; check the authorization, and MLflow's allowed hosts (they include the port)"
    if status == 404:
        return "; check the address and that the experiment exists"
    return ""


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds of a Retry-After header; 0 for none and for the form with a date, whose clock is not ours."""
    text = response.headers.get("retry-after", "").strip()
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _from_any_thread(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(event.set)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for the event, at most ``timeout_s`` seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
