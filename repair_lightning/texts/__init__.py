"""Texts as they are written: dialogues, what a text asks, and what stands between a prompt and its target."""

from pathlib import Path


def lines_of(name: str) -> list[str]:
    """The lines of a data file in this folder, without comments and empty ones."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
