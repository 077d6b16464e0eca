"""The machine side outside the container: gatekeeper, broker, runner, journal. Standard library only, Python 3.9."""
