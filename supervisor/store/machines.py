"""Machines in the database.

Owns: adding, reading, changing and removing machines, the pinned host key, and the fencing counter of each.
Deliberately does not know: how a machine is reached; what a field may look like is ``supervisor.machines``'s.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, select, update
from sqlalchemy.dialects import postgresql, sqlite

from supervisor import machines as rules
from supervisor.errors import BadInput, Conflict, NotFound
from supervisor.machines import Machine
from supervisor.store.engine import is_sqlite, reading, writing
from supervisor.store.schema import machines

# What an operator may change by `change`; the host key has its own door, because accepting one is an act of its own.
CHANGEABLE = frozenset({"address", "port", "user", "labels", "role", "expected_state", "transport", "notes", "enabled"})
_STORED = tuple(field.name for field in dataclasses.fields(Machine))


class Machines:
    """The machines of one database. Every method is one transaction and may be called from any thread."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def add(self, machine: Machine) -> Machine:
        """Store a new machine; a removed one of the same id comes back with its generation, never with its host key.

        Returns it as stored. Raises ``BadInput`` for a field that cannot be, ``Conflict`` if the id is taken.
        """
        now = self._clock()
        values = _checked({name: getattr(machine, name) for name in CHANGEABLE}, machine.transport)
        values |= {
            "id": rules.machine_id(machine.id), "version": 1, "created_at": now, "updated_at": now, "removed_at": None,
            "last_seen_at": None, "last_boot_id": None, **_key_columns(machine.host_key, machine.host_key_accepted_by, now),
        }  # fmt: skip
        with writing(self._engine) as connection:
            insert = sqlite.insert if is_sqlite(self._engine) else postgresql.insert
            # The generation is not in the update: a machine keeps refusing what it refused before it was removed.
            statement = (
                insert(machines)
                .values(**values, generation=0)
                .on_conflict_do_update(
                    index_elements=[machines.c.id], set_=values, where=machines.c.removed_at.is_not(None)
                )
                .returning(machines)
            )
            row = connection.execute(statement).mappings().one_or_none()
            if row is None:
                raise Conflict(
                    f"there is a machine {machine.id} already",
                    got=machine.id,
                    next_step=f"choose another id, or change it: `chargehand machine show {machine.id}`",
                )
            return _machine(row)

    def get(self, machine_id: str, *, removed: bool = False) -> Machine:
        """The machine; raises ``NotFound`` (also for a removed one, unless ``removed``) that names the nearest ids."""
        with reading(self._engine) as connection:
            return self._get(connection, machine_id, removed=removed)

    def list(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        removed: bool = False,
        after: str = "",
        limit: int | None = None,
    ) -> list[Machine]:
        """Machines sorted by id, those with every given label, beginning behind the id ``after``."""
        query = select(machines).where(machines.c.id > after).order_by(machines.c.id)
        if not removed:
            query = query.where(machines.c.removed_at.is_(None))
        with reading(self._engine) as connection:
            found = (_machine(row) for row in connection.execute(query).mappings())
            chosen = [machine for machine in found if rules.matches(machine.labels, labels or {})]
        return chosen if limit is None else chosen[:limit]

    def change(self, machine_id: str, version: int, **changes: Any) -> Machine:
        """Change fields of ``CHANGEABLE`` if the machine is still at ``version``.

        Raises ``BadInput``, ``NotFound``, or ``Conflict`` if somebody changed it in between.
        """
        unknown = sorted(set(changes) - CHANGEABLE)
        if unknown:
            raise BadInput(
                "this cannot be changed on a machine", expected=" | ".join(sorted(CHANGEABLE)), got=", ".join(unknown)
            )
        with writing(self._engine) as connection:
            before = self._get(connection, machine_id, lock=True)
            if before.version != version:
                raise Conflict(
                    f"machine {machine_id} was changed in between",
                    expected=f"version {version}",
                    got=f"version {before.version}",
                    next_step="read it again and repeat the change",
                )
            return self._set(connection, before, _checked(changes, changes.get("transport", before.transport)))

    def accept_host_key(self, machine_id: str, host_key: str, by: str) -> Machine:
        """Pin ``host_key`` because the person ``by`` said so. Pinning the pinned key again changes nothing.

        Raises ``BadInput`` for a damaged key, ``NotFound``.
        """
        columns = _key_columns(host_key, by, self._clock())
        with writing(self._engine) as connection:
            before = self._get(connection, machine_id, lock=True)
            if before.host_key == columns["host_key"]:
                return before
            return self._set(connection, before, columns)

    def remove(self, machine_id: str) -> Machine:
        """Take the machine out of service; its runs and its audit chain stay. Raises ``NotFound``."""
        with writing(self._engine) as connection:
            before = self._get(connection, machine_id, lock=True)
            return self._set(
                connection, before, {"removed_at": self._clock(), "enabled": False, **_key_columns(None, None, 0)}
            )

    def next_generation(self, machine_id: str) -> int:
        """The next fencing token, higher than every one given out before, by any gateway. Raises ``NotFound``."""
        statement = (
            update(machines)
            .where(machines.c.id == machine_id, machines.c.removed_at.is_(None))
            .values(generation=machines.c.generation + 1)
            .returning(machines.c.generation)
        )
        with writing(self._engine) as connection:
            generation = connection.execute(statement).scalar()
            if generation is None:
                self._get(connection, machine_id)
                raise NotFound(f"there is no machine {machine_id}", got=machine_id)
            return int(generation)

    def raise_generation(self, machine_id: str, seen: int) -> int:
        """Lift the counter to at least ``seen``, what the machine itself says it saw (a restored backup is behind).

        Returns the counter afterwards. Raises ``NotFound``.
        """
        with writing(self._engine) as connection:
            before = self._get(connection, machine_id, lock=True)
            if seen > before.generation:
                connection.execute(update(machines).where(machines.c.id == machine_id).values(generation=seen))
            return max(seen, before.generation)

    def seen(self, machine_id: str, boot_id: str | None = None) -> None:
        """Note that the machine answered just now, and in which boot. Unknown machines are ignored: this is a note."""
        values: dict[str, Any] = {"last_seen_at": self._clock()}
        if boot_id is not None:
            values["last_boot_id"] = boot_id
        with writing(self._engine) as connection:
            connection.execute(update(machines).where(machines.c.id == machine_id).values(**values))

    def _get(self, connection: Connection, machine_id: str, *, removed: bool = False, lock: bool = False) -> Machine:
        query = select(machines).where(machines.c.id == machine_id)
        row = connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()
        if row is None or (row["removed_at"] is not None and not removed):
            names = connection.execute(
                select(machines.c.id).where(machines.c.removed_at.is_(None)).order_by(machines.c.id).limit(10)
            ).scalars()
            known = ", ".join(names)
            raise NotFound(
                f"there is no machine {machine_id!r}",
                expected=f"one of {known}" if known else "a machine that was added",
                got=machine_id,
                next_step="`chargehand machine list` shows all" if known else "add one with `chargehand machine add`",
            )
        return _machine(row)

    def _set(self, connection: Connection, before: Machine, values: Mapping[str, Any]) -> Machine:
        statement = (
            update(machines)
            .where(machines.c.id == before.id)
            .values(**values, version=before.version + 1, updated_at=self._clock())
            .returning(machines)
        )
        return _machine(connection.execute(statement).mappings().one())


