"""The central side: what a gateway keeps, decides and starts.

Parts: ``errors`` (the error tree), ``machines`` (what a machine's identity may look like), ``settings`` (one
``chargehand.toml``), ``store`` (the database), ``audit`` (the tamper-evident chain), ``runs`` (states and flow).
"""
