"""Texts as they are written: dialogues, what a text asks, and what stands between a prompt and its target."""
