"""The hybrid: RLSEdit writes every edit at once into the base, and REPAIR's loop takes over what that got wrong.

Ours. Where the error monitor finds an edit wrong, it is taken out of RLSEdit's problem and written again as a shard of
its own, upon the changed matrix. Whenever the matrix moves on, each low-rank shard is moved against it, so that what is
said at the shard's own keys stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from repair_lightning.editors.base import register
from repair_lightning.editors.keyed import Keyed
from repair_lightning.editors.rlsedit import ANCHORING, RIDGE, VALUES, RLSEdit
from repair_lightning.editors.shards import Steps
from repair_lightning.editors.values import Values
from repair_lightning.memory.shards import LowRankShard
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE, EditBatch, EditReport


@register("rls_repair")
class RLSRepair(Keyed, RLSEdit):
    """RLSEdit first, then REPAIR; the options are theirs.

    Args:
        relation_false_rate: see `Keyed`.
        writing: how shards are written.
        hold: see `Keyed`.
        seed: of samples; `seed_everything` where a command gives none.
        values: how RLSEdit finds values.
        ridge: RLSEdit's lambda.
        anchoring: RLSEdit's mu.
        anchors: RLSEdit's anchor prompts, or the file that holds them.
    """

    can_adapt = False
    can_share = False

    def __init__(
        self,
        relation_false_rate: float = 0.01,
        writing: Steps = Steps(),  # noqa: B008 - jsonargparse reads the defaults here
        hold: Literal["device", "host"] = "device",
        seed: int = 0,
        values: Values = VALUES,
        ridge: float = RIDGE,
        anchoring: float = ANCHORING,
        anchors: str | list[str] | None = None,
        **common: Any,
    ) -> None:
        keyed: dict[str, Any] = {"relation_false_rate": relation_false_rate, "writing": writing, "hold": hold}
        rls: dict[str, Any] = {"values": values, "ridge": ridge, "anchoring": anchoring, "anchors": anchors}
        super().__init__(**keyed, **rls, seed=seed, layers=1, **common)

    def build_memory(self, shape: tuple[int, int]) -> SideMemory:
        """An empty bank in float32: shards follow the matrix again and again, and rounding would add up."""
        return SideMemory(shape, host=self.hold == "host")

    def write(self, batch: EditBatch) -> list[EditReport]:
        """What is new goes into the matrix, what has failed before into shards."""
        new = tuple(edit for edit in batch.edits if not self.attempts([edit]))
        again = tuple(edit for edit in batch.edits if edit not in new)
        reports: list[EditReport] = []
        if new:
            with self._holding_shards():
                reports += RLSEdit.write(self, EditBatch(new))
        if again:
            reports += Keyed.write(self, EditBatch(again))
        return sorted(reports, key=lambda report: batch.ids.index(report.id))

    @contextmanager
    def _holding_shards(self) -> Iterator[None]:
        """Inside, the matrix may move: afterwards every shard adds to it what gives the same at its own keys."""
        before = self.edited.weights.matrix(self.layer)
        yield
        moved = self.edited.weights.matrix(self.layer) - before
        if not moved.any():
            return
        for id in self.memory.ids:
            shard = self.memory[id]
            assert isinstance(shard, LowRankShard)
            keys = torch.linalg.pinv(shard.right).T  # the dual of the dual basis
            self.memory.put(id, shard.left - (moved @ keys.to(moved).T).to(shard.left), shard.right)

    def forget(self, ids: Iterable[str]) -> None:
        """Neither a shard nor a term of the problem answers for the edits any more."""
        known = list(ids)
        Keyed.forget(self, known)
        with self._holding_shards():
            RLSEdit.forget(self, known)

    def undo(self, ids: Sequence[str]) -> list[str]:
        """Take edits back, from the problem or with their shard."""
        inside = [id for id in ids if self.ledger.owner_of(id) == BASE]
        if inside:
            self.ledger.undo(inside, "taken back on request")
            self.forget(inside)
        return super().undo([id for id in ids if id not in set(inside)])

    def figures(self) -> dict[str, Any]:
        """RLSEdit's, and how many edits each of the two holds."""
        sizes = self.ledger.sizes()
        base = sizes.pop(BASE, 0)
        return super().figures() | {"in_the_matrix": base, "in_shards": sum(sizes.values())}
