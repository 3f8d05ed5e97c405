"""The key router: the edit whose subject a prompt names, and of which it asks the same, answers it.

Ours, not the paper's: the activation score finds the right shard for fewer prompts. Two things are looked at apart:

- **What it is about.** The words of the edit's subject must stand in the sentence that asks, one after the other, and
  must not be a part of a longer name. An index from words to edits finds them; no forward pass is needed, and a prompt
  that names no edited subject goes to the base at once.
- **What it asks.** The sentence with a stand-in for the subject is read by the base, and its last state compared with
  the edit's in a space in which wordings of one question lie together (`functional.relations`); the words that both
  have in common count as much. Prompts that say the same words need no comparison; prompts that deny what the edit does
  not, or name other numbers, ask something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from repair_lightning.functional.relations import (
    RelationSpace,
    alike,
    fit_relations,
    no_space,
    usual_limit,
    words_in_common,
)
from repair_lightning.memory.query import Choice, Query, pad_right
from repair_lightning.memory.routers.base import Anchor, Read
from repair_lightning.memory.routers.in_text import InTextRouter
from repair_lightning.memory.routers.names import Candidate, Known, NameIndex
from repair_lightning.memory.rows import Rows
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.texts.relations import bank, share_in_common, stem_weight, stems
from repair_lightning.types import BASE

_ABOVE_OTHERS = 0.15
"""How far above an irrelevant prompt that names its subject, towards 1, an edit's limit lies."""
_ALIKE = 0.999
"""As alike at most are prompts that say other words. Where a base's states cannot tell questions apart, as what enters
its first layer cannot, this is the limit: then the same words alone are the same question."""
_REMEMBERED = 8192
"""Texts whose vectors are kept: what is asked comes again."""
_SAMPLED, _ENOUGH = 150, 30
"""Wordings of edits that a limit is taken from: at most, and at least."""
_OF_EDITS = ("shards", "limits", "numbers")


