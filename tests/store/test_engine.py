"""The engine, its transactions, and bringing a database to the newest schema."""

from __future__ import annotations

import concurrent.futures
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text

from supervisor.errors import BadSettings, StoreFailed
from supervisor.store import migrate
from supervisor.store.engine import make_engine, reading, writing
from supervisor.store.schema import metadata
from supervisor.store.store import open_store


def shape(engine: Engine) -> dict[str, object]:
    """Every table with its columns, keys and indexes, as the database itself tells them."""
    look = inspect(engine)
    return {
        name: (
            sorted((c["name"], str(c["type"]), c["nullable"]) for c in look.get_columns(name)),
            look.get_pk_constraint(name)["constrained_columns"],
            sorted((u["name"], tuple(u["column_names"])) for u in look.get_unique_constraints(name)),
            sorted((i["name"], tuple(i["column_names"]), bool(i["unique"])) for i in look.get_indexes(name)),
            sorted((tuple(f["constrained_columns"]), f["referred_table"]) for f in look.get_foreign_keys(name)),
        )
        for name in look.get_table_names()
        if name != "alembic_version"
    }


def migrated_step_by_step(url: str) -> Engine:
    engine = make_engine(url)
    config = migrate.alembic_config()
    with writing(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return engine


def test_the_fast_way_and_the_migrations_lead_to_the_same_schema(tmp_path: Path) -> None:
    slow = migrated_step_by_step(f"sqlite:///{tmp_path / 'slow.db'}")
    with open_store(f"sqlite:///{tmp_path / 'fast.db'}") as fast:
        assert shape(slow) == shape(fast.engine)
        assert migrate.revision(slow) == migrate.revision(fast.engine) == migrate.HEAD
    slow.dispose()


def test_the_migrations_lead_to_what_the_tables_are_described_as(url: str) -> None:
    engine = migrated_step_by_step(url)
    with reading(engine) as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_the_newest_migration_is_the_one_the_code_names() -> None:
    assert ScriptDirectory.from_config(migrate.alembic_config()).get_heads() == [migrate.HEAD]


def test_opening_says_what_was_done(url: str) -> None:
    engine = make_engine(url)
    assert (migrate.upgrade(engine), migrate.upgrade(engine)) == ("created", "current")
    engine.dispose()


def test_a_database_of_a_newer_version_is_refused_and_left_alone(url: str) -> None:
    with open_store(url) as store:
        with writing(store.engine) as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(StoreFailed, match="got: '9999'"):
            migrate.upgrade(store.engine)


def test_many_gateways_that_open_a_new_database_at_once_make_it_once(url: str) -> None:
    together = threading.Barrier(6)

    def start(_: int) -> str:
        together.wait(timeout=30)
        engine = make_engine(url)
        try:
            return migrate.upgrade(engine)
        finally:
            engine.dispose()

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        done = list(pool.map(start, range(6)))
    assert sorted(done) == ["created"] + ["current"] * 5


def test_opening_a_database_imports_no_alembic(tmp_path: Path) -> None:
    code = (
        "import sys; from supervisor.store.store import open_store; "
        f"open_store('sqlite:///{tmp_path / 'a.db'}').close(); print('alembic' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_the_files_are_for_their_owner_only(tmp_path: Path) -> None:
    with open_store(f"sqlite:///{tmp_path / 'data' / 'a.db'}") as store:
        store.settings_changed("anna", "k", 1, 2)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data").iterdir()}
        assert set(modes) == {"a.db", "a.db-wal", "a.db-shm"}
        assert set(modes.values()) == {0o600}
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


@pytest.mark.parametrize(("durable", "level"), [(False, 1), (True, 2)])
def test_the_ordinary_engine_is_normal_and_the_durable_one_full(tmp_path: Path, durable: bool, level: int) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'a.db'}", durable=durable)
    with reading(engine) as connection:
        assert connection.execute(text("PRAGMA synchronous")).scalar() == level
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
    engine.dispose()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://x/y", "nonsense"])
def test_what_is_no_database_of_ours_is_refused(url: str) -> None:
    with pytest.raises(BadSettings):
        make_engine(url)


def test_a_refused_url_does_not_repeat_its_password() -> None:
    with pytest.raises(BadSettings) as caught:
        make_engine("mysql://chargehand:hunter2@db/x")
    assert "hunter2" not in str(caught.value)


def test_a_damaged_file_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"this is no database, but it is long enough to be taken for one" * 100)
    with pytest.raises(StoreFailed, match="restore a backup"):
        open_store(f"sqlite:///{tmp_path / 'a.db'}")


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreFailed, match="data_dir"):
        open_store(f"sqlite:///{tmp_path / 'file' / 'a.db'}")


def test_a_writer_takes_the_lock_at_its_beginning_and_a_reader_never_waits(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with open_store(f"sqlite:///{path}") as store, writing(store.engine):
        other = sqlite3.connect(path, timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        assert other.execute("SELECT count(*) FROM runs").fetchone() == (0,)
        other.close()


def test_opening_a_database_again_leaves_the_locks_of_this_process_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    probe = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
        "try: c.execute('PRAGMA journal_mode=DELETE'); print('switched')\n"
        "except sqlite3.OperationalError as error: print(error)"
    )
    with open_store(url) as store, reading(store.engine) as connection:
        connection.execute(text("SELECT count(*) FROM runs")).scalar()
        make_engine(url).dispose()
        # Another process may leave WAL mode only if it sees no lock of ours.
        ran = subprocess.run(
            [sys.executable, "-c", probe, tmp_path / "a.db"], capture_output=True, text=True, check=True
        )
    assert ran.stdout.strip() == "database is locked"


def test_what_a_failed_transaction_wrote_is_gone(url: str) -> None:
    with open_store(url) as store:
        with pytest.raises(RuntimeError), writing(store.engine) as connection:
            connection.execute(text("INSERT INTO audit_chains (chain, seq, hash) VALUES ('x', 0, '')"))
            raise RuntimeError
        with reading(store.engine) as connection:
            assert connection.execute(text("SELECT count(*) FROM audit_chains")).scalar() == 0
