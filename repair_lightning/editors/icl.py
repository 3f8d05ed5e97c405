"""Editors that write nothing: an edit is a text, and owns an empty shard.

`icl`, in-context retrieval: the base reads edits before it answers. In the manner of IKE ("Can We Edit Factual
Knowledge by In-Context Learning?", arXiv 2305.12740), which puts demonstrations before a prompt, and of MemPrompt
(arXiv 2201.06009), which keeps corrections in a memory. A base that is asked through its chat template reads them in
the system message and as earlier turns; a bare one, as lines before the prompt. Deviations: what is read are the edits
about the subject that the prompt names, found by the key router, or with `retriever: states` those whose prompts are
like it by the cosine of the base's own states (IKE: of sentence embeddings); each is a prompt with its target, without
IKE's copy, update and retain demonstrations. Where no edit is named, or none is as near as held-out irrelevant prompts
are to theirs, the base answers alone.

`lookup`, ours, as a yardstick: where the key router finds an edit, its target is said token by token, whatever the base
would say. Routing decides all of its score, so a method with the same router that scores less has lost something in
writing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch

from repair_lightning.editors.base import Editor, register
from repair_lightning.editors.checks import at_least, share
from repair_lightning.errors import ConfigError
from repair_lightning.memory.query import Query
from repair_lightning.memory.routers import Router, make_router
from repair_lightning.types import EditBatch, EditReport

Retriever = Literal["key", "states"]
"""What finds the edits that a prompt is about."""


class StoredTexts(Editor):
    """An editor whose router holds all that there is of an edit."""

    can_undo = True

    def empty_shards(self, number: int) -> list[int]:
        """The ids of so many new shards of rank 0, one per edit, so that it can be said which one answered."""
        (rows, columns), device = self.memory.shape, self.edited.device
        nothing = torch.zeros(rows, 0, device=device), torch.zeros(0, columns, device=device)
        return [self.memory.add(*nothing) for _ in range(number)]

    def write(self, batch: EditBatch) -> list[EditReport]:
        """Enter the edits; of their prompts the key router reads the words, not the base's states."""
        anchors, shards = self.anchors_of(batch.edits), self.empty_shards(len(batch.edits))
        of_texts = not self.router.reads_states
        asked = Query.of_texts([anchor.asked for anchor in anchors]) if of_texts else self.query_of(batch.edits)
        self.router.add(batch.ids, anchors, asked, shards)
        return [EditReport(id, shard, 0.0, 0.0, 0) for id, shard in zip(batch.ids, shards, strict=True)]

    def finish_window(self) -> None:
        """Drop what no edit owns any more, and calibrate on held-out irrelevant prompts."""
        self.drop_unowned()
        self.calibrate()

    def forget(self, ids: Iterable[str]) -> None:
        """The router drops the edits."""
        self.router.forget(list(ids))


@register("icl")
class InContext(StoredTexts):
    """Edits as text before the prompts that they are about.

    Args:
        retriever: what finds them: `key`, the subject that a prompt names, or `states`, how alike prompts are.
        number: of edits that are put before a prompt, the nearest last. IKE takes 32 demonstrations of one edit.
        false_fire_rate: with `states`, share of the held-out irrelevant prompts that may get anything put before them.
    """

    def __init__(
        self,
        retriever: Retriever = "key",
        number: int = 4,
        false_fire_rate: float = 0.01,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.retriever, self.number, self.false_fire_rate = retriever, number, false_fire_rate
        at_least(1, self, "number")
        share(self, "false_fire_rate")
        if retriever not in get_args(Retriever):
            raise ConfigError(f"retriever must be one of {', '.join(get_args(Retriever))}, got '{retriever}'")

    def build_router(self) -> Router:
        """It finds the edits that a prompt is about."""
        if self.retriever == "key":
            return make_router("facts", number=self.number)
        return make_router("retrieval", number=self.number, false_fire_rate=self.false_fire_rate)


@register("lookup")
class Lookup(StoredTexts):
    """Edits as texts, found by the key router.

    Args:
        relation_false_rate: share of other questions about a subject, from a bank of our own, that may pass for the one
            that was edited.
    """

    def __init__(self, relation_false_rate: float = 0.01, **common: Any) -> None:
        super().__init__(**common)
        self.relation_false_rate = relation_false_rate

    def build_router(self) -> Router:
        """The key router, whose edits' targets are said as they stand."""
        return make_router("lookup", relation_false_rate=self.relation_false_rate)
