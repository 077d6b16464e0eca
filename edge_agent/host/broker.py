"""The broker: the process on the host that executes but cannot think.

Owns: one lease, one journal, the control socket, the connection into the worker, and the loop that serves them while a
command runs. Deliberately does not know: models, A2A, SSH, systemd; what a call may do is the gate's answer.

One thread, one selector. The broker connects *into* the worker's socket; nothing connects to the broker but the
gatekeeper, over a socket that the worker's container does not see. It ends when it is told to, when its lease ends, when
its worker has gone or broke the protocol; systemd (or the keeper) then stops the worker. While its journal cannot be
written it refuses every call and does not prolong its lease.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import selectors
import signal
import socket
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Set

from edge_agent.host import clock, confine
from edge_agent.host.calls import Calls
from edge_agent.host.documents import read_object, seconds
from edge_agent.host.errors import BadRequest, HostError, JournalFailed, MachineFailed, NoLease
from edge_agent.host.home import PROTOCOL, Home, connect_below
from edge_agent.host.journal import Journal
from edge_agent.host.lease import Grant, Lease, current_run
from edge_agent.host.units import notify
from tools.policy import Policy
from tools.values import JsonObject, Malformed, ToolCall, want

# One line of the protocols of broker.sock and tools.sock, bytes.
MAX_LINE = 1024 * 1024
# Between two tries to connect into a worker that is still starting, seconds.
CONNECT_RETRY_S = 0.01
# Calls that wait while one runs; a worker asks one at a time, so more is a defect of the worker.
MAX_WAITING = 16
# Answers that wait for a peer to read them, bytes: some evidences. A worker that asks and never reads is no worker.
MAX_UNREAD = 8 * MAX_LINE
# Calls of one run. The loop's own limit is far below; this one bounds the journal that a worker taken over can fill.
MAX_CALLS = 2000
# After the end of the lease, seconds: by then the kernel ends a broker that could not end itself.
WATCHDOG_S = 4.0
CALL_ID = re.compile(r"c[1-9][0-9]{0,8}")


class Lines:
    """A stream socket as lines of JSON, without blocking the loop: whole lines come out, whole lines go in."""

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        self.stream = stream
        self._in = bytearray()
        self._out = bytearray()

    def receive(self) -> Optional[List[bytes]]:
        """The whole lines that have come, ``None`` at the end of the stream. Raises ``BadRequest`` for an endless line."""
        try:
            data = self.stream.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._in += data
        *lines, rest = bytes(self._in).split(b"\n")
        self._in = bytearray(rest)
        if max(map(len, (rest, *lines))) > MAX_LINE:
            raise BadRequest("a line is longer than %d bytes" % MAX_LINE)
        return lines

    def send(self, document: JsonObject) -> None:
        """Send what the peer takes now; the rest is ``pending``. Raises ``BadRequest`` for a peer that never reads."""
        self._out += json.dumps(document, separators=(",", ":")).encode("ascii") + b"\n"
        self.flush()
        if len(self._out) > MAX_UNREAD:
            raise BadRequest("more than %d bytes wait to be read" % MAX_UNREAD)

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while self._out:
                    del self._out[: self.stream.send(self._out)]
            except (BrokenPipeError, ConnectionResetError):
                self._out.clear()  # it has gone; the end of its stream is read next

    @property
    def pending(self) -> bool:
        return bool(self._out)


def take_lease(home: Home, run_dir: str) -> "tuple[Grant, float]":
    """The lease that ``start`` left for this very start of the broker; it is used up by reading.

    Returns the grant and the boot time it was given at. Raises ``NoLease``: nobody starts the broker by hand.
    """
    path = os.path.join(run_dir, "lease.json")
    try:
        with open(path, "rb") as file:
            text = file.read()
        os.unlink(path)
    except FileNotFoundError:
        raise NoLease(
            "there is no lease: the edge agent only runs when a supervisor starts it",
            next_step="ask the gateway for a run (chargehand run MACHINE ...)",
        ) from None
    try:
        document = read_object(text)
        grant = Grant.from_json(want(document, "grant", dict))
        granted_at = seconds(document, "granted_at")
    except (ValueError, HostError) as error:
        raise NoLease("the lease cannot be read: %s" % error) from error
    run = current_run(home.state())
    # The time of the granting counts as much as the grant: from a later one the lease would last longer.
    known = {"run_id": grant.run_id, "lease_digest": grant.digest, "granted_at": granted_at}
    if run is None or any(run.get(name) != value for name, value in known.items()):
        raise NoLease("the lease is not the one that was granted last")
    now = clock.boottime()
    if grant.boot_id != clock.boot_id() or not granted_at <= now <= min(granted_at + grant.lease_s, grant.not_after):
        raise NoLease("the lease is not fresh")
    return grant, granted_at


def arm_watchdog(left_s: float) -> None:
    """Have the kernel end this process ``left_s`` and ``WATCHDOG_S`` seconds from now, whatever it is doing then.

    A lease that only a healthy broker ends is none: it may hang in a parser or a dead disk. Arming it again replaces it.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(0.0, left_s) + WATCHDOG_S)


