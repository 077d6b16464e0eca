"""Tests of ``inference``; ``scripted_server`` is used by other tests too."""
