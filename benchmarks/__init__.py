"""Benchmarks: every figure of speed or memory is a ratio whose two sides were measured in one run (see README.md)."""
