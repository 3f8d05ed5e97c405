"""The bank of shards: which there are, and what a choice of them does to the value matrix's output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from repair_lightning.functional import bernoulli_mask
from repair_lightning.memory.bank import ShardBank
from repair_lightning.memory.shards import Adds, AnyShard, Factors, LowRankShard, Selection, Shard, ValueShard


class SideMemory(ShardBank):
    """The shards by id. Ids are never used twice; a pruned shard keeps its id and starts a new generation.

    Args:
        shape: (D, F) of the value matrix.
        mask_ratio: share of the coordinates that a shard may train (rho); 1 opens all.
        seed: with the shard's id and generation it determines the mask.
        host: keep low-rank shards in the CPU's memory, wherever the rest of the bank is.
        int8: keep new low-rank shards in a byte per entry.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        mask_ratio: float = 1.0,
        seed: int = 0,
        host: bool = False,
        int8: bool = False,
    ) -> None:
        super().__init__(shape, host, int8)
        if not 0 < mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be in (0, 1], got {mask_ratio}")
        self.mask_ratio, self.seed = mask_ratio, seed
        self.turn = (0, 1)
        """Of several banks that open shards side by side: which one this is, and how many there are."""

    def _new_id(self) -> int:
        """The next id that is this bank's to give."""
        place, banks = self.turn
        shard = self.next_id + (place - self.next_id) % banks
        self.next_id = shard + 1
        return shard

    def own(self, shard: int) -> bool:
        """Whether a shard is written by this bank, of those that stand side by side."""
        return shard % self.turn[1] == self.turn[0]

    def open_shard(self) -> int:
        """Add an empty dense shard with a fresh mask; returns its id."""
        shard = self._new_id()
        return self._put(shard, Shard(self.shape, self._mask(shard, 0)))

    def add(self, left: Tensor, right: Tensor) -> int:
        """Add a low-rank shard `left` (D, R) times `right` (R, F); returns its id."""
        return self._put(self._new_id(), self._low_rank_shard(left, right))

    def put(self, shard: int, left: Tensor, right: Tensor) -> None:
        """Replace a shard by another low-rank one, under its id."""
        self._put(shard, self._low_rank_shard(left, right))

    def add_value(self, value: Tensor) -> int:
        """Add a shard that is one output (D,); returns its id."""
        return self._put(self._new_id(), ValueShard(value))

    def put_value(self, shard: int, value: Tensor) -> None:
        """Replace a shard by one that is one output (D,), under its id."""
        self._put(shard, ValueShard(value))

    def put_dense(self, shard: int, generation: int, delta: Tensor) -> None:
        """Take in what another bank has written into a dense shard, a new one or one that is here."""
        if shard not in self:
            self._put(shard, Shard(self.shape, self._mask(shard, generation), generation))
            self._sort()
        self[shard].delta.data.copy_(delta)

    def drop(self, shards: Iterable[int]) -> None:
        """Take shards out for good."""
        for shard in list(shards):
            self._remove(shard)

    def prune(self, shard: int) -> None:
        """Forget what a shard holds: a dense one's delta becomes zero and its mask is drawn anew, another leaves."""
        if not isinstance(self[shard], Shard):
            self.drop([shard])
            return
        generation = self[shard].generation + 1
        self._put(shard, Shard(self.shape, self._mask(shard, generation), generation))

    def fuse(self, shards: Sequence[int], delta: Tensor) -> int:
        """Replace several shards by one new shard that holds `delta` (D, F); returns its id."""
        gone = {shard: self[shard] for shard in shards}  # an unknown id is refused before anything changes
        fused = self.next_id
        self.next_id += 1
        for shard in gone:
            self._remove(shard)
        self._put(fused, Shard(self.shape, None if self.mask_ratio == 1 else delta.ne(0)))
        self[fused].delta.data.copy_(delta)
        return fused

    def stacked(self, shards: Iterable[int] | None = None) -> Tensor:
        """The deltas (K, D, F) of the given shards, by default of all."""
        chosen = [self[shard].delta for shard in (self.ids if shards is None else shards)]
        return torch.stack(chosen) if chosen else torch.zeros(0, *self.shape, device=self.device)

    def select(self, choice: Tensor) -> Selection:
        """What a choice (B,) of shard ids, `BASE` or `READS` does to the value matrix's output."""
        return selection_of([None if shard < 0 else self[shard] for shard in choice.tolist()], self.device)

    def _mask(self, shard: int, generation: int) -> Tensor | None:
        if self.mask_ratio == 1:
            return None
        generator = torch.Generator().manual_seed(
            ((self.seed * 1_000_003 + shard) * 1_000_003 + generation) % (1 << 63)
        )
        return bernoulli_mask(self.shape, self.mask_ratio, generator)


def selection_of(rows: Sequence[AnyShard | None], device: torch.device) -> Selection:
    """What shards do to the value matrix's output, one for each of B rows; None is the base."""
    wanted = {id(shard): shard for shard in rows if shard is not None}
    if len(wanted) == 1 and None not in rows and not isinstance(rows[0], ValueShard):
        return Selection(len(rows), [(rows[0], None)])  # type: ignore[list-item]

    def of(kind: type[Any]) -> tuple[list[Any], Tensor]:
        """The shards of a kind, row by row, and the rows (n,)."""
        found = [i for i, shard in enumerate(rows) if isinstance(shard, kind)]
        return [rows[i] for i in found], torch.tensor(found, device=device)

    dense, low, values = of(Shard), of(LowRankShard), of(ValueShard)
    parts: list[tuple[Adds, Tensor | None]] = []
    for shard in dict.fromkeys(dense[0]):
        parts.append((shard, torch.tensor([i for i, one in enumerate(rows) if one is shard], device=device)))
    if low[0]:
        parts.append((Factors(low[0], device), low[1]))
    replaced = (torch.stack([one.value for one in values[0]]).to(device), values[1]) if values[0] else None
    return Selection(len(rows), parts, replaced)
