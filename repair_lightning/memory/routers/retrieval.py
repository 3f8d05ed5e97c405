"""Retrieval: which edits the base is to read before a prompt.

No shard does anything here; a memory that answers is an edit whose text the base reads first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers.base import Anchor, Router, of_all
from repair_lightning.memory.routers.key import KeyRouter
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE


class FactsRouter(KeyRouter):
    """The key router as a retriever: the edits whose subject a prompt names, whatever it asks of it.

    Args:
        number: of edits that the base reads before a prompt, those that ask the same last.
    """

    name = "facts"
    vouches: ClassVar[bool] = False  # the base may say what it likes of what it reads
    prefaces: ClassVar[bool] = True

    def __init__(self, number: int = 1) -> None:
        super().__init__()
        self.number = number

    def route(self, query: Query, memory: SideMemory) -> Choice:
        """The edit that is most likely asked for, where any is named."""
        found = Choice.base(len(query))
        nearest: list[str | None] = [None] * len(query)
        for row, ranked in self.ranked(query.texts).items():
            score, number = ranked[-1][-2], int(ranked[-1][-1])
            found.memory[row], nearest[row] = self.shards[self._place(number)], self._ids[number]
            found.score[row], found.threshold[row] = score, -2.0  # to be named is enough
        return replace(found, nearest=tuple(nearest))

    def preface(self, query: Query, memory: Sequence[int]) -> list[list[str]]:
        """The edits that each prompt names, its own memory's last; none where the base answers alone."""
        ranked, of_shard = self.ranked(query.texts), dict(zip(self.shards.tolist(), self.ids, strict=True))
        found = []
        for row, shard in enumerate(memory):
            own = [of_shard[shard]] if shard in of_shard else []
            named = [self._ids[int(rank[-1])] for rank in ranked.get(row, ())] if own else []
            others = [id for id in dict.fromkeys(named) if id not in own]
            found.append([*others, *own][-self.number :])
        return found

    def fingerprint(self, shard: int) -> str:
        """What a prompt may be given depends on all edits."""
        return of_all(shard, self.ids)


class RetrievalRouter(Router):
    """The nearest edit by the cosine of the prompts' last states, centred on irrelevant prompts.

    Args:
        number: of edits that the base reads before a prompt, the nearest last.
        false_fire_rate: share of the held-out irrelevant prompts that may get anything.
    """

    name = "retrieval"
    needs_owned = False
    prefaces = True
    remembered = ("ids", "threshold", "keys", "shards", "centre")

    def __init__(self, number: int = 1, false_fire_rate: float = 0.01) -> None:
        self.number, self.false_fire_rate = number, false_fire_rate
        self.ids: list[str] = []
        self.keys, self.shards = torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)
        self.centre = torch.zeros(0)
        self.threshold = 2.0  # which no cosine exceeds

    def fit(self, background: Query) -> None:
        """What is common to all prompts."""
        self.centre = background.last_hidden().mean(0).cpu()

    def describe(self, anchors: Sequence[Anchor], prompts: Query, shards: Sequence[int]) -> dict[str, Tensor]:
        """Each edit's direction and shard."""
        return {"keys": self._directions(prompts), "shards": torch.tensor(list(shards), dtype=torch.long)}

    def insert(self, ids: Sequence[str], described: Mapping[str, Tensor]) -> None:
        """Take in edits."""
        self.forget(ids)
        self.ids = [*self.ids, *ids]
        self.keys = torch.cat([self.keys.reshape(-1, described["keys"].shape[1]), described["keys"]])
        self.shards = torch.cat([self.shards, described["shards"]])

    def forget(self, ids: Sequence[str]) -> None:
        """Drop edits."""
        gone = set(ids)
        keep = torch.tensor([id not in gone for id in self.ids], dtype=torch.bool)
        if not keep.all():
            self.ids = [id for id in self.ids if id not in gone]
            self.keys, self.shards = self.keys[keep], self.shards[keep]

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

    def preface(self, query: Query, memory: Sequence[int]) -> list[list[str]]:
        """The edits nearest to each prompt, its own memory's last; none where the base answers alone."""
        likeness = self._directions(query) @ self.keys.T if self.ids else torch.zeros(len(query), 0)
        places = {shard: i for i, shard in enumerate(self.shards.tolist())}
        found = []
        for row, shard in zip(likeness, memory, strict=True):
            shown = [places[int(shard)]] if int(shard) in places else []
            if shown and self.number > 1:
                others = [i for i in row.argsort(descending=True).tolist() if i not in shown][: self.number - 1]
                shown = [*others[::-1], *shown]
            found.append([self.ids[i] for i in shown])
        return found

    def fingerprint(self, shard: int) -> str:
        """What a prompt may be given depends on all edits."""
        return of_all(shard, self.ids)

    def _directions(self, query: Query) -> Tensor:
        last = query.last_hidden().cpu()
        return normalize(last - self.centre if len(self.centre) else last, dim=-1)
