"""What gateway and worker say to each other over A2A. The SDK's types stop here."""
