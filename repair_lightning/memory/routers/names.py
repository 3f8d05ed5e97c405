"""Which edits a prompt may be about: those whose subject it names, found by an index from words to edits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from repair_lightning.texts import asking
from repair_lightning.texts.relations import STAND_IN

_UNNAMED = 0.75
"""Share of the words, weighted, that an edit without a subject and a prompt must have in common."""


@dataclass(frozen=True, slots=True)
class Known:
    """What an edit's prompt asks, as it is compared: with the words of its subject (none where the prompt does not name
    it), as it was written, and with the stand-in; whether every sign counts, whether it denies something, its words
    with digits outside the subject, and how many sentences it has."""

    subject: tuple[str, ...]
    asked: str
    relation: str
    code: bool
    denies: bool
    numbers: frozenset[str]
    sentences: int

    @classmethod
    def of(cls, subject: str, asked: str) -> Known:
        """From an edit's subject and what its prompt asks."""
        words = asking.spellings(subject)
        masked = asking.without(asked, words, STAND_IN) if words else None
        named = words if masked is not None else ()
        relation = masked if masked is not None else asked
        code, denies, sentences = asking.is_code(asked), asking.negated(relation), len(asking.sentences(asked))
        return cls(named, asked, relation, code, denies, _numbers(relation), sentences)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A part of a prompt that may ask what an edit is about: the prompt's row, the edit's place, the sentence with the
    stand-in, whether it says the same words, and how many words of the subject it names."""

    row: int
    edit: int
    relation: str
    same: bool
    named: int


class NameIndex:
    """Edits by the words of their subjects; a place is an edit's number in the order of entry."""

    def __init__(self, frequent: Mapping[str, int] | None = None) -> None:
        self.known: list[Known] = []
        self.frequent = Counter(frequent or {})
        """How many irrelevant prompts hold a word; rare words are looked up first."""
        self._index: dict[str, list[int]] = {}
        self._exact: dict[str, list[int]] = {}

    def count(self, texts: Iterable[str]) -> None:
        """Learn from irrelevant prompts which words are common."""
        self.frequent = Counter(word for text in texts for word in dict.fromkeys(asking.spellings(text)))

    def append(self, known: Known) -> None:
        """Enter an edit."""
        place = len(self.known)
        self.known.append(known)
        self._exact.setdefault(_exactly(known.asked), []).append(place)
        words = known.subject or asking.spellings(known.asked)
        keys = _pairs(known.subject) or words
        if keys:
            rarest = min(keys, key=lambda key: (max(self.frequent[word] for word in key.split()), -len(key)))
            self._index.setdefault(rarest, []).append(place)

    def keep(self, places: Sequence[int]) -> None:
        """Drop all edits but those at some places."""
        kept = [self.known[place] for place in places]
        self.known, self._index, self._exact = [], {}, {}
        for known in kept:
            self.append(known)

    def candidates(self, row: int, text: str) -> list[Candidate]:
        """The parts of a prompt, of row `row`, that may ask what an edit is about."""
        if exact := self._exact.get(_exactly(text)):
            return [Candidate(row, place, "", True, len(self.known[place].subject)) for place in exact]
        by_edit: dict[int, list[Candidate]] = defaultdict(list)
        for window in asking.windows(text):
            spelled = asking.spellings(window)
            keys = {*spelled, *_pairs(spelled)}
            keys |= {key[:-1] for key in keys if key.endswith("s")}  # in the plural too
            places = sorted({place for key in keys for place in self._index.get(key, ())})
            long = len(asking.sentences(window)) if len(places) else 0
            for place in places:
                if by_edit.get(place) and long != self.known[place].sentences:
                    continue  # the likeliest part that names it is enough, but for one that is as long as the edit's
                candidate = self._candidate(row, place, window)
                if candidate is not None:
                    by_edit[place].append(candidate)
        names = {place: f" {' '.join(self.known[place].subject)} " for place, parts in by_edit.items() if parts}
        longer = sorted(set(names.values()), key=len, reverse=True)
        longest = [p for p, own in names.items() if not any(own != other and own in other for other in longer)]
        return [candidate for place in longest for candidate in by_edit[place]]

    def _candidate(self, row: int, place: int, window: str) -> Candidate | None:
        """The window as a candidate for an edit; None where it is about something else, or plainly asks something
        else."""
        known = self.known[place]
        if known.code:  # signs count: only the same signs are the same
            _, found, after = f" {asking.signs(window)} ".rpartition(f" {asking.signs(known.asked)} ")
            same = bool(found) and all(map(asking.is_courtesy, asking.sentences(after)))
            return Candidate(row, place, "", True, len(known.subject)) if same else None
        relation = _masked(window, known.subject) if known.subject else window
        if relation is None or asking.negated(relation) != known.denies or _numbers(relation) != known.numbers:
            return None
        if not known.subject and self._in_common(known.asked, window) < _UNNAMED:
            return None
        same = asking.says_the_same(relation, known.relation)
        return Candidate(row, place, relation, same, len(known.subject))

    def _in_common(self, one: str, other: str) -> float:
        """The weighted share of the words of either text that both have; rare words weigh more."""
        a, b = set(asking.spellings(one)), set(asking.spellings(other))
        weight = {word: 1 / (1 + self.frequent[word]) for word in a | b}
        return sum(weight[word] for word in a & b) / max(sum(weight.values()), 1e-9)


def _pairs(words: Sequence[str]) -> list[str]:
    """Each two words that stand side by side: few names share them, where many share a word."""
    return [f"{one} {other}" for one, other in pairwise(words)]


def _exactly(text: str) -> str:
    """A text as one that is the same is found: its words, or of code its signs."""
    return asking.signs(text) if asking.is_code(text) else " ".join(asking.spellings(text))


def _numbers(text: str) -> frozenset[str]:
    return frozenset(word for word in asking.spellings(text) if any(char.isdigit() for char in word))


def _masked(window: str, subject: Sequence[str]) -> str | None:
    """The window with the stand-in for a subject; None where it does not name it, or names something longer."""
    for words in (subject, [*subject[:-1], f"{subject[-1]}s"]):
        found = asking.places(window, words)
        if found and not all(asking.longer_name(window, end) for _, end in found):
            return asking.without(window, words, STAND_IN)
    return None
