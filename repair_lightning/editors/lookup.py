"""Lookup: the key router, and the stored answer as a text. What do `keyed`'s shards add to that?

Ours, as a yardstick. Nothing is trained: where the router finds an edit, its target is said token by token, whatever
the base would say. Routing decides all of its score, so a method with the same router that scores less has lost
something in writing.
"""

from __future__ import annotations

from typing import Any

from repair_lightning.editors.base import register
from repair_lightning.editors.stored import StoredTexts
from repair_lightning.memory.query import Query
from repair_lightning.memory.routers import Router, make_router
from repair_lightning.types import EditBatch, EditReport


@register("lookup")
class Lookup(StoredTexts):
    """Edits as texts, found by the key router.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        relation_false_rate: share of other questions about a subject, from a bank of our own, that may pass for the one
            that was edited.
        common: what every editor takes, see `Editor`.
    """

    def __init__(self, base: str = "", relation_false_rate: float = 0.01, **common: Any) -> None:
        super().__init__(base, **common)
        self.relation_false_rate = relation_false_rate

    def build_router(self) -> Router:
        """The key router, whose edits' targets are said as they stand."""
        return make_router("lookup", relation_false_rate=self.relation_false_rate)

    def write(self, batch: EditBatch) -> list[EditReport]:
        """Enter the edits; of their prompts the router reads the words, not the base's states."""
        anchors, shards = self.anchors_of(batch.edits), self.empty_shards(len(batch.edits))
        self.router.add(batch.ids, anchors, Query.of_texts([anchor.asked for anchor in anchors]), shards)
        return [EditReport(id, shard, 0.0, 0.0, 0) for id, shard in zip(batch.ids, shards, strict=True)]
