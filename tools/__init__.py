"""What may be done on a host: values, policy, gate, observers. Standard library only, Python 3.9."""