class Broker:
    """One run's broker. ``serve`` returns when the run is over on this machine.

    Args:
        home, run_dir: where things lie.
        lease, journal: this run's, the journal is new.
        calls: gate, runner and journal, joined.
    """

    def __init__(
        self, run_dir: str, lease: Lease, journal: Journal, calls: Calls, selector: selectors.BaseSelector
    ) -> None:
        self._run_dir = run_dir
        self._lease = lease
        self._journal = journal
        self._calls = calls
        self._selector = selector
        self._worker: Optional[Lines] = None
        self._worker_said: Optional[JsonObject] = None
        self._seen: Set[str] = set()
        self._waiting: List[ToolCall] = []
        self._asking: List[Lines] = []
        self._over = ""
        self._listener = self._listen()
        self._wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        selector.register(self._wake_read, selectors.EVENT_READ, lambda: self._end("the unit was stopped"))
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _listen(self) -> socket.socket:
        path = os.path.join(self._run_dir, "broker.sock")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        listener.bind(path)
        listener.listen(8)
        return listener

    # -- the loop

    def serve(self) -> str:
        """Serve until the run is over; returns why. Kills what runs and writes ``stopped`` before it returns."""
        arm_watchdog(self._lease.left(clock.boottime()))
        while True:
            self._round()
            if self._over:
                return self._over

    def _round(self) -> None:
        self._connect_worker()
        events = self._selector.select(self._wait_s())
        # Before anything that came: after the end of the lease nothing is taken up any more.
        if self._lease.left(clock.boottime()) <= 0:
            self._expire()
            return
        for key, _ in events:
            key.data()
            if self._over:
                return
        self._calls.check_time(time.monotonic())
        self._next()

    def _wait_s(self) -> float:
        waits = [self._lease.left(clock.boottime())]
        if self._calls.deadline is not None:
            waits.append(self._calls.deadline - time.monotonic())
        if self._worker is None:
            waits.append(CONNECT_RETRY_S)
        return max(0.0, min(waits))

    def _expire(self) -> None:
        with contextlib.suppress(JournalFailed):
            self._journal.append("lease.expired", {"hard_stop": clock.boottime() >= self._lease.hard_stop_at})
        self._end("the lease ended")

    def _end(self, reason: str) -> None:
        if self._over:
            return
        self._over = reason
        self._waiting.clear()
        self._calls.end(reason)
        # A journal that cannot be written any more must not keep a broker alive.
        with contextlib.suppress(JournalFailed):
            self._journal.append("stopped", {"reason": reason, "calls": self._calls.counted})
        self._journal.close()
        for asker in self._asking:
            self._answer(
                asker, {"error": MachineFailed("the run ended before the worker was ready", got=reason).to_json()}
            )
        if self._worker is not None:
            self._worker.stream.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._run_dir, "broker.sock"))

    # -- the worker

    def _connect_worker(self) -> None:
        if self._worker is not None:
            return
        try:
            stream = connect_below(os.path.join(self._run_dir, "worker"), "tools.sock")
        except OSError:
            return  # it does not listen yet, or listens and takes nobody: tried again until the lease ends
        self._worker = Lines(stream)
        self._selector.register(stream, selectors.EVENT_READ, self._worker_ready)
        self._tell(
            {
                "hello": {
                    "protocol": PROTOCOL,
                    "run_id": self._lease.grant.run_id,
                    "limits": self._lease.grant.limits,
                    "model": self._lease.grant.model,
                    "tools": self._calls.catalogue(),
                }
            }
        )

    def _worker_ready(self) -> None:
        """The worker's stream is readable, or takes what waited for it."""
        worker = self._worker
        if worker is None:
            return
        if worker.pending:
            worker.flush()
            self._watch(worker)
        try:
            lines = worker.receive()
        except BadRequest as error:
            self._refuse_worker(str(error))
            return
        if lines is None:
            self._end("the worker has gone")
            return
        for line in lines:
            if self._over:
                return
            try:
                self._worker_line(line)
            except (ValueError, RecursionError) as error:
                self._refuse_worker(str(error) or type(error).__name__)

    def _worker_line(self, line: bytes) -> None:
        document = json.loads(line)
        if not isinstance(document, dict):
            raise Malformed("a line must be an object, got %.80r" % (document,))
        if "call" in document:
            self._submit(ToolCall.from_json(want(document, "call", dict)))
        elif "cancel" in document:
            self._cancel(want(document, "cancel", str))
        elif "ready" in document:
            # To the gateway goes what it expects of it, nothing else a worker may put there.
            self._worker_said = {
                name: document[name]
                for name in ("pid", "start_s")
                if isinstance(document.get(name), (int, float)) and math.isfinite(document[name])
            }
            for asker in self._asking:
                self._answer(asker, {"ready": True, "worker": self._worker_said})
            self._asking.clear()
        else:
            raise Malformed("a line must hold 'call', 'cancel' or 'ready', got %.80r" % (sorted(document),))

    def _refuse_worker(self, what: str) -> None:
        """The worker does not keep to the protocol: it is told once, and the run is over. A worker that is sound never
        gets here, and one that is not must not be argued with."""
        said = "the worker broke the protocol: %s" % what[:500]
        self._tell({"error": BadRequest(said).to_json()})
        self._end(said)

    def _submit(self, call: ToolCall) -> None:
        if not CALL_ID.fullmatch(call.call_id) or call.call_id in self._seen:
            raise Malformed("call ids are c1, c2, ... and each is used once, got %.80r" % call.call_id)
        if len(self._seen) >= MAX_CALLS:
            raise Malformed("more than %d calls in one run" % MAX_CALLS)
        if len(self._waiting) >= MAX_WAITING:
            raise Malformed("more than %d calls wait already; ask one at a time" % MAX_WAITING)
        self._seen.add(call.call_id)
        self._waiting.append(call)
        self._next()

    def _next(self) -> None:
        while self._waiting and not self._calls.busy and not self._over:
            self._calls.submit(self._waiting.pop(0), self._tell, self._tell)

    def _cancel(self, call_id: str) -> None:
        for call in [call for call in self._waiting if call.call_id == call_id]:
            self._waiting.remove(call)
            # Whoever asked for it waits for an answer.
            self._calls.refuse(call, "cancelled", "cancelled before its turn came", self._tell, self._tell)
        self._calls.cancel(call_id, "cancelled by the worker")

    def _tell(self, document: JsonObject) -> None:
        worker = self._worker
        if worker is None:
            return
        try:
            worker.send(document)
            if not self._over:
                self._watch(worker)
        except BadRequest as error:
            self._end("the worker does not read what it is told: %s" % error)

    def _watch(self, worker: Lines) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.pending else 0)
        self._selector.modify(worker.stream, events, self._worker_ready)

    # -- the gatekeeper

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            stream, _ = self._listener.accept()
            asker = Lines(stream)
            self._selector.register(stream, selectors.EVENT_READ, lambda: self._control_readable(asker))

    def _control_readable(self, asker: Lines) -> None:
        try:
            lines = asker.receive()
        except BadRequest:
            lines = None
        if lines is None:
            self._hang_up(asker)
            return
        for line in lines:
            try:
                document = read_object(line)
                answer = self._control(asker, want(document, "verb", str), document)
            except HostError as error:
                answer = {"error": error.to_json(), "exit_code": error.exit_code}
            except (Malformed, RecursionError) as error:
                answer = {"error": BadRequest(str(error)).to_json(), "exit_code": BadRequest.exit_code}
            if answer is not None and not self._answer(asker, answer):
                return

    def _answer(self, asker: Lines, document: JsonObject) -> bool:
        """Whether the answer went out whole; the gatekeeper reads at once, so whoever does not is not listened to."""
        asker.send(document)
        if asker.pending:
            self._hang_up(asker)
        return not asker.pending

    def _hang_up(self, asker: Lines) -> None:
        self._selector.unregister(asker.stream)
        asker.stream.close()
        self._asking = [other for other in self._asking if other is not asker]

    def _control(self, asker: Lines, verb: str, document: Dict[str, Any]) -> Optional[JsonObject]:
        handlers: Dict[str, Callable[[Lines, Dict[str, Any]], Optional[JsonObject]]] = {
            "ready": self._control_ready,
            "renew": self._control_renew,
            "status": self._control_status,
            "stop": self._control_stop,
        }
        if verb not in handlers:
            raise BadRequest("the broker does not know %r" % verb, expected=", ".join(sorted(handlers)))
        return handlers[verb](asker, document)

    def _control_ready(self, asker: Lines, document: Dict[str, Any]) -> Optional[JsonObject]:
        if self._worker_said is None:
            self._asking.append(asker)
            return None
        return {"ready": True, "worker": self._worker_said}

    def _control_renew(self, asker: Lines, document: Dict[str, Any]) -> Optional[JsonObject]:
        now = clock.boottime()
        renewal = (
            want(document, "run_id", str),
            want(document, "generation", int),
            want(document, "seq", int),
            seconds(document, "lease_s"),
        )
        ends_at = self._lease.check_renewal(*renewal, now)
        # Written first: a lease that cannot be recorded is not prolonged, and the run ends when it does.
        self._journal.append("lease.renewed", {"seq": document["seq"], "left_s": round(ends_at - now, 3)})
        left = self._lease.renew(*renewal, now)
        arm_watchdog(left)
        return {"lease_left_s": left}

    def _control_status(self, asker: Lines, document: Dict[str, Any]) -> Optional[JsonObject]:
        grant = self._lease.grant
        return {
            "run_id": grant.run_id,
            "generation": grant.generation,
            "lease_left_s": self._lease.left(clock.boottime()),
            "calls": self._calls.counted,
            "worker": self._worker is not None,
        }

    def _control_stop(self, asker: Lines, document: Dict[str, Any]) -> Optional[JsonObject]:
        self._lease.owns(want(document, "run_id", str), want(document, "generation", int))
        self._end(want(document, "reason", str, "asked to stop")[:500])
        return {"stopping": True}


