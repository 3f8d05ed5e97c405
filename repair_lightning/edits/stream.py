"""The stream of edits as a LightningDataModule: an epoch is a window, its batches are homogeneous clusters.

Each window's worklist is sized and holds the arrivals, the residual pool and what the closed loop requeued; nothing
of the future is looked at. Everything waits in the ledger, so nothing is lost between windows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader

from repair_lightning.edits.clustering import form_batches
from repair_lightning.edits.joining import Joined
from repair_lightning.edits.ledger import EditStatus, LedgerEntry
from repair_lightning.edits.source import EditSource
from repair_lightning.errors import ConfigError, RepairError
from repair_lightning.types import Edit, EditBatch
from repair_lightning.world import WORLD

log = logging.getLogger(__name__)


class EditStream(EditSource):
    """Edits in the order in which they arrive, `window` of them at a time.

    Args:
        path: a local file, a hub data set, or `world` for the embedded one.
        format: of the records, see `repair_lightning.edits.formats`.
        max_edits: take the first so many good records.
        on_bad_record: `stop` writes nothing when a record is bad, `skip` writes the good ones and lists the bad ones.
        window: edits that arrive and are handled together; 1 is the paper's strict stream.
        batch_size: most edits of a batch.
        clustering: form batches by the similarity of the base's features; else in the order of arrival.
        irrelevant: file of unrelated questions, `world` for the embedded ones; None lets the base write its own.
        irrelevant_prefix: put before each of them.
        max_irrelevant: take so many of them; half train, a quarter calibrates the router, a quarter guards.
        sample_seed: draw `max_edits` of the good records at random with this seed, None takes the first; they arrive in
            the file's order, and a larger draw holds every smaller one of its seed.
        singles: every edit by itself: a window holds one, and when all has been done for it and it is scored, the
            editor goes back to the model that it began with. Scores are then means over single edits (N = 1).
    """

    max_regroups = 2
    """An edit that left this many batches is written alone."""

    def __init__(
        self,
        path: str = WORLD,
        format: str = "jsonl",
        max_edits: int | None = None,
        on_bad_record: Literal["stop", "skip"] = "stop",
        window: int = 128,
        batch_size: int = 128,
        clustering: bool = True,
        irrelevant: str | None = None,
        irrelevant_prefix: str = "",
        max_irrelevant: int = 1000,
        sample_seed: int | None = None,
        singles: bool = False,
    ) -> None:
        super().__init__(
            path, format, max_edits, on_bad_record, irrelevant, irrelevant_prefix, max_irrelevant, sample_seed
        )
        for name, value in (("window", window), ("batch_size", batch_size), ("max_irrelevant", max_irrelevant)):
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}")
        self.window, self.batch_size = 1 if singles else window, batch_size
        self.singles, self.clustering = singles, clustering
        self.arrived = 0
        self._open: list[EditBatch] = []  # handed out; still the same as long as nothing of it was written
        self._open_entries: dict[str, LedgerEntry] = {}

    def train_dataloader(self) -> DataLoader:
        """The next window's batches. Lightning asks for it at the start of every epoch, and twice when it resumes.

        Where ranks share the work, each gets its own, and as many as the others: empty ones fill up.
        """
        if not self._open or any(self.ledger.entry(id) is not entry for id, entry in self._open_entries.items()):
            self._open = self.next_window()
            self._open_entries = {id: self.ledger.entry(id) for batch in self._open for id in batch.ids}
        return DataLoader(self._dealt(self._open), batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]

    def _dealt(self, batches: list[EditBatch]) -> list[EditBatch]:
        """This rank's batches: the longest go round first."""
        editor = self._editor
        if not editor.shares:
            return batches
        costs = [float(sum(len(editor.encode(edit).target) for edit in batch.edits)) for batch in batches]
        mine = [batches[i] for i in editor.team.mine(len(batches), costs)]
        return mine + [EditBatch(())] * (-(-len(batches) // editor.team.size) - len(mine))

    def verdict(self) -> list[Any]:
        """What became of the window's edits and of the stream, in plain types: the same on every rank."""
        entries = [self.ledger.entry(id) for batch in self._open for id in batch.ids]
        known = [[entry.edit.id, str(entry.status), entry.shard, entry.attempts, entry.score] for entry in entries]
        return [self.ledger.counts(), self.arrived, self.windows, known]

    def next_window(self) -> list[EditBatch]:
        """Let the next edits arrive and form batches of all that waits to be written."""
        number = 0 if self.singles and self.waiting() else self.window
        coming = self.edits[self.arrived : self.arrived + number]
        self._arrive(coming)
        self.arrived += len(coming)
        self.windows += 1
        waiting = self.waiting()
        alone = [id for id in waiting if self.ledger.entry(id).regroups >= self.max_regroups]
        batches = [EditBatch((self.ledger.edit(id),)) for id in alone]
        together = [self.ledger.entry(id) for id in waiting if id not in set(alone)]
        for attempts in sorted({entry.attempts for entry in together}, reverse=True):
            # What failed together is not written together again: the editor grants it less company.
            batches[:0] = self._batches([entry.edit for entry in together if entry.attempts == attempts])
        return batches

    def _arrive(self, coming: Sequence[Edit]) -> None:
        """Enter arrivals in the ledger, each behind the edits that it supersedes."""
        assert self.records is not None
        replaced = {edit.id: edit for edit in self.records.superseded_edits}
        expected: dict[str, list[str]] = {edit.id: [] for edit in coming}
        for id, newer in self.records.superseded.items():
            if newer in expected:
                expected[newer].append(id)
        arriving = [[*(replaced[id] for id in expected[edit.id] if id in replaced), edit] for edit in coming]
        self.ledger.arrive([edit for group in arriving for edit in group], self.windows)
        for newer, older in expected.items():
            for id in older:
                self.ledger.supersede(id, newer)
            written = [id for id in older if id not in replaced]  # into an earlier model
            if written:
                self._editor.forget(written)

    def waiting(self) -> list[str]:
        """Ids of the edits that no shard holds yet."""
        return self.ledger.with_status(EditStatus.PENDING, EditStatus.RESIDUAL, EditStatus.REQUEUED)

    def _batches(self, edits: Sequence[Edit]) -> list[EditBatch]:
        share = -(-len(edits) // self._editor.team.size) if self._editor.shares else len(edits)
        size = max(1, min(self.batch_size, self._editor.batch_limit(edits), share))
        if not self.clustering or len(edits) <= 1 or size == 1:
            groups = [list(range(at, min(at + size, len(edits)))) for at in range(0, len(edits), size)]
        else:
            features = self._editor.features(edits)
            finite = np.isfinite(features).all(-1)  # where it is not, the base makes nothing of the edit: it goes alone
            groups = [[int(i)] for i in np.flatnonzero(~finite)]
            like = np.flatnonzero(finite).tolist()
            found = form_batches(features[finite], size) if like else []
            groups += [[like[i] for i in group] for group in found]
        return [EditBatch(tuple(edits[i] for i in group)) for group in groups]

    @property
    def _editor(self) -> Any:  # an `Editor`, whose part of the house may import this one and not be imported
        return self.trainer.lightning_module  # type: ignore[union-attr]

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to arrive or to be written."""
        return self.arrived >= len(self.edits) and not self.waiting()

    @property
    def complete(self) -> bool:
        """Whether nothing that has arrived waits, and nothing else will join it: at the end, or of a single edit."""
        return self.exhausted or (self.singles and not self.waiting())

    def transfer_batch_to_device(self, batch: EditBatch, device: Any, dataloader_idx: int) -> EditBatch:
        """Batches are plain text and stay where they are."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream and the ledger; where a journal holds it, only how many edits are in which state."""
        return {
            "ledger": {"counts": self.ledger.counts()} if self.ledger.journal else self.ledger.state_dict(),
            "arrived": self.arrived,
            "windows": self.windows,
            "joined": asdict(self.joined) if self.joined else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            RepairError: the ledger, rebuilt from its journal, is not the one that was saved.
        """
        if state_dict.get("joined"):
            self._follow(Joined(**state_dict["joined"]))
        saved = state_dict["ledger"]
        if "counts" not in saved:
            self.ledger.load_state_dict(saved)
        elif saved["counts"] != self.ledger.counts():
            both = (self.ledger.counts(), saved["counts"])
            told, known = (", ".join(f"{n} {status}" for status, n in counts.items() if n) or "none" for counts in both)
            raise RepairError(
                f"the journal is damaged: it tells of edits {told}, the checkpoint of {known}; restore it from a copy, "
                "or --overwrite starts the run anew"
            )
        self.arrived, self.windows = state_dict["arrived"], state_dict["windows"]
        self._open, self._open_entries = [], {}
