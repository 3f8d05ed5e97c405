"""A bank of wordings of our own: what can be asked of a subject, each relation in several ways."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from pathlib import Path

from repair_lightning.texts.asking import spellings

STAND_IN = "this"
"""Stands where a text names its subject, so that what is asked can be compared whatever it is asked of."""
STEM = 5
"""Letters of a word that count."""


@lru_cache(1)
def bank() -> tuple[tuple[str, ...], tuple[int, ...]]:
    """All wordings, with the stand-in as their subject, and the relation that each belongs to."""
    found = [
        (relation, wording.strip().replace("{}", STAND_IN))
        for relation, line in enumerate(_lines())
        for wording in line.split(" | ")
    ]
    return tuple(wording for _, wording in found), tuple(relation for relation, _ in found)


@lru_cache(1)
def word_weights() -> dict[str, float]:
    """Squared inverse document frequency of the bank's word stems."""
    wordings = bank()[0]
    counts = Counter(stem for wording in wordings for stem in stems(wording))
    return {stem: math.log((len(wordings) + 1) / (count + 0.5)) ** 2 for stem, count in counts.items()}


@lru_cache(1 << 13)
def stems(text: str) -> frozenset[str]:
    """The words of a text but for the stand-in, each cut to its first letters: so much of a word says what is asked."""
    return frozenset(word[:STEM] for word in spellings(text) if word != STAND_IN)


def stem_weight(stem: str) -> float:
    """The weight of a stem; one that the bank does not know counts as one that it holds three times."""
    known = word_weights()
    return known.get(stem, math.log(len(bank()[0]) / 3) ** 2)


def share_in_common(one: frozenset[str], other: frozenset[str]) -> float:
    """The weighted share of the stems of either text that both have, in [0, 1]."""
    whole = sum(stem_weight(stem) for stem in one | other)
    return sum(stem_weight(stem) for stem in one & other) / whole if whole else 0.0


def _lines() -> list[str]:
    text = Path(__file__).with_name("relations.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
