"""Migrations of the database; ``supervisor.store.migrate`` runs them."""
