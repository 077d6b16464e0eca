"""The gatekeeper's verbs as methods, for one machine.

Owns: the documents that go with each verb, and how a machine's errors become the centre's (``supervisor.errors``).
Deliberately does not know: SSH (``ssh``), runs and their states.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from supervisor.activation.ssh import Connections, dialled, run_verb
from supervisor.errors import Busy, ChargehandError, LeaseLost, MachineFailed, ProtocolMismatch, Refused
from supervisor.machines import Machine

PROTOCOL = 1
JsonObject = dict[str, Any]

_BY_CODE: dict[str, type[ChargehandError]] = {
    "busy": Busy,
    "stale": LeaseLost,
    "no_lease": LeaseLost,
    "refused": Refused,
    "bad_request": ProtocolMismatch,
}


class Gatekeeper:
    """The door of one machine.

    Args:
        machine: as the store knows it.
        endpoint: gives (address, port) to connect to; the embedded machine's changes with every start of the gateway.
        connections: the pool.
        verb_s: seconds a verb may take, other than ``start`` and ``stop``.
    """

    def __init__(
        self, machine: Machine, endpoint: Callable[[], tuple[str, int]], connections: Connections, verb_s: float
    ) -> None:
        self.machine = machine
        self._endpoint = endpoint
        self._connections = connections
        self._verb_s = verb_s

    async def ask(self, verb: str, document: JsonObject, timeout_s: float | None = None) -> JsonObject:
        """Ask one verb; returns its answer. Raises the centre's error for what the machine says or fails to say."""
        address, port = self._endpoint()
        connection = await self._connections.connection(self.machine, address, port)
        answer = await run_verb(connection, verb, json.dumps(document).encode("utf-8"), timeout_s or self._verb_s)
        try:
            said = dict(json.loads(answer.stdout))
        except (ValueError, TypeError):
            raise ProtocolMismatch(
                f"machine {self.machine.id} answered {verb!r} with something that is no answer of a gatekeeper",
                expected="one JSON object",
                got=(answer.stdout or answer.stderr)[:200].decode("utf-8", "backslashreplace"),
                next_step="is the edge installed? chargehand edge install",
            ) from None
        if "error" not in said:
            return said
        raise self._error(verb, said["error"])

    def _error(self, verb: str, said: JsonObject) -> ChargehandError:
        code = str(said.get("code"))
        kind = _BY_CODE.get(code, MachineFailed)
        return kind(
            f"{self.machine.id}: {said.get('message', 'failed without a word')}",
            tried=verb,
            expected=str(said.get("expected", "")),
            got=said.get("got") or None,
            next_step=str(said.get("next", "")),
            # Of the refusals the caller must tell "too late" from "not yours".
            code=code.replace("_", "-") if kind is LeaseLost else None,
        )

    async def hello(self) -> JsonObject:
        return await self.ask("hello", {})

    async def status(self) -> JsonObject:
        return await self.ask("status", {})

    async def start(self, document: JsonObject, timeout_s: float) -> JsonObject:
        return await self.ask("start", dict(document, protocol=PROTOCOL), timeout_s)

    async def renew(self, run_id: str, generation: int, seq: int, lease_s: float) -> JsonObject:
        return await self.ask("renew", {"run_id": run_id, "generation": generation, "seq": seq, "lease_s": lease_s})

    async def stop(self, run_id: str, generation: int, reason: str, timeout_s: float) -> JsonObject:
        return await self.ask("stop", {"run_id": run_id, "generation": generation, "reason": reason}, timeout_s)

    async def journal(self, run_id: str) -> list[str]:
        """All lines of a run's journal."""
        lines: list[str] = []
        while True:
            page = await self.ask("journal", {"run_id": run_id, "offset": len(lines)})
            lines.extend(page["lines"])
            if page["complete"] or not page["lines"]:
                return lines

    async def observe(self, name: str, document: JsonObject) -> JsonObject:
        return await self.ask(f"observe {name}", document)

    async def apply(self, files: list[JsonObject], dry_run: bool = False) -> JsonObject:
        return await self.ask("apply", {"files": files, "dry_run": dry_run}, self._verb_s * 2)

    @contextlib.asynccontextmanager
    async def dial(self, name: str, socket_path: Path) -> AsyncIterator[None]:
        """While the context lasts, ``socket_path`` leads to the worker's socket ``name`` (``a2a``, ``inference``)."""
        address, port = self._endpoint()
        connection = await self._connections.connection(self.machine, address, port)
        async with dialled(connection, f"dial {name}", socket_path, self._verb_s):
            yield
