"""Scores: both protocols, other forms, routing confusion, probes, and what lm-evaluation-harness asks."""
