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
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
from repair_lightning.memory.routers.base import Anchor, Read, Router
from repair_lightning.memory.rows import NUMBERS, Part, Rows, joined
from repair_lightning.memory.side_memory import SideMemory
from repair_lightning.texts import asking
from repair_lightning.texts.relations import STAND_IN, bank, share_in_common, stem_weight, stems
from repair_lightning.types import BASE

_ABOVE_OTHERS = 0.15
"""How far above an irrelevant prompt that names its subject, towards 1, an edit's limit lies."""
_ALIKE = 0.999
"""As alike at most are prompts that say other words. Where a base's states cannot tell questions apart, as what enters
its first layer cannot, this is the limit: then the same words alone are the same question."""
_UNNAMED = 0.75
"""Share of the words, weighted, that an edit without a subject and a prompt must have in common."""
_REMEMBERED = 8192
"""Texts whose vectors are kept: what is asked comes again."""
_SAMPLED, _ENOUGH = 150, 30
"""Wordings of edits that a limit is taken from: at most, and at least."""
_FIXED = ("relations",)
_SPACE = ("centre", "projection")


@dataclass(frozen=True, slots=True)
class _Known:
    """What an edit's prompt asks, as it is compared.

    Attributes:
        subject: the words of its subject; empty where the prompt does not name it.
        asked: what its prompt asks, as it was written.
        relation: the same with the stand-in.
        code: whether every sign counts.
        denies: whether it denies something.
        numbers: its words with digits, outside the subject.
        sentences: how many it has.
    """

    subject: tuple[str, ...]
    asked: str
    relation: str
    code: bool
    denies: bool
    numbers: frozenset[str]
    sentences: int

    @classmethod
    def of(cls, subject: str, asked: str) -> _Known:
        words = asking.spellings(subject)
        masked = asking.without(asked, words, STAND_IN) if words else None
        named = words if masked is not None else ()
        relation = masked if masked is not None else asked
        code, denies, sentences = asking.is_code(asked), asking.negated(relation), len(asking.sentences(asked))
        return cls(named, asked, relation, code, denies, _numbers(relation), sentences)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A part of a prompt that may ask what an edit is about: the prompt's row, the edit's place, the sentence with the
    stand-in, whether it says the same words, and how many words of the subject it names."""

    row: int
    edit: int
    relation: str
    same: bool
    named: int


class KeyRouter(Router):
    """The edit whose subject a prompt names, and of which it asks the same, answers it.

    Args:
        relation_false_rate: share of other questions, of a bank of our own, that may pass for the same one.
    """

    name = "key"
    needs_owned = False
    reads_states: ClassVar[bool] = False
    vouches: ClassVar[bool] = True
    needs_space: ClassVar[bool] = True

    def __init__(self, relation_false_rate: float = 0.01) -> None:
        self.relation_false_rate = relation_false_rate
        self.space = no_space()
        self.ids: list[str] = []
        self.numbers = torch.zeros(0, dtype=torch.long)  # ascending; no two edits ever have the same
        self.next_number = 0
        self.shards = torch.zeros(0, dtype=torch.long)
        self.relations = torch.zeros(0, 0)
        self.limits = torch.zeros(0)
        self.known: list[_Known] = []
        self._index: dict[str, list[int]] = {}
        self._exact: dict[str, list[int]] = {}
        self._frequent: dict[str, int] = {}
        self._vectors_of: dict[str, Tensor] = {}  # of texts that were read

    def options(self) -> dict[str, Any]:
        """As given to the constructor."""
        return {"relation_false_rate": self.relation_false_rate}

    # -- what is known ------------------------------------------------------------------------------------------------

    def fit(self, background: Query) -> None:
        """Which words are common, from irrelevant prompts, and the space of relations, from a bank of our own. A router
        that holds edits keeps what it has."""
        if self.ids:
            return
        self._frequent = {}
        for text in background.texts:
            for word in set(asking.spellings(text)):
                self._frequent[word] = self._frequent.get(word, 0) + 1
        self._vectors_of = {}
        if not len(self.space.centre) and self.read is not None:
            self.space = self.learn_space(self.read)

    def learn_space(self, read: Read) -> RelationSpace:
        """The space in which wordings of one question lie together, from a bank of our own."""
        wordings, relation = bank()
        return fit_relations(
            read(wordings), torch.tensor(relation), _words_in_common(wordings), self.relation_false_rate
        )

    def describe(self, anchors: Sequence[Anchor], prompts: Query, shards: Sequence[int]) -> dict[str, Tensor]:
        """What the edits are about, and the vectors of what they ask."""
        known = [_Known.of(anchor.subject, anchor.asked) for anchor in anchors]
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
        self._append(ids, [json.loads(row.decode("utf-8", "surrogatepass")) for row in rows])
        self.shards = torch.cat([self.shards, described["shards"]])
        vectors = described["relations"]
        self.relations = torch.cat([self.relations if len(self.relations) else vectors[:0], vectors])
        self.limits = torch.cat([self.limits, torch.full((len(ids),), -1.0)])
        self.numbers = torch.cat([self.numbers, torch.arange(len(ids)) + self.next_number])
        self.next_number += len(ids)

    def _append(self, ids: Sequence[str], texts: Sequence[Sequence[str]]) -> None:
        for id, (subject, asked) in zip(ids, texts, strict=True):
            self.ids.append(id)
            self.known.append(_Known.of(subject, asked))
            self._enter(len(self.ids) - 1)

    def _enter(self, place: int) -> None:
        known = self.known[place]
        self._exact.setdefault(_exactly(known.asked), []).append(place)
        words = known.subject or asking.spellings(known.asked)
        keys = _pairs(known.subject) or words
        if keys:
            rarest = min(keys, key=lambda key: (max(self._frequent.get(word, 0) for word in key.split()), -len(key)))
            self._index.setdefault(rarest, []).append(place)

    def forget(self, ids: Sequence[str]) -> None:
        """Drop edits; the others keep their order."""
        gone = set(ids)
        if gone.isdisjoint(self.ids):
            return
        keep = [i for i, name in enumerate(self.ids) if name not in gone]
        index = torch.tensor(keep, dtype=torch.long)
        for field in ("shards", "relations", "limits", "numbers"):
            setattr(self, field, getattr(self, field)[index])
        self.ids, self.known = [self.ids[i] for i in keep], [self.known[i] for i in keep]
        self._enter_all()

    def _enter_all(self) -> None:
        self._index, self._exact = {}, {}
        for place in range(len(self.ids)):
            self._enter(place)

    def reassign(self, shards: Sequence[int], fused: int) -> None:
        """The edits of the given shards belong to `fused`."""
        self.shards = torch.where(torch.isin(self.shards, torch.tensor(list(shards))), fused, self.shards)

    # -- limits -------------------------------------------------------------------------------------------------------

    def calibrate(self, memory: SideMemory, owned: Mapping[int, Query], background: Query) -> None:
        """The limits of new edits: above what other questions reach, of a bank or of the edits where those lie further
        apart, and above irrelevant prompts that name the subject."""
        new = (self.limits < 0).nonzero()[:, 0]
        if not len(new):
            return
        self.limits[new] = min(self.space.limit, self._usual_limit(), _ALIKE)
        for candidate, score in self._compared(background.texts, {int(i) for i in new}):
            if candidate.same:  # it asks for the edit itself
                continue
            above = score + _ABOVE_OTHERS * (1 - score)
            self.limits[candidate.edit] = max(float(self.limits[candidate.edit]), above)

    def _usual_limit(self) -> float:
        """The limit that what the edits ask of their subjects suggests; 1 while they ask too little."""
        places = torch.linspace(0, len(self.ids) - 1, min(len(self.ids), 2 * _SAMPLED)).long().unique().tolist()
        first = {self.known[place].relation: place for place in reversed(places)}
        texts = list(first)[:_SAMPLED]
        if len(texts) < _ENOUGH or not len(self.space.centre):
            return 1.0
        vectors = self.relations[[first[text] for text in texts]]
        both = alike(vectors @ vectors.T, _words_in_common(texts))
        return usual_limit(both[torch.ones_like(both, dtype=torch.bool).triu(1)])

    # -- routing ------------------------------------------------------------------------------------------------------

    def route(self, query: Query, memory: SideMemory) -> Choice:
        """The best edit of each prompt, if it asks the same."""
        if not self.ids:
            return Choice.base(len(query))
        best: dict[int, tuple[tuple[float, ...], _Candidate, float]] = {}
        for candidate, score in self._compared(query.texts):
            fires = score > self._limit(candidate.edit)
            rank = (float(fires), float(candidate.same), float(candidate.named), score, float(candidate.edit))
            if candidate.row not in best or rank > best[candidate.row][0]:
                best[candidate.row] = rank, candidate, score
        memories, scores, limits = [BASE] * len(query), [-1.0] * len(query), [float("inf")] * len(query)
        nearest: list[str | None] = [None] * len(query)
        for row, (order, candidate, score) in best.items():
            memories[row] = int(self.shards[candidate.edit]) if order[0] else BASE
            scores[row], limits[row] = score, self._limit(candidate.edit)
            nearest[row] = self.ids[candidate.edit]
        found = torch.tensor(memories, dtype=torch.long)
        return Choice(found, torch.tensor(scores), torch.tensor(limits), tuple(nearest))

    def _limit(self, place: int) -> float:
        """An edit's limit; the space's own until it is calibrated."""
        found = float(self.limits[place])
        return found if found >= 0 else self.space.limit

    def _compared(self, texts: Sequence[str], among: set[int] | None = None) -> list[tuple[_Candidate, float]]:
        """The candidates of prompts, each with how alike it asks, in [-1, 1]; the base reads only what must be read."""
        found = [
            candidate
            for row, text in enumerate(texts)
            for candidate in self._candidates(row, text)
            if among is None or candidate.edit in among
        ]
        open_ones = [candidate for candidate in found if not candidate.same]
        if not open_ones:
            return [(candidate, 1.0) for candidate in found]
        vectors = self._vectors([candidate.relation for candidate in open_ones], anew=among is not None)
        own = self.relations[torch.tensor([candidate.edit for candidate in open_ones])]
        words = [share_in_common(stems(c.relation), stems(self.known[c.edit].relation)) for c in open_ones]
        scores = alike((vectors * own).sum(-1), torch.tensor(words)).clamp(-1, _ALIKE).tolist()
        said = dict(zip(map(id, open_ones), scores, strict=True))
        return [(candidate, said.get(id(candidate), 1.0)) for candidate in found]

    def _candidates(self, row: int, text: str) -> list[_Candidate]:
        found = [
            _Candidate(row, place, "", True, len(self.known[place].subject))
            for place in self._exact.get(_exactly(text), ())
        ]
        if found:
            return found
        by_edit: dict[int, list[_Candidate]] = defaultdict(list)
        for window in asking.windows(text):
            spelled = asking.spellings(window)
            places = sorted({place for key in {*spelled, *_pairs(spelled)} for place in self._with(key)})
            long = len(asking.sentences(window)) if len(places) else 0
            for place in places:
                if by_edit.get(place) and long != self.known[place].sentences:
                    continue  # the likeliest part that names it is enough, but for one that is as long as the edit's
                candidate = self._candidate(row, place, window)
                if candidate is not None:
                    by_edit[place].append(candidate)
        longest = _longest_names({place: self.known[place].subject for place, parts in by_edit.items() if parts})
        return [candidate for place in longest for candidate in by_edit[place]]

    def _with(self, key: str) -> Iterable[int]:
        """The edits that are entered under a word or a pair of words, in the plural too."""
        yield from self._index.get(key, ())
        if key.endswith("s"):
            yield from self._index.get(key[:-1], ())

    def _candidate(self, row: int, place: int, window: str) -> _Candidate | None:
        """The window as a candidate for an edit; None where it is about something else, or plainly asks something
        else."""
        known = self.known[place]
        if known.code:  # signs count: only the same signs are the same
            _, found, after = f" {asking.signs(window)} ".rpartition(f" {asking.signs(known.asked)} ")
            same = bool(found) and all(map(asking.is_courtesy, asking.sentences(after)))
            return _Candidate(row, place, "", True, len(known.subject)) if same else None
        relation = _masked(window, known.subject) if known.subject else window
        if relation is None or asking.negated(relation) != known.denies or _numbers(relation) != known.numbers:
            return None
        if not known.subject and self._in_common(known.asked, window) < _UNNAMED:
            return None
        same = asking.says_the_same(relation, known.relation)
        return _Candidate(row, place, relation, same, len(known.subject))

    def _in_common(self, one: str, other: str) -> float:
        """The weighted share of the words of either text that both have; rare words weigh more."""
        a, b = set(asking.spellings(one)), set(asking.spellings(other))
        weight = {word: 1 / (1 + self._frequent.get(word, 0)) for word in a | b}
        return sum(weight[word] for word in a & b) / max(sum(weight.values()), 1e-9)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is known of the edits, and what was learnt before them."""
        state = self.state_beside_rows() | {"relations": self.relations, "numbers": self.numbers}
        return state | {"ids": list(self.ids), "texts": self._texts()}

    def _texts(self, start: int = 0, stop: int | None = None) -> list[list[str]]:
        return [[" ".join(known.subject), known.asked] for known in self.known[start:stop]]

    def state_beside_rows(self) -> dict[str, Any]:
        """What changes with every calibration, and what is there once."""
        return {
            "shards": self.shards,
            "limits": self.limits,
            "next_number": self.next_number,
            "frequent": dict(self._frequent),
            "limit": self.space.limit,
            **{field: getattr(self.space, field) for field in _SPACE},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accepts what :meth:`state_dict` gave."""
        for field in ("shards", "limits", "relations", "numbers"):
            setattr(self, field, state[field].cpu().clone())
        self.next_number = max(self.next_number, int(state["next_number"]))  # never given twice
        self._frequent = dict(state["frequent"])
        self._vectors_of = {}
        self.space = RelationSpace(state["centre"].cpu(), state["projection"].cpu(), float(state["limit"]))
        self.ids, self.known, self._index, self._exact = [], [], {}, {}
        self._append(list(state["ids"]), state["texts"])

    def rows(self) -> Rows:
        """The edits' ids, texts and vectors."""

        def take(start: int, stop: int) -> dict[str, Tensor]:
            said = json.dumps([self.ids[start:stop], self._texts(start, stop)]).encode()
            return {
                "said": torch.frombuffer(bytearray(said), dtype=torch.uint8),
                "relations": self.relations[start:stop],
            }

        return Rows(self.numbers, take)

    @staticmethod
    def state_of_rows(state: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
        """The whole state again."""
        ids: list[str] = []
        texts: list[list[str]] = []
        for part in parts:
            names, said = json.loads(part.tensors["said"].numpy().tobytes())
            for id, text, kept in zip(names, said, part.kept.tolist(), strict=True):
                if kept:
                    ids.append(id)
                    texts.append(text)
        plain = {name: joined(parts, name) for name in (NUMBERS, *_FIXED)}
        return {**state, "ids": ids, "texts": texts, **plain}


def _pairs(words: Sequence[str]) -> list[str]:
    """Each two words that stand side by side: few names share them, where many share a word."""
    return [f"{one} {other}" for one, other in pairwise(words)]


def _exactly(text: str) -> str:
    """A text as one that is the same is found: its words, or of code its signs."""
    return asking.signs(text) if asking.is_code(text) else " ".join(asking.spellings(text))


def _words_in_common(texts: Sequence[str]) -> Tensor:
    """(n, n) the weighted share of word stems that each two have in common."""
    held = [stems(text) for text in texts]
    column = {stem: i for i, stem in enumerate(sorted(set().union(*held)))}
    holds = torch.zeros(len(texts), len(column))
    for row, own in enumerate(held):
        holds[row, [column[stem] for stem in own]] = 1
    return words_in_common(holds, torch.tensor([stem_weight(stem) for stem in column]))


def _numbers(text: str) -> frozenset[str]:
    return frozenset(word for word in asking.spellings(text) if any(char.isdigit() for char in word))


def _masked(window: str, subject: Sequence[str]) -> str | None:
    """The window with the stand-in for a subject; None where it does not name it, or names something longer."""
    for words in (subject, [*subject[:-1], f"{subject[-1]}s"]):
        found = asking.places(window, words)
        if found and not all(asking.longer_name(window, end) for _, end in found):
            return asking.without(window, words, STAND_IN)
    return None


def _longest_names(subjects: Mapping[int, Sequence[str]]) -> list[int]:
    """The edits whose subject is not a part of another one's that is named too."""
    spelled = {place: f" {' '.join(words)} " for place, words in subjects.items()}
    longer = sorted(set(spelled.values()), key=len, reverse=True)
    return [p for p, own in spelled.items() if not any(own != other and own in other for other in longer)]
