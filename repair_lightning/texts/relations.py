"""A bank of wordings of our own: what can be asked of a subject, each relation in several ways."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache

from repair_lightning.texts import lines_of
from repair_lightning.texts.asking import spellings

STAND_IN = "this"
"""Stands where a text names its subject, so that what is asked can be compared whatever it is asked of."""


STEM = 5
"""Letters of a word that count."""


@lru_cache(1)
def bank() -> tuple[tuple[str, ...], tuple[int, ...]]:
    """All wordings, with the stand-in as their subject, and the relation that each belongs to."""
    relations = [line.replace("{}", STAND_IN).split(" | ") for line in lines_of("relations.txt")]
    places = tuple(place for place, wordings in enumerate(relations) for _ in wordings)
    return tuple(wording.strip() for wordings in relations for wording in wordings), places


@lru_cache(1 << 13)
def stems(text: str) -> frozenset[str]:
    """The words of a text but for the stand-in, each cut to its first letters: so much of a word says what is asked."""
    return frozenset(word[:STEM] for word in spellings(text) if word != STAND_IN)


@lru_cache(1)
def _counts() -> Counter[str]:
    return Counter(stem for wording in bank()[0] for stem in stems(wording))


def stem_weight(stem: str) -> float:
    """Squared inverse document frequency of a stem in the bank; one that is not in it counts as if it were there three
    times."""
    number, count = len(bank()[0]), _counts()[stem]
    return math.log((number + 1) / (count + 0.5) if count else number / 3) ** 2


def share_in_common(one: frozenset[str], other: frozenset[str]) -> float:
    """The weighted share of the stems of either text that both have, in [0, 1]."""
    whole = math.fsum(map(stem_weight, one | other))  # exact, in whatever order a set gives its members
    return math.fsum(map(stem_weight, one & other)) / whole if whole else 0.0
