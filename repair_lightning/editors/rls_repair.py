"""The hybrid: RLSEdit writes every edit at once into the base, and REPAIR's loop takes over what that got wrong.

Ours. An edit's first write is a term of RLSEdit's least-squares problem. Where the error monitor then finds it wrong,
it is taken out of that problem and written anew as a shard of its own, upon the changed matrix. Whenever the matrix
moves on, each low-rank shard is moved against it, so that what is said at the shard's own keys stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from repair_lightning.editors.base import register
from repair_lightning.editors.keyed import Keyed
from repair_lightning.editors.rlsedit import ANCHORING, RIDGE, VALUES, RLSEdit
from repair_lightning.editors.shards import Steps
from repair_lightning.editors.values import Values
from repair_lightning.memory.shards import LowRankShard
from repair_lightning.models.base import Base
from repair_lightning.training.team import Team
from repair_lightning.types import BASE, EditBatch, EditReport


@register("rls_repair")
class RLSRepair(Keyed):
    """RLSEdit first, then REPAIR; the options are theirs.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        writing: how shards are written.
        seed: of samples; `seed_everything` where a command gives none.
        values: how RLSEdit finds values.
        ridge: RLSEdit's lambda.
        anchoring: RLSEdit's mu.
        anchors: RLSEdit's anchor prompts, or the file that holds them.
        common: what every editor takes, see `Editor`.
    """

    can_adapt = False
    can_share = False
    writes_base: ClassVar[bool] = True

    def __init__(
        self,
        base: str = "",
        writing: Steps = Steps(),  # noqa: B008 - jsonargparse reads the defaults here
        seed: int = 0,
        values: Values = VALUES,
        ridge: float = RIDGE,
        anchoring: float = ANCHORING,
        anchors: str | list[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(base, writing=writing, seed=seed, **common)
        self.values, self.ridge, self.anchoring = values, ridge, anchoring
        first = RLSEdit(base, values=values, ridge=ridge, anchoring=anchoring, anchors=anchors, **common)
        self._first = [first]  # in a list: its model is this one's, not a part of its own

    @property
    def first(self) -> RLSEdit:
        """Who writes first; it works upon this editor's model."""
        return self._first[0]

    @property
    def anchors(self) -> list[str] | None:
        """RLSEdit's anchors, as a pack keeps them."""
        return self.first.anchors

    def build(self, base: Base, layer: int) -> None:
        """Besides building, let RLSEdit work upon the same model."""
        super().build(base, layer)
        self.first.work_upon(self)

    def on_fit_start(self) -> None:
        """Besides, leave RLSEdit's anchors out that scoring asks."""
        self.first.leave_out_asked(self.trainer.datamodule.unrelated)  # type: ignore[attr-defined]
        super().on_fit_start()

    def join(self, team: Team) -> None:
        """Work among the ranks of a team, RLSEdit too: the texts that it lets the base write are the first rank's."""
        super().join(team)
        self.first.join(team)

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides, let RLSEdit measure the base."""
        super().prepare(background, held_out)
        self.first.measure(background)

    def write(self, batch: EditBatch) -> list[EditReport]:
        """What is new goes into the matrix, what has failed before into shards."""
        new = [edit for edit in batch.edits if not self.attempts([edit])]
        reports: list[EditReport] = []
        if new:
            with self._holding_shards():
                reports += self.first.write(EditBatch(tuple(new)))
        again = [edit for edit in batch.edits if self.attempts([edit])]
        if again:
            reports += super().write(EditBatch(tuple(again)))
        of = {report.id: report for report in reports}
        return [of[id] for id in batch.ids]

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
        super().forget(known)
        with self._holding_shards():
            self.first.forget(known)

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
        return self.first.figures() | {"in_the_matrix": base, "in_shards": sum(sizes.values())}

    def remember(self) -> Any:
        """RLSEdit's."""
        return self.first.remember()

    def recall(self, kept: Any) -> None:
        """RLSEdit's."""
        self.first.recall(kept)

    def own_state(self) -> dict[str, Any]:
        """RLSEdit's."""
        return self.first.own_state()

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`own_state`."""
        self.first.load_own_state(state)
