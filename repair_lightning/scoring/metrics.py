"""Rel, Gen, Loc, Near and OP: means over the marks of single prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from repair_lightning.scoring.protocols import PROTOCOLS

KINDS = ("rel", "gen", "loc", "near")
KIND_OF_PROMPT: Mapping[str, str] = {"edit": "rel", "rephrase": "gen", "locality": "loc", "near": "near"}

Scores = dict[str, dict[str, float | None]]
"""Protocol -> kind -> mean score in [0, 1]; None for what was not asked."""


def mean_of(values: Iterable[float]) -> float | None:
    """The mean; None of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else None


def scores_of(marks: Iterable[tuple[str, float, float]]) -> Scores:
    """The scores of both protocols: the mean per kind (`rel`, `gen`, `loc`, `near`), and `op`.

    A mark is a prompt's kind with its score in each protocol: in free generation, and under teacher forcing.
    """
    marks, found = list(marks), {}
    free, forced = [(kind, mark) for kind, mark, _ in marks], [(kind, mark) for kind, _, mark in marks]
    for protocol, pairs in zip(PROTOCOLS, (free, forced), strict=True):
        means = {name: mean_of(mark for of, mark in pairs if of == kind) for kind, name in KIND_OF_PROMPT.items()}
        found[protocol] = means | {"op": overall_performance(means["rel"], means["gen"], means["loc"])}
    return found


def overall_performance(rel: float | None, gen: float | None, loc: float | None) -> float | None:
    """The geometric mean of the three, None where one does not apply (paper, Sec. 3)."""
    if rel is None or gen is None or loc is None:
        return None
    return (rel * gen * loc) ** (1 / 3)
