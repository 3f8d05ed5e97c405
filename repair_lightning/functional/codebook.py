"""GRACE's rules for a codebook: when a key opens an entry of its own, and how far the balls around keys reach.

Source: GRACE (arXiv 2211.11031), Sec. 3.2 and Alg. 1: the nearest entry alone is looked at.

Deviations: a conflict never makes a ball larger (the authors' code sets both radii to half the distance, also where
one was shorter), and a key that is already there with another label takes over: half of no distance would leave
neither of the two a ball.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SAME = 1e-3  # keys closer than this share of the first radius are one key: they differ by rounding
COVER = 1.001  # a ball grows to the distance times this, so that what it grew for is inside it in spite of rounding
OUT_OF_REACH = -1.0  # the radius of an entry that nothing reaches


@dataclass(frozen=True)
class Placement:
    """What becomes of a key: whether it `opens` an entry, else it joins the nearest one; the `radius` of a new entry's
    ball; and from now on that of the `nearest` entry's."""

    opens: bool
    radius: float
    nearest: float


def was_cut(distance: float, radius: float, first: float) -> bool:
    """Whether a ball of this radius ends where a key at this distance cut it short, or has the same key."""
    return distance <= SAME * first or math.isclose(radius, distance / 2, rel_tol=1e-6)


def placement(distance: float, radius: float, same_label: bool, first: float) -> Placement:
    """Where a key goes, by its distance to the nearest entry's key, the radius of that entry's ball, whether both say
    the same, and epsilon, the radius of an entry's `first` ball."""
    if distance > radius + first:
        return Placement(True, first, radius)
    if same_label:
        return Placement(False, 0.0, max(radius, distance * COVER))
    if distance <= SAME * first:
        return Placement(True, first, OUT_OF_REACH)
    half = distance / 2
    return Placement(True, min(first, half), min(radius, half))
