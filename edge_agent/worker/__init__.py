"""The worker: the container process with the LLM loop and the A2A server. It can think and talk, not execute."""
