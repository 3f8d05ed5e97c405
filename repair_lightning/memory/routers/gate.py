"""A router of trained gates: for each shard a logistic regression says whether a prompt is in its scope.

The scope classifier of SERAC (arXiv 2206.06520, Sec. 3) in the form that DEFER has as GRACE's baseline (arXiv
2211.11031, Sec. 4.1): one linear layer, here on what enters the edited layer and its value matrix at the prompt's last
token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers.base import Router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE

ROUNDING = 1e-4
"""Probabilities are the same up to this, however many tokens a prompt was padded with."""


@torch.enable_grad()
def fitted_gate(inside: Tensor, outside: Tensor, ridge: float) -> Tensor:
    """Weights and bias (X + 1,) of a logistic regression that tells features (n, X) from (m, X).

    Both sides weigh alike, whatever their numbers; `ridge / 2 ||w||^2` is added to the mean loss.
    """
    features = torch.cat([inside, outside])
    labels = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    shares = torch.cat([torch.full((len(part),), 0.5 / max(len(part), 1)) for part in (inside, outside)])
    gate = torch.zeros(features.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([gate], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        wrong = binary_cross_entropy_with_logits(features @ gate[:-1] + gate[-1], labels, shares, reduction="sum")
        value = wrong + ridge / 2 * gate[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call, arg-type]
    return gate.detach()


class GateRouter(Router):
    """The shard whose gate is the surest answers, if it is sure enough.

    Gates are trained at each calibration: a shard's own edits against the irrelevant prompts of :meth:`fit` and the
    edits of other shards. A gate then opens above `threshold`, and above all but `false_fire_rate` of the held-out
    prompts.

    Args:
        threshold: the least probability that opens a gate.
        false_fire_rate: share of held-out irrelevant prompts that may open one.
        ridge: weight of the gates' size, activations and hidden states being of unit variance on the average.
    """

    name = "gate"
    remembered = ("gates", "limits", "mean", "scale", "background", "shards")

    def __init__(self, threshold: float = 0.5, false_fire_rate: float = 0.01, ridge: float = 1e-2) -> None:
        self.threshold, self.false_fire_rate, self.ridge = threshold, false_fire_rate, ridge
        self.background = self.mean = self.scale = torch.zeros(0)
        self.shards: list[int] = []
        self.gates = torch.zeros(0, 0)
        self.limits = torch.zeros(0)

    def fit(self, background: Query) -> None:
        """What is outside every scope, and the features' unit."""
        found = self._states(background)
        parts = (background.activations.shape[-1], background.hidden.shape[-1])
        self.mean = found.mean(0)
        units = [part.square().mean().sqrt().clamp_min(1e-6) for part in (found - self.mean).split(parts, -1)]
        self.scale = torch.cat([unit.expand(size) for unit, size in zip(units, parts, strict=True)])
        self.background = self._features(background)

    @staticmethod
    def _states(query: Query) -> Tensor:
        last = query.at_last()
        return torch.cat([last.activations[:, 0], last.hidden[:, 0]], -1).detach().float().cpu()

    def _features(self, query: Query) -> Tensor:
        """(B, F + D)"""
        return (self._states(query) - self.mean) / self.scale

    def _probabilities(self, features: Tensor) -> Tensor:
        """(B, K), each prompt by itself: a product of many rows has other bits than one of few."""
        rows = [(features_row * self.gates[:, :-1]).sum(-1) + self.gates[:, -1] for features_row in features]
        return torch.stack(rows).sigmoid()

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """Train the gates anew and set their thresholds; a shard without edits never answers."""
        own = {shard: self._features(edits) for shard, edits in owned.items()}
        self.shards, self.gates, self.limits = list(own), torch.zeros(0, 0), torch.zeros(0)
        if not own:
            return
        others = {s: [self.background, *(part for other, part in own.items() if other != s)] for s in own}
        self.gates = torch.stack([fitted_gate(part, torch.cat(others[s]), self.ridge) for s, part in own.items()])
        known = self._probabilities(self._features(background))
        highest = torch.quantile(known, 1 - self.false_fire_rate, dim=0, interpolation="higher")
        self.limits = (highest + ROUNDING).clamp_min(self.threshold)

    def route(self, query: Query, memory: SideMemory) -> Choice:
        """The shard whose gate is the furthest above its threshold."""
        if not self.shards:
            return Choice.base(len(query))
        found = self._probabilities(self._features(query))
        best = (found - self.limits).argmax(-1)
        score, limit = found.gather(1, best[:, None])[:, 0], self.limits[best]
        return Choice(
            torch.where(score > limit, torch.tensor(self.shards)[best], BASE), score, limit, (None,) * len(query)
        )
