"""The hybrid router: the key chooses, and the chosen shard's activation must agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from repair_lightning.functional.routing import Pool
from repair_lightning.memory.query import Check, Choice, Query
from repair_lightning.memory.routers.activation import ActivationRouter
from repair_lightning.memory.routers.key import KeyRouter
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE, READS


class HybridRouter(KeyRouter):
    """The key chooses; the chosen shard's activation score must exceed its threshold too."""

    name = "hybrid"
    needs_owned = True
    reads_states = True

    def __init__(
        self,
        pool: Pool = "last",
        act_ratio: float | None = None,
        false_fire_rate: float = 0.01,
        relation_false_rate: float = 0.01,
        in_text: bool = False,
    ) -> None:
        super().__init__(relation_false_rate, in_text)
        self.pool, self.act_ratio, self.false_fire_rate = pool, act_ratio, false_fire_rate
        self.gate = ActivationRouter(pool, act_ratio, false_fire_rate)
        self.reads_all_tokens = self.gate.reads_all_tokens

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """Both routers' thresholds."""
        super().calibrate(memory, owned, background)
        self.gate.calibrate(memory, owned, background)

    def route(self, query: Query, memory: SideMemory) -> Choice:
        """The key's choice where both gates open; only shards that some prompt's key chose are scored."""
        choice = super().route(query, memory)
        chosen = set(choice.memory.tolist())
        shards = [shard for shard in memory.ids if shard in self.gate.thresholds and shard in chosen]
        scores = self.gate.scores(query, memory, shards)
        column = {shard: i for i, shard in enumerate(shards)}
        found = choice.memory.tolist()
        excited = [float(scores[row, column[shard]]) if shard in column else 0.0 for row, shard in enumerate(found)]
        limits = [self.gate.thresholds[shard] if shard in column else math.inf for shard in found]
        value, limit = torch.tensor(excited), torch.tensor(limits)
        # Only a strictly greater score fires: the least float above the threshold is what must be reached.
        agrees = Check("activation", value, limit.nextafter(torch.tensor(math.inf)))
        kept = torch.where((value > limit) | (choice.memory == READS), choice.memory, BASE)
        return Choice(kept, choice.score, choice.threshold, choice.nearest, (*choice.checks, agrees))

    def reassign(self, shards: Sequence[int], fused: int) -> None:
        """Both routers follow."""
        super().reassign(shards, fused)
        self.gate.reassign(shards, fused)

    def common_state(self) -> dict[str, Any]:
        """Both states."""
        return super().common_state() | self.gate.state_dict()

    def remember(self) -> Any:
        """Both states."""
        return super().remember(), self.gate.remember()

    def recall(self, kept: Any) -> None:
        """Both states."""
        own, gate = kept
        super().recall(own)
        self.gate.recall(gate)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Both states."""
        super().load_state_dict(state)
        self.gate.load_state_dict(state)
