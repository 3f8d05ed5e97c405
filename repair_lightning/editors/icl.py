"""Editors that write nothing: an edit is a text, and owns an empty shard.

`icl`, in-context retrieval: the edits nearest to a prompt are put before it. In the manner of IKE ("Can We Edit Factual
Knowledge by In-Context Learning?", arXiv 2305.12740), which retrieves demonstrations by the cosine of sentence
embeddings, and of MemPrompt (arXiv 2201.06009), which keeps corrections in a memory. Deviations: the embedding is the
base's own state of the prompt's last token; a line is an edit's prompt with its target, without IKE's copy, update and
retain demonstrations; where no edit is as near as held-out irrelevant prompts are to theirs, the base answers alone.

`lookup`, ours, as a yardstick: where the key router finds an edit, its target is said token by token, whatever the base
would say. Routing decides all of its score, so a method with the same router that scores less has lost something in
writing.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import nan
from typing import Any

import torch

from repair_lightning.editors.base import Editor, register
from repair_lightning.editors.checks import at_least, share
from repair_lightning.errors import ConfigError
from repair_lightning.memory.query import Query, pad_right
from repair_lightning.memory.routers import Router, make_router
from repair_lightning.types import Edit, EditBatch, EditReport


class StoredTexts(Editor):
    """An editor whose router holds all that there is of an edit."""

    can_undo = True

    def empty_shards(self, number: int) -> list[int]:
        """The ids of so many new shards of rank 0, one per edit, so that it can be said which one answered."""
        (rows, columns), device = self.memory.shape, self.edited.device
        nothing = torch.zeros(rows, 0, device=device), torch.zeros(0, columns, device=device)
        return [self.memory.add(*nothing) for _ in range(number)]

    def finish_window(self) -> None:
        """Drop what no edit owns any more, and calibrate on held-out irrelevant prompts."""
        self.drop_unowned()
        self.calibrate()

    def forget(self, ids: Iterable[str]) -> None:
        """The router drops the edits."""
        self.router.forget(list(ids))


@register("icl")
class InContext(StoredTexts):
    """Edits as text before the prompts that they are near to.

    Args:
        number: of edits that are put before a prompt, the nearest last. IKE takes 32 demonstrations of one edit.
        line: how an edit reads there, with `{prompt}` and `{target}`.
        false_fire_rate: share of the held-out irrelevant prompts that may get anything put before them.
    """

    def __init__(
        self, number: int = 4, line: str = "{prompt} {target}\n", false_fire_rate: float = 0.01, **common: Any
    ) -> None:
        super().__init__(**common)
        self.number, self.line, self.false_fire_rate = number, line, false_fire_rate
        at_least(1, self, "number")
        share(self, "false_fire_rate")
        if "{prompt}" not in line or "{target}" not in line:
            raise ConfigError(f"line must hold {{prompt}} and {{target}}, got {line!r}")

    def build_router(self) -> Router:
        """It finds the edits that are near a prompt, and holds their lines."""
        return make_router("retrieval", number=self.number, false_fire_rate=self.false_fire_rate)

    def write(self, batch: EditBatch) -> list[EditReport]:
        """Remember the edits."""
        shards = self.empty_shards(len(batch.edits))
        described = self.router.describe((), self.query_of(batch.edits), shards)
        lines = pad_right([self.tokens_of(edit) for edit in batch.edits])
        self.router.insert(batch.ids, described | {"lines": lines})
        return [EditReport(id, shard, nan, 0.0, 0) for id, shard in zip(batch.ids, shards, strict=True)]

    def tokens_of(self, edit: Edit) -> list[int]:
        """An edit's line as token ids."""
        text = self.line.replace("{prompt}", self.edited.forms.asked(edit.prompt)).replace("{target}", edit.target)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


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

    def write(self, batch: EditBatch) -> list[EditReport]:
        """Enter the edits; of their prompts the router reads the words, not the base's states."""
        anchors, shards = self.anchors_of(batch.edits), self.empty_shards(len(batch.edits))
        self.router.add(batch.ids, anchors, Query.of_texts([anchor.asked for anchor in anchors]), shards)
        return [EditReport(id, shard, 0.0, 0.0, 0) for id, shard in zip(batch.ids, shards, strict=True)]
