"""The tables, as SQLAlchemy Core describes them.

Owns: names, types, keys and indexes of every table of the centre's database.
Deliberately does not know: how rows are read, written or migrated (a test holds this description and the migrations
together).

Times ending in ``_at`` are seconds since the epoch, UTC, as a double. Audit times are integer microseconds (``at_us``):
they are hashed, and an integer has one text form. JSON stands as text in canonical form, so that what was digested
can be digested again, on every database alike.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator

from tools.values import canonical


class CanonicalJson(TypeDecorator[Any]):
    """A JSON value kept as canonical text (``tools.values.canonical``); SQL NULL is ``None``."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else canonical(value).decode("ascii")

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


class Seconds(TypeDecorator[float]):
    """A time or duration in seconds. SQLite hands back an integer for a whole number in RETURNING; this does not."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> float | None:
        return None if value is None else float(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> float | None:
        return None if value is None else float(value)


# Named constraints: a later migration can only drop what has the same name on every database.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# The same form for money.
Amount = Seconds
MACHINE_ID = String(63)
RUN_ID = String(36)
DIGEST = String(71)
HEX = String(64)
# SQLite counts rows by itself only in a column of type INTEGER.
ROW_ID = BigInteger().with_variant(Integer, "sqlite")

machines = Table(
    "machines",
    metadata,
    Column("id", MACHINE_ID, primary_key=True),
    Column("address", String(255), nullable=False),
    Column("port", Integer, nullable=False),
    Column("user", String(32), nullable=False),
    Column("labels", CanonicalJson, nullable=False),
    Column("role", String(64), nullable=False),
    Column("expected_state", CanonicalJson),
    Column("transport", String(16), nullable=False),
    Column("host_key", Text),
    Column("host_key_fingerprint", String(64)),
    Column("host_key_accepted_at", Seconds),
    Column("host_key_accepted_by", Text),
    Column("notes", Text, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("version", Integer, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("created_at", Seconds, nullable=False),
    Column("updated_at", Seconds, nullable=False),
    Column("last_seen_at", Seconds),
    Column("last_boot_id", String(64)),
    Column("removed_at", Seconds),
)

runs = Table(
    "runs",
    metadata,
    Column("id", RUN_ID, primary_key=True),
    Column("machine", MACHINE_ID, ForeignKey("machines.id"), nullable=False),
    Column("trigger", String(32), nullable=False),
    Column("trigger_detail", CanonicalJson),
    Column("requested_by", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("runbook", String(128)),
    Column("model", CanonicalJson),
    Column("state", String(32), nullable=False),
    Column("state_since", Seconds, nullable=False),
    Column("deadline", Seconds),
    Column("generation", BigInteger),
    Column("created_at", Seconds, nullable=False),
    Column("started_at", Seconds),
    Column("ended_at", Seconds),
    Column("not_after", Seconds, nullable=False),
    Column("verdict", CanonicalJson),
    Column("report", CanonicalJson),
    Column("unit_after", String(32)),
    Column("processes_after", Integer),
    Column("seconds", CanonicalJson),
    Column("tokens_in", BigInteger),
    Column("tokens_out", BigInteger),
    Column("cost_usd", Amount),
    Column("error", CanonicalJson),
    Column("journal_head", HEX),
    Column("trace_id", String(32), nullable=False),
    Column("cancel_requested_by", Text),
    Column("cancel_requested_at", Seconds),
    Index(None, "machine", "created_at"),
    Index(None, "state", "deadline"),
    Index(None, "created_at"),
)

# `seq` is the gateway's own count over all sources; `key` is the source's, so that a repeated delivery is seen as one.
run_events = Table(
    "run_events",
    metadata,
    Column("run_id", RUN_ID, ForeignKey("runs.id"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("source", String(16), nullable=False),
    Column("key", String(64)),
    Column("kind", String(32), nullable=False),
    Column("body", CanonicalJson, nullable=False),
    Column("at", Seconds, nullable=False),
    UniqueConstraint("run_id", "source", "key"),
)

# The journal of the machine as it was collected: the lines are kept byte by byte, they carry their own chain.
run_journals = Table(
    "run_journals",
    metadata,
    Column("run_id", RUN_ID, ForeignKey("runs.id"), primary_key=True),
    Column("lines", Text, nullable=False),
    Column("count", Integer, nullable=False),
    Column("head", HEX, nullable=False),
    Column("complete", Boolean, nullable=False),
    Column("collected_at", Seconds, nullable=False),
)

# The row that a writer locks: whoever holds it may append to the chain.
audit_chains = Table(
    "audit_chains",
    metadata,
    Column("chain", String(71), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("hash", HEX, nullable=False),
)

audit_records = Table(
    "audit_records",
    metadata,
    Column("chain", String(71), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("at_us", BigInteger, nullable=False),
    Column("kind", String(48), nullable=False),
    Column("actor", Text, nullable=False),
    Column("run_id", RUN_ID),
    Column("key", String(128)),
    Column("body", Text, nullable=False),
    Column("prev", HEX, nullable=False),
    Column("hash", HEX, nullable=False),
    UniqueConstraint("chain", "key"),
    Index(None, "run_id"),
    Index(None, "kind", "at_us"),
)

audit_checkpoints = Table(
    "audit_checkpoints",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("at_us", BigInteger, nullable=False),
    Column("heads", Text, nullable=False),
    Column("prev", HEX, nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("signature", Text, nullable=False),
)

approvals = Table(
    "approvals",
    metadata,
    Column("id", RUN_ID, primary_key=True),
    Column("run_id", RUN_ID, ForeignKey("runs.id"), nullable=False),
    Column("machine", MACHINE_ID, ForeignKey("machines.id"), nullable=False),
    Column("digest", DIGEST, nullable=False),
    Column("policy_digest", DIGEST, nullable=False),
    Column("request", CanonicalJson, nullable=False),
    Column("state", String(16), nullable=False),
    Column("asked_at", Seconds, nullable=False),
    Column("expires_at", Seconds, nullable=False),
    Column("answered_at", Seconds),
    Column("answered_by", Text),
    Column("answered_from", Text),
    Column("reason", Text),
    Column("delivered_at", Seconds),
    Column("executed_at", Seconds),
    Index(None, "run_id"),
    Index(None, "state", "expires_at"),
)

settings_changes = Table(
    "settings_changes",
    metadata,
    Column("id", ROW_ID, primary_key=True, autoincrement=True),
    Column("at", Seconds, nullable=False),
    Column("actor", Text, nullable=False),
    Column("key", String(255), nullable=False),
    Column("old", CanonicalJson),
    Column("new", CanonicalJson),
)
