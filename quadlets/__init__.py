"""What systemd and podman are told: unit templates, the worker's image, the host's zipapp, polkit rules."""
