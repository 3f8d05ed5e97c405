"""Scores: protocols, metrics, the report."""
