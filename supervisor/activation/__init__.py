"""How the centre reaches a machine: SSH, the gatekeeper's verbs, the embedded machine. One door to asyncssh."""
