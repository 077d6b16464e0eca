"""Supervised runs: states, flow, verdict, trace."""
