"""Texts about an edited subject: the base reads the edits before it writes one.

Ours, not the paper's. A shard says its edit's target as a short answer; in a text it would have to say it at a place
that nobody knows. So where a prompt asks for a text about a subject and for nothing else, the edits about that subject
are put into the prompt, and the base writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from repair_lightning.memory.query import Choice, Query
from repair_lightning.memory.routers.base import Router, of_all
from repair_lightning.memory.routers.names import NameIndex
from repair_lightning.types import BASE, READS

MOST = 8
"""Edits that the base reads before a text; of more about one subject the latest."""


class InTextRouter(Router):
    """A router that knows the `names` of its edits, and their ids by number; `in_text` turns it on."""

    names: NameIndex
    _ids: dict[int, str]

    @property
    def ids(self) -> list[str]:
        """The edits in their order."""
        return list(self._ids.values())

    def with_texts(self, choice: Choice, texts: Sequence[str]) -> Choice:
        """The choice, where prompts that the base was to answer may ask for a text about an edited subject."""
        if not self.in_text:
            return choice
        memory, nearest = choice.memory.clone(), list(choice.nearest)
        for row, text in enumerate(texts):
            if memory[row] == BASE and (named := self.names.wanted_in_text(text)):
                memory[row], nearest[row] = READS, self._ids[named[-1]]
        return replace(choice, memory=memory, nearest=tuple(nearest))

    def preface(self, query: Query, memory: Sequence[int]) -> list[list[str]]:
        """The latest edits about the subject of each text that is asked for."""
        pairs = zip(query.texts, memory, strict=True)
        named = [self.names.wanted_in_text(text)[-MOST:] if who == READS else [] for text, who in pairs]
        return [[self._ids[number] for number in numbers] for numbers in named]

    def fingerprint(self, shard: int) -> str:
        """What the base reads before a text depends on all edits."""
        return of_all(shard, self.ids) if shard == READS else ""
