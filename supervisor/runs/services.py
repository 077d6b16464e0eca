"""What the stages of a run need, opened once and handed in.

Owns: the open store, ledger, spool, SSH connections and embedded machines of one gateway, and closing them.
Deliberately does not know: the stages, DBOS, the command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from otel.redaction import Redactor
from otel.spool import Spool, SpoolLimits
from supervisor.activation.embedded import EmbeddedMachine
from supervisor.activation.gatekeeper import Gatekeeper
from supervisor.activation.ssh import Connections, gateway_key, public_key_line
from supervisor.audit import kinds
from supervisor.audit.checkpoint import load_signer, make_checkpoint
from supervisor.audit.journal import compare, verify_journal
from supervisor.audit.ledger import Entry, Ledger, open_ledger
from supervisor.errors import BadInput, BadSettings, MachineUnreachable
from supervisor.machines import EMBEDDED, Machine
from supervisor.policy.loader import BadPolicy, compile_policy, default_policy, load
from supervisor.runbooks import BadRunbook, load_all
from supervisor.runs.trace import spans_of
from supervisor.settings.model import Settings
from supervisor.store.events import RunEvent
from supervisor.store.runs import Run
from supervisor.store.store import Store, open_store
from tools.runbooks import Runbook
from tools.values import Event, JsonObject, digest


@dataclasses.dataclass(frozen=True)
class SealedJournal:
    """What was made of a run's journal: the body of its audit record, its head, and the gaps found."""

    record: JsonObject
    head: str | None
    gaps: list[JsonObject]


class Services:
    """Everything of one gateway that has to be opened and closed. Use ``open_services``."""

    def __init__(
        self, settings: Settings, store: Store, ledger: Ledger, spool: Spool, runbooks: Mapping[str, Runbook]
    ) -> None:
        self.settings = settings
        self.store = store
        self.ledger = ledger
        self.spool = spool
        self.runbooks = runbooks
        self.environment: Mapping[str, str] = os.environ
        limits = settings.limits
        self._key = gateway_key(settings.data_dir, settings.ssh.key_file)
        self.connections = Connections(self._key, limits.connect_s, limits.keepalive_s, limits.connections)
        self.embedded: dict[str, EmbeddedMachine] = {}
        self._policies: dict[tuple[tuple[str, str], ...], tuple[JsonObject, str]] = {}

    @property
    def public_key(self) -> str:
        """The gateway's public key as it stands in ``authorized_keys`` of machines."""
        return public_key_line(self._key)

    # -- machines

    def embedded_directory(self, machine_id: str) -> Path:
        return self.settings.data_dir / "machines" / machine_id

    async def start_embedded(self, machine_id: str) -> EmbeddedMachine:
        """Serve the embedded machine ``machine_id`` (idempotent); it is closed with these services."""
        if machine_id not in self.embedded:
            machine = EmbeddedMachine(machine_id, self.embedded_directory(machine_id), self.public_key)
            await machine.start()
            self.embedded[machine_id] = machine
        return self.embedded[machine_id]

    async def door(self, machine_id: str) -> tuple[Machine, Gatekeeper]:
        """The machine and its gatekeeper. Raises ``NotFound``; connecting happens at the first verb."""
        machine = await asyncio.to_thread(self.store.machines.get, machine_id)
        return machine, self.gatekeeper(machine)

    def gatekeeper(self, machine: Machine) -> Gatekeeper:
        return Gatekeeper(machine, lambda: self._endpoint(machine), self.connections, self.settings.limits.verb_s)

    def _endpoint(self, machine: Machine) -> tuple[str, int]:
        if machine.transport != EMBEDDED:
            return machine.address, machine.port
        serving = self.embedded.get(machine.id)
        if serving is None:
            raise MachineUnreachable(
                f"the embedded machine {machine.id} is served by a gateway, and this process is none",
                next_step="chargehand up",
            )
        return serving.endpoint

    # -- policy

    def policy_for(self, machine: Machine) -> tuple[JsonObject, str]:
        """The compiled policy in force for ``machine`` and its digest. Raises ``BadInput``: a policy file is not right."""
        labels = tuple(sorted(machine.labels.items()))
        found = self._policies.get(labels)
        if found is None:
            policy = self._compile(dict(machine.labels))
            found = self._policies[labels] = policy, digest(policy)
        return found

    def _compile(self, labels: Mapping[str, str]) -> JsonObject:
        if not self.settings.policies:
            return default_policy()
        try:
            return compile_policy([load(path.expanduser()) for path in self.settings.policies], labels)
        except BadPolicy as error:
            raise BadInput(
                "a policy file is not right",
                tried=error.where,
                got=error.problem,
                next_step="chargehand policy check FILE",
            ) from error
        except OSError as error:
            raise BadInput(
                f"a policy file cannot be read: {error.strerror}",
                tried=str(error.filename),
                next_step="see policies in chargehand.toml",
            ) from error

    # -- audit

    async def record(
        self,
        machine: str | None,
        kind: str,
        body: Mapping[str, Any],
        *,
        run_id: str | None = None,
        key: str | None = None,
        actor: str = "gateway",
    ) -> None:
        """Append one audit record; on disk when this returns."""
        entry = Entry(kind, body, machine, run_id, actor, key)
        await self.ledger.append_async([entry])

    async def record_all(self, machine: str, records: Iterable[tuple[str, JsonObject, str]], *, run_id: str) -> None:
        """Append several records (kind, body, key) of a run at once."""
        entries = [Entry(kind, body, machine, run_id, f"agent:{machine}", key) for kind, body, key in records]
        await self.ledger.append_async(entries)

    def check_journal(self, run: Run, lines: Sequence[str], events: Sequence[Event], missing: str) -> SealedJournal:
        """Verify a collected journal, hold it against the stream, and keep it. ``missing``: why there is none."""
        known = self.ledger.records(run_id=run.id, kind=kinds.LEASE_GRANTED)
        started = bool(known)
        if missing or not lines:
            gaps = []
            if started and (events or not missing):
                gaps = [gap.to_json() for gap in compare([], events, complete=False)]
            record = {"lines": 0, "head": None, "verified": False, "missing": missing or "the run has no journal"}
            return SealedJournal(record, None, gaps)
        report = verify_journal(lines, run.id)
        gaps = [gap.to_json() for gap in compare(report.entries, events)]
        gaps += [{"kind": "journal-broken", "call_id": None, **broken.to_json()} for broken in report.breaks]
        self.store.journals.save(run.id, lines, report.head, complete=True)
        record = {
            "lines": report.lines,
            "head": report.head,
            "lease_digest": report.lease_digest,
            "verified": report.verified,
            "gaps": len(gaps),
        }
        return SealedJournal(record, report.head, gaps)

    def checkpoint(self) -> None:
        """Sign all chain heads, if there is anything new."""
        make_checkpoint(self.ledger, load_signer(self.settings.data_dir))

    # -- traces

    def put_trace(self, run: Run, events: Sequence[RunEvent]) -> int:
        """Put the spans of a run that has ended into the spool; returns how many were new."""
        traces = self.settings.traces
        return self.spool.put(spans_of(run, events, traces.environment, traces.content)).accepted

    async def aclose(self) -> None:
        """Close everything, bounded, embedded machines last: runs may be stopping through them."""
        await self.connections.aclose()
        for machine in self.embedded.values():
            await machine.aclose()
        self.embedded.clear()
        self.spool.close()
        self.ledger.close()
        self.store.close()


