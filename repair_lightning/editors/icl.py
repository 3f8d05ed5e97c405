"""In-context retrieval: nothing is written; the edits nearest to a prompt are put before it, as text.

In the manner of IKE ("Can We Edit Factual Knowledge by In-Context Learning?", arXiv 2305.12740), which retrieves
demonstrations by the cosine of sentence embeddings, and of MemPrompt (arXiv 2201.06009), which keeps corrections in a
memory. Deviations: the embedding is the base's own state of the prompt's last token; a line is an edit's prompt with
its target, without IKE's copy, update and retain demonstrations; where no edit is as near as held-out irrelevant
prompts are to theirs, the base answers alone.
"""

from __future__ import annotations

from typing import Any

from repair_lightning.editors.base import register
from repair_lightning.editors.checks import at_least, share
from repair_lightning.editors.stored import StoredTexts
from repair_lightning.errors import ConfigError
from repair_lightning.memory.query import pad_right
from repair_lightning.memory.routers import Router, make_router
from repair_lightning.types import Edit, EditBatch, EditReport


@register("icl")
class InContext(StoredTexts):
    """Edits as text before the prompts that they are near to.

    Args:
        base: folder or hub name of a Hugging Face causal LM.
        layer: whose input is the embedding; None for the default of `resolve_layer`.
        number: of edits that are put before a prompt, the nearest last. IKE takes 32 demonstrations of one edit.
        line: how an edit reads there, with `{prompt}` and `{target}`.
        false_fire_rate: share of the held-out irrelevant prompts that may get anything put before them.
    """

    def __init__(
        self,
        base: str = "",
        number: int = 4,
        line: str = "{prompt} {target}\n",
        false_fire_rate: float = 0.01,
        **common: Any,
    ) -> None:
        super().__init__(base, **common)
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
        return [EditReport(id, shard, float("nan"), 0.0, 0) for id, shard in zip(batch.ids, shards, strict=True)]

    def tokens_of(self, edit: Edit) -> list[int]:
        """An edit's line as token ids."""
        text = self.line.replace("{prompt}", self.edited.forms.asked(edit.prompt)).replace("{target}", edit.target)
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found
