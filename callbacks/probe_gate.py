"""The gate before a window counts: unrelated questions must keep the base's own answers, and so must most other
questions about the subjects that were edited.

Not in the paper. It stands before the error monitor: what the window wrote is asked about only once it may stay, and a
merge finds nothing that has not passed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from repair_lightning.edits.ledger import EditStatus, Ledger
from repair_lightning.errors import counted
from repair_lightning.scoring.probes import guard_questions
from repair_lightning.scoring.protocols import answers
from repair_lightning.types import BASE

from .editing import Editing, Remembering, stream_of

log = logging.getLogger(__name__)


class ProbeGate(Remembering):
    """Rolls a window back that breaks too many probes; its edits are written again, or quarantined.

    Args:
        enabled: off lets every window pass.
    """

    sample = 256
    """Most probes that are asked, of the irrelevant prompts that nothing else sees."""
    max_probe_loss = 0.02
    """Highest share of them that may lose the base's answer."""
    subjects = 64
    """Most questions about the window's subjects."""
    max_subject_loss = 0.2
    """Highest share of these that may lose the base's answer: which of them ask for the edit itself is not known."""
    max_attempts = 4
    """Writes of an edit whose window was rolled back before it is quarantined."""
    kept = ("rolled_back",)

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.prompts: list[str] = []
        self.expected: dict[str, str] = {}
        self.rolled_back = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Remember how things stand, and what is broken already."""
        if not self.enabled:
            return
        stream = stream_of(trainer)
        self.before = pl_module.snapshot()
        self.attempts = {id: stream.ledger.entry(id).attempts for id in stream.ledger}
        self.prompts = list(pl_module.guard_prompts[: self.sample])
        self.broken = self._broken(self.prompts, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Ask, and take the window back where too much has changed."""
        if not self.enabled:
            return
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        new = [stream.ledger.edit(id) for id in self._written(stream.ledger)]
        about = stream.unrelated(guard_questions(pl_module.anchors_of(new), self.subjects))
        broken, hijacked = self._broken(self.prompts, pl_module), self._broken(about, pl_module)
        share, share_about = len(broken) / len(self.prompts), len(hijacked) / max(len(about), 1)
        pl_module.log("gate/probe_loss", share, batch_size=len(self.prompts))
        pl_module.log("gate/subject_loss", share_about, batch_size=max(len(about), 1))
        pl_module.team.same("which probes lost their answer", str(sorted((broken | hijacked).items())))
        if share > self.max_probe_loss and len(broken) > len(self.broken):
            limit = f"more than {self.max_probe_loss}"
            self._roll_back(broken, f"{share:.3f} of the probes lost their answer", limit, pl_module)
        elif share_about > self.max_subject_loss:
            reason = f"{share_about:.3f} of other questions about its subjects lost their answer"
            self._roll_back(hijacked, reason, f"more than {self.max_subject_loss}", pl_module)
        del self.before

    def _written(self, ledger: Ledger) -> list[str]:
        """The edits that the window has written."""
        stored = ledger.with_status(EditStatus.WRITTEN, EditStatus.FAILED)
        return [id for id in stored if ledger.entry(id).attempts > self.attempts.get(id, 0)]

    def _roll_back(self, broken: dict[str, int], reason: str, limit: str, editor: Editing) -> None:
        """Undo the window's writes. Its edits wait again; those that broke the probes, only so many times."""
        ledger = editor.ledger
        written = self._written(ledger)
        guilty = {id for shard in set(broken.values()) for id in ledger.owned_by(shard)} & set(written)
        editor.rollback(self.before)
        spent = [id for id in guilty or written if ledger.entry(id).attempts >= self.max_attempts]
        again = [id for id in written if id not in set(spent)]
        editor.forget(again + spent)
        innocent = {id: self.attempts.get(id, 0) for id in again if guilty and id not in guilty}
        ledger.requeue(again, f"window rolled back: {reason}", innocent)
        ledger.quarantine(spent, f"{reason} in each of {self.max_attempts} attempts")
        editor.finish_window()
        self.rolled_back += 1
        said = f"{reason}, {limit}; {counted(len(again), 'edit')} to be written again"
        log.warning("window rolled back: %s, %d quarantined", said, len(spent))

    def _broken(self, prompts: Sequence[str], editor: Editing) -> dict[str, int]:
        """Each prompt that is not answered as by the base -> the memory that answers it."""
        if not prompts:
            return {}
        chosen = editor.choose(prompts).memory.cpu()
        at = [i for i, memory in enumerate(chosen.tolist()) if memory != BASE or editor.base_changed]
        found = answers(editor.edited, [prompts[i] for i in at], chosen[at], max_new_tokens=8)
        new = [prompts[i] for i in at if prompts[i] not in self.expected]
        with editor.edited.weights.originals():
            said = answers(editor.edited, new, torch.full((len(new),), BASE), max_new_tokens=8)
        self.expected |= dict(zip(new, said, strict=True))
        pairs = zip(at, found, strict=True)
        return {prompts[i]: int(chosen[i]) for i, answer in pairs if answer != self.expected[prompts[i]]}