def _machine(row: RowMapping) -> Machine:
    return Machine(**{name: row[name] for name in _STORED})


def _checked(values: Mapping[str, Any], transport: str) -> dict[str, Any]:
    checked = dict(values)
    if transport not in rules.TRANSPORTS:
        raise BadInput("this is no transport", expected=" | ".join(rules.TRANSPORTS), got=transport)
    if "address" in checked:
        checked["address"] = rules.address(checked["address"])
    if "port" in checked:
        # An embedded machine gets its port when its server starts.
        embedded = transport == rules.EMBEDDED and checked["port"] == 0
        checked["port"] = 0 if embedded else rules.port(checked["port"])
    if "user" in checked:
        checked["user"] = rules.user(checked["user"])
    if "labels" in checked:
        checked["labels"] = rules.labels(checked["labels"])
    if "role" in checked:
        checked["role"] = rules.role(checked["role"])
    return checked


def _key_columns(host_key: str | None, by: str | None, now: float) -> dict[str, Any]:
    if host_key is None:
        return dict.fromkeys(("host_key", "host_key_fingerprint", "host_key_accepted_at", "host_key_accepted_by"))
    if not by:
        raise BadInput(
            "a host key is accepted by somebody", expected="who accepts it", got=by, next_step="name the person"
        )
    key = rules.host_key(host_key)
    return {
        "host_key": key.text,
        "host_key_fingerprint": key.fingerprint,
        "host_key_accepted_at": now,
        "host_key_accepted_by": by,
    }
