"""Recursive least squares along a long stream: does a step cost more late than early, and does it stay exact?"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.context import Context
from benchmarks.report import Table, number
from benchmarks.timing import interleaved, seconds_of
from repair_lightning.functional.least_squares import Recursion

TITLE = "Recursion: least squares, step by step"
F, D, KEYS = 896, 288, 4
"""The value matrix of a 15 M Llama, and a target of four tokens."""
RIDGE, ANCHORING, ANCHORS = 0.01, 1.0, 2000
REPEATS = 25
"""Interleaved repeats of a step at each size."""
UNDONE = 20
"""Steps that are taken back at the end."""


def run_part(context: Context) -> dict[str, Any]:
    """One problem that grows by a step at a time; at each size its minimiser is compared with the closed form's."""
    generator = torch.Generator().manual_seed(context.seed)
    scales = torch.logspace(0, -3, F)  # real activations vary much more in some directions than in others
    weight = torch.randn(D, F, generator=generator) / F**0.5
    anchors = torch.randn(ANCHORS, F, generator=generator) * scales
    problem = Recursion.start(weight, anchors, RIDGE, ANCHORING)
    closed = ClosedForm(problem)
    sizes, rows, terms = context.within_limit(context.sizes), [], []
    first: Recursion | None = None
    for step in range(1, max(sizes, default=0) + 1):
        terms.append((torch.randn(KEYS, F, generator=generator) * scales, torch.randn(KEYS, D, generator=generator)))
        problem = problem.absorb(*terms[-1])
        closed.add(*terms[-1])
        if step in sizes:
            first = first or problem
            rows.append(row_of(step, problem, first, terms[-1], closed.error(problem.weight)))
    return {"sizes": rows, "undo": undo(problem, closed, terms[:UNDONE]) if rows else None}


def row_of(
    step: int, problem: Recursion, first: Recursion, term: tuple[Tensor, Tensor], error: float
) -> dict[str, Any]:
    """One more step upon the problem as it is now, beside the same upon the one of the first size."""
    calls = {"now": partial(problem.absorb, *term), "first": partial(first.absorb, *term)}
    seconds = {name: median(found) for name, found in interleaved(calls, REPEATS).items()}
    ratio = seconds["now"] / seconds["first"]
    return {"steps": step, "seconds": seconds["now"], "ratio": ratio, "error": error, "rebuilt": problem.rebuilt}


def undo(problem: Recursion, closed: ClosedForm, terms: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The oldest steps taken back: the time of one, and how far from the closed form without them that ends."""
    seconds = []
    for keys, values in terms:
        seconds.append(seconds_of(partial(problem.remove, keys, values)))
        problem = problem.remove(keys, values)
        closed.add(keys, values, -1.0)
    return {"steps": len(terms), "seconds": median(seconds), "error": closed.error(problem.weight)}


class ClosedForm:
    """The normal equations of the whole problem in float64."""

    def __init__(self, start: Recursion) -> None:
        self.normal = start.information.clone()
        self.right = self.normal @ start.weight.double().T

    def add(self, keys: Tensor, values: Tensor, sign: float = 1.0) -> None:
        """With (or without) keys and their values."""
        self.normal += sign * keys.double().T @ keys.double()
        self.right += sign * keys.double().T @ values.double()

    def error(self, weight: Tensor) -> float:
        """How far a weight is from the minimiser, relative to it."""
        exact = torch.linalg.solve(self.normal, self.right).T
        return float((weight.double() - exact).norm() / exact.norm())


def tables(result: dict[str, Any]) -> list[Table]:
    """A row per size."""
    rows = [
        (
            f"{row['steps']:,}",
            number(1e3 * row["seconds"]),
            number(row["ratio"], "x"),
            f"{row['error']:.1e}",
            str(row["rebuilt"]),
        )
        for row in result["sizes"]
    ]
    note = (
        f"A step is {KEYS} keys of {F} coordinates with values of {D}; ms and ratio are medians of {REPEATS} steps, "
        "interleaved with as many upon the problem of the first size; error is the distance to the closed form of the "
        "whole problem in float64, relative to that; rebuilt counts the steps for which float32 was not enough."
    )
    if result["undo"]:
        taken = result["undo"]
        note += (
            f" Then the {taken['steps']} oldest steps are taken back, {number(1e3 * taken['seconds'])} ms each, which "
            f"ends {taken['error']:.1e} from the closed form without them."
        )
    return [Table(TITLE, ("steps", "ms/step", "ratio", "error", "rebuilt"), rows, note)]
