"""What runs on a machine during a run: the worker (in a container) and the host side (gatekeeper, broker, runner)."""
