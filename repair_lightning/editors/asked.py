"""What an editor may be asked: texts as token ids, the base's own answers, states, and who answers a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from repair_lightning.editors.held import HeldModel
from repair_lightning.functional.relations import DIMENSIONS, SHRINKAGE, RelationSpace
from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers import Anchor
from repair_lightning.models.base import kept_space
from repair_lightning.models.sampling import greedy_rows, own_texts
from repair_lightning.models.tokenizing import Encoded
from repair_lightning.texts.dialogue import behind
from repair_lightning.texts.naming import named_in
from repair_lightning.texts.relations import STEM, bank
from repair_lightning.types import BASE, Edit


class AskedModel(HeldModel):
    """A held model that can be asked; where ranks share the work, all of them must ask alike.

    Attributes:
        background: the states of the irrelevant prompts that writing may use.
    """

    background: Query

    def encode(self, edit: Edit) -> Encoded:
        """An edit's prompt and target as token ids."""
        return self._encode(edit.prompt, edit.target)

    def variants(self, edits: Sequence[Edit]) -> list[tuple[int, Encoded]]:
        """The edits in the other forms that they are written in, as (edit, row), but for what the base cannot read."""
        forms = self.edited.forms
        return self._readable([(i, row) for i, e in enumerate(edits) for row in forms.variants(e.prompt, e.target)[1:]])

    def checks(self, edits: Sequence[Edit]) -> list[tuple[int, Encoded]]:
        """The edits in the forms that they are asked back in, likewise."""
        forms = self.edited.forms
        return self._readable([(i, row) for i, e in enumerate(edits) for row in forms.checks(e.prompt, e.target)])

    def _readable(self, rows: Sequence[tuple[int, Encoded]]) -> list[tuple[int, Encoded]]:
        return [(i, row) for i, row in rows if len(row.ids) <= self.edited.longest]

    def anchors_of(self, edits: Sequence[Edit]) -> list[Anchor]:
        """What the edits are about: the record's subject, else the name in what is asked; and what that is."""
        asked = [self.edited.forms.asked(edit.prompt) for edit in edits]
        return [Anchor(edit.subject or named_in(text), text) for edit, text in zip(edits, asked, strict=True)]

    def in_context(self, edits: Sequence[Edit]) -> list[Edit]:
        """The edits asked behind a context that the base wrote itself: a stand-in for other words."""
        contexts = self.base_texts(max(1, min(len(edits), 16)), length=8)
        return [replace(edit, prompt=behind(contexts[i % len(contexts)], edit.prompt)) for i, edit in enumerate(edits)]

    def base_texts(self, number: int, length: int = 12) -> list[str]:
        """Texts that the base wrote by itself, the same on every rank; see `own_texts`."""
        return self.team.first(own_texts(self.edited.base, self.tokenizer, number, length))

    def said_by_base(self, prompts: Sequence[str], length: int = 8) -> list[Encoded]:
        """Prompts with what the base as it was says to them, in at most so many tokens."""
        with self.edited.forced(None), self.edited.weights.originals():
            return [Encoded(*row) for row in greedy_rows(self.edited.base, self.edited.forms, prompts, length)]

    def query_of(self, edits: Sequence[Edit]) -> Query:
        """The edits' prompts as a router sees them, from the one pass that serves their writing too."""
        texts = [self.edited.forms.asked(edit.prompt) for edit in edits]
        rows = [self.encode(edit) for edit in edits]
        captures = self.edited.captures([row.ids for row in rows])
        return self.edited.query_of(texts, [row.prompt for row in rows], captures)

    def features(self, edits: Sequence[Edit]) -> np.ndarray:
        """Unit features (n, D) of the edits' prompts in the frozen base, for clustering."""
        mine = self.team.mine_of([edit.prompt for edit in edits])
        centre = self.background.last_hidden().mean(0)
        part = self.query_of([edits[i] for i in mine]).last_hidden() if mine else centre[None][:0]
        (last,) = self.team.rows(mine, part)
        return torch.nn.functional.normalize(last - centre, dim=-1).cpu().numpy()

    def choose(self, prompts: Sequence[str]) -> Choice:
        """The router's choice for prompts."""
        return self.edited.choose(prompts)

    @torch.no_grad()
    def choose_for(self, edits: Sequence[Edit]) -> Choice:
        """The router's choice for the edits' own prompts, from the states that are known of them."""
        mine = self.team.mine_of([edit.prompt for edit in edits])
        own, part = [edits[i] for i in mine], Choice.base(0)
        if own:
            query = self.query_of(own) if self.router.reads_states else self._asked([edit.prompt for edit in own])
            part = self.edited.held(self.router.route(query, self.memory), [self.encode(edit).prompt for edit in own])
        return self.edited.shared_choice(mine, part)

    def owner_choice(self, ids: Sequence[str]) -> Tensor:
        """Oracle routing: the shard that owns each edit, or the base where none does."""
        owners = [self.ledger.owner_of(id) if id in self.ledger else None for id in ids]
        return torch.tensor([BASE if owner is None else owner for owner in owners], dtype=torch.long)

    def _asked(self, prompts: Sequence[str]) -> Query:
        return Query.of_texts([self.edited.forms.asked(prompt) for prompt in prompts])

    def _shared_queries(self, prompts: Sequence[str]) -> Query:
        return self.edited.shared_query(len(prompts), lambda index: self.edited.query([prompts[i] for i in index]))

    def _relation_space(self) -> RelationSpace:
        """The router's space of relations: learnt once per base, layer, precision and form, and kept on the disk."""
        learning = (SHRINKAGE, DIMENSIONS, STEM, *self.router.options().values())
        known = (self.identity, str(self.edited.forms.chat), *map(str, learning), *bank()[0])
        return kept_space(known, lambda: self.router.learn_space(self.edited.last_states))  # type: ignore[attr-defined]
