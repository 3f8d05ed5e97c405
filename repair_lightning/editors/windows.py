"""How an editor runs under Lightning: one epoch is one window of the stream, one training step writes one batch."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch

from repair_lightning.editors.asked import AskedModel
from repair_lightning.editors.exchange import Pace, Written
from repair_lightning.editors.singles import SingleEdits
from repair_lightning.errors import RepairError
from repair_lightning.training.team import ALONE
from repair_lightning.types import EditBatch, EditReport


class WindowModule(AskedModel):
    """Drives windows; what is done in them is the method's.

    Attributes:
        guard_prompts: irrelevant prompts that neither writing nor thresholds have seen.
        written: what this rank has written of the window, where the ranks share its batches.
        paces: per rank, what it wrote and how long that took; empty for a team of one.
    """

    guard_prompts: Sequence[str] = ()
    written: Written | None = None
    paces: Sequence[Pace] = ()

    def configure_callbacks(self) -> list[pl.Callback]:
        """What goes back to the start after each edit, where the stream's edits are scored one by one."""
        return [SingleEdits()] if self.trainer.datamodule.singles else []  # type: ignore[attr-defined]

    @abstractmethod
    def prepare(self, background: Sequence[str], held_out: Sequence[str]) -> None:
        """Take in irrelevant prompts, before the first edit."""

    @abstractmethod
    def write(self, batch: EditBatch) -> list[EditReport]:
        """Write one batch into the memory; one report per edit."""

    @abstractmethod
    def finish_window(self) -> None:
        """Called when a window's last batch is written."""

    def configure_model(self) -> None:
        """Lightning's hook for building the model."""
        self.load()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimiser that each write binds to its shard; between writes it holds a placeholder."""
        return self.build_optimizer([torch.nn.Parameter(torch.zeros(0))])

    def build_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of the inner steps; methods without any never step it."""
        return torch.optim.SGD(parameters, lr=1.0)

    def train(self, mode: bool = True) -> WindowModule:
        """Shards may train; the base stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.base is not None:
            self.base.model.eval()
        return self

    def on_fit_start(self) -> None:
        """Share the stream's ledger and learn what is irrelevant."""
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        self.ledger = stream.ledger
        self.join(getattr(self.trainer.strategy, "team", ALONE))
        train, calibrate, self.guard_prompts = stream.irrelevant_parts(self)
        self.prepare(train, calibrate)
        self.change_base()  # of a resumed run or a pack; until here the base was asked as it was

    def training_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Write one batch and enter what came of it in the ledger; after the last one ranks exchange their work."""
        if self.shares:
            self.written = self.written or Written()
            self.written.begin()
        if batch.edits:  # empty ones fill up a rank that has fewer than others
            reports = self.write(batch)
            if sorted(report.id for report in reports) != sorted(batch.ids):
                raise RepairError(
                    f"{type(self).__name__}.write must return one report for each edit of its batch; got "
                    f"{[report.id for report in reports][:5]} for {list(batch.ids[:5])}"
                )
            self.ledger.written(reports)
            self.log_losses(reports)
            if self.written is not None:
                self.written.add(reports)
        if self.trainer.is_last_batch:
            if self.written is not None:
                self.exchange(self.written)
            self.finish_window()
            if self.writes_base and self.team.size > 1:  # each rank has written all edits: a GPU's last bits may differ
                found = self.edited.weights.state()
                self.edited.weights.load({layer: self.team.of_first(value) for layer, value in found.items()})

    def exchange(self, written: Written) -> None:
        """Give all ranks what each has written of a window, and take in what the others have."""
        self.written = None
        parts = written.exchange(self)
        self.paces = [known.plus(new) for known, new in zip(self.paces or [Pace()] * len(parts), parts, strict=True)]
        for rank, pace in enumerate(parts):
            self.log(f"rank/{rank}/edits_per_minute", pace.per_minute, batch_size=1)

    def log_losses(self, reports: Sequence[EditReport]) -> None:
        """The batch's mean losses to the loggers."""
        size = len(reports)
        self.log("write/loss", sum(report.loss for report in reports) / size, batch_size=size)
        self.log("write/kd", sum(report.kd for report in reports) / size, batch_size=size)
        self.log("write/steps", float(reports[0].steps), batch_size=size)

    def log_now(self, values: Mapping[str, float]) -> None:
        """Values to the loggers at once, for hooks in which Lightning's `log` is closed."""
        if self._trainer is None:
            return
        edits = float(len(self.trainer.datamodule.written()))  # type: ignore[attr-defined]
        for logger in self.trainer.loggers:
            logger.log_metrics({"edits": edits, **values}, step=self.trainer.fit_loop.total_batch_idx)

    def on_train_epoch_end(self) -> None:
        """After the callbacks: the ranks make sure that they have all decided alike, and stop when nothing is left."""
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.team.size > 1:
            self.team.same("what became of the window", json.dumps([stream.verdict(), self.memory.ids[-64:]]))
        if stream.exhausted:
            self.trainer.should_stop = True
