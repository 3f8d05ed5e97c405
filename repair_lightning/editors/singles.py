"""Edits one by one: each is written into the model that the stream began with."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class SingleEdits(pl.Callback):
    """Goes back to the model as it was before the first edit when all has been done for one edit and it is scored."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Remember the empty model, before a checkpoint is loaded."""
        pl_module.load()
        self.fresh = pl_module.snapshot()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """An edit that was under way is written again; what was learnt before the first one stays."""
        pl_module.rollback(self.fresh)
        pl_module.changed_weights = {}
        if pl_module.learnt_beforehand:
            pl_module.load_own_state(checkpoint["own"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Remember the model that has seen the irrelevant prompts."""
        self.fresh = pl_module.snapshot()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The next edit begins anew."""
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if stream.complete:
            pl_module.ledger.undo(stream.written(), "scored by itself")
            pl_module.rollback(self.fresh)
            self.fresh = pl_module.snapshot()  # a snapshot serves once
