"""Hands the database fixtures to the tests of this folder."""

from __future__ import annotations

from tests.store.fixtures import ledger, machine, postgres_server, store, url

__all__ = ["ledger", "machine", "postgres_server", "store", "url"]
