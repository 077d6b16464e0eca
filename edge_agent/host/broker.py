"""The broker: the process on the host that executes but cannot think.

Owns: one lease, one journal, the control socket, the connection into the worker, and the loop that serves them while a
command runs. Deliberately does not know: models, A2A, SSH, systemd; what a call may do is the gate's answer.

One thread, one selector. The broker connects *into* the worker's socket; nothing connects to the broker but the
gatekeeper, over a socket that the worker's container does not see. It ends when it is told to, when its lease ends, or
when its journal cannot be written; systemd (or the keeper) then stops the worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any, Callable, Dict, List, Optional

from edge_agent.host import clock, confine
from edge_agent.host.calls import Calls
from edge_agent.host.errors import BadRequest, HostError, JournalFailed, MachineFailed, NoLease
from edge_agent.host.home import PROTOCOL, Home
from edge_agent.host.journal import Journal
from edge_agent.host.lease import Grant, Lease, current_run
from edge_agent.host.units import notify
from tools.values import JsonObject, Malformed, ToolCall, want

# One line of the protocols of broker.sock and tools.sock, bytes.
MAX_LINE = 1024 * 1024
# Between two tries to connect into a worker that is still starting, seconds.
CONNECT_RETRY_S = 0.01
# Calls that wait while one runs; a worker asks one at a time, so more is a defect of the worker.
MAX_WAITING = 16


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
        if b"\n" not in self._in:
            if len(self._in) > MAX_LINE:
                raise BadRequest("a line is longer than %d bytes" % MAX_LINE)
            return []
        *lines, rest = bytes(self._in).split(b"\n")
        self._in = bytearray(rest)
        return lines

    def send(self, document: JsonObject) -> None:
        self._out += json.dumps(document, separators=(",", ":")).encode("ascii") + b"\n"
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._out:
                del self._out[: self.stream.send(self._out)]

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
        document = json.loads(text)
        grant = Grant.from_json(want(document, "grant", dict))
        granted_at = float(want(document, "granted_at", (int, float)))
    except (ValueError, HostError) as error:
        raise NoLease("the lease cannot be read: %s" % error) from error
    run = current_run(home.state())
    if run is None or run.get("run_id") != grant.run_id or run.get("lease_digest") != grant.digest:
        raise NoLease("the lease is not the one that was granted last")
    if grant.boot_id != clock.boot_id() or clock.boottime() > min(granted_at + grant.lease_s, grant.not_after):
        raise NoLease("the lease is not fresh")
    return grant, granted_at


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
        self._worker_lost = False
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
        while not self._over:
            self._connect_worker()
            for key, _ in self._selector.select(self._wait_s()):
                key.data()
                if self._over:
                    break
            self._calls.check_time(time.monotonic())
            if not self._over and self._lease.left(clock.boottime()) <= 0:
                self._expire()
        return self._over

    def _wait_s(self) -> float:
        waits = [self._lease.left(clock.boottime())]
        if self._calls.deadline is not None:
            waits.append(self._calls.deadline - time.monotonic())
        if self._worker is None and not self._worker_lost:
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
        self._calls.end(reason)
        # A journal that cannot be written any more must not keep a broker alive.
        with contextlib.suppress(JournalFailed):
            self._journal.append("stopped", {"reason": reason, "calls": self._calls.counted})
        self._journal.close()
        if self._worker is not None:
            self._worker.stream.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._run_dir, "broker.sock"))

    # -- the worker

    def _connect_worker(self) -> None:
        if self._worker is not None or self._worker_lost:
            return
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            stream.connect(os.path.join(self._run_dir, "worker", "tools.sock"))
        except OSError:
            stream.close()
            return
        worker = self._worker = Lines(stream)
        self._selector.register(stream, selectors.EVENT_READ, self._worker_readable)
        worker.send(
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

    def _worker_readable(self) -> None:
        worker = self._worker
        if worker is None:
            return
        try:
            lines = worker.receive()
        except BadRequest as error:
            self._lose_worker(str(error))
            return
        if lines is None:
            self._lose_worker("the worker has gone")
            return
        for line in lines:
            self._worker_line(worker, line)

    def _worker_line(self, worker: Lines, line: bytes) -> None:
        try:
            document = json.loads(line)
            if not isinstance(document, dict):
                raise Malformed("a line must be an object, got %.80r" % (document,))
            if "call" in document:
                self._submit(ToolCall.from_json(want(document, "call", dict)))
            elif "cancel" in document:
                self._cancel(want(document, "cancel", str))
            elif "ready" in document:
                self._worker_said = dict(document)
                for asker in self._asking:
                    asker.send({"ready": True, "worker": self._worker_said})
                self._asking.clear()
            else:
                raise Malformed("a line must hold 'call', 'cancel' or 'ready', got %.80r" % (sorted(document),))
        except (ValueError, RecursionError) as error:
            worker.send({"error": {"code": "bad_request", "message": str(error)[:500]}})
        except JournalFailed as error:
            worker.send({"error": error.to_json()})

    def _submit(self, call: ToolCall) -> None:
        if self._calls.busy:
            if len(self._waiting) >= MAX_WAITING:
                raise Malformed("more than %d calls wait already; ask one at a time" % MAX_WAITING)
            self._waiting.append(call)
            return
        self._calls.submit(call, self._tell, self._tell_done)

    def _cancel(self, call_id: str) -> None:
        self._waiting = [call for call in self._waiting if call.call_id != call_id]
        self._calls.cancel(call_id, "cancelled by the worker")

    def _tell(self, document: JsonObject) -> None:
        if self._worker is not None:
            self._worker.send(document)
            self._flush_later()

    def _tell_done(self, document: JsonObject) -> None:
        self._tell(document)
        if self._waiting and not self._over:
            self._submit(self._waiting.pop(0))

    def _flush_later(self) -> None:
        worker = self._worker
        if worker is None or not worker.pending:
            return

        def ready() -> None:
            worker.flush()
            if not worker.pending:
                self._selector.modify(worker.stream, selectors.EVENT_READ, self._worker_readable)
            self._worker_readable()

        self._selector.modify(worker.stream, selectors.EVENT_READ | selectors.EVENT_WRITE, ready)

    def _lose_worker(self, reason: str) -> None:
        if self._worker is not None:
            self._selector.unregister(self._worker.stream)
            self._worker.stream.close()
        self._worker, self._worker_lost = None, True
        self._waiting.clear()
        self._calls.cancel(None, reason)

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
            self._selector.unregister(asker.stream)
            asker.stream.close()
            self._asking = [other for other in self._asking if other is not asker]
            return
        for line in lines:
            try:
                document = json.loads(line)
                answer = self._control(asker, want(document, "verb", str), document)
            except HostError as error:
                answer = {"error": error.to_json(), "exit_code": error.exit_code}
            except (ValueError, TypeError) as error:
                answer = {"error": BadRequest(str(error)).to_json(), "exit_code": 2}
            if answer is not None:
                asker.send(answer)

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
        if self._worker_lost:
            raise MachineFailed("the worker ended before it was ready")
        if self._worker_said is None:
            self._asking.append(asker)
            return None
        return {"ready": True, "worker": self._worker_said}

    def _control_renew(self, asker: Lines, document: Dict[str, Any]) -> Optional[JsonObject]:
        left = self._lease.renew(
            want(document, "run_id", str),
            want(document, "generation", int),
            want(document, "seq", int),
            float(want(document, "lease_s", (int, float))),
            clock.boottime(),
        )
        self._journal.append("lease.renewed", {"seq": document["seq"], "left_s": round(left, 3)})
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
        lease = Lease(grant, granted_at, config.max_lease_s)
        journal = Journal(home.journal_path(grant.run_id), grant.run_id)
        journal.append(
            "lease.started",
            {
                "lease_digest": grant.digest,
                "machine": grant.machine,
                "generation": grant.generation,
                "policy_digest": grant.policy_digest,
                "lease_s": grant.lease_s,
                "hard_stop_s": grant.hard_stop_s,
                "landlock_abi": confine.landlock_abi()[0],
            },
        )
        selector = selectors.DefaultSelector()
        calls = Calls(grant.policy, home, journal, selector)
        broker = Broker(run_dir, lease, journal, calls, selector)
    except (HostError, Malformed) as error:
        sys.stderr.write("chargehand-broker: %s\n" % error)
        return 1
    notify("READY=1")
    reason = broker.serve()
    notify("STOPPING=1")
    sys.stderr.write("chargehand-broker: run %s is over: %s\n" % (grant.run_id, reason))
    return 0
