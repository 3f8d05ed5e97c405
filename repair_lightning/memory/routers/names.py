"""Which edits a prompt may be about: those whose subject it names, found by an index from words to edits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from repair_lightning.texts import asking
from repair_lightning.texts.relations import STAND_IN

_UNNAMED = 0.75
"""Share of the words, weighted, that an edit without a subject and a prompt must have in common."""
_NO_WORD = ""
"""In the index, the word of texts that have none."""


class Asks(NamedTuple):
    """What is compared of an edit's prompt: what it asks, with the stand-in for its subject, whether every sign counts,
    whether it denies something, its words with digits outside the subject, what makes another person of a role, and how
    many sentences it has."""

    relation: str
    code: bool
    denies: bool
    numbers: frozenset[str]
    roles: asking.Roles
    sentences: int


@dataclass(slots=True)
class Known:
    """An edit's prompt: the words of its subject, none where the prompt does not name it, and what was asked."""

    subject: tuple[str, ...]
    asked: str
    _asks: Asks | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, subject: str, asked: str) -> Known:
        """From an edit's subject and what its prompt asks."""
        words = asking.spellings(subject)
        return cls(words if words and asking.places(asked, words) else (), asked)

    @property
    def asks(self) -> Asks:
        """What is compared; found when it is first asked for, as most edits of a large memory never are."""
        if self._asks is None:
            relation = self.relation
            code, denies = asking.is_code(self.asked), asking.negated(relation)
            told_apart = _numbers(relation), asking.roles_of(relation)
            self._asks = Asks(relation, code, denies, *told_apart, len(asking.sentences(self.asked)))
        return self._asks

    @property
    def relation(self) -> str:
        """What is asked, with the stand-in for the subject."""
        return (asking.without(self.asked, self.subject, STAND_IN) if self.subject else None) or self.asked


@dataclass(frozen=True, slots=True)
class Candidate:
    """A part of a prompt that may ask what an edit is about: the prompt's row, the edit's number, the sentence with the
    stand-in, whether it says the same words, and how many words of the subject it names."""

    row: int
    edit: int
    relation: str
    same: bool
    named: int


class NameIndex:
    """Edits by the words of their subjects, each under a number; later ones have higher numbers."""

    def __init__(self, frequent: Mapping[str, int] | None = None) -> None:
        self.known: dict[int, Known] = {}
        self.frequent = Counter(frequent or {})
        """How many irrelevant prompts hold a word; rare words are looked up first."""
        self._index: dict[str, list[int]] = {}
        self._keys: dict[int, str] = {}  # under which of its words an edit is in the index

    def count(self, texts: Iterable[str]) -> None:
        """Learn from irrelevant prompts which words are common."""
        self.frequent = Counter(word for text in texts for word in dict.fromkeys(asking.spellings(text)))

    def enter(self, number: int, known: Known) -> None:
        """Enter an edit."""
        self.known[number] = known
        words = known.subject or asking.spellings(known.asked) or (_NO_WORD,)
        pairs = _pairs(known.subject)
        rarest = min(pairs or words, key=lambda key: (self._met(key, bool(pairs)), -len(key)))
        self._keys[number] = rarest
        self._index.setdefault(rarest, []).append(number)

    def _met(self, key: str, pair: bool) -> int:
        """How often a key is likely to be met in vain: it is in irrelevant prompts, and of a pair, many edits are under
        it. Who names a subject names all its pairs, so any of them finds the edit."""
        often = 1 + max((self.frequent[word] for word in key.split()), default=0)
        return often * (1 + len(self._index.get(key, ()))) if pair else often

    def remove(self, number: int) -> None:
        """Drop an edit."""
        del self.known[number]
        key = self._keys.pop(number)
        self._index[key].remove(number)
        if not self._index[key]:
            del self._index[key]

    def _under(self, spelled: Sequence[str]) -> list[int]:
        """The edits that are in the index under some words, or two that stand side by side."""
        keys = {*spelled, *_pairs(spelled)}
        keys |= {key[:-1] for key in keys if key.endswith("s")}  # in the plural too
        return sorted({number for key in keys for number in self._index.get(key, ())})

    def candidates(self, row: int, text: str) -> list[Candidate]:
        """The parts of a prompt, of row `row`, that may ask what an edit is about."""
        exact, near = _exactly(text), self._under(asking.spellings(text) or (_NO_WORD,))
        if alike := [number for number in near if _exactly(self.known[number].asked) == exact]:
            return [Candidate(row, number, "", True, len(self.known[number].subject)) for number in alike]
        by_edit: dict[int, list[Candidate]] = defaultdict(list)
        for window in asking.windows(text):
            numbers = self._under(asking.spellings(window))
            long = len(asking.sentences(window)) if numbers else 0
            for number in numbers:
                if by_edit.get(number) and long != self.known[number].asks.sentences:
                    continue  # the likeliest part that names it is enough, but for one that is as long as the edit's
                candidate = self._candidate(row, number, window)
                if candidate is not None:
                    by_edit[number].append(candidate)
        names = {number: f" {' '.join(self.known[number].subject)} " for number, parts in by_edit.items() if parts}
        longer = sorted(set(names.values()), key=len, reverse=True)
        longest = [p for p, own in names.items() if not any(own != other and own in other for other in longer)]
        return [candidate for number in longest for candidate in by_edit[number]]

    def wanted_in_text(self, text: str) -> list[int]:
        """The edits about whose subject a prompt asks for a text, the latest last; of names within others the longest
        count."""
        for window in asking.windows(text):
            found, spelled = {}, asking.spellings(window)
            asks = asking.TEXT_ORDERS.intersection(spelled) and not asking.only_quoted(window, text)
            for number in self._under(spelled) if asks else ():
                subject = self.known[number].subject
                request = _masked(window, subject) if subject else None
                if request is not None and asking.wants_text(request, STAND_IN):
                    found[number] = len(subject)
            if found:
                return [number for number, size in found.items() if size == max(found.values())]
        return []

    def _candidate(self, row: int, number: int, window: str) -> Candidate | None:
        """The window as a candidate for an edit; None where it is about something else, or plainly asks something
        else."""
        known = self.known[number]
        asks = known.asks
        if asks.code:  # signs count: only the same signs are the same
            _, found, after = f" {asking.signs(window)} ".rpartition(f" {asking.signs(known.asked)} ")
            same = bool(found) and all(map(asking.is_courtesy, asking.sentences(after)))
            return Candidate(row, number, "", True, len(known.subject)) if same else None
        relation = _masked(window, known.subject) if known.subject else window
        if relation is None or asking.negated(relation) != asks.denies or _numbers(relation) != asks.numbers:
            return None
        if asking.roles_of(relation).other(asks.roles):
            return None
        if not known.subject and self._in_common(known.asked, window) < _UNNAMED:
            return None
        same = asking.says_the_same(relation, asks.relation)
        return Candidate(row, number, relation, same, len(known.subject))

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
