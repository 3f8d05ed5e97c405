"""Lookup: the key router, and the stored answer as a text. What do `keyed`'s shards add to that?

Ours, as a yardstick. Nothing is trained: where the router finds an edit, its target is said token by token, whatever
the base would say. Routing decides all of its score, so a method with the same router that scores less has lost
something in writing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from repair_lightning.editors.base import Editor, register
from repair_lightning.memory.routers import Anchor, Router, make_router
from repair_lightning.texts.naming import named_in
from repair_lightning.types import EditBatch, EditReport


@register("lookup")
class Lookup(Editor):
    """Edits as texts, found by the key router.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        relation_false_rate: share of other questions about a subject, from a bank of our own, that may pass for the one
            that was edited.
        common: what every editor takes, see `Editor`.
    """

    can_undo: ClassVar[bool] = True

    def __init__(self, base: str = "", relation_false_rate: float = 0.01, **common: Any) -> None:
        super().__init__(base, **common)
        self.relation_false_rate = relation_false_rate

    def build_router(self) -> Router:
        """The key router, whose edits' targets are said as they stand."""
        return make_router("lookup", relation_false_rate=self.relation_false_rate)

    def write(self, batch: EditBatch) -> list[EditReport]:
        """Enter the edits; each owns an empty shard, so that it can be said which one answered."""
        width, inner = self.memory.shape
        nothing = torch.zeros(width, 0), torch.zeros(0, inner)
        shards = [self.memory.add(*nothing) for _ in batch.edits]
        asked = [self.edited.forms.asked(edit.prompt) for edit in batch.edits]
        anchors = [Anchor(e.subject or named_in(text), text) for e, text in zip(batch.edits, asked, strict=True)]
        self.router.add(batch.ids, anchors, self.query_of(batch.edits), shards)
        return [EditReport(id, shard, 0.0, 0.0, 0) for id, shard in zip(batch.ids, shards, strict=True)]

    def finish_window(self) -> None:
        """Drop what no edit owns any more, and calibrate on held-out irrelevant prompts."""
        owned = self.ledger.sizes()
        self.memory.drop([shard for shard in self.memory.ids if shard not in owned])
        self.router.calibrate(self.memory, {}, self.held_out)

    def forget(self, ids: Iterable[str]) -> None:
        """The router drops the edits."""
        self.router.forget(list(ids))
