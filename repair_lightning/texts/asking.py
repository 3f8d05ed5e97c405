"""What a text asks: its words, the sentence that holds the question, and whether it names a subject.

Pure functions of texts. Words keep the signs that tell names apart (`C`, `C++`, `C#`, `A-`), and scripts that write no
blanks between words are read character by character. Nothing here knows a tokenizer or a base.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from repair_lightning.texts.joint import unspaced


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SIGNS = frozenset("#%&@*/\\")
_MARKUP = frozenset("*_~`=<>|^")
_APOSTROPHES = "'’ʼ`´"
_ENDS = ".!?…。！？؟।॥։።"
_FULL_WIDTH = "。！？"
_QUESTIONS = "?？؟;՞"
_CLOSERS = "\"'”’»)]}›」』）"
_ABBREVIATIONS = _set(
    """
    mr mrs ms dr st jr sr no vs prof gen sen rep gov inc ltd co corp mt ft approx etc eg ie cf al ca vol fig dept
    lt col sgt capt rev hon op ed bros messrs mme mlle nr bzw usw
    """
)
_NEGATIONS = _set(
    """
    not never neither nor cannot without nicht kein keine keinen niemals nie pas jamais ne nunca jamás não nem
    ikke inte niet geen нет не никогда non mai nigdy değil 不 没 非 無 未 別
    """
)
_CONTRACTED = re.compile(r"\b\w+n['’]t\b")
_CODE = re.compile(r"\w\(|[{};=\[\]\\]|^\s+\S|\n\s*\S", re.MULTILINE)
COURTESY = _set(
    """
    please kindly thanks thank you tell me us can could would will do does know say let i we want to like asked
    ask asking question a an the is are was were it s so well now then ok okay hi hello hey dear just quickly
    really exactly again bitte danke por favor gracias merci svp
    """
)
"""Words that change nothing of what is asked."""
_SHORT = 8
"""A sentence of fewer words without a name is courtesy beside a question."""
WINDOW = 4
"""Most sentences that are read together as one question."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a text: its folded spelling and its place."""

    text: str
    start: int
    end: int


@lru_cache(1 << 14)
def words(text: str) -> tuple[Word, ...]:
    """The words of a text, folded (NFKC, without case) and with the signs that stand to them."""
    found: list[Word] = []
    start: int | None = None
    for i, char in enumerate(text):
        kind = _kind(text, i, char, start)
        if kind == "word":
            start = i if start is None else start
            continue
        if start is not None:
            _take(found, text, start, i)
            start = None
        if kind == "alone":
            found.append(Word(_fold(char), i, i + 1))
    if start is not None:
        _take(found, text, start, len(text))
    return tuple(found)


def _kind(text: str, i: int, char: str, start: int | None) -> str:
    """`word` for a character that belongs to a word, `alone` for one that is a word, else `between`."""
    if unspaced(char):
        return "alone" if char.isalnum() else "between"
    category = unicodedata.category(char)
    if char.isalnum() or char == "_" or category[0] == "M":
        return "word"
    if char in _APOSTROPHES:
        return "between"
    if category[0] == "S" or char in _SIGNS:
        return "word"
    before, after = text[i - 1 : i], text[i + 1 : i + 2]
    if char in ".,:" and before.isdigit() and after.isdigit():
        return "word"
    if char == "." and after.isalpha() and (not before or before.isspace()):
        return "word"  # .NET
    if unicodedata.category(char) == "Pd":
        number = after.isdigit() and not before.isalnum()
        grade = start is not None and not after.isalnum() and not unspaced(after or " ") and i - start <= 2
        return "word" if number or grade else "between"
    return "between"


def _take(found: list[Word], text: str, start: int, end: int) -> None:
    """A run of word characters, without what only marks it up."""
    while end - start > 2 and text[start] in _MARKUP and text[end - 1] == text[start]:
        start, end = start + 1, end - 1
    found.append(Word(_fold(text[start:end]), start, end))


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def spellings(text: str) -> tuple[str, ...]:
    """The folded words of a text."""
    return tuple(word.text for word in words(text))


def sentences(text: str) -> list[str]:
    """A text cut after each sentence and at each line; an initial or an abbreviation ends none."""
    return [part for line in text.split("\n") for part in _cut(line) if part.strip()]


