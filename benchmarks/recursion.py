"""Does a step of recursive least squares cost more late than early, and does it stay exact?

A step is 4 keys of 896 coordinates with values of 288. Ms and ratio are medians of 25 steps, interleaved with as many
upon the problem of the first size. *Error*: distance to the closed form of the whole problem in float64, relative to
that; *rebuilt*: steps for which float32 was not enough.
"""

from __future__ import annotations

from functools import partial
from statistics import median

import torch

from benchmarks.context import Context
from benchmarks.machine import interleaved
from benchmarks.report import Rows
from repair_lightning.functional.least_squares import Recursion

F, D, KEYS = 896, 288, 4
"""The value matrix of a 15 M Llama, and a target of four tokens."""
RIDGE, ANCHORING, ANCHORS = 0.01, 1.0, 2000
REPEATS = 25
"""Interleaved repeats of a step at each size."""


def run_part(context: Context) -> Rows:
    """A row per size, of one problem that grows by a step at a time."""
    generator = torch.Generator().manual_seed(context.seed)
    scales = torch.logspace(0, -3, F)  # real activations vary much more in some directions than in others
    weight = torch.randn(D, F, generator=generator) / F**0.5
    problem = Recursion.start(weight, torch.randn(ANCHORS, F, generator=generator) * scales, RIDGE, ANCHORING)
    normal = problem.information.clone()
    right = normal @ weight.double().T
    rows, first = [], None
    for step in range(1, max(context.sizes) + 1):
        keys, values = (torch.randn(KEYS, size, generator=generator) for size in (F, D))
        keys *= scales
        problem = problem.absorb(keys, values)
        normal += keys.double().T @ keys.double()
        right += keys.double().T @ values.double()
        if step in context.sizes:
            first = first or problem
            calls = {"now": partial(problem.absorb, keys, values), "first": partial(first.absorb, keys, values)}
            now, early = (median(seconds) for seconds in interleaved(calls, REPEATS).values())
            exact = torch.linalg.solve(normal, right).T
            error = float((problem.weight.double() - exact).norm() / exact.norm())
            row = {"steps": step, "ms/step": 1e3 * now, "ratio": now / early, "error": error}
            rows.append(row | {"rebuilt": problem.rebuilt})
    return rows
