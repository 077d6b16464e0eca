"""What Alembic runs: the migrations, on the connection that ``supervisor.store.migrate`` hands in."""

from __future__ import annotations

from alembic import context

from supervisor.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    # The caller's transaction holds the lock that keeps a second gateway out.
    transactional_ddl=False,
)
context.run_migrations()
