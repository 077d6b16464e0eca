"""Policies as people write them: YAML packs, compiled into the one document a machine is given."""
