"""The gatekeeper: the SSH forced command, the only door into a machine.

Owns: reading exactly one verb and one document, the verbs, the form of answers and errors
(docs/contracts.md, "Verbs of the gatekeeper"). Deliberately does not know: the gateway, A2A, models; it never runs a
shell, and what a verb may do is decided by the lease, the unit manager and the gate.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import sys
import threading
import time
from typing import Any, BinaryIO, Callable, Dict, List, Mapping, Optional, Tuple

from edge_agent.host import clock
from edge_agent.host.documents import read_object, seconds
from edge_agent.host.errors import BadRequest, Busy, HostError, JournalFailed, MachineFailed, NoLease
from edge_agent.host.home import PROTOCOL, Home, HostConfig, connect_below, empty, write_atomic
from edge_agent.host.journal import Journal, check, is_over, prune, read_lines
from edge_agent.host.lease import Grant, admit, check_run_id, current_run, run_record
from edge_agent.host.main import bytecode_path, own_zipapp
from edge_agent.host.units import INACTIVE, UnitManager, choose
from edge_agent.host.version import VERSION
from tools.values import JsonObject, Malformed, want

MAX_DOCUMENT = 4 * 1024 * 1024
# Stdin must come to its end within this time, seconds; a verb never waits for a person.
READ_S = 20.0
# From `start` to a worker that answers, seconds. A cold disk and a slow machine are in it.
START_S = 60.0
# For everything to be gone after `stop`, seconds; the units' own kill comes before.
STOP_S = 20.0
CONTROL_S = 10.0
# For the broker to end in order when it is told to: it kills what runs (at most twice its own patience) and writes that.
STOP_ASK_S = 4.0
# How long an answer may still come after the asking side has closed, seconds.
HALF_CLOSED_S = 2.0
WORD = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class Gatekeeper:
    """One verb of one connection. ``home`` is the installation; the streams are the SSH channel's."""

    def __init__(self, home: Home, stdin: BinaryIO, stdout: BinaryIO) -> None:
        self._home = home
        self._stdin = stdin
        self._stdout = stdout

    def serve(self, command: str) -> int:
        """Carry out ``command`` (``SSH_ORIGINAL_COMMAND``); returns the exit status. Never raises for bad input."""
        verb = command.split(" ", 1)[0][:32]
        try:
            handler, argument = self._choose(command)
            answer = handler(argument)
            if answer is not None:
                self._answer(answer)
            return 0
        except HostError as error:
            return self._fail(verb, error)
        except (Malformed, RecursionError) as error:
            return self._fail(verb, BadRequest("the document of %r is not right: %s" % (verb, error)))
        except OSError as error:
            return self._fail(verb, MachineFailed("%s failed: %s" % (verb, error)))
        except Exception as error:  # noqa: BLE001 - a defect: whoever asked still gets one document, the log the rest
            import traceback

            self._home.log({"verb": verb, "defect": traceback.format_exc()[-4000:]})
            return self._fail(verb, MachineFailed("%s failed: %r" % (verb, error), next_step="see gatekeeper.log"))

    def _answer(self, document: JsonObject) -> None:
        self._stdout.write(json.dumps(document, separators=(",", ":")).encode("ascii") + b"\n")
        self._stdout.flush()

    def _fail(self, verb: str, error: HostError) -> int:
        self._home.log({"verb": verb, "peer": os.environ.get("SSH_CONNECTION", "")[:80], "error": error.to_json()})
        # Whoever asked may have hung up: then nobody reads it, and the log has it.
        with contextlib.suppress(OSError):
            self._answer({"error": error.to_json()})
        return error.exit_code

    def _choose(self, command: str) -> Tuple[Callable[[str], Optional[JsonObject]], str]:
        words = command.split(" ")
        plain: Dict[str, Callable[[str], Optional[JsonObject]]] = {
            "hello": self.hello,
            "start": self.start,
            "renew": self.renew,
            "stop": self.stop,
            "status": self.status,
            "journal": self.journal,
            "apply": self.apply,
        }
        with_argument: Dict[str, Callable[[str], Optional[JsonObject]]] = {"observe": self.observe, "dial": self.dial}
        if len(words) == 1 and words[0] in plain:
            return plain[words[0]], ""
        if len(words) == 2 and words[0] in with_argument and WORD.fullmatch(words[1]):
            return with_argument[words[0]], words[1]
        raise BadRequest(
            "the command is not one of the gatekeeper's verbs",
            expected="one of: %s, observe NAME, dial a2a, dial inference" % ", ".join(sorted(plain)),
            got=repr(command)[:120],
            next_step="this key opens no shell; use chargehand on the gateway",
        )

    def _document(self) -> JsonObject:
        """The JSON object on stdin; empty means ``{}``. Raises ``BadRequest`` for anything else."""
        deadline = time.monotonic() + READ_S
        fd = self._stdin.fileno()
        data = bytearray()
        while True:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise BadRequest("stdin did not end within %g s" % READ_S)
            block = os.read(fd, 65536)
            if not block:
                break
            data += block
            if len(data) > MAX_DOCUMENT:
                raise BadRequest("the document is too large", expected="at most %d bytes" % MAX_DOCUMENT)
        if not data.strip():
            return {}
        try:
            return read_object(data)
        except Malformed as error:
            raise BadRequest("the document on stdin: %s" % error, got=repr(bytes(data[:60]))) from error

    # -- verbs that only look

    def hello(self, _: str) -> JsonObject:
        self._document()
        config = self._home.config()
        from edge_agent.host.preflight import capabilities

        state = self._home.state()
        run = current_run(state)
        live = self._broker_status(config) if run else None
        return {
            "protocol": PROTOCOL,
            "version": VERSION,
            "machine": config.machine,
            "python": "%d.%d.%d" % sys.version_info[:3],
            "kernel": os.uname().release,
            "os": _os_release(),
            "hostname": socket.gethostname(),
            "boot_id": clock.boot_id(),
            "boottime": clock.boottime(),
            "wall": clock.wall(),
            "units": config.units,
            "image": config.image,
            "generation": state["generation"],
            "run": live,
            "capabilities": capabilities(config),
        }

    def status(self, _: str) -> JsonObject:
        self._document()
        config = self._home.config()
        units = choose(self._home, config)
        live = self._broker_status(config)
        processes = units.processes()
        run = current_run(self._home.state())
        return {
            "unit": units.state(),
            "processes": [process.to_json() for process in processes],
            "run": live or ({"run_id": run["run_id"], "generation": run["generation"]} if run else None),
            "lease_left_s": live["lease_left_s"] if live else None,
            "boot_id": clock.boot_id(),
            "boottime": clock.boottime(),
        }

    def journal(self, _: str) -> JsonObject:
        document = self._document()
        run_id = check_run_id(want(document, "run_id", str))
        offset = want(document, "offset", int, 0)
        if offset < 0:
            raise BadRequest("field 'offset' counts lines from the first", expected="0 or more", got=repr(offset))
        lines = self._journal_lines(run_id)
        page: List[str] = []
        size = 0
        for line in lines[offset:]:
            size += len(line)
            if page and size > MAX_DOCUMENT // 2:
                break
            page.append(line)
        head = ""
        try:
            head = check(lines, run_id)[1]
        except JournalFailed as error:
            # A broken chain is evidence, not a failure of the verb: the centre checks the lines itself.
            head = "broken: %s" % error
        told = offset + len(page)
        return {"lines": page, "next": told, "complete": told >= len(lines), "over": is_over(lines), "head": head}

    def _journal_lines(self, run_id: str) -> List[str]:
        for directory in (self._home.journals, self._home.observations):
            with contextlib.suppress(FileNotFoundError):
                return read_lines(os.path.join(directory, run_id + ".jsonl"))
        raise BadRequest(
            "there is no journal of run %s on this machine" % run_id,
            next_step="the run never started here, or its journal was pruned",
        )

    def observe(self, name: str) -> JsonObject:
        from edge_agent.host.observe import observe_once

        return observe_once(self._home, self._home.config(), name, self._document())

    def apply(self, _: str) -> JsonObject:
        from edge_agent.host.apply import apply_files

        document = self._document()
        with self._home.lock():
            config = self._home.config()
            if choose(self._home, config).processes():
                raise Busy("a run is on this machine; the installation is not changed under it")
            return apply_files(self._home, document)

    # -- verbs that act

    def start(self, _: str) -> JsonObject:
        grant = Grant.from_json(self._document())
        config = self._home.config()
        began = time.monotonic()
        with self._home.lock():
            state = self._home.state()
            units = choose(self._home, config)
            if units.state() != INACTIVE or units.processes():
                run = current_run(state)
                raise Busy(
                    "a run is on this machine already",
                    got="run %s" % run["run_id"] if run else "processes without a run record",
                    next_step="wait for it, or chargehand runs cancel it",
                )
            now = clock.boottime()
            admit(grant, config, state, now, clock.boot_id())
            run_dir = self._home.run_dir(config)
            _clear(run_dir)
            journal_path = self._home.journal_path(grant.run_id)
            if os.path.exists(journal_path):
                raise JournalFailed("a journal of run %s exists already" % grant.run_id)
            prune(self._home.journals)
            # The fence moves before anything starts: whatever happens now, this start cannot be replayed.
            state.update(generation=grant.generation, run=run_record(grant, now))
            self._home.save_state(state)
            try:
                task = {"run_id": grant.run_id, "machine": grant.machine, "limits": grant.limits, "model": grant.model}
                write_atomic(os.path.join(run_dir, "worker", "task.json"), json.dumps(task).encode("ascii"), 0o644)
                lease = {"grant": grant.to_json(), "granted_at": now}
                write_atomic(os.path.join(run_dir, "lease.json"), json.dumps(lease).encode("ascii"))
                units.start(START_S)
                started = time.monotonic()
                answer = self._control(config, {"verb": "ready"}, START_S)
            except (HostError, OSError) as error:
                if isinstance(error, HostError):
                    error.got = "\n".join(filter(None, (error.got, units.why())))
                self._force_down(units, run_dir)
                state["run"] = None
                self._home.save_state(state)
                if isinstance(error, NoLease):
                    raise MachineFailed(
                        "the edge agent ended while it was started",
                        got=error.got,
                        next_step="what broker and worker said last stands beside; the units' journal has the rest",
                    ) from error
                raise
        return {
            "run_id": grant.run_id,
            "ready": True,
            "lease_digest": grant.digest,
            "worker": answer.get("worker"),
            "seconds": {"units": round(started - began, 4), "ready": round(time.monotonic() - began, 4)},
        }

    def renew(self, _: str) -> JsonObject:
        document = self._document()
        renewal = {
            "verb": "renew",
            "run_id": check_run_id(want(document, "run_id", str)),
            "generation": want(document, "generation", int),
            "seq": want(document, "seq", int),
            "lease_s": seconds(document, "lease_s"),
        }
        return self._control(self._home.config(), renewal, CONTROL_S)

    def stop(self, _: str) -> JsonObject:
        document = self._document()
        run_id = check_run_id(want(document, "run_id", str))
        generation = want(document, "generation", int)
        reason = want(document, "reason", str, "asked to stop")
        config = self._home.config()
        with self._home.lock():
            state = self._home.state()
            units = choose(self._home, config)
            run = current_run(state)
            if run is not None and run["run_id"] != run_id:
                if units.processes():
                    raise NoLease("another run is on this machine", expected=str(run["run_id"]), got=run_id)
            elif run is not None and int(run["generation"]) != generation:
                raise NoLease("the run has another generation", expected=str(run["generation"]), got=str(generation))
            else:
                self._stop_gently(config, run_id, generation, reason)
                self._force_down(units, self._home.run_dir(config))
            left = units.processes()
            unit = units.state()
            if left or unit != INACTIVE:
                raise MachineFailed(
                    "the edge agent is still there after %g s" % STOP_S,
                    expected="inactive, no process",
                    got="%s, %s" % (unit, ", ".join("%d %s" % (p.pid, p.argv[:60]) for p in left)),
                    next_step="the gateway tries again; the units' own hard stop comes after that",
                )
            if run is not None and run["run_id"] == run_id:
                state["run"] = None
                self._home.save_state(state)
            # Still under the lock: two stops at once must not both write the last line.
            lines, head = self._close_journal(run_id, reason)
        return {"unit": unit, "processes": len(left), "journal_lines": lines, "journal_head": head}

    def dial(self, name: str) -> None:
        if name not in ("a2a", "inference"):
            raise BadRequest("there is no socket of that name to dial", expected="a2a or inference", got=name)
        config = self._home.config()
        try:
            stream = connect_below(os.path.join(self._home.run_dir(config), "worker"), name + ".sock")
        except OSError as error:
            raise NoLease(
                "the worker does not listen: %s" % error.strerror,
                next_step="a run must be on; see chargehand runs list",
            ) from error
        with stream:
            self._answer({"ok": True})
            stream.setblocking(True)
            # From here on the bytes are the two ends' own: nothing of this program's may get between them.
            with contextlib.suppress(OSError):
                splice(self._stdin.fileno(), self._stdout.fileno(), stream)

    # -- parts of the verbs

    def _control(self, config: HostConfig, document: Mapping[str, Any], timeout_s: float) -> JsonObject:
        """One question to the broker. Raises what it answers, ``NoLease`` when there is none."""
        path = os.path.join(self._home.run_dir(config), "broker.sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.settimeout(timeout_s)
            try:
                stream.connect(path)
                stream.sendall(json.dumps(document).encode("ascii") + b"\n")
                line = b""
                while not line.endswith(b"\n"):
                    block = stream.recv(65536)
                    if not block:
                        raise NoLease("the broker ended before it answered")
                    line += block
            except socket.timeout:
                raise MachineFailed("the broker did not answer within %g s" % timeout_s) from None
            except (FileNotFoundError, ConnectionError) as error:
                raise NoLease("no run is on this machine", got=str(error)) from None
        answer = read_object(line)
        if "error" in answer:
            raise _error_of(answer)
        return answer

    def _broker_status(self, config: HostConfig) -> Optional[JsonObject]:
        try:
            return self._control(config, {"verb": "status"}, CONTROL_S)
        except NoLease:
            return None

    def _stop_gently(self, config: HostConfig, run_id: str, generation: int, reason: str) -> None:
        try:
            self._control(
                config, {"verb": "stop", "run_id": run_id, "generation": generation, "reason": reason}, STOP_ASK_S
            )
        except HostError:
            return  # it is gone or hung: the unit manager ends it

    def _force_down(self, units: UnitManager, run_dir: str) -> None:
        units.stop(STOP_S)
        _clear(run_dir)

    def _close_journal(self, run_id: str, reason: str) -> Tuple[int, str]:
        """Lines and head of the run's journal; if the broker died before it could say ``stopped``, say it here.

        Nothing runs any more, so this process is the only writer.
        """
        path = os.path.join(self._home.journals, run_id + ".jsonl")
        try:
            lines = read_lines(path)
        except FileNotFoundError:
            return 0, ""
        if lines and not is_over(lines):
            try:
                journal = Journal(path, run_id, create=False)
                journal.append("stopped", {"reason": "found dead at stop: %s" % reason[:400], "calls": None})
                journal.close()
                lines = read_lines(path)
            except JournalFailed:
                pass  # a damaged chain stays as it is: the centre reports it
        try:
            return check(lines, run_id)
        except JournalFailed as error:
            return len(lines), "broken: %s" % error


def _clear(run_dir: str) -> None:
    """Remove what a past run left in the run directory: sockets, the lease, and whatever its worker made."""
    for name in ("broker.sock", "lease.json", "pause-was-there"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(run_dir, name))
    empty(os.path.join(run_dir, "worker"))


def _error_of(answer: JsonObject) -> HostError:
    """What the broker refused with, as it would have been raised here."""
    said = answer["error"]
    error = HostError(said["message"], expected=said["expected"], got=said["got"], next_step=said["next"])
    error.code, error.exit_code = said["code"], answer.get("exit_code", HostError.exit_code)
    return error


def _os_release() -> JsonObject:
    try:
        with open("/etc/os-release", encoding="utf-8", errors="replace") as file:
            fields = dict(line.strip().split("=", 1) for line in file if "=" in line)
    except OSError:
        return {}
    return {name.lower(): fields[name].strip("\"'") for name in ("ID", "VERSION_ID", "PRETTY_NAME") if name in fields}


def splice(source: int, sink: int, stream: socket.socket) -> None:
    """Carry bytes both ways until ``stream`` ends: ``source`` → ``stream`` → ``sink``.

    The end of ``source`` is passed on as a half close; a worker that then says nothing more for ``HALF_CLOSED_S`` is not
    waited for: it may hang, and nobody listens any more. Each way has a thread of its own, so that an end that does not
    read holds up only its own way.
    """

    def upward() -> None:
        with contextlib.suppress(OSError):
            while True:
                data = os.read(source, 65536)
                if not data:
                    break
                stream.sendall(data)
            stream.shutdown(socket.SHUT_WR)
            time.sleep(HALF_CLOSED_S)
            stream.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=upward, daemon=True).start()
    while True:
        data = stream.recv(65536)
        if not data:
            return
        view = memoryview(data)
        while view:
            view = view[os.write(sink, view) :]


def main(home: Home) -> int:
    """The forced command: one verb from ``SSH_ORIGINAL_COMMAND``, one answer."""
    command = os.environ.get("SSH_ORIGINAL_COMMAND", "")
    status = Gatekeeper(home, sys.stdin.buffer, sys.stdout.buffer).serve(command)
    zipapp = own_zipapp()
    if command == "hello" and zipapp and not os.path.exists(bytecode_path(zipapp)):
        # The first thing anybody asks a new zipapp, the installer included; the verbs after it are faster for it.
        from edge_agent.host.bytecode import write_bytecode

        try:
            write_bytecode(zipapp)
        except (OSError, SyntaxError, ValueError) as error:
            home.log({"verb": "hello", "bytecode": str(error)})
    return status
