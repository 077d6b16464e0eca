"""Tracing: names, spans, redaction, the durable spool, delivery to MLflow and reading back. Knows no other package of ours."""
