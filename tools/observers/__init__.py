"""Typed read-only tools: fixed probes, parsed output. The table of all of them is ``tools.observers.registry``."""
