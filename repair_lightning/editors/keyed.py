"""Keyed: each edit in a low-rank shard of its own, found by the words and the meaning of what is asked.

Ours, not the paper's: it has none of REPAIR's parts (dense shards of many edits, distillation, routing loss, merge).
What it owes to others: a memory with one entry per edit, looked up by key, is GRACE's (arXiv 2211.11031); shards of a
value matrix beside a frozen base are WISE's (arXiv 2405.14768); the least change of a matrix that maps given keys to
given values is ROME's (arXiv 2202.05262).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from repair_lightning.editors.base import register
from repair_lightning.editors.inner_loop import AskedBack, TargetRows
from repair_lightning.editors.low_rank import LowRankWriter, Outcome, factors_of, shortened
from repair_lightning.editors.shards import ShardEditor, Steps
from repair_lightning.errors import ConfigError
from repair_lightning.memory.routers import Router, make_router
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.types import BASE, Edit, EditBatch, EditReport


@register("keyed")
class Keyed(ShardEditor):
    """One low-rank shard per edit, behind the key router.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        relation_false_rate: share of other questions about a subject, from a bank of our own, that may pass for the one
            that was edited.
        in_text: whether the base reads the edits about a subject before it writes a text about it.
        writing: the inner steps.
        hold: where shards are kept, on the base's `device` or on the `host`, in the CPU's memory: many edits of a large
            base are more than a GPU holds.
        seed: of samples; `seed_everything` where a command gives none.
        common: what every editor takes, see `Editor`.
    """

    def __init__(
        self,
        base: str = "",
        relation_false_rate: float = 0.01,
        in_text: bool = True,
        writing: Steps = Steps(),  # noqa: B008 - jsonargparse reads the defaults here
        hold: Literal["device", "host"] = "device",
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(base, seed, **common)
        if not 0 < relation_false_rate < 1:
            raise ConfigError(f"relation_false_rate must be in (0, 1), got {relation_false_rate}")
        writing.check()
        self.relation_false_rate, self.in_text = relation_false_rate, in_text
        self.writing, self.hold = writing, hold

    def build_memory(self, shape: tuple[int, int]) -> SideMemory:
        """An empty bank that keeps shards in a byte per entry: an edit's target is said with a margin."""
        return SideMemory(shape, host=self.hold == "host", int8=True)

    def build_router(self) -> Router:
        """The key router."""
        return make_router("key", relation_false_rate=self.relation_false_rate, in_text=self.in_text)

    def write(self, batch: EditBatch) -> list[EditReport]:
        """Train the edits side by side; each gets a new shard, unless what came of it is not finite."""
        edits = batch.edits
        if self.cache_mib:  # all forms at once: what comes one by one then finds them
            forms = [*map(self.encode, edits), *(row for _, row in [*self.variants(edits), *self.checks(edits)])]
            self.edited.captures([row.ids for row in forms])
        rows = self._rows(edits)
        budget = self.writing.steps * (1 + self.attempts(edits))
        asked = AskedBack.of(self, edits)
        outcomes = self._asked_back(edits, LowRankWriter(self).train(rows, budget), budget, asked)
        if self.memory.int8:
            outcomes = shortened(outcomes, AskedBack(self, rows), asked, self.writing.margin)
        reports = [self._report(id, outcome) for id, outcome in zip(batch.ids, outcomes, strict=True)]
        stays = [i for i, report in enumerate(reports) if report.error is None]
        prompts = rows.prompts.rows(torch.tensor(stays, dtype=torch.long))
        self.enter([edits[i] for i in stays], [reports[i].shard for i in stays], prompts)
        return reports

    def _report(self, id: str, outcome: Outcome) -> EditReport:
        if not outcome.is_finite():
            reason = f"the loss or the shard was not finite after {outcome.steps} steps: rolled back"
            return EditReport(id, BASE, outcome.loss, 0.0, outcome.steps, error=reason)
        return EditReport(id, self.memory.add(outcome.left, outcome.right), outcome.loss, 0.0, outcome.steps)

    def rewrite(self, batch: EditBatch, shard: int) -> list[EditReport]:
        """Write edits again, each into a new shard."""
        return self.write(batch)

    def written_together(self, edits: Sequence[Edit]) -> int:
        """As many as in a batch."""
        return self.batch_limit(edits)

    def _rows(self, edits: Sequence[Edit], checked: bool = False) -> TargetRows:
        """Rows of the edits in the forms that they are written in; `checked`: also in those they are asked back in."""
        return self.rows(edits, self.variants(edits) + (self.checks(edits) if checked else []))

    def _asked_back(
        self, edits: Sequence[Edit], outcomes: list[Outcome], budget: int, asked: AskedBack | None
    ) -> list[Outcome]:
        """The outcomes where each edit is asked in forms that it was not written in; those that do not hold there
        are written again with these forms among the others."""
        fails = [] if asked is None else asked.fails(factors_of(outcomes, asked.rows))
        if not fails:
            return outcomes
        again = LowRankWriter(self).train(self._rows([edits[i] for i in fails], checked=True), budget)
        renewed = dict(zip(fails, again, strict=True))
        return [renewed.get(i, outcome) for i, outcome in enumerate(outcomes)]

    def finish_window(self) -> None:
        """Besides, an edit that was written again has left its old shard, which goes."""
        self.memory.drop([shard for shard in self.memory.ids if not self.ledger.owns(shard)])
        super().finish_window()
