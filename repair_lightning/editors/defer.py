"""DEFER: a trained gate hands prompts over to a small second model, which is trained on all edits so far.

SERAC ("Memory-Based Model Editing at Scale", arXiv 2206.06520) puts a scope classifier before a counterfactual model;
DEFER is its relative without an editing dataset, a baseline of GRACE (arXiv 2211.11031, Sec. 4.1): a gate and a new
head upon what enters a layer's value matrix. Here the head is a trained copy of the value matrix, which a prompt that
was handed over gets at every token; and the gate also sees what enters the layer.

Each batch trains the copy on its edits, on edits drawn from those so far, and on irrelevant prompts with the base's own
answers, so that what is handed over by mistake is answered as before. The gate is trained again when a window is over.

Defaults: `grace/config/editor/defer.yaml` of github.com/Thartvigsen/GRACE, but a rate of 1e-3: their 0.1 is for a head
from scratch. Deviations: theirs mixes head and layer by the gate while training, and trains on the latest edit alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from repair_lightning.editors.base import KEPT, WholeEditor, register
from repair_lightning.editors.checks import at_least, positive, share
from repair_lightning.editors.inner_loop import TargetRows, TargetTail, descend, tail_of
from repair_lightning.memory.routers import Router, make_router
from repair_lightning.memory.shards import Selection, Shard
from repair_lightning.types import Edit, EditReport


@register("defer")
class Defer(WholeEditor):
    """A gate and a second value matrix.

    Args:
        lr: of Adam, absolute.
        steps: most steps per batch.
        stop_margin: a batch is done once every target token of its own leads its best rival by this many nats; None
            takes all steps.
        replay: most earlier edits beside a batch.
        irrelevant: most irrelevant prompts beside it.
        threshold: the least probability of being in scope that hands a prompt over.
        false_fire_rate: share of held-out irrelevant prompts that may be handed over.
        seed: of what is drawn; `seed_everything` where a command gives none.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        steps: int = 100,
        stop_margin: float | None = 2.0,
        replay: int = 128,
        irrelevant: int = 32,
        threshold: float = 0.5,
        false_fire_rate: float = 0.01,
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.lr, self.steps, self.stop_margin, self.seed = lr, steps, stop_margin, seed
        self.replay, self.irrelevant = replay, irrelevant
        self.threshold, self.false_fire_rate = threshold, false_fire_rate
        positive(self, "lr")
        at_least(1, self, "steps")
        at_least(0, self, "replay", "irrelevant")
        share(self, "threshold", "false_fire_rate")

    def build_router(self) -> Router:
        """A trained gate."""
        return make_router("gate", threshold=self.threshold, false_fire_rate=self.false_fire_rate)

    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Besides, take the base's own answers to irrelevant prompts, and find how much of it a step must run."""
        super().prepare(background, held_out)
        self.said = self.said_by_base(self.background_prompts[:KEPT])
        self.tail = tail_of(self)

    def change(self, edits: Sequence[Edit]) -> list[EditReport]:
        """Train the second matrix, a shard of the bank."""
        shard = self.memory.ids[0] if len(self.memory) else self.memory.open_shard()
        module, rows = self.memory[shard], self.rows_beside(edits, shard)
        assert isinstance(module, Shard)
        optimizer = torch.optim.Adam([module.delta], lr=self.lr)
        tail = TargetTail(self.edited.split, rows, self.tail)

        def done(_: int, logits: Tensor, losses: Tensor) -> bool:
            return bool(rows.lead(logits, self.stop_margin).all())

        with tail.cut(), self.edited.forced(Selection(len(rows), [(module, None)])):
            steps, losses = descend(rows, lambda: tail(module.product)[0], optimizer, self.steps, done, torch.mean)
        optimizer.zero_grad()
        return [EditReport(edit.id, shard, loss, 0.0, steps) for edit, loss in zip(edits, losses, strict=True)]

    def rows_beside(self, edits: Sequence[Edit], shard: int) -> TargetRows:
        """A batch's rows, and behind them those of earlier edits and of irrelevant prompts."""
        ids = [edit.id for edit in edits]
        earlier = [id for id in self.ledger.owned_by(shard) if id not in ids]
        draw = random.Random(f"{self.seed}/{ids[0]}")
        again = [self.encode(self.ledger.edit(id)) for id in draw.sample(earlier, min(self.replay, len(earlier)))]
        other = draw.sample(self.said, min(self.irrelevant, len(self.said)))
        return TargetRows.of(self.edited, [*map(self.encode, edits), *again, *other], len(edits))

    def finish_window(self) -> None:
        """Train the gate again, on all edits that the second matrix owns."""
        self.calibrate()

    def forget(self, ids: Iterable[str]) -> None:
        """The next gate is trained without them; what the second matrix holds of them stays until others replace it."""