def _cut(line: str) -> Iterator[str]:
    start = 0
    for i, char in enumerate(line):
        if char not in _ENDS or (i + 1 < len(line) and line[i + 1] in _ENDS):
            continue
        end = i + 1
        while end < len(line) and line[end] in _CLOSERS:
            end += 1
        if char not in _FULL_WIDTH and (end >= len(line) or not line[end].isspace()):
            continue
        if char == "." and not _ends_sentence(line[start:i], line[end:].lstrip()):
            continue
        yield line[start:end].strip()
        start = end
    yield line[start:].strip()


def _ends_sentence(before: str, after: str) -> bool:
    last = re.split(r"[\s.(]", before)[-1]
    initial = len(last) == 1 and last.isupper()
    return not initial and last.casefold() not in _ABBREVIATIONS and not after[:1].islower()


def is_question(sentence: str) -> bool:
    """Whether a sentence ends with a question mark."""
    return sentence.rstrip(_CLOSERS + " ").endswith(tuple(_QUESTIONS))


def _is_courtesy(sentence: str) -> bool:
    """Whether a sentence is short and names nothing: no number, no word after the first that begins with a capital."""
    found = words(sentence)
    if len(found) >= _SHORT:
        return False
    return not any(word.text[:1].isdigit() or _capital(sentence, word) for word in found[1:]) and not any(
        unspaced(char) for char in sentence
    )


def _capital(text: str, word: Word) -> bool:
    first = text[word.start : word.start + 1]
    return first.isupper() and word.text != "i"


@lru_cache(1 << 12)
def windows(text: str) -> tuple[str, ...]:
    """The parts of a text that may hold its question, the likeliest first.

    The sentence that asks is the last one if it is left open, else the last question, else the last sentence; what is
    only courtesy is passed over. It is read alone, with up to :data:`WINDOW` sentences before it, and with what follows
    it; a text of few sentences also as a whole.
    """
    parts = sentences(text)
    if len(parts) <= 1:
        return (text.strip(),)
    at = _asking(parts)
    found = [" ".join(parts[max(0, at - n) : at + 1]) for n in range(WINDOW)]
    if at + 1 < len(parts):
        found += [" ".join(parts[max(0, at - n) :]) for n in range(2)]
    if len(parts) <= 2 * WINDOW:
        found.append(text.strip())
    return tuple(dict.fromkeys(found))


def _asking(parts: Sequence[str]) -> int:
    last = len(parts) - 1
    open_end = not parts[last].rstrip(_CLOSERS + " ").endswith(tuple(_ENDS))
    if open_end and not _is_courtesy(parts[last]):
        return last
    asked = [i for i, part in enumerate(parts) if is_question(part)]
    told = [i for i, part in enumerate(parts) if not _is_courtesy(part)]
    return next((i for i in reversed(asked) if not _is_courtesy(parts[i])), (asked or told or [last])[-1])


def negated(text: str) -> bool:
    """Whether a text denies something."""
    return bool(_CONTRACTED.search(text.casefold())) or not _NEGATIONS.isdisjoint(spellings(text))


def is_code(text: str) -> bool:
    """Whether a text looks like code, in which every sign counts."""
    return bool(_CODE.search(text.strip()))


def signs(text: str) -> str:
    """A text as code is compared: without the white space around it, and with single blanks inside."""
    return " ".join(text.split())


def places(text: str, subject: Sequence[str]) -> list[tuple[int, int]]:
    """Where the words of a subject stand one after the other in a text, as (start, end)."""
    known = words(text)
    found, n, i = [], len(subject), 0
    while n and i + n <= len(known):
        if all(known[i + k].text == subject[k] for k in range(n)):
            found.append((known[i].start, known[i + n - 1].end))
            i += n
        else:
            i += 1
    return found


def longer_name(text: str, end: int) -> bool:
    """Whether a name that ends at a place goes on with another capitalised word: then it is another name."""
    found = re.match(r"[ \u00a0]([^\W\d_]\S*)", text[end:])
    following = found.group(1) if found else ""
    return following[:1].isupper() and following[:2] != "I " and not text.isupper() and following != "I"


def without(text: str, subject: Sequence[str], stand_in: str) -> str | None:
    """A text with a stand-in where it names a subject; None where it does not name it in one piece."""
    found = places(text, subject)
    if not found:
        return None
    parts, at = [], 0
    for start, end in found:
        parts += [text[at:start], stand_in]
        at = end
    return "".join([*parts, text[at:]])


def says_the_same(one: str, other: str) -> bool:
    """Whether two texts have the same words but for courtesy."""
    plain = [[word for word in spellings(text) if word not in COURTESY] for text in (one, other)]
    return bool(plain[0]) and plain[0] == plain[1]
