"""Settings: one ``chargehand.toml``, ``CHARGEHAND_`` variables over it, references instead of secrets."""
