"""How far a score would move with other edits: the percentile bootstrap (Efron 1979)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DRAWS = 1000
SHARE = 0.95
_KINDS = ("edit", "rephrase", "locality")


def op_interval(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """`low` and `high`, between which `SHARE` of OP in free generation lies, in [0, 1], over `DRAWS` draws of the edits
    with replacement, each with all its prompts; None where there is no OP. Draws that hold no prompt of some kind count
    as none. The seed is fixed.

    Args:
        rows: what a model said to each prompt: `id` of the edit, `kind`, `correct`.
    """
    place = {id: i for i, id in enumerate(dict.fromkeys(row["id"] for row in rows))}
    right, asked = np.zeros((2, len(_KINDS), len(place)))
    for row in rows:
        if row["kind"] in _KINDS:
            at = _KINDS.index(row["kind"]), place[row["id"]]
            right[at] += row["correct"]
            asked[at] += 1
    if not (place and asked.any(1).all()):
        return None
    generator, evenly = np.random.default_rng(0), np.full(len(place), 1 / len(place))
    drawn = (generator.multinomial(len(place), evenly) for _ in range(DRAWS))
    shares = [(right @ times) / number for times in drawn if (number := asked @ times).all()]
    low, high = np.quantile(np.prod(shares, 1) ** (1 / len(_KINDS)), [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return {"low": float(low), "high": float(high)}
