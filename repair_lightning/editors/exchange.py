"""What the ranks of a run give each other when a window is written: reports, keys and shards, as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repair_lightning.memory.shards import LowRankShard
from repair_lightning.types import EditReport

if TYPE_CHECKING:
    from repair_lightning.editors.asked import AskedModel


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
        for rank, reports in enumerate(editor.team.gather_objects(self.reports)):
            if rank != editor.team.rank:
                editor.ledger.written(reports)
        known = set(editor.memory.ids)
        touched = dict.fromkeys(report.shard for report in self.reports if report.shard in known)
        low = [shard for shard in touched if isinstance(editor.memory[shard], LowRankShard)]
        self._exchange_low_rank(editor, low)
        self._exchange_dense(editor, [shard for shard in touched if shard not in set(low)])
        self._exchange_entries(editor)
        found = editor.team.gather_objects((len(self.reports), self.seconds, editor.memory.next_id))
        editor.memory.next_id = max(next_id for *_, next_id in found)
        return [(edits, seconds) for edits, seconds, _ in found]

    @staticmethod
    def _exchange_low_rank(editor: AskedModel, shards: Sequence[int]) -> None:
        memory, (d, f) = editor.memory, editor.memory.shape
        empty = {"ids": torch.zeros(0).long(), "ranks": torch.zeros(0).long()}
        kind = torch.int8 if memory.int8 else torch.float32
        empty |= {"left": torch.zeros(0, d, dtype=kind), "right": torch.zeros(0, f, dtype=kind)}
        empty |= {"scale": torch.zeros(0)} if memory.int8 else {}
        tensors = memory.low_rank_tensors(shards) or empty
        for rank, part in enumerate(editor.team.gather(*(tensors[name].to(memory.device) for name in empty))):
            if rank != editor.team.rank and len(part[0]):
                memory.load_low_rank(dict(zip(empty, part, strict=True)))

    @staticmethod
    def _exchange_dense(editor: AskedModel, shards: Sequence[int]) -> None:
        """One shard of each rank at a time: a dense one is as large as the value matrix."""
        memory, team = editor.memory, editor.team
        for i in range(max(team.gather_objects(len(shards)))):
            shard = memory[shards[i]] if i < len(shards) else None
            head = torch.tensor([] if shard is None else [shards[i], shard.generation], dtype=torch.long)
            delta = torch.zeros(0, memory.shape[1], device=memory.device) if shard is None else shard.delta
            for rank, (known, values) in enumerate(team.gather(head, delta)):
                if rank != team.rank and len(known):
                    id, generation = known.tolist()
                    memory.put_dense(id, generation, values)

    def _exchange_entries(self, editor: AskedModel) -> None:
        nothing = editor.router.describe([], editor.background.rows(slice(0, 0)), [])
        names = list(nothing)
        for i in range(max(editor.team.gather_objects(len(self._described)))):
            ids, described = self._described[i] if i < len(self._described) else ([], nothing)
            named = editor.team.gather_objects(ids)
            if not names:
                continue
            for owners, part in zip(named, editor.team.gather(*(described[name] for name in names)), strict=True):
                if owners:
                    editor.router.insert(owners, dict(zip(names, part, strict=True)))
