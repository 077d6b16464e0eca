"""What models are told (``*.md``), read by ``prompts.text``, and the runbooks (``runbooks/*.yaml``)."""
