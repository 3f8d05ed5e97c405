"""Ranks: who does what of a window, and what happens when one is lost."""
