"""What the ranks of a run give each other when a window is written: reports, keys and shards, as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repair_lightning.memory.shards import LowRankShard
from repair_lightning.training.team import Team
from repair_lightning.types import EditReport

if TYPE_CHECKING:
    from repair_lightning.editors.asked import AskedModel

Packet = tuple[Any, Sequence[Tensor]]  # what goes from rank to rank: plain things, and tensors


def pace(edits: float, seconds: float) -> dict[str, float]:
    """How many edits a rank has written and the seconds that it took, for the report."""
    return {"edits": edits, "seconds": seconds, "edits_per_minute": 60 * edits / max(seconds, 1e-9)}


class Written:
    """What one rank has written of a window so far, and the seconds that it took."""

    def __init__(self) -> None:
        self.reports: list[EditReport] = []
        self.seconds = 0.0
        self._described: list[tuple[list[str], Mapping[str, Tensor]]] = []

    def describe(self, ids: Sequence[str], described: Mapping[str, Tensor]) -> None:
        """What the router is to keep of some edits, once all ranks have written."""
        self._described.append((list(ids), described))

    def exchange(self, editor: AskedModel) -> list[tuple[int, float]]:
        """Give this to all ranks and enter what each has written in ledger, router and bank; returns each rank's number
        of edits and seconds."""
        team, memory, (d, f) = editor.team, editor.memory, editor.memory.shape
        for rank, reports in enumerate(team.gather_objects(self.reports)):
            if rank != team.rank:
                editor.ledger.written(reports)
        known = set(memory.ids)
        touched = list(dict.fromkeys(report.shard for report in self.reports if report.shard in known))
        low = [shard for shard in touched if isinstance(memory[shard], LowRankShard)]
        dense = [shard for shard in touched if shard not in set(low)]

        empty = {"ids": torch.zeros(0).long(), "ranks": torch.zeros(0).long()}
        empty |= {"left": torch.zeros(0, d), "right": torch.zeros(0, f)}
        own = [(True, [tensor.to(memory.device) for tensor in memory.low_rank_tensors(low).values()])] if low else []
        for rank, _, part in _packets(team, own, [tensor.to(memory.device) for tensor in empty.values()]):
            if rank != team.rank:
                memory.load_low_rank(dict(zip(empty, part, strict=True)))
        deltas = [((shard, memory[shard].generation), [memory[shard].delta]) for shard in dense]
        for rank, (shard, generation), (delta,) in _packets(team, deltas, [torch.zeros(0, f, device=memory.device)]):
            if rank != team.rank:
                memory.put_dense(shard, generation, delta)
        nothing = editor.router.describe([], editor.background.rows(slice(0, 0)), [])
        entries = [(ids, [described[name] for name in nothing]) for ids, described in self._described if nothing]
        for _, ids, part in _packets(team, entries, list(nothing.values())):
            editor.router.insert(ids, dict(zip(nothing, part, strict=True)))

        found = team.gather_objects((len(self.reports), self.seconds, memory.next_id))
        memory.next_id = max(next_id for *_, next_id in found)
        return [(edits, seconds) for edits, seconds, _ in found]


def _packets(team: Team, own: Sequence[Packet], nothing: Sequence[Tensor]) -> Iterator[tuple[int, Any, Any]]:
    """The packets of all ranks with the rank, one of each at a time: a dense shard is as large as the value matrix. Who
    has no more gives tensors that are `nothing`."""
    for i in range(max(team.gather_objects(len(own)))):
        head, tensors = own[i] if i < len(own) else (None, nothing)
        for rank, (said, part) in enumerate(zip(team.gather_objects(head), team.gather(*tensors), strict=True)):
            if said is not None:
                yield rank, said, part
