"""Putting the machine side on a machine, and taking it off: over the administrator's own SSH session, once."""
