"""The paper's router (arXiv 2510.01879, Eq. 2 and Alg. 2): the shard whose delta a prompt excites most.

Deviations: one score per prompt, pooled over its own tokens; a threshold per shard, calibrated unless `act_ratio` is
given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repair_lightning.functional import activation_scores, calibrate_threshold, decide, ratio_threshold
from repair_lightning.functional.routing import Pool
from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers.base import Router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE


class ActivationRouter(Router):
    """The paper's router: a shard answers where its pooled `||A(x) delta^T||` exceeds its threshold the most.

    Args:
        pool: `last`, `mean` or `max` over the prompt's tokens.
        act_ratio: the paper's rule, threshold = `act_ratio * min edit score`; None calibrates instead.
        false_fire_rate: share of irrelevant prompts that may fire, for the calibrated threshold.
    """

    name = "activation"

    def __init__(self, pool: Pool = "last", act_ratio: float | None = None, false_fire_rate: float = 0.01) -> None:
        self.pool = pool
        self.act_ratio = act_ratio
        self.false_fire_rate = false_fire_rate
        self.reads_all_tokens = pool != "last"
        self.thresholds: dict[int, float] = {}

    def options(self) -> dict[str, Any]:
        """As given to the constructor."""
        return {"pool": self.pool, "act_ratio": self.act_ratio, "false_fire_rate": self.false_fire_rate}

    def scores(self, query: Query, memory: SideMemory, shards: Sequence[int] | None = None) -> Tensor:
        """Activation scores (B, K) on the CPU."""
        deltas = [memory[shard].delta for shard in (memory.ids if shards is None else shards)]
        return activation_scores(query.activations.float(), deltas, query.mask, self.pool).detach().cpu()

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """Thresholds per shard; a shard without edits never fires."""
        self.thresholds = {}
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
        scores = self.scores(query, memory, shards)
        limits = torch.tensor([self.thresholds[shard] for shard in shards], dtype=scores.dtype)
        choice, _ = decide(scores, limits)
        best = (scores / limits).argmax(-1, keepdim=True)
        memory_ids = torch.tensor([*shards, BASE])[choice]  # -1 picks the last entry: the base
        return Choice(memory_ids, scores.gather(1, best)[:, 0], limits[best[:, 0]], (None,) * len(query))

    def reassign(self, shards: Sequence[int], fused: int) -> None:
        """The fused shard starts without a threshold; calibrate before routing."""
        self.thresholds = {shard: limit for shard, limit in self.thresholds.items() if shard not in shards}

    def state_dict(self) -> dict[str, Any]:
        """The thresholds."""
        return {"thresholds": {str(shard): limit for shard, limit in self.thresholds.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accepts what :meth:`state_dict` gave."""
        self.thresholds = {int(shard): limit for shard, limit in state["thresholds"].items()}
