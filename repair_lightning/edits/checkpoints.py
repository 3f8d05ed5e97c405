"""Checkpoints after each window: what changes in a file, what never changes in the run's journal.

The file is written aside and read back. The journal then takes its hash and the new rows in one transaction, and the
file gets its name. A process that is killed in between leaves it aside, where :func:`settle` finds it.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from repair_lightning.edits.journal import Checkpoint, Tables
from repair_lightning.errors import RepairError
from repair_lightning.models.base import files_hash
from repair_lightning.storage.files import sync

ROWS = "rows"
"""The entry of a checkpoint that holds its rows by table and number, see `repair_lightning.edits.journal`."""


class SaveEachWindow(CheckpointCallback):
    """Saves after every window but the last: a stream that has ended is merged and scored before it counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, unless nothing is left to arrive or to be written."""
        last = 0 <= (trainer.max_epochs or -1) <= trainer.current_epoch + 1
        if not last and not trainer.datamodule.exhausted:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path)


class JournaledCheckpointIO(TorchCheckpointIO):
    """The run's own checkpoint, at `path`, is whole or not there; any other is Lightning's. `save` stores a file's hash
    and the rows (see `Journal.save`), and `tables` gives the rows back."""

    def __init__(self, path: Path, save: Callable[[str, Tables], None], tables: Callable[[], Tables]) -> None:
        super().__init__()
        self.path, self.save, self.tables = path, save, tables

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; the previous one stays until this one is known to be good.

        RepairError where it cannot be written, or what is read back is not what was written.
        """
        if not self._is_ours(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        content, aside = io.BytesIO(), _aside(self.path)
        torch.save({key: value for key, value in checkpoint.items() if key != ROWS}, content)
        sha256 = hashlib.sha256(content.getbuffer()).hexdigest()
        known = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if files_hash([aside]) != sha256:
                raise RepairError(f"checkpoint '{path}': what is read back is not what was written; check the disk")
            self.save(sha256, checkpoint.get(ROWS, {}))
            known = True
            os.replace(aside, self.path)
            sync(self.path.parent)
        except OSError as error:
            raise RepairError(
                f"checkpoint '{path}' cannot be written ({error.strerror or error}); the previous one and the journal "
                "are whole: make room and give the same command again"
            ) from error
        finally:
            if not known:
                aside.unlink(missing_ok=True)  # what has failed takes no room

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A checkpoint with its rows."""
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return checkpoint | {ROWS: self.tables()} if self._is_ours(path) else checkpoint

    def _is_ours(self, path: Any) -> bool:
        return Path(path).resolve() == self.path.resolve()


def settle(path: Path, known: Checkpoint | None) -> None:
    """Finish or take back what a killed process left; RepairError where the file is not what the journal knows."""
    aside = _aside(path)
    if known and aside.is_file() and files_hash([aside]) == known.sha256:
        os.replace(aside, path)
        sync(path.parent)
    aside.unlink(missing_ok=True)
    if known and not path.is_file():
        problem = "it is missing"
    elif path.is_file() and (known is None or files_hash([path]) != known.sha256):
        problem = "the journal knows no such content"
    else:
        return
    raise RepairError(
        f"checkpoint '{path}' is damaged: {problem}; restore it from a copy, or --overwrite starts the run anew"
    )


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
