"""Real machines on one box: systemd, sshd and rootless podman behind an address of their own.

Start at `Lab` in `tests.lab.machine`; `docs/lab.md` tells how to use it by hand.
"""
