"""What a base says by itself, kept on the disk: the run that asks it a prompt first does so for all others."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from repair_lightning.models.gguf import cache_dir

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 30
"""A file that holds more is emptied."""
_SIZES = ("page_count", "freelist_count", "page_size")


class KeptAnswers:
    """Rows of token ids that a base answered other rows with, in one SQLite file for each that computes them otherwise.

    A cache that cannot be read or written costs time alone: one warning, and it is done without.

    Args:
        folder: where the file is made.
        identity: all that decides the answers.
    """

    def __init__(self, folder: Path, *identity: str) -> None:
        self.file = folder / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.sqlite"
        self.works = True

    @classmethod
    def of(cls, model: Any, sha256: str) -> KeptAnswers:
        """Those of a loaded base, in the user's cache: by its weights, its settings, and what computes."""
        settings = (model.config.to_json_string(), model.generation_config.to_json_string(), str(model.dtype))
        device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
        return cls(cache_dir() / "answers", sha256, *settings, device, torch.__version__, transformers.__version__)

    def get(self, questions: Sequence[Sequence[int]]) -> dict[int, list[int]]:
        """By place, the answers to those of the questions that are known; a question holds all that decides it."""
        if not (questions and self.works and self.file.is_file()):
            return {}
        names = [_name(question) for question in questions]
        try:
            with closing(self._open()) as store:
                rows = [store.execute("SELECT ids FROM said WHERE name = ?", [name]).fetchone() for name in names]
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            return {}
        return {i: np.frombuffer(row[0], np.int32).tolist() for i, row in enumerate(rows) if row}

    def put(self, answers: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Keep questions with their answers."""
        rows = [(_name(question), np.array(answer, np.int32).tobytes()) for question, answer in answers]
        if not (rows and self.works):
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as store, store:
                pages, free, size = (store.execute(f"PRAGMA {name}").fetchone()[0] for name in _SIZES)
                if (pages - free) * size > MOST_BYTES:
                    store.execute("DELETE FROM said")
                store.executemany("INSERT OR IGNORE INTO said VALUES (?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def _open(self) -> sqlite3.Connection:
        """A connection for one call: threads and processes share the file."""
        store = sqlite3.connect(self.file, timeout=30)
        store.execute("CREATE TABLE IF NOT EXISTS said (name BLOB PRIMARY KEY, ids BLOB) WITHOUT ROWID")
        return store

    def _give_up(self, error: Exception) -> None:
        log.warning("the base's answers cannot be kept in '%s' (%s): it is asked each time", self.file, error)
        self.works = False


def _name(question: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.array(question, np.int64).tobytes(), digest_size=16).digest()