def open_services(settings: Settings) -> Services:
    """Open store, ledger and spool in ``settings.data_dir``. Raises ``BadSettings``, ``StoreFailed``, ``BadInput``."""
    settings.data_dir.mkdir(parents=True, mode=0o700, exist_ok=True)
    password = None
    if settings.database_password is not None:
        password = settings.database_password.read().reveal()
    with contextlib.ExitStack() as undo:
        store = open_store(settings.store_url, password=password)
        undo.callback(store.close)
        ledger = open_ledger(settings.store_url, password=password)
        undo.callback(ledger.close)
        redactor = Redactor(_secrets(settings, os.environ))
        limits = SpoolLimits(pending_bytes=settings.traces.spool_bytes)
        spool = Spool(settings.data_dir / "spool.db", redactor, limits)
        undo.callback(spool.close)
        runbooks = _runbooks(settings.data_dir / "runbooks")
        services = Services(settings, store, ledger, spool, runbooks)
        undo.pop_all()
        return services


def _runbooks(own: Path) -> Mapping[str, Runbook]:
    """The shipped runbooks and, if there is such a directory, the operator's own."""
    try:
        return load_all([own] if own.is_dir() else [])
    except BadRunbook as error:
        raise BadInput(
            "a runbook is not right", tried=str(own), got=str(error), next_step="chargehand runbook check FILE"
        ) from error


# Variables whose values are keys wherever they come up: they are masked in every trace.
_KEY_VARIABLES = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY")


def _secrets(settings: Settings, environment: Mapping[str, str]) -> list[str]:
    found = [environment[name] for name in _KEY_VARIABLES if environment.get(name)]
    for model in (settings.model, *settings.models.values()):
        if model.key is not None:
            # A key that is not there fails the run that needs it, not the start of the gateway.
            with contextlib.suppress(BadSettings):
                found.append(model.key.read(environment).reveal())
    return [value for value in found if len(value) >= 8]
