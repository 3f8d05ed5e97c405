"""Correcting a model while it is in use: from Python, and as an OpenAI-compatible server."""
