"""Bases: loading, architectures, the prefix cache, and the edited model."""
