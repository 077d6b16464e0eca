"""Bringing a database to the schema this version knows.

Owns: which revision that is, the fast way for a new database, and the refusal of a newer one.
Deliberately does not know: what the tables mean.

Importing Alembic costs more than making the whole schema, so it is only imported for a database that is behind. A new
database is made from ``supervisor.store.schema`` in one transaction; a test holds that and the migrations together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, inspect, text

from supervisor.errors import StoreFailed
from supervisor.store.engine import is_sqlite, reading, writing
from supervisor.store.schema import metadata

HEAD = "0001"
_VERSION_TABLE = "alembic_version"
# Any number that is ours: PostgreSQL's advisory lock that lets one gateway migrate while the others wait.
_ADVISORY_LOCK = 0x43484152


def upgrade(engine: Engine) -> str:
    """Bring the database to ``HEAD``; returns what was done: ``current``, ``created`` or ``migrated``.

    Two gateways that start at once do it once. Raises ``StoreFailed`` for a database that a newer version made.
    """
    with reading(engine) as connection:
        if _revision(connection) == HEAD:
            return "current"
    with writing(engine) as connection:
        if not is_sqlite(engine):
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        found = _revision(connection)
        if found == HEAD:
            return "current"
        if found is None:
            metadata.create_all(connection)
            _stamp(connection)
            return "created"
        _migrate(connection, found)
        return "migrated"


def revision(engine: Engine) -> str | None:
    """The revision the database is at, ``None`` if it holds no schema of ours."""
    with reading(engine) as connection:
        return _revision(connection)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table(_VERSION_TABLE):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _stamp(connection: Connection) -> None:
    connection.execute(
        text(
            "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, "
            "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
        )
    )
    connection.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": HEAD})


def _migrate(connection: Connection, found: str) -> None:
    from alembic import command
    from alembic.script import ScriptDirectory
    from alembic.util.exc import CommandError

    config = alembic_config()
    try:
        ScriptDirectory.from_config(config).get_revision(found)
    except CommandError:
        raise StoreFailed(
            "the database was made by a version that this one does not know",
            expected=f"a revision up to {HEAD}",
            got=found,
            next_step="install the version of chargehand that wrote it, or a newer one",
        ) from None
    config.attributes["connection"] = connection
    command.upgrade(config, HEAD)


def alembic_config() -> Any:
    """The Alembic configuration of the migrations inside this package (no file is needed)."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config
