"""A router of balls around keys: the nearest key answers for what lies in its ball, and the base for all else.

The codebook of GRACE (arXiv 2211.11031), Sec. 3.1: a key is what enters the edited value matrix at the prompt's last
token, the distance is Euclidean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers.base import Router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE


class BallRouter(Router):
    """Entries of a key, a radius and a shard, each with the edits that it answers.

    Args:
        radius: of a new entry's ball.

    Attributes:
        keys: (N, F), on the CPU.
        radii: (N,)
        shards: (N,)
        members: per entry, the ids of its edits.
    """

    name = "ball"
    needs_owned = False
    remembered = ("keys", "radii", "shards", "members")

    def __init__(self, radius: float = 1.0) -> None:
        self.radius = radius
        self.keys = torch.zeros(0, 0)
        self.radii = torch.zeros(0)
        self.shards = torch.zeros(0, dtype=torch.long)
        self.members: list[list[str]] = []

    @staticmethod
    def key_of(prompts: Query) -> Tensor:
        """The keys (B, F) of prompts."""
        return prompts.at_last().activations[:, 0].detach().float().cpu()

    def distances(self, keys: Tensor) -> Tensor:
        """From keys (B, F) to those of the entries, (B, N); not by way of products, which are blurred near zero."""
        known = self.keys.reshape(-1, keys.shape[1])
        return torch.cdist(keys, known, compute_mode="donot_use_mm_for_euclid_dist")

    def open(self, id: str, key: Tensor, radius: float, shard: int) -> None:
        """A new entry for an edit, with a key (F,)."""
        self.keys = torch.cat([self.keys.reshape(-1, len(key)), key[None]])
        self.radii = torch.cat([self.radii, torch.tensor([radius])])
        self.shards = torch.cat([self.shards, torch.tensor([shard])])
        self.members = [*self.members, [id]]

    def join(self, id: str, entry: int) -> None:
        """An edit becomes a member of an entry."""
        members = self.members[entry]
        self.members = [*self.members[:entry], [*members, id], *self.members[entry + 1 :]]

    def reach(self, entry: int, radius: float) -> None:
        """Give an entry's ball another radius."""
        self.radii = self.radii.clone()
        self.radii[entry] = radius

    def forget(self, ids: Sequence[str]) -> None:
        """Drop edits; an entry whose last edit goes is gone."""
        gone = set(ids)
        left = [[id for id in members if id not in gone] for members in self.members]
        kept = torch.tensor([entry for entry, members in enumerate(left) if members], dtype=torch.long)
        self.keys, self.radii, self.shards = self.keys[kept], self.radii[kept], self.shards[kept]
        self.members = [left[entry] for entry in kept.tolist()]

    def route(self, query: Query, memory: SideMemory) -> Choice:
        """The nearest key, if a prompt lies in its ball; the score is the distance, negated."""
        if not len(self.keys):
            return Choice.base(len(query))
        distances = self.distances(self.key_of(query))
        best = distances.masked_fill(self.radii < 0, torch.inf).argmin(-1)
        distance = distances.gather(1, best[:, None])[:, 0]
        found, score = distance < self.radii[best], -distance
        nearest = tuple(self.members[entry][0] for entry in best.tolist())
        return Choice(torch.where(found, self.shards[best], BASE), score, -self.radii[best], nearest)
