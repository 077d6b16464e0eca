"""The audit chain: what happened, in an order nobody can change unnoticed."""