class KeyRouter(InTextRouter):
    """The edit whose subject a prompt names, and of which it asks the same, answers it.

    Args:
        relation_false_rate: share of other questions, of a bank of our own, that may pass for the same one.
        in_text: whether the base reads the edits about a subject before it writes a text about it.
    """

    name = "key"
    needs_owned = False
    reads_states: ClassVar[bool] = False
    vouches: ClassVar[bool] = True
    needs_space: ClassVar[bool] = True
    per_edit: ClassVar[tuple[str, ...]] = ("ids", "texts", "relations", "numbers")

    def __init__(self, relation_false_rate: float = 0.01, in_text: bool = False) -> None:
        self.relation_false_rate, self.in_text = relation_false_rate, in_text
        self.space = no_space()
        self.numbers = torch.zeros(0, dtype=torch.long)  # ascending; no two edits ever have the same
        self.next_number = 0
        self.shards = torch.zeros(0, dtype=torch.long)
        self.limits = torch.zeros(0)
        self.names = NameIndex()
        self._ids: dict[int, str] = {}  # by number, as the vectors are
        self._numbers: dict[str, int] = {}
        self._relations: dict[int, Tensor] = {}
        self._vectors_of: dict[str, Tensor] = {}  # of texts that were read

    def fit(self, background: Query) -> None:
        """Which words are common, from irrelevant prompts, and the space of relations, from a bank of our own. A router
        that holds edits keeps what it has."""
        if self._ids:
            return
        self.names.count(background.texts)
        self._vectors_of = {}
        if not len(self.space.centre) and self.read is not None:
            self.space = self.learn_space(self.read)

    def learn_space(self, read: Read) -> RelationSpace:
        """The space in which wordings of one question lie together, from a bank of our own."""
        wordings, relation = bank()
        common = _words_in_common(wordings)
        return fit_relations(read(wordings), torch.tensor(relation), common, self.relation_false_rate)

    def describe(self, anchors: Sequence[Anchor], prompts: Query, shards: Sequence[int]) -> dict[str, Tensor]:
        """What the edits are about, and the vectors of what they ask."""
        known = [Known.of(anchor.subject, anchor.asked) for anchor in anchors]
        texts = [json.dumps([a.subject, a.asked], ensure_ascii=False).encode("utf-8", "surrogatepass") for a in anchors]
        return {
            "shards": torch.tensor(list(shards), dtype=torch.long),
            "relations": self._vectors([one.relation for one in known], anew=True),
            "texts": pad_right([list(text) for text in texts]),
        }

    def _vectors(self, texts: Sequence[str], anew: bool = False) -> Tensor:
        """(n, k), each text read once.

        What is kept of edits is read `anew`, all texts together: last bits depend on which texts are read at once, and
        a run that goes on remembers none that were asked before.
        """
        if not texts or self.read is None:
            return torch.zeros(len(texts), self.space.projection.shape[1])
        new = [text for text in dict.fromkeys(texts) if anew or text not in self._vectors_of]
        if new:
            if len(self._vectors_of) + len(new) > _REMEMBERED:
                self._vectors_of.clear()
                new = list(dict.fromkeys(texts))
            self._vectors_of |= dict(zip(new, self.space(self.read(new)), strict=True))
        return torch.stack([self._vectors_of[text] for text in texts])

    def insert(self, ids: Sequence[str], described: Mapping[str, Tensor]) -> None:
        """Take in edits; until the next calibration the space's own limit is theirs."""
        self.forget(ids)
        rows = [bytes(byte for byte in row if byte >= 0) for row in described["texts"].tolist()]
        known = [Known.of(*json.loads(row.decode("utf-8", "surrogatepass"))) for row in rows]
        numbers = torch.arange(len(ids)) + self.next_number
        self._enter(numbers.tolist(), ids, known, described["relations"])
        self.shards = torch.cat([self.shards, described["shards"]])
        self.limits = torch.cat([self.limits, torch.full((len(ids),), -1.0)])
        self.numbers = torch.cat([self.numbers, numbers])
        self.next_number += len(ids)

    def _enter(
        self, numbers: Sequence[int], ids: Sequence[str], known: Iterable[Known], vectors: Iterable[Tensor]
    ) -> None:
        self._ids |= zip(numbers, ids, strict=True)
        self._numbers |= zip(ids, numbers, strict=True)
        self._relations |= zip(numbers, vectors, strict=True)
        for number, one in zip(numbers, known, strict=True):
            self.names.enter(number, one)

    def forget(self, ids: Sequence[str]) -> None:
        """Drop edits; the others keep their order."""
        gone = [self._numbers.pop(id) for id in dict.fromkeys(ids) if id in self._numbers]
        if not gone:
            return
        keep = ~torch.isin(self.numbers, torch.tensor(gone))
        for field in _OF_EDITS:
            setattr(self, field, getattr(self, field)[keep])
        for number in gone:
            del self._ids[number], self._relations[number]
            self.names.remove(number)

    def _place(self, number: int) -> int:
        """Where an edit stands in the tables."""
        return int(torch.searchsorted(self.numbers, number))

    def reassign(self, shards: Sequence[int], fused: int) -> None:
        """The edits of the given shards belong to `fused`."""
        self.shards = torch.where(torch.isin(self.shards, torch.tensor(list(shards))), fused, self.shards)

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """The limits of new edits: above what other questions reach, of a bank or of the edits where those lie further
        apart, and above irrelevant prompts that name the subject."""
        new = (self.limits < 0).nonzero()[:, 0]
        if not len(new):
            return
        self.limits[new] = min(self.space.limit, self._usual_limit(), _ALIKE)
        for candidate, score in self._compared(background.texts, set(self.numbers[new].tolist())):
            if candidate.same:  # it asks for the edit itself
                continue
            above, place = score + _ABOVE_OTHERS * (1 - score), self._place(candidate.edit)
            self.limits[place] = max(float(self.limits[place]), above)

    def _usual_limit(self) -> float:
        """The limit that what the edits ask of their subjects suggests; 1 while they ask too little."""
        places = torch.linspace(0, len(self._ids) - 1, min(len(self._ids), 2 * _SAMPLED)).long().unique()
        first = {self.names.known[number].relation: number for number in reversed(self.numbers[places].tolist())}
        texts = list(first)[:_SAMPLED]
        if len(texts) < _ENOUGH or not len(self.space.centre):
            return 1.0
        vectors = torch.stack([self._relations[first[text]] for text in texts])
        both = alike(vectors @ vectors.T, _words_in_common(texts))
        return usual_limit(both[torch.ones_like(both, dtype=torch.bool).triu(1)])

    def route(self, query: Query, memory: SideMemory) -> Choice:
        """The best edit of each prompt, if it asks the same."""
        if not self._ids:
            return Choice.base(len(query))
        best = {row: ranked[-1] for row, ranked in self.ranked(query.texts).items()}
        size = len(query)
        memories, scores, limits = torch.full((size,), BASE), torch.full((size,), -1.0), torch.full((size,), torch.inf)
        nearest: list[str | None] = [None] * size
        for row, (fires, _, _, score, number) in best.items():
            edit = int(number)
            memories[row] = self.shards[self._place(edit)] if fires else BASE
            scores[row], limits[row], nearest[row] = score, self._limit(edit), self._ids[edit]
        return self.with_texts(Choice(memories, scores, limits, tuple(nearest)), query.texts)

    def ranked(self, texts: Sequence[str]) -> dict[int, list[tuple[float, ...]]]:
        """By row, what is known of the edits that a prompt may be about, the likeliest last: whether it asks the same,
        whether in the same words, how many words of the subject it names, how alike it asks, the edit's number."""
        found: dict[int, list[tuple[float, ...]]] = {}
        for candidate, score in self._compared(texts):
            fires = float(score > self._limit(candidate.edit))
            rank = (fires, float(candidate.same), float(candidate.named), score, float(candidate.edit))
            found.setdefault(candidate.row, []).append(rank)
        return {row: sorted(ranks) for row, ranks in found.items()}

    def _limit(self, number: int) -> float:
        """An edit's limit; the space's own until it is calibrated."""
        found = float(self.limits[self._place(number)])
        return found if found >= 0 else self.space.limit

    def _compared(self, texts: Sequence[str], among: set[int] | None = None) -> list[tuple[Candidate, float]]:
        """The candidates of prompts, each with how alike it asks, in [-1, 1]; the base reads only what must be read."""
        found = [c for row, text in enumerate(texts) for c in self.names.candidates(row, text)]
        found = [c for c in found if among is None or c.edit in among]
        open_ones = [candidate for candidate in found if not candidate.same]
        if not open_ones:
            return [(candidate, 1.0) for candidate in found]
        vectors = self._vectors([candidate.relation for candidate in open_ones], anew=among is not None)
        own = torch.stack([self._relations[candidate.edit] for candidate in open_ones])
        words = [share_in_common(stems(c.relation), stems(self.names.known[c.edit].asks.relation)) for c in open_ones]
        scores = iter(alike((vectors * own).sum(-1), torch.tensor(words)).clamp(-1, _ALIKE).tolist())
        return [(candidate, 1.0 if candidate.same else next(scores)) for candidate in found]

    def state_dict(self) -> dict[str, Any]:
        """What is known of the edits, and what was learnt before them."""
        texts = [[" ".join(known.subject), known.asked] for known in self.names.known.values()]
        relations = torch.stack([*self._relations.values()]) if self._relations else torch.zeros(0, 0)
        of_edits = {"ids": self.ids, "texts": texts, "relations": relations, "numbers": self.numbers}
        return self.common_state() | of_edits

    def common_state(self) -> dict[str, Any]:
        """Besides what was learnt before the edits, their shards and limits."""
        return {
            **{field: getattr(self, field) for field in ("shards", "limits", "next_number")},
            **{field: getattr(self.space, field) for field in ("limit", "centre", "projection")},
            "frequent": dict(self.names.frequent),
        }

    def remember(self) -> Any:
        """References: nothing that is kept is changed in place, but for limits that are set once."""
        tables = {field: getattr(self, field) for field in _OF_EDITS}
        return tables, dict(self._ids), dict(self._relations), dict(self.names.known), self.names.frequent, self.space

    def recall(self, kept: Any) -> None:
        """Go back to what was remembered: what has come since leaves, what has gone comes back."""
        tables, ids, relations, known, self.names.frequent, self.space = kept
        for number in self._ids.keys() - ids.keys():
            self.names.remove(number)
        for number in ids.keys() - self._ids.keys():
            self.names.enter(number, known[number])
        for field, table in tables.items():
            setattr(self, field, table.clone())
        self._ids, self._relations, self.names.known = dict(ids), dict(relations), dict(known)
        self._numbers = {id: number for number, id in ids.items()}
        self._vectors_of = {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accepts what :meth:`state_dict` gave."""
        for field in _OF_EDITS:
            setattr(self, field, state[field].cpu().clone())
        self.next_number = max(self.next_number, int(state["next_number"]))  # never given twice
        self.names = NameIndex(state["frequent"])
        self._vectors_of = {}
        self.space = RelationSpace(state["centre"].cpu(), state["projection"].cpu(), float(state["limit"]))
        self._ids, self._numbers, self._relations = {}, {}, {}
        known = (Known(tuple(subject.split()), asked) for subject, asked in state["texts"])
        self._enter(self.numbers.tolist(), list(state["ids"]), known, state["relations"].cpu())

    def rows(self) -> Rows[int]:
        """The edits' ids and texts in UTF-8, and their vectors."""
        return Rows({number: number for number in self._ids}, self._row)

    def _row(self, number: int) -> dict[str, Tensor]:
        known = self.names.known[number]
        said = json.dumps([self._ids[number], " ".join(known.subject), known.asked]).encode()
        return {"said": torch.frombuffer(bytearray(said), dtype=torch.uint8), "relations": self._relations[number]}

    @staticmethod
    def from_rows(rows: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Any]:
        """The edits' entries again."""
        said = [json.loads(row["said"].numpy().tobytes()) for row in rows.values()]
        vectors = [row["relations"] for row in rows.values()]
        return {
            "ids": [id for id, *_ in said],
            "texts": [text for _, *text in said],
            "relations": torch.stack(vectors) if vectors else torch.zeros(0, 0),
            "numbers": torch.tensor(list(rows), dtype=torch.long),
        }


def _words_in_common(texts: Sequence[str]) -> Tensor:
    """(n, n) the weighted share of word stems that each two have in common."""
    held = [stems(text) for text in texts]
    column = {stem: i for i, stem in enumerate(sorted(set().union(*held)))}
    holds = torch.zeros(len(texts), len(column))
    for row, own in enumerate(held):
        holds[row, [column[stem] for stem in own]] = 1
    return words_in_common(holds, torch.tensor([stem_weight(stem) for stem in column]))
