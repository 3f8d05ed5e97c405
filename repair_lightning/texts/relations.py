"""A bank of wordings of our own: what can be asked of a subject, each relation in several ways."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

STAND_IN = "this"
"""Stands where a text names its subject, so that what is asked can be compared whatever it is asked of."""


@lru_cache(1)
def bank() -> tuple[tuple[str, ...], tuple[int, ...]]:
    """All wordings, with the stand-in as their subject, and the relation that each belongs to."""
    found = [
        (relation, wording.strip().replace("{}", STAND_IN))
        for relation, line in enumerate(_lines())
        for wording in line.split(" | ")
    ]
    return tuple(wording for _, wording in found), tuple(relation for relation, _ in found)


def questions_about(subject: str, number: int) -> list[str]:
    """Questions of the bank about a subject, each of another relation, spread over all of them."""
    lines = _lines()
    step = max(len(lines) // number, 1)
    return [line.split(" | ")[0].strip().replace("{}", subject) for line in lines[::step]][:number]


def _lines() -> list[str]:
    text = Path(__file__).with_name("relations.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