def main(home: Home) -> int:
    """The broker process from start to end; the exit status is 0 unless it could not start."""
    confine.hide_memory()
    confine.become_subreaper()
    try:
        config = home.config()
        run_dir = home.run_dir(config)
        grant, granted_at = take_lease(home, run_dir)
        policy = Policy.from_json(grant.policy)
        lease_digest = grant.digest
        # From here on only its compiled form is needed.
        grant = dataclasses.replace(grant, policy={})
        lease = Lease(grant, granted_at, config.max_lease_s)
        journal = Journal(home.journal_path(grant.run_id), grant.run_id)
        journal.append(
            "lease.started",
            {
                "lease_digest": lease_digest,
                "machine": grant.machine,
                "generation": grant.generation,
                "policy_digest": grant.policy_digest,
                "lease_s": grant.lease_s,
                "hard_stop_s": grant.hard_stop_s,
                "landlock_abi": confine.landlock_abi()[0],
            },
        )
        selector = selectors.DefaultSelector()
        calls = Calls(policy, home, journal, selector, lambda: lease.left(clock.boottime()) > 0)
        broker = Broker(run_dir, lease, journal, calls, selector)
    except (HostError, Malformed, OSError) as error:
        said = error.next_step if isinstance(error, HostError) else ""
        sys.stderr.write("chargehand-broker: %s%s\n" % (error, "; " + said if said else ""))
        return 1
    confine.give_back_memory()
    notify("READY=1")
    reason = broker.serve()
    notify("STOPPING=1")
    sys.stderr.write("chargehand-broker: run %s is over: %s\n" % (grant.run_id, reason))
    return 0
