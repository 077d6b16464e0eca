"""Benchmarks: one command, a table and JSON. Ratios measured side by side on one box; never an assertion in a timed test."""
