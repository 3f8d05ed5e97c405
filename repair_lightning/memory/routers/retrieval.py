"""Retrieval by likeness alone: the edits that are most like a prompt, and what is to be put before it.

No shard does anything here; a memory that answers is an edit whose text the base reads first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from repair_lightning.memory.query import Choice, Query, pad_right
from repair_lightning.memory.routers.base import Anchor, Router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE


class RetrievalRouter(Router):
    """The nearest edit by the cosine of the prompts' last states, centred on irrelevant prompts.

    Args:
        number: of edits put before a prompt, the nearest last.
        false_fire_rate: share of the held-out irrelevant prompts that may get anything.
    """

    name = "retrieval"
    needs_owned = False
    prefaces = True
    remembered = ("ids", "threshold", "keys", "shards", "lines", "centre")

    def __init__(self, number: int = 1, false_fire_rate: float = 0.01) -> None:
        self.number, self.false_fire_rate = number, false_fire_rate
        self.ids: list[str] = []
        self.keys, self.shards = torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)
        self.lines = torch.zeros(0, 0, dtype=torch.long)
        self.centre = torch.zeros(0)
        self.threshold = 2.0  # which no cosine exceeds

    def fit(self, background: Query) -> None:
        """What is common to all prompts."""
        self.centre = background.last_hidden().mean(0).cpu()

    def describe(self, anchors: Sequence[Anchor], prompts: Query, shards: Sequence[int]) -> dict[str, Tensor]:
        """Each edit's direction and shard; whoever adds it says its `lines` (n, W) besides."""
        return {"keys": self._directions(prompts), "shards": torch.tensor(list(shards), dtype=torch.long)}

    def insert(self, ids: Sequence[str], described: Mapping[str, Tensor]) -> None:
        """Take in edits with their lines: token ids, -1 past the end."""
        self.forget(ids)
        self.ids = [*self.ids, *ids]
        lines = described.get("lines", torch.zeros(len(ids), 0, dtype=torch.long))
        rows = [[token for token in row if token >= 0] for row in (*self.lines.tolist(), *lines.tolist())]
        self.lines = pad_right(rows)
        self.keys = torch.cat([self.keys.reshape(-1, described["keys"].shape[1]), described["keys"]])
        self.shards = torch.cat([self.shards, described["shards"]])

    def forget(self, ids: Sequence[str]) -> None:
        """Drop edits."""
        gone = set(ids)
        keep = torch.tensor([id not in gone for id in self.ids], dtype=torch.bool)
        if not keep.all():
            self.ids = [id for id in self.ids if id not in gone]
            self.keys, self.shards, self.lines = self.keys[keep], self.shards[keep], self.lines[keep]

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """What all but a few irrelevant prompts stay below."""
        if self.ids:
            nearest = (self._directions(background) @ self.keys.T).amax(-1)
            limit = torch.quantile(nearest, 1 - self.false_fire_rate, interpolation="higher")
            self.threshold = min(float(limit), 1 - 1e-3)

    def route(self, query: Query, memory: SideMemory) -> Choice:
        """The nearest edit, if it is nearer than irrelevant prompts are."""
        if not self.ids:
            return Choice.base(len(query))
        score, index = (self._directions(query) @ self.keys.T).max(-1)
        chosen = torch.where(score > self.threshold, self.shards[index], BASE)
        nearest = tuple(self.ids[i] for i in index.tolist())
        return Choice(chosen, score, torch.full_like(score, self.threshold), nearest)

    def preface(self, query: Query, memory: Sequence[int]) -> list[list[int]]:
        """The lines before each prompt: of the edits nearest to it, its own memory's last; none of the base's."""
        likeness = self._directions(query) @ self.keys.T if self.ids else torch.zeros(len(query), 0)
        places = {shard: i for i, shard in enumerate(self.shards.tolist())}
        found = []
        for row, shard in zip(likeness, memory, strict=True):
            shown = [places[int(shard)]] if int(shard) in places else []
            if shown and self.number > 1:
                others = [i for i in row.argsort(descending=True).tolist() if i not in shown][: self.number - 1]
                shown = [*others[::-1], *shown]
            found.append([token for i in shown for token in self.lines[i].tolist() if token >= 0])
        return found

    def fingerprint(self, shard: int) -> str:
        """What a prompt may be given depends on all edits."""
        return f"{shard} {hashlib.sha256(self.lines.numpy().tobytes()).hexdigest()}"

    def _directions(self, query: Query) -> Tensor:
        last = query.last_hidden().cpu()
        return normalize(last - self.centre if len(self.centre) else last, dim=-1)
