"""What editors have in common that write nothing: an edit is a text, and owns an empty shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch

from repair_lightning.editors.base import Editor


class StoredTexts(Editor):
    """An editor whose router holds all that there is of an edit."""

    can_undo: ClassVar[bool] = True

    def empty_shards(self, number: int) -> list[int]:
        """The ids of so many new shards of rank 0, one per edit, so that it can be said which one answered."""
        (rows, columns), device = self.memory.shape, self.edited.device
        nothing = torch.zeros(rows, 0, device=device), torch.zeros(0, columns, device=device)
        return [self.memory.add(*nothing) for _ in range(number)]

    def finish_window(self) -> None:
        """Drop what no edit owns any more, and calibrate on held-out irrelevant prompts."""
        owned = self.ledger.sizes()
        self.memory.drop([shard for shard in self.memory.ids if shard not in owned])
        self.router.calibrate(self.memory, {}, self.held_out)

    def forget(self, ids: Iterable[str]) -> None:
        """The router drops the edits."""
        self.router.forget(list(ids))
