"""Rel, Gen, Loc, Near and OP as one torchmetrics metric, so that processes add up their counts by themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

KINDS = ("rel", "gen", "loc", "near")
KIND_OF_PROMPT: Mapping[str, str] = {"edit": "rel", "rephrase": "gen", "locality": "loc", "near": "near"}


class EditScores(Metric):
    """Mean score per kind of prompt, and `op = (rel gen loc)^(1/3)`.

    `update` takes a kind (`rel`, `gen`, `loc`, `near`) and scores in [0, 1]. `compute` gives None for what was never
    asked, and for `op` where one of its three parts is missing.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(len(KINDS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(KINDS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, kind: str, scores: Tensor) -> None:
        """Add scores (n,) of one kind."""
        at = KINDS.index(kind)
        self.total[at] += scores.double().sum().to(self.total.device)
        self.count[at] += scores.numel()

    def compute(self) -> dict[str, float | None]:  # type: ignore[override]
        """The means so far."""
        means = {kind: float(self.total[i] / self.count[i]) if self.count[i] else None for i, kind in enumerate(KINDS)}
        return means | {"op": overall_performance(means["rel"], means["gen"], means["loc"])}


def overall_performance(rel: float | None, gen: float | None, loc: float | None) -> float | None:
    """The geometric mean of the three, None where one does not apply (paper, Sec. 3)."""
    if rel is None or gen is None or loc is None:
        return None
    return (rel * gen * loc) ** (1 / 3)
