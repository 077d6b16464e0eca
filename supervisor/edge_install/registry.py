"""What the gateway knows of a machine before an installation, and keeps of it afterwards.

Owns: the seam between an installation and the gateway's store, key, policy and audit chain. Deliberately does not know:
how a machine is reached or changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from supervisor.audit import kinds
from supervisor.audit.ledger import Entry
from supervisor.edge_install import grants
from supervisor.errors import BadInput, NotFound
from supervisor.machines import Machine
from tools.policy import Policy

if TYPE_CHECKING:  # importing the services costs a second
    from supervisor.runs.services import Services


class Registry:
    """The gateway's side of installations. ``operator``: who acts, for the audit chain."""

    def __init__(self, services: Services, operator: str) -> None:
        self._services = services
        self._operator = operator

    @property
    def gateway_key(self) -> str:
        """The gateway's public key as it stands in ``authorized_keys``."""
        return self._services.public_key

    def known(self, machine_id: str) -> Machine | None:
        """The machine's record, ``None`` when there is none."""
        try:
            return self._services.store.machines.get(machine_id)
        except NotFound:
            return None

    def polkit_rule(self, machine: Machine, user: str) -> str | None:
        """The polkit rules file for ``user`` under the policy of ``machine``, ``None`` when it lets no unit be managed."""
        document, _ = self._services.policy_for(machine)
        return grants.polkit_rule(Policy.from_json(document), user)

    def register(self, machine: Machine) -> None:
        """Keep the record of an installed machine: a new one, or where and with which key an old one is now reached.

        What an operator wrote into an old record (labels, role, notes) stays unless the installation names something.
        """
        machines = self._services.store.machines
        before = self.known(machine.id)
        if before is None:
            # Without its key: who accepted that is said, and recorded, below.
            machines.add(dataclasses.replace(machine, host_key=None, host_key_fingerprint=None))
            self._record(kinds.MACHINE_ADDED, machine, {"address": machine.address, "port": machine.port})
        else:
            wanted: dict[str, Any] = {"address": machine.address, "port": machine.port, "user": machine.user}
            wanted |= {"labels": dict(machine.labels)} if machine.labels else {}
            wanted |= {"role": machine.role} if machine.role else {}
            changes = {name: value for name, value in wanted.items() if getattr(before, name) != value}
            if changes:
                machines.change(machine.id, before.version, **changes)
                self._record(kinds.MACHINE_CHANGED, machine, changes)
        if machine.host_key is None:
            raise BadInput("an installed machine has a host key", tried=f"register {machine.id}")
        # `add` does not bring a removed machine's key back; this is also where it is said who accepted it.
        if before is None or before.host_key != machine.host_key:
            machines.accept_host_key(machine.id, machine.host_key, self._operator)
            self._record(kinds.HOST_KEY_ACCEPTED, machine, {"fingerprint": machine.host_key_fingerprint})

    def unregister(self, machine_id: str) -> None:
        """Take the record of an uninstalled machine out of service; its runs and its audit chain stay."""
        found = self.known(machine_id)
        if found is not None:
            self._services.store.machines.remove(machine_id)
            self._record(kinds.MACHINE_REMOVED, found, {})

    def _record(self, kind: str, machine: Machine, body: Mapping[str, Any]) -> None:
        self._services.ledger.append([Entry(kind, {"by": "edge install", **body}, machine.id, actor=self._operator)])
