"""The paper's router (arXiv 2510.01879, Eq. 2 and Alg. 2): the shard whose delta a prompt excites most.

Deviations: one score per prompt, pooled over its own tokens; a threshold per shard, calibrated unless `act_ratio` is
given. Where there are many shards, Eq. 2 is applied to each one's sketch first, and to its delta only if that puts it
among the candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_not
from typing import Any, ClassVar

import torch
from torch import Tensor

from repair_lightning.functional import (
    activation_scores,
    calibrate_threshold,
    decide,
    ratio_threshold,
    sketch,
    sketched_scores,
)
from repair_lightning.functional.routing import Pool
from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers.base import Router
from repair_lightning.memory.shards import AnyShard
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE


class ActivationRouter(Router):
    """The paper's router: a shard answers where its pooled `||A(x) delta^T||` exceeds its threshold the most.

    Where there are many shards, that is looked up in two levels: those whose sketches exceed their thresholds the most
    are the candidates, and these alone are scored. Thresholds are calibrated on exact scores always.

    Args:
        pool: `last`, `mean` or `max` over the prompt's tokens.
        act_ratio: the paper's rule, threshold = `act_ratio * min edit score`; None calibrates instead.
        false_fire_rate: share of irrelevant prompts that may fire, for the calibrated threshold.
    """

    sketch_rank: ClassVar[int] = 8
    """Rows of a shard's sketch: on dense shards of eight ZsRE edits each, 16 candidates held the best shard for 99.6 %
    of the prompts with 8 rows and for 93 % with 4; for 92 % by the centroid of the shard's own edits."""
    two_level_from = 256
    """Shards from which on candidates are chosen first: from where it was measured to pay."""
    candidates = 32
    """Shards that are then scored per prompt."""
    name = "activation"

    def __init__(
        self,
        pool: Pool = "last",
        act_ratio: float | None = None,
        false_fire_rate: float = 0.01,
    ) -> None:
        self.pool, self.act_ratio, self.false_fire_rate = pool, act_ratio, false_fire_rate
        self.reads_all_tokens = pool != "last"
        self._set({})

    def _set(self, thresholds: dict[int, float]) -> None:
        """Begin with thresholds and no sketches: shards may have changed."""
        self.thresholds = thresholds
        self._sketched: list[AnyShard] = []
        self._sketches = torch.zeros(0, 0, 0)

    def scores(self, query: Query, memory: SideMemory, shards: Sequence[int] | None = None) -> Tensor:
        """Activation scores (B, K) on the CPU."""
        deltas = [memory[shard].delta for shard in (memory.ids if shards is None else shards)]
        return activation_scores(query.activations.float(), deltas, query.mask, self.pool).detach().cpu()

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """Thresholds per shard; a shard without edits never fires."""
        self._set({})
        for shard, edits in owned.items():
            positive = self.scores(edits, memory, [shard]).flatten()
            negative = self.scores(background, memory, [shard]).flatten()
            self.thresholds[shard] = (
                ratio_threshold(positive, self.act_ratio)
                if self.act_ratio is not None
                else calibrate_threshold(positive, negative, self.false_fire_rate)
            )

    def route(self, query: Query, memory: SideMemory) -> Choice:
        """The shard with the largest score over threshold, if that ratio exceeds one."""
        shards = [shard for shard in memory.ids if shard in self.thresholds]
        if not shards:
            return Choice.base(len(query))
        limits = torch.tensor([self.thresholds[shard] for shard in shards])
        if len(shards) >= self.two_level_from:
            scores = self._scores_of_candidates(query, memory, shards, limits)
        else:
            scores = self.scores(query, memory, shards)
        choice, _ = decide(scores, limits)
        best = (scores / limits).argmax(-1, keepdim=True)
        memory_ids = torch.tensor([*shards, BASE])[choice]  # -1 picks the last entry: the base
        return Choice(memory_ids, scores.gather(1, best)[:, 0], limits[best[:, 0]], (None,) * len(query))

    def _scores_of_candidates(self, query: Query, memory: SideMemory, shards: Sequence[int], limits: Tensor) -> Tensor:
        """Activation scores (B, K) on the CPU of each prompt's candidates; 0, which never fires, for other shards."""
        query = query.at_last() if self.pool == "last" else query
        activations, mask = query.activations.float(), query.mask
        found = {shard: memory[shard] for shard in memory.ids}
        modules: list[AnyShard] = [found[shard] for shard in shards]  # type: ignore[misc]
        rough = sketched_scores(activations, self._sketches_of(modules).to(activations.device), mask, self.pool)
        chosen = (rough.cpu() / limits).topk(min(self.candidates, len(shards)), dim=-1).indices
        scores = torch.zeros(len(query), len(shards))
        for column in chosen.unique().tolist():
            rows = (chosen == column).any(-1).nonzero()[:, 0]
            at, delta = rows.to(mask.device), modules[column].delta
            own = activation_scores(activations[at], [delta], mask[at], self.pool, check=False)
            scores[rows, column] = own[:, 0].detach().cpu()
        return scores

    @torch.no_grad()
    def _sketches_of(self, shards: list[AnyShard]) -> Tensor:
        """The shards' sketches (K, R, F); made when they are needed, kept while the shards stay what they are."""
        if len(shards) != len(self._sketched) or any(map(is_not, shards, self._sketched)):
            known = {id(shard): one for shard, one in zip(self._sketched, self._sketches, strict=True)}
            made = [
                known[id(shard)] if id(shard) in known else sketch(shard.delta, self.sketch_rank) for shard in shards
            ]
            self._sketches, self._sketched = torch.stack(made), shards
        return self._sketches

    def reassign(self, shards: Sequence[int], fused: int) -> None:
        """The fused shard starts without a threshold; calibrate before routing."""
        self.thresholds = {shard: limit for shard, limit in self.thresholds.items() if shard not in shards}

    def state_dict(self) -> dict[str, Any]:
        """The thresholds."""
        return {"thresholds": {str(shard): limit for shard, limit in self.thresholds.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accepts what :meth:`state_dict` gave; what is derived from the shards is made anew."""
        self._set({int(shard): limit for shard, limit in state["thresholds"].items()})
